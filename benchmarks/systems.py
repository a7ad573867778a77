"""Every pipeline of docs/pipelines.md, cached and from engines, on a small random model.

    python -m benchmarks.systems            # writes benchmarks/systems.json; what is there stays

For each: the counted arithmetic of a picture, full and cached, runs and seconds; its denoiser is
exported in two halves, drawn with from ONNX Runtime, and read by TensorRT-RTX, with --compile also
compiled for compute capability 8.9. Shares of the arithmetic are those of these small models.
Needs the tests' packages (`pip install ".[test,rtx]"`).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import encache
from encache.contract.library import describe_library
from encache.contract.manifest import ONNX, read_manifest
from encache.contract.target import Target, rows_of
from encache.evaluate.machine import describe_machine
from encache.export.build import Request, build_engines
from encache.export.trt import Compiler, profile
from encache.files import write_json
from encache.model.arithmetic import Arithmetic, count_arithmetic
from encache.model.checkpoint import Checkpoint, find_checkpoint
from encache.model.spec import NO_CUT
from encache.model.text import text_length
from encache.runtime.engines import TorchEngines
from tests.runtime.test_systems import STEPS, SYSTEMS, System, denoiser_of, draw

RESULT = Path(__file__).with_name("systems.json")
STRIDE = 5
RTX = "tensorrt-rtx"
#: Whose denoisers differ, by their names in tests/runtime/test_systems.py.
NAMES = (
    *("image", "inpainting, 4 channels", "inpainting, 9 channels", "xl refiner", "xl inpainting"),
    *("controlnet", "controlnet, xl", "latent consistency", "turbo", "if-1", "if-2", "dit"),
    *("text2video-zero", "videofusion"),
)


class Meter:
    """Sums the arithmetic of some functions, in MFLOP."""

    def __init__(self) -> None:
        self.mflop = 0.0

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose runs are counted."""

        @wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                result = function(*arguments, **options)
            self.mflop += counter.get_total_flops() / 1e6
            return result

        return run


@contextmanager
def metered(pipe: Any) -> Iterator[dict[str, Meter]]:
    """Count what the ControlNet and the codec compute."""
    meters = {"controlnet": Meter(), "codec": Meter()}
    controlnet, codec = getattr(pipe, "controlnet", None), getattr(pipe, "vae", None)
    with ExitStack() as stack:
        for meter, module, names in (
            (meters["controlnet"], controlnet, ("forward",)),
            (meters["codec"], codec, ("encode", "decode")),
        ):
            for name in names if module is not None else ():
                stack.enter_context(
                    patch.object(module, name, meter.of(getattr(module, name)), create=True)
                )
        yield meters


def rows_of_calls(pipe: Any, arguments: dict[str, Any]) -> list[tuple[int, ...]]:
    """Shape of the latents at each call of the untouched pipeline."""
    shapes = []
    hook = denoiser_of(pipe).register_forward_pre_hook(
        lambda _, given, named: shapes.append(tuple((given or [*named.values()])[0].shape)),
        with_kwargs=True,
    )
    draw(pipe, arguments)
    hook.remove()
    return shapes


@contextmanager
def counted(name: str) -> Iterator[list[int]]:
    """The rows of each run of a method of TorchEngines."""
    runs: list[int] = []
    method = getattr(TorchEngines, name)

    def run(self: TorchEngines, first: Any, *others: Any) -> Any:
        runs.append(len(first) if isinstance(first, Tensor) else 1)
        return method(self, first, *others)

    with patch.object(TorchEngines, name, run):
        yield runs


def timed(pipe: Any, arguments: dict[str, Any]) -> tuple[Tensor, float]:
    """What is drawn, and the seconds of a second time."""
    drawn = draw(pipe, arguments)
    start = time.perf_counter()
    draw(pipe, arguments)
    return drawn, time.perf_counter() - start


def arithmetic_of(pipe: Any, cut: str, shape: tuple[int, ...]) -> Arithmetic:
    """Of one row of latents of this shape."""
    frames = shape[2] if len(shape) == 5 else 1
    return count_arithmetic(
        denoiser_of(pipe), cut, *shape[-2:], text_length=text_length(pipe), num_frames=frames
    )


