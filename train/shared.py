"""Training with the cache in the loop: whole pictures through few encoder runs.

The decoder calls that share an encoder run are one batch, and the solver is a table. So a sampler
with one encoder run is one run of the encoder, one of the decoder and one small matrix product,
differentiable from noise to picture (after arXiv 2505.21960, which trains it by distillation).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from encache.model.checkpoint import Checkpoint
from encache.model.features import Cut
from encache.model.loading import load_pipeline
from encache.model.preset import PRESET_KEY, Preset
from encache.model.split import SplitUNet
from encache.model.text import tokenize
from encache.runtime.blend import Blend
from encache.runtime.pipeline import EncachePipeline
from encache.runtime.plan import Encode, Plan, Row, make_plan
from encache.runtime.schedulers import full_config, make_scheduler
from encache.runtime.solver import count_calls
from encache.train.diffusion import Prediction, add_noise, noise_of
from encache.train.fcr import FCR, consistency, consistency_over_time, frozen_dtype, prediction_of
from encache.train.finetune import Run, Task, add_lora
from encache.train.loop import Losses, generator_of
from encache.train.pairs import Pairs
from encache.train.validation import sample_grid

#: Pairs beyond those that are trained on, whose error is watched.
NUM_HELD_OUT = 64
#: Share of the score's prompts that are left out, which guidance needs.
_SCORE_DROPOUT = 0.1


@dataclass(frozen=True)
class Shared:
    """The sum of losses of a student whose decoder calls share encoder runs.

    Attributes:
        latent_weight: of the relative squared error against the teacher's latents. It keeps every
            picture what the teacher draws of the same noise; what cannot be told apart it blurs.
        perceptual_weight: of the same pictures' relative squared difference in the features of the
            unchanged UNet's encoder, noised alike (after arXiv 2401.00110). It needs no other
            network, and asks for what the model sees rather than for every latent pixel.
        vsd_weight: of variational score distillation (arXiv 2305.16213), which asks for likely
            pictures rather than for the teacher's, and so stays sharp. It needs no pairs.
        vsd_rank: of the LoRA on the unchanged UNet that follows the student's own distribution.
        vsd_rate: its learning rate, as a multiple of the student's.
        guidance_scale: of the teacher's score in it.
        fcr: the regulariser; weight 0 does without. Its cut is the student's.
    """

    latent_weight: float = 1.0
    perceptual_weight: float = 0.0
    vsd_weight: float = 0.0
    vsd_rank: int = 64
    vsd_rate: float = 100.0
    guidance_scale: float = 7.5
    fcr: FCR = field(default_factory=lambda: FCR(weight=0.0))

    @property
    def needs_pairs(self) -> bool:
        """Whether any loss looks at the teacher's latents."""
        return bool(self.latent_weight or self.perceptual_weight or self.fcr.weight)


@dataclass(frozen=True)
class SharedBatch:
    """Unit noise [B, C, h, w], text [B, L, D], and what the losses draw.

    `wanted` [B, E, C, h, w] are the teacher's latents at the E places that are compared; `empty`
    [1, L, D] is the text of no prompt. Fresh noise `renoise` [B, C, h, w], `timesteps` [B] and
    `deltas` [B] serve the losses that noise pictures again; `dropped` [B] leaves prompts out.
    """

    noise: Tensor
    text: Tensor
    wanted: Tensor
    empty: Tensor
    renoise: Tensor
    timesteps: Tensor
    deltas: Tensor
    dropped: Tensor


