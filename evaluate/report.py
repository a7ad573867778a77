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

from encache.evaluate.page import render
from encache.evaluate.results import Interval, Report, Row
from encache.files import check_writable, write_atomically

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


def to_json(report: Report) -> str:
    """Everything but the pictures as strict JSON; numbers that are not finite become null."""
    content = asdict(replace(report, grid={}))
    del content["grid"]
    return json.dumps(strict(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


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
