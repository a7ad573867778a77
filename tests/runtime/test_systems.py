"""Every system runs cached in its own pipeline: the real diffusers class with small random weights.

For each: stride 1 equals the untouched pipeline; reuse equals propagation stated by hooks, with a
stride and with an explicit list; one batch per segment equals one call at a time.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)

import encache
from tests.conftest import XL_UNET, make_pipeline, make_xl_pipeline, tiny_unet
from tests.families import (
    if_texts,
    make_dit_pipeline,
    make_frames_pipeline,
    make_if_pipeline,
    make_if_upscaler,
    make_video_pipeline,
    mask,
    picture,
    similar,
    tiny_controlnet,
)
from tests.runtime.propagation import calls_from, counting, propagation, unet_children
from tests.runtime.solvers import solver

STEPS = 10
SMALL = {"height": 16, "width": 24}


@dataclass(frozen=True)
class System:
    """A pipeline, what it is asked, and which calls of its scheduler it makes.

    Attributes:
        make: makes the pipeline.
        arguments: of its call.
        cut: where it is cut, if it is.
        calls: the first call, and how many the scheduler has.
        rows: of the denoiser at each call.
    """

    make: Any
    arguments: dict = field(default_factory=dict)
    cut: str = "mid"
    calls: tuple[int, int] = (0, STEPS)
    rows: int = 2


def image_to_image():
    return similar(make_pipeline(), StableDiffusionImg2ImgPipeline, requires_safety_checker=False)


def inpainting(channels):
    pipe = make_pipeline(in_channels=channels, out_channels=4)
    return similar(pipe, StableDiffusionInpaintPipeline, requires_safety_checker=False)


def inpainting_xl():
    unet = tiny_unet(**XL_UNET, in_channels=9, out_channels=4)
    return similar(make_xl_pipeline(), StableDiffusionXLInpaintPipeline, unet=unet)


def solved_by(name, make=make_pipeline):
    pipe = make()
    pipe.scheduler = solver(name)
    return pipe


def refiner():
    """Image to image with one text encoder and an aesthetic score."""
    base = make_xl_pipeline()
    # As the real one's: its pooled text is as wide as its text, which tells it from a base model.
    encoder = base.text_encoder_2
    config = type(encoder.config)(**{**encoder.config.to_dict(), "projection_dim": 24})
    torch.manual_seed(0)
    encoder = type(encoder)(config).eval()
    changes = {"cross_attention_dim": 24, "projection_class_embeddings_input_dim": 5 * 4 + 24}
    return similar(
        base,
        StableDiffusionXLImg2ImgPipeline,
        unet=tiny_unet(**XL_UNET | changes),
        text_encoder_2=encoder,
        text_encoder=None,
        tokenizer=None,
        requires_aesthetics_score=True,
        add_watermarker=False,
    )


def latent_consistency():
    pipe = make_pipeline(time_cond_proj_dim=8)
    scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return similar(
        pipe,
        LatentConsistencyModelPipeline,
        scheduler=scheduler,
        requires_safety_checker=False,
    )


def turbo():
    pipe = make_pipeline()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )
    return pipe


def controlled(num_controlnets, kind=StableDiffusionControlNetPipeline):
    pipe = make_pipeline()
    nets = [tiny_controlnet(pipe.unet, seed) for seed in range(num_controlnets)]
    return similar(
        pipe,
        kind,
        controlnet=nets if num_controlnets > 1 else nets[0],
        requires_safety_checker=False,
    )


def controlled_xl(kind=StableDiffusionXLControlNetPipeline):
    pipe = make_xl_pipeline()
    return similar(
        pipe,
        kind,
        controlnet=tiny_controlnet(pipe.unet),
        add_watermarker=False,
    )


LATENT = {"output_type": "latent"}
CONTROL = {**LATENT, "image": picture()}
CONTROLLED_PICTURE = {**CONTROL, "control_image": picture(seed=8), "strength": 0.65}
VIDEO = {"num_frames": 3, "height": 16, "width": 16, **LATENT}
FRAMES = {"video_length": 3, "height": 16, "width": 16, "t0": 3, "t1": 6, **LATENT}
SYSTEMS = {
    "text": System(make_pipeline, {**LATENT, **SMALL}),
    "text, pndm": System(lambda: solved_by("pndm"), LATENT, "up0", (0, STEPS + 1)),
    "text, heun": System(lambda: solved_by("heun"), LATENT, "up1", (0, 2 * STEPS - 1)),
    "image": System(
        image_to_image, {"image": picture(), "strength": 0.65, **LATENT}, "up1", (4, STEPS)
    ),
    "image, pndm": System(
        lambda: solved_by("pndm", image_to_image),
        {"image": picture(), "strength": 0.8, **LATENT},
        "up2",
        (2, STEPS + 1),
    ),
    "image, heun": System(
        lambda: solved_by("heun", image_to_image),
        {"image": picture(), "strength": 0.8, **LATENT},
        "mid",
        (4, 2 * STEPS - 1),
    ),
    "inpainting, 4 channels": System(
        lambda: inpainting(4),
        {"image": picture(), "mask_image": mask(), "strength": 0.8, **SMALL, **LATENT},
        "up0",
        (2, STEPS),
    ),
    "inpainting, 9 channels": System(
        lambda: inpainting(9),
        {"image": picture(), "mask_image": mask(), "strength": 1.0, **SMALL, **LATENT},
        "up2",
    ),
    "xl": System(make_xl_pipeline, {**LATENT, **SMALL}, "up0"),
    "xl inpainting": System(
        inpainting_xl,
        {"image": picture(), "mask_image": mask(), "strength": 0.8, **SMALL, **LATENT},
        "mid",
        (2, STEPS),
    ),
    "xl refiner": System(
        refiner, {"image": picture(), "strength": 0.5, **LATENT}, "up1", (5, STEPS)
    ),
    "latent consistency": System(latent_consistency, LATENT, "up2", rows=1),
    "turbo": System(turbo, {"guidance_scale": 0.0, **LATENT}, "mid", rows=1),
    "controlnet": System(lambda: controlled(1), CONTROL, "mid"),
    "controlnet, two": System(
        lambda: controlled(2), {**LATENT, "image": [picture(), picture(seed=8)]}, "up1"
    ),
    "controlnet, image": System(
        lambda: controlled(1, StableDiffusionControlNetImg2ImgPipeline),
        CONTROLLED_PICTURE,
        "up0",
        (4, STEPS),
    ),
    "controlnet, guess mode": System(lambda: controlled(1), {**CONTROL, "guess_mode": True}, "up0"),
    "controlnet, xl": System(controlled_xl, {**CONTROL, "height": 16, "width": 16}, "up0"),
    "controlnet, xl, image": System(
        lambda: controlled_xl(StableDiffusionXLControlNetImg2ImgPipeline),
        {**CONTROLLED_PICTURE, "height": 16, "width": 16},
        "mid",
        (4, STEPS),
    ),
    "if-1": System(make_if_pipeline, {"output_type": "pt", **if_texts()}, "mid"),
    "if-2": System(
        make_if_upscaler, {"output_type": "pt", "image": picture(8, 8), **if_texts()}, "up0"
    ),
    "dit": System(make_dit_pipeline, {"output_type": "pt", "class_labels": [7]}, "1"),
    "text2video-zero": System(make_frames_pipeline, FRAMES, "mid", rows=2),
    "videofusion": System(make_video_pipeline, VIDEO, "mid"),
}


def draw(pipe, arguments):
    """The pipeline's own result, as a tensor."""
    texts = isinstance(arguments.get("prompt_embeds"), torch.Tensor) or "class_labels" in arguments
    asked = {
        "num_inference_steps": STEPS,
        **({} if texts else {"prompt": "red apple"}),
        **arguments,
    }
    drawn = pipe(generator=torch.Generator().manual_seed(0), return_dict=False, **asked)[0]
    return drawn.float()


