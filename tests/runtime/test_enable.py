"""`encache.enable`: what is followed, what is left alone, and what is refused."""

import copy
from types import SimpleNamespace

import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0

import encache
from encache.errors import EncacheError
from encache.runtime.generation import place_of
from encache.runtime.key_calls import NAMED_KEY_CALLS
from encache.runtime.pipeline import EncachePipeline
from tests.conftest import make_pipeline, make_xl_pipeline, stable_diffusion_scheduler, tiny_unet
from tests.families import picture, similar, tiny_controlnet
from tests.runtime.propagation import calls_from, counting, propagation, unet_children
from tests.runtime.solvers import NAMES, solver

STEPS = 10


def draw(pipe, prompt="red apple", **arguments):
    arguments = {"num_inference_steps": STEPS, "output_type": "latent", **arguments}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **arguments).images


def assert_close(actual, expected, tolerance=1e-5):
    assert expected.std() > 1e-1  # not a comparison of zeros
    assert (actual - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("cut", ["none", "up1"])
@pytest.mark.parametrize("name", ["dpmsolver++", "unipc", "heun"])
def test_extrapolation_is_the_line_through_the_last_two_key_calls(pipeline, name, cut):
    pipeline.scheduler = solver(name)
    num_calls = 2 * STEPS - 1 if name == "heun" else STEPS
    keys = (0, 1, 3, 7)
    calls, children = calls_from(0, num_calls, keys), unet_children(pipeline.unet, cut)
    with propagation(pipeline.unet, children, calls, order=1):
        expected = draw(pipeline)
    encache.enable(pipeline, cut=cut, key_calls=keys)
    assert_close(draw(pipeline), expected)


@pytest.mark.parametrize("cut", ["none", "mid"])
@pytest.mark.parametrize("blend", ["reuse", "extrapolate"])
def test_it_draws_what_the_plan_draws(pipeline, cut, blend):
    ours = EncachePipeline.from_pipe(pipeline, cut)
    expected = draw(ours, stride=4, blend=blend)
    encache.enable(pipeline, 4, cut=cut, blend=blend)
    assert_close(draw(pipeline), expected, 1e-4)


def test_a_stochastic_scheduler_draws_its_own_noise(pipeline):
    pipeline.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(
        pipeline.scheduler.config
    )
    calls = calls_from(0, STEPS, range(0, STEPS, 5))
    with propagation(pipeline.unet, [pipeline.unet], calls):
        expected = draw(pipeline)
    encache.enable(pipeline, 5, blend="reuse")
    assert_close(draw(pipeline), expected)


class StopError(Exception):
    pass


def stop_at(call, how):
    def on_step_end(pipe, index, timestep, tensors):
        if index == call and how == "exception":
            raise StopError
        pipe._interrupt = index >= call
        return {}

    return on_step_end


@pytest.mark.parametrize("cut", ["none", "mid"])
@pytest.mark.parametrize("how", ["exception", "interruption"])
def test_a_generation_starts_anew(pipeline, cut, how):
    encache.enable(pipeline, 4, cut=cut)
    askings = (
        {},
        {"num_inference_steps": 7},
        {"num_images_per_prompt": 2},
        {"prompt": "hot dog"},
        {"height": 24, "width": 16},
        {"guidance_scale": 1.0},
    )
    undisturbed = [draw(pipeline, **asked) for asked in askings]
    for call, (asked, expected) in enumerate(zip(askings, undisturbed, strict=True)):
        try:
            draw(pipeline, callback_on_step_end=stop_at(call, how))
        except StopError:
            assert how == "exception"
        assert torch.equal(draw(pipeline, **asked), expected), asked


@pytest.mark.parametrize("name", [*NAMES, "lcm", "ddpm", "euler ancestral", "lms", "kdpm2", "sde"])
def test_a_scheduler_makes_new_timesteps_for_each_generation(name):
    """What recognising a generation rests upon."""
    more = {
        "lcm": "LCMScheduler",
        "ddpm": "DDPMScheduler",
        "euler ancestral": "EulerAncestralDiscreteScheduler",
        "lms": "LMSDiscreteScheduler",
        "kdpm2": "KDPM2DiscreteScheduler",
        "sde": "DPMSolverSDEScheduler",
    }
    if name in more:
        kind = getattr(diffusers, more[name])
        if name == "sde":
            pytest.importorskip("torchsde")
        scheduler = kind.from_config(stable_diffusion_scheduler().config)
    else:
        scheduler = solver(name)
    scheduler.set_timesteps(4)
    first = scheduler.timesteps
    # A timestep is a view into them, also where a pipeline begins later.
    assert [place_of(one, first, None) for one in first[1:]] == list(range(1, len(first)))
    scheduler.set_timesteps(4)
    assert scheduler.timesteps is not first
    assert scheduler.timesteps.data_ptr() != first.data_ptr()


def test_a_timestep_that_is_no_view_is_found_by_value():
    table = torch.tensor([9, 6, 6, 3])
    assert place_of(torch.tensor([6, 6]), table, None) == 1
    assert place_of(6, table, 2) == 2
    assert place_of(3.0, table, 1) == 3
    for unknown in (5, torch.tensor([6, 3])):
        with pytest.raises(EncacheError, match="not one of its scheduler's"):
            place_of(unknown, table, None)


def test_what_a_callback_changes_begins_a_segment(pipeline):
    """The prompt, and the end of guidance, which halves the batch."""

    def change(pipe, index, timestep, tensors):
        if index == 2:
            return {"prompt_embeds": tensors["prompt_embeds"] * 0.5}
        if index == 4:
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}
        return {}

    told = {
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    for cut in ("none", "mid"):
        calls = calls_from(0, STEPS, (0, 3, 5, 8))
        with propagation(pipeline.unet, unet_children(pipeline.unet, cut), calls):
            expected = draw(pipeline, **told)
        encache.enable(pipeline, cut=cut, key_calls=(0, 8), blend="reuse")
        assert_close(draw(pipeline, **told), expected)
        encache.disable(pipeline)


def test_the_end_of_a_controlnets_guidance_begins_a_segment(pipeline):
    pipe = make_controlled(pipeline)
    told = {"image": picture(), "control_guidance_end": 0.5}
    calls = calls_from(0, STEPS, (0, 4, 5, 8))
    children = unet_children(pipe.unet, "mid")
    with propagation(pipe.unet, children, calls, controlnet=pipe.controlnet):
        expected = draw(pipe, **told)
    encache.enable(pipe, 4, cut="mid", blend="reuse")
    assert_close(draw(pipe, **told), expected)


def make_controlled(pipe, **changes):
    controlnet = tiny_controlnet(tiny_unet(**changes) if changes else pipe.unet)
    return similar(
        pipe,
        StableDiffusionControlNetPipeline,
        controlnet=controlnet,
        requires_safety_checker=False,
    )


@torch.no_grad()
def faster_diffusion(pipe, keys, control_image):
    """Faster Diffusion's published loop for a ControlNet, with its prior noise injection.

    One segment after the other: encoder and ControlNet see the latents as they are; then, for each
    call, the noise is added if t / 1000 < 0.5, and the solver steps.
    """
    unet, scheduler = pipe.unet, pipe.scheduler
    scheduler.set_timesteps(STEPS)
    latents = initial = first_latents() * scheduler.init_noise_sigma
    text = torch.cat(pipe.encode_prompt("red apple", "cpu", 1, True, "")[::-1])
    for key, stop in zip(keys, (*keys[1:], STEPS), strict=True):
        calls = calls_from(key, stop, {key})
        with propagation(unet, unet_children(unet, "mid"), calls):
            both, first = torch.cat([latents] * 2), scheduler.timesteps[key]
            added = {}
            if control_image is not None:
                down, mid = pipe.controlnet(both, first, text, control_image, return_dict=False)
                added = {"down_block_additional_residuals": down}
                added["mid_block_additional_residual"] = mid
            noises = [
                unet(both, scheduler.timesteps[call], text, **added).sample for call, _ in calls
            ]
        for (call, _), noise in zip(calls, noises, strict=True):
            timestep = scheduler.timesteps[call]
            if timestep / 1000 < 0.5:
                latents = latents + 0.003 * initial
            unconditional, conditional = noise.chunk(2)
            guided = unconditional + 7.5 * (conditional - unconditional)
            latents = scheduler.step(guided, timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize("with_controlnet", [False, True])
def test_prior_noise_is_injected_as_published(pipeline, with_controlnet):
    keys = (0, 1, 3, 6, 8)
    told, image = {}, None
    if with_controlnet:
        pipeline = make_controlled(pipeline)
        told = {"image": picture()}
        image = torch.cat([pipeline.control_image_processor.preprocess(picture(), 16, 16)] * 2)
    expected = faster_diffusion(pipeline, keys, image)
    own = pipeline.scheduler
    settings = {"cut": "mid", "key_calls": keys, "blend": "reuse"}
    encache.enable(pipeline, **settings)
    without = draw(pipeline, **told)
    encache.enable(pipeline, prior_noise=True, **settings)
    for _ in range(2):  # each generation has its own noise
        ours = draw(pipeline, **told)
        assert_close(ours, expected)
    assert (without - expected).norm() / expected.norm() > 1e-3
    # Another scheduler is disturbed too, and the pipeline's own is not.
    assert own.step.__func__ is type(own).step
    pipeline.scheduler = copy.deepcopy(own)
    assert_close(draw(pipeline, **told), expected)
    encache.disable(pipeline)
    assert type(pipeline.scheduler) is type(own)


def test_two_pipelines_share_a_denoiser(pipeline):
    other, third = (
        StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
        for _ in range(2)
    )
    for one in (other, third):
        one.set_progress_bar_config(disable=True)
        one.scheduler = solver("euler")
    encache.enable(pipeline, 3, cut="up1", prior_noise=True)
    encache.enable(other, 5, cut="none")
    alone = draw(pipeline), draw(other, "hot dog"), draw(third)
    together = []

    def run_the_others(*_):
        if not together:
            together.extend([draw(other, "hot dog"), draw(third)])
        return {}

    assert torch.equal(draw(pipeline, callback_on_step_end=run_the_others), alone[0])
    assert torch.equal(together[0], alone[1])
    assert torch.equal(together[1], alone[2])
    fresh = make_pipeline()
    fresh.scheduler = solver("euler")
    assert_close(alone[2], draw(fresh), 1e-6)


def test_a_pipeline_made_of_an_enabled_ones_parts_gets_its_own_cache(pipeline):
    encache.enable(pipeline, 5, cut="mid")
    other = similar(pipeline, StableDiffusionPipeline, requires_safety_checker=False)
    other.scheduler = solver("euler")
    unet = tiny_unet()
    encache.enable(other, 2, cut="none")
    with counting(pipeline.unet._original) as counts:
        draw(other)
    assert sum(counts.values()) == STEPS // 2
    del pipeline
    encache.disable(other)
    assert type(other.unet) is type(unet)


def test_whose_pipeline_is_gone_says_so():
    pipe = make_pipeline()
    encache.enable(pipe, 5)
    denoiser = pipe.unet
    del pipe
    with pytest.raises(EncacheError, match="is gone"):
        denoiser(torch.zeros(2, 4, 8, 8), torch.tensor(1), torch.zeros(2, 5, 16))


def test_the_model_is_left_as_it_was(pipeline):
    unet, scheduler = pipeline.unet, pipeline.scheduler
    names = {name: id(one) for name, one in unet.named_modules()}
    before = names, dict(vars(unet)), dict(pipeline.config)
    own = draw(pipeline)
    encache.enable(pipeline, 3, cut="mid", prior_noise=True)
    draw(pipeline)
    names = {name: id(one) for name, one in unet.named_modules()}
    assert before == (names, dict(vars(unet)), dict(pipeline.config))
    assert isinstance(pipeline.unet, diffusers.UNet2DConditionModel)
    assert pipeline.unet.config is unet.config
    assert pipeline.unet.dtype == torch.float32
    assert sum(one.numel() for one in pipeline.unet.parameters()) == unet.num_parameters()
    encache.disable(pipeline)
    assert (pipeline.unet, pipeline.scheduler) == (unet, scheduler)
    assert torch.equal(draw(pipeline), own)


def test_the_pipeline_can_still_be_moved_and_saved(pipeline, tmp_path):
    encache.enable(pipeline, 3, cut="mid", prior_noise=True)
    single = draw(pipeline)
    pipeline.to(torch.float64)
    assert pipeline.unet._original.dtype == torch.float64
    double = draw(pipeline, latents=first_latents().double())
    assert double.dtype == torch.float64
    assert_close(double.float(), single)
    pipeline.to(torch.float32).save_pretrained(tmp_path)
    saved = StableDiffusionPipeline.from_pretrained(tmp_path)
    saved.set_progress_bar_config(disable=True)
    encache.disable(pipeline)
    assert_close(draw(saved), draw(pipeline), 1e-6)
    assert type(copy.deepcopy(pipeline).unet) is diffusers.UNet2DConditionModel


def first_latents():
    return torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))


