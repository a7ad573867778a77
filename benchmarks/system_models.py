"""Train what the default model lacks for docs/pipelines.md: a ControlNet, a LoRA, a small DiT.

    python benchmarks/system_models.py         # goes on where it stopped

All learn from the default model's own training pictures, on one core, in minutes: the ControlNet
to follow edges, the LoRA to draw with lines alone, the DiT a few emoji by number. The LoRA needs
peft (`pip install ".[train,lora]"`).
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
)
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from encache.evaluate.machine import describe_machine
from encache.files import write_json
from encache.model.checkpoint import find_checkpoint
from encache.model.loading import load_pipeline
from encache.model.text import tokenize
from encache.train.autoencoder import encode
from encache.train.denoiser import MIN_SNR_GAMMA, make_scheduler
from encache.train.diffusion import add_noise, min_snr_weight, weighted_error
from encache.train.emoji import (
    CONCEPT_CATEGORIES,
    TWEMOJI,
    Emoji,
    fetch_packages,
    load_posed_images,
    read_emoji,
)
from encache.train.loop import Losses, Recipe, digest, fit, step_generators

RUNS = Path("runs/system_pictures")
CONTROLNET, DIT, LORA = RUNS / "controlnet", RUNS / "dit", RUNS / "lines.safetensors"
NOTES = RUNS / "training.json"
SHORT = Recipe(1, 1e-3, warmup=30, decay_fraction=0.4, ema_decay=0.98, checkpoint_every=25)
RECIPES = {
    "controlnet": replace(SHORT, steps=600, learning_rate=1e-3),
    "lora": replace(SHORT, steps=300, learning_rate=2e-3),
    "dit": replace(SHORT, steps=1800, learning_rate=2e-3, ema_decay=0.99),
}
#: Pictures in a step of each, and poses in which each emoji is seen.
BATCH_SIZE = {"controlnet": 16, "lora": 16, "dit": 32}
POSES = {"controlnet": 4, "lora": 2, "dit": 24}
#: The LoRA's, and the layers that it changes.
RANK, ADAPTED = 16, ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
#: What the DiT draws, by its number, in one style. diffusers fixes its further class, no class.
CLASSES = (
    *("red apple", "tangerine", "lemon", "banana", "watermelon", "grapes"),
    *("strawberry", "cherries", "tomato", "avocado", "aubergine", "carrot"),
    *("broccoli", "cactus", "evergreen tree", "mushroom", "tulip", "sunflower"),
    *("rose", "doughnut", "cookie", "hamburger", "penguin", "lady beetle"),
)
NO_CLASS = 1000
DROPPED = 0.1


def edges_of(pictures: Tensor) -> Tensor:
    """How steeply the brightness of pictures [N, 3, H, W] in [-1, 1] changes, in [0, 1], alike."""
    down, right = torch.gradient(pictures.mean(1, keepdim=True), dim=(2, 3))
    return (2 * torch.hypot(down, right)).clamp(max=1).expand(-1, 3, -1, -1)


def make_dit() -> DiTTransformer2DModel:
    """An untrained DiT for latents of the default model, [B, 4, 16, 16]."""
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        sample_size=16,
        num_embeds_ada_norm=NO_CLASS,
    )
    # As the paper has it: each block begins as the identity, and the prediction as zero.
    for one in (*(block.norm1.linear for block in dit.transformer_blocks), dit.proj_out_2):
        nn.init.zeros_(one.weight)
        nn.init.zeros_(one.bias)
    return dit


@contextmanager
def training(name: str) -> Iterator[None]:
    """Note the processor's seconds, summed over interrupted runs."""
    start = time.process_time()
    try:
        yield
    finally:
        notes = json.loads(NOTES.read_text()) if NOTES.exists() else {}
        spent = notes.get(name, {"cpu_seconds": 0.0})["cpu_seconds"] + time.process_time() - start
        recipe = {"steps": RECIPES[name].steps, "batch_size": BATCH_SIZE[name]}
        notes[name] = {**recipe, "cpu_seconds": spent, "machine": describe_machine()}
        write_json(NOTES, notes)


