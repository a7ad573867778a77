"""Every key call equals diffusers; encoder propagation equals its formula."""

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import StableDiffusionPipeline

from encache.contract.target import Target
from encache.errors import EncacheError
from encache.model.spec import CUTS
from encache.runtime.blend import BLENDS
from encache.runtime.engines import TorchEngines
from encache.runtime.guidance import make_guide
from encache.runtime.key_calls import PAPER_KEY_CALLS
from encache.runtime.pipeline import EncachePipeline
from encache.runtime.plan import make_plan
from encache.runtime.sampler import Sampling
from encache.runtime.settings import Policy
from tests.conftest import (
    ONE_SEGMENT,
    TEXT_WIDTH,
    make_pipeline,
    save_tuned,
    stable_diffusion_scheduler,
    tiny_unet,
)
from tests.runtime.solvers import NAMES, solver

STEPS = 10


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def latents(pipeline, prompt="red apple", seed=0, **arguments):
    arguments = {"num_inference_steps": STEPS, **arguments}
    return pipeline(prompt, generator=generator(seed), output_type="latent", **arguments).images


def assert_close(actual, expected, tolerance=1e-4):
    assert expected.abs().max() > 0.5  # not a comparison of zeros
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_every_key_call_equals_diffusers(pipeline, name, guidance_scale):
    pipeline.scheduler = solver(name)
    ours = EncachePipeline.from_pipe(pipeline, "up2")
    arguments = {"guidance_scale": guidance_scale, "negative_prompt": "hot dog"}
    expected = latents(pipeline, **arguments)
    assert_close(latents(ours, stride=1, **arguments), expected)


@pytest.mark.parametrize("cut", CUTS)
def test_every_cut_equals_diffusers(pipeline, cut):
    ours = EncachePipeline.from_pipe(pipeline, cut)
    assert_close(latents(ours, stride=1), latents(pipeline))


def test_channels_last_changes_nothing(pipeline):
    """As checkpoints are loaded on a GPU."""
    ours = EncachePipeline.from_pipe(pipeline, "up1")
    expected = latents(ours, stride=5)
    pipeline.unet.to(memory_format=torch.channels_last)
    assert_close(latents(ours, stride=5), expected)


@pytest.mark.parametrize("name", NAMES)
def test_onnx_runtime_equals_diffusers(engine_folder, up2_folder, pipeline, name):
    pipeline.scheduler = solver(name)
    expected = latents(pipeline)
    for folder in (engine_folder, up2_folder):
        ours = EncachePipeline.from_engines(folder)
        ours.scheduler = solver(name)
        assert_close(latents(ours, stride=1), expected, tolerance=1e-3)


def test_pictures_equal_diffusers(engine_folder, pipeline):
    expected = pipeline("red apple", generator=generator(), num_inference_steps=5).images[0]
    for ours in (
        EncachePipeline.from_pipe(pipeline, "up2"),
        EncachePipeline.from_engines(engine_folder),
    ):
        picture = ours("red apple", generator=generator(), num_inference_steps=5, stride=1)
        difference = np.asarray(picture.images[0], int) - np.asarray(expected, int)
        assert np.abs(difference).max() <= 1


def test_second_prompt_right_after_a_first(pipeline):
    ours = EncachePipeline.from_pipe(pipeline, "up2")
    first = latents(ours, "red apple", stride=5)
    second = latents(ours, "hot dog", stride=5)
    assert_close(
        second, latents(EncachePipeline.from_pipe(pipeline, "up2"), "hot dog", stride=5), 1e-6
    )
    assert not torch.allclose(first, second, atol=1e-2)


def test_two_pipelines_share_a_unet(pipeline):
    other = StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
    other.scheduler = solver("euler")
    one, two = EncachePipeline.from_pipe(pipeline, "up2"), EncachePipeline.from_pipe(other, "mid")
    alone = latents(one, stride=2), latents(two, "hot dog", stride=5)
    together = []

    def run_the_other(*_):
        if not together:
            together.append(latents(two, "hot dog", stride=5))
        return {}

    assert_close(latents(one, stride=2, callback_on_step_end=run_the_other), alone[0], 1e-6)
    assert_close(together[0], alone[1], 1e-6)
    # The shared UNet itself is as diffusers left it.
    untouched = make_pipeline()
    assert_close(latents(pipeline), latents(untouched), 1e-6)


