"""Lists of prompts: text, CSV, JSON lines and Parquet."""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from encache.errors import EncacheError
from encache.files import parse_json, read_lines, read_text
from encache.model.spec import check_size
from encache.runtime.jobs import Job

#: What a table may say of a picture; other columns are left alone.
COLUMNS = ("prompt", "seed", "negative_prompt", "height", "width")
_LARGEST_SEED = 2**63 - 1

Table = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """A picture of a list.

    Attributes:
        key: names it, however long the list is and wherever it stands in it.
        job: what is drawn.
    """

    key: str
    job: Job


def read_rows(path: Path, num_images: int, default: Job) -> list[Row]:
    """The pictures that a list asks for, in its order.

    Args:
        path: .txt with a prompt per line; .csv, .jsonl or .parquet with `COLUMNS`.
        num_images: per line, of seeds one after another.
        default: what a line does not say.

    Raises:
        EncacheError: it cannot be read, or a line of it not be drawn.
    """
    table = _read_table(path)
    jobs = [
        job
        for number, line in enumerate(table, 1)
        for job in _jobs_of(line, num_images, default, f"{path}, row {number}")
    ]
    if not jobs:
        raise EncacheError(f"{path} holds no prompt.")
    seen: Counter[str] = Counter()
    rows = []
    for job in jobs:
        key = hashlib.sha256(json.dumps(astuple(job)).encode()).hexdigest()[:20]
        seen[key] += 1
        rows.append(Row(key if seen[key] == 1 else f"{key}-{seen[key]}", job))
    return rows


def digest_of(rows: Sequence[Row]) -> str:
    """sha256 of a list's keys, in hexadecimal digits."""
    return hashlib.sha256(" ".join(row.key for row in rows).encode()).hexdigest()


def _read_table(path: Path) -> Table:
    readers: dict[str, Callable[[Path], Table]] = {
        ".txt": lambda path: [{"prompt": line} for line in read_lines(path)],
        ".csv": _read_csv,
        ".jsonl": _read_json_lines,
        ".parquet": _read_parquet,
    }
    if path.suffix.lower() not in readers:
        raise EncacheError(
            f"{path} is no list that is known: name it {', '.join(readers)} after what it is."
        )
    table = readers[path.suffix.lower()](path)
    if table and not any("prompt" in line for line in table):
        raise EncacheError(f"{path} has no column prompt, but {', '.join(map(str, table[0]))}.")
    return table


def _read_csv(path: Path) -> Table:
    try:
        return list(csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise EncacheError(f"{path} is no table with commas ({error}).") from error


def _read_json_lines(path: Path) -> Table:
    table = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.encode(errors="surrogatepass"))
        except ValueError as error:
            raise EncacheError(f"{path}, line {number} is no JSON ({error}).") from error
        if not isinstance(row, dict):
            raise EncacheError(f'{path}, line {number} is no object like {{"prompt": "a cat"}}.')
        table.append(row)
    return table


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise EncacheError('Parquet needs pyarrow: pip install ".[ray]".') from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = [name for name in file.schema_arrow.names if name in COLUMNS]
        return file.read(columns=names).to_pylist()
    except pyarrow.ArrowException as error:
        raise EncacheError(f"{path} is no whole Parquet file ({error}).") from error


def _jobs_of(line: Mapping[str, Any], num_images: int, default: Job, where: str) -> Iterator[Job]:
    prompt, negative = (
        _text(line.get(name), f"{where}: {name}") for name in ("prompt", "negative_prompt")
    )
    if prompt is None:
        raise EncacheError(f"{where} has no prompt.")
    seed, height, width = (
        _number(line.get(name), f"{where}: {name}") for name in ("seed", "height", "width")
    )
    first = default.seed if seed is None else seed
    if first > _LARGEST_SEED - num_images + 1:
        raise EncacheError(f"{where}: seed {first} is too large.")
    height, width = height or default.height, width or default.width
    try:
        check_size(*(side for side in (height, width) if side))
    except EncacheError as error:
        raise EncacheError(f"{where}: {error}") from error
    for one in range(first, first + num_images):
        yield Job(prompt, one, negative or default.negative_prompt, height, width)


def _text(value: Any, what: str) -> str | None:
    if value is None:
        return None
    try:
        if isinstance(value, str) and value.encode() is not None:
            return value
    except UnicodeEncodeError:
        pass
    raise EncacheError(f"{what} must be text, not {value!r}.")


def _number(value: Any, what: str) -> int | None:
    """A whole number that is not negative, as a table's cell holds it."""
    if value is None or value == "" or value != value:  # a missing number may be NaN
        return None
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if isinstance(value, bool) or not (text.strip().isascii() and text.strip().isdecimal()):
        raise EncacheError(f"{what} must be a whole number, not {value!r}.")
    return int(text)
