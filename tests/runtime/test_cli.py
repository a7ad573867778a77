"""encache-run as its users type it; every mistake ends in one sentence."""

import errno
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
from contextlib import suppress
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from encache import files
from encache.contract.manifest import read_manifest
from encache.export.cli import main as export
from encache.model.checkpoint import DEFAULT_MODEL_NAME, default_model, fast_model
from encache.model.preset import PRESET_KEY, Preset
from encache.runtime.cli import main
from encache.runtime.images import METADATA_KEY, file_name, read_metadata, save_png
from encache.runtime.pipeline import EncachePipeline
from encache.runtime.plan import make_plan
from encache.runtime.settings import Policy
from tests.conftest import ONE_SEGMENT, save_tuned

PROGRAM = [sys.executable, "-c", "from encache.runtime.cli import main; main()"]


@pytest.fixture
def run(model_folder, engine_folder, tmp_path, monkeypatch):
    """Call encache-run on the tiny model in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, ckpt=model_folder, engines=engine_folder.parent):
        defaults = ["--steps", "10", *(["--ckpt", str(ckpt)] if ckpt else [])]
        if "torch" not in arguments:
            defaults += ["--engine-dir", str(engines)]
        return CliRunner().invoke(main, [*defaults, *map(str, arguments)])

    return run


def assert_one_sentence(result, code, *words):
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)  # anything else would be a traceback
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("Error: ")
    for word in words:
        assert word in message, message


def test_a_prompt_ends_in_a_picture(run, tmp_path):
    result = run("--prompt", "red apple", "--stride", 5)
    assert result.exit_code == 0, result.output
    assert result.stdout == "outputs/000-red-apple-s0.png\n"
    assert Image.open(tmp_path / "outputs" / "000-red-apple-s0.png").size == (16, 16)


def test_the_metadata_repeats_the_picture(run, tmp_path, engine_folder):
    result = run("--prompt", "Grüne 梨", "--seed", 7, "--scheduler", "euler", "--stride", 2)
    path = tmp_path / result.stdout.strip()
    data = read_metadata(path)
    assert engine_folder.name.endswith(data["engines"]["key"])
    assert data["fingerprint"] == data["engines"]["model"]
    pipeline = EncachePipeline.from_engines(engine_folder)
    scheduler_class = getattr(diffusers, data["scheduler"]["_class_name"])
    pipeline.scheduler = scheduler_class.from_config(data["scheduler"])
    policy = {key: data[key] for key in ("stride", "key_calls", "blend", "prior_noise")}
    call = {
        key: data[key]
        for key in ("negative_prompt", "num_inference_steps", "guidance_scale", "height", "width")
    }
    asked = Policy(**{**policy, "key_calls": None}, cut=pipeline.engines.cut)
    plan = make_plan(pipeline.scheduler, data["num_inference_steps"], asked)
    assert plan.hash() == data["plan"]
    generator = [torch.Generator().manual_seed(data["seed"])]
    again = pipeline(data["prompt"], generator=generator, **call, **policy).images[0]
    assert again.tobytes() == Image.open(path).tobytes()


def test_nothing_is_overwritten(run, tmp_path):
    """Comparing settings at one seed is what this program is for."""
    settings = [("--stride", 2), ("--stride", 5), ("--scheduler", "euler"), ("--prompt", "x")]
    paths = []
    for one in settings:
        result = run("--prompt", "red apple", *one)
        assert result.exit_code == 0, result.output
        paths += result.stdout.splitlines()
    assert paths[:3] == [f"outputs/000-red-apple-s0{end}.png" for end in ("", "-2", "-3")]
    assert len(set(paths)) == len(paths) == len(list((tmp_path / "outputs").iterdir()))
    assert len({Image.open(tmp_path / path).tobytes() for path in paths[:3]}) == 3


@pytest.mark.parametrize("prompts", [["", "..", "   ", "--prompt"], ["Ä", "ä", "a/b", "a b"]])
def test_prompts_that_look_alike_as_names(run, tmp_path, prompts):
    for prompt in prompts:
        assert run("--prompt", prompt).exit_code == 0
    found = sorted(read_metadata(path)["prompt"] for path in (tmp_path / "outputs").iterdir())
    assert found == sorted(prompts)


def test_a_repeated_command_draws_only_what_is_missing(run, tmp_path, monkeypatch):
    command = ("--prompt", "hot dog", "--num-images", 5, "--batch-size", 2)
    first = run(*command).stdout
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "outputs").iterdir()}
    lost = tmp_path / "outputs" / "000-hot-dog-s3.png"
    content = lost.read_bytes()
    lost.unlink()
    drawn = []
    call = EncachePipeline.__call__
    monkeypatch.setattr(
        EncachePipeline,
        "__call__",
        lambda self, prompts, **k: drawn.append(len(prompts)) or call(self, prompts, **k),
    )
    assert run(*command).stdout == first
    assert drawn == [2]  # the batch that had lost one
    assert lost.read_bytes() == content
    del kept[lost]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_how_a_picture_was_batched_does_not_make_it_another(run, tmp_path, up2_folder):
    for arguments in (("--num-images", 1), ("--num-images", 3), ("--num-images", 3)):
        bounds = ("--cut", "up2", "--max-decode-batch", 8, "--stride", 5)
        result = run("--prompt", "x", *arguments, *bounds, engines=up2_folder.parent)
        assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (tmp_path / "outputs").iterdir())
    assert names == [f"000-x-s{seed}.png" for seed in range(3)]


def test_a_foreign_file_in_the_way(run, tmp_path):
    (tmp_path / "outputs").mkdir()
    foreign = tmp_path / "outputs" / "000-red-apple-s0.png"
    foreign.write_bytes(b"mine")
    assert run("--prompt", "red apple").stdout == "outputs/000-red-apple-s0-2.png\n"
    assert foreign.read_bytes() == b"mine"
    (tmp_path / "mine.png").write_bytes(b"mine")
    result = run("--prompt", "red apple", "--output", "mine.png")
    assert_one_sentence(result, 1, "mine.png", "not overwritten")
    assert (tmp_path / "mine.png").read_bytes() == b"mine"
    (tmp_path / "report.json").write_text("mine")
    result = run("--prompt", "x", "--compare", "--json", "report.json")
    assert_one_sentence(result, 1, "report.json", "not overwritten")


def test_the_same_file_again(run, tmp_path):
    for _ in range(2):
        assert run("--prompt", "red apple", "--output", "a.png").stdout == "a.png\n"
    assert_one_sentence(run("--prompt", "pear", "--output", "a.png"), 1, "a.png")
    assert read_metadata(tmp_path / "a.png")["prompt"] == "red apple"


def test_two_runs_at_once(model_folder, engine_folder, tmp_path):
    command = [*PROGRAM, "--ckpt", model_folder, "--steps", "2"]
    command += ["--engine-dir", engine_folder.parent, "--prompt", "x", "--output", tmp_path]
    runs = [
        subprocess.Popen([*command, "--stride", str(stride)], stdout=subprocess.PIPE, text=True)
        for stride in (1, 2)
    ]
    paths = [one.communicate()[0].strip() for one in runs]
    assert len(set(paths)) == 2
    assert {read_metadata(path)["stride"] for path in paths} == {1, 2}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_killed_run_keeps_what_it_has(model_folder, engine_folder, tmp_path):
    command = [*PROGRAM, "--ckpt", model_folder, "--steps", "20"]
    command += ["--engine-dir", engine_folder.parent, "--prompt", "x", "--output", tmp_path]
    command += ["--num-images", "300", "--batch-size", "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline().strip()
        process.kill()
    assert read_metadata(first)["seed"] == 0
    whole = [path for path in tmp_path.iterdir() if path.suffix == ".png"]
    assert len(whole) in range(3, 300)
    for path in whole:
        Image.open(path).load()


def test_an_output_folder_may_have_any_name(run, tmp_path):
    (tmp_path / "pictures.png").mkdir()
    result = run("--prompt", "x", "--output", "pictures.png")
    assert result.stdout == "pictures.png/000-x-s0.png\n"


@pytest.mark.parametrize("name", ["out.jpg", "out.JPEG", "out.webp", "out.tiff"])
def test_other_kinds_of_pictures(run, tmp_path, name):
    assert_one_sentence(run("--prompt", "x", "--output", name), 2, name, "PNG")
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_are_simply_drawn(run, steps):
    plan = json.loads(run("--dry-run", "--steps", steps).stdout)
    assert plan["key_calls"] == [0]
    assert run("--prompt", "x", "--steps", steps).exit_code == 0


@pytest.mark.parametrize("option", ["--guidance-scale"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_options_that_are_no_numbers(run, option, value):
    assert_one_sentence(run("--prompt", "x", option, value), 2, option, "finite")


@pytest.mark.parametrize("option", ["--prompt", "--negative-prompt"])
def test_a_prompt_of_other_bytes(model_folder, engine_folder, tmp_path, option):
    command = [*PROGRAM, "--ckpt", model_folder]
    command += ["--engine-dir", engine_folder.parent, "--output", tmp_path, "--prompt", "x"]
    done = subprocess.run([*command, option, b"Gr\xfcn"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "is not UTF-8 text" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_prompts_file_as_editors_write_it(run, tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "prompts.txt").write_bytes("hot\u2028dog\r\nGrün\r\n".encode(encoding))
        result = run("--prompts-file", "prompts.txt")
        assert result.exit_code == 0, result.output
    found = sorted(read_metadata(path)["prompt"] for path in (tmp_path / "outputs").iterdir())
    assert found == sorted(["hot\u2028dog", "Grün"])


def test_nan_in_a_weight_is_no_black_picture(model_folder, run, tmp_path):
    copied = shutil.copytree(model_folder, tmp_path / "copy")
    path = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.bias"][0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    result = run("--prompt", "x", "--backend", "torch", ckpt=copied)
    assert_one_sentence(result, 1, "call 0 of the UNet", "black", "fp32")
    assert not list(tmp_path.rglob("*.png"))


def test_engines_with_exchanged_names(run, model_folder, engine_folder, up2_folder, tmp_path):
    """A folder's name proves nothing; its manifest does."""
    store = tmp_path / "store"
    shutil.copytree(engine_folder, store / up2_folder.name)
    shutil.copytree(up2_folder, store / engine_folder.name)
    for cut in ("none", "up2"):
        result = run("--prompt", "x", "--cut", cut, engines=store)
        assert_one_sentence(result, 1, "was renamed")
    assert not list(tmp_path.rglob("*.png"))


