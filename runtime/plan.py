"""The plan: everything about a sampling run that is known before the first latent exists."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise, takewhile
from typing import Any, Literal

import torch
from torch import Tensor

from encache.errors import PlanError
from encache.model.spec import NO_CUT
from encache.runtime.blend import BLENDS, DEFAULT_STRIDE, Blend, ring_weights, slots_for
from encache.runtime.key_calls import check_key_calls, uniform_key_calls
from encache.runtime.schedulers import full_config
from encache.runtime.settings import FULL, Policy
from encache.runtime.solver import (
    PRIOR_NOISE,
    Columns,
    Scheduler,
    SolverTable,
    count_calls,
    probe_solver,
)

Row = tuple[float, ...]

#: What an evaluation of a whole denoiser adds to the history: its guided prediction; that and the
#: contrast between its branches, conditional less unconditional, so that guidance is weighted
#: apart; or what the conditional branch gave, which then ran alone, in half the rows.
Branches = Literal["guided", "apart", "conditional"]


@dataclass(frozen=True)
class Evaluate:
    """Run the denoiser, or its encoder where it is cut, on latents made from the history.

    Attributes:
        call: the key call.
        timestep: of the key call.
        row: coefficients over the history of the input.
        slot: place in the ring that receives the features; None if the prediction is next in the
            history.
        branches: what it adds to the history.
    """

    call: int
    timestep: float
    row: Row
    slot: int | None
    branches: Branches = "guided"

    @property
    def num_columns(self) -> int:
        """How many columns of the history it fills."""
        if self.slot is not None:
            return 0
        return 2 if self.branches == "apart" else 1


@dataclass(frozen=True)
class Decode:
    """Run the decoder for calls start..stop-1 in one batch; their predictions join the history.

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
        num_slots: M, slots of the feature ring; 0 without a cut.
        key_calls: where the denoiser, or its encoder, runs.
        blend: name of the rule that made the weights, or "fitted".
        steps: the runs in order.
        columns: what the history holds.
        samples: row k gives the latents before call k, row N the result, over the history.
        timesteps: of all calls.
    """

    num_calls: int
    num_slots: int
    key_calls: tuple[int, ...]
    blend: str
    steps: tuple[Evaluate | Decode, ...]
    columns: Columns
    samples: tuple[Row, ...]
    timesteps: tuple[float, ...]

    @property
    def num_evaluations(self) -> int:
        """Runs of the denoiser, or of its encoder where it is cut, per image."""
        return sum(isinstance(step, Evaluate) for step in self.steps)

    @property
    def weighs_guidance(self) -> bool:
        """Whether it weighs the predictions with and without prompt itself."""
        return any(getattr(step, "branches", "guided") != "guided" for step in self.steps)

    @property
    def runs_one_branch(self) -> bool:
        """Whether an evaluation leaves guidance out, and so has fewer rows."""
        return any(getattr(step, "branches", "guided") == "conditional" for step in self.steps)

    def count_rows(self, num_guided: int) -> int:
        """Rows of the denoiser, or of its encoder, per image; G of them per evaluation or one."""
        steps = (step for step in self.steps if isinstance(step, Evaluate))
        return sum(1 if step.branches == "conditional" else num_guided for step in steps)

    @property
    def num_decoder_runs(self) -> int:
        """Decoder batches per image."""
        return sum(isinstance(step, Decode) for step in self.steps)

    @property
    def longest_decode(self) -> int | None:
        """Most calls in one decoder run; None without a cut."""
        decodes = (step for step in self.steps if isinstance(step, Decode))
        return max((step.stop - step.start for step in decodes), default=None)

    @cached_property
    def filled(self) -> tuple[int, ...]:
        """How many columns of the history are filled after each step."""
        added = (
            step.stop - step.start if isinstance(step, Decode) else step.num_columns
            for step in self.steps
        )
        return tuple(accumulate(added, initial=self.columns.prediction(0)))[1:]

    @cached_property
    def finished(self) -> tuple[range, ...]:
        """Which calls are over by each step, so that the latents behind them are known."""
        counts = (0, *map(self._count_finished, self.filled))
        return tuple(range(*pair) for pair in pairwise(counts))

    def _count_finished(self, filled: int) -> int:
        """How many calls are over when so many columns are filled."""
        return sum(1 for _ in takewhile(lambda row: not any(row[filled:]), self.samples[1:]))

    def to_json(self) -> str:
        """All numbers of the run, readable by any program."""
        return json.dumps(asdict(self, dict_factory=_said))

    def hash(self) -> str:
        """Sixteen hexadecimal digits that name these numbers, rounded to 5 decimals."""
        rounded = json.loads(self.to_json(), parse_float=lambda text: round(float(text), 5) + 0.0)
        return hashlib.sha256(json.dumps(rounded).encode()).hexdigest()[:16]


def _said(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dataclass as JSON has it; what most plans do not need is left out where it says nothing."""
    return {name: value for name, value in pairs if (name, value) != ("branches", "guided")}


