"""Results on disk, so that a repeated or prolonged evaluation computes only what is new."""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from encache.files import check_writable, write_atomically

Arrays = Mapping[str, np.ndarray]


def join(batches: Iterable[Arrays]) -> Arrays:
    """Join the arrays of all batches by name, along their first axis."""
    listed = list(batches)
    return {name: np.concatenate([batch[name] for batch in listed]) for name in listed[0]}


class Store:
    """Named arrays under a description of everything that determines them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        check_writable(folder)

    def get(self, description: Mapping[str, Any], make: Callable[[], Arrays]) -> Arrays:
        """Return what is stored under the description; make and store it first if it is missing."""
        text = json.dumps(description, sort_keys=True)
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"
        try:
            with np.load(path, allow_pickle=False) as stored:
                return dict(stored)
        except (FileNotFoundError, ValueError, zipfile.BadZipFile, EOFError):
            pass  # never made, or damaged: make it anew
        arrays = make()
        content = io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]
        write_atomically(path, content.getvalue())
        return arrays
