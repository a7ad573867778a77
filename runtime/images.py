"""Pictures on disk, each with everything needed to make it again."""

import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from encache.files import write_new

#: Key of the JSON text in a PNG's metadata.
METADATA_KEY = "encache"
#: Of each frame of a clip: eight in a second.
FRAME_MILLISECONDS = 125


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, Any]) -> Path:
    """Write the picture and its metadata at once: complete, or not at all.

    Returns:
        `path`, or where that is taken the same name with a number: path-2.png.
    """
    return _save(encode_png(image, metadata), path)


def _save(encoded: bytes, path: Path) -> Path:
    for free in _candidates(path):
        with suppress(FileExistsError):  # perhaps since a moment ago
            write_new(free, encoded)
            break
    return free


def save_gif(frames: np.ndarray, path: Path, metadata: Mapping[str, Any]) -> Path:
    """The same for a clip.

    Args:
        frames: [F, H, W, 3] between 0 and 1.
        path: of the file.
        metadata: goes into the comment, where a GIF has room for text.
    """
    first, *others = map(to_image, frames)
    encoded = io.BytesIO()
    first.save(
        encoded,
        format="GIF",
        save_all=True,
        append_images=others,
        duration=FRAME_MILLISECONDS,
        loop=0,
        comment=_to_json(metadata).encode(),
    )
    return _save(encoded.getvalue(), path)


def to_image(pixels: np.ndarray) -> Image.Image:
    """A picture of pixels [H, W, 3] between 0 and 1."""
    return Image.fromarray((pixels * 255).round().astype("uint8"))


def encode_png(image: Image.Image, metadata: Mapping[str, Any]) -> bytes:
    """The picture and its metadata as a file."""
    info = PngInfo()
    info.add_itxt(METADATA_KEY, _to_json(metadata))
    encoded = io.BytesIO()
    image.save(encoded, format="PNG", pnginfo=info)
    return encoded.getvalue()


def find_picture(path: Path, metadata: Mapping[str, Any]) -> Path | None:
    """The picture or clip with this metadata among those that were saved under this name."""
    wanted = json.loads(_to_json(metadata))
    taken = takewhile(Path.exists, _candidates(path))
    return next((one for one in taken if _metadata_of(one) == wanted), None)


def _candidates(path: Path) -> Iterator[Path]:
    yield path
    for number in count(2):
        yield path.with_stem(f"{path.stem}-{number}")


def _to_json(metadata: Mapping[str, Any]) -> str:
    return json.dumps(metadata, ensure_ascii=False, default=str)


def _metadata_of(path: Path) -> dict[str, Any] | None:
    try:
        return read_metadata(path)
    # Somebody else's file.
    except (OSError, ValueError, SyntaxError, RecursionError, Image.DecompressionBombError):
        return None


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `save_png` or `save_gif` wrote, or an empty dict."""
    with Image.open(path) as image:
        return json.loads(image.info.get(METADATA_KEY) or image.info.get("comment", "{}"))


def file_name(index: int, prompt: str, seed: int, suffix: str = ".png") -> str:
    """A readable name that no two pictures of a run share: 000-red-apple-s0.png."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60]
    # Names are bounded in bytes, and a letter may take four.
    slug = words.encode()[:120].decode(errors="ignore") or "prompt"
    return f"{index:03d}-{slug}-s{seed}{suffix}"
