"""decoder(encoder(x)) == unet(x), bit for bit, at every cut and for every Stable Diffusion."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from encache.errors import CheckpointError
from encache.model.backbone import backbone_of
from encache.model.spec import FEATURE_CUTS
from encache.model.split import Halves, Whole, blend
from tests.conftest import TEXT_WIDTH, XL_UNET, tiny_unet

FAMILIES = {
    "1.x": {},
    "2.x": {"use_linear_projection": True, "attention_head_dim": (1, 2, 3, 4)},
    "two layers": {"layers_per_block": 2},
}


def draw(height=16, width=16):
    torch.manual_seed(1)
    text = torch.randn(2, 5, TEXT_WIDTH)
    return torch.randn(2, 4, height, width), torch.tensor([7.0]), {"text": text}


@pytest.mark.parametrize("size", [(16, 16), (13, 17)])
@pytest.mark.parametrize("cut", FEATURE_CUTS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_recomposition_is_bit_exact(family, cut, size):
    unet = tiny_unet(**FAMILIES[family])
    latents, timestep, conditions = draw(*size)
    halves = Halves(unet, cut)
    features = halves.encoder(latents, timestep, conditions)
    ring = [one[None] for one in features]
    noise = halves.decoder(ring, torch.ones(1, 1), timestep, conditions)
    whole = unet(latents, timestep, conditions["text"]).sample
    assert torch.equal(noise, whole)
    assert torch.equal(Whole(backbone_of(unet))(latents, timestep, conditions), whole)
    sizes = {"B": 2, "h": size[0], "w": size[1]}
    assert [tuple(one.shape) for one in features] == [one.size(sizes) for one in halves.features]


@pytest.mark.parametrize("cut", ["mid", "up0", "up1"])
@torch.no_grad()
def test_recomposition_is_bit_exact_with_added_conditions(cut):
    unet = tiny_unet(**XL_UNET)
    latents, timestep, _ = draw()
    conditions = {
        "text": torch.randn(2, 5, 40),
        "pooled_text": torch.randn(2, 20),
        "time_ids": torch.rand(2, 6) * 100,
    }
    halves = Halves(unet, cut)
    features = halves.encoder(latents, timestep, conditions)
    ring = [one[None] for one in features]
    noise = halves.decoder(ring, torch.ones(1, 1), timestep, conditions)
    added = {"text_embeds": conditions["pooled_text"], "time_ids": conditions["time_ids"]}
    whole = unet(latents, timestep, conditions["text"], added_cond_kwargs=added).sample
    assert torch.equal(noise, whole)


@torch.no_grad()
def test_batched_calls_equal_single_calls():
    halves = Halves(tiny_unet(), "up1")
    latents, timestep, conditions = draw()
    rings = [
        torch.stack(pair)
        for pair in zip(
            halves.encoder(latents, timestep, conditions),
            halves.encoder(latents + 1, timestep, conditions),
            strict=True,
        )
    ]
    weights, timesteps = torch.randn(3, 2), torch.tensor([10.0, 500.0, 900.0])
    together = halves.decoder(rings, weights, timesteps, conditions).view(3, 2, 4, 16, 16)
    for call in range(3):
        one = slice(call, call + 1)
        alone = halves.decoder(rings, weights[one], timesteps[one], conditions)
        torch.testing.assert_close(together[call], alone, rtol=1e-5, atol=1e-5)


def test_blend_is_the_weighted_sum():
    ring, weights = torch.randn(3, 2, 5, 4, 4), torch.randn(6, 3)
    mixed = blend(weights, ring).view(6, 2, 5, 4, 4)
    for call in range(6):
        expected = sum(weights[call, slot] * ring[slot] for slot in range(3))
        torch.testing.assert_close(mixed[call], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_model_is_left_as_it_was():
    unet = tiny_unet()
    before = {name: id(one) for name, one in unet.named_modules()}, dict(vars(unet))
    latents, timestep, conditions = draw(13, 17)
    halves = Halves(unet, "up0")
    ring = [one[None] for one in halves.encoder(latents, timestep, conditions)]
    halves.decoder(ring, torch.ones(1, 1), timestep, conditions)
    assert before == ({name: id(one) for name, one in unet.named_modules()}, dict(vars(unet)))


@torch.no_grad()
def test_a_forward_that_was_put_in_place_does_not_run_the_original():
    unet = tiny_unet()
    latents, timestep, conditions = draw()
    whole = unet(latents, timestep, conditions["text"]).sample
    own, unet.forward = unet.forward, lambda *arguments, **options: own(*arguments, **options)
    halves = Halves(unet, "up1")
    ring = [one[None] for one in halves.encoder(latents, timestep, conditions)]
    noise = halves.decoder(ring, torch.ones(1, 1), timestep, conditions)
    assert torch.equal(noise, whole)


@torch.no_grad()
def test_the_decoder_sees_the_latents_through_the_features_alone():
    halves = Halves(tiny_unet(), "mid")
    latents, timestep, conditions = draw()

    def decode(features):
        ring = [one[None] for one in features]
        return halves.decoder(ring, torch.ones(1, 1), timestep, conditions)

    features = halves.encoder(latents, timestep, conditions)
    before = decode(features)
    others = halves.encoder(-latents, timestep, conditions)  # which must leave nothing behind
    assert torch.equal(decode(features), before)
    assert not torch.allclose(decode(others), before, atol=1e-3)


def test_what_crosses_the_cut_in_stable_diffusion_1_5():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    sizes = {"B": 1, "h": 64, "w": 64}
    features = {cut: Halves(unet, cut).features for cut in FEATURE_CUTS}
    shapes = {cut: [one.size(sizes)[1:] for one in crossing] for cut, crossing in features.items()}
    assert len(shapes["mid"]) == 13
    assert [one.name for one in features["mid"]] == [*(f"skip_{i}" for i in range(12)), "hidden"]
    assert shapes["mid"][-1] == (1280, 8, 8)
    assert shapes["up0"][-1] == (1280, 16, 16)
    assert shapes["up1"][-1] == (1280, 32, 32)
    assert shapes["up2"] == [(320, 64, 64)] * 3 + [(640, 64, 64)]
    assert features["mid"][-1].shape == ("B", 1280, "h/8", "w/8")


def test_a_cut_that_a_unet_has_not_is_refused():
    with pytest.raises(CheckpointError, match="no cut up2. Choose one of none, mid, up0, up1"):
        Halves(tiny_unet(**XL_UNET), "up2")


def test_a_denoiser_of_no_known_family_is_refused():
    with pytest.raises(CheckpointError, match="cannot read a Linear"):
        Halves(torch.nn.Linear(1, 1), "mid")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"class_embed_type": "identity"}, "class_embed_type identity"),
        ({"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 8}, "encoder_hid_dim_type"),
        ({"addition_embed_type": "image", "encoder_hid_dim": 8}, "addition_embed_type image"),
        ({"attention_type": "gated"}, "gated attention"),
    ],
)
def test_unsupported_conditioning_is_refused(changes, reason):
    with pytest.raises(CheckpointError, match=reason):
        Halves(tiny_unet(**changes), "mid")


@torch.no_grad()
def test_freeu_is_followed():
    unet = tiny_unet()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    latents, timestep, conditions = draw()
    halves = Halves(unet, "mid")
    ring = [one[None] for one in halves.encoder(latents, timestep, conditions)]
    noise = halves.decoder(ring, torch.ones(1, 1), timestep, conditions)
    assert torch.equal(noise, unet(latents, timestep, conditions["text"]).sample)
