"""Fit plans to the default model and measure them on prompts and seeds held out.

    python benchmarks/fit.py                            # writes benchmarks/fit.json
    python benchmarks/fit.py --num-held-out 64 --part plans --part rows

Everything is kept in the store, so a run that is stopped goes on, and parts can be added.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from encache.evaluate.distribution import bootstrap_interval, bootstrap_ratio
from encache.evaluate.fit import evaluations_of
from encache.evaluate.fitting import Fitter, Wanted, apart, spread_key_calls
from encache.evaluate.machine import describe_machine
from encache.evaluate.refine import Refinement, differentiable_model
from encache.evaluate.search import Search, search_key_calls
from encache.evaluate.settings import read_prompts
from encache.evaluate.store import Store
from encache.evaluate.trajectories import Trajectories, split_prompts
from encache.files import write_json
from encache.model.checkpoint import default_model, find_checkpoint
from encache.progress import progress
from encache.runtime.key_calls import paper_key_calls
from encache.runtime.pipeline import EncachePipeline
from encache.runtime.plan import Branches, Plan, make_plan
from encache.runtime.rules import RULES, plan_of_weights
from encache.runtime.schedulers import make_scheduler
from encache.runtime.settings import FULL, Policy
from encache.runtime.solver import count_calls

FOLDER = Path("runs/fit")
#: Solver, steps and numbers of evaluations.
SAMPLERS = (("ddim", 50, (17, 10, 5)), ("dpmsolver++", 20, (10, 7, 4)))
#: From how many pictures the same plan is fitted.
FEWER = (16, 64)
SEARCHES = Search(generations=6)
#: How many of the unconditional runs are kept: one in so many.
UNCONDITIONAL = (2, 3)
Row = dict[str, Any]


class Study:
    """The default model with one solver.

    Args:
        solver, steps: of the full sampler.
        options: of the command line.
        num_images: to fit on.
    """

    def __init__(
        self, solver: str, steps: int, options: argparse.Namespace, num_images: int
    ) -> None:
        checkpoint = find_checkpoint()
        scale = checkpoint.guidance_scale
        pipeline = EncachePipeline.from_checkpoint(checkpoint, engine_dir=options.engine_dir)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = make_scheduler(solver, pipeline.scheduler)
        self.solver, self.steps, self.scale = solver, steps, scale
        self.scheduler = pipeline.scheduler
        self.num_calls = count_calls(pipeline.scheduler, steps)
        store = Store(options.store)
        trajectories = Trajectories(pipeline, checkpoint.fingerprint, steps, scale, store)
        prompts = read_prompts(default_model() / "prompts.txt")
        pictures, held_out = split_prompts(prompts, num_images, options.num_held_out)
        trajectories.draw_missing(pictures, held_out)
        self.fitter = Fitter(
            trajectories,
            pictures,
            held_out,
            Refinement(options.refine_steps) if options.refine_steps else None,
            lambda: differentiable_model(checkpoint, scale, pipeline.device),
        )

    def row(self, name: str, plan: Plan) -> Row:
        """A plan's errors, beside those of as many plain steps."""
        errors, similar = self.fitter.compare(plan)
        plain, _ = self.fitter.compare(make_plan(self.scheduler, plan.num_evaluations, FULL))
        held_out = self.fitter.held_out
        prompts = [job.prompt for job in held_out.jobs(range(held_out.number))]
        return {
            "solver": self.solver,
            "steps": self.steps,
            "name": name,
            "pictures": self.fitter.pictures.number,
            "key_calls": plan.key_calls,
            "rows": plan.count_rows(2),
            "error": float(errors.mean()),
            "interval": bootstrap_interval(errors, prompts),
            "to_plain": bootstrap_ratio(errors, plain, prompts),
            "psnr": float(similar.mean()),
            "timesteps": [step.timestep for step in evaluations_of(plan)],
            "errors": [float(f"{error:.4g}") for error in errors],
        }

    def rule(self, keys: tuple[int, ...]) -> Plan:
        """The default blend."""
        return make_plan(self.scheduler, self.steps, Policy(key_calls=keys))


