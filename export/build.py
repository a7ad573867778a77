"""Build an engine folder: complete and renamed into place, or not there at all."""

import ctypes
import gc
import glob
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from encache.contract.calibration import Calibration, EightBits, has_fp8, refuse_without_fp8
from encache.contract.dtypes import EIGHT_BITS, refuse_dtype, torch_dtype
from encache.contract.library import BACKENDS, TENSORRT_BACKENDS
from encache.contract.manifest import (
    ENGINE,
    MANIFEST,
    ONNX,
    ONNX_WEIGHTS,
    PLANS,
    Identity,
    Manifest,
    identify,
    read_manifest,
    record_files,
)
from encache.contract.target import Target
from encache.errors import EncacheError, EngineError
from encache.export.companions import write_companions
from encache.files import naming
from encache.model.checkpoint import Checkpoint
from encache.model.family import empty_is_zero
from encache.model.spec import CUTS, DEFAULT_CUT, Cut, GraphSpec, ImageSpec
from encache.model.text import text_length

if TYPE_CHECKING:
    from encache.export.calibrate import Observed
    from encache.export.graphs import Graph
    from encache.export.quantize import Quantized
    from encache.export.trt import Shapes

#: Largest accepted ||graph - eager|| / ||eager||, by dtype. fp32 graphs differ by reordered sums,
#: fp16 graphs by their weights' and activations' rounding; those of 8 bits by what the cache may
#: cost, and on the model's own trajectories.
PARITY_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-4, "fp16": 1e-2, "int8": 0.1, "fp8": 0.1}
#: Of the image decoder in 8 bits, whose error no later call repairs; else it stays in fp16.
_PICTURE_ERROR = 0.02

Report = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to build; equal requests end in the same folder.

    Attributes:
        checkpoint: the model.
        cut: where its UNet is cut.
        dtype: one of `ENGINE_DTYPES` that the backend takes.
        backend: what will run the engines.
        target: what TensorRT engines are compiled for; None for ONNX graphs.
        calibration: of engines of 8 bits; None for others.
        frames: of a clip, where the denoiser takes clips; else 0.
    """

    checkpoint: Checkpoint
    cut: Cut = DEFAULT_CUT
    dtype: str = "fp32"
    backend: str = "onnxruntime"
    target: Target | None = None
    calibration: Calibration | None = None
    frames: int = 0

    def __post_init__(self) -> None:
        for value, known in ((self.cut, CUTS), (self.backend, BACKENDS)):
            if value not in known and not (known is CUTS and self.cut.isdecimal()):
                raise EncacheError(f"There is no {value!r}. Choose one of {', '.join(known)}.")
        if self.calibration and self.checkpoint.family.hosted:
            raise EncacheError(
                f"Engines of 8 bits are made by drawing with EncachePipeline, which does not draw "
                f"{self.checkpoint.family.title}: choose fp16."
            )
        if bool(self.frames) != self.checkpoint.family.clips:
            raise EncacheError("Engines for clips, and no others, need a number of frames.")
        refuse_dtype(self.backend, self.dtype)
        if (self.backend in TENSORRT_BACKENDS) != (self.target is not None):
            raise EncacheError("TensorRT engines, and no others, need a target.")
        if (self.dtype in EIGHT_BITS) != (self.calibration is not None):
            raise EncacheError("Engines of 8 bits, and no others, need a calibration.")
        if self.target and self.dtype == "fp8":
            refuse_without_fp8(self.target)

    @cached_property
    def identity(self) -> Identity:
        """Hashes the checkpoint, which takes about 0.7 s per GB."""
        return identify(
            self.checkpoint,
            self.cut,
            self.dtype,
            self.backend,
            self.target,
            self.calibration,
            self.frames,
        )

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
    if (engine_dir / MANIFEST).exists():
        raise EngineError(f"{engine_dir} is one engine folder: give --engine-dir its parent.")
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
    compiled = _compile(request, exported, folder, report) if request.target else _NOT_COMPILED
    manifest = Manifest(
        name=request.checkpoint.name,
        identity=request.identity,
        graphs=exported.graphs,
        spec=exported.spec,
        files=record_files(folder),
        parity=exported.parity,
        parity_tolerance=PARITY_TOLERANCE[request.dtype],
        build_seconds=round(time.perf_counter() - start, 1),
        scratch_bytes=compiled.scratch_bytes,
        guidance_scale=request.checkpoint.guidance_scale,
        preset=request.checkpoint.preset,
        empty_is_zero=exported.empty_is_zero,
        eight_bits=compiled.eight_bits,
    )
    own = request.checkpoint.folder
    if own and (own / PLANS).is_file():  # which may be exchanged: no file of the manifest
        shutil.copyfile(own / PLANS, folder / PLANS)
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
        quantized: what is meant to compute in 8 bits in a graph.
    """

    graphs: tuple[GraphSpec, ...]
    spec: ImageSpec
    parity: dict[str, float]
    shapes: "dict[str, dict[str, Shapes]]"
    empty_is_zero: bool
    quantized: "dict[str, Quantized]"


@dataclass(frozen=True)
class _AllCompiled:
    """What the compiler says of each graph, as in the manifest."""

    scratch_bytes: dict[str, int]
    eight_bits: dict[str, EightBits]


