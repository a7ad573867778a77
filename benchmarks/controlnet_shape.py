"""The encoder of Stable Diffusion v1.5 with a ControlNet's residuals, compiled for an RTX 4090.

    python benchmarks/controlnet_shape.py       # writes benchmarks/sd15_controlnet_rtx4090.json

Random weights in fp16, the cut mid, 512x512, one picture with guidance. The decoder is told nothing
of a ControlNet; it is the one of benchmarks/sd15_rtx4090_mid.json. Takes about two minutes on a CPU
of its own, 4 GB of memory and of disk, and `pip install ".[rtx]"`.
"""

import resource
import tempfile
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from encache.contract.library import describe_library
from encache.contract.target import Target
from encache.evaluate.machine import describe_machine
from encache.evaluate.random_weights import SHAPES
from encache.export.graphs import denoiser_graphs, write_onnx
from encache.export.trt import Compiler, profile
from encache.files import write_json
from encache.model.spec import ImageSpec

RESULT = Path(__file__).with_name("sd15_controlnet_rtx4090.json")
BACKEND, CAPABILITY = "tensorrt-rtx", "8.9"


def main() -> None:
    """Export, compile, and note what that took."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    unet = UNet2DConditionModel(**SHAPES["sd15"].unet).eval()
    torch.set_default_dtype(torch.float32)
    encoder = denoiser_graphs(unet, "mid", controlled=True)[0]
    spec = ImageSpec(4, (64, 64), 8, 0.18215)
    target = Target(describe_library(BACKEND), (CAPABILITY,), (2, 2), 10, (512, 512), (512, 512))
    sizes = {"B": 2, "K": 3, "L": 77, "M": 2, "h": 64, "w": 64}
    with tempfile.TemporaryDirectory() as folder:
        start, cpu = time.perf_counter(), time.process_time()
        path = write_onnx(encoder, Path(folder), sizes)
        exported, cpu_exported = time.perf_counter(), time.process_time()
        del unet
        compiler = Compiler(BACKEND, path)
        compiled = compiler.compile(profile(encoder.spec, target, spec, 77), (CAPABILITY,))
        done, cpu_done = time.perf_counter(), time.process_time()
    report = {
        "machine": describe_machine(),
        "compute_capability": CAPABILITY,
        "residuals": sum(one.name.startswith("residual_") for one in encoder.spec.inputs),
        "export_seconds": exported - start,
        "export_cpu_seconds": cpu_exported - cpu,
        "compile_seconds": done - exported,
        "compile_cpu_seconds": cpu_done - cpu_exported,
        "engine_bytes": len(bytes(compiled.engine)),
        "scratch_bytes": compiled.scratch_bytes,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    write_json(RESULT, report)
    print(report)


if __name__ == "__main__":
    main()
