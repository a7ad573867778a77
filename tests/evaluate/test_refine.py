"""Plans refined by gradients: the gradient is right, validation decides, a stop changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from encache.evaluate.fit import errors_of, run_plan, typical_error
from encache.evaluate.refine import Freedom, Refinement, differentiable, refine
from encache.model.backbone import backbone_of
from tests.conftest import tiny_unet
from tests.evaluate.test_fit import SCALE, batches_of, model, rule_of

__all__ = ["model"]  # a fixture

LAST = 999.0
SETTINGS = Refinement(steps=6, kept=2, rate=0.2)


@pytest.fixture(scope="module")
def problem(model):
    _, denoise, conditions = model
    batches = batches_of(denoise, number=4, conditions=conditions)
    validation = batches_of(denoise, number=2, seed=1, conditions=conditions)
    unet = tiny_unet().requires_grad_(False)
    gradients = differentiable(backbone_of(unet), SCALE)
    return batches, validation, denoise, gradients


def freedom_of(problem, plan):
    batches, _, denoise, _ = problem
    histories = []
    for batch in batches:
        run_plan(plan, batch, denoise)
        histories.append(list(batch.history))
    return Freedom(plan, histories, 500.0, LAST)


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_no_change_is_the_plan_itself(name, problem):
    batches, _, denoise, gradients = problem
    _, plan = rule_of(name)
    freedom = freedom_of(problem, plan)
    expected = run_plan(plan, batches[0], denoise)
    numbers = torch.zeros(len(freedom))
    with torch.no_grad():
        ours = freedom.sample(numbers, batches[0], gradients)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    frozen = freedom.freeze(numbers)
    torch.testing.assert_close(torch.tensor(frozen.samples), torch.tensor(plan.samples))


def test_a_frozen_plan_is_what_was_differentiated(problem):
    batches, _, denoise, gradients = problem
    _, plan = rule_of()
    freedom = freedom_of(problem, plan)
    numbers = 0.05 * torch.randn(len(freedom), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = freedom.sample(numbers, batches[0], gradients)
    frozen = freedom.freeze(numbers)
    assert [one.timestep for one in frozen.steps] != [one.timestep for one in plan.steps]
    torch.testing.assert_close(
        run_plan(frozen, batches[0], denoise), expected, rtol=1e-3, atol=1e-3
    )


def test_the_denoiser_is_told_no_time_that_it_does_not_know(problem):
    freedom = freedom_of(problem, rule_of()[1])
    for far in (100.0, -100.0):
        told = freedom.timesteps(torch.full((len(freedom),), far))
        assert told.min() >= 0
        assert told.max() <= LAST


def test_the_gradient_is_the_quotient_of_differences(problem):
    batches, _, _, gradients = problem
    _, plan = rule_of()
    freedom = freedom_of(problem, plan)

    def loss(numbers):
        return freedom.sample(numbers, batches[0], gradients).square().mean()

    start = torch.zeros(len(freedom), requires_grad=True)
    [gradient] = torch.autograd.grad(loss(start), start)
    direction = torch.nn.functional.normalize(gradient, dim=0)
    with torch.no_grad():
        quotient = (loss(2e-3 * direction) - loss(-2e-3 * direction)) / 4e-3
    assert gradient[-plan.num_evaluations :].abs().max() > 0  # timesteps are among the numbers
    torch.testing.assert_close(quotient, gradient @ direction, rtol=2e-2, atol=1e-4)


def test_refining_lowers_the_error_and_goes_on_after_a_stop(problem):
    batches, validation, denoise, gradients = problem
    _, rule = rule_of()
    kept = {}

    def keep(step, make):
        if step not in kept:
            kept[step] = make()
        return kept[step]

    whole = refine(rule, batches, validation, denoise, gradients, SETTINGS, LAST, keep)
    assert sorted(kept) == [2, 4, 6]
    before, after = (errors_of(plan, validation, denoise).mean() for plan in (rule, whole))
    assert after < 0.9 * before
    del kept[4], kept[6]  # stopped after the first look
    assert refine(rule, batches, validation, denoise, gradients, SETTINGS, LAST, keep) == whole


def test_pictures_that_go_astray_do_not_lead(problem):
    batches, validation, denoise, gradients = problem
    _, rule = rule_of()

    def spoil(batch):
        def wanted():
            latents = batch.wanted().clone()
            latents[:, 0] *= -1  # half of the pictures, of which no plan makes that
            return latents

        return replace(batch, wanted=wanted, history=[])

    spoilt = [spoil(batch) for batch in batches]
    refined = refine(rule, spoilt, validation, denoise, gradients, SETTINGS, LAST)
    before, after = (typical_error(plan, validation, denoise) for plan in (rule, refined))
    assert after < 0.95 * before


def test_what_does_not_serve_the_validation_pictures_is_not_taken(problem):
    batches, validation, denoise, gradients = problem
    _, rule = rule_of()

    def ruin(step, make):
        state = make()
        return {**state, "numbers": state["numbers"] + np.float64(100.0)}

    assert refine(rule, batches, validation, denoise, gradients, SETTINGS, LAST, ruin) == rule
