"""A student: how it samples, the questions it is asked, and the run that teaches it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from encache.model.checkpoint import Checkpoint
from encache.model.loading import unet_weights
from encache.model.preset import PRESET_KEY, Preset
from encache.model.spec import Cut
from encache.model.text import tokenize
from encache.runtime.blend import Blend
from encache.runtime.pipeline import EncachePipeline
from encache.runtime.plan import Plan, make_plan
from encache.runtime.schedulers import full_config, make_scheduler
from encache.runtime.settings import Policy
from encache.runtime.solver import count_calls
from encache.train.composed import relative_error
from encache.train.fcr import frozen_dtype, prediction_of
from encache.train.finetune import Run, Task
from encache.train.loop import generator_of, spread
from encache.train.pairs import Pairs
from encache.train.shared import Shared, SharedBatch, SharedObjective
from encache.train.validation import sample_grid

#: Pairs beyond those that are trained on, whose error is watched.
NUM_HELD_OUT = 64
#: Share of the score's prompts that are left out, which guidance needs.
_SCORE_DROPOUT = 0.1


@dataclass(frozen=True)
class Student:
    """How the fine-tuned model samples: a preset with everything said, its solver and its plan."""

    preset: Preset
    scheduler: Any
    plan: Plan
    cut: Cut

    def comparable_calls(self, teacher: Any, steps: int) -> tuple[int, ...]:
        """The calls at whose end student and teacher should have the same latents.

        The ends of segments if both make the same calls, otherwise the end of all: ().
        """
        ours, theirs = (  # what the UNet predicts changes nothing of the latents
            full_config(one) | {"prediction_type": None} for one in (self.scheduler, teacher)
        )
        same = ours == theirs and self.preset.steps == steps
        return (*self.plan.key_calls[1:], self.plan.num_calls) if same else ()


def make_student(
    model_scheduler: Any,
    scheduler: str,
    timestep_spacing: str,
    prediction: str | None,
    steps: int,
    stride: int | None,
    cut: Cut,
    blend: Blend,
) -> Student:
    """A student that draws without guidance.

    Args:
        model_scheduler: of the checkpoint, whose noise schedule is kept.
        scheduler: name of the solver.
        timestep_spacing: as in diffusers.
        prediction: what the student's UNet learns to predict; None for what it does predict.
        steps: num_inference_steps.
        stride: calls that share an encoder run; None for all.
        cut: where the encoder ends.
        blend: see `encache.runtime.blend`.

    Raises:
        PlanError: they do not fit together.
    """
    solver = make_scheduler(scheduler, model_scheduler)
    changes = {"timestep_spacing": timestep_spacing}
    if prediction:
        changes["prediction_type"] = prediction
    solver = type(solver).from_config(solver.config, **changes)
    stride = stride or count_calls(solver, steps)
    preset = Preset(
        scheduler=full_config(solver),
        steps=steps,
        guidance_scale=1.0,
        cut=cut,
        stride=stride,
        blend=blend,
        prior_noise=False,
    )
    policy = Policy(stride=stride, blend=blend, cut=cut)
    return Student(preset, solver, make_plan(solver, steps, policy), cut)


#: Turns prompts into text embeddings [B, L, D].
Embed = Callable[[Sequence[str]], Tensor]


class Questions:
    """The batches of a run: step k is a function of the run's seed and k alone.

    Args:
        pairs: where the teacher's latents are.
        number: how many of them are trained on; without `needs_pairs` every row is a new question.
        settings: the losses.
        num_timesteps: of the noise schedule.
        run, accelerator: how a step is spread out.
        embed: see `Embed`.
    """

    def __init__(
        self,
        pairs: Pairs,
        number: int,
        settings: Shared,
        num_timesteps: int,
        run: Run,
        accelerator: Accelerator,
        embed: Embed,
    ) -> None:
        self.pairs = pairs
        self.number = number
        self.settings = settings
        self.num_timesteps = num_timesteps
        self.run = run
        self.accelerator = accelerator
        self.embed = embed

    def __call__(self, start: int) -> Iterator[SharedBatch]:
        """The batches from a step on."""
        accumulation = self.run.recipe.accumulation
        processes = self.accelerator.process_index, self.accelerator.num_processes
        for batch in count(start * accumulation):
            step, rows = spread(batch, self.run.batch_size, accumulation, *processes)
            # The last number tells these draws from those of the pairs at an equal seed.
            yield self._batch([generator_of(self.run.seed, step, row, 1) for row in rows])

    def held_out(self) -> Iterator[SharedBatch]:
        """The pairs after those that are trained on, in batches of the run's size."""
        pairs = range(self.number, self.number + NUM_HELD_OUT)
        for first in range(0, NUM_HELD_OUT, self.run.batch_size):
            part = pairs[first : first + self.run.batch_size]
            yield self._ask(part, [generator_of(index) for index in part])

    def _batch(self, draws: Sequence[torch.Generator]) -> SharedBatch:
        limit = self.number if self.settings.needs_pairs else 2**31
        indices = [int(torch.randint(limit, (), generator=draw)) for draw in draws]
        return self._ask(indices, draws)

    def _ask(self, indices: Sequence[int], draws: Sequence[torch.Generator]) -> SharedBatch:
        device = self.accelerator.device
        prompts, noises = zip(*map(self.pairs.teacher.question, indices), strict=True)
        noise = torch.stack(noises).to(device)
        wanted = noise[:, None]
        if self.settings.needs_pairs:
            wanted = torch.stack([self.pairs.latents(index) for index in indices]).to(device)
        low, high = (0.02, 0.98) if self.settings.vsd_weight else (0.0, 1.0)
        bounds = int(low * self.num_timesteps), int(high * self.num_timesteps)
        delta_max = self.settings.fcr.delta_max

        def drawn(one: Any) -> Tensor:
            return torch.stack([one(draw) for draw in draws]).to(device)

        return SharedBatch(
            noise=noise,
            text=self.embed(prompts),
            wanted=wanted,
            empty=self.embed([""]),
            renoise=drawn(lambda draw: torch.randn(noise.shape[1:], generator=draw)),
            timesteps=drawn(lambda draw: torch.randint(*bounds, (), generator=draw)),
            deltas=drawn(lambda draw: torch.randint(1, delta_max + 1, (), generator=draw)),
            score_noise=drawn(lambda draw: torch.randn(noise.shape[1:], generator=draw)),
            score_timesteps=drawn(
                lambda draw: torch.randint(self.num_timesteps, (), generator=draw)
            ),
            dropped=drawn(lambda draw: torch.rand((), generator=draw) < _SCORE_DROPOUT),
        )


