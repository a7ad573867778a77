"""Fused LoRAs compute what diffusers computes with its adapters in place."""

import re
import sys

import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from encache.errors import CheckpointError
from encache.model.checkpoint import find_checkpoint
from encache.model.loading import load_pipeline
from encache.model.lora import Lora, find_lora
from encache.runtime.cli import main
from tests.conftest import TEXT_WIDTH, make_pipeline


def write_lora(folder, name, seed, **unet_changes):
    pipeline = make_pipeline(**unet_changes)
    torch.manual_seed(seed)
    layers = {}
    for part, targets in (
        ("unet", ["to_q", "to_v"]),
        ("text_encoder", ["q_proj", "k_proj", "v_proj", "out_proj"]),
    ):
        model = getattr(pipeline, part)
        model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
        found = get_peft_model_state_dict(model)
        layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(found)
    StableDiffusionPipeline.save_lora_weights(folder, weight_name=name, **layers)
    return folder / name


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return [write_lora(folder, f"style{seed}.safetensors", seed) for seed in (1, 2)]


@torch.no_grad()
def outputs(pipeline):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.randn(1, 5, TEXT_WIDTH, generator=generator)
    ids = torch.arange(16)[None]
    return pipeline.unet(latents, 10, text).sample, pipeline.text_encoder(ids)[0]


def test_fused_equals_adapters_at_their_scales(model_folder, loras):
    wanted = load_pipeline(find_checkpoint(model_folder))
    plain = outputs(wanted)
    for path, name in zip(loras, ("one", "two"), strict=True):
        wanted.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    wanted.set_adapters(["one", "two"], [0.5, 1.0])
    fused = load_pipeline(find_checkpoint(model_folder, loras=[f"{loras[0]}:0.5", str(loras[1])]))
    assert not any("lora" in name for name, _ in fused.unet.named_modules())
    for ours, theirs, before in zip(outputs(fused), outputs(wanted), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert (ours - before).norm() > 0.01 * before.norm()


def test_another_scale_is_another_model(model_folder, loras):
    plain, whole, half = (
        find_checkpoint(model_folder, loras=one)
        for one in ([], [str(loras[0])], [f"{loras[0]}:0.5"])
    )
    assert len({plain.fingerprint, whole.fingerprint, half.fingerprint}) == 3
    assert half.name == "tiny+style1"


def test_a_colon_may_belong_to_the_path(loras, tmp_path):
    assert find_lora(f"{loras[0]}:-0.5") == Lora(loras[0], -0.5)
    odd = tmp_path / "a:b.safetensors"
    odd.write_bytes(loras[0].read_bytes())
    assert find_lora(str(odd)) == Lora(odd)


def test_refusals(model_folder, loras, tmp_path):
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "whole.safetensors")
    strange = tmp_path / "strange.safetensors"
    save_file({"transformer.blocks.0.lora_A.weight": torch.zeros(1, 1)}, strange)
    (tmp_path / "broken.safetensors").write_bytes(loras[0].read_bytes()[:99])
    for name, words in [
        ("missing.safetensors", "no LoRA file"),
        ("style.pt", "pickle"),
        ("whole.safetensors", "no LoRA"),
        ("broken.safetensors", "not a complete"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            find_checkpoint(model_folder, loras=[str(tmp_path / name)])
    wide = write_lora(tmp_path, "wide.safetensors", 1, block_out_channels=(16, 16, 32, 32))
    for path in (wide, strange):
        with pytest.raises(CheckpointError, match="does not fit"):
            load_pipeline(find_checkpoint(model_folder, loras=[str(path)]))


@pytest.mark.parametrize("strangers", [1, 3])
def test_layers_that_fit_nothing_are_not_left_out_in_silence(
    model_folder, loras, tmp_path, strangers
):
    """As in a LoRA for a text encoder or UNet with more layers."""
    tensors, path = load_file(loras[0]), tmp_path / "half.safetensors"
    known = next(name for name in tensors if "down_blocks.0" in name and "lora.down" in name)
    for number in range(strangers):
        for side in ("lora.down", "lora.up"):
            name = known.replace("lora.down", side)
            new = name.replace("attentions.0", f"attentions.{7 + number}")
            tensors[new] = tensors[name].clone()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"{strangers} of its \d+ layers are not in it"):
        load_pipeline(find_checkpoint(model_folder, loras=[str(path)]))


def kohya_names(tensors):
    """diffusers' names as kohya's trainers write them."""
    for name, tensor in tensors.items():
        part, layer, side = re.fullmatch(
            r"(unet|text_encoder)\.(.*)\.lora(?:_linear_layer)?\.(down|up)\.weight", name
        ).groups()
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te_text_model"}[part]
        layer = layer.removeprefix("text_model.").replace(".", "_")
        yield f"{prefix}_{layer}.lora_{side}.weight", tensor


def test_a_lora_of_kohyas_trainers(model_folder, loras, tmp_path):
    path = tmp_path / "kohya.safetensors"
    tensors = dict(kohya_names(load_file(loras[0])))
    alphas = {
        name.replace("lora_down.weight", "alpha"): torch.tensor(float(len(one)))
        for name, one in tensors.items()
        if "lora_down" in name
    }
    save_file({**tensors, **alphas}, path)
    found, wanted = (
        outputs(load_pipeline(find_checkpoint(model_folder, loras=[str(one)])))
        for one in (path, loras[0])
    )
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_peft_that_does_not_fit(loras, monkeypatch):
    pipeline = make_pipeline()

    def refuse(*_, **__):
        raise ValueError("The version of PEFT you are using is not compatible.")

    monkeypatch.setattr(pipeline, "load_lora_weights", refuse)
    with pytest.raises(CheckpointError, match="not compatible: pip install"):
        Lora(loras[0]).apply(pipeline)


def test_without_peft(loras, monkeypatch):
    pipeline = make_pipeline()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(CheckpointError, match="pip install"):
        Lora(loras[0]).apply(pipeline)


def test_a_picture_drawn_with_a_lora(model_folder, loras, tmp_path):
    command = ["--ckpt", model_folder, "--backend", "torch", "--steps", 4, "--prompt", "hot dog"]
    pictures = []
    for name, more in (("with", ["--lora", loras[0]]), ("without", [])):
        output = tmp_path / f"{name}.png"
        result = CliRunner().invoke(main, list(map(str, [*command, *more, "--output", output])))
        assert result.exit_code == 0, result.output
        pictures.append(output.read_bytes())
    assert pictures[0] != pictures[1]
