"""An honest comparison in one run: the plain sampler, the same plan, the engines, fewer steps."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from encache.model.arithmetic import Arithmetic
from encache.progress import progress
from encache.runtime.pipeline import EncachePipeline
from encache.runtime.plan import Plan, make_plan
from encache.runtime.solver import count_calls

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

#: Makes one picture [1, H, W, 3] in [0, 1] from a prompt and unit noise [1, 4, h, w].
Sampler = Callable[[str, Tensor], np.ndarray]


@dataclass(frozen=True)
class Row:
    """One way to sample, measured.

    Attributes:
        name: what it is.
        seconds: median over the pictures, each from prompt to pixels.
        spread: smallest and largest of those times.
        encoder_runs, decoder_runs: per picture; a decoder run may hold many calls.
        gflop: counted UNet arithmetic per picture.
        psnr: mean over the pictures, in dB against the first row at the same seeds; None for it.
        num_images: N.
    """

    name: str
    seconds: float
    spread: tuple[float, float]
    encoder_runs: int
    decoder_runs: int
    gflop: float
    psnr: float | None
    num_images: int


def compare(
    plain: "StableDiffusionPipeline",
    cached: Sequence[EncachePipeline],
    arithmetic: Arithmetic,
    prompts: Sequence[str],
    seeds: Sequence[int],
    call: dict[str, Any],
    policy: dict[str, Any],
    plain_call: dict[str, Any],
    plain_name: str = "diffusers",
) -> list[Row]:
    """Sample every prompt and seed in every way, interleaved, after one warm-up each.

    Args:
        plain: the undivided model in PyTorch with the scheduler to use, or the one that its
            weights were trained from.
        cached: the pipelines to compare with it, all of one model and scheduler.
        arithmetic: of one row of one call.
        prompts, seeds: every pair is one picture.
        call: arguments of the cached ones; num_inference_steps, guidance_scale, height and width
            among them.
        policy: the caching policy.
        plain_call: the same arguments of the plain one; its size is theirs.
        plain_name: what the table calls it.
    """
    rows, plain_rows = (2 if one["guidance_scale"] > 1 else 1 for one in (call, plain_call))
    steps = plain_call["num_inference_steps"]
    full = make_plan(plain.scheduler, steps)
    plan = make_plan(cached[0].scheduler, call["num_inference_steps"], **policy, rows_per_call=rows)
    budget = _gflop(plan, arithmetic) * rows / plain_rows
    fewer_steps = steps_within(plain.scheduler, steps, budget, arithmetic)
    fewer = make_plan(plain.scheduler, fewer_steps)
    fewer_call = {**plain_call, "num_inference_steps": fewer_steps}

    ways: list[tuple[str, Plan, int, Sampler]] = [
        (f"{plain_name}, {full.num_calls} calls", full, plain_rows, _sampler(plain, plain_call)),
        *(
            (f"encache, {one.engines.name}", plan, rows, _sampler(one, {**call, **policy}))
            for one in cached
        ),
        (
            f"{plain_name}, {fewer.num_calls} calls (equal arithmetic)",
            fewer,
            plain_rows,
            _sampler(plain, fewer_call),
        ),
    ]
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    seconds: list[list[float]] = [[] for _ in ways]
    psnrs: list[list[float]] = [[] for _ in ways]
    size = cached[0].latent_size(call["height"], call["width"])
    shape = (1, cached[0].spec.channels, *size)
    warm_ups = 3 if plain.unet.device.type == "cuda" else 1  # the second may capture a graph
    for *_, sampler in ways:
        for _ in range(warm_ups):
            sampler(prompts[0], torch.zeros(shape).to(plain.unet.device, plain.unet.dtype))
    for prompt, seed in progress(jobs, desc="compare"):
        # One noise for all, drawn once: generators give other numbers in other precisions.
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        noise = noise.to(plain.unet.device, plain.unet.dtype)
        reference: np.ndarray | None = None
        for index, (*_, sampler) in enumerate(ways):
            start = time.perf_counter()
            picture = sampler(prompt, noise)
            seconds[index].append(time.perf_counter() - start)
            if reference is None:
                reference = picture
            else:
                psnrs[index].extend(psnr(picture, reference))
    return [
        Row(
            name=name,
            seconds=statistics.median(times),
            spread=(min(times), max(times)),
            encoder_runs=way.num_encoder_runs,
            decoder_runs=way.num_decoder_runs,
            gflop=_gflop(way, arithmetic) * num_rows,
            psnr=statistics.fmean(values) if values else None,
            num_images=len(jobs),
        )
        for (name, way, num_rows, _), times, values in zip(ways, seconds, psnrs, strict=True)
    ]


def steps_within(scheduler: Any, steps: int, gflop: float, arithmetic: Arithmetic) -> int:
    """Most steps of the plain sampler whose calls cost at most `gflop` per row; at least one."""
    for fewer in range(steps, 1, -1):
        if count_calls(scheduler, fewer) * arithmetic.full <= gflop:
            return fewer
    return 1


def psnr(pictures: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB [n] of pictures [n, ...] in [0, 1]; equal ones give 99."""
    error = ((pictures - reference) ** 2).reshape(len(pictures), -1).mean(axis=1)
    with np.errstate(divide="ignore"):
        return np.minimum(-10 * np.log10(error), 99.0)


def format_table(rows: Sequence[Row]) -> str:
    """The rows as text, times also as a ratio to the first."""
    lines = [
        f"{'':44}{'s/image':>9}{'speed':>8}{'encoder':>9}{'decoder':>9}{'GFLOP':>9}{'PSNR dB':>9}"
    ]
    for row in rows:
        fidelity = "-" if row.psnr is None else f"{row.psnr:.1f}"
        lines.append(
            f"{row.name:44}{row.seconds:9.3f}{rows[0].seconds / row.seconds:7.2f}x"
            f"{row.encoder_runs:9d}{row.decoder_runs:9d}{row.gflop:9.1f}{fidelity:>9}"
        )
    lines.append(
        f"Median of {rows[0].num_images} images after warm-up; GFLOP of the UNet; PSNR against the "
        "first row at the same seeds."
    )
    return "\n".join(lines)


def _gflop(plan: Plan, arithmetic: Arithmetic) -> float:
    """Per row of the batch."""
    return arithmetic.total(plan.num_encoder_runs, plan.num_calls)


def _sampler(
    pipeline: "StableDiffusionPipeline | EncachePipeline", arguments: dict[str, Any]
) -> Sampler:
    def run(prompt: str, noise: Tensor) -> np.ndarray:
        return pipeline(prompt, latents=noise, output_type="np", **arguments).images

    return run
