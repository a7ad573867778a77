"""`python -m encache.model.unpickle IN OUT`: a pickle's tensors as safetensors; runs none of it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from encache.command import Command
from encache.errors import CheckpointError
from encache.files import check_new, replacing
from encache.model.weights import reason_of

if TYPE_CHECKING:
    from torch import Tensor


class _Inert:
    """Stands in for every class that a pickle names and PyTorch does not know; does nothing."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_pickled_tensors(path: Path) -> "dict[str, Tensor]":
    """The tensors of a .ckpt, .bin or .pt file by name, from its state_dict if it has one.

    PyTorch's restricted unpickler reads it. Training tools leave callbacks and settings beside the
    weights, of classes that may not even be installed: those become empty stand-ins.

    Raises:
        CheckpointError: it is damaged, names something dangerous, or holds no tensors.
    """
    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    try:
        strangers = get_unsafe_globals_in_checkpoint(path)
    except OSError:
        raise
    except Exception:  # an older format, or damage that torch.load will name
        strangers = []
    stand_ins = [(type(name, (_Inert,), {}), name) for name in strangers]
    try:
        with safe_globals(stand_ins):  # type: ignore[arg-type]
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damage surfaces as any exception
        raise CheckpointError(f"{path} cannot be read safely: {reason_of(error)}") from error
    tensors = dict(_tensors(content))
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors by name.")
    return tensors


def _tensors(content: Any) -> "Iterator[tuple[str, Tensor]]":
    import torch

    state = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    for name, value in state.items() if isinstance(state, Mapping) else ():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            # Of its own: safetensors refuses tensors that share memory.
            yield name, value.detach().clone().contiguous()


@click.command(cls=Command)
@click.argument("source", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("target", type=click.Path(path_type=Path))
def main(source: Path, target: Path) -> None:
    """Write the tensors of the pickle SOURCE to TARGET, a .safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    check_new(target)
    tensors = read_pickled_tensors(source)
    try:
        with replacing(target) as temporary:
            save_file(tensors, temporary, {"format": "pt"})
    except SafetensorError as error:  # its own for a full disk
        raise CheckpointError(f"{target} could not be written: {reason_of(error)}") from error
    click.echo(target)


if __name__ == "__main__":
    main()
