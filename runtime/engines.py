"""What a backend does for the sampler, and the PyTorch backend that the others are held against."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from encache.export.target import Target
from encache.model.features import Cut, Feature

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class Engines(Protocol):
    """An engine pair with its text encoder and image decoder.

    The ring belongs to one generation: a tensor [M, B, C, h', w'] per feature, allocated once,
    written in place by `encode` and read by `decode`.

    Attributes:
        name: of the backend.
        identity: what a picture's metadata says about the engines that made it.
        features: the tensors that cross the cut.
        target: the sizes that they were compiled for; None if they take any.
        dtype, device: of latents, text embeddings and features.
    """

    name: str
    identity: Mapping[str, Any]
    features: tuple[Feature, ...]
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

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """Text embeddings [B, L, D] of token ids [B, L]."""

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] of latents already divided by the scaling factor."""


def allocate_ring(
    engines: Engines, num_slots: int, batch: int, height: int, width: int
) -> list[Tensor]:
    """One zeroed tensor [M, B, C, h', w'] per feature.

    Zeroed, because a blend multiplies slots that are not filled yet by zero, and 0 * NaN is NaN.
    """
    return [
        torch.zeros(
            num_slots,
            *feature.shape(batch, height, width),
            dtype=engines.dtype,
            device=engines.device,
        )
        for feature in engines.features
    ]


class TorchEngines:
    """The halves run by PyTorch, straight from the pipeline's own modules."""

    name = "torch"
    target: Target | None = None

    def __init__(self, pipeline: "StableDiffusionPipeline", cut: Cut) -> None:
        from encache.model.split import SplitUNet

        split = SplitUNet(pipeline.unet, cut)
        self.identity: Mapping[str, Any] = {
            "backend": self.name,
            "cut": cut,
            "dtype": str(pipeline.unet.dtype),
        }
        self.features = split.features
        self.dtype = pipeline.unet.dtype
        self.device = pipeline.unet.device
        self._split = split
        self._pipeline = pipeline

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
        return self._split.decoder(ring, weights, timesteps, text)

    @torch.inference_mode()
    def encode_text(self, token_ids: Tensor) -> Tensor:
        return self._pipeline.text_encoder(token_ids.to(self.device)).last_hidden_state

    @torch.inference_mode()
    def decode_latents(self, latents: Tensor) -> Tensor:
        return self._pipeline.vae.decode(latents.to(self._pipeline.vae.dtype)).sample
