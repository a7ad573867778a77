"""The engine folder's contract: what it was built for, and the hash of every file in it.

Needs neither torch nor a backend, so a finished export is recognised at once.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from encache.contract.calibration import Calibration, EightBits
from encache.contract.target import Target
from encache.errors import EngineError
from encache.files import parse_json
from encache.model.checkpoint import Checkpoint
from encache.model.preset import UNSAID, Preset, parse_preset
from encache.model.spec import Cut, GraphSpec, ImageSpec, TensorSpec

MANIFEST = "manifest.json"
#: Fitted plans of a model, in its folder or in an engine folder.
PLANS = "plans.json"
#: What a part's folder holds: a graph with its weights beside it, or a compiled engine.
ONNX, ONNX_WEIGHTS, ENGINE = "model.onnx", "model.onnx.data", "model.engine"
#: Raised when graphs or manifests of an older encache no longer fit its runtime.
GRAPH_FORMAT = 4
_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
REBUILD = "Delete the folder and run encache-export again."


@dataclass(frozen=True)
class Identity:
    """Everything that decides the content of an engine folder; `key` names it.

    Attributes:
        model: fingerprint of the checkpoint.
        cut, dtype, backend: as asked for.
        tools: versions of the libraries that trace the graphs.
        target: what TensorRT engines are compiled for; None for ONNX graphs.
        calibration: of engines of 8 bits, whose scales and layers follow from it; else None.
        pipeline: class of the pipeline that keeps its own loop, for which the denoiser alone was
            exported; or empty.
        frames: of a clip, where the graphs keep their number; or 0.
        graph_format: see `GRAPH_FORMAT`.
    """

    model: str
    cut: Cut
    dtype: str
    backend: str
    tools: str
    target: Target | None = None
    calibration: Calibration | None = None
    pipeline: str = ""
    frames: int = 0
    graph_format: int = GRAPH_FORMAT

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits over all attributes."""
        attributes = asdict(self)
        for name in ("calibration", "pipeline", "frames"):
            if not attributes[name]:  # folders from before it was one keep their names
                del attributes[name]
        text = json.dumps(attributes, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def identify(
    checkpoint: Checkpoint,
    cut: Cut,
    dtype: str,
    backend: str,
    target: Target | None,
    calibration: Calibration | None,
    frames: int = 0,
) -> Identity:
    """The identity of the engines that this machine would build."""
    tools = " ".join(f"{name} {version(name).split('+')[0]}" for name in _TOOLS)
    family = checkpoint.family
    return Identity(
        checkpoint.fingerprint,
        cut,
        dtype,
        backend,
        tools,
        target,
        calibration,
        pipeline=(family.engines or family.pipeline) if family.hosted else "",
        frames=frames,
    )


@dataclass(frozen=True)
class FileRecord:
    """What a file of the folder must be."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json.

    Attributes:
        name: of the checkpoint.
        identity: what the engines were built for.
        graphs: what goes into each graph and what comes out.
        spec: how pictures and latents relate.
        files: size in bytes and sha256 of each file, by its path in the folder.
        parity: relative error of each graph against PyTorch eager at build.
        parity_tolerance: the largest that was accepted.
        build_seconds: how long the build took.
        guidance_scale: the model's default.
        scratch_bytes: GPU memory that each TensorRT engine needs beside its weights.
        preset: how else the model wants to be sampled.
        empty_is_zero: whether no negative prompt means zeros, as for Stable Diffusion XL.
        eight_bits: of each graph that computes in 8 bits, how much of it does.
    """

    name: str
    identity: Identity
    graphs: tuple[GraphSpec, ...]
    spec: ImageSpec
    files: Mapping[str, FileRecord]
    parity: Mapping[str, float]
    parity_tolerance: float
    build_seconds: float
    guidance_scale: float
    scratch_bytes: Mapping[str, int] = field(default_factory=dict)
    preset: Preset = UNSAID
    empty_is_zero: bool = False
    eight_bits: Mapping[str, EightBits] = field(default_factory=dict)

    @property
    def features(self) -> tuple[TensorSpec, ...]:
        """The tensors that cross the cut; none without one."""
        return next((one.outputs for one in self.graphs if one.name == "unet_encoder"), ())

    @property
    def conditions(self) -> tuple[TensorSpec, ...]:
        """What the denoiser is told beside latents and timestep."""
        return self.graphs[0].inputs[2:]

    def write(self, folder: Path) -> None:
        """Write manifest.json; it must be the last file of the folder."""
        data = asdict(self)
        data["digest"] = _digest(data)
        (folder / MANIFEST).write_text(json.dumps(data, indent=2) + "\n")


def _digest(data: Mapping[str, Any]) -> str:
    """sha256 of the manifest's own content, so that it is guarded like the files it lists."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json.

    Raises:
        EngineError: there is none, it is damaged or of another format, or a file that it lists is
            missing or of another size (contents are checked when they are read).
        OSError: something there may not be read.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise EngineError(
            f"{folder} is not an engine folder: it holds no {MANIFEST}. Build one with "
            "encache-export."
        )
    try:
        data: dict[str, Any] = parse_json(_read_file(path))
        if data.pop("digest") != _digest(data):
            raise ValueError("its digest differs")
        graph_format = data["identity"]["graph_format"]
        if graph_format != GRAPH_FORMAT:
            raise EngineError(
                f"{folder} has graph format {graph_format}, this encache reads {GRAPH_FORMAT}. "
                f"{REBUILD}"
            )
        eight_bits = data.get("eight_bits", {})
        manifest = Manifest(
            **{
                **data,
                "identity": _read_identity(data["identity"]),
                "graphs": tuple(map(_read_graph, data["graphs"])),
                "spec": ImageSpec(**_tuples(data["spec"])),
                "files": {name: FileRecord(**one) for name, one in data["files"].items()},
                "preset": parse_preset(data.get("preset", {})),
                "eight_bits": {n: EightBits(**_tuples(one)) for n, one in eight_bits.items()},
            }
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{path} is damaged ({error}). {REBUILD}") from error
    _refuse_changed(folder, manifest)
    return manifest


def refuse_denoiser_alone(folder: Path, manifest: Manifest) -> None:
    """Raise EngineError for a folder that draws nothing without its pipeline."""
    if pipeline := manifest.identity.pipeline:
        raise EngineError(
            f"{folder} holds the denoiser of a {pipeline} alone: give encache-run its --ckpt and "
            "this folder's parent as --engine-dir, or in Python that pipeline to encache.enable."
        )


def _read_identity(data: Mapping[str, Any]) -> Identity:
    kinds = {"target": Target, "calibration": Calibration}
    values = {
        name: one and kinds[name](**_tuples(one)) if name in kinds else one
        for name, one in data.items()
    }
    return Identity(**values)


def _read_graph(data: Mapping[str, Any]) -> GraphSpec:
    tensors = (
        tuple(TensorSpec(**_tuples(one)) for one in data[part]) for part in ("inputs", "outputs")
    )
    return GraphSpec(data["name"], *tensors)


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """With tuples for JSON's lists."""
    return {name: tuple(one) if isinstance(one, list) else one for name, one in data.items()}


def _refuse_changed(folder: Path, manifest: Manifest) -> None:
    """Other files than those listed are nobody's business: no loader reads them."""
    for name, record in manifest.files.items():
        if _check_file(folder / name).st_size != record.size:
            raise EngineError(f"{folder / name} is not what was built. {REBUILD}")


def _check_file(path: Path) -> os.stat_result:
    """The file's status, unless it is missing, or something that cannot be read to its end."""
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            return status
    except (FileNotFoundError, NotADirectoryError):
        raise EngineError(f"{path} is missing. {REBUILD}") from None
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself
            raise
    raise EngineError(f"{path} is not a file. {REBUILD}")


def _read_file(path: Path) -> bytes:
    _check_file(path)
    return path.read_bytes()


def read_verified(folder: Path, manifest: Manifest, name: str) -> bytes:
    """Read a file once and return its bytes only if they are the ones that were built.

    Raises:
        EngineError: the file is missing, truncated or altered.
        OSError: it may not be read.
    """
    path = folder / name
    if name not in manifest.files:
        raise EngineError(f"{path} is missing. {REBUILD}")
    content = _read_file(path)
    if hashlib.sha256(content).hexdigest() != manifest.files[name].sha256:
        raise EngineError(f"{path} is not what was built: its sha256 differs. {REBUILD}")
    return content


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Size and sha256 of every file below the folder, by its path in the folder."""
    records = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            name = path.relative_to(folder).as_posix()
            records[name] = FileRecord(path.stat().st_size, digest)
    return records
