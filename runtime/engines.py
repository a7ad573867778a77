"""What runs the denoiser for the sampler: an engine folder's graphs, or PyTorch itself."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, Protocol

import torch
from torch import Tensor

from encache.contract.dtypes import tensor_dtype, torch_dtype
from encache.contract.library import COMPILED
from encache.contract.manifest import Manifest
from encache.contract.target import Target
from encache.model.backbone import Conditions, backbone_of
from encache.model.spec import NO_CUT, Cut, GraphSpec, TensorSpec
from encache.model.split import Halves
from encache.runtime.compiling import through_compiler


class Engines(Protocol):
    """One denoiser: whole, or cut into an engine pair.

    The ring belongs to one generation: a tensor [M, B, ...] per feature, allocated once, written in
    place by `encode` and read by `decode`.

    Attributes:
        name: of the backend.
        cut: where the denoiser is cut, which decides which of the methods there are.
        identity: what a picture's metadata says about the engines that made it.
        features: the tensors that cross the cut; none without one.
        conditions: what the denoiser is told beside latents and timestep.
        capturable: whether its runs may be part of a CUDA graph.
        has_own_threads: whether a library beside PyTorch computes on the CPU.
        target: the sizes that they were compiled for; None if they take any.
    """

    name: str
    cut: Cut
    identity: Mapping[str, Any]
    features: tuple[TensorSpec, ...]
    conditions: tuple[TensorSpec, ...]
    capturable: bool
    has_own_threads: bool
    target: Target | None

    @property
    def dtype(self) -> torch.dtype:
        """Of latents, conditions and features."""

    @property
    def device(self) -> torch.device:
        """Where they are."""

    def denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """Noise [B, C, h, w] of latents [B, C, h, w] at timestep [1]; without a cut."""

    def encode(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditions: Conditions,
        ring: Sequence[Tensor],
        slot: int,
    ) -> None:
        """Write the features of latents [B, C, h, w] at timestep [1] into a slot of the ring."""

    def decode(
        self, ring: Sequence[Tensor], weights: Tensor, timesteps: Tensor, conditions: Conditions
    ) -> Tensor:
        """Noise [K * B, C, h, w] of K calls from the ring, weights [K, M], timesteps [K]."""


def allocate_ring(engines: Engines, num_slots: int, latents: Sequence[int]) -> list[Tensor]:
    """One tensor [M, B, ...] per feature of latents [B, C, h, w] or [B, C, F, h, w].

    It is not yet cleared.
    """
    sizes = sizes_of(latents)
    return [
        torch.empty(num_slots, *feature.size(sizes), dtype=engines.dtype, device=engines.device)
        for feature in engines.features
    ]


def sizes_of(latents: Sequence[int]) -> dict[str, int]:
    """Free sizes by name, of latents [B, C, h, w] or [B, C, F, h, w]."""
    batch, _, *sides = latents
    return {"B": batch, **dict(zip("whF", reversed(sides), strict=False))}


class Graph(Protocol):
    """One graph of an engine folder, ready to run."""

    spec: GraphSpec

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Compute the outputs into the given tensors, in the order of the current stream."""


def run_graph(
    graph: Graph, inputs: Mapping[str, Tensor], dtype: torch.dtype, **sizes: int
) -> dict[str, Tensor]:
    """Run a graph into new tensors, whose free sizes are these."""
    device = next(iter(inputs.values())).device
    outputs = {
        one.name: torch.empty(one.size(sizes), dtype=tensor_dtype(one, dtype), device=device)
        for one in graph.spec.outputs
    }
    graph.run(inputs, outputs)
    return outputs


