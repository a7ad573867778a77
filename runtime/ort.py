"""The ONNX Runtime backend: every tensor stays where torch put it, nothing is copied."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from encache.contract.manifest import ONNX, ONNX_WEIGHTS, REBUILD, Manifest, read_verified
from encache.errors import EngineError
from encache.model.spec import GraphSpec

_NUMPY = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.int64: np.int64,
}
_ON_GPU = "CUDAExecutionProvider"
#: Earlier ones run the graphs' Attention on the CPU, whatever the provider (onnxruntime #28025).
_FIRST_ON_GPU = (1, 25)
#: In the text of an error that means too little memory.
_NO_MEMORY = "AllocateRawInternal"


def open_onnxruntime(folder: Path, manifest: Manifest) -> tuple[dict[str, "_Session"], str]:
    """Open a folder's graphs, on the GPU where onnxruntime-gpu and one are there.

    Returns:
        The graphs by name, and the device that they run on.

    Raises:
        EngineError: a file was altered, ONNX Runtime refuses it, or is too old for a GPU.
    """
    gpu = torch.cuda.is_available() and _ON_GPU in onnxruntime.get_available_providers()
    if gpu and tuple(map(int, onnxruntime.__version__.split(".")[:2])) < _FIRST_ON_GPU:
        raise EngineError(
            f"onnxruntime-gpu {onnxruntime.__version__} computes attention on the CPU: pip install "
            f'"onnxruntime-gpu>={".".join(map(str, _FIRST_ON_GPU))}".'
        )
    stream = torch.cuda.Stream() if gpu else None
    graphs = {one.name: _Session(folder, manifest, one, stream) for one in manifest.graphs}
    return graphs, "cuda" if gpu else "cpu"


class _Session:
    """One graph, on the CPU or on a stream of its own."""

    def __init__(
        self, folder: Path, manifest: Manifest, spec: GraphSpec, stream: torch.cuda.Stream | None
    ) -> None:
        self.spec = spec
        self._stream = stream
        options = onnxruntime.SessionOptions()
        # Threads spin within a run, which is fastest, and stop after it: torch and the other
        # sessions need the cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # As other libraries have it, and as Ray tells a worker how many cores are its own.
        if (threads := os.environ.get("OMP_NUM_THREADS", "")).isdecimal():
            options.intra_op_num_threads = int(threads)
        self._run_options = onnxruntime.RunOptions()
        providers: list = ["CPUExecutionProvider"]
        if stream:
            # Its kernels are ordered by the stream; the host need not wait for them.
            self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            place = {
                "device_id": str(stream.device_index),
                "user_compute_stream": str(stream.cuda_stream),
            }
            providers = [(_ON_GPU, place), *providers]
        model = read_verified(folder, manifest, f"{spec.name}/{ONNX}")
        weights = read_verified(folder, manifest, f"{spec.name}/{ONNX_WEIGHTS}")
        options.add_external_initializers_from_files_in_memory(
            [ONNX_WEIGHTS], [weights], [len(weights)]
        )
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=providers)
        except Exception as error:  # ONNX Runtime raises its own untyped exceptions
            raise EngineError(
                f"ONNX Runtime cannot open {folder / spec.name}: {error}. {REBUILD}"
            ) from error
        if stream and self._session.get_providers()[0] != _ON_GPU:
            raise EngineError(
                "onnxruntime-gpu cannot use this GPU: its CUDA libraries do not load, and the "
                "reason is above. Install the CUDA and cuDNN that it names, or onnxruntime "
                "instead of it."
            )

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Compute the outputs into the given tensors, in the order of the current stream."""
        binding = self._session.io_binding()
        kept = {name: tensor.contiguous() for name, tensor in inputs.items()}
        for name, tensor in kept.items():
            binding.bind_input(name, *_place(tensor))
        for name, tensor in outputs.items():
            binding.bind_output(name, *_place(tensor))
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())
        try:
            self._session.run_with_iobinding(binding, self._run_options)
        except Exception as error:  # ONNX Runtime raises its own untyped exceptions
            if _NO_MEMORY in str(error):
                raise torch.OutOfMemoryError(str(error)) from error
            raise EngineError(f"ONNX Runtime cannot run {self.spec.name}: {error}") from error
        if self._stream:
            torch.cuda.current_stream().wait_stream(self._stream)


def _place(tensor: Tensor) -> tuple:
    """What a binding wants to know: device, its number, type, shape, address."""
    device = tensor.device
    shape = list(tensor.shape)
    return (device.type, device.index or 0, _NUMPY[tensor.dtype], shape, tensor.data_ptr())
