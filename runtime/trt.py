"""The TensorRT backends: engines that share one scratch memory and run on the current stream."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encache.errors import EngineError
from encache.export.library import describe_library, load_library
from encache.export.manifest import ENGINE, REBUILD, Identity, Manifest, read_verified
from encache.export.target import local_compute_capability
from encache.runtime.engines import GraphEngines
from encache.runtime.files import write_atomically


def open_tensorrt(folder: Path, manifest: Manifest) -> GraphEngines:
    """Open a folder's engines on this machine's GPU.

    Raises:
        EngineError: they were compiled for another GPU or another version of the library, there is
            no GPU, its memory does not suffice, or a file was altered.
    """
    refuse_elsewhere(folder, manifest.identity)
    _refuse_too_little_memory(folder, manifest)
    library = load_library(manifest.identity.backend)
    runtime = library.Runtime(library.Logger(library.Logger.ERROR))
    engines = {name: _Engine(runtime, folder, manifest, name) for name in manifest.parity}
    # They run one after another, so one block of memory serves all of them.
    most = max(one.scratch_bytes for one in engines.values())
    scratch = torch.empty(most, dtype=torch.uint8, device="cuda")
    for engine in engines.values():
        engine.use_scratch(scratch)
    return GraphEngines(manifest, engines, "cuda", capturable=True)


def refuse_elsewhere(folder: Path, identity: Identity) -> None:
    """Raise EngineError unless this machine can run engines of this identity."""
    target = identity.target
    if target is None:
        raise EngineError(f"{folder} does not say what it was compiled for. {REBUILD}")
    again = f"Compile again here: encache-export --backend {identity.backend}."
    installed = describe_library(identity.backend)
    if installed != target.library:
        raise EngineError(
            f"{folder} was compiled by {target.library}, this machine has {installed}. {again}"
        )
    here = local_compute_capability()
    if here not in target.compute_capabilities:
        raise EngineError(
            f"{folder} was compiled for compute capability "
            f"{', '.join(target.compute_capabilities)}; this is {torch.cuda.get_device_name()}, "
            f"{here}. {again}"
        )


def _refuse_too_little_memory(folder: Path, manifest: Manifest) -> None:
    """Before anything is loaded: weights of all engines, and the largest scratch memory."""
    weights = sum(one.size for name, one in manifest.files.items() if name.endswith(ENGINE))
    needed = weights + max(manifest.scratch_bytes.values())
    free, _ = torch.cuda.mem_get_info()
    if needed > free:
        raise EngineError(
            f"{folder} needs {needed / 2**30:.1f} GiB of GPU memory, {free / 2**30:.1f} are free. "
            "Export it with a smaller --batch, --decode-batch or size, or close other programs."
        )


class _Engine:
    """One engine with its execution context.

    TensorRT-RTX finishes engines for the GPU at hand when they are opened; what it made is kept
    beside the folder, for the next time.
    """

    def __init__(self, runtime: Any, folder: Path, manifest: Manifest, graph: str) -> None:
        self._library = load_library(manifest.identity.backend)
        self._runtime = runtime  # must outlive what it opened
        self._graph = graph
        content = read_verified(folder, manifest, f"{graph}/{ENGINE}")
        self._engine = runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise EngineError(
                f"{manifest.identity.backend} cannot open {folder / graph}; its reason is above. "
                f"Update the NVIDIA driver, or compile anew: {REBUILD}"
            )
        self._context = self._open_context(folder.with_name(f"{folder.name}.{graph}.jit"))

    @property
    def scratch_bytes(self) -> int:
        """GPU memory that a run needs beside weights, inputs and outputs."""
        return self._engine.device_memory_size_v2

    def use_scratch(self, scratch: Tensor) -> None:
        """Run in this memory from now on."""
        self._scratch = scratch
        self._context.set_device_memory(scratch.data_ptr(), scratch.numel())

    def width_of(self, output: str) -> int:
        """The last dimension of an output."""
        return self._engine.get_tensor_shape(output)[-1]

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Compute the outputs into the given tensors, in the order of the current stream.

        Raises:
            EngineError: a shape was not compiled for.
        """
        for name, tensor in inputs.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise EngineError(
                    f"{self._graph} was not compiled for {name} of shape {list(tensor.shape)}. "
                    "Export it again for this --batch, --decode-batch, --height and --width."
                )
        bound = {name: _aligned(tensor) for name, tensor in {**inputs, **outputs}.items()}
        for name, tensor in bound.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise EngineError(f"{self._graph} could not run; the library's reason is above.")
        for name, tensor in outputs.items():
            if bound[name] is not tensor:
                tensor.copy_(bound[name])

    def _open_context(self, cache_path: Path) -> Any:
        config = self._engine.create_runtime_config()
        strategies = self._library.ExecutionContextAllocationStrategy
        config.set_execution_context_allocation_strategy(strategies.USER_MANAGED)
        if not hasattr(config, "create_runtime_cache"):  # standard TensorRT compiled everything
            return self._engine.create_execution_context(config)
        config.dynamic_shapes_kernel_specialization_strategy = (
            self._library.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        cache = config.create_runtime_cache()
        # The library itself refuses what it did not make for this GPU, driver and version.
        known = cache_path.is_file() and cache.deserialize(cache_path.read_bytes())
        config.set_runtime_cache(cache)
        context = self._engine.create_execution_context(config)
        if not known:
            with suppress(OSError):  # a folder may be read-only; the next start is slow again
                write_atomically(cache_path, bytes(cache.serialize()))
        return context


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it at an address that TensorRT takes."""
    return tensor if tensor.is_contiguous() and tensor.data_ptr() % 256 == 0 else tensor.clone()
