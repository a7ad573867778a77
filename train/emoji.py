"""Captioned emoji: the training data of the default model."""

import hashlib
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

PACKAGE = "emoji-datasource-twitter@16.0.0"
EMOJI_JSON_SHA256 = "1d602e65be88772bf8cc368ce16b855d719eeddbafe128d471b80203f494d29f"

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
class Emoji:
    """One picture and the words that name it."""

    captions: tuple[str, ...]
    image: Path


def fetch_package(directory: Path) -> Path:
    """Download Twemoji with `npm pack`, which checks its integrity, and return the unpacked folder.

    A folder that was fetched before is used as it is.

    Raises:
        EncacheError: npm is missing or fails, or the package is not the pinned one.
    """
    package = directory / "package"
    if not package.exists():
        directory.mkdir(parents=True, exist_ok=True)
        npm = shutil.which("npm")
        if npm is None:
            raise EncacheError(
                "The emoji come as an npm package and npm is not installed. Install npm, or pass "
                f"--emoji-dir with the unpacked package {PACKAGE}."
            )
        with tempfile.TemporaryDirectory(dir=directory) as temporary:
            packed = subprocess.run(
                [npm, "pack", PACKAGE, "--silent"], cwd=temporary, capture_output=True, text=True
            )
            if packed.returncode:
                raise EncacheError(f"npm pack {PACKAGE} failed: {packed.stderr.strip()[-300:]}")
            archive = Path(temporary, packed.stdout.split()[-1])
            shutil.unpack_archive(archive, temporary, filter="data")
            Path(temporary, "package").rename(package)
    verify_package(package)
    return package


def verify_package(package: Path) -> None:
    """Raise EncacheError unless `package` holds the emoji.json that the recipe was written for."""
    table = package / "emoji.json"
    if not table.is_file():
        raise EncacheError(f"{package} holds no emoji.json; pass the unpacked {PACKAGE}.")
    if hashlib.sha256(table.read_bytes()).hexdigest() != EMOJI_JSON_SHA256:
        raise EncacheError(f"{table} is not the one of {PACKAGE}; delete the folder to fetch it.")


def read_emoji(package: Path, categories: Iterable[str]) -> list[Emoji]:
    """List the emoji of the given categories in the package's own order.

    Captions are the Unicode name and the short names: "red apple", "apple".
    """
    wanted = set(categories)
    folder = package / "img" / "twitter" / "64"
    return [
        Emoji(_captions(entry), folder / entry["image"])
        for entry in json.loads((package / "emoji.json").read_text())
        if entry["category"] in wanted and entry["has_img_twitter"]
    ]


def _captions(entry: dict) -> tuple[str, ...]:
    names = [entry["name"], *entry["short_names"]]
    words = (name.lower().replace("_", " ").replace("-", " ") for name in names)
    return tuple(dict.fromkeys(words))


def load_images(emoji: Sequence[Emoji]) -> torch.Tensor:
    """Read the pictures over white as float32 [N, 3, 64, 64] in [-1, 1]."""
    return torch.stack([_over_white(one.image) for one in emoji])


def _over_white(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1
