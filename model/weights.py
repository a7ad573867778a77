"""Weight files, of which nothing is ever executed."""

import hashlib
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from encache.errors import CheckpointError

_PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
#: As diffusers and transformers write a model's weights: whole or in shards, plain or a variant.
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)"
    r"(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?(?:\.(?P<older>\w+))?\.safetensors"
)


def refuse_pickle(path: Path) -> None:
    """Raise CheckpointError for the name of a pickle, with the command that converts it."""
    if path.suffix.lower() not in _PICKLES:
        return
    # transformers has another name for its weights in each format.
    target = path.with_name(re.sub(r"^pytorch_model", "model", path.stem) + ".safetensors")
    command = shlex.join(["python", "-m", "encache.model.unpickle", str(path), str(target)])
    raise CheckpointError(
        f"{path} is a pickle, and reading a pickle runs whatever code is in it. Take its tensors "
        f"out, which runs nothing: {command}"
    )


def weight_files(folder: Path, variant: str) -> list[Path]:
    """A model's weights of one variant, "" being the plain ones, in a stable order."""
    return [path for path in sorted(folder.glob("*")) if _variant_of(path) == variant]


def choose_variant(folders: Sequence[Path], wanted: str = "") -> str:
    """The variant to ask diffusers for, which takes plain weights where a model has no such.

    Args:
        folders: of the models that are loaded together.
        wanted: preferred where it is there; otherwise plain weights are, then fp16.

    Raises:
        CheckpointError: some model has neither plain weights nor the others' variant.
    """
    found = [set(map(_variant_of, folder.glob("*"))) - {None} for folder in folders]
    known = sorted({*filter(None, set().union(*found))}, key=lambda name: (name != "fp16", name))
    for variant in (wanted, "", *known):
        if all({variant, ""} & one for one in found) and any(variant in one for one in found):
            return variant
    listed = "; ".join(
        f"{folder.name} has {', '.join(sorted(name or 'plain' for name in one)) or 'none'}"
        for folder, one in zip(folders, found, strict=True)
    )
    raise CheckpointError(f"{folders[0].parent} has no variant of all its weights: {listed}.")


def _variant_of(path: Path) -> str | None:
    match = _WEIGHTS.fullmatch(path.name)
    return (match["variant"] or match["older"] or "") if match else None


def refuse_without_safetensors(folder: Path) -> None:
    """Raise CheckpointError for a model's folder without weights, or with pickled ones alone."""
    if any(_variant_of(path) is not None for path in folder.glob("*")):
        return
    for path in sorted(folder.glob("*")):
        refuse_pickle(path)
    raise CheckpointError(
        f"{folder} holds no weights: they are called diffusion_pytorch_model.safetensors or "
        "model.safetensors. Download the folder again."
    )


def digest_of(files: Iterable[Path]) -> bytes:
    """sha256 over the files' contents and names: equal for equal files, wherever."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
        total.update(os.fsencode(file.name))
    return total.digest()


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
