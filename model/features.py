"""The one table of the tensors that cross the cut; split, export, engines and sampler read it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from encache.errors import CheckpointError, EncacheError

#: Where the UNet is cut: after the mid block, after up_blocks[0], [1] or [2], or behind its output,
#: which leaves nothing to decode: the features are the noise prediction itself.
Cut = Literal["mid", "up0", "up1", "up2", "out"]
CUTS: tuple[Cut, ...] = get_args(Cut)
#: The cheapest, and with the default blend the nearest to the full sampler (docs/study.md).
DEFAULT_CUT: Cut = "out"


@dataclass(frozen=True)
class Feature:
    """One tensor that crosses the cut: `channels` at 1 / 2**level of the latent's size."""

    name: str
    channels: int
    level: int

    def shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape for latents [batch, 4, height, width]; every halving rounds up."""
        scale = 2**self.level
        return (batch, self.channels, -(-height // scale), -(-width // scale))


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
            CheckpointError: the UNet's does not say for which size it was trained.
        """
        size = unet_config["sample_size"]
        sides = (size, size) if isinstance(size, int) else tuple(size or ())
        if len(sides) != 2:
            raise CheckpointError(
                "The UNet's config.json does not say its sample_size, the latent size it was "
                'trained for. Add it there, for example "sample_size": 64.'
            )
        levels = vae_config.get("block_out_channels") or vae_config["decoder_block_out_channels"]
        return cls(
            channels=unet_config["in_channels"],
            sample_size=sides,
            downscale=2 ** (len(levels) - 1),
            scaling_factor=vae_config["scaling_factor"],
        )


def check_size(*sides: int) -> None:
    """Raise EncacheError unless every side of a picture is a multiple of 8 pixels."""
    for side in sides:
        if side % 8 or side < 8:
            raise EncacheError(
                f"Height and width must be multiples of 8, not {side}: try {max(8, side // 8 * 8)}."
            )


def num_up_blocks_cached(cut: Cut, num_up_blocks: int) -> int:
    """How many of the up blocks run with the encoder.

    Raises:
        CheckpointError: there are too few of them for this cut.
    """
    cached = CUTS.index(cut)
    if cut != "out" and cached >= num_up_blocks:
        choices = ", ".join((*CUTS[:num_up_blocks], "out"))
        raise CheckpointError(
            f"This UNet has only {num_up_blocks} up blocks, which have no cut {cut}. "
            f"Choose one of {choices}."
        )
    return min(cached, num_up_blocks)


def feature_table(unet_config: Mapping[str, Any], cut: Cut) -> tuple[Feature, ...]:
    """List the features of a UNet2DConditionModel config in the order both halves use.

    The skip tensors that the decoder still needs come first, in the order the encoder makes them,
    and the hidden state at the cut comes last.

    Raises:
        CheckpointError: the UNet has too few up blocks for this cut.
    """
    channels = tuple(unet_config["block_out_channels"])
    layers = unet_config["layers_per_block"]
    layers = (layers,) * len(channels) if isinstance(layers, int) else tuple(layers)
    cached = num_up_blocks_cached(cut, len(channels))
    if cut == "out":
        return (Feature("prediction", unet_config["out_channels"], 0),)
    skips = [Feature("skip_0", channels[0], 0)]
    for level, (width, depth) in enumerate(zip(channels, layers, strict=True)):
        levels = [level] * depth + ([level + 1] if level + 1 < len(channels) else [])
        skips += [Feature(f"skip_{len(skips) + i}", width, at) for i, at in enumerate(levels)]
    used = sum(depth + 1 for depth in tuple(reversed(layers))[:cached])
    deepest = len(channels) - 1
    hidden = Feature("hidden", tuple(reversed(channels))[max(cached - 1, 0)], deepest - cached)
    return (*skips[: len(skips) - used], hidden)
