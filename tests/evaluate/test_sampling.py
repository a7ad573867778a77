"""An evaluation against the samplers it stands for, and what a repeated one computes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch.nn.functional import mse_loss

from encache.errors import EncacheError
from encache.evaluate.distribution import frechet_distance
from encache.evaluate.drift import measure_drift
from encache.evaluate.extractors import Extracted, Extractor
from encache.evaluate.fidelity import psnr
from encache.evaluate.fit import widen
from encache.evaluate.rows import make_row, plain_at_equal_arithmetic
from encache.evaluate.sampling import Backend, Evaluation, Model, relative_error, ssim
from encache.evaluate.settings import Protocol, Setting, cached_settings, read_prompts
from encache.evaluate.store import Store
from encache.model.checkpoint import find_checkpoint
from encache.model.split import Halves
from encache.runtime.pipeline import EncachePipeline

FULL = Setting("tiny", "", 10)
CACHED = Setting("tiny", "", 10, "mid", "reuse", 5)
PROTOCOL = Protocol(("red apple", "hot dog", "green pear"), 5, 3.0, batch_size=2)


@pytest.fixture
def evaluation(model_folder, tmp_path):
    model = Model(find_checkpoint(model_folder), Backend())
    return Evaluation({"tiny": model}, PROTOCOL, Store(tmp_path / "store"))


def noise(seed):
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_the_full_sampler_is_diffusers(evaluation, model_folder):
    plain = StableDiffusionPipeline.from_pretrained(model_folder, safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    for pictures in PROTOCOL.batches:
        drawn = torch.from_numpy(evaluation.latents(FULL, pictures)["latents"])
        for row, index in enumerate(pictures):
            expected = plain(
                PROTOCOL.prompts[index % 3],
                latents=noise(index),
                num_inference_steps=10,
                guidance_scale=3.0,
                output_type="latent",
            ).images
            torch.testing.assert_close(drawn[row : row + 1], expected, rtol=1e-3, atol=1e-3)


def test_pictures_do_not_depend_on_their_batch(evaluation, model_folder, tmp_path):
    alone = Evaluation(
        evaluation.models,
        Protocol(PROTOCOL.prompts, 5, 3.0, batch_size=1),
        Store(tmp_path / "other"),
    )
    together = evaluation.latents(CACHED, range(2, 4))["latents"]
    for row, index in enumerate((2, 3)):
        single = alone.latents(CACHED, range(index, index + 1))["latents"]
        np.testing.assert_allclose(single[0], together[row], rtol=1e-3, atol=1e-3)


def test_comparison_follows_its_formulas(evaluation):
    pictures = PROTOCOL.batches[0]
    ours, theirs = (evaluation.latents(one, pictures)["latents"] for one in (CACHED, FULL))
    drawn, wanted = (evaluation.pictures(one, pictures) for one in (CACHED, FULL))
    compared = evaluation.compare(CACHED, FULL, pictures)
    for row in range(2):
        error = np.sum((ours[row] - theirs[row]) ** 2) / np.sum(theirs[row] ** 2)
        assert compared["latent_error"][row] == pytest.approx(error, rel=1e-5)
        decibels = 10 * np.log10(1 / mse_loss(drawn[row], wanted[row]).item())
        assert compared["psnr"][row] == pytest.approx(decibels, rel=1e-4)
    assert (evaluation.compare(FULL, FULL, pictures)["latent_error"] == 0).all()
    assert (evaluation.compare(FULL, FULL, pictures)["ssim"] > 0.9999).all()


def test_ssim_of_known_pictures():
    torch.manual_seed(0)
    pictures = torch.rand(2, 3, 32, 32)
    assert ssim(pictures, pictures).tolist() == pytest.approx([1.0, 1.0])
    constant = torch.full((1, 3, 32, 32), 0.5)
    # Two constants differ in luminance alone: (2ab + c) / (a^2 + b^2 + c) with c = 0.01^2.
    expected = (2 * 0.5 * 0.25 + 1e-4) / (0.5**2 + 0.25**2 + 1e-4)
    assert ssim(constant, constant / 2).tolist() == pytest.approx([expected], rel=1e-3)
    assert psnr(constant.numpy(), constant.numpy()).tolist() == [99.0]


def test_divergence_is_infinite_error():
    reference = np.ones((2, 4, 8, 8), np.float32)
    broken = reference.copy()
    broken[0, 0, 0, 0] = np.nan
    assert relative_error(broken, reference).tolist() == [np.inf, 0.0]


def test_a_repeated_evaluation_draws_nothing(evaluation, monkeypatch):
    first = [evaluation.compare(CACHED, FULL, one) for one in PROTOCOL.batches]
    evaluation.pictures.cache_clear()
    monkeypatch.setattr(EncachePipeline, "__call__", None)  # any drawing would fail
    again = [evaluation.compare(CACHED, FULL, one) for one in PROTOCOL.batches]
    for left, right in zip(first, again, strict=True):
        assert all(np.array_equal(left[name], right[name]) for name in left)


def test_a_damaged_result_is_made_anew(tmp_path):
    store = Store(tmp_path)
    made = store.get({"what": 1}, lambda: {"x": np.arange(3)})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:40])
    again = store.get({"what": 1}, lambda: {"x": np.arange(3)})
    assert np.array_equal(made["x"], again["x"])
    kept = store.get({"what": 1}, lambda: {"x": np.zeros(1)})
    assert np.array_equal(kept["x"], np.arange(3))
    other = store.get({"what": 2}, lambda: {"x": np.zeros(1)})
    assert len(other["x"]) == 1


def test_nothing_pickled_is_read_from_the_store(tmp_path):
    store = Store(tmp_path)
    store.get({"what": 1}, lambda: {"x": np.arange(3)})
    (path,) = tmp_path.iterdir()
    np.savez(path, x=np.array([{"code": print}], dtype=object))
    assert np.array_equal(store.get({"what": 1}, lambda: {"x": np.ones(1)})["x"], [1.0])


def test_a_row_counts_what_its_plan_runs(evaluation):
    row = make_row(evaluation, CACHED, FULL, FULL)
    arithmetic = evaluation.models["tiny"].arithmetic("mid", PROTOCOL)
    assert (row.encoder_runs, row.num_calls, row.key_calls) == (2, 10, (0, 5))
    # Two rows per picture: with the prompt and without.
    assert row.gflop == pytest.approx(2 * (2 * arithmetic.encoder + 10 * arithmetic.decoder))
    whole = evaluation.models["tiny"].arithmetic(FULL.cut, PROTOCOL)
    assert row.share == pytest.approx(row.gflop / (20 * whole.full))
    assert row.latent_error.low <= row.latent_error.mean <= row.latent_error.high
    assert row.num_images == 5
    full = make_row(evaluation, FULL, FULL, FULL)
    assert (full.share, full.latent_error, full.plain) == (1.0, None, True)


def test_a_fitted_plan_is_one_more_setting(evaluation):
    """Here one that nothing was fitted in: the rule's own numbers, over a wider history."""
    rule = Setting("tiny", "", 10, "none", "extrapolate", 4)
    wide = widen(evaluation.models["tiny"].plan(rule), ("apart", "conditional", "apart"), 3.0)
    same = widen(evaluation.models["tiny"].plan(rule), ("apart",) * 3, 3.0)
    fitted, sparse = (replace(FULL, fitted=plan) for plan in (same, wide))
    assert not fitted.plain
    assert len({FULL.name, fitted.name, sparse.name}) == 3
    for pictures in PROTOCOL.batches:
        ours, theirs = (evaluation.latents(one, pictures)["latents"] for one in (fitted, rule))
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    rows = [make_row(evaluation, one, FULL, FULL) for one in (rule, fitted, sparse)]
    assert rows[0].latent_error.mean == pytest.approx(rows[1].latent_error.mean, rel=1e-3)
    assert [row.encoder_runs for row in rows] == [3, 3, 3]
    # Six rows of twenty; one less where one call runs a single branch.
    assert [row.share for row in rows] == pytest.approx([6 / 20, 6 / 20, 5 / 20])


