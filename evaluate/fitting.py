"""From reference trajectories to fitted plans, step by step, each of which is kept in the store."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from encache.evaluate.distribution import bootstrap_interval
from encache.evaluate.fidelity import psnr, relative_error
from encache.evaluate.fit import (
    FOLDS,
    RIDGES,
    Batch,
    Denoise,
    denoiser,
    fit_weights,
    run_plan,
    typical_error,
    widen,
)
from encache.evaluate.refine import Refinement, refine
from encache.evaluate.store import Arrays, join
from encache.evaluate.trajectories import Pictures, Trajectories
from encache.files import digest_of_lines
from encache.model.spec import rows_per_picture
from encache.progress import progress
from encache.runtime.plan import Branches, Plan, make_plan
from encache.runtime.planfile import FittedOn, FittedPlan, Measured, parse_plan
from encache.runtime.schedulers import full_config
from encache.runtime.settings import Policy

#: One picture in so many is not fitted on: it decides between the rule, the fit, the refined fit.
VALIDATION = 4
#: Batches that a search fits on, and validates on: enough to tell candidates apart.
SEARCHED = 4

#: Finds key calls by budget, given the error of any.
Find = Callable[[Callable[[tuple[int, ...]], float]], dict[int, tuple[int, ...]]]


@dataclass(frozen=True)
class Wanted:
    """One plan that is asked for.

    Attributes:
        key_calls: where the denoiser runs.
        branches: of each of these calls.
    """

    key_calls: tuple[int, ...]
    branches: tuple[Branches, ...]


class Fitter:
    """Fits plans of one model.

    Args:
        trajectories: of the full sampler.
        pictures: to fit on, 16 or more.
        held_out: to measure on.
        gradients: makes the denoiser in PyTorch, when it is first needed.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        pictures: Pictures,
        held_out: Pictures,
        gradients: Callable[[], Denoise],
    ) -> None:
        self.trajectories = trajectories
        self.pictures = pictures
        self.held_out = held_out
        self._make_gradients = gradients

    @cached_property
    def denoise(self) -> Denoise:
        """The model, as the engines run it."""
        settings = self.trajectories.settings
        scale = settings.guidance_scale if settings.rows > 1 else None
        return denoiser(self.trajectories.pipeline.engines, scale)

    @cached_property
    def gradients(self) -> Denoise:
        """The model with gradients."""
        return self._make_gradients()

    @cached_property
    def _batches(self) -> tuple[list[Batch], list[Batch]]:
        """To fit on, and for validation."""
        batches = [self.trajectories.batch(self.pictures, one) for one in self.pictures.batches]
        fitted = [one for index, one in enumerate(batches) if index % VALIDATION]
        return fitted, batches[::VALIDATION]

    @cached_property
    def fitted_on(self) -> FittedOn:
        """What a plan file says of it."""
        settings = self.trajectories.settings
        return FittedOn(
            model=self.trajectories.fingerprint,
            scheduler=json.dumps(full_config(self.trajectories.pipeline.scheduler)),
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            prompts=digest_of_lines(self.pictures.prompts),
            num_pictures=self.pictures.number,
        )

    def rule(self, wanted: Wanted) -> Plan:
        """The rule that a fit starts from, over the wanted history."""
        settings = self.trajectories.settings
        policy = Policy(key_calls=wanted.key_calls)
        plan = make_plan(self.trajectories.pipeline.scheduler, settings.steps, policy)
        return widen(plan, wanted.branches, settings.guidance_scale)

    def fit_squares(self, wanted: Wanted) -> Plan:
        """Fit the weights by least squares."""
        rule = self.rule(wanted)
        described = {"fitted": rule.hash(), "ridges": RIDGES, "folds": FOLDS, **self._described}

        def make() -> Arrays:
            return {"plan": np.array(self._fit(rule).to_json())}

        return parse_plan(json.loads(self.trajectories.store.get(described, make)["plan"].item()))

    def fit(self, wanted: Wanted, refinement: Refinement | None) -> Plan:
        """Fit the weights, and refine them; whatever serves validation best, the rule included.

        Args:
            wanted: what is fitted.
            refinement: None does without gradients.
        """
        fitted = self.fit_squares(wanted)
        candidates = [self.rule(wanted), fitted]
        if refinement:
            candidates.append(self._refine(fitted, refinement))
        return min(candidates, key=self.validation_error)

    def validation_error(self, plan: Plan) -> float:
        """`typical_error` on the validation pictures."""
        _, validation = self._batches
        return typical_error(plan, validation, self.denoise)

    def fitted_error(self, wanted: Wanted, few: bool = False) -> float:
        """What a search looks at: how far a fit that is not refined is off on validation pictures.

        Args:
            wanted: what is fitted.
            few: on `SEARCHED` batches each, to look at many.
        """
        rule = self.rule(wanted)
        described = {"searched": rule.hash(), "few": few, **self._described}
        batches, validation = (one[:SEARCHED] if few else one for one in self._batches)

        def make() -> Arrays:
            fitted = fit_weights(rule, batches, self.denoise)
            return {"error": np.array(typical_error(fitted, validation, self.denoise))}

        return float(self.trajectories.store.get(described, make)["error"])

    def search(self, budgets: Sequence[int], find: Find) -> list[tuple[int, ...]]:
        """Key calls for each budget: those of a search, or even ones where these serve better.

        Args:
            budgets: numbers of evaluations.
            find: the search, over what is told of errors on few pictures.
        """
        scale = self.trajectories.settings.guidance_scale
        found = find(lambda keys: self.fitted_error(apart(keys, scale), few=True))
        chosen = []
        for budget in budgets:
            choices = (spread_key_calls(budget, self.trajectories.num_calls), found[budget])
            chosen.append(min(choices, key=lambda keys: self.fitted_error(apart(keys, scale))))
        return chosen

    def measure(self, plan: Plan, wanted: Wanted) -> FittedPlan:
        """Measure a plan on the pictures held out, beside the rule with the same key calls."""
        errors, similar = self.compare(plan)
        rule_errors, _ = self.compare(self.rule(wanted))
        prompts = [job.prompt for job in self.held_out.jobs(range(self.held_out.number))]
        measured = Measured(
            num_pictures=self.held_out.number,
            error=float(errors.mean()),
            interval=bootstrap_interval(errors, prompts),
            rule_error=float(rule_errors.mean()),
            psnr=float(similar.mean()),
        )
        return FittedPlan(plan, self.fitted_on, measured)

    @cached_property
    def _described(self) -> dict[str, Any]:
        return self.trajectories.describe(self.pictures, range(self.pictures.number))

    def _fit(self, rule: Plan) -> Plan:
        batches, _ = self._batches
        with progress(total=rule.num_evaluations, desc="least squares") as bar:
            return fit_weights(rule, batches, self.denoise, on_segment=bar.update)

    def _refine(self, plan: Plan, settings: Refinement) -> Plan:
        described = {"refined": plan.hash(), **asdict(settings), **self._described}
        last = self.trajectories.pipeline.scheduler.config.num_train_timesteps - 1

        def keep(step: int, make: Callable[[], Arrays]) -> Arrays:
            return self.trajectories.store.get({**described, "step": step}, make)

        with progress(total=settings.steps, desc="gradients") as bar:
            return refine(
                plan, *self._batches, self.denoise, self.gradients, settings, last, keep, bar.update
            )

    def compare(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """Relative squared error of the latents, and PSNR, of every picture held out [n] each."""
        pipeline, held_out = self.trajectories.pipeline, self.held_out

        def measure(numbers: range) -> Arrays:
            batch = self.trajectories.batch(held_out, numbers)
            latents = run_plan(plan, batch, self.denoise), batch.wanted()[-1]
            pictures = (pipeline.decode(one, "pt").cpu().numpy() for one in latents)
            error = relative_error(*(one.cpu().numpy() for one in latents))
            return {"error": error, "psnr": psnr(*pictures)}

        def find(numbers: range) -> Arrays:
            described = {"measured": plan.hash(), **self.trajectories.describe(held_out, numbers)}
            return self.trajectories.store.get(described, lambda: measure(numbers))

        with progress(held_out.batches, desc="held out") as bar:
            found = join(map(find, bar))
        return found["error"], found["psnr"]


def apart(key_calls: Sequence[int], guidance_scale: float) -> Wanted:
    """Guidance weighted apart at every key call, where there is guidance."""
    branches: Branches = "apart" if rows_per_picture(guidance_scale) == 2 else "guided"
    return Wanted(tuple(key_calls), (branches,) * len(key_calls))


def spread_key_calls(number: int, num_calls: int) -> tuple[int, ...]:
    """So many key calls from 0 on, as evenly as whole numbers allow."""
    return tuple(-(-index * num_calls // number) for index in range(number))