def test_the_model_names_itself(run, engine_folder, tmp_path):
    renamed = shutil.copytree(engine_folder, tmp_path / "other-model")
    result = run("--prompt", "x", ckpt=None, engines=renamed)
    assert read_metadata(tmp_path / result.stdout.strip())["model"] == "tiny"


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_scheduler_of_which_one_byte_changed(run, engine_folder, tmp_path, dry):
    copied = shutil.copytree(engine_folder, tmp_path / "engine")
    path = copied / "scheduler" / "scheduler_config.json"
    for old, new in ((b"DDIM", b"DDIN"), (b'"steps_offset": 1', b'"steps_offset": 2')):
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new))
        result = run("--prompt", "x", *dry, ckpt=None, engines=copied)
        assert_one_sentence(result, 1, "scheduler_config.json", "is not what was built")
        path.write_bytes(content)


def test_the_guidance_of_an_engine_folder_is_its_models(run, engine_folder, tmp_path):
    copied = shutil.copytree(engine_folder, tmp_path / "engine")
    replace(read_manifest(copied), guidance_scale=2.5).write(copied)
    result = run("--prompt", "x", ckpt=None, engines=copied)
    assert read_metadata(tmp_path / result.stdout.strip())["guidance_scale"] == 2.5
    assert EncachePipeline.from_engines(copied).default_guidance_scale == 2.5


