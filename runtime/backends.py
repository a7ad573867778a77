"""From an engine folder to what the sampler needs."""

import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from encache.errors import EngineError
from encache.export.library import TENSORRT_BACKENDS
from encache.export.manifest import REBUILD, Manifest, read_verified
from encache.files import parse_json
from encache.model.loading import scheduler_from_config
from encache.runtime.engines import Engines

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

SCHEDULER_CONFIG = "scheduler/scheduler_config.json"


def load_engines(folder: Path, manifest: Manifest) -> Engines:
    """Open the engine pair, text encoder and image decoder of a folder.

    Raises:
        EngineError: a file was altered, or the backend is unknown.
    """
    backend = manifest.identity.backend
    if backend == "onnxruntime":
        from encache.runtime.ort import open_onnxruntime

        return open_onnxruntime(folder, manifest)
    if backend in TENSORRT_BACKENDS:
        from encache.runtime.trt import open_tensorrt

        return open_tensorrt(folder, manifest)
    raise EngineError(f"{folder} was built for the unknown backend {backend!r}. {REBUILD}")


def load_tokenizer(folder: Path, manifest: Manifest) -> "CLIPTokenizer":
    """The tokenizer of a folder, from its checked files alone."""
    from transformers import CLIPTokenizer

    # transformers reads whatever lies in a folder, so it gets one with nothing else in it.
    with tempfile.TemporaryDirectory() as checked:
        for name in manifest.files:
            part, file = PurePosixPath(name).parts[0], PurePosixPath(name).name
            if part == "tokenizer":
                Path(checked, file).write_bytes(read_verified(folder, manifest, name))
        return CLIPTokenizer.from_pretrained(checked, local_files_only=True)


def load_scheduler(folder: Path, manifest: Manifest) -> Any:
    """The scheduler of an engine folder, after checking its config.

    Raises:
        EngineError: it was altered, or describes no scheduler.
    """
    config = read_verified(folder, manifest, SCHEDULER_CONFIG)
    try:
        return scheduler_from_config(parse_json(config))
    except ValueError as error:
        raise EngineError(f"{SCHEDULER_CONFIG} names no diffusers scheduler ({error}).") from error