def compose(
    plan: Plan, split: SplitUNet, noise: Tensor, text: Tensor, recompute: bool = False
) -> Tensor:
    """Run a plan without guidance, as one differentiable function of the UNet's weights.

    Args:
        plan: what to run.
        split: the UNet in two, at any cut.
        noise: z [B, C, h, w].
        text: embeddings [B, L, D].
        recompute: keep no activations inside the halves.

    Returns:
        The history (z, eps_0, ..., eps_{N-1}) [N + 1, B, C, h, w], float32; a row of
        `plan.samples` over it gives latents.
    """
    run = _recomputed if recompute else _called
    dtype = split.encoder.unet.dtype
    history = noise[None]
    ring: list[tuple[Tensor, ...]] = [()] * plan.num_slots
    for step in plan.steps:
        if isinstance(step, Encode):
            latents = latents_of(step.row, history).to(dtype)
            ring[step.slot] = run(split.encoder, latents, noise.new_tensor([step.timestep]), text)
        else:
            filled = next(features for features in ring if features)
            slots = [features or filled for features in ring]  # what is not filled yet weighs 0
            features = [torch.stack(tensors) for tensors in zip(*slots, strict=True)]
            weights, timesteps = noise.new_tensor(step.weights), noise.new_tensor(step.timesteps)
            predicted = run(split.decoder, features, weights, timesteps, text)
            history = torch.cat([history, predicted.float().view(-1, *noise.shape)])
    return history


def latents_of(row: Row, history: Tensor) -> Tensor:
    """Combine the history [K, B, C, h, w] by the first K of a row's coefficients."""
    return torch.tensordot(history.new_tensor(row[: len(history)]), history, 1)


def _called(half: nn.Module, *arguments: Any) -> Any:
    return half(*arguments)


def _recomputed(half: nn.Module, *arguments: Any) -> Any:
    return checkpoint(half, *arguments, use_reentrant=False)


def relative_error(latents: Tensor, wanted: Tensor) -> Tensor:
    """||x - r||^2 / ||r||^2 of every picture: [B, ...] -> [B]."""
    difference = (latents - wanted).flatten(1).square().sum(1)
    return difference / wanted.flatten(1).square().sum(1)


