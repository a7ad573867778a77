"""`encache-train`: fine-tune for caching, or train the default model from its public data."""

from pathlib import Path

import click

from encache.command import Command
from encache.train.fcr_cli import fcr
from encache.train.options import NAMES
from encache.train.shared_cli import shared


@click.group()
def main() -> None:
    """Train Stable Diffusion models whose encoder may be cached."""


@main.command(cls=Command, context_settings=NAMES)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="diffusers folder to write; new, empty, or this command's own.",
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
    help="Folder of the unpacked emoji packages. Default: fetched into --work-dir with npm.",
)
@click.option("--autoencoder-steps", type=click.IntRange(1), help="Default: the recipe's 3000.")
@click.option(
    "--max-train-steps", type=click.IntRange(1), help="UNet steps. Default: the recipe's 14000."
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
    """Train the default model: food, animals and plants as emoji, 64x64.

    Takes hours on a CPU. The same command goes on after a stop, and does nothing once it is done.
    Prints the folder.

    Example: encache-train emoji --output runs/emoji/model
    """
    import torch

    from encache.train import autoencoder, denoiser
    from encache.train.default_model import train_default_model

    if threads:
        torch.set_num_threads(threads)
    train_default_model(
        emoji_dir,
        work_dir,
        output,
        autoencoder_steps or autoencoder.RECIPE.steps,
        max_train_steps or denoiser.RECIPE.steps,
    )
    click.echo(output)


main.add_command(fcr)
main.add_command(shared)


if __name__ == "__main__":
    main()
