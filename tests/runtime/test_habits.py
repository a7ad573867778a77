"""What diffusers' users write is honoured, or refused in one sentence; never ignored."""

import inspect
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback

from encache.errors import EncacheError
from encache.model.checkpoint import find_checkpoint
from encache.model.loading import load_pipeline
from encache.runtime.pipeline import EncachePipeline
from tests.conftest import make_pipeline

FULL = {"num_inference_steps": 4, "output_type": "np", "guidance_scale": 5.0}


def draw(pipeline, prompt="red apple", seed=0, **arguments):
    own = {"stride": 1} if isinstance(pipeline, EncachePipeline) else {}
    generator = torch.Generator().manual_seed(seed)
    return pipeline(prompt, generator=generator, **{**FULL, **own, **arguments}).images


def assert_alike(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.fixture
def wrapped(pipeline):
    wrapped = EncachePipeline.from_pipe(pipeline)
    wrapped.set_progress_bar_config(disable=True)
    return wrapped


@pytest.fixture
def opened(engine_folder):
    opened = EncachePipeline.from_engines(engine_folder)
    opened.set_progress_bar_config(disable=True)
    return opened


def test_the_call_has_diffusers_arguments_in_their_order():
    theirs = [*inspect.signature(StableDiffusionPipeline.__call__).parameters]
    ours = [*inspect.signature(EncachePipeline.__call__).parameters]
    theirs.remove("kwargs")
    assert ours[: len(theirs)] == theirs


def test_clip_skip_leaves_out_the_last_layers(wrapped):
    """The oracle is a text encoder that does not have them; as in diffusers, the negative does."""
    shorter = make_pipeline()
    inner = getattr(shorter.text_encoder, "text_model", shorter.text_encoder)
    inner.encoder.layers = inner.encoder.layers[:-1]
    embeds = EncachePipeline.from_pipe(shorter).texts(["red apple"])["text"]
    expected = draw(wrapped, None, prompt_embeds=embeds)
    assert_alike(draw(wrapped, clip_skip=1), expected)
    assert_alike(draw(wrapped, clip_skip=0), draw(wrapped))
    assert np.abs(expected - draw(wrapped)).max() > 1e-3


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("timesteps", [900, 500, 100]),
        ("sigmas", [1.0, 0.5]),
        ("eta", 0.5),
        ("ip_adapter_image", np.zeros((8, 8, 3))),
        ("ip_adapter_image_embeds", [torch.zeros(1, 1, 4)]),
        ("cross_attention_kwargs", {"scale": 0.5}),
        ("callback", print),
        ("clip_skip", -1),
        ("clip_skip", 9),
        ("guidance_scale", float("nan")),
        ("guidance_scale", float("inf")),
        ("guidance_rescale", float("nan")),
        ("callback_on_step_end_tensor_inputs", ["latents", "prompt_embeds"]),
        ("callback_on_step_end", SDCFGCutoffCallback(cutoff_step_ratio=0.5)),
    ],
)
def test_arguments_that_are_refused(wrapped, argument, value):
    with pytest.raises(EncacheError):
        draw(wrapped, **{argument: value})


def test_neutral_arguments_are_taken(pipeline, wrapped):
    neutral = {"timesteps": None, "eta": 0.0, "cross_attention_kwargs": None, "clip_skip": None}
    assert_alike(draw(wrapped, **neutral), draw(pipeline, **neutral))


def test_clip_skip_needs_pytorch(opened):
    with pytest.raises(EncacheError, match="needs PyTorch"):
        draw(opened, clip_skip=1)


@pytest.mark.parametrize("prompt", [3, ["red apple", None], [b"red"], "\udcff"])
def test_a_prompt_is_text(wrapped, prompt):
    with pytest.raises(EncacheError, match="text"):
        draw(wrapped, prompt)


def test_unequal_embeddings_are_called_that(wrapped):
    embeds = torch.zeros(1, 20, 16)
    with pytest.raises(EncacheError, match="equally long"):
        draw(wrapped, None, prompt_embeds=embeds)


def test_other_pipelines_are_refused(pipeline):
    parts = pipeline.components
    xl = object.__new__(StableDiffusionXLImg2ImgPipeline)
    for other in (xl, StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False), None):
        with pytest.raises(EncacheError, match=f"This is a {type(other).__name__}"):
            EncachePipeline.from_pipe(other)


