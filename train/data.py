"""Captioned pictures for fine-tuning: image folders, webdataset shards, the emoji."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from encache.errors import EncacheError
from encache.model.pictures import (
    UnreadablePictureError,
    crop_to,
    is_text,
    read_captions,
    read_picture,
)
from encache.train import emoji
from encache.train.loop import generator_of

#: Unreadable pictures in a row after which a run stops.
MAX_TRIES = 20


class Pictures(Protocol):
    """A set of captioned pictures with random access.

    Attributes:
        names: one per picture, for messages.
        num_without_caption: pictures that were left out.
        fingerprint: sha256 over names and captions (of shards: sizes), not over the pictures.
    """

    names: list[str]
    num_without_caption: int
    fingerprint: str

    def read(self, index: int, draw: torch.Generator) -> tuple[Image.Image, str]:
        """Picture `index` in RGB and a caption; what varies is drawn.

        Raises:
            OSError, UnreadablePictureError: the picture or its caption cannot be read.
        """


class ImageFolder:
    """A folder with metadata.jsonl: {"file_name": ..., "text": ...} per line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        captioned, self.num_without_caption = read_captions(folder / "metadata.jsonl")
        self.names = [name for name, _ in captioned]
        self.captions = [caption for _, caption in captioned]
        self.fingerprint = _digest(f"{name} {caption}" for name, caption in captioned)

    def read(self, index: int, draw: torch.Generator) -> tuple[Image.Image, str]:
        """See `Pictures`."""
        return read_picture(self.folder / self.names[index]), self.captions[index]


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class Shards:
    """webdataset shards (.tar) as img2dataset writes them: KEY.jpg beside KEY.txt or KEY.json.

    The members' places are listed once, so that pictures can be read in any order, which an exact
    resume needs. Only plain tar files can be read so, not compressed ones.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self.names: list[str] = []
        self.num_without_caption = 0
        self._places: list[tuple[Path, dict[str, tuple[int, int]]]] = []
        for shard in sorted(shards):
            for key, members in _list_members(shard).items():
                if not members.keys() & _PICTURE_SUFFIXES:
                    continue
                if not members.keys() & {"txt", "json"}:
                    self.num_without_caption += 1
                    continue
                self.names.append(f"{shard.name}:{key.lstrip('./')}")
                self._places.append((shard, members))
        sizes = ([size for _, size in members.values()] for _, members in self._places)
        self.fingerprint = _digest(
            f"{name} {size}" for name, size in zip(self.names, sizes, strict=True)
        )

    def read(self, index: int, draw: torch.Generator) -> tuple[Image.Image, str]:
        """See `Pictures`."""
        shard, members = self._places[index]
        suffix = min(members.keys() & _PICTURE_SUFFIXES)
        picture = read_picture(io.BytesIO(_read_member(shard, members[suffix])))
        if "txt" in members:
            return picture, _read_member(shard, members["txt"]).decode(errors="replace").strip()
        return picture, _caption_of(_read_member(shard, members["json"]))


def _caption_of(facts: bytes) -> str:
    try:
        caption = json.loads(facts)["caption"]
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadablePictureError("its facts are no JSON with a caption") from error
    if not is_text(caption):
        raise UnreadablePictureError("it has no caption")
    return str(caption)


_PICTURE_SUFFIXES = {"jpg", "jpeg", "png", "webp"}


def _list_members(shard: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Offset and size of every file of a tar, by key and suffix."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                key = f"{folder}/{stem}"
                place = (member.offset_data, member.size)
                samples.setdefault(key, {})[suffix.lower()] = place
    except tarfile.TarError as error:
        raise EncacheError(
            f"{shard} is not a complete, uncompressed tar file ({error}). Fetch it again, or move "
            "it out of the folder."
        ) from error
    return samples


def _read_member(shard: Path, place: tuple[int, int]) -> bytes:
    offset, size = place
    with shard.open("rb") as file:
        file.seek(offset)
        return file.read(size)


class EmojiPictures:
    """The default model's own training data, every picture in a random pose."""

    def __init__(self, folder: Path) -> None:
        self.emoji = emoji.read_emoji(folder, emoji.CONCEPT_CATEGORIES)
        self.names = [f"{one.image.parent.name}/{one.image.name}" for one in self.emoji]
        self.num_without_caption = 0
        self.fingerprint = _digest(f"{one.image.name} {one.captions}" for one in self.emoji)

    def read(self, index: int, draw: torch.Generator) -> tuple[Image.Image, str]:
        """See `Pictures`."""
        one = self.emoji[index]
        choice = int(torch.randint(len(one.captions), (), generator=draw))
        return emoji.load_posed_image(one, draw), one.captions[choice]


