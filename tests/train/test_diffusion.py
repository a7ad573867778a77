"""Noising, targets and weights against their formulas, and against diffusers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr

from encache.train.diffusion import add_noise, ddim_step, min_snr_weight, target


@pytest.fixture
def drawn():
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 6, 4, 3, 3, generator=generator)
    return scheduler, clean, noise, torch.tensor([0, 10, 200, 500, 900, 999])


def test_noise_and_targets_equal_diffusers(drawn):
    scheduler, clean, noise, timesteps = drawn
    alpha_bar = scheduler.alphas_cumprod[timesteps]
    noisy = add_noise(clean, noise, alpha_bar)
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, timesteps))
    velocity = target(clean, noise, alpha_bar, "v_prediction")
    torch.testing.assert_close(velocity, scheduler.get_velocity(clean, noise, timesteps))
    assert target(clean, noise, alpha_bar, "epsilon") is noise


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_weights_follow_min_snr(drawn, prediction):
    scheduler, _, _, timesteps = drawn
    snr = compute_snr(scheduler, timesteps)
    divisor = snr if prediction == "epsilon" else snr + 1
    expected = torch.minimum(snr, torch.tensor(5.0)) / divisor
    alpha_bar = scheduler.alphas_cumprod[timesteps]
    torch.testing.assert_close(min_snr_weight(alpha_bar, 5.0, prediction), expected)
    assert min_snr_weight(alpha_bar, None).tolist() == [1.0] * 6


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_step_equals_diffusers(drawn, prediction):
    _, noisy, output, _ = drawn
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=prediction)
    scheduler.set_timesteps(20)  # 50 training timesteps apart
    before, after = torch.full((6,), 700), torch.full((6,), 650)
    alphas = scheduler.alphas_cumprod
    torch.testing.assert_close(
        ddim_step(noisy, output, alphas[before], alphas[after], prediction),
        scheduler.step(output, 700, noisy).prev_sample,
    )