def test_enabling_again_replaces_the_settings_and_disabling_is_safe(pipeline):
    unet = pipeline.unet
    encache.disable(pipeline)
    assert pipeline.unet is unet
    encache.enable(pipeline, 2)
    encache.enable(pipeline, 5)
    with counting(unet) as counts:
        draw(pipeline)
    assert counts[unet] == 2
    encache.disable(pipeline)
    encache.disable(pipeline)
    assert pipeline.unet is unet


def test_settings_that_are_refused_change_nothing(pipeline):
    unet = pipeline.unet
    encache.enable(pipeline, 5)
    with pytest.raises(EncacheError):
        encache.enable(pipeline, 2, cut="up9")
    with counting(unet) as counts:
        draw(pipeline)
    assert counts[unet] == 2


def test_changes_of_the_model_are_followed(pipeline):
    encache.enable(pipeline, 3, cut="mid", blend="reuse")
    draw(pipeline)
    pipeline.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    pipeline.unet.conv_out.weight.data *= 0.9
    changed = make_pipeline()
    changed.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    changed.unet.conv_out.weight.data *= 0.9
    calls = calls_from(0, STEPS, range(0, STEPS, 3))
    with propagation(changed.unet, unet_children(changed.unet, "mid"), calls):
        expected = draw(changed)
    assert_close(draw(pipeline), expected)