def open_pictures(folder: Path) -> Pictures:
    """Recognise what kind of set `folder` is.

    Raises:
        EncacheError: none that is known, or it holds no captioned picture.
    """
    shards = list(folder.glob("*.tar"))
    if (folder / "metadata.jsonl").is_file():
        pictures: Pictures = ImageFolder(folder)
    elif shards:
        pictures = Shards(shards)
    elif (folder / emoji.TWEMOJI.word).is_dir():
        pictures = EmojiPictures(folder)
    else:
        raise EncacheError(
            f"{folder} is no training set: it holds neither metadata.jsonl with lines like "
            '{"file_name": "0001.png", "text": "a red apple"}, nor .tar shards of img2dataset, '
            "nor the emoji packages of encache-train emoji."
        )
    if not pictures.names:
        raise EncacheError(
            f"{folder} holds no picture with a caption ({pictures.num_without_caption} without)."
        )
    return pictures


@dataclass(frozen=True)
class Draws:
    """How a step's examples are drawn; equal values give equal batches on any machine.

    Attributes:
        resolution: height and width in pixels.
        latent_shape: (channels, height, width) of the noise.
        num_timesteps: of the noise schedule.
        delta_max: largest distance of a pair, in training timesteps.
        caption_dropout: share of captions replaced by "".
        flip: mirror half of the pictures.
        seed: of the run.
    """

    resolution: int
    latent_shape: tuple[int, int, int]
    num_timesteps: int
    delta_max: int
    caption_dropout: float = 0.1
    flip: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Example:
    """One picture [3, H, W] in [-1, 1] with everything that is random about its training step."""

    pixels: Tensor
    caption: str
    noise: Tensor
    timestep: int
    delta: int
    place: float
    unreadable: tuple[str, ...]


class Steps(Dataset):
    """Batch number k of one process, as a function of the run's seed and k alone.

    A step's examples are numbered through, whether they come in one batch, in several accumulated
    ones, or on several processes, and each has its own generator. So the arrangement does not
    change the step, workers may read ahead, and a resumed run sees what the first would have.
    Pictures are drawn with replacement.
    """

    def __init__(
        self,
        pictures: Pictures,
        draws: Draws,
        batch_size: int,
        accumulation: int = 1,
        process: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.pictures = pictures
        self.draws = draws
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.process = process
        self.num_processes = num_processes

    def __getitem__(self, batch: int) -> list[Example]:
        step, part = divmod(batch, self.accumulation)
        first = (part * self.num_processes + self.process) * self.batch_size
        return [self._example(step, first + row) for row in range(self.batch_size)]

    def _example(self, step: int, row: int) -> Example:
        draws = self.draws
        draw = generator_of(draws.seed, step, row)
        timestep = int(torch.randint(draws.num_timesteps, (), generator=draw))
        delta = int(torch.randint(1, draws.delta_max + 1, (), generator=draw))
        noise = torch.randn(draws.latent_shape, generator=draw)
        drop, mirror, place = torch.rand(3, generator=draw).tolist()
        image, caption, unreadable = self._read(draw)
        pixels = to_pixels(image, draws.resolution, draws.flip and mirror < 0.5)
        caption = "" if drop < draws.caption_dropout else caption
        return Example(pixels, caption, noise, timestep, delta, place, unreadable)

    def _read(self, draw: torch.Generator) -> tuple[Image.Image, str, tuple[str, ...]]:
        """Draw pictures until one can be read; the names of the others come along."""
        unreadable: list[str] = []
        while len(unreadable) < MAX_TRIES:
            index = int(torch.randint(len(self.pictures.names), (), generator=draw))
            try:
                return *self.pictures.read(index, draw), tuple(unreadable)
            except (OSError, UnreadablePictureError):
                unreadable.append(self.pictures.names[index])
        raise EncacheError(
            f"{MAX_TRIES} pictures in a row could not be read, the last was {unreadable[-1]}. "
            "Check the training data."
        )


def batches(steps: Steps, start: int, num_workers: int) -> Iterator[list[Example]]:
    """Read the batches from step `start` on, ahead of their use when there are workers."""
    endless = _CountFrom(start * steps.accumulation)
    loader = DataLoader(steps, batch_size=None, sampler=endless, num_workers=num_workers)
    try:
        yield from loader
    except EncacheError as error:  # a worker's comes with its whole traceback as the message
        raise EncacheError(str(error).rpartition("EncacheError: ")[2].strip()) from error


class _CountFrom:
    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        index = self.start
        while True:
            yield index
            index += 1


def to_pixels(image: Image.Image, resolution: int, mirror: bool) -> Tensor:
    """The middle of the picture as [3, R, R] in [-1, 1]."""
    pixels = np.array(crop_to(image, resolution, resolution))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
    return tensor.flip(-1) if mirror else tensor
