"""Published rules as plans: against what they are by definition."""

import numpy as np
import pytest
import torch

from encache.evaluate.rules import (
    RULES,
    adams_weights,
    hermite_weights,
    plan_of_weights,
    ridge_weights,
    zeus_weights,
)
from encache.runtime.blend import lagrange_weights
from encache.runtime.plan import make_plan
from encache.runtime.settings import Policy
from tests.runtime.solvers import solver

KEYS = (0, 1, 4, 9, 15)


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "euler"])
def test_a_line_through_two_key_calls_is_the_blend(name):
    def line(nodes, call, following, num_calls):
        return [0.0] * (len(nodes) - 2) + [*lagrange_weights(nodes[-2:], call)]

    ours = plan_of_weights(solver(name), 20, KEYS, line, "line")
    theirs = make_plan(solver(name), 20, Policy(key_calls=KEYS))
    torch.testing.assert_close(torch.tensor(ours.samples), torch.tensor(theirs.samples))
    for our, their in zip(ours.steps, theirs.steps, strict=True):
        torch.testing.assert_close(torch.tensor(our.row), torch.tensor(their.row))


@pytest.mark.parametrize("name", RULES.keys() - {"ab2"})
def test_key_calls_take_their_own_prediction(name):
    plan = plan_of_weights(solver("ddim"), 20, range(20), RULES[name], name)
    full = make_plan(solver("ddim"), 20)
    torch.testing.assert_close(torch.tensor(plan.samples), torch.tensor(full.samples))


def test_hermite_is_taylor_with_other_polynomials():
    """The second order by hand, on key calls two apart: H_1(y) = 2 y, H_2(y) = 4 y^2 - 2."""
    values = np.array([1.0, 4.0, 2.0])
    first = (values[2] - values[1]) / 2
    second = (first - (values[1] - values[0]) / 2) / 2
    for distance in (1, 2, 3):
        y = 0.5 * distance
        expected = values[2] + 0.5 * 2 * y * first + 0.25 * (4 * y**2 - 2) / 2 * second
        weights = hermite_weights((0, 2, 4), 4 + distance, 8, 20)
        assert np.dot(weights, values) == pytest.approx(expected)
    assert hermite_weights((0,), 3, 8, 20) == [1.0]


def test_spectrum_without_a_ridge_is_numpys_chebyshev_fit():
    values = np.array([1.0, -2.0, 0.5, 3.0, 2.0])
    fitted = np.polynomial.Chebyshev.fit(KEYS, values, 2, domain=(0, 20))
    weights = ridge_weights(KEYS, 18, 20, 20, degree=2, ridge=1e-12)
    assert np.dot(weights, values) == pytest.approx(fitted(18))
    # The ridge pulls the coefficients towards zero.
    assert abs(np.dot(ridge_weights(KEYS, 18, 20, 20, ridge=1e6), values)) < 1e-3


def test_ab2_is_plms_of_second_order_over_the_key_calls():
    """By diffusers' DDIM, call by call, with the weights of its PNDM at the key calls."""
    keys, ddim = (0, 5, 10, 15), solver("ddim")
    plan = plan_of_weights(ddim, 20, keys, adams_weights, "ab2")
    run = dict(zip(keys, [1.0, -0.5, 2.0, 0.3], strict=True))
    ddim.set_timesteps(20)
    latents, last, taken = torch.tensor([0.7]), None, 0.0
    for call, timestep in enumerate(ddim.timesteps):
        if call in run:
            taken = run[call] if last is None else (3 * run[call] - last) / 2
            last = run[call]
        latents = ddim.step(torch.tensor([taken]), timestep, latents).prev_sample
    assert np.dot(plan.samples[-1], [0.7, *run.values()]) == pytest.approx(latents.item(), rel=1e-5)
    assert adams_weights((0, 2), 3, 8, 20) == [-1.5, 2.5]


def test_zeus_goes_one_step_by_the_last_difference_and_stays():
    """By hand, on all outputs one after the other, run or forecast."""
    keys, num_calls = (0, 1, 4, 9, 15), 20
    run = dict(zip(keys, [1.0, 4.0, 2.0, -3.0, 0.5], strict=True))
    outputs: list[float] = []
    for call in range(num_calls):
        if call in run:
            outputs.append(run[call])
        elif call - 1 in run:
            outputs.append(2 * outputs[-1] - outputs[-2])
        else:
            outputs.append(outputs[-1])
    for call, expected in enumerate(outputs):
        nodes = [key for key in keys if key <= call]
        weights = zeus_weights(nodes, call, num_calls, num_calls)
        assert np.dot(weights, [run[key] for key in nodes]) == pytest.approx(expected)
