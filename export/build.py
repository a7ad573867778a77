"""Build an engine folder: complete and renamed into place, or not there at all."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from encache.errors import EncacheError, EngineError
from encache.export.manifest import (
    MANIFEST,
    Identity,
    Manifest,
    identify,
    read_manifest,
    record_files,
)
from encache.model.checkpoint import Checkpoint, load_pipeline
from encache.model.features import CUTS, DEFAULT_CUT, Cut, ImageSpec, feature_table

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

#: Largest accepted ||graph - eager|| / ||eager||, by dtype. fp32 graphs differ by reordered sums,
#: fp16 graphs by their weights' and activations' rounding.
PARITY_TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2}
DTYPES = tuple(PARITY_TOLERANCE)
BACKENDS = ("onnxruntime",)

Report = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to build; equal requests end in the same folder."""

    checkpoint: Checkpoint
    cut: Cut = DEFAULT_CUT
    dtype: str = "fp32"
    backend: str = "onnxruntime"

    def __post_init__(self) -> None:
        for value, known in ((self.cut, CUTS), (self.dtype, DTYPES), (self.backend, BACKENDS)):
            if value not in known:
                raise EncacheError(f"There is no {value!r}. Choose one of {', '.join(known)}.")

    @cached_property
    def identity(self) -> Identity:
        """Hashes the checkpoint, which takes about 0.7 s per GB."""
        return identify(self.checkpoint, self.cut, self.dtype, self.backend)

    @property
    def folder_name(self) -> str:
        """Name of the engine folder."""
        return f"{self.checkpoint.name}-{self.identity.key}"


def find_engines(request: Request, engine_dir: Path) -> Path | None:
    """The finished engine folder of this request, or None.

    Raises:
        EngineError: it is finished, but a file is missing, of another size, or foreign.
    """
    folder = engine_dir / request.folder_name
    if not (folder / MANIFEST).is_file():
        return None
    read_manifest(folder)
    return folder


def build_engines(request: Request, engine_dir: Path, report: Report = lambda line: None) -> Path:
    """Return the request's engine folder, building it unless it is finished already.

    A second builder of the same key waits for the first and takes its result.

    Args:
        request: what to build.
        engine_dir: parent of engine folders; created when missing.
        report: receives one line per finished part.

    Raises:
        EngineError: a graph does not reproduce PyTorch.
        CheckpointError: the checkpoint cannot be used.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    if finished := find_engines(request, engine_dir):
        return finished
    engine_dir.mkdir(parents=True, exist_ok=True)
    folder = engine_dir / request.folder_name
    unfinished = f".{folder.name}-"
    with _take(FileLock(engine_dir / f".{folder.name}.lock"), report):
        if finished := find_engines(request, engine_dir):
            return finished
        for leftover in engine_dir.glob(f"{unfinished}*"):  # of a builder that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=engine_dir, prefix=unfinished) as temporary:
            parts = Path(temporary, "engines")
            parts.mkdir()
            _write_engines(request, parts, report)
            shutil.rmtree(folder, ignore_errors=True)  # a folder without manifest is no engine
            parts.rename(folder)
    return folder


def _take(lock: FileLock, report: Report) -> AbstractContextManager[object]:
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        report("waiting for another process that builds the same engines")
        return lock.acquire()


def _write_engines(request: Request, folder: Path, report: Report) -> None:
    import torch

    from encache.export.graphs import pipeline_graphs, write_onnx
    from encache.export.parity import measure_parity

    start = time.perf_counter()
    dtype = torch.float16 if request.dtype == "fp16" else torch.float32
    pipeline = load_pipeline(request.checkpoint, dtype)
    size = pipeline.unet.config.sample_size
    traced = max(size, 16)  # smaller pictures shrink to one pixel inside the UNet
    for graph in pipeline_graphs(pipeline, request.cut):
        (folder / graph.name).mkdir()
        write_onnx(graph, folder / graph.name, {"B": 2, "K": 3, "M": 2, "h": traced, "w": traced})
        report(f"exported {graph.name}")
    # The reference computes in fp32, also with weights that were rounded to fp16.
    pipeline.to(torch.float32)
    tolerance = PARITY_TOLERANCE[request.dtype]
    parity = {}
    for graph in pipeline_graphs(pipeline, request.cut):
        error = measure_parity(graph, folder / graph.name / "model.onnx", size)
        report(f"checked {graph.name}: relative error {error:.1e}")
        if not error <= tolerance:
            raise EngineError(
                f"The {graph.name} graph differs from PyTorch by {error:.1e}, more than "
                f"{tolerance:.0e}. Nothing was written; try --dtype fp32, or report this."
            )
        parity[graph.name] = error
    _write_companions(pipeline, folder)
    manifest = Manifest(
        name=request.checkpoint.name,
        identity=request.identity,
        features=feature_table(pipeline.unet.config, request.cut),
        spec=ImageSpec.of(pipeline.unet.config, pipeline.vae.config),
        files=record_files(folder),
        parity=parity,
        parity_tolerance=tolerance,
        build_seconds=round(time.perf_counter() - start, 1),
    )
    manifest.write(folder)


def _write_companions(pipeline: "StableDiffusionPipeline", folder: Path) -> None:
    """Tokenizer, scheduler and index, as in a diffusers folder."""
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "EncachePipeline",
        "scheduler": ["diffusers", type(pipeline.scheduler).__name__],
        "tokenizer": ["transformers", type(pipeline.tokenizer).__name__],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
