"""The one training loop: any model, any sum of loss terms, exact resume."""

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from encache.errors import EncacheError

#: Draws its own batch with the generator and returns the terms whose sum is minimised.
LossTerms = Callable[[torch.Generator], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to learn.

    The learning rate warms up over `warmup` steps, stays, and falls linearly to zero over the last
    `decay_fraction` of `steps`, so a run may be prolonged from any checkpoint before the fall.
    """

    steps: int
    learning_rate: float
    warmup: int = 200
    decay_fraction: float = 0.25
    weight_decay: float = 0.0
    ema_decay: float = 0.999
    gradient_clip: float = 1.0
    checkpoint_every: int = 250

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of the step with this index."""
        rise = (step + 1) / max(self.warmup, 1)
        fall = (self.steps - step) / max(self.decay_fraction * self.steps, 1)
        return self.learning_rate * min(1.0, rise, fall)


def fit(
    model: nn.Module, loss_terms: LossTerms, recipe: Recipe, checkpoint: Path, seed: int = 0
) -> nn.Module:
    """Minimise the sum of `loss_terms` over the parameters of `model`; return the averaged copy.

    `checkpoint` holds everything that the next step depends on; when it exists the run goes on
    from it and ends with the same weights as an uninterrupted one.

    Raises:
        EncacheError: the loss is not finite; the last checkpoint is kept.
    """
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    generator = torch.Generator().manual_seed(seed)
    start = _restore(checkpoint, model, average, optimizer, generator)
    model.train()
    bar = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, desc=checkpoint.stem)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(step)
        terms = loss_terms(generator)
        loss = torch.stack(tuple(terms.values())).sum()
        if not torch.isfinite(loss):
            raise EncacheError(f"The loss is {loss.item()} at step {step}; kept {checkpoint}.")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
        optimizer.step()
        _move_average(average, model, min(recipe.ema_decay, (step + 1) / (step + 10)))
        if step % 20 == 0:
            bar.set_postfix({name: f"{value.item():.4f}" for name, value in terms.items()})
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
            _save(checkpoint, step + 1, model, average, optimizer, generator)
    return average.eval()


@torch.no_grad()
def _move_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def _save(
    checkpoint: Path,
    step: int,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
    }
    temporary = checkpoint.with_suffix(".tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, checkpoint)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise EncacheError(
            f"{checkpoint} could not be written at step {step} ({str(error).splitlines()[0]}): "
            "free some space, then run the same command again."
        ) from error


def _restore(
    checkpoint: Path,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> int:
    if not checkpoint.exists():
        return 0
    try:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        return state["step"]
    except Exception as error:  # a damaged archive, or one of another model
        raise EncacheError(
            f"{checkpoint} is no checkpoint of this run ({str(error).splitlines()[0]}). Delete it "
            "to start over."
        ) from error
