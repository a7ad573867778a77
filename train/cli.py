"""`encache-train`: fine-tune with FCR, or train the default model from its public data."""

from pathlib import Path
from typing import Literal

import click

from encache.command import Command, FiniteFloat, Text
from encache.model.features import CUTS, Cut

#: diffusers' training scripts write their options with underscores.
_NAMES = {"token_normalize_func": lambda name: name.replace("_", "-")}

#: Of what a run with --rank prints.
_USES = (
    "{0} is the whole UNet: give it to --ckpt of encache-run, encache-export or encache-eval.\n"
    "{1} is the LoRA alone: give it to --lora of encache-run or encache-export, beside the "
    "model that was fine-tuned."
)


@click.group()
def main() -> None:
    """Train Stable Diffusion models whose encoder may be cached."""


@main.command(cls=Command, context_settings=_NAMES)
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


@main.command(cls=Command, context_settings=_NAMES)
@click.option(
    "--pretrained-model-name-or-path",
    "pretrained",
    help="diffusers folder, hub id or .safetensors file. Default: the model that ships with "
    "encache.",
)
@click.option("--base", help="diffusers folder or hub id that completes a .safetensors file.")
@click.option(
    "--train-data-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Pictures with metadata.jsonl or metadata.csv, or with their captions beside them "
    "(0001.txt), .tar shards of img2dataset, or the emoji packages.",
)
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for the weights, the checkpoint, the logs and the validation pictures.",
)
@click.option(
    "--cut",
    type=click.Choice(CUTS),
    default="up2",
    show_default=True,
    help="Where the encoder ends; draw with the same one.",
)
@click.option(
    "--fcr-weight",
    type=FiniteFloat(0),
    default=0.1,
    show_default=True,
    help="lambda; 0 is plain fine-tuning.",
)
@click.option(
    "--fcr-delta-max", type=click.IntRange(1), help="D_max in training timesteps. Default: 10."
)
@click.option(
    "--fcr-stride",
    type=click.IntRange(1),
    help="D_max as this many sampling calls, instead of --fcr-delta-max.",
)
@click.option(
    "--fcr-steps",
    type=click.IntRange(1),
    help="Sampling steps that --fcr-stride counts in. Default: 50.",
)
@click.option(
    "--fcr-form",
    type=click.Choice(("raw", "relative", "spread")),
    default="raw",
    show_default=True,
    help="Squared change of the features, as it is, or relative to their mean square or variance.",
)
@click.option(
    "--fcr-stop-grad",
    type=click.Choice(("none", "older", "newer")),
    default="none",
    show_default=True,
    help="Side of a pair that is held still; the older is the noisier.",
)
@click.option(
    "--cached-weight",
    type=FiniteFloat(0),
    default=0.0,
    show_default=True,
    help="Also distil the unchanged UNet into calls on extrapolated features, --fcr-stride (or "
    "--fcr-delta-max) apart.",
)
@click.option(
    "--resolution",
    type=click.IntRange(8),
    help="Height and width in pixels. Default: the model's own, or the smaller of the two.",
)
@click.option("--random-flip", is_flag=True, help="Mirror half of the pictures.")
@click.option(
    "--proportion-empty-prompts",
    type=FiniteFloat(0, 1),
    default=0.1,
    show_default=True,
    help="Share of captions left out, for classifier-free guidance.",
)
@click.option(
    "--train-batch-size",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Pictures per device and batch.",
)
@click.option(
    "--gradient-accumulation-steps",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Batches per step.",
)
@click.option("--max-train-steps", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--learning-rate", type=FiniteFloat(0), default=1e-5, show_default=True)
@click.option(
    "--lr-scheduler",
    type=click.Choice(("constant", "linear", "cosine")),
    default="constant",
    show_default=True,
    help="How the learning rate falls to zero by the last step, if it does.",
)
@click.option(
    "--lr-warmup-steps",
    type=click.IntRange(0),
    default=100,
    show_default=True,
    help="Over which the learning rate rises.",
)
@click.option("--adam-weight-decay", type=FiniteFloat(0), default=1e-2, show_default=True)
@click.option("--use-8bit-adam", is_flag=True, help="Needs bitsandbytes and a CUDA GPU.")
@click.option(
    "--max-grad-norm",
    type=FiniteFloat(0),
    default=1.0,
    show_default=True,
    help="0 clips nothing.",
)
@click.option(
    "--snr-gamma",
    type=FiniteFloat(0, min_open=True),
    help="min-SNR weighting; 5 is usual. Default: none.",
)
@click.option(
    "--ema-decay",
    type=FiniteFloat(0, 1),
    default=0.999,
    show_default=True,
    help="Of the averaged weights that are written; 0 writes the last ones.",
)
@click.option(
    "--rank",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Train a LoRA of this rank on the attentions; 0 trains the whole UNet.",
)
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory, more time.")
@click.option(
    "--mixed-precision",
    type=click.Choice(("no", "fp16", "bf16")),
    help="Default: accelerate's configuration, or no.",
)
@click.option(
    "--checkpointing-steps",
    type=click.IntRange(1),
    default=250,
    show_default=True,
    help="Steps between checkpoints.",
)
@click.option(
    "--resume-from-checkpoint",
    type=click.Choice(("latest", "never")),
    default="latest",
    show_default=True,
    help="Whether to go on from the checkpoint in --output-dir; never starts over and replaces "
    "what an earlier run left there.",
)
@click.option(
    "--report-to",
    type=click.Choice(("tensorboard", "none")),
    default="tensorboard",
    show_default=True,
    help="What the losses are logged for, in --output-dir/logs.",
)
@click.option(
    "--validation-prompt",
    type=Text(),
    multiple=True,
    help="Drawn every --validation-steps; repeatable.",
)
@click.option("--validation-steps", type=click.IntRange(1), default=500, show_default=True)
@click.option(
    "--dataloader-num-workers",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Processes that read pictures; 0 reads them in between.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: torch's.")
def fcr(
    pretrained: str | None,
    base: str | None,
    train_data_dir: Path,
    output_dir: Path,
    cut: Cut,
    fcr_weight: float,
    fcr_delta_max: int | None,
    fcr_stride: int | None,
    fcr_steps: int | None,
    fcr_form: Literal["raw", "relative", "spread"],
    fcr_stop_grad: Literal["none", "older", "newer"],
    cached_weight: float,
    resolution: int | None,
    random_flip: bool,
    proportion_empty_prompts: float,
    train_batch_size: int,
    gradient_accumulation_steps: int,
    max_train_steps: int,
    learning_rate: float,
    lr_scheduler: Literal["constant", "linear", "cosine"],
    lr_warmup_steps: int,
    adam_weight_decay: float,
    use_8bit_adam: bool,
    max_grad_norm: float,
    snr_gamma: float | None,
    ema_decay: float,
    rank: int,
    gradient_checkpointing: bool,
    mixed_precision: str | None,
    checkpointing_steps: int,
    resume_from_checkpoint: str,
    report_to: str,
    validation_prompt: tuple[str, ...],
    validation_steps: int,
    dataloader_num_workers: int,
    seed: int,
    threads: int | None,
) -> None:
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
    if fcr_stride and fcr_delta_max:
        raise click.UsageError("Give either --fcr-delta-max or --fcr-stride.")
    if fcr_steps and not fcr_stride:
        raise click.UsageError("--fcr-steps means nothing without --fcr-stride.")
    if cached_weight and not (fcr_stride or fcr_delta_max):
        raise click.UsageError(
            "--cached-weight needs the distance of key calls: give --fcr-stride, or "
            "--fcr-delta-max in training timesteps."
        )

    import torch
    from accelerate import Accelerator

    from encache.model.checkpoint import find_checkpoint
    from encache.model.loading import load_pipeline
    from encache.train.data import open_pictures
    from encache.train.fcr import FCR
    from encache.train.finetune import Run, fine_tune
    from encache.train.loop import Recipe

    if threads:
        torch.set_num_threads(threads)
    checkpoint = find_checkpoint(pretrained, base)
    pictures = open_pictures(train_data_dir)
    if pictures.num_without_caption:
        click.echo(f"{pictures.num_without_caption} pictures have no caption: skipped.", err=True)
    if pictures.num_without_picture:
        click.echo(
            f"{pictures.num_without_picture} lines of the metadata name no picture of the folder: "
            "skipped.",
            err=True,
        )
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            log_with=None if report_to == "none" else report_to,
            project_dir=output_dir / "logs",
        )
    except ValueError as error:
        raise click.UsageError(f"--mixed-precision {mixed_precision or ''}: {error}") from error
    pipeline = load_pipeline(checkpoint)
    num_timesteps = len(pipeline.scheduler.alphas_cumprod)
    delta_max = fcr_delta_max or 10
    if fcr_stride:
        delta_max = fcr_stride * num_timesteps // (fcr_steps or 50)
    if not 1 <= delta_max < num_timesteps:
        raise click.UsageError(
            f"Pairs of timesteps up to {delta_max} apart do not fit {num_timesteps} training "
            "timesteps: give another --fcr-delta-max or --fcr-stride."
        )
    paths = fine_tune(
        checkpoint,
        pipeline,
        pictures,
        FCR(
            weight=fcr_weight,
            delta_max=delta_max,
            form=fcr_form,
            stop_grad=fcr_stop_grad,
            cut=cut,
            snr_gamma=snr_gamma,
            cached_weight=cached_weight,
            cached_stride=delta_max,
        ),
        Run(
            output=output_dir,
            resume=resume_from_checkpoint != "never",
            recipe=Recipe(
                steps=max_train_steps,
                learning_rate=learning_rate,
                warmup=lr_warmup_steps,
                schedule=lr_scheduler,
                decay_fraction=1.0,
                weight_decay=adam_weight_decay,
                ema_decay=ema_decay,
                gradient_clip=max_grad_norm,
                accumulation=gradient_accumulation_steps,
                checkpoint_every=checkpointing_steps,
                use_8bit_adam=use_8bit_adam,
            ),
            batch_size=train_batch_size,
            resolution=resolution,
            caption_dropout=proportion_empty_prompts,
            flip=random_flip,
            lora_rank=rank,
            gradient_checkpointing=gradient_checkpointing,
            validation_prompts=validation_prompt,
            validation_every=validation_steps,
            num_workers=dataloader_num_workers,
            seed=seed,
        ),
        accelerator,
    )
    if accelerator.is_main_process:
        click.echo("\n".join(map(str, paths)))
        if rank:
            click.echo(_USES.format(*paths), err=True)


if __name__ == "__main__":
    main()
