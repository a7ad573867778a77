"""encache-run with checkpoints of pipelines that keep their own loop, and with their inputs.

Each draws what the pipeline itself draws with the same cache; every mistake ends in one sentence.
"""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import (
    ControlNetModel,
    DiTPipeline,
    IFPipeline,
    LatentConsistencyModelPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    TextToVideoSDPipeline,
    TextToVideoZeroPipeline,
)
from PIL import Image
from transformers import T5Config, T5EncoderModel

import encache
from encache.errors import EncacheError
from encache.evaluate.bench_cli import main as bench
from encache.export.cli import main as export
from encache.runtime.cli import main
from encache.runtime.images import read_metadata
from tests.conftest import make_pipeline, tiny_unet
from tests.families import (
    make_dit_pipeline,
    make_if_pipeline,
    make_video_pipeline,
    similar,
    tiny_controlnet,
)
from tests.runtime.test_cli import assert_one_sentence
from tests.runtime.test_systems import inpainting, latent_consistency

PROMPT = ("--prompt", "red apple")


#: A UNet of two levels, which is exported in half the time.
SLIM = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def deepfloyd():
    """DeepFloyd-IF with a small text encoder of its kind."""
    parts = make_pipeline().components
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(parts["tokenizer"]), d_model=20, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    return similar(
        make_if_pipeline(),
        IFPipeline,
        tokenizer=parts["tokenizer"],
        text_encoder=T5EncoderModel(config).eval(),
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory, model_folder):
    """Folders of small models, and pictures beside them."""
    folder = tmp_path_factory.mktemp("models")
    slim = make_pipeline(**SLIM)
    made = {
        "slim": slim,
        "slim-control": tiny_controlnet(slim.unet),
        "inpainting": inpainting(9),
        "lcm": latent_consistency(),
        "video": make_video_pipeline(),
        "dit": make_dit_pipeline(),
        "if": deepfloyd(),
        "control": tiny_controlnet(tiny_unet()),
        "other": tiny_controlnet(tiny_unet(cross_attention_dim=20)),
    }
    for name, one in made.items():
        one.save_pretrained(folder / name)
    (folder / "text").symlink_to(model_folder)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    Image.fromarray(pixels[::-1]).save(folder / "other.png")
    half = np.zeros((24, 16), np.uint8)
    half[:, 8:] = 255
    Image.fromarray(half).save(folder / "mask.png")
    Image.fromarray(half[:16]).save(folder / "small.png")
    Image.fromarray(half[:20]).save(folder / "odd.png")
    return folder


@pytest.fixture
def run(models, tmp_path, monkeypatch):
    """Call encache-run in PyTorch, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(ckpt, *arguments, backend="torch"):
        defaults = ["--ckpt", str(models / ckpt), "--backend", backend, "--steps", "6"]
        return CliRunner().invoke(main, [*defaults, *map(str, arguments)])

    return run


#: By name: the checkpoint, what is typed, the pipeline, and the same in its own words.
SYSTEMS = {
    "image": (
        "text",
        (*PROMPT, "--image", "picture.png", "--strength", "0.7"),
        StableDiffusionImg2ImgPipeline,
        {"image": "picture.png", "strength": 0.7},
    ),
    "mask": (
        "inpainting",
        (*PROMPT, "--image", "picture.png", "--mask-image", "mask.png"),
        StableDiffusionInpaintPipeline,
        {"image": "picture.png", "mask_image": "mask.png", "height": 24, "width": 16},
    ),
    "control": (
        "text",
        (*PROMPT, "--controlnet", "control", "--control-image", "picture.png"),
        StableDiffusionControlNetPipeline,
        {"image": "picture.png"},
    ),
    "control and image": (
        "text",
        (
            *(*PROMPT, "--controlnet", "control", "--control-image", "other.png"),
            *("--image", "picture.png", "--strength", "0.7"),
        ),
        StableDiffusionControlNetImg2ImgPipeline,
        {"image": "picture.png", "control_image": "other.png", "strength": 0.7},
    ),
    "lcm": ("lcm", PROMPT, LatentConsistencyModelPipeline, {}),
    "if": ("if", (*PROMPT, "--negative-prompt", "pear"), IFPipeline, {"negative_prompt": "pear"}),
    "dit": ("dit", ("--class-label", "7"), DiTPipeline, {"class_labels": [7]}),
    "frames": (
        "text",
        (*PROMPT, "--num-frames", "3"),
        TextToVideoZeroPipeline,
        {"video_length": 3, "t0": 4, "t1": 5},
    ),
    "video": ("video", (*PROMPT, "--num-frames", "3"), TextToVideoSDPipeline, {"num_frames": 3}),
}


def typed(models, words):
    """Options with the paths of the files that they name."""
    return [str(models / one) if (models / one).exists() else one for one in words]


def expected(models, ckpt, kind, call):
    """What the pipeline draws with the same cache, in diffusers' own words; pixels [F, H, W, 3]."""
    parts = {"safety_checker": None, "feature_extractor": None}
    if "ControlNet" in kind.__name__:
        parts["controlnet"] = ControlNetModel.from_pretrained(models / "control")
    pipe = kind.from_pretrained(models / ckpt, **parts)
    pipe.set_progress_bar_config(disable=True)
    encache.enable(pipe, 3, cut="1" if kind is DiTPipeline else "mid")
    told = {
        name: Image.open(models / value) if "image" in name else value
        for name, value in call.items()
    }
    if "class_labels" not in told:
        told["prompt"] = "red apple"
    drawn = pipe(
        num_inference_steps=6,
        generator=torch.Generator().manual_seed(2),
        output_type="np",
        return_dict=False,
        **told,
    )[0]
    drawn = np.asarray(drawn)
    return drawn.reshape(-1, *drawn.shape[-3:])