WRITTEN = [
    lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    lambda pipe: pipe.load_lora_weights("style.safetensors"),
    lambda pipe: pipe.load_textual_inversion("cat.safetensors"),
    lambda pipe: pipe.load_ip_adapter("h94/IP-Adapter"),
    lambda pipe: pipe.enable_model_cpu_offload(),
    lambda pipe: pipe.enable_attention_slicing(),
    lambda pipe: pipe.set_adapters(["style"]),
    lambda pipe: pipe.encode_prompt("red apple", "cpu", 1, True),
    lambda pipe: pipe.save_pretrained("out"),
    lambda pipe: pipe.unet.enable_gradient_checkpointing(),
    lambda pipe: pipe.vae.enable_slicing(),
    lambda pipe: pipe.components,
    lambda pipe: setattr(pipe, "vae", None),
    lambda pipe: setattr(pipe, "unet", 3),
    lambda pipe: setattr(pipe, "text_encoder", 3),
    lambda pipe: setattr(pipe, "safety_checker", print),
]


@pytest.mark.parametrize("habit", WRITTEN)
def test_habits_that_would_have_no_effect(opened, habit):
    with pytest.raises(EncacheError, match="from_pipe"):
        habit(opened)


def test_habits_that_are_honoured(pipeline, wrapped):
    wrapped.safety_checker = None
    assert wrapped.to("cpu") is wrapped.to(torch.float32) is wrapped
    assert (wrapped.device.type, wrapped.dtype) == ("cpu", torch.float32)
    assert not hasattr(wrapped, "no_such_thing")
    for one in (wrapped, pipeline):
        one.scheduler = EulerDiscreteScheduler.from_config(one.scheduler.config)
    assert_alike(draw(wrapped), draw(pipeline))
    images, nsfw = wrapped("red apple", stride=1, return_dict=False, **FULL)
    assert len(images) == 1
    assert nsfw is None
    output = wrapped("red apple", stride=1, **FULL)
    assert output[0] is output["images"] is output.images
    wrapped.scheduler = EulerAncestralDiscreteScheduler.from_config(wrapped.scheduler.config)
    with pytest.raises(EncacheError, match="draws noise"):
        draw(wrapped)


@pytest.mark.parametrize("place", ["cuda", "meta", torch.float16])
def test_engines_do_not_move(wrapped, place):
    with pytest.raises(EncacheError):
        wrapped.to(place)


def test_loading_habits(model_folder):
    taken = {"safety_checker": None, "use_safetensors": True, "torch_dtype": torch.float16}
    scheduler = EulerDiscreteScheduler()
    pipe = EncachePipeline.from_pretrained(
        model_folder, backend="torch", scheduler=scheduler, variant=None, **taken
    )
    assert pipe.dtype == torch.float16
    assert pipe.scheduler is scheduler
    for refused in (
        {"torch_dtype": torch.bfloat16},
        {"safety_checker": print},
        {"vae_decoder": 1},
        {"unet": make_pipeline().unet},
        {"custom_pipeline": "lpw"},
        {"revision": "main"},
        {"use_safetensors": False},
    ):
        with pytest.raises(EncacheError):
            EncachePipeline.from_pretrained(model_folder, backend="torch", **refused)


def test_the_models_guidance_is_the_default_everywhere(pipeline, wrapped):
    shipped = EncachePipeline.from_pretrained(backend="torch")
    assert shipped.default_guidance_scale == find_checkpoint().guidance_scale == 3.0
    plain = {"num_inference_steps": 4, "output_type": "np"}
    images = [
        one("red apple", generator=torch.Generator().manual_seed(0), **plain, **more).images
        for one, more in ((pipeline, {}), (wrapped, {"stride": 1}))
    ]
    assert_alike(images[1], images[0])


def test_a_callback_stops_the_run(pipeline, wrapped):
    def stop(pipe, call, timestep, tensors):
        seen.append(call)
        assert pipe.num_timesteps == 8
        pipe._interrupt = call == 2
        return tensors

    results = []
    for one in (pipeline, wrapped):
        seen = []
        results.append(draw(one, num_inference_steps=8, callback_on_step_end=stop))
        assert seen[:3] == [0, 1, 2]
    assert seen == [0, 1, 2]
    assert_alike(results[1], results[0])
    assert_alike(draw(wrapped), draw(pipeline))  # the next run starts afresh


