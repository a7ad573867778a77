"""Does an exported graph compute what PyTorch computes?"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import onnxruntime
import torch
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.logger import G_LOGGER

from encache.contract.dtypes import tensor_dtype
from encache.export.calibrate import Sample
from encache.export.graphs import Graph, Sizes


def measure_parity(graph: Graph, path: Path, traced: Sizes) -> float:
    """Largest ||graph - eager|| / ||eager|| over the outputs, on fresh random inputs.

    The sizes differ from those traced: odd and not square, so that a frozen dimension shows. The
    reference computes in fp32, also with weights that were rounded to fp16.

    Args:
        graph: in the dtype of its export.
        path: the exported model.onnx, run by ONNX Runtime on the CPU.
        traced: the sizes of the export; about half of the latents' is tried.
    """
    height, width = traced["h"] // 2 + 1, traced["w"] // 2
    sizes = {**traced, "B": 3, "K": 2, "M": 3, "h": height, "w": width}
    inputs = graph.draw(torch.Generator().manual_seed(1), sizes)
    with torch.inference_mode():
        eager = _in_fp32(graph.module)(_widen(inputs))
    eager = (eager,) if isinstance(eager, torch.Tensor) else eager
    return measure_error(graph, path, [(inputs, eager)])


def measure_error(graph: Graph, path: Path, samples: Sequence[Sample]) -> float:
    """Largest ||graph - expected|| / ||expected|| over the outputs, each over all samples.

    Args:
        graph: in the dtype of its export.
        path: the exported model.onnx, run by ONNX Runtime on the CPU.
        samples: inputs, and the outputs that are expected.
    """
    squares = torch.zeros(len(graph.spec.outputs), 2)
    with G_LOGGER.verbosity(G_LOGGER.ERROR), OnnxrtRunner(_open_session(path)) as runner:
        for inputs, expected in samples:
            given = {
                one.name: inputs[one.name].to("cpu", tensor_dtype(one, graph.dtype))
                for one in graph.spec.inputs
            }
            outputs = runner.infer({name: one.numpy() for name, one in given.items()})
            for index, (spec, one) in enumerate(zip(graph.spec.outputs, expected, strict=True)):
                apart = torch.from_numpy(outputs[spec.name]).float() - one.cpu()
                squares[index] += torch.stack([apart.square().sum(), one.cpu().square().sum()])
    # Unlike Python's, torch's max keeps a NaN.
    return (squares[:, 0] / squares[:, 1]).sqrt().max().item()


def _in_fp32(module: torch.nn.Module) -> torch.nn.Module:
    """The module, or a widened copy of it that makes room again once it has run."""
    if all(one.dtype == torch.float32 for one in module.parameters()):
        return module
    return deepcopy(module).float()


def _widen(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same inputs, numbers in fp32."""
    return {name: one.float() if one.is_floating_point() else one for name, one in inputs.items()}


def _open_session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        path,
        providers=["CPUExecutionProvider"],
        # Folding would keep a second copy of fp16 weights, widened to the CPU's fp32.
        disabled_optimizers=["ConstantFolding"],
    )
