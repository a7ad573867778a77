"""ControlNets on disk or on the hub, opened beside the model whose features they add to."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from encache.errors import CheckpointError
from encache.model.hub import CONFIG, find_part
from encache.model.weights import (
    choose_variant,
    digest_of,
    reason_of,
    weight_files,
)

if TYPE_CHECKING:
    import torch


def find_controlnet(named: str) -> Path:
    """The folder of a ControlNet that a path or a hub id names, looked at without loading it.

    Raises:
        CheckpointError: there is none, or only pickled weights.
    """
    return find_part(named, ("ControlNetModel",), "ControlNet")


def fingerprint_of(folder: Path) -> str:
    """sha256 over a ControlNet's files: equal for equal ones, wherever."""
    return digest_of([folder / CONFIG, *weight_files(folder, choose_variant([folder]))]).hex()


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
