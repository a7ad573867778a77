"""Small models with Stable Diffusion's exact component classes and random weights."""

import hashlib
import json
import os
import shutil
from fractions import Fraction
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import that reads it

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from encache.contract.manifest import ONNX
from encache.model.checkpoint import find_checkpoint
from encache.model.loading import read_outline
from encache.model.preset import PRESET_KEY, Preset
from encache.model.spec import DEFAULT_CUT
from encache.runtime.plan import make_plan
from encache.runtime.planfile import FittedOn, FittedPlan, Measured, write_plans
from encache.runtime.schedulers import full_config
from encache.runtime.settings import Policy
from encache.train.text import train_tokenizer

torch.set_num_threads(2)

TEXT_WIDTH = 16


def tiny_unet(seed=0, **changes):
    """A UNet with Stable Diffusion's four kinds of blocks and a few thousand weights."""
    torch.manual_seed(seed)
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 24, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**config, **changes}).eval()


def stable_diffusion_scheduler(**changes):
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**{**config, **changes})


#: One encoder run, four decoder calls, no guidance: as weights may be trained for.
ONE_SEGMENT = Preset(
    scheduler=full_config(stable_diffusion_scheduler(timestep_spacing="trailing")),
    steps=4,
    guidance_scale=1.0,
    cut="mid",
    stride=4,
    blend="reuse",
    prior_noise=False,
)


def save_tuned(folder, base, preset, **metadata):
    """A checkpoint of UNet weights, other than the tiny model's, that say how to sample them."""
    path = folder / "tuned.safetensors"
    header = {"base": str(base), PRESET_KEY: preset.to_json(), **metadata}
    save_file(tiny_unet(seed=1).state_dict(), path, header)
    return find_checkpoint(path)


def share_of_the_way(ours, theirs, start):
    """How far two trained states are apart, over how far training moved one of them.

    Adam makes much of gradients near zero, so that single weights differ by rounding alone.
    """

    def distance(one, other):
        return sum((one[name].float() - other[name].float()).square().sum() for name in one) ** 0.5

    return distance(ours, theirs) / distance(ours, start)


