"""Training with the cache in the loop: its sampler, its losses, and `encache-train shared`."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from diffusers import DDIMScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from encache.errors import EncacheError
from encache.model.checkpoint import find_checkpoint
from encache.model.loading import load_pipeline
from encache.model.preset import PRESET_KEY, Preset
from encache.model.split import Halves
from encache.runtime.pipeline import EncachePipeline
from encache.train import student as module
from encache.train.cli import main
from encache.train.composed import compose, latents_of, relative_error
from encache.train.pairs import SHARD, Pairs, Teacher
from encache.train.shared import Shared, SharedBatch, SharedObjective
from encache.train.student import make_student
from tests.conftest import (
    ONE_SEGMENT,
    TEXT_WIDTH,
    make_pipeline,
    save_tuned,
    share_of_the_way,
    stable_diffusion_scheduler,
    tiny_unet,
)

SHAPE = (4, 8, 8)


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


def make(
    scheduler="ddim",
    spacing="trailing",
    prediction=None,
    steps=4,
    stride=None,
    cut="mid",
    blend="reuse",
):
    """From a scheduler whose config leaves out what it does not change, as Stable Diffusion's."""
    model = DDIMScheduler.from_config(
        {
            "_class_name": "DDIMScheduler",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        }
    )
    made = make_student(model, scheduler, spacing, prediction, steps, stride, cut, blend)
    config = made.scheduler.config
    assert (config.timestep_spacing, config.prediction_type) == (spacing, prediction or "epsilon")
    return made


def make_objective(settings=None, student=None, seed=0):
    student = student or make()
    alphas = stable_diffusion_scheduler().alphas_cumprod
    ends = (student.plan.num_calls,)
    settings = settings or Shared()
    unet = tiny_unet(seed)
    return SharedObjective(unet, student.plan, ends, student.cut, alphas, "epsilon", settings)


def make_batch(size=3, num_ends=1, seed=0):
    torch.manual_seed(seed)
    return SharedBatch(
        noise=torch.randn(size, *SHAPE),
        text=torch.randn(size, 16, TEXT_WIDTH),
        wanted=torch.randn(size, num_ends, *SHAPE),
        empty=torch.randn(1, 16, TEXT_WIDTH),
        renoise=torch.randn(size, *SHAPE),
        timesteps=torch.tensor([20, 400, 980][:size]),
        deltas=torch.tensor([1, 10, 5][:size]),
        score_noise=torch.randn(size, *SHAPE),
        score_timesteps=torch.tensor([700, 30, 200][:size]),
        dropped=torch.tensor([False, True, False][:size]),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 8, "stride": 4, "prediction": "v_prediction"},
        {"cut": "up2", "spacing": "leading"},
        {"cut": "up1", "steps": 6, "stride": 2, "blend": "extrapolate"},
        {"steps": 7, "stride": 3, "blend": "extrapolate", "scheduler": "dpmsolver++"},
        {"steps": 6, "stride": 3, "blend": "interpolate-refresh"},
        {"steps": 3, "stride": 4, "scheduler": "heun", "blend": "extrapolate", "cut": "up1"},
    ],
)
def test_the_composed_sampler_equals_the_pipeline(options):
    student = make(**options)
    pipeline = make_pipeline()
    wrapped = EncachePipeline.from_pipe(pipeline, student.cut)
    wrapped.set_progress_bar_config(disable=True)
    wrapped.scheduler = student.scheduler
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    text = torch.randn(2, 16, TEXT_WIDTH, generator=torch.Generator().manual_seed(2))
    drawn = wrapped(
        prompt_embeds=text,
        latents=noise,
        num_inference_steps=student.preset.steps,
        stride=student.preset.stride,
        blend=student.preset.blend,
        guidance_scale=1.0,
        output_type="latent",
    ).images
    for recompute in (False, True):
        halves = Halves(pipeline.unet, student.cut)
        history = compose(student.plan, halves, noise, {"text": text}, recompute)
        latents = latents_of(student.plan.samples[-1], history)
        torch.testing.assert_close(latents.detach(), drawn, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"steps": 4, "stride": 2, "blend": "extrapolate", "cut": "up0"}]
)
def test_gradients_equal_finite_differences(options):
    student = make(**options)
    unet = tiny_unet().double()
    noise, text = (one.double() for one in (make_batch().noise, make_batch().text))
    wanted = make_batch().wanted[:, 0].double()

    def loss():
        # In double precision throughout: only so do differences show the gradient.
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch.Tensor, "float", torch.Tensor.double)
            history = compose(student.plan, Halves(unet, student.cut), noise, {"text": text})
            return relative_error(latents_of(student.plan.samples[-1], history), wanted).mean()

    parameters = dict(unet.named_parameters())
    loss().backward()
    # In front of the cut, at it, behind it.
    for name in ("conv_in.weight", "mid_block.resnets.0.conv1.weight", "conv_out.weight"):
        parameter, step = parameters[name], 1e-6
        direction = torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(3)
        ).double()
        slope = (parameter.grad * direction).sum()
        with torch.no_grad():
            parameter += step * direction
            above = loss()
            parameter -= 2 * step * direction
            below = loss()
            parameter += step * direction
        torch.testing.assert_close((above - below) / (2 * step), slope, rtol=1e-5, atol=1e-8)
        assert slope.abs() > 1e-4


