"""`encache-train fcr`, from pictures to a file that the rest of encache and diffusers take."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from encache.model.checkpoint import find_checkpoint
from encache.model.loading import load_pipeline
from encache.model.lora import find_lora
from encache.train import fcr
from encache.train.cli import main
from tests.conftest import share_of_the_way

COLOURS = ("red", "green", "blue", "yellow")


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """accelerate keeps the first precision of a process; each test starts as a command does."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for colour in COLOURS:
        Image.new("RGB", (20, 16), colour).save(folder / f"{colour}.png")
        rows.append(json.dumps({"file_name": f"{colour}.png", "text": f"{colour} apple"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def arguments(model_folder, pictures, tmp_path):
    """Make a command line; `output` is below the test's folder."""

    def make(output, *more):
        values = ["fcr", "--pretrained-model-name-or-path", model_folder]
        values += ["--train-data-dir", pictures, "--output-dir", tmp_path / output]
        values += ["--max-train-steps", 4, "--train-batch-size", 2, "--learning-rate", 1e-3]
        values += ["--lr-warmup-steps", 0, "--report-to", "none", *more]
        return [str(value) for value in values]

    return make


def train(arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result


def test_the_written_file_is_a_checkpoint(arguments, tmp_path, model_folder):
    result = train(arguments("out", "--fcr-stride", 10, "--fcr-form", "relative"))
    path = tmp_path / "out" / "fcr.safetensors"
    assert result.stdout.strip() == str(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    facts = json.loads(header["encache"])
    assert header["base"] == str(model_folder)
    assert (facts["steps"], facts["seed"], facts["precision"]) == (4, 0, "no")
    assert facts["loss"]["delta_max"] == 200  # 10 of 50 calls over 1000 timesteps
    found = find_checkpoint(path)
    assert found.folder == model_folder
    trained = load_pipeline(found).unet.state_dict()
    before = load_pipeline(find_checkpoint(model_folder)).unet.state_dict()
    moved = [name for name in before if not torch.equal(before[name], trained[name])]
    assert len(moved) == len(before)
    plain = UNet2DConditionModel.from_pretrained(model_folder, subfolder="unet")
    plain.load_state_dict(load_file(path))


def test_a_resumed_run_equals_an_uninterrupted_one(arguments, tmp_path, monkeypatch):
    train(arguments("whole", "--checkpointing-steps", 2))
    prepare = fcr.Preparation.__call__
    calls = 0

    def stop(self, examples):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return prepare(self, examples)

    with monkeypatch.context() as patched:
        patched.setattr(fcr.Preparation, "__call__", stop)
        result = CliRunner().invoke(main, arguments("parts", "--checkpointing-steps", 2))
        assert result.exit_code == 1
    assert not (tmp_path / "parts" / "fcr.safetensors").exists()
    train(arguments("parts", "--checkpointing-steps", 2))
    whole, parts = (load_file(tmp_path / name / "fcr.safetensors") for name in ("whole", "parts"))
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def test_a_finished_run_is_not_repeated(arguments, tmp_path, monkeypatch):
    train(arguments("out"))
    first = load_file(tmp_path / "out" / "fcr.safetensors")
    monkeypatch.setattr(fcr.Preparation, "__call__", None)  # any further step would fail
    train(arguments("out"))
    again = load_file(tmp_path / "out" / "fcr.safetensors")
    torch.testing.assert_close(again, first, rtol=0, atol=0)


def test_other_settings_do_not_go_on_from_a_checkpoint(arguments, tmp_path):
    train(arguments("out"))
    result = CliRunner().invoke(main, arguments("out", "--fcr-weight", "0.5"))
    assert result.exit_code == 1
    assert "begun with other settings: loss" in result.stderr
    train(arguments("out", "--fcr-weight", "0.5", "--resume-from-checkpoint", "never"))


@pytest.mark.parametrize("form", ["raw", "relative"])
def test_accumulation_equals_a_larger_batch(arguments, tmp_path, model_folder, form):
    train(arguments("large", "--train-batch-size", 4, "--fcr-form", form))
    train(arguments("small", "--gradient-accumulation-steps", 2, "--fcr-form", form))
    large, small = (load_file(tmp_path / name / "fcr.safetensors") for name in ("large", "small"))
    start = load_pipeline(find_checkpoint(model_folder)).unet.state_dict()
    assert share_of_the_way(small, large, start) < 0.01


def test_two_processes_equal_one_with_the_doubled_batch(arguments, tmp_path):
    more = ["--report-to", "tensorboard", "--fcr-form", "relative"]
    train(arguments("one", "--train-batch-size", 4, *more))
    # What accelerate launch runs, which starts several processes on a CPU through MPI only.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "-m", "encache.train.cli", *arguments("two", *more)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    one, two = (logged(tmp_path / name / "logs") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, values in one.items():
        assert two[name] == pytest.approx(values, rel=1e-4), name


def logged(folder):
    """Every scalar of the one tensorboard log below `folder`: name -> values."""
    events = EventAccumulator(str(next(folder.rglob("events*")).parent))
    events.Reload()
    return {name: [e.value for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_the_log_holds_losses_and_feature_sizes(arguments, tmp_path):
    more = ["--report-to", "tensorboard", "--cut", "mid", "--cached-weight", 0.5, "--fcr-stride", 5]
    train(arguments("out", *more))
    scalars = logged(tmp_path / "out" / "logs")
    assert {
        "denoise",
        "fcr",
        "cached",
        "loss",
        "mean_square/skip_0",
        "mean_square/hidden",
    } <= scalars.keys()
    assert len(scalars["loss"]) == 4
    terms = zip(scalars["denoise"], scalars["fcr"], scalars["cached"], strict=True)
    assert [sum(step) for step in terms] == pytest.approx(scalars["loss"], rel=1e-5)


def test_a_lora_is_written_for_diffusers_and_folded_in(arguments, tmp_path, model_folder):
    # encache's options are diffusers' with hyphens; its underscores are understood too.
    result = train(arguments("out", "--rank", 2, "--max_train_steps", 3))
    whole, adapter = map(Path, result.stdout.splitlines())
    assert whole == tmp_path / "out" / "fcr.safetensors"
    assert f"{whole} is the whole UNet: give it to --ckpt of encache-run" in result.stderr
    assert f"{adapter} is the LoRA alone: give it to --lora of encache-run" in result.stderr
    assert find_lora(str(adapter)).path == adapter
    folded = load_pipeline(find_checkpoint(tmp_path / "out" / "fcr.safetensors")).unet
    pipeline = StableDiffusionPipeline.from_pretrained(model_folder, safety_checker=None)
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    moved = {name for name, t in folded.state_dict().items() if not torch.equal(t, before[name])}
    assert moved
    assert all(".attn" in name for name in moved)
    pipeline.load_lora_weights(tmp_path / "out", weight_name="fcr_lora.safetensors")
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            folded(latents, 300, text).sample,
            pipeline.unet(latents, 300, text).sample,
            rtol=1e-4,
            atol=1e-5,
        )


def test_validation_grid(arguments, tmp_path):
    more = ["--validation-prompt", "red apple", "--validation-prompt", "hot dog"]
    train(arguments("out", *more, "--validation-steps", 2))
    grids = sorted(path.name for path in (tmp_path / "out" / "validation").iterdir())
    assert grids == ["step-000002.png", "step-000004.png"]


def test_a_full_disk_is_named(arguments, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", refuse)
    more = ["--validation-prompt", "red apple", "--validation-steps", 2]
    result = CliRunner().invoke(main, arguments("out", *more))
    assert result.exit_code == 1
    place = tmp_path / "out" / "validation" / "step-000002.png"
    assert f"No space left on device ({place}): free some space" in result.stderr


def test_a_run_that_stopped_before_its_first_checkpoint_is_begun_again(
    arguments, tmp_path, monkeypatch
):
    def refuse(state, path):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    more = ["--validation-prompt", "red apple", "--validation-steps", 4]
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", refuse)
        result = CliRunner().invoke(main, arguments("out", *more))
    assert "free some space, then run the same command again" in result.stderr
    other = CliRunner().invoke(main, arguments("out", *more, "--seed", 1))
    assert "step-000004.png is there already, without a checkpoint" in other.stderr
    train(arguments("out", *more))


@pytest.mark.parametrize("name", ["fcr.safetensors", "fcr_lora.safetensors"])
def test_results_of_another_run_are_not_overwritten(arguments, tmp_path, name):
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir()
    foreign.write_bytes(b"of another run")
    result = CliRunner().invoke(main, arguments("out", "--rank", 2))
    assert result.exit_code == 1
    assert f"{foreign} is there already, without a checkpoint" in result.stderr
    assert foreign.read_bytes() == b"of another run"
    train(arguments("out", "--rank", 2, "--resume-from-checkpoint", "never"))
    assert load_file(foreign)


def test_validation_pictures_of_another_run_are_not_overwritten(arguments, tmp_path):
    foreign = tmp_path / "out" / "validation" / "step-000004.png"
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    more = ["--validation-prompt", "red apple", "--validation-steps"]
    result = CliRunner().invoke(main, arguments("out", *more, 2))
    assert result.exit_code == 1
    assert f"{foreign} is there already" in result.stderr
    train(arguments("out", *more, 3))
    assert foreign.read_bytes() == b""


def test_validation_does_not_change_the_training(arguments, tmp_path):
    train(arguments("plain"))
    train(arguments("watched", "--validation-prompt", "red apple", "--validation-steps", 1))
    plain, watched = (
        load_file(tmp_path / name / "fcr.safetensors") for name in ("plain", "watched")
    )
    torch.testing.assert_close(watched, plain, rtol=0, atol=0)


def test_bf16_stays_near_fp32(arguments, tmp_path):
    more = ["--report-to", "tensorboard", "--validation-prompt", "red apple"]
    more += ["--validation-steps", 4, "--learning-rate", 1e-2]
    train(arguments("fp32", *more))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(arguments("bf16", *more, "--mixed-precision", "bf16", "--gradient-checkpointing"))
    weights = load_file(tmp_path / "bf16" / "fcr.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    fp32, bf16 = (logged(tmp_path / name / "logs")["loss"] for name in ("fp32", "bf16"))
    assert bf16 == pytest.approx(fp32, rel=2e-2)
    assert abs(fp32[3] - fp32[0]) > 0.1 * fp32[0]  # the steps in between did something
    assert (tmp_path / "bf16" / "validation" / "step-000004.png").is_file()


def test_a_diverging_run_says_so(arguments, tmp_path):
    result = CliRunner().invoke(main, arguments("out", "--learning-rate", "1e30"))
    assert result.exit_code == 1
    assert "The loss is nan at step" in result.stderr
    assert not (tmp_path / "out" / "fcr.safetensors").exists()


def test_unreadable_pictures_are_named(arguments, pictures, tmp_path):
    (pictures / "red.png").write_bytes(b"none")
    result = train(arguments("out"))
    assert "Skipped 1 unreadable pictures: red.png" in result.stderr
    assert result.stdout == f"{tmp_path / 'out' / 'fcr.safetensors'}\n"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fcr-stride", "5", "--fcr-delta-max", "5"], "either --fcr-delta-max or --fcr-stride"),
        (["--resolution", "15"], "multiple of 2"),
        (["--fcr-steps", "20"], "--fcr-steps means nothing without --fcr-stride"),
        (["--fcr-stride", "1", "--fcr-steps", "2000"], "up to 0 apart do not fit"),
        (["--fcr-delta-max", "1000"], "up to 1000 apart do not fit 1000 training timesteps"),
        (["--cached-weight", "1"], "--cached-weight needs the distance of key calls"),
        (["--snr-gamma", "0"], "--snr-gamma"),
    ],
)
def test_options_that_cannot_be_honoured(arguments, tmp_path, more, message):
    kept = tmp_path / "out" / "checkpoint.pt"
    kept.parent.mkdir()
    kept.touch()
    more = [*more, "--resume-from-checkpoint", "never"]
    result = CliRunner().invoke(main, arguments("out", *more))
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert kept.exists()


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(
    "option",
    [one.opts[0] for one in main.commands["fcr"].params if isinstance(one.type, click.FloatRange)],
)
def test_numbers_that_are_not_finite_are_refused(arguments, option, value):
    result = CliRunner().invoke(main, arguments("out", option, value))
    assert result.exit_code == 2
    assert f"Invalid value for '{option}': " in result.stderr


def test_a_precision_that_the_device_lacks(arguments, monkeypatch):
    def refuse(**options):
        raise ValueError("bf16 mixed precision requires a supported device.")

    monkeypatch.setattr("accelerate.Accelerator", refuse)
    result = CliRunner().invoke(main, arguments("out", "--mixed-precision", "bf16"))
    assert result.exit_code == 2
    assert "--mixed-precision bf16: bf16 mixed precision requires" in result.stderr


def test_other_families_are_refused(arguments, xl_folder, tmp_path):
    values = arguments("out")
    values[values.index("--pretrained-model-name-or-path") + 1] = str(xl_folder)
    result = CliRunner().invoke(main, values)
    assert result.exit_code == 1
    assert "tiny-xl is Stable Diffusion XL; training knows Stable Diffusion 1.x" in result.stderr
    assert not (tmp_path / "out" / "fcr.safetensors").exists()
