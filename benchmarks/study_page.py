"""The tables and plots of docs/study.md; `python benchmarks/pages.py` writes them."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from encache.evaluate.distribution import bootstrap_ratio
from encache.evaluate.headline import significant, with_interval
from encache.evaluate.results import Interval

Row = Mapping[str, Any]
#: Points (x, mean, low, high) by label.
Lines = Mapping[str, Sequence[tuple[float, float, float, float]]]
PLAIN = "plain sampler, fewer steps"


def short_name(row: Row) -> str:
    """The setting without the words that all rows of a table share."""
    return ", ".join(row["name"].split(", ")[1:])


def number(value: float | None) -> str:
    """Three significant digits."""
    return "" if value is None else significant(value, 3)


def interval(value: Mapping[str, float] | None) -> str:
    """The mean and its 95 % interval."""
    return "" if value is None else with_interval(Interval(**value))


def table(rows: Sequence[Row]) -> str:
    """One row per setting, by falling arithmetic; columns that nothing fills are left out."""
    columns: dict[str, Callable[[Row], str]] = {
        "setting": short_name,
        "encoder runs": lambda row: str(row["encoder_runs"]),
        "arithmetic": lambda row: f"{row['share']:.2f}",
        "latent error": lambda row: interval(row["latent_error"]),
        "times equal-cost": lambda row: interval(row["times_plain"]),
        "PSNR": lambda row: f"{row['psnr']['mean']:.1f}" if row["psnr"] else "",
        "Frechet": lambda row: number(row["frechet"]),
        "retrieved": lambda row: f"{row['retrieval']['mean']:.0%}" if row["retrieval"] else "",
    }
    rows = sorted(rows, key=lambda row: -row["share"])
    cells = {name: [fill(row) for row in rows] for name, fill in columns.items()}
    filled = {name: column for name, column in cells.items() if any(column)}
    return markdown(list(filled), zip(*filled.values(), strict=True))


def lead_table(answers: Mapping[str, Sequence[Row]]) -> str:
    """Errors of the output cache as multiples of the equal-cost sampler's, by stride."""
    blends = ("extrapolate", "interpolate")
    sources = [
        (answers[name], blend) for name in ("which blend", "the same start") for blend in blends
    ]
    cells = []
    for stride_ in (2, 3, 5, 10, 20):
        name = "ddim, 50 steps, none, {}, stride " + str(stride_)
        found = [named(rows, name.format(blend)) for rows, blend in sources]
        first = next(row for row in found if row)
        cells.append((str(stride_), f"{first['share']:.2f}", *map(lead, found)))
    heads = [*blends, *(f"{blend}, one start" for blend in blends)]
    return markdown(["stride", "arithmetic", *heads], cells)


def runs_table(answers: Mapping[str, Sequence[Row]]) -> str:
    """The same with `extrapolate`, by runs of the UNet, for three full samplers."""
    samplers = {
        "of 50 DDIM calls": ("which blend", "ddim, 50 steps"),
        "of 20 DDIM calls": ("few DDIM steps", "ddim, 20 steps"),
        "of 20 DPM-Solver++ calls": ("few DPM-Solver++ steps", "dpmsolver++, 20 steps"),
    }
    found = {
        (head, row["encoder_runs"]): row
        for head, (name, full) in samplers.items()
        for row in answers[name]
        if short_name(row).startswith(f"{full}, none, extrapolate, stride")
    }
    counts = sorted({runs for _, runs in found}, reverse=True)
    cells = [(str(n), *(lead(found.get((head, n))) for head in samplers)) for n in counts]
    return markdown(["runs of the UNet", *samplers], cells)


def less_than_reuse_table(answers: Mapping[str, Sequence[Row]]) -> str:
    """How much less error settings have than `reuse` at the cut mid and the same stride."""
    rows = [*answers["which blend"], *answers["prior noise"]]
    settings = [
        *(f"mid, {blend}" for blend in ("extrapolate", "interpolate", "interpolate-refresh")),
        *("none, extrapolate", "none, interpolate", "none, extrapolate, prior noise"),
    ]

    def error(setting: str, stride_: int) -> float | None:
        cut, blend, *more = setting.split(", ")
        row = named(rows, ", ".join(("ddim, 50 steps", cut, blend, f"stride {stride_}", *more)))
        return row["latent_error"]["mean"] if row else None

    def less(setting: str, stride_: int) -> str:
        ours, theirs = error(setting, stride_), error("mid, reuse", stride_)
        return f"{1 - ours / theirs:.0%}" if ours and theirs else ""

    cells = [(f"cut {one}", *(less(one, stride_) for stride_ in (5, 10))) for one in settings]
    return markdown(["setting", "stride 5", "stride 10"], cells)


