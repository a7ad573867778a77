"""Conv, MatMul, Gemm and Attention of an exported graph in 8 bits, by Q/DQ nodes.

TensorRT-RTX is strongly typed: the precision of a layer is what the graph says. Its convolutions
compute in 8 bits only where a scale has no dimension at all; with shape [1] they silently stay in
half precision.
"""

import re
from ast import literal_eval
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from encache.contract.calibration import EightBits
from encache.contract.manifest import ONNX_WEIGHTS
from encache.errors import EngineError
from encache.export.calibrate import LIMITS, Layer, Observed
from encache.export.trt import CompiledLayer

_SCOPES = "pkg.torch.onnx.name_scopes"
_TYPES = {
    "int8": (TensorProto.INT8, np.dtype(np.int8)),
    "fp8": (TensorProto.FLOAT8E4M3FN, np.dtype(ml_dtypes.float8_e4m3fn)),
}
_WITH_WEIGHTS = {"Conv", "MatMul", "Gemm"}
#: What the compiler calls the precisions of 8 bits.
_COMPILED = {"Int8", "FP8"}
#: The compiler's own name of its attention kernels, which keep no node's.
_ATTENTION = re.compile(r"_gemm_mha")


@dataclass(frozen=True)
class Quantized:
    """What is meant to compute in 8 bits in one graph.

    Attributes:
        observed: the graph.
        nodes: paths of those layers, by the names of their nodes.
        kept: paths of the others.
    """

    observed: Observed
    nodes: Mapping[str, str]
    kept: tuple[str, ...]

    def judge(self, layers: Sequence[CompiledLayer]) -> EightBits:
        """What of it the compiled layers really do."""
        eight = [one.name for one in layers if one.datatype in _COMPILED]
        names = {part for name in eight for part in self._nodes_of(name)}
        fused = sum(bool(_ATTENTION.match(name)) for name in eight)
        flop, fallen_back = 0.0, []
        for node, path in self.nodes.items():
            layer = self.observed.layers[path]
            if layer.is_attention:
                fused -= 1
                done = fused >= 0
            else:
                done = node in names
            if done:
                flop += layer.flop
            else:
                fallen_back.append(path)
        maxima = {name: max(one.maxima) for name, one in self.observed.layers.items()}
        share = flop / self.observed.flop
        return EightBits(share, self.kept, tuple(fallen_back), maxima)

    def _nodes_of(self, layer: str) -> Iterator[str]:
        """Nodes in a compiled layer, such as "node_a+node_b_myl0_7"; some are numbered again."""
        for part in re.sub(r"_myl\d+_\d+$", "", layer).split("+"):
            yield part if part in self.nodes else re.sub(r"_\d+$", "", part)


def choose_kept(observed: Observed, share: float, fp8: bool) -> frozenset[str]:
    """The layers that stay in fp16: what cannot be otherwise, and what costs most precision.

    Errors of layers add up in their squares, so what counts is squared error per operation.

    Args:
        observed: the graph.
        share: of the arithmetic, at most, that is given up for precision.
        fp8: whether the GPU has FP8, without which attention stays.
    """
    left = share * observed.flop
    kept = {
        name
        for name, one in observed.layers.items()
        if not min(one.maxima) or (one.is_attention and not fp8)
    }
    costs = {name: one for name, one in observed.layers.items() if one.error and name not in kept}
    for name in sorted(costs, key=lambda name: costs[name].error / costs[name].flop, reverse=True):
        if costs[name].flop <= left:
            left -= costs[name].flop
            kept.add(name)
    return frozenset(kept)


def expected_error(observed: Observed, kept: Collection[str]) -> float:
    """||quantised - exact|| / ||exact|| of the outputs, if the errors of layers are independent."""
    return sum(one.error for name, one in observed.layers.items() if name not in kept) ** 0.5


def quantize(path: Path, observed: Observed, kept: Collection[str], dtype: str) -> Quantized:
    """Write a graph again in 8 bits.

    Args:
        path: an exported model.onnx in fp16, with its weights beside it.
        observed: what it was seen doing.
        kept: layers that stay in fp16.
        dtype: "int8" or "fp8".

    Raises:
        EngineError: the graph does not have a layer that was seen.
    """
    wanted = {name: one for name, one in observed.layers.items() if name not in kept}
    nodes = quantize_onnx(path, wanted, dtype)
    if missing := wanted.keys() - set(nodes.values()):
        raise EngineError(
            f"{path.parent.name} was exported without {min(missing)}, which was calibrated. Use "
            "--dtype fp16, or report this."
        )
    return Quantized(observed, nodes, tuple(sorted(kept)))


