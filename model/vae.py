"""Another autoencoder in place of the checkpoint's own, such as the small AutoencoderTiny."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encache.errors import CheckpointError
from encache.files import parse_json
from encache.model.hub import CONFIG, find_part, short_name
from encache.model.spec import ImageSpec
from encache.model.weights import (
    choose_variant,
    digest_of,
    reason_of,
    weight_files,
)

_CLASSES = ("AutoencoderKL", "AutoencoderTiny")


@dataclass(frozen=True)
class Autoencoder:
    """An autoencoder that replaces the model's own.

    Attributes:
        folder: as diffusers writes it.
        variant: of its weights, such as "fp16", if it has it.
    """

    folder: Path
    variant: str = ""

    @property
    def name(self) -> str:
        return short_name(self.folder)

    @property
    def fingerprint(self) -> str:
        weights = weight_files(self.folder, choose_variant([self.folder], self.variant))
        return digest_of([self.folder / CONFIG, *weights]).hex()

    def apply(self, pipeline: Any) -> None:
        """Load it in the place of the pipeline's, in the UNet's precision.

        Raises:
            CheckpointError: it is damaged, or its latents are of another kind than the UNet's.
        """
        import diffusers

        folder = self.folder
        name = parse_json((folder / CONFIG).read_bytes())["_class_name"]
        try:
            vae = getattr(diffusers, name).from_pretrained(
                folder,
                dtype=pipeline.unet.dtype,
                local_files_only=True,
                use_safetensors=True,
                variant=choose_variant([folder], self.variant) or None,
            )
        except Exception as error:  # damaged files surface as any exception of three libraries
            raise CheckpointError(f"{folder} could not be loaded: {reason_of(error)}") from error
        old, new = (
            (one.config.latent_channels, ImageSpec.downscale_of(one.config))
            for one in (pipeline.vae, vae)
        )
        if new != old:
            raise CheckpointError(
                f"{folder} has {new[0]} latent channels at 1/{new[1]} of the picture's size, this "
                f"model {old[0]} at 1/{old[1]}."
            )
        pipeline.register_modules(vae=vae)


def find_vae(named: str | Path, variant: str = "") -> Autoencoder:
    """An autoencoder by its folder or hub id, looked at without loading it.

    Raises:
        CheckpointError: there is none that Stable Diffusion can use, or only pickled weights.
    """
    return Autoencoder(find_part(named, _CLASSES, "diffusers autoencoder"), variant)
