"""`encache-eval` as a user meets it."""

import json
import math

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from encache.evaluate.cli import main
from encache.evaluate.sampling import relative_error
from encache.runtime.pipeline import EncachePipeline
from tests.conftest import ONE_SEGMENT, save_tuned


@pytest.fixture
def arguments(model_folder, tmp_path):
    """A small evaluation of the tiny model; `more` comes on top."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\nhot dog\n")

    def make(*more, ckpts=(model_folder,)):
        values = [word for ckpt in ckpts for word in ("--ckpt", ckpt)]
        values += ["--prompts", prompts, "--num-images", 4, "--steps", 8, "--batch-size", 2]
        values += ["--stride", 2, "--stride", 4]
        values += ["--report", tmp_path / "report", *more]
        return [str(value) for value in values]

    return make


def evaluate(arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result


def rows_of(folder):
    return json.loads((folder / "report.json").read_text())["rows"]


def test_a_report_pairs_everything_with_the_full_sampler(arguments, tmp_path):
    result = evaluate(arguments("--cut", "mid", "--cut", "up2"))
    folder = tmp_path / "report"
    assert result.stdout.strip() == str(folder / "index.html")
    rows = rows_of(folder)
    full, *others = rows
    assert (full["name"], full["latent_error"]) == ("tiny, 8 steps", None)
    cached = [row for row in others if not row["plain"]]
    assert len(cached) == 2 * 2 * 2  # cuts, blends, strides
    assert all(row["latent_error"]["mean"] > 0 for row in others)
    assert all(0 < row["share"] < 1 for row in others)
    # Every setting has the plain sampler that its arithmetic buys.
    shares = [row["share"] for row in rows if row["plain"]]
    for row in cached:
        assert any(row["share"] - 1 / 8 < share <= row["share"] + 1e-6 for share in shares)
    drift = json.loads((folder / "report.json").read_text())["drift"]
    assert drift["lags"] == [1, 2, 3, 5]
    assert "hot dog" in (folder / "index.html").read_text()


@pytest.mark.parametrize(("steps", "strides"), [("2", {2}), ("4", {3}), ("6", {3, 5})])
def test_few_steps_need_no_stride(steps, strides, tmp_path):
    """Nobody gave one that could be too long."""
    result = evaluate(["--steps", steps, "--dry-run", "--report", str(tmp_path)])
    found = {
        line.rpartition("stride ")[2] for line in result.stdout.splitlines() if "stride" in line
    }
    assert found == set(map(str, strides))


@pytest.mark.parametrize("option", ["--steps", "--reference-steps", "--plain-steps"])
def test_more_steps_than_the_schedule_has(option, tmp_path):
    command = ["--num-images", "1", option, "1000", "--report", str(tmp_path), "--stride", "2"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1, result.output
    assert "1000 steps" in result.stderr.splitlines()[-1]


def test_a_repeated_evaluation_draws_nothing_new(arguments, tmp_path, monkeypatch):
    evaluate(arguments())
    first = rows_of(tmp_path / "report")
    drawn = []
    monkeypatch.setattr(
        "encache.runtime.pipeline.EncachePipeline.__call__", lambda *a, **k: drawn.append(a)
    )
    evaluate(arguments("--max-decode-batch", 2))
    assert not drawn
    assert rows_of(tmp_path / "report") == first


def test_real_pictures_give_distances(arguments, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs encache[eval]")
    real = tmp_path / "real"
    real.mkdir()
    lines = []
    for index, colour in enumerate(("red", "green", "blue", "yellow", "white")):
        Image.new("RGB", (30, 20), colour).save(real / f"{index}.png")
        text = "red apple" if index % 2 else "hot dog"
        lines.append(json.dumps({"file_name": f"{index}.png", "text": text}))
    (real / "metadata.jsonl").write_text("\n".join(lines))
    evaluate(
        arguments("--real", real, "--extractor", "efficientnet-lite0", "--no-drift", "--grid", 0)
    )
    for row in rows_of(tmp_path / "report"):
        assert math.isfinite(row["frechet"])
        assert 0 <= row["precision"] <= 1
        assert row["retrieval"]["mean"] == 1.0  # both names are among the 5 nearest of 5
    # More pictures in the folder are other real pictures; one that is none is named.
    (real / "6.png").write_bytes(b"no picture")
    Image.new("RGB", (30, 20), "black").save(real / "5.png")
    before = rows_of(tmp_path / "report")[0]["frechet"]
    evaluate(
        arguments("--real", real, "--extractor", "efficientnet-lite0", "--no-drift", "--grid", 0)
    )
    assert rows_of(tmp_path / "report")[0]["frechet"] != before
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (report["protocol"]["real pictures"], report["protocol"]["unreadable"]) == (6, ["6.png"])
    (real / "metadata.jsonl").write_text("{}")
    result = CliRunner().invoke(
        main, arguments("--real", real, "--extractor", "efficientnet-lite0")
    )
    assert result.exit_code == 1
    assert "needs lines like" in result.stderr


def test_few_real_pictures_are_refused_before_anything_is_drawn(arguments, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs encache[eval]")
    (tmp_path / "none").mkdir()
    result = CliRunner().invoke(
        main, arguments("--real", tmp_path / "none", "--extractor", "efficientnet-lite0")
    )
    assert result.exit_code == 1
    assert "holds 0 readable pictures" in result.stderr
    assert not list((tmp_path / "report" / "store").iterdir())


def test_the_grid_shows_each_seed_of_a_prompt(arguments, tmp_path):
    evaluate(arguments("--grid", 3, "--no-drift"))
    page = (tmp_path / "report" / "index.html").read_text()
    for heading in ("red apple (seed 0)", "hot dog (seed 1)", "red apple (seed 2)"):
        assert f">{heading}<" in page
    assert "hot dog (seed 3)" not in page


def test_several_checkpoints_share_the_first_ones_reference(arguments, model_folder, tmp_path):
    evaluate(arguments("--no-drift", "--grid", 0, ckpts=(model_folder, model_folder)))
    rows = rows_of(tmp_path / "report")
    fulls = [row for row in rows if row["plain"] and row["steps"] == 8]
    assert [row["checkpoint"] for row in fulls] == ["tiny-1", "tiny-2"]
    # The same model twice: its full sampler is the reference to the last bit.
    assert fulls[1]["latent_error"]["mean"] == 0


def test_a_longer_reference(arguments, tmp_path):
    evaluate(arguments("--reference-steps", 12, "--plain-steps", 3, "--no-drift", "--grid", 0))
    rows = {row["name"]: row for row in rows_of(tmp_path / "report")}
    assert rows["tiny, 12 steps"]["latent_error"] is None
    assert rows["tiny, 12 steps"]["share"] == pytest.approx(1.5)
    assert rows["tiny, 8 steps"]["latent_error"]["mean"] > 0
    assert rows["tiny, 3 steps"]["plain"]


def test_dry_run_lists_settings(arguments, tmp_path):
    result = evaluate(arguments("--dry-run", "--blend", "reuse"))
    names = result.stdout.splitlines()
    assert names[0] == "tiny, 8 steps"
    assert "tiny, 8 steps, none, reuse, stride 4" in names
    assert not (tmp_path / "report" / "index.html").exists()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--real", "."], 2, "--real needs --extractor"),
        (["--device", "quantum"], 2, "--device quantum cannot be used"),
        (["--device", "cpu", "--backend", "onnxruntime"], 2, "--device is for torch"),
        (["--base", "somewhere"], 2, "--base completes .safetensors files"),
        (["--stride", "9"], 1, "stride must be between 1 (the full sampler) and"),
        (["--paper-key-calls"], 1, "for 50 and 20 calls, not for 8"),
        (["--cut", "up7"], 2, "'up7' is not one of"),
        (["--clip", "no/such-model"], 1, "CLIP"),
    ],
)
def test_what_cannot_be_honoured(arguments, more, code, message):
    result = CliRunner().invoke(main, arguments(*more))
    assert result.exit_code == code
    assert message in result.stderr


def test_prompts_are_needed_for_a_model_of_ones_own(model_folder, tmp_path):
    result = CliRunner().invoke(
        main, ["--ckpt", str(model_folder), "--report", str(tmp_path / "r")]
    )
    assert result.exit_code == 2
    assert "Give --prompts" in result.stderr


def test_an_empty_prompt_file(arguments, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n \n")
    result = CliRunner().invoke(main, arguments())
    assert result.exit_code == 1
    assert "holds no prompt" in result.stderr


def test_weights_made_for_a_plan_are_drawn_by_it_beside_their_base(
    arguments, model_folder, tmp_path
):
    tuned = save_tuned(tmp_path, model_folder, ONE_SEGMENT)
    evaluate(arguments("--no-drift", "--num-images", 1, ckpts=(tuned.weights,)))
    rows = rows_of(tmp_path / "report")
    full, own = rows[0], rows[-1]
    assert (full["name"], full["latent_error"]) == ("tiny, 8 steps", None)
    assert own["name"] == "tuned, 4 steps, mid, reuse, stride 4, guidance 1"
    assert [row for row in rows if row["checkpoint"] == "tuned"] == [own]
    assert (own["encoder_runs"], own["num_calls"]) == (1, 4)
    # One row per picture for two, and less than four of eight whole calls.
    assert own["share"] < 0.25
    assert own["opponent"] == "tiny, 1 steps"
    assert own["times_plain"]["mean"] > 0
    # Its error is that of what the pipeline draws, against the base's full sampler.
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = []
    for model, call in ((tuned.weights, {}), (model_folder, {"stride": 1})):
        pipeline = EncachePipeline.from_pretrained(model, backend="torch")
        pipeline.set_progress_bar_config(disable=True)
        call |= {} if model == tuned.weights else {"num_inference_steps": 8}
        drawn.append(pipeline("red apple", latents=noise, output_type="latent", **call).images)
    ours, theirs = (one.numpy() for one in drawn)
    assert own["latent_error"]["mean"] == pytest.approx(relative_error(ours, theirs).item(), 1e-3)
