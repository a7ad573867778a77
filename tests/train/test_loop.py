"""The training loop resumes exactly and stops safely."""

import itertools
import sys
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from encache.errors import EncacheError
from encache.train.loop import Losses, Recipe, ahead, averaged, fit, generator_of, step_generators

RECIPE = Recipe(steps=20, learning_rate=0.05, warmup=3, checkpoint_every=7, ema_decay=0.9)


def problem():
    """Fit y = x W with batches drawn by the generator."""
    torch.manual_seed(0)
    model, target = nn.Linear(4, 3), torch.randn(4, 3)

    def compute_losses(module, generator):
        batch = torch.randn(8, 4, generator=generator)
        return Losses({"squared": (module(batch) - batch @ target).square().mean()})

    return model, step_generators(), compute_losses


def loss_of(model, compute_losses):
    return compute_losses(model, generator_of(9, 9)).terms["squared"]


def stop_before_step(number, compute_losses):
    calls = 0

    def stop(module, generator):
        nonlocal calls
        calls += 1
        if calls == number + 1:
            raise KeyboardInterrupt
        return compute_losses(module, generator)

    return stop


def test_learning(tmp_path):
    model, batches, losses = problem()
    before = loss_of(model, losses)
    recipe = Recipe(steps=300, learning_rate=0.05, warmup=3, ema_decay=0.9)
    fit(model, batches, losses, recipe, tmp_path / "run.pt")
    assert loss_of(model, losses) < 0.01 * before


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    model, batches, losses = problem()
    fit(model, batches, losses, RECIPE, tmp_path / "whole.pt")

    stopped, batches, losses = problem()
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, batches, stop_before_step(9, losses), RECIPE, tmp_path / "parts.pt")
    assert torch.load(tmp_path / "parts.pt", weights_only=True)["step"] == 7
    resumed, batches, losses = problem()
    fit(resumed, batches, losses, RECIPE, tmp_path / "parts.pt")
    for left, right in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)
    whole, parts = (
        torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "parts.pt")
    )
    assert parts.pop("identity") == whole.pop("identity")
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def test_the_written_weights_are_the_averaged_ones(tmp_path):
    model, batches, losses = problem()
    fit(model, batches, losses, RECIPE, tmp_path / "run.pt")
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert torch.equal(model.weight, state["average"]["weight"])
    assert not torch.equal(model.weight, state["model"]["weight"])
    with averaged(model, state["model"]):
        assert torch.equal(model.weight, state["model"]["weight"])
    assert torch.equal(model.weight, state["average"]["weight"])


def test_the_average_follows_its_formula(tmp_path):
    model, batches, losses = problem()
    expected, path = model.weight.detach().clone(), []

    def record(step, means, average):
        path.append(model.weight.detach().clone())

    fit(model, batches, losses, RECIPE, tmp_path / "run.pt", on_step=record)
    for step, weight in enumerate(path):
        decay = min(0.9, (step + 1) / (step + 10))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(model.weight.detach(), expected)


def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path):
    large, batches, losses = problem()
    fit(large, batches, losses, RECIPE, tmp_path / "large.pt")

    def halves(start):
        for generator in batches(start):
            drawn = torch.randn(8, 4, generator=generator)
            yield from drawn.split(4)

    small, _, _ = problem()
    torch.manual_seed(0)
    nn.Linear(4, 3)
    target = torch.randn(4, 3)
    recipe = replace(RECIPE, accumulation=2)
    fit(
        small,
        halves,
        lambda module, x: Losses({"squared": (module(x) - x @ target).square().mean()}),
        recipe,
        tmp_path / "small.pt",
    )
    torch.testing.assert_close(small.weight, large.weight, rtol=1e-4, atol=1e-6)


def test_frozen_parameters_stay(tmp_path):
    model, batches, losses = problem()
    model.bias.requires_grad_(False)
    before = model.bias.clone()
    fit(model, batches, losses, RECIPE, tmp_path / "run.pt")
    assert torch.equal(model.bias, before)
    assert torch.load(tmp_path / "run.pt", weights_only=True)["model"].keys() == {"weight"}


