"""Small denoisers and pipelines of the real diffusers classes beyond plain Stable Diffusion."""

import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    IFPipeline,
    IFSuperResolutionPipeline,
    TextToVideoSDPipeline,
    TextToVideoZeroPipeline,
    UNet3DConditionModel,
)

from tests.conftest import TEXT_WIDTH, make_pipeline, tiny_unet


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


def noisy_scheduler(**changes):
    """DeepFloyd-IF's: stochastic, with a learned variance and thresholding."""
    return DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
        thresholding=True,
        **changes,
    )


def similar(pipe, kind, **parts):
    """A pipeline of another class with the parts of one."""
    known = {name: one for name, one in pipe.components.items() if name != "image_encoder"}
    made = kind(**{**known, **parts})
    made.set_progress_bar_config(disable=True)
    return made


def tiny_controlnet(unet, seed=5):
    """A ControlNet for a UNet that says something; an untrained one gives zeros."""
    torch.manual_seed(seed)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    for one in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(one.weight, std=0.2)
    return controlnet.eval()


def picture(height=16, width=16, seed=3):
    """A random picture [1, 3, h, w] between 0 and 1."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def mask(height=16, width=16):
    """The right half of a picture."""
    half = torch.zeros(1, 1, height, width)
    half[..., width // 2 :] = 1
    return half


def make_if_pipeline():
    return _quiet(
        IFPipeline(
            unet=tiny_if_unet(),
            scheduler=noisy_scheduler(),
            **dict.fromkeys(
                ("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker")
            ),
            requires_safety_checker=False,
        )
    )


def make_if_upscaler():
    return _quiet(
        IFSuperResolutionPipeline(
            unet=tiny_if_unet(6, class_embed_type="timestep"),
            scheduler=noisy_scheduler(),
            image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            **dict.fromkeys(
                ("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker")
            ),
            requires_safety_checker=False,
        )
    )


def if_texts():
    """Embedded prompts of a width that the tiny IF reads."""
    generator = torch.Generator().manual_seed(4)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: torch.randn(1, 5, 20, generator=generator) for name in names}


def make_dit_pipeline():
    vae = make_pipeline().vae
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    return _quiet(DiTPipeline(transformer=tiny_dit(), vae=vae, scheduler=scheduler))


def make_frames_pipeline():
    """Text2Video-Zero."""
    return similar(make_pipeline(), TextToVideoZeroPipeline, requires_safety_checker=False)


def make_video_pipeline():
    """VideoFusion."""
    small = make_pipeline()
    return _quiet(
        TextToVideoSDPipeline(
            vae=small.vae,
            text_encoder=small.text_encoder,
            tokenizer=small.tokenizer,
            unet=tiny_video_unet(),
            scheduler=small.scheduler,
        )
    )


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe
