"""Fit plans to the default model and measure them on prompts and seeds held out.

    python benchmarks/study.py pictures                 # the real pictures, once
    python benchmarks/fit.py                            # writes benchmarks/fit.json, the plans
    python benchmarks/fit.py --part rules --num-held-out 128

Everything is kept in the store, so a run that is stopped goes on. A part that is run again takes
the place of its rows in the results, and the others stay.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from encache.evaluate.extractors import load_extractor
from encache.evaluate.fitting import Fitter, Wanted, apart, spread_key_calls
from encache.evaluate.machine import describe_machine
from encache.evaluate.real import Real, read_real
from encache.evaluate.refine import Refinement, differentiable_model
from encache.evaluate.rows import make_row, plain_at_equal_arithmetic
from encache.evaluate.rules import RULES, plan_of_weights
from encache.evaluate.sampling import Backend, Evaluation, Model
from encache.evaluate.search import Search, search_key_calls
from encache.evaluate.settings import Protocol, Setting, read_prompts
from encache.evaluate.store import Store
from encache.evaluate.trajectories import Trajectories, split_prompts
from encache.files import write_json
from encache.model.checkpoint import default_model, find_checkpoint
from encache.progress import progress
from encache.runtime.key_calls import paper_key_calls
from encache.runtime.pipeline import EncachePipeline
from encache.runtime.plan import Branches, Plan
from encache.runtime.planfile import FittedPlan, Measured, write_plans
from encache.runtime.schedulers import make_scheduler
from encache.runtime.solver import count_calls
from encache.train.emoji import STYLES

FOLDER = Path("runs/fit")
REAL = Path("runs/study/real")
SHIPPED = "shipped"


@dataclass(frozen=True)
class Sampler:
    """What plans are fitted for.

    Attributes:
        solver: by name; "" for the model's own.
        steps: of the full sampler.
        budgets: numbers of evaluations.
        few: the key calls of plans with so few evaluations are searched; for more of them even ones
            leave little.
    """

    solver: str
    steps: int
    budgets: tuple[int, ...]
    few: int


OWN, OTHER = Sampler("", 50, (17, 13, 11, 10, 5, 3), 5), Sampler("dpmsolver++", 20, (10, 7, 4), 10)
#: Plans of so few evaluations are refined twice as long, since a step costs them so little.
LONGER = 5
#: From how many pictures the same plan is fitted.
FEWER = (16, 32, 64, 128)
#: Evaluations of the plan that is drawn otherwise than it was fitted.
TRANSFERRED = 13
SEARCHES = Search(generations=6)
#: How many of the unconditional runs are kept: one in so many.
UNCONDITIONAL = (2, 3)
Row = dict[str, Any]


class Study:
    """The default model with one solver.

    Args:
        sampler: see `Sampler`.
        options: of the command line.
        num_images: to fit on.
    """

    def __init__(self, sampler: Sampler, options: argparse.Namespace, num_images: int) -> None:
        self.checkpoint = find_checkpoint()
        self.sampler, self.budgets, self.steps = sampler, sampler.budgets, sampler.steps
        self.full = Setting(SHIPPED, sampler.solver, sampler.steps)
        self.scale = self.checkpoint.guidance_scale
        self.options = options
        self.store = Store(options.store)
        self.extractor = load_extractor("efficientnet-lite0")
        prompts = read_prompts(default_model() / "prompts.txt")
        self.pictures, self.held_out = split_prompts(prompts, num_images, options.num_held_out)
        backend = Backend("onnxruntime", engine_dir=options.engine_dir)
        self.models = {SHIPPED: Model(self.checkpoint, backend)}
        self.scheduler = self.models[SHIPPED].scheduler(self.full)
        self.num_calls = count_calls(self.scheduler, self.steps)
        self.evaluation = self.evaluate(
            Protocol(self.held_out.prompts, options.num_held_out, self.scale, batch_size=16)
        )

    def evaluate(self, protocol: Protocol) -> Evaluation:
        """The pictures of a protocol, measured and kept."""
        return Evaluation(self.models, protocol, self.store, self.extractor)

    @cached_property
    def real(self) -> Real:
        """The real pictures, as the extractor sees them."""
        return read_real(REAL, self.extractor, (64, 64), self.store)

    @cached_property
    def fitter(self) -> Fitter:
        """Fits on trajectories, which are drawn first."""
        pipeline = EncachePipeline.from_checkpoint(
            self.checkpoint, engine_dir=self.options.engine_dir
        )
        pipeline.set_progress_bar_config(disable=True)
        if self.full.scheduler:
            pipeline.scheduler = make_scheduler(self.full.scheduler, pipeline.scheduler)
        trajectories = Trajectories(
            pipeline, self.checkpoint.fingerprint, self.steps, self.scale, self.store
        )
        trajectories.draw_missing(self.pictures)
        return Fitter(
            trajectories,
            self.pictures,
            self.held_out,
            lambda: differentiable_model(self.checkpoint, self.scale, pipeline.device),
        )

    def row(self, name: str, setting: Setting, evaluation: Evaluation | None = None) -> Row:
        """A setting, measured beside the full sampler and as many plain steps."""
        evaluation = evaluation or self.evaluation
        protocol, full = evaluation.protocol, self.full
        opponent = plain_at_equal_arithmetic(self.models, protocol, setting, full)
        measured = make_row(evaluation, setting, full, full, opponent, self.real)
        errors = evaluation.compare_all(setting, full)["latent_error"]
        plan = self.models[SHIPPED].plan(setting)
        rows = plan.count_rows(protocol.rows_of(setting))
        return {
            **asdict(measured),
            "name": name,
            "solver": self.full.scheduler or "ddim",
            "pictures": self.pictures.number,
            "rows": rows,
            "errors": [float(f"{error:.4g}") for error in errors],
        }

    def search(self) -> list[tuple[int, ...]]:
        """Key calls of few runs moved by NSGA-II, or even ones where these serve better."""
        budgets = [budget for budget in self.budgets if budget <= self.sampler.few]
        return self.fitter.search(
            budgets,
            lambda error_of: search_key_calls(self.num_calls, budgets, error_of, SEARCHES),
        )

    def rule(self, keys: tuple[int, ...]) -> Setting:
        """The default blend."""
        return replace(self.full, key_calls=keys)

    def by(self, plan: Plan) -> Setting:
        """A fitted plan, or a rule's."""
        return replace(self.full, fitted=plan)

    def squares(self, keys: tuple[int, ...]) -> Setting:
        """Fitted by least squares."""
        return self.by(self.fitter.fit_squares(apart(keys, self.scale)))

    def refined(self, keys: tuple[int, ...]) -> Setting:
        """Fitted by least squares and gradients."""
        steps = self.options.refine_steps * (2 if len(keys) <= LONGER else 1)
        return self.by(self.fitter.fit(apart(keys, self.scale), Refinement(steps)))


def plans(study: Study) -> Iterator[Row]:
    """Every budget: plain steps, the rule, least squares, and gradients besides."""
    yield study.row("full", study.full)
    for budget in study.budgets:
        keys = spread_key_calls(budget, study.num_calls)
        yield study.row("plain", replace(study.full, steps=budget))
        yield study.row("rule", study.rule(keys))
        yield study.row("least squares", study.squares(keys))
        yield study.row("gradients", study.refined(keys))


def rules(study: Study) -> Iterator[Row]:
    """Published rules at the same key calls, and the published key calls."""
    for budget in study.budgets:
        keys = spread_key_calls(budget, study.num_calls)
        for name, weigh in RULES.items():
            plan = plan_of_weights(study.scheduler, study.steps, keys, weigh, name)
            yield study.row(name, study.by(plan))
    published = paper_key_calls(study.num_calls)
    yield study.row("published key calls", study.rule(published))
    yield study.row("published key calls, least squares", study.squares(published))


def searched(study: Study) -> Iterator[Row]:
    """Key calls moved by NSGA-II."""
    for keys in study.search():
        ways = {"rule": study.rule, "least squares": study.squares, "gradients": study.refined}
        for way, make in ways.items():
            yield {**study.row(way, make(keys)), "key_calls": keys}


def rows(study: Study) -> Iterator[Row]:
    """Guidance at fewer calls: more evaluations in as many rows."""
    for budget in study.budgets:
        for where, guided in _guided(budget, study.num_calls).items():
            branches = tuple(_branches(one) for one in guided)
            wanted = Wanted(spread_key_calls(len(guided), study.num_calls), branches)
            fitted = study.fitter.fit_squares(wanted)
            ways = {"rule": study.fitter.rule(wanted), "least squares": fitted}
            for way, plan in ways.items():
                yield {**study.row(way, study.by(plan)), "guided": where, "budget": budget}


