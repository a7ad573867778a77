"""What the fine-tuning commands share: their options, and what is made of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from encache.command import FiniteFloat, Text

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import StableDiffusionPipeline

    from encache.model.checkpoint import Checkpoint
    from encache.train.fcr import FCR
    from encache.train.finetune import Run, Task

#: diffusers' training scripts write their options with underscores.
NAMES = {"token_normalize_func": lambda name: name.replace("_", "-")}

_COMMON = (
    click.option(
        "--pretrained-model-name-or-path",
        "pretrained",
        help="diffusers folder, hub id or .safetensors file. Default: the model that ships with "
        "encache.",
    ),
    click.option("--base", help="diffusers folder or hub id that completes a .safetensors file."),
    click.option(
        "--output-dir",
        type=click.Path(path_type=Path),
        required=True,
        help="Folder for the weights, the checkpoint, the logs and the validation pictures.",
    ),
    click.option(
        "--train-batch-size",
        type=click.IntRange(1),
        default=4,
        show_default=True,
        help="Pictures per device and batch.",
    ),
    click.option(
        "--gradient-accumulation-steps",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Batches per step.",
    ),
    click.option("--max-train-steps", type=click.IntRange(1), default=1000, show_default=True),
    click.option("--learning-rate", type=FiniteFloat(0), default=1e-5, show_default=True),
    click.option(
        "--lr-scheduler",
        type=click.Choice(("constant", "linear", "cosine")),
        default="constant",
        show_default=True,
        help="How the learning rate falls to zero by the last step, if it does.",
    ),
    click.option(
        "--lr-warmup-steps",
        type=click.IntRange(0),
        default=100,
        show_default=True,
        help="Over which the learning rate rises.",
    ),
    click.option("--adam-weight-decay", type=FiniteFloat(0), default=1e-2, show_default=True),
    click.option("--use-8bit-adam", is_flag=True, help="Needs bitsandbytes and a CUDA GPU."),
    click.option(
        "--max-grad-norm",
        type=FiniteFloat(0),
        default=1.0,
        show_default=True,
        help="0 clips nothing.",
    ),
    click.option(
        "--ema-decay",
        type=FiniteFloat(0, 1),
        default=0.999,
        show_default=True,
        help="Of the averaged weights that are written; 0 writes the last ones.",
    ),
    click.option(
        "--rank",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Train a LoRA of this rank on the attentions; 0 trains the whole UNet.",
    ),
    click.option(
        "--save-dtype",
        type=click.Choice(("fp32", "fp16")),
        default="fp32",
        show_default=True,
        help="Of the written UNet; fp16 is half as large.",
    ),
    click.option("--gradient-checkpointing", is_flag=True, help="Less memory, more time."),
    click.option(
        "--mixed-precision",
        type=click.Choice(("no", "fp16", "bf16")),
        help="Default: accelerate's configuration, or no.",
    ),
    click.option(
        "--checkpointing-steps",
        type=click.IntRange(1),
        default=250,
        show_default=True,
        help="Steps between checkpoints.",
    ),
    click.option(
        "--resume-from-checkpoint",
        type=click.Choice(("latest", "never")),
        default="latest",
        show_default=True,
        help="Whether to go on from the checkpoint in --output-dir; never starts over and replaces "
        "what an earlier run left there.",
    ),
    click.option(
        "--report-to",
        type=click.Choice(("tensorboard", "none")),
        default="tensorboard",
        show_default=True,
        help="What the losses are logged for, in --output-dir/logs.",
    ),
    click.option(
        "--validation-prompt",
        type=Text(),
        multiple=True,
        help="Drawn every --validation-steps; repeatable.",
    ),
    click.option("--validation-steps", type=click.IntRange(1), default=500, show_default=True),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True),
    click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: torch's."),
)

_FCR = (
    click.option(
        "--fcr-delta-max", type=click.IntRange(1), help="D_max in training timesteps. Default: 10."
    ),
    click.option(
        "--fcr-stride",
        type=click.IntRange(1),
        help="D_max as this many sampling calls, instead of --fcr-delta-max.",
    ),
    click.option(
        "--fcr-steps",
        type=click.IntRange(1),
        help="Sampling steps that --fcr-stride counts in. Default: 50.",
    ),
    click.option(
        "--fcr-form",
        type=click.Choice(("raw", "relative", "spread")),
        default="raw",
        show_default=True,
        help="Squared change of the features, as it is, or relative to their mean square or "
        "variance.",
    ),
    click.option(
        "--fcr-stop-grad",
        type=click.Choice(("none", "older", "newer")),
        default="none",
        show_default=True,
        help="Side of a pair that is held still; the older is the noisier.",
    ),
)

#: Of what a run with --rank prints.
_USES = (
    "{0} is the whole UNet: give it to --ckpt of encache-run, encache-export or encache-eval.\n"
    "{1} is the LoRA alone: {2}."
)


def _decorate(options: tuple[Callable[[Any], Any], ...], command: Any) -> Any:
    for option in reversed(options):
        command = option(command)
    return command


def common_options(command: Any) -> Any:
    """The options that `Opened` is made of."""
    return _decorate(_COMMON, command)


def fcr_options(command: Any) -> Any:
    """The options that `make_fcr` takes, besides the weight."""
    return _decorate(_FCR, command)


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

    @property
    def teacher_precision(self) -> str:
        """That a frozen UNet draws in: the run's own on a GPU, fp32 on a CPU."""
        on_gpu = self.accelerator.device.type == "cuda"
        return self.accelerator.mixed_precision if on_gpu else "no"

    def fine_tune(self, task: "Task") -> None:
        """Learn the task, and print the paths of what it wrote."""
        from encache.train.finetune import fine_tune

        paths = fine_tune(self.checkpoint, self.pipeline, task, self.run, self.accelerator)
        if self.accelerator.is_main_process:
            click.echo("\n".join(map(str, paths)))
            if self.run.lora_rank:
                click.echo(_USES.format(*paths, task.lora_use), err=True)


