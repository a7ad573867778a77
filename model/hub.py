"""Folders by their path or by their name on the Hugging Face hub."""

import re
from collections.abc import Callable
from pathlib import Path

from encache.errors import CheckpointError
from encache.model.weights import reason_of

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


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


def hub_id_of(folder: Path) -> str | None:
    """What names a folder of the hub's cache on every machine; None for any other folder."""
    model = folder.resolve().parent.parent.name  # models--owner--name/snapshots/hash
    if folder.resolve().parent.name != "snapshots" or not model.startswith("models--"):
        return None
    return model.removeprefix("models--").replace("--", "/", 1)


def short_name(folder: Path) -> str:
    """Its last part, by which a user knows it."""
    return (hub_id_of(folder) or folder.resolve().name).rpartition("/")[-1]
