"""The recipe of the default model, from the emoji package to a diffusers folder."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from encache.train import autoencoder as autoencoder_recipe
from encache.train import denoiser as denoiser_recipe
from encache.train.emoji import (
    AUTOENCODER_CATEGORIES,
    CONCEPT_CATEGORIES,
    load_images,
    read_emoji,
)
from encache.train.text import train_tokenizer


def train_default_model(
    package: Path,
    work: Path,
    output: Path,
    autoencoder_steps: int = autoencoder_recipe.RECIPE.steps,
    denoiser_steps: int = denoiser_recipe.RECIPE.steps,
) -> StableDiffusionPipeline:
    """Train tokenizer, autoencoder, text encoder and UNet; write them to `output` in fp16.

    `work` keeps the checkpoints, so an interrupted run goes on where it stopped.
    """
    work.mkdir(parents=True, exist_ok=True)
    autoencoder = autoencoder_recipe.train_autoencoder(
        load_images(read_emoji(package, AUTOENCODER_CATEGORIES)),
        work / "autoencoder.pt",
        replace(autoencoder_recipe.RECIPE, steps=autoencoder_steps),
    )
    concepts = read_emoji(package, CONCEPT_CATEGORIES)
    captions = [one.captions for one in concepts]
    tokenizer = train_tokenizer(caption for names in captions for caption in names)
    latents = autoencoder_recipe.encode(autoencoder, load_images(concepts))
    model = denoiser_recipe.train_denoiser(
        denoiser_recipe.CaptionedLatents(latents, captions),
        tokenizer,
        work / "denoiser.pt",
        replace(denoiser_recipe.RECIPE, steps=denoiser_steps),
    )
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=denoiser_recipe.make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    samples = [names[0] for names in captions[:: max(1, len(captions) // 32)]][:32]
    grid = sample_grid(pipeline, samples, columns=8)
    pipeline.to(torch.float16).save_pretrained(output)
    _load_in_float32(output / "text_encoder" / "config.json")
    grid.save(output / "samples.png")
    return pipeline.to(torch.float32)


def _load_in_float32(config: Path) -> None:
    """Let transformers open the fp16 weights in float32 by default, as diffusers opens its own."""
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2))


def sample_grid(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], columns: int, seed: int = 0
) -> Image.Image:
    """One picture per prompt, row by row, 50 DDIM calls with guidance 4."""
    generators = [torch.Generator().manual_seed(seed) for _ in prompts]
    images = pipeline(list(prompts), guidance_scale=4.0, generator=generators).images
    width, height = images[0].size
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * width, index // columns * height))
    return grid
