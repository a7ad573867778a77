"""Small denoisers and pipelines of the real diffusers classes beyond plain Stable Diffusion."""

import torch
from diffusers import DiTTransformer2DModel, UNet3DConditionModel

from tests.conftest import TEXT_WIDTH, tiny_unet


def tiny_if_unet(in_channels=3, **changes):
    """DeepFloyd-IF's kinds of blocks; six output channels, of which three are the variance."""
    blocks = ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 2)
    config = {
        "sample_size": 16,
        "in_channels": in_channels,
        "out_channels": 6,
        "block_out_channels": (8, 16, 32),
        "cross_attention_dim": 12,
        "attention_head_dim": 8,
        "down_block_types": blocks,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 2, "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "act_fn": "gelu",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
        "encoder_hid_dim": 20,
        "encoder_hid_dim_type": "text_proj",
    }
    return tiny_unet(**{**config, **changes})


def tiny_video_unet():
    """VideoFusion's kinds of blocks."""
    torch.manual_seed(0)
    unet = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    ).eval()
    for name, parameter in unet.named_parameters():
        # Trained ones are not zero, and frames must see each other here.
        if ".temp_convs." in name and ".conv4." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return unet


def tiny_dit():
    """DiT with its classes and its variance."""
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        sample_size=8,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    ).eval()
