"""From jobs to pictures: a picture depends on its job and its settings, not on its batch mates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from encache.errors import EncacheError
from encache.runtime.memory import explaining_want_of_memory, too_many_rows
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
    """Pictures of jobs of one size, in one batch.

    Args:
        pipeline: what draws.
        jobs: at least one; either all of them say what to avoid, or none does.
        settings: how they are sampled.
        options: further arguments of the pipeline, such as output_type.
    """
    first = jobs[0]
    unwanted = [job.negative_prompt or "" for job in jobs]
    with explaining_want_of_memory(too_many_rows(len(jobs) * settings.rows)):
        noise = noise_of(pipeline, jobs)
    return pipeline(
        [job.prompt for job in jobs],
        negative_prompt=None if first.negative_prompt is None else unwanted,
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


def draw_noise(
    pipeline: "EncachePipeline",
    num_images: int,
    size: tuple[int, int],
    generator: torch.Generator | list[torch.Generator] | None,
    latents: Tensor | None,
) -> Tensor:
    """Unit noise [n, C, h, w], float32: the latents that are given, or drawn as diffusers draws it.

    Raises:
        EncacheError: generators or latents are of another number or shape.
    """
    shape = (num_images, pipeline.spec.channels, *size)
    if isinstance(generator, list) and len(generator) != num_images:
        raise EncacheError(f"{len(generator)} generators were given for {num_images} images.")
    if latents is None:
        latents = randn_tensor(
            shape, generator=generator, device=pipeline.device, dtype=pipeline.dtype
        )
    if latents.shape != shape:
        raise EncacheError(f"latents must be {list(shape)}, not {list(latents.shape)}.")
    return latents.to(pipeline.device, torch.float32)