def make_plan(
    scheduler: Scheduler,
    num_steps: int,
    policy: Policy = FULL,
    *,
    max_decode_batch: int | None = None,
    rows_per_call: int = 2,
) -> Plan:
    """Turn a scheduler and a caching policy into a plan; equal questions are answered from memory.

    Args:
        scheduler: a deterministic diffusers scheduler; it is read, never changed.
        num_steps: num_inference_steps.
        policy: see `Policy`.
        max_decode_batch: most rows of one decoder run; larger ones are split, which bounds memory.
        rows_per_call: images times guidance branches.

    Raises:
        PlanError: the numbers do not fit together.
    """
    if policy.plan:
        return _checked(policy.plan, count_calls(scheduler, num_steps), policy.cut)
    if policy.blend not in BLENDS:
        raise PlanError(f"There is no blend {policy.blend!r}. Choose one of {', '.join(BLENDS)}.")
    config = json.dumps(full_config(scheduler))
    whole = policy.cut == NO_CUT
    most_calls = None if whole else calls_within(max_decode_batch, rows_per_call)
    return _make_plan(type(scheduler), config, num_steps, policy, most_calls)


def _checked(plan: Plan, num_calls: int, cut: str) -> Plan:
    """A fitted plan, as far as it fits a run."""
    if cut != NO_CUT:
        raise PlanError(
            f"The plan caches the output, not the features at the cut {cut}: leave the cut or the "
            "plan out."
        )
    if plan.num_calls != num_calls:
        raise PlanError(
            f"The plan is one of {plan.num_calls} calls, and the solver makes {num_calls}: sample "
            "with the steps and the solver that it was fitted for."
        )
    return plan


def calls_within(max_decode_batch: int | None, rows_per_call: int) -> int | None:
    """How many calls one decoder run may take; None if nothing bounds it."""
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
    policy: Policy,
    max_decode_calls: int | None,
) -> Plan:
    scheduler = scheduler_class.from_config(json.loads(config))
    table = probe_solver(scheduler, num_steps, PRIOR_NOISE if policy.prior_noise else 0.0)
    key_calls = policy.key_calls
    if key_calls is None:
        stride = min(DEFAULT_STRIDE, table.num_calls) if policy.stride is None else policy.stride
        key_calls = uniform_key_calls(stride, table.num_calls)
    keys = check_key_calls(key_calls, table.num_calls)
    look_ahead = policy.blend.startswith("interpolate")
    steps = (_look_ahead_steps if look_ahead else _causal_steps)(table, keys, policy.blend)
    columns, samples = table.columns, table.samples
    if policy.cut == NO_CUT:
        steps, columns, samples = _blend_outputs(steps, table)
    return Plan(
        num_calls=table.num_calls,
        num_slots=0 if policy.cut == NO_CUT else slots_for(policy.blend, keys),
        key_calls=keys,
        blend=policy.blend,
        steps=tuple(_split_decodes(steps, max_decode_calls)),
        columns=columns,
        samples=_rows(samples),
        timesteps=tuple(table.timesteps.tolist()),
    )


