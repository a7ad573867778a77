"""The plan: everything about a sampling run that is known before the first latent exists."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from encache.errors import PlanError
from encache.runtime.blend import (
    BLENDS,
    DEFAULT_BLEND,
    DEFAULT_STRIDE,
    NUM_SLOTS,
    Blend,
    blend_weights,
)
from encache.runtime.schedulers import full_config
from encache.runtime.solver import PRIOR_NOISE, Scheduler, SolverTable, probe_solver

#: The key calls of Faster Diffusion (arXiv 2312.09608, section 4) by number of calls.
PAPER_KEY_CALLS: dict[int, tuple[int, ...]] = {
    50: (0, 1, 2, 3, 5, 10, 15, 25, 35),
    20: (0, 1, 2, 3, 5, 10, 15),
}

Row = tuple[float, ...]


@dataclass(frozen=True)
class Encode:
    """Run the encoder for a key call on latents made from the noise history.

    Attributes:
        call: the key call.
        timestep: of the key call.
        row: coefficients over (z, eps_0, ..., eps_{N-1}) of the encoder's input.
        slot: place in the ring that receives the features.
    """

    call: int
    timestep: float
    row: Row
    slot: int


@dataclass(frozen=True)
class Decode:
    """Run the decoder for calls start..stop-1 in one batch.

    Attributes:
        start, stop: the calls.
        timesteps: of these calls.
        weights: one row per call, one column per ring slot.
    """

    start: int
    stop: int
    timesteps: tuple[float, ...]
    weights: tuple[Row, ...]


@dataclass(frozen=True)
class Plan:
    """A sampling run as data: hashable, JSON, the same for every backend.

    Attributes:
        num_calls: N, denoiser evaluations of the full sampler.
        num_slots: M, slots of the feature ring.
        key_calls: where the encoder runs.
        blend: name of the rule that made the weights.
        steps: the encoder and decoder runs in order.
        samples: row k gives the latents before call k, row N the result, over
            (z, eps_0, ..., eps_{N-1}).
        timesteps: of all calls.
    """

    num_calls: int
    num_slots: int
    key_calls: tuple[int, ...]
    blend: Blend
    steps: tuple[Encode | Decode, ...]
    samples: tuple[Row, ...]
    timesteps: tuple[float, ...]

    @property
    def num_encoder_runs(self) -> int:
        """Encoder evaluations per image."""
        return sum(isinstance(step, Encode) for step in self.steps)

    @property
    def num_decoder_runs(self) -> int:
        """Decoder batches per image."""
        return sum(isinstance(step, Decode) for step in self.steps)

    @property
    def longest_decode(self) -> int:
        """Most calls in one decoder run."""
        return max(step.stop - step.start for step in self.steps if isinstance(step, Decode))

    def to_json(self) -> str:
        """All numbers of the run, readable by any program."""
        return json.dumps(asdict(self))

    def hash(self) -> str:
        """Sixteen hexadecimal digits that name these numbers, rounded to 5 decimals."""
        rounded = json.loads(self.to_json(), parse_float=lambda text: round(float(text), 5) + 0.0)
        return hashlib.sha256(json.dumps(rounded).encode()).hexdigest()[:16]


def uniform_key_calls(stride: int, num_calls: int) -> tuple[int, ...]:
    """Every `stride`-th call: (0, stride, 2 stride, ...)."""
    if not 1 <= stride <= num_calls:
        raise PlanError(
            f"The stride must be between 1 (the full sampler) and the {num_calls} calls, "
            f"not {stride}."
        )
    return tuple(range(0, num_calls, stride))


def strides_within(strides: Sequence[int], num_calls: int) -> tuple[int, ...]:
    """Those of some default strides that so many calls allow, or the longest one if none."""
    return tuple(stride for stride in strides if stride <= num_calls) or (num_calls,)


def paper_key_calls(num_calls: int) -> tuple[int, ...]:
    """The key calls that Faster Diffusion publishes for this number of calls."""
    if num_calls not in PAPER_KEY_CALLS:
        known = " and ".join(map(str, PAPER_KEY_CALLS))
        raise PlanError(
            f"The paper gives key calls for {known} calls, not for {num_calls}. Use --stride, or "
            "list the key calls."
        )
    return PAPER_KEY_CALLS[num_calls]


def check_key_calls(key_calls: Sequence[int], num_calls: int) -> tuple[int, ...]:
    """Return the key calls, or raise PlanError unless they rise from 0 within the calls."""
    calls = tuple(key_calls)
    if not calls or calls[0] != 0:
        raise PlanError(f"Key calls must start at 0: there is nothing to reuse yet, got {calls}.")
    if any(later <= earlier for earlier, later in pairwise(calls)):
        raise PlanError(f"Key calls must rise without repeats, got {calls}.")
    if calls[-1] >= num_calls:
        raise PlanError(f"Key call {calls[-1]} is beyond the last of {num_calls} calls.")
    return calls


def make_plan(
    scheduler: Scheduler,
    num_steps: int,
    *,
    stride: int | None = 1,
    key_calls: Sequence[int] | None = None,
    blend: Blend = DEFAULT_BLEND,
    prior_noise: bool = False,
    max_decode_batch: int | None = None,
    rows_per_call: int = 2,
) -> Plan:
    """Turn a scheduler and a caching policy into a plan; equal questions are answered from memory.

    Args:
        scheduler: a deterministic diffusers scheduler; it is read, never changed.
        num_steps: num_inference_steps.
        stride: distance of uniform key calls; 1 samples without a cache, None is the default
            distance, or all calls if there are fewer.
        key_calls: explicit key calls instead of a stride.
        blend: see `encache.runtime.blend`.
        prior_noise: inject z as Faster Diffusion does.
        max_decode_batch: most rows of one decoder run; larger ones are split, which bounds memory.
        rows_per_call: images times guidance branches.

    Raises:
        PlanError: the numbers do not fit together.
    """
    if blend not in BLENDS:
        raise PlanError(f"There is no blend {blend!r}. Choose one of {', '.join(BLENDS)}.")
    config = json.dumps(full_config(scheduler))
    keys = None if key_calls is None else tuple(key_calls)
    max_decode_calls = _calls_within(max_decode_batch, rows_per_call)
    return _make_plan(
        type(scheduler), config, num_steps, stride, keys, blend, prior_noise, max_decode_calls
    )


def _calls_within(max_decode_batch: int | None, rows_per_call: int) -> int | None:
    if max_decode_batch is None:
        return None
    if max_decode_batch < rows_per_call:
        raise PlanError(
            f"One call decodes {rows_per_call} rows (images times guidance), more than the "
            f"{max_decode_batch} of max_decode_batch. Raise it, or make fewer images at once."
        )
    return max_decode_batch // rows_per_call


@lru_cache(maxsize=128)
def _make_plan(
    scheduler_class: Any,
    config: str,
    num_steps: int,
    stride: int | None,
    key_calls: tuple[int, ...] | None,
    blend: Blend,
    prior_noise: bool,
    max_decode_calls: int | None,
) -> Plan:
    scheduler = scheduler_class.from_config(json.loads(config))
    table = probe_solver(scheduler, num_steps, PRIOR_NOISE if prior_noise else 0.0)
    if key_calls is None:
        stride = min(DEFAULT_STRIDE, table.num_calls) if stride is None else stride
        key_calls = uniform_key_calls(stride, table.num_calls)
    keys = check_key_calls(key_calls, table.num_calls)
    look_ahead = blend.startswith("interpolate")
    make_steps = _look_ahead_steps if look_ahead else _causal_steps
    steps = make_steps(table, keys, blend)
    return Plan(
        num_calls=table.num_calls,
        num_slots=min(NUM_SLOTS[blend], len(keys)),
        key_calls=keys,
        blend=blend,
        steps=tuple(_split_decodes(steps, max_decode_calls)),
        samples=_rows(table.samples),
        timesteps=tuple(table.timesteps.tolist()),
    )


def _causal_steps(table: SolverTable, keys: tuple[int, ...], blend: Blend) -> list[Encode | Decode]:
    """Encode each key call, then decode its whole segment from the last M key features."""
    slots = min(NUM_SLOTS[blend], len(keys))
    steps: list[Encode | Decode] = []
    for index, (key, stop) in enumerate(zip(keys, (*keys[1:], table.num_calls), strict=True)):
        nodes = keys[max(0, index + 1 - slots) : index + 1]
        steps.append(_encode(table, key, index % slots))
        steps.append(_decode(table, range(key, stop), nodes, keys, slots, blend))
    return steps


def _look_ahead_steps(
    table: SolverTable, keys: tuple[int, ...], blend: Blend
) -> list[Encode | Decode]:
    """Decode a key call, guess the next key's latents with its noise, encode there, interpolate.

    The guess holds the noise of the key call, or continues its change over the last two calls. The
    last segment has no next key, so it extrapolates.
    """
    slots = min(NUM_SLOTS[blend], len(keys))
    steps: list[Encode | Decode] = [_encode(table, 0, 0)]
    for index, (key, following) in enumerate(pairwise(keys)):
        slot, between = (index + 1) % slots, range(key + 1, following)
        steps.append(_decode(table, range(key, key + 1), (key,), keys, slots, blend))
        slope = 1.0 if blend == "interpolate-continued" and key else 0.0
        steps.append(_encode(table, following, slot, _guess(table, following, key, slope)))
        if between:
            steps.append(_decode(table, between, (key, following), keys, slots, blend))
        if blend == "interpolate-refresh":
            steps.append(_encode(table, following, slot))
    steps.append(_decode(table, range(keys[-1], table.num_calls), keys[-2:], keys, slots, blend))
    return steps


def _encode(table: SolverTable, call: int, slot: int, row: Tensor | None = None) -> Encode:
    """An encoder run at `call`, on the solver's latents or on those that `row` guesses."""
    row = table.inputs[call] if row is None else row
    return Encode(call, table.timesteps[call].item(), tuple(row.tolist()), slot)


