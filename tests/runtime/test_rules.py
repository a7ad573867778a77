"""Published rules as plans: against what they are by definition."""

import numpy as np
import pytest
import torch

from encache.runtime.blend import lagrange_weights
from encache.runtime.plan import make_plan
from encache.runtime.rules import RULES, hermite_weights, plan_of_weights, ridge_weights
from encache.runtime.settings import Policy
from tests.runtime.solvers import solver

KEYS = (0, 1, 4, 9, 15)


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "euler"])
def test_a_line_through_two_key_calls_is_the_blend(name):
    def line(nodes, call, num_calls):
        return [0.0] * (len(nodes) - 2) + [*lagrange_weights(nodes[-2:], call)]

    ours = plan_of_weights(solver(name), 20, KEYS, line, "line")
    theirs = make_plan(solver(name), 20, Policy(key_calls=KEYS))
    torch.testing.assert_close(torch.tensor(ours.samples), torch.tensor(theirs.samples))
    for our, their in zip(ours.steps, theirs.steps, strict=True):
        torch.testing.assert_close(torch.tensor(our.row), torch.tensor(their.row))


@pytest.mark.parametrize("name", RULES)
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
        weights = hermite_weights((0, 2, 4), 4 + distance, 20)
        assert np.dot(weights, values) == pytest.approx(expected)
    assert hermite_weights((0,), 3, 20) == [1.0]


def test_spectrum_without_a_ridge_is_numpys_chebyshev_fit():
    values = np.array([1.0, -2.0, 0.5, 3.0, 2.0])
    fitted = np.polynomial.Chebyshev.fit(KEYS, values, 2, domain=(0, 20))
    weights = ridge_weights(KEYS, 18, 20, degree=2, ridge=1e-12)
    assert np.dot(weights, values) == pytest.approx(fitted(18))
    # The ridge pulls the coefficients towards zero.
    assert abs(np.dot(ridge_weights(KEYS, 18, 20, ridge=1e6), values)) < 1e-3
