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
from encache.contract.library import COMPILED
from encache.errors import EncacheError
from encache.export.options import (
    EngineOptions,
    ModelOptions,
    SizeOptions,
    refuse_without_cut,
)
from encache.files import check_new, read_lines, write_json
from encache.model.checkpoint import Checkpoint
from encache.options import names_of, option, takes
from encache.runtime.inputs import InputOptions
from encache.runtime.opening import Opening, Run, resolve_run
from encache.runtime.options import EnginesOptions, SamplingOptions

if TYPE_CHECKING:
    from encache.runtime.generator import Generator, Order
    from encache.runtime.host import Host, Wish

#: What a user takes for a file's name; only the first can hold our metadata.
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_NO_PROMPT = "Give --prompt, or --prompts-file with a prompt in it."
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
@takes(wanted=_PromptOptions, inputs=InputOptions, sampling=SamplingOptions, size=SizeOptions)
@takes(output=_OutputOptions, model=ModelOptions, engine=EngineOptions, engines=EnginesOptions)
def main(
    wanted: _PromptOptions,
    inputs: InputOptions,
    sampling: SamplingOptions,
    size: SizeOptions,
    output: _OutputOptions,
    model: ModelOptions,
    engine: EngineOptions,
    engines: EnginesOptions,
) -> None:
    """Draw prompts with Stable Diffusion, running the UNet at key calls only.

    A picture to change, a mask, a ControlNet, a number of frames, or a checkpoint of another
    diffusers pipeline ask for that pipeline, which keeps its own loop; clips become GIFs.

    Prints the pictures' paths. Missing engines are built first. Nothing is overwritten: a picture
    that another one's name would hide gets a number, and a repeated command draws only what is
    missing. Weights that were trained for one way to sample name it in their header, and what is
    not typed here follows that.

    Example: encache-run --prompt "red apple" --stride 10
    """
    prompts = wanted.read()
    engines.refuse_idle_options(sampling, "comparing", *names_of(InputOptions))
    _refuse_idle_options(output.comparing)
    size.check()
    if not engines.one_folder:
        source = model.find(hosted=True)
        if (checkpoint := inputs.settle(source)).family.hosted:
            wishes = _wishes(checkpoint, inputs, prompts, output.seeds)
            host = _open_host(
                checkpoint, source, inputs, sampling, size, wanted, engine, engines, output
            )
            _run_hosted(host, wishes, engines, output)
            return
    if not prompts and not output.dry_run:
        raise click.UsageError(_NO_PROMPT)
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


def _wishes(
    checkpoint: Checkpoint, inputs: InputOptions, prompts: Sequence[str], seeds: Sequence[int]
) -> "list[Wish]":
    """What a pipeline of its own loop draws; or raise UsageError where that is not said."""
    from encache.runtime.host import Wish

    for name in typed_options({"plan_file", "quality", "budget", "batch_size", "dry_run"}):
        raise click.UsageError(
            f"{name} means nothing for {checkpoint.family.title}: this pipeline keeps its own loop."
        )
    if not checkpoint.family.text_encoders:
        if prompts:
            raise click.UsageError(f"{checkpoint.family.title} reads no prompt: leave it out.")
        return [Wish(seed, label=one) for one, seed in product(inputs.class_label, seeds)]
    if not prompts:
        raise click.UsageError(_NO_PROMPT)
    return [Wish(seed, prompt) for prompt, seed in product(prompts, seeds)]


def _open_host(
    checkpoint: Checkpoint,
    source: Checkpoint,
    inputs: InputOptions,
    sampling: SamplingOptions,
    size: SizeOptions,
    wanted: _PromptOptions,
    engine: EngineOptions,
    engines: EnginesOptions,
    output: _OutputOptions,
) -> "Host":
    """Open it; everything that can be wrong is checked before engines are built."""
    from encache.model.controlnet import find_controlnet
    from encache.runtime.host import Host
    from encache.runtime.inputs import read_inputs

    cut = engine.cut or checkpoint.cut
    refuse_without_cut(cut, "max_decode_batch")
    if engines.backend == COMPILED:
        name = checkpoint.family.pipeline
        raise click.UsageError(f"{name} runs with --backend torch, and not compiled yet.")
    return Host(
        checkpoint,
        source,
        read_inputs(inputs, checkpoint.family),
        sampling,
        size,
        negative_prompt=wanted.negative_prompt,
        cut=cut,
        backend=engines.backend,
        dtype=engine.dtype,
        controlnets=[find_controlnet(one) for one in inputs.controlnet],
        max_decode_batch=output.max_decode_batch,
    )