@pytest.fixture
def tuned(model_folder, tmp_path):
    """The path of weights that say how to sample them."""
    return save_tuned(tmp_path, model_folder, ONE_SEGMENT).weights


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Call encache-run on one prompt with nothing but what is given; returns the metadata."""
    monkeypatch.chdir(tmp_path)

    def draw(*arguments):
        result = CliRunner().invoke(main, ["--prompt", "hot dog", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return read_metadata(tmp_path / result.stdout.strip())

    return draw


SAID = {
    "num_inference_steps": 4,
    "guidance_scale": 1.0,
    "stride": 4,
    "key_calls": None,
    "blend": "reuse",
    "prior_noise": False,
}


@pytest.mark.parametrize(
    ("typed", "changes"),
    [
        ((), {}),
        (("--steps", 6), {"num_inference_steps": 6}),
        (("--steps", 2), {"num_inference_steps": 2, "stride": 2}),
        (("--guidance-scale", 3), {"guidance_scale": 3.0}),
        (("--stride", 2), {"stride": 2}),
        (("--key-calls", "0,1"), {"stride": None, "key_calls": [0, 1]}),
        (
            ("--key-calls", "paper", "--steps", 20),
            {"stride": None, "key_calls": [0, 1, 2, 3, 5, 10, 15], "num_inference_steps": 20},
        ),
        (("--blend", "extrapolate"), {"blend": "extrapolate"}),
        (("--prior-noise",), {"prior_noise": True}),
    ],
)
def test_weights_are_drawn_as_they_say_unless_told_otherwise(tuned, draw, typed, changes):
    data = draw("--ckpt", tuned, "--backend", "torch", *typed)
    assert {key: data[key] for key in SAID} == {**SAID, **changes}
    assert data["scheduler"]["timestep_spacing"] == "trailing"
    assert data["engines"]["cut"] == "mid"


def test_other_places_and_solvers_than_the_weights_want(tuned, draw):
    data = draw("--ckpt", tuned, "--backend", "torch", "--cut", "up1", "--scheduler", "euler")
    assert data["engines"]["cut"] == "up1"
    assert data["scheduler"]["_class_name"] == "EulerDiscreteScheduler"
    assert data["num_inference_steps"] == 4


def test_key_calls_that_the_weights_name_give_way_to_a_stride(model_folder, tmp_path, draw):
    preset = Preset(steps=6, key_calls=(0, 4), prior_noise=True)
    path = save_tuned(tmp_path, model_folder, preset).weights
    command = ("--ckpt", path, "--backend", "torch")
    assert draw(*command)["key_calls"] == [0, 4]
    data = draw(*command, "--stride", 3, "--no-prior-noise")
    assert (data["stride"], data["key_calls"], data["prior_noise"]) == (3, None, False)


def test_the_plan_of_the_weights_is_what_a_dry_run_prints(tuned):
    plan = json.loads(CliRunner().invoke(main, ["--ckpt", str(tuned), "--dry-run"]).stdout)
    assert plan["timesteps"] == [999, 749, 499, 249]
    assert plan["key_calls"] == [0]
    assert [step["stop"] for step in plan["steps"] if "stop" in step] == [4]


def test_an_engine_folder_draws_as_its_weights_say(tuned, draw, tmp_path):
    result = CliRunner().invoke(export, ["--ckpt", str(tuned), "--engine-dir", str(tmp_path)])
    assert result.exit_code == 0, result.output
    expected = draw("--ckpt", tuned, "--backend", "torch", "--output", "torch.png")
    tuned.unlink()
    data = draw("--engine-dir", result.stdout.strip(), "--output", "onnx.png")
    assert {key: data[key] for key in SAID} == SAID
    assert data["plan"] == expected["plan"]
    ours, theirs = (
        np.asarray(Image.open(tmp_path / f"{name}.png"), int) for name in ("onnx", "torch")
    )
    assert np.abs(ours - theirs).max() <= 1
    data = draw("--engine-dir", result.stdout.strip(), "--stride", 2, "--guidance-scale", 2)
    assert (data["stride"], data["guidance_scale"]) == (2, 2.0)


def test_weights_of_few_steps_are_compared_with_their_base(tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["--ckpt", str(tuned), "--backend", "torch", "--prompt", "x", "--compare"]
    result = CliRunner().invoke(main, [*command, "--repeats", "1", "--json", "report.json"])
    assert result.exit_code == 0, result.output
    assert "compared with the full sampler of its base tiny" in result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    full, cached, fewer = report["rows"]
    assert (full["sampling"], cached["sampling"]) == ("50 steps", "1 of 4 calls")
    assert report["task"]["guidance_scale"] == 7.5
    assert report["settings"]["guidance_scale"] == 1.0
    # One picture is one row with these weights and two with their base.
    assert full["gflop"] / 50 == pytest.approx(fewer["gflop"])
    assert cached["gflop"] < 2 * fewer["gflop"]


@pytest.fixture
def companion(tmp_path, monkeypatch):
    """A stand-in for the default model's fine-tuned companion: its own weights, with a plan."""
    path = tmp_path / "shared.safetensors"
    weights = load_file(default_model() / "unet" / "diffusion_pytorch_model.safetensors")
    header = {"base": DEFAULT_MODEL_NAME, PRESET_KEY: ONE_SEGMENT.to_json()}
    save_file(weights, path, header)
    monkeypatch.setattr("encache.export.options.fast_model", lambda: path)
    return path


