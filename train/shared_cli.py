"""`encache-train shared`: fine-tune for a plan with few encoder runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from encache.command import Command, FiniteFloat, typed_options
from encache.model.spec import FEATURE_CUTS, NO_CUT, Cut
from encache.options import option, takes
from encache.runtime.blend import BLENDS, Blend
from encache.runtime.schedulers import SCHEDULERS
from encache.train.options import NAMES, FCROptions, Opened, RunOptions, open_model

if TYPE_CHECKING:
    from encache.model.checkpoint import Checkpoint
    from encache.runtime.pipeline import EncachePipeline
    from encache.train.fcr import FCR
    from encache.train.shared import Shared


@dataclass(frozen=True)
class _TeacherOptions:
    """Whose pictures are learned from."""

    prompts: Path | None = option(
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="Text file with a prompt per line, drawn from at random; a line that stands there "
        "twice is drawn twice as often. Default: those of the model that ships with encache, if "
        "that is it.",
    )
    pairs_dir: Path | None = option(
        type=click.Path(path_type=Path),
        help="Where the teacher's pictures are kept; several runs may share them. Default: pairs "
        "in --output-dir.",
    )
    num_pairs: int = option(
        type=click.IntRange(1),
        default=10000,
        help="Teacher's pictures to learn from; drawn first as far as they are not there.",
    )
    pairs_seed: int = option(
        type=click.IntRange(0, 2**32 - 1), default=0, help="Of the teacher's noise and prompts."
    )
    teacher_steps: int = option(
        type=click.IntRange(1), default=50, help="Steps of the model's own solver, in full."
    )
    teacher_stride: int = option(
        type=click.IntRange(1),
        default=1,
        help="Run the teacher's UNet at every Nth call and interpolate the noise between. On the "
        "model that ships, 3 is a third of the work and .0007 off (relative squared error, "
        "docs/study.md).",
    )
    teacher_batch_size: int = option(
        type=click.IntRange(1), default=8, help="Teacher's pictures at once."
    )
    teacher_backend: str = option(
        type=click.Choice(("torch", "onnxruntime")),
        default="torch",
        help="What draws them; onnxruntime is faster on a CPU.",
    )
    guidance_scale: float | None = option(
        type=FiniteFloat(),
        help="Of the teacher. The student learns its result and draws without guidance. Default: "
        "the model's own.",
    )


@dataclass(frozen=True)
class _StudentOptions:
    """How the fine-tuned model samples."""

    steps: int = option(
        "--steps", "--num-inference-steps", type=click.IntRange(1), default=4, help="The student's."
    )
    stride: int | None = option(
        type=click.IntRange(1),
        help="Decoder calls that share an encoder run. Default: all of them.",
    )
    cut: Cut = option(
        type=click.Choice(FEATURE_CUTS),
        default="mid",
        help="What the encoder is: the UNet up to the mid block, or with up blocks 0, 1, 2.",
    )
    blend: Blend = option(
        type=click.Choice(BLENDS),
        default="reuse",
        help="How the student's calls mix the features of encoder runs.",
    )
    scheduler: str = option(
        type=click.Choice(tuple(SCHEDULERS)), default="ddim", help="The student's solver."
    )
    timestep_spacing: str = option(
        type=click.Choice(("trailing", "leading", "linspace")),
        default="trailing",
        help="Of the student; trailing starts from the last training timestep.",
    )
    prediction: str | None = option(
        type=click.Choice(("epsilon", "v_prediction")),
        help="What the student learns to predict. v_prediction suits few calls better: with "
        "epsilon, errors at the first call are multiplied by about ten. It must be learned anew "
        "from a model that predicts epsilon. Default: what the first weights predict.",
    )
    student_weights: Path | None = option(
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="UNet that the student starts from, such as another run's shared.safetensors. "
        "Default: the model's own.",
    )


@dataclass(frozen=True)
class _LossOptions:
    """What is asked of it."""

    latent_weight: float = option(
        type=FiniteFloat(0), default=1.0, help="Of the error against the teacher's latents."
    )
    perceptual_weight: float = option(
        type=FiniteFloat(0),
        default=0.0,
        help="Of the difference in the features of the unchanged UNet.",
    )
    vsd_weight: float = option(
        type=FiniteFloat(0),
        default=0.0,
        help="Of variational score distillation: sharper than regression on large models, but "
        "not the teacher's pictures any more.",
    )
    vsd_rank: int = option(
        type=click.IntRange(1), default=64, help="Of the LoRA that follows what the student draws."
    )
    vsd_rate: float = option(
        type=FiniteFloat(0, min_open=True),
        default=100.0,
        help="Learning rate of that LoRA, as a multiple of --learning-rate.",
    )
    fcr_weight: float = option(
        type=FiniteFloat(0), default=0.0, help="lambda of FCR as a further loss; 0 does without."
    )

    @property
    def needs_pairs(self) -> bool:
        """Whether any loss looks at the teacher's pictures."""
        return bool(self.latent_weight or self.perceptual_weight or self.fcr_weight)

    def check(self) -> None:
        """Raise click.UsageError where nothing is asked, or what is said means nothing."""
        if not (self.latent_weight or self.perceptual_weight or self.vsd_weight):
            raise click.UsageError(
                "Without --latent-weight, --perceptual-weight or --vsd-weight nothing says what "
                "to draw: give one of them."
            )
        _refuse_what_means_nothing(
            needs_pairs=self.needs_pairs, vsd=bool(self.vsd_weight), fcr=bool(self.fcr_weight)
        )

    def settings(self, guidance_scale: float, fcr: "FCR") -> "Shared":
        """The losses, with what they need from elsewhere."""
        from encache.train.shared import Shared

        return Shared(
            latent_weight=self.latent_weight,
            perceptual_weight=self.perceptual_weight,
            vsd_weight=self.vsd_weight,
            vsd_rank=self.vsd_rank,
            vsd_rate=self.vsd_rate,
            guidance_scale=guidance_scale,
            fcr=fcr,
        )


