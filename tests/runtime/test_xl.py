"""Stable Diffusion XL: the oracle is diffusers' own pipeline."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

from encache.errors import CheckpointError, EncacheError
from encache.export.build import Request, build_engines
from encache.model.checkpoint import find_checkpoint
from encache.model.loading import load_pipeline
from encache.runtime.cli import main
from encache.runtime.pipeline import EncachePipeline
from tests.conftest import XL_UNET, make_pipeline, make_xl_pipeline, tiny_unet
from tests.model.single_file import original_state_dict

ARGUMENTS = {"num_inference_steps": 6, "output_type": "latent", "height": 16, "width": 24}

#: What makes a UNet of XL with two levels, which is exported in half the time.
SHALLOW = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 1,
}


@pytest.fixture
def pipeline():
    return make_xl_pipeline()


def draw(pipeline, prompt="red apple", **arguments):
    own = {"stride": 1} if isinstance(pipeline, EncachePipeline) else {}
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt, generator=generator, **{**ARGUMENTS, **own, **arguments}).images


@pytest.mark.parametrize("cut", ["none", "mid", "up1"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"negative_prompt": ""},
        {"negative_prompt": "green pear", "num_images_per_prompt": 2},
        {"prompt_2": "hot dog", "negative_prompt": "pear", "negative_prompt_2": "banana"},
        {"guidance_scale": 1.0},
        {"clip_skip": 1, "guidance_rescale": 0.5},
        {"original_size": (64, 48), "crops_coords_top_left": (3, 5), "target_size": (32, 32)},
        {"negative_original_size": (9, 9), "negative_target_size": (8, 8)},
    ],
)
def test_every_call_equals_diffusers(pipeline, cut, arguments):
    ours = EncachePipeline.from_pipe(pipeline, cut)
    actual, expected = draw(ours, **arguments), draw(pipeline, **arguments)
    # The pipeline starts from its scheduler's noise level; equal noise, equal latents.
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_what_is_asked_makes_a_difference(pipeline):
    ours = EncachePipeline.from_pipe(pipeline)
    plain = draw(ours)
    for arguments in (
        {"negative_prompt": ""},
        {"prompt_2": "hot dog"},
        {"original_size": (640, 480)},
        {"clip_skip": 1},
    ):
        assert not torch.allclose(draw(ours, **arguments), plain, atol=1e-4), arguments


def test_embeddings_may_be_given(pipeline):
    ours = EncachePipeline.from_pipe(pipeline)
    texts = ours.texts(["red apple"])
    given = {"prompt_embeds": texts["text"], "pooled_prompt_embeds": texts["pooled_text"]}
    torch.testing.assert_close(draw(ours, None, **given), draw(ours), rtol=1e-5, atol=1e-5)
    with pytest.raises(EncacheError, match="also reads pooled_text"):
        draw(ours, None, prompt_embeds=texts["text"])


def test_lost_words_are_named_once(pipeline, caplog):
    ours = EncachePipeline.from_pipe(pipeline)
    draw(ours, "red apple " * 20, negative_prompt="")
    assert caplog.text.count("is too long") == 1
    draw(ours, "red apple " * 20, negative_prompt="", prompt_2="hot dog " * 20)
    assert caplog.text.count("is too long") == 3


def test_stable_diffusion_reads_none_of_it():
    ours = EncachePipeline.from_pipe(make_pipeline())
    for arguments in ({"prompt_2": "x"}, {"original_size": (8, 8)}):
        with pytest.raises(EncacheError, match="belongs to Stable Diffusion XL"):
            draw(ours, **arguments)


def test_a_single_file(xl_folder, tmp_path):
    other = make_xl_pipeline(seed=3)
    whole, pruned = tmp_path / "xl.safetensors", tmp_path / "pruned.safetensors"
    tensors = original_state_dict(other)
    save_file(tensors, whole)
    encoders = ("conditioner.embedders.0.", "conditioner.embedders.1.")
    save_file({name: one for name, one in tensors.items() if not name.startswith(encoders)}, pruned)
    ours = EncachePipeline.from_pretrained(whole, base=xl_folder, backend="torch")
    torch.testing.assert_close(draw(ours), draw(other), rtol=1e-4, atol=1e-4)
    kept = make_xl_pipeline()
    other.text_encoder, other.text_encoder_2 = kept.text_encoder, kept.text_encoder_2
    ours = EncachePipeline.from_pretrained(pruned, base=xl_folder, backend="torch")
    torch.testing.assert_close(draw(ours), draw(other), rtol=1e-4, atol=1e-4)


def test_a_single_file_needs_a_base_of_its_family(model_folder, tmp_path):
    path = tmp_path / "xl.safetensors"
    save_file(original_state_dict(make_xl_pipeline()), path)
    with pytest.raises(CheckpointError, match=r"is Stable Diffusion XL, and .* is Stable .* 1.x"):
        find_checkpoint(path, base=model_folder)


def test_a_lora_reaches_unet_and_both_text_encoders(xl_folder, tmp_path):
    made, adapted = make_xl_pipeline(), make_xl_pipeline()
    layers = {}
    for part, targets in (
        ("unet", ["to_q", "to_v"]),
        ("text_encoder", ["q_proj", "v_proj"]),
        ("text_encoder_2", ["q_proj", "v_proj"]),
    ):
        model = getattr(made, part)
        torch.manual_seed(1)
        model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
        found = get_peft_model_state_dict(model)
        layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(found)
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, weight_name="x.safetensors", **layers)
    adapted.load_lora_weights(tmp_path, weight_name="x.safetensors")
    lora = str(tmp_path / "x.safetensors")
    ours = EncachePipeline.from_pretrained(xl_folder, loras=[lora], backend="torch")
    torch.testing.assert_close(draw(ours), draw(adapted), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(draw(ours), draw(make_xl_pipeline()), atol=1e-2)


def test_an_autoencoder_that_overflows_in_fp16_is_kept_in_fp32(pipeline, tmp_path):
    pipeline.vae.register_to_config(force_upcast=True)
    pipeline.unet = tiny_unet(**{**XL_UNET, **SHALLOW})
    pipeline.save_pretrained(tmp_path / "copy")
    checkpoint = find_checkpoint(tmp_path / "copy")
    assert load_pipeline(checkpoint, torch.float16).vae.dtype == torch.float32
    stable_diffusion = load_pipeline(find_checkpoint(), torch.float16).vae
    assert stable_diffusion.config.force_upcast  # diffusers' default, which it heeds for XL alone
    assert stable_diffusion.dtype == torch.float16
    folder = build_engines(Request(checkpoint, dtype="fp16"), tmp_path / "engines")
    ours = EncachePipeline.from_engines(folder)
    assert ours.dtype == torch.float16
    whole = EncachePipeline.from_pipe(make_xl_pipeline())
    latents = draw(whole)
    ours_drawn, theirs = (one.decode(latents.float(), "pt") for one in (ours, whole))
    # Its weights were rounded when they were read in fp16.
    torch.testing.assert_close(ours_drawn, theirs, rtol=1e-2, atol=1e-3)


def test_the_command_draws_it(xl_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["--ckpt", str(xl_folder), "--backend", "torch", "--prompt", "x", "--steps", "4"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / result.stdout.strip()).size == (16, 16)


@pytest.mark.parametrize("cut", ["none", "mid"])
def test_engines_draw_what_diffusers_draws(xl_folder, pipeline, tmp_path, cut):
    checkpoint = find_checkpoint(xl_folder)
    assert checkpoint.guidance_scale == 5.0
    ours = EncachePipeline.from_engines(build_engines(Request(checkpoint, cut), tmp_path))
    arguments = {"height": 24, "width": 40, "negative_prompt": "pear"}
    for more in (arguments, {**arguments, "negative_prompt": None}):
        actual, expected = draw(ours, **more), draw(pipeline, **more)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    pictures = draw(ours, output_type="np", stride=3)
    assert pictures.shape == (1, 16, 24, 3)
    assert np.isfinite(pictures).all()


def test_the_command_compares_it(xl_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["--ckpt", str(xl_folder), "--backend", "torch", "--prompt", "x", "--steps", "6"]
    result = CliRunner().invoke(main, [*command, "--compare", "--repeats", "1", "--json", "a.json"])
    assert result.exit_code == 0, result.output
    full, cached, fewer = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert cached["psnr"] > fewer["psnr"] or cached["psnr"] > 30
    # Two of six calls, counted alike.
    assert cached["gflop"] == pytest.approx(full["gflop"] / 3)


def test_a_wrapped_pipeline_in_fp16_decodes_in_fp32_where_its_autoencoder_asks_for_it():
    whole = make_xl_pipeline()
    latents = draw(whole).float()
    expected = EncachePipeline.from_pipe(whole).decode(latents, "pt")
    whole.vae.register_to_config(force_upcast=True)
    narrow = whole.to(torch.float16)
    ours = EncachePipeline.from_pipe(narrow)
    actual = ours.decode(latents, "pt")
    assert actual.dtype == torch.float32
    assert narrow.vae.dtype == torch.float16  # it is the caller's
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-3)


def test_arguments_that_would_be_ignored_are_refused(pipeline):
    ours = EncachePipeline.from_pipe(pipeline)
    texts = ours.texts(["red apple"])
    given = {"prompt_embeds": texts["text"], "pooled_prompt_embeds": texts["pooled_text"]}
    with pytest.raises(EncacheError, match="not as both"):
        draw(ours, None, prompt_2="pear", **given)
    negative = {f"negative_{name}": one for name, one in given.items()}
    with pytest.raises(EncacheError, match="not as both"):
        draw(ours, negative_prompt="pear", **negative)
    for arguments, words in (
        ({"negative_crops_coords_top_left": (1, 1)}, "Give both"),
        ({"negative_original_size": (8, 8)}, "Give both"),
        ({"clip_skip": -1}, "clip_skip"),
        ({"denoising_end": 0.8}, "take no argument 'denoising_end'"),
        ({"output_type": "pli"}, "pil, np, pt or latent"),
    ):
        with pytest.raises(EncacheError, match=words):
            draw(ours, **arguments)
    for name in ("text_encoder_2", "tokenizer_2", "tokenizer", "watermark", "image_encoder"):
        with pytest.raises(EncacheError, match=f"Setting {name}"):
            setattr(ours, name, object())


def test_one_negative_embedding_serves_all_prompts(pipeline):
    ours = EncachePipeline.from_pipe(pipeline)
    nothing = ours.texts(["green pear"])
    negative = {
        "negative_prompt_embeds": nothing["text"],
        "negative_pooled_prompt_embeds": nothing["pooled_text"],
    }
    prompts = ["red apple", "hot dog"]
    actual = draw(ours, prompts, **negative)
    expected = draw(ours, prompts, negative_prompt="green pear")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_latents_that_are_normalised_by_channel_are_refused(pipeline):
    pipeline.vae.register_to_config(latents_mean=[0.1] * 4, latents_std=[2.0] * 4)
    with pytest.raises(CheckpointError, match="latents_mean"):
        EncachePipeline.from_pipe(pipeline)
