"""Real pictures, whose distribution the drawn ones are compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from encache import __version__
from encache.errors import EncacheError
from encache.evaluate.extractors import Extractor
from encache.evaluate.store import Arrays, Store
from encache.model.pictures import (
    UnreadablePictureError,
    crop_to,
    find_metadata,
    list_pictures,
    read_captions,
    read_picture,
)
from encache.progress import progress

#: Pictures that are read, extracted and stored together.
BATCH = 64
#: Fewest pictures that make a distribution; precision and recall look at three neighbours.
FEWEST = 4


@dataclass(frozen=True)
class Real:
    """Features of M real pictures.

    Attributes:
        features: [M, D].
        spatial: [M, D2], where the extractor has them.
        captions: one each, where metadata.jsonl or metadata.csv gives them.
        unreadable: names of pictures that were left out.
    """

    features: np.ndarray
    spatial: np.ndarray | None
    captions: tuple[str, ...] | None
    unreadable: tuple[str, ...]


def read_real(folder: Path, extractor: Extractor, size: tuple[int, int], store: Store) -> Real:
    """Extract the features of all pictures in a folder, scaled and cropped to `size` (H, W).

    Raises:
        EncacheError: there are too few, or the metadata cannot be understood.
    """
    metadata = find_metadata(folder)
    captions = dict(read_captions(metadata)[0]) if metadata else {}
    names = sorted({*list_pictures(folder), *captions})
    paths = [folder / name for name in names]
    batches = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    parts = [
        store.get(_describe(batch, extractor, size), partial(_extract, batch, extractor, size))
        for batch in progress(batches, desc="real pictures")
    ]
    readable = np.concatenate([part["readable"] for part in parts]) if parts else np.zeros(0, bool)
    if readable.sum() < FEWEST:
        raise EncacheError(
            f"{folder} holds {readable.sum()} readable pictures; a distribution needs {FEWEST} at "
            "least."
        )
    kept = [name for name, good in zip(names, readable, strict=True) if good]
    return Real(
        features=np.concatenate([part["features"] for part in parts if part["readable"].any()]),
        spatial=_join(parts, "spatial"),
        captions=tuple(captions.get(name, "") for name in kept) if captions else None,
        unreadable=tuple(name for name in names if name not in set(kept)),
    )


def _describe(paths: Sequence[Path], extractor: Extractor, size: tuple[int, int]) -> dict:
    """What the features depend on; times stand for contents, which take long to hash."""
    files = [[path.name, *_size_and_time(path)] for path in paths]
    return {"encache": __version__, "real": files, "extractor": extractor.name, "size": size}


def _size_and_time(path: Path) -> tuple[int, ...]:
    try:
        facts = path.stat()
    except OSError:  # a link that leads nowhere: reading it will count it as unreadable
        return ()
    return facts.st_size, facts.st_mtime_ns


def _extract(paths: Sequence[Path], extractor: Extractor, size: tuple[int, int]) -> Arrays:
    pictures = [_read(path, size) for path in paths]
    readable = [picture for picture in pictures if picture is not None]
    arrays = {"readable": np.array([picture is not None for picture in pictures])}
    if readable:
        extracted = extractor(torch.stack(readable))
        arrays["features"] = extracted.features.numpy()
        if extracted.spatial is not None:
            arrays["spatial"] = extracted.spatial.numpy()
    return arrays


def _read(path: Path, size: tuple[int, int]) -> Tensor | None:
    height, width = size
    try:
        picture = crop_to(read_picture(path), width, height)
    except UnreadablePictureError:
        return None
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _join(parts: Sequence[Arrays], name: str) -> np.ndarray | None:
    found = [part[name] for part in parts if name in part]
    return np.concatenate(found) if found else None
