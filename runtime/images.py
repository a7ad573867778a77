"""Pictures on disk, each with everything needed to make it again."""

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from encache.files import write_atomically

#: Key of the JSON text in a PNG's metadata.
METADATA_KEY = "encache"


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write the picture and its metadata at once: complete, or not at all."""
    info = PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps(metadata, ensure_ascii=False, default=str))
    encoded = io.BytesIO()
    image.save(encoded, format="PNG", pnginfo=info)
    write_atomically(path, encoded.getvalue())


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
