"""Compile Stable Diffusion v1.5's shape in fp16, INT8 and FP8 for an RTX 4090, without one.

    python -m encache.evaluate.random_weights sd15 runs/sd15-shape      # 2 GB
    python benchmarks/precision_engines.py

Writes benchmarks/precision_engines.json: of the whole denoiser, both halves at two cuts and the
image decoder, how long compiling takes, how much memory, how large the engine is, and which share
of the arithmetic the compiler puts in 8 bits. Each graph is compiled in a process of its own.

The weights are random, so there is nothing to calibrate: all scales are alike, and whatever may
compute in 8 bits does. `encache-export` keeps up to 15 % of the arithmetic in fp16.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peaks import milliseconds

from encache.contract.manifest import ONNX
from encache.contract.target import GPUS, make_target
from encache.evaluate.machine import describe_machine
from encache.export.build import Report
from encache.export.calibrate import Observed, observe_shapes
from encache.export.graphs import Graph, pipeline_graphs, write_onnx
from encache.export.quantize import quantize
from encache.export.trt import CompiledLayer, Compiler, Shapes, profile
from encache.files import write_json
from encache.model.checkpoint import Checkpoint, find_checkpoint
from encache.model.loading import load_pipeline
from encache.model.spec import Cut, ImageSpec

BACKEND, GPU = "tensorrt-rtx", "rtx-4090"
CUTS: tuple[Cut, ...] = ("none", "mid", "up2")
DTYPES = ("int8", "fp8")
FOLDER = Path("runs/precision_engines")
Row = dict[str, Any]


@dataclass(frozen=True)
class Exported:
    """A graph in fp16.

    Attributes:
        folder: where it is.
        shapes: that it is compiled for.
        observed: what one of its runs computes.
    """

    folder: Path
    shapes: dict[str, Shapes]
    observed: Observed


def export(checkpoint: Checkpoint, folder: Path) -> dict[tuple[Cut, str], Exported]:
    """Write each graph in fp16, once, by its cut and name."""
    pipeline = load_pipeline(checkpoint, torch.float16)
    spec = ImageSpec.of(pipeline.unet.config, pipeline.vae.config)
    length = pipeline.tokenizer.model_max_length
    height, width = spec.sample_size
    sizes = {"B": 2, "K": 3, "L": length, "M": 2, "h": height, "w": width}
    for cut in CUTS:
        for graph in eligible(pipeline, cut):
            place = folder / cut / graph.spec.name
            if not (place / ONNX).exists():
                place.mkdir(parents=True, exist_ok=True)
                write_onnx(graph, place, sizes)
    for module in (pipeline.unet, pipeline.vae):
        module.to("meta")
    exported = {}
    for cut in CUTS:
        target = make_target(checkpoint, BACKEND, cut, compute_capabilities=(GPUS[GPU],))
        for graph in eligible(pipeline, cut):
            name = graph.spec.name
            shapes = profile(graph.spec, target, spec, length)
            rows = 1 if name == "vae_decoder" else 2
            observed = observe_shapes(graph, {**sizes, "B": rows, "K": 1})
            exported[cut, name] = Exported(folder / cut / name, shapes, observed)
    return exported


def eligible(pipeline: Any, cut: Cut) -> list[Graph]:
    """Of a cut, the graphs that may compute in 8 bits; the image decoder once."""
    graphs = [one for one in pipeline_graphs(pipeline, cut) if "text" not in one.spec.name]
    return [one for one in graphs if cut == "none" or one.spec.name != "vae_decoder"]


def compile_apart(path: Path, shapes: Any) -> Row:
    """What `compile_here` finds, in a process whose memory is its own."""
    command = [sys.executable, __file__, "--compile", str(path), "--shapes", json.dumps(shapes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def compile_here(path: Path, shapes: Any) -> Row:
    """Compile one graph, and say what that took, in the processor's own time."""
    start = time.process_time()
    compiled = Compiler(BACKEND, path).compile(shapes, (GPUS[GPU],), detailed=True)
    return {
        "seconds": time.process_time() - start,
        "peak_bytes": peak_bytes(),
        "engine_bytes": compiled.engine.nbytes,
        "scratch_bytes": compiled.scratch_bytes,
        "layers": compiled.layers,
    }


def peak_bytes() -> int:
    """Most memory that this process had; what getrusage says begins with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (one for one in lines if one.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def rows_of(checkpoint: Checkpoint, folder: Path, report: Report) -> Iterator[Row]:
    """Every graph in every precision."""
    for (cut, name), graph in export(checkpoint, folder).items():
        facts = {"graph": name, "cut": cut}
        report(f"{name}, cut {cut}, fp16")
        row = compile_apart(graph.folder / ONNX, graph.shapes)
        del row["layers"]
        everything = milliseconds(graph.observed, graph.observed.layers, "fp16")
        yield {**facts, "dtype": "fp16", **row, "milliseconds": everything}
        for dtype in DTYPES:
            report(f"{name}, cut {cut}, {dtype}")
            copied = shutil.copytree(graph.folder, folder / "quantized", dirs_exist_ok=True)
            quantized = quantize(copied / ONNX, graph.observed, (), dtype)
            row = compile_apart(copied / ONNX, graph.shapes)
            layers = [CompiledLayer(*one) for one in row.pop("layers")]
            judged = quantized.judge(layers)
            yield {
                **facts,
                "dtype": dtype,
                **row,
                "share": judged.share,
                "meant": len(quantized.nodes),
                "fallen_back": judged.fallen_back,
                "milliseconds": milliseconds(graph.observed, judged.fallen_back, dtype),
            }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", type=Path, default=Path("runs/sd15-shape"))
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for graphs: 8 GB")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/precision_engines.json"))
    parser.add_argument("--compile", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shapes", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        print(json.dumps(compile_here(options.compile, options.shapes)))
        return
    rows: list[Row] = []
    checkpoint = find_checkpoint(options.ckpt)
    for row in rows_of(checkpoint, options.folder, lambda line: print(line, file=sys.stderr)):
        rows.append(row)
        content = {"machine": describe_machine(), "gpu": GPU, "rows": rows}
        write_json(options.output, content)


if __name__ == "__main__":
    main()
