"""The training loop resumes exactly and stops safely."""

import pytest
import torch
from torch import nn

from encache.errors import EncacheError
from encache.train.loop import Recipe, fit

RECIPE = Recipe(steps=20, learning_rate=0.05, warmup=3, checkpoint_every=7, ema_decay=0.9)


def problem():
    """Fit y = x W with batches drawn by the generator."""
    torch.manual_seed(0)
    model, target = nn.Linear(4, 3), torch.randn(4, 3)

    def loss_terms(generator):
        batch = torch.randn(8, 4, generator=generator)
        return {"squared": (model(batch) - batch @ target).square().mean()}

    return model, loss_terms


def test_learning(tmp_path):
    model, loss_terms = problem()
    before = loss_terms(torch.Generator().manual_seed(9))["squared"]
    recipe = Recipe(steps=300, learning_rate=0.05, warmup=3, ema_decay=0.9)
    fit(model, loss_terms, recipe, tmp_path / "run.pt")
    assert loss_terms(torch.Generator().manual_seed(9))["squared"] < 0.01 * before


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    model, loss_terms = problem()
    average = fit(model, loss_terms, RECIPE, tmp_path / "whole.pt")

    stopped, terms = problem()
    calls = 0

    def stop_at_the_tenth(generator):
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyboardInterrupt
        return terms(generator)

    with pytest.raises(KeyboardInterrupt):
        fit(stopped, stop_at_the_tenth, RECIPE, tmp_path / "parts.pt")
    resumed, terms = problem()
    resumed_average = fit(resumed, terms, RECIPE, tmp_path / "parts.pt")
    for one, other in ((model, resumed), (average, resumed_average)):
        for left, right in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(left, right)


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_checkpoint(tmp_path):
    model, terms = problem()

    def explode(generator):
        scale = float("nan") if explode.calls == 9 else 1.0
        explode.calls += 1
        return {name: scale * value for name, value in terms(generator).items()}

    explode.calls = 0
    with pytest.raises(EncacheError, match="nan at step 9"):
        fit(model, explode, RECIPE, tmp_path / "run.pt")
    assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 7


def test_learning_rate_rises_stays_and_falls():
    recipe = Recipe(steps=100, learning_rate=1.0, warmup=10, decay_fraction=0.2)
    rates = [recipe.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == [1.0] * 71
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)


@pytest.mark.parametrize("damage", ["truncated", "another model"])
def test_a_foreign_checkpoint_is_refused(tmp_path, damage):
    path = tmp_path / "run.pt"
    model, terms = problem()
    fit(model, terms, RECIPE, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    else:
        model = nn.Linear(5, 5)
    with pytest.raises(EncacheError, match="Delete it to start over"):
        fit(model, terms, RECIPE, path)


def test_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(EncacheError, match="free some space"):
        fit(*problem(), RECIPE, tmp_path / "run.pt")
    assert not list(tmp_path.iterdir())


def test_no_half_written_checkpoint(tmp_path):
    model, terms = problem()
    fit(model, terms, RECIPE, tmp_path / "run.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