def denoiser_of(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


def children_of(denoiser, cut):
    if hasattr(denoiser, "transformer_blocks"):
        blocks = denoiser.transformer_blocks[: int(cut) + 1] if cut != "none" else []
        return [denoiser.pos_embed, *blocks] if blocks else [denoiser]
    return unet_children(denoiser, cut)


@pytest.fixture(params=SYSTEMS, scope="module")
def system(request):
    one = SYSTEMS[request.param]
    return one, one.make()


def assert_close(actual, expected, tolerance=1e-5):
    """Relative to the norm of what is expected."""
    assert expected.std() > 1e-2  # not a comparison of zeros
    assert (actual - expected).norm() / expected.norm() < tolerance


def cached(pipe, system, **settings):
    encache.enable(pipe, **settings)
    try:
        return draw(pipe, system.arguments)
    finally:
        encache.disable(pipe)


def test_stride_1_is_the_untouched_pipeline(system):
    system, pipe = system
    expected = draw(pipe, system.arguments)
    for cut in ("none", system.cut):
        assert_close(cached(pipe, system, stride=1, cut=cut), expected)
    assert torch.equal(draw(pipe, system.arguments), expected)


def test_reuse_is_propagation(system):
    system, pipe = system
    first, stop = system.calls
    denoiser, controlnet = denoiser_of(pipe), getattr(pipe, "controlnet", None)
    listed = (0, first + 1, first + 3)
    full = draw(pipe, system.arguments)
    for cut in ("none", system.cut):
        for settings, keys in (
            ({"stride": 3}, range(first, stop, 3)),
            ({"key_calls": listed}, {first, *listed}),
        ):
            calls = calls_from(first, stop, keys)
            if "video_length" in system.arguments:  # one frame, then all of them from call 3 on
                calls = calls[:6] + [(call, key or call == 3) for call, key in calls[3:]]
            children = children_of(denoiser, cut)
            with propagation(denoiser, children, calls, controlnet=controlnet):
                expected = draw(pipe, system.arguments)
            assert not torch.allclose(expected, full, rtol=1e-3, atol=1e-3)
            with counting(children[0], *filter(None, [controlnet])) as counts:
                ours = cached(pipe, system, cut=cut, blend="reuse", **settings)
            assert_close(ours, expected)
            assert set(counts.values()) == {sum(key for _, key in calls)}


def test_one_batch_per_segment_is_one_call_at_a_time(system):
    system, pipe = system
    rows = system.rows * system.arguments.get("video_length", 1)
    settings = {"stride": 4, "cut": system.cut}
    together = cached(pipe, system, **settings)
    assert_close(cached(pipe, system, max_decode_batch=rows, **settings), together)
