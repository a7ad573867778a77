"""Every kind of checkpoint loads to the same weights; everything else is refused in a sentence."""

import json
import shlex
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from encache.errors import CheckpointError
from encache.model.checkpoint import find_checkpoint
from encache.model.hub import hub_id_of, short_name
from encache.model.loading import load_pipeline
from encache.model.unpickle import main as unpickle
from tests.conftest import make_pipeline, tiny_unet
from tests.model.single_file import original_state_dict


def assert_same_weights(one, other):
    for name in ("unet", "vae", "text_encoder"):
        left, right = getattr(one, name).state_dict(), getattr(other, name).state_dict()
        assert left.keys() == right.keys()
        for key, value in left.items():
            torch.testing.assert_close(value, right[key], rtol=0, atol=0)


def test_diffusers_folder(model_folder):
    loaded = load_pipeline(find_checkpoint(model_folder))
    assert_same_weights(loaded, make_pipeline())
    assert loaded.unet.dtype == torch.float32


def test_single_file(model_folder, tmp_path):
    path = tmp_path / "sd.safetensors"
    save_file(original_state_dict(make_pipeline(seed=3)), path)
    loaded = load_pipeline(find_checkpoint(path, base=model_folder))
    assert_same_weights(loaded, make_pipeline(seed=3))


def test_a_whole_file_names_no_base(tmp_path):
    path = tmp_path / "sd.safetensors"
    save_file(original_state_dict(make_pipeline()), path, metadata={"base": "SD 1.5"})
    assert find_checkpoint(path).folder is None


def test_unet_over_base(model_folder, tmp_path):
    path = tmp_path / "fcr.safetensors"
    save_file(tiny_unet(seed=5).state_dict(), path)
    loaded = load_pipeline(find_checkpoint(path, base=model_folder))
    expected = make_pipeline()
    expected.unet = tiny_unet(seed=5)
    assert_same_weights(loaded, expected)


def test_unet_that_names_its_base(model_folder, tmp_path):
    path = tmp_path / "fcr.safetensors"
    save_file(tiny_unet().state_dict(), path, metadata={"base": str(model_folder)})
    assert_same_weights(load_pipeline(find_checkpoint(path)), make_pipeline())


def test_a_base_that_is_gone(tmp_path):
    path = tmp_path / "fcr.safetensors"
    save_file(tiny_unet().state_dict(), path, metadata={"base": "/gone/model"})
    with pytest.raises(
        CheckpointError, match=r"fcr.safetensors names its base /gone/model.*--base"
    ):
        find_checkpoint(path)


def test_default_model_loads():
    checkpoint = find_checkpoint()
    pipeline = load_pipeline(checkpoint)
    assert type(pipeline.unet).__name__ == "UNet2DConditionModel"
    assert sum(file.stat().st_size for file in checkpoint.files()) <= 20_000_000


