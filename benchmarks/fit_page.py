"""The tables of fitted plans in docs/study.md; `python benchmarks/pages.py` writes them."""

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from study_page import Row, fill, interval, markdown, number

from encache.evaluate.headline import significant, with_interval
from encache.evaluate.results import Interval

SOLVERS = ("ddim", "dpmsolver++")
FITTED = ("least squares", "gradients")
#: Which runs have guidance, where not all do, as the table calls it.
WHERE = {
    "all but the last two": "all but the last two",
    "one in 2": "one in 2",
    "the first of 2": "the first half",
    "one in 3": "one in 3",
    "the first of 3": "the first third",
}


def fill_page(page: str, fit: Mapping[str, Any]) -> str:
    """docs/study.md with the tables of fit.json; a part that was not run has none."""
    parts = {name: part["rows"] for name, part in fit["parts"].items()}
    for solver in SOLVERS:
        if rows := parts.get(f"{solver} plans"):
            page = fill(page, f"fitted plans, {solver}", plans_table(rows))
    if "ddim searched" in parts:
        page = fill(page, "moved key calls", searched_table(parts))
    if {f"{solver} rules" for solver in SOLVERS} <= parts.keys():
        page = fill(page, "published rules", rules_table(parts))
    if "ddim rows" in parts:
        page = fill(page, "guidance at fewer calls", branches_table(parts))
    if "ddim transfer" in parts:
        page = fill(page, "fitted elsewhere", transfer_table(parts["ddim transfer"]))
    if "ddim fewer" in parts:
        page = fill(page, "fitted on fewer pictures", fewer_table(parts))
    return page


def plans_table(rows: Sequence[Row]) -> str:
    """Every way at every number of evaluations, by falling cost."""
    heads = ["runs", "way", "rows", "latent error", "its median", "times plain", "PSNR"]
    heads += ["perceptual", "Frechet to full", "Frechet to real"]
    cells = [
        (
            str(row["encoder_runs"]),
            row["name"],
            str(row["rows"]),
            interval(row["latent_error"]),
            significant(median(row["errors"]), 2) if row["latent_error"] else "",
            "" if row["name"] == "plain" else interval(row["times_plain"]),
            f"{row['psnr']['mean']:.1f}" if row["psnr"] else "",
            number(row["perceptual"]["mean"]) if row["perceptual"] else "",
            number(row["frechet_to_full"]),
            number(row["frechet"]),
        )
        for row in sorted(rows, key=lambda row: -row["encoder_runs"])
    ]
    return markdown(heads, cells)


def searched_table(parts: Mapping[str, Sequence[Row]]) -> str:
    """Key calls that a search moved, beside even ones."""
    cells = []
    for solver in SOLVERS:
        for row in parts.get(f"{solver} searched", []):
            same = {name: row[name] for name in ("encoder_runs", "name")}
            even = _find(parts[f"{solver} plans"], **same)
            keys = ", ".join(map(str, row["key_calls"]))
            cells.append((solver, keys, row["name"], *_errors([even, row])))
    return markdown(["solver", "key calls", "way", "evenly spread", "moved"], cells)


def rules_table(parts: Mapping[str, Sequence[Row]]) -> str:
    """Latent errors of rules at equal key calls, as multiples of the line's."""
    cells = []
    for solver in SOLVERS:
        known = [*parts[f"{solver} rules"], *parts[f"{solver} plans"]]
        budgets = {row["encoder_runs"] for row in parts[f"{solver} rules"] if row["name"] == "ab2"}
        for budget in sorted(budgets, reverse=True):
            found = {row["name"]: row for row in known if row["encoder_runs"] == budget}
            names = ("plain", "rule", "ab2", "zeus", "hicache", "spectrum", *FITTED)
            cells.append((solver, str(budget), *_errors([found.get(name) for name in names])))
    heads = ["solver", "runs", "plain steps", "a line (the default)", "AB2", "ZEUS", "HiCache"]
    return markdown([*heads, "Spectrum", *FITTED], cells)


def branches_table(parts: Mapping[str, Sequence[Row]]) -> str:
    """Plans of equal rows that leave guidance out at some of their runs, which buys more runs."""
    cells = []
    for solver in SOLVERS:
        for row in parts[f"{solver} plans"]:
            sparse = {
                one["guided"]: one
                for one in parts.get(f"{solver} rows", [])
                if (one["budget"], one["name"]) == (row["encoder_runs"], row["name"])
            }
            if row["name"] != "least squares" or not sparse:
                continue
            rows = [row, *(sparse[where] for where in WHERE)]
            runs = (one["encoder_runs"] for one in rows)
            pairs = [f"{error} ({one})" for error, one in zip(_errors(rows), runs, strict=True)]
            cells.append((solver, str(row["rows"]), *pairs))
    return markdown(["solver", "rows", "every", *WHERE.values()], cells)


def transfer_table(rows: Sequence[Row]) -> str:
    """One line per condition."""
    conditions = dict.fromkeys(row["condition"] for row in rows)
    cells = []
    for condition in conditions:
        found = {row["name"]: row for row in rows if row["condition"] == condition}
        errors = [found[name]["latent_error"] for name in ("plain", "rule", "gradients")]
        gain = significant(errors[1]["mean"] / errors[2]["mean"])
        cells.append((condition, *map(interval, errors), f"{gain}x"))
    return markdown(["drawn with", "plain steps", "a line", "fitted", "line / fitted"], cells)


def fewer_table(parts: Mapping[str, Sequence[Row]]) -> str:
    """Errors of least squares by pictures fitted on."""
    whole = [row for row in parts["ddim plans"] if row["name"] == "least squares"]
    rows = [*parts["ddim fewer"], *whole]
    numbers = sorted({row["pictures"] for row in rows})
    cells = []
    for runs in sorted({row["encoder_runs"] for row in parts["ddim fewer"]}, reverse=True):
        rule = _find(parts["ddim plans"], encoder_runs=runs, name="rule")
        fitted = [_find(rows, encoder_runs=runs, pictures=number) for number in numbers]
        cells.append((str(runs), *_errors([rule, *fitted])))
    return markdown(["runs", "a line", *(f"{number} pictures" for number in numbers)], cells)


def features_table(rows: Sequence[Row]) -> str:
    """What fitted blends gain for the feature cache."""
    cells = [
        (
            row["cut"],
            str(row["stride"]),
            row["blend"],
            with_interval(Interval(row["error"], *row["interval"])),
            with_interval(Interval(*row["to_rule"])) if row["blend"] != "extrapolate" else "",
        )
        for row in rows
    ]
    return markdown(["cut", "stride", "blend", "latent error", "times the line's"], cells)


def _find(rows: Sequence[Row], **wanted: Any) -> Row:
    return next(row for row in rows if all(row[name] == one for name, one in wanted.items()))


def _errors(rows: Sequence[Row | None]) -> list[str]:
    """Mean latent errors on the pictures that all of them have, which are the first."""
    number = min(len(row["errors"]) for row in rows if row)
    return [significant(fmean(row["errors"][:number]), 2) if row else "" for row in rows]
