"""Plan files: what is written is read, damage is refused, what it was fitted for is asked."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encache.errors import PlanError
from encache.evaluate.fit import widen
from encache.runtime.plan import make_plan
from encache.runtime.planfile import (
    FittedOn,
    FittedPlan,
    Measured,
    check_fits,
    choose_plan,
    read_plans,
    write_plans,
)
from encache.runtime.schedulers import full_config
from encache.runtime.settings import Policy
from tests.runtime.solvers import solver

FITTED_ON = FittedOn("abc123", json.dumps(full_config(solver("ddim"))), 20, 3.0, "0" * 64, 64)


def fitted(stride, psnr=30.0, branches="apart"):
    rule = make_plan(solver("ddim"), 20, Policy(stride))
    kinds = ["apart"] + [branches] * (rule.num_evaluations - 1)
    measured = Measured(64, 0.01 * stride, (0.005, 0.02), 0.03, psnr)
    return FittedPlan(widen(rule, kinds, 3.0), FITTED_ON, measured)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "plans.json"
    write_plans(path, [fitted(4, 35.0), fitted(10, 25.0)])
    return path


def alter(path, change):
    data = json.loads(path.read_bytes())
    change(data)
    path.write_text(json.dumps(data))


def test_what_is_written_is_read_the_cheapest_first(path):
    cheap, dear = read_plans(path)
    assert (cheap, dear) == (fitted(10, 25.0), fitted(4, 35.0))
    assert cheap.share == 0.1
    assert dear.share == 0.25
    assert cheap.plan.hash() == fitted(10).plan.hash()


def test_a_call_with_one_branch_costs_half():
    assert fitted(5, branches="conditional").plan.count_rows(2) == 2 + 3
    assert fitted(5, branches="conditional").share == 5 / 40


def plan_of(data):
    return data["plans"][0]["plan"]


DAMAGES = {
    "its schema is 'encache plans 99'": lambda data: data.update(schema="encache plans 99"),
    "'schema' is missing": lambda data: data.pop("schema"),
    "holds no plan": lambda data: data.update(plans=[]),
    "'plans' is missing, or no list": lambda data: data.update(plans={}),
    "'row' holds a number that is not finite": lambda data: plan_of(data)["steps"][1][
        "row"
    ].__setitem__(0, float("nan")),
    "'samples' holds a number that is not finite": lambda data: plan_of(data)["samples"][
        3
    ].__setitem__(0, float("inf")),
    "'timesteps' holds a number that is not": lambda data: plan_of(data)["timesteps"].__setitem__(
        0, 10**400
    ),
    "'samples' holds something that is no number": lambda data: plan_of(data)["samples"][
        3
    ].__setitem__(0, "__import__('os')"),
    "'samples' must have 11 numbers": lambda data: plan_of(data)["samples"][3].pop(),
    "'samples' must have 21 rows": lambda data: plan_of(data)["samples"].pop(),
    "'row' must have 11 numbers": lambda data: plan_of(data)["steps"][0]["row"].append(0.0),
    "call 4 reads predictions that are not made": lambda data: plan_of(data)["steps"][1][
        "row"
    ].__setitem__(-1, 0.5),
    "must rise from 0": lambda data: plan_of(data)["steps"][1].update(call=0),
    "'call' must be a whole number": lambda data: plan_of(data)["steps"][1].update(call=-1),
    "'num_calls' must be a whole number": lambda data: plan_of(data).update(num_calls=10**9),
    "'branches' must be one of": lambda data: plan_of(data)["steps"][1].update(branches="both"),
    "'error' holds something": lambda data: data["plans"][0]["measured"].update(error=None),
    "'scheduler' is missing": lambda data: data["fitted_on"].update(scheduler="exec"),
    "'timestep' of call 4 must lie between 0 and 999": lambda data: plan_of(data)["steps"][
        1
    ].update(timestep=1045.6),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_damage_is_refused_in_one_sentence(path, reason):
    alter(path, DAMAGES[reason])
    with pytest.raises(PlanError, match="plans.json holds no plan that can be run") as refused:
        read_plans(path)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


@settings(max_examples=60, deadline=None)
@given(
    junk=st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=8,
    ),
    name=st.sampled_from(["steps", "samples", "timesteps", "num_calls", None]),
)
def test_any_json_is_a_plan_or_refused(tmp_path_factory, junk, name):
    path = tmp_path_factory.mktemp("junk") / "plans.json"
    write_plans(path, [fitted(10)])
    alter(
        path, lambda data: plan_of(data).update({name: junk}) if name else data.update(plans=junk)
    )
    with pytest.raises(PlanError):
        read_plans(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"PK\x03\x04"])
def test_what_is_no_json_is_refused(tmp_path, content):
    path = tmp_path / "plans.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match="holds no plan that can be run"):
        read_plans(path)


def test_a_front_is_asked_for_quality_or_cost(path):
    plans = read_plans(path)
    cheap, dear = plans
    assert choose_plan(plans) == dear
    assert choose_plan([fitted(4, 60.0), fitted(5, 50.0), fitted(10, 25.0)]) == fitted(5, 50.0)
    assert choose_plan(plans, quality=20) == cheap
    assert choose_plan(plans, quality=30) == dear
    assert choose_plan(plans, budget=0.2) == cheap
    assert choose_plan(plans, quality=20, budget=0.9) == cheap
    for asked in ({"quality": 40}, {"budget": 0.05}, {"quality": 30, "budget": 0.2}):
        with pytest.raises(PlanError, match="There are 25.0 dB for 0.1, 35.0 dB for 0.25 of"):
            choose_plan(plans, **asked)


def test_a_plan_file_is_never_written_over(path):
    with pytest.raises(FileExistsError):
        write_plans(path, [fitted(5)])
    assert len(read_plans(path)) == 2


def fits(**changes):
    asked = {
        "model": "abc123",
        "scheduler": full_config(solver("ddim")),
        "steps": 20,
        "guidance_scale": 3.0,
    }
    return check_fits(FITTED_ON, **{**asked, **changes})


def test_a_plan_serves_what_it_was_fitted_for():
    assert fits() is None
    assert fits(guidance_scale=3.2) is None
    assert fits(scheduler={**full_config(solver("ddim")), "_diffusers_version": "1.0"}) is None
    assert "guidance 3; how good it is at 5" in fits(guidance_scale=5.0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "def456"}, "another model"),
        (
            {"scheduler": full_config(solver("dpmsolver++"))},
            "another solver .it is DDIMScheduler, not DPM",
        ),
        ({"scheduler": full_config(solver("ddim", beta_end=0.02))}, "beta_end differs"),
        ({"steps": 50}, "20 steps, not 50"),
        ({"guidance_scale": 1.0}, "guidance 3, not 1"),
    ],
)
def test_anything_else_is_refused(changes, reason):
    with pytest.raises(PlanError, match=f"was fitted for .*{reason}"):
        fits(**changes)