class GraphEngines:
    """The denoiser's graphs of an engine folder, whatever library runs them.

    Args:
        manifest: of the folder.
        graphs: the folder's, by name.
        device: where their inputs and outputs are.
        capturable: see `Engines`.
    """

    def __init__(
        self, manifest: Manifest, graphs: Mapping[str, Graph], device: str, capturable: bool
    ) -> None:
        identity = manifest.identity
        self.name = identity.backend
        self.cut = identity.cut
        self.identity: Mapping[str, Any] = {"key": identity.key, **asdict(identity)}
        self.features = manifest.features
        self.conditions = manifest.conditions
        self.target = identity.target
        self.dtype = torch_dtype(identity.dtype)
        self.device = torch.device(device)
        self.capturable = capturable
        self.has_own_threads = self.device.type == "cpu"
        self._graphs = graphs

    def denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        inputs = {"latents": latents, "timestep": timestep, **conditions}
        run = run_graph(self._graphs["unet"], inputs, self.dtype, **sizes_of(latents.shape))
        return run["noise"]

    def encode(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditions: Conditions,
        ring: Sequence[Tensor],
        slot: int,
    ) -> None:
        inputs = {"latents": latents, "timestep": timestep, **conditions}
        self._graphs["unet_encoder"].run(inputs, self._by_name([one[slot] for one in ring]))

    def decode(
        self, ring: Sequence[Tensor], weights: Tensor, timesteps: Tensor, conditions: Conditions
    ) -> Tensor:
        inputs = {
            **self._by_name(ring),
            "weights": weights,
            "timesteps": timesteps,
            **conditions,
        }
        # The first feature is as large as the latents, but a clip's frames are its rows.
        sizes = {"K": len(weights), "B": len(next(iter(conditions.values())))}
        sizes |= {"h": ring[0].shape[-2], "w": ring[0].shape[-1]}
        return run_graph(self._graphs["unet_decoder"], inputs, self.dtype, **sizes)["noise"]

    def _by_name(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip((one.name for one in self.features), tensors, strict=True))


class TorchEngines:
    """The denoiser run by PyTorch, straight from a diffusers module.

    Args:
        module: the denoiser.
        cut: where it is cut.
        capturable: see `Engines`; a graph does not follow later changes of the module.
        compiled: run it through torch.compile, whose first runs take minutes. Behind a cut some of
            it stays as it is: what the halves replace in the module is not traced.

    Raises:
        CheckpointError: encache cannot run it, or it has no such cut.
    """

    has_own_threads = False
    target: Target | None = None

    def __init__(
        self, module: Any, cut: Cut, *, capturable: bool = False, compiled: bool = False
    ) -> None:
        self._backbone = backbone_of(module)
        halves = None if cut == NO_CUT else Halves(module, cut)
        parts: tuple[Any, ...] = (self._undivided,)
        if halves:
            parts = (halves.encoder, halves.decoder)
        self._parts = tuple(map(through_compiler, parts)) if compiled else parts
        self.name = COMPILED if compiled else "torch"
        self.cut = cut
        self.identity: Mapping[str, Any] = {
            "backend": self.name,
            "cut": cut,
            "dtype": str(module.dtype),
            "device": module.device.type,
            "torch": version("torch"),
        }
        self.features = halves.features if halves else ()
        self.conditions = self._backbone.conditions
        self.capturable = capturable and self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of the module, wherever a wrapped pipeline has moved it."""
        return self._backbone.module.dtype

    @property
    def device(self) -> torch.device:
        """Of the module."""
        return self._backbone.module.device

    @torch.inference_mode()
    def denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        (undivided,) = self._parts
        return undivided(latents, timestep, conditions)

    @torch.inference_mode()
    def encode(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditions: Conditions,
        ring: Sequence[Tensor],
        slot: int,
    ) -> None:
        encoder, _ = self._parts
        features = encoder(latents, timestep, conditions)
        for tensor, feature in zip(ring, features, strict=True):
            tensor[slot].copy_(feature)

    @torch.inference_mode()
    def decode(
        self, ring: Sequence[Tensor], weights: Tensor, timesteps: Tensor, conditions: Conditions
    ) -> Tensor:
        _, decoder = self._parts
        return decoder(ring, weights, timesteps, conditions)

    def _undivided(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        return self._backbone.call(self._backbone.module, latents, timestep, conditions)
