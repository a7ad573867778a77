"""The shapes of well-known models with random weights: as fast and as large as the real ones.

    python -m encache.evaluate.random_weights sdxl runs/sdxl-shape

writes one; `encache-export --ckpt runs/sdxl-shape` takes it as it takes the real one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from encache.model.checkpoint import Checkpoint, default_model, find_checkpoint
from encache.model.family import STABLE_DIFFUSION, STABLE_DIFFUSION_XL, Family


@dataclass(frozen=True)
class Shape:
    """What differs from diffusers' and transformers' defaults.

    Attributes:
        family: whose pipeline it is.
        unet: its config.
        text_encoders: theirs, in the family's order.
        scaling_factor: of the autoencoder.
    """

    family: Family
    unet: dict[str, Any]
    text_encoders: tuple[dict[str, Any], ...]
    scaling_factor: float


VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
}
CLIP_BIG_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
SHAPES = {
    "sd15": Shape(
        STABLE_DIFFUSION, {"sample_size": 64, "cross_attention_dim": 768}, (CLIP_L,), 0.18215
    ),
    "sdxl": Shape(
        STABLE_DIFFUSION_XL,
        {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        (CLIP_L, CLIP_BIG_G),
        0.13025,
    ),
}


def find_shape(name: str, folder: Path) -> Checkpoint:
    """The checkpoint of this shape in a folder, written there unless it exists, in fp16.

    Its tokenizers are the default model's, with Stable Diffusion's length of 77. Stable Diffusion
    v1.5 is 2 GB, XL 7 GB.
    """
    if not (folder / "model_index.json").is_file():
        _write(SHAPES[name], folder)
    return find_checkpoint(folder)


def _write(shape: Shape, folder: Path) -> None:
    import torch

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)  # XL's weights would fill a memory of 16 GB in fp32
    try:
        pipeline = _make(shape)
    finally:
        torch.set_default_dtype(default)
    # model_index.json is written last, so that an interrupted folder is written again.
    pipeline.to(torch.float16).save_pretrained(folder)


def _make(shape: Shape) -> Any:
    """The pipeline, in PyTorch's default precision."""
    import diffusers
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    shipped, family = default_model(), shape.family
    tokenizer = CLIPTokenizer.from_pretrained(shipped / "tokenizer", model_max_length=77)
    classes = (CLIPTextModel, CLIPTextModelWithProjection)
    encoders = [
        made(CLIPTextConfig(**config))
        for made, config in zip(classes, shape.text_encoders, strict=False)
    ]
    scaling = {"scaling_factor": shape.scaling_factor}
    return getattr(diffusers, family.pipeline)(
        unet=diffusers.UNet2DConditionModel(**shape.unet),
        vae=diffusers.AutoencoderKL(**VAE, **scaling),
        scheduler=diffusers.DDIMScheduler.from_pretrained(shipped / "scheduler"),
        **dict(zip(family.text_encoders, encoders, strict=True)),
        **dict.fromkeys(family.tokenizers, tokenizer),
        **family.loading,
    )


@click.command()
@click.argument("name", type=click.Choice(tuple(SHAPES)))
@click.argument("folder", type=click.Path(path_type=Path))
def main(name: str, folder: Path) -> None:
    """Write a model of the shape NAME with random weights to FOLDER, in fp16."""
    click.echo(find_shape(name, folder).folder)


if __name__ == "__main__":
    main()
