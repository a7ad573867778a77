"""The OpenVINO backend: ONNX graphs on a CPU, in fp32 or in bf16.

In bf16 the graphs, their inputs and their outputs stay in fp32; what lies between is rounded by
OpenVINO, which needs no calibration. A graph is compiled for each set of shapes that it is run
with, because OpenVINO is much faster where it knows them.
"""

import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encache.contract.manifest import ONNX, ONNX_WEIGHTS, REBUILD, Manifest, read_verified
from encache.errors import EngineError
from encache.model.spec import GraphSpec

#: OpenVINO's names of our precisions.
_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
#: Latents up to this size shrink to one pixel inside a UNet. OpenVINO 2026.4 computes attention
#: with a single query wrongly, and then goes on so at larger sizes.
_ONE_PIXEL = 8
#: Sets of shapes that a graph stays compiled for, each with weights of its own; a run of a cut
#: model has two or three.
_MOST_SHAPES = 4
#: By input, its shape.
_Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def open_openvino(folder: Path, manifest: Manifest) -> dict[str, "_Compiled"]:
    """Open a folder's graphs on this machine's CPU, by name.

    Raises:
        EngineError: OpenVINO is missing or refuses a graph, a file was altered, or the CPU does not
            compute in the folder's precision.
    """
    core = load_openvino().Core()
    dtype = manifest.identity.dtype
    if dtype == "bf16":
        refuse_without_bf16(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    core.set_property({"ENABLE_MMAP": False})  # a file that is replaced must not change weights
    options = {"INFERENCE_PRECISION_HINT": _PRECISIONS[dtype], "PERFORMANCE_HINT": "LATENCY"}
    return {one.name: _Compiled(core, options, folder, manifest, one) for one in manifest.graphs}


def load_openvino() -> Any:
    """The library, which is kept from telling its maker that it was imported.

    Raises:
        EngineError: it is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise EngineError(
            f'The backend openvino is not installed ({error}): pip install "encache[openvino]".'
        ) from error
    return openvino


def refuse_without_bf16(capabilities: list[str]) -> None:
    """Raise EngineError unless a CPU of these capabilities has instructions for bf16."""
    if "BF16" not in capabilities:
        raise EngineError(
            "This CPU has no instructions for bf16 (AVX512_BF16 or AMX): use --dtype fp32."
        )


class _Compiled:
    """One graph."""

    def __init__(
        self,
        core: Any,
        options: Mapping[str, str],
        folder: Path,
        manifest: Manifest,
        spec: GraphSpec,
    ) -> None:
        self.spec = spec
        for name in (ONNX, ONNX_WEIGHTS):
            read_verified(folder, manifest, f"{spec.name}/{name}")
        try:
            # It takes weights from a file alone, large ones only when it compiles.
            self._model = core.read_model(folder / spec.name / ONNX)
        except RuntimeError as error:
            raise EngineError(
                f"OpenVINO cannot open {folder / spec.name}: {error}. {REBUILD}"
            ) from error
        self._core, self._options = core, options
        self._requests: dict[_Shapes, Any] = {}
        self._tensor = load_openvino().Tensor
        self._lock = threading.Lock()  # of several threads, one at a time

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Compute the outputs into the given tensors."""
        self._refuse_one_pixel(inputs)
        given = {name: tensor.contiguous() for name, tensor in inputs.items()}
        places = {
            name: self._tensor(tensor.numpy(), shared_memory=True)
            for name, tensor in {**given, **outputs}.items()
        }
        try:
            with self._lock:
                request = self._request_for({name: one.shape for name, one in given.items()})
                for name, place in places.items():
                    request.set_tensor(name, place)
                request.infer()
        except RuntimeError as error:
            if "bad_alloc" in str(error):
                raise torch.OutOfMemoryError(str(error)) from error
            raise EngineError(f"OpenVINO cannot run {self.spec.name}: {error}") from error

    def _request_for(self, shapes: Mapping[str, torch.Size]) -> Any:
        """What runs the graph at these shapes; those that were used longest ago make room."""
        key = tuple((name, tuple(shape)) for name, shape in shapes.items())
        request = self._requests.pop(key, None)
        if request is None:
            if len(self._requests) == _MOST_SHAPES:
                del self._requests[next(iter(self._requests))]
            model = self._model.clone()
            model.reshape({name: list(shape) for name, shape in key})
            compiled = self._core.compile_model(model, "CPU", self._options)
            request = compiled.create_infer_request()
        self._requests[key] = request
        return request

    def _refuse_one_pixel(self, inputs: Mapping[str, Tensor]) -> None:
        if not self.spec.name.startswith("unet"):
            return
        first = inputs[self.spec.inputs[0].name]  # latents, or features of the same size
        if max(first.shape[-2:]) <= _ONE_PIXEL:
            raise EngineError(
                f"OpenVINO computes latents of {_ONE_PIXEL}x{_ONE_PIXEL} pixels and less wrongly: "
                "draw larger pictures, or use --backend onnxruntime."
            )
