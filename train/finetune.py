"""Fine-tune a checkpoint with FCR: from pictures and captions to fcr.safetensors."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from torch import Tensor

from encache import __version__
from encache.errors import EncacheError
from encache.files import check_writable, replacing
from encache.model.checkpoint import Checkpoint
from encache.model.features import ImageSpec
from encache.model.text import tokenize
from encache.train.data import Draws, Example, Pictures, Steps, batches
from encache.train.fcr import FCR, FCRObjective, NoisedBatch
from encache.train.loop import Recipe, averaged, fit
from encache.train.validation import sample_grid

#: What a run hands over: the whole UNet, and the adapter alone where one was trained.
WEIGHTS, LORA = "fcr.safetensors", "fcr_lora.safetensors"
#: What diffusers' own LoRA training adapts: the projections of every attention.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
#: Where a file's own metadata says which run made it.
_METADATA_KEY = "encache"


@dataclass(frozen=True)
class Run:
    """Everything about a fine-tuning run that is not its model, its data or its loss.

    Attributes:
        output: folder for fcr.safetensors, fcr_lora.safetensors, checkpoint.pt, logs/ and
            validation/.
        batch_size: pictures per process and accumulated batch.
        resume: go on from checkpoint.pt when there is one, and overwrite nothing where there is
            none; otherwise start over and replace what is there.
        lora_rank: 0 trains the whole UNet.
        validation_prompts: drawn every `validation_every` steps with the averaged weights.
    """

    output: Path
    recipe: Recipe
    batch_size: int = 1
    resolution: int | None = None
    caption_dropout: float = 0.1
    flip: bool = False
    resume: bool = True
    lora_rank: int = 0
    gradient_checkpointing: bool = False
    validation_prompts: tuple[str, ...] = ()
    validation_every: int = 500
    num_workers: int = 0
    seed: int = 0

    @property
    def results(self) -> tuple[Path, ...]:
        """The files that the finished run hands over, the whole UNet first."""
        names = (WEIGHTS, LORA) if self.lora_rank else (WEIGHTS,)
        return tuple(self.output / name for name in names)

    @property
    def checkpoint(self) -> Path:
        """What a stopped run goes on from."""
        return self.output / "checkpoint.pt"

    def validation_grid(self, step: int) -> Path:
        """Where the pictures drawn after so many steps go."""
        return self.output / "validation" / f"step-{step:06d}.png"


def fine_tune(
    checkpoint: Checkpoint,
    pipeline: StableDiffusionPipeline,
    pictures: Pictures,
    settings: FCR,
    run: Run,
    accelerator: Accelerator,
) -> tuple[Path, ...]:
    """Train the UNet on L_denoise + lambda L_FCR and write its averaged weights.

    Args:
        checkpoint: what to start from.
        pipeline: the same, loaded; its UNet is trained in place.
        pictures: the data.
        settings: the loss.
        run: the rest; a run that was stopped goes on from its checkpoint.
        accelerator: processes, device and precision.

    Returns:
        The path of fcr.safetensors, then with `run.lora_rank` that of fcr_lora.safetensors.

    Raises:
        EncacheError: the model or the data cannot be used, the folder holds another run's files,
            or the loss is not finite.
    """
    objective = _make_objective(pipeline, settings, run)
    draws = _make_draws(pipeline, settings, run)
    steps = Steps(
        pictures,
        draws,
        run.batch_size,
        run.recipe.accumulation,
        accelerator.process_index,
        accelerator.num_processes,
    )
    prepare = _Preparation(pipeline, accelerator)
    facts = _facts(checkpoint, pictures, settings, run, draws, accelerator)
    _prepare_folder(run, facts)
    accelerator.wait_for_everyone()
    _start_log(accelerator)

    def on_step(step: int, losses: Mapping[str, float], average: Mapping[str, Tensor]) -> None:
        accelerator.log(dict(losses), step=step)
        if run.validation_prompts and (step + 1) % run.validation_every == 0:
            with averaged(objective, average):
                _validate(pipeline, run, facts, step + 1, accelerator)

    fit(
        objective,
        lambda start: map(prepare, batches(steps, start, run.num_workers)),
        lambda model, batch: model(batch),
        run.recipe,
        run.checkpoint,
        accelerator=accelerator,
        identity=facts,
        on_step=on_step,
    )
    accelerator.end_training()
    prepare.report_unreadable()
    if accelerator.is_main_process:
        if run.lora_rank:
            _save_lora(pipeline, run.output / LORA)
        header = {_METADATA_KEY: json.dumps({**facts, "steps": run.recipe.steps})}
        if checkpoint.base_name:
            header["base"] = checkpoint.base_name
        _write_weights(pipeline, run.output / WEIGHTS, header)
    return run.results


def _prepare_folder(run: Run, facts: Mapping[str, Any]) -> None:
    """Make the folder; refuse one whose files the run would overwrite without going on from it."""
    check_writable(run.output)
    if not run.resume:
        run.checkpoint.unlink(missing_ok=True)
    elif not run.checkpoint.exists():
        steps = range(run.validation_every, run.recipe.steps + 1, run.validation_every)
        grids = map(run.validation_grid, steps if run.validation_prompts else ())
        taken = [path for path in run.results if path.exists()]
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


def _make_objective(pipeline: StableDiffusionPipeline, settings: FCR, run: Run) -> FCRObjective:
    scheduler = pipeline.scheduler
    prediction = scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise EncacheError(
            f"This model predicts {prediction!r}; training knows epsilon and v_prediction."
        )
    # Before the adapter is added: the teacher of a cached distillation is the model as it was.
    objective = FCRObjective(pipeline.unet, scheduler.alphas_cumprod, prediction, settings)
    if run.lora_rank:
        _add_lora(pipeline, run.lora_rank, run.seed)
    if run.gradient_checkpointing:
        objective.enable_gradient_checkpointing()
    return objective


def _make_draws(pipeline: StableDiffusionPipeline, settings: FCR, run: Run) -> Draws:
    spec = ImageSpec.of(pipeline.unet.config, pipeline.vae.config)
    resolution = run.resolution or min(spec.picture_size)
    if resolution % spec.downscale:
        raise EncacheError(f"The resolution must be a multiple of {spec.downscale} pixels.")
    latent_size = resolution // spec.downscale
    return Draws(
        resolution=resolution,
        latent_shape=(spec.channels, latent_size, latent_size),
        num_timesteps=len(pipeline.scheduler.alphas_cumprod),
        delta_max=settings.delta_max,
        caption_dropout=run.caption_dropout,
        flip=run.flip,
        seed=run.seed,
    )


class _Preparation:
    """Turns examples into what the objective takes, on the device, with the frozen networks."""

    def __init__(self, pipeline: StableDiffusionPipeline, accelerator: Accelerator) -> None:
        self.device = accelerator.device
        precisions = {"fp16": torch.float16, "bf16": torch.bfloat16}
        self.dtype = precisions.get(accelerator.mixed_precision, torch.float32)
        self.vae = pipeline.vae.to(self.device, self.dtype).requires_grad_(False)
        self.text_encoder = pipeline.text_encoder.to(self.device, self.dtype).requires_grad_(False)
        self.tokenizer = pipeline.tokenizer
        self.unreadable: set[str] = set()

    @torch.no_grad()
    def __call__(self, examples: Sequence[Example]) -> NoisedBatch:
        for example in examples:
            self.unreadable.update(example.unreadable)
        pixels = torch.stack([one.pixels for one in examples]).to(self.device, self.dtype)
        # The mean of the posterior, not a draw: its spread is far below the noise that is added.
        latents = self.vae.encode(pixels).latent_dist.mean * self.vae.config.scaling_factor
        tokens = tokenize(self.tokenizer, [one.caption for one in examples]).to(self.device)
        return NoisedBatch(
            clean=latents.float(),
            noise=torch.stack([one.noise for one in examples]).to(self.device),
            timesteps=torch.tensor([one.timestep for one in examples], device=self.device),
            deltas=torch.tensor([one.delta for one in examples], device=self.device),
            places=torch.tensor([one.place for one in examples], device=self.device),
            text=self.text_encoder(tokens)[0].float(),
        )

    def report_unreadable(self) -> None:
        if self.unreadable:
            some = ", ".join(sorted(self.unreadable)[:10])
            print(f"Skipped {len(self.unreadable)} unreadable pictures: {some}", file=sys.stderr)


def _facts(
    checkpoint: Checkpoint,
    pictures: Pictures,
    settings: FCR,
    run: Run,
    draws: Draws,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What makes two runs the same run: not how its batch is spread out.

    Its length counts only where the learning rate falls towards the end.
    """
    recipe = replace(run.recipe, accumulation=1, checkpoint_every=0)
    if recipe.schedule == "constant":
        recipe = replace(recipe, steps=0)
    return {
        "model": checkpoint.fingerprint,
        "data": pictures.fingerprint,
        "loss": asdict(settings),
        **asdict(recipe),
        **asdict(draws),
        "batch": run.batch_size * run.recipe.accumulation * accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "lora_rank": run.lora_rank,
        "encache_version": __version__,
    }


