"""Plans fitted to a model: least squares over the plan's own history, segment by segment.

What a plan does between two evaluations is one row of coefficients over its history h, for the
latents x = c . h. For every call of a segment, the row is sought that brings the pictures i nearest
to the full sampler's latents x*:

    min_c  sum_i w_i ||h_i c - x*_i||^2 / ||x*_i,N||^2 + ridge tr(A) / K ||c - c_rule||^2

A [K, K] is the first sum's Gram matrix, and c_rule the row by which the rule that the fit starts
from goes on. It is a closed loop: the columns h are those that the plan, as far as it is fitted,
fills itself. A few pictures end as other pictures whatever the numbers are; lest they decide all,
the weights w_i = 1 / (1 + e_i / median e) of Cauchy's distribution fall with the relative squared
error e_i that the rule leaves. How much freedom the pictures pay for, none included, is found by
leaving some of them out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from encache.errors import PlanError
from encache.model.backbone import Conditions
from encache.runtime.engines import Engines
from encache.runtime.guidance import make_guide
from encache.runtime.plan import Branches, Evaluate, Plan, Row
from encache.runtime.sampler import evaluate
from encache.runtime.solver import Columns

#: Strengths of the pull towards the rule that are tried.
RIDGES = tuple(10.0**power for power in range(-1, -9, -1))
#: Parts of the pictures, each of which is left out once.
FOLDS = 4

#: Evaluates latents [n, C, h, w] at a timestep [1]; gives the columns that it adds [K, n, C, h, w].
Denoise = Callable[[Tensor, Tensor, Conditions, Branches], Tensor]


@dataclass(frozen=True)
class Batch:
    """Some pictures to fit on.

    Attributes:
        noise: z [n, C, h, w].
        conditions: of G * n rows each.
        wanted: reads the full sampler's latents before every call, and its result
            [N + 1, n, C, h, w], so that those of few pictures are in memory at once.
        history: what a plan has filled so far, a column [n, C, h, w] each.
    """

    noise: Tensor
    conditions: Conditions
    wanted: Callable[[], Tensor]
    history: list[Tensor] = field(default_factory=list)


def denoiser(engines: Engines, guidance_scale: float | None) -> Denoise:
    """Engines without a cut, as a function that a fit calls."""
    guide = make_guide(guidance_scale)

    def denoise(
        latents: Tensor, timestep: Tensor, conditions: Conditions, branches: Branches
    ) -> Tensor:
        return evaluate(
            engines.denoise, guide, latents.to(engines.dtype), timestep, conditions, branches
        )

    return denoise


def evaluations_of(plan: Plan) -> list[Evaluate]:
    """The steps of a plan for the output cache, which are all evaluations."""
    return [step for step in plan.steps if isinstance(step, Evaluate)]


def widen(rule: Plan, branches: Sequence[Branches], guidance_scale: float) -> Plan:
    """The same plan, over a history that has what these branches add.

    Where the conditional branch is to run alone, the guided prediction is made with the latest
    contrast: eps_c + (s - 1) (eps_c - eps_u). Otherwise every number stays what it is.

    Args:
        rule: for the output cache, whose blend does not look ahead.
        branches: of each of its evaluations; not "conditional" before the first contrast.
        guidance_scale: s.

    Raises:
        PlanError: the blend looks ahead.
    """
    if len(set(rule.key_calls)) < rule.num_evaluations or rule.blend.startswith("interpolate"):
        raise PlanError(f"A fit starts from reuse or extrapolate, not from {rule.blend}.")
    steps = [
        replace(step, branches=one)
        for step, one in zip(evaluations_of(rule), branches, strict=True)
    ]
    columns = Columns(sum(step.num_columns for step in steps), rule.columns.sources)
    made = torch.zeros(len(rule.columns), len(columns), dtype=torch.float64)
    place, contrast = columns.prediction(0), None
    made[:place, :place] = torch.eye(place)
    for index, step in enumerate(steps):
        made[rule.columns.prediction(index), place] = 1
        if step.branches == "conditional":
            assert contrast
            made[rule.columns.prediction(index), contrast] = guidance_scale - 1
        if step.branches == "apart":
            contrast = place + 1
        place += step.num_columns
    samples = torch.tensor(rule.samples, dtype=torch.float64) @ made
    wide = replace(rule, blend="fitted", steps=tuple(steps), columns=columns)
    return with_samples(wide, samples, input_scales(rule))


def input_scales(plan: Plan) -> list[float]:
    """By how much the latents before each evaluation are multiplied for the denoiser.

    Some solvers scale them; a multiplication's factor shows on any number.
    """
    scales = []
    for step in evaluations_of(plan):
        latents = plan.samples[step.call]
        largest = max(range(len(latents)), key=lambda column: abs(latents[column]))
        scales.append(step.row[largest] / latents[largest])
    return scales


def with_samples(plan: Plan, samples: Tensor, scales: Sequence[float]) -> Plan:
    """The plan with these rows [N + 1, columns], from which the denoiser's inputs follow."""
    steps = [
        replace(step, row=_row(samples[step.call] * scale))
        for step, scale in zip(evaluations_of(plan), scales, strict=True)
    ]
    return replace(plan, steps=tuple(steps), samples=tuple(map(_row, samples)))


