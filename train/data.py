"""Captioned pictures for fine-tuning: folders, webdataset shards, the emoji."""

import io
import json
import posixpath
import re
import tarfile
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from encache.errors import EncacheError
from encache.files import decode_text, digest_of_lines
from encache.model.pictures import (
    SUFFIXES,
    UnreadablePictureError,
    crop_to,
    find_metadata,
    is_litter,
    is_text,
    list_files,
    list_pictures,
    read_captions,
    read_picture,
)
from encache.train import emoji
from encache.train.loop import generator_of, spread

#: Unreadable pictures in a row after which a run stops.
MAX_TRIES = 20
#: Names of shards; a compressed one is listed too, so that it is refused rather than overlooked.
_SHARD = re.compile(r"[^.].*\.(tar(\.(gz|bz2|xz|zst))?|tgz|tbz2?|txz)", re.IGNORECASE)
#: Zeros with which a tar's end may be filled up, in bytes.
_LONGEST_PADDING = 2**20


class Pictures(Protocol):
    """A set of captioned pictures with random access.

    Attributes:
        names: one per picture, for messages.
        num_without_caption: pictures that were left out.
        num_without_picture: lines of the metadata that were left out: they name no picture.
        fingerprint: sha256 over names and captions, not over the pictures.
    """

    names: list[str]
    num_without_caption: int
    num_without_picture: int
    fingerprint: str

    def read(self, index: int, draw: torch.Generator) -> tuple[Image.Image, str]:
        """Picture `index` in RGB and a caption; what varies is drawn.

        Raises:
            OSError, UnreadablePictureError: the picture cannot be read.
        """


