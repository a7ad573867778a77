"""What a backend does for the sampler: by an engine folder's graphs, or by PyTorch itself."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from encache.errors import EncacheError
from encache.export.graphs import TORCH_DTYPES
from encache.export.manifest import Manifest
from encache.export.target import Target
from encache.model.features import Cut, Feature
from encache.model.split import SplitUNet

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


class Engines(Protocol):
    """An engine pair with its text encoder and image decoder.

    The ring belongs to one generation: a tensor [M, B, C, h', w'] per feature, allocated once,
    written in place by `encode` and read by `decode`.

    Attributes:
        name: of the backend.
        identity: what a picture's metadata says about the engines that made it.
        features: the tensors that cross the cut.
        capturable: whether its runs may be part of a CUDA graph.
        has_own_threads: whether a library beside PyTorch computes on the CPU.
        target: the sizes that they were compiled for; None if they take any.
        dtype, device: of latents, text embeddings and features.
    """

    name: str
    identity: Mapping[str, Any]
    features: tuple[Feature, ...]
    capturable: bool
    has_own_threads: bool
    target: Target | None
    dtype: torch.dtype
    device: torch.device

    def encode(
        self, latents: Tensor, timestep: Tensor, text: Tensor, ring: Sequence[Tensor], slot: int
    ) -> None:
        """Write the features of latents [B, 4, h, w] at timestep [1] into a slot of the ring."""

    def decode(
        self, ring: Sequence[Tensor], weights: Tensor, timesteps: Tensor, text: Tensor
    ) -> Tensor:
        """Noise [K * B, 4, h, w] of K calls from the ring, weights [K, M], timesteps [K]."""

    def encode_text(self, token_ids: Tensor, clip_skip: int = 0) -> Tensor:
        """Text embeddings [B, L, D] of token ids [B, L], without the last `clip_skip` layers.

        Raises:
            EncacheError: the engines hold all layers, and some are to be left out.
        """

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] of latents already divided by the scaling factor."""


def allocate_ring(
    engines: Engines, num_slots: int, batch: int, height: int, width: int
) -> list[Tensor]:
    """One tensor [M, B, C, h', w'] per feature, not yet cleared."""
    return [
        torch.empty(
            num_slots,
            *feature.shape(batch, height, width),
            dtype=engines.dtype,
            device=engines.device,
        )
        for feature in engines.features
    ]


def mix(weights: Tensor, ring: Tensor) -> Tensor:
    """The blend of the cut "out": [K, M] x [M, B, C, h, w] -> [K * B, C, h, w], in float32.

    Weights in fp16 would no longer sum to one.
    """
    return (weights @ ring.flatten(1).float()).view(-1, *ring.shape[2:])


