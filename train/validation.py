"""Pictures that show how a training run is doing."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image


def sample_grid(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], columns: int, seed: int = 0
) -> Image.Image:
    """One picture per prompt, row by row, 50 steps of the pipeline's solver with guidance 4."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), columns):  # a row at a time bounds the memory
        row = list(prompts[start : start + columns])
        generators = [torch.Generator().manual_seed(seed) for _ in row]
        images += pipeline(row, guidance_scale=4.0, generator=generators).images
    width, height = images[0].size
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * width, index // columns * height))
    return grid
