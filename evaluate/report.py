"""A report as files: report.json for programs, rows.csv for tables, index.html for people."""

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from encache.errors import EncacheError
from encache.evaluate.page import render
from encache.evaluate.results import Drift, Interval, Report, Row
from encache.runtime.files import check_writable, write_atomically

REPORT = "report.json"
TABLE = "rows.csv"
PAGE = "index.html"

_INTERVALS = frozenset(entry.name for entry in fields(Row) if entry.type == (Interval | None))


def write_report(report: Report, folder: Path) -> Path:
    """Write the three files, each complete or not at all, and return the page.

    Raises:
        OSError: the folder cannot be written.
    """
    check_writable(folder)
    write_atomically(folder / REPORT, to_json(report).encode())
    write_atomically(folder / TABLE, to_csv(report).encode())
    write_atomically(folder / PAGE, render(report).encode())
    return folder / PAGE


def read_report(folder: Path) -> Report:
    """Read what `write_report` wrote, without the pictures.

    A number that was not finite comes back as NaN, or as None where a row may lack it.

    Raises:
        EncacheError: there is no report, or it cannot be understood.
    """
    path = folder / REPORT
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EncacheError(f"There is no report in {folder}: {REPORT} is missing.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise EncacheError(
            f"{path} is damaged or from another version of encache ({error}). Delete it and "
            "evaluate again."
        ) from error


def to_json(report: Report) -> str:
    """Everything but the pictures as strict JSON; numbers that are not finite become null."""
    content = asdict(replace(report, grid={}))
    del content["grid"]
    return json.dumps(strict(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str) -> Report:
    """The report that `to_json` turned into this text, without its pictures."""
    content = json.loads(text)
    return Report(
        title=content["title"],
        machine=content["machine"],
        protocol=content["protocol"],
        rows=tuple(_read_row(row) for row in content["rows"]),
        drift=_read_drift(content["drift"]) if content["drift"] else None,
    )


def to_csv(report: Report) -> str:
    """One line per setting; an interval takes three columns, and key calls are spaced."""
    columns = [column for entry in fields(Row) for column in _columns_of(entry.name)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in report.rows:
        writer.writerow(_flat(row))
    return text.getvalue()


def _columns_of(name: str) -> tuple[str, ...]:
    return (name, f"{name}_low", f"{name}_high") if name in _INTERVALS else (name,)


def _flat(row: Row) -> dict[str, Any]:
    """The row's cells by column; a missing interval leaves its columns out."""
    cells: dict[str, Any] = {}
    for entry in fields(Row):
        value = getattr(row, entry.name)
        if isinstance(value, Interval):
            cells.update(
                zip(_columns_of(entry.name), (value.mean, value.low, value.high), strict=True)
            )
        else:
            cells[entry.name] = " ".join(map(str, value)) if isinstance(value, tuple) else value
    return cells


def strict(value: Any) -> Any:
    """The value in JSON's own types; whatever JSON does not know becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [strict(entry) for entry in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def _read_row(content: dict[str, Any]) -> Row:
    values = dict(content, key_calls=tuple(content["key_calls"]))
    for name in ("gflop", "share", "seconds"):
        values[name] = _number(values[name])
    for name in _INTERVALS:
        if values[name] is not None:
            values[name] = Interval(**{key: _number(x) for key, x in values[name].items()})
    return Row(**values)


def _read_drift(content: dict[str, Any]) -> Drift:
    curves = {
        field: {name: tuple(map(_number, xs)) for name, xs in content[field].items()}
        for field in ("by_tensor", "by_call", "by_time")
    }
    return Drift(lags=tuple(content["lags"]), **curves)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
