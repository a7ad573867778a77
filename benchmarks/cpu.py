"""Does the cache pay on a CPU what its arithmetic promises? Writes JSON, prints the table last.

    python benchmarks/cpu.py --output benchmarks/cpu.json

For the default model and for Stable Diffusion v1.5's shape with random weights (smaller pictures,
so that 50 full calls end), at every cut: seconds per image of stride 1 and stride 10 with
ONNX Runtime and of stride 10 with PyTorch, interleaved, medians over the repetitions, and the share
of the time spent outside the engines. The prediction counts multiply-accumulates of the UNet only.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from encache.export.build import Request, build_engines
from encache.model.arithmetic import count_arithmetic
from encache.model.checkpoint import Checkpoint, find_checkpoint, load_pipeline
from encache.model.features import CUTS
from encache.model.random_weights import SD15_UNET, SD15_VAE
from encache.runtime.bench import TimedEngines
from encache.runtime.machine import describe_machine
from encache.runtime.pipeline import EncachePipeline

STEPS = 50
STRIDE = 10


def make_sd15_shape(folder: Path) -> Checkpoint:
    """Stable Diffusion v1.5 with random weights and the default model's tokenizer."""
    default = load_pipeline(find_checkpoint())
    torch.manual_seed(0)
    length = default.tokenizer.model_max_length
    pipeline = StableDiffusionPipeline(
        unet=UNet2DConditionModel(**SD15_UNET),
        vae=AutoencoderKL(**SD15_VAE),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(hidden_size=768, num_attention_heads=12, max_position_embeddings=length)
        ),
        tokenizer=default.tokenizer,
        scheduler=default.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return find_checkpoint(folder)


def timed_image(
    pipeline: EncachePipeline, stride: int, size: int, seed: int, steps: int = STEPS
) -> dict:
    """Seconds of one image, in all and inside each part of the engines."""
    timed = TimedEngines(pipeline.engines)
    original, pipeline.engines = pipeline.engines, timed
    start = time.perf_counter()
    pipeline(
        "red apple",
        height=size,
        width=size,
        num_inference_steps=steps,
        stride=stride,
        generator=torch.Generator().manual_seed(seed),
    )
    seconds = time.perf_counter() - start
    pipeline.engines = original
    return {"seconds": seconds, **timed.seconds()}


def measure(checkpoint: Checkpoint, cut: str, size: int, repeats: int, engine_dir: Path) -> dict:
    """All figures of one model at one cut."""
    plain = load_pipeline(checkpoint)
    engines = EncachePipeline.from_engines(build_engines(Request(checkpoint, cut), engine_dir))
    eager = EncachePipeline.from_pipe(plain, cut)
    for pipeline in (engines, eager):
        pipeline.set_progress_bar_config(disable=True)
    ways = {
        "onnxruntime stride 1": (engines, 1),
        f"onnxruntime stride {STRIDE}": (engines, STRIDE),
        f"torch stride {STRIDE}": (eager, STRIDE),
    }
    for pipeline, stride in ways.values():
        timed_image(pipeline, stride, size, seed=0, steps=2 * stride)
    runs = {name: [] for name in ways}
    for seed in range(repeats):
        for name, (pipeline, stride) in ways.items():
            runs[name].append(timed_image(pipeline, stride, size, seed))
    medians = {
        name: {part: statistics.median(run[part] for run in images) for part in images[0]}
        for name, images in runs.items()
    }
    height, width = engines.latent_size(size, size)
    length = plain.tokenizer.model_max_length
    cost = count_arithmetic(plain.unet.config, cut, height, width, length)
    full, cached = (
        sum(medians[name][part] for part in ("encode", "decode")) for name in list(ways)[:2]
    )
    predicted = STEPS * cost.full / (STEPS / STRIDE * cost.encoder + STEPS * cost.decoder)
    ours = medians[f"onnxruntime stride {STRIDE}"]
    outside = [
        1 - sum(seconds for part, seconds in run.items() if part != "seconds") / run["seconds"]
        for run in runs[f"onnxruntime stride {STRIDE}"]
    ]
    return {
        "cut": cut,
        "size": size,
        "repeats": repeats,
        "gflop_per_row": {"encoder": cost.encoder, "decoder": cost.decoder},
        "medians": medians,
        "runs": runs,
        "predicted_speedup": predicted,
        "measured_speedup_unet": full / cached,
        "measured_speedup_image": medians["onnxruntime stride 1"]["seconds"] / ours["seconds"],
        "outside_engines": statistics.median(outside),
        "onnxruntime_over_torch": medians[f"torch stride {STRIDE}"]["seconds"] / ours["seconds"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/cpu.json"))
    parser.add_argument("--sd-size", type=int, default=128, help="pixels of the v1.5 shape")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sd-repeats", type=int, default=2)
    options = parser.parse_args()
    report = {"machine": describe_machine(), "steps": STEPS, "stride": STRIDE, "models": {}}
    # Four cuts of the v1.5 shape are 16 GB of engines: built beside the model, then deleted.
    with tempfile.TemporaryDirectory() as temporary:
        models = {
            "default": (find_checkpoint(), 64, options.repeats),
            "sd15-shape": (
                make_sd15_shape(Path(temporary, "sd15")),
                options.sd_size,
                options.sd_repeats,
            ),
        }
        for name, (checkpoint, size, repeats) in models.items():
            report["models"][name] = [
                measure(checkpoint, cut, size, repeats, Path(temporary, "engines")) for cut in CUTS
            ]
            options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{'model':12}{'cut':6}{'s/image':>9}{'predicted':>11}{'UNet':>8}{'image':>8}", end="")
    print(f"{'outside':>9}{'vs torch':>10}")
    for name, rows in report["models"].items():
        for row in rows:
            seconds = row["medians"][f"onnxruntime stride {STRIDE}"]["seconds"]
            print(
                f"{name:12}{row['cut']:6}{seconds:9.3f}{row['predicted_speedup']:10.2f}x"
                f"{row['measured_speedup_unet']:7.2f}x{row['measured_speedup_image']:7.2f}x"
                f"{row['outside_engines']:9.1%}{row['onnxruntime_over_torch']:9.2f}x"
            )


if __name__ == "__main__":
    main()
