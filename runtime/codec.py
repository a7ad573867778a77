"""From latents to pictures: the autoencoder's decoder half."""

from typing import Any, Protocol

import torch
from torch import Tensor

from encache.contract.dtypes import tensor_dtype
from encache.runtime.engines import Graph, run_graph


class Codec(Protocol):
    """The autoencoder as the pipeline uses it."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [n, 3, H, W] in [-1, 1] of latents already divided by the scaling factor."""


class TorchCodec:
    """A diffusers autoencoder run by PyTorch."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        return self._vae.decode(latents.to(self._vae.dtype)).sample


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
