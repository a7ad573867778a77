"""The table equals the stepped diffusers scheduler."""

import json

import diffusers
import pytest
import torch

from encache.errors import PlanError
from encache.model.loading import scheduler_from_config
from encache.runtime.schedulers import SCHEDULERS, full_config, make_scheduler
from encache.runtime.solver import probe_solver
from tests.conftest import stable_diffusion_scheduler
from tests.runtime.solvers import NAMES, solver


def step_by_hand(scheduler, steps, noise, outputs):
    """diffusers' own denoising loop, with given model outputs."""
    scheduler.set_timesteps(steps)
    sample = noise * scheduler.init_noise_sigma
    inputs, samples = [], [sample]
    for timestep, output in zip(scheduler.timesteps, outputs, strict=True):
        inputs.append(scheduler.scale_model_input(sample, timestep))
        sample = scheduler.step(output, timestep, sample).prev_sample
        samples.append(sample)
    return torch.stack(inputs), torch.stack(samples)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("name", NAMES)
def test_table_equals_the_stepped_scheduler(name, steps, prediction_type):
    scheduler = solver(name, prediction_type=prediction_type)
    table = probe_solver(scheduler, steps)
    torch.manual_seed(0)
    noise = torch.randn(1, 4, 8, 8)
    outputs = torch.randn(table.num_calls, 1, 4, 8, 8)
    inputs, samples = step_by_hand(scheduler, steps, noise, outputs)
    history = torch.cat([noise[None], outputs])
    for rows, stepped in ((table.inputs, inputs), (table.samples, samples)):
        difference = torch.tensordot(rows, history, 1) - stepped
        assert difference.abs().max() <= 2e-5 * stepped.abs().max()
    torch.testing.assert_close(table.timesteps, scheduler.timesteps.float())


@pytest.mark.parametrize(
    ("name", "calls"), [("ddim", 50), ("pndm", 51), ("heun", 99), ("unipc", 50)]
)
def test_number_of_calls(name, calls):
    assert probe_solver(solver(name), 50).num_calls == calls


def test_probing_leaves_the_scheduler_and_the_random_state_alone():
    scheduler = solver("dpmsolver++")
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    probe_solver(scheduler, 10)
    assert scheduler.num_inference_steps is None
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmsolver++"])
def test_prior_noise_equals_injection_in_the_loop(name):
    scheduler, strength = solver(name), 0.003
    table = probe_solver(scheduler, 20, strength)
    scheduler.set_timesteps(20)
    torch.manual_seed(0)
    noise, outputs = torch.randn(4), torch.randn(20, 4)
    sample = noise * scheduler.init_noise_sigma
    for call, timestep in enumerate(scheduler.timesteps):
        if timestep < 500:
            scale = scheduler.scale_model_input(torch.ones(1), timestep)
            sample = sample + strength * noise / scale
        model_input = scheduler.scale_model_input(sample, timestep)
        history = torch.cat([noise[None], outputs])
        torch.testing.assert_close(table.inputs[call] @ history, model_input, rtol=1e-4, atol=1e-4)
        sample = scheduler.step(outputs[call], timestep, sample).prev_sample
    torch.testing.assert_close(table.samples[-1] @ history, sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EulerAncestralDiscreteScheduler(),
        diffusers.DDPMScheduler(clip_sample=False),
        diffusers.LCMScheduler(),
        diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        diffusers.DDIMScheduler(clip_sample=True),
        diffusers.DPMSolverMultistepScheduler(thresholding=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_stochastic_and_clipping_schedulers_are_refused(scheduler):
    with pytest.raises(PlanError, match="draws noise, clips or thresholds"):
        probe_solver(scheduler, 10)


def test_steps_of_zero_and_too_many():
    for name in NAMES:
        for steps in (0, -1, 2000):
            with pytest.raises(PlanError, match="between 1 and 1000 steps"):
                probe_solver(solver(name), steps)


def test_unknown_scheduler():
    with pytest.raises(PlanError, match="Choose one of ddim"):
        make_scheduler("ancestral", stable_diffusion_scheduler())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedulers_config_is_json_and_makes_the_same_again(name):
    made = make_scheduler(name, stable_diffusion_scheduler())
    text = json.dumps(full_config(made), allow_nan=False)
    again = scheduler_from_config(json.loads(text))
    assert full_config(again) == full_config(made)
    assert again.config.get("lambda_min_clipped") == made.config.get("lambda_min_clipped")
