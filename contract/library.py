"""Which TensorRT is installed: the one place where TensorRT-RTX and standard TensorRT differ."""

from functools import cache
from importlib import import_module
from typing import Any

from encache.errors import EngineError

#: Modules that may hold the library, and the extra that installs it.
_LIBRARIES = {
    "tensorrt-rtx": (("tensorrt_rtx", "tensorrt_rtx_bindings"), "rtx"),
    "tensorrt": (("tensorrt",), "tensorrt"),
}
TENSORRT_BACKENDS = tuple(_LIBRARIES)
#: PyTorch runs the model's own modules, as they are or through torch.compile.
COMPILED = "torch.compile"
TORCH_BACKENDS = ("torch", COMPILED)
#: What runs engines.
BACKENDS = ("onnxruntime", "openvino", *TENSORRT_BACKENDS)


@cache
def load_library(backend: str) -> Any:
    """The Python module of a TensorRT backend.

    Raises:
        EngineError: it is not installed.
    """
    modules, extra = _LIBRARIES[backend]
    for module in modules:
        try:
            return import_module(module)
        except ImportError as error:
            reason = error
    raise EngineError(
        f'The backend {backend} is not installed ({reason}): pip install "encache[{extra}]".'
    ) from reason


def describe_library(backend: str) -> str:
    """The backend and its version, to which engines are bound."""
    return f"{backend} {load_library(backend).__version__}"