def test_fast(companion, draw):
    data = draw("--fast", "--backend", "torch")
    assert data["model"] == companion.stem
    assert {key: data[key] for key in SAID} == SAID
    assert (data["height"], data["width"]) == (64, 64)


def test_fast_is_a_model(run, companion, engine_folder):
    assert fast_model() == default_model() / companion.name
    assert_one_sentence(run("--prompt", "x", "--fast"), 2, "--fast", "--ckpt")
    result = run("--prompt", "x", "--fast", "--base", "y", ckpt=None)
    assert_one_sentence(result, 2, "--fast", "--base")
    result = run("--prompt", "x", "--fast", ckpt=None, engines=engine_folder)
    assert_one_sentence(result, 2, "one engine folder", "--fast")
    result = CliRunner().invoke(export, ["--fast", "--ckpt", "y"])
    assert_one_sentence(result, 2, "--fast", "--ckpt")


def test_the_models_own_steps_of_training_are_refused(run):
    assert_one_sentence(run("--prompt", "x", "--steps", 1000), 1, "1000 steps", "fewer")


def test_many_prompts_and_images(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("hot dog\n\n  green pear  \n")
    result = run("--prompt", "a/b", "--prompts-file", "prompts.txt", "--num-images", 2)
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (tmp_path / "outputs").iterdir())
    assert names == [
        f"{index:03d}-{slug}-s{seed}.png"
        for index, slug in enumerate(["a-b", "hot-dog", "green-pear"])
        for seed in (0, 1)
    ]


