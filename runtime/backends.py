"""From an engine folder to what the sampler needs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encache.errors import EngineError
from encache.export.manifest import REBUILD, Manifest, read_verified
from encache.runtime.engines import Engines

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def load_engines(folder: Path, manifest: Manifest) -> Engines:
    """Open the engine pair, text encoder and image decoder of a folder.

    Raises:
        EngineError: a file was altered, or the backend is unknown.
    """
    backend = manifest.identity.backend
    if backend == "onnxruntime":
        from encache.runtime.ort import OrtEngines

        return OrtEngines(folder, manifest)
    raise EngineError(f"{folder} was built for the unknown backend {backend!r}. {REBUILD}")


def load_tokenizer(folder: Path, manifest: Manifest) -> "CLIPTokenizer":
    """The tokenizer of a folder, after checking its files."""
    from transformers import CLIPTokenizer

    _verify(folder, manifest, "tokenizer/")
    return CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)


def load_scheduler(folder: Path, manifest: Manifest) -> Any:
    """The scheduler of a folder, after checking its config."""
    import diffusers

    config = json.loads(read_verified(folder, manifest, "scheduler/scheduler_config.json"))
    scheduler: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin):
        return scheduler.from_config(config)  # type: ignore[attr-defined]
    raise EngineError(f"{folder} names no diffusers scheduler. {REBUILD}")


def _verify(folder: Path, manifest: Manifest, prefix: str) -> None:
    for name in manifest.files:
        if name.startswith(prefix):
            read_verified(folder, manifest, name)
