"""`encache-train fcr`: fine-tune for longer strides."""

from dataclasses import dataclass
from pathlib import Path

import click

from encache.command import Command, FiniteFloat
from encache.model.spec import FEATURE_CUTS, Cut
from encache.options import option, takes
from encache.train.options import NAMES, FCROptions, RunOptions, open_model


@dataclass(frozen=True)
class _Options:
    """What is learned from which pictures."""

    train_data_dir: Path = option(
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        required=True,
        help="Pictures with metadata.jsonl or metadata.csv, or with their captions beside them "
        "(0001.txt), .tar shards of img2dataset, or the emoji packages.",
    )
    cut: Cut = option(
        type=click.Choice(FEATURE_CUTS),
        default="up2",
        help="Where the encoder ends; draw with the same one.",
    )
    fcr_weight: float = option(
        type=FiniteFloat(0), default=0.1, help="lambda; 0 is plain fine-tuning."
    )
    cached_weight: float = option(
        type=FiniteFloat(0),
        default=0.0,
        help="Also distil the unchanged UNet into calls on extrapolated features, --fcr-stride (or "
        "--fcr-delta-max) apart.",
    )
    snr_gamma: float | None = option(
        type=FiniteFloat(0, min_open=True), help="min-SNR weighting; 5 is usual. Default: none."
    )
    resolution: int | None = option(
        type=click.IntRange(8),
        help="Height and width in pixels. Default: the model's own, or the smaller of the two.",
    )
    random_flip: bool = option(is_flag=True, default=False, help="Mirror half of the pictures.")
    proportion_empty_prompts: float = option(
        type=FiniteFloat(0, 1),
        default=0.1,
        help="Share of captions left out, for classifier-free guidance.",
    )
    dataloader_num_workers: int = option(
        type=click.IntRange(0),
        default=0,
        help="Processes that read pictures; 0 reads them in between.",
    )


@click.command(cls=Command, context_settings=NAMES)
@takes(chosen=_Options, regulariser=FCROptions, run=RunOptions)
def fcr(chosen: _Options, regulariser: FCROptions, run: RunOptions) -> None:
    """Fine-tune a UNet for longer strides (FCR).

    Asks the encoder for features that change little from one timestep to another, so that it may
    be skipped for longer: minimises L_denoise + lambda ||Enc(x_t) - Enc(x_{t-D})||^2, with D drawn
    from 1 to D_max, over the features that cross --cut. The same command goes on after a stop.

    Prints the path of fcr.safetensors, the whole UNet, which --ckpt of the other commands takes;
    with --rank then that of fcr_lora.safetensors, the LoRA alone, which --lora takes.

    `accelerate launch -m encache.train.cli fcr ...` runs it on several devices.

    \b
    Example:
      encache-train fcr --train-data-dir pictures --fcr-stride 10 \\
          --output-dir runs/fcr
    """
    regulariser.check()
    distance = regulariser.fcr_stride or regulariser.fcr_delta_max
    if chosen.cached_weight and not distance:
        raise click.UsageError(
            "--cached-weight needs the distance of key calls: give --fcr-stride, or "
            "--fcr-delta-max in training timesteps."
        )

    from encache.model.checkpoint import find_checkpoint
    from encache.train.data import open_pictures
    from encache.train.fcr import fcr_task

    pictures = open_pictures(chosen.train_data_dir)
    if pictures.num_without_caption:
        click.echo(f"{pictures.num_without_caption} pictures have no caption: skipped.", err=True)
    if pictures.num_without_picture:
        click.echo(
            f"{pictures.num_without_picture} lines of the metadata name no picture of the folder: "
            "skipped.",
            err=True,
        )
    checkpoint = find_checkpoint(run.pretrained, run.base)
    opened = open_model(checkpoint, run)
    settings = regulariser.make(
        opened.num_timesteps,
        weight=chosen.fcr_weight,
        cut=chosen.cut,
        snr_gamma=chosen.snr_gamma,
        cached_weight=chosen.cached_weight,
    )
    task = fcr_task(
        opened.pipeline,
        pictures,
        settings,
        opened.run,
        opened.accelerator,
        resolution=chosen.resolution,
        caption_dropout=chosen.proportion_empty_prompts,
        flip=chosen.random_flip,
        num_workers=chosen.dataloader_num_workers,
    )
    opened.fine_tune(task)