def test_a_log_file_is_not_filled_with_bars(tmp_path, capfd):
    fit(*problem(), RECIPE, tmp_path / "run.pt")
    assert capfd.readouterr().err == ""


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_checkpoint(tmp_path):
    model, batches, losses = problem()
    calls = 0

    def explode(module, generator):
        nonlocal calls
        calls += 1
        factor = float("nan") if calls == 10 else 1.0
        return Losses({"squared": factor * losses(module, generator).terms["squared"]})

    with pytest.raises(EncacheError, match="nan at step 9"):
        fit(model, batches, explode, RECIPE, tmp_path / "run.pt")
    assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 7


def test_random_numbers_depend_on_every_coordinate():
    places = [(0, 0), (0, 1), (1, 0), (0, 0, 1)]
    drawn = [torch.randn(4, generator=generator_of(*place)) for place in places]
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == len(places)
    assert torch.equal(drawn[1], torch.randn(4, generator=generator_of(0, 1)))


def test_learning_rate_rises_stays_and_falls():
    recipe = Recipe(steps=100, learning_rate=1.0, warmup=10, decay_fraction=0.2)
    rates = [recipe.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == [1.0] * 71
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)
    constant = Recipe(steps=100, learning_rate=1.0, warmup=10, schedule="constant")
    assert constant.learning_rate_at(99) == 1.0
    cosine = Recipe(steps=100, learning_rate=1.0, warmup=1, schedule="cosine", decay_fraction=1.0)
    assert cosine.learning_rate_at(50) == pytest.approx(0.5)


@pytest.mark.parametrize("damage", ["truncated", "another model"])
def test_a_foreign_checkpoint_is_refused(tmp_path, damage):
    path = tmp_path / "run.pt"
    model, *rest = problem()
    fit(model, *rest, RECIPE, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    else:
        model = nn.Linear(5, 5)
    with pytest.raises(EncacheError, match="Delete it to start over"):
        fit(model, *rest, RECIPE, path)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    fit(*problem(), RECIPE, tmp_path / "run.pt", identity={"weight": 0.1, "seed": 3})
    with pytest.raises(EncacheError, match=r"settings: weight 0\.1 \(now 0\.2\)\. Repeat"):
        fit(*problem(), RECIPE, tmp_path / "run.pt", identity={"weight": 0.2, "seed": 3})


def test_a_checkpoint_beyond_the_asked_steps_is_refused(tmp_path):
    fit(*problem(), RECIPE, tmp_path / "run.pt")
    with pytest.raises(EncacheError, match="20 steps already, more than the 10"):
        fit(*problem(), replace(RECIPE, steps=10), tmp_path / "run.pt")


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    model, batches, losses = problem()

    def steep(module, generator):
        loss = losses(module, generator).terms["squared"]
        zero = (module.weight - module.weight.detach()).sum()
        return Losses({"squared": loss, "root": zero.abs().sqrt()})  # 0, with an infinite slope

    with pytest.raises(EncacheError, match="norm of its gradient nan"):
        fit(model, batches, steep, RECIPE, tmp_path / "run.pt")
    assert not (tmp_path / "run.pt").exists()


def test_no_clipping(tmp_path):
    free, clipped = problem(), problem()
    fit(*free, replace(RECIPE, gradient_clip=0.0), tmp_path / "free.pt")
    fit(*clipped, replace(RECIPE, gradient_clip=1e9), tmp_path / "clipped.pt")
    assert torch.equal(free[0].weight, clipped[0].weight)


def test_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(EncacheError, match="free some space"):
        fit(*problem(), RECIPE, tmp_path / "run.pt")
    assert not list(tmp_path.iterdir())


def test_no_half_written_checkpoint(tmp_path):
    fit(*problem(), RECIPE, tmp_path / "run.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_8bit_adam_without_bitsandbytes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(EncacheError, match="pip install bitsandbytes"):
        fit(*problem(), replace(RECIPE, use_8bit_adam=True), tmp_path / "run.pt")


def test_batches_made_ahead_are_the_same():
    batches = ahead(iter(range(5)))
    assert [next(batches) for _ in range(4)] == [0, 1, 2, 3]


def test_an_error_of_a_batch_made_ahead_comes_with_that_batch():
    def source():
        yield 0
        raise EncacheError("a damaged pair")

    batches = ahead(source())
    assert next(batches) == 0
    with pytest.raises(EncacheError, match="a damaged pair"):
        next(batches)


def test_no_thread_outlives_the_batches_made_ahead():
    before = threading.active_count()
    batches = ahead(itertools.count())
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before