def _guided(budget: int, num_calls: int) -> dict[str, list[bool]]:
    """Which evaluations are guided, where not all are, in as many rows as a budget of them."""
    found = {"all but the last two": [True] * (budget - 1) + [False] * 2}
    for every in UNCONDITIONAL:
        # every * c evaluations in (every + 1) * c rows
        number = min(2 * budget * every // (every + 1), num_calls)
        found[f"one in {every}"] = [index % every == 0 for index in range(number)]
        found[f"the first of {every}"] = [index < 2 * budget - number for index in range(number)]
    return found


def _branches(guided: bool) -> Branches:
    return "apart" if guided else "conditional"


def transfer(study: Study) -> Iterator[Row]:
    """What was fitted on plain names at the model's own guidance and size, drawn otherwise."""
    keys = spread_key_calls(TRANSFERRED, study.num_calls)
    settings = {
        "plain": replace(study.full, steps=TRANSFERRED),
        "rule": study.rule(keys),
        "gradients": study.refined(keys),
    }
    protocol = study.evaluation.protocol
    names = [f"{STYLES[0].word} {name}" for name in protocol.prompts]
    others = {
        "as fitted": protocol,
        "prompts in a style": replace(protocol, prompts=tuple(names)),
        "guidance 2": replace(protocol, guidance_scale=2.0),
        "guidance 5": replace(protocol, guidance_scale=5.0),
        "96 x 64 pixels": replace(protocol, height=96, width=64),
    }
    for condition, other in others.items():
        evaluation = study.evaluate(other)
        for name, setting in settings.items():
            yield {**study.row(name, setting, evaluation), "condition": condition}


PARTS = {
    "plans": plans,
    "searched": searched,
    "rules": rules,
    "rows": rows,
    "transfer": transfer,
}
#: Of the model's own solver alone.
ALONE = {"transfer"}


def fewer(options: argparse.Namespace) -> Iterator[Row]:
    """The same plans from fewer pictures."""
    for number in FEWER:
        study = Study(OWN, options, number)
        for budget in study.budgets:
            keys = spread_key_calls(budget, study.num_calls)
            yield study.row("least squares", study.squares(keys))


def ship(study: Study, path: Path) -> None:
    """Write the plan of each budget that serves the validation pictures best, as it measured."""
    moved = {len(keys): keys for keys in study.search()}
    shipped = []
    for budget in study.budgets:
        spread = spread_key_calls(budget, study.num_calls)
        candidates = [study.refined(keys).fitted for keys in {spread, moved.get(budget, spread)}]
        best = min(filter(None, candidates), key=study.fitter.validation_error)
        row, rule = study.row("", study.by(best)), study.row("", study.rule(best.key_calls))
        error = row["latent_error"]
        measured = Measured(
            num_pictures=row["num_images"],
            error=error["mean"],
            interval=(error["low"], error["high"]),
            rule_error=rule["latent_error"]["mean"],
            psnr=row["psnr"]["mean"],
        )
        shipped.append(FittedPlan(best, study.fitter.fitted_on, measured))
    write_plans(path, shipped)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=(*PARTS, "fewer"), default=[])
    parser.add_argument("--sampler", action="append", choices=("ddim", "dpmsolver++"), default=[])
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--num-held-out", type=int, default=512)
    parser.add_argument("--refine-steps", type=int, default=80)
    parser.add_argument("--store", type=Path, default=FOLDER / "store")
    parser.add_argument("--engine-dir", type=Path, default=FOLDER / "engines")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/fit.json"))
    parser.add_argument("--plans", type=Path, help="Write the best plans there, a new file.")
    options = parser.parse_args()
    wanted = options.part or [*PARTS, "fewer"]
    for sampler in (OWN, OTHER):
        name = sampler.solver or "ddim"
        if options.sampler and name not in options.sampler:
            continue
        study = Study(sampler, options, options.num_images)
        for part in PARTS:
            if part not in wanted or (part in ALONE and sampler is not OWN):
                continue
            start = time.perf_counter()
            found = [*progress(PARTS[part](study), desc=f"{name} {part}")]
            _write(options, f"{name} {part}", found, time.perf_counter() - start)
        if options.plans and sampler is OWN:
            ship(study, options.plans)
    if "fewer" in wanted:
        _write(options, "ddim fewer", [*fewer(options)], 0.0)


def _write(options: argparse.Namespace, part: str, rows: list[Row], seconds: float) -> None:
    known = json.loads(options.output.read_text()) if options.output.exists() else {"parts": {}}
    protocol = {
        "num_images": options.num_images,
        "num_held_out": options.num_held_out,
        "refinement": asdict(Refinement(options.refine_steps)),
        "search": asdict(SEARCHES),
        "machine": describe_machine(),
        "seconds": round(seconds),
    }
    write_json(
        options.output, {"parts": {**known["parts"], part: {"protocol": protocol, "rows": rows}}}
    )


if __name__ == "__main__":
    main()