@click.command(cls=Command, context_settings=NAMES)
@takes(
    teaching=_TeacherOptions,
    learning=_StudentOptions,
    loss=_LossOptions,
    regulariser=FCROptions,
    run=RunOptions,
)
def shared(
    teaching: _TeacherOptions,
    learning: _StudentOptions,
    loss: _LossOptions,
    regulariser: FCROptions,
    run: RunOptions,
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
    regulariser.check()
    loss.check()

    from encache.train.pairs import Pairs, make_teacher, read_prompts
    from encache.train.student import make_student, shared_task

    checkpoint = _find_teacher(run)
    texts = read_prompts(teaching.prompts, checkpoint)
    start = _find_start(learning.student_weights, checkpoint)
    opened = open_model(checkpoint, run)
    student = make_student(
        opened.pipeline.scheduler,
        learning.scheduler,
        learning.timestep_spacing,
        learning.prediction or (start.predicts if start else None),
        learning.steps,
        learning.stride,
        learning.cut,
        learning.blend,
    )
    dtype = _teacher_dtype(opened, teaching.teacher_backend)
    teacher = make_teacher(
        checkpoint,
        opened.pipeline,
        texts,
        steps=teaching.teacher_steps,
        guidance_scale=teaching.guidance_scale,
        stride=teaching.teacher_stride,
        seed=teaching.pairs_seed,
        precision="no" if dtype == "fp32" else dtype,  # as folders of pairs have it
        compared_at=student.comparable_calls(opened.pipeline.scheduler, teaching.teacher_steps),
    )
    pairs = Pairs(teaching.pairs_dir or opened.run.output / "pairs", teacher)

    def draw_pairs(number: int) -> None:
        pairs.draw_missing(
            number,
            lambda: _open_teacher(opened, teaching.teacher_backend, dtype),
            teaching.teacher_batch_size,
            opened.accelerator,
        )

    task = shared_task(
        opened.pipeline,
        student,
        pairs,
        teaching.num_pairs,
        loss.settings(
            guidance_scale=teacher.guidance_scale,
            fcr=regulariser.make(opened.num_timesteps, weight=loss.fcr_weight, cut=learning.cut),
        ),
        opened.run,
        opened.accelerator,
        start=start,
        draw_pairs=draw_pairs,
    )
    opened.fine_tune(task)


def _find_teacher(run: RunOptions) -> "Checkpoint":
    from encache.model.checkpoint import find_checkpoint
    from encache.model.preset import UNSAID

    checkpoint = find_checkpoint(run.pretrained, run.base)
    if checkpoint.preset != UNSAID:
        raise click.UsageError(
            f"{checkpoint.weights} was trained for a plan and is no teacher: give it to "
            "--student-weights, and what it was trained from to --pretrained-model-name-or-path."
        )
    return checkpoint


def _find_start(weights: Path | None, teacher: "Checkpoint") -> "Checkpoint | None":
    """The student's first weights, if they are not the teacher's."""
    from encache.model.checkpoint import find_checkpoint

    start = find_checkpoint(weights, teacher.folder) if weights else None
    if start and start.holds != "unet":
        raise click.UsageError(f"--student-weights {weights} holds more than a UNet.")
    return start


def _teacher_dtype(opened: Opened, backend: str) -> str:
    """The precision it draws in: fp16 by torch on a GPU if the training is mixed, else fp32."""
    accelerator = opened.accelerator
    half = accelerator.device.type == "cuda" and accelerator.mixed_precision != "no"
    return "fp16" if half and backend == "torch" else "fp32"


def _open_teacher(opened: Opened, backend: str, dtype: str) -> "EncachePipeline":
    """A copy of its own, which may have another precision than the one that is trained."""
    from encache.contract.dtypes import torch_dtype
    from encache.model.loading import load_pipeline
    from encache.runtime.pipeline import EncachePipeline

    if backend != "torch":
        return EncachePipeline.from_checkpoint(opened.checkpoint, cut=NO_CUT, backend=backend)
    device = opened.accelerator.device
    return EncachePipeline.from_pipe(
        load_pipeline(opened.checkpoint, torch_dtype(dtype), device), NO_CUT
    )


def _refuse_what_means_nothing(*, needs_pairs: bool, vsd: bool, fcr: bool) -> None:
    """Options of a loss that weighs nothing are refused, never ignored."""
    of_pairs = {"pairs_dir", "num_pairs", "teacher_steps", "teacher_stride", "teacher_batch_size"}
    of_fcr = {"fcr_delta_max", "fcr_stride", "fcr_steps", "fcr_form", "fcr_stop_grad"}
    for weighs, names, weight in (
        (needs_pairs, of_pairs | {"teacher_backend"}, "--latent-weight or --perceptual-weight"),
        (vsd, {"vsd_rank", "vsd_rate"}, "--vsd-weight"),
        (fcr, of_fcr, "--fcr-weight"),
    ):
        for name in () if weighs else typed_options(names):
            raise click.UsageError(f"{name} means nothing without {weight}.")
