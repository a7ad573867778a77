"""A replaced autoencoder decodes what diffusers decodes with it in place."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderTiny
from PIL import Image

from encache.errors import CheckpointError
from encache.model.checkpoint import find_checkpoint
from encache.model.loading import load_pipeline
from encache.runtime.cli import main
from encache.runtime.pipeline import EncachePipeline
from tests.conftest import make_pipeline


def tiny_autoencoder(levels=2):
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8,) * levels,
        decoder_block_out_channels=(8,) * levels,
        num_encoder_blocks=(1,) * levels,
        num_decoder_blocks=(1,) * levels,
    ).eval()


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "small"
    tiny_autoencoder().save_pretrained(folder)
    return folder


def draw(pipeline, **arguments):
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        "red apple", num_inference_steps=3, generator=generator, output_type="pt", **arguments
    ).images


def test_pictures_equal_diffusers(model_folder, vae_folder, tmp_path):
    plain = make_pipeline()
    before = draw(plain)
    plain.vae = tiny_autoencoder()
    expected = draw(plain)
    assert (expected - before).abs().max() > 0.1
    for backend in ("torch", "onnxruntime"):
        pipeline = EncachePipeline.from_pretrained(
            model_folder, vae=vae_folder, cut="none", backend=backend, engine_dir=tmp_path
        )
        torch.testing.assert_close(draw(pipeline, stride=1), expected, rtol=1e-3, atol=1e-3)
    (engines,) = tmp_path.glob("*/manifest.json")
    assert engines.parent.name.startswith("tiny+small-")


def test_a_checkpoint_that_has_it_already(vae_folder, tmp_path):
    expected = make_pipeline()
    expected.vae = tiny_autoencoder()
    expected.save_pretrained(tmp_path)
    pipeline = EncachePipeline.from_pipe(load_pipeline(find_checkpoint(tmp_path)))
    torch.testing.assert_close(draw(pipeline, stride=1), draw(expected), rtol=1e-4, atol=1e-4)


def test_it_is_another_model(model_folder, vae_folder, tmp_path):
    plain, replaced = find_checkpoint(model_folder), find_checkpoint(model_folder, vae=vae_folder)
    assert plain.fingerprint != replaced.fingerprint
    copy = shutil.copytree(vae_folder, tmp_path / "copy")
    assert find_checkpoint(model_folder, vae=copy).fingerprint == replaced.fingerprint


def write_config(folder, **changes):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(changes))
    return folder


def test_mistakes(model_folder, vae_folder, tmp_path):
    tiny_autoencoder(levels=3).save_pretrained(tmp_path / "deep")
    pickled = write_config(tmp_path / "pickled", _class_name="AutoencoderTiny")
    (pickled / "diffusion_pytorch_model.bin").touch()
    cut = shutil.copytree(vae_folder, tmp_path / "cut")
    weights = cut / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    for folder, reason in [
        (tmp_path / "none", "config.json cannot be read"),
        (write_config(tmp_path / "video", _class_name="AutoencoderKLWan"), "is a AutoencoderKLWan"),
        (write_config(tmp_path / "list", other=1), "config.json cannot be read"),
        (pickled, "is a pickle.*encache.model.unpickle"),
        (cut, "could not be loaded"),
        (tmp_path / "deep", "4 latent channels at 1/4 of the picture's size, this model 4 at 1/2"),
    ]:
        with pytest.raises(CheckpointError, match=reason):
            load_pipeline(find_checkpoint(model_folder, vae=folder))


def test_by_the_command_line(model_folder, vae_folder, tmp_path):
    pictures = []
    for name, more in (("a.png", ()), ("b.png", ("--vae", str(vae_folder)))):
        command = [
            *("--ckpt", str(model_folder), "--backend", "torch", "--output", str(tmp_path / name)),
            *("--prompt", "red apple", "--steps", "3", *more),
        ]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        pictures.append(Image.open(tmp_path / name).tobytes())
    assert pictures[0] != pictures[1]
