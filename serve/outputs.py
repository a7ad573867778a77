"""Where bulk work puts its pictures, so that a stop at any moment loses and doubles nothing.

A picture's own file is the record that it is drawn: it is written aside and renamed to the name of
its row's key. All else, the lines of metadata.jsonl and the shards, is made from these files.
"""

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from encache.errors import EncacheError
from encache.files import check_writable, parse_json, replacing, write_json, write_new
from encache.model.pictures import is_litter
from encache.serve.rows import Row

#: What decides a folder's pictures; hidden from `encache-train`.
SETTINGS = ".encache-batch.json"
METADATA = "metadata.jsonl"
_LEFT = re.compile(r"\.(metadata\.jsonl|\d+\.tar)\.\d+")


class Output(Protocol):
    """What takes pictures."""

    done: set[str]

    def save(self, row: Row, picture: bytes) -> None:
        """Keep the PNG file of a row, unless it is there."""

    def record(self, rows: Sequence[Row]) -> None:
        """Note rows whose pictures were saved."""

    def finish(self) -> None:
        """Leave the same files, whatever the order in which pictures came."""


@contextmanager
def claiming(folder: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Hold the folder for this process, and for pictures of these settings alone.

    Raises:
        EncacheError: another process has it, or it holds something else.
    """
    check_writable(folder)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        held = lock.acquire()
    except Timeout as error:
        raise EncacheError(f"Another encache-batch is writing to {folder}: wait for it.") from error
    with held:
        _check_settings(folder, settings)
        for left in folder.glob(".*.*.*"):  # by a process that was killed
            if _LEFT.fullmatch(left.name):
                left.unlink()
        yield


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    path = folder / SETTINGS
    wanted = json.loads(json.dumps(settings))
    if path.exists():
        try:
            found = parse_json(path.read_bytes())
        except ValueError as error:
            raise EncacheError(f"{path} is damaged ({error}): choose another folder.") from error
        differing = sorted(name for name in wanted if found.get(name) != wanted[name])
        if differing:
            raise EncacheError(
                f"{folder} holds pictures of another {', '.join(differing)}: choose another "
                "folder, or type what was typed then."
            )
    elif any(not is_litter(one.name) for one in folder.iterdir()):
        raise EncacheError(f"{folder} is not empty, and not of encache-batch: choose another.")
    else:
        write_json(path, wanted)


class _Pictures:
    """PNG files by key, in 256 folders, because file systems are slow where there are too many."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done = set()
        for part in folder.glob("[0-9a-f][0-9a-f]"):
            for entry in os.scandir(part):
                if entry.name.startswith("."):  # what a process left that was killed
                    os.unlink(entry.path)
                else:
                    self.done.add(entry.name.removesuffix(".png"))

    @staticmethod
    def name(key: str) -> str:
        return f"{key[:2]}/{key}.png"

    def save(self, row: Row, picture: bytes) -> None:
        path = self.folder / self.name(row.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            write_new(path, picture)
        self.done.add(row.key)


class ImageFolder:
    """Pictures beside metadata.jsonl; see `Output`."""

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        self._pictures = _Pictures(folder)
        self._path = folder / METADATA
        self._rows = rows
        self.done = self._pictures.done
        self.finish()

    def save(self, row: Row, picture: bytes) -> None:
        self._pictures.save(row, picture)

    def record(self, rows: Sequence[Row]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(_line(row) for row in rows))

    def finish(self) -> None:
        """Write metadata.jsonl in the order of the list; pictures of longer lists come last."""
        known = {_Pictures.name(row.key) for row in self._rows}
        lines = [_line(row) for row in self._rows if row.key in self.done]
        with suppress(FileNotFoundError):
            for line in self._path.read_text(encoding="utf-8").splitlines(keepends=True):
                with suppress(ValueError, TypeError, KeyError):  # half a line of a full disk
                    name = json.loads(line)["file_name"]
                    if name not in known and Path(name).stem in self.done:
                        known.add(name)
                        lines.append(line)
        with replacing(self._path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")


def _facts(row: Row) -> dict[str, Any]:
    job = row.job
    return {"seed": job.seed, "negative_prompt": job.negative_prompt}


def _line(row: Row) -> str:
    facts = {"file_name": _Pictures.name(row.key), "text": row.job.prompt, **_facts(row)}
    return json.dumps(facts) + "\n"


class Shards:
    """webdataset shards, each of the same rows of the list; see `Output`.

    A shard is packed when its last picture is there; until then they lie in a hidden folder.
    """

    def __init__(self, folder: Path, rows: Sequence[Row], size: int) -> None:
        self._folder = folder
        self._shards = [rows[start : start + size] for start in range(0, len(rows), size)]
        self._number = {row.key: place // size for place, row in enumerate(rows)}
        self._pictures = _Pictures(folder / ".pictures")
        self.done = self._pictures.done
        self._missing = [len(shard) for shard in self._shards]
        for number, shard in enumerate(self._shards):
            if self._path(number).exists():
                self._drop(shard)
                self.done.update(row.key for row in shard)
            else:
                self.record([row for row in shard if row.key in self.done])

    def save(self, row: Row, picture: bytes) -> None:
        self._pictures.save(row, picture)

    def record(self, rows: Sequence[Row]) -> None:
        for row in rows:
            number = self._number[row.key]
            self._missing[number] -= 1
            if self._missing[number] == 0:
                self._pack(number)

    def finish(self) -> None:
        shutil.rmtree(self._pictures.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.tar"

    def _pack(self, number: int) -> None:
        shard = self._shards[number]
        with replacing(self._path(number)) as temporary, tarfile.open(temporary, "w") as archive:
            for row in shard:
                picture = (self._pictures.folder / _Pictures.name(row.key)).read_bytes()
                facts = {"caption": row.job.prompt, "key": row.key, **_facts(row)}
                _add(archive, f"{row.key}.png", picture)
                _add(archive, f"{row.key}.txt", row.job.prompt.encode())
                _add(archive, f"{row.key}.json", json.dumps(facts).encode())
        self._drop(shard)

    def _drop(self, shard: Sequence[Row]) -> None:
        for row in shard:
            (self._pictures.folder / _Pictures.name(row.key)).unlink(missing_ok=True)


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without the time: equal rows give equal shards
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