def test_the_error_is_relative_and_of_each_picture():
    wanted = torch.randn(3, *SHAPE)
    scaled = wanted * torch.tensor([1.0, 1.1, 2.0]).view(-1, 1, 1, 1)
    torch.testing.assert_close(relative_error(scaled, wanted), torch.tensor([0.0, 0.01, 1.0]))


def test_the_latent_loss_is_the_mean_over_all_compared_places():
    student = make(steps=4, stride=2)
    objective = make_objective(student=student)
    objective.ends = (2, 4)
    batch = make_batch(num_ends=2)
    latents = objective.sample(batch.noise, batch.text)
    assert latents.shape == (3, 2, *SHAPE)
    errors = [relative_error(latents[:, i], batch.wanted[:, i]).mean() for i in (0, 1)]
    losses = objective(batch)
    torch.testing.assert_close(losses.terms["latent"], sum(errors) / 2)
    torch.testing.assert_close(losses.watched["latent_error"], errors[1].detach())


def test_the_perceptual_loss_is_that_of_the_unchanged_model():
    objective = make_objective(Shared(latent_weight=0.0, perceptual_weight=1.0))
    batch = make_batch()
    same = replace(batch, wanted=objective.sample(batch.noise, batch.text).detach())
    assert objective(same).terms["perceptual"] < 1e-9
    first = objective.perceptual(batch.noise, batch)
    with torch.no_grad():
        for parameter in objective.unet.parameters():
            parameter += 1.0
    torch.testing.assert_close(objective.perceptual(batch.noise, batch), first)
    assert first > 0.01


def test_score_distillation_moves_pictures_to_the_teachers_score():
    settings = Shared(latent_weight=0.0, vsd_weight=1.0, vsd_rank=2, guidance_scale=3.0)
    objective = make_objective(settings)
    assert not settings.needs_pairs
    batch = make_batch()
    latents = torch.randn(3, *SHAPE).requires_grad_()
    # Before its first step the adapter adds nothing, so both scores agree and nothing moves.
    (gradient,) = torch.autograd.grad(objective.score_distillation(latents, batch), latents)
    assert not gradient.any()
    with torch.no_grad():
        for name, parameter in objective.teacher.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    (gradient,) = torch.autograd.grad(objective.score_distillation(latents, batch), latents)
    alpha_bar = objective.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    noised = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * batch.renoise

    def guided(adapted):
        (objective.teacher.enable_adapters if adapted else objective.teacher.disable_adapters)()
        empty = batch.empty.expand_as(batch.text)
        without, given = (
            objective.teacher(noised, batch.timesteps, text).sample for text in (empty, batch.text)
        )
        return without + 3.0 * (given - without)

    wanted = (1 - alpha_bar) * (guided(False) - guided(True)) / latents.numel()
    torch.testing.assert_close(gradient, wanted.detach(), rtol=1e-4, atol=1e-7)
    assert gradient.abs().max() > 1e-6


