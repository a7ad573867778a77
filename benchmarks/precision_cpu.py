"""One guided call of the default model's UNet on a CPU, in every precision that there is for it.

    python benchmarks/precision_cpu.py          # writes benchmarks/precision_cpu.json

All contenders take turns. ONNX Runtime and OpenVINO get the same graph in fp32; "fixed" has its
shapes written into it. INT8 is ONNX Runtime's own dynamic quantisation, and for OpenVINO the graph
that `encache-export --dtype int8` compiles, with attention left as it is. Errors are those of the
noise against PyTorch, over calls of whole pictures. Whole pictures, and Stable Diffusion v1.5's
shape, are measured by encache-bench.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

from encache.contract.calibration import make_calibration
from encache.contract.dtypes import tensor_dtype
from encache.contract.manifest import ONNX
from encache.evaluate.machine import describe_machine
from encache.export.calibrate import Observed, Sample, Trajectories
from encache.export.graphs import Graph, pipeline_graphs, write_onnx
from encache.export.quantize import choose_kept, quantize
from encache.files import write_json
from encache.model.checkpoint import find_checkpoint
from encache.model.loading import load_pipeline
from encache.runtime.openvino import load_openvino

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Arrays], np.ndarray]
STATIC = "OpenVINO, INT8, the rest in bf16"
STEPS = 10  # of the pictures that it is calibrated on, whose calls are timed


def session(path: Path, threads: int) -> Run:
    """A graph in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    opened = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: opened.run(None, inputs)[0]


def compiled(path: Path, threads: int, precision: str, shapes: Mapping[str, Any]) -> Run:
    """A graph in OpenVINO; with fixed shapes, as this project's backend has it, if there are."""
    core = load_openvino().Core()
    model = core.read_model(path)
    if shapes:
        model.reshape(shapes)
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    request = core.compile_model(model, "CPU", options).create_infer_request()
    return lambda inputs: request.infer(inputs, share_inputs=True)[0]


def export(
    graphs: Mapping[str, Graph], observed: Observed, latents: torch.Tensor, folder: Path
) -> dict[str, Path]:
    """The denoiser in fp32 and in INT8, the latter in both libraries' ways."""
    sizes = {"B": 2, "L": 77, "h": latents.shape[-2], "w": latents.shape[-1]}
    paths = {}
    for name, graph in graphs.items():
        (folder / name).mkdir()
        paths[name] = write_onnx(graph, folder / name, sizes)
    copied = shutil.copytree(folder / "fp16", folder / "static") / ONNX
    attention = {name for name, one in observed.layers.items() if one.is_attention}
    quantize(copied, observed, choose_kept(observed, 0.15, fp8=True) | attention, "int8")
    (folder / "dynamic").mkdir()
    dynamic = folder / "dynamic" / ONNX
    kinds = ["Conv", "MatMul", "Gemm"]  # what it makes of Attention, it cannot load
    quantize_dynamic(
        paths["fp32"], dynamic, op_types_to_quantize=kinds, weight_type=QuantType.QInt8
    )
    return {**paths, "static": copied, "dynamic": dynamic}


def contenders(
    paths: Mapping[str, Path], shapes: Mapping[str, Any], threads: int
) -> dict[str, Run]:
    """Everything that is timed, ONNX Runtime in fp32 first; `STATIC` takes inputs in fp16."""
    return {
        "ONNX Runtime, fp32": session(paths["fp32"], threads),
        "ONNX Runtime, INT8, dynamic": session(paths["dynamic"], threads),
        "OpenVINO, fp32": compiled(paths["fp32"], threads, "f32", {}),
        "OpenVINO, bf16": compiled(paths["fp32"], threads, "bf16", {}),
        "OpenVINO, bf16, fixed": compiled(paths["fp32"], threads, "bf16", shapes),
        STATIC: compiled(paths["static"], threads, "bf16", shapes),
    }


def given(sample: Sample, graph: Graph) -> Arrays:
    """A sample's inputs in the dtypes of a graph."""
    inputs, _ = sample
    return {
        one.name: inputs[one.name].to(tensor_dtype(one, graph.dtype)).numpy()
        for one in graph.spec.inputs
    }


def measure(
    runs: Mapping[str, Run], inputs: Mapping[str, list[Arrays]], expected: list[Any], repeats: int
) -> list[dict[str, Any]]:
    """Milliseconds of a call, and the error of the noise."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    squares = dict.fromkeys(runs, 0.0)
    for index, exact in enumerate(expected):  # which is the warm-up, too
        for name, run in runs.items():
            squares[name] += np.square(run(inputs[name][index]).astype(np.float32) - exact).sum()
    for repeat in range(repeats):
        for name, run in runs.items():
            one = inputs[name][repeat % len(expected)]
            start = time.perf_counter()
            run(one)
            seconds[name].append(time.perf_counter() - start)
    norm = sum(np.square(exact).sum() for exact in expected)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    return [
        {
            "contender": name,
            "milliseconds": 1e3 * medians[name],
            "spread": [1e3 * min(times), 1e3 * max(times)],
            "speed": first / medians[name],
            "error": float(np.sqrt(squares[name] / norm)),
        }
        for name, times in seconds.items()
    ]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("benchmarks/precision_cpu.json"))
    options = parser.parse_args()
    checkpoint = find_checkpoint()
    pipeline = load_pipeline(checkpoint, torch.float32)
    calibration = replace(make_calibration(checkpoint), steps=STEPS)
    drawn = Trajectories(pipeline, calibration, checkpoint.guidance_scale)
    graphs = {"fp32": pipeline_graphs(pipeline, "none")[0]}
    observed = drawn.observe([graphs["fp32"]], "int8")["unet"]
    half = load_pipeline(checkpoint, torch.float16)
    graphs["fp16"] = pipeline_graphs(half, "none")[0]
    samples = observed.samples
    shapes = {name: list(one.shape) for name, one in given(samples[0], graphs["fp32"]).items()}
    with tempfile.TemporaryDirectory() as folder:
        paths = export(graphs, observed, samples[0][0]["latents"], Path(folder))
        runs = contenders(paths, shapes, options.threads)
        inputs = {
            name: [given(one, graphs["fp16" if name == STATIC else "fp32"]) for one in samples]
            for name in runs
        }
        expected = [one.numpy() for _, (one,) in samples]
        rows = measure(runs, inputs, expected, options.repeats)
    facts = {"repeats": options.repeats, "threads": options.threads, "samples": len(samples)}
    write_json(options.output, {"machine": describe_machine(), **facts, "rows": rows})


if __name__ == "__main__":
    main()