_NOT_COMPILED = _AllCompiled({}, {})


def _export(request: Request, folder: Path, report: Report) -> _Exported:
    """Write the ONNX graphs with their companions, and check them against PyTorch."""
    from encache.export.graphs import open_graphs, write_onnx
    from encache.export.parity import measure_parity
    from encache.export.trt import profile

    observed = _calibrate(request, report)
    report(f"loading {request.checkpoint.name}")
    pipeline, spec, graphs = open_graphs(
        request.checkpoint, request.cut, torch_dtype(request.dtype), request.frames
    )
    # Smaller pictures shrink to one pixel inside the UNet.
    height, width = (max(side, 16) for side in spec.sample_size)
    length = text_length(pipeline)
    # Two clips of two frames, because the exporter keeps what is 1 in its example.
    batch = 4 if request.checkpoint.family.across_frames else 2
    sizes = {"B": batch, "K": 3, "L": length, "M": 2, "h": height, "w": width}
    for graph in graphs:
        report(f"exporting {graph.spec.name}")
        (folder / graph.spec.name).mkdir()
        write_onnx(graph, folder / graph.spec.name, sizes)
    if not request.checkpoint.family.hosted:  # whose pipeline has its own
        write_companions(pipeline, folder)
    exact = "fp16" if request.calibration else request.dtype
    tolerance = PARITY_TOLERANCE[exact]
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
    quantized = {}
    for name, graph in {one.spec.name: one for one in graphs if one.spec.name in observed}.items():
        done = _quantize(request, graph, observed[name], folder / name / ONNX, report)
        if done:
            quantized[name], parity[name] = done
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
        quantized=quantized,
    )


def _calibrate(request: Request, report: Report) -> "dict[str, Observed]":
    """What the graphs were seen doing that are to compute in 8 bits."""
    if request.calibration is None:
        return {}
    from encache.export.calibrate import calibrate

    report(f"drawing {len(request.calibration.prompts)} pictures to calibrate on")
    observed = calibrate(request.checkpoint, request.cut, request.calibration, request.dtype)
    gc.collect()  # the model that drew them makes room
    return observed


def _quantize(
    request: Request, graph: "Graph", observed: "Observed", path: Path, report: Report
) -> "tuple[Quantized, float] | None":
    """Put a graph of 8 bits in the place of one in fp16, with its error; or leave it."""
    from encache.export.parity import measure_error
    from encache.export.quantize import choose_kept, expected_error, quantize

    assert request.calibration
    assert request.target
    name, tolerance = graph.spec.name, PARITY_TOLERANCE[request.dtype]
    if graph.dtype != torch_dtype(request.dtype):
        report(f"{name} stays in fp32, because it overflows in fp16")
        return None
    kept = choose_kept(observed, request.calibration.kept_share, has_fp8(request.target))
    expected = expected_error(observed, kept)
    if name == "vae_decoder" and expected > _PICTURE_ERROR:
        report(f"{name} stays in fp16: in {request.dtype} its error would be {expected:.1e}")
        return None
    quantized = quantize(path, observed, kept, request.dtype)
    error = measure_error(graph, path, observed.samples)
    report(f"checked {name} in {request.dtype}: relative error {error:.1e}")
    if not error <= tolerance:
        raise EngineError(
            f"In {request.dtype}, {name} differs from PyTorch by {error:.1e} on the model's own "
            f"pictures, more than {tolerance}. Nothing was written; try --dtype fp16."
        )
    return quantized, error


def _compile(request: Request, exported: _Exported, folder: Path, report: Report) -> _AllCompiled:
    """Put TensorRT engines in the place of the ONNX graphs."""
    import torch

    from encache.export.trt import Compiler

    target = request.target
    assert target
    ahead, timing_cache = target.compute_capabilities, None
    if request.backend == "tensorrt":  # compiles here and now, by trying kernels on the GPU
        # Beside the engine folders: this one is still inside a temporary folder.
        timing_cache = folder.parents[1] / f"{target.library} {torch.cuda.get_device_name()}.timing"
        ahead = ()
    scratch_bytes, eight_bits = {}, {}
    for graph, sizes in exported.shapes.items():
        report(f"compiling {graph}")
        path = folder / graph / ONNX
        quantized = exported.quantized.get(graph)
        compiler = Compiler(request.backend, path)
        compiled = compiler.compile(sizes, ahead, timing_cache, detailed=quantized is not None)
        path.with_name(ENGINE).write_bytes(compiled.engine)
        path.unlink()
        path.with_name(ONNX_WEIGHTS).unlink()
        scratch_bytes[graph] = compiled.scratch_bytes
        report(f"compiled {graph}: {scratch_bytes[graph] / 2**20:.0f} MiB of scratch memory")
        if quantized:
            eight_bits[graph] = judged = quantized.judge(compiled.layers)
            report(f"{graph} computes {judged.share:.1%} of its arithmetic in 8 bits")
            for layer in judged.fallen_back:
                report(f"{layer} was meant to compute in 8 bits, and does not")
        del compiler, compiled  # as large as the weights; the next graph wants the memory
    return _AllCompiled(scratch_bytes, eight_bits)