class Graph(Protocol):
    """One graph of an engine folder, ready to run."""

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Compute the outputs into the given tensors, in the order of the current stream."""

    def width_of(self, output: str) -> int:
        """The last dimension of an output."""


class GraphEngines:
    """The graphs of an engine folder, whatever library runs them.

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
        self.identity: Mapping[str, Any] = {"key": identity.key, **asdict(identity)}
        self.features = manifest.features
        self.target = identity.target
        self.dtype = TORCH_DTYPES[identity.dtype]
        self.device = torch.device(device)
        self.capturable = capturable
        self.has_own_threads = self.device.type == "cpu"
        self._spec = manifest.spec
        self._graphs = graphs

    def encode(
        self, latents: Tensor, timestep: Tensor, text: Tensor, ring: Sequence[Tensor], slot: int
    ) -> None:
        inputs = {"latents": latents, "timestep": timestep, "text": text}
        self._graphs["unet_encoder"].run(inputs, self._by_name([one[slot] for one in ring]))

    def decode(
        self, ring: Sequence[Tensor], weights: Tensor, timesteps: Tensor, text: Tensor
    ) -> Tensor:
        if "unet_decoder" not in self._graphs:  # the cut "out" leaves the blend alone
            return mix(weights, ring[0])
        inputs = {"weights": weights, "timesteps": timesteps, "text": text}
        noise = self._empty(len(weights) * len(text), self._spec.channels, *ring[0].shape[-2:])
        self._graphs["unet_decoder"].run({**self._by_name(ring), **inputs}, {"noise": noise})
        return noise

    def encode_text(self, token_ids: Tensor, clip_skip: int = 0) -> Tensor:
        if clip_skip:
            raise EncacheError(
                "clip_skip needs PyTorch: the text encoder's engine ends with its last layer. Use "
                'backend="torch", or encode the prompt elsewhere and pass prompt_embeds.'
            )
        graph = self._graphs["text_encoder"]
        text = self._empty(*token_ids.shape, graph.width_of("text"))
        graph.run({"token_ids": token_ids.to(self.device)}, {"text": text})
        return text

    def decode_latents(self, latents: Tensor) -> Tensor:
        batch, _, *size = latents.shape
        picture = self._empty(batch, 3, *(side * self._spec.downscale for side in size))
        inputs = {"latents": latents.to(self.dtype)}
        self._graphs["vae_decoder"].run(inputs, {"picture": picture})
        return picture

    def _by_name(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip((one.name for one in self.features), tensors, strict=True))

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


class TorchEngines:
    """The halves run by PyTorch, straight from the pipeline's own modules.

    Args:
        pipeline: whose modules run.
        cut: where its UNet is cut.
        capturable: see `Engines`; a graph does not follow later changes of the modules.
    """

    name = "torch"
    has_own_threads = False
    target: Target | None = None

    def __init__(
        self, pipeline: "StableDiffusionPipeline", cut: Cut, *, capturable: bool = False
    ) -> None:
        split = SplitUNet(pipeline.unet, cut)
        self.identity: Mapping[str, Any] = {
            "backend": self.name,
            "cut": cut,
            "dtype": str(pipeline.unet.dtype),
            "device": pipeline.unet.device.type,
            "torch": version("torch"),
        }
        self.features = split.features
        self.dtype = pipeline.unet.dtype
        self.device = pipeline.unet.device
        self.capturable = capturable and self.device.type == "cuda"
        self._split = split
        self.pipeline = pipeline
        self._cut = cut

    @torch.inference_mode()
    def encode(
        self, latents: Tensor, timestep: Tensor, text: Tensor, ring: Sequence[Tensor], slot: int
    ) -> None:
        features = self._split.encoder(latents, timestep, text)
        for tensor, feature in zip(ring, features, strict=True):
            tensor[slot].copy_(feature)

    @torch.inference_mode()
    def decode(
        self, ring: Sequence[Tensor], weights: Tensor, timesteps: Tensor, text: Tensor
    ) -> Tensor:
        if self._cut == "out":
            return mix(weights, ring[0])
        return self._split.decoder(ring, weights, timesteps, text)

    @torch.inference_mode()
    def encode_text(self, token_ids: Tensor, clip_skip: int = 0) -> Tensor:
        text_encoder = self.pipeline.text_encoder
        encoded = text_encoder(token_ids.to(self.device), output_hidden_states=bool(clip_skip))
        if not clip_skip:
            return encoded.last_hidden_state
        if not 0 < clip_skip < len(encoded.hidden_states):
            most = len(encoded.hidden_states) - 1
            raise EncacheError(f"clip_skip leaves out 1 to {most} layers, not {clip_skip}.")
        # Once inside a text_model, as diffusers still expects it.
        inner = getattr(text_encoder, "text_model", text_encoder)
        return inner.final_layer_norm(encoded.hidden_states[-(clip_skip + 1)])

    @torch.inference_mode()
    def decode_latents(self, latents: Tensor) -> Tensor:
        return self.pipeline.vae.decode(latents.to(self.pipeline.vae.dtype)).sample
