"""Draw docs/samples.png: some of the default model's names, a row for each style.

    python benchmarks/samples.py

Every picture has seed 0 and the settings that encache-run takes by default.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from encache.runtime.pipeline import EncachePipeline

STYLES = ("flat", "shaded", "3d")
NAMES = (
    *("red apple", "hot dog", "octopus", "butterfly", "slice of pizza", "penguin", "strawberry"),
    *("sunflower", "cactus", "whale", "doughnut", "lady beetle", "avocado", "tropical fish"),
    *("mushroom", "watermelon"),
)


def main() -> None:
    """Draw row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/samples.png"))
    options = parser.parse_args()
    pipeline = EncachePipeline.from_pretrained()
    height, width = pipeline.spec.picture_size
    grid = Image.new("RGB", (len(NAMES) * width, len(STYLES) * height))
    for row, style in enumerate(STYLES):
        images = pipeline(
            [f"{style} {name}" for name in NAMES],
            generator=[torch.Generator().manual_seed(0) for _ in NAMES],
        ).images
        for column, image in enumerate(images):
            grid.paste(image, (column * width, row * height))
    grid.quantize(256).save(options.output, optimize=True)


if __name__ == "__main__":
    main()
