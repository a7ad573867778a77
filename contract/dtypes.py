"""The precisions that engines are built in, by the names of `--dtype`."""

from typing import TYPE_CHECKING

from encache.contract.library import TENSORRT_BACKENDS
from encache.errors import EncacheError

if TYPE_CHECKING:
    import torch

    from encache.model.spec import TensorSpec

#: Ours, and torch's.
_NAMES = {"fp32": "float32", "fp16": "float16"}
DTYPES = tuple(_NAMES)


def torch_dtype(name: str) -> "torch.dtype":
    """torch's own of a name.

    Raises:
        EncacheError: there is none.
    """
    import torch

    if name not in _NAMES:
        raise EncacheError(f"There is no {name!r}. Choose one of {', '.join(DTYPES)}.")
    return getattr(torch, _NAMES[name])


def dtype_name(dtype: "str | torch.dtype") -> str:
    """Our name of torch's; a name as it is."""
    names = {f"torch.{theirs}": ours for ours, theirs in _NAMES.items()}
    return names.get(str(dtype), str(dtype))


def tensor_dtype(spec: "TensorSpec", model_dtype: "torch.dtype") -> "torch.dtype":
    """torch's own of a tensor, where the model's is given."""
    import torch

    return model_dtype if spec.dtype == "model" else getattr(torch, spec.dtype)


def default_dtype(backend: str) -> str:
    """What suits a backend: GPUs are twice as fast in fp16, CPUs are not."""
    return "fp16" if backend in TENSORRT_BACKENDS else "fp32"
