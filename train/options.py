"""What the fine-tuning commands share: their options, and what is made of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from encache.command import FiniteFloat, Text
from encache.errors import CheckpointError
from encache.model.family import STABLE_DIFFUSION
from encache.options import option

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import StableDiffusionPipeline

    from encache.model.checkpoint import Checkpoint
    from encache.train.fcr import FCR
    from encache.train.finetune import Run, Task
    from encache.train.loop import Schedule

#: diffusers' training scripts write their options with underscores.
NAMES = {"token_normalize_func": lambda name: name.replace("_", "-")}


@dataclass(frozen=True)
class RunOptions:
    """A run of fine-tuning, with the names of diffusers' training scripts."""

    pretrained: str | None = option(
        "--pretrained-model-name-or-path",
        help="diffusers folder, hub id or .safetensors file. Default: the model that ships with "
        "encache.",
    )
    base: str | None = option(help="diffusers folder or hub id that completes a .safetensors file.")
    output_dir: Path = option(
        type=click.Path(path_type=Path),
        required=True,
        help="Folder for the weights, the checkpoint, the logs and the validation pictures.",
    )
    train_batch_size: int = option(
        type=click.IntRange(1), default=4, help="Pictures per device and batch."
    )
    gradient_accumulation_steps: int = option(
        type=click.IntRange(1), default=1, help="Batches per step."
    )
    max_train_steps: int = option(type=click.IntRange(1), default=1000)
    learning_rate: float = option(type=FiniteFloat(0), default=1e-5)
    lr_scheduler: "Schedule" = option(
        type=click.Choice(("constant", "linear", "cosine")),
        default="constant",
        help="How the learning rate falls to zero by the last step, if it does.",
    )
    lr_warmup_steps: int = option(
        type=click.IntRange(0), default=100, help="Over which the learning rate rises."
    )
    adam_weight_decay: float = option(type=FiniteFloat(0), default=1e-2)
    use_8bit_adam: bool = option(
        is_flag=True, default=False, help="Needs bitsandbytes and a CUDA GPU."
    )
    max_grad_norm: float = option(type=FiniteFloat(0), default=1.0, help="0 clips nothing.")
    ema_decay: float = option(
        type=FiniteFloat(0, 1),
        default=0.999,
        help="Of the averaged weights that are written; 0 writes the last ones.",
    )
    rank: int = option(
        type=click.IntRange(0),
        default=0,
        help="Train a LoRA of this rank on the attentions; 0 trains the whole UNet.",
    )
    save_dtype: str = option(
        type=click.Choice(("fp32", "fp16")),
        default="fp32",
        help="Of the written UNet; fp16 is half as large.",
    )
    gradient_checkpointing: bool = option(
        is_flag=True, default=False, help="Less memory, more time."
    )
    mixed_precision: str | None = option(
        type=click.Choice(("no", "fp16", "bf16")),
        help="Default: accelerate's configuration, or no.",
    )
    checkpointing_steps: int = option(
        type=click.IntRange(1), default=250, help="Steps between checkpoints."
    )
    resume_from_checkpoint: str = option(
        type=click.Choice(("latest", "never")),
        default="latest",
        help="Whether to go on from the checkpoint in --output-dir; never starts over and replaces "
        "what an earlier run left there.",
    )
    report_to: str = option(
        type=click.Choice(("tensorboard", "none")),
        default="tensorboard",
        help="What the losses are logged for, in --output-dir/logs.",
    )
    validation_prompt: tuple[str, ...] = option(
        default=(), type=Text(), multiple=True, help="Drawn every --validation-steps; repeatable."
    )
    validation_steps: int = option(type=click.IntRange(1), default=500)
    seed: int = option(type=click.IntRange(0, 2**32 - 1), default=0)
    threads: int | None = option(type=click.IntRange(1), help="CPU threads. Default: torch's.")


