"""Measure what a picture costs: contenders interleaved, build and warm-up apart, medians."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encache.evaluate.contenders import Contender
from encache.evaluate.fidelity import psnr
from encache.progress import progress


@dataclass(frozen=True)
class Row:
    """One contender at one batch size.

    Attributes:
        backend, sampling: see `Contender`.
        device: where it ran.
        batch: pictures at once.
        seconds: median of a batch, from prompt to pixels.
        spread: the fastest and the slowest.
        pictures_per_second: by the median.
        speed: of a picture, against the first row's.
        psnr: dB against the first contender's pictures, which is the full sampler's; their mean.
        gflop: counted arithmetic of the UNet per picture.
        tflops: that arithmetic over the whole time, text encoder and image decoder included.
        share_of_peak: `tflops` over what one large matrix product reaches here.
        parts: seconds of a batch inside "texts", "denoise", "encode", "decode" and "codec", and
            "outside" of them, in a run of its own that no CUDA graph hides.
        peak_bytes: PyTorch's GPU memory at most, whatever all contenders keep included; the
            weights and scratch memory of other libraries are not.
    """

    backend: str
    sampling: str
    device: str
    batch: int
    seconds: float
    spread: tuple[float, float]
    pictures_per_second: float
    speed: float
    psnr: float | None
    gflop: float | None
    tflops: float | None
    share_of_peak: float | None
    parts: dict[str, float] | None
    peak_bytes: int | None


def measure(
    contenders: Sequence[Contender],
    inputs: Sequence[tuple[str, Tensor]],
    peak_tflops: float,
    baseline: Row | None = None,
) -> tuple[list[Row], dict[str, str]]:
    """Time every contender, all of them once per repetition.

    Args:
        contenders: without a baseline, speeds are ratios to the first.
        inputs: prompt and noise [batch, 4, h, w] of each repetition.
        peak_tflops: of one large matrix product here.
        baseline: what speeds are ratios to.

    Returns:
        The rows, and of each contender that cannot run the reason.
    """
    batch = len(inputs[0][1])
    failures: dict[str, str] = {}
    peaks: dict[Contender, int | None] = {}
    seconds: dict[Contender, list[float]] = {one: [] for one in contenders}
    fidelity: dict[Contender, list[float]] = {one: [] for one in contenders}
    parts: dict[Contender, dict[str, float] | None] = {}

    @contextmanager
    def sparing(one: Contender) -> Iterator[None]:
        """Let one that fails not take the others with it."""
        try:
            yield
        except Exception as error:  # of any library that a contender brings
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            failures[f"{one.backend}, {one.sampling}"] = reason
            del seconds[one]

    for one in progress(contenders, desc=f"warm-up, batch {batch}"):
        with sparing(one):
            peaks[one] = _warm_up(one, *inputs[0])
    for prompt, noise in progress(inputs, desc=f"measure, batch {batch}"):
        reference = None
        for one, times in list(seconds.items()):
            with sparing(one):
                time_taken, pictures = _timed(one, prompt, noise)
                times.append(time_taken)
                if reference is not None:
                    fidelity[one] += psnr(pictures, reference).tolist()
                if one is contenders[0]:
                    reference = pictures
    for one in list(seconds):
        with sparing(one):
            parts[one] = _parts(one, *inputs[0])
    rows: list[Row] = []
    for one, times in seconds.items():
        median = statistics.median(times)
        per_picture = median / batch
        tflops = one.gflop / per_picture / 1e3 if one.gflop else None
        first = baseline or (rows[0] if rows else None)
        row = Row(
            backend=one.backend,
            sampling=one.sampling,
            device=str(one.device),
            batch=batch,
            seconds=median,
            spread=(min(times), max(times)),
            pictures_per_second=1 / per_picture,
            speed=first.seconds / first.batch / per_picture if first else 1.0,
            psnr=statistics.mean(fidelity[one]) if fidelity[one] else None,
            gflop=one.gflop,
            tflops=tflops,
            share_of_peak=tflops / peak_tflops if tflops else None,
            parts=parts[one],
            peak_bytes=peaks[one],
        )
        rows.append(row)
    return rows, failures


def _warm_up(contender: Contender, prompt: str, noise: Tensor) -> int | None:
    """Draw once, on a GPU also capture and replay; the peak of PyTorch's memory there."""
    if not torch.cuda.is_available():
        _timed(contender, prompt, noise)
        return None
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        _timed(contender, prompt, noise)
    return torch.cuda.max_memory_allocated()


