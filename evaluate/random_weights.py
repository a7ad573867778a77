"""Stable Diffusion v1.5's shape with random weights: as fast and as large as the real one."""

from pathlib import Path
from typing import Any

from encache.model.checkpoint import Checkpoint, default_model, find_checkpoint

#: What differs from diffusers' and transformers' defaults.
SD15_UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
SD15_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
SD15_TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
}


def find_sd15_shape(folder: Path) -> Checkpoint:
    """The checkpoint in this folder, written there unless it exists (2 GB, fp16).

    Its tokenizer is the default model's, with Stable Diffusion's length of 77.
    """
    if not (folder / "model_index.json").is_file():
        _write(folder)
    return find_checkpoint(folder)


def _write(folder: Path) -> None:
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    shipped = default_model()
    pipeline = StableDiffusionPipeline(
        unet=UNet2DConditionModel(**SD15_UNET),
        vae=AutoencoderKL(**SD15_VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(**SD15_TEXT_ENCODER)),
        tokenizer=CLIPTokenizer.from_pretrained(shipped / "tokenizer", model_max_length=77),
        scheduler=DDIMScheduler.from_pretrained(shipped / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # model_index.json is written last, so that an interrupted folder is written again.
    pipeline.to(torch.float16).save_pretrained(folder)
