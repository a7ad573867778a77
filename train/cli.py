"""`encache-train`: train the default model from its public data."""

from pathlib import Path

import click

from encache.command import Command


@click.group()
def main() -> None:
    """Train Stable Diffusion models whose encoder may be cached."""


@main.command(cls=Command)
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="diffusers folder to write."
)
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path),
    default=Path("runs/emoji"),
    show_default=True,
    help="Data and checkpoints; the same command goes on from them.",
)
@click.option(
    "--emoji-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Unpacked emoji package, instead of fetching it with npm.",
)
@click.option("--autoencoder-steps", type=click.IntRange(1), help="Default: the recipe's.")
@click.option(
    "--max-train-steps", type=click.IntRange(1), help="UNet steps. Default: the recipe's."
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: torch's.")
def emoji(
    output: Path,
    work_dir: Path,
    emoji_dir: Path | None,
    autoencoder_steps: int | None,
    max_train_steps: int | None,
    threads: int | None,
) -> None:
    """Train the default model: Twemoji food, animals and plants, 64x64.

    Example: encache-train emoji --output runs/emoji/model
    """
    import torch

    from encache.train import autoencoder, denoiser
    from encache.train.default_model import train_default_model
    from encache.train.emoji import fetch_package, verify_package

    if threads:
        torch.set_num_threads(threads)
    if emoji_dir:
        verify_package(emoji_dir)
    train_default_model(
        emoji_dir or fetch_package(work_dir),
        work_dir,
        output,
        autoencoder_steps or autoencoder.RECIPE.steps,
        max_train_steps or denoiser.RECIPE.steps,
    )
    click.echo(output)
