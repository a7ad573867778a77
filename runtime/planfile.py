"""Plans fitted to a model, in a file: their numbers, what they were fitted on, how good they are.

A file holds a front: one plan or several of one model, with different costs. It may be anybody's:
nothing in it is run but numbers, which are checked before they are used, and what it says of a
solver is only compared.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from encache.errors import PlanError
from encache.files import parse_json, to_json, write_new
from encache.model.preset import Preset
from encache.model.spec import NO_CUT, rows_per_picture
from encache.runtime.plan import Branches, Evaluate, Plan, Row
from encache.runtime.solver import Columns

SCHEMA = "encache plans 1"
#: PSNR in dB to the full sampler's pictures that a plan must have to be the default: that of the
#: default stride on the shipped model (docs/study.md).
DEFAULT_QUALITY = 48.0
#: More calls, columns or pictures than any plan has.
_MOST = 10_000
#: How far a run's guidance may be from the fitted one, as a share of it, before it is said.
_NEAR = 0.1
_REMEDY = "Fetch the file again, fit again with encache-fit, or do without a plan: with --stride."


@dataclass(frozen=True)
class FittedOn:
    """What plans were fitted on.

    Attributes:
        model: fingerprint of the checkpoint.
        scheduler: its solver's whole config, as JSON.
        steps: num_inference_steps.
        guidance_scale: 1 or less is without guidance.
        prompts: sha256 of the prompts, a line each.
        num_pictures: how many.
    """

    model: str
    scheduler: str
    steps: int
    guidance_scale: float
    prompts: str
    num_pictures: int

    def near(self, guidance_scale: float) -> bool:
        """Whether what was measured says anything of this guidance."""
        if rows_per_picture(guidance_scale) == rows_per_picture(self.guidance_scale) == 1:
            return True
        return abs(guidance_scale - self.guidance_scale) <= _NEAR * self.guidance_scale

    @property
    def preset(self) -> Preset:
        """How a run has to be sampled for such a plan, as weights say it that want to be."""
        return Preset(steps=self.steps, guidance_scale=self.guidance_scale, cut=NO_CUT)

    def differences(self, scheduler: Mapping[str, Any]) -> list[str]:
        """What of a solver's config is other than what was fitted on."""
        wanted, config = json.loads(self.scheduler), json.loads(json.dumps(dict(scheduler)))
        classes = [str(one.get("_class_name")) for one in (wanted, config)]
        if classes[0] != classes[1]:
            return [f"it is {classes[0][:40]}, not {classes[1]}"]
        names = sorted({*wanted, *config} - {"_diffusers_version"})
        return [f"{name} differs" for name in names if wanted.get(name) != config.get(name)]


@dataclass(frozen=True)
class Measured:
    """How near a plan comes to the full sampler, on prompts and seeds that it was not fitted on.

    Attributes:
        num_pictures: how many.
        error: mean relative squared error of the latents.
        interval: of it, 95 %.
        rule_error: of the rule that the fit started from, on the same pictures.
        psnr: of the pictures, in dB.
    """

    num_pictures: int
    error: float
    interval: tuple[float, float]
    rule_error: float
    psnr: float


@dataclass(frozen=True)
class FittedPlan:
    """A plan with what is known of it."""

    plan: Plan
    fitted_on: FittedOn
    measured: Measured

    @property
    def share(self) -> float:
        """Rows of the denoiser, as a share of the full sampler's."""
        branches = rows_per_picture(self.fitted_on.guidance_scale)
        return self.plan.count_rows(branches) / (branches * self.plan.num_calls)


def write_plans(path: Path, plans: Sequence[FittedPlan]) -> None:
    """Write plans that were fitted on the same, to a new file.

    Raises:
        FileExistsError: there is one.
    """
    fitted_on = asdict(plans[0].fitted_on)
    content = {
        "schema": SCHEMA,
        "fitted_on": {**fitted_on, "scheduler": json.loads(fitted_on["scheduler"])},
        "plans": [
            {
                "evaluations": one.plan.num_evaluations,
                "share": one.share,
                "measured": asdict(one.measured),
                "plan": json.loads(one.plan.to_json()),
            }
            for one in plans
        ],
    }
    write_new(path, to_json(content))


