"""Another autoencoder in place of the checkpoint's own, such as the small AutoencoderTiny."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from encache.errors import CheckpointError
from encache.files import parse_json
from encache.model.spec import ImageSpec
from encache.model.weights import choose_variant, reason_of, refuse_without_safetensors

if TYPE_CHECKING:
    import torch

_CLASSES = ("AutoencoderKL", "AutoencoderTiny")
_CONFIG = "config.json"


def check_vae(folder: Path) -> Path:
    """The folder again, if it holds an autoencoder that Stable Diffusion can use.

    Raises:
        CheckpointError: it holds none, or only pickled weights.
    """
    try:
        name = parse_json((folder / _CONFIG).read_bytes())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is no diffusers autoencoder: its {_CONFIG} cannot be read ({error!r})."
        ) from error
    if name not in _CLASSES:
        raise CheckpointError(f"{folder} is a {name}; encache takes {' and '.join(_CLASSES)}.")
    refuse_without_safetensors(folder)
    return folder


def replace_vae(pipeline: Any, folder: Path, dtype: "torch.dtype", variant: str = "") -> None:
    """Load the autoencoder, of this variant if it has it, in the place of the pipeline's.

    Raises:
        CheckpointError: it is damaged, or its latents are of another kind than the UNet's.
    """
    import diffusers

    name = parse_json((folder / _CONFIG).read_bytes())["_class_name"]
    try:
        vae = getattr(diffusers, name).from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            variant=choose_variant([folder], variant) or None,
        )
    except Exception as error:  # damaged files surface as any exception of three libraries
        raise CheckpointError(f"{folder} could not be loaded: {reason_of(error)}") from error
    old, new = (ImageSpec.of(pipeline.unet.config, one.config) for one in (pipeline.vae, vae))
    if new.downscale != old.downscale or vae.config.latent_channels != old.channels:
        raise CheckpointError(
            f"{folder} has {vae.config.latent_channels} latent channels at 1/{new.downscale} of "
            f"the picture's size, this model {old.channels} at 1/{old.downscale}."
        )
    pipeline.register_modules(vae=vae)
