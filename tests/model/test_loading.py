"""Whoever opens a checkpoint gets what diffusers makes of it; shared files load as they are."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from encache.contract.manifest import read_manifest
from encache.errors import CheckpointError, PlanError
from encache.export.build import Request, build_engines
from encache.model.checkpoint import find_checkpoint
from encache.model.loading import load_pipeline, read_outline
from encache.runtime.backends import load_scheduler
from encache.runtime.cli import main
from encache.runtime.pipeline import EncachePipeline
from encache.runtime.schedulers import full_config, make_scheduler
from tests.conftest import make_pipeline, tiny_unet
from tests.model.single_file import original_state_dict
from tests.model.test_checkpoint import assert_same_weights


@pytest.fixture
def copied(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "copy")


def edit(path, **changes):
    """Change a JSON file; None removes a key."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("scheduler/scheduler_config.json", {"steps_offset": None}),
        ("scheduler/scheduler_config.json", {"steps_offset": 0, "clip_sample": True}),
        ("scheduler/scheduler_config.json", {"_class_name": "EulerDiscreteScheduler"}),
        ("unet/config.json", {"sample_size": [16, 24]}),
        ("unet/config.json", {"sample_size": 8, "_diffusers_version": "0.6.0"}),
        ("unet/config.json", {"in_channels": None, "out_channels": None}),
        ("vae/config.json", {"scaling_factor": None}),
    ],
)
def test_the_outline_is_what_diffusers_loads(copied, part, changes):
    edit(copied / part, **changes)
    checkpoint = find_checkpoint(copied)
    outline = read_outline(checkpoint)
    theirs = StableDiffusionPipeline.from_pretrained(copied, safety_checker=None)
    ours = EncachePipeline.from_pipe(load_pipeline(checkpoint))
    assert outline.spec == ours.spec == EncachePipeline.from_pipe(theirs).spec
    for scheduler in (outline.scheduler, ours.scheduler):
        assert full_config(scheduler) == full_config(theirs.scheduler)


def test_the_command_line_draws_with_the_repaired_schedule(copied):
    edit(copied / "scheduler" / "scheduler_config.json", steps_offset=None)
    command = ["--ckpt", str(copied), "--steps", "10", "--stride", "1", "--dry-run"]
    plan = json.loads(CliRunner().invoke(main, command).stdout)
    assert plan["timesteps"] == [*range(901, 0, -100)]


@pytest.mark.usefixtures("only_text_encoder")
def test_a_model_that_is_not_square(copied, tmp_path):
    edit(copied / "unet" / "config.json", sample_size=[8, 12])
    output = tmp_path / "wide.png"
    command = ["--ckpt", copied, "--prompt", "hot dog", "--steps", "2", "--output", output]
    result = CliRunner().invoke(main, list(map(str, [*command, "--backend", "torch"])))
    assert result.exit_code == 0, result.output
    assert Image.open(output).size == (24, 16)
    folder = build_engines(Request(find_checkpoint(copied)), tmp_path / "engines")
    assert read_manifest(folder).spec.picture_size == (16, 24)


def test_a_model_without_a_size_is_refused(copied):
    edit(copied / "unet" / "config.json", sample_size=None)
    with pytest.raises(CheckpointError, match="does not say its sample_size"):
        read_outline(find_checkpoint(copied))


@pytest.mark.parametrize("length", [None, 500])
def test_a_tokenizer_without_a_length(copied, length):
    edit(copied / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    pipeline = EncachePipeline.from_pipe(load_pipeline(find_checkpoint(copied)))
    wanted = EncachePipeline.from_pipe(make_pipeline()).texts(["red apple"])
    torch.testing.assert_close(pipeline.texts(["red apple"]), wanted)


@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json"])
@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 200_000])
def test_damaged_configs(copied, file, content):
    (copied / file).write_text(content)
    with pytest.raises(CheckpointError, match="damaged config"):
        read_outline(find_checkpoint(copied))


def as_variant(folder, variant, *, parts=("unet", "vae", "text_encoder"), change=0.0):
    """Give the weights of these parts a variant's name, changed so that they can be told apart."""
    for part in parts:
        (path,) = (one for one in (folder / part).glob("*.safetensors") if one.suffixes[:-1] == [])
        weights = {name: value + change for name, value in load_file(path).items()}
        save_file(weights, path.with_suffix(f".{variant}.safetensors"), {"format": "pt"})
    return folder


def drop_plain(folder, *parts):
    for part in parts:
        for path in (folder / part).glob("*.safetensors"):
            if not path.suffixes[:-1]:
                path.unlink()