def format_table(rows: Sequence[Row]) -> str:
    """The rows as text, speeds as ratios to the first."""
    header = f"{'':50}{'batch':>6}{'s':>9}{'pictures/s':>12}{'speed':>8}{'PSNR dB':>9}{'GFLOP':>9}"
    lines = [header + f"{'TFLOP/s':>9}{'of peak':>9}{'outside':>9}"]
    for row in rows:
        outside = row.parts["outside"] / sum(row.parts.values()) if row.parts else None
        lines.append(
            f"{row.backend + ', ' + row.sampling:50}{row.batch:6d}{row.seconds:9.3f}"
            f"{row.pictures_per_second:12.2f}{row.speed:7.2f}x"
            f"{_cell(row.psnr, '9.1f')}{_cell(row.gflop, '9.1f')}{_cell(row.tflops, '9.2f')}"
            f"{_cell(row.share_of_peak, '9.1%')}{_cell(outside, '9.1%')}"
        )
    lines.append(
        "Medians, all contenders taking turns after warm-up; PSNR against the first row's pictures "
        "(99: equal); GFLOP of the UNet per picture; peak: "
        "one large matrix product here; outside: time in no engine, without CUDA graphs."
    )
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return f"{'-':>9}" if value is None else f"{value:{form}}"


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of one large matrix product, the best of several: the practical ceiling here."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = _now()
        a @ b
        best = min(best, _now() - start)
    return 2 * size**3 / best / 1e12


class Stopwatch:
    """Notes the seconds spent in functions, on the device's own clock."""

    def __init__(self) -> None:
        self._marks: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time is noted under a name."""

        def run(*arguments: Any) -> Any:
            start = _mark()
            result = function(*arguments)
            self._marks[name].append((start, _mark()))
            return result

        return run

    def reset(self) -> None:
        """Forget what was noted."""
        self._marks.clear()

    def seconds(self) -> dict[str, float]:
        """By name."""
        _now()  # events are read when they are over
        return {
            name: sum(_between(start, stop) for start, stop in marks)
            for name, marks in self._marks.items()
        }


class _Timed:
    """An object some of whose methods are timed."""

    capturable = False  # a replayed graph shows nothing of its inside

    def __init__(self, inner: Any, watch: Stopwatch, **names: str) -> None:
        self._inner = inner
        self._timed = {
            method: watch.timed(name, getattr(inner, method)) for method, name in names.items()
        }

    def __getattr__(self, name: str) -> Any:
        return self._timed.get(name) or getattr(self._inner, name)

    def __call__(self, *arguments: Any) -> Any:
        return self._timed["__call__"](*arguments)


def _parts(contender: Contender, prompt: str, noise: Tensor) -> dict[str, float] | None:
    """Where a batch's seconds go, in a run of its own; what no engine spends is "outside"."""
    pipeline = contender.pipeline
    if pipeline is None or contender.call is None:
        return None
    watch = Stopwatch()
    watched = pipeline.with_parts(
        engines=_Timed(
            pipeline.engines, watch, denoise="denoise", encode="encode", decode="decode"
        ),
        texts=_Timed(pipeline.texts, watch, __call__="texts"),
        codec=_Timed(pipeline.codec, watch, decode="codec"),
    )
    watched.set_progress_bar_config(disable=True)
    for _ in range(2):  # the first warms up
        watch.reset()
        start = _now()
        watched(prompt, latents=noise, num_images_per_prompt=len(noise), **contender.call)
        total = _now() - start
    inside = watch.seconds()
    return {**inside, "outside": total - sum(inside.values())}


def _timed(contender: Contender, prompt: str, noise: Tensor) -> tuple[float, np.ndarray]:
    """Seconds, and the pictures [n, 3, H, W]."""
    with contender.patch():
        start = _now()
        pictures = contender.draw(prompt, noise)
        seconds = _now() - start
    return seconds, pictures.float().cpu().numpy()


def _now() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _mark() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, stop: Any) -> float:
    return stop - start if isinstance(start, float) else start.elapsed_time(stop) / 1e3
