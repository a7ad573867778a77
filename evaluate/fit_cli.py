"""`encache-fit`: plans whose numbers are learned from the model's own pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from encache.command import Command, echo_path, typed_options
from encache.errors import EncacheError, PlanError
from encache.export.options import EngineDir, ModelOptions
from encache.model.checkpoint import Checkpoint, default_model
from encache.model.preset import Preset
from encache.model.spec import NO_CUT
from encache.options import option, takes
from encache.progress import progress
from encache.runtime.options import KeyCalls, SolverOptions, parse_key_calls

if TYPE_CHECKING:
    from encache.evaluate.fitting import Find
    from encache.evaluate.store import Store
    from encache.evaluate.trajectories import Trajectories
    from encache.runtime.planfile import FittedPlan


#: Evaluations unless others are asked for.
_DEFAULT_RUNS = 10


@dataclass(frozen=True)
class _PlanOptions:
    """Which plans are fitted."""

    runs: tuple[int, ...] = option(
        default=(),
        type=click.IntRange(1),
        multiple=True,
        help="Evaluations of the denoiser per picture; several make a front. "
        f"Default: {_DEFAULT_RUNS}.",
    )
    key_calls: KeyCalls | None = option(
        callback=parse_key_calls,
        help="Where it runs instead, as 0,5,10, or 'paper' for Faster Diffusion's list.",
    )
    search: int = option(
        type=click.IntRange(0),
        default=0,
        help="Generations of NSGA-II that move the key calls; 0 spreads them evenly.",
    )


@dataclass(frozen=True)
class _FitOptions:
    """What they are fitted on, and how."""

    prompts: Path | None = option(
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="One prompt per line, or COCO's captions (.json). Default: the shipped model's own. "
        "Every fourth one is held out.",
    )
    num_images: int = option(type=click.IntRange(16), default=256, help="Pictures to fit on.")
    num_held_out: int = option(type=click.IntRange(2), default=64, help="Pictures to measure on.")
    refine_steps: int = option(
        type=click.IntRange(0), default=80, help="Steps of gradient descent; 0 does without."
    )
    backend: str = option(
        type=click.Choice(("onnxruntime", "torch")),
        default="onnxruntime",
        help="For all that needs no gradient.",
    )
    store: Path = option(
        type=click.Path(path_type=Path),
        default=Path("runs/fit"),
        help="Folder for the full sampler's latents; a repeated command goes on.",
    )


@click.command(cls=Command)
@takes(
    model=ModelOptions,
    sampling=SolverOptions,
    plans=_PlanOptions,
    fitting=_FitOptions,
    place=EngineDir,
)
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="The plan file, a new one."
)
def main(
    model: ModelOptions,
    sampling: SolverOptions,
    plans: _PlanOptions,
    fitting: _FitOptions,
    place: EngineDir,
    output: Path,
) -> None:
    """Fit the numbers of a sampling run to what the full sampler makes of some prompts.

    A plan of the output cache is a table of weights. The rule that makes them by default knows no
    model; fitted ones come nearer to this model's full sampler at the same cost. They hold for the
    solver, steps and guidance that they were fitted for. Prints what each gains on pictures whose
    prompts and seeds were held out.

    Example: encache-fit --runs 5 --runs 10 --runs 17 --output plans.json
    """
    for name in typed_options({"runs", "search"}) if plans.key_calls else ():
        raise click.UsageError(f"{name} means nothing beside --key-calls.")
    if fitting.backend == "torch" and [*typed_options({"engine_dir"})]:
        raise click.UsageError("--engine-dir means nothing with --backend torch.")
    checkpoint = model.find()
    prompts = _read_prompts(fitting.prompts, checkpoint)

    from encache.evaluate.fitting import Fitter, apart
    from encache.evaluate.refine import Refinement, differentiable_model
    from encache.evaluate.store import Store
    from encache.evaluate.trajectories import split_prompts
    from encache.files import check_new
    from encache.runtime.planfile import write_plans

    check_new(output)
    store = Store(fitting.store)
    trajectories = _open(checkpoint, sampling, fitting.backend, store, place.engine_dir)
    scale, num_calls = trajectories.settings.guidance_scale, trajectories.num_calls
    listed = _key_calls(plans, num_calls)
    find = _search(plans.search, num_calls, [len(keys) for keys in listed])
    pictures, held_out = split_prompts(prompts, fitting.num_images, fitting.num_held_out)
    trajectories.draw_missing(pictures, held_out)
    fitter = Fitter(
        trajectories,
        pictures,
        held_out,
        lambda: differentiable_model(checkpoint, scale, trajectories.pipeline.device),
    )
    found = []
    refinement = Refinement(fitting.refine_steps) if fitting.refine_steps else None
    if find:
        listed = fitter.search([len(keys) for keys in listed], find)
    for keys in listed:
        wanted = apart(keys, scale)
        found.append(fitter.measure(fitter.fit(wanted, refinement), wanted))
        click.echo(_describe(found[-1]), err=True)
    write_plans(output, found)
    echo_path(output)


def _read_prompts(path: Path | None, checkpoint: Checkpoint) -> Sequence[str]:
    from encache.evaluate.settings import read_prompts

    if path is None and checkpoint.folder != default_model():
        raise click.UsageError("Give --prompts; only the shipped model has its own.")
    return read_prompts(path or default_model() / "prompts.txt")


def _open(
    checkpoint: Checkpoint,
    sampling: SolverOptions,
    backend: str,
    store: "Store",
    engine_dir: Path,
) -> "Trajectories":
    """The model, its solver, and the store of its trajectories."""
    from encache.evaluate.trajectories import Trajectories
    from encache.runtime.pipeline import EncachePipeline
    from encache.runtime.schedulers import make_scheduler
    from encache.runtime.settings import resolve

    pipeline = EncachePipeline.from_checkpoint(
        checkpoint,
        cut=NO_CUT,
        backend=backend,
        engine_dir=engine_dir,
        report=lambda line: click.echo(line, err=True),
    )
    pipeline.set_progress_bar_config(disable=True)
    if sampling.scheduler:
        pipeline.scheduler = make_scheduler(sampling.scheduler, pipeline.scheduler)
    wished = Preset(steps=sampling.steps, guidance_scale=sampling.guidance_scale)
    settings = resolve(wished, checkpoint.preset, checkpoint.guidance_scale)
    return Trajectories(
        pipeline,
        checkpoint.fingerprint,
        settings.steps,
        settings.guidance_scale,
        store,
    )


def _key_calls(plans: _PlanOptions, num_calls: int) -> list[tuple[int, ...]]:
    """Where the denoiser runs in each of the plans, before a search moves it."""
    from encache.evaluate.fitting import spread_key_calls
    from encache.runtime.key_calls import listed_key_calls

    if plans.key_calls:
        return [listed_key_calls(plans.key_calls, num_calls)]
    budgets = sorted({*plans.runs}) or [min(_DEFAULT_RUNS, num_calls)]
    for budget in budgets:
        if budget > num_calls:
            raise PlanError(f"A plan runs between 1 and {num_calls} calls, not {budget}.")
    return [spread_key_calls(budget, num_calls) for budget in budgets]


def _search(generations: int, num_calls: int, budgets: Sequence[int]) -> "Find | None":
    """What finds better key calls, if that is asked for."""
    if not generations:
        return None
    try:
        from encache.evaluate.search import Search, search_key_calls
    except ImportError as error:
        raise EncacheError('--search needs pymoo: pip install "encache[fit]".') from error
    search = Search(generations=generations)

    def find(error_of: Callable[[tuple[int, ...]], float]) -> dict[int, tuple[int, ...]]:
        with progress(total=search.candidates, desc="key calls") as bar:
            return search_key_calls(num_calls, budgets, error_of, search, bar.update)

    return find


def _describe(found: "FittedPlan") -> str:
    """What a plan gains, in a line."""
    measured = found.measured
    return (
        f"{found.plan.num_evaluations} runs at {', '.join(map(str, found.plan.key_calls))}: latent "
        f"error {measured.error:.3g} ({measured.interval[0]:.3g} to {measured.interval[1]:.3g}), "
        f"{measured.rule_error:.3g} by the rule; {measured.psnr:.1f} dB, {found.share:.0%} of the "
        "full cost"
    )