def mix(weights, outputs):
    """Weighted sum of tensors, or of tuples of tensors."""
    if isinstance(outputs[0], torch.Tensor):
        return sum(weight * output for weight, output in zip(weights, outputs, strict=True))
    return tuple(mix(weights, parts) for parts in zip(*outputs, strict=True))


@torch.no_grad()
def encoder_propagation(pipeline, cut, key_calls, order, steps, guidance_scale=7.5):
    """Encoder propagation stated directly: one call after the other, one branch at a time.

    At a key call the whole UNet runs and its encoder's outputs are kept. At any other call hooks
    replace the encoder's outputs: by the last ones (order 0, Faster Diffusion), or by the straight
    line through the last two (order 1). Without a cut they replace the noise predictions.
    """
    unet, scheduler = pipeline.unet, pipeline.scheduler
    text = [pipeline.encode_prompt(p, "cpu", 1, False)[0] for p in ("", "red apple")]
    scheduler.set_timesteps(steps)
    sample = torch.randn((1, 4, 8, 8), generator=generator()) * scheduler.init_noise_sigma
    blocks = {"conv_in": unet.conv_in, "mid": unet.mid_block}
    blocks |= {f"down{index}": block for index, block in enumerate(unet.down_blocks)}
    blocks = {"out": unet.conv_out} if cut == "none" else blocks
    kept = [{name: [] for name in blocks} for _ in text]
    passed = []
    for call, timestep in enumerate(scheduler.timesteps):
        key = call in key_calls
        passed += [call] if key else []

        weights = [1.0]
        if order and len(passed) > 1:
            ahead = (call - passed[-1]) / (passed[-1] - passed[-2])
            weights = [-ahead, 1 + ahead]

        def keep_or_replace(outputs, key=key, weights=weights):
            def hook(module, arguments, output):
                if key:
                    outputs.append(output)
                    return output
                return mix(weights, outputs[-len(weights) :])

            return hook

        model_input = scheduler.scale_model_input(sample, timestep)
        noises = []
        for embeds, outputs in zip(text, kept, strict=True):
            handles = [
                block.register_forward_hook(keep_or_replace(outputs[name]))
                for name, block in blocks.items()
            ]
            noises.append(unet(model_input, timestep, embeds).sample)
            for handle in handles:
                handle.remove()
        noise = noises[0] + guidance_scale * (noises[1] - noises[0])
        sample = scheduler.step(noise, timestep, sample).prev_sample
    return sample


@pytest.mark.parametrize(("blend", "order"), [("reuse", 0), ("extrapolate", 1)])
@pytest.mark.parametrize("key_calls", [PAPER_KEY_CALLS[50], tuple(range(0, 50, 5))])
@pytest.mark.parametrize("cut", ["mid", "none"])
def test_blends_equal_encoder_propagation(pipeline, cut, key_calls, blend, order):
    ours = EncachePipeline.from_pipe(pipeline, cut)
    expected = encoder_propagation(pipeline, cut, key_calls, order, 50)
    actual = latents(ours, num_inference_steps=50, key_calls=key_calls, blend=blend)
    assert_close(actual, expected)
    assert not torch.allclose(actual, latents(pipeline, num_inference_steps=50), atol=1e-3)


def test_a_blend_is_not_the_full_sampler_but_near(pipeline):
    ours = EncachePipeline.from_pipe(pipeline, "up2")
    full = latents(pipeline, num_inference_steps=50)
    for blend in BLENDS:
        cached = latents(ours, num_inference_steps=50, stride=5, blend=blend)
        error = ((cached - full).norm() / full.norm()).item()
        assert 1e-6 < error < 0.5, blend


def test_an_image_does_not_change_with_its_batch_mates(pipeline):
    ours = EncachePipeline.from_pipe(pipeline, "up2")
    arguments = {"num_inference_steps": STEPS, "output_type": "latent", "stride": 5}
    batch = ours(
        ["hot dog", "red apple"],
        num_images_per_prompt=2,
        generator=[generator(seed) for seed in (1, 2, 3, 4)],
        **arguments,
    ).images
    alone = ours("red apple", generator=[generator(4)], **arguments).images
    assert_close(batch[3:], alone, 1e-4)


