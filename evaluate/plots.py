"""Plots as inline SVG, whose text is text and whose ink is the page's own colour."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from encache.evaluate.results import Row, front

#: Below this a latent error is rounding, and would only stretch the axis.
SMALLEST_ERROR = 1e-7
#: So many places on the x axis get a tick each.
FEW_TICKS = 12
#: Of a plot, in inches.
WIDTH = 5.0

_INK = "#123456"  # stands for currentColor, which Matplotlib cannot say
_COLORS = (
    *("#2f7fd0", "#d9541e", "#1a9a6c", "#a869c6", "#b98a12", "#d6498f", "#17a2b8"),
    *("#7d8a2e", "#8c6d5a", "#6a74e0", "#3f9c35", "#e0803a", "#9a4f8f"),
)
_LINES = ("-", "--", ":")
_MARKERS = {"mid": "o", "up0": "s", "up1": "D", "up2": "^", "none": "*"}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "encache",  # equal reports give equal pages
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.15,
    "grid.color": _INK,
    "axes.grid": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
    ),
}


def can_plot(row: Row) -> bool:
    """Whether a row has a place on logarithmic axes."""
    error = row.latent_error
    return error is not None and not row.diverged and error.mean >= SMALLEST_ERROR


def front_plot(rows: Sequence[Row], cost: Callable[[Row], float], cost_name: str) -> str:
    """Latent error against cost: the plain sampler as a line, cached settings as points.

    The number at a point is its encoder runs. The broad band joins the front.
    """

    def draw(axes: Axes) -> None:
        points = [row for row in rows if can_plot(row)]
        fulls = [row for row in rows if row.full and row.share <= 1.001 and not row.diverged]
        for row in fulls:
            axes.axvline(cost(row), color=_INK, linewidth=0.8, linestyle=":")
        best = [row for row in front(rows, cost) if can_plot(row)]
        axes.plot(*_curve(best, cost), color=_INK, alpha=0.12, linewidth=7, zorder=0)
        for index, (label, members) in enumerate(_by(points, _plain_label, plain=True).items()):
            members = sorted(members, key=cost)
            _scatter(axes, members, cost, label, _INK, "o" + _LINES[index % len(_LINES)])
            _annotate(axes, members, cost, _INK, {"xytext": (5, 3)})
        for index, (label, members) in enumerate(_by(points, _cached_label, plain=False).items()):
            marker = _MARKERS.get(members[0].cut, "P")
            color = _COLORS[index % len(_COLORS)]
            _scatter(axes, members, cost, label, color, marker)
            _annotate(axes, members, cost, color, {"xytext": (-4, -9), "ha": "right"})
        axes.set(xlabel=cost_name, ylabel="relative squared latent error")
        axes.set_xlim(0, 1.06 * max(map(cost, [*points, *fulls])))

    return _svg(draw, f"Latent error against {cost_name}")


def curves_plot(curves: Mapping[str, Sequence[float]], xs: Sequence[int], x_name: str) -> str:
    """One line per feature on a logarithmic axis; numbers that are not positive leave gaps."""

    def draw(axes: Axes) -> None:
        for index, (name, values) in enumerate(curves.items()):
            ys = [y if math.isfinite(y) and y > 0 else math.nan for y in values]
            color = _COLORS[index % len(_COLORS)]
            style = _LINES[index // len(_COLORS) % len(_LINES)]
            axes.plot(xs[: len(ys)], ys, style, color=color, label=name, linewidth=1.4)
        axes.set(xlabel=x_name, ylabel="relative squared change")
        if len(xs) <= FEW_TICKS:
            axes.set_xticks(xs)

    return _svg(draw, f"Change of features against {x_name}")


def _scatter(
    axes: Axes,
    rows: Sequence[Row],
    cost: Callable[[Row], float],
    label: str,
    color: str,
    style: str,
) -> None:
    xs, ys = _curve(rows, cost)
    errors = [row.latent_error for row in rows if row.latent_error is not None]
    below = [max(0.0, error.mean - error.low) for error in errors]
    above = [max(0.0, error.high - error.mean) for error in errors]
    axes.errorbar(
        xs, ys, yerr=[below, above], fmt=style, color=color, label=label, linewidth=1, markersize=5
    )


def _annotate(
    axes: Axes,
    rows: Sequence[Row],
    cost: Callable[[Row], float],
    color: str,
    place: dict[str, Any],
) -> None:
    """Write each row's encoder runs beside its point, `place` away in points."""
    for row, x, y in zip(rows, *_curve(rows, cost), strict=True):
        axes.annotate(
            str(row.encoder_runs),
            (x, y),
            textcoords="offset points",
            fontsize=7.5,
            color=color,
            **place,
        )


def _curve(rows: Sequence[Row], cost: Callable[[Row], float]) -> tuple[list[float], list[float]]:
    return [cost(row) for row in rows], [row.error.mean for row in rows if row.error is not None]


def _by(rows: Sequence[Row], label: Callable[..., str], *, plain: bool) -> dict[str, list[Row]]:
    """The plain or cached rows, by a label that names only what differs among them."""
    members = [row for row in rows if row.plain == plain]
    checkpoints = {row.checkpoint for row in rows}
    schedulers = {row.scheduler for row in rows}
    groups: dict[str, list[Row]] = {}
    for row in members:
        parts = [label(row)]
        parts += [row.scheduler] if len(schedulers) > 1 else []
        parts += [_shortened(row.checkpoint)] if len(checkpoints) > 1 else []
        groups.setdefault(", ".join(filter(None, parts)), []).append(row)
    return groups


def _shortened(path: str, length: int = 28) -> str:
    return path if len(path) <= length else f"…{path[1 - length :]}"


def _label_decimals(axes: Axes) -> None:
    """Decimals on the logarithmic axis: powers need mathematical text, which names must not be."""
    bottom, top = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top < 50 * bottom else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _plain_label(row: Row) -> str:
    return "plain, fewer steps"


def _cached_label(row: Row) -> str:
    return f"{row.cut} {row.blend}" + (" + noise" if row.prior_noise else "")


def _svg(draw: Callable[[Axes], None], title: str) -> str:
    text = io.StringIO()
    # A style that lasts only here; the figure itself is known to nobody else.
    with mpl.rc_context(_STYLE):
        figure = Figure(layout="constrained")
        axes = figure.add_subplot(yscale="log")
        draw(axes)
        _label_decimals(axes)
        _add_legend(figure, axes)
        # No metadata: it holds the date, and addresses.
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


def _add_legend(figure: Figure, axes: Axes) -> None:
    """Below the axes, in as many columns as fit; the figure grows and the axes keep their size."""
    labels = axes.get_legend_handles_labels()[1]
    width = 36 + 4.6 * max(map(len, labels), default=0)  # points, at the size below
    columns = max(1, min(3, int(72 * WIDTH / width)))
    figure.set_size_inches(WIDTH, 3.5 + 0.19 * math.ceil(len(labels) / columns))
    if labels:
        figure.legend(loc="outside lower center", ncols=columns, fontsize=8.5)