def test_an_image_is_the_same_alone_and_in_a_batch(run, tmp_path):
    run("--prompt", "hot dog", "--num-images", 2, "--output", "many")
    run("--prompt", "hot dog", "--seed", 1, "--output", "one.png")
    together = Image.open(tmp_path / "many" / "000-hot-dog-s1.png").tobytes()
    alone = Image.open(tmp_path / "one.png").tobytes()
    assert max(abs(a - b) for a, b in zip(together, alone, strict=True)) <= 1


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (
            ("--key-calls", "0,3,7", "--blend", "interpolate"),
            {"key_calls": [0, 3, 7], "stride": None, "blend": "interpolate"},
        ),
        (
            ("--blend", "interpolate-refresh", "--prior-noise", "--scheduler", "heun"),
            {"blend": "interpolate-refresh", "prior_noise": True},
        ),
        (
            ("--guidance-scale", "1", "--scheduler", "pndm", "--backend", "torch", "--cut", "mid"),
            {"guidance_scale": 1.0},
        ),
        (
            ("--backend", "torch", "--cut", "mid", "--max-decode-batch", "2"),
            {"max_decode_batch": 2},
        ),
        (("--height", "40", "--width", "24"), {"height": 40, "width": 24}),
        (
            ("--steps", "20", "--key-calls", "paper", "--blend", "reuse"),
            {"num_inference_steps": 20, "key_calls": [0, 1, 2, 3, 5, 10, 15], "blend": "reuse"},
        ),
        (("--negative-prompt", "green pear"), {"negative_prompt": "green pear"}),
    ],
)
def test_options(run, tmp_path, arguments, facts):
    plain, chosen = (run("--prompt", "hot dog", *more) for more in ((), arguments))
    assert chosen.exit_code == 0, chosen.output
    pictures = [tmp_path / result.stdout.strip() for result in (plain, chosen)]
    said = read_metadata(pictures[1])
    assert {name: said[name] for name in facts} == facts
    before, after = (Image.open(path) for path in pictures)
    assert after.size == (facts.get("width", 16), facts.get("height", 16))
    assert before.tobytes() != after.tobytes()


