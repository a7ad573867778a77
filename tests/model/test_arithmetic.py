"""The halves cost what the undivided UNet costs."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from encache.model.arithmetic import count_arithmetic
from encache.model.spec import CUTS
from tests.conftest import TEXT_WIDTH, tiny_unet
from tests.families import tiny_dit, tiny_if_unet, tiny_video_unet


@pytest.mark.parametrize("cut", CUTS)
def test_halves_add_up(cut):
    # torch's counter misses the CPU's fused attention, so count on shapes alone here too.
    unet = tiny_unet().to("meta")
    latents, timestep = torch.empty(1, 4, 8, 8, device="meta"), torch.empty(1, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(latents, timestep, torch.empty(1, 7, TEXT_WIDTH, device="meta"))
    counted = count_arithmetic(unet, cut, 8, 8, text_length=7)
    # Both halves embed the time, which the undivided UNet does once.
    assert counted.full == pytest.approx(counter.get_total_flops() / 1e9, rel=0.01)


@pytest.mark.parametrize(
    ("make", "cut", "frames"),
    [(tiny_if_unet, "mid", 1), (tiny_dit, "1", 1), (tiny_video_unet, "mid", 3)],
)
def test_halves_of_other_families_add_up(make, cut, frames):
    whole, halves = (
        count_arithmetic(make(), one, 8, 8, text_length=7, num_frames=frames)
        for one in ("none", cut)
    )
    assert 0.1 * whole.full < halves.decoder < 0.9 * whole.full
    assert halves.full == pytest.approx(whole.full, rel=0.05)


def test_stable_diffusion_1_5():
    # diffusers' defaults are its channels and blocks: 401.6 GMAC, of which down and mid 32.5 %.
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    counted = count_arithmetic(unet, "mid", 64, 64)
    assert counted.full == pytest.approx(2 * 401.6, rel=0.002)
    assert counted.encoder / counted.full == pytest.approx(0.325, abs=0.002)
    deep = count_arithmetic(unet, "up2", 64, 64)
    assert deep.decoder / deep.full == pytest.approx(0.246, abs=0.002)
