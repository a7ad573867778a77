"""The ONNX graphs of a pipeline: its denoiser, whole or in halves, text encoders, image decoder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from encache.contract.dtypes import tensor_dtype
from encache.contract.manifest import ONNX
from encache.model.backbone import Backbone, attend_across_frames, backbone_of
from encache.model.checkpoint import Checkpoint
from encache.model.loading import load_pipeline
from encache.model.spec import NO_CUT, Cut, GraphSpec, ImageSpec, TensorSpec
from encache.model.split import Halves, Whole
from encache.model.text_encoder import TextEncoder, text_encoders_of

#: GroupNormalization and Attention are single operators from opset 21 and 23 on.
OPSET = 23

#: Values of B (batch), K (calls), M (ring slots), h and w (latent size).
Sizes = Mapping[str, int]
Tensors = Mapping[str, Tensor]

# The bounds only spare the exporter a second trace: it proves its steps within them (diffusers
# branches at 64 rows, and a picture of one pixel would broadcast). The graphs have no bounds.
_BOUNDS = {"B": {"max": 63}, "h": {"min": 9}, "w": {"min": 9}}


@dataclass(frozen=True)
class Graph:
    """One module to be exported.

    Attributes:
        spec: its name, inputs and outputs.
        module: takes its inputs by name, gives its outputs in order.
        dtype: of what the specs call the model's own.
    """

    spec: GraphSpec
    module: nn.Module
    dtype: torch.dtype

    def draw(self, generator: torch.Generator, sizes: Sizes) -> dict[str, Tensor]:
        """Random inputs of the given sizes."""
        return {one.name: _draw(one, self.dtype, generator, sizes) for one in self.spec.inputs}


def open_graphs(
    checkpoint: Checkpoint, cut: Cut, dtype: torch.dtype, frames: int = 0
) -> tuple[Any, ImageSpec, tuple[Graph, ...]]:
    """Load a checkpoint, and list what is to be exported of it.

    Of a pipeline that keeps its own loop that is the denoiser alone, because all else runs there.

    Args:
        checkpoint: what is exported.
        cut: where its denoiser is cut.
        dtype: of the weights.
        frames: of a clip, where the denoiser takes clips; else 0.

    Returns:
        The diffusers pipeline, how its pictures and latents relate, and the graphs.
    """
    family = checkpoint.family
    if not family.hosted:
        pipeline = load_pipeline(checkpoint, dtype)
        spec = ImageSpec.of(pipeline.unet.config, pipeline.vae.config)
        return pipeline, spec, pipeline_graphs(pipeline, cut)
    absent: dict[str, Any] = {}
    if not family.codec:  # DeepFloyd-IF, whose text encoder is larger than all the rest
        absent = dict.fromkeys(family.text_encoders)
    if family.controlled:  # it runs in PyTorch
        absent = {"controlnet": None}
    pipeline = load_pipeline(checkpoint, dtype, **absent)
    denoiser, codec = getattr(pipeline, family.denoiser), getattr(pipeline, family.codec, None)
    if family.across_frames:
        attend_across_frames(denoiser)
    spec = ImageSpec.of_denoiser(denoiser.config, codec and codec.config)
    return pipeline, spec, denoiser_graphs(denoiser, cut, family.controlled, frames)


def pipeline_graphs(pipeline: Any, cut: Cut) -> tuple[Graph, ...]:
    """List the graphs of a diffusers pipeline whose denoiser is cut at `cut`."""
    return (
        *denoiser_graphs(pipeline.unet, cut),
        *map(_text_graph, text_encoders_of(pipeline)),
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
            kwargs={"inputs": graph.draw(torch.Generator().manual_seed(0), sizes)},
            input_names=[one.name for one in graph.spec.inputs],
            output_names=[one.name for one in graph.spec.outputs],
            dynamic_shapes={"inputs": _free_dimensions(graph.spec.inputs)},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # only the exporter that dynamo=True replaces returns None
    program.save(path, external_data=True)
    return path


def _free_dimensions(inputs: tuple[TensorSpec, ...]) -> dict[str, dict[int, Any]]:
    """One Dim for each size that has a name; levels halve with rounding, so each has its own."""
    named = {one for spec in inputs for one in spec.shape if isinstance(one, str)}
    plain = {one: Dim(one.replace("/", "_"), **_bounds(one)) for one in named if "*" not in one}
    dims = {**plain, **{one: _multiple(one, plain) for one in named - plain.keys()}}
    return {
        one.name: {
            axis: dims[dimension]
            for axis, dimension in enumerate(one.shape)
            if isinstance(dimension, str)
        }
        for one in inputs
    }


def _bounds(dimension: str) -> dict[str, int]:
    """What holds for a size, and so for its half or quarter, which is rounded up."""
    name, _, divisor = dimension.partition("/")
    return {end: -(-one // int(divisor or 1)) for end, one in _BOUNDS.get(name, {}).items()}


def _multiple(dimension: str, dims: Mapping[str, Any]) -> Any:
    """The Dim of a product like "B*16"."""
    name, _, factor = dimension.partition("*")
    return int(factor) * dims[name]


class _ByName(nn.Module):
    """A module that takes its inputs by name."""

    def __init__(self, module: nn.Module, call: Callable[[Any, Tensors], Any]) -> None:
        super().__init__()
        self.module = module
        self._call = call

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        return self._call(self.module, inputs)


def denoiser_graphs(
    module: Any, cut: Cut, controlled: bool = False, frames: int = 0
) -> tuple[Graph, ...]:
    """List the graphs of a diffusers denoiser: one, or a pair at a cut.

    Args:
        module: the denoiser.
        cut: where it is cut.
        controlled: whether a ControlNet adds to the features, which then go in by name.
        frames: of a clip, where the denoiser takes clips: the exporter writes no graph in which
            their number is free.
    """
    backbone = backbone_of(module)
    conditions = (*backbone.conditions, *(backbone.residuals if controlled else ()))
    inputs = (backbone.latents, TensorSpec("timestep", (1,), "float32", (0, 999)), *conditions)

    def call(run: Any, tensors: Tensors) -> Any:
        named = {one.name: tensors[one.name] for one in conditions}
        return run(tensors["latents"], tensors["timestep"], named)

    if cut == NO_CUT:
        spec = GraphSpec("unet", inputs, (backbone.prediction,))
        graphs = [Graph(spec, _ByName(Whole(backbone), call), module.dtype)]
    else:
        halves = Halves(module, cut)
        spec = GraphSpec("unet_encoder", inputs, halves.features)
        encoder = Graph(spec, _ByName(halves.encoder, call), module.dtype)
        graphs = [encoder, _decoder_graph(backbone, halves)]
    bound = {**backbone.bound, "F": frames} if frames else backbone.bound
    return tuple(replace(one, spec=one.spec.bind(bound)) for one in graphs)


def _decoder_graph(backbone: Backbone, halves: Halves) -> Graph:
    ring = tuple(replace(one, shape=("M", *one.shape)) for one in halves.features)
    noise = replace(backbone.prediction, shape=("K*B", *backbone.prediction.shape[1:]))
    inputs = (
        *ring,
        # Like a blend's, so that what is mixed is as large as what was mixed.
        TensorSpec("weights", ("K", "M"), "float32", (0.2, 0.6)),
        TensorSpec("timesteps", ("K",), "float32", (0, 999)),
        *backbone.conditions,
    )

    def call(decoder: Any, tensors: Tensors) -> Any:
        features = tuple(tensors[one.name] for one in ring)
        conditions = {one.name: tensors[one.name] for one in backbone.conditions}
        return decoder(features, tensors["weights"], tensors["timesteps"], conditions)

    spec = GraphSpec("unet_decoder", inputs, (noise,))
    return Graph(spec, _ByName(halves.decoder, call), backbone.module.dtype)


def _text_graph(encoder: TextEncoder) -> Graph:
    spec = GraphSpec(encoder.name, encoder.inputs, encoder.outputs)
    module = _ByName(encoder, lambda run, tensors: run(tensors["token_ids"]))
    return Graph(spec, module, encoder.module.dtype)


class _Picture(nn.Module):
    """The autoencoder's decoder half."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample


def _picture_graph(vae: Any) -> Graph:
    # A sampler's latents, divided by the scaling factor, are several times unit noise.
    dtype = "float32" if vae.dtype == torch.float32 else "model"  # which some overflow in fp16
    latents = TensorSpec(
        "latents", ("B", vae.config.latent_channels, "h", "w"), dtype, 1 / vae.config.scaling_factor
    )
    scale = ImageSpec.downscale_of(vae.config)
    picture = TensorSpec("picture", ("B", 3, f"{scale}*h", f"{scale}*w"), dtype)
    module = _ByName(_Picture(vae), lambda run, tensors: run(tensors["latents"]))
    return Graph(GraphSpec("vae_decoder", (latents,), (picture,)), module, vae.dtype)


def _draw(
    spec: TensorSpec, model_dtype: torch.dtype, generator: torch.Generator, sizes: Sizes
) -> Tensor:
    """A random tensor as its spec describes it."""
    shape = spec.size(sizes)
    if isinstance(spec.values, tuple):
        low, high = spec.values
        drawn = low + (high - low) * torch.rand(shape, generator=generator)
    else:
        drawn = spec.values * torch.randn(shape, generator=generator)
    return drawn.to(tensor_dtype(spec, model_dtype))