def test_dry_run_prints_the_plan(run, tmp_path):
    result = run("--stride", 5, "--dry-run")
    plan = json.loads(result.stdout)
    assert plan["key_calls"] == [0, 5]
    assert not (tmp_path / "outputs").exists()


def test_compare(run, tmp_path):
    result = run(
        "--prompt", "hot dog", "--stride", 5, "--compare", "--repeats", 2, "--json", "report.json"
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    full, eager, engines, fewer = rows
    assert [row["backend"] for row in rows] == ["diffusers", "torch", "onnxruntime", "diffusers"]
    assert [row["sampling"] for row in rows] == [
        *("10 steps", "2 of 10 calls", "2 of 10 calls", "2 steps")
    ]
    assert fewer["gflop"] <= engines["gflop"] == eager["gflop"] < full["gflop"]
    assert full["psnr"] is None
    assert engines["psnr"] == pytest.approx(eager["psnr"], abs=0.5)
    for row in rows:
        assert row["spread"][0] <= row["seconds"] <= row["spread"][1]
        assert f"{row['backend']}, {row['sampling']}" in result.stdout


def test_engines_are_built_on_first_use(run, tmp_path):
    result = run("--prompt", "hot dog", engines=tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert "once" in result.stderr
    assert len([path for path in (tmp_path / "new").iterdir() if path.is_dir()]) == 1


def test_one_engine_folder_needs_no_checkpoint(run, engine_folder):
    by_folder = run("--prompt", "hot dog", "--output", "a.png", ckpt=None, engines=engine_folder)
    by_model = run("--prompt", "hot dog", "--output", "b.png")
    assert (by_folder.stdout, by_model.stdout) == ("a.png\n", "b.png\n")
    pictures = [Image.open(name).tobytes() for name in ("a.png", "b.png")]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    "options", [("--cut", "mid"), ("--dtype", "fp32"), ("--tome", "0.5"), ("--compare",)]
)
def test_one_engine_folder_has_decided(run, engine_folder, options):
    result = run("--prompt", "x", *options, ckpt=None, engines=engine_folder)
    assert_one_sentence(result, 2, "one engine folder", options[0])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, ["--prompt"]),
        (("--prompt", "x", "--stride", "11"), 1, ["not 11", "10 calls"]),
        (("--prompt", "x", "--stride", "0"), 2, ["--stride"]),
        (("--prompt", "x", "--key-calls", "1,2"), 1, ["start at 0"]),
        (("--prompt", "x", "--key-calls", "0,2,2"), 1, ["without repeats"]),
        (("--prompt", "x", "--key-calls", "0,two"), 2, ["0,5,10"]),
        (("--prompt", "x", "--key-calls", "paper"), 1, ["50 and 20 calls", "not for 10"]),
        (("--prompt", "x", "--steps", "0"), 2, ["--steps"]),
        (("--prompt", "x", "--steps", "5000"), 1, ["1000 steps", "not 5000"]),
        (("--prompt", "x", "--height", "20"), 1, ["multiples of 8", "16"]),
        (("--prompt", "x", "--backend", "abacus"), 2, ["abacus"]),
        (("--prompt", "x", "--scheduler", "magic"), 2, ["magic"]),
        (("--prompt", "x", "--prompt", "y", "--output", "a.png"), 2, ["2 pictures"]),
        (("--prompts-file", "none.txt"), 2, ["none.txt"]),
        (("--prompt", "x", "--json", "a.json"), 2, ["--json", "without --compare"]),
        (("--prompt", "x", "--compare", "--num-images", "2"), 2, ["--num-images", "with"]),
        (("--prompt", "x", "--base", "y"), 1, ["leave out --base"]),
        (("--prompt", "x", "--output", "/proc/none"), 1, ["/proc/none"]),
        (("--prompt", "x", "--max-decode-batch", "1"), 2, ["--max-decode-batch", "--cut"]),
        (("--prompt", "x", "--seed", str(2**64)), 2, ["--seed"]),
        (("--prompt", "x", "--stride", "2", "--key-calls", "0,3"), 2, ["--stride", "--key-calls"]),
        (("--prompt", "x", "--backend", "torch", "--engine-dir", "y"), 2, ["--engine-dir"]),
        (
            ("--prompt", "x", "--backend", "torch.compile", "--engine-dir", "y"),
            2,
            ["torch.compile"],
        ),
        (("--prompt", "x", "--height", "800000", "--width", "800000"), 1, ["Memory"]),
        (("--prompt", "x", "--lora", "a.safetensors:nan"), 1, ["finite"]),
        (("--prompt", "x", "--variant", "fp16"), 1, ["fp16"]),
    ],
)
def test_mistakes(run, tmp_path, arguments, code, words):
    assert_one_sentence(run(*arguments), code, *words)
    assert not list(tmp_path.rglob("*.png"))


