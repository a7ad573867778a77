"""The losses of a student whose decoder calls share encoder runs, with the cache in the loop.

Features are not asked to be alike, as by FCR; pictures are asked to stay right while features are
shared (after arXiv 2505.21960).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from encache.model.spec import Cut
from encache.model.split import Halves
from encache.runtime.plan import Plan
from encache.train.composed import compose, latents_of, relative_error, runner
from encache.train.diffusion import Prediction, add_noise, noise_of
from encache.train.fcr import FCR, consistency, consistency_over_time
from encache.train.finetune import Objective, add_lora
from encache.train.loop import Losses


@dataclass(frozen=True)
class Shared:
    """The losses of a student whose decoder calls share encoder runs, and their weights.

    Attributes:
        latent_weight: of the relative squared error against the teacher's latents. It keeps every
            picture what the teacher draws of the same noise; what cannot be told apart it blurs.
        perceptual_weight: of the same pictures' relative squared difference in the features of the
            unchanged UNet's encoder, noised alike (after arXiv 2401.00110). It needs no other
            network, and asks for what the model sees rather than for every latent pixel.
        vsd_weight: of variational score distillation (arXiv 2305.16213, with guidance for both
            scores as arXiv 2505.21960 has it), which asks for likely pictures rather than for the
            teacher's, and so stays sharp. It needs no pairs.
        vsd_rank: of the LoRA on the unchanged UNet that follows the student's own distribution.
        vsd_rate: its learning rate, as a multiple of the student's.
        guidance_scale: of both scores in it; 1 or less is none.
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
    `deltas` [B] serve the losses that noise pictures again; the score's own loss has `score_noise`
    and `score_timesteps`, and `dropped` [B] leaves its prompts out.
    """

    noise: Tensor
    text: Tensor
    wanted: Tensor
    empty: Tensor
    renoise: Tensor
    timesteps: Tensor
    deltas: Tensor
    score_noise: Tensor
    score_timesteps: Tensor
    dropped: Tensor


class SharedObjective(Objective):
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
        super().__init__(unet)
        self.plan = plan
        self.ends = tuple(ends)
        self.cut = cut
        self.prediction = prediction
        self.settings = settings
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)
        # The model as it was; with an adapter of its own where the student's score is followed.
        self.teacher: UNet2DConditionModel | None = None
        if settings.perceptual_weight or settings.vsd_weight:
            self.teacher = copy.deepcopy(unet).requires_grad_(False).eval()
        Halves(unet, cut)  # refuses what cannot be cut so
        if settings.vsd_weight:
            add_lora(self.teacher, settings.vsd_rank, seed)

    def train(self, mode: bool = True) -> "SharedObjective":
        """Set the mode of the student; the teacher's stays."""
        super().train(mode)
        if self.teacher:
            self.teacher.eval()
        return self

    def group_of(self, name: str) -> tuple[str, float]:
        """The score's adapter learns at its own rate; see `encache.train.loop.GroupOf`."""
        adapter = name.startswith("teacher.")
        return ("score", self.settings.vsd_rate) if adapter else ("student", 1.0)

    def forward(self, batch: SharedBatch) -> Losses:
        """Draw the pictures and compare them."""
        settings = self.settings
        halves = Halves(self.unet, self.cut)  # anew: a copy of this module has its own UNet
        latents = self.sample(batch.noise, batch.text, halves)
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
            terms["fcr"] = self.fcr(halves, batch)
        return Losses(terms, {name: value.detach() for name, value in watched.items()})

    def sample(self, noise: Tensor, text: Tensor, halves: Halves | None = None) -> Tensor:
        """The student's latents [B, E, C, h, w] at the places that are compared."""
        halves = halves or Halves(self.unet, self.cut)
        history = compose(self.plan, halves, noise, {"text": text}, self.recompute)
        return torch.stack([latents_of(self.plan.samples[end], history) for end in self.ends], 1)

    def perceptual(self, latents: Tensor, batch: SharedBatch) -> Tensor:
        """How differently the unchanged encoder sees pictures and teacher's, noised alike."""
        encoder = Halves(self._frozen_teacher(), "mid").encoder

        def see(clean: Tensor) -> tuple[Tensor, ...]:
            noised = self._noised(clean, batch.renoise, batch.timesteps)
            return encoder(noised, batch.timesteps, {"text": batch.text})

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
        # Older PyTorch would use the adapter's casts, made here without gradient, for its own loss.
        torch.clear_autocast_cache()
        return 0.5 * (latents - target).square().mean()

    def score_error(self, latents: Tensor, batch: SharedBatch) -> Tensor:
        """The adapted teacher's denoising loss on the student's pictures (arXiv 2305.16213)."""
        assert self.teacher is not None
        timesteps = batch.score_timesteps
        text = torch.where(batch.dropped.view(-1, 1, 1), batch.empty, batch.text)
        noised = self._noised(latents, batch.score_noise, timesteps)
        self.teacher.enable_adapters()
        # Only here: what is run again backwards must find the adapter as it is then.
        if self.recompute:
            self.teacher.enable_gradient_checkpointing()
        output = self.teacher(noised, timesteps, text).sample
        self.teacher.disable_gradient_checkpointing()
        alpha_bar = self.alphas_cumprod[timesteps]
        predicted = noise_of(noised.float(), output.float(), alpha_bar, self.prediction)
        weight = alpha_bar.view(-1, 1, 1, 1)
        return (weight * (predicted - batch.score_noise).square()).mean()

    def fcr(self, halves: Halves, batch: SharedBatch) -> Tensor:
        """lambda ||Enc(x_t) - Enc(x_{t-D})||^2 of the student on the teacher's pictures."""

        def encode(timesteps: Tensor) -> tuple[Tensor, ...]:
            noised = self._noised(batch.wanted[:, -1], batch.noise, timesteps)
            return runner(self.recompute)(halves.encoder, noised, timesteps, {"text": batch.text})

        older = encode(batch.timesteps)
        return consistency_over_time(
            encode, older, batch.timesteps, batch.deltas, self.settings.fcr
        )

    def _guided_noise(self, noised: Tensor, batch: SharedBatch, *, adapted: bool) -> Tensor:
        """eps with guidance, by the teacher or by its adapted twin."""
        assert self.teacher is not None
        (self.teacher.enable_adapters if adapted else self.teacher.disable_adapters)()
        texts = [batch.text]
        if self.settings.guidance_scale > 1:
            texts.insert(0, batch.empty.expand_as(batch.text))
        rows, timesteps = noised.repeat(len(texts), 1, 1, 1), batch.timesteps.repeat(len(texts))
        output = self.teacher(rows, timesteps, torch.cat(texts)).sample
        alpha_bar = self.alphas_cumprod[timesteps]
        noise = noise_of(rows.float(), output.float(), alpha_bar, self.prediction)
        *without, given = noise.chunk(len(texts))
        return without[0].lerp(given, self.settings.guidance_scale) if without else given

    def _frozen_teacher(self) -> UNet2DConditionModel:
        assert self.teacher is not None
        if self.settings.vsd_weight:
            self.teacher.disable_adapters()
        return self.teacher

    def _noised(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return add_noise(clean, noise, self.alphas_cumprod[timesteps]).to(self.unet.dtype)
