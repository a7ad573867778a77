"""Folders by their path or by their name on the Hugging Face hub."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from encache.errors import CheckpointError
from encache.files import parse_json
from encache.model.weights import reason_of, refuse_without_safetensors

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

#: Of a part, in its folder.
CONFIG = "config.json"


def find_folder(named: str | Path, download: Callable[[str], str]) -> Path:
    """The path itself, or the local copy of what a hub id names.

    Args:
        named: a path or a hub id such as "runwayml/stable-diffusion-v1-5".
        download: fetches what a hub id names, as far as it is not there, and returns its folder.

    Raises:
        CheckpointError: the hub has no such thing, or cannot be reached.
    """
    path, hub_id = Path(named).expanduser(), str(named)
    if path.exists() or not _HUB_ID.fullmatch(hub_id):
        return path
    try:
        return Path(download(hub_id))
    except Exception as error:  # several layers of clients, each with exceptions of its own
        raise CheckpointError(
            f"{hub_id!r} is no local path and could not be fetched from the hub: {reason_of(error)}"
        ) from error


def find_part(named: str | Path, classes: Sequence[str], kind: str) -> Path:
    """The folder of a part of a pipeline that stands alone, looked at without loading it.

    Args:
        named: a folder, or a hub id.
        classes: of diffusers, any of which it may be.
        kind: what it is, for a person.

    Raises:
        CheckpointError: there is none, or only pickled weights.
    """
    folder = find_folder(named, _download_part)
    try:
        name = parse_json((folder / CONFIG).read_bytes())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is no {kind}: its {CONFIG} cannot be read ({error!r})."
        ) from error
    if name not in classes:
        raise CheckpointError(f"{folder} is a {name}; encache takes {' and '.join(classes)}.")
    refuse_without_safetensors(folder)
    return folder


def _download_part(hub_id: str) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(
        hub_id, allow_patterns=[CONFIG, "diffusion_pytorch_model*.safetensors"]
    )


def hub_id_of(folder: Path) -> str | None:
    """What names a folder of the hub's cache on every machine; None for any other folder."""
    model = folder.resolve().parent.parent.name  # models--owner--name/snapshots/hash
    if folder.resolve().parent.name != "snapshots" or not model.startswith("models--"):
        return None
    return model.removeprefix("models--").replace("--", "/", 1)


def short_name(folder: Path) -> str:
    """Its last part, by which a user knows it."""
    return (hub_id_of(folder) or folder.resolve().name).rpartition("/")[-1]