def test_a_folder_with_fp16_variants_alone(copied):
    drop_plain(as_variant(copied, "fp16"), "unet", "vae", "text_encoder")
    checkpoint = find_checkpoint(copied)
    assert checkpoint.variant == "fp16"
    assert_same_weights(load_pipeline(checkpoint), make_pipeline())


def test_a_folder_with_one_fp16_variant_alone(copied):
    drop_plain(as_variant(copied, "fp16", parts=["unet"]), "unet")
    assert_same_weights(load_pipeline(find_checkpoint(copied)), make_pipeline())


def test_plain_weights_win_unless_a_variant_is_asked_for(copied):
    as_variant(copied, "fp16", change=1.0)
    as_variant(copied, "non_ema", parts=["unet"], change=2.0)
    plain, fp16, non_ema = (find_checkpoint(copied, variant=v) for v in (None, "fp16", "non_ema"))
    prints = {one.fingerprint for one in (plain, fp16, non_ema)}
    assert len(prints) == 3
    assert_same_weights(load_pipeline(plain), make_pipeline())
    biases = [load_pipeline(one).unet.conv_in.bias.mean() for one in (plain, fp16, non_ema)]
    torch.testing.assert_close(biases[1], biases[0] + 1)
    torch.testing.assert_close(biases[2], biases[0] + 2)
    before = plain.fingerprint
    as_variant(copied, "fp16", change=3.0)  # lies beside the weights that are read
    assert find_checkpoint(copied).fingerprint == before


def test_variants_that_are_not_there(copied):
    with pytest.raises(CheckpointError, match="no weights of the variant bf16"):
        find_checkpoint(copied, variant="bf16")
    as_variant(copied, "fp16", parts=["unet"])
    as_variant(copied, "bf16", parts=["vae"])
    drop_plain(copied, "unet", "vae")
    with pytest.raises(CheckpointError, match="unet has fp16; vae has bf16"):
        find_checkpoint(copied)


def test_sharded_weights(copied):
    pipeline = make_pipeline()
    shutil.rmtree(copied / "unet")
    pipeline.unet.save_pretrained(copied / "unet", max_shard_size="100KB", variant="fp16")
    assert len(list((copied / "unet").glob("*.safetensors"))) > 1
    checkpoint = find_checkpoint(copied)
    assert_same_weights(load_pipeline(checkpoint), pipeline)
    before = checkpoint.fingerprint
    shard = sorted((copied / "unet").glob("*.safetensors"))[-1]
    save_file({name: value + 1 for name, value in load_file(shard).items()}, shard)
    assert find_checkpoint(copied).fingerprint != before


V_PREDICTIONS = [
    ({"modelspec.prediction_type": "v"}, {}),
    ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, {}),
    ({"ss_v_parameterization": "True"}, {}),
    ({}, {"v_pred": torch.tensor([])}),
]


@pytest.mark.parametrize(("metadata", "marks"), V_PREDICTIONS)
@pytest.mark.parametrize("holds", ["pipeline", "unet"])
def test_a_header_that_says_v_prediction(model_folder, tmp_path, metadata, marks, holds):
    path = tmp_path / "v.safetensors"
    tensors = (
        original_state_dict(make_pipeline()) if holds == "pipeline" else tiny_unet().state_dict()
    )
    save_file({**tensors, **marks}, path, metadata)
    checkpoint = find_checkpoint(path, base=model_folder)
    pipeline = load_pipeline(checkpoint)
    assert read_outline(checkpoint).scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert_same_weights(pipeline, make_pipeline())


def test_a_header_that_says_epsilon(copied, tmp_path):
    edit(copied / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    for metadata, wanted in (
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({}, "v_prediction"),
    ):
        path = tmp_path / "e.safetensors"
        save_file(tiny_unet().state_dict(), path, metadata)
        checkpoint = find_checkpoint(path, base=copied)
        assert load_pipeline(checkpoint).scheduler.config.prediction_type == wanted


def test_a_schedule_that_ends_without_signal(model_folder, tmp_path):
    path = tmp_path / "z.safetensors"
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    save_file({**tiny_unet().state_dict(), **marks}, path)
    scheduler = load_pipeline(find_checkpoint(path, base=model_folder)).scheduler
    assert scheduler.alphas_cumprod[-1] == 0
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "HeunDiscreteScheduler"])
def test_a_solver_that_cannot_follow_such_a_schedule(copied, tmp_path, scheduler):
    path = tmp_path / "z.safetensors"
    save_file({**tiny_unet().state_dict(), "ztsnr": torch.tensor([])}, path)
    ddim = read_outline(find_checkpoint(path, base=copied)).scheduler
    assert full_config(make_scheduler("euler", ddim))["rescale_betas_zero_snr"]
    with pytest.raises(PlanError, match="heun cannot follow"):
        make_scheduler("heun", ddim)
    edit(copied / "model_index.json", scheduler=["diffusers", scheduler])
    edit(copied / "scheduler" / "scheduler_config.json", _class_name=scheduler)
    for open_checkpoint in (read_outline, load_pipeline):
        with pytest.raises(CheckpointError, match=f"{scheduler} knows no rescale_betas_zero_snr"):
            open_checkpoint(find_checkpoint(path, base=copied))