def test_the_score_follows_the_student_and_the_student_the_score():
    settings = Shared(latent_weight=0.0, vsd_weight=1.0, vsd_rank=2, vsd_rate=50.0)
    objective = make_objective(settings)
    losses = objective(make_batch())
    assert set(losses.terms) == {"vsd", "score"}
    sum(losses.terms.values()).backward()
    learning = {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}
    adapter = [name for name in learning if name.startswith("teacher.")]
    assert adapter
    assert all("lora" in name and objective.group_of(name)[1] == 50.0 for name in adapter)
    assert objective.group_of("unet.conv_in.weight")[1] == 1.0
    assert any(learning[name].abs().max() > 0 for name in adapter)
    # The score's own loss does not reach the student.
    objective.zero_grad()
    objective.score_error(make_batch().noise, make_batch()).backward()
    assert all(p.grad is None or not p.grad.any() for p in objective.unet.parameters())


def test_fcr_is_a_further_term_with_the_students_features():
    plain = make_objective()
    fcr = replace(Shared().fcr, weight=0.5, form="relative", delta_max=10)
    regularised = make_objective(Shared(fcr=fcr))
    batch = make_batch()
    terms = regularised(batch).terms
    torch.testing.assert_close(terms["latent"], plain(batch).terms["latent"])
    assert terms["fcr"] > 0
    batch = replace(batch, deltas=torch.zeros(3, dtype=torch.long))
    assert regularised(batch).terms["fcr"] < 1e-9


def teacher_of(**changes):
    values = {
        "model": "m",
        "scheduler": "{}",
        "prompts": ("red apple", "hot dog"),
        "steps": 4,
        "guidance_scale": 2.0,
        "stride": 1,
        "calls": (4,),
        "shape": SHAPE,
    }
    return Teacher(**{**values, **changes})


@pytest.fixture
def pipeline():
    wrapped = EncachePipeline.from_pipe(make_pipeline(), "none")
    wrapped.set_progress_bar_config(disable=True)
    return wrapped


def test_pairs_are_the_full_samplers_pictures(tmp_path, pipeline):
    pairs = Pairs(tmp_path / "pairs", teacher_of(calls=(2, 4)))
    pairs.draw_missing(3, lambda: pipeline, 40, Accelerator())
    prompt, noise = pairs.teacher.question(2)
    kept = {}
    pipeline(
        prompt,
        latents=noise[None],
        num_inference_steps=4,
        guidance_scale=2.0,
        stride=1,
        output_type="latent",
        callback_on_step_end=lambda _, call, __, tensors: kept.update({call: tensors["latents"]}),
    )
    wanted = torch.cat([kept[1], kept[3]])
    torch.testing.assert_close(pairs.latents(2), wanted, rtol=1e-3, atol=1e-3)


def test_a_folder_of_pairs_grows_and_is_shared(tmp_path, pipeline):
    folder = tmp_path / "pairs"
    Pairs(folder, teacher_of(calls=(2, 4))).draw_missing(1, lambda: pipeline, 64, Accelerator())
    first = next(folder.glob("*.safetensors"))
    kept = first.stat().st_mtime_ns
    fewer = Pairs(folder, teacher_of())  # another run that compares the end alone
    fewer.draw_missing(SHARD + 1, lambda: pipeline, 64, Accelerator())
    assert first.stat().st_mtime_ns == kept
    assert len([*folder.glob("*.safetensors")]) == 2
    fewer.draw_missing(SHARD, None, 64, Accelerator())  # nothing is opened
    torch.testing.assert_close(
        fewer.latents(SHARD)[0], Pairs(folder, teacher_of(calls=(2, 4))).latents(SHARD)[1]
    )


def test_large_batches_draw_the_same_pairs(tmp_path, pipeline):
    """Over several files at once, of which one is there already."""
    small, large = (Pairs(tmp_path / name, teacher_of()) for name in ("small", "large"))
    small.draw_missing(3 * SHARD, lambda: pipeline, 24, Accelerator())
    large.draw_missing(1, lambda: pipeline, 24, Accelerator())
    large.draw_missing(3 * SHARD, lambda: pipeline, 2 * SHARD, Accelerator())
    for index in (0, SHARD - 1, SHARD, 3 * SHARD - 1):
        torch.testing.assert_close(large.latents(index), small.latents(index), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 1}, "seed"), ({"calls": (1, 4)}, "calls"), ({"model": "n"}, "model")],
)
def test_pairs_of_another_teacher_are_refused(tmp_path, pipeline, change, named):
    folder = tmp_path / "pairs"
    Pairs(folder, teacher_of()).draw_missing(1, lambda: pipeline, 64, Accelerator())
    with pytest.raises(EncacheError, match=named):
        Pairs(folder, teacher_of(**change))