def test_an_offloaded_model_is_brought_in_first(pipeline):
    class Arrives(ModelHook):
        def pre_forward(self, module, *arguments, **options):
            module.requires_grad_(False)
            arrived.append(module)
            return arguments, options

    arrived = []
    encache.enable(pipeline, 5, cut="mid")
    add_hook_to_module(pipeline.unet, Arrives())
    unet = pipeline.unet._original
    unet.conv_in.register_forward_pre_hook(lambda *_: seen.append(len(arrived)))
    seen = []
    draw(pipeline)
    assert seen[0] == 1


def test_weights_that_are_nowhere_are_refused_with_a_cut(pipeline):
    """As a model is that brings its weights in one layer at a time."""
    encache.enable(pipeline, 5, cut="mid")
    pipeline.unet._original.to("meta")
    with pytest.raises(EncacheError, match="enable_sequential_cpu_offload.* Use enable_model_cpu"):
        draw(pipeline, prompt_embeds=torch.zeros(1, 5, 16), prompt=None, guidance_scale=1)


def test_no_call_is_decoded_that_is_not_made():
    """A base model leaves the last calls to its refiner."""
    pipe = make_xl_pipeline()
    told = {"denoising_end": 0.6, "guidance_scale": 1.0}
    calls = calls_from(0, 6, (0, 4))
    with propagation(pipe.unet, unet_children(pipe.unet, "mid"), calls):
        expected = draw(pipe, **told)
    rows = []
    pipe.unet.conv_out.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    encache.enable(pipe, 4, cut="mid", blend="reuse")
    assert_close(draw(pipe, **told), expected)
    assert rows == [4, 2]


