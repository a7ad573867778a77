"""`encache-export`: from a checkpoint to an engine folder."""

import time
from pathlib import Path

import click

from encache.command import Command
from encache.export.build import BACKENDS, Request, build_engines, find_engines
from encache.export.options import engine_options
from encache.model.checkpoint import find_checkpoint
from encache.model.features import Cut


@click.command(cls=Command)
@engine_options
@click.option("--backend", type=click.Choice(BACKENDS), default="onnxruntime", show_default=True)
@click.option(
    "--engine-dir",
    type=click.Path(path_type=Path),
    default=Path("engines"),
    show_default=True,
    help="Parent of the engine folders.",
)
def main(
    ckpt: str | None, base: str | None, cut: Cut, dtype: str, backend: str, engine_dir: Path
) -> None:
    """Split a Stable Diffusion UNet and export it with its text encoder and image decoder.

    Prints the engine folder. Repeating a finished export does nothing.

    Example: encache-export --ckpt fcr.safetensors --base path/to/stable-diffusion
    """
    request = Request(find_checkpoint(ckpt, base), cut, dtype, backend)
    if finished := find_engines(request, engine_dir):
        click.echo("Nothing to do: this export is finished.", err=True)
        click.echo(finished)
        return
    start = time.perf_counter()
    folder = build_engines(request, engine_dir, lambda line: click.echo(line, err=True))
    click.echo(f"built in {time.perf_counter() - start:.0f} s", err=True)
    click.echo(folder)
