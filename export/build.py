"""Build an engine folder: complete and renamed into place, or not there at all."""

import ctypes
import gc
import glob
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from encache.contract.dtypes import DTYPES, torch_dtype
from encache.contract.library import BACKENDS, TENSORRT_BACKENDS
from encache.contract.manifest import (
    ENGINE,
    MANIFEST,
    ONNX,
    ONNX_WEIGHTS,
    Identity,
    Manifest,
    identify,
    read_manifest,
    record_files,
)
from encache.contract.target import Target
from encache.errors import EncacheError, EngineError
from encache.files import naming
from encache.model.checkpoint import Checkpoint
from encache.model.family import empty_is_zero, family_of
from encache.model.loading import load_pipeline
from encache.model.spec import CUTS, DEFAULT_CUT, Cut, GraphSpec, ImageSpec

if TYPE_CHECKING:
    from encache.export.trt import Shapes

#: Largest accepted ||graph - eager|| / ||eager||, by dtype. fp32 graphs differ by reordered sums,
#: fp16 graphs by their weights' and activations' rounding.
PARITY_TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2}

Report = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to build; equal requests end in the same folder.

    Attributes:
        checkpoint: the model.
        cut: where its UNet is cut.
        dtype: "fp32" or "fp16".
        backend: what will run the engines.
        target: what TensorRT engines are compiled for; None for ONNX Runtime.
    """

    checkpoint: Checkpoint
    cut: Cut = DEFAULT_CUT
    dtype: str = "fp32"
    backend: str = "onnxruntime"
    target: Target | None = None

    def __post_init__(self) -> None:
        for value, known in ((self.cut, CUTS), (self.dtype, DTYPES), (self.backend, BACKENDS)):
            if value not in known:
                raise EncacheError(f"There is no {value!r}. Choose one of {', '.join(known)}.")
        if (self.backend in TENSORRT_BACKENDS) != (self.target is not None):
            raise EncacheError("TensorRT engines, and no others, need a target.")

    @cached_property
    def identity(self) -> Identity:
        """Hashes the checkpoint, which takes about 0.7 s per GB."""
        return identify(self.checkpoint, self.cut, self.dtype, self.backend, self.target)

    @property
    def folder_name(self) -> str:
        """Name of the engine folder."""
        return f"{self.checkpoint.name}-{self.identity.key}"


def find_engines(request: Request, engine_dir: Path) -> Path | None:
    """The finished engine folder of this request, or None.

    Raises:
        EngineError: it is finished, but a file is missing or of another size, or it holds engines
            of something else than its name says.
        OSError: something there may not be read.
    """
    folder = engine_dir / request.folder_name
    if not (folder / MANIFEST).exists():
        return None
    found = read_manifest(folder)
    if found.identity != request.identity:
        raise EngineError(
            f"{folder} was renamed: it holds the engines {found.name}-{found.identity.key} "
            f"({found.identity.backend}, cut {found.identity.cut}, {found.identity.dtype}). Give "
            "it that name again, or move it away, and repeat the command."
        )
    return folder


def find_covering_engines(request: Request, engine_dir: Path) -> Path | None:
    """A finished folder that serves a request with a target: its own, or a wider one, or None."""
    if finished := find_engines(request, engine_dir):
        return finished
    others = sorted(engine_dir.glob(f"{glob.escape(request.checkpoint.name)}-*/{MANIFEST}"))
    return next((one.parent for one in others if _covers(one.parent, request)), None)


def _covers(folder: Path, request: Request) -> bool:
    try:
        identity = read_manifest(folder).identity
    except (EngineError, OSError):  # whoever asks for that folder itself is told
        return False
    if not (request.target and identity.target):
        return False
    same = replace(identity, target=request.target) == request.identity
    return same and identity.target.covers(request.target)


def build_engines(request: Request, engine_dir: Path, report: Report = lambda line: None) -> Path:
    """Return the request's engine folder, building it unless it is finished already.

    A second builder of the same key waits for the first and takes its result.

    Args:
        request: what to build.
        engine_dir: parent of engine folders; created when missing.
        report: receives one line per part as it begins, and one when it was checked.

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
        # Of builders that were killed.
        for leftover in engine_dir.glob(f"{glob.escape(unfinished)}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=engine_dir, prefix=unfinished) as temporary:
            parts = Path(temporary, "engines")
            parts.mkdir()
            with naming(engine_dir):
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
    start = time.perf_counter()
    exported = _export(request, folder, report)
    _release_memory()
    scratch_bytes = _compile(request, exported.shapes, folder, report) if request.target else {}
    manifest = Manifest(
        name=request.checkpoint.name,
        identity=request.identity,
        graphs=exported.graphs,
        spec=exported.spec,
        files=record_files(folder),
        parity=exported.parity,
        parity_tolerance=PARITY_TOLERANCE[request.dtype],
        build_seconds=round(time.perf_counter() - start, 1),
        scratch_bytes=scratch_bytes,
        guidance_scale=request.checkpoint.guidance_scale,
        preset=request.checkpoint.preset,
        empty_is_zero=exported.empty_is_zero,
    )
    manifest.write(folder)


def _release_memory() -> None:
    """Give back what the export held, which compilers want."""
    gc.collect()  # a pipeline holds itself in cycles
    with suppress(OSError, AttributeError):  # glibc alone keeps, and has a way to give back
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class _Exported:
    """What is known of the ONNX graphs once the checkpoint has left memory.

    Attributes:
        graphs, spec: as in the manifest.
        parity: relative error of each graph.
        shapes: of each graph's inputs, for engines with a target.
        empty_is_zero: as in the manifest.
    """

    graphs: tuple[GraphSpec, ...]
    spec: ImageSpec
    parity: dict[str, float]
    shapes: "dict[str, dict[str, Shapes]]"
    empty_is_zero: bool


def _export(request: Request, folder: Path, report: Report) -> _Exported:
    """Write the ONNX graphs with their companions, and check them against PyTorch."""
    from encache.export.graphs import pipeline_graphs, write_onnx
    from encache.export.parity import measure_parity
    from encache.export.trt import profile

    report(f"loading {request.checkpoint.name}")
    pipeline = load_pipeline(request.checkpoint, torch_dtype(request.dtype))
    spec = ImageSpec.of(pipeline.unet.config, pipeline.vae.config)
    # Smaller pictures shrink to one pixel inside the UNet.
    height, width = (max(side, 16) for side in spec.sample_size)
    length = pipeline.tokenizer.model_max_length
    sizes = {"B": 2, "K": 3, "L": length, "M": 2, "h": height, "w": width}
    graphs = pipeline_graphs(pipeline, request.cut)
    for graph in graphs:
        report(f"exporting {graph.spec.name}")
        (folder / graph.spec.name).mkdir()
        write_onnx(graph, folder / graph.spec.name, sizes)
    _write_companions(pipeline, folder)
    tolerance = PARITY_TOLERANCE[request.dtype]
    parity = {}
    for graph in graphs:
        name = graph.spec.name
        error = measure_parity(graph, folder / name / ONNX, sizes)
        report(f"checked {name}: relative error {error:.1e}")
        if not error <= tolerance:
            raise EngineError(
                f"The {name} graph differs from PyTorch by {error:.1e}, more than "
                f"{tolerance:.0e}. Nothing was written; try --dtype fp32, or report this."
            )
        parity[name] = error
    target = request.target
    return _Exported(
        graphs=tuple(one.spec for one in graphs),
        spec=spec,
        parity=parity,
        shapes=(
            {one.spec.name: profile(one.spec, target, spec, length) for one in graphs}
            if target
            else {}
        ),
        empty_is_zero=empty_is_zero(pipeline),
    )


def _compile(
    request: Request, shapes: "Mapping[str, Mapping[str, Shapes]]", folder: Path, report: Report
) -> dict[str, int]:
    """Put TensorRT engines in the place of the ONNX graphs; the bytes of scratch each needs."""
    import torch

    from encache.export.trt import Compiler

    target = request.target
    assert target
    ahead, timing_cache = target.compute_capabilities, None
    if request.backend == "tensorrt":  # compiles here and now, by trying kernels on the GPU
        # Beside the engine folders: this one is still inside a temporary folder.
        timing_cache = folder.parents[1] / f"{target.library} {torch.cuda.get_device_name()}.timing"
        ahead = ()
    scratch_bytes = {}
    for graph, sizes in shapes.items():
        report(f"compiling {graph}")
        path = folder / graph / ONNX
        compiled = Compiler(request.backend, path).compile(sizes, ahead, timing_cache)
        path.with_name(ENGINE).write_bytes(compiled.engine)
        path.unlink()
        path.with_name(ONNX_WEIGHTS).unlink()
        scratch_bytes[graph] = compiled.scratch_bytes
        del compiled  # as large as the weights; the next graph wants the memory
        report(f"compiled {graph}: {scratch_bytes[graph] / 2**20:.0f} MiB of scratch memory")
    return scratch_bytes


def _write_companions(pipeline: Any, folder: Path) -> None:
    """Tokenizers, scheduler and index, as in a diffusers folder."""
    tokenizers = {name: getattr(pipeline, name) for name in family_of(pipeline).tokenizers}
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(folder / name)
    # As the checkpoint wrote it: what it left out is each solver's own default, here as there.
    left_out = {"_use_default_values", *pipeline.scheduler.config.get("_use_default_values", ())}
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    config = folder / "scheduler" / pipeline.scheduler.config_name
    kept = {
        name: value
        for name, value in json.loads(config.read_bytes()).items()
        if name not in left_out
    }
    config.write_text(json.dumps(kept, indent=2) + "\n")
    index = {
        "_class_name": "EncachePipeline",
        "scheduler": ["diffusers", type(pipeline.scheduler).__name__],
        **{name: ["transformers", type(one).__name__] for name, one in tokenizers.items()},
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
