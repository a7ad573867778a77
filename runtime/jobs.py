"""From jobs to pictures: a picture depends on its job and its settings, not on its batch mates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from encache.runtime.memory import explaining_want_of_memory
from encache.runtime.settings import Settings

if TYPE_CHECKING:
    from encache.runtime.pipeline import EncachePipeline


@dataclass(frozen=True)
class Job:
    """One picture.

    Attributes:
        prompt: what to draw.
        seed: of its noise.
        negative_prompt: what to avoid; None is the model's way to say nothing.
        height, width: in pixels; None is the model's own size.
    """

    prompt: str
    seed: int
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None


def draw(
    pipeline: "EncachePipeline", jobs: Sequence[Job], settings: Settings, **options: Any
) -> Any:
    """Pictures of jobs that differ in prompt and seed alone, in one batch.

    Args:
        pipeline: what draws.
        jobs: at least one.
        settings: how they are sampled.
        options: further arguments of the pipeline, such as output_type.
    """
    first = jobs[0]
    with explaining_want_of_memory(len(jobs) * settings.rows):
        noise = noise_of(pipeline, jobs)
    return pipeline(
        [job.prompt for job in jobs],
        negative_prompt=first.negative_prompt,
        latents=noise,
        height=first.height,
        width=first.width,
        **{**settings.arguments, **options},
    ).images


def noise_of(pipeline: "EncachePipeline", jobs: Sequence[Job]) -> Tensor:
    """Unit noise [n, C, h, w] of jobs, drawn on the CPU in fp32: equal for any device and dtype."""
    size = pipeline.latent_size(jobs[0].height, jobs[0].width)
    generators = (torch.Generator().manual_seed(job.seed) for job in jobs)
    return torch.stack(
        [torch.randn(pipeline.spec.channels, *size, generator=one) for one in generators]
    )
