"""encache-run --plan: a plan from a file draws as its numbers say, and only where it fits."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from encache.errors import EncacheError, PlanError
from encache.evaluate.fit import widen
from encache.model.checkpoint import find_checkpoint
from encache.model.loading import read_outline
from encache.runtime.cli import main
from encache.runtime.images import read_metadata
from encache.runtime.pipeline import EncachePipeline
from encache.runtime.plan import make_plan
from encache.runtime.schedulers import full_config, make_scheduler
from encache.runtime.settings import Policy
from tests.conftest import make_pipeline


@pytest.fixture
def run(model_folder, engine_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        places = ("--ckpt", model_folder, "--engine-dir", engine_folder.parent, "--prompt", "x")
        return CliRunner().invoke(main, [*map(str, (*places, *arguments))])

    return run


@pytest.mark.parametrize(
    ("chosen", "stride"),
    [((), 2), (("--quality", "30"), 2), (("--quality", "10"), 5), (("--budget", "0.3"), 5)],
)
def test_a_plan_of_the_file_draws_its_own_picture(run, plans, tmp_path, chosen, stride):
    by_plan = run("--plan", plans, *chosen, "--output", "a.png")
    assert by_plan.exit_code == 0, by_plan.output
    rule = ("--stride", stride, "--steps", 10, "--guidance-scale", 3)
    assert run(*rule, "--output", "b.png").exit_code == 0
    ours, theirs = (Image.open(tmp_path / name) for name in ("a.png", "b.png"))
    assert ours.tobytes() == theirs.tobytes()
    said = read_metadata(tmp_path / "a.png")
    assert said["stride"] is None
    assert said["num_inference_steps"] == 10
    assert len(said["plan"]) == 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--steps", 20), "10 steps, not 20"),
        (("--scheduler", "euler"), "another solver"),
        (("--guidance-scale", 1), "guidance 3, not 1"),
        (("--stride", 5), "--stride means nothing beside a plan"),
        (("--blend", "reuse"), "--blend means nothing beside a plan"),
        (("--quality", 60), "No plan in the file is that good"),
        (("--quality", 30, "--budget", 0.3), "that good and that cheap"),
        (("--cut", "up2"), "caches the output"),
    ],
)
def test_where_it_does_not_fit_it_is_refused(run, plans, arguments, words):
    result = run("--plan", plans, *arguments)
    assert result.exit_code in (1, 2)
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_another_models_plan_is_refused(run, plans):
    content = json.loads(plans.read_text())
    content["fitted_on"]["model"] = "f" * 64
    plans.write_text(json.dumps(content))
    result = run("--plan", plans)
    assert result.exit_code == 1
    assert "fitted for another model" in result.stderr


def alter_scheduler(plans, change):
    content = json.loads(plans.read_text())
    change(content["fitted_on"]["scheduler"])
    plans.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: config.pop("_class_name"), "another solver (it is None, not"),
        (lambda config: config.update(_class_name="os"), "another solver (it is os, not"),
        (lambda config: config.update(beta_end=0.5), "another solver (beta_end differs)"),
        (lambda config: config.clear(), "'num_train_timesteps' must be a whole number"),
        (lambda config: config.update(num_train_timesteps=10**9), "must be a whole number"),
        (lambda config: config.update(num_train_timesteps=5), "must lie between 0 and 4"),
    ],
)
def test_what_a_plan_says_of_a_solver_is_only_compared(run, plans, change, words):
    alter_scheduler(plans, change)
    result = run("--plan", plans)
    assert result.exit_code == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_the_solver_that_a_plan_was_fitted_with_is_found_by_its_name(run, plans, model_folder):
    own = read_outline(find_checkpoint(model_folder)).scheduler
    other = full_config(make_scheduler("dpmsolver++", own))
    alter_scheduler(plans, lambda config: (config.clear(), config.update(other)))
    assert run("--plan", plans, "--dry-run").exit_code == 0
    refused = run("--plan", plans, "--scheduler", "ddim")
    assert "it is DPMSolverMultistepScheduler, not DDIMScheduler" in refused.stderr


def test_another_guidance_is_warned_of_and_drawn(run, plans):
    result = run("--plan", plans, "--guidance-scale", 5)
    assert result.exit_code == 0, result.output
    assert "fitted for guidance 3" in result.stderr


def test_what_chooses_needs_plans(run):
    assert "this model comes with none: give --plan" in run("--budget", 0.5).stderr


@pytest.fixture
def own(model_folder, plans, tmp_path):
    """The key calls of a model that has plans of its own, the dear one of 50 dB."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    content = json.loads(plans.read_text())
    content["plans"][0]["measured"]["psnr"] = 50.0
    (folder / "plans.json").write_text(json.dumps(content))

    def key_calls(*arguments):
        command = ["--ckpt", folder, "--dry-run", *arguments]
        result = CliRunner().invoke(main, list(map(str, command)))
        assert result.exit_code == 0, result.output
        return tuple(json.loads(result.stdout)["key_calls"])

    return key_calls


def test_a_models_own_good_plan_is_its_default(own, tmp_path):
    assert own() == (0, 2, 4, 6, 8)
    assert own("--guidance-scale", 3.2) == (0, 2, 4, 6, 8)
    assert own("--budget", 0.3) == own("--quality", 10) == (0, 5)
    (tmp_path / "model" / "plans.json").unlink()
    assert own() == tuple(range(0, 50, 3))


@pytest.mark.parametrize(
    "said",
    [
        ("--stride", 3, "--steps", 50),
        ("--steps", 50),
        ("--guidance-scale", 5),
        ("--guidance-scale", 1),
        ("--blend", "extrapolate"),
        ("--no-prior-noise",),
        ("--cut", "up2"),
    ],
)
def test_whoever_says_how_gets_the_rule(own, said):
    assert own(*said) == tuple(range(0, 50, 3))


def test_plans_of_other_weights_are_no_default(own, tmp_path):
    path = tmp_path / "model" / "plans.json"
    content = json.loads(path.read_text())
    content["fitted_on"]["model"] = "f" * 64
    path.write_text(json.dumps(content))
    assert own() == tuple(range(0, 50, 3))


def test_an_engine_folder_may_hold_plans(engine_folder, plans, tmp_path):
    folder = tmp_path / "engines"
    shutil.copytree(engine_folder, folder)
    shutil.copy(plans, folder)
    command = ["--engine-dir", folder, "--dry-run", "--budget", 0.3]
    result = CliRunner().invoke(main, list(map(str, command)))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["key_calls"] == [0, 5]


def test_in_python():
    ours = EncachePipeline.from_pipe(make_pipeline())
    call = {"num_inference_steps": 6, "output_type": "latent"}
    noise = torch.randn(1, 4, 8, 8)
    plan = make_plan(ours.scheduler, 6, Policy(3))
    expected = ours("x", stride=3, latents=noise, **call).images
    assert torch.equal(ours("x", plan=plan, latents=noise, **call).images, expected)
    for name, value in {"stride": 3, "blend": "reuse", "prior_noise": True}.items():
        with pytest.raises(EncacheError, match=f"a plan or {name}, not both"):
            ours("x", plan=plan, latents=noise, **{name: value}, **call)
    guided = widen(plan, ["apart"] * plan.num_evaluations, 3.0)
    with pytest.raises(EncacheError, match="fitted with guidance"):
        ours("x", plan=guided, latents=noise, guidance_scale=1.0, **call)
    with pytest.raises(PlanError, match="one of 6 calls, and the solver makes 7"):
        ours("x", plan=plan, latents=noise, num_inference_steps=7)
