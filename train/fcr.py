"""Losses that let the encoder be skipped: consistent features (FCR), and cached distillation."""

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from encache.errors import EncacheError
from encache.model.spec import Cut, ImageSpec
from encache.model.split import Halves
from encache.model.text import tokenize
from encache.train.composed import runner
from encache.train.data import Draws, Example, Pictures, Steps, batches
from encache.train.diffusion import (
    Prediction,
    add_noise,
    ddim_step,
    min_snr_weight,
    target,
    weighted_error,
)
from encache.train.finetune import Objective, Run, Task
from encache.train.loop import Losses
from encache.train.validation import sample_grid

Form = Literal["raw", "relative", "spread"]
StopGrad = Literal["none", "older", "newer"]


@dataclass(frozen=True)
class FCR:
    """L = L_denoise + weight * E ||Enc(x_t) - Enc(x_{t-D})||^2, D ~ U{1..delta_max}.

    Attributes:
        weight: lambda; 0 is plain fine-tuning and costs no second encoder run.
        delta_max: D_max in training timesteps.
        form: "raw" squared differences; "relative" to each picture's own mean square, so that
            shrinking the features does not lower the loss; or relative to their "spread", so that
            adding a constant to them does not either.
        stop_grad: which side is held still: the "older" (noisier, the key call in sampling), the
            "newer", or "none".
        cut: whose features are compared.
        snr_gamma: of the min-SNR weighting; None for none.
        cached_weight: of `FCRObjective.cached_error`; 0 does without.
        cached_stride: distance of its key calls in training timesteps.
    """

    weight: float = 0.1
    delta_max: int = 10
    form: Form = "raw"
    stop_grad: StopGrad = "none"
    cut: Cut = "up2"
    snr_gamma: float | None = None
    cached_weight: float = 0.0
    cached_stride: int = 100


@dataclass(frozen=True)
class NoisedBatch:
    """Clean latents [B, 4, h, w], the noise to add, timesteps [B], text [B, L, D].

    `deltas` [B] in 1..D_max separates the pairs of FCR; `places` [B] in [0, 1) says where in its
    segment a cached call lies.
    """

    clean: Tensor
    noise: Tensor
    timesteps: Tensor
    deltas: Tensor
    places: Tensor
    text: Tensor


def consistency(
    older: Sequence[Tensor], newer: Sequence[Tensor], form: Form, stop_grad: StopGrad
) -> Tensor:
    """Mean over pictures and over the tensors that cross the cut of their mean squared difference.

    The relative form divides by the mean square of both sides, the spread form by the mean square
    of what is left when each channel's mean over the picture is taken away. Both let the gradient
    through the divisor: with a detached one the loss keeps its value when features shrink, but its
    gradient still shrinks them.

    Args:
        older, newer: features of the same pictures at t and at t - D, each [B, C, h', w'].
        form: see `FCR`.
        stop_grad: see `FCR`.

    Raises:
        EncacheError: features of one pixel have no spread.
    """
    differences = []
    for old, new in zip(older, newer, strict=True):
        if form == "spread" and old.shape[-2:].numel() == 1:
            raise EncacheError(
                "Features of one pixel have no spread, by which --fcr-form spread divides. Train "
                "on larger pictures (--resolution), or use --fcr-form relative."
            )
        old = old.detach() if stop_grad == "older" else old
        new = new.detach() if stop_grad == "newer" else new
        change = mean_square(old - new)
        if form != "raw":
            size = mean_square if form == "relative" else spread
            change = 2 * change / (size(old) + size(new))
        differences.append(change.mean())
    return torch.stack(differences).mean()


#: Runs the encoder on clean latents noised to timesteps [B]; returns its features.
EncodeNoised = Callable[[Tensor], Sequence[Tensor]]


def consistency_over_time(
    encode: EncodeNoised,
    older: Sequence[Tensor],
    timesteps: Tensor,
    deltas: Tensor,
    settings: FCR,
) -> Tensor:
    """lambda E ||Enc(x_t) - Enc(x_{t-D})||^2 for the features `older` of x_t.

    Args:
        encode: see `EncodeNoised`; the picture and its noise are those of `older`.
        timesteps, deltas: t and D [B]. Where t < D the pair ends at 0: the denoising loss still
            needs the lowest timesteps.
    """
    newer = encode((timesteps - deltas).clamp(min=0))
    return settings.weight * consistency(older, newer, settings.form, settings.stop_grad)