def _row(numbers: Tensor) -> Row:
    return tuple(numbers.tolist())


def fit_weights(
    rule: Plan,
    batches: Sequence[Batch],
    denoise: Denoise,
    *,
    ridges: Sequence[float] = RIDGES,
    folds: int = FOLDS,
    on_segment: Callable[[], None] = lambda: None,
) -> Plan:
    """Fit a plan's rows to the full sampler's latents; see the module.

    Args:
        rule: what the fit starts from and is pulled towards; from `widen`.
        batches: the pictures, whose histories are filled anew.
        denoise: the model.
        ridges: strengths of the pull, of which the best is taken; none at all keeps the rule.
        folds: parts of the pictures, each of which is left out once.
        on_segment: called after each.

    Returns:
        The plan with other rows.
    """
    samples = torch.tensor(rule.samples, dtype=torch.float64)
    fitted, scales = samples.clone(), input_scales(rule)
    stops = [*rule.key_calls[1:], rule.num_calls]
    for batch in batches:
        batch.history[:] = [batch.noise]
    for index, stop in enumerate(stops):
        step = evaluations_of(with_samples(rule, fitted, scales))[index]
        calls = range(step.call + 1, stop + 1)
        for batch in batches:
            _run(batch, step, denoise)
        # As the rule goes on from latents that are not its own: what it does to them, and the
        # predictions that it adds.
        kept = samples[calls.start : calls.stop, 0] / samples[step.call, 0]
        started = fitted[step.call] - samples[step.call]
        fitted[calls.start : calls.stop] += kept[:, None] * started
        normal = _normal_equations(batches, fitted, calls, folds)
        filled = normal.gram.shape[-1]
        fitted[calls.start : calls.stop, :filled] += _solve_validated(normal, ridges).T
        on_segment()
    return with_samples(rule, fitted, scales)


def _run(batch: Batch, step: Evaluate, denoise: Denoise) -> None:
    """Fill the columns of an evaluation."""
    latents = combine(step.row, batch.history)
    timestep = latents.new_tensor([step.timestep])
    batch.history.extend(denoise(latents, timestep, batch.conditions, step.branches))


def combine(row: Tensor | Row, history: Sequence[Tensor]) -> Tensor:
    """row . history [K, n, C, h, w], as far as that is filled: [n, C, h, w]."""
    coefficients = torch.as_tensor(row[: len(history)]).to(history[0])
    return torch.tensordot(coefficients, torch.stack(list(history)), 1)


