"""Pictures on disk, each with everything needed to make it again."""

import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from encache.files import write_new

#: Key of the JSON text in a PNG's metadata.
METADATA_KEY = "encache"


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, Any]) -> Path:
    """Write the picture and its metadata at once: complete, or not at all.

    Returns:
        `path`, or where that is taken the same name with a number: path-2.png.
    """
    encoded = encode_png(image, metadata)
    for free in _candidates(path):
        with suppress(FileExistsError):  # perhaps since a moment ago
            write_new(free, encoded)
            break
    return free


def encode_png(image: Image.Image, metadata: Mapping[str, Any]) -> bytes:
    """The picture and its metadata as a file."""
    info = PngInfo()
    info.add_itxt(METADATA_KEY, _to_json(metadata))
    encoded = io.BytesIO()
    image.save(encoded, format="PNG", pnginfo=info)
    return encoded.getvalue()


def find_png(path: Path, metadata: Mapping[str, Any]) -> Path | None:
    """The picture with this metadata among those that `save_png` has put under this name."""
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
    """The metadata that `save_png` wrote, or an empty dict."""
    with Image.open(path) as image:
        return json.loads(image.info.get(METADATA_KEY, "{}"))


def file_name(index: int, prompt: str, seed: int) -> str:
    """A readable name that no two pictures of a run share: 000-red-apple-s0.png."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60]
    # Names are bounded in bytes, and a letter may take four.
    slug = words.encode()[:120].decode(errors="ignore") or "prompt"
    return f"{index:03d}-{slug}-s{seed}.png"
