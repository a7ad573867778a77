"""The sampling loop: execute a plan over an engine pair."""

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from encache.runtime.engines import Engines, allocate_ring
from encache.runtime.plan import Decode, Encode, Plan

logger = logging.getLogger(__name__)

#: Combines noise [K, G, n, 4, h, w] over the guidance axis G into [K, n, 4, h, w].
Guide = Callable[[Tensor], Tensor]
#: Called after each run of the decoder with the calls it covered and a way to their latents.
OnDecoded = Callable[[Decode, Callable[[int], Tensor]], None]


class Sampling:
    """A plan with its buffers and numbers on the engines' device, for one batch and size.

    A run reads nothing back and allocates no lasting memory, so that a GPU never waits for the
    host and a whole run can be captured as one CUDA graph.

    Args:
        plan: what to run, in which order, with which numbers.
        engines: the engine pair that runs it.
        shape: of the noise (n, 4, h, w).
        num_guided: G, 2 with guidance and 1 without.
        guide: see `Guide`.
    """

    def __init__(
        self, plan: Plan, engines: Engines, shape: Sequence[int], num_guided: int, guide: Guide
    ) -> None:
        self._engines = engines
        self._num_guided = num_guided
        self._guide = guide
        self._ring = allocate_ring(engines, plan.num_slots, num_guided * shape[0], *shape[2:])
        # The history (z, eps_0, ..., eps_{N-1}); the plan's rows are coefficients over it.
        self._history = torch.empty(plan.num_calls + 1, *shape, device=engines.device)
        self._samples = self._place(plan.samples)
        self._num_calls = plan.num_calls
        self._calls_at_once = plan.longest_decode
        self._steps = [
            (step, self._place(step.row[: step.call + 1]), self._place([step.timestep]))
            if isinstance(step, Encode)
            else (step, self._place(step.weights), self._place(step.timesteps))
            for step in plan.steps
        ]

    @torch.inference_mode()
    def run(self, noise: Tensor, text: Tensor, on_decoded: OnDecoded | None = None) -> Tensor:
        """Turn unit noise into latents.

        Args:
            noise: z, one per image [n, 4, h, w], float32.
            text: text embeddings [G * n, L, D], negative ones first.
            on_decoded: for progress and callbacks; it may raise to stop.

        Returns:
            Latents [n, 4, h, w], float32.
        """
        with _one_thread if self._engines.has_own_threads else nullcontext():
            return self._run(noise, text, on_decoded)

    def first_broken_call(self) -> int | None:
        """The first call of the last run whose noise prediction is not finite, if there is one."""
        broken = (~self._history[1:].isfinite()).flatten(1).any(1).nonzero()
        return int(broken[0]) if len(broken) else None

    def _run(self, noise: Tensor, text: Tensor, on_decoded: OnDecoded | None) -> Tensor:
        # What is not filled yet is multiplied by zero, and 0 * NaN is NaN.
        for buffer in (self._history, *self._ring):
            buffer.zero_()
        self._history[0] = noise
        for step, numbers, timesteps in self._steps:
            if isinstance(step, Encode):
                latents = torch.tensordot(numbers, self._history[: step.call + 1], 1)
                latents = latents.to(self._engines.dtype).repeat(self._num_guided, 1, 1, 1)
                self._engines.encode(latents, timesteps, text, self._ring, step.slot)
            else:
                predicted = self._decode(numbers, timesteps, text)
                predicted = predicted.float().view(len(timesteps), self._num_guided, *noise.shape)
                self._history[step.start + 1 : step.stop + 1] = self._guide(predicted)
                if on_decoded:
                    on_decoded(step, self._latents_before)
        return self._latents_before(self._num_calls)

    def _decode(self, weights: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """Noise of the calls in one run of the decoder, or in as many as memory asks for."""
        try:
            parts = zip(
                weights.split(self._calls_at_once),
                timesteps.split(self._calls_at_once),
                strict=True,
            )
            return torch.cat([self._engines.decode(self._ring, *part, text) for part in parts])
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
        return self._decode(weights, timesteps, text)  # outside, where nothing is held any more

    def _latents_before(self, call: int) -> Tensor:
        row = self._samples[call, : call + 1]
        return torch.tensordot(row, self._history[: call + 1], 1)

    def _place(self, numbers: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
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
