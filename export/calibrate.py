"""What a model's layers see while it draws, and what 8 bits in each of them would cost.

The model draws a few pictures in full, in PyTorch and fp32. A layer's scale follows from the
largest magnitude that went into it, over all calls and both branches of guidance. Its error is the
first-order change of the graph's outputs y when it alone computes in 8 bits: with its own change d,
J = dy/dd and random v of unit variance, ||J d||^2 = E (v . J d)^2 (Hutchinson, 1990), so one
backward pass measures all layers at once.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from encache.contract.calibration import Calibration
from encache.contract.dtypes import tensor_dtype
from encache.export.graphs import Graph, Sizes, Tensors, pipeline_graphs
from encache.model.checkpoint import Checkpoint
from encache.model.loading import load_pipeline
from encache.model.spec import Cut, GraphSpec

#: The largest magnitude of a precision.
LIMITS = {"int8": 127.0, "fp8": 448.0}
#: FP8 attention is one kernel from so many keys on, which fill one matrix instruction, and up to
#: so wide heads.
_FUSED_KEYS, _FUSED_WIDTH = 32, 160
#: Inputs and outputs of one run of a graph, in fp32.
Sample = tuple[Tensors, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Layer:
    """A convolution, a matrix product or an attention.

    Attributes:
        maxima: largest magnitude of its input, or of attention's query, key and value.
        flop: of one run.
        error: squared relative error of the graph's outputs if it alone computes in 8 bits.
    """

    maxima: tuple[float, ...]
    flop: float
    error: float = 0.0

    @property
    def is_attention(self) -> bool:
        """It alone has three inputs without weights."""
        return len(self.maxima) > 1


@dataclass(frozen=True)
class Observed:
    """What one graph was seen doing.

    Attributes:
        layers: those that may compute in 8 bits, by their path in the graph's module.
        flop: of all, together with those that may not.
        samples: runs to compare a quantised graph with.
    """

    layers: Mapping[str, Layer]
    flop: float
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class _Note:
    """What a module was seen to take and give."""

    maximum: float = 0.0
    output_maximum: float = 0.0
    output: tuple[int, ...] = ()


_Notes = dict[nn.Module, _Note]


def calibrate(
    checkpoint: Checkpoint, cut: Cut, calibration: Calibration, dtype: str
) -> dict[str, Observed]:
    """Let a model draw, on the GPU if there is one, and look at each of its graphs.

    Args:
        checkpoint: from `find_checkpoint`.
        cut: where its denoiser is cut.
        calibration: what is drawn.
        dtype: "int8" or "fp8", whose errors are measured.

    Returns:
        By name, the graphs that may compute in 8 bits; text encoders may not.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = load_pipeline(checkpoint, torch.float32, device)
    drawn = Trajectories(pipeline, calibration, checkpoint.guidance_scale)
    return drawn.observe(pipeline_graphs(pipeline, cut), dtype)


