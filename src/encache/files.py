"""Files that are complete or not there at all."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def check_writable(folder: Path) -> None:
    """Create the folder, and raise OSError now rather than after minutes of work."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_atomically(path: Path, content: bytes) -> None:
    """Write the file beside its place and rename it there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write what JSON can hold, a line per value, atomically."""
    write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")