def plans(study: Study, budgets: tuple[int, ...]) -> Iterator[Row]:
    """Every budget: plain steps, the rule, least squares, and gradients besides."""
    for budget in budgets:
        keys = spread_key_calls(budget, study.num_calls)
        wanted = apart(keys, study.scale)
        yield study.row("plain", make_plan(study.scheduler, budget, FULL))
        yield study.row("rule", study.rule(keys))
        yield study.row("least squares", study.fitter.fit_squares(wanted))
        if study.fitter.refinement:
            yield study.row("gradients", study.fitter.fit(wanted))


def rules(study: Study, budgets: tuple[int, ...]) -> Iterator[Row]:
    """Published rules at the same key calls, and the published key calls."""
    for budget in budgets:
        keys = spread_key_calls(budget, study.num_calls)
        for name, weigh in RULES.items():
            yield study.row(name, plan_of_weights(study.scheduler, study.steps, keys, weigh, name))
    published = paper_key_calls(study.num_calls)
    yield study.row("published key calls", study.rule(published))
    fitted = study.fitter.fit_squares(apart(published, study.scale))
    yield study.row("published key calls, least squares", fitted)


def searched(study: Study, budgets: tuple[int, ...]) -> Iterator[Row]:
    """Key calls moved by NSGA-II."""
    found = study.fitter.search(
        budgets, lambda error_of: search_key_calls(study.num_calls, budgets, error_of, SEARCHES)
    )
    for keys in found:
        yield study.row("searched key calls, rule", study.rule(keys))
        wanted = apart(keys, study.scale)
        yield study.row("searched key calls, least squares", study.fitter.fit_squares(wanted))
        if study.fitter.refinement:
            yield study.row("searched key calls, gradients", study.fitter.fit(wanted))


def rows(study: Study, budgets: tuple[int, ...]) -> Iterator[Row]:
    """Guidance at fewer calls: more evaluations in as many rows."""
    for budget in budgets:
        for every in UNCONDITIONAL:
            # every * c evaluations in (every + 1) * c rows
            number = min(2 * budget * every // (every + 1), study.num_calls)
            keys = spread_key_calls(number, study.num_calls)
            sparse = tuple(_branches(index % every == 0) for index in range(number))
            early = tuple(_branches(index < 2 * budget - number) for index in range(number))
            for name, branches in ((f"one in {every}", sparse), ("the first", early)):
                wanted = Wanted(keys, branches)
                yield study.row(f"guided {name}, rule", study.fitter.rule(wanted))
                fitted = study.fitter.fit_squares(wanted)
                yield study.row(f"guided {name}, least squares", fitted)


def _branches(guided: bool) -> Branches:
    return "apart" if guided else "conditional"


PARTS = {"plans": plans, "rules": rules, "searched": searched, "rows": rows}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=(*PARTS, "fewer"), default=[])
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--num-held-out", type=int, default=512)
    parser.add_argument("--refine-steps", type=int, default=80)
    parser.add_argument("--store", type=Path, default=FOLDER / "store")
    parser.add_argument("--engine-dir", type=Path, default=FOLDER / "engines")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/fit.json"))
    options = parser.parse_args()
    wanted = options.part or [*PARTS, "fewer"]
    found: list[Row] = []
    for solver, steps, budgets in SAMPLERS:
        study = Study(solver, steps, options, options.num_images)
        for part in (part for part in PARTS if part in wanted):
            found += progress(PARTS[part](study, budgets), desc=f"{solver} {part}")
            _write(options, found)
        for number in FEWER if "fewer" in wanted else ():
            found += plans(Study(solver, steps, options, number), budgets)
            _write(options, found)


def _write(options: argparse.Namespace, found: list[Row]) -> None:
    content = {
        "machine": describe_machine(),
        "protocol": {
            "num_images": options.num_images,
            "num_held_out": options.num_held_out,
            "refinement": asdict(Refinement(options.refine_steps)),
            "search": asdict(SEARCHES),
        },
        "rows": found,
    }
    write_json(options.output, content)


if __name__ == "__main__":
    main()
