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
from encache.model.pictures import UnreadablePictureError, crop_to, read_captions, read_picture
from encache.progress import progress

#: Pictures that are read, extracted and stored together.
BATCH = 64
#: Fewest pictures that make a distribution; precision and recall look at three neighbours.
FEWEST = 4
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True)
class Real:
    """Features of M real pictures.

    Attributes:
        features: [M, D].
        spatial: [M, D2], where the extractor has them.
        captions: one each, where metadata.jsonl gives them.
        unreadable: names of pictures that were left out.
    """

    features: np.ndarray
    spatial: np.ndarray | None
    captions: tuple[str, ...] | None
    unreadable: tuple[str, ...]


def read_real(folder: Path, extractor: Extractor, size: tuple[int, int], store: Store) -> Real:
    """Extract the features of all pictures in a folder, scaled and cropped to `size` (H, W).

    Raises:
        EncacheError: there are too few, or metadata.jsonl cannot be understood.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    metadata = folder / "metadata.jsonl"
    captions = dict(read_captions(metadata)[0]) if metadata.is_file() else {}
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
    names = [str(path.relative_to(folder)) for path in paths]
    kept = [name for name, good in zip(names, readable, strict=True) if good]
    return Real(
        features=np.concatenate([part["features"] for part in parts if part["readable"].any()]),
        spatial=_join(parts, "spatial"),
        captions=tuple(captions.get(name, "") for name in kept) if captions else None,
        unreadable=tuple(name for name in names if name not in set(kept)),
    )


def _describe(paths: Sequence[Path], extractor: Extractor, size: tuple[int, int]) -> dict:
    """What the features depend on; times stand for contents, which take long to hash."""
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    return {"encache": __version__, "real": files, "extractor": extractor.name, "size": size}


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