def frames_of(path):
    with Image.open(path) as picture:
        for number in range(getattr(picture, "n_frames", 1)):
            picture.seek(number)
            yield np.asarray(picture.convert("RGB")) / 255


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_command_draws_what_the_pipeline_draws(run, models, system, tmp_path):
    ckpt, words, kind, call = SYSTEMS[system]
    options = [*typed(models, words), "--seed", "2", "--cut", "1" if ckpt == "dit" else "mid"]
    result = run(ckpt, *options)
    assert result.exit_code == 0, (result.output, result.exception)
    path = tmp_path / result.stdout.strip()
    ours, theirs = list(frames_of(path)), expected(models, ckpt, kind, call)
    assert path.suffix == (".gif" if len(theirs) > 1 else ".png")
    assert len(ours) == len(theirs)
    # A GIF has 256 colours for a frame.
    tolerance = 0.15 if path.suffix == ".gif" else 0.003
    assert max(abs(one - two).mean() for one, two in zip(ours, theirs, strict=True)) < tolerance
    facts = read_metadata(path)
    assert facts["pipeline"] == kind.__name__
    assert facts["seed"] == 2
    before = path.read_bytes()
    again = run(ckpt, *options)
    assert again.stdout == result.stdout
    assert path.read_bytes() == before
    assert run(ckpt, *options, "--stride", 2).stdout != result.stdout  # nothing is overwritten


def test_a_controlnet_adds_to_engines(run, models, tmp_path):
    options = typed(models, (*PROMPT, "--controlnet", "slim-control"))
    options += [*typed(models, ("--control-image", "picture.png")), "--cut", "mid"]
    pixels = []
    for backend in ("torch", "onnxruntime"):
        place = ["--engine-dir", models / "engines"] if backend != "torch" else []
        result = run("slim", *options, *place, "--output", f"{backend}.png", backend=backend)
        assert result.exit_code == 0, (result.output, result.exception)
        pixels.append(np.asarray(Image.open(tmp_path / f"{backend}.png"), float))
    assert pixels[0].std() > 1
    assert abs(pixels[0] - pixels[1]).max() <= 1
    with_image = [*options, "--image", *typed(models, ("other.png",)), "--output", "image.png"]
    result = run("slim", *with_image, *place, backend="onnxruntime")
    assert result.exit_code == 0, (result.output, result.exception)
    (folder,) = (models / "engines").glob("slim-*")  # these serve image to image, too
    alone = CliRunner().invoke(main, ["--engine-dir", str(folder), *PROMPT])
    assert_one_sentence(alone, 1, "the denoiser of a StableDiffusionControlNetPipeline alone")
    pipe = StableDiffusionPipeline.from_pretrained(models / "slim")
    with pytest.raises(EncacheError, match="with what a ControlNet adds, and .* without it"):
        encache.enable(pipe, engines=folder)
    result = CliRunner().invoke(
        export,
        [
            *("--ckpt", str(models / "slim"), "--pipeline", "StableDiffusionControlNetPipeline"),
            *("--cut", "mid", "--engine-dir", str(models / "engines")),
        ],
    )
    assert result.output.splitlines()[0] == "Nothing to do: this export is finished."