def test_what_a_network_sees_is_compared_with_the_full_sampler(evaluation):
    features = [torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 8, 3, stride=2)]

    def layers(pictures):
        first = features[0](pictures)
        return [first, features[1](first)]

    def network(pictures):
        return Extracted(layers(pictures)[1].mean((2, 3)))

    evaluation.extractor = Extractor("small", network, "cpu", layers)
    row = make_row(evaluation, CACHED, FULL, FULL)
    drawn, wanted = (
        torch.cat([evaluation.pictures(one, batch) for batch in PROTOCOL.batches])
        for one in (CACHED, FULL)
    )
    with torch.no_grad():
        pairs = [*zip(layers(drawn), layers(wanted), strict=True)]
        expected = sum(
            (2 - 2 * torch.cosine_similarity(ours, theirs, 1)).mean().item()
            for ours, theirs in pairs
        )
        ours, theirs = (one.mean((2, 3)).numpy() for one in pairs[1])
    assert row.perceptual.mean == pytest.approx(expected, rel=1e-4)
    assert row.frechet_to_full == pytest.approx(frechet_distance(ours, theirs), rel=1e-3)
    full = make_row(evaluation, FULL, FULL, FULL)
    assert (full.perceptual, full.frechet_to_full) == (None, None)


def test_the_opponent_has_at_most_the_same_arithmetic(evaluation):
    for setting in (CACHED, Setting("tiny", "", 10, "up2", "extrapolate", 3)):
        opponent = plain_at_equal_arithmetic(evaluation.models, PROTOCOL, setting, FULL)
        ours, theirs = (make_row(evaluation, one, FULL, FULL).gflop for one in (setting, opponent))
        one_more = theirs * (opponent.steps + 1) / opponent.steps
        assert theirs <= ours * (1 + 1e-6) < one_more * (1 + 1e-6)


