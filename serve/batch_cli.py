"""`encache-batch`: a list of prompts to a folder of pictures, on one machine or many."""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from encache import __version__
from encache.command import Command, Text, echo_path, typed_options
from encache.export.options import EngineOptions, ModelOptions, SizeOptions
from encache.options import option, takes
from encache.runtime.opening import Opening, Run, resolve_run
from encache.runtime.options import EnginesOptions, SamplingOptions

if TYPE_CHECKING:
    from encache.serve.bulk import Recipe
    from encache.serve.rows import Row


@dataclass(frozen=True)
class _ListOptions:
    """What to draw."""

    negative_prompt: str | None = option(
        type=Text(), help="What to avoid, where the list does not say."
    )
    seed: int = option(
        type=click.IntRange(0, 2**63 - 1), default=0, help="Where the list does not say."
    )
    num_images: int = option(
        type=click.IntRange(1), default=1, help="Per row, of seeds one after another."
    )


@dataclass(frozen=True)
class _OutputOptions:
    """Where the pictures go, and how many are drawn at once."""

    output: Path = option(
        type=click.Path(path_type=Path, file_okay=False), default=Path("pictures"), help="Folder."
    )
    shards: bool = option(
        is_flag=True, default=False, help="webdataset shards instead of files and metadata.jsonl."
    )
    shard_size: int = option(type=click.IntRange(1), default=1000, help="Pictures in each.")
    batch_size: int = option(type=click.IntRange(1), default=8, help="Most pictures at once.")
    max_decode_batch: int | None = option(
        type=click.IntRange(1), help="Most rows in one decoder run; bounds memory."
    )
    dry_run: bool = option(
        is_flag=True, default=False, help="Print what is to be drawn and its cost, and stop."
    )


@dataclass(frozen=True)
class _WorkerOptions:
    """Who draws."""

    workers: int | None = option(
        type=click.IntRange(1),
        help="Processes, each with engines of its own. Default: this one; in a cluster one per "
        "GPU, or per --cores.",
    )
    cores: int | None = option(
        type=click.IntRange(1),
        help="Of each worker. Default: its share of this machine; in a cluster 1.",
    )
    ray_address: str | None = option(
        help="Of a Ray cluster; auto finds the one that this machine is in."
    )


@click.command(cls=Command)
@click.argument("prompts", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@takes(wanted=_ListOptions, sampling=SamplingOptions, size=SizeOptions, output=_OutputOptions)
@takes(work=_WorkerOptions, model=ModelOptions, engine=EngineOptions, engines=EnginesOptions)
def main(
    prompts: Path,
    wanted: _ListOptions,
    sampling: SamplingOptions,
    size: SizeOptions,
    output: _OutputOptions,
    work: _WorkerOptions,
    model: ModelOptions,
    engine: EngineOptions,
    engines: EnginesOptions,
) -> None:
    """Draw a list of prompts: .txt (one per line), .csv, .jsonl or .parquet.

    Columns: prompt, and if wanted seed, negative_prompt, height and width. Prints the folder, which
    encache-train reads. A repeated command draws only what is missing, whatever stopped the first.
    The number of workers does not change the pictures.

    Example: encache-batch prompts.csv --output pictures --stride 5
    """
    engines.refuse_idle_options(sampling)
    _refuse_idle_options(output, work)
    from encache.runtime.jobs import Job
    from encache.serve.bulk import draw_rows
    from encache.serve.outputs import ImageFolder, Shards, claiming
    from encache.serve.rows import read_rows

    size.check()
    default = Job("", wanted.seed, wanted.negative_prompt, size.height, size.width)
    rows = read_rows(prompts, wanted.num_images, default)
    folder = engines.one_folder
    # A worker may run in another working folder.
    place = engines.engine_dir.absolute()
    opening = Opening.of(folder and place, model, engine, engines.backend, place)
    recipe = _settle(opening, rows, sampling, size, output)
    if output.dry_run:
        click.echo(json.dumps(_cost(rows, recipe), indent=1))
        return
    settings = _settings(recipe.opening, recipe.run, output, rows)
    with claiming(output.output, settings):
        pictures = (
            Shards(output.output, rows, output.shard_size)
            if output.shards
            else ImageFolder(output.output, rows)
        )
        with redirect_stdout(sys.stderr):  # what Ray says of workers that it lost
            draw_rows(rows, recipe, pictures, _who_draws(recipe, work))
    echo_path(output.output)


def _refuse_idle_options(output: _OutputOptions, work: _WorkerOptions) -> None:
    if not output.shards:
        for name in typed_options({"shard_size"}):
            raise click.UsageError(f"{name} means nothing without --shards.")
    if not (work.workers or work.ray_address):
        for name in typed_options({"cores"}):
            raise click.UsageError(f"{name} means nothing without --workers or --ray-address.")


def _settle(
    opening: Opening,
    rows: "list[Row]",
    sampling: SamplingOptions,
    size: SizeOptions,
    output: _OutputOptions,
) -> "Recipe":
    """What every worker opens; all that can be wrong is checked before any picture is drawn."""
    from encache.serve.bulk import Recipe

    # Full batches, and a last one of any length: as many seeds as give both.
    seeds = range(output.batch_size + 1)
    run = resolve_run(opening, sampling, size, seeds, output.batch_size, output.max_decode_batch)
    if opening.manifest and (target := opening.manifest.identity.target):
        for height, width in {(row.job.height, row.job.width) for row in rows}:
            target.refuse_beyond(rows=run.settings.rows, height=height, width=width)
    # Without what was loaded to look at it: every worker loads its own.
    return Recipe(replace(opening), run, size, output.max_decode_batch)


def _settings(
    opening: Opening, run: Run, output: _OutputOptions, rows: "list[Row]"
) -> dict[str, Any]:
    """What decides the pictures of a folder, beside its rows; shards also depend on the list."""
    from encache.runtime.plan import make_plan
    from encache.runtime.schedulers import full_config
    from encache.serve.rows import digest_of

    listed = {"list": digest_of(rows), "shard_size": output.shard_size} if output.shards else {}
    return {
        "encache": __version__,
        "format": "shards" if output.shards else "files",
        "model": opening.fingerprint,
        "backend": opening.manifest.identity.backend if opening.manifest else opening.backend,
        "dtype": opening.dtype,
        "cut": opening.cut,
        "guidance_scale": run.settings.guidance_scale,
        "scheduler": full_config(run.solver),
        "plan": make_plan(run.solver, run.settings.steps, run.settings.policy).hash(),
        **listed,
    }


def _cost(rows: "list[Row]", recipe: "Recipe") -> dict[str, Any]:
    from encache.runtime.generator import cost_of

    each = cost_of(recipe.run.solver, recipe.run.settings)
    return {"pictures": len(rows), **{name: len(rows) * one for name, one in vars(each).items()}}


def _who_draws(recipe: "Recipe", work: _WorkerOptions) -> Any:
    from encache.serve.bulk import Cluster, draw_here, draw_with_ray

    if work.workers in (None, 1) and not work.ray_address:
        return partial(draw_here, recipe)
    return partial(draw_with_ray, recipe, Cluster(work.ray_address, work.workers, work.cores))


if __name__ == "__main__":
    main()
