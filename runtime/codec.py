"""From latents to pictures: the autoencoder's decoder half."""

import copy
from typing import Any, Protocol

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from encache.contract.dtypes import tensor_dtype
from encache.errors import EncacheError
from encache.model.spec import ImageSpec
from encache.runtime.compiling import through_compiler
from encache.runtime.engines import Graph, run_graph
from encache.runtime.memory import explaining_want_of_memory


class Codec(Protocol):
    """The autoencoder as the pipeline uses it."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [n, 3, H, W] in [-1, 1] of latents already divided by the scaling factor."""


class TorchCodec:
    """A diffusers autoencoder run by PyTorch.

    Args:
        vae: the autoencoder.
        upcast: whether fp16 is too narrow for it; then a copy of it runs in fp32.
        compiled: run it through torch.compile.
    """

    def __init__(self, vae: Any, *, upcast: bool = False, compiled: bool = False) -> None:
        narrow = upcast and vae.dtype == torch.float16
        self._vae = copy.deepcopy(vae).float() if narrow else vae
        self._run = through_compiler(self._decode) if compiled else self._decode

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        return self._run(latents.to(self._vae.dtype))

    def _decode(self, latents: Tensor) -> Tensor:
        return self._vae.decode(latents).sample


class GraphCodec:
    """The graph of an autoencoder's decoder half."""

    def __init__(self, graph: Graph, dtype: torch.dtype) -> None:
        self._graph = graph
        self._dtype = dtype

    def decode(self, latents: Tensor) -> Tensor:
        batch, _, height, width = latents.shape
        (spec,) = self._graph.spec.inputs
        inputs = {"latents": latents.to(tensor_dtype(spec, self._dtype))}
        return run_graph(self._graph, inputs, self._dtype, B=batch, h=height, w=width)["picture"]


def refuse_output_type(output_type: str) -> None:
    """Raise EncacheError for a kind of pictures that there is not."""
    if output_type not in ("pil", "np", "pt", "latent"):
        raise EncacheError(f"output_type is pil, np, pt or latent, not {output_type!r}.")


def decode_pictures(codec: Codec, spec: ImageSpec, latents: Tensor, output_type: str) -> Any:
    """Turn latents [n, C, h, w] into pictures, one by one, which bounds memory.

    Args:
        codec: the autoencoder.
        spec: how pictures and latents relate.
        latents: as the sampler leaves them.
        output_type: "pil", "np" [n, H, W, 3], "pt" [n, 3, H, W], both in [0, 1], or "latent".

    Raises:
        EncacheError: the autoencoder's numbers overflow, or memory does not hold a picture.
    """
    refuse_output_type(output_type)
    if output_type == "latent":
        return latents
    with explaining_want_of_memory(
        "Memory does not hold the autoencoder's work on one picture: make smaller pictures, or "
        "use fp16 or a small --vae."
    ):
        pictures = torch.cat([codec.decode(one / spec.scaling_factor) for one in latents.split(1)])
    if not pictures.isfinite().all():
        raise EncacheError(
            "The latents are finite, but the autoencoder's picture is not: its numbers overflow. "
            "Try fp32, another --vae, or a lower guidance scale."
        )
    processor = VaeImageProcessor(vae_scale_factor=spec.downscale)
    return processor.postprocess(pictures, output_type=output_type)