@dataclass(frozen=True)
class FCROptions:
    """FCR, besides its weight."""

    fcr_delta_max: int | None = option(
        type=click.IntRange(1), help="D_max in training timesteps. Default: 10."
    )
    fcr_stride: int | None = option(
        type=click.IntRange(1),
        help="D_max as this many sampling calls, instead of --fcr-delta-max.",
    )
    fcr_steps: int | None = option(
        type=click.IntRange(1), help="Sampling steps that --fcr-stride counts in. Default: 50."
    )
    fcr_form: Any = option(
        type=click.Choice(("raw", "relative", "spread")),
        default="raw",
        help="Squared change of the features, as it is, or relative to their mean square or "
        "variance.",
    )
    fcr_stop_grad: Any = option(
        type=click.Choice(("none", "older", "newer")),
        default="none",
        help="Side of a pair that is held still; the older is the noisier.",
    )

    def check(self) -> None:
        """Raise click.UsageError where the distances of a pair contradict each other."""
        if self.fcr_stride and self.fcr_delta_max:
            raise click.UsageError("Give either --fcr-delta-max or --fcr-stride.")
        if self.fcr_steps and not self.fcr_stride:
            raise click.UsageError("--fcr-steps means nothing without --fcr-stride.")

    def make(self, num_timesteps: int, **others: Any) -> "FCR":
        """The regulariser; the others are `FCR`'s.

        Raises:
            click.UsageError: the timesteps are fewer than a pair needs.
        """
        from encache.train.fcr import FCR

        delta_max = self.fcr_delta_max or 10
        if self.fcr_stride:
            delta_max = self.fcr_stride * num_timesteps // (self.fcr_steps or 50)
        if not 1 <= delta_max < num_timesteps:
            raise click.UsageError(
                f"Pairs of timesteps up to {delta_max} apart do not fit {num_timesteps} training "
                "timesteps: give another --fcr-delta-max or --fcr-stride."
            )
        return FCR(
            delta_max=delta_max,
            cached_stride=delta_max,
            form=self.fcr_form,
            stop_grad=self.fcr_stop_grad,
            **others,
        )


#: Of what a run with --rank prints.
_USES = (
    "{0} is the whole UNet: give it to --ckpt of encache-run, encache-export or encache-eval.\n"
    "{1} is the LoRA alone: {2}."
)


@dataclass(frozen=True)
class Opened:
    """A checkpoint that is about to be fine-tuned."""

    checkpoint: "Checkpoint"
    pipeline: "StableDiffusionPipeline"
    run: "Run"
    accelerator: "Accelerator"

    @property
    def num_timesteps(self) -> int:
        """Of the noise schedule."""
        return len(self.pipeline.scheduler.alphas_cumprod)

    def fine_tune(self, task: "Task") -> None:
        """Learn the task, and print the paths of what it wrote."""
        from encache.train.finetune import fine_tune

        paths = fine_tune(self.checkpoint, self.pipeline, task, self.run, self.accelerator)
        if self.accelerator.is_main_process:
            click.echo("\n".join(map(str, paths)))
            if self.run.lora_rank:
                click.echo(_USES.format(*paths, task.lora_use), err=True)


def open_model(checkpoint: "Checkpoint", options: RunOptions) -> Opened:
    """Load a checkpoint and prepare the run that the options describe.

    Raises:
        CheckpointError: training knows no models of its family.
    """
    import torch
    from accelerate import Accelerator

    from encache.contract.dtypes import torch_dtype
    from encache.model.loading import load_pipeline
    from encache.train.finetune import Run
    from encache.train.loop import Recipe

    if checkpoint.family is not STABLE_DIFFUSION:
        raise CheckpointError(
            f"{checkpoint.name} is {checkpoint.family.title}; training knows "
            f"{STABLE_DIFFUSION.title} alone."
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    precision, report_to = options.mixed_precision, options.report_to
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=None if report_to == "none" else report_to,
            project_dir=options.output_dir / "logs",
        )
    except ValueError as error:
        raise click.UsageError(f"--mixed-precision {precision or ''}: {error}") from error
    run = Run(
        output=options.output_dir,
        resume=options.resume_from_checkpoint != "never",
        recipe=Recipe(
            steps=options.max_train_steps,
            learning_rate=options.learning_rate,
            warmup=options.lr_warmup_steps,
            schedule=options.lr_scheduler,
            decay_fraction=1.0,
            weight_decay=options.adam_weight_decay,
            ema_decay=options.ema_decay,
            gradient_clip=options.max_grad_norm,
            accumulation=options.gradient_accumulation_steps,
            checkpoint_every=options.checkpointing_steps,
            use_8bit_adam=options.use_8bit_adam,
        ),
        batch_size=options.train_batch_size,
        lora_rank=options.rank,
        gradient_checkpointing=options.gradient_checkpointing,
        dtype=torch_dtype(options.save_dtype),
        validation_prompts=options.validation_prompt,
        validation_every=options.validation_steps,
        seed=options.seed,
    )
    return Opened(checkpoint, load_pipeline(checkpoint), run, accelerator)