def test_batches_equal_diffusers(pipeline):
    ours = EncachePipeline.from_pipe(pipeline, "up2")
    arguments = {
        "prompt": ["red apple", "hot dog"],
        "negative_prompt": ["green pear", "yellow banana"],
        "num_images_per_prompt": 2,
        "num_inference_steps": 5,
        "output_type": "latent",
        "guidance_rescale": 0.5,
        "height": 24,
        "width": 32,
    }
    seeds = range(4)
    expected = pipeline(generator=[generator(seed) for seed in seeds], **arguments).images
    actual = ours(generator=[generator(seed) for seed in seeds], stride=1, **arguments).images
    assert actual.shape == (4, 4, 12, 16)
    assert_close(actual, expected)


def test_max_decode_batch_changes_nothing(pipeline):
    ours = EncachePipeline.from_pipe(pipeline, "up2")
    assert_close(latents(ours, stride=5, max_decode_batch=4), latents(ours, stride=5), 1e-4)
    with pytest.raises(EncacheError, match="max_decode_batch"):
        latents(ours, max_decode_batch=1)


def test_prediction_type_v(pipeline):
    pipeline.scheduler = solver("dpmsolver++", prediction_type="v_prediction")
    ours = EncachePipeline.from_pipe(pipeline, "up2")
    assert_close(latents(ours, stride=1), latents(pipeline))


def test_output_types(pipeline):
    ours = EncachePipeline.from_pipe(pipeline, "up2")
    arguments = {"num_inference_steps": 2, "stride": 1}
    shapes = {"np": (1, 16, 16, 3), "pt": (1, 3, 16, 16), "latent": (1, 4, 8, 8)}
    for output_type, shape in shapes.items():
        images, flags = ours("red apple", output_type=output_type, return_dict=False, **arguments)
        assert tuple(images.shape) == shape
        assert flags is None
    assert ours("red apple", **arguments).images[0].size == (16, 16)


def test_latents_and_embeddings_may_be_given(pipeline):
    ours = EncachePipeline.from_pipe(pipeline, "up2")
    noise = torch.randn((1, 4, 8, 8), generator=generator())
    arguments = {"num_inference_steps": 5, "output_type": "latent", "stride": 1}
    expected = ours("red apple", generator=generator(), **arguments).images
    assert_close(ours("red apple", latents=noise, **arguments).images, expected, 1e-6)
    embeds = ours.texts(["red apple"])["text"]
    given = ours(prompt_embeds=embeds, latents=noise, **arguments).images
    assert_close(given, expected, 1e-6)


def test_callbacks_see_every_call_in_order(pipeline):
    seen, expected = [], []

    def record(into):
        def callback(pipe, call, timestep, tensors):
            into.append((call, int(timestep), tensors["latents"].clone()))
            return {}

        return callback

    latents(pipeline, callback_on_step_end=record(expected))
    latents(EncachePipeline.from_pipe(pipeline, "up2"), stride=1, callback_on_step_end=record(seen))
    assert [one[:2] for one in seen] == [one[:2] for one in expected]
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours[2], theirs[2], rtol=1e-4, atol=1e-4)


def test_a_callback_may_not_replace_the_latents(pipeline):
    ours = EncachePipeline.from_pipe(pipeline, "up2")
    with pytest.raises(EncacheError, match="replaced the latents"):
        latents(ours, callback_on_step_end=lambda *a: {"latents": torch.zeros(1)})
    with pytest.raises(EncacheError, match="no other tensor"):
        latents(ours, callback_on_step_end_tensor_inputs=["prompt_embeds"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"height": 20}, "try 16"),
        ({"prompt": None}, "either prompt or prompt_embeds"),
        ({"negative_prompt": ["a", "b"]}, "1 prompts and 2 negative"),
        ({"generator": [generator()] * 3}, "3 generators"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, "latents must be"),
        ({"stride": 11}, "and the 10 calls, not 11"),
        ({"num_inference_steps": 0}, "between 1 and 1000 steps"),
    ],
)
def test_arguments_that_cannot_be_honoured(pipeline, arguments, reason):
    ours = EncachePipeline.from_pipe(pipeline, "up2")
    with pytest.raises(EncacheError, match=reason):
        ours(**{"prompt": "red apple", "num_inference_steps": STEPS, **arguments})