def mean_square(tensor: Tensor) -> Tensor:
    """Mean square of every picture's features [B, C, h', w'] -> [B], in float32."""
    return tensor.float().square().mean(dim=(1, 2, 3))


def spread(tensor: Tensor) -> Tensor:
    """Variance over the pixels, the mean over channels, of features [B, C, h', w'] -> [B]."""
    return mean_square(tensor - tensor.mean(dim=(2, 3), keepdim=True))


class FCRObjective(Objective):
    """The UNet with its loss as one forward pass, which is what data parallel training wraps."""

    alphas_cumprod: Tensor

    def __init__(
        self,
        unet: UNet2DConditionModel,
        alphas_cumprod: Tensor,
        prediction: Prediction,
        settings: FCR,
    ) -> None:
        super().__init__(unet)
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)
        self.prediction = prediction
        self.settings = settings
        # In a list, so that it is no part of this module: never trained, averaged or saved.
        self._teacher: list[UNet2DConditionModel] = []
        if settings.cached_weight:
            self._teacher.append(copy.deepcopy(unet).requires_grad_(False).eval())

    def forward(self, batch: NoisedBatch) -> Losses:
        """Noise, predict, compare; watch the size of every tensor that crosses the cut."""
        settings = self.settings
        # Made anew because it holds no state, and a copy of this module must split its own UNet.
        halves = Halves(self.unet, settings.cut)
        older = self._encode(
            halves, self._noised(batch, batch.timesteps), batch.timesteps, batch.text
        )
        predicted = self._decode(halves, older, batch.timesteps, batch.text)
        alpha_bar = self.alphas_cumprod[batch.timesteps]
        wanted = target(batch.clean, batch.noise, alpha_bar, self.prediction)
        weight = min_snr_weight(alpha_bar, settings.snr_gamma, self.prediction)
        terms = {"denoise": weighted_error(predicted, wanted, weight)}
        if settings.weight:
            terms["fcr"] = consistency_over_time(
                lambda t: self._encode(halves, self._noised(batch, t), t, batch.text),
                older,
                batch.timesteps,
                batch.deltas,
                settings,
            )
        if settings.cached_weight:
            terms["cached"] = settings.cached_weight * self.cached_error(halves, older, batch)
        sizes = {
            f"mean_square/{feature.name}": mean_square(tensor).mean().detach()
            for feature, tensor in zip(halves.features, older, strict=True)
        }
        return Losses(terms, sizes)

    def cached_error(self, halves: Halves, older: Sequence[Tensor], batch: NoisedBatch) -> Tensor:
        """How far a call on extrapolated features is from what the unchanged UNet says there.

        The teacher takes two DDIM steps from x_t, to the next key call and to a call of its
        segment, so these latents follow from each other as they do in sampling, which noised
        pictures do not (there is no guidance here). The student decodes that call from the features
        of both key calls, extrapolated in the timestep, and is compared with the teacher's own
        prediction.
        """
        teacher = self._teacher[0].to(batch.clean.device)
        stride = self.settings.cached_stride
        first = batch.timesteps
        second = (first - stride).clamp(min=0)
        gap = first - second
        distance = torch.minimum((batch.places * gap).long(), second)
        call = second - distance
        with torch.no_grad():
            x = self._noised(batch, first)
            key = self._step(x, teacher(x, first, batch.text).sample, first, second)
            x = self._step(key, teacher(key, second, batch.text).sample, second, call)
            wanted = teacher(x, call, batch.text).sample
        newer = self._encode(halves, key, second, batch.text)
        slope = (distance / gap.clamp(min=1)).view(-1, 1, 1, 1)
        features = [
            new + slope.to(new.dtype) * (new - old) for old, new in zip(older, newer, strict=True)
        ]
        predicted = self._decode(halves, features, call, batch.text)
        alpha_bar = self.alphas_cumprod[call]
        weight = min_snr_weight(alpha_bar, self.settings.snr_gamma, self.prediction)
        return weighted_error(predicted, wanted, weight)

    def _step(self, x: Tensor, output: Tensor, before: Tensor, after: Tensor) -> Tensor:
        alphas = self.alphas_cumprod
        stepped = ddim_step(
            x.float(), output.float(), alphas[before], alphas[after], self.prediction
        )
        return stepped.to(x.dtype)

    def _noised(self, batch: NoisedBatch, timesteps: Tensor) -> Tensor:
        noised = add_noise(batch.clean, batch.noise, self.alphas_cumprod[timesteps])
        return noised.to(self.unet.dtype)

    def _encode(
        self, halves: Halves, latents: Tensor, timesteps: Tensor, text: Tensor
    ) -> tuple[Tensor, ...]:
        """One encoder call, with one timestep per picture."""
        return runner(self.recompute)(halves.encoder, latents, timesteps, {"text": text})

    def _decode(
        self, halves: Halves, features: Sequence[Tensor], timesteps: Tensor, text: Tensor
    ) -> Tensor:
        """One decoder call on its own features, with one timestep per picture."""
        weights = features[0].new_ones(1, 1)
        ring = [one[None] for one in features]
        decode = runner(self.recompute)
        return decode(halves.decoder, ring, weights, timesteps[None], {"text": text})


