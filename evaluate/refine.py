"""Plans refined by gradients: all numbers together, for the picture at the end.

A fit by segments asks every segment for the full sampler's latents. What matters is where the last
one ends, and a plan is a differentiable function of its coefficients and of the timesteps that the
denoiser is told. Both are moved by Adam (arXiv 1412.6980) on the mean of log(e_i + m), where e_i is
the relative squared error of a picture and m the median that the plan starts with. So pictures that
go astray pull by the same weights as in the fit by segments, 1 / (1 + e_i / m).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import cos, pi, sqrt

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from encache.evaluate.fit import (
    Batch,
    Denoise,
    combine,
    evaluations_of,
    input_scales,
    relative_errors,
    run_plan,
    typical_error,
    with_samples,
)
from encache.model.backbone import Backbone, Conditions, backbone_of
from encache.model.checkpoint import Checkpoint
from encache.model.loading import load_pipeline
from encache.model.spec import rows_per_picture
from encache.runtime.guidance import make_guide
from encache.runtime.plan import Branches, Plan
from encache.runtime.sampler import evaluate

State = Mapping[str, np.ndarray]
#: Of Adam: how slowly its two means follow.
_MOMENTA = (0.9, 0.95)
#: Least variance of a direction of change, as a share of all directions' mean.
_LEAST = 1e-5
#: Relative squared error below which there is nothing to refine.
_EXACT = 1e-12


@dataclass(frozen=True)
class Refinement:
    """How long and how fast.

    Attributes:
        steps: of gradient descent, each on one batch of pictures.
        kept: steps between two looks at the validation pictures, and the most that a stop loses.
        rate: about how far a number moves in a step, in the units of `Freedom`, as a share of
            sqrt(m); it falls to zero as a cosine.
        timestep_unit: training timesteps that count as one unit.
    """

    steps: int = 80
    kept: int = 10
    rate: float = 0.04
    timestep_unit: float = 500.0


def differentiable(backbone: Backbone, guidance_scale: float | None) -> Denoise:
    """A denoiser in PyTorch as a function with gradients, which keeps no activations."""
    guide = make_guide(guidance_scale)
    denoise = partial(backbone.call, backbone.module)

    def differentiable_denoise(
        latents: Tensor, timestep: Tensor, conditions: Conditions, branches: Branches
    ) -> Tensor:
        return checkpoint(
            evaluate, denoise, guide, latents, timestep, conditions, branches, use_reentrant=False
        )

    return differentiable_denoise


def differentiable_model(
    checkpoint: Checkpoint, guidance_scale: float, device: torch.device
) -> Denoise:
    """A checkpoint's denoiser, loaded for that in fp32, where the pictures are."""
    unet = load_pipeline(checkpoint, torch.float32, device).unet.requires_grad_(False)
    guided = rows_per_picture(guidance_scale) == 2
    return differentiable(backbone_of(unet), guidance_scale if guided else None)


class Freedom:
    """The numbers of a plan that are refined, as one vector in units that are alike.

    A row's coefficients c = c_0 + L^-T theta change along directions whose effects on the latents
    are uncorrelated and of unit size, by the Gram matrix A = L L^T of what the history holds.

    Args:
        plan: what is refined.
        histories: what it fills on some pictures, columns [n, C, h, w] each.
        timestep_unit: see `Refinement`.
        last: the greatest training timestep, which the denoiser knows.
    """

    def __init__(
        self, plan: Plan, histories: Sequence[Sequence[Tensor]], timestep_unit: float, last: float
    ) -> None:
        self.plan = plan
        self._unit, self._last = timestep_unit, last
        self._steps = evaluations_of(plan)
        self._scales = input_scales(plan)
        self._stops = [*plan.key_calls[1:], plan.num_calls]
        columns = [torch.stack(list(one)).flatten(1).double().cpu() for one in histories]
        gram = torch.stack([one @ one.T / one.shape[1] for one in columns]).mean(0)
        self._whitened = [_inverse_root(gram[:filled, :filled]) for filled in plan.filled]
        self._sizes = [*plan.filled, len(self._steps)]

    def __len__(self) -> int:
        return sum(self._sizes)

    def rows(self, numbers: Tensor) -> list[Tensor]:
        """Coefficients of the latents after each segment, as far as columns are filled."""
        thetas = numbers.split(self._sizes)[:-1]
        starts = [numbers.new_tensor(self.plan.samples[stop]) for stop in self._stops]
        return [
            start[: len(theta)] + root.to(theta) @ theta
            for start, root, theta in zip(starts, self._whitened, thetas, strict=True)
        ]

    def timesteps(self, numbers: Tensor) -> Tensor:
        """What the denoiser is told at each evaluation [E]."""
        told = numbers.new_tensor([step.timestep for step in self._steps])
        return (told + self._unit * numbers.split(self._sizes)[-1]).clamp(0, self._last)

    def sample(self, numbers: Tensor, batch: Batch, denoise: Denoise) -> Tensor:
        """Latents [n, C, h, w] that the plan makes with these numbers, with gradients."""
        history = [batch.noise]
        row = numbers.new_tensor(self.plan.samples[0][:1])
        told = zip(
            self._steps, self._scales, self.timesteps(numbers), self.rows(numbers), strict=True
        )
        for step, scale, timestep, following in told:
            latents = scale * combine(row, history)
            history.extend(denoise(latents, timestep[None], batch.conditions, step.branches))
            row = following
        return combine(row, history)

    def freeze(self, numbers: Tensor) -> Plan:
        """The plan with these numbers; its latents within segments stay as they were."""
        samples = torch.tensor(self.plan.samples, dtype=torch.float64)
        for stop, row in zip(self._stops, self.rows(numbers), strict=True):
            samples[stop, : len(row)] = row.double()
        steps = [
            replace(step, timestep=float(timestep))
            for step, timestep in zip(self._steps, self.timesteps(numbers), strict=True)
        ]
        return with_samples(replace(self.plan, steps=tuple(steps)), samples, self._scales)


