"""`encache-train`: fine-tune for caching, or train the default model from its public data."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from encache.command import Command, FiniteFloat, typed_options
from encache.model.spec import FEATURE_CUTS, NO_CUT, Cut
from encache.runtime.blend import BLENDS, Blend
from encache.runtime.schedulers import SCHEDULERS
from encache.train.options import (
    NAMES,
    check_fcr,
    common_options,
    fcr_options,
    make_fcr,
    open_model,
)


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


@main.command(cls=Command, context_settings=NAMES)
@click.option(
    "--train-data-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Pictures with metadata.jsonl or metadata.csv, or with their captions beside them "
    "(0001.txt), .tar shards of img2dataset, or the emoji packages.",
)
@click.option(
    "--cut",
    type=click.Choice(FEATURE_CUTS),
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
@fcr_options
@click.option(
    "--cached-weight",
    type=FiniteFloat(0),
    default=0.0,
    show_default=True,
    help="Also distil the unchanged UNet into calls on extrapolated features, --fcr-stride (or "
    "--fcr-delta-max) apart.",
)
@click.option(
    "--snr-gamma",
    type=FiniteFloat(0, min_open=True),
    help="min-SNR weighting; 5 is usual. Default: none.",
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
    "--dataloader-num-workers",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Processes that read pictures; 0 reads them in between.",
)
@common_options
def fcr(
    train_data_dir: Path,
    cut: Cut,
    fcr_weight: float,
    fcr_delta_max: int | None,
    fcr_stride: int | None,
    fcr_steps: int | None,
    fcr_form: str,
    fcr_stop_grad: str,
    cached_weight: float,
    snr_gamma: float | None,
    resolution: int | None,
    random_flip: bool,
    proportion_empty_prompts: float,
    dataloader_num_workers: int,
    **common: Any,
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
    check_fcr(fcr_delta_max, fcr_stride, fcr_steps)
    if cached_weight and not (fcr_stride or fcr_delta_max):
        raise click.UsageError(
            "--cached-weight needs the distance of key calls: give --fcr-stride, or "
            "--fcr-delta-max in training timesteps."
        )

    from encache.model.checkpoint import find_checkpoint
    from encache.train.data import open_pictures
    from encache.train.fcr import fcr_task

    pictures = open_pictures(train_data_dir)
    if pictures.num_without_caption:
        click.echo(f"{pictures.num_without_caption} pictures have no caption: skipped.", err=True)
    if pictures.num_without_picture:
        click.echo(
            f"{pictures.num_without_picture} lines of the metadata name no picture of the folder: "
            "skipped.",
            err=True,
        )
    checkpoint = find_checkpoint(common["pretrained"], common["base"])
    opened = open_model(checkpoint, common)
    settings = make_fcr(
        opened.num_timesteps,
        fcr_delta_max=fcr_delta_max,
        fcr_stride=fcr_stride,
        fcr_steps=fcr_steps,
        fcr_form=fcr_form,
        fcr_stop_grad=fcr_stop_grad,
        weight=fcr_weight,
        cut=cut,
        snr_gamma=snr_gamma,
        cached_weight=cached_weight,
    )
    task = fcr_task(
        opened.pipeline,
        pictures,
        settings,
        opened.run,
        opened.accelerator,
        resolution=resolution,
        caption_dropout=proportion_empty_prompts,
        flip=random_flip,
        num_workers=dataloader_num_workers,
    )
    opened.fine_tune(task)


@main.command(cls=Command, context_settings=NAMES)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Text file with a prompt per line, drawn from at random; a line that stands there twice "
    "is drawn twice as often. Default: those of the model that ships with encache, if that is it.",
)
@click.option(
    "--pairs-dir",
    type=click.Path(path_type=Path),
    help="Where the teacher's pictures are kept; several runs may share them. Default: pairs in "
    "--output-dir.",
)
@click.option(
    "--num-pairs",
    type=click.IntRange(1),
    default=10000,
    show_default=True,
    help="Teacher's pictures to learn from; drawn first as far as they are not there.",
)
@click.option(
    "--pairs-seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of the teacher's noise and prompts.",
)
@click.option(
    "--teacher-steps",
    type=click.IntRange(1),
    default=50,
    show_default=True,
    help="Steps of the model's own solver, in full.",
)
@click.option(
    "--teacher-stride",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Run the teacher's UNet at every Nth call and interpolate the noise between. On the model "
    "that ships, 3 is a third of the work and .0007 off (relative squared error, docs/study.md).",
)
@click.option(
    "--teacher-batch-size",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Teacher's pictures at once.",
)
@click.option(
    "--teacher-backend",
    type=click.Choice(("torch", "onnxruntime")),
    default="torch",
    show_default=True,
    help="What draws them; onnxruntime is faster on a CPU.",
)
@click.option(
    "--guidance-scale",
    type=FiniteFloat(),
    help="Of the teacher. The student learns its result and draws without guidance. Default: the "
    "model's own.",
)
@click.option(
    "--steps",
    "--num-inference-steps",
    "steps",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="The student's.",
)
@click.option(
    "--stride",
    type=click.IntRange(1),
    help="Decoder calls that share an encoder run. Default: all of them.",
)
@click.option(
    "--cut",
    type=click.Choice(FEATURE_CUTS),
    default="mid",
    show_default=True,
    help="What the encoder is: the UNet up to the mid block, or with up blocks 0, 1, 2.",
)
@click.option(
    "--blend",
    type=click.Choice(BLENDS),
    default="reuse",
    show_default=True,
    help="How the student's calls mix the features of encoder runs.",
)
@click.option(
    "--scheduler",
    type=click.Choice(tuple(SCHEDULERS)),
    default="ddim",
    show_default=True,
    help="The student's solver.",
)
@click.option(
    "--timestep-spacing",
    type=click.Choice(("trailing", "leading", "linspace")),
    default="trailing",
    show_default=True,
    help="Of the student; trailing starts from the last training timestep.",
)
@click.option(
    "--prediction",
    type=click.Choice(("epsilon", "v_prediction")),
    help="What the student learns to predict. v_prediction suits few calls better: with epsilon, "
    "errors at the first call are multiplied by about ten. It must be learned anew from a model "
    "that predicts epsilon. Default: what the first weights predict.",
)
@click.option(
    "--student-weights",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="UNet that the student starts from, such as another run's shared.safetensors. Default: "
    "the model's own.",
)
@click.option(
    "--latent-weight",
    type=FiniteFloat(0),
    default=1.0,
    show_default=True,
    help="Of the error against the teacher's latents.",
)
@click.option(
    "--perceptual-weight",
    type=FiniteFloat(0),
    default=0.0,
    show_default=True,
    help="Of the difference in the features of the unchanged UNet.",
)
@click.option(
    "--vsd-weight",
    type=FiniteFloat(0),
    default=0.0,
    show_default=True,
    help="Of variational score distillation: sharper than regression on large models, but not "
    "the teacher's pictures any more.",
)
@click.option(
    "--vsd-rank",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Of the LoRA that follows what the student draws.",
)
@click.option(
    "--vsd-rate",
    type=FiniteFloat(0, min_open=True),
    default=100.0,
    show_default=True,
    help="Learning rate of that LoRA, as a multiple of --learning-rate.",
)
@click.option(
    "--fcr-weight",
    type=FiniteFloat(0),
    default=0.0,
    show_default=True,
    help="lambda of FCR as a further loss; 0 does without.",
)
@fcr_options
@common_options
def shared(
    prompts: Path | None,
    pairs_dir: Path | None,
    num_pairs: int,
    pairs_seed: int,
    teacher_steps: int,
    teacher_stride: int,
    teacher_batch_size: int,
    teacher_backend: str,
    guidance_scale: float | None,
    steps: int,
    stride: int | None,
    cut: Cut,
    blend: Blend,
    scheduler: str,
    timestep_spacing: str,
    prediction: str | None,
    student_weights: Path | None,
    latent_weight: float,
    perceptual_weight: float,
    vsd_weight: float,
    vsd_rank: int,
    vsd_rate: float,
    fcr_weight: float,
    fcr_delta_max: int | None,
    fcr_stride: int | None,
    fcr_steps: int | None,
    fcr_form: str,
    fcr_stop_grad: str,
    **common: Any,
) -> None:
    """Fine-tune a UNet for a plan: few encoder runs, each shared by several decoder calls.

    Draws pictures with the full, guided sampler, then teaches the UNet to make the same ones of
    the same noise with --steps calls that share encoder runs, without guidance. By default that
    is one encoder run and one batch of four decoder calls. The same command goes on after a stop.

    Prints the path of shared.safetensors, the whole UNet with its plan in the header, which --ckpt
    of the other commands takes; they then sample by that plan.

    `accelerate launch -m encache.train.cli shared ...` runs it on several devices.

    \b
    Example:
      encache-train shared --num-pairs 2000 --teacher-stride 3 --max-train-steps 500 \\
          --output-dir runs/shared
    """
    check_fcr(fcr_delta_max, fcr_stride, fcr_steps)
    if not (latent_weight or perceptual_weight or vsd_weight):
        raise click.UsageError(
            "Without --latent-weight, --perceptual-weight or --vsd-weight nothing says what to "
            "draw: give one of them."
        )

    _refuse_what_means_nothing(
        needs_pairs=bool(latent_weight or perceptual_weight or fcr_weight),
        vsd=bool(vsd_weight),
        fcr=bool(fcr_weight),
    )

    from encache.model.checkpoint import find_checkpoint
    from encache.model.preset import UNSAID
    from encache.runtime.pipeline import EncachePipeline
    from encache.train.pairs import Pairs, make_teacher, read_prompts
    from encache.train.shared import Shared
    from encache.train.student import make_student, shared_task

    checkpoint = find_checkpoint(common["pretrained"], common["base"])
    if checkpoint.preset != UNSAID:
        raise click.UsageError(
            f"{checkpoint.weights} was trained for a plan and is no teacher: give it to "
            "--student-weights, and what it was trained from to --pretrained-model-name-or-path."
        )
    texts = read_prompts(prompts, checkpoint)
    start = find_checkpoint(student_weights, checkpoint.folder) if student_weights else None
    if start and start.holds != "unet":
        raise click.UsageError(f"--student-weights {student_weights} holds more than a UNet.")
    opened = open_model(checkpoint, common)
    pipeline, run = opened.pipeline, opened.run
    student = make_student(
        pipeline.scheduler,
        scheduler,
        timestep_spacing,
        prediction or (start.predicts if start else None),
        steps,
        stride,
        cut,
        blend,
    )
    teacher = make_teacher(
        checkpoint,
        pipeline,
        texts,
        steps=teacher_steps,
        guidance_scale=guidance_scale,
        stride=teacher_stride,
        seed=pairs_seed,
        precision=opened.teacher_precision if teacher_backend == "torch" else "no",
        compared_at=student.comparable_calls(pipeline.scheduler, teacher_steps),
    )
    fcr_settings = make_fcr(
        opened.num_timesteps,
        fcr_delta_max=fcr_delta_max,
        fcr_stride=fcr_stride,
        fcr_steps=fcr_steps,
        fcr_form=fcr_form,
        fcr_stop_grad=fcr_stop_grad,
        weight=fcr_weight,
        cut=cut,
    )
    settings = Shared(
        latent_weight=latent_weight,
        perceptual_weight=perceptual_weight,
        vsd_weight=vsd_weight,
        vsd_rank=vsd_rank,
        vsd_rate=vsd_rate,
        guidance_scale=teacher.guidance_scale,
        fcr=fcr_settings,
    )
    pairs = Pairs(pairs_dir or run.output / "pairs", teacher)

    def open_teacher() -> EncachePipeline:
        if teacher_backend == "torch":
            pipeline.to(opened.accelerator.device)
            return EncachePipeline.from_pipe(pipeline, NO_CUT)
        return EncachePipeline.from_checkpoint(checkpoint, cut=NO_CUT, backend=teacher_backend)

    def draw_pairs(number: int) -> None:
        with opened.accelerator.autocast() if teacher.precision != "no" else nullcontext():
            pairs.draw_missing(number, open_teacher, teacher_batch_size, opened.accelerator)

    task = shared_task(
        pipeline,
        student,
        pairs,
        num_pairs,
        settings,
        run,
        opened.accelerator,
        start=start,
        draw_pairs=draw_pairs,
    )
    opened.fine_tune(task)


def _refuse_what_means_nothing(*, needs_pairs: bool, vsd: bool, fcr: bool) -> None:
    """Options of a loss that weighs nothing are refused, never ignored."""
    of_pairs = {"pairs_dir", "num_pairs", "teacher_steps", "teacher_stride", "teacher_batch_size"}
    of_fcr = {"fcr_delta_max", "fcr_stride", "fcr_steps", "fcr_form", "fcr_stop_grad"}
    for weighs, names, weight in (
        (needs_pairs, of_pairs | {"teacher_backend"}, "--latent-weight or --perceptual-weight"),
        (vsd, {"vsd_rank", "vsd_rate"}, "--vsd-weight"),
        (fcr, of_fcr, "--fcr-weight"),
    ):
        for option in () if weighs else typed_options(names):
            raise click.UsageError(f"{option} means nothing without {weight}.")


if __name__ == "__main__":
    main()