def test_the_ratio_to_the_opponent_is_paired(evaluation):
    opponent = plain_at_equal_arithmetic(evaluation.models, PROTOCOL, CACHED, FULL)
    row = make_row(evaluation, CACHED, FULL, FULL, opponent)
    ours, theirs = (
        np.concatenate(
            [evaluation.compare(one, FULL, batch)["latent_error"] for batch in PROTOCOL.batches]
        )
        for one in (CACHED, opponent)
    )
    assert row.opponent == opponent.name
    assert row.times_plain.mean == pytest.approx(ours.mean() / theirs.mean())
    assert row.times_plain.low <= row.times_plain.mean <= row.times_plain.high
    assert make_row(evaluation, CACHED, FULL, FULL, FULL).times_plain is None


def test_drift_equals_features_of_a_stepped_sampler(model_folder):
    plain = StableDiffusionPipeline.from_pretrained(model_folder, safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    drift = measure_drift(
        EncachePipeline.from_pipe(plain, "mid"),
        ["red apple"],
        [0],
        num_inference_steps=6,
        guidance_scale=1.0,
    )
    halves = Halves(plain.unet, "mid")
    text = plain.encode_prompt("red apple", "cpu", 1, False)[0]
    scheduler, latents, features, moved = plain.scheduler, noise(0), [], []
    scheduler.set_timesteps(6)
    following = [*scheduler.timesteps[1:], None]
    with torch.no_grad():
        for timestep, later in zip(scheduler.timesteps, following, strict=True):
            features.append(halves.encoder(latents, timestep[None], {"text": text}))
            if later is not None:
                moved.append(halves.encoder(latents, later[None], {"text": text}))
            output = plain.unet(latents, timestep, text).sample
            latents = scheduler.step(output, timestep, latents).prev_sample
    assert drift.lags == (1, 2, 3, 5)
    for index, feature in enumerate(halves.features):
        tensors = [one[index] for one in features]
        changes = [
            ((now - before) ** 2).sum().item() / (now**2).sum().item()
            for before, now in zip(tensors[:-2], tensors[2:], strict=True)
        ]
        assert drift.by_tensor[feature.name][1] == pytest.approx(np.mean(changes), rel=1e-3)
        misses = [
            ((now - (2 * near - far)) ** 2).sum().item() / (now**2).sum().item()
            for far, near, now in zip(tensors[:-4], tensors[2:-2], tensors[4:], strict=True)
        ]
        assert drift.extrapolated[feature.name][1] == pytest.approx(np.mean(misses), rel=1e-3)
        assert len(drift.by_call[feature.name]) == 5
        by_time = [
            ((now[index] - before[index]) ** 2).sum().item() / (now[index] ** 2).sum().item()
            for now, before in zip(moved, features[:-1], strict=True)
        ]
        assert drift.by_time[feature.name] == pytest.approx(by_time, rel=1e-3)


def test_prompts_and_seeds_repeat():
    assert PROTOCOL.batches == [range(0, 2), range(2, 4), range(4, 5)]
    assert PROTOCOL.prompts_of(range(2, 5)) == ["green pear", "red apple", "hot dog"]


def test_names_tell_settings_apart():
    settings = [
        FULL,
        CACHED,
        Setting("tiny", "dpmsolver++", 10),
        Setting("tiny", "", 10, "mid", "reuse", 1, (0, 3)),
        Setting("tiny", "", 10, "mid", "reuse", 5, prior_noise=True),
        Setting("tiny", "", 10, "up2", "reuse", 5),
    ]
    assert len({one.name for one in settings}) == len(settings)
    assert FULL.plain
    assert not settings[3].plain


def test_settings_are_a_product():
    listed = cached_settings([FULL], ["mid", "up2"], ["reuse"], [5], [(0, 3)], [False, True])
    assert len(set(listed)) == 8
    assert {one.key_calls for one in listed} == {None, (0, 3)}
    assert not any(one.plain for one in listed)


def test_reading_prompts(tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("red apple\n\n  hot dog \n")
    assert read_prompts(lines) == ["red apple", "hot dog"]
    coco = tmp_path / "captions.json"
    coco.write_text('{"annotations": [{"caption": "A cat. "}, {"caption": "A dog."}]}')
    assert sorted(read_prompts(coco)) == ["A cat.", "A dog."]
    for text in ("", "\n\n"):
        lines.write_text(text)
        with pytest.raises(EncacheError, match="no prompt"):
            read_prompts(lines)
    for text in ('{"images": []}', "[]", "{", "[" * 10_000, '{"annotations": [{"caption": 7}]}'):
        coco.write_text(text)
        with pytest.raises(EncacheError, match="COCO"):
            read_prompts(coco)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_by_any_editor(tmp_path, encoding):
    lines = tmp_path / "prompts.txt"
    lines.write_bytes("a café\u2028au lait\r\n\r\nnext\x85line\rhot dog".encode(encoding))
    assert read_prompts(lines) == ["a café\u2028au lait", "next\x85line", "hot dog"]
    coco = tmp_path / "captions.JSON"
    coco.write_bytes('{"annotations": [{"caption": "Café."}, {"caption": " "}]}'.encode(encoding))
    assert read_prompts(coco) == ["Café."]


@pytest.mark.parametrize("name", ["prompts.txt", "captions.json"])
def test_prompts_that_are_no_text_are_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b'{"annotations":\n"caf\xe9"}')
    with pytest.raises(EncacheError, match=rf"{name} is not UTF-8 text \(line 2"):
        read_prompts(path)