def fcr_task(
    pipeline: StableDiffusionPipeline,
    pictures: Pictures,
    settings: FCR,
    run: Run,
    accelerator: Accelerator,
    *,
    resolution: int | None = None,
    caption_dropout: float = 0.1,
    flip: bool = False,
    num_workers: int = 0,
) -> Task:
    """Fine-tuning on pictures with `FCRObjective`.

    Args:
        pipeline: the loaded model.
        pictures: the data.
        settings: the loss.
        resolution: in pixels; by default the model's own, or the smaller of the two.
        caption_dropout: share of captions left out.
        flip: mirror half of the pictures.
        num_workers: processes that read pictures.

    Raises:
        EncacheError: the model predicts what training does not know, or the resolution is none.
    """
    prediction = prediction_of(pipeline)
    draws = Draws(
        **_sizes(pipeline, resolution),
        num_timesteps=len(pipeline.scheduler.alphas_cumprod),
        delta_max=settings.delta_max,
        caption_dropout=caption_dropout,
        flip=flip,
        seed=run.seed,
    )
    steps = Steps(
        pictures,
        draws,
        run.batch_size,
        run.recipe.accumulation,
        accelerator.process_index,
        accelerator.num_processes,
    )
    prepare = Preparation(pipeline, accelerator)
    alphas_cumprod = pipeline.scheduler.alphas_cumprod
    objective = FCRObjective(pipeline.unet, alphas_cumprod, prediction, settings)
    return Task(
        name="fcr",
        objective=objective,
        batches=lambda start: map(prepare, batches(steps, start, num_workers)),
        facts={"data": pictures.fingerprint, "loss": asdict(settings), **asdict(draws)},
        draw=lambda prompts, seed: sample_grid(
            pipeline, prompts, columns=8, seed=seed, guidance_scale=4.0
        ),
        finish=prepare.report_unreadable,
    )


def prediction_of(pipeline: StableDiffusionPipeline) -> Prediction:
    """What the model predicts, if training knows it; or raise EncacheError."""
    prediction = pipeline.scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise EncacheError(
            f"This model predicts {prediction!r}; training knows epsilon and v_prediction."
        )
    return prediction


def _sizes(pipeline: StableDiffusionPipeline, resolution: int | None) -> dict[str, Any]:
    spec = ImageSpec.of(pipeline.unet.config, pipeline.vae.config)
    resolution = resolution or min(spec.picture_size)
    if resolution % spec.downscale:
        raise EncacheError(f"The resolution must be a multiple of {spec.downscale} pixels.")
    side = resolution // spec.downscale
    return {"resolution": resolution, "latent_shape": (spec.channels, side, side)}


class Preparation:
    """Turns examples into what the objective takes, on the device, with the frozen networks."""

    def __init__(self, pipeline: StableDiffusionPipeline, accelerator: Accelerator) -> None:
        self.device = accelerator.device
        self.dtype = frozen_dtype(accelerator)
        self.vae = pipeline.vae.to(self.device, self.dtype).requires_grad_(False)
        self.text_encoder = pipeline.text_encoder.to(self.device, self.dtype).requires_grad_(False)
        self.tokenizer = pipeline.tokenizer
        self.unreadable: set[str] = set()

    @torch.no_grad()
    def __call__(self, examples: Sequence[Example]) -> NoisedBatch:
        """Encode the pictures and the captions of one batch."""
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
        """Name the pictures that could not be read, on stderr."""
        if self.unreadable:
            some = ", ".join(sorted(self.unreadable)[:10])
            print(f"Skipped {len(self.unreadable)} unreadable pictures: {some}", file=sys.stderr)


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """Of the networks that are not trained: the precision that the run is mixed with."""
    precisions = {"fp16": torch.float16, "bf16": torch.bfloat16}
    return precisions.get(accelerator.mixed_precision, torch.float32)
