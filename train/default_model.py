"""The recipe of the default model, from the emoji package to a diffusers folder."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from encache.train import autoencoder as autoencoder_recipe
from encache.train import denoiser as denoiser_recipe
from encache.train.emoji import (
    AUTOENCODER_CATEGORIES,
    CONCEPT_CATEGORIES,
    load_posed_images,
    read_emoji,
)
from encache.train.loop import digest
from encache.train.text import train_tokenizer
from encache.train.validation import sample_grid

#: Pictures per emoji that the autoencoder and the denoiser see.
AUTOENCODER_POSES, DENOISER_POSES = 2, 24


def train_default_model(
    emoji_dir: Path,
    work: Path,
    output: Path,
    autoencoder_steps: int,
    denoiser_steps: int,
) -> None:
    """Train tokenizer, autoencoder, text encoder and UNet; write them to `output` in fp16.

    `work` keeps the checkpoints, so an interrupted run goes on where it stopped.
    """
    work.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    autoencoder = autoencoder_recipe.train_autoencoder(
        load_posed_images(
            read_emoji(emoji_dir, AUTOENCODER_CATEGORIES), AUTOENCODER_POSES, generator
        ),
        work / "autoencoder.pt",
        replace(autoencoder_recipe.RECIPE, steps=autoencoder_steps),
    )
    concepts = read_emoji(emoji_dir, CONCEPT_CATEGORIES)
    tokenizer = train_tokenizer(caption for one in concepts for caption in one.captions)
    images = load_posed_images(concepts, DENOISER_POSES, generator)
    latents = autoencoder_recipe.encode(autoencoder, images)
    origin = {"images": digest(images), "autoencoder_steps": autoencoder_steps}
    captions = [one.captions for one in concepts for _ in range(DENOISER_POSES)]
    model = denoiser_recipe.train_denoiser(
        denoiser_recipe.CaptionedLatents(latents, captions, origin),
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
    names = list(dict.fromkeys(one.captions[0] for one in concepts))
    samples = names[:: max(1, len(names) // 32)][:32]
    grid = sample_grid(pipeline, samples, columns=8)
    pipeline.to(torch.float16).save_pretrained(output)
    _load_in_float32(output / "text_encoder" / "config.json")
    grid.save(output / "samples.png")
    (output / "prompts.txt").write_text("\n".join(names) + "\n")


def _load_in_float32(config: Path) -> None:
    """Let transformers open the fp16 weights in float32 by default, as diffusers opens its own."""
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2))
