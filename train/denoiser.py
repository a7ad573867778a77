"""The default model's UNet and text encoder, learned together on precomputed latents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from encache.model.text import tokenize
from encache.train.diffusion import add_noise, min_snr_weight, weighted_error
from encache.train.loop import Losses, Recipe, fit, step_generators
from encache.train.text import make_text_encoder

RECIPE = Recipe(steps=14_000, learning_rate=1e-3, weight_decay=1e-3, ema_decay=0.998)
BATCH_SIZE = 32
#: Share of captions replaced by "", which classifier-free guidance needs.
CAPTION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0


class TextToNoise(nn.Module):
    """The two parts that learn together: token ids and noisy latents -> predicted noise."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, noisy: Tensor, timesteps: Tensor, token_ids: Tensor) -> Tensor:
        """Predict the noise in `noisy` [B, 4, h, w] at `timesteps` [B] for `token_ids` [B, L]."""
        text = self.text_encoder(token_ids).last_hidden_state
        return self.unet(noisy, timesteps, text).sample


@dataclass(frozen=True)
class CaptionedLatents:
    """Latents [N, 4, h, w] of unit variance; picture i may be called any of captions[i].

    Attributes:
        origin: what the latents were made from. Made anew, they may differ in a last bit.
    """

    latents: Tensor
    captions: Sequence[Sequence[str]]
    origin: Mapping[str, Any]


def make_unet(latent_size: int) -> UNet2DConditionModel:
    """Build an untrained UNet with the block types of Stable Diffusion v1.5, much narrower."""
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96, 144, 144),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=128,
        attention_head_dim=2,  # diffusers' name for the number of heads
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train_denoiser(
    data: CaptionedLatents,
    tokenizer: CLIPTokenizer,
    checkpoint: Path,
    recipe: Recipe = RECIPE,
    seed: int = 0,
) -> TextToNoise:
    """Fit text encoder and UNet to the data with the min-SNR weighted noise prediction loss."""
    torch.manual_seed(seed)
    model = TextToNoise(make_text_encoder(tokenizer), make_unet(data.latents.shape[-1]))
    model.unet.to(memory_format=torch.channels_last)
    token_ids = [tokenize(tokenizer, captions) for captions in data.captions]
    empty = tokenize(tokenizer, [""])[0]
    alphas_cumprod = make_scheduler().alphas_cumprod

    def compute_losses(module: nn.Module, generator: torch.Generator) -> Losses:
        chosen = torch.randint(len(data.latents), (BATCH_SIZE,), generator=generator)
        ids = torch.stack([_draw_caption(token_ids[i], empty, generator) for i in chosen.tolist()])
        timesteps = torch.randint(len(alphas_cumprod), (BATCH_SIZE,), generator=generator)
        clean = data.latents[chosen].contiguous(memory_format=torch.channels_last)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = add_noise(clean, noise, alphas_cumprod[timesteps])
        device = model.unet.device
        predicted = module(noisy.to(device), timesteps.to(device), ids.to(device))
        weight = min_snr_weight(alphas_cumprod[timesteps], MIN_SNR_GAMMA).to(device)
        return Losses({"denoise": weighted_error(predicted, noise.to(device), weight)})

    identity = {**data.origin, "vocabulary": len(tokenizer), "seed": seed}
    fit(model, step_generators(seed), compute_losses, recipe, checkpoint, identity=identity)
    return model.cpu()


def _draw_caption(captions: Tensor, empty: Tensor, generator: torch.Generator) -> Tensor:
    drop, choice = torch.rand(2, generator=generator).tolist()
    return empty if drop < CAPTION_DROPOUT else captions[int(choice * len(captions))]
