"""The TensorRT backends: engines that share one scratch memory and run on the current stream."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encache.contract.library import describe_library, load_library
from encache.contract.manifest import ENGINE, REBUILD, Identity, Manifest, read_verified
from encache.contract.target import local_compute_capability
from encache.errors import EngineError
from encache.files import write_atomically
from encache.model.spec import GraphSpec


def open_tensorrt(folder: Path, manifest: Manifest) -> dict[str, "_Engine"]:
    """Open a folder's engines on this machine's GPU.

    Raises:
        EngineError: they were compiled for another GPU or another version of the library, there is
            no GPU, its memory does not suffice, or a file was altered.
    """
    refuse_elsewhere(folder, manifest.identity)
    _refuse_too_little_memory(folder, manifest)
    library = load_library(manifest.identity.backend)
    runtime = library.Runtime(library.Logger(library.Logger.ERROR))
    engines = {one.name: _Engine(runtime, folder, manifest, one) for one in manifest.graphs}
    # They run one after another, so one block of memory serves all of them.
    most = max(one.scratch_bytes for one in engines.values())
    scratch = torch.empty(most, dtype=torch.uint8, device="cuda")
    for engine in engines.values():
        engine.use_scratch(scratch)
    return engines


def refuse_elsewhere(folder: Path, identity: Identity) -> None:
    """Raise EngineError unless this machine can run engines of this identity."""
    target = identity.target
    if target is None:
        raise EngineError(f"{folder} does not say what it was compiled for. {REBUILD}")
    again = f"Compile it here: encache-export --backend {identity.backend}, with the same --ckpt."
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
    torch.cuda.empty_cache()  # what PyTorch holds for later counts as used
    weights = sum(one.size for name, one in manifest.files.items() if name.endswith(ENGINE))
    needed = weights + max(manifest.scratch_bytes.values())
    free, _ = torch.cuda.mem_get_info()
    if needed > free:
        raise EngineError(
            f"{folder} needs {needed / 2**30:.1f} GiB of GPU memory, {free / 2**30:.1f} are free. "
            "Export it with a smaller --batch, --decode-batch or size, or close other programs."
        )


class _Engine:
    """One engine, with an execution context for each set of input shapes.

    A context that is part of a CUDA graph must not change its shapes, and its first run after such
    a change cannot be captured.

    TensorRT-RTX finishes engines for the GPU at hand when it first meets a shape; what it made is
    kept beside the folder, for the next time.
    """

    def __init__(self, runtime: Any, folder: Path, manifest: Manifest, spec: GraphSpec) -> None:
        self._library = load_library(manifest.identity.backend)
        self.spec = spec
        self._stream = torch.cuda.Stream()
        content = read_verified(folder, manifest, f"{spec.name}/{ENGINE}")
        engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise EngineError(
                f"{manifest.identity.backend} cannot open {folder / spec.name}; its reason is "
                f"above. Update the NVIDIA driver, or compile anew: {REBUILD}"
            )
        # Attributes die in the order in which they are first set: each before what it came from.
        self._contexts: dict[tuple[tuple[int, ...], ...], Any] = {}
        self._config = engine.create_runtime_config()
        strategies = self._library.ExecutionContextAllocationStrategy
        self._config.set_execution_context_allocation_strategy(strategies.USER_MANAGED)
        folder = folder.resolve()
        self._kernels_path = folder.with_name(f"{folder.name}.{spec.name}.kernels")
        self._kernels = self._open_kernels()
        self._engine = engine
        self._runtime = runtime

    @property
    def scratch_bytes(self) -> int:
        """GPU memory that a run needs beside weights, inputs and outputs."""
        return self._engine.device_memory_size_v2

    def use_scratch(self, scratch: Tensor) -> None:
        """Run in this memory from now on."""
        self._scratch = scratch

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Compute the outputs into the given tensors, in the order of the current stream.

        Raises:
            EngineError: a shape was not compiled for.
        """
        shapes = tuple(tuple(tensor.shape) for tensor in inputs.values())
        known = shapes in self._contexts
        if not known:
            self._contexts[shapes] = self._open_context(inputs)
        context = self._contexts[shapes]
        bound = {name: aligned(tensor) for name, tensor in {**inputs, **outputs}.items()}
        for name, tensor in bound.items():
            context.set_tensor_address(name, tensor.data_ptr())
        with _off_the_default(self._stream) as stream:
            if not context.execute_async_v3(stream.cuda_stream):
                raise EngineError(f"{self.spec.name} could not run; the library's reason is above.")
        for name, tensor in outputs.items():
            if bound[name] is not tensor:
                tensor.copy_(bound[name])
        if not known:
            self._keep_kernels()

    def _open_context(self, inputs: Mapping[str, Tensor]) -> Any:
        context = self._engine.create_execution_context(self._config)
        if context is None:
            raise EngineError(
                f"{self.spec.name} could not be prepared to run, often for want of GPU memory; the "
                "library's reason is above. Close other programs and try again."
            )
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise EngineError(
                    f"{self.spec.name} was not compiled for {name} of shape {list(tensor.shape)}. "
                    "Export it again for this --batch, --decode-batch, --height and --width."
                )
        return context

    def _open_kernels(self) -> Any | None:
        """TensorRT-RTX's cache of finished kernels; standard TensorRT finished all at build."""
        if not hasattr(self._config, "create_runtime_cache"):
            return None
        self._config.dynamic_shapes_kernel_specialization_strategy = (
            self._library.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        kernels = self._config.create_runtime_cache()
        if self._kernels_path.is_file():
            # The library itself refuses what it did not make for this GPU, driver and version.
            kernels.deserialize(self._kernels_path.read_bytes())
        self._config.set_runtime_cache(kernels)
        return kernels

    def _keep_kernels(self) -> None:
        if self._kernels is not None:
            with suppress(OSError):  # a folder may be read-only; the next start is slow again
                write_atomically(self._kernels_path, bytes(self._kernels.serialize()))


@contextmanager
def _off_the_default(stream: torch.cuda.Stream) -> Iterator[torch.cuda.Stream]:
    """The current stream, or `stream` in its order: TensorRT waits for all of the GPU otherwise."""
    current = torch.cuda.current_stream()
    if current != torch.cuda.default_stream():
        yield current
        return
    stream.wait_stream(current)
    yield stream
    current.wait_stream(stream)


def aligned(tensor: Tensor) -> Tensor:
    """A tensor of any shape, or a copy as TensorRT reads it: contiguous, at 256 bytes' multiple."""
    if tensor.is_contiguous() and tensor.data_ptr() % 256 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
