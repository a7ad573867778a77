"""decoder(encoder(x)) == model(x) for every family beyond Stable Diffusion's plain UNet."""

import pytest
import torch
from diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero import (
    CrossFrameAttnProcessor2_0,
)

from encache.errors import CheckpointError
from encache.model.backbone import attend_across_frames, backbone_of
from encache.model.spec import TensorSpec
from encache.model.split import Halves
from tests.conftest import TEXT_WIDTH, XL_UNET, tiny_unet
from tests.families import tiny_controlnet, tiny_dit, tiny_if_unet, tiny_video_unet


def draw(module, *sizes, batch=2):
    """Random latents and conditions for a denoiser."""
    backbone = backbone_of(module)
    torch.manual_seed(1)
    names = {"B": batch, "L": 5, **dict(zip("whF", reversed(sizes), strict=False))}
    conditions = {
        one.name: torch.randint(0, 9, one.size(names))
        if one.dtype == "int64"
        else torch.randn(one.size(names))
        for one in backbone.conditions
    }
    return torch.randn(backbone.latents.size(names)), torch.tensor([7.0]), conditions


CASES = {
    "inpainting": (lambda: tiny_unet(in_channels=9), (13, 17), "up1"),
    "distilled guidance": (lambda: tiny_unet(time_cond_proj_dim=6), (16, 16), "mid"),
    "refiner": (
        lambda: tiny_unet(**XL_UNET | {"projection_class_embeddings_input_dim": 5 * 4 + 40}),
        (16, 16),
        "up0",
    ),
    "upscaler": (lambda: tiny_unet(num_class_embeds=10), (16, 16), "up2"),
    "IF, stage I": (tiny_if_unet, (16, 16), "mid"),
    "IF, stage I, later": (tiny_if_unet, (16, 16), "up1"),
    "IF, stage II": (lambda: tiny_if_unet(6, class_embed_type="timestep"), (16, 16), "up0"),
    "VideoFusion": (tiny_video_unet, (3, 13, 17), "mid"),
    "VideoFusion, later": (tiny_video_unet, (3, 16, 16), "up0"),
    "DiT": (tiny_dit, (), "0"),
    "DiT, later": (tiny_dit, (), "2"),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_recomposition(case):
    make, sizes, cut = CASES[case]
    module = make()
    backbone, halves = backbone_of(module), Halves(module, cut)
    latents, timestep, conditions = draw(module, *sizes)
    timesteps = timestep.expand(len(latents))
    features = halves.encoder(latents, timesteps, conditions)
    ring = [one[None] for one in features]
    prediction = halves.decoder(ring, torch.ones(1, 1), timestep, conditions)
    whole = backbone.call(module, latents, timesteps, conditions)
    assert whole.std() > 1e-3
    torch.testing.assert_close(prediction, whole, rtol=1e-5, atol=1e-5)
    # Every condition is read.
    for name, one in conditions.items():
        changed = {**conditions, name: one + 1}
        assert not torch.equal(backbone.call(module, latents, timesteps, changed), whole), name


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_batched_calls_equal_single_calls(case):
    make, sizes, cut = CASES[case]
    module = make()
    halves = Halves(module, cut)
    latents, timestep, conditions = draw(module, *sizes)
    rings = [
        torch.stack(pair)
        for pair in zip(
            halves.encoder(latents, timestep.expand(2), conditions),
            halves.encoder(latents + 1, timestep.expand(2), conditions),
            strict=True,
        )
    ]
    weights, timesteps = torch.randn(3, 2), torch.tensor([10.0, 500.0, 900.0])
    together = halves.decoder(rings, weights, timesteps, conditions).chunk(3)
    for call in range(3):
        one = slice(call, call + 1)
        alone = halves.decoder(rings, weights[one], timesteps[one], conditions)
        torch.testing.assert_close(together[call], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unet_changes", [{}, {"layers_per_block": 2}, XL_UNET])
@pytest.mark.parametrize("cut", ["mid", "up0", "up1"])
@torch.no_grad()
def test_residuals_belong_to_the_features(cut, unet_changes):
    unet = tiny_unet(**unet_changes)
    latents, timestep, conditions = draw(unet, 16, 16)
    controlnet = tiny_controlnet(unet)
    added = None
    if "time_ids" in conditions:
        added = {"text_embeds": conditions["pooled_text"], "time_ids": conditions["time_ids"]}
    down, mid = controlnet(
        latents,
        timestep,
        conditions["text"],
        torch.randn(2, 3, 32, 32),
        added_cond_kwargs=added,
        return_dict=False,
    )
    given = {
        "encoder_hidden_states": conditions["text"],
        "added_cond_kwargs": added,
        "down_block_additional_residuals": down,
        "mid_block_additional_residual": mid,
    }
    whole = unet(latents, timestep, **given).sample
    plain = unet(latents, timestep, conditions["text"], added_cond_kwargs=added).sample
    assert not torch.allclose(whole, plain, atol=1e-2)
    read = backbone_of(unet).read(given)
    shapes = [one.size({"B": 2, "h": 16, "w": 16}) for one in backbone_of(unet).residuals]
    assert shapes == [tuple(one.shape) for one in (*down, mid)]
    halves = Halves(unet, cut)
    ring = [one[None] for one in halves.encoder(latents, timestep, read)]
    # The decoder needs no residuals, and takes none.
    for told in (read, conditions):
        prediction = halves.decoder(ring, torch.ones(1, 1), timestep, told)
        assert torch.equal(prediction, whole)


def test_what_no_condition_carries_is_refused():
    backbone = backbone_of(tiny_unet())
    text, one = torch.randn(2, 5, TEXT_WIDTH), torch.zeros(1)
    read = backbone.read({"encoder_hidden_states": text, "cross_attention_kwargs": {}})
    assert list(read) == ["text"]
    for argument in (
        {"attention_mask": one},
        {"cross_attention_kwargs": {"scale": 0.5}},
        {"added_cond_kwargs": {"image_embeds": [one]}},
        {"down_intrablock_additional_residuals": [one]},
    ):
        with pytest.raises(CheckpointError, match=f"{next(iter(argument))}.* does not carry it"):
            backbone.read(argument)
    down = {"down_block_additional_residuals": [one] * 4, "mid_block_additional_residual": one}
    with pytest.raises(CheckpointError, match="gives 5 residuals to a model that adds 9"):
        backbone.read(down)


@torch.no_grad()
def test_attention_across_frames_is_that_of_diffusers():
    """For two clips of three frames."""
    unet = tiny_unet()
    latents, timestep = torch.randn(6, 4, 8, 8), torch.tensor([7])
    conditions = {"text": torch.randn(6, 5, TEXT_WIDTH)}
    backbone = backbone_of(unet)
    alone = backbone.call(unet, latents, timestep, conditions)
    unet.set_attn_processor(CrossFrameAttnProcessor2_0(batch_size=2))
    expected = backbone.call(unet, latents, timestep, conditions)
    attend_across_frames(unet)
    ours = backbone.call(unet, latents, timestep, conditions)
    assert not torch.allclose(alone, expected, atol=1e-3)
    torch.testing.assert_close(ours, expected)


def test_sizes_that_are_not_free():
    spec = TensorSpec("clip", ("B*F", 4, "h/2", "w"))
    assert spec.bind({"F": 16}).shape == ("B*16", 4, "h/2", "w")
    assert spec.bind({"F": 16, "h": 9}).shape == ("B*16", 4, 5, "w")
    assert spec.bind({"B": 2, "F": 3, "h": 8, "w": 6}).shape == (6, 4, 4, 6)