@pytest.mark.parametrize("lacking", ["first_stage_model.", "cond_stage_model."])
def test_the_folder_completes_a_pruned_file(copied, tmp_path, lacking):
    path = tmp_path / "pruned.safetensors"
    tensors = original_state_dict(make_pipeline(seed=3))
    save_file({name: one for name, one in tensors.items() if not name.startswith(lacking)}, path)
    loaded = load_pipeline(find_checkpoint(path, base=copied))
    file, folder = make_pipeline(seed=3), make_pipeline()
    expected = file
    if lacking == "first_stage_model.":
        expected.vae = folder.vae
    else:
        expected.text_encoder = folder.text_encoder
    assert_same_weights(loaded, expected)


@pytest.mark.parametrize(
    ("tensor", "family"),
    [
        ("model.diffusion_model.joint_blocks.0.x", "Stable Diffusion 3"),
        ("model.diffusion_model.double_blocks.0.x", "Flux"),
    ],
)
def test_single_files_of_other_families(model_folder, tmp_path, tensor, family):
    path = tmp_path / "other.safetensors"
    names = ("model.diffusion_model.input_blocks.0.0.weight", tensor)
    save_file({name: torch.zeros(1) for name in names}, path)
    with pytest.raises(CheckpointError, match=f"is {family};"):
        find_checkpoint(path, base=model_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet": ["my_unet", "MyUNet"]}, "a MyUNet of its own module my_unet"),
        ({"_class_name": ["my_pipeline", "MyPipeline"]}, "is a .*MyPipeline"),
        ({"unet": [None, None]}, "names no unet"),
        ({"vae": "AutoencoderKL"}, "names no vae"),
    ],
)
def test_a_folder_with_code_of_its_own(copied, changes, message):
    edit(copied / "model_index.json", **changes)
    (copied / "unet" / "my_unet.py").write_text("raise SystemExit('executed')")
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(copied)


@pytest.mark.usefixtures("only_text_encoder")
def test_the_guidance_belongs_to_the_model(copied, tmp_path):
    assert find_checkpoint().guidance_scale == 3.0
    assert find_checkpoint(copied).guidance_scale == 7.5
    edit(copied / "model_index.json", _guidance_scale=2)
    assert find_checkpoint(copied).guidance_scale == 2.0
    folder = build_engines(Request(find_checkpoint(copied)), tmp_path / "engines")
    assert read_manifest(folder).guidance_scale == 2.0
    save_file(tiny_unet().state_dict(), tmp_path / "fcr.safetensors")
    assert find_checkpoint(tmp_path / "fcr.safetensors", base=copied).guidance_scale == 2.0
    edit(copied / "model_index.json", _guidance_scale="high")
    with pytest.raises(CheckpointError, match="no number"):
        _ = find_checkpoint(copied).guidance_scale


@pytest.mark.usefixtures("only_text_encoder")
@pytest.mark.parametrize(
    "left_out", [[], ["timestep_spacing"], ["steps_offset", "prediction_type"]]
)
def test_another_solver_takes_over_what_diffusers_would_take(copied, tmp_path, left_out):
    """Config files of old checkpoints leave things out, for which each solver has its default."""
    edit(copied / "scheduler" / "scheduler_config.json", **dict.fromkeys(left_out))
    theirs = StableDiffusionPipeline.from_pretrained(copied, safety_checker=None).scheduler
    wanted = full_config(DPMSolverMultistepScheduler.from_config(theirs.config))
    wanted["steps_offset"] = 1  # which diffusers repairs, but forgets again here
    checkpoint = find_checkpoint(copied)
    folder = build_engines(Request(checkpoint), tmp_path / "engines")
    for scheduler in (
        read_outline(checkpoint).scheduler,
        load_pipeline(checkpoint).scheduler,
        load_scheduler(folder, read_manifest(folder)),
    ):
        assert full_config(make_scheduler("dpmsolver++", scheduler)) == wanted
