"""The table of all settings as HTML."""

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from html import escape
from itertools import pairwise

from encache.evaluate.headline import significant
from encache.evaluate.results import Interval, Row, front, match

#: A value that is missing.
DASH = "&ndash;"
STAR = '<b class="star" title="on the front">★</b>'


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        heading: in HTML.
        meaning: in plain text.
        cell: what it shows of a row, in HTML.
        style: class of the cells; "words" may be wrapped.
        common: whether the column is left out where all rows agree.
    """

    heading: str
    meaning: str
    cell: Callable[[Row], str]
    style: str = ""
    common: bool = False


def table(rows: Sequence[Row]) -> str:
    """The rows by falling arithmetic, and what the columns mean."""
    measured = [c for c in _columns(rows) if any(c.cell(row) != DASH for row in rows)]
    common = [c for c in measured if c.common and len({c.cell(row) for row in rows}) == 1]
    columns = [c for c in measured if c not in common]
    everywhere = ", ".join(f"{c.heading} {c.cell(rows[0])}" for c in common)
    heads = "".join(f'<th scope="col" class="{c.style}">{c.heading}</th>' for c in columns)
    body = "\n".join(_line(row, columns) for row in sorted(rows, key=_falling_share))
    meanings = "".join(f"<dt>{c.heading}</dt><dd>{escape(c.meaning)}</dd>" for c in columns)
    return (
        f'<p class="note">By falling arithmetic; the plain sampler is shaded. {STAR} marks what '
        "no other row beats in latent error at the same or less arithmetic, or time. The error is "
        '<b class="closer">less</b> or <b class="further">more</b> than the plain sampler\'s at '
        "equal arithmetic where the interval of their ratio leaves out 1. Brackets are 95 % "
        f"bootstrap intervals.{everywhere and f' All rows: {everywhere}.'}</p>\n"
        '<div class="scroll" tabindex="0"><table><thead><tr><th scope="col">setting</th>'
        f"{heads}</tr></thead>\n"
        f"<tbody>{body}</tbody></table></div>\n"
        f"<details><summary>What the columns mean</summary><dl>{meanings}</dl></details>\n"
    )


def number(value: float | Interval | None, form: str = "", digits: int = 2) -> str:
    """A number in HTML, or a mean above its interval, or a dash, or that it diverged.

    Args:
        value: what was measured, if it was.
        form: a format string; without one the number gets so many significant `digits`.
        digits: see `form`.
    """
    if value is None:
        return DASH
    interval = isinstance(value, Interval)
    numbers = (value.mean, value.low, value.high) if isinstance(value, Interval) else (value,)
    if not all(map(math.isfinite, numbers)):
        return '<em class="diverged">diverged</em>'
    mean, *bounds = (form.format(x) if form else significant(x, digits) for x in numbers)
    return f"{mean}<small>[{', '.join(bounds)}]</small>" if interval else mean


def _line(row: Row, columns: Sequence[Column]) -> str:
    cells = "".join(f'<td class="{c.style}">{c.cell(row)}</td>' for c in columns)
    shade = "plain" if row.plain else "cached"
    return f'<tr class="{shade}"><th scope="row">{escape(row.name)}</th>{cells}</tr>'


def _columns(rows: Sequence[Row]) -> list[Column]:
    return [*_comparison(rows), *_QUALITY, *_POLICY]


def _comparison(rows: Sequence[Row]) -> list[Column]:
    """The columns for which a row must be seen beside the others."""
    cheap = front(rows, lambda row: row.share)
    fast = front(rows, lambda row: row.seconds)

    def starred(text: str, row: Row, best: Sequence[Row]) -> str:
        return f"{text} {STAR}" if row in best else text

    def against_plain(row: Row) -> str:
        found = match(row, rows)
        if found is None:
            return DASH
        mean, low, high = map(significant, astuple(found.ratio))
        steps = f"{found.opponent.steps} steps"
        return f'<b class="{found.outcome}">{mean}</b><small>[{low}, {high}]<br>{steps}</small>'

    return [
        Column(
            "share",
            "of the full sampler's arithmetic",
            lambda row: starred(number(row.share, "{:.2f}"), row, cheap),
        ),
        Column(
            "latent error&nbsp;↓",
            "squared difference to the full sampler's latents at the same seeds, relative",
            lambda row: number(row.latent_error),
        ),
        Column(
            "&times;&nbsp;plain&nbsp;↓",
            "the mean latent error as a multiple of the plain sampler's over the same pictures, "
            "with as many steps as the setting's arithmetic buys; they stand below; less than 1 "
            "beats it",
            against_plain,
        ),
        Column(
            "s&nbsp;/&nbsp;image",
            "seconds per image",
            lambda row: starred(number(row.seconds, digits=3), row, fast),
        ),
    ]


_QUALITY = (
    Column(
        "PSNR&nbsp;↑",
        "in dB, of the pictures against the full sampler's at the same seeds",
        lambda row: number(row.psnr, "{:.1f}"),
    ),
    Column(
        "SSIM&nbsp;↑",
        "structural similarity to the full sampler's pictures at the same seeds",
        lambda row: number(row.ssim, "{:.3f}"),
    ),
    Column(
        "perceptual&nbsp;↓",
        "LPIPS' distance, without its learned weights, to the full sampler's pictures at the same "
        "seeds",
        lambda row: number(row.perceptual),
    ),
    Column(
        "Fréchet to full&nbsp;↓",
        "distance of the pictures' distribution to that of the full sampler's",
        lambda row: number(row.frechet_to_full, digits=3),
    ),
    Column(
        "Fréchet&nbsp;↓",
        "distance of the pictures' distribution to that of real pictures",
        lambda row: number(row.frechet, digits=3),
    ),
    Column(
        "spatial Fréchet&nbsp;↓",
        "the same on features that keep their places (sFID with Inception)",
        lambda row: number(row.spatial_frechet, digits=3),
    ),
    Column(
        "precision&nbsp;↑",
        "fraction of the pictures that resemble real ones",
        lambda row: number(row.precision, "{:.3f}"),
    ),
    Column(
        "recall&nbsp;↑",
        "fraction of the real pictures that resemble sampled ones",
        lambda row: number(row.recall, "{:.3f}"),
    ),
    Column("IS&nbsp;↑", "inception score", lambda row: number(row.inception_score, digits=3)),
    Column(
        "CLIPScore&nbsp;↑",
        "agreement of prompt and picture",
        lambda row: number(row.clip_score, digits=3),
    ),
    Column(
        "retrieval&nbsp;↑",
        "fraction of the pictures whose prompt names one of the 5 nearest real pictures",
        lambda row: number(row.retrieval, "{:.3f}"),
    ),
)


def _key_calls(row: Row) -> str:
    strides = {later - earlier for earlier, later in pairwise(row.key_calls)}
    if len(strides) == 1 and row.key_calls[-1] + max(strides) >= row.num_calls:
        return f"every {max(strides)}"
    return " ".join(map(str, row.key_calls))


_POLICY = (
    Column("GFLOP", "UNet arithmetic per image", lambda row: number(row.gflop, digits=3)),
    Column(
        "encoder&nbsp;/ calls",
        "encoder runs and denoiser calls per image",
        lambda row: f"{row.encoder_runs} / {row.num_calls}",
    ),
    Column("steps", "num_inference_steps", lambda row: str(row.steps)),
    Column(
        "key calls",
        "calls at which the encoder runs",
        lambda row: DASH if row.plain else _key_calls(row),
        "words",
    ),
    Column("cut", "where the UNet is cut", lambda row: DASH if row.plain else escape(row.cut)),
    Column(
        "blend",
        "how a call's features follow from those of key calls",
        lambda row: DASH if row.plain else escape(row.blend),
    ),
    Column(
        "prior noise",
        "whether the first noise is injected again",
        lambda row: "yes" if row.prior_noise else DASH,
    ),
    Column("scheduler", "of the sampler", lambda row: escape(row.scheduler) or DASH, common=True),
    Column("checkpoint", "of the model", lambda row: escape(row.checkpoint), "words", common=True),
    Column("pictures", "how many were made", lambda row: str(row.num_images), common=True),
)


def _falling_share(row: Row) -> float:
    return -row.share if math.isfinite(row.share) else math.inf
