"""How fast the UNet's features change over the calls of the full sampler.

This is what the method lives from: where features hardly change, running the encoder again buys
little. It also shows which tensors spoil it.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from itertools import product
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from encache.evaluate.results import Drift
from encache.model.backbone import Conditions
from encache.runtime.engines import Engines, allocate_ring
from encache.runtime.pipeline import EncachePipeline

LAGS = (1, 2, 3, 5, 10)


class _Watch:
    """Engines that hand every encoder run to a listener."""

    def __init__(self, engines: Engines, listen: Callable[..., None]) -> None:
        self._engines = engines
        self._listen = listen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engines, name)

    def encode(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditions: Conditions,
        ring: Sequence[Tensor],
        slot: int,
    ) -> None:
        self._engines.encode(latents, timestep, conditions, ring, slot)
        self._listen(latents, timestep, conditions, [tensor[slot].clone() for tensor in ring])


class _Comparison:
    """Compares the features of each call, as it comes, with those of the calls before."""

    def __init__(self, engines: Engines) -> None:
        self.engines = engines
        self.names = [feature.name for feature in engines.features]
        self.recent: deque[list[Tensor]] = deque(maxlen=2 * max(LAGS) + 1)
        self.latents: Tensor | None = None
        self.changes: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.misses: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.by_time: dict[str, list[float]] = defaultdict(list)

    def __call__(
        self, latents: Tensor, timestep: Tensor, conditions: Conditions, features: list[Tensor]
    ) -> None:
        if self.latents is not None:
            ring = allocate_ring(self.engines, 1, latents.shape)
            self.engines.encode(self.latents, timestep, conditions, ring, 0)
            for name, now, before in zip(self.names, ring, self.recent[-1], strict=True):
                self.by_time[name].append(relative_change(now[0], before))
        self.recent.append(features)
        self.latents = latents
        for lag, (index, name) in product(LAGS, enumerate(self.names)):
            if lag < len(self.recent):
                now, before = features[index], self.recent[-1 - lag][index]
                self.changes[name, lag].append(relative_change(now, before))
            if 2 * lag < len(self.recent):
                line = 2 * before - self.recent[-1 - 2 * lag][index]
                self.misses[name, lag].append(relative_change(now, line))


def relative_change(now: Tensor, before: Tensor) -> float:
    """||now - before||^2 / ||now||^2 over all elements of two tensors of one shape."""
    change = (now - before).float().square().sum() / now.float().square().sum()
    return change.item()


def _means(
    values: dict[tuple[str, int], list[float]], names: Sequence[str], lags: Sequence[int]
) -> dict[str, tuple[float, ...]]:
    """One mean per lag that occurred, by name."""
    return {name: tuple(fmean(v) for lag in lags if (v := values[name, lag])) for name in names}


def measure_drift(
    pipeline: EncachePipeline, prompts: Sequence[str], seeds: Sequence[int], **call: Any
) -> Drift:
    """Sample in full and compare each call's features with those of later calls.

    Args:
        pipeline: its cut decides which features exist.
        prompts, seeds: one picture each; changes are summed over them.
        call: arguments for the pipeline, such as num_inference_steps and guidance_scale.
    """
    compare = _Comparison(pipeline.engines)
    watched = pipeline.with_parts(engines=_Watch(pipeline.engines, compare))
    watched.set_progress_bar_config(desc="drift")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    watched(list(prompts), generator=generators, output_type="latent", stride=1, **call)
    lags = tuple(lag for lag in LAGS if compare.changes[compare.names[0], lag])
    return Drift(
        lags=lags,
        by_tensor=_means(compare.changes, compare.names, lags),
        extrapolated=_means(compare.misses, compare.names, lags),
        by_call={name: tuple(compare.changes[name, 1]) for name in compare.names},
        by_time={name: tuple(compare.by_time[name]) for name in compare.names},
    )
