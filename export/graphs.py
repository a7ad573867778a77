"""The ONNX graphs of a pipeline: UNet encoder and decoder, text encoder, image decoder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from encache.export.manifest import ONNX
from encache.model.features import Cut
from encache.model.split import SplitUNet

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

#: GroupNormalization and Attention are single operators from opset 21 and 23 on.
OPSET = 23
#: By the names of `--dtype`.
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}

#: Values of B (batch), K (calls), M (ring slots), h and w (latent size).
Sizes = Mapping[str, int]

# The bounds only spare the exporter a second trace: it proves its steps within them (diffusers
# branches at 64 rows, and a picture of one pixel would broadcast). The graphs have no bounds.
_BATCH, _CALLS, _SLOTS, _LENGTH = Dim("B", max=63), Dim("K"), Dim("M"), Dim("L")
_LATENTS = {0: _BATCH, 2: Dim("h", min=9), 3: Dim("w", min=9)}
_TEXT = {0: _BATCH, 1: _LENGTH}


@dataclass(frozen=True)
class Graph:
    """One module to be exported, with what the exporter and the parity check need.

    Attributes:
        name: of the engine's folder.
        module: takes what `draw` returns, gives one tensor or a tuple.
        inputs, outputs: tensor names, flattened in order.
        dynamic_shapes: free dimensions of each argument.
        draw: makes random arguments of the given sizes.
    """

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_shapes: tuple[Any, ...]
    draw: Callable[[torch.Generator, Sizes], tuple[Any, ...]]


def pipeline_graphs(pipeline: "StableDiffusionPipeline", cut: Cut) -> tuple[Graph, ...]:
    """List the graphs of a pipeline whose UNet is cut at `cut`.

    The cut "out" leaves no decoder but the blend, which needs no engine.
    """
    split = SplitUNet(pipeline.unet, cut)
    length = pipeline.tokenizer.model_max_length
    decoder = () if cut == "out" else (_decoder_graph(split, pipeline.unet, length),)
    return (
        _encoder_graph(split, pipeline.unet, length),
        *decoder,
        _text_graph(pipeline.text_encoder, len(pipeline.tokenizer), length),
        _picture_graph(pipeline.vae),
    )


def write_onnx(graph: Graph, folder: Path, sizes: Sizes) -> Path:
    """Trace the graph at `sizes` and write model.onnx with its weights beside it.

    Args:
        graph: one of `pipeline_graphs`.
        folder: receives model.onnx and model.onnx.data.
        sizes: of the traced example; they stay free in the graph.
    """
    path = folder / ONNX
    with torch.inference_mode():
        program = torch.onnx.export(
            graph.module.eval(),
            graph.draw(torch.Generator().manual_seed(0), sizes),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=graph.dynamic_shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # only the exporter that dynamo=True replaces returns None
    program.save(path, external_data=True)
    return path


def flatten(arguments: Sequence[Any]) -> list[Tensor]:
    """The tensors of nested positional arguments, in the order of `Graph.inputs`."""
    tensors: list[Tensor] = []
    for argument in arguments:
        tensors += [argument] if isinstance(argument, Tensor) else flatten(argument)
    return tensors


def _encoder_graph(split: SplitUNet, unet: Any, length: int) -> Graph:
    def draw(generator: torch.Generator, sizes: Sizes) -> tuple[Any, ...]:
        return (
            _draw_latents(generator, sizes, unet.config.in_channels, unet.dtype),
            _draw_timesteps(generator, 1),
            _draw_text(generator, sizes, unet, length),
        )

    return Graph(
        "unet_encoder",
        split.encoder,
        ("latents", "timestep", "text"),
        tuple(feature.name for feature in split.features),
        (_LATENTS, {}, _TEXT),
        draw,
    )


def _decoder_graph(split: SplitUNet, unet: Any, length: int) -> Graph:
    def draw(generator: torch.Generator, sizes: Sizes) -> tuple[Any, ...]:
        shapes = [one.shape(sizes["B"], sizes["h"], sizes["w"]) for one in split.features]
        ring = tuple(_randn(generator, (sizes["M"], *shape), unet.dtype) for shape in shapes)
        weights = torch.rand(sizes["K"], sizes["M"], generator=generator) + 0.1
        return (
            ring,
            weights / weights.sum(1, keepdim=True),
            _draw_timesteps(generator, sizes["K"]),
            _draw_text(generator, sizes, unet, length),
        )

    # Levels halve with rounding, so each has sizes of its own.
    levels = {one.level: (Dim(f"h{one.level}"), Dim(f"w{one.level}")) for one in split.features}
    ring_shapes = tuple(
        {0: _SLOTS, 1: _BATCH, 3: levels[one.level][0], 4: levels[one.level][1]}
        for one in split.features
    )
    return Graph(
        "unet_decoder",
        split.decoder,
        (*(one.name for one in split.features), "weights", "timesteps", "text"),
        ("noise",),
        (ring_shapes, {0: _CALLS, 1: _SLOTS}, {0: _CALLS}, _TEXT),
        draw,
    )


class _TextEmbeddings(nn.Module):
    """CLIP's last hidden state, which is all that Stable Diffusion reads."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.text_encoder(token_ids).last_hidden_state


def _text_graph(text_encoder: nn.Module, vocabulary_size: int, length: int) -> Graph:
    def draw(generator: torch.Generator, sizes: Sizes) -> tuple[Any, ...]:
        return (torch.randint(vocabulary_size, (sizes["B"], length), generator=generator),)

    module = _TextEmbeddings(text_encoder)
    return Graph("text_encoder", module, ("token_ids",), ("text",), ({0: _BATCH},), draw)


class _Picture(nn.Module):
    """The autoencoder's decoder half."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample


def _picture_graph(vae: Any) -> Graph:
    def draw(generator: torch.Generator, sizes: Sizes) -> tuple[Any, ...]:
        # As large as a sampler's, which are several times unit noise here.
        scale = 1 / vae.config.scaling_factor
        return (scale * _draw_latents(generator, sizes, vae.config.latent_channels, vae.dtype),)

    return Graph("vae_decoder", _Picture(vae), ("latents",), ("picture",), (_LATENTS,), draw)


def _draw_latents(
    generator: torch.Generator, sizes: Sizes, channels: int, dtype: torch.dtype
) -> Tensor:
    return _randn(generator, (sizes["B"], channels, sizes["h"], sizes["w"]), dtype)


def _draw_text(generator: torch.Generator, sizes: Sizes, unet: Any, length: int) -> Tensor:
    return _randn(generator, (sizes["B"], length, unet.config.cross_attention_dim), unet.dtype)


def _draw_timesteps(generator: torch.Generator, count: int) -> Tensor:
    return torch.rand(count, generator=generator) * 999


def _randn(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)
