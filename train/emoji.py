"""Captioned emoji in three styles: the training data of the default model."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from encache.errors import EncacheError
from encache.files import naming

#: Pictures are square, this many pixels wide.
SIZE = 64
#: The shelves the denoiser learns; people and flags are left out on purpose.
CONCEPT_CATEGORIES = ("Food & Drink", "Animals & Nature")
#: The autoencoder only has to know how emoji look, so it sees more of them.
AUTOENCODER_CATEGORIES = (
    *CONCEPT_CATEGORIES,
    "Activities",
    "Travel & Places",
    "Objects",
    "Smileys & Emotion",
    "Symbols",
)


@dataclass(frozen=True)
class Style:
    """One artist's emoji: the word that asks for it and the npm package that holds it."""

    word: str
    package: str
    version: str
    #: Path of a picture inside the package, with the fields of emoji.json.
    picture: str


#: Twemoji's package also holds the table of names (emoji.json) that all styles share.
TWEMOJI = Style("flat", "emoji-datasource-twitter", "16.0.0", "img/twitter/64/{image}")
NOTO = Style("shaded", "emoji-datasource-google", "16.0.0", "img/google/64/{image}")
FLUENT = Style("3d", "@lobehub/fluent-emoji-3d", "1.1.0", "assets/{unified}.webp")
STYLES = (TWEMOJI, NOTO, FLUENT)


@dataclass(frozen=True)
class Emoji:
    """One picture and the words that ask for it, the plain name first."""

    captions: tuple[str, ...]
    image: Path


def fetch_packages(directory: Path) -> None:
    """Unpack every style's npm package into `directory`/<word>; npm checks their integrity.

    A package that was fetched before is used as it is.

    Raises:
        EncacheError: npm is missing or fails.
    """
    for style in STYLES:
        if not (directory / style.word).exists():
            _fetch(style, directory)


def _fetch(style: Style, directory: Path) -> None:
    npm = shutil.which("npm")
    name = f"{style.package}@{style.version}"
    if npm is None:
        raise EncacheError(
            "The emoji come as npm packages and npm is not installed. Install npm, or pass "
            f"--emoji-dir with the unpacked {name} as its folder {style.word}."
        )
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        packed = subprocess.run(
            [npm, "pack", name, "--loglevel=error"], cwd=temporary, capture_output=True, text=True
        )
        if packed.returncode:
            reason = " ".join(packed.stderr.replace("npm error ", "").split())
            raise EncacheError(f"npm pack {name} failed in {directory}: {reason[:300]}")
        with naming(directory):
            archive = Path(temporary, packed.stdout.split()[-1])
            shutil.unpack_archive(archive, temporary, filter="data")
        Path(temporary, "package").rename(directory / style.word)


def read_emoji(directory: Path, categories: Iterable[str]) -> list[Emoji]:
    """List the pictures of the given categories, style by style, in the order of emoji.json.

    A picture's captions are its Unicode name and short names ("red apple", "apple"), the same
    after its style's word ("3d red apple"), and its shelf ("food"). A style may lack a picture.

    Raises:
        EncacheError: a package is missing or is not the pinned version.
    """
    for style in STYLES:
        _verify(directory / style.word, style)
    table = json.loads((directory / TWEMOJI.word / "emoji.json").read_text())
    wanted = set(categories)
    listed = [
        Emoji(_captions(entry, style), directory / style.word / _picture(entry, style))
        for style in STYLES
        for entry in table
        if entry["category"] in wanted
    ]
    return [one for one in listed if one.image.is_file()]


def _verify(folder: Path, style: Style) -> None:
    try:
        found = json.loads((folder / "package.json").read_text())
        matches = (found["name"], found["version"]) == (style.package, style.version)
    except (OSError, ValueError, KeyError, TypeError):
        matches = False
    if not matches:
        raise EncacheError(
            f"{folder} is not the unpacked npm package {style.package}@{style.version}; delete it "
            "to fetch it anew."
        )


def _picture(entry: dict, style: Style) -> str:
    return style.picture.format(image=entry["image"], unified=entry["unified"].lower())


def _captions(entry: dict, style: Style) -> tuple[str, ...]:
    words = [entry["name"], *entry["short_names"]]
    names = [word.lower().replace("_", " ").replace("-", " ") for word in words]
    shelf = entry["subcategory"].split("-")[0]
    return tuple(dict.fromkeys([*names, *(f"{style.word} {name}" for name in names), shelf]))


def load_posed_images(
    emoji: Sequence[Emoji], poses: int, generator: torch.Generator
) -> torch.Tensor:
    """Read each picture in `poses` random poses, float32 [N * poses, 3, 64, 64] in [-1, 1]."""
    images = (_over_white(one.image) for one in emoji)
    return _to_tensor([_pose(image, generator) for image in images for _ in range(poses)])


def load_posed_image(emoji: Emoji, generator: torch.Generator) -> Image.Image:
    """Read the picture mirrored or not, turned by up to 5 degrees, shrunk to 0.85 or more, shifted.

    Poses give a caption as many pictures as it has in life: without them a small model learns its
    few pictures by heart, and sampling it becomes easier than sampling anything that people use.
    """
    return _pose(_over_white(emoji.image), generator)


def _pose(image: Image.Image, generator: torch.Generator) -> Image.Image:
    mirror, turn, shrink, right, down = torch.rand(5, generator=generator).tolist()
    side = round(SIZE * (1 - 0.15 * shrink))
    if mirror < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle = 10 * turn - 5
    image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor="white")
    image = image.resize((side, side), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (SIZE, SIZE), "white")
    canvas.paste(image, (round(right * (SIZE - side)), round(down * (SIZE - side))))
    return canvas


def _over_white(path: Path) -> Image.Image:
    with Image.open(path) as image:
        rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    flat = Image.alpha_composite(white, rgba).convert("RGB")
    return flat.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    pixels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
