"""A diffusers scheduler as a table of numbers.

A deterministic scheduler is linear in the initial noise z and the model outputs eps_j. Stepping it
once on basis vectors reads off its coefficients, so a sampling loop needs no scheduler.
"""

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from encache.errors import PlanError

#: Largest relative difference between the table and the stepped scheduler on random data.
LINEARITY_TOLERANCE = 1e-3
#: Faster Diffusion (arXiv 2312.09608, section 3.4): strength of the injected prior noise.
PRIOR_NOISE = 0.003


class Scheduler(Protocol):
    """What the probe asks of a diffusers scheduler."""

    config: Any
    timesteps: Tensor
    init_noise_sigma: Any

    def set_timesteps(self, num_inference_steps: int) -> None: ...
    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor: ...
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any: ...


@dataclass(frozen=True)
class Columns:
    """What a history holds, in this order: what a run starts from, then its predictions.

    Attributes:
        num_predictions: of the denoiser, in the order in which they are made.
        sources: what a run starts from, by name; each of the latents' shape.
    """

    num_predictions: int
    sources: tuple[str, ...] = ("noise",)

    def __len__(self) -> int:
        return self.prediction(self.num_predictions)

    def prediction(self, number: int) -> int:
        """The column of a prediction."""
        return len(self.sources) + number


@dataclass(frozen=True)
class SolverTable:
    """Coefficients over (z, eps_0, ..., eps_{N-1}) for N calls; float32 on the CPU.

    Attributes:
        timesteps: what the denoiser is told at each call [N].
        inputs: row k gives the denoiser's input at call k [N, N + 1].
        samples: row k gives the latents before call k, row N the result [N + 1, N + 1].
    """

    timesteps: Tensor
    inputs: Tensor
    samples: Tensor

    @property
    def num_calls(self) -> int:
        """N."""
        return len(self.timesteps)

    @property
    def columns(self) -> Columns:
        """What the coefficients belong to."""
        return Columns(self.num_calls)


def probe_solver(scheduler: Scheduler, num_steps: int, prior_noise: float = 0.0) -> SolverTable:
    """Step a copy of `scheduler` on basis vectors and return its table.

    Args:
        scheduler: any diffusers scheduler that is deterministic and linear.
        num_steps: num_inference_steps; the calls follow (50 -> 51 for PNDM, 99 for Heun).
        prior_noise: share of z added to the denoiser's input at every call of the second half,
            `PRIOR_NOISE` in Faster Diffusion.

    Raises:
        PlanError: the scheduler draws noise, clips or thresholds, or refuses the number of steps.
    """
    basis = torch.eye(len(Columns(count_calls(scheduler, num_steps))))
    # A stochastic scheduler is found out below; it must not disturb the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        try:
            inputs, samples = _step_through(scheduler, num_steps, prior_noise, basis)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            # The last steps of some solvers lie outside the schedule that they are made for.
            raise PlanError(
                f"{type(scheduler).__name__} cannot make {num_steps} steps on a schedule of "
                f"{scheduler.config.num_train_timesteps} timesteps ({error}). Try fewer."
            ) from error
        table = SolverTable(_prepare(scheduler, num_steps).timesteps.float(), inputs, samples)
        _verify_linear(scheduler, num_steps, prior_noise, table)
    return table


def count_calls(scheduler: Scheduler, num_steps: int) -> int:
    """Denoiser evaluations of `num_steps` inference steps.

    Raises:
        PlanError: the scheduler cannot make so many steps, or so few.
    """
    most = scheduler.config.num_train_timesteps
    if not 1 <= num_steps <= most:
        raise PlanError(f"Sampling takes between 1 and {most} steps, not {num_steps}.")
    return len(_prepare(scheduler, num_steps).timesteps)


def _prepare(scheduler: Scheduler, num_steps: int) -> Scheduler:
    """A copy with fresh state, ready for `num_steps`."""
    fresh = copy.deepcopy(scheduler)
    try:
        fresh.set_timesteps(num_steps)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise PlanError(f"{type(scheduler).__name__} refuses {num_steps} steps: {error}") from error
    return fresh


def _step_through(
    scheduler: Scheduler, num_steps: int, prior_noise: float, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the scheduler on z = columns[0] and eps_k = columns[k + 1], each a vector of width W.

    Returns:
        The denoiser's inputs [N, W] and the latents [N + 1, W].
    """
    scheduler = _prepare(scheduler, num_steps)
    # Some schedulers (UniPC) contract over the batch axis, so a vector becomes a picture.
    noise, *outputs = columns[:, None, :, None, None]
    sample = noise * scheduler.init_noise_sigma
    halfway = scheduler.config.num_train_timesteps / 2
    inputs, samples = [], [sample]
    for output, timestep in zip(outputs, scheduler.timesteps, strict=True):
        scaled = scheduler.scale_model_input(sample, timestep)
        if prior_noise and timestep < halfway:
            # Scaling is a multiplication, so its factor shows on ones.
            factor = prior_noise / _factor(sample, scaled)
            sample = sample + factor * noise
            scaled = scaled + prior_noise * noise
            samples[-1] = sample
        inputs.append(scaled)
        sample = scheduler.step(output, timestep, sample).prev_sample
        samples.append(sample)
    return torch.stack(inputs).flatten(1), torch.stack(samples).flatten(1)


def _factor(sample: Tensor, scaled: Tensor) -> float:
    index = sample.abs().argmax()
    return float(scaled.flatten()[index] / sample.flatten()[index])


def _verify_linear(
    scheduler: Scheduler, num_steps: int, prior_noise: float, table: SolverTable
) -> None:
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(len(table.columns), 8, generator=generator) * 3
    _, stepped = _step_through(scheduler, num_steps, prior_noise, columns)
    difference = (table.samples @ columns - stepped).abs().max() / stepped.abs().max()
    if not difference < LINEARITY_TOLERANCE:
        raise PlanError(
            f"{type(scheduler).__name__} draws noise, clips or thresholds (it differs from its "
            f"own table by {difference:.1g}), so its calls cannot be planned ahead. Use a "
            "deterministic one such as ddim, dpmsolver++, unipc, euler, heun, pndm or deis, with "
            "clip_sample and thresholding off."
        )
