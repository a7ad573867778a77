"""The options by which `encache-export` and `encache-run` name the same engines."""

from collections.abc import Callable
from typing import Any

import click

from encache.export.build import DTYPES
from encache.model.features import CUTS, DEFAULT_CUT

_OPTIONS = (
    click.option(
        "--ckpt",
        help="diffusers folder, hub id, single-file or UNet-only .safetensors. "
        "Default: the model that ships with encache.",
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
        default=DEFAULT_CUT,
        show_default=True,
        help="Where the UNet is cut; a later cut caches more of it, out caches all.",
    ),
    click.option(
        "--dtype", type=click.Choice(DTYPES), help="Default: fp32, and fp16 for TensorRT."
    ),
)


def engine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --ckpt, --base, --variant, --lora, --vae, --cut and --dtype to a command."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function
