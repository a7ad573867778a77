"""Plans hold for every solver, key list and blend."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encache.errors import PlanError
from encache.runtime.blend import BLENDS, lagrange_weights
from encache.runtime.key_calls import (
    PAPER_KEY_CALLS,
    check_key_calls,
    paper_key_calls,
    uniform_key_calls,
)
from encache.runtime.plan import Decode, Evaluate, make_plan
from encache.runtime.settings import FULL, Policy
from encache.runtime.solver import probe_solver
from tests.runtime.solvers import NAMES, solver

key_lists = st.sets(st.integers(1, 19), max_size=8).map(lambda keys: (0, *sorted(keys)))


@given(nodes=st.lists(st.integers(0, 60), min_size=1, max_size=3, unique=True), call=st.integers())
def test_lagrange_weights_reproduce_polynomials(nodes, call):
    call %= 100
    weights = lagrange_weights(nodes, call)
    for degree in range(len(nodes)):
        blended = sum(w * node**degree for w, node in zip(weights, nodes, strict=True))
        assert blended == pytest.approx(call**degree, rel=1e-6, abs=1e-6)


def test_two_nodes_are_tiec():
    earlier, later, call = 10, 20, 14
    w = (later - call) / (later - earlier)
    assert lagrange_weights((earlier, later), call) == pytest.approx((w, 1 - w))


@settings(max_examples=60, deadline=None)
@given(keys=key_lists, blend=st.sampled_from(BLENDS), name=st.sampled_from(NAMES))
def test_caching_the_output_is_a_blend_multiplied_in(keys, blend, name):
    """A sampler that keeps the predictions in a ring and mixes them, as a cut keeps features."""
    policy = Policy(key_calls=keys, blend=blend)
    ours = make_plan(solver(name), 20, policy)
    theirs = make_plan(solver(name), 20, replace(policy, cut="mid"))
    assert all(step.slot is None for step in ours.steps)
    assert ours.num_evaluations == theirs.num_evaluations == len(ours.columns) - 1

    def denoise(latents, timestep):  # any function that is not linear
        return torch.sin(latents + timestep / 100)

    noise = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def combine(row, history):
        return torch.tensordot(torch.tensor(row[: len(history)]).double(), torch.stack(history), 1)

    composed, history, ring = [noise], [noise], {}
    for step in ours.steps:
        composed.append(denoise(combine(step.row, composed), step.timestep))
    for step in theirs.steps:
        if isinstance(step, Evaluate):
            ring[step.slot] = denoise(combine(step.row, history), step.timestep)
        else:
            for weights in step.weights:
                mixed = (weight * ring[slot] for slot, weight in enumerate(weights) if weight)
                history.append(sum(mixed))
    torch.testing.assert_close(
        combine(ours.samples[-1], composed),
        combine(theirs.samples[-1], history),
        rtol=1e-4,
        atol=1e-5,
    )
    for filled, calls in zip(ours.filled, ours.finished, strict=True):
        assert not any(any(ours.samples[call + 1][filled:]) for call in calls)
    assert [call for calls in ours.finished for call in calls] == list(range(ours.num_calls))


@settings(max_examples=60, deadline=None)
@given(keys=key_lists, blend=st.sampled_from(BLENDS), name=st.sampled_from(NAMES))
def test_every_call_is_decoded_once_from_filled_slots(keys, blend, name):
    policy = Policy(key_calls=keys, blend=blend, prior_noise=True, cut="mid")
    plan = make_plan(solver(name), 20, policy)
    filled, decoded = set(), []
    for step in plan.steps:
        if isinstance(step, Evaluate):
            filled.add(step.slot)
            # An encoder run may only read noise that exists already.
            assert not any(step.row[1 + len(decoded) :])
        else:
            decoded += range(step.start, step.stop)
            for row in step.weights:
                assert sum(row) == pytest.approx(1)
                assert {slot for slot, weight in enumerate(row) if weight} <= filled
    assert decoded == list(range(plan.num_calls))
    gaps = sum(second - first > 1 for first, second in pairwise(keys))
    refreshed = gaps if blend == "interpolate-refresh" else 0
    assert plan.num_evaluations == len(keys) + refreshed


def test_key_calls_decode_from_their_own_features():
    for blend in BLENDS:
        plan = make_plan(solver("ddim"), 20, Policy(5, blend=blend, cut="mid"))
        slot_of = {}
        for step in plan.steps:
            if isinstance(step, Evaluate):
                slot_of[step.call] = step.slot
            elif step.start in plan.key_calls:
                one_hot = [0.0] * plan.num_slots
                one_hot[slot_of[step.start]] = 1.0
                assert list(step.weights[0]) == one_hot


def test_look_ahead_holds_the_noise():
    scheduler = solver("dpmsolver++")
    table = probe_solver(scheduler, 20)
    plan = make_plan(scheduler, 20, Policy(5, blend="interpolate", cut="mid"))
    guess = next(step for step in plan.steps if isinstance(step, Evaluate) and step.call == 5)
    torch.manual_seed(0)
    noise, held = torch.randn(2)
    history = torch.cat([noise[None], held.expand(20)])
    expected = table.inputs[5] @ history
    assert torch.tensor(guess.row) @ history == pytest.approx(expected.item(), abs=1e-5)
    assert not any(guess.row[2:])


@given(bound=st.integers(1, 12), stride=st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_splitting_decodes_changes_no_number(bound, stride):
    scheduler = solver("ddim")
    policy = Policy(stride, cut="mid")
    whole = make_plan(scheduler, 20, policy)
    parts = make_plan(scheduler, 20, policy, max_decode_batch=2 * bound + 1)
    decodes = [step for step in parts.steps if isinstance(step, Decode)]
    assert max(step.stop - step.start for step in decodes) <= bound
    for field in ("weights", "timesteps"):
        joined = [
            [row for d in plan.steps if isinstance(d, Decode) for row in getattr(d, field)]
            for plan in (whole, parts)
        ]
        assert joined[0] == joined[1]


def test_stride_one_runs_the_encoder_at_all_calls():
    plan = make_plan(solver("heun"), 10, FULL)
    assert plan.key_calls == tuple(range(19))


def test_plan_is_hashable_json_and_named_by_its_numbers():
    plans = [make_plan(solver("ddim"), 20, Policy(stride)) for stride in (5, 5, 4)]
    assert plans[0] == plans[1]
    assert hash(plans[0]) == hash(plans[1])
    assert plans[0].hash() == plans[1].hash() != plans[2].hash()
    data = json.loads(plans[0].to_json())
    assert data["key_calls"] == [0, 5, 10, 15]
    assert len(data["samples"]) == 21


@pytest.mark.parametrize("num_calls", PAPER_KEY_CALLS)
def test_paper_lists_are_valid(num_calls):
    assert check_key_calls(paper_key_calls(num_calls), num_calls) == PAPER_KEY_CALLS[num_calls]


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ((), "start at 0"),
        ((1, 2), "start at 0"),
        ((0, 5, 5), "without repeats"),
        ((0, 7, 3), "rise"),
        ((0, 20), "beyond the last of 20"),
    ],
)
def test_bad_key_calls(keys, reason):
    with pytest.raises(PlanError, match=reason):
        make_plan(solver("ddim"), 20, Policy(key_calls=keys))


def test_bad_strides_and_lists():
    for stride in (0, 21):
        with pytest.raises(PlanError, match="and the 20 calls, not"):
            uniform_key_calls(stride, 20)
    with pytest.raises(PlanError, match="for 50 and 20 calls, not for 51"):
        paper_key_calls(51)
