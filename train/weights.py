"""Weights written whole or not at all."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from encache.errors import EncacheError
from encache.files import replacing


@contextmanager
def replacing_weights(path: Path) -> Iterator[Path]:
    """`replacing`, for what safetensors writes; it has its own error for a full disk.

    Raises:
        EncacheError: the file could not be written.
    """
    try:
        with replacing(path) as temporary:
            yield temporary
    except Exception as error:
        raise EncacheError(
            f"{path} could not be written ({error}): check the disk, free some space, then run the "
            "same command again; what was finished is kept."
        ) from error


def write_weights(
    module: nn.Module, path: Path, header: Mapping[str, str], dtype: torch.dtype = torch.float32
) -> None:
    """Write the parameters and buffers of a module, with some strings in the file's header."""
    tensors = module.state_dict().items()
    write_tensors({name: tensor.to(dtype) for name, tensor in tensors}, path, header)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str]) -> None:
    """Write named tensors, with some strings in the file's header."""
    plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with replacing_weights(path) as temporary:
        save_file(plain, temporary, dict(header))
