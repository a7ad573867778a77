"""`encache.enable` on an engine folder: what PyTorch draws with the same cache, and refusals."""

import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionImg2ImgPipeline

import encache
from encache.contract.manifest import MANIFEST, read_manifest
from encache.contract.target import Target
from encache.errors import EncacheError
from encache.runtime.engines import GraphEngines
from tests.conftest import build, make_pipeline, make_xl_pipeline
from tests.families import picture, similar, tiny_controlnet
from tests.runtime.propagation import counting

STEPS = 10
SMALL = {"height": 16, "width": 24}


@pytest.fixture(scope="module")
def xl_engines(xl_folder, tmp_path_factory):
    return build(xl_folder, tmp_path_factory, "mid")


def image_to_image():
    return similar(make_pipeline(), StableDiffusionImg2ImgPipeline, requires_safety_checker=False)


#: How a pipeline is made, the fixture with its engines, and what it is asked.
SYSTEMS = {
    "text to image, output cache": (make_pipeline, "engine_folder", SMALL),
    "text to image": (make_pipeline, "up2_folder", SMALL),
    "image to image": (image_to_image, "up2_folder", {"image": picture(16, 24), "strength": 0.7}),
    "XL": (make_xl_pipeline, "xl_engines", SMALL),
}


def draw(pipe, **arguments):
    told = {"num_inference_steps": STEPS, "output_type": "latent", **arguments}
    return pipe("red apple", generator=torch.Generator().manual_seed(0), **told).images


def assert_close(actual, expected, tolerance=1e-3):
    assert expected.std() > 1e-1  # not a comparison of zeros
    assert (actual - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("system", SYSTEMS)
def test_engines_draw_what_pytorch_draws(system, request):
    make, fixture, arguments = SYSTEMS[system]
    pipe, folder = make(), request.getfixturevalue(fixture)
    cut = read_manifest(folder).identity.cut
    untouched = draw(pipe, **arguments)
    encache.enable(pipe, 4, cut=cut)
    cached = draw(pipe, **arguments)
    assert (cached - untouched).norm() / untouched.norm() > 1e-3
    with counting(pipe.unet.conv_in, pipe.unet.conv_out) as counts:
        encache.enable(pipe, 4, engines=folder)
        assert_close(draw(pipe, **arguments), cached)
        encache.enable(pipe, 1, engines=folder, cut=cut)
        assert_close(draw(pipe, **arguments), untouched)
    assert sum(counts.values()) == 0  # PyTorch ran nothing


def test_any_precision_of_the_pipeline(up2_folder):
    pipe = make_pipeline()
    encache.enable(pipe, 3, engines=str(up2_folder))
    single = draw(pipe)
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    double = draw(pipe.to(torch.float64), latents=latents.double())
    assert double.dtype == torch.float64
    assert_close(double.float(), single)


def compiled(folder, copied):
    """Engines that say that they were compiled for certain sizes."""
    manifest = read_manifest(shutil.copytree(folder, copied))
    target = Target("any", ("8.9",), (1, 2), 2, (16, 24), (16, 16))
    replace(manifest, identity=replace(manifest.identity, target=target)).write(copied)
    return copied


def test_no_more_is_asked_of_engines_than_they_were_compiled_for(up2_folder, tmp_path, monkeypatch):
    calls, decode = [], GraphEngines.decode

    def noting(self, ring, weights, *others):
        calls.append(len(weights))
        return decode(self, ring, weights, *others)

    monkeypatch.setattr(GraphEngines, "decode", noting)
    pipe = make_pipeline()
    encache.enable(pipe, 5, engines=up2_folder)
    expected = draw(pipe)
    assert calls == [5, 5]
    encache.enable(pipe, 5, engines=compiled(up2_folder, tmp_path / "engines"))
    assert_close(draw(pipe), expected, 1e-5)
    assert calls[2:] == [2, 2, 1, 2, 2, 1]
    for asked, words in [
        ({"height": 16, "width": 24}, "width 16, not 24"),
        ({"height": 32, "width": 16}, "height 16 to 24, not 32"),
        ({"num_images_per_prompt": 2}, "rows 1 to 2, not 4"),
    ]:
        with pytest.raises(EncacheError, match=words):
            draw(pipe, **asked)
    assert_close(draw(pipe), expected, 1e-5)


def controlled():
    pipe = make_pipeline()
    kind = StableDiffusionControlNetPipeline
    net = tiny_controlnet(pipe.unet)
    return similar(pipe, kind, controlnet=net, requires_safety_checker=False)


def test_refusals_change_nothing(up2_folder, tmp_path):
    for make, folder, options, words in [
        (make_pipeline, up2_folder, {"cut": "mid"}, "engines of the cut up2, not mid"),
        (make_xl_pipeline, up2_folder, {}, "This model has no cut up2"),
        (
            lambda: make_pipeline(in_channels=9),
            up2_folder,
            {},
            "is .B, 4, h, w. there and .B, 9, h",
        ),
        (controlled, up2_folder, {}, "without what a ControlNet adds, and .* with it"),
        (make_pipeline, tmp_path, {}, f"holds no {MANIFEST}"),
    ]:
        pipe = make()
        encache.enable(pipe, 5)
        before = dict(vars(pipe))
        with pytest.raises(EncacheError, match=words):
            encache.enable(pipe, 2, engines=folder, **options)
        assert vars(pipe) == before


def test_inputs_that_the_engines_lack_are_refused(up2_folder):
    """As a T2I adapter gives them."""
    pipe = make_pipeline()
    encache.enable(pipe, 5, engines=up2_folder)
    pipe.scheduler.set_timesteps(STEPS)
    latents, text = torch.zeros(1, 4, 8, 8), torch.zeros(1, 5, 16)
    residuals = {
        "down_block_additional_residuals": [torch.zeros(1)] * 8,
        "mid_block_additional_residual": torch.zeros(1),
    }
    with pytest.raises(EncacheError, match="residual_0.*do not take"):
        pipe.unet(latents, pipe.scheduler.timesteps[0], text, **residuals)