class Trajectories:
    """Everything recorded while the model draws the pictures of a calibration.

    Args:
        pipeline: a diffusers pipeline in fp32; its modules are left as they are.
        calibration: what is drawn.
        guidance_scale: with which.
    """

    def __init__(self, pipeline: Any, calibration: Calibration, guidance_scale: float) -> None:
        self._notes: _Notes = {}
        self._samples = calibration.samples
        self._calls: list[list[dict[str, Tensor]]] = []
        self._latents: list[Tensor] = []
        handle = pipeline.unet.register_forward_pre_hook(self._record, with_kwargs=True)
        pipeline.set_progress_bar_config(disable=True)
        try:
            with _noting(pipeline.unet, self._notes):
                for index, prompt in enumerate(calibration.prompts):
                    self._calls.append([])
                    drawn = pipeline(
                        prompt,
                        num_inference_steps=calibration.steps,
                        guidance_scale=guidance_scale,
                        generator=torch.Generator().manual_seed(index),
                        output_type="latent",
                    )
                    self._latents.append(drawn.images / pipeline.vae.config.scaling_factor)
        finally:
            handle.remove()

    def observe(self, graphs: Sequence[Graph], dtype: str) -> dict[str, Observed]:
        """What the denoiser and the image decoder among the graphs of the pipeline do."""
        observed: dict[str, Observed] = {}
        for graph in graphs:
            inputs = self._inputs(graph.spec, graphs[0])
            if inputs:
                observed[graph.spec.name] = _observe(graph, inputs, self._notes, dtype)
        return observed

    def _record(self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        latents, timestep = arguments
        added = named.get("added_cond_kwargs") or {}
        call = {
            "latents": latents,
            "timestep": timestep.float().reshape(1),
            "text": named["encoder_hidden_states"],
            "pooled_text": added.get("text_embeds"),
            "time_ids": added.get("time_ids"),
        }
        self._calls[-1].append({name: one for name, one in call.items() if one is not None})

    def _inputs(self, spec: GraphSpec, first: Graph) -> list[Tensors]:
        """Inputs of a graph at calls of all prompts; none of text encoders, which stay as is."""
        if spec.name == "vae_decoder":
            return [{"latents": one} for one in self._latents]
        if spec.name.startswith("text_encoder"):
            return []
        pairs = self._spread()
        if spec.name == "unet_decoder":
            return [_behind(first, *pair) for pair in pairs]
        return [call for _, call in pairs]

    def _spread(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Calls from the first to the last, each with the one before, from all prompts in turn."""
        for index in range(self._samples):
            calls = self._calls[index % len(self._calls)]
            at = round(index * (len(calls) - 1) / max(1, self._samples - 1))
            yield calls[max(0, at - 1)], calls[at]


@torch.inference_mode()
def _behind(encoder: Graph, before: Tensors, call: Tensors) -> Tensors:
    """What the decoder gets at a call: its own features, and those extrapolated from the last."""
    features = [encoder.module(one) for one in (before, call)]
    ring = {
        spec.name: torch.stack(both)
        for spec, both in zip(encoder.spec.outputs, zip(*features, strict=True), strict=True)
    }
    conditions = {name: one for name, one in call.items() if name not in ("latents", "timestep")}
    weights = torch.tensor([[0.0, 1.0], [-1.0, 2.0]], device=call["latents"].device)
    return {**ring, "weights": weights, "timesteps": call["timestep"].repeat(2), **conditions}


def _observe(graph: Graph, inputs: Sequence[Tensors], notes: _Notes, dtype: str) -> Observed:
    notes = dict(notes)
    seen: _Notes = {}
    with torch.no_grad(), _noting(graph.module, notes), _noting(graph.module, seen):
        samples = tuple((one, _outputs(graph, one)) for one in inputs)
    errors = _measure_errors(graph, samples, notes, dtype)
    return _gather(graph, seen, notes, errors, samples)


def observe_shapes(graph: Graph, sizes: Sizes) -> Observed:
    """What one run of a graph computes, on shapes alone: magnitudes are 1, no error is known.

    Args:
        graph: one whose module was moved to the device "meta".
        sizes: of its inputs.
    """
    seen: _Notes = {}

    def note(layer: nn.Module, _: tuple[Tensor], output: Tensor) -> None:
        seen[layer] = _Note(1.0, 1.0, tuple(output.shape))

    inputs = {
        one.name: torch.empty(one.size(sizes), dtype=tensor_dtype(one, graph.dtype), device="meta")
        for one in graph.spec.inputs
    }
    with torch.no_grad(), _hooked(graph.module, note):
        graph.module(inputs)
    return _gather(graph, seen, seen, defaultdict(float), ())


def _gather(
    graph: Graph,
    seen: _Notes,
    notes: _Notes,
    errors: Mapping[nn.Module, float],
    samples: tuple[Sample, ...],
) -> Observed:
    """By path in the graph, the layers that it was seen running, with what all runs had."""
    names = {module: name for name, module in graph.module.named_modules()}
    layers = {
        names[module]: Layer((notes[module].maximum,), _flop(module, note), errors[module])
        for module, note in seen.items()
    }
    blocks: list[Any] = [one for one in names if getattr(one, "to_q", None) in seen]
    attention = {
        names[block]: Layer(
            tuple(notes[one].output_maximum for one in _parts(block)),
            # Queries with keys, and weights with values.
            4.0 * prod(seen[block.to_q].output) * seen[block.to_k].output[1],
            errors[block],
        )
        for block in blocks
    }
    flop = sum(one.flop for one in (*layers.values(), *attention.values()))
    if graph.spec.name == "vae_decoder":  # its only head is too wide
        blocks = []
    fused = {names[block]: attention[names[block]] for block in blocks if _fuses(block, seen)}
    return Observed({**layers, **fused}, flop, samples)


def _fuses(attention: Any, seen: _Notes) -> bool:
    _, keys, width = seen[attention.to_k].output
    normed = getattr(attention, "norm_q", None) is not None  # its input is not what to_q gave
    return keys >= _FUSED_KEYS and width <= _FUSED_WIDTH * attention.heads and not normed


def _outputs(graph: Graph, inputs: Tensors) -> tuple[Tensor, ...]:
    outputs = graph.module(inputs)
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _measure_errors(
    graph: Graph, samples: Sequence[Sample], notes: _Notes, dtype: str
) -> defaultdict[nn.Module, float]:
    """By layer, the mean over samples of its squared relative error; see above."""
    errors: defaultdict[nn.Module, float] = defaultdict(float)
    weights: dict[nn.Module, Tensor] = {}
    attentions: list[Any] = [one for one in graph.module.modules() if hasattr(one, "to_q")]
    blocks = {one.to_out[0]: one for one in attentions}
    given: dict[nn.Module, Tensor] = {}

    def watch(layer: nn.Module, tensor: Tensor, changed: Tensor) -> None:
        def project(gradient: Tensor) -> None:
            rows = (gradient * changed).flatten(1).sum(1)
            errors[layer] += rows.square().sum().item() / len(samples)

        if tensor.requires_grad:
            tensor.register_hook(project)

    def change(module: Any, arguments: tuple[Tensor], output: Tensor) -> None:
        with torch.no_grad():
            if module not in weights:
                weight = module.weight
                weights[module] = round_to(weight, weight.abs().max().item(), dtype)
            rounded = round_to(arguments[0], notes[module].maximum, dtype)
            watch(module, output, _compute(module, rounded, weights[module]) - output)
            given[module] = output.detach()
            if block := blocks.get(module):
                parts = _parts(block)
                exact = [given[one] for one in parts]
                fp8 = [round_to(given[one], notes[one].output_maximum, "fp8") for one in parts]
                changed = _attend(fp8, block.heads) - _attend(exact, block.heads)
                watch(block, arguments[0], changed)
                given.clear()

    generator = torch.Generator().manual_seed(0)
    graph.module.requires_grad_(False)
    with torch.enable_grad(), _hooked(graph.module, change):
        for inputs, expected in samples:
            grown = {
                name: one.clone().requires_grad_() if one.is_floating_point() else one
                for name, one in inputs.items()
            }
            total = torch.zeros(())
            for output, one in zip(_outputs(graph, grown), expected, strict=True):
                vector = torch.randn(one.shape, generator=generator).to(one)
                scale = one.norm() * len(expected) ** 0.5
                total = total.to(one.device) + (output * vector).sum() / scale
            total.backward()
    return errors


def _parts(attention: Any) -> tuple[nn.Module, ...]:
    return attention.to_q, attention.to_k, attention.to_v


def _attend(given: Sequence[Tensor], heads: int) -> Tensor:
    """Attention of query, key and value [B, L, heads * D], like the query.

    What FP8 does to the weights is left out: written out, they would fill the memory.
    """
    query, key, value = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in given)
    return scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def round_to(x: Tensor, maximum: float, dtype: str) -> Tensor:
    """A tensor of any shape as a precision of 8 bits holds it, in its own dtype.

    Args:
        x: what is rounded.
        maximum: the largest magnitude that is held.
        dtype: "int8" or "fp8".
    """
    limit = LIMITS[dtype]
    scale = maximum / limit or 1.0
    whole = (x / scale).clamp(-limit, limit)
    whole = whole.round() if dtype == "int8" else whole.to(torch.float8_e4m3fn)
    return whole.to(x.dtype) * scale


def _compute(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    """A layer with other weights, past its hooks."""
    if isinstance(module, nn.Linear):
        return linear(x, weight, module.bias)
    return module._conv_forward(x, weight, module.bias)


def _flop(module: Any, note: _Note) -> float:
    """A product has an addition for each multiplication."""
    return 2 * prod(note.output) * prod(module.weight.shape[1:])


@contextmanager
def _noting(module: nn.Module, notes: _Notes) -> Iterator[None]:
    """Note in `notes` what the layers of a module take and give."""

    def note(layer: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        known = notes.get(layer, _Note())
        notes[layer] = _Note(
            max(known.maximum, arguments[0].abs().max().item()),
            max(known.output_maximum, output.abs().max().item()),
            tuple(output.shape),
        )

    with _hooked(module, note):
        yield


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    """Call a hook after each convolution and each matrix product inside a module."""
    kinds = (nn.Conv2d, nn.Linear)
    layers = [one for one in module.modules() if isinstance(one, kinds)]
    handles = [one.register_forward_hook(hook) for one in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
