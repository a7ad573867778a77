"""Fine-tune a checkpoint's UNet: any loss around it, from a folder to NAME.safetensors."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from encache import __version__
from encache.errors import EncacheError
from encache.files import check_writable, replacing
from encache.model.checkpoint import Checkpoint
from encache.train.loop import Batches, Recipe, averaged, check_identity, fit
from encache.train.weights import replacing_weights, write_weights

#: What diffusers' own LoRA training adapts: the projections of every attention.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
#: Where a file's own metadata says which run made it.
_METADATA_KEY = "encache"


@dataclass(frozen=True)
class Run:
    """Everything about a fine-tuning run that is not its model, its data or its loss.

    Attributes:
        output: folder for the weights, checkpoint.pt, logs/ and validation/.
        batch_size: examples per process and accumulated batch.
        resume: go on from checkpoint.pt when there is one, and overwrite nothing where there is
            none; otherwise start over and replace what is there.
        lora_rank: 0 trains the whole UNet.
        dtype: of the written UNet; the training itself keeps fp32.
        validation_prompts: drawn every `validation_every` steps with the averaged weights.
    """

    output: Path
    recipe: Recipe
    batch_size: int = 1
    resume: bool = True
    lora_rank: int = 0
    gradient_checkpointing: bool = False
    dtype: torch.dtype = torch.float32
    validation_prompts: tuple[str, ...] = ()
    validation_every: int = 500
    seed: int = 0

    def results(self, task: str) -> tuple[Path, ...]:
        """The files that the finished run hands over: the whole UNet, then a LoRA alone."""
        names = (task, f"{task}_lora") if self.lora_rank else (task,)
        return tuple(self.output / f"{name}.safetensors" for name in names)

    @property
    def checkpoint(self) -> Path:
        """What a stopped run goes on from."""
        return self.output / "checkpoint.pt"

    def validation_grid(self, step: int) -> Path:
        """Where the pictures drawn after so many steps go."""
        return self.output / "validation" / f"step-{step:06d}.png"


class Objective(nn.Module):
    """A UNet with its loss as one forward pass, which is what data parallel training wraps.

    Its forward takes a batch and returns `encache.train.loop.Losses`.

    Attributes:
        unet: trained.
        recompute: keep no activations inside the halves, but run them again backwards.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        self.recompute = False

    def enable_gradient_checkpointing(self) -> None:
        """Trade time for memory: keep no activations inside the halves, nor inside blocks."""
        self.unet.enable_gradient_checkpointing()
        self.recompute = True

    def group_of(self, name: str) -> tuple[str, float]:
        """All parameters learn alike; see `encache.train.loop.GroupOf`."""
        return "all", 1.0


@dataclass(frozen=True)
class Task:
    """What a run learns, made before any adapter is added to the UNet.

    Attributes:
        name: of the written files and of the log.
        objective: the UNet with its loss.
        batches: the data, prepared for the objective.
        facts: what tells its data and its loss from another task's.
        draw: a picture of prompts, from a seed, as the UNet is at the moment.
        measure: figures for the log beside that picture.
        header: strings for the header of the written weights.
        prepare: makes what the batches need and is not there yet; once all else was checked.
        lora_use: what the LoRA of a run with a rank is good for, to be printed.
        finish: called once the last step is done.
    """

    name: str
    objective: Objective
    batches: Batches
    facts: Mapping[str, Any]
    draw: Callable[[Sequence[str], int], Image.Image]
    measure: Callable[[], Mapping[str, float]] = dict
    header: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[], None] = lambda: None
    lora_use: str = (
        "give it to --lora of encache-run or encache-export, beside the model that was fine-tuned"
    )
    finish: Callable[[], None] = lambda: None


def fine_tune(
    checkpoint: Checkpoint,
    pipeline: StableDiffusionPipeline,
    task: Task,
    run: Run,
    accelerator: Accelerator,
) -> tuple[Path, ...]:
    """Minimise the task's losses over the pipeline's UNet and write its averaged weights.

    Args:
        checkpoint: what to start from.
        pipeline: the same, loaded; its UNet is trained in place.
        task: what to learn.
        run: the rest; a run that was stopped goes on from its checkpoint.
        accelerator: processes, device and precision.

    Returns:
        `run.results`.

    Raises:
        EncacheError: the model or the data cannot be used, the folder holds another run's files,
            or the loss is not finite.
    """
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
        # There, PyTorch's fused attention takes a third of the step, mostly backwards.
        for part in task.objective.children():
            if isinstance(part, UNet2DConditionModel):
                part.set_attn_processor(AttnProcessor())
    if run.gradient_checkpointing:
        task.objective.enable_gradient_checkpointing()
    if run.lora_rank:
        lora_config(run.lora_rank)  # refused before anything takes long
    facts = _facts(checkpoint, task, run, accelerator)
    _prepare_folder(run, task.name, facts)
    check_identity(run.checkpoint, facts)
    accelerator.wait_for_everyone()
    _start_log(task.name, accelerator)
    task.prepare()
    if run.lora_rank:
        add_lora(pipeline.unet, run.lora_rank, run.seed)

    def on_step(step: int, losses: Mapping[str, float], average: Mapping[str, Tensor]) -> None:
        accelerator.log(dict(losses), step=step)
        if (step + 1) % run.validation_every == 0:
            with averaged(task.objective, average):
                _validate(task, run, facts, step + 1, accelerator)

    fit(
        task.objective,
        task.batches,
        lambda model, batch: model(batch),
        run.recipe,
        run.checkpoint,
        accelerator=accelerator,
        identity=facts,
        on_step=on_step,
        group_of=task.objective.group_of,
    )
    accelerator.end_training()
    task.finish()
    results = run.results(task.name)
    if accelerator.is_main_process:
        if run.lora_rank:
            _save_lora(pipeline, results[1])
        made_by = {_METADATA_KEY: json.dumps({**facts, "steps": run.recipe.steps})}
        base = {"base": checkpoint.base_name} if checkpoint.base_name else {}
        header = {**made_by, **base, **task.header}
        write_weights(pipeline.unet, results[0], header, run.dtype)
    return results