def quantize_onnx(path: Path, layers: Mapping[str, Layer], dtype: str) -> dict[str, str]:
    """Write the graph again, with these layers in 8 bits.

    Args:
        path: an exported model.onnx in fp16, with its weights beside it.
        layers: by path in the exported module.
        dtype: of convolutions and matrix products; attention is in FP8.

    Returns:
        The layers that the graph has, by the names of their nodes.
    """
    model = onnx.load(path)
    quantizer = _Quantizer(model.graph, dtype)
    done = {}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        name = _path_of(node)
        if name in layers and quantizer.takes(node):
            nodes += quantizer.quantize(node, layers[name])
            done[node.name] = name
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    quantizer.store_tensors()
    path.with_name(ONNX_WEIGHTS).unlink()  # onnx would append to it
    onnx.save(model, path, save_as_external_data=True, location=ONNX_WEIGHTS)
    return done


def _path_of(node: NodeProto) -> str:
    """Of the module that a node was traced in."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            return literal_eval(entry.value)[-2]
    return ""


class _Quantizer:
    """The tensors of a graph that are given in 8 bits."""

    def __init__(self, graph: onnx.GraphProto, dtype: str) -> None:
        self._graph = graph
        self._dtype = dtype
        self._initializers = {one.name: one for one in graph.initializer}
        self._stored: dict[str, TensorProto] = {}
        self._known: set[str] = set()

    def takes(self, node: NodeProto) -> bool:
        """Whether there is a way to 8 bits: attention, or a layer with weights."""
        if node.op_type == "Attention":
            return True
        return node.op_type in _WITH_WEIGHTS and node.input[1] in self._initializers

    def quantize(self, node: NodeProto, layer: Layer) -> Iterator[NodeProto]:
        """Give a node its inputs in 8 bits, and yield the nodes that make them."""
        if node.op_type == "Attention":
            for index, maximum in enumerate(layer.maxima):
                yield from self._give(node, index, maximum, "fp8")
            return
        yield from self._give(node, 0, layer.maxima[0], self._dtype)
        yield from self._give_weight(node)

    def store_tensors(self) -> None:
        """Scales and weights of 8 bits in the place of weights that no node reads any more."""
        read = {name for node in self._graph.node for name in node.input}
        kept = [one for name, one in self._initializers.items() if name in read]
        del self._graph.initializer[:]
        self._graph.initializer.extend([*kept, *self._stored.values()])

    def _give(self, node: NodeProto, index: int, maximum: float, dtype: str) -> Iterator[NodeProto]:
        """An activation; nodes that share one share its Q and DQ."""
        source = node.input[index]
        name = f"{source}/{dtype}"
        node.input[index] = f"{name}/dq"
        if name not in self._known:
            scale = self._store_scale(name, scale_of(maximum, dtype), dtype)
            yield helper.make_node("QuantizeLinear", [source, *scale], [f"{name}/q"], f"{name}/Q")
            yield self._dequantize(name, scale)

    def _give_weight(self, node: NodeProto) -> Iterator[NodeProto]:
        source = node.input[1]
        name = f"{source}/{self._dtype}"
        node.input[1] = f"{name}/dq"
        if name not in self._known:
            weight = numpy_helper.to_array(self._initializers[source]).astype(np.float32)
            scale = scale_of(np.abs(weight).max(), self._dtype)
            number, kind = _TYPES[self._dtype]
            whole = weight / np.float32(scale)
            whole = np.rint(whole) if self._dtype == "int8" else whole
            self._stored[f"{name}/q"] = helper.make_tensor(
                f"{name}/q", number, weight.shape, whole.astype(kind).tobytes(), raw=True
            )
            yield self._dequantize(name, self._store_scale(name, scale, self._dtype))

    def _dequantize(self, name: str, scale: list[str]) -> NodeProto:
        self._known.add(name)
        given = [f"{name}/q", *scale]
        return helper.make_node("DequantizeLinear", given, [f"{name}/dq"], f"{name}/DQ")

    def _store_scale(self, name: str, scale: np.float16, dtype: str) -> list[str]:
        """Names of the scale, without dimensions, and of a zero point, which sets the type."""
        number, _ = _TYPES[dtype]
        names = [f"{name}/scale", f"{name}/zero"]
        self._stored[names[0]] = numpy_helper.from_array(np.array(scale), names[0])
        self._stored[names[1]] = helper.make_tensor(names[1], number, (), b"\0", raw=True)
        return names


def scale_of(maximum: float, dtype: str) -> np.float16:
    """The smallest scale in fp16 with which no value up to the maximum is cut off.

    It is a normal number: a GPU may take smaller ones for zero.
    """
    exact = float(maximum) / LIMITS[dtype]
    scale = np.float16(exact)
    if float(scale) < exact:
        scale = np.nextafter(scale, np.float16(np.inf))
    return max(scale, np.finfo(np.float16).tiny)