def named(rows: Sequence[Row], name: str) -> Row | None:
    """The row of a setting, if it was measured."""
    return next((row for row in rows if short_name(row) == name), None)


def lead(row: Row | None) -> str:
    """The error as a multiple of the equal-cost sampler's, in the mean."""
    return significant(row["times_plain"]["mean"]) if row and row["times_plain"] else ""


def shared_table(rows: Sequence[Row]) -> str:
    """Weights that were trained for a plan beside what as many rows of the UNet buy otherwise.

    Trials of a few steps have a table of their own.
    """
    heads = ["sampler", "rows", "latent error", "PSNR", "Frechet", "precision", "recall"]
    cells = [
        (
            row["name"],
            f"{100 * row['share']:.1f}",
            interval(row["latent_error"]),
            f"{row['psnr']['mean']:.1f}" if row["psnr"] else "",
            number(row["frechet"]),
            f"{row['precision']:.2f}",
            f"{row['recall']:.2f}",
            interval(row["retrieval"]),
        )
        for row in sorted(rows, key=lambda row: -row["share"])
        if not row["checkpoint"].startswith("short")
    ]
    return markdown([*heads, "retrieved"], cells)


def regularised_table(rows: Sequence[Row]) -> str:
    """Short trials with FCR in the same loop beside those without, seed by seed."""
    found = {row["checkpoint"]: row for row in rows}
    seeds = [name.removeprefix("short ") for name in found if re.fullmatch(r"short \d", name)]
    cells = [
        (
            seed,
            *(f"{found[name]['latent_error']['mean']:.4f}" for name in pair),
            *(number(found[name]["frechet"]) for name in pair),
        )
        for seed in seeds
        if (pair := (f"short {seed}", f"short, FCR {seed}"))[1] in found
    ]
    heads = ["seed", "latent error", "with FCR", "Frechet", "with FCR"]
    return markdown(heads, cells)


def models_table(models: Mapping[str, Sequence[Row]]) -> str:
    """One row per model, one column per setting of the fine-tuned ones."""
    _, *tuned = models.values()
    wanted = dict.fromkeys(short_name(row) for rows in tuned for row in rows)
    rows = []
    for model, found in models.items():
        by_name = {short_name(row): row for row in found}
        cells = [by_name.get(name, {}).get("latent_error") for name in wanted]
        rows.append((model, *map(interval, cells)))
    return markdown(["model", *wanted], rows)


def pictures_table(full_runs: Mapping[str, Row]) -> str:
    """What each model's full sampler draws, against real pictures."""
    heads = ["model", "Frechet", "precision", "recall", "retrieved"]
    rows = []
    for model, row in full_runs.items():
        shares = (f"{one:.2f}" for one in (row["precision"], row["recall"]))
        found = row["retrieval"]
        retrieved = f"{found['mean']:.0%} [{found['low']:.0%}, {found['high']:.0%}]"
        rows.append((model, number(row["frechet"]), *shares, retrieved))
    return markdown(heads, rows)


def features_table(models: Mapping[str, Any]) -> str:
    """Sizes against the shipped model's, and changes, by mean square and by variance."""
    deltas = ("10", "100", "200")
    rows = []
    for name, found in models.items():
        cells = [name]
        for size in ("mean_square", "spread"):
            shipped = models["shipped"][size]
            ratios = [found[size][one] / shipped[one] for one in shipped]
            cells.append(f"{min(ratios):.2f} to {max(ratios):.2f}")
        for change in ("relative_change", "spread_change"):
            cells += [number(found[change][delta]) for delta in deltas]
        rows.append(cells)
    changes = [f"D = {d} / {size}" for size in ("mean square", "variance") for d in deltas]
    return markdown(["model", "mean squares", "variances", *changes], rows)


