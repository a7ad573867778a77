"""What a pipeline of its own loop is given beside texts, or in their place."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from encache.command import FiniteFloat
from encache.errors import EncacheError
from encache.model.checkpoint import Checkpoint, for_pipeline
from encache.model.family import HOSTED, Family
from encache.model.spec import check_size
from encache.options import option

if TYPE_CHECKING:
    from PIL.Image import Image

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
#: What draws without, and then does as it likes.
_OPTIONAL = ("strength", "num_frames")


@dataclass(frozen=True)
class InputOptions:
    """What a picture is made of, apart from its text."""

    image: Path | None = option(type=_FILE, help="A picture to change, or to enlarge.")
    mask_image: Path | None = option(
        type=_FILE, help="As large as --image: what is white is drawn anew."
    )
    strength: float | None = option(
        type=FiniteFloat(0, 1), help="How much of --image is lost. Default: the pipeline's."
    )
    controlnet: tuple[str, ...] = option(
        default=(), multiple=True, help="Folder or hub id of a ControlNet; repeatable."
    )
    control_image: tuple[Path, ...] = option(
        default=(), type=_FILE, multiple=True, help="What it is told; one for each."
    )
    class_label: tuple[int, ...] = option(
        default=(),
        type=click.IntRange(0),
        multiple=True,
        help="What a DiT draws, by its number; repeatable.",
    )
    num_frames: int | None = option(
        type=click.IntRange(2), help="Of a clip. Default: the pipeline's."
    )

    @property
    def given(self) -> dict[str, Any]:
        """What was said, by name."""
        return {name: value for name, value in vars(self).items() if value not in (None, ())}

    def settle(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint as the pipeline that takes what was given; itself, if that is nothing.

        Raises:
            EncacheError: it is for no such pipeline, or something is missing.
        """
        if not (self.given or checkpoint.family.hosted):
            return checkpoint
        if not checkpoint.family.hosted:
            checkpoint = for_pipeline(checkpoint, self._family(checkpoint.family))
        family = checkpoint.family
        known = [*family.inputs, *(["controlnet"] if family.controlled else [])]
        for name in self.given.keys() - known:
            raise EncacheError(f"{_typed(name)} means nothing for {family.title}: leave it out.")
        for name in family.inputs:
            if name not in self.given and name not in _OPTIONAL:
                raise EncacheError(f"{family.title} needs {_typed(name)}.")
        if family.controlled and not (self.controlnet or checkpoint.index.get("controlnet")):
            raise EncacheError(f"{family.title} needs --controlnet.")
        if self.controlnet and len(self.control_image) != len(self.controlnet):
            raise EncacheError(
                f"{len(self.controlnet)} ControlNets need as many --control-image, not "
                f"{len(self.control_image)}."
            )
        return checkpoint

    def _family(self, family: Family) -> Family:
        """The pipeline of a text-to-image model that takes most of what was given."""
        asked = self.given.keys() - {"controlnet"}
        controlled = bool(self.given.keys() - asked) or "control_image" in asked
        fitting = [
            one
            for one in HOSTED.values()
            if one.base == family.pipeline
            and asked <= one.inputs.keys()
            and one.controlled == controlled
        ]
        if not fitting:
            named = " and ".join(sorted(map(_typed, self.given)))
            raise EncacheError(f"{family.title} has no pipeline that takes {named}.")
        return min(fitting, key=lambda one: len(one.inputs))


def _typed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Inputs:
    """The same, read.

    Attributes:
        arguments: of the pipeline's call.
        digests: sha256 of each file, by the option that names it.
        size: height and width of the pictures that were given, if any were.
    """

    arguments: Mapping[str, Any]
    digests: Mapping[str, list[str]]
    size: tuple[int, int] | None


def read_inputs(options: InputOptions, family: Family) -> Inputs:
    """Read the files.

    Raises:
        EncacheError: one is no picture, or of another size than the others.
    """
    digests: dict[str, list[str]] = {}
    pictures = dict(_read_pictures(options, digests))
    sizes = {(name, one.size) for name, found in pictures.items() for one in found}
    if len({size for _, size in sizes}) > 1:
        named = ", ".join(f"{name} {size[0]}x{size[1]}" for name, size in sorted(sizes))
        raise EncacheError(f"The pictures are of several sizes: {named}. Give them one size.")
    size = next(((height, width) for _, (width, height) in sizes), None)
    if size and family.codec:
        check_size(*size)
    arguments: dict[str, Any] = {}
    for name, argument in family.inputs.items():
        if name in pictures:
            found = pictures[name]
            arguments[argument] = found if len(found) > 1 else found[0]
        elif name in options.given and name != "class_label":
            arguments[argument] = options.given[name]
    return Inputs(arguments, digests, size)


def _read_pictures(
    options: InputOptions, digests: dict[str, list[str]]
) -> "Iterator[tuple[str, list[Image]]]":
    """The pictures of each option, and on the way their files' hashes."""
    for name in ("image", "mask_image", "control_image"):
        given = options.given.get(name, ())
        paths = given if isinstance(given, tuple) else (given,)
        if paths:
            digests[name] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
            mode = "L" if name == "mask_image" else "RGB"
            yield name, [_read_picture(path, mode) for path in paths]


def _read_picture(path: Path, mode: str) -> "Image":
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise EncacheError(f"{path} is no picture that can be read ({error}).") from error
