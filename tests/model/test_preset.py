"""How a file's header asks to be sampled is read back as written, or refused in one sentence."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from encache.contract.manifest import read_manifest
from encache.contract.target import Target, make_target, rows_of
from encache.errors import CheckpointError
from encache.export.build import Request, build_engines
from encache.export.cli import main as export
from encache.model.checkpoint import find_checkpoint
from encache.model.loading import load_pipeline, read_outline
from encache.model.preset import PRESET_KEY, UNSAID, Preset
from encache.model.spec import CUTS
from encache.runtime.backends import load_scheduler
from encache.runtime.schedulers import full_config
from tests.conftest import (
    ONE_SEGMENT,
    make_pipeline,
    save_tuned,
    stable_diffusion_scheduler,
    tiny_unet,
)
from tests.model.single_file import original_state_dict

numbers = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(st.none() | st.booleans() | st.integers() | numbers | st.text(), st.lists)
configs = st.dictionaries(st.text(), values).map(lambda config: {**config, "_class_name": "X"})
counts = st.integers(1, 10**6)
presets = st.builds(
    lambda keys, **rest: Preset(**rest, **keys),
    keys=st.one_of(
        st.just({}),
        st.fixed_dictionaries({"stride": counts}),
        st.fixed_dictionaries({"key_calls": st.lists(st.integers(0, 99)).map(tuple)}),
    ),
    scheduler=st.none() | configs,
    steps=st.none() | counts,
    guidance_scale=st.none() | numbers,
    cut=st.none() | st.sampled_from(CUTS),
    blend=st.none() | st.text(),
    prior_noise=st.none() | st.booleans(),
)


@given(presets)
def test_a_preset_survives_its_json(preset):
    assert Preset.from_json(preset.to_json(), "x") == preset


@given(presets, presets)
def test_what_one_says_goes_before_what_another_says(ours, theirs):
    merged = ours.over(theirs)
    assert ours.over(UNSAID) == UNSAID.over(ours) == ours.over(ours) == ours
    assert not (merged.stride and merged.key_calls)
    for name in ("scheduler", "steps", "guidance_scale", "cut", "blend", "prior_noise"):
        first = getattr(ours, name)
        assert getattr(merged, name) == (getattr(theirs, name) if first is None else first)
    if ours.stride or ours.key_calls:
        assert (merged.stride, merged.key_calls) == (ours.stride, ours.key_calls)


MALFORMED = [
    ("", "Expecting value"),
    ("[]", "not an object"),
    ("[" * 200_000, "nested too deeply"),
    ('{"steps": 0}', "steps must be a whole number from 1, not '0'"),
    ('{"steps": true}', "steps must be"),
    ('{"steps": 4.0}', "steps must be"),
    ('{"stride": "4"}', "stride must be"),
    ('{"guidance_scale": NaN}', "not JSON compliant"),
    ('{"guidance_scale": 1e999}', "not JSON compliant"),
    (f'{{"guidance_scale": 1{"0" * 400}}}', "guidance_scale must be a finite number"),
    ('{"guidance_scale": false}', "guidance_scale must be"),
    ('{"cut": "down1"}', "cut must be one of none, mid, up0"),
    ('{"cut": ["mid"]}', "cut must be"),
    ('{"key_calls": "0,2"}', "key_calls must be a list"),
    ('{"key_calls": [0, -1]}', "key_calls must be"),
    ('{"stride": 2, "key_calls": [0]}', "both a stride and key_calls"),
    ('{"blend": 1}', "blend must be"),
    ('{"prior_noise": 0}', "prior_noise must be true or false"),
    ('{"scheduler": "DDIMScheduler"}', "scheduler must be"),
    ('{"scheduler": {"beta_start": 1}}', "scheduler must be"),
    ('{"scheduler": {"_class_name": "DDIMScheduler", "beta_start": NaN}}', "not JSON compliant"),
    ('{"eta": 1}', "'eta' is unknown"),
]


@pytest.mark.parametrize(("text", "reason"), MALFORMED)
def test_malformed_headers_are_refused(model_folder, tmp_path, text, reason):
    path = tmp_path / "odd.safetensors"
    save_file(tiny_unet().state_dict(), path, {PRESET_KEY: text})
    with pytest.raises(CheckpointError, match=f"odd.safetensors cannot be.*{PRESET_KEY}") as error:
        find_checkpoint(path, base=model_folder)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@given(st.text() | st.dictionaries(st.sampled_from(sorted(vars(UNSAID))), values).map(json.dumps))
def test_any_header_is_read_or_refused(text):
    try:
        Preset.from_json(text, "x")
    except CheckpointError as error:
        assert str(error).startswith("x cannot be sampled")  # noqa: PT017


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"_class_name": "NoSuchScheduler"}, "NoSuchScheduler"),
        ({"_class_name": "AutoencoderKL"}, "AutoencoderKL is no scheduler"),
        ({"_class_name": "utils"}, "utils is no scheduler"),
        ({"_class_name": "os.system"}, "os.system"),
        ({"_class_name": "SchedulerMixin"}, ""),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "magic"}, "magic"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": "many"}, ""),
    ],
)
def test_a_header_that_names_no_scheduler(model_folder, tmp_path, config, reason):
    checkpoint = save_tuned(tmp_path, model_folder, Preset(scheduler=config))
    for open_checkpoint in (read_outline, load_pipeline):
        with pytest.raises(CheckpointError, match="names no diffusers scheduler in its") as error:
            open_checkpoint(checkpoint)
        assert reason in str(error.value)


def test_finding_a_preset_needs_no_torch(model_folder, tmp_path):
    path = save_tuned(tmp_path, model_folder, ONE_SEGMENT).weights
    code = "import sys; from encache.model.checkpoint import find_checkpoint as find\n"
    code += f"assert find({str(path)!r}).preset.steps == 4; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_scheduler_of_a_header_takes_the_folders_place(model_folder, tmp_path):
    checkpoint = save_tuned(tmp_path, model_folder, ONE_SEGMENT)
    wanted = stable_diffusion_scheduler(timestep_spacing="trailing")
    for scheduler in (read_outline(checkpoint).scheduler, load_pipeline(checkpoint).scheduler):
        assert type(scheduler) is DDIMScheduler
        assert full_config(scheduler) == full_config(wanted)
    assert read_outline(checkpoint.base).scheduler.config.timestep_spacing == "leading"


def test_what_the_weights_predict_still_counts(model_folder, tmp_path):
    said = {"modelspec.prediction_type": "v"}
    checkpoint = save_tuned(tmp_path, model_folder, ONE_SEGMENT, **said)
    scheduler = load_pipeline(checkpoint).scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.timestep_spacing == "trailing"


def test_the_model_answers_before_its_base(model_folder, tmp_path):
    said = save_tuned(tmp_path, model_folder, ONE_SEGMENT)
    before = said.fingerprint
    assert (said.guidance_scale, said.cut) == (1.0, "mid")
    assert (said.base.guidance_scale, said.base.cut) == (7.5, "none")
    silent = save_tuned(tmp_path, model_folder, UNSAID)
    assert (silent.guidance_scale, silent.cut) == (7.5, "none")
    assert silent.fingerprint != before


def test_a_whole_checkpoint_has_no_preset(tmp_path):
    path = tmp_path / "sd.safetensors"
    save_file(original_state_dict(make_pipeline()), path, {PRESET_KEY: '{"steps": 4}'})
    assert find_checkpoint(path).preset == UNSAID


@pytest.mark.usefixtures("only_text_encoder")
def test_an_engine_folder_remembers(model_folder, tmp_path):
    checkpoint = save_tuned(tmp_path, model_folder, ONE_SEGMENT)
    folder = build_engines(Request(checkpoint, checkpoint.cut), tmp_path / "engines")
    manifest = read_manifest(folder)
    assert manifest.preset == ONE_SEGMENT
    assert manifest.guidance_scale == 1.0
    config = full_config(load_scheduler(folder, manifest))
    del config["_diffusers_version"]  # of the file
    assert config == ONE_SEGMENT.scheduler
    content = json.loads((folder / "manifest.json").read_text())
    content["preset"]["steps"] = 5
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(Exception, match="damaged"):
        read_manifest(folder)


@pytest.mark.usefixtures("only_text_encoder")
def test_the_weights_choose_the_cut_of_an_export(model_folder, tmp_path):
    path = save_tuned(tmp_path, model_folder, ONE_SEGMENT).weights
    for options, cut in (((), "mid"), (("--cut", "up2"), "up2")):
        command = ["--ckpt", path, "--engine-dir", tmp_path / "engines", *options]
        result = CliRunner().invoke(export, list(map(str, command)))
        assert result.exit_code == 0, result.output
        folder = tmp_path / "engines" / result.stdout.strip()
        assert read_manifest(folder).identity.cut == cut


@pytest.mark.parametrize(
    ("preset", "rows", "calls"),
    [
        (UNSAID, (2, 2), 10),
        (ONE_SEGMENT, (1, 1), 4),
        (Preset(stride=50), (2, 2), 10),
        (Preset(steps=8, key_calls=(0, 2), guidance_scale=1.0), (1, 1), 6),
        (Preset(steps=8, key_calls=(0, 5, 6)), (2, 2), 5),
        (Preset(steps=1, key_calls=(0,)), (2, 2), 1),
    ],
)
def test_a_target_fits_the_plan_of_the_weights(
    model_folder, tmp_path, monkeypatch, preset, rows, calls
):
    monkeypatch.setattr("encache.contract.target.describe_library", lambda backend: "any")
    checkpoint = save_tuned(tmp_path, model_folder, preset)
    target = make_target(checkpoint, "tensorrt-rtx", "mid", compute_capabilities=("8.9",))
    assert target == Target("any", ("8.9",), rows, calls, (16, 16), (16, 16))
    asked = make_target(
        checkpoint, "x", "mid", compute_capabilities=("8.9",), rows=(3, 3), decode_calls=2
    )
    assert (asked.rows, asked.decode_calls) == ((3, 3), 2)


def test_rows_of_pictures(model_folder, tmp_path):
    unguided = save_tuned(tmp_path, model_folder, ONE_SEGMENT)
    for checkpoint, one, span in ((unguided, (3, 3), (1, 4)), (unguided.base, (6, 6), (1, 8))):
        assert rows_of(checkpoint, (3, 3)) == one
        assert rows_of(checkpoint, (1, 4)) == span