@dataclass(frozen=True, slots=True)
class Place:
    """Where bytes lie: a whole file, or `size` bytes of a shard from `offset` on."""

    path: Path
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """Read them, or raise OSError."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


#: A picture's name, its place and its caption.
Sample = tuple[str, Place, str]


class StoredPictures:
    """Pictures in files or shards, in any order, which an exact resume needs; see `Pictures`."""

    def __init__(
        self, samples: Sequence[Sample], num_without_caption: int, num_without_picture: int = 0
    ) -> None:
        self.names = [name for name, _, _ in samples]
        self.captions = [caption for _, _, caption in samples]
        self.num_without_caption = num_without_caption
        self.num_without_picture = num_without_picture
        self.fingerprint = digest_of_lines(f"{name} {caption}" for name, _, caption in samples)
        self._places = [place for _, place, _ in samples]

    def read(self, index: int, draw: torch.Generator) -> tuple[Image.Image, str]:
        """See `Pictures`."""
        return read_picture(io.BytesIO(self._places[index].read())), self.captions[index]


def open_image_folder(metadata: Path) -> StoredPictures:
    """The pictures that metadata.jsonl or metadata.csv lists, once per line, in its order."""
    folder = metadata.parent
    pairs, num_without_picture = read_captions(metadata)
    samples = [(name, Place(folder / name), caption) for name, caption in pairs if caption]
    present = {*list_pictures(folder), *(name for name, _ in pairs)}
    keys = {_key(name) for name in present}
    alone = present.difference(name for name, _, _ in samples)
    num_without_caption = sum(not _goes_along(_key(name), keys) for name in alone)
    return StoredPictures(samples, num_without_caption, num_without_picture)


def open_captioned_folder(folder: Path) -> StoredPictures:
    """The pictures beside which a caption lies; see `pair`."""
    return StoredPictures(*pair({name: Place(folder / name) for name in list_files(folder)}))


def open_shards(shards: Iterable[Path]) -> StoredPictures:
    """webdataset shards (.tar), as img2dataset writes them; see `pair`.

    The members' places are listed once, so that they can be read in any order: only plain tar
    files can be read so, not compressed ones.
    """
    samples: list[Sample] = []
    num_without_caption = 0
    for shard in sorted(shards):
        found, without = pair(_list_members(shard))
        samples += found
        num_without_caption += without
    return StoredPictures(samples, num_without_caption)


def pair(files: Mapping[str, Place]) -> tuple[list[Sample], int]:
    """Put every picture KEY.jpg together with its caption in KEY.txt, KEY.caption or KEY.json.

    The JSON is {"caption": ...}. What else a key has, KEY.png beside KEY.jpg or KEY.depth.png, goes
    along with its picture and is neither used nor counted.

    Returns:
        The samples in the order of the files, and the number of pictures without a caption.

    Raises:
        EncacheError: a caption is no text.
    """
    keys: dict[str, dict[str, str]] = {}
    for name in files:
        keys.setdefault(_key(name), {})[name.removeprefix(_key(name)).lower()] = name
    pictures = {key: names for key, names in keys.items() if not names.keys().isdisjoint(SUFFIXES)}
    samples, num_without_caption = [], 0
    for key, names in pictures.items():
        if caption := _find_caption(files, names):
            picture = next(names[suffix] for suffix in SUFFIXES if suffix in names)
            samples.append((picture, files[picture], caption))
        elif not _goes_along(key, pictures):
            num_without_caption += 1
    return samples, num_without_caption


def _key(name: str) -> str:
    return posixpath.splitext(name)[0]


def _goes_along(key: str, keys: Container[str]) -> bool:
    """Whether it belongs to another picture, as a.depth to a; a number (v1.0) tells keys apart."""
    splits = [match.start() for match in re.finditer(r"\.(?=[^\d/][^/]*$)", key)]
    return any(key[:split] in keys for split in splits)


def _find_caption(files: Mapping[str, Place], names: Mapping[str, str]) -> str:
    """The first that is not empty among the files of a key, or ""."""
    for suffix in (".txt", ".caption", ".json"):
        if suffix in names:
            text = decode_text(files[names[suffix]].read(), names[suffix])
            caption = _caption_of(text) if suffix == ".json" else text
            if is_text(caption):
                return caption.strip()
    return ""


def _caption_of(facts: str) -> Any:
    try:
        return json.loads(facts)["caption"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _list_members(shard: Path) -> dict[str, Place]:
    """Every file of a tar with the place of its bytes; a link has those that it leads to."""
    nothing = Place(shard, size=0)  # no picture: reading it counts it as unreadable
    places: dict[str, Place] = {}
    links: dict[str, str] = {}
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                name = posixpath.normpath(member.name)
                if member.issym():
                    target = posixpath.join(posixpath.dirname(name), member.linkname)
                    links[name] = posixpath.normpath(target)
                elif member.islnk():  # to a member before it; a name packed twice links to itself
                    places[name] = places.get(posixpath.normpath(member.linkname), nothing)
                elif member.isfile():
                    whole = Place(shard, member.offset_data, member.size)
                    places[name] = nothing if member.issparse() else whole
            _check_end(file, archive)
    except tarfile.TarError as error:
        raise EncacheError(
            f"{shard} is not a complete, uncompressed tar file ({error}). Unpack it, fetch it "
            "again, or move it out of the folder."
        ) from error
    places |= {name: places.get(target, nothing) for name, target in links.items()}
    return {f"{shard.name}:{name}": place for name, place in places.items() if not is_litter(name)}


def _check_end(file: BinaryIO, archive: tarfile.TarFile) -> None:
    """tarfile ends without a word at a damaged header, and after the first of joined archives."""
    file.seek(archive.offset)
    if file.read(_LONGEST_PADDING).strip(b"\0"):
        raise tarfile.ReadError("there is more after its end")


class EmojiPictures:
    """The default model's own training data, every picture in a random pose."""

    def __init__(self, folder: Path) -> None:
        self.emoji = emoji.read_emoji(folder, emoji.CONCEPT_CATEGORIES)
        self.names = [f"{one.image.parent.name}/{one.image.name}" for one in self.emoji]
        self.num_without_caption = self.num_without_picture = 0
        self.fingerprint = digest_of_lines(f"{one.image.name} {one.captions}" for one in self.emoji)

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
    metadata = find_metadata(folder)
    shards = [path for path in folder.glob("*") if _SHARD.fullmatch(path.name)]
    if metadata:
        pictures: Pictures = open_image_folder(metadata)
    elif shards:
        pictures = open_shards(shards)
    elif (folder / emoji.TWEMOJI.word).is_dir():
        pictures = EmojiPictures(folder)
    else:
        pictures = open_captioned_folder(folder)
        if not pictures.names and not pictures.num_without_caption:
            raise EncacheError(
                f"{folder} is no training set: it holds neither metadata.jsonl with lines like "
                '{"file_name": "0001.png", "text": "a red apple"} or metadata.csv with these '
                "columns, nor captions beside the pictures (0001.txt beside 0001.png), nor .tar "
                "shards of img2dataset, nor the emoji packages of encache-train emoji."
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
        step, rows = spread(
            batch, self.batch_size, self.accumulation, self.process, self.num_processes
        )
        return [self._example(step, row) for row in rows]

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