def test_from_pretrained_builds_and_opens(model_folder, engine_folder, pipeline):
    for backend in ("torch", "onnxruntime"):
        ours = EncachePipeline.from_pretrained(
            model_folder, backend=backend, engine_dir=engine_folder.parent
        )
        assert_close(latents(ours, stride=1), latents(pipeline), 1e-3)
    ours = EncachePipeline.from_single_file(model_folder, backend="torch", cut="mid")
    assert_close(latents(ours, stride=1), latents(pipeline))


@pytest.mark.parametrize(("cut", "runs"), [("none", 2), ("up2", 2 + 2)])
def test_all_parts_run_compiled(model_folder, pipeline, monkeypatch, cut, runs):
    """Two key calls of four; torch.compile itself, which takes a minute, is PyTorch's."""
    calls = []

    def compile(part):
        name = getattr(part, "__name__", type(part).__name__)
        return lambda *arguments: calls.append(name) or part(*arguments)

    monkeypatch.setattr(torch, "compile", compile)
    ours = EncachePipeline.from_pretrained(model_folder, backend="torch.compile", cut=cut)
    assert ours.engines.name == "torch.compile"
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {"num_inference_steps": 4, "stride": 2, "latents": noise, "output_type": "pt"}
    pictures = ours("red apple", **call).images
    assert len(calls) == runs + 2  # the text encoder, and the autoencoder
    plain = EncachePipeline.from_pretrained(model_folder, backend="torch", cut=cut)
    torch.testing.assert_close(pictures, plain("red apple", **call).images)


@pytest.fixture
def tuned(model_folder, tmp_path):
    """A checkpoint that says how to sample it, opened, and the same model that says nothing."""
    path = save_tuned(tmp_path, model_folder, ONE_SEGMENT).weights
    silent = make_pipeline()
    silent.unet = tiny_unet(seed=1)
    return EncachePipeline.from_pretrained(path, backend="torch"), silent


def test_weights_are_sampled_as_they_say(tuned):
    ours, silent = tuned
    plain = EncachePipeline.from_pipe(silent, "mid")
    plain.scheduler = stable_diffusion_scheduler(timestep_spacing="trailing")
    asked = {"num_inference_steps": 4, "stride": 4, "blend": "reuse", "guidance_scale": 1.0}
    expected = latents(plain, **asked)
    assert_close(latents(ours, num_inference_steps=None), expected, 1e-6)
    assert ours.num_timesteps == 4
    assert not torch.allclose(latents(plain, **{**asked, "stride": 2}), expected, atol=1e-3)


@pytest.mark.parametrize(
    "asked",
    [
        {"num_inference_steps": 8},
        {"guidance_scale": 3.0},
        {"stride": 2},
        {"key_calls": [0, 1]},
        {"blend": "extrapolate", "stride": 2},
        {"prior_noise": True},
    ],
)
def test_what_is_asked_for_goes_before_what_weights_say(tuned, asked):
    ours, silent = tuned
    plain = EncachePipeline.from_pipe(silent, "mid")
    plain.scheduler = ours.scheduler
    said = {"num_inference_steps": 4, "stride": 4, "blend": "reuse", "guidance_scale": 1.0}
    if "key_calls" in asked:
        del said["stride"]
    expected = latents(plain, **{**said, **asked})
    actual = latents(ours, **{"num_inference_steps": None, **asked})
    assert_close(actual, expected, 1e-6)
    assert not torch.allclose(actual, latents(ours, num_inference_steps=None), atol=1e-4)


def test_fewer_steps_than_the_stride_of_the_weights(tuned):
    ours, _ = tuned
    expected = latents(ours, num_inference_steps=2, stride=2)
    assert_close(latents(ours, num_inference_steps=2), expected, 1e-6)


