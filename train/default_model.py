"""The recipe of the default model, from the emoji package to a diffusers folder."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import StableDiffusionPipeline

from encache import __version__
from encache.errors import EncacheError
from encache.files import check_writable
from encache.train import autoencoder as autoencoder_recipe
from encache.train import denoiser as denoiser_recipe
from encache.train.emoji import (
    AUTOENCODER_CATEGORIES,
    CONCEPT_CATEGORIES,
    STYLES,
    fetch_packages,
    load_posed_images,
    read_emoji,
)
from encache.train.loop import digest
from encache.train.text import train_tokenizer
from encache.train.validation import sample_grid

#: Pictures per emoji that the autoencoder and the denoiser see.
AUTOENCODER_POSES, DENOISER_POSES = 2, 24
#: At which it draws best, by eye; kept in its model_index.json.
GUIDANCE_SCALE = 3.0


def train_default_model(
    emoji_dir: Path | None,
    work: Path,
    output: Path,
    autoencoder_steps: int,
    denoiser_steps: int,
) -> None:
    """Train tokenizer, autoencoder, text encoder and UNet; write them to `output` in fp16.

    `work` keeps the checkpoints, so an interrupted run goes on where it stopped; a finished one is
    left as it is.

    Args:
        emoji_dir: the unpacked npm packages; None fetches them into `work`.
        work: folder for the checkpoints.
        output: diffusers folder, which appears when it is complete.
        autoencoder_steps, denoiser_steps: of training.

    Raises:
        EncacheError: the packages are not to be had, or `output` holds something else or could
            not be written.
    """
    recipe = _describe(autoencoder_steps, denoiser_steps)
    data = emoji_dir or work / "data"
    if _is_finished(output, recipe, (work, data)):
        return
    if emoji_dir is None:
        fetch_packages(data)
    names = list(dict.fromkeys(one.captions[0] for one in read_emoji(data, CONCEPT_CATEGORIES)))
    for folder in (work, output.parent):
        check_writable(folder)
    pipeline = _train(data, work, autoencoder_steps, denoiser_steps)
    _write(pipeline, names, recipe, output)


def _train(
    emoji_dir: Path, work: Path, autoencoder_steps: int, denoiser_steps: int
) -> StableDiffusionPipeline:
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
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=denoiser_recipe.make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _describe(autoencoder_steps: int, denoiser_steps: int) -> dict[str, Any]:
    """What makes two runs the same run."""
    return {
        "encache_version": __version__,
        "packages": [f"{style.package}@{style.version}" for style in STYLES],
        "autoencoder_steps": autoencoder_steps,
        "denoiser_steps": denoiser_steps,
    }


def _is_finished(output: Path, recipe: Mapping[str, Any], inputs: Sequence[Path]) -> bool:
    """Whether `output` holds this recipe's model; refuse it if the model cannot go there."""
    if any(path.resolve().is_relative_to(output.resolve()) for path in inputs):
        raise EncacheError(f"{output} holds the training's own files: choose another --output.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        found = json.loads((output / "model_index.json").read_text()).get("_recipe")
    except (OSError, ValueError, AttributeError):
        found = None
    if found != recipe:
        raise EncacheError(
            f"{output} is there already and was not made by this command: choose another --output, "
            "or delete it."
        )
    return True


def _write(
    pipeline: StableDiffusionPipeline,
    names: Sequence[str],
    recipe: Mapping[str, Any],
    output: Path,
) -> None:
    """Write the model in fp16, its names, and pictures of some of them."""
    pipeline.set_progress_bar_config(disable=True)
    transformers.utils.logging.disable_progress_bar()
    grid = sample_grid(
        pipeline, names[:: max(1, len(names) // 32)][:32], columns=8, guidance_scale=4.0
    )
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
            folder = Path(scratch, output.name)
            pipeline.to(torch.float16).save_pretrained(folder)
            # transformers shall open the fp16 weights in float32 by default, as diffusers does.
            _amend(folder / "text_encoder" / "config.json", {"dtype": "float32"})
            # diffusers drops the private keys when it opens the folder.
            private = {"_guidance_scale": GUIDANCE_SCALE, "_recipe": recipe}
            _amend(folder / "model_index.json", private)
            grid.save(folder / "samples.png")
            (folder / "prompts.txt").write_text("\n".join(names) + "\n")
            os.replace(folder, output)
    except Exception as error:  # safetensors has its own error for a full disk
        raise EncacheError(
            f"{output} could not be written ({error}): free some space, then run the same command "
            "again; the training is kept."
        ) from error


def _amend(path: Path, changes: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2) + "\n")
