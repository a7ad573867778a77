"""decoder(encoder(x)) == unet(x), bit for bit, at every cut and for every Stable Diffusion."""

import pytest
import torch

from encache.errors import CheckpointError
from encache.model.features import CUTS, feature_table
from encache.model.split import SplitUNet, blend
from tests.conftest import TEXT_WIDTH, tiny_unet

FAMILIES = {
    "1.x": {},
    "2.x": {"use_linear_projection": True, "attention_head_dim": (1, 2, 3, 4)},
    "two layers": {"layers_per_block": 2},
}
XL = {
    "block_out_channels": (8, 16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}


def draw(height=16, width=16):
    torch.manual_seed(1)
    return torch.randn(2, 4, height, width), torch.tensor([7.0]), torch.randn(2, 5, TEXT_WIDTH)


@pytest.mark.parametrize("size", [(16, 16), (13, 17)])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_recomposition_is_bit_exact(family, cut, size):
    unet = tiny_unet(**FAMILIES[family])
    latents, timestep, text = draw(*size)
    split = SplitUNet(unet, cut)
    features = split.encoder(latents, timestep, text)
    noise = split.decoder([one[None] for one in features], torch.ones(1, 1), timestep, text)
    assert torch.equal(noise, unet(latents, timestep, text).sample)
    assert [tuple(one.shape) for one in features] == [
        feature.shape(2, *size) for feature in split.features
    ]


@pytest.mark.parametrize("cut", ["mid", "up0", "up1", "out"])
@torch.no_grad()
def test_recomposition_is_bit_exact_with_added_conditions(cut):
    unet = tiny_unet(**XL)
    latents, timestep, text = draw()
    added, time_ids = torch.randn(2, 10), torch.rand(2, 6) * 100
    split = SplitUNet(unet, cut)
    features = split.encoder(latents, timestep, text, added, time_ids)
    ring = [one[None] for one in features]
    noise = split.decoder(ring, torch.ones(1, 1), timestep, text, added, time_ids)
    conditions = {"text_embeds": added, "time_ids": time_ids}
    whole = unet(latents, timestep, text, added_cond_kwargs=conditions).sample
    assert torch.equal(noise, whole)


@torch.no_grad()
def test_batched_calls_equal_single_calls():
    split = SplitUNet(tiny_unet(), "up1")
    latents, timestep, text = draw()
    rings = [
        torch.stack(pair)
        for pair in zip(
            split.encoder(latents, timestep, text),
            split.encoder(latents + 1, timestep, text),
            strict=True,
        )
    ]
    weights, timesteps = torch.randn(3, 2), torch.tensor([10.0, 500.0, 900.0])
    together = split.decoder(rings, weights, timesteps, text).view(3, 2, 4, 16, 16)
    for call in range(3):
        alone = split.decoder(rings, weights[call : call + 1], timesteps[call : call + 1], text)
        torch.testing.assert_close(together[call], alone, rtol=1e-5, atol=1e-5)


def test_blend_is_the_weighted_sum():
    ring, weights = torch.randn(3, 2, 5, 4, 4), torch.randn(6, 3)
    mixed = blend(weights, ring).view(6, 2, 5, 4, 4)
    for call in range(6):
        expected = sum(weights[call, slot] * ring[slot] for slot in range(3))
        torch.testing.assert_close(mixed[call], expected, rtol=1e-5, atol=1e-5)


def test_table_of_stable_diffusion_1_5():
    channels = (320, 640, 1280, 1280)
    config = {"block_out_channels": channels, "layers_per_block": 2, "out_channels": 4}
    shapes = {cut: [f.shape(1, 64, 64)[1:] for f in feature_table(config, cut)] for cut in CUTS}
    assert len(shapes["mid"]) == 13
    assert shapes["mid"][-1] == (1280, 8, 8)
    assert shapes["up0"][-1] == (1280, 16, 16)
    assert shapes["up1"][-1] == (1280, 32, 32)
    assert shapes["up2"] == [(320, 64, 64)] * 3 + [(640, 64, 64)]
    assert shapes["out"] == [(4, 64, 64)]


def test_a_cut_that_a_unet_has_not_is_refused():
    with pytest.raises(CheckpointError, match="no cut up2. Choose one of mid, up0, up1, out"):
        SplitUNet(tiny_unet(**XL), "up2")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"class_embed_type": "timestep"}, "class conditioning"),
        ({"time_cond_proj_dim": 8}, "distilled guidance"),
        ({"addition_embed_type": "text"}, "addition_embed_type text"),
        (
            {"up_block_types": ("UpBlock2D",) * 3 + ("AttnUpBlock2D",)},
            "other up blocks",
        ),
    ],
)
def test_unsupported_conditioning_is_refused(changes, reason):
    with pytest.raises(CheckpointError, match=reason):
        SplitUNet(tiny_unet(**changes), "mid")


def test_freeu_is_refused():
    unet = tiny_unet()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(CheckpointError, match="FreeU"):
        SplitUNet(unet, "mid")
