"""Pictures on disk, each with everything needed to make it again."""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

#: Key of the JSON text in a PNG's metadata.
METADATA_KEY = "encache"


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write the picture and its metadata at once: complete, or not at all."""
    info = PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps(metadata, ensure_ascii=False))
    descriptor, temporary = tempfile.mkstemp(suffix=".png", prefix=".", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            image.save(stream, format="PNG", pnginfo=info)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_writable(folder: Path) -> None:
    """Create the folder, and raise OSError now rather than after minutes of sampling."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


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


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