def test_strides_beyond_the_calls_and_few_calls(pipeline):
    for steps in (1, 2, 4):
        encache.enable(pipeline, 4, cut="mid", blend="reuse")
        with counting(pipeline.unet.conv_in) as counts:
            draw(pipeline, num_inference_steps=steps)
        assert sum(counts.values()) == 1


def test_published_lists(pipeline):
    encache.enable(pipeline, cut="mid", key_calls="paper")
    with counting(pipeline.unet.conv_in) as counts:
        draw(pipeline, num_inference_steps=20)
    assert sum(counts.values()) == 7
    with pytest.raises(EncacheError, match="for 50 and 20 calls, not for 10"):
        draw(pipeline)
    # 100ls and s2 in the authors' code.
    hundred, fifty = NAMED_KEY_CALLS["if-1"][100], NAMED_KEY_CALLS["if-2"][50]
    assert set(hundred) == {i for i in range(100) if i > 85 or i < 10 or i % 5 == 0}
    assert set(fifty) == {i for i in range(50) if i < 20 or i > 40 or i % 2 == 0}
    assert list(hundred) == sorted(hundred)
    assert list(fifty) == sorted(fifty)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"blend": "interpolate"}, "to look ahead needs the solver as a table"),
        ({"blend": "cubic"}, "takes the blends reuse and extrapolate, not 'cubic'"),
        ({"stride": 0}, "The stride must be 1 .* or more, not 0"),
        ({"stride": 2, "key_calls": (0, 1)}, "a stride or key calls, not both"),
        ({"key_calls": (1, 2)}, "must start at 0"),
        ({"key_calls": (0, 2, 2)}, "must rise"),
        ({"key_calls": ()}, "must start at 0"),
        ({"key_calls": "mine"}, "no key calls 'mine'. Choose one of paper, if-1, if-2"),
        ({"cut": "up7"}, "no cut up7. Choose one of none, mid, up0"),
        ({"cut": 3}, "no cut 3"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(pipeline, settings, reason):
    with pytest.raises(EncacheError, match=reason):
        encache.enable(pipeline, **settings)
    assert type(pipeline.unet) is diffusers.UNet2DConditionModel


def test_calls_that_cannot_be_honoured_are_refused(pipeline):
    encache.enable(pipeline, key_calls=(0, 2, 12))
    with pytest.raises(EncacheError, match="Key call 12 is beyond the last of 10 calls"):
        draw(pipeline)
    assert draw(pipeline, num_inference_steps=13).isfinite().all()
    with pytest.raises(EncacheError, match=r"cross_attention_kwargs\.scale is given"):
        draw(pipeline, num_inference_steps=13, cross_attention_kwargs={"scale": 0.5})
    encache.enable(pipeline, 2, cut="mid", max_decode_batch=1)
    with pytest.raises(EncacheError, match="decodes 2 rows .* more than the 1"):
        draw(pipeline)


def test_what_is_no_known_pipeline_is_refused(pipeline):
    for thing in (SimpleNamespace(), EncachePipeline.from_pipe(pipeline)):
        with pytest.raises(EncacheError, match="encache.enable takes a diffusers pipeline"):
            encache.enable(thing)
    vars(pipeline)["unet"] = diffusers.UNet2DModel(block_out_channels=(32,) * 4)
    with pytest.raises(EncacheError, match="cannot read a UNet2DModel; it knows UNet2DCond"):
        encache.enable(pipeline)
    with pytest.raises(AttributeError):
        encache.enabled  # noqa: B018


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"in_channels": 9}, "9 channels, and gives 4"),
        ({"time_cond_proj_dim": 8}, "its guidance"),
        ({"num_class_embeds": 8}, "a noise level"),
    ],
)
def test_what_draws_from_more_than_a_text_is_sent_here(changes, what):
    with pytest.raises(EncacheError, match=f"reads {what}.* encache.enable"):
        EncachePipeline.from_pipe(make_pipeline(**changes))


