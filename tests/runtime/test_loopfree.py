"""Weights of Loopfree distillation (arXiv 2505.21960) are sampled as their authors sample them.

One encoder run, and the decoder at all four timesteps on its features; no guidance.
"""

import json

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from encache.model.checkpoint import find_checkpoint
from encache.model.loading import load_pipeline
from encache.runtime.pipeline import EncachePipeline
from encache.runtime.schedulers import make_scheduler
from tests.conftest import make_pipeline

NUM_CALLS = 4
#: As Stable Diffusion v1.5 ships it; the spacing that it leaves out is "leading".
SCHEDULER_CONFIG = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


@pytest.fixture
def folder(tmp_path):
    """A diffusers folder with Stable Diffusion v1.5's config but for the widths."""
    pipeline = make_pipeline(
        block_out_channels=(32, 64, 96, 128),
        layers_per_block=2,
        attention_head_dim=8,
        norm_num_groups=32,
    )
    folder = tmp_path / "loopfree"
    pipeline.scheduler = PNDMScheduler()
    pipeline.save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER_CONFIG))
    return folder


@torch.no_grad()
def sample_as_published(folder, pipeline, noise, text):
    """Latents [1, 4, h, w] of the authors' loop over the undivided UNet's own modules."""
    unet = pipeline.unet
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(NUM_CALLS)

    def embed(timestep):
        return unet.time_embedding(unet.time_proj(timestep[None]))

    hidden, skips = encode(unet, noise, embed(scheduler.timesteps[0]), text)
    predicted = [
        decode(unet, hidden, skips, embed(timestep), text) for timestep in scheduler.timesteps
    ]
    latents = noise
    for timestep, one in zip(scheduler.timesteps, predicted, strict=True):
        latents = scheduler.step(one, timestep, latents).prev_sample
    return latents


def encode(unet, latents, embedded_time, text):
    """The hidden state after the mid block, and the skips that the decoder consumes."""
    hidden = unet.conv_in(latents)
    skips = [hidden]
    for block in unet.down_blocks:
        hidden, made = block(hidden, embedded_time, **attending(block, text))
        skips += made
    return unet.mid_block(hidden, embedded_time, encoder_hidden_states=text), skips


def decode(unet, hidden, skips, embedded_time, text):
    """The noise that the up blocks and conv_out predict."""
    for block in unet.up_blocks:
        count = len(block.resnets)
        skips, used = skips[:-count], tuple(skips[-count:])
        hidden = block(hidden, used, embedded_time, **attending(block, text))
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


def attending(block, text):
    """What a block with cross attention takes besides."""
    return {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}


def test_the_published_loop(folder):
    ours = EncachePipeline.from_pretrained(folder, cut="mid", backend="torch")
    assert isinstance(ours.scheduler, PNDMScheduler)
    ours.scheduler = make_scheduler("ddim", ours.scheduler)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    text = ours.texts(["red apple"])["text"]
    plain = load_pipeline(find_checkpoint(folder))
    expected = sample_as_published(folder, plain, noise, text)
    arguments = {"num_inference_steps": NUM_CALLS, "guidance_scale": 1.0, "stride": NUM_CALLS}
    latents = ours(
        "red apple", latents=noise, output_type="latent", blend="reuse", **arguments
    ).images
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    # And not what the undivided UNet makes of four steps.
    full = ours("red apple", latents=noise, output_type="latent", **{**arguments, "stride": 1})
    assert not torch.allclose(full.images, expected, atol=1e-2)
