"""From an engine folder to what a pipeline is made of."""

import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from encache.contract.library import TENSORRT_BACKENDS
from encache.contract.manifest import (
    REBUILD,
    Manifest,
    read_verified,
    refuse_denoiser_alone,
)
from encache.errors import EngineError
from encache.files import parse_json
from encache.model.family import tokenizer_of
from encache.model.loading import scheduler_from_config
from encache.runtime.codec import Codec, GraphCodec
from encache.runtime.engines import Engines, GraphEngines
from encache.runtime.text import GraphText, Texts

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

SCHEDULER_CONFIG = "scheduler/scheduler_config.json"


class Parts(NamedTuple):
    """What runs a model: its denoiser, its text encoders, its autoencoder."""

    engines: Engines
    texts: Texts
    codec: Codec


def open_parts(folder: Path, manifest: Manifest) -> Parts:
    """Open the graphs of a folder.

    Raises:
        EngineError: a file was altered, or the backend is unknown.
    """
    refuse_denoiser_alone(folder, manifest)
    graphs, device = open_graphs(folder, manifest)
    backend = manifest.identity.backend
    engines = GraphEngines(manifest, graphs, device, capturable=backend in TENSORRT_BACKENDS)
    names = [name for name in graphs if name.startswith("text_encoder")]
    tokenizers = [load_tokenizer(folder, manifest, tokenizer_of(name)) for name in names]
    texts = [GraphText(graphs[name], engines.dtype, engines.device) for name in names]
    codec = GraphCodec(graphs["vae_decoder"], engines.dtype)
    return Parts(engines, Texts(tokenizers, texts), codec)


def open_graphs(folder: Path, manifest: Manifest) -> tuple[dict[str, Any], str]:
    """Open the graphs that a manifest lists.

    Returns:
        The graphs by name, and the device that they run on.

    Raises:
        EngineError: a file was altered, or the backend is unknown.
    """
    backend = manifest.identity.backend
    if backend == "onnxruntime":
        from encache.runtime.ort import open_onnxruntime

        graphs, device = open_onnxruntime(folder, manifest)
        return dict(graphs), device
    if backend == "openvino":
        from encache.runtime.openvino import open_openvino

        return dict(open_openvino(folder, manifest)), "cpu"
    if backend in TENSORRT_BACKENDS:
        from encache.runtime.trt import open_tensorrt

        return dict(open_tensorrt(folder, manifest)), "cuda"
    raise EngineError(f"{folder} was built for the unknown backend {backend!r}. {REBUILD}")


def load_tokenizer(folder: Path, manifest: Manifest, part: str = "tokenizer") -> "CLIPTokenizer":
    """A tokenizer of a folder, from its checked files alone."""
    from transformers import CLIPTokenizer

    # transformers reads whatever lies in a folder, so it gets one with nothing else in it.
    with tempfile.TemporaryDirectory() as checked:
        for name in manifest.files:
            if PurePosixPath(name).parts[0] == part:
                file = Path(checked, PurePosixPath(name).name)
                file.write_bytes(read_verified(folder, manifest, name))
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
