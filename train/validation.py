"""Pictures that show how a training run is doing."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image


def sample_grid(
    pipeline: Any, prompts: Sequence[str], columns: int, seed: int = 0, **options: Any
) -> Image.Image:
    """One picture per prompt, row by row; the options are the pipeline's."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), columns):  # a row at a time bounds the memory
        row = list(prompts[start : start + columns])
        generators = [torch.Generator().manual_seed(seed) for _ in row]
        images += pipeline(row, generator=generators, **options).images
    width, height = images[0].size
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * width, index // columns * height))
    return grid
