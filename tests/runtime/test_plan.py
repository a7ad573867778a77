"""Plans hold for every solver, key list and blend."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encache.errors import PlanError
from encache.runtime.blend import BLENDS, lagrange_weights
from encache.runtime.plan import (
    PAPER_KEY_CALLS,
    Decode,
    Encode,
    check_key_calls,
    make_plan,
    paper_key_calls,
    uniform_key_calls,
)
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
def test_every_call_is_decoded_once_from_filled_slots(keys, blend, name):
    plan = make_plan(solver(name), 20, key_calls=keys, blend=blend, prior_noise=True)
    filled, decoded = set(), []
    for step in plan.steps:
        if isinstance(step, Encode):
            filled.add(step.slot)
            # An encoder run may only read noise that exists already.
            assert not any(step.row[1 + len(decoded) :])
        else:
            decoded += range(step.start, step.stop)
            for row in step.weights:
                assert sum(row) == pytest.approx(1)
                assert {slot for slot, weight in enumerate(row) if weight} <= filled
    assert decoded == list(range(plan.num_calls))
    refreshed = max(0, len(keys) - 1) if blend == "interpolate-refresh" else 0
    assert plan.num_encoder_runs == len(keys) + refreshed


def test_key_calls_decode_from_their_own_features():
    for blend in BLENDS:
        plan = make_plan(solver("ddim"), 20, stride=5, blend=blend)
        slot_of = {}
        for step in plan.steps:
            if isinstance(step, Encode):
                slot_of[step.call] = step.slot
            elif step.start in plan.key_calls:
                one_hot = [0.0] * plan.num_slots
                one_hot[slot_of[step.start]] = 1.0
                assert list(step.weights[0]) == one_hot


def test_look_ahead_holds_the_noise():
    scheduler = solver("dpmsolver++")
    table = probe_solver(scheduler, 20)
    plan = make_plan(scheduler, 20, stride=5, blend="interpolate")
    guess = next(step for step in plan.steps if isinstance(step, Encode) and step.call == 5)
    torch.manual_seed(0)
    noise, held = torch.randn(2)
    history = torch.cat([noise[None], held.expand(20)])
    expected = table.inputs[5] @ history
    assert torch.tensor(guess.row) @ history == pytest.approx(expected.item(), abs=1e-5)
    assert not any(guess.row[2:])


def test_look_ahead_continues_the_noise():
    scheduler = solver("dpmsolver++")
    table = probe_solver(scheduler, 20)
    plan = make_plan(scheduler, 20, stride=5, blend="interpolate-continued")
    guess = next(step for step in plan.steps if isinstance(step, Encode) and step.call == 10)
    history = torch.randn(21, generator=torch.Generator().manual_seed(0))
    continued = history.clone()  # entry j + 1 is eps_j; eps_5 and eps_4 are known
    for call in range(6, 10):
        continued[call + 1] = history[6] + (call - 5) * (history[6] - history[5])
    expected = table.inputs[10] @ continued
    assert torch.tensor(guess.row) @ history == pytest.approx(expected.item(), abs=1e-5)


def test_damping_goes_half_as_far():
    plain, damped, reuse = (
        make_plan(solver("ddim"), 20, stride=5, blend=blend)
        for blend in ("extrapolate", "extrapolate-damped", "reuse")
    )
    assert damped.key_calls == plain.key_calls == reuse.key_calls
    assert plain.steps[3].weights[2] == pytest.approx((-0.4, 1.4))  # call 7 from keys 0 and 5
    assert damped.steps[3].weights[2] == pytest.approx((-0.2, 1.2))


@given(bound=st.integers(1, 12), stride=st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_splitting_decodes_changes_no_number(bound, stride):
    scheduler = solver("ddim")
    whole = make_plan(scheduler, 20, stride=stride)
    parts = make_plan(scheduler, 20, stride=stride, max_decode_batch=2 * bound + 1)
    decodes = [step for step in parts.steps if isinstance(step, Decode)]
    assert max(step.stop - step.start for step in decodes) <= bound
    for field in ("weights", "timesteps"):
        joined = [
            [row for d in plan.steps if isinstance(d, Decode) for row in getattr(d, field)]
            for plan in (whole, parts)
        ]
        assert joined[0] == joined[1]


def test_stride_one_runs_the_encoder_at_all_calls():
    plan = make_plan(solver("heun"), 10, stride=1)
    assert plan.key_calls == tuple(range(19))


def test_plan_is_hashable_json_and_named_by_its_numbers():
    plans = [make_plan(solver("ddim"), 20, stride=stride) for stride in (5, 5, 4)]
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
        make_plan(solver("ddim"), 20, key_calls=keys)


def test_bad_strides_and_lists():
    for stride in (0, 21):
        with pytest.raises(PlanError, match="and the 20 calls, not"):
            uniform_key_calls(stride, 20)
    with pytest.raises(PlanError, match="for 50 and 20 calls, not for 51"):
        paper_key_calls(51)
