"""Captioned pictures from disk, as a viewer shows them and at the size a model works with."""

import csv
import io
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps

from encache.errors import EncacheError
from encache.files import read_text

#: Endings of what people call pictures. Formats of photos come first, because the first ending
#: wins where a sample has several pictures. What this Pillow cannot read is listed all the same: it
#: shall be named as unreadable, not overlooked.
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".jpe", ".jfif", ".avif", ".heic", ".heif", ".jxl"),
    *(".bmp", ".dib", ".gif", ".apng", ".tif", ".tiff", ".jp2", ".j2k", ".jpx", ".mpo"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".qoi", ".psd"),
)
#: What a file of captions needs, by its name.
_METADATA = {
    "metadata.jsonl": 'lines like {"file_name": "0001.png", "text": "a red apple"}',
    "metadata.csv": "the columns file_name and text",
}
#: By Pillow's raw mode of a PNG: what makes a level of the file one of 8 bits.
_TO_EIGHT_BITS: dict[object, float] = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
_LITTER = {"__MACOSX", "@eaDir"}
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


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


def list_files(folder: Path) -> list[str]:
    """The files in a folder and its folders that a person would count, as sorted names a/b.jpg.

    Linked folders are looked into, each once however many links lead to it or back up.
    """
    found, seen = [], set()
    for root, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        if (place := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not is_litter(name))
        inside = Path(root).relative_to(folder)
        found += [(inside / name).as_posix() for name in files if not is_litter(name)]
    return sorted(found)


def _raise(error: OSError) -> None:
    """Pictures in a folder that may not be read are not overlooked."""
    raise error


def list_pictures(folder: Path) -> list[str]:
    """Those of `list_files` whose ending is a picture's."""
    return [name for name in list_files(folder) if name.lower().endswith(SUFFIXES)]


def is_litter(name: str) -> bool:
    """Whether nobody put a/b.jpg there: hidden files, the doubles ._b.jpg of macOS, thumbnails."""
    parts = name.split("/")
    return any(part in _LITTER or (part[:1] == "." and part.strip(".")) for part in parts)


def find_metadata(folder: Path) -> Path | None:
    """The folder's metadata.jsonl or metadata.csv."""
    return next((folder / name for name in _METADATA if (folder / name).is_file()), None)


def read_captions(metadata: Path) -> tuple[list[tuple[str, str]], int]:
    """Pictures with their captions, by the columns file_name and text of a .jsonl or .csv file.

    Returns:
        The pairs in the file's order, the names as `list_files` writes them, the caption "" where
        there is none; and the number of lines that name no file of the folder.

    Raises:
        EncacheError: the file is no text, or none of its lines gives a picture and a caption.
    """
    rows = _read_rows(metadata)
    named = [(_name_inside(metadata.parent, row.get("file_name")), row.get("text")) for row in rows]
    pairs = [(name, text if is_text(text) else "") for name, text in named if name]
    if not any(text for _, text in pairs):
        raise EncacheError(
            f"{metadata} needs {_METADATA[metadata.name]}, and the picture in its folder; none of "
            f"its {len(rows)} is one."
        )
    return pairs, len(rows) - len(pairs)


def _read_rows(metadata: Path) -> list[dict[str, Any]]:
    text = read_text(metadata)
    if metadata.suffix == ".jsonl":
        return [_parse(line) for line in text.split("\n") if line.strip()]
    try:
        return list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise EncacheError(f"{metadata} is no table with commas ({error}).") from error


def _parse(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _name_inside(folder: Path, name: Any) -> str | None:
    """The file's name as `list_files` writes it, or None where the folder has no such file.

    A name that leads out of the folder counts as missing: a data set from elsewhere must not make
    other files of this machine part of a model.
    """
    root = os.path.abspath(folder)
    for spelling in (name, name.replace("\\", "/")) if is_text(name) else ():
        path = Path(os.path.abspath(os.path.join(root, spelling)))
        if path.is_relative_to(root) and os.path.isfile(path):
            return path.relative_to(root).as_posix()
    return None


def is_text(value: object) -> TypeGuard[str]:
    """Whether it is a string with something in it, and with no half of a cut emoji."""
    return isinstance(value, str) and bool(value.strip()) and not _HALF_CHARACTER.search(value)
