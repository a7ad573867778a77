"""The TensorRT backends: engines that share one scratch memory and run on the current stream."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encache.errors import EngineError
from encache.export.library import describe_library, load_library
from encache.export.manifest import ENGINE, REBUILD, Identity, Manifest, read_verified
from encache.export.target import local_compute_capability
from encache.model.split import blend
from encache.runtime.engines import TORCH_DTYPES
from encache.runtime.files import write_atomically


class TensorRTEngines:
    """The engines of a folder on this machine's GPU.

    They run one after another, so one block of memory serves all of them.

    Raises:
        EngineError: they were compiled for another GPU or another version of the library, there is
            no GPU, or its memory does not suffice.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        identity = manifest.identity
        refuse_elsewhere(folder, identity)
        self.name = identity.backend
        self.identity: Mapping[str, Any] = {"key": identity.key, **asdict(identity)}
        self.target = identity.target
        self.features = manifest.features
        self.spec = manifest.spec
        self.dtype = TORCH_DTYPES[identity.dtype]
        self.device = torch.device("cuda")
        _refuse_too_little_memory(folder, manifest)
        library = load_library(identity.backend)
        self._runtime = library.Runtime(library.Logger(library.Logger.ERROR))
        self._engines = {
            name: _Engine(library, self._runtime, folder, manifest, name)
            for name in manifest.parity
        }
        most = max(one.scratch_bytes for one in self._engines.values())
        self._scratch = torch.empty(most, dtype=torch.uint8, device=self.device)
        for engine in self._engines.values():
            engine.use_scratch(self._scratch)

    def encode(
        self, latents: Tensor, timestep: Tensor, text: Tensor, ring: Sequence[Tensor], slot: int
    ) -> None:
        inputs = {"latents": latents, "timestep": timestep, "text": text}
        slots = (tensor[slot] for tensor in ring)
        names = (feature.name for feature in self.features)
        self._engines["unet_encoder"].run(inputs, dict(zip(names, slots, strict=True)))

    def decode(
        self, ring: Sequence[Tensor], weights: Tensor, timesteps: Tensor, text: Tensor
    ) -> Tensor:
        if "unet_decoder" not in self._engines:  # the cut "out"
            return blend(weights, ring[0])
        names = (feature.name for feature in self.features)
        inputs = dict(zip(names, ring, strict=True))
        inputs |= {"weights": weights, "timesteps": timesteps, "text": text}
        rows = len(weights) * len(text)
        noise = self._empty(rows, self.spec.channels, *ring[0].shape[-2:])
        self._engines["unet_decoder"].run(inputs, {"noise": noise})
        return noise

    def encode_text(self, token_ids: Tensor) -> Tensor:
        text = self._empty(*token_ids.shape, self._engines["text_encoder"].width_of("text"))
        self._engines["text_encoder"].run({"token_ids": token_ids.to(self.device)}, {"text": text})
        return text

    def decode_latents(self, latents: Tensor) -> Tensor:
        batch, _, height, width = latents.shape
        scale = self.spec.downscale
        picture = self._empty(batch, 3, height * scale, width * scale)
        self._engines["vae_decoder"].run({"latents": latents.to(self.dtype)}, {"picture": picture})
        return picture

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


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

    def __init__(
        self, library: Any, runtime: Any, folder: Path, manifest: Manifest, graph: str
    ) -> None:
        self._library = library
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
        """Run in this memory, which must outlive the engine."""
        self._context.set_device_memory(scratch.data_ptr(), scratch.numel())

    def width_of(self, name: str) -> int:
        """The last dimension of a tensor."""
        return self._engine.get_tensor_shape(name)[-1]

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Enqueue a run on the current stream; inputs must live until it is done.

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
