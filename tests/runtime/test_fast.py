"""The default model's companion: near the full sampler, with one encoder run."""

import torch

from encache.model.checkpoint import DEFAULT_MODEL_NAME, default_model, fast_model, find_checkpoint
from encache.model.weights import read_header
from encache.runtime.pipeline import EncachePipeline
from encache.train.composed import relative_error

PROMPTS = ["red apple", "hot dog", "octopus", "3d butterfly"]


def draw(model, **call):
    pipeline = EncachePipeline.from_pretrained(model, backend="torch")
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    return pipeline(PROMPTS, latents=noise, output_type="latent", **call).images


def test_it_says_how_it_is_sampled():
    checkpoint = find_checkpoint(fast_model())
    assert checkpoint.base == find_checkpoint()
    _, header = read_header(fast_model())
    assert header["base"] == DEFAULT_MODEL_NAME
    preset = checkpoint.preset
    assert (preset.cut, preset.steps, preset.stride, preset.blend) == ("mid", 4, 4, "reuse")
    assert preset.guidance_scale == 1.0
    # All companions together stay below 40 MB.
    assert fast_model().stat().st_size < 18e6


def test_it_draws_nearly_what_the_full_sampler_draws():
    """Of the same noise; fewer plain steps at three times the arithmetic are no nearer."""
    full = draw(default_model(), stride=1)
    errors = relative_error(draw(fast_model()), full)
    plain = relative_error(draw(default_model(), num_inference_steps=4, stride=1), full)
    assert errors.mean() < 0.25
    assert errors.mean() < plain.mean()
