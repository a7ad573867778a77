"""Captioned pictures from disk, as a viewer shows them and at the size a model works with."""

import io
import json
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps

from encache.errors import EncacheError

#: By Pillow's raw mode of a PNG: what makes a level of the file one of 8 bits.
_TO_EIGHT_BITS: dict[object, float] = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}


class UnreadablePictureError(ValueError):
    """A picture is damaged, or of a kind that nobody can show."""


def read_picture(source: Path | BinaryIO) -> Image.Image:
    """Decode the whole picture in sRGB, as a viewer shows it.

    It is turned as its EXIF says, converted from its ICC profile where that can be used, and laid
    on white where it is transparent: under the transparency any colour may hide. Of an animation
    it is the first frame.

    Raises:
        UnreadablePictureError: it is damaged, of an unknown format, or suspiciously large; or its
            levels are 32-bit integers or floats, whose black and white are not agreed on.
    """
    try:
        with Image.open(source) as image:
            if image.format == "PNG":
                _scale_key(image)
            image.load()
            return _as_shown(image)
    except Exception as error:  # Pillow's decoders raise nearly anything for damaged bytes
        raise UnreadablePictureError(str(error)) from error


def _scale_key(image: ImageFile.ImageFile) -> None:
    """Bring a PNG's transparent colour to 8 bits, as Pillow does with the pixels alone."""
    scale = _TO_EIGHT_BITS.get(image.tile[0][3])
    key = image.info.get("transparency")
    if scale and isinstance(key, int):
        image.info["transparency"] = int(key * scale)
    elif scale and key:
        image.info["transparency"] = tuple(int(level * scale) for level in key)


def _as_shown(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile") or b""
    with suppress(Exception):  # damaged EXIF, too, raises nearly anything, and the picture is whole
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):
        image = _in_eight_bits(image)
    return _in_srgb(_over_white(image), profile)


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey levels of 12 or 16 bits, which Pillow would clip at 255."""
    if not image.mode.startswith("I;16") and (image.mode, image.format) != ("I", "PPM"):
        raise ValueError(f"levels of mode {image.mode} have no agreed black and white")
    tags = getattr(image, "tag_v2", {})
    white = 2**12 - 1 if tags.get(ExifTags.Base.BitsPerSample) == (12,) else 2**16 - 1
    levels = np.asarray(image)
    shown = levels.astype(np.uint32) * 255 // white
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is zero
        shown = 255 - shown
    grey = Image.fromarray(shown.astype(np.uint8))
    if "transparency" in image.info:
        opaque = levels != image.info["transparency"]
        grey.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))
    return grey


def _over_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    grey = image.mode in ("1", "L", "LA", "La")
    # Pillow converts the premultiplied La to LA alone.
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("L" if grey else "RGB")


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert to sRGB, through the embedded profile where it fits the picture.

    A profile of RGB also fits a grey picture. One that fits neither way is ignored: programs that
    convert a picture from CMYK or to grey may leave the old one in.
    """
    for mode in (image.mode, "RGB") if profile else ():
        if mode in ("L", "CMYK", "RGB"):
            try:
                srgb = ImageCms.createProfile("sRGB")
                transform = ImageCms.buildTransform(io.BytesIO(profile), srgb, mode, "RGB")
                return transform.apply(image.convert(mode))
            except ImageCms.PyCMSError:
                continue
    return image.convert("RGB")


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