def _guess(table: SolverTable, call: int, key: int, slope: float) -> Tensor:
    """Coefficients of the latents at `call` when no noise after `key` is known yet.

    Noise k calls after the key is taken for eps_key + slope * k * (eps_key - eps_{key - 1}).
    """
    row = table.inputs[call].clone()
    unknown = row[key + 2 : call + 1].clone()  # column j + 1 belongs to eps_j
    continued = slope * (unknown * torch.arange(1, len(unknown) + 1)).sum()
    row[key + 1] += unknown.sum() + continued
    if slope:
        row[key] -= continued
    row[key + 2 : call + 1] = 0
    return row


def _decode(
    table: SolverTable,
    calls: range,
    nodes: tuple[int, ...],
    keys: tuple[int, ...],
    slots: int,
    blend: Blend,
) -> Decode:
    """A decoder run whose weights interpolate the `nodes`, each in the slot of its key call."""
    rows = []
    for call in calls:
        row = [0.0] * slots
        for node, weight in zip(nodes, blend_weights(blend, nodes, call), strict=True):
            row[keys.index(node) % slots] = weight
        rows.append(tuple(row))
    timesteps = tuple(table.timesteps[calls.start : calls.stop].tolist())
    return Decode(calls.start, calls.stop, timesteps, tuple(rows))


def _split_decodes(
    steps: Sequence[Encode | Decode], max_calls: int | None
) -> list[Encode | Decode]:
    pieces: list[Encode | Decode] = []
    for step in steps:
        if isinstance(step, Encode) or max_calls is None:
            pieces.append(step)
            continue
        for start in range(step.start, step.stop, max_calls):
            stop = min(start + max_calls, step.stop)
            part = slice(start - step.start, stop - step.start)
            pieces.append(Decode(start, stop, step.timesteps[part], step.weights[part]))
    return pieces


def _rows(table: Any) -> tuple[Row, ...]:
    return tuple(tuple(row) for row in table.tolist())
