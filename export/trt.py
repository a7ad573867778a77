"""From an ONNX graph to a TensorRT engine, by TensorRT-RTX or by standard TensorRT.

TensorRT-RTX compiles for named GPUs on any machine, also without one, and finishes each engine on
its GPU when it is first loaded. Standard TensorRT compiles on the GPU that will run the engine.
Both are strongly typed: the precision is the graph's.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from encache.contract.library import describe_library, load_library
from encache.contract.target import Span, Target
from encache.errors import EngineError
from encache.files import write_atomically
from encache.model.spec import GraphSpec, ImageSpec

#: Smallest, preferred and largest shape of an input.
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
#: Ring slots that one blend or another uses.
_SLOTS: Span = (1, 2)
#: Of attention's weights, which lie between 0 and 1, in FP8, whose largest number is 448. Lasts as
#: long as the module: the library does not copy it.
_NORMALIZATION_SCALE = np.array(1 / 448, np.float16)
#: A line of what the library tells about an engine; kernels of its own have other names.
_LAYER = re.compile(
    r"^Name: (\S+), LayerType: \w+, Inputs: \[ \{[^}]*?Datatype: (\w+)", re.MULTILINE
)


def profile(
    graph: GraphSpec, target: Target, spec: ImageSpec, text_length: int
) -> dict[str, Shapes]:
    """Smallest, preferred and largest shape of each of the graph's inputs.

    The largest sizes are preferred: they are what the engines are asked for.
    """
    rows = target.rows
    if graph.name.startswith("text_encoder"):  # negative prompts come apart, and one serves all
        rows = (1, rows[1])
    elif graph.name == "vae_decoder":  # pictures are decoded one by one
        rows = (1, 1)
    spans: dict[str, Span] = {
        "B": rows,
        "K": (1, target.decode_calls or 1),
        "L": (text_length, text_length),
        "M": _SLOTS,
        "h": (target.height[0] // spec.downscale, target.height[1] // spec.downscale),
        "w": (target.width[0] // spec.downscale, target.width[1] // spec.downscale),
    }
    least, most = ({name: span[end] for name, span in spans.items()} for end in (0, 1))
    return {one.name: (one.size(least), one.size(most), one.size(most)) for one in graph.inputs}


class CompiledLayer(NamedTuple):
    """A layer of an engine.

    Attributes:
        name: of the graph's nodes in it, joined by "+", and a number; of some kernels their own.
        datatype: of its first input, such as "Half", "Int8" or "FP8".
    """

    name: str
    datatype: str


@dataclass(frozen=True)
class Compiled:
    """An engine.

    Attributes:
        engine: its bytes, in a buffer of the library's, not copied.
        scratch_bytes: memory that it needs beside its weights at its largest sizes.
        layers: its layers, where they were asked for.
    """

    engine: Any
    scratch_bytes: int
    layers: tuple[CompiledLayer, ...]


class Compiler:
    """One ONNX graph in a TensorRT library.

    Attributes:
        network: the library's own reading of the graph.

    Raises:
        EngineError: the library is missing, or does not know something in the graph.
    """

    def __init__(self, backend: str, path: Path) -> None:
        self._library = load_library(backend)
        self._name = describe_library(backend)
        self._logger = _make_logger(self._library)
        self._builder = self._library.Builder(self._logger)
        flag = self._library.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        self.network = self._builder.create_network(1 << int(flag))
        # The network refers to weights that the parser holds.
        self._parser = self._library.OnnxParser(self.network, self._logger)
        if not self._parser.parse_from_file(str(path)):
            errors = map(self._parser.get_error, range(self._parser.num_errors))
            reasons = "; ".join(f"{error.node_operator()}: {error.desc()}" for error in errors)
            raise EngineError(f"{self._name} cannot read {path}: {reasons}")
        self._prepare_attention()

    @property
    def inputs(self) -> dict[str, Any]:
        """The network's inputs by name."""
        tensors = map(self.network.get_input, range(self.network.num_inputs))
        return {tensor.name: tensor for tensor in tensors}

    @property
    def outputs(self) -> dict[str, Any]:
        """The network's outputs by name."""
        tensors = map(self.network.get_output, range(self.network.num_outputs))
        return {tensor.name: tensor for tensor in tensors}

    def compile(
        self,
        shapes: Mapping[str, Shapes],
        compute_capabilities: Sequence[str] = (),
        timing_cache: Path | None = None,
        detailed: bool = False,
    ) -> Compiled:
        """Compile for these shapes.

        Args:
            shapes: of each input.
            compute_capabilities: of GPUs that need not be there, with TensorRT-RTX alone; without
                any, this machine's GPU is compiled for.
            timing_cache: what standard TensorRT has learned from trying kernels on this GPU, read
                and written; a file of another GPU or version is ignored.
            detailed: also read the layers, which then have names inside the engine.

        Raises:
            EngineError: the library gives up; the message has its reason.
        """
        config = self._builder.create_builder_config()
        if compute_capabilities:
            config.num_compute_capabilities = len(compute_capabilities)
            for index, number in enumerate(compute_capabilities):
                member = f"SM{number.replace('.', '')}"
                config.set_compute_capability(
                    getattr(self._library.ComputeCapability, member), index
                )
        # All memory then comes from the caller, without which no CUDA graph can be captured.
        if hasattr(self._library.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            config.set_flag(self._library.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if detailed:
            config.profiling_verbosity = self._library.ProfilingVerbosity.DETAILED
        optimization = self._builder.create_optimization_profile()
        for name in self.inputs:
            optimization.set_shape(name, *shapes[name])
        config.add_optimization_profile(optimization)
        if timing_cache:
            known = timing_cache.read_bytes() if timing_cache.is_file() else b""
            if not config.set_timing_cache(config.create_timing_cache(known), False):
                config.set_timing_cache(config.create_timing_cache(b""), False)
        engine = self._builder.build_serialized_network(self.network, config)
        if engine is None:
            raise EngineError(f"{self._name} cannot compile the graph: {self._logger.complaint}.")
        if timing_cache:
            write_atomically(timing_cache, bytes(config.get_timing_cache().serialize()))
        return Compiled(engine, self._logger.scratch_bytes, self._logger.layers)

    def _prepare_attention(self) -> None:
        """Let it decompose where no fused kernel fits: wide heads at free sizes, or fp32.

        Where its inputs are dequantised, what it computes inside is quantised too.
        """
        layers = list(map(self.network.get_layer, range(self.network.num_layers)))
        kinds = self._library.LayerType
        dequantized = {one.get_output(0).name for one in layers if one.type == kinds.DEQUANTIZE}
        for layer in layers:
            if layer.type == kinds.ATTENTION_INPUT:
                layer.__class__ = self._library.IAttentionInputLayer  # the binding's way to cast
                layer.attention.decomposable = True
                # The parser scales the query and the key before they come here, but not the value.
                if layer.attention.get_input(2).name in dequantized:
                    self._quantize_normalization(layer.attention)

    def _quantize_normalization(self, attention: Any) -> None:
        """Without it, attention on inputs in FP8 is computed in half precision."""
        scale = self.network.add_constant((), self._library.Weights(_NORMALIZATION_SCALE))
        attention.normalization_quantize_scale = scale.get_output(0)
        attention.normalization_quantize_to_type = self._library.DataType.FP8


def _make_logger(library: Any) -> Any:
    """A logger that keeps what the library says only there: scratch memory, layers, complaints."""

    class Logger(library.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.complaint = "it does not say why"
            self.scratch_bytes = 0
            self.layers: tuple[CompiledLayer, ...] = ()

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.ERROR, library.ILogger.INTERNAL_ERROR):
                self.complaint = message.strip().rstrip(".")
            if found := re.match(r"Total Activation Memory: (\d+) bytes", message):
                self.scratch_bytes = int(found[1])
            if "LayerType: " in message:
                self.layers += tuple(CompiledLayer(*one) for one in _LAYER.findall(message))

    return Logger()
