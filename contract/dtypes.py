"""The precisions that engines are built in, by the names of `--dtype`."""

from typing import TYPE_CHECKING

from encache.contract.library import TENSORRT_BACKENDS
from encache.errors import EncacheError

if TYPE_CHECKING:
    import torch

    from encache.model.spec import TensorSpec

#: Ours, and torch's.
_NAMES = {"fp32": "float32", "fp16": "float16"}
#: Of weights and of all tensors alike.
DTYPES = tuple(_NAMES)
#: Inside layers alone, with the dtype of the tensors around them.
_AROUND = {"bf16": "fp32", "int8": "fp16", "fp8": "fp16"}
#: The precisions of 8 bits, which are calibrated.
EIGHT_BITS = ("int8", "fp8")
ENGINE_DTYPES = (*DTYPES, *_AROUND)
#: What a backend takes beside DTYPES, or instead.
_OF_BACKEND = {"openvino": ("fp32", "bf16"), "tensorrt-rtx": (*DTYPES, *EIGHT_BITS)}


def torch_dtype(name: str) -> "torch.dtype":
    """torch's own of a name, of the tensors that go into engines and come out.

    Raises:
        EncacheError: there is none.
    """
    import torch

    if name not in ENGINE_DTYPES:
        raise EncacheError(f"There is no {name!r}. Choose one of {', '.join(ENGINE_DTYPES)}.")
    return getattr(torch, _NAMES[_AROUND.get(name, name)])


def dtype_name(dtype: "str | torch.dtype") -> str:
    """Our name of torch's; a name as it is."""
    names = {f"torch.{theirs}": ours for ours, theirs in _NAMES.items()}
    return names.get(str(dtype), str(dtype))


def tensor_dtype(spec: "TensorSpec", model_dtype: "torch.dtype") -> "torch.dtype":
    """torch's own of a tensor, where the model's is given."""
    import torch

    return model_dtype if spec.dtype == "model" else getattr(torch, spec.dtype)


def default_dtype(backend: str) -> str:
    """What suits a backend: GPUs are twice as fast in fp16, CPUs are not; OpenVINO is in bf16."""
    if backend in TENSORRT_BACKENDS:
        return "fp16"
    return "bf16" if backend == "openvino" else "fp32"


def refuse_dtype(backend: str, dtype: str) -> None:
    """Raise EncacheError unless a backend computes in this precision."""
    known = _OF_BACKEND.get(backend, DTYPES)
    if dtype not in known:
        raise EncacheError(
            f"The backend {backend} takes --dtype {' or '.join(known)}, not {dtype}."
        )