def measure_cache(pipe: Any, system: System, cut: str) -> dict[str, Any]:
    """One way to cache, beside the untouched pipeline."""
    shapes = rows_of_calls(pipe, system.arguments)
    arithmetic = arithmetic_of(pipe, cut, shapes[0])
    rows = sum(shape[0] for shape in shapes)
    full, full_seconds = timed(pipe, system.arguments)
    with metered(pipe) as meters:
        shown(pipe, system)
    encache.enable(pipe, STRIDE, cut=cut)
    cached, seconds = timed(pipe, system.arguments)
    key = "denoise" if cut == NO_CUT else "encode"
    with metered(pipe) as cached_meters, counted("decode") as decoded, counted(key) as evaluated:
        shown(pipe, system)
    encache.disable(pipe)
    others = {name: (meter.mflop, cached_meters[name].mflop) for name, meter in meters.items()}
    cached_denoiser = sum(evaluated) * arithmetic.encoder + rows * arithmetic.decoder
    return {
        "cut": cut,
        "calls": len(shapes),
        "encoder_runs": len(evaluated),
        "decoder_runs": len(decoded),
        "mflop": {"denoiser": (1e3 * rows * arithmetic.full, 1e3 * cached_denoiser), **others},
        "seconds": (full_seconds, seconds),
        "difference": float((cached - full).norm() / full.norm()),
    }


def shown(pipe: Any, system: System) -> None:
    """Draw pictures, not latents."""
    asked = {name: one for name, one in system.arguments.items() if name != "output_type"}
    texts = "prompt_embeds" in asked or "class_labels" in asked
    pipe(
        **asked,
        **({} if texts else {"prompt": "red apple"}),
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    )


def measure_engines(pipe: Any, system: System, folder: Path, compiling: bool) -> dict[str, Any]:
    """Both halves from ONNX Runtime beside PyTorch, and as TensorRT-RTX reads or compiles them."""
    pipe.save_pretrained(folder / "model")
    checkpoint = find_checkpoint(folder / "model", hosted=True)
    frames = system.arguments.get("num_frames", 0)
    start = time.process_time()
    engines = build_engines(Request(checkpoint, system.cut, frames=frames), folder / "engines")
    seconds = time.process_time() - start
    encache.enable(pipe, STRIDE, cut=system.cut)
    expected = draw(pipe, system.arguments)
    encache.enable(pipe, STRIDE, engines=engines)
    ours = draw(pipe, system.arguments)
    encache.disable(pipe)
    return {
        "export_seconds": seconds,
        "parity": read_manifest(engines).parity,
        "onnxruntime_error": float((ours - expected).norm() / expected.norm()),
        "tensorrt_layers": read_all(engines),
        **({"tensorrt_bytes": compile_all(checkpoint, engines)} if compiling else {}),
    }


def read_all(engines: Path) -> dict[str, int]:
    """Layers of each of the denoiser's graphs, as TensorRT-RTX reads it."""
    graphs = [one.name for one in read_manifest(engines).graphs if one.name.startswith("unet")]
    return {name: Compiler(RTX, engines / name / ONNX).network.num_layers for name in graphs}


def compile_all(checkpoint: Checkpoint, engines: Path) -> dict[str, int]:
    """Bytes of each of the denoiser's graphs, compiled for an RTX 4090."""
    manifest = read_manifest(engines)
    height, width = manifest.spec.picture_size
    rows = rows_of(checkpoint)
    target = Target(describe_library(RTX), ("8.9",), rows, STRIDE, (height,) * 2, (width,) * 2)
    sizes = {}
    for graph in manifest.graphs:
        if graph.name.startswith("unet"):
            compiler = Compiler(RTX, engines / graph.name / ONNX)
            shapes = profile(graph, target, manifest.spec, 16)
            sizes[graph.name] = len(bytes(compiler.compile(shapes, ("8.9",)).engine))
    return sizes


def main() -> None:
    """Measure what is not there yet, what costs little first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="also compile, for minutes each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {"systems": {}}
    for part in ("caches", "engines"):
        for name in NAMES:
            found = known["systems"].setdefault(name, {})
            if part not in found:
                found[part] = measure(name, part, options.compile)
                known["machine"], known["stride"] = describe_machine(), STRIDE
                write_json(RESULT, known)
                print(name, json.dumps(found[part]), flush=True)


def measure(name: str, part: str, compiling: bool) -> Any:
    """Both ways to cache of one system, or its engines."""
    system = SYSTEMS[name]
    pipe = system.make()
    if part == "caches":
        return [measure_cache(pipe, system, cut) for cut in (NO_CUT, system.cut)]
    with tempfile.TemporaryDirectory() as folder:
        return measure_engines(pipe, system, Path(folder), compiling)


if __name__ == "__main__":
    main()
