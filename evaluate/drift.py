"""How fast the UNet's features change over the calls of the full sampler.

This is what the method lives from: where features hardly change, running the encoder again buys
little. It also shows which tensors spoil it.
"""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from encache.evaluate.results import Drift
from encache.runtime.pipeline import EncachePipeline

LAGS = (1, 2, 3, 5, 10)


class _Watch:
    """Engines that hand every freshly encoded feature to a listener."""

    def __init__(self, engines: Any, listen: Any) -> None:
        self._engines = engines
        self._listen = listen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engines, name)

    def encode(
        self, latents: Tensor, timestep: Tensor, text: Tensor, ring: Sequence[Tensor], slot: int
    ) -> None:
        self._engines.encode(latents, timestep, text, ring, slot)
        self._listen([tensor[slot].clone() for tensor in ring])


def measure_drift(
    pipeline: EncachePipeline, prompts: Sequence[str], seeds: Sequence[int], **call: Any
) -> Drift:
    """Sample in full and compare each call's features with those of later calls.

    The difference of calls k and k + d is ||F_{k+d} - F_k||^2 / ||F_{k+d}||^2 over the whole batch.

    Args:
        pipeline: its cut decides which features exist.
        prompts, seeds: one picture each.
        call: arguments for the pipeline, such as num_inference_steps and guidance_scale.
    """
    names = [feature.name for feature in pipeline.engines.features]
    recent: deque[list[Tensor]] = deque(maxlen=max(LAGS) + 1)
    changes: Mapping[tuple[str, int], list[float]] = defaultdict(list)

    def listen(features: list[Tensor]) -> None:
        recent.append(features)
        for lag in LAGS:
            if lag < len(recent):
                for name, now, before in zip(names, features, recent[-1 - lag], strict=True):
                    change = (now - before).float().square().sum() / now.float().square().sum()
                    changes[name, lag].append(change.item())

    watched = EncachePipeline(
        _Watch(pipeline.engines, listen), pipeline.tokenizer, pipeline.scheduler, pipeline.spec
    )
    watched.set_progress_bar_config(desc="drift")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    watched(list(prompts), generator=generators, output_type="latent", stride=1, **call)
    lags = tuple(lag for lag in LAGS if changes[names[0], lag])
    return Drift(
        lags=lags,
        by_tensor={
            name: tuple(sum(changes[name, lag]) / len(changes[name, lag]) for lag in lags)
            for name in names
        },
        by_call={name: tuple(changes[name, 1]) for name in names},
    )
