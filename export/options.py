"""The options by which `encache-export` and `encache-run` name the same engines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from encache.command import typed_options
from encache.contract.dtypes import DTYPES
from encache.model.checkpoint import fast_model
from encache.model.spec import CUTS, DEFAULT_CUT

_OPTIONS = (
    click.option(
        "--ckpt",
        help="diffusers folder, hub id, single-file or UNet-only .safetensors. "
        "Default: the model that ships with encache.",
    ),
    click.option(
        "--fast",
        is_flag=True,
        help="The default model's fine-tuned companion: one encoder run, no guidance.",
    ),
    click.option("--base", help="diffusers folder or hub id that completes a .safetensors file."),
    click.option(
        "--variant",
        help="Of a folder's weights, such as fp16. Default: the plain ones, or what is there.",
    ),
    click.option(
        "--lora",
        "loras",
        multiple=True,
        help="FILE.safetensors or FILE.safetensors:SCALE, fused into the weights; repeatable.",
    ),
    click.option(
        "--vae",
        help="Folder or hub id of another autoencoder, such as the small madebyollin/taesd.",
    ),
    click.option(
        "--cut",
        type=click.Choice(CUTS),
        show_default=f"the weights' own, or {DEFAULT_CUT}",
        help="Where the UNet is cut; a later cut caches more of it, out caches all.",
    ),
    click.option(
        "--dtype", type=click.Choice(DTYPES), help="Default: fp32, and fp16 for TensorRT."
    ),
)


def engine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --ckpt, --fast, --base, --variant, --lora, --vae, --cut and --dtype to a command."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def named_model(ckpt: str | None, fast: bool) -> str | Path | None:
    """What the running command's --ckpt or --fast names; None is the default model.

    Raises:
        click.UsageError: both name one.
    """
    if not fast:
        return ckpt
    for option in typed_options({"ckpt", "base", "variant"}):
        raise click.UsageError(f"--fast is a model of its own: leave out {option}.")
    return fast_model()