def make_pipeline(seed=0, **unet_changes):
    unet = tiny_unet(seed, **unet_changes)
    tokenizer = train_tokenizer(["red apple", "green pear", "hot dog", "yellow banana"])
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=32,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()
    # Random CLIP weights ignore the tokens almost entirely; a prompt must make a difference.
    text_encoder.get_input_embeddings().weight.data.mul_(50)
    vae = AutoencoderKL(
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=stable_diffusion_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline():
    return make_pipeline()


#: What makes `tiny_unet` one of Stable Diffusion XL.
XL_UNET = {
    "block_out_channels": (8, 16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "cross_attention_dim": 16 + 24,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 20,
}


def make_xl_pipeline(seed=0):
    """A tiny Stable Diffusion XL: two text encoders, pooled text, sizes."""
    small = make_pipeline(seed)
    torch.manual_seed(seed)
    config = small.text_encoder.config
    wide = type(config)(
        **{**config.to_dict(), "hidden_size": 24, "projection_dim": 20, "num_hidden_layers": 3}
    )
    second = CLIPTextModelWithProjection(wide).eval()
    second.get_input_embeddings().weight.data.mul_(50)
    pipeline = StableDiffusionXLPipeline(
        vae=small.vae,
        text_encoder=small.text_encoder,
        text_encoder_2=second,
        tokenizer=small.tokenizer,
        tokenizer_2=small.tokenizer,
        unet=tiny_unet(seed, **XL_UNET),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def xl_folder(tmp_path_factory):
    """A tiny Stable Diffusion XL in a diffusers folder; tests must not change it."""
    folder = tmp_path_factory.mktemp("xl") / "tiny-xl"
    make_xl_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny Stable Diffusion in a diffusers folder; tests must not change it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_pipeline().save_pretrained(folder)
    return folder


#: What makes a `tiny_unet` that is exported in half the time: it attends where it begins, in the
#: middle and where it ends.
SLIM = {
    "down_block_types": ("CrossAttnDownBlock2D",) + ("DownBlock2D",) * 3,
    "up_block_types": ("UpBlock2D",) * 3 + ("CrossAttnUpBlock2D",),
}


@pytest.fixture(scope="session")
def slim_folder(tmp_path_factory):
    """The tiny Stable Diffusion with less attention; tests must not change it."""
    pipeline = make_pipeline()
    pipeline.unet = tiny_unet(**SLIM)
    folder = tmp_path_factory.mktemp("slim") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def engine_folder(tmp_path_factory, model_folder):
    """Its engines at the default cut; tests that alter them copy them first."""
    return build(model_folder, tmp_path_factory, DEFAULT_CUT)


@pytest.fixture(scope="session")
def up2_folder(tmp_path_factory, model_folder):
    """Its engines with a decoder to speak of."""
    return build(model_folder, tmp_path_factory, "up2")


@pytest.fixture(scope="session")
def fp16_folder(tmp_path_factory, model_folder):
    """The same in fp16."""
    return build(model_folder, tmp_path_factory, "up2", "fp16")


@pytest.fixture(scope="session", autouse=True)
def each_graph_is_traced_once(tmp_path_factory):
    """Builds copy the ONNX graph of a module that was exported before: tracing takes most time.

    Each build still checks its graphs against its own model, so a copy that is not its would fail.
    """
    from encache.export import graphs

    write, written = graphs.write_onnx, {}

    def write_or_copy(graph, folder, sizes):
        key = description_of(graph), tuple(sorted(sizes.items()))
        if key not in written:
            first = tmp_path_factory.mktemp("graph")
            write(graph, first, sizes)
            written[key] = first
        shutil.copytree(written[key], folder, dirs_exist_ok=True)
        return Path(folder, ONNX)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "write_onnx", write_or_copy)
        yield


def description_of(graph):
    """All that an exported graph depends on: its ends, and its layers' settings and weights."""
    layers = [
        (name, type(layer).__qualname__, *map(repr_of_setting, sorted(vars(layer).items())))
        for name, layer in graph.module.named_modules()
    ]
    weights = hashlib.sha256()
    for name, one in graph.module.state_dict().items():
        weights.update(f"{name} {one.dtype} {tuple(one.shape)}".encode())
        weights.update(one.contiguous().view(-1).view(torch.uint8).numpy())
    return graph.spec, graph.dtype, repr(layers), weights.hexdigest()


def repr_of_setting(setting):
    name, value = setting
    if name == "name_or_path":  # a checkpoint's folder
        return name
    plain = isinstance(value, (bool, int, float, str, Fraction, tuple, type(None)))
    return name, value if plain and not name.startswith("_") else type(value).__qualname__


@pytest.fixture
def only_text_encoder(monkeypatch):
    """Export one small graph instead of all, where the rest would only take time."""
    from encache.export import graphs

    whole = graphs.pipeline_graphs
    monkeypatch.setattr(graphs, "pipeline_graphs", lambda *a: whole(*a)[-2:-1])


def build(model_folder, tmp_path_factory, cut, dtype="fp32"):
    from encache.export.build import Request, build_engines

    request = Request(find_checkpoint(model_folder), cut, dtype)
    return build_engines(request, tmp_path_factory.mktemp("engines"))


@pytest.fixture
def plans(model_folder, tmp_path):
    """Two plans that are the rule itself, at strides 2 and 5."""
    return write_rules(tmp_path / "plans.json", model_folder)


def write_rules(path, model_folder):
    """The same, in a new file."""
    checkpoint = find_checkpoint(model_folder)
    scheduler = read_outline(checkpoint).scheduler
    on = FittedOn(
        model=checkpoint.fingerprint,
        scheduler=json.dumps(full_config(scheduler)),
        steps=10,
        guidance_scale=3.0,
        prompts="0" * 64,
        num_pictures=1,
    )
    write_plans(
        path,
        [
            FittedPlan(
                make_plan(scheduler, 10, Policy(stride)),
                on,
                Measured(1, error, (0.0, 1.0), 1.0, db),
            )
            for stride, error, db in ((2, 0.1, 40.0), (5, 0.2, 20.0))
        ],
    )
    return path