def test_fingerprint_follows_content_not_place(model_folder, tmp_path):
    copy = shutil.copytree(model_folder, tmp_path / "copy")
    original = find_checkpoint(model_folder).fingerprint
    assert find_checkpoint(copy).fingerprint == original
    weights = load_file(copy / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_in.bias"][0] += 1
    save_file(weights, copy / "unet" / "diffusion_pytorch_model.safetensors")
    assert find_checkpoint(copy).fingerprint != original


@pytest.mark.parametrize("suffix", ["ckpt", "CKPT", "pt", "Pth", "bin"])
def test_pickles_are_refused_unread(tmp_path, suffix):
    path = tmp_path / f"my model.{suffix}"
    path.write_bytes(b"not even a pickle")
    with pytest.raises(CheckpointError, match=r"pickle.*encache.model.unpickle .*safetensors'"):
        find_checkpoint(path)


@pytest.mark.parametrize(
    ("part", "pickled"),
    [("unet", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")],
)
def test_a_folder_of_pickles_loads_after_the_command_it_is_refused_with(
    model_folder, tmp_path, part, pickled
):
    copy = shutil.copytree(model_folder, tmp_path / "copy")
    (weights,) = (copy / part).glob("*.safetensors")
    torch.save(load_file(weights), copy / part / pickled)
    weights.unlink()
    with pytest.raises(CheckpointError, match="is a pickle") as refusal:
        find_checkpoint(copy)
    command = str(refusal.value).partition("runs nothing: ")[2]
    arguments = shlex.split(command)
    assert arguments[:3] == ["python", "-m", "encache.model.unpickle"]
    result = CliRunner().invoke(unpickle, arguments[3:])
    assert result.exit_code == 0, result.output
    assert_same_weights(load_pipeline(find_checkpoint(copy)), make_pipeline())


def test_missing_path():
    with pytest.raises(CheckpointError, match="no diffusers folder at"):
        find_checkpoint("/no/such/model")
    for path in ("missing.safetensors", "runs/missing.safetensors"):  # no hub id
        for base in (None, "folder"):
            with pytest.raises(CheckpointError, match=f"There is no file {path}"):
                find_checkpoint(path, base)


def test_hub_id_without_network():
    with pytest.raises(CheckpointError, match="could not be fetched from the hub"):
        find_checkpoint("nobody/no-such-model")


def test_folder_without_index(tmp_path):
    with pytest.raises(CheckpointError, match="no model_index.json"):
        find_checkpoint(tmp_path)


def test_damaged_index(model_folder, tmp_path):
    copy = shutil.copytree(model_folder, tmp_path / "copy")
    (copy / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        find_checkpoint(copy)


def test_incomplete_folder(model_folder, tmp_path):
    copy = shutil.copytree(model_folder, tmp_path / "copy")
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(CheckpointError, match="no tokenizer folder"):
        find_checkpoint(copy)


def test_truncated_file(tmp_path):
    path = tmp_path / "fcr.safetensors"
    save_file(tiny_unet().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        find_checkpoint(path)


def test_truncated_weights_in_a_folder(model_folder, tmp_path):
    copy = shutil.copytree(model_folder, tmp_path / "copy")
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="could not be loaded"):
        load_pipeline(find_checkpoint(copy))


def test_not_a_unet(tmp_path):
    path = tmp_path / "vae.safetensors"
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"neither a UNet.*decoder.conv_in.weight"):
        find_checkpoint(path)
    save_file({"unet.lora_A.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="a LoRA"):
        find_checkpoint(path)


def test_unet_without_base(tmp_path):
    path = tmp_path / "fcr.safetensors"
    save_file(tiny_unet().state_dict(), path)
    with pytest.raises(CheckpointError, match="--base"):
        find_checkpoint(path)


def test_unet_of_another_architecture(model_folder, tmp_path):
    path = tmp_path / "fcr.safetensors"
    save_file(tiny_unet(layers_per_block=2).state_dict(), path)
    with pytest.raises(CheckpointError, match="another architecture"):
        load_pipeline(find_checkpoint(path, base=model_folder))


def test_other_pipeline_class(model_folder, tmp_path):
    copy = shutil.copytree(model_folder, tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    index["_class_name"] = "FluxPipeline"
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is a FluxPipeline; encache runs Stable Diffusion"):
        find_checkpoint(copy)


def test_what_completes_weights_made_from_a_checkpoint(model_folder, tmp_path):
    assert find_checkpoint().base_name == "encache/emoji"
    assert find_checkpoint(model_folder).base_name == str(model_folder)
    single = tmp_path / "sd.safetensors"
    save_file(original_state_dict(make_pipeline()), single)
    assert find_checkpoint(single, base=model_folder).base_name is None
    cached = tmp_path / "models--owner--some-name" / "snapshots" / "0123"
    shutil.copytree(model_folder, cached)
    assert find_checkpoint(cached).base_name == "owner/some-name"


def test_unknown_component_class(model_folder, tmp_path):
    copy = shutil.copytree(model_folder, tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    index["unet"] = ["diffusers", "NoSuchModel"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="could not be loaded"):
        load_pipeline(find_checkpoint(copy))


def test_only_the_hubs_own_cache_names_a_model(tmp_path):
    cached = tmp_path / "models--owner--name" / "snapshots" / "0123abcd"
    mine = tmp_path / "data" / "snapshots" / "mine"
    for folder in (cached, mine):
        folder.mkdir(parents=True)
    assert hub_id_of(cached) == "owner/name"
    assert short_name(cached) == "name"
    assert hub_id_of(mine) is None
    assert short_name(mine) == "mine"