def gains_table(models: Mapping[str, Sequence[Row]], num_prompts: int) -> str:
    """Errors against each model's own full run, as multiples of another model's."""
    errors = {
        model: {short_name(row): row["errors"] for row in rows} for model, rows in models.items()
    }
    settings = [name for name in errors["control"] if any(errors["control"][name])]

    def ratio(model: str, other: str, name: str) -> str:
        if name not in errors[model]:
            return ""
        groups = [picture % num_prompts for picture in range(len(errors[model][name]))]
        found = bootstrap_ratio(errors[model][name], errors[other][name], groups)
        return with_interval(Interval(*found))

    rows = [
        (f"{model} / {other}", *(ratio(model, other, name) for name in settings))
        for other in ("shipped", "control")
        for model in errors
        if model not in ("shipped", other)
    ]
    return markdown(["models", *settings], rows)


def drift_table(drift: Mapping[str, Any]) -> str:
    """By tensor: relative squared changes, what a line through two calls misses, and why."""
    lags = [lag for lag in (1, 5, 10) if lag in drift["lags"]]
    heads = [f"{lag} calls {what}" for what in ("apart", "beyond a line") for lag in lags]
    rows = []
    for name, changes in drift["by_tensor"].items():
        columns = [changes, drift["extrapolated"][name]]
        cells = [number(one[drift["lags"].index(lag)]) for one in columns for lag in lags]
        share = sum(drift["by_time"][name]) / sum(drift["by_call"][name])
        rows.append((name, *cells, f"{share:.0%}"))
    return markdown(["feature", *heads, "by the timestep alone"], rows)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(page: str, name: str, content: str) -> str:
    """Replace what stands between the markers of this name.

    Raises:
        ValueError: a page has no such markers.
    """
    pattern = re.compile(f"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"The page has no place for {name!r}.")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", page)