WORDS = [
    "--stride",
    "--steps",
    "--key-calls",
    "--blend",
    "--scheduler",
    "--guidance-scale",
    "--height",
    "--max-decode-batch",
    "--prior-noise",
    "--seed",
    "--num-images",
    "0",
    "1",
    "5",
    "-3",
    "1e9",
    "0,5",
    "5,0",
    "0,,1",
    "paper",
    "reuse",
    "interpolate",
    "heun",
    "nan",
    "é",
]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(words=st.lists(st.sampled_from([*WORDS, ""]), max_size=8))
def test_no_command_line_ends_in_a_traceback(run, words):
    result = run("--dry-run", *words)
    assert result.exit_code in (0, 1, 2)
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_missing_and_corrupt_checkpoints(run, tmp_path):
    assert_one_sentence(run("--prompt", "x", ckpt="/no/model"), 1, "/no/model")
    (tmp_path / "broken.safetensors").write_bytes(b"12345678")
    result = run("--prompt", "x", ckpt="broken.safetensors")
    assert_one_sentence(result, 1, "broken.safetensors", "not a complete safetensors file")
    (tmp_path / "sd.ckpt").write_bytes(b"")
    assert_one_sentence(run("--prompt", "x", ckpt="sd.ckpt"), 1, "pickle")


