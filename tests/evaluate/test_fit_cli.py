"""`encache-fit` as a user meets it."""

import json
import sys

import pytest
from click.testing import CliRunner

from encache.evaluate.cli import main as evaluate
from encache.evaluate.fit_cli import main
from encache.evaluate.store import Store
from encache.runtime.planfile import read_plans


@pytest.fixture
def arguments(model_folder, tmp_path):
    """A small fit of the tiny model, in a store by name; `more` comes on top."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\nhot dog\ngreen pear\nyellow banana\n")

    def make(*more, store="store", output="plans.json"):
        values = ["--ckpt", model_folder, "--prompts", prompts, "--backend", "torch"]
        values += ["--num-images", 16, "--num-held-out", 4, "--refine-steps", 2, "--steps", 6]
        values += ["--store", tmp_path / store, "--output", tmp_path / output, *more]
        return [str(value) for value in values]

    return make


def fit(arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result


def test_a_front_is_fitted_measured_and_written(arguments, tmp_path):
    path = tmp_path / "plans.json"
    result = fit(arguments("--runs", "3", "--runs", "2"))
    assert result.stdout.strip() == str(path)
    assert "2 runs at 0, 3: latent error" in result.stderr
    cheap, dear = read_plans(path)
    assert cheap.plan.key_calls == (0, 3)
    assert dear.plan.key_calls == (0, 2, 4)
    assert dear.share == 0.5
    for one in (cheap, dear):
        low, high = one.measured.interval
        assert low <= one.measured.error <= high
        assert one.measured.error < one.measured.rule_error
        assert one.measured.num_pictures == 4
    assert dear.fitted_on.steps == 6
    assert dear.fitted_on.num_pictures == 16
    again = CliRunner().invoke(main, arguments("--runs", "3"))
    assert again.exit_code == 1
    assert "exists already" in again.output


def test_fitted_plans_are_evaluated_beside_the_others(arguments, model_folder, tmp_path):
    fit(arguments("--runs", "3", "--runs", "2"))
    command = ["--ckpt", model_folder, "--prompts", tmp_path / "prompts.txt", "--num-images", 2]
    command += ["--plan", tmp_path / "plans.json", "--stride", 2, "--no-drift", "--grid", 0]
    command += ["--report", tmp_path / "report", "--steps"]
    result = CliRunner().invoke(evaluate, list(map(str, [*command, 6])))
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "report" / "report.json").read_text())["rows"]
    found = {row["encoder_runs"]: row for row in rows if "fitted plan" in row["name"]}
    assert {runs: row["share"] for runs, row in found.items()} == {
        2: pytest.approx(1 / 3),
        3: pytest.approx(1 / 2),
    }
    assert all(row["opponent"] and row["latent_error"]["mean"] > 0 for row in found.values())
    refused = CliRunner().invoke(evaluate, list(map(str, [*command, 7])))
    assert refused.exit_code == 1
    assert "The plan was fitted for 6 steps, not 7" in refused.stderr


def test_a_killed_fit_goes_on_and_ends_equal(arguments, tmp_path, monkeypatch):
    fit(arguments("--runs", "3", store="whole", output="whole.json"))
    made = []
    whole_get = Store.get

    def get(self, description, make):
        def counted():
            made.append(description)
            if len(made) == 4:  # amid the trajectories, the fit and the measurement in turn
                raise KeyboardInterrupt
            return make()

        return whole_get(self, description, counted)

    monkeypatch.setattr(Store, "get", get)
    stops = 0
    while CliRunner().invoke(main, arguments("--runs", "3", store="killed")).exit_code:
        stops += 1
        made.clear()
        assert stops < 10
    assert stops >= 2
    whole, killed = (
        json.loads((tmp_path / name).read_text()) for name in ("whole.json", "plans.json")
    )
    assert killed == whole


def test_searched_key_calls_are_as_many(arguments, tmp_path):
    fit(arguments("--runs", "2", "--search", "1", "--refine-steps", "0"))
    [plan] = read_plans(tmp_path / "plans.json")
    assert plan.plan.num_evaluations == 2


def test_listed_key_calls_another_solver_and_no_guidance(arguments, tmp_path):
    options = ("--key-calls", "0,1,4", "--scheduler", "dpmsolver++", "--guidance-scale", "1")
    fit(arguments(*options))
    [plan] = read_plans(tmp_path / "plans.json")
    assert plan.plan.key_calls == (0, 1, 4)
    assert plan.plan.count_rows(1) == 3
    assert {step.branches for step in plan.plan.steps} == {"guided"}
    assert json.loads(plan.fitted_on.scheduler)["_class_name"] == "DPMSolverMultistepScheduler"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--key-calls", "0,2", "--runs", "2"), "--runs means nothing beside --key-calls"),
        (("--key-calls", "0,2", "--search", "2"), "--search means nothing beside --key-calls"),
        (("--runs", "7"), "between 1 and 6 calls, not 7"),
        (("--key-calls", "paper"), "for 50 and 20 calls, not for 6"),
        (("--engine-dir", "engines"), "--engine-dir means nothing with --backend torch"),
        (("--num-images", "15"), "15 is not in the range"),
    ],
)
def test_what_does_not_go_together_is_refused_before_a_picture(arguments, more, reason, tmp_path):
    result = CliRunner().invoke(main, arguments(*more))
    assert result.exit_code != 0
    assert reason in result.output.replace("\n", " ")
    assert not [*tmp_path.glob("store/*")]


def test_a_missing_library_is_named(arguments, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pymoo", None)
    monkeypatch.delitem(sys.modules, "encache.evaluate.search", raising=False)
    for name in [name for name in sys.modules if name.startswith("pymoo.")]:
        monkeypatch.delitem(sys.modules, name)
    result = CliRunner().invoke(main, arguments("--runs", "2", "--search", "1"))
    assert result.exit_code == 1
    assert "--search needs pymoo" in result.output
    assert not [*tmp_path.glob("store/*")]


def test_another_model_has_no_prompts_of_its_own(model_folder, tmp_path):
    output = str(tmp_path / "plans.json")
    result = CliRunner().invoke(main, ["--ckpt", str(model_folder), "--output", output])
    assert result.exit_code == 2
    assert "Give --prompts" in result.output