@dataclass(frozen=True)
class _Normal:
    """Normal equations of each fold of the pictures: Gram matrices and moments, float64.

    Attributes:
        gram: [folds, K, K].
        moment: [folds, K, calls], of what the rule leaves to be explained.
    """

    gram: Tensor
    moment: Tensor

    def without(self, fold: int) -> "_Normal":
        """Of all the others together."""
        kept = torch.arange(len(self.gram)) != fold
        return _Normal(self.gram[kept].sum(0, True), self.moment[kept].sum(0, True))

    def solve(self, ridge: float) -> Tensor:
        """The rows' difference from the rule [K, calls]."""
        gram = self.gram.sum(0)
        pull = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        return torch.linalg.solve(gram + pull, self.moment.sum(0))

    def gained(self, fold: int, difference: Tensor) -> Tensor:
        """By how much a difference from the rule lowers a fold's squared error [calls]."""
        explained = 2 * difference * self.moment[fold]
        return (explained - difference * (self.gram[fold] @ difference)).sum(0)


def _normal_equations(batches: Sequence[Batch], rows: Tensor, calls: range, folds: int) -> _Normal:
    """Of the latents of these calls over the histories, weighted as the module says."""
    columns = len(batches[0].history)
    own = rows[calls.start : calls.stop, :columns]
    grams, moments, errors = [], [], []
    for batch in batches:
        # [n, K, D] and [n, calls + 1, D]
        histories = torch.stack(batch.history, 1).flatten(2).double().cpu()
        seen = batch.wanted()[[*calls, -1]].transpose(0, 1).flatten(2).double().cpu()
        sizes = seen[:, -1].norm(dim=-1)
        for history, wanted, size in zip(
            histories / sizes[:, None, None], seen, sizes, strict=True
        ):
            left = wanted[:-1] / size - own @ history
            grams.append(history @ history.T)
            moments.append(history @ left.T)
            errors.append(left[-1].square().sum())
    error = torch.stack(errors)
    weights = 1 / (1 + error / error.median().clamp(min=1e-30))
    parts = [torch.arange(len(weights)) % folds == fold for fold in range(folds)]
    gram, moment = (
        torch.stack([torch.einsum("n,nij->ij", weights[part], one[part]) for part in parts])
        for one in (torch.stack(grams), torch.stack(moments))
    )
    return _Normal(gram, moment)


def _solve_validated(normal: _Normal, ridges: Sequence[float]) -> Tensor:
    """The solution with the ridge that serves left-out pictures best at the segment's end.

    Zeros where none serves them better than the rule.
    """
    folds = range(len(normal.gram))

    def gain(ridge: float) -> float:
        solved = [normal.without(fold).solve(ridge) for fold in folds]
        return sum(float(normal.gained(fold, solved[fold])[-1]) for fold in folds)

    gains = {ridge: gain(ridge) for ridge in ridges}
    best = max(gains, key=lambda ridge: gains[ridge], default=None)
    if best is None or gains[best] <= 0:
        return torch.zeros_like(normal.moment[0])
    return normal.solve(best)


def run_plan(plan: Plan, batch: Batch, denoise: Denoise) -> Tensor:
    """Latents [n, C, h, w] of the pictures of a batch."""
    batch.history[:] = [batch.noise]
    for step in evaluations_of(plan):
        _run(batch, step, denoise)
    return combine(plan.samples[-1], batch.history)


def errors_of(plan: Plan, batches: Sequence[Batch], denoise: Denoise) -> Tensor:
    """||x - x*||^2 / ||x*||^2 of every picture [n]."""
    errors = [relative_errors(run_plan(plan, batch, denoise), batch) for batch in batches]
    return torch.cat(errors).cpu()


def relative_errors(latents: Tensor, batch: Batch) -> Tensor:
    """The same of latents [n, C, h, w] that stand for a batch's; with gradients."""
    wanted = batch.wanted()[-1].flatten(1)
    return (latents.flatten(1) - wanted).square().sum(1) / wanted.square().sum(1)


def typical_error(plan: Plan, batches: Sequence[Batch], denoise: Denoise) -> float:
    """The geometric mean of these errors, which the few pictures that go astray do not decide."""
    return float(errors_of(plan, batches, denoise).log().mean().exp())
