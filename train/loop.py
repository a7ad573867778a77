"""The one training loop: any model, any sum of loss terms, any devices, exact resume.

Nothing random survives a step: whoever makes the batches draws them from `generator_of`, so step
k sees the same numbers in a resumed run, with several processes, and with gradient accumulation.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from encache.errors import EncacheError
from encache.progress import progress

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Losses:
    """Scalars of one batch: the sum of `terms` is minimised, `watched` is only logged."""

    terms: Mapping[str, Tensor]
    watched: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to learn.

    The learning rate warms up over `warmup` steps, stays, and falls to zero over the last
    `decay_fraction` of `steps`, so a run may be prolonged from any checkpoint before the fall.

    Attributes:
        schedule: how it falls; "constant" never does.
        ema_decay: of the averaged weights; 0 keeps the last ones.
        gradient_clip: largest norm of the gradient; 0 for any.
        accumulation: batches per step.
    """

    steps: int
    learning_rate: float
    warmup: int = 200
    schedule: Schedule = "linear"
    decay_fraction: float = 0.25
    weight_decay: float = 0.0
    ema_decay: float = 0.999
    gradient_clip: float = 1.0
    accumulation: int = 1
    checkpoint_every: int = 250
    use_8bit_adam: bool = False

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of the step with this index."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        left = min(1.0, (self.steps - step) / max(self.decay_fraction * self.steps, 1))
        fall = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
        return self.learning_rate * min(rise, fall[self.schedule])

    def ema_decay_at(self, step: int) -> float:
        """Small at first, so that the average forgets the start."""
        return min(self.ema_decay, (step + 1) / (step + 10))