def test_pairs_without_their_facts_are_refused(tmp_path, pipeline):
    pairs = Pairs(tmp_path / "pairs", teacher_of())
    pairs.draw_missing(1, lambda: pipeline, 64, Accelerator())
    facts = tmp_path / "pairs" / "pairs.json"
    facts.write_text(facts.read_text().replace('"calls": [', '"calls": 4, "x": ['))
    with pytest.raises(EncacheError, match="damaged"):
        Pairs(tmp_path / "pairs", teacher_of())
    facts.unlink()
    with pytest.raises(EncacheError, match="no pairs.json"):
        Pairs(tmp_path / "pairs", teacher_of())


def test_processes_share_the_shards_whenever_they_look(tmp_path, pipeline):
    """The second looks when the first has drawn already."""
    pairs = Pairs(tmp_path / "pairs", teacher_of())
    for index in (0, 1):
        process = SimpleNamespace(
            process_index=index, num_processes=2, is_main_process=True, wait_for_everyone=int
        )
        pairs.draw_missing(3 * SHARD, lambda: pipeline, 64, process)
    assert len([*(tmp_path / "pairs").glob("*.safetensors")]) == 3


def test_a_damaged_shard_is_named(tmp_path, pipeline):
    folder = tmp_path / "pairs"
    pairs = Pairs(folder, teacher_of())
    pairs.draw_missing(1, lambda: pipeline, 64, Accelerator())
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(EncacheError, match="delete it, and the same command draws it again"):
        pairs.latents(0)