def _prepare_folder(run: Run, task: str, facts: Mapping[str, Any]) -> None:
    """Make the folder; refuse one whose files the run would overwrite without going on from it."""
    check_writable(run.output)
    if not run.resume:
        run.checkpoint.unlink(missing_ok=True)
    elif not run.checkpoint.exists():
        steps = range(run.validation_every, run.recipe.steps + 1, run.validation_every)
        grids = map(run.validation_grid, steps if run.validation_prompts else ())
        taken = [path for path in run.results(task) if path.exists()]
        taken += [path for path in grids if path.exists() and not _is_drawn_by(facts, path)]
        if taken:
            raise EncacheError(
                f"{taken[0]} is there already, without a checkpoint to go on from: choose another "
                "--output-dir, or replace it with --resume-from-checkpoint never."
            )


def _is_drawn_by(facts: Mapping[str, Any], grid: Path) -> bool:
    """Whether a validation picture is of the same run, stopped before its first checkpoint."""
    try:
        with Image.open(grid) as image:
            return image.info.get(_METADATA_KEY) == json.dumps(facts)
    except OSError:  # no picture at all
        return False


def _facts(
    checkpoint: Checkpoint, task: Task, run: Run, accelerator: Accelerator
) -> dict[str, Any]:
    """What makes two runs the same run: not how its batch is spread out.

    Its length counts only where the learning rate falls towards the end.
    """
    recipe = replace(run.recipe, accumulation=1, checkpoint_every=0)
    if recipe.schedule == "constant":
        recipe = replace(recipe, steps=0)
    return {
        "model": checkpoint.fingerprint,
        **task.facts,
        **asdict(recipe),
        "seed": run.seed,
        "batch": run.batch_size * run.recipe.accumulation * accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "lora_rank": run.lora_rank,
        "encache_version": __version__,
    }


def _start_log(name: str, accelerator: Accelerator) -> None:
    try:
        accelerator.init_trackers(name)
    except ImportError as error:
        raise EncacheError(
            f'{error}. Install it with pip install "encache[train]", or pass --report-to none.'
        ) from error


def _validate(
    task: Task, run: Run, facts: Mapping[str, Any], step: int, accelerator: Accelerator
) -> None:
    if accelerator.is_main_process:
        with torch.no_grad(), accelerator.autocast():
            if figures := dict(task.measure()):
                accelerator.log(figures, step=step)
                words = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
                print(f"step {step}: {words}", file=sys.stderr)
            if run.validation_prompts:
                try:
                    _save_grid(task.draw(run.validation_prompts, run.seed), run, facts, step)
                except EncacheError as error:  # not finite, which training may still mend
                    print(f"step {step}: no validation pictures: {error}", file=sys.stderr)
    accelerator.wait_for_everyone()


def _save_grid(grid: Image.Image, run: Run, facts: Mapping[str, Any], step: int) -> None:
    target = run.validation_grid(step)
    target.parent.mkdir(exist_ok=True)
    info = PngInfo()
    info.add_itxt(_METADATA_KEY, json.dumps(facts))
    with replacing(target) as path:
        grid.save(path, "PNG", pnginfo=info)


def lora_config(rank: int) -> Any:
    """An adapter of this rank for a UNet's attentions.

    Raises:
        EncacheError: peft is missing.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise EncacheError('LoRA needs peft: pip install "encache[train]".') from error
    return LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=[*LORA_TARGETS]
    )


def add_lora(unet: Any, rank: int, seed: int) -> None:
    """Freeze a UNet and add an adapter to it."""
    unet.requires_grad_(False)
    torch.manual_seed(seed)  # of the adapter's first weights
    unet.add_adapter(lora_config(rank))


def _save_lora(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """Write the adapter in diffusers' format and fold it into the UNet."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    with replacing_weights(path) as temporary:
        pipeline.save_lora_weights(path.parent, unet_lora_layers=layers, weight_name=temporary.name)
    pipeline.unet.fuse_lora()
    pipeline.unet.unload_lora()