def noised(clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy latents and noise [B, 4, h, w], timesteps and weights of the loss [B]."""
    alphas_cumprod = make_scheduler().alphas_cumprod
    timesteps = torch.randint(len(alphas_cumprod), (len(clean),), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    noisy = add_noise(clean, noise, alphas_cumprod[timesteps])
    return noisy, noise, timesteps, min_snr_weight(alphas_cumprod[timesteps], MIN_SNR_GAMMA)


@torch.no_grad()
def texts_of(pipe: Any, captions: Sequence[Sequence[str]], generator: torch.Generator) -> Tensor:
    """Embedded captions [B, L, D], one of each picture's, or none."""
    draws = torch.rand(len(captions), 2, generator=generator).tolist()
    words = [
        "" if drop < DROPPED else of_one[int(choice * len(of_one))]
        for of_one, (drop, choice) in zip(captions, draws, strict=True)
    ]
    return pipe.text_encoder(tokenize(pipe.tokenizer, words)).last_hidden_state


def train_controlnet(pipe: Any, emoji: Sequence[Emoji]) -> None:
    """A ControlNet for the default model, which begins as a copy of its UNet's first half."""
    pictures = load_posed_images(emoji, POSES["controlnet"], torch.Generator().manual_seed(1))
    latents, size = encode(pipe.vae, pictures), BATCH_SIZE["controlnet"]
    captions = [one.captions for one in emoji for _ in range(POSES["controlnet"])]
    unet = pipe.unet.requires_grad_(False).to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 64))
    controlnet.requires_grad_(True).to(memory_format=torch.channels_last)

    def compute_losses(module: nn.Module, generator: torch.Generator) -> Losses:
        chosen = torch.randint(len(latents), (size,), generator=generator)
        text = texts_of(pipe, [captions[index] for index in chosen.tolist()], generator)
        noisy, noise, timesteps, weights = noised(latents[chosen], generator)
        control = edges_of(pictures[chosen])
        down, mid = module(noisy, timesteps, text, control, return_dict=False)
        predicted = unet(
            noisy,
            timesteps,
            text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        ).sample
        return Losses({"denoise": weighted_error(predicted, noise, weights)})

    learn("controlnet", controlnet, compute_losses, latents)
    controlnet.save_pretrained(CONTROLNET)


def train_lora(pipe: Any, emoji: Sequence[Emoji]) -> None:
    """A LoRA for the default model's UNet, with which it draws black lines on white."""
    pictures = load_posed_images(emoji, POSES["lora"], torch.Generator().manual_seed(3))
    latents, size = encode(pipe.vae, 1 - 2 * edges_of(pictures)), BATCH_SIZE["lora"]
    captions = [one.captions for one in emoji for _ in range(POSES["lora"])]
    unet = copy.deepcopy(pipe.unet).requires_grad_(False).to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ADAPTED))

    def compute_losses(module: nn.Module, generator: torch.Generator) -> Losses:
        chosen = torch.randint(len(latents), (size,), generator=generator)
        text = texts_of(pipe, [captions[index] for index in chosen.tolist()], generator)
        noisy, noise, timesteps, weights = noised(latents[chosen], generator)
        predicted = module(noisy, timesteps, text).sample
        return Losses({"denoise": weighted_error(predicted, noise, weights)})

    learn("lora", unet, compute_losses, latents)
    StableDiffusionPipeline.save_lora_weights(LORA.parent, get_peft_model_state_dict(unet))
    (LORA.parent / "pytorch_lora_weights.safetensors").rename(LORA)


def train_dit(pipe: Any, emoji: Sequence[Emoji]) -> None:
    """A DiT that draws `CLASSES`, in the latents of the default model's autoencoder."""
    flat = {one.captions[0]: one for one in emoji if TWEMOJI.word in one.image.parts}
    poses, size = POSES["dit"], BATCH_SIZE["dit"]
    drawn = [flat[name] for name in CLASSES]
    pictures = load_posed_images(drawn, poses, torch.Generator().manual_seed(2))
    latents, dit = encode(pipe.vae, pictures), make_dit()

    def compute_losses(module: nn.Module, generator: torch.Generator) -> Losses:
        chosen = torch.randint(len(latents), (size,), generator=generator)
        dropped = torch.rand(size, generator=generator) < DROPPED
        noisy, noise, timesteps, weights = noised(latents[chosen], generator)
        labels = torch.where(dropped, NO_CLASS, chosen // poses)
        module.eval()  # in training each block would drop classes of its own choice
        predicted = module(noisy, timesteps, class_labels=labels).sample
        return Losses({"denoise": weighted_error(predicted, noise, weights)})

    learn("dit", dit, compute_losses, latents)
    DiTPipeline(dit, pipe.vae, make_scheduler()).save_pretrained(DIT)


def learn(
    name: str,
    model: nn.Module,
    compute_losses: Callable[[nn.Module, torch.Generator], Losses],
    latents: Tensor,
) -> None:
    """Fit a model to latents [N, 4, 16, 16]; go on from its checkpoint, if there is one."""
    with training(name):
        fit(
            model,
            step_generators(),
            compute_losses,
            RECIPES[name],
            RUNS / f"{name}.pt",
            identity={"latents": digest(latents)},
        )


def main() -> None:
    """Train all; what is finished costs nothing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--emoji-dir", type=Path, default=Path("runs/emoji/data"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    fetch_packages(options.emoji_dir)
    RUNS.mkdir(parents=True, exist_ok=True)
    emoji = read_emoji(options.emoji_dir, CONCEPT_CATEGORIES)
    pipe = load_pipeline(find_checkpoint())
    for path, train in ((CONTROLNET, train_controlnet), (LORA, train_lora), (DIT, train_dit)):
        if not path.exists():
            train(pipe, emoji)


if __name__ == "__main__":
    main()
