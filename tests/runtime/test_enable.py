"""Caching in a pipeline's own loop equals encoder propagation stated by hooks, call by call."""

import pytest
import torch
from diffusers import (
    DDIMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline,
)
from tests.conftest import make_pipeline
from tests.runtime.solvers import NAMES, solver
import encache

def draw(pipe, **arguments):
    arguments = {"num_inference_steps": 10, "output_type": "latent", **arguments}
    return pipe("red apple", generator=torch.Generator().manual_seed(0), **arguments).images

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut", ["none", "up1"])
def test_stride_1(name, cut):
    pipe = make_pipeline()
    pipe.scheduler = solver(name)
    expected = draw(pipe)
    encache.enable(pipe, 1, cut=cut)
    torch.testing.assert_close(draw(pipe), expected, rtol=1e-5, atol=1e-5)