def test_a_controlnet_of_another_model_is_refused(pipeline):
    for changes in ({"cross_attention_dim": 24}, {"block_out_channels": (8, 16, 24, 40)}):
        pipe = make_controlled(pipeline, **changes)
        with pytest.raises(EncacheError, match="belongs to another model: its .* is"):
            encache.enable(pipe)
    pipe = make_controlled(pipeline, layers_per_block=2)
    encache.enable(pipe)
    with pytest.raises(EncacheError, match="gives 13 residuals to a model that adds 9"):
        draw(pipe, image=picture())


class Twice(StableDiffusionPipeline):
    """Asks its denoiser twice a step, as some ways of guidance do."""

    def progress_bar(self, *arguments, **options):
        unet = self.unet

        def twice(*inputs, **others):
            unet(*inputs, **others)
            return unet(*inputs, **others)

        twice.config, twice.dtype = unet.config, unet.dtype
        vars(self)["unet"] = twice
        return super().progress_bar(*arguments, **options)


@pytest.mark.parametrize("steps", [1, 2, 3, STEPS])
def test_a_denoiser_that_is_asked_twice_a_step_is_refused(pipeline, steps):
    pipe = similar(pipeline, Twice, requires_safety_checker=False)
    encache.enable(pipe, 5)
    if steps == 1:  # then there is nothing to take for the other's
        expected = draw(pipeline, num_inference_steps=1)
        assert torch.equal(draw(pipe, num_inference_steps=1), expected)
        return
    with pytest.raises(EncacheError, match="asks for call 1 where call 2 would be next"):
        draw(pipe, num_inference_steps=steps)


def test_attention_across_rows_is_refused_with_a_cut(pipeline):
    class Mine(AttnProcessor2_0):
        pass

    pipeline.unet.set_attn_processor(Mine())
    with pytest.raises(EncacheError, match="attention is a Mine, .* The cut none needs no batch"):
        encache.enable(pipeline, cut="mid")
    expected = draw(pipeline)
    encache.enable(pipeline, 1)
    assert_close(draw(pipeline), expected)
    encache.disable(pipeline)
    # Perturbed guidance sets its own when a generation begins.
    pipeline.unet.set_attn_processor(AttnProcessor2_0())
    kind = diffusers.StableDiffusionPAGPipeline
    pipe = similar(pipeline, kind, requires_safety_checker=False, pag_applied_layers=["mid"])
    expected = draw(pipe, pag_scale=3.0)
    encache.enable(pipe, 1)
    assert_close(draw(pipe, pag_scale=3.0), expected)
    encache.enable(pipe, 3, cut="mid")
    with pytest.raises(EncacheError, match="attention is a PAG"):
        draw(pipe, pag_scale=3.0)
