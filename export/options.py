"""The options by which commands name models, engines and sizes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from encache.command import typed_options
from encache.contract.dtypes import ENGINE_DTYPES
from encache.model.checkpoint import Checkpoint, fast_model, find_checkpoint
from encache.model.spec import CUTS, DEFAULT_CUT, NO_CUT, Cut, check_size
from encache.options import option


@dataclass(frozen=True)
class ModelOptions:
    """Which model."""

    ckpt: str | None = option(
        help="diffusers folder, hub id, single-file or UNet-only .safetensors. "
        "Default: the model that ships with encache."
    )
    fast: bool = option(
        is_flag=True,
        default=False,
        help="The default model's fine-tuned companion: one encoder run, no guidance.",
    )
    base: str | None = option(help="diffusers folder or hub id that completes a .safetensors file.")
    variant: str | None = option(
        help="Of a folder's weights, such as fp16. Default: the plain ones, or what is there."
    )
    loras: tuple[str, ...] = option(
        "--lora",
        default=(),
        multiple=True,
        help="FILE.safetensors or FILE.safetensors:SCALE, fused into the weights; repeatable.",
    )
    concepts: tuple[str, ...] = option(
        "--concept",
        default=(),
        multiple=True,
        help="FILE.safetensors or FILE.safetensors:TOKEN of textual inversion, or the weights of "
        "Custom Diffusion, as diffusers' scripts write them; repeatable.",
    )
    vae: str | None = option(
        help="Folder or hub id of another autoencoder, such as the small madebyollin/taesd."
    )
    tome: float | None = option(
        type=float, help="ToMe: merge this part of the tokens in self-attention, such as 0.5."
    )

    def find(self, hosted: bool = False) -> Checkpoint:
        """The checkpoint, not loaded yet.

        Args:
            hosted: whether it may belong to a pipeline that keeps its own loop.

        Raises:
            click.UsageError: two options name one.
        """
        if self.fast:
            for name in typed_options({"ckpt", "base", "variant"}):
                raise click.UsageError(f"--fast is a model of its own: leave out {name}.")
        named = fast_model() if self.fast else self.ckpt
        return find_checkpoint(
            named,
            self.base,
            loras=self.loras,
            concepts=self.concepts,
            vae=self.vae,
            variant=self.variant,
            tome=self.tome,
            hosted=hosted,
        )


class _CutType(click.Choice):
    """One of a UNet's cuts, or the number of a transformer's block."""

    def __init__(self) -> None:
        super().__init__(CUTS)

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> Cut:
        if isinstance(value, str) and value.isdecimal():
            return str(int(value))
        return super().convert(value, parameter, context)


@dataclass(frozen=True)
class EngineOptions:
    """How it is run, and where its engines are."""

    cut: Cut | None = option(
        type=_CutType(),
        show_default=f"the weights' own, or {DEFAULT_CUT}",
        help="What is cached: the output (none), or the features at this place of the UNet; of a "
        "transformer behind the block of this number.",
    )
    dtype: str | None = option(
        type=click.Choice(ENGINE_DTYPES),
        help="Default: fp32, fp16 for TensorRT, bf16 for OpenVINO; TensorRT-RTX has int8 and fp8.",
    )


def refuse_without_cut(cut: Cut, name: str) -> None:
    """Raise click.UsageError if this option was typed, and the denoiser is whole."""
    for typed in typed_options({name}) if cut == NO_CUT else ():
        raise click.UsageError(f"{typed} means nothing without a --cut: nothing is decoded.")


@dataclass(frozen=True)
class EngineDir:
    """Where engines are found and built."""

    engine_dir: Path = option(
        type=click.Path(path_type=Path),
        default=Path("engines"),
        help="Parent of the engine folders.",
    )


@dataclass(frozen=True)
class SizeOptions:
    """How large pictures are."""

    height: int | None = option(
        type=click.IntRange(8), help="Pixels. Default: the model's own size."
    )
    width: int | None = option(
        type=click.IntRange(8), help="Pixels. Default: the model's own size."
    )

    def check(self) -> None:
        """Raise EncacheError unless they are multiples of 8."""
        check_size(*(side for side in (self.height, self.width) if side))
