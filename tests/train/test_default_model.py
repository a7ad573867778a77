"""The recipe of the default model, on a handful of made-up emoji and a few steps."""

import json
import math
import shutil

import pytest
import torch
import transformers
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from safetensors import SafetensorError

from encache.model.text import tokenize
from encache.train import autoencoder, default_model, denoiser, emoji
from encache.train.cli import main
from encache.train.text import MAX_TOKENS, train_tokenizer

CATEGORY = "Food & Drink"


COLOURS = ("red", "green", "blue", "yellow", "black", "orange")


@pytest.fixture
def packages(tmp_path):
    """Emoji packages with six coloured discs, of which the last style lacks one."""
    folder = tmp_path / "packages"
    entries = [
        {
            "name": f"{colour.upper()} DISC",
            "short_names": [f"{colour}_disc", colour],
            "unified": colour.upper(),
            "image": f"{colour}.png",
            "category": CATEGORY,
            "subcategory": "food-disc",
        }
        for colour in COLOURS
    ]
    for style in emoji.STYLES:
        for entry in entries:
            path = (
                folder
                / style.word
                / style.picture.format(image=entry["image"], unified=entry["unified"].lower())
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_disc(path, entry["unified"].lower())
        description = {"name": style.package, "version": style.version}
        (folder / style.word / "package.json").write_text(json.dumps(description))
    path.unlink()
    entries.append({**entries[0], "category": "Flags"})
    (folder / emoji.TWEMOJI.word / "emoji.json").write_text(json.dumps(entries))
    return folder


def draw_disc(path, colour):
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((8, 8, 56, 56), fill=colour)
    image.save(path, lossless=True)


def test_reading_emoji(packages):
    listed = emoji.read_emoji(packages, [CATEGORY])
    assert len(listed) == 6 + 6 + 5
    assert listed[0].captions == ("red disc", "red", "flat red disc", "flat red", "food")
    assert listed[-1].captions[2] == "3d black disc"
    images = emoji.load_posed_images(listed, 1, torch.Generator().manual_seed(0))
    assert images.shape == (17, 3, 64, 64)
    assert images[0, :, 0, 0].tolist() == [1, 1, 1]  # transparent becomes white
    for first in (0, 6, 12):
        assert images[first, :, 32, 32].tolist() == [1, -1, -1]


def test_poses_move_the_picture_and_nothing_else(packages):
    listed = emoji.read_emoji(packages, [CATEGORY])[:1]
    images = emoji.load_posed_images(listed, 20, torch.Generator().manual_seed(0))
    assert images.shape == (20, 3, 64, 64)
    assert len({image.numpy().tobytes() for image in images}) == 20
    red = (images[:, 0] > 0.5) & (images[:, 1] < -0.5)
    shares = red.float().mean(dim=(1, 2)) / (math.pi * 24.5**2 / 64**2)
    assert shares.max() <= 1.02
    assert shares.min() >= 0.78**2  # shrunk to 0.85, and to fit when turned by 5 degrees
    again = emoji.load_posed_images(listed, 20, torch.Generator().manual_seed(0))
    assert torch.equal(images, again)


@pytest.mark.parametrize("damage", ["another version", "missing"])
def test_another_package_is_refused(packages, damage):
    description = packages / "3d" / "package.json"
    if damage == "missing":
        description.unlink()
    else:
        description.write_text(json.dumps({"name": emoji.FLUENT.package, "version": "0.0.1"}))
    result = CliRunner().invoke(main, ["emoji", "--output", "x", "--emoji-dir", str(packages)])
    assert result.exit_code == 1
    assert "is not the unpacked npm package @lobehub/fluent-emoji-3d@1.1.0" in result.stderr


def test_npm_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    result = CliRunner().invoke(
        main, ["emoji", "--output", str(tmp_path / "o"), "--work-dir", str(tmp_path / "w")]
    )
    assert result.exit_code == 1
    assert "npm is not installed" in result.stderr


@pytest.fixture
def arguments(packages, tmp_path):
    """A command line of few steps, with its folders `model` and `work`."""
    values = ["emoji", "--output", tmp_path / "model", "--work-dir", tmp_path / "work"]
    values += ["--emoji-dir", packages, "--autoencoder-steps", 2, "--max_train_steps", 3]
    return [str(value) for value in values]


def test_npm_fails(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text(
        '#!/bin/sh\ncase "$*" in *--silent*) ;; *) echo "npm error code ENOSPC" >&2 ;; esac\n'
        "exit 228\n"
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(
        main, ["emoji", "--output", str(tmp_path / "o"), "--work-dir", str(tmp_path / "w")]
    )
    assert result.exit_code == 1
    assert f"failed in {tmp_path / 'w' / 'data'}: code ENOSPC" in result.stderr
    assert not list((tmp_path / "w" / "data").iterdir())


def test_the_recipe_writes_a_stable_diffusion_folder(arguments, tmp_path):
    output, work = tmp_path / "model", tmp_path / "work"
    transformers.utils.logging.enable_progress_bar()
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(output)
    assert "\r" not in result.stderr
    assert json.loads((output / "model_index.json").read_text())["_guidance_scale"] == 3.0
    pipeline = StableDiffusionPipeline.from_pretrained(output, safety_checker=None)
    assert type(pipeline.tokenizer).__name__ == "CLIPTokenizer"
    assert pipeline.vae.config.scaling_factor == 1.0
    picture = pipeline("red disc", num_inference_steps=2).images[0]
    assert picture.size == (64, 64)
    assert Image.open(output / "samples.png").size == (8 * 64, 64)
    assert (output / "prompts.txt").read_text().split("\n")[0] == "red disc"
    assert {path.name for path in work.iterdir()} == {"autoencoder.pt", "denoiser.pt"}


def test_a_full_disk_loses_no_training_and_a_finished_run_is_not_repeated(
    arguments, tmp_path, monkeypatch
):
    def refuse(self, folder):
        folder.mkdir()
        (folder / "model_index.json").touch()
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    output = tmp_path / "model"
    with monkeypatch.context() as patched:
        patched.setattr(StableDiffusionPipeline, "save_pretrained", refuse)
        result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert f"{output} could not be written (I/O error: No space left" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"packages", "work"}

    output.mkdir()  # empty, so it is nobody's
    assert CliRunner().invoke(main, arguments).exit_code == 0
    written = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    monkeypatch.setattr(default_model, "_train", None)  # any further step would fail
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stdout.strip()) == (0, str(output))
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == written
    result = CliRunner().invoke(main, [*arguments, "--max-train-steps", "4"])
    assert "is there already and was not made by this command" in result.stderr


@pytest.mark.parametrize("kind", ["a model", "other files", "a file"])
def test_something_else_is_not_overwritten(arguments, tmp_path, model_folder, kind):
    output = tmp_path / "model"
    if kind == "a model":
        shutil.copytree(model_folder, output)
    elif kind == "other files":
        output.mkdir()
        (output / "model_index.json").write_text("[]")
    else:
        output.write_text("notes")
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert f"{output} is there already and was not made by this command" in result.stderr
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("output", ["", "work", "packages"])
def test_the_model_does_not_go_over_the_training(arguments, tmp_path, output):
    result = CliRunner().invoke(main, [*arguments, "--output", str(tmp_path / output)])
    assert result.exit_code == 1
    assert "holds the training's own files: choose another --output" in result.stderr


def test_the_help_names_the_recipes_steps():
    text = CliRunner().invoke(main, ["emoji", "--help"]).stdout
    assert f"the recipe's {autoencoder.RECIPE.steps}." in text
    assert f"the recipe's {denoiser.RECIPE.steps}." in text


def test_standardising_changes_latents_but_no_picture():
    torch.manual_seed(0)
    model = autoencoder.make_autoencoder().eval()
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        before = model.decode(autoencoder.encode(model, images)).sample
        variance = model.encode(images).latent_dist.logvar
        scale = autoencoder.encode(model, images).std(dim=(0, 2, 3))
        autoencoder.standardise(model, autoencoder.encode(model, images))
        latents = autoencoder.encode(model, images)
        after = model.decode(latents).sample
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), rtol=0, atol=1e-4)
    expected = variance - 2 * scale.log()[None, :, None, None]
    with torch.no_grad():
        actual = model.encode(images).latent_dist.logvar
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_tokenizer_round_trip(tmp_path):
    tokenizer = train_tokenizer(["red apple", "hot dog", "apple"])
    assert tokenizer.decode(tokenizer("red apple").input_ids, skip_special_tokens=True).strip() == (
        "red apple"
    )
    ids = tokenize(tokenizer, ["red apple", "", "words never seen " * 30])
    assert ids.shape == (3, MAX_TOKENS)
    assert int(ids.max()) < len(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again("hot dog").input_ids == tokenizer("hot dog").input_ids
    shuffled = train_tokenizer(["apple", "red apple", "hot dog"])
    assert shuffled("hot dog").input_ids == tokenizer("hot dog").input_ids