def digest(tensor: Tensor) -> str:
    """Sixteen hexadecimal digits that name the contents of a CPU tensor of any shape."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


#: Yields the batches of one process from the given step on, `accumulation` for every step, and
#: never ends.
Batches = Callable[[int], Iterator[Any]]
#: To which group a parameter belongs, by its name, and the multiple of the learning rate with which
#: that group learns. The gradients of a group are clipped together.
GroupOf = Callable[[str], tuple[str, float]]
#: Told of every step: its index, the mean losses over all processes, and the averaged weights.
OnStep = Callable[[int, Mapping[str, float], Mapping[str, Tensor]], None]


def generator_of(*coordinates: int) -> torch.Generator:
    """The random numbers of one place in a run, such as (seed, step), each below 2**32."""
    # torch keeps 32 bits of a seed, so the coordinates must be mixed, not packed.
    mixed = np.random.SeedSequence(coordinates).generate_state(1).item()
    return torch.Generator().manual_seed(mixed)


def spread(
    batch: int, batch_size: int, accumulation: int, process: int, num_processes: int
) -> tuple[int, range]:
    """The step that a process's batch number `batch` belongs to, and its rows in that step.

    A step's rows are numbered through, however they are spread over batches and processes.
    """
    step, part = divmod(batch, accumulation)
    first = (part * num_processes + process) * batch_size
    return step, range(first, first + batch_size)


def step_generators(seed: int = 0) -> Batches:
    """Batches for losses that draw their own data: the bare generators."""

    def generators(start: int) -> Iterator[torch.Generator]:
        while True:
            yield generator_of(seed, start)
            start += 1

    return generators


def fit(
    model: nn.Module,
    batches: Batches,
    compute_losses: Callable[[nn.Module, Any], Losses],
    recipe: Recipe,
    checkpoint: Path,
    *,
    accelerator: Accelerator | None = None,
    identity: Mapping[str, Any] | None = None,
    on_step: OnStep | None = None,
    group_of: GroupOf = lambda name: ("all", 1.0),
) -> None:
    """Minimise the losses over the trainable parameters of `model`; leave the average in it.

    Args:
        model: moved to the accelerator's device.
        batches: see `Batches`.
        compute_losses: of the model (as prepared for several processes) and one batch.
        recipe: how.
        checkpoint: holds everything that the next step depends on; when it exists the run goes on
            from it and ends with the same weights as an uninterrupted one.
        accelerator: processes, device and precision; by default accelerate's choice.
        identity: settings that a checkpoint must share to be gone on from.
        on_step: for logs and validation.
        group_of: see `GroupOf`; by default all parameters learn alike.

    Raises:
        EncacheError: the loss or its gradient is not finite (the last checkpoint is kept), or the
            checkpoint belongs to another run or could not be written.
    """
    accelerator = accelerator or Accelerator()
    _refuse_unsupported(accelerator)
    accelerator.gradient_accumulation_steps = 1  # done here; the environment may say otherwise
    model.to(accelerator.device).train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    average = {name: p.detach().clone() for name, p in parameters.items()}
    prepared, optimizer = accelerator.prepare(model, _make_optimizer(parameters, recipe, group_of))
    rates = list(dict(map(group_of, parameters)).values())  # in the order of the groups
    run = _Run(checkpoint, identity or {}, parameters, average, optimizer, accelerator)
    start = run.restore(recipe.steps)
    bar = progress(
        range(start, recipe.steps),
        initial=start,
        total=recipe.steps,
        desc=checkpoint.stem,
        disable=not accelerator.is_main_process,
    )
    source = batches(start)
    if accelerator.device.type != "cpu":
        source = ahead(source)
    for step in bar:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = recipe.learning_rate_at(step) * rate
        losses = _accumulate(accelerator, prepared, source, compute_losses, recipe.accumulation)
        norm = _clip(accelerator, optimizer, recipe.gradient_clip or math.inf)
        # fp16's scaler skips steps whose gradient overflows, and that is no failure.
        if not math.isfinite(losses["loss"] if accelerator.scaler else losses["loss"] + norm):
            raise EncacheError(
                f"The loss is {losses['loss']} at step {step}, the norm of its gradient {norm}; "
                f"the last good checkpoint is kept ({checkpoint}). Lower the learning rate or use "
                "another precision."
            )
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(
            list(average.values()),
            [p.detach() for p in parameters.values()],
            1 - recipe.ema_decay_at(step),
        )
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {losses['loss']:.4f}")
        if on_step:  # before the checkpoint, so that a stop inside it is made up for
            on_step(step, losses, average)
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
            run.save(step + 1)
    _copy(average, parameters)
    model.eval()


def ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same endless batches, each made in a thread while the one before is learned from."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, batches)
        while True:
            batch = following.result()
            following = thread.submit(next, batches)
            yield batch


@contextmanager
def averaged(model: nn.Module, average: Mapping[str, Tensor]) -> Iterator[None]:
    """Let `model` have the averaged weights inside a `with`."""
    parameters = {name: p for name, p in model.named_parameters() if name in average}
    last = {name: p.detach().clone() for name, p in parameters.items()}
    training = model.training
    _copy(average, parameters)
    model.eval()
    try:
        yield
    finally:
        _copy(last, parameters)
        model.train(training)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _make_optimizer(
    parameters: Mapping[str, nn.Parameter], recipe: Recipe, group_of: GroupOf
) -> Any:
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        label, rate = group_of(name)
        group = groups.setdefault(label, {"params": [], "lr": rate * recipe.learning_rate})
        group["params"].append(parameter)
    options: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if not recipe.use_8bit_adam:
        return torch.optim.AdamW(groups.values(), **options, fused=True)
    try:
        import bitsandbytes
    except ImportError as error:
        raise EncacheError(
            "8-bit Adam needs bitsandbytes and a CUDA GPU: pip install bitsandbytes, or leave out "
            "--use-8bit-adam."
        ) from error
    return bitsandbytes.optim.AdamW8bit(groups.values(), **options)


def _clip(accelerator: Accelerator, optimizer: Any, largest: float) -> float:
    """Clip the gradients of each group to a norm of `largest`; return the largest norm found."""
    # A scaler's gradients are unscaled once, for all groups.
    accelerator.unscale_gradients(optimizer)
    norms = [nn.utils.clip_grad_norm_(group["params"], largest) for group in optimizer.param_groups]
    return torch.stack(norms).max().item()  # NaN if any of them is


def _accumulate(
    accelerator: Accelerator,
    model: nn.Module,
    source: Iterator[Any],
    compute_losses: Callable[[nn.Module, Any], Losses],
    accumulation: int,
) -> dict[str, float]:
    """Add up the gradients of one step; return its mean losses, `loss` being their sum."""
    totals: dict[str, Tensor] = {}
    for last in [False] * (accumulation - 1) + [True]:
        with nullcontext() if last else accelerator.no_sync(model):
            losses = compute_losses(model, next(source))
            loss = torch.stack(tuple(losses.terms.values())).sum() / accumulation
            accelerator.backward(loss)
        for name, value in {**losses.terms, **losses.watched, "loss": loss * accumulation}.items():
            totals[name] = totals.get(name, 0) + value.detach().float() / accumulation
    means = accelerator.reduce(torch.stack(list(totals.values())), "mean")
    return dict(zip(totals, means.tolist(), strict=True))


@dataclass
class _Run:
    """What a checkpoint holds and where it lies."""

    checkpoint: Path
    identity: Mapping[str, Any]
    parameters: Mapping[str, nn.Parameter]
    average: Mapping[str, Tensor]
    optimizer: Any
    accelerator: Accelerator

    def save(self, step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": step,
            "identity": json.dumps(self.identity),
            "model": {name: p.detach() for name, p in self.parameters.items()},
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        if self.accelerator.scaler:
            state["scaler"] = self.accelerator.scaler.state_dict()
        temporary = self.checkpoint.with_suffix(".tmp")
        try:
            torch.save(state, temporary)
            os.replace(temporary, self.checkpoint)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            temporary.unlink(missing_ok=True)
            raise EncacheError(
                f"{self.checkpoint} could not be written at step {step} "
                f"({str(error).splitlines()[0]}): free some space, then run the same command again."
            ) from error

    def restore(self, steps: int) -> int:
        """Load the checkpoint, if there is one; return the next step of `steps`."""
        step = self._load() if self.checkpoint.exists() else 0
        if step > steps:
            raise EncacheError(
                f"{self.checkpoint} holds {step} steps already, more than the {steps} asked for. "
                "Choose another folder, or delete it to start over."
            )
        everywhere = self.accelerator.gather(torch.tensor([step], device=self.accelerator.device))
        if len(set(everywhere.tolist())) > 1:
            raise EncacheError(
                f"Not every process finds {self.checkpoint}: put it where all nodes can read it."
            )
        return step

    def _load(self) -> int:
        state = _read(self.checkpoint, self.identity)
        try:
            _copy(state["model"], self.parameters)
            _copy(state["average"], self.average)
            self.optimizer.load_state_dict(state["optimizer"])
            if self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            return state["step"]
        except Exception as error:  # one of another model
            raise _no_checkpoint(self.checkpoint, error) from error


def check_identity(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Raise EncacheError if there is a checkpoint that a run of this identity cannot go on from."""
    if checkpoint.exists():
        _read(checkpoint, identity)


def _read(checkpoint: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint of this identity holds, or EncacheError."""
    try:
        # Mapped, so that several processes of a machine share one copy.
        state = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)
        theirs, ours = json.loads(state["identity"]), json.loads(json.dumps(identity))
    except Exception as error:  # a damaged archive
        raise _no_checkpoint(checkpoint, error) from error
    different = ", ".join(
        f"{name} {theirs.get(name)} (now {ours.get(name)})"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    )
    if different:
        raise EncacheError(
            f"{checkpoint} was begun with other settings: {different}. Repeat those, choose "
            "another folder, or delete it to start over."
        )
    return state


def _no_checkpoint(checkpoint: Path, error: Exception) -> EncacheError:
    return EncacheError(
        f"{checkpoint} is no checkpoint of this run ({str(error).splitlines()[0]}). "
        "Delete it to start over."
    )


def _refuse_unsupported(accelerator: Accelerator) -> None:
    """Frameworks that take the parameters apart need a loop of their own."""
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "TP"):
        raise EncacheError(
            f"This training runs data parallel, not with {kind}: choose another in accelerate's "
            "configuration, or train a LoRA with --rank when memory is short."
        )