def test_mistakes_are_found_before_engines_are_built(run, tmp_path):
    for arguments in (("--stride", "11"), ("--height", "20"), ("--key-calls", "3")):
        assert run("--prompt", "x", *arguments, engines=tmp_path / "new").exit_code == 1
    assert run("--dry-run", engines=tmp_path / "new").exit_code == 0
    assert not (tmp_path / "new").exists()


def test_prompts_that_are_not_text(run, tmp_path):
    (tmp_path / "latin.txt").write_bytes("Grün".encode("latin-1"))
    assert_one_sentence(run("--prompts-file", "latin.txt"), 1, "not UTF-8", "line 1")


def test_an_engine_folder_without_its_manifest(run, engine_folder, tmp_path):
    copied = shutil.copytree(engine_folder, tmp_path / "engine")
    (copied / "manifest.json").unlink()
    assert_one_sentence(run("--prompt", "x", engines=copied), 1, "holds no manifest.json")


def test_an_edited_engine(run, engine_folder, tmp_path):
    copied = shutil.copytree(engine_folder, tmp_path / "engine")
    with (copied / "unet" / "model.onnx.data").open("r+b") as stream:
        first = stream.read(1)
        stream.seek(0)
        stream.write(bytes([first[0] ^ 1]))
    result = run("--prompt", "x", ckpt=None, engines=copied)
    assert_one_sentence(result, 1, "model.onnx.data", "encache-export")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_refuses(run, tmp_path, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "link", refuse)
    assert_one_sentence(run("--prompt", "x"), 1, os.strerror(number))
    assert not list(tmp_path.rglob("*.png"))


def test_a_full_disk(model_folder, engine_folder, tmp_path):
    """A limit on file sizes stops writing in the middle, as a full disk does."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))"
    ignore = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    script = f"{limit}; {ignore}; from encache.runtime.cli import main; main()"
    command = [sys.executable, "-c", script, "--ckpt", model_folder, "--prompt", "x"]
    command += ["--engine-dir", engine_folder.parent, "--steps", "2", "--stride", "1"]
    done = subprocess.run([*command, "--output", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("Error: File too large")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing_half_written(model_folder, engine_folder, tmp_path):
    # Started in the background of a shell, a process ignores Ctrl-C unless it asks for it.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = [sys.executable, "-c", f"{code}from encache.runtime.cli import main; main()"]
    command += ["--ckpt", model_folder, "--engine-dir", engine_folder.parent, "--prompt", "x"]
    command += ["--steps", "999", "--stride", "1", "--num-images", "8", "--output", tmp_path]
    leader, follower = pty.openpty()  # a bar is drawn in a terminal only
    termios.tcsetwinsize(follower, (24, 80))
    with subprocess.Popen(command, stderr=follower) as process:
        os.close(follower)
        shown = b""
        while b"0/999" not in shown:
            shown += os.read(leader, 1024)
        process.send_signal(signal.SIGINT)
        with suppress(OSError):  # the end of a terminal
            while part := os.read(leader, 1024):
                shown += part
    assert process.returncode == 1
    assert b"Traceback" not in shown
    assert not list(tmp_path.iterdir())


def test_file_names_are_safe():
    assert file_name(3, "Red  Apple!/../x", 5) == "003-red-apple-x-s5.png"
    assert file_name(0, "", 0) == "000-prompt-s0.png"
    assert len(file_name(0, "梨" * 500, 0).encode()) < 200


def test_metadata_survives(tmp_path):
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {"prompt": "ü 梨"})
    assert read_metadata(tmp_path / "a.png") == {"prompt": "ü 梨"}
    assert METADATA_KEY in Image.open(tmp_path / "a.png").info
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    assert read_metadata(tmp_path / "b.png") == {}
