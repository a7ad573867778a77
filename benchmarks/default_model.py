"""Does the default model draw what it is asked for? Draws every concept once, with seed 0.

    python benchmarks/default_model.py --emoji-dir runs/emoji/data

A picture counts as recognised when, of all the real emoji of the vocabulary, the one that was asked
for is the nearest in squared pixel distance. Writes JSON and one grid of all pictures.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from encache.runtime.machine import describe_machine
from encache.runtime.pipeline import EncachePipeline
from encache.train.emoji import CONCEPT_CATEGORIES, TWEMOJI, load_images, read_emoji

STEPS, GUIDANCE_SCALE, COLUMNS = 50, 2.0, 20


def draw(pipeline: EncachePipeline, prompts: list[str], stride: int) -> torch.Tensor:
    """Pictures [N, 3, 64, 64] in [0, 1]."""
    pictures = [
        pipeline(
            prompt,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            stride=stride,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        for prompt in tqdm(prompts, desc=f"stride {stride}")
    ]
    return torch.cat(pictures)


def recognised(pictures: torch.Tensor, real: torch.Tensor, nearest: int) -> float:
    """Share of pictures whose own emoji is among the `nearest` real ones."""
    ranks = torch.cdist(pictures.flatten(1), real.flatten(1)).argsort(dim=1)
    own = torch.arange(len(pictures))[:, None]
    return (ranks[:, :nearest] == own).any(dim=1).float().mean().item()


def grid(pictures: torch.Tensor) -> Image.Image:
    """All pictures, row by row."""
    rows = math.ceil(len(pictures) / COLUMNS)
    canvas = np.full((rows * 64, COLUMNS * 64, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        y, x = index // COLUMNS * 64, index % COLUMNS * 64
        canvas[y : y + 64, x : x + 64] = (picture.permute(1, 2, 0).numpy() * 255).round()
    return Image.fromarray(canvas)


def main() -> None:
    """Draw, count, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--emoji-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/default_model.json"))
    parser.add_argument("--grid", type=Path, default=Path("docs/samples.png"))
    options = parser.parse_args()
    twemoji = options.emoji_dir / TWEMOJI.word
    listed = read_emoji(options.emoji_dir, CONCEPT_CATEGORIES)
    concepts = [one for one in listed if twemoji in one.image.parents]
    prompts = [concept.captions[0] for concept in concepts]
    real = load_images(concepts) / 2 + 0.5
    pipeline = EncachePipeline.from_pretrained()
    pipeline.set_progress_bar_config(disable=True)
    report = {
        "machine": describe_machine(),
        "num_concepts": len(concepts),
        "steps": STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "recognised": {},
    }
    for stride in (1, 5, 10):
        pictures = draw(pipeline, prompts, stride)
        report["recognised"][f"stride {stride}"] = {
            f"nearest {count}": recognised(pictures, real, count) for count in (1, 5)
        }
        if stride == 5:
            grid(pictures).quantize(256).save(options.grid, optimize=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["recognised"], indent=1))


if __name__ == "__main__":
    main()
