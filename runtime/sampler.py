"""The sampling loop: execute a plan over an engine pair."""

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from encache.model.backbone import Conditions
from encache.runtime.engines import Engines, allocate_ring
from encache.runtime.plan import Branches, Decode, Evaluate, Plan, Row

logger = logging.getLogger(__name__)

#: Combines noise [K, G, n, C, h, w] over the guidance axis G into [K, n, C, h, w].
Guide = Callable[[Tensor], Tensor]
#: Called after each run with the calls that it finished and a way to the latents before any call.
OnFinished = Callable[[range, Callable[[int], Tensor]], None]


def evaluate(
    denoise: Callable[[Tensor, Tensor, Conditions], Tensor],
    guide: Guide,
    latents: Tensor,
    timestep: Tensor,
    conditions: Conditions,
    branches: Branches,
) -> Tensor:
    """Run a whole denoiser once, for what that adds to the history.

    Args:
        denoise: of `Engines`, without a cut.
        guide: see `Guide`.
        latents: [n, C, h, w], in the denoiser's dtype.
        timestep: [1].
        conditions: of G * n rows each.
        branches: see `Branches`.

    Returns:
        One or two columns [K, n, C, h, w], float32.
    """
    num_guided = len(next(iter(conditions.values()))) // len(latents)
    if branches == "conditional":
        conditions = {name: one[-len(latents) :] for name, one in conditions.items()}
        return denoise(latents, timestep, conditions)[None].float()
    predicted = denoise(latents.repeat(num_guided, 1, 1, 1), timestep, conditions)
    by_branch = predicted.float().view(1, num_guided, *latents.shape)
    if branches == "guided":
        return guide(by_branch)
    return torch.cat([guide(by_branch), by_branch[:, 1] - by_branch[:, 0]])


class Sampling:
    """A plan with its buffers and numbers on the engines' device, for one batch and size.

    A run reads nothing back and allocates no lasting memory, so that a GPU never waits for the
    host and a whole run can be captured as one CUDA graph.

    Args:
        plan: what to run, in which order, with which numbers.
        engines: what runs it.
        shape: of the noise (n, C, h, w).
        num_guided: G, 2 with guidance and 1 without.
        guide: see `Guide`.
    """

    def __init__(
        self, plan: Plan, engines: Engines, shape: Sequence[int], num_guided: int, guide: Guide
    ) -> None:
        self.plan = plan
        self._engines = engines
        self._num_guided = num_guided
        self._guide = guide
        self._ring = allocate_ring(engines, plan.num_slots, (num_guided * shape[0], *shape[1:]))
        # What a run starts from, and its predictions; the plan's rows are coefficients over it.
        self._history = torch.empty(len(plan.columns), *shape, device=engines.device)
        self._samples = self._place(plan.samples)
        self._calls_at_once = plan.longest_decode or 1
        sources = plan.columns.prediction(0)
        self._numbers = [
            (self._place(step.row[:filled]), self._place([step.timestep]))
            if isinstance(step, Evaluate)
            else (self._place(step.weights), self._place(step.timesteps))
            for step, filled in zip(plan.steps, (sources, *plan.filled), strict=False)
        ]

    @torch.inference_mode()
    def run(
        self, noise: Tensor, conditions: Conditions, on_finished: OnFinished | None = None
    ) -> Tensor:
        """Turn unit noise into latents.

        Args:
            noise: z, one per image [n, C, h, w], float32.
            conditions: of G * n rows each, without a prompt's first.
            on_finished: for progress and callbacks; it may raise to stop.

        Returns:
            Latents [n, C, h, w], float32.
        """
        with _one_thread if self._engines.has_own_threads else nullcontext():
            return self._run(noise, conditions, on_finished)

    def first_broken_call(self) -> int | None:
        """The first call of the last run whose noise prediction is not finite, if there is one."""
        predictions = self._history[self.plan.columns.prediction(0) :]
        broken = (~predictions.isfinite()).flatten(1).any(1).nonzero()
        if not len(broken):
            return None
        steps = self.plan.steps
        evaluations = [step for step in steps if isinstance(step, Evaluate)]
        whole = [one.call for one in evaluations for _ in range(one.num_columns)]
        return (whole or range(self.plan.num_calls))[int(broken[0])]

    def _run(self, noise: Tensor, conditions: Conditions, on_finished: OnFinished | None) -> Tensor:
        # What is not filled yet is multiplied by zero, and 0 * NaN is NaN.
        for buffer in (self._history, *self._ring):
            buffer.zero_()
        filled = self.plan.columns.prediction(0)
        self._history[:filled] = noise
        steps = zip(self.plan.steps, self._numbers, self.plan.finished, strict=True)
        for step, (numbers, timesteps), finished in steps:
            if isinstance(step, Decode):
                predicted = self._decode(numbers, timesteps, conditions).float()
                added = self._guide(predicted.view(-1, self._num_guided, *noise.shape))
            else:
                latents = self._combine(numbers).to(self._engines.dtype)
                if step.slot is not None:
                    latents = latents.repeat(self._num_guided, 1, 1, 1)
                    self._engines.encode(latents, timesteps, conditions, self._ring, step.slot)
                    continue
                denoise = self._engines.denoise
                added = evaluate(
                    denoise, self._guide, latents, timesteps, conditions, step.branches
                )
            self._history[filled : filled + len(added)] = added
            filled += len(added)
            if on_finished:
                on_finished(finished, self._latents_before)
        return self._latents_before(self.plan.num_calls)

    def _decode(self, weights: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Noise of the calls in one run of the decoder, or in as many as memory asks for."""
        try:
            parts = zip(
                weights.split(self._calls_at_once),
                timesteps.split(self._calls_at_once),
                strict=True,
            )
            decode = self._engines.decode
            return torch.cat([decode(self._ring, *part, conditions) for part in parts])
        except torch.OutOfMemoryError:
            calls = min(len(timesteps), self._calls_at_once)
            if calls == 1:
                raise
            self._calls_at_once = (calls + 1) // 2
            logger.warning(
                "memory does not hold %d calls in one run of the decoder; going on with %d",
                calls,
                self._calls_at_once,
            )
        # Outside, where nothing is held any more.
        return self._decode(weights, timesteps, conditions)

    def _latents_before(self, call: int) -> Tensor:
        return self._combine(self._samples[call])

    def _combine(self, row: Tensor) -> Tensor:
        """row . history, as far as the row goes."""
        return torch.tensordot(row, self._history[: len(row)], 1)

    def _place(self, numbers: Row | Sequence[Row] | list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float32, device=self._engines.device)


class _OneThread:
    """Let PyTorch compute alone, and start no threads that then spin in the way of a library's.

    Its small products here gain nothing by them, and engines took a quarter longer on two cores.
    The number is the whole process's: of several runs at once, the last one to end restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._threads = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._running:
                self._threads = torch.get_num_threads()
            self._running += 1
            torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._running -= 1
            if not self._running:
                torch.set_num_threads(self._threads)


_one_thread = _OneThread()
