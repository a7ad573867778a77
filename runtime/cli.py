"""`encache-run`: from a prompt to pictures, through a cached denoiser."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from encache.command import Command, Text, echo_path, typed_options
from encache.errors import EncacheError
from encache.export.options import EngineOptions, ModelOptions, SizeOptions
from encache.files import read_lines
from encache.model.checkpoint import Checkpoint
from encache.options import option, takes
from encache.runtime.opening import Opening, Run, resolve_run
from encache.runtime.options import EnginesOptions, SamplingOptions

if TYPE_CHECKING:
    from encache.runtime.generator import Generator, Order

#: What a user takes for a file's name; only the first can hold our metadata.
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
#: Pictures at once, unless asked otherwise: memory grows with it, and speed hardly.
BATCH_SIZE = 4


@dataclass(frozen=True)
class _PromptOptions:
    """What to draw."""

    prompts: tuple[str, ...] = option(
        "--prompt", default=(), type=Text(), multiple=True, help="What to draw; repeatable."
    )
    prompts_file: Path | None = option(
        type=click.Path(path_type=Path, exists=True, dir_okay=False), help="One prompt per line."
    )
    negative_prompt: str | None = option(type=Text(), help="What to avoid.")

    def read(self) -> list[str]:
        """The prompts of both options; a file may be a pipe, which can be read once."""
        return [*self.prompts, *(read_lines(self.prompts_file) if self.prompts_file else ())]


@dataclass(frozen=True)
class _OutputOptions:
    """How many pictures, and where they go."""

    seed: int = option(type=click.IntRange(0, 2**63 - 1), default=0, help="Of the first image.")
    num_images: int = option(type=click.IntRange(1), default=1, help="Per prompt.")
    batch_size: int = option(
        type=click.IntRange(1),
        default=BATCH_SIZE,
        help="Most pictures of a prompt at once; each batch is saved before the next.",
    )
    max_decode_batch: int | None = option(
        type=click.IntRange(1),
        help="Most rows (calls x images x guidance) in one decoder run; bounds memory.",
    )
    output: Path = option(
        type=click.Path(path_type=Path),
        default=Path("outputs"),
        help="Folder for the pictures, or a .png file when there is only one.",
    )
    comparing: bool = option(
        "--compare", is_flag=True, default=False, help="Compare speed and fidelity instead."
    )
    repeats: int = option(type=click.IntRange(1), default=5, help="Seeds of --compare.")
    json_path: Path | None = option(
        "--json", type=click.Path(path_type=Path), help="Write the comparison as data."
    )
    dry_run: bool = option(is_flag=True, default=False, help="Print the plan as JSON and stop.")

    @property
    def seeds(self) -> range:
        """Of the pictures of each prompt."""
        return range(self.seed, self.seed + (self.repeats if self.comparing else self.num_images))


@click.command(cls=Command)
@takes(wanted=_PromptOptions, sampling=SamplingOptions, size=SizeOptions, output=_OutputOptions)
@takes(model=ModelOptions, engine=EngineOptions, engines=EnginesOptions)
def main(
    wanted: _PromptOptions,
    sampling: SamplingOptions,
    size: SizeOptions,
    output: _OutputOptions,
    model: ModelOptions,
    engine: EngineOptions,
    engines: EnginesOptions,
) -> None:
    """Draw prompts with Stable Diffusion, running the UNet at key calls only.

    Prints the pictures' paths. Missing engines are built first. Nothing is overwritten: a picture
    that another one's name would hide gets a number, and a repeated command draws only what is
    missing. Weights that were trained for one way to sample name it in their header, and what is
    not typed here follows that.

    Example: encache-run --prompt "red apple" --stride 10
    """
    prompts = wanted.read()
    if not prompts and not output.dry_run:
        raise click.UsageError("Give --prompt, or --prompts-file with a prompt in it.")
    engines.refuse_idle_options(sampling, "comparing")
    _refuse_idle_options(output.comparing)
    size.check()
    # Everything that can be wrong is checked before engines are built, which may take minutes.
    opening = Opening.of(engines.one_folder, model, engine, engines.backend, engines.engine_dir)
    run = resolve_run(
        opening,
        sampling,
        size,
        output.seeds,
        1 if output.comparing else output.batch_size,
        output.max_decode_batch,
    )
    if output.dry_run:
        click.echo(run.plan.to_json())
        return
    from encache.files import check_new
    from encache.runtime.generator import Generator, Order
    from encache.runtime.jobs import Job

    if output.json_path:
        check_new(output.json_path)
    paths = {} if output.comparing else _picture_paths(output.output, prompts, output.seeds)
    if opening.checkpoint and output.comparing:
        _compare(opening.checkpoint, opening, run, prompts, wanted.negative_prompt, size, output)
        return
    generator = Generator(opening, run, size, output.max_decode_batch)
    job = partial(Job, negative_prompt=wanted.negative_prompt, height=size.height, width=size.width)
    batches = [
        [Order(job(prompt, seed), run.settings) for seed in seeds]
        for prompt, seeds in product(prompts, run.batches)
    ]
    if output.output in paths.values():
        _refuse_taken(output.output, generator.describe(batches[0][0]))
    _draw(generator, batches, [*paths.values()])


def _refuse_idle_options(comparing: bool) -> None:
    idle = {"num_images", "batch_size", "output"} if comparing else {"json_path", "repeats"}
    for name in typed_options(idle):
        raise click.UsageError(
            f"{name} means nothing {'with' if comparing else 'without'} --compare."
        )


def _picture_paths(
    output: Path, prompts: Sequence[str], seeds: Sequence[int]
) -> dict[tuple[int, int], Path]:
    """Where the picture of each prompt (by its place) and seed goes; refuses before any work."""
    from encache.files import check_writable
    from encache.runtime.images import file_name

    suffix = output.suffix.lower()
    places = list(product(range(len(prompts)), seeds))
    if output.is_dir() or suffix not in _PICTURE_SUFFIXES:
        check_writable(output)
        return {
            (index, seed): output / file_name(index, prompts[index], seed) for index, seed in places
        }
    if suffix != ".png":
        raise click.UsageError(
            f"--output {output}: pictures are PNG files, with their settings inside. Name a .png "
            "file or a folder."
        )
    if len(places) > 1:
        raise click.UsageError(
            f"--output {output} is one file, but {len(places)} pictures are asked for."
        )
    check_writable(output.parent)
    return {places[0]: output}


def _refuse_taken(output: Path, facts: dict[str, Any]) -> None:
    """A file that the user names gets no other name, unlike the pictures in a folder."""
    from encache.runtime.images import find_png

    if output.exists() and find_png(output, facts) != output:
        raise EncacheError(
            f"{output} exists already, holds something else and is not overwritten: choose another "
            "name, or delete it."
        )


def _draw(
    generator: "Generator", batches: Sequence[Sequence["Order"]], paths: Sequence[Path]
) -> None:
    """Draw and save batch by batch, so that a run that is stopped keeps what it has."""
    from encache.files import WRITERS
    from encache.runtime.images import find_png, save_png

    places = iter(paths)
    with ThreadPoolExecutor(WRITERS) as writers:
        for orders in batches:
            told = [(next(places), generator.describe(order)) for order in orders]
            drawn = [find_png(*one) for one in told]
            if None in drawn:  # the whole batch again, for which engines may be compiled
                generator.pipeline.set_progress_bar_config(desc=orders[0].job.prompt[:40])
                new = [one for one in generator(orders) if drawn[one[0]] is None]
                saved = writers.map(save_png, *zip(*((i, *told[p]) for p, i in new), strict=True))
                for (place, _), path in zip(new, saved, strict=True):
                    drawn[place] = path
            for path in filter(None, drawn):
                echo_path(path)


def _compare(
    source: Checkpoint,
    opening: Opening,
    run: Run,
    prompts: Sequence[str],
    negative_prompt: str | None,
    size: SizeOptions,
    output: _OutputOptions,
) -> None:
    from encache.evaluate.bench import format_table
    from encache.evaluate.comparison import compare
    from encache.evaluate.contenders import Task
    from encache.evaluate.machine import describe_machine
    from encache.files import write_json

    task = Task(
        prompts=tuple(prompts),
        steps=run.settings.steps,
        guidance_scale=run.settings.guidance_scale,
        height=size.height,
        width=size.width,
        policies={},
        negative_prompt=negative_prompt,
    )
    task, rows = compare(
        source,
        None if opening.backend == "torch" else opening.open(run, size),
        run.solver,
        run.settings,
        task,
        output.seeds,
        output.max_decode_batch,
        opening.dtype,
    )
    click.echo(format_table(rows))
    if output.json_path:
        report = {
            "machine": describe_machine(),
            "task": task.facts,
            "seeds": list(output.seeds),
            "settings": asdict(run.settings),
            "dtype": opening.dtype,
            "rows": [asdict(row) for row in rows],
        }
        write_json(output.json_path, report)