def _blend_outputs(
    steps: Sequence[Evaluate | Decode], table: SolverTable
) -> tuple[list[Evaluate | Decode], Columns, Tensor]:
    """The same run without a decoder, whose blends are multiplied into the solver's rows.

    A call's prediction is then a weighted sum of what the evaluations gave, and the history holds
    nothing but these.
    """
    columns = Columns(sum(isinstance(step, Evaluate) for step in steps), table.columns.sources)
    # What stands in each column of the solver's history, as a row over ours.
    made = torch.zeros(len(table.columns), len(columns), dtype=torch.float64)
    sources = range(columns.prediction(0))
    made[sources, sources] = 1
    held: dict[int | None, int] = {}  # by slot, the column of the evaluation that filled it
    evaluations: list[Evaluate | Decode] = []
    for step in steps:
        if isinstance(step, Evaluate):
            row = torch.tensor(step.row, dtype=torch.float64) @ made
            held[step.slot] = columns.prediction(len(evaluations))
            evaluations.append(replace(step, row=tuple(row.tolist()), slot=None))
            continue
        for call, weights in zip(range(step.start, step.stop), step.weights, strict=True):
            for slot, weight in enumerate(weights):
                if weight:
                    made[table.columns.prediction(call), held[slot]] += weight
    return evaluations, columns, table.samples.double() @ made


def _causal_steps(
    table: SolverTable, keys: tuple[int, ...], blend: Blend
) -> list[Evaluate | Decode]:
    """Evaluate each key call, then decode its whole segment from the last M of them."""
    slots = slots_for(blend, keys)
    steps: list[Evaluate | Decode] = []
    for index, (key, stop) in enumerate(zip(keys, (*keys[1:], table.num_calls), strict=True)):
        nodes = keys[max(0, index + 1 - slots) : index + 1]
        steps.append(_evaluate(table, key, index % slots))
        steps.append(_decode(table, range(key, stop), nodes, keys, slots))
    return steps


def _look_ahead_steps(
    table: SolverTable, keys: tuple[int, ...], blend: Blend
) -> list[Evaluate | Decode]:
    """Decode a key call, guess the next key's latents with its noise, evaluate there, interpolate.

    The guess holds the noise of the key call. The last segment has no next key, so it extrapolates.
    """
    slots = slots_for(blend, keys)
    steps: list[Evaluate | Decode] = [_evaluate(table, 0, 0)]
    for index, (key, following) in enumerate(pairwise(keys)):
        slot, between = (index + 1) % slots, range(key + 1, following)
        steps.append(_decode(table, range(key, key + 1), (key,), keys, slots))
        steps.append(_evaluate(table, following, slot, _guess(table, following, key)))
        if between:  # otherwise there was nothing to guess
            steps.append(_decode(table, between, (key, following), keys, slots))
            if blend == "interpolate-refresh":
                steps.append(_evaluate(table, following, slot))
    steps.append(_decode(table, range(keys[-1], table.num_calls), keys[-2:], keys, slots))
    return steps


def _evaluate(table: SolverTable, call: int, slot: int, row: Tensor | None = None) -> Evaluate:
    """An evaluation at `call`, on the solver's latents or on those that `row` guesses."""
    row = table.inputs[call] if row is None else row
    return Evaluate(call, table.timesteps[call].item(), tuple(row.tolist()), slot)


def _guess(table: SolverTable, call: int, key: int) -> Tensor:
    """Coefficients of the latents at `call` if every noise after `key` were the key's."""
    row = table.inputs[call].clone()
    known, stop = table.columns.prediction(key), table.columns.prediction(call)
    row[known] += row[known + 1 : stop].sum()
    row[known + 1 : stop] = 0
    return row


def _decode(
    table: SolverTable, calls: range, nodes: tuple[int, ...], keys: tuple[int, ...], slots: int
) -> Decode:
    """A decoder run whose weights interpolate the `nodes`, each in the slot of its key call."""
    places = {node: keys.index(node) % slots for node in nodes}
    rows = [ring_weights(places, slots, call) for call in calls]
    timesteps = tuple(table.timesteps[calls.start : calls.stop].tolist())
    return Decode(calls.start, calls.stop, timesteps, tuple(rows))


def _split_decodes(
    steps: Sequence[Evaluate | Decode], max_calls: int | None
) -> list[Evaluate | Decode]:
    pieces: list[Evaluate | Decode] = []
    for step in steps:
        if isinstance(step, Evaluate) or max_calls is None:
            pieces.append(step)
            continue
        for start in range(step.start, step.stop, max_calls):
            stop = min(start + max_calls, step.stop)
            part = slice(start - step.start, stop - step.start)
            pieces.append(Decode(start, stop, step.timesteps[part], step.weights[part]))
    return pieces


def _rows(table: Tensor) -> tuple[Row, ...]:
    return tuple(tuple(row) for row in table.tolist())