@pytest.fixture
def arguments(model_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\nhot dog\n")

    def make(output, *more):
        values = ["shared", "--pretrained-model-name-or-path", model_folder, "--prompts", prompts]
        values += ["--output-dir", tmp_path / output, "--pairs-dir", tmp_path / "pairs"]
        values += ["--num-pairs", 8, "--teacher-steps", 4, "--teacher-batch-size", 64]
        values += ["--max-train-steps", 4, "--train-batch-size", 2, "--learning-rate", 1e-3]
        values += ["--lr-warmup-steps", 0, "--report-to", "none", *more]
        return [str(value) for value in values]

    return make


def train(arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result


def stop_after(calls, function):
    """As Ctrl-C would, at the next call."""
    left = iter(range(calls))

    def stop(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*arguments)

    return stop


def test_the_written_file_is_a_checkpoint_with_its_plan(arguments, tmp_path, model_folder):
    more = ["--validation-prompt", "red apple", "--validation-steps", 2, "--scheduler", "ddim"]
    result = train(arguments("out", *more))
    path = tmp_path / "out" / "shared.safetensors"
    assert result.stdout.strip() == str(path)
    assert "held_out_latent_error" in result.stderr
    with safe_open(path, "pt") as file:
        header = file.metadata()
    preset = Preset.from_json(header[PRESET_KEY], path)
    assert (preset.steps, preset.stride, preset.cut, preset.blend) == (4, 4, "mid", "reuse")
    assert preset.guidance_scale == 1.0
    assert preset.scheduler["timestep_spacing"] == "trailing"
    assert header["base"] == str(model_folder)
    facts = json.loads(header["encache"])
    assert (facts["steps"], facts["pairs"], facts["teacher"]["steps"]) == (4, 8, 4)
    trained = load_pipeline(find_checkpoint(path)).unet.state_dict()
    before = load_pipeline(find_checkpoint(model_folder)).unet.state_dict()
    assert all(not torch.equal(before[name], trained[name]) for name in before)
    with Image.open(tmp_path / "out" / "validation" / "step-000004.png") as grid:
        assert grid.size == (8 * 16, 16)


def test_a_finished_run_can_be_written_in_half_the_size(arguments, tmp_path):
    train(arguments("out"))
    path = tmp_path / "out" / "shared.safetensors"
    whole = load_file(path)
    train(arguments("out", "--save-dtype", "fp16"))
    half = load_file(path)
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    torch.testing.assert_close({name: t.half() for name, t in whole.items()}, half)
    assert find_checkpoint(path).preset.steps == 4


def test_training_lowers_the_error(arguments, tmp_path):
    more = ["--max-train-steps", 60, "--learning-rate", 3e-3, "--train-batch-size", 8]
    result = train(arguments("out", *more, "--ema-decay", 0, "--validation-steps", 10))
    errors = [
        float(line.rpartition(" ")[2])
        for line in result.stderr.splitlines()
        if "held_out_latent_error" in line
    ]
    assert errors[-1] < 0.8 * errors[0]


def test_a_resumed_run_equals_an_uninterrupted_one(arguments, tmp_path, monkeypatch):
    train(arguments("whole", "--checkpointing-steps", 2))
    with monkeypatch.context() as patched:
        patched.setattr(module.Questions, "_batch", stop_after(3, module.Questions._batch))
        result = CliRunner().invoke(main, arguments("parts", "--checkpointing-steps", 2))
        assert result.exit_code == 1
    assert not (tmp_path / "parts" / "shared.safetensors").exists()
    train(arguments("parts", "--checkpointing-steps", 2))
    whole, parts = (
        load_file(tmp_path / name / "shared.safetensors") for name in ("whole", "parts")
    )
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def test_training_goes_on_from_another_runs_student(arguments, tmp_path):
    train(arguments("first", "--prediction", "v_prediction"))
    first = tmp_path / "first" / "shared.safetensors"
    train(arguments("second", "--student-weights", first, "--learning-rate", 0))
    headers = []
    for name in ("first", "second"):
        with safe_open(tmp_path / name / "shared.safetensors", "pt") as file:
            headers.append(file.metadata())
    # The same student, of the same teacher.
    weights = (load_file(tmp_path / name / "shared.safetensors") for name in ("first", "second"))
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    presets = [Preset.from_json(header[PRESET_KEY], "") for header in headers]
    assert presets[0] == presets[1]
    assert presets[0].scheduler["prediction_type"] == "v_prediction"
    assert headers[0]["base"] == headers[1]["base"]
    facts = [json.loads(header["encache"]) for header in headers]
    assert facts[0]["model"] == facts[1]["model"]
    assert facts[0]["student"] is None
    assert facts[1]["student"]


def test_a_student_is_no_teacher(arguments, model_folder, tmp_path):
    tuned = save_tuned(tmp_path, model_folder, ONE_SEGMENT)
    values = arguments("out")
    values[values.index(str(model_folder))] = str(tuned.weights)
    result = CliRunner().invoke(main, values)
    assert result.exit_code == 2
    assert "--student-weights" in result.stderr


def test_accumulation_equals_a_larger_batch(arguments, tmp_path, model_folder):
    train(arguments("large", "--train-batch-size", 4))
    train(arguments("small", "--gradient-accumulation-steps", 2, "--gradient-checkpointing"))
    large, small = (load_file(tmp_path / n / "shared.safetensors") for n in ("large", "small"))
    start = load_pipeline(find_checkpoint(model_folder)).unet.state_dict()
    assert share_of_the_way(small, large, start) < 0.01


def test_the_long_plan_is_compared_at_the_ends_of_its_segments(arguments, tmp_path):
    more = ["--steps", 4, "--stride", 2, "--timestep-spacing", "leading"]
    train(arguments("out", *more))
    with open(tmp_path / "pairs" / "pairs.json") as file:
        assert json.load(file)["calls"] == [2, 4]


def test_all_losses_and_a_lora_at_once(arguments, tmp_path):
    shown = ["--validation-prompt", "hot dog", "--validation-steps", 2]
    losses = ["--perceptual-weight", 0.1, "--vsd-weight", 0.1, "--vsd-rank", 2, "--fcr-weight", 0.1]
    result = train(arguments("out", *losses, "--rank", 2, "--fcr-form", "relative", *shown))
    assert (tmp_path / "out" / "validation" / "step-000004.png").exists()
    whole, lora = result.stdout.split()
    assert whole.endswith("shared.safetensors")
    assert lora.endswith("shared_lora.safetensors")
    assert not any("lora" in name for name in load_file(whole))


@pytest.mark.parametrize("more", [[], ["--gradient-checkpointing"]])
def test_score_distillation_does_not_depend_on_how_a_batch_is_spread(
    arguments, tmp_path, model_folder, more
):
    losses = ["--vsd-weight", 1, "--vsd-rank", 2, "--perceptual-weight", 1]
    train(arguments("large", *losses, "--train-batch-size", 4))
    train(arguments("small", *losses, *more, "--gradient-accumulation-steps", 2))
    large, small = (load_file(tmp_path / n / "shared.safetensors") for n in ("large", "small"))
    start = load_pipeline(find_checkpoint(model_folder)).unet.state_dict()
    assert share_of_the_way(small, large, start) < 0.01


def test_a_lora_is_resumed_with_its_score(arguments, tmp_path, monkeypatch):
    more = ["--checkpointing-steps", 2, "--rank", 2, "--vsd-weight", 1, "--vsd-rank", 2]
    train(arguments("whole", *more))
    with monkeypatch.context() as patched:
        patched.setattr(module, "_draw", None)
        patched.setattr(module.Questions, "_batch", stop_after(3, module.Questions._batch))
        assert CliRunner().invoke(main, arguments("parts", *more)).exit_code == 1
    train(arguments("parts", *more))
    whole, parts = (load_file(tmp_path / n / "shared.safetensors") for n in ("whole", "parts"))
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def test_nothing_is_drawn_before_everything_is_checked(arguments, tmp_path, model_folder):
    train(arguments("out"))
    drawn = len([*(tmp_path / "pairs").iterdir()])
    result = CliRunner().invoke(main, arguments("out", "--num-pairs", 200))
    assert result.exit_code == 1
    assert "begun with other settings: pairs 8 (now 200)" in result.stderr
    result = CliRunner().invoke(main, arguments("new", "--num-pairs", 200, "--prompts", "nowhere"))
    assert result.exit_code == 2
    other = tmp_path / "other.safetensors"
    save_file(tiny_unet(layers_per_block=2).state_dict(), other)
    values = arguments("new", "--num-pairs", 200, "--student-weights", other)
    result = CliRunner().invoke(main, values)
    assert result.exit_code == 1
    assert "another architecture" in result.stderr
    assert len([*(tmp_path / "pairs").iterdir()]) == drawn


def test_score_distillation_alone_needs_no_pairs(arguments, tmp_path):
    values = arguments("out", "--latent-weight", 0, "--vsd-weight", 1, "--vsd-rank", 2)
    for name in ("--pairs-dir", "--num-pairs", "--teacher-steps", "--teacher-batch-size"):
        at = values.index(name)
        del values[at : at + 2]
    train(values)
    assert not (tmp_path / "out" / "pairs").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--vsd-rank", 4], "--vsd-rank means nothing without --vsd-weight"),
        (["--fcr-form", "relative"], "--fcr-form means nothing without --fcr-weight"),
        (
            ["--latent-weight", 0, "--vsd-weight", 1],
            "means nothing without --latent-weight or --perceptual-weight",
        ),
        (["--latent-weight", 0], "nothing says what to draw"),
        (["--stride", 9], "between 1"),
        (["--steps", 5000], "between 1 and 1000 steps"),
        (["--fcr-stride", 2, "--fcr-delta-max", 2], "either"),
        (["--cut", "none"], "none"),
    ],
)
def test_what_cannot_be_is_refused(arguments, tmp_path, more, said):
    result = CliRunner().invoke(main, arguments("out", *more))
    assert result.exit_code in (1, 2)
    assert said in result.stderr
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_prompts_are_needed_for_a_model_of_ones_own(arguments, tmp_path):
    values = arguments("out")
    at = values.index("--prompts")
    result = CliRunner().invoke(main, values[:at] + values[at + 2 :])
    assert result.exit_code == 1
    assert "--prompts" in result.stderr
    (tmp_path / "prompts.txt").write_text("\n\n")
    result = CliRunner().invoke(main, values)
    assert "holds no prompt" in result.stderr


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_student_that_makes_the_teachers_calls_is_compared_at_every_segments_end(prediction):
    student = make(steps=10, stride=4, spacing="leading", prediction=prediction)
    teacher = DDIMScheduler.from_config(student.scheduler.config, prediction_type="epsilon")
    assert student.comparable_calls(teacher, 10) == (4, 8, 10)
    assert student.comparable_calls(teacher, 20) == ()
    trailing = DDIMScheduler.from_config(teacher.config, timestep_spacing="trailing")
    assert student.comparable_calls(trailing, 10) == ()