def test_comparing(run, models, tmp_path):
    options = [
        *typed(models, SYSTEMS["control"][1]),
        "--compare",
        "--repeats",
        2,
        "--json",
        "a.json",
    ]
    result = run("text", *options, "--cut", "mid", "--key-calls", "0,3")
    assert result.exit_code == 0, (result.output, result.exception)
    full, cached = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert (full["backend"], cached["backend"]) == ("diffusers", "torch")
    assert full["psnr"] is None
    assert 5 < cached["psnr"] < 99
    assert "cut mid, 2 key calls" in result.stdout


REFUSED = [
    ("text", ("--image", "picture.png"), 2, ["--prompt"]),
    ("inpainting", PROMPT, 1, ["inpainting needs --image"]),
    ("text", (*PROMPT, "--mask-image", "mask.png"), 1, ["needs --image"]),
    (
        "text",
        (*PROMPT, "--image", "picture.png", "--mask-image", "small.png"),
        1,
        ["image 16x24", "mask_image 16x16"],
    ),
    ("text", (*PROMPT, "--image", "odd.png"), 1, ["multiples of 8, not 20"]),
    ("text", (*PROMPT, "--image", "text/model_index.json"), 1, ["no picture that can be read"]),
    (
        "text",
        (*PROMPT, "--image", "picture.png", "--controlnet", "control"),
        1,
        ["image to image with a ControlNet needs --control-image"],
    ),
    (
        "text",
        (*PROMPT, "--num-frames", "3", "--controlnet", "control"),
        1,
        ["no pipeline that takes --controlnet and --num-frames"],
    ),
    (
        "text",
        (*PROMPT, "--controlnet", "other", "--control-image", "picture.png"),
        1,
        ["belongs to another model"],
    ),
    (
        "text",
        (*PROMPT, "--controlnet", "text", "--control-image", "mask.png"),
        1,
        ["no ControlNet"],
    ),
    (
        "text",
        (*PROMPT, "--control-image", "mask.png"),
        1,
        ["needs --controlnet"],
    ),
    (
        "text",
        (*PROMPT, "--image", "picture.png", "--key-calls", "0,9"),
        1,
        ["Key call 9 is beyond the last of 6"],
    ),
    ("text", (*PROMPT, "--image", "picture.png", "--height", "16"), 1, ["--height means nothing"]),
    ("text", (*PROMPT, "--image", "picture.png", "--blend", "interpolate"), 1, ["look ahead"]),
    ("text", (*PROMPT, "--image", "picture.png", "--dry-run"), 2, ["--dry-run means nothing"]),
    ("dit", ("--class-label", "7", "--backend", "torch.compile"), 2, ["takes --backend torch"]),
    ("text", (*PROMPT, "--class-label", "3"), 1, ["no pipeline that takes --class-label"]),
    ("dit", ("--class-label", "7", *PROMPT), 2, ["DiT reads no prompt"]),
    ("dit", ("--class-label", "1000"), 1, ["classes 0 to 999, not 1000"]),
    ("dit", ("--class-label", "7", "--cut", "9"), 1, ["has no cut 9. Choose one of none, 0, 1, 2"]),
    ("lcm", (*PROMPT, "--negative-prompt", "x"), 1, ["--negative-prompt means nothing"]),
    ("lcm", (*PROMPT, "--image", "picture.png"), 1, ["--image means nothing for Latent"]),
    ("if", (*PROMPT, "--width", "16"), 1, ["--width means nothing for DeepFloyd-IF"]),
    ("video", (*PROMPT, "--output", "clip.png"), 2, ["clips are GIF files"]),
]


@pytest.mark.parametrize(("ckpt", "words", "code", "said"), REFUSED)
def test_refusals(run, models, ckpt, words, code, said, tmp_path):
    result = run(ckpt, *typed(models, words))
    assert_one_sentence(result, code, *said)
    assert not [*tmp_path.rglob("*.*")]


def test_other_commands_refuse_such_checkpoints(models):
    result = CliRunner().invoke(bench, ["--ckpt", str(models / "dit")])
    assert_one_sentence(result, 1, "is a DiTPipeline (DiT), which keeps its own loop")


@pytest.mark.parametrize(
    ("ckpt", "words", "said"),
    [
        ("text", ("--pipeline", "DiTPipeline"), ["It can be: StableDiffusionImg2ImgPipeline"]),
        ("dit", ("--pipeline", "StableDiffusionImg2ImgPipeline"), ["It can be: no other"]),
        ("dit", ("--num-frames", "3"), ["--num-frames means nothing for DiT"]),
    ],
)
def test_what_cannot_be_exported(models, ckpt, words, said):
    result = CliRunner().invoke(export, ["--ckpt", str(models / ckpt), *words])
    assert_one_sentence(result, 1, *said)
