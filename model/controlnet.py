"""ControlNets on disk or on the hub, opened beside the model whose features they add to."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from encache.errors import CheckpointError
from encache.files import parse_json
from encache.model.hub import find_folder
from encache.model.weights import (
    choose_variant,
    digest_of,
    reason_of,
    refuse_without_safetensors,
    weight_files,
)

if TYPE_CHECKING:
    import torch

_CONFIG = "config.json"
_CLASS = "ControlNetModel"


def find_controlnet(named: str) -> Path:
    """The folder of a ControlNet that a path or a hub id names, looked at without loading it.

    Raises:
        CheckpointError: there is none, or only pickled weights.
    """
    folder = find_folder(named, _download)
    try:
        name = parse_json((folder / _CONFIG).read_bytes())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is no ControlNet: its {_CONFIG} cannot be read ({error!r})."
        ) from error
    if name != _CLASS:
        raise CheckpointError(f"{folder} is a {name}; encache takes a {_CLASS}.")
    refuse_without_safetensors(folder)
    return folder


def fingerprint_of(folder: Path) -> str:
    """sha256 over a ControlNet's files: equal for equal ones, wherever."""
    return digest_of([folder / _CONFIG, *weight_files(folder, choose_variant([folder]))]).hex()


def load_controlnet(folder: Path, dtype: "torch.dtype") -> Any:
    """Open a ControlNet in a precision.

    Raises:
        CheckpointError: it is damaged.
    """
    import diffusers

    try:
        return diffusers.ControlNetModel.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            variant=choose_variant([folder]) or None,
        )
    except Exception as error:  # damaged files surface as any exception of three libraries
        raise CheckpointError(f"{folder} could not be loaded: {reason_of(error)}") from error


def _download(hub_id: str) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(
        hub_id, allow_patterns=[_CONFIG, "diffusion_pytorch_model*.safetensors"]
    )