def test_a_concept_of_several_tokens(pipeline, wrapped):
    vectors = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * 50
    pipeline.load_textual_inversion({"<toy>": vectors}, token="<toy>")
    wrapped = EncachePipeline.from_pipe(pipeline)
    assert_alike(draw(wrapped, "a <toy>"), draw(pipeline, "a <toy>"))


def test_threads_share_a_pipeline(opened):
    jobs = [(prompt, seed) for prompt in ("red apple", "hot dog") for seed in range(6)]
    wanted = [draw(opened, *job, stride=2) for job in jobs]
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(8) as pool:
        drawn = list(pool.map(lambda job: draw(opened, *job, stride=2), jobs))
        texts = [prompt for prompt, _ in jobs] * 40
        for encoded in pool.map(lambda text: opened.texts([text, "x"])["text"], texts):
            assert encoded.shape == (2, 16, 16)
    for one, other in zip(drawn, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    assert torch.get_num_threads() == threads


def break_text_encoder(pipeline):
    pipeline.text_encoder.get_input_embeddings().weight.data.fill_(float("nan"))


def break_unet(pipeline):
    pipeline.unet.conv_out.bias.data[0] = float("nan")


def break_vae(pipeline):
    pipeline.vae.decoder.conv_out.bias.data[0] = float("inf")


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (break_text_encoder, "text encoder"),
        (break_unet, "call 0 of the UNet"),
        (break_vae, "autoencoder"),
    ],
)
@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_a_black_picture_says_where_it_began(model_folder, damage, place, output_type):
    pipeline = load_pipeline(find_checkpoint(model_folder))
    damage(pipeline)
    with pytest.raises(EncacheError, match=place):
        draw(EncachePipeline.from_pipe(pipeline), output_type=output_type)


def test_an_overflow_in_the_middle_names_its_call(wrapped, monkeypatch):
    denoise, calls = wrapped.engines.denoise, []

    def overflow(latents, timestep, conditions):
        calls.append(timestep)
        return denoise(latents, timestep, conditions) / float(len(calls) != 3)

    monkeypatch.setattr(wrapped.engines, "denoise", overflow)
    with pytest.raises(EncacheError, match="call 2 of the UNet.*fp32"):
        draw(wrapped, output_type="latent", stride=1)
    calls.clear()
    with pytest.raises(EncacheError, match="call 4 of the UNet.*fp32"):
        draw(wrapped, output_type="latent", stride=2, num_inference_steps=6)


def test_an_overflow_behind_a_cut_names_its_call(pipeline, monkeypatch):
    wrapped = EncachePipeline.from_pipe(pipeline, "mid")
    encode, calls = wrapped.engines.encode, []

    def overflow(latents, timestep, conditions, ring, slot):
        encode(latents, timestep, conditions, ring, slot)
        calls.append(timestep)
        if len(calls) == 3:
            ring[0][slot].fill_(float("inf"))

    monkeypatch.setattr(wrapped.engines, "encode", overflow)
    with pytest.raises(EncacheError, match="call 2 of the UNet.*fp32"):
        draw(wrapped, output_type="latent", stride=1)


@pytest.mark.parametrize(
    "scheduler",
    ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"],
)
@pytest.mark.parametrize("steps", [1, 2, 3, 999, 1000])
def test_the_limits_of_a_schedule(wrapped, scheduler, steps):
    """Where diffusers can step, so can a plan; where it cannot, a sentence says so."""
    made = getattr(diffusers, scheduler).from_config(wrapped.scheduler.config)
    stepped = getattr(diffusers, scheduler).from_config(wrapped.scheduler.config)
    wrapped.scheduler = made
    try:
        stepped.set_timesteps(steps)
        sample = torch.ones(1, 1, 1, 1)
        for timestep in stepped.timesteps:
            sample = stepped.step(sample * 0, timestep, sample).prev_sample
    except (IndexError, ValueError):
        with pytest.raises(EncacheError, match=rf"{scheduler} \w+ .*{steps} steps"):
            draw(wrapped, num_inference_steps=steps, stride=None)
        return
    if steps < 10:
        assert draw(wrapped, num_inference_steps=steps, stride=None).shape == (1, 16, 16, 3)


def test_nothing_of_diffusers_is_forgotten():
    """Every public attribute of diffusers' pipeline is ours, or refused."""
    pipe = object.__new__(EncachePipeline)
    for name in (one for one in dir(StableDiffusionPipeline) if not one.startswith("_")):
        if name not in dir(EncachePipeline):
            with pytest.raises(EncacheError):
                getattr(pipe, name)
