"""Captioned pictures from disk, at the size a model works with."""

import json
import struct
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps

from encache.errors import EncacheError


class UnreadablePictureError(ValueError):
    """A picture, or its caption, is damaged."""


def read_picture(source: Path | BinaryIO) -> Image.Image:
    """Decode the whole picture, in RGB.

    Raises:
        UnreadablePictureError: it is damaged, of an unknown format, or suspiciously large.
    """
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    # Pillow's decoders raise SyntaxError and struct.error for broken chunks.
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise UnreadablePictureError(str(error)) from error


def crop_to(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale the picture until it just covers width x height pixels, and cut out the middle."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def read_captions(metadata: Path) -> tuple[list[tuple[str, str]], int]:
    """File names with their captions, from lines of {"file_name": ..., "text": ...}.

    Returns:
        The pairs, and the number of lines that give none.

    Raises:
        EncacheError: the file is no text, or none of its lines gives a pair.
    """
    try:
        lines = [line for line in metadata.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise EncacheError(f"{metadata} is not UTF-8 text ({error.reason}).") from error
    captioned = [pair for line in lines if (pair := _pair(line))]
    if not captioned:
        raise EncacheError(
            f'{metadata} needs lines like {{"file_name": "0001.png", "text": "a red apple"}}; none '
            f"of its {len(lines)} is one."
        )
    return captioned, len(lines) - len(captioned)


def _pair(line: str) -> tuple[str, str] | None:
    try:
        row = json.loads(line)
        name, caption = row["file_name"], row["text"]
    except (ValueError, KeyError, TypeError):
        return None
    return (name, caption) if is_text(name) and is_text(caption) else None


def is_text(value: object) -> bool:
    """Whether it is a string with something in it."""
    return isinstance(value, str) and bool(value.strip())
