"""The four ONNX graphs of a pipeline: UNet encoder and decoder, text encoder, image decoder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from encache.model.features import Cut
from encache.model.split import SplitUNet
from torch import Tensor, nn
from torch.export import Dim

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

#: GroupNormalization and Attention are single operators from opset 21 and 23 on.
OPSET = 23
WEIGHTS_SUFFIX = ".onnx.data"


@dataclass(frozen=True)
class Graph:
    """One module to be exported, with what the exporter and the parity check need.

    Attributes:
        name: of the engine's folder.
        module: takes `example` and returns one tensor or a tuple.
        inputs, outputs: tensor names, flattened in order.
        example: positional arguments that trace it.
        dynamic_shapes: free dimensions of each argument.
        draw: makes fresh random arguments of other sizes.
    """

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_shapes: tuple[Any, ...]
    draw: Callable[[torch.Generator, Mapping[str, int]], tuple[Any, ...]]


class _TextEmbeddings(nn.Module):
    """CLIP's last hidden state, which is all that Stable Diffusion reads."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.text_encoder(token_ids).last_hidden_state


class _Picture(nn.Module):
    """The autoencoder's decoder half."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample


def pipeline_graphs(pipeline: "StableDiffusionPipeline", cut: Cut) -> tuple[Graph, ...]:
    """List the graphs of a pipeline whose UNet is cut at `cut`."""
    split = SplitUNet(pipeline.unet, cut)
    unet, tokenizer = pipeline.unet.config, pipeline.tokenizer
    names = tuple(feature.name for feature in split.features)
    dtype = pipeline.unet.dtype
    # The bounds only spare the exporter a second trace: it proves its steps within them (diffusers
    # branches at 64 rows, and a picture of one pixel would broadcast). The graphs have no bounds.
    batch, calls, slots = Dim("B", max=63), Dim("K"), Dim("M")
    height, width = Dim("h", min=9), Dim("w", min=9)
    text_shape = {0: batch, 1: Dim("L")}
    levels = {
        feature.level: (Dim(f"h{feature.level}"), Dim(f"w{feature.level}"))
        for feature in split.features
    }

    def randn(generator: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def draw_text(generator: torch.Generator, sizes: Mapping[str, int]) -> Tensor:
        length = tokenizer.model_max_length
        return randn(generator, sizes["B"], length, unet.cross_attention_dim)

    def draw_timesteps(generator: torch.Generator, count: int) -> Tensor:
        return torch.rand(count, generator=generator) * 999

    def draw_encoder(generator: torch.Generator, sizes: Mapping[str, int]) -> tuple[Any, ...]:
        latents = randn(generator, sizes["B"], unet.in_channels, sizes["h"], sizes["w"])
        return latents, draw_timesteps(generator, 1), draw_text(generator, sizes)

    def draw_decoder(generator: torch.Generator, sizes: Mapping[str, int]) -> tuple[Any, ...]:
        ring = tuple(
            randn(generator, sizes["M"], *feature.shape(sizes["B"], sizes["h"], sizes["w"]))
            for feature in split.features
        )
        weights = torch.randn(sizes["K"], sizes["M"], generator=generator)
        weights /= weights.sum(1, keepdim=True).clamp(min=1)
        timesteps = draw_timesteps(generator, sizes["K"])
        return ring, weights, timesteps, draw_text(generator, sizes)

    def draw_tokens(generator: torch.Generator, sizes: Mapping[str, int]) -> tuple[Any, ...]:
        shape = (sizes["B"], tokenizer.model_max_length)
        return (torch.randint(len(tokenizer), shape, generator=generator),)

    def draw_latents(generator: torch.Generator, sizes: Mapping[str, int]) -> tuple[Any, ...]:
        return (randn(generator, sizes["B"], unet.in_channels, sizes["h"], sizes["w"]),)

    ring_shapes = tuple(
        {0: slots, 1: batch, 3: levels[feature.level][0], 4: levels[feature.level][1]}
        for feature in split.features
    )
    latent_shape = {0: batch, 2: height, 3: width}
    return (
        Graph(
            "unet_encoder",
            split.encoder,
            ("latents", "timestep", "text"),
            names,
            (latent_shape, {}, text_shape),
            draw_encoder,
        ),
        Graph(
            "unet_decoder",
            split.decoder,
            (*names, "weights", "timesteps", "text"),
            ("noise",),
            (ring_shapes, {0: calls, 1: slots}, {0: calls}, text_shape),
            draw_decoder,
        ),
        Graph(
            "text_encoder",
            _TextEmbeddings(pipeline.text_encoder),
            ("token_ids",),
            ("text",),
            ({0: batch},),
            draw_tokens,
        ),
        Graph(
            "vae_decoder",
            _Picture(pipeline.vae),
            ("latents",),
            ("picture",),
            (latent_shape,),
            draw_latents,
        ),
    )


def write_onnx(graph: Graph, folder: Path, sizes: Mapping[str, int]) -> Path:
    """Trace the graph at `sizes` and write model.onnx with its weights beside it.

    Args:
        graph: one of `pipeline_graphs`.
        folder: receives model.onnx and model.onnx.data.
        sizes: B, K, M, h and w of the traced example; those dimensions stay free.
    """
    path = folder / "model.onnx"
    with torch.inference_mode():
        program = torch.onnx.export(
            graph.module.eval(),
            graph.draw(torch.Generator().manual_seed(0), sizes),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=graph.dynamic_shapes,
            opset_version=OPSET,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    program.save(path, external_data=True)
    return path


def flatten(arguments: Sequence[Any]) -> list[Tensor]:
    """The tensors of nested positional arguments, in the order of `Graph.inputs`."""
    tensors: list[Tensor] = []
    for argument in arguments:
        tensors += [argument] if isinstance(argument, Tensor) else flatten(argument)
    return tensors
