"""Weight files, of which nothing is ever executed."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from encache.errors import CheckpointError

_PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}


def refuse_pickle(path: Path) -> None:
    """Raise CheckpointError for the name of a pickle, with the command that converts it."""
    if path.suffix in _PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, and reading a pickle runs whatever code is in it. Convert it in "
            'a sandbox: python -c "import sys, torch; from safetensors.torch import save_file; '
            "d = torch.load(sys.argv[1], weights_only=True); d = d.get('state_dict', d); "
            "save_file({k: v.contiguous() for k, v in d.items() if hasattr(v, 'shape')}, "
            f'sys.argv[2])" {path} {path.with_suffix(".safetensors")}'
        )


def refuse_without_safetensors(folder: Path) -> None:
    """Raise CheckpointError for a folder of weights that can only be read by unpickling."""
    if not list(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} holds no .safetensors weights; pickled weights (.bin) are not read because "
            "loading one can run code. Download the safetensors variant."
        )


def reason_of(error: Exception) -> str:
    """The first words of a library's message, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_header(path: Path) -> tuple[set[str], dict[str, str]]:
    """Tensor names and metadata of a safetensors file.

    Raises:
        CheckpointError: it is none, or truncated.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return set(file.keys()), file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a complete safetensors file ({error}).") from error