def open_model(checkpoint: "Checkpoint", options: dict[str, Any]) -> Opened:
    """Load a checkpoint and prepare the run that the options of `common_options` describe."""
    import torch
    from accelerate import Accelerator

    from encache.contract.dtypes import torch_dtype
    from encache.model.loading import load_pipeline
    from encache.train.finetune import Run
    from encache.train.loop import Recipe

    if options["threads"]:
        torch.set_num_threads(options["threads"])
    precision, report_to = options["mixed_precision"], options["report_to"]
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=None if report_to == "none" else report_to,
            project_dir=options["output_dir"] / "logs",
        )
    except ValueError as error:
        raise click.UsageError(f"--mixed-precision {precision or ''}: {error}") from error
    run = Run(
        output=options["output_dir"],
        resume=options["resume_from_checkpoint"] != "never",
        recipe=Recipe(
            steps=options["max_train_steps"],
            learning_rate=options["learning_rate"],
            warmup=options["lr_warmup_steps"],
            schedule=options["lr_scheduler"],
            decay_fraction=1.0,
            weight_decay=options["adam_weight_decay"],
            ema_decay=options["ema_decay"],
            gradient_clip=options["max_grad_norm"],
            accumulation=options["gradient_accumulation_steps"],
            checkpoint_every=options["checkpointing_steps"],
            use_8bit_adam=options["use_8bit_adam"],
        ),
        batch_size=options["train_batch_size"],
        lora_rank=options["rank"],
        gradient_checkpointing=options["gradient_checkpointing"],
        dtype=torch_dtype(options["save_dtype"]),
        validation_prompts=options["validation_prompt"],
        validation_every=options["validation_steps"],
        seed=options["seed"],
    )
    return Opened(checkpoint, load_pipeline(checkpoint), run, accelerator)


def check_fcr(fcr_delta_max: int | None, fcr_stride: int | None, fcr_steps: int | None) -> None:
    """Raise click.UsageError where the distances of a pair contradict each other."""
    if fcr_stride and fcr_delta_max:
        raise click.UsageError("Give either --fcr-delta-max or --fcr-stride.")
    if fcr_steps and not fcr_stride:
        raise click.UsageError("--fcr-steps means nothing without --fcr-stride.")


def make_fcr(
    num_timesteps: int,
    *,
    fcr_delta_max: int | None,
    fcr_stride: int | None,
    fcr_steps: int | None,
    fcr_form: Any,
    fcr_stop_grad: Any,
    **others: Any,
) -> "FCR":
    """The regulariser that the options of `fcr_options` describe; the others are `FCR`'s.

    Raises:
        click.UsageError: the timesteps are fewer than a pair needs.
    """
    from encache.train.fcr import FCR

    delta_max = fcr_delta_max or 10
    if fcr_stride:
        delta_max = fcr_stride * num_timesteps // (fcr_steps or 50)
    if not 1 <= delta_max < num_timesteps:
        raise click.UsageError(
            f"Pairs of timesteps up to {delta_max} apart do not fit {num_timesteps} training "
            "timesteps: give another --fcr-delta-max or --fcr-stride."
        )
    return FCR(
        delta_max=delta_max,
        cached_stride=delta_max,
        form=fcr_form,
        stop_grad=fcr_stop_grad,
        **others,
    )