def test_the_cut_and_the_scheduler_of_the_weights_give_way(model_folder, tmp_path):
    path = save_tuned(tmp_path, model_folder, ONE_SEGMENT).weights
    scheduler = solver("euler")
    ours = EncachePipeline.from_pretrained(path, backend="torch", cut="up1", scheduler=scheduler)
    assert ours.scheduler is scheduler
    assert ours.engines.features == TorchEngines(tiny_unet(), "up1").features
    assert ours.preset == ONE_SEGMENT


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"blend": "magic"}, "no blend 'magic'"),
        ({"stride": None, "key_calls": (1, 2)}, "must start at 0"),
        ({"stride": None, "key_calls": (0, 7)}, "beyond the last of 4 calls"),
        ({"steps": 5000}, "between 1 and 1000 steps"),
        ({"scheduler": {"_class_name": "EulerAncestralDiscreteScheduler"}}, "deterministic"),
        ({"scheduler": {"_class_name": "DDIMScheduler", "steps_offset": "1"}}, "refuses 4 steps"),
    ],
)
def test_what_weights_say_must_fit_together(model_folder, tmp_path, changes, reason):
    path = save_tuned(tmp_path, model_folder, replace(ONE_SEGMENT, **changes)).weights
    ours = EncachePipeline.from_pretrained(path, backend="torch")
    with pytest.raises(EncacheError, match=reason):
        ours("red apple")


def test_an_onnx_runtime_too_old_for_a_gpu(engine_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "__version__", "1.24.4")
    with pytest.raises(EncacheError, match=r"on the CPU: pip install .*>=1.25"):
        EncachePipeline.from_engines(engine_folder)


def test_a_run_leaves_nothing_to_the_next(pipeline):
    engines = TorchEngines(pipeline.unet, "up2")
    plan = make_plan(pipeline.scheduler, STEPS, Policy(3, cut="up2"))
    text = {"text": torch.randn(2, 16, TEXT_WIDTH, generator=generator())}
    noise = torch.randn(1, 4, 8, 8, generator=generator())
    sampling = Sampling(plan, engines, noise.shape, 2, make_guide(7.5))
    first = sampling.run(noise, text)
    assert sampling.run(noise * torch.nan, text).isnan().all()
    assert_close(sampling.run(noise, text), first, 1e-6)


def test_compiled_engines_bound_what_may_be_asked(pipeline):
    ours = EncachePipeline.from_pipe(pipeline, "up2")
    expected = latents(ours, stride=5)
    ours.engines.target = Target("any", ("8.9",), (2, 2), 2, (16, 16), (16, 24))
    batches = []
    decode = ours.engines.decode
    ours.engines.decode = lambda ring, weights, *more: (
        batches.append(len(weights)) or decode(ring, weights, *more)
    )
    assert_close(latents(ours, stride=5), expected)
    assert batches == [2, 2, 1, 2, 2, 1]
    for changes, word in [
        ({"guidance_scale": 1.0}, "rows 2, not 1"),
        ({"num_images_per_prompt": 2}, "rows 2, not 4"),
        ({"height": 24}, "height 16, not 24"),
        ({"width": 32}, "width 16 to 24, not 32"),
    ]:
        with pytest.raises(EncacheError, match=word):
            latents(ours, **changes)


def test_the_decoder_runs_in_parts_where_memory_is_short(pipeline, caplog):
    ours = EncachePipeline.from_pipe(pipeline, "up2")
    expected = latents(ours, stride=10)
    decode, sizes, callbacks = ours.engines.decode, [], []

    def decode_few(ring, weights, *more):
        sizes.append(len(weights))
        if len(weights) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return decode(ring, weights, *more)

    ours.engines.decode = decode_few
    actual = latents(
        ours, stride=10, callback_on_step_end=lambda pipe, call, *_: callbacks.append(call)
    )
    assert_close(actual, expected, 1e-4)
    # Learned once; every part and every call once.
    assert sizes == [10, 5, 3, 3, 3, 1]
    assert callbacks == list(range(10))
    assert "going on with 3" in caplog.text


def test_pytorch_wakes_no_threads_beside_onnx_runtime(up2_folder, pipeline, monkeypatch):
    changes = []
    monkeypatch.setattr(torch, "set_num_threads", changes.append)
    latents(EncachePipeline.from_engines(up2_folder))
    assert changes == [1, torch.get_num_threads()]
    latents(EncachePipeline.from_pipe(pipeline, "up2"))
    assert len(changes) == 2


def test_too_little_memory_for_one_call(up2_folder):
    ours = EncachePipeline.from_engines(up2_folder)
    # The matrix of attention over so many pixels has 32 TiB.
    with pytest.raises(EncacheError, match="Memory does not hold one call of 2 rows"):
        latents(ours, height=2048, width=2048)