def read_plans(path: Path) -> tuple[FittedPlan, ...]:
    """Read what `write_plans` wrote, the cheapest first.

    Raises:
        PlanError: it is anything else; the sentence says which number is wrong.
    """
    with _explaining(path):
        data = parse_json(path.read_bytes())
        schema = _get(data, "schema", str)
        if schema != SCHEMA:
            raise ValueError(f"its schema is {schema[:40]!r}, and this encache reads {SCHEMA!r}")
        fitted_on = _parse_fitted_on(_get(data, "fitted_on", dict))
        last = _whole(json.loads(fitted_on.scheduler), "num_train_timesteps") - 1
        listed = _get(data, "plans", list)
        if not listed:
            raise ValueError("it holds no plan")
        plans = [
            FittedPlan(
                _within(parse_plan(_get(one, "plan", dict)), last),
                fitted_on,
                _parse_measured(_get(one, "measured", dict)),
            )
            for one in listed
        ]
    return tuple(sorted(plans, key=lambda one: one.share))


def choose_plan(
    plans: Sequence[FittedPlan], *, quality: float | None = None, budget: float | None = None
) -> FittedPlan:
    """The cheapest plan of at least this quality, or the nearest to the full sampler in a budget.

    Args:
        plans: at least one.
        quality: least PSNR in dB. Of neither, it is `DEFAULT_QUALITY`, if a plan has that.
        budget: most rows, as a share of the full sampler's.

    Raises:
        PlanError: there is none.
    """
    cheap = [one for one in plans if budget is None or one.share <= budget]
    least = DEFAULT_QUALITY if quality is None and budget is None else quality
    good = [one for one in cheap if least is not None and one.measured.psnr >= least]
    if good:
        return min(good, key=lambda one: one.share)
    if cheap and quality is None:
        return min(cheap, key=lambda one: one.measured.error)
    there = ", ".join(f"{one.measured.psnr:.1f} dB for {one.share:.2g}" for one in plans)
    raise PlanError(
        f"No plan in the file is that good and that cheap. There are {there} of the full sampler's "
        "rows: ask for less, or fit more with encache-fit."
    )


def check_fits(
    fitted_on: FittedOn,
    *,
    model: str,
    scheduler: Mapping[str, Any],
    steps: int,
    guidance_scale: float,
) -> str | None:
    """Refuse a plan that was fitted on something else than what is to be sampled.

    Args:
        fitted_on: what the plan was fitted on.
        model: fingerprint.
        scheduler: the solver's whole config.
        steps: num_inference_steps.
        guidance_scale: of the run.

    Returns:
        What to warn of: a guidance that is a little away; None if there is nothing.

    Raises:
        PlanError: its numbers mean nothing here.
    """
    solver = fitted_on.differences(scheduler)
    fitted, asked = (rows_per_picture(one) for one in (fitted_on.guidance_scale, guidance_scale))
    differences = {
        f"another model ({fitted_on.model[:12]}, not {model[:12]})": model != fitted_on.model,
        f"another solver ({', '.join(solver)})": bool(solver),
        f"{fitted_on.steps} steps, not {steps}": steps != fitted_on.steps,
        f"guidance {fitted_on.guidance_scale:g}, not {guidance_scale:g}": fitted != asked,
    }
    for difference, present in differences.items():
        if present:
            raise PlanError(
                f"The plan was fitted for {difference}. Sample as it was fitted, fit another with "
                "encache-fit, or do without a plan: with --stride."
            )
    if not fitted_on.near(guidance_scale):
        return (
            f"The plan was fitted for guidance {fitted_on.guidance_scale:g}; how good it is at "
            f"{guidance_scale:g} was not measured."
        )
    return None


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise PlanError(f"{path} holds no plan that can be run: {error}. {_REMEDY}") from error


def _get(data: Any, name: str, kind: type) -> Any:
    """A value of a JSON object, which must be of this kind."""
    if not isinstance(data, dict) or not isinstance(data.get(name), kind):
        raise ValueError(f"{name!r} is missing, or no {kind.__name__}")
    return data[name]


