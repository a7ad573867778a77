"""The recipe of the default model, on a handful of made-up emoji and a few steps."""

import hashlib
import json

import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from encache.train import autoencoder, denoiser, emoji
from encache.train.cli import main
from encache.train.text import MAX_TOKENS, train_tokenizer

CATEGORY = "Food & Drink"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An emoji package with six coloured discs."""
    folder = tmp_path / "package"
    pictures = folder / "img" / "twitter" / "64"
    pictures.mkdir(parents=True)
    entries = []
    for colour in ("red", "green", "blue", "yellow", "black", "orange"):
        image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        ImageDraw.Draw(image).ellipse((8, 8, 56, 56), fill=colour)
        image.save(pictures / f"{colour}.png")
        entries.append(
            {
                "name": f"{colour.upper()} DISC",
                "short_names": [f"{colour}_disc", colour],
                "image": f"{colour}.png",
                "category": CATEGORY,
                "has_img_twitter": True,
            }
        )
    entries.append({**entries[0], "category": "Flags"})
    entries.append({**entries[0], "has_img_twitter": False})
    (folder / "emoji.json").write_text(json.dumps(entries))
    digest = hashlib.sha256((folder / "emoji.json").read_bytes()).hexdigest()
    monkeypatch.setattr(emoji, "EMOJI_JSON_SHA256", digest)
    return folder


def test_reading_emoji(package):
    listed = emoji.read_emoji(package, [CATEGORY])
    assert len(listed) == 6
    assert listed[0].captions == ("red disc", "red")
    images = emoji.load_images(listed)
    assert images.shape == (6, 3, 64, 64)
    assert images[0, :, 0, 0].tolist() == [1, 1, 1]  # transparent becomes white
    assert images[0, :, 32, 32].tolist() == [1, -1, -1]


def test_another_package_is_refused(package, monkeypatch):
    monkeypatch.setattr(emoji, "EMOJI_JSON_SHA256", "0")
    result = CliRunner().invoke(main, ["emoji", "--output", "x", "--emoji-dir", str(package)])
    assert result.exit_code == 1
    assert "is not the one of" in result.stderr


def test_npm_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    result = CliRunner().invoke(
        main, ["emoji", "--output", str(tmp_path / "o"), "--work-dir", str(tmp_path / "w")]
    )
    assert result.exit_code == 1
    assert "npm is not installed" in result.stderr


def test_the_recipe_writes_a_stable_diffusion_folder(package, tmp_path):
    output, work = tmp_path / "model", tmp_path / "work"
    arguments = ["emoji", "--output", output, "--work-dir", work, "--emoji-dir", package]
    arguments += ["--autoencoder-steps", 2, "--max-train-steps", 3]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(output)
    pipeline = StableDiffusionPipeline.from_pretrained(output, safety_checker=None)
    assert type(pipeline.tokenizer).__name__ == "CLIPTokenizer"
    assert pipeline.vae.config.scaling_factor == 1.0
    picture = pipeline("red disc", num_inference_steps=2).images[0]
    assert picture.size == (64, 64)
    assert Image.open(output / "samples.png").size == (8 * 64, 64)
    assert {path.name for path in work.iterdir()} == {"autoencoder.pt", "denoiser.pt"}


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


def test_noise_and_loss_follow_their_formulas():
    alpha_bar = torch.tensor([0.9, 0.1])
    clean, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    noisy = denoiser.add_noise(clean, noise, alpha_bar)
    torch.testing.assert_close(noisy[0], 0.9**0.5 * clean[0] + 0.1**0.5 * noise[0])
    predicted = noise + torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    # SNR 9 is cut to 5, so its weight is 5/9; SNR 1/9 keeps weight 1.
    expected = torch.tensor((5 / 9 * 1.0 + 1 * 4.0) / 2)
    torch.testing.assert_close(denoiser.denoising_loss(predicted, noise, alpha_bar), expected)


def test_tokenizer_round_trip(tmp_path):
    tokenizer = train_tokenizer(["red apple", "hot dog", "apple"])
    assert tokenizer.decode(tokenizer("red apple").input_ids, skip_special_tokens=True).strip() == (
        "red apple"
    )
    ids = denoiser.tokenize(tokenizer, ["red apple", "", "words never seen " * 30])
    assert ids.shape == (3, MAX_TOKENS)
    assert int(ids.max()) < len(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again("hot dog").input_ids == tokenizer("hot dog").input_ids
    shuffled = train_tokenizer(["apple", "red apple", "hot dog"])
    assert shuffled("hot dog").input_ids == tokenizer("hot dog").input_ids
