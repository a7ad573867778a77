"""Files that are complete or not there at all, and text as any editor writes it.

That holds after a power failure too: a file's content is on the disk before it gets its name.
"""

import codecs
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from encache.errors import EncacheError

#: Files that are written at once: a disk takes hardly longer for several than for one.
WRITERS = 8


def check_writable(folder: Path) -> None:
    """Create the folder, and raise OSError now rather than after minutes of work."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_new(path: Path) -> None:
    """Raise EncacheError if the file exists, OSError if it could not be written."""
    if path.exists() or path.is_symlink():
        raise EncacheError(
            f"{path} exists already and is not overwritten: choose another name, or delete it."
        )
    check_writable(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError that does not say where it happened, as a full disk's, say so."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary file in the same folder, gone at the end unless it was renamed."""
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}")
    try:
        with naming(path):
            yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until the file's content is on the disk; else its name could get there first."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a place beside `path` to write to, and rename it there if the block succeeds."""
    with _beside(path) as temporary:
        yield temporary
        # Some libraries make files for their owner alone.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        _flush(temporary)
        os.replace(temporary, path)


def write_new(path: Path, content: bytes) -> None:
    """Write the file at once: complete, or not at all, and never over another.

    Raises:
        FileExistsError: there is a file of this name, perhaps since a moment ago.
    """
    with _beside(path) as temporary:
        temporary.write_bytes(content)
        _flush(temporary)
        try:
            os.link(temporary, path)
        except OSError as error:
            if path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            os.replace(temporary, path)  # a file system without hard links


def write_atomically(path: Path, content: bytes) -> None:
    """Write the file beside its place and rename it there."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def parse_json(content: bytes) -> Any:
    """What the JSON says.

    Raises:
        ValueError: it is none, or nested so deeply that nobody wrote it.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def to_json(content: Any) -> bytes:
    """As JSON, a line per value."""
    return json.dumps(content, indent=1).encode() + b"\n"


def write_json(path: Path, content: Any) -> None:
    """Write what JSON can hold, atomically."""
    write_atomically(path, to_json(content))


def decode_text(content: bytes, name: object) -> str:
    """Decode UTF-8, or UTF-16 that begins with a byte order mark; the mark is left out.

    Raises:
        EncacheError: it is neither; the sentence begins with the file's name.
    """
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise EncacheError(
            f"{name} is not UTF-8 text (line {line}: {error.reason}). Save it as UTF-8."
        ) from error
    if "\0" in text:  # UTF-16 without its mark, or no text at all
        raise EncacheError(f"{name} is not UTF-8 text (it holds zero bytes). Save it as UTF-8.")
    return text


def read_text(path: Path) -> str:
    """Read a text file; see `decode_text`."""
    return decode_text(path.read_bytes(), path)


def read_lines(path: Path) -> list[str]:
    r"""The lines that hold something, without the space around them.

    They end at \n, \r\n or \r alone: str.splitlines would also cut at U+2028 and its like.
    """
    lines = re.split("[\r\n]", read_text(path))
    return [line.strip() for line in lines if line.strip()]


def digest_of_lines(lines: Iterable[str]) -> str:
    """sha256 of lines of text and of file names, in hexadecimal digits."""
    # File names that are no UTF-8 come as surrogates.
    return hashlib.sha256("\n".join(lines).encode(errors="surrogatepass")).hexdigest()