def plot(lines: Lines, x_name: str, path: Path, *, ticks: Sequence[float] = ()) -> None:
    """Latent error with its interval against x, which is logarithmic where ticks are given."""
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axes = figure.add_subplot(yscale="log", xscale="log" if ticks else "linear")
    for index, (label, points) in enumerate(lines.items()):
        xs, means, lows, highs = zip(*sorted(points), strict=True)
        style = {"color": "black", "linestyle": "--"} if label == PLAIN else {}
        (line,) = axes.plot(xs, means, marker="osD^v*Px"[index % 8], markersize=5, **style)
        line.set_label(label)
        axes.fill_between(xs, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
    if ticks:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set(xlabel=x_name, ylabel="relative squared latent error")
    axes.grid(alpha=0.2)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    _save(figure, path)


#: Panels of `draw_buys`: what a row holds, and how it is called.
PANELS = {
    "latent_error": "relative squared latent error",
    "frechet": "Frechet distance to real pictures",
    "precision": "precision",
    "recall": "recall",
    "retrieval": "prompts found again",
}


def draw_buys(shared: Sequence[Row], answers: Mapping[str, Sequence[Row]], path: Path) -> None:
    """What rows of the UNet buy: plain steps, a rule, fitted plans, trained weights; by measure."""
    lines: dict[str, list[Row]] = {}
    for row in shared:
        if label := _buyer(row):
            lines.setdefault(label, []).append(row)
    for row in answers["fcr200-spread-10 against the shipped model"]:
        if not row["blend"] or row["blend"] == "extrapolate":
            lines.setdefault("features alike (FCR, lambda 10)", []).append(row)
    figure = Figure(figsize=(9.6, 6.2), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    for axes, (measure, heading) in zip(panels, PANELS.items(), strict=False):
        for index, (label, rows) in enumerate(lines.items()):
            points = [
                (100 * row["share"], value["mean"] if isinstance(value, Mapping) else value)
                for row in sorted(rows, key=share)
                if (value := row[measure]) is not None
            ]
            style = {"color": "black", "linestyle": "--"} if label == PLAIN else {}
            axes.plot(*zip(*points, strict=True), marker="osD^v*Px"[index], label=label, **style)
        axes.set(xscale="log", title=heading, xlabel="rows of the UNet")
        axes.set_xticks([3, 6, 10, 20, 34, 100], ["3", "6", "10", "20", "34", "100"])
        axes.minorticks_off()
        axes.grid(alpha=0.2)
    panels[0].set(yscale="log")
    panels[-1].axis("off")
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center", frameon=False)
    _save(figure, path)


def _buyer(row: Row) -> str | None:
    """Whose line in `draw_buys` a row is on; on none are trials, and what was trained further."""
    if row["checkpoint"].startswith("short") or row["checkpoint"] == "one run":
        return None
    if row["checkpoint"] != "shipped":
        return "pictures right (trained for the plan)"
    if row["plain"]:
        return PLAIN
    return "fitted plans" if "fitted plan" in row["name"] else "output cache, extrapolate"


def _save(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):  # equal data, equal file
        figure.savefig(path, metadata={"Date": None})


def lines_of(
    rows: Iterable[Row], label: Callable[[Row], str | None], x: Callable[[Row], float]
) -> Lines:
    """Group rows by label; rows without label, or without error, are left out."""
    lines: dict[str, dict[float, tuple[float, float, float, float]]] = {}
    for row in rows:
        name, error = label(row), row["latent_error"]
        if name is not None and error is not None:
            point = (x(row), error["mean"], error["low"], error["high"])
            lines.setdefault(name, {})[point[0]] = point
    return {name: list(points.values()) for name, points in lines.items()}


def share(row: Row) -> float:
    """Of the full sampler's arithmetic."""
    return row["share"]


def stride(row: Row) -> float:
    """The distance of its uniform key calls."""
    return row["key_calls"][1] - row["key_calls"][0]


def uniform(row: Row) -> bool:
    """Whether it is cached, with equal strides and nothing else."""
    if row["plain"] or row["prior_noise"]:
        return False
    return row["key_calls"] == list(range(0, row["num_calls"], int(stride(row))))


def draw(answers: Mapping[str, Sequence[Row]], shared: Sequence[Row], folder: Path) -> None:
    """The page's plots."""
    folder.mkdir(exist_ok=True)
    draw_buys(shared, answers, folder / "buys.svg")
    plain = [row for row in answers["plain sampling with fewer steps"] if row["plain"]]
    blends = [row for row in answers["which blend"] if not row["plain"]]

    def cut_label(row: Row) -> str | None:
        return PLAIN if row["plain"] else f"cut {row['cut']}, extrapolate"

    extrapolated = [
        row
        for row in (*answers["where to cut"], *blends)
        if row["blend"] == "extrapolate" and uniform(row)
    ]
    cuts = lines_of([*plain, *extrapolated], cut_label, share)
    plot(cuts, "share of the arithmetic", folder / "cuts.svg")
    for cut in ("mid", "none"):
        at_cut = [row for row in blends if row["cut"] == cut and uniform(row)]
        lines = lines_of(at_cut, lambda row: row["blend"], stride)
        strides = sorted({point[0] for points in lines.values() for point in points})
        plot(lines, "stride", folder / f"blends-{cut}.svg", ticks=strides)


def fill_page(page: str, study: Mapping[str, Any], shared: Sequence[Row]) -> str:
    """docs/study.md with the tables of study.json, and of shared.json's rows."""
    answers = study["answers"]
    plain = [row for row in answers["plain sampling with fewer steps"] if row["plain"]]
    trained = study["protocol"]["training"]["variants"]
    variants = [name for name in trained if f"{name} against the shipped model" in answers]
    for name, rows in answers.items():
        if not name.startswith(tuple(variants)):
            page = fill(page, name, table(rows))
    page = fill(page, "lead", lead_table(answers))
    page = fill(page, "lead by runs", runs_table(answers))
    page = fill(page, "less than reuse", less_than_reuse_table(answers))
    shipped = [*answers["where to cut"], *answers["which blend"]]
    for reference in ("its own full run", "the shipped model"):
        models = {name: answers[f"{name} against {reference}"] for name in variants}
        models = {"shipped": shipped, **models}
        page = fill(page, f"against {reference}", models_table(models))
        if reference == "its own full run":
            page = fill(page, "gains", gains_table(models, study["protocol"]["num_prompts"]))
            full_runs = {name: rows[0] for name, rows in models.items()} | {"shipped": plain[0]}
            page = fill(page, "pictures", pictures_table(full_runs))
    page = fill(page, "features", features_table(study["features"]))
    page = fill(page, "drift", drift_table(study["drift"]))
    page = fill(page, "one encoder run", shared_table(shared))
    return fill(page, "FCR in the same loop", regularised_table(shared))
