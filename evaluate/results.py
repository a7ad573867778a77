"""What an evaluation finds, and the rules by which settings are compared.

A *setting* is one way to sample. Its opponent is the plain sampler at equal arithmetic, because
anybody can save arithmetic by taking fewer steps.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, Literal

from PIL import Image

#: PNG bytes or a PIL image.
Picture = bytes | Image.Image
#: Whether a setting stays closer to the full sampler than its opponent, or further from it.
Outcome = Literal["closer", "further", "alike"]


@dataclass(frozen=True)
class Interval:
    """A mean over pictures and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One setting, measured. None means not measured; a number that is not finite, diverged.

    Attributes:
        name: what it is, unique in a report.
        checkpoint, scheduler, steps: what sampled, with how many steps.
        cut, blend, key_calls, prior_noise: the caching policy.
        plain: sampled without a cache: the full sampler, and the same with fewer steps.
        num_images: N.
        encoder_runs, num_calls: per image.
        gflop: counted UNet arithmetic per image.
        share: of the full sampler's arithmetic.
        seconds: per image, of text encoding and sampling in batches, without the image decoder.
        latent_error: squared latent difference to the full sampler at the same seeds, relative;
            None for the full sampler itself (or whatever else is the reference).
        opponent: name of the plain row with as many steps as this one's arithmetic buys.
        times_plain: the mean latent error as a multiple of the opponent's, over the same pictures.
        psnr, ssim: of the pictures against the full sampler's at the same seeds; in dB, and <= 1.
        perceptual: distance to the full sampler's pictures at the same seeds, as a network sees it.
        frechet_to_full: distance of the pictures' distribution to that of the full sampler's.
        frechet: to that of real pictures.
        spatial_frechet: the same on features that keep their places (sFID with Inception).
        precision, recall: of the pictures' distribution against the real one.
        inception_score: of the pictures.
        clip_score: between prompt and picture.
        retrieval: fraction of pictures whose prompt names one of the 5 nearest real pictures.
    """

    name: str
    checkpoint: str
    scheduler: str
    steps: int
    cut: str
    blend: str
    key_calls: tuple[int, ...]
    prior_noise: bool
    plain: bool
    num_images: int
    encoder_runs: int
    num_calls: int
    gflop: float
    share: float
    seconds: float
    latent_error: Interval | None = None
    opponent: str | None = None
    times_plain: Interval | None = None
    psnr: Interval | None = None
    ssim: Interval | None = None
    perceptual: Interval | None = None
    frechet_to_full: float | None = None
    frechet: float | None = None
    spatial_frechet: float | None = None
    precision: float | None = None
    recall: float | None = None
    inception_score: float | None = None
    clip_score: Interval | None = None
    retrieval: Interval | None = None

    @property
    def full(self) -> bool:
        """Whether this is the full sampler, against which the others are measured."""
        return self.plain and self.latent_error is None

    @property
    def error(self) -> Interval | None:
        """The latent error, which is zero for the full sampler."""
        return Interval(0.0, 0.0, 0.0) if self.full else self.latent_error

    @property
    def diverged(self) -> bool:
        """Whether any of its numbers is infinite or not a number."""
        return not _all_finite(astuple(self))


@dataclass(frozen=True)
class Drift:
    """How fast features change: relative squared differences between the features of two calls.

    Attributes:
        lags: the distances d.
        by_tensor: for each feature the difference of calls k and k + d, one number per lag, mean
            over k: the error of reusing it.
        extrapolated: the difference of call k + d and the line through k - d and k: the error of
            extrapolating it from key calls d apart, at its largest.
        by_call: for each feature the difference of calls k and k + 1, one number per k.
        by_time: the same if only the timestep moves on and the latents stay those of call k.
    """

    lags: tuple[int, ...]
    by_tensor: Mapping[str, tuple[float, ...]]
    extrapolated: Mapping[str, tuple[float, ...]]
    by_call: Mapping[str, tuple[float, ...]]
    by_time: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Report:
    """Everything that one evaluation found.

    Attributes:
        title: of the page.
        machine, protocol: facts in the order in which they are shown; JSON values.
        rows: one per setting.
        drift: of the features, if it was measured.
        grid: pictures by prompt and row name, from equal seeds.
    """

    title: str
    machine: Mapping[str, Any]
    protocol: Mapping[str, Any]
    rows: tuple[Row, ...]
    drift: Drift | None = None
    grid: Mapping[str, Mapping[str, Picture]] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """A cached setting beside the plain sampler at equal arithmetic.

    `ratio` is the setting's mean error as a multiple of its opponent's, over the same pictures.
    """

    row: Row
    opponent: Row
    ratio: Interval

    @property
    def outcome(self) -> Outcome:
        """Which one is closer to the full sampler; alike where the interval holds 1."""
        if self.ratio.high < 1:
            return "closer"
        return "further" if self.ratio.low > 1 else "alike"


def match(row: Row, rows: Sequence[Row]) -> Match | None:
    """The setting beside its opponent; None without one, or where either diverged."""
    opponent = next((other for other in rows if other.name == row.opponent), None)
    if row.times_plain is None or opponent is None or row.diverged or opponent.diverged:
        return None
    return Match(row, opponent, row.times_plain)


def front(rows: Sequence[Row], cost: Callable[[Row], float]) -> list[Row]:
    """The rows that no other row beats in latent error without costing more, by rising cost."""
    measured = [row for row in rows if row.error is not None and not row.diverged]
    best = [row for row in measured if not any(_beats(other, row, cost) for other in measured)]
    return sorted(best, key=cost)


def _beats(row: Row, other: Row, cost: Callable[[Row], float]) -> bool:
    """At least as good in both cost and error, and better in one."""
    if row.error is None or other.error is None:
        return False
    ours, theirs = (cost(row), row.error.mean), (cost(other), other.error.mean)
    return ours != theirs and ours[0] <= theirs[0] and ours[1] <= theirs[1]


def _all_finite(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_all_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