def _inverse_root(gram: Tensor) -> Tensor:
    """L^-T of a Gram matrix L L^T, whose directions without effect are held."""
    least = _LEAST * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.inv(torch.linalg.cholesky(gram + least)).T


def refine(
    plan: Plan,
    batches: Sequence[Batch],
    validation: Sequence[Batch],
    denoise: Denoise,
    gradients: Denoise,
    settings: Refinement,
    last: float,
    keep: Callable[[int, Callable[[], State]], State] = lambda step, make: make(),
    on_step: Callable[[], None] = lambda: None,
) -> Plan:
    """Refine a fitted plan; see the module.

    Args:
        plan: what is refined.
        batches: to learn from, one after the other.
        validation: pictures whose error says when to stop; the plan itself is among the choices.
        denoise: the model, as fast as there is.
        gradients: the same, differentiable.
        settings: see `Refinement`.
        last: the greatest training timestep.
        keep: asked for the state at a step, and for how to make it; may remember earlier runs.
        on_step: called after each.

    Returns:
        The plan with the least `typical_error` of validation.
    """
    histories, errors = [], []
    for batch in batches:
        errors.append(relative_errors(run_plan(plan, batch, denoise), batch))
        histories.append(list(batch.history))
    median = float(torch.cat(errors).median().clamp(min=_EXACT))
    freedom = Freedom(plan, histories, settings.timestep_unit, last)
    state: State = {name: np.zeros(len(freedom)) for name in ("numbers", "mean", "square")}
    best = plan, typical_error(plan, validation, denoise)
    for start in range(0, settings.steps, settings.kept):
        steps = range(start, min(start + settings.kept, settings.steps))

        def advance(state: State = state, steps: range = steps) -> State:
            for step in steps:
                batch = batches[step % len(batches)]
                gradient = _gradient(freedom, state, batch, gradients, median)
                state = _adam(state, gradient, step, settings, sqrt(median))
                on_step()
            return state

        state = keep(steps.stop, advance)
        refined = freedom.freeze(torch.from_numpy(state["numbers"]))
        error = typical_error(refined, validation, denoise)
        if error < best[1]:
            best = refined, error
    return best[0]


def _gradient(
    freedom: Freedom, state: State, batch: Batch, denoise: Denoise, median: float
) -> np.ndarray:
    """Of what a batch's pictures are to lower."""
    numbers = torch.from_numpy(state["numbers"]).to(batch.noise).requires_grad_()
    errors = relative_errors(freedom.sample(numbers, batch, denoise), batch)
    [gradient] = torch.autograd.grad((errors + median).log().mean(), numbers)
    return gradient.double().cpu().numpy()


def _adam(
    state: State, gradient: np.ndarray, step: int, settings: Refinement, unit: float
) -> State:
    """One step of Adam, with a rate that falls as a cosine."""
    slow, slower = _MOMENTA
    mean = slow * state["mean"] + (1 - slow) * gradient
    square = slower * state["square"] + (1 - slower) * gradient**2
    unbiased = mean / (1 - slow ** (step + 1))
    size = np.sqrt(square / (1 - slower ** (step + 1))) + 1e-12
    rate = settings.rate * unit * (1 + cos(pi * step / settings.steps)) / 2
    return {
        "numbers": state["numbers"] - rate * unbiased / size,
        "mean": mean,
        "square": square,
    }
