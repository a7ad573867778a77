"""What a model's tensors and pictures are like, and where it may be cut; needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from encache.errors import CheckpointError, EncacheError

#: Where the denoiser is cut: in a UNet one of `CUTS`, in a transformer the number of a block.
Cut = str
#: Of a UNet: nowhere, after the mid block, or after up_blocks[0], [1] or [2].
CUTS: tuple[Cut, ...] = ("none", "mid", "up0", "up1", "up2")
#: The whole denoiser is one engine; what is cached is its output.
NO_CUT: Cut = "none"
#: Where there are features, which can be cached or trained.
FEATURE_CUTS: tuple[Cut, ...] = tuple(cut for cut in CUTS if cut != NO_CUT)
#: The cheapest, and with the default blend the nearest to the full sampler (docs/study.md).
DEFAULT_CUT: Cut = NO_CUT

#: A number, or a product of numbers and of sizes by name, such as "B", "h/4", "K*B"; quotients are
#: rounded up, as a model does that halves odd sides.
Dimension = int | str


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor whose sizes may be free.

    Attributes:
        name: in graphs, engines and tables.
        shape: its dimensions.
        dtype: "model" for the model's own, or "float32", or "int64".
        values: what it usually holds: normal numbers of this standard deviation, or whatever lies
            between two bounds.
    """

    name: str
    shape: tuple[Dimension, ...]
    dtype: str = "model"
    values: float | tuple[float, float] = 1.0

    def size(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape where the free sizes are these."""
        return tuple(_measure(dimension, sizes) for dimension in self.shape)

    def bind(self, sizes: Mapping[str, int]) -> "TensorSpec":
        """The same tensor where these sizes are no longer free."""
        return replace(self, shape=tuple(_bind(dimension, sizes) for dimension in self.shape))


def _bind(dimension: Dimension, sizes: Mapping[str, int]) -> Dimension:
    factors = str(dimension).split("*")
    bound = [
        str(_measure(factor, sizes)) if factor.partition("/")[0] in sizes else factor
        for factor in factors
    ]
    numbers = all(factor.isdecimal() for factor in bound)
    return prod(map(int, bound)) if numbers else "*".join(bound)


def _measure(dimension: Dimension, sizes: Mapping[str, int]) -> int:
    if isinstance(dimension, int):
        return dimension
    factors = (factor.partition("/") for factor in dimension.split("*"))
    return prod(
        -(-(int(name) if name.isdecimal() else sizes[name]) // int(divisor or 1))
        for name, _, divisor in factors
    )


@dataclass(frozen=True)
class GraphSpec:
    """What goes into a graph and what comes out, in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def bind(self, sizes: Mapping[str, int]) -> "GraphSpec":
        """The same graph where these sizes are no longer free."""
        inputs, outputs = (
            tuple(one.bind(sizes) for one in part) for part in (self.inputs, self.outputs)
        )
        return replace(self, inputs=inputs, outputs=outputs)


@dataclass(frozen=True)
class ImageSpec:
    """How pictures and latents relate in one model.

    Attributes:
        channels: latent channels.
        sample_size: default latent (height, width).
        downscale: picture pixels per latent pixel and side.
        scaling_factor: latents = encoded picture * scaling_factor.
    """

    channels: int
    sample_size: tuple[int, int]
    downscale: int
    scaling_factor: float

    @property
    def picture_size(self) -> tuple[int, int]:
        """Default picture (height, width) in pixels."""
        height, width = self.sample_size
        return height * self.downscale, width * self.downscale

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Latent height and width of a picture's, which default to the model's own."""
        default_height, default_width = self.picture_size
        height, width = height or default_height, width or default_width
        return height // self.downscale, width // self.downscale

    @classmethod
    def of(cls, unet_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> "ImageSpec":
        """Read it from the configs of a diffusers UNet and autoencoder.

        Raises:
            CheckpointError: the UNet's does not say for which size it was trained, or it reads more
                than latents and text, or its latents are normalised by channel.
        """
        _refuse_more_than_text(unet_config)
        if vae_config.get("latents_mean") or vae_config.get("latents_std"):
            raise CheckpointError(
                "This model's latents are shifted and scaled channel by channel (latents_mean and "
                "latents_std in its autoencoder's config.json), which encache does not carry. Use "
                "diffusers' own pipeline, with encache.enable(pipe)."
            )
        return cls.of_denoiser(unet_config, vae_config)

    @classmethod
    def of_denoiser(
        cls, unet_config: Mapping[str, Any], vae_config: Mapping[str, Any] | None
    ) -> "ImageSpec":
        """Read it from any denoiser's config, of whose pictures a pipeline of its own takes care.

        Args:
            unet_config: of a diffusers UNet or transformer.
            vae_config: of its autoencoder; None where it draws pixels.

        Raises:
            CheckpointError: it does not say for which size it was trained.
        """
        size = unet_config["sample_size"]
        sides = (size, size) if isinstance(size, int) else tuple(size or ())
        if len(sides) != 2:
            raise CheckpointError(
                "The UNet's config.json does not say its sample_size, the latent size it was "
                'trained for. Add it there, for example "sample_size": 64.'
            )
        return cls(
            channels=unet_config["in_channels"],
            sample_size=sides,
            downscale=cls.downscale_of(vae_config) if vae_config else 1,
            scaling_factor=vae_config["scaling_factor"] if vae_config else 1.0,
        )

    @staticmethod
    def downscale_of(vae_config: Mapping[str, Any]) -> int:
        """Picture pixels per latent pixel and side of a diffusers autoencoder."""
        levels = vae_config.get("block_out_channels") or vae_config["decoder_block_out_channels"]
        return 2 ** (len(levels) - 1)


def _refuse_more_than_text(unet_config: Mapping[str, Any]) -> None:
    taken, given = unet_config["in_channels"], unet_config["out_channels"]
    more = {
        "a noise level": unet_config.get("class_embed_type") or unet_config.get("num_class_embeds"),
        "its guidance (time_cond_proj_dim)": unet_config.get("time_cond_proj_dim"),
        f"{taken} channels, and gives {given}": taken != given,
    }
    for what, present in more.items():
        if present:
            raise CheckpointError(
                f"This UNet reads {what}, so it does not draw from a text alone. Open its own "
                "diffusers pipeline and cache that: encache.enable(pipe)."
            )


def rows_per_picture(guidance_scale: float) -> int:
    """Rows of the denoiser per picture and call: two with guidance, which 1 or less turns off."""
    return 2 if guidance_scale > 1 else 1


def check_size(*sides: int) -> None:
    """Raise EncacheError unless every side of a picture is a multiple of 8 pixels."""
    for side in sides:
        if side % 8 or side < 8:
            raise EncacheError(
                f"Height and width must be multiples of 8, not {side}: try {max(8, side // 8 * 8)}."
            )
