"""Stable Diffusion with a cached UNet encoder, deployed through ONNX and TensorRT."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from encache.runtime.enable import disable, enable

__all__ = ["disable", "enable"]
__version__ = "0.3.0"


def __getattr__(name: str) -> Any:
    """Import what the package offers when somebody asks for it: PyTorch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from encache.runtime import enable

    return getattr(enable, name)