def shared_task(
    pipeline: StableDiffusionPipeline,
    student: Student,
    pairs: Pairs,
    number: int,
    settings: Shared,
    run: Run,
    accelerator: Accelerator,
    start: Checkpoint | None = None,
    draw_pairs: Callable[[int], None] = lambda number: None,
) -> Task:
    """Fine-tuning for a plan with `SharedObjective`.

    Args:
        pipeline: the loaded model.
        student: how the fine-tuned model samples.
        pairs: the teacher's pictures, of which `number` are trained on.
        settings: the losses.
        start: the student's first weights; by default the teacher's.
        draw_pairs: draws the first pairs, so many, as far as they are missing.

    Raises:
        EncacheError: the model predicts what training does not know, or cannot be cut so.
    """
    objective = SharedObjective(
        pipeline.unet,
        student.plan,
        pairs.teacher.calls if len(pairs.teacher.calls) > 1 else (student.plan.num_calls,),
        student.cut,
        pipeline.scheduler.alphas_cumprod,
        prediction_of(pipeline),
        settings,
        run.seed,
    )
    first_weights = unet_weights(start, pipeline.unet) if start else None

    def prepare() -> None:
        if settings.needs_pairs:
            draw_pairs(number + NUM_HELD_OUT)
        if first_weights:  # only now: the pairs, and the losses' copy, are the teacher's
            pipeline.unet.load_state_dict(first_weights)
        for part in (pipeline.text_encoder, pipeline.vae):  # the latter for validation
            part.to(accelerator.device, frozen_dtype(accelerator)).requires_grad_(False)

    @torch.no_grad()
    def embed(prompts: Sequence[str]) -> Tensor:
        tokens = tokenize(pipeline.tokenizer, list(prompts)).to(accelerator.device)
        return pipeline.text_encoder(tokens)[0].float()

    num_timesteps = len(pipeline.scheduler.alphas_cumprod)
    questions = Questions(pairs, number, settings, num_timesteps, run, accelerator, embed)

    def held_out_error() -> dict[str, float]:
        errors = [
            relative_error(objective.sample(one.noise, one.text)[:, -1], one.wanted[:, -1])
            for one in questions.held_out()
        ]
        return {"held_out_latent_error": torch.cat(errors).mean().item()}

    return Task(
        name="shared",
        objective=objective,
        batches=questions,
        facts={
            **({"teacher": pairs.teacher.facts, "pairs": number} if settings.needs_pairs else {}),
            "prompts": pairs.teacher.facts["prompts"],
            "plan": student.plan.hash(),
            "cut": student.cut,
            "loss": asdict(settings),
            "student": start.fingerprint if start else None,
        },
        draw=lambda prompts, seed: _draw(pipeline, student, prompts, seed),
        prepare=prepare,
        lora_use="it draws by the plan in that file's header, beside the weights that were trained",
        measure=held_out_error if settings.needs_pairs else dict,
        header={PRESET_KEY: student.preset.to_json()},
    )


def _draw(
    pipeline: StableDiffusionPipeline, student: Student, prompts: Sequence[str], seed: int
) -> Image.Image:
    wrapped = EncachePipeline.from_pipe(pipeline, student.cut)
    wrapped.set_progress_bar_config(disable=True)
    wrapped.scheduler = student.scheduler
    options = {
        "num_inference_steps": student.preset.steps,
        "guidance_scale": student.preset.guidance_scale,
        "stride": student.preset.stride,
        "blend": student.preset.blend,
    }
    return sample_grid(wrapped, prompts, columns=8, seed=seed, **options)