class SharedObjective(nn.Module):
    """The UNet, composed into its sampler, with the sum of losses.

    Args:
        unet: trained.
        plan: how the student samples.
        ends: the numbers of calls after which it is compared with the teacher, in rising order.
        cut: where it is cut.
        alphas_cumprod: of the noise schedule [T].
        prediction: what the UNet predicts.
        settings: the losses.
        seed: of the score's adapter.
    """

    alphas_cumprod: Tensor

    def __init__(
        self,
        unet: UNet2DConditionModel,
        plan: Plan,
        ends: Sequence[int],
        cut: Cut,
        alphas_cumprod: Tensor,
        prediction: Prediction,
        settings: Shared,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.plan = plan
        self.ends = tuple(ends)
        self.cut = cut
        self.prediction = prediction
        self.settings = settings
        self.recompute = False
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)
        # The model as it was; with an adapter of its own where the student's score is followed.
        self.teacher: UNet2DConditionModel | None = None
        if settings.perceptual_weight or settings.vsd_weight:
            self.teacher = copy.deepcopy(unet).requires_grad_(False).eval()
        if settings.vsd_weight:
            add_lora(self.teacher, settings.vsd_rank, seed)

    def enable_gradient_checkpointing(self) -> None:
        """Trade time for memory: keep no activations inside the halves, nor inside blocks."""
        self.unet.enable_gradient_checkpointing()
        self.recompute = True

    def rate_of(self, name: str) -> float:
        """The multiple of the learning rate with which a parameter of this module learns."""
        return self.settings.vsd_rate if name.startswith("teacher.") else 1.0

    def forward(self, batch: SharedBatch) -> Losses:
        """Draw the pictures and compare them."""
        settings = self.settings
        split = SplitUNet(self.unet, self.cut)  # anew: a copy of this module has its own UNet
        latents = self.sample(batch.noise, batch.text, split)
        terms: dict[str, Tensor] = {}
        watched: dict[str, Tensor] = {}
        if settings.needs_pairs:
            error = relative_error(latents.flatten(0, 1), batch.wanted.flatten(0, 1)).mean()
            if settings.latent_weight:
                terms["latent"] = settings.latent_weight * error
            watched["latent_error"] = relative_error(latents[:, -1], batch.wanted[:, -1]).mean()
        if settings.perceptual_weight:
            difference = self.perceptual(latents[:, -1], batch)
            terms["perceptual"] = settings.perceptual_weight * difference
        if settings.vsd_weight:
            terms["vsd"] = settings.vsd_weight * self.score_distillation(latents[:, -1], batch)
            terms["score"] = self.score_error(latents[:, -1].detach(), batch)
        if settings.fcr.weight:
            terms["fcr"] = self.fcr(split, batch)
        return Losses(terms, {name: value.detach() for name, value in watched.items()})

    def sample(self, noise: Tensor, text: Tensor, split: SplitUNet | None = None) -> Tensor:
        """The student's latents [B, E, C, h, w] at the places that are compared."""
        split = split or SplitUNet(self.unet, self.cut)
        history = compose(self.plan, split, noise, text, self.recompute)
        return torch.stack([latents_of(self.plan.samples[end], history) for end in self.ends], 1)

    def perceptual(self, latents: Tensor, batch: SharedBatch) -> Tensor:
        """How differently the unchanged encoder sees pictures and teacher's, noised alike."""
        encoder = SplitUNet(self._frozen_teacher(), "mid").encoder

        def see(clean: Tensor) -> tuple[Tensor, ...]:
            noised = self._noised(clean, batch.renoise, batch.timesteps)
            return encoder(noised, batch.timesteps, batch.text)

        with torch.no_grad():
            wanted = see(batch.wanted[:, -1])
        return consistency(wanted, see(latents), "relative", "older")

    def score_distillation(self, latents: Tensor, batch: SharedBatch) -> Tensor:
        """A loss whose gradient moves pictures from the student's score to the teacher's."""
        with torch.no_grad():
            noised = self._noised(latents, batch.renoise, batch.timesteps)
            teacher = self._guided_noise(noised, batch, adapted=False)
            student = self._guided_noise(noised, batch, adapted=True)
            variance = 1 - self.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
            target = latents - variance * (teacher - student)
        return 0.5 * (latents - target).square().mean()

    def score_error(self, latents: Tensor, batch: SharedBatch) -> Tensor:
        """The adapted teacher's denoising loss on the student's pictures (arXiv 2305.16213)."""
        assert self.teacher is not None
        # The noise of the next row at its level: not that which the distillation looked at.
        renoise, timesteps = batch.renoise.roll(1, 0), batch.timesteps.roll(1, 0)
        text = torch.where(batch.dropped.view(-1, 1, 1), batch.empty, batch.text)
        noised = self._noised(latents, renoise, timesteps)
        self.teacher.enable_adapters()
        output = self.teacher(noised, timesteps, text).sample
        alpha_bar = self.alphas_cumprod[timesteps]
        predicted = noise_of(noised.float(), output.float(), alpha_bar, self.prediction)
        weight = alpha_bar.view(-1, 1, 1, 1)
        return (weight * (predicted - renoise).square()).mean()

    def fcr(self, split: SplitUNet, batch: SharedBatch) -> Tensor:
        """lambda ||Enc(x_t) - Enc(x_{t-D})||^2 of the student on the teacher's pictures."""

        def encode(timesteps: Tensor) -> tuple[Tensor, ...]:
            noised = self._noised(batch.wanted[:, -1], batch.noise, timesteps)
            run = _recomputed if self.recompute else _called
            return run(split.encoder, noised, timesteps, batch.text)

        older = encode(batch.timesteps)
        return consistency_over_time(
            encode, older, batch.timesteps, batch.deltas, self.settings.fcr
        )

    def _guided_noise(self, noised: Tensor, batch: SharedBatch, *, adapted: bool) -> Tensor:
        """eps with guidance, by the teacher or by its adapted twin."""
        assert self.teacher is not None
        (self.teacher.enable_adapters if adapted else self.teacher.disable_adapters)()
        text = torch.cat([batch.empty.expand_as(batch.text), batch.text])
        timesteps = batch.timesteps.repeat(2)
        output = self.teacher(noised.repeat(2, 1, 1, 1), timesteps, text).sample
        alpha_bar = self.alphas_cumprod[timesteps]
        noise = noise_of(
            noised.repeat(2, 1, 1, 1).float(), output.float(), alpha_bar, self.prediction
        )
        without, given = noise.chunk(2)
        return without + self.settings.guidance_scale * (given - without)

    def _frozen_teacher(self) -> UNet2DConditionModel:
        assert self.teacher is not None
        if self.settings.vsd_weight:
            self.teacher.disable_adapters()
        return self.teacher

    def _noised(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return add_noise(clean, noise, self.alphas_cumprod[timesteps]).to(self.unet.dtype)


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
        same = full_config(self.scheduler) == full_config(teacher) and self.preset.steps == steps
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
    solver = type(solver).from_config({**solver.config, **changes})
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
    return Student(preset, solver, make_plan(solver, steps, stride=stride, blend=blend), cut)


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
        rows = self.run.batch_size
        for batch in count(start * self.run.recipe.accumulation):
            step, part = divmod(batch, self.run.recipe.accumulation)
            first = (part * self.accelerator.num_processes + self.accelerator.process_index) * rows
            yield self._batch([generator_of(self.run.seed, step, first + i) for i in range(rows)])

    def held_out(self) -> SharedBatch:
        """The pairs after those that are trained on, without anything drawn."""
        return self._ask(range(self.number, self.number + NUM_HELD_OUT))

    def _batch(self, draws: Sequence[torch.Generator]) -> SharedBatch:
        limit = self.number if self.settings.needs_pairs else 2**31
        indices = [int(torch.randint(limit, (), generator=draw)) for draw in draws]
        return self._ask(indices, draws)

    def _ask(
        self, indices: Sequence[int], draws: Sequence[torch.Generator] | None = None
    ) -> SharedBatch:
        draws = draws or [generator_of(index) for index in indices]
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
) -> Task:
    """Fine-tuning for a plan with `SharedObjective`.

    Args:
        pipeline: the loaded model.
        student: how the fine-tuned model samples.
        pairs: the teacher's pictures, of which `number` and `NUM_HELD_OUT` more are drawn.
        settings: the losses.
        start: the student's first weights; by default the teacher's.

    Raises:
        EncacheError: the model predicts what training does not know.
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
    if start:  # now that the losses have their copy of the teacher
        pipeline.unet.load_state_dict(load_pipeline(start).unet.state_dict())
    dtype = frozen_dtype(accelerator)
    text_encoder = pipeline.text_encoder.to(accelerator.device, dtype).requires_grad_(False)

    @torch.no_grad()
    def embed(prompts: Sequence[str]) -> Tensor:
        tokens = tokenize(pipeline.tokenizer, list(prompts)).to(accelerator.device)
        return text_encoder(tokens)[0].float()

    num_timesteps = len(pipeline.scheduler.alphas_cumprod)
    questions = Questions(pairs, number, settings, num_timesteps, run, accelerator, embed)

    def held_out_error() -> dict[str, float]:
        batch = questions.held_out()
        latents = objective.sample(batch.noise, batch.text)
        error = relative_error(latents[:, -1], batch.wanted[:, -1]).mean()
        return {"held_out_latent_error": error.item()}

    return Task(
        name="shared",
        objective=objective,
        enable_gradient_checkpointing=objective.enable_gradient_checkpointing,
        batches=questions,
        facts={
            "teacher": asdict(pairs.teacher),
            "pairs": number,
            "plan": student.plan.hash(),
            "cut": student.cut,
            "loss": asdict(settings),
            "student": start.fingerprint if start else None,
        },
        draw=lambda prompts, seed: _draw(pipeline, student, prompts, seed),
        rate_of=objective.rate_of,
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