def _number(data: Any, name: str) -> float:
    return _numbers([data.get(name)], 1, name)[0]


def _whole(data: Any, name: str) -> int:
    value = data.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST:
        raise ValueError(f"{name!r} must be a whole number up to {_MOST}")
    return value


def _numbers(values: Any, length: int, name: str) -> Row:
    """A row of finite numbers of this length."""
    if not isinstance(values, list) or len(values) != length:
        raise ValueError(f"{name!r} must have {length} numbers")
    for value in values:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{name!r} holds something that is no number")
        if not abs(value) <= 3e38:  # of float32, in which it is run; false for NaN too
            raise ValueError(f"{name!r} holds a number that is not finite")
    return tuple(map(float, values))


def _parse_fitted_on(data: Mapping[str, Any]) -> FittedOn:
    return FittedOn(
        model=_get(data, "model", str),
        scheduler=json.dumps(_get(data, "scheduler", dict)),
        steps=_whole(data, "steps"),
        guidance_scale=_number(data, "guidance_scale"),
        prompts=_get(data, "prompts", str),
        num_pictures=_whole(data, "num_pictures"),
    )


def _parse_measured(data: Mapping[str, Any]) -> Measured:
    low, high = _numbers(data.get("interval"), 2, "interval")
    return Measured(
        num_pictures=_whole(data, "num_pictures"),
        error=_number(data, "error"),
        interval=(low, high),
        rule_error=_number(data, "rule_error"),
        psnr=_number(data, "psnr"),
    )


def parse_plan(data: Mapping[str, Any]) -> Plan:
    """The plan for the output cache that parsed JSON describes.

    Raises:
        ValueError: it is none, or a row reads what is not there by then.
    """
    num_calls = _whole(data, "num_calls")
    steps = [_parse_step(one) for one in _get(data, "steps", list)]
    columns = Columns(sum(step.num_columns for step in steps))
    if len(columns) > _MOST:
        raise ValueError(f"it has more than {_MOST} columns")
    samples = _get(data, "samples", list)
    if len(samples) != num_calls + 1:
        raise ValueError(f"'samples' must have {num_calls + 1} rows")
    plan = Plan(
        num_calls=num_calls,
        num_slots=0,
        key_calls=tuple(step.call for step in steps),
        blend="fitted",
        steps=tuple(steps),
        columns=columns,
        samples=tuple(_numbers(row, len(columns), "samples") for row in samples),
        timesteps=_numbers(data.get("timesteps"), num_calls, "timesteps"),
    )
    _check_order(plan)
    return plan


def _parse_step(data: Any) -> Evaluate:
    row = _get(data, "row", list)
    branches: Branches = data.get("branches", "guided")
    if branches not in get_args(Branches):
        raise ValueError(f"'branches' must be one of {', '.join(get_args(Branches))}")
    return Evaluate(
        call=_whole(data, "call"),
        timestep=_number(data, "timestep"),
        row=_numbers(row, len(row), "row"),
        slot=None,
        branches=branches,
    )


def _within(plan: Plan, last: float) -> Plan:
    """The plan, whose denoiser is told no time that it does not know.

    Raises:
        ValueError: it is.
    """
    for step in plan.steps:
        assert isinstance(step, Evaluate)
        if not 0 <= step.timestep <= last:
            raise ValueError(f"'timestep' of call {step.call} must lie between 0 and {last:g}")
    return plan


def _check_order(plan: Plan) -> None:
    """Raise ValueError unless the calls rise from 0, and no row reads what is not there yet."""
    calls = plan.key_calls
    rising = all(earlier < later for earlier, later in pairwise(calls))
    if calls[:1] != (0,) or not rising or calls[-1] >= plan.num_calls:
        raise ValueError("the calls of its steps must rise from 0 within 'num_calls'")
    filled = (plan.columns.prediction(0), *plan.filled)
    for step, there in zip(plan.steps, filled, strict=False):
        assert isinstance(step, Evaluate)
        if len(step.row) != len(plan.columns):
            raise ValueError(f"'row' must have {len(plan.columns)} numbers")
        if any(step.row[there:]):
            raise ValueError(f"the row of call {step.call} reads predictions that are not made yet")