def _start_log(accelerator: Accelerator) -> None:
    try:
        accelerator.init_trackers("fcr")
    except ImportError as error:
        raise EncacheError(
            f'{error}. Install it with pip install "encache[train]", or pass --report-to none.'
        ) from error


def _validate(
    pipeline: StableDiffusionPipeline,
    run: Run,
    facts: Mapping[str, Any],
    step: int,
    accelerator: Accelerator,
) -> None:
    if accelerator.is_main_process:
        target = run.validation_grid(step)
        target.parent.mkdir(exist_ok=True)
        with torch.no_grad(), accelerator.autocast():
            grid = sample_grid(pipeline, run.validation_prompts, columns=8, seed=run.seed)
        info = PngInfo()
        info.add_itxt(_METADATA_KEY, json.dumps(facts))
        with replacing(target) as path:
            grid.save(path, "PNG", pnginfo=info)
    accelerator.wait_for_everyone()


def _add_lora(pipeline: StableDiffusionPipeline, rank: int, seed: int) -> None:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise EncacheError('LoRA needs peft: pip install "encache[train]".') from error
    pipeline.unet.requires_grad_(False)
    torch.manual_seed(seed)  # of the adapter's first weights
    pipeline.unet.add_adapter(
        LoraConfig(
            r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=[*LORA_TARGETS]
        )
    )


def _save_lora(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """Write the adapter in diffusers' format and fold it into the UNet."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    with _replacing_weights(path) as temporary:
        pipeline.save_lora_weights(path.parent, unet_lora_layers=layers, weight_name=temporary.name)
    pipeline.unet.fuse_lora()
    pipeline.unet.unload_lora()


def _write_weights(
    pipeline: StableDiffusionPipeline, path: Path, header: Mapping[str, str]
) -> None:
    tensors = {
        name: tensor.cpu().contiguous() for name, tensor in pipeline.unet.state_dict().items()
    }
    with _replacing_weights(path) as temporary:
        save_file(tensors, temporary, dict(header))


@contextmanager
def _replacing_weights(path: Path) -> Iterator[Path]:
    try:
        with replacing(path) as temporary:
            yield temporary
    except Exception as error:  # safetensors has its own error for a full disk
        raise EncacheError(
            f"{path} could not be written ({error}): free some space, then run the same command "
            "again; the training is kept in checkpoint.pt."
        ) from error