def _run_hosted(
    host: "Host", wishes: "Sequence[Wish]", engines: EnginesOptions, output: _OutputOptions
) -> None:
    """Draw and save one after another, so that a run that is stopped keeps what it has."""
    from encache.runtime.images import find_picture, save_gif, save_png, to_image

    host.refuse_unknown_classes(wishes)
    if output.json_path:
        check_new(output.json_path)
    if output.comparing:
        _compare_hosted(host, wishes, engines, output)
        return
    suffix = ".gif" if host.frames else ".png"
    words = list(dict.fromkeys(one.words for one in wishes))
    paths = _picture_paths(output.output, words, output.seeds, suffix)
    places = list(zip(wishes, paths.values(), strict=True))
    if output.output in paths.values():
        _refuse_taken(output.output, host.describe(wishes[0]))
    drawn = [find_picture(path, host.describe(wish)) for wish, path in places]
    if None in drawn and engines.backend != "torch":
        folder = host.build(engines.engine_dir, lambda line: click.echo(line, err=True))
        host.enable(folder)
    elif None in drawn:
        host.enable()
    for (wish, path), found in zip(places, drawn, strict=True):
        if found is None:
            pixels, facts = host.draw(wish), host.describe(wish)
            if suffix == ".gif":
                found = save_gif(pixels, path, facts)
            else:
                found = save_png(to_image(pixels[0]), path, facts)
        echo_path(found)


def _compare_hosted(
    host: "Host", wishes: "Sequence[Wish]", engines: EnginesOptions, output: _OutputOptions
) -> None:
    from encache.evaluate.bench import format_table
    from encache.evaluate.hosted import compare
    from encache.evaluate.machine import describe_machine

    folder = None
    if engines.backend != "torch":
        folder = host.build(engines.engine_dir, lambda line: click.echo(line, err=True))
    rows = compare(host, wishes, folder)
    click.echo(format_table(rows))
    if output.json_path:
        report = {
            "machine": describe_machine(),
            "task": host.describe(wishes[0]),
            "seeds": list(output.seeds),
            "rows": [asdict(row) for row in rows],
        }
        write_json(output.json_path, report)


def _refuse_idle_options(comparing: bool) -> None:
    idle = {"num_images", "batch_size", "output"} if comparing else {"json_path", "repeats"}
    for name in typed_options(idle):
        raise click.UsageError(
            f"{name} means nothing {'with' if comparing else 'without'} --compare."
        )


def _picture_paths(
    output: Path, prompts: Sequence[str], seeds: Sequence[int], kind: str = ".png"
) -> dict[tuple[int, int], Path]:
    """Where the picture of each prompt (by its place) and seed goes; refuses before any work."""
    from encache.files import check_writable
    from encache.runtime.images import file_name

    suffix = output.suffix.lower()
    places = list(product(range(len(prompts)), seeds))
    if output.is_dir() or suffix not in _PICTURE_SUFFIXES:
        check_writable(output)
        return {
            (index, seed): output / file_name(index, prompts[index], seed, kind)
            for index, seed in places
        }
    if suffix != kind:
        what = "pictures are PNG" if kind == ".png" else "clips are GIF"
        raise click.UsageError(
            f"--output {output}: {what} files, with their settings inside. Name a {kind} file or a "
            "folder."
        )
    if len(places) > 1:
        raise click.UsageError(
            f"--output {output} is one file, but {len(places)} pictures are asked for."
        )
    check_writable(output.parent)
    return {places[0]: output}


def _refuse_taken(output: Path, facts: dict[str, Any]) -> None:
    """A file that the user names gets no other name, unlike the pictures in a folder."""
    from encache.runtime.images import find_picture

    if output.exists() and find_picture(output, facts) != output:
        raise EncacheError(
            f"{output} exists already, holds something else and is not overwritten: choose another "
            "name, or delete it."
        )


def _draw(
    generator: "Generator", batches: Sequence[Sequence["Order"]], paths: Sequence[Path]
) -> None:
    """Draw and save batch by batch, so that a run that is stopped keeps what it has."""
    from encache.files import WRITERS
    from encache.runtime.images import find_picture, save_png

    places = iter(paths)
    with ThreadPoolExecutor(WRITERS) as writers:
        for orders in batches:
            told = [(next(places), generator.describe(order)) for order in orders]
            drawn = [find_picture(*one) for one in told]
            if None in drawn:  # the whole batch again, for which engines may be compiled
                generator.pipeline.set_progress_bar_config(desc=orders[0].job.prompt[:40])
                saving = {
                    place: writers.submit(save_png, image, *told[place])
                    for place, image in generator(orders)
                    if drawn[place] is None
                }
                for place, saved in saving.items():
                    drawn[place] = saved.result()
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
