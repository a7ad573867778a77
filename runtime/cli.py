"""`encache-run`: from a prompt to pictures, through cached encoder features."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from encache import __version__
from encache.command import Command, FiniteFloat, Text, echo_path, typed_options
from encache.contract.dtypes import default_dtype
from encache.contract.library import BACKENDS, TENSORRT_BACKENDS
from encache.contract.manifest import MANIFEST, Manifest, read_manifest
from encache.contract.target import DECODE_CALLS, Span, Target, make_target, most_rows
from encache.errors import CheckpointError, EncacheError
from encache.export.options import engine_options, named_model
from encache.files import read_lines
from encache.model.checkpoint import Checkpoint, find_checkpoint
from encache.model.preset import Preset
from encache.model.spec import NO_CUT, Cut, check_size
from encache.runtime.blend import BLENDS, DEFAULT_BLEND, DEFAULT_STRIDE, Blend
from encache.runtime.schedulers import SCHEDULERS
from encache.runtime.settings import DEFAULT_STEPS, Settings, resolve

if TYPE_CHECKING:
    from encache.evaluate.contenders import Task
    from encache.runtime.pipeline import EncachePipeline
    from encache.runtime.plan import Plan
    from encache.runtime.solver import Scheduler

#: What a user takes for a file's name; only the first can hold our metadata.
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
#: Pictures at once, unless asked otherwise: memory grows with it, and speed hardly.
BATCH_SIZE = 4


def _parse_key_calls(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | Literal["paper"] | None:
    if value is None:
        return None
    if value == "paper":
        return "paper"
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is not a list like 0,5,10 or the word paper."
        ) from None


@click.command(cls=Command)
@click.option("--prompt", "prompts", type=Text(), multiple=True, help="What to draw; repeatable.")
@click.option(
    "--prompts-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="One prompt per line.",
)
@click.option("--negative-prompt", type=Text(), help="What to avoid.")
@click.option(
    "--stride",
    type=click.IntRange(1),
    help="The encoder runs at every stride-th call; 1 runs it at all. Default: the weights' own, "
    f"or {DEFAULT_STRIDE}, or the number of calls if that is less.",
)
@click.option(
    "--key-calls",
    callback=_parse_key_calls,
    help="Calls at which the encoder runs, as 0,5,10, or 'paper' for Faster Diffusion's list.",
)
@click.option(
    "--blend",
    type=click.Choice(BLENDS),
    show_default=f"the weights' own, or {DEFAULT_BLEND}",
)
@click.option(
    "--prior-noise/--no-prior-noise",
    default=None,
    help="Inject prior noise as Faster Diffusion does. Default: as the weights want it, or not.",
)
@click.option(
    "--steps",
    "--num-inference-steps",
    "steps",
    type=click.IntRange(1),
    show_default=f"the weights' own, or {DEFAULT_STEPS}",
)
@click.option("--scheduler", type=click.Choice(tuple(SCHEDULERS)), help="Default: the model's own.")
@click.option(
    "--guidance-scale",
    type=FiniteFloat(),
    help="1 or less turns it off. Default: the model's own.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Of the first image.",
)
@click.option(
    "--num-images", type=click.IntRange(1), default=1, show_default=True, help="Per prompt."
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=BATCH_SIZE,
    show_default=True,
    help="Most pictures of a prompt at once; each batch is saved before the next.",
)
@click.option("--height", type=click.IntRange(8), help="Pixels. Default: the model's own size.")
@click.option("--width", type=click.IntRange(8), help="Pixels. Default: the model's own size.")
@click.option(
    "--max-decode-batch",
    type=click.IntRange(1),
    help="Most rows (calls x images x guidance) in one decoder run; bounds memory.",
)
@engine_options
@click.option(
    "--backend",
    type=click.Choice(("torch", *BACKENDS)),
    default="onnxruntime",
    show_default=True,
)
@click.option(
    "--engine-dir",
    type=click.Path(path_type=Path),
    default=Path("engines"),
    show_default=True,
    help="Where engines are found, or built on first use; or one engine folder.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("outputs"),
    show_default=True,
    help="Folder for the pictures, or a .png file when there is only one.",
)
@click.option("--compare", "comparing", is_flag=True, help="Compare speed and fidelity instead.")
@click.option(
    "--repeats", type=click.IntRange(1), default=5, show_default=True, help="Seeds of --compare."
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the comparison as data."
)
@click.option("--dry-run", is_flag=True, help="Print the plan as JSON and stop.")
def main(
    prompts: tuple[str, ...],
    prompts_file: Path | None,
    negative_prompt: str | None,
    stride: int | None,
    key_calls: tuple[int, ...] | Literal["paper"] | None,
    blend: Blend | None,
    prior_noise: bool | None,
    steps: int | None,
    scheduler: str | None,
    guidance_scale: float | None,
    seed: int,
    num_images: int,
    batch_size: int,
    height: int | None,
    width: int | None,
    max_decode_batch: int | None,
    ckpt: str | None,
    fast: bool,
    base: str | None,
    variant: str | None,
    loras: tuple[str, ...],
    vae: str | None,
    cut: Cut | None,
    dtype: str | None,
    backend: str,
    engine_dir: Path,
    output: Path,
    comparing: bool,
    repeats: int,
    json_path: Path | None,
    dry_run: bool,
) -> None:
    """Draw prompts with Stable Diffusion, running the UNet's encoder only at key calls.

    Prints the pictures' paths. Missing engines are built first. Nothing is overwritten: a picture
    that another one's name would hide gets a number, and a repeated command draws only what is
    missing. Weights that were trained for one way to sample name it in their header, and what is
    not typed here follows that.

    Example: encache-run --prompt "red apple" --stride 10
    """
    wanted = [*prompts, *(read_lines(prompts_file) if prompts_file else ())]
    if not wanted and not dry_run:
        raise click.UsageError("Give --prompt, or --prompts-file with a prompt in it.")
    one_folder = (engine_dir / MANIFEST).is_file()
    _refuse_what_would_be_ignored(
        engine_dir if one_folder else None, comparing, bool(key_calls), backend
    )

    from encache.files import check_new
    from encache.runtime.pipeline import refuse_beyond
    from encache.runtime.plan import make_plan
    from encache.runtime.schedulers import full_config, make_scheduler

    # Everything that can be wrong is checked before engines are built, which may take minutes.
    check_size(*(side for side in (height, width) if side))
    dtype = dtype or default_dtype(backend)
    seeds = range(seed, seed + (repeats if comparing else num_images))
    model: Checkpoint | Manifest
    source = manifest = pipeline = None
    if one_folder:
        model = manifest = read_manifest(engine_dir)
        cut = manifest.identity.cut
    else:
        named = named_model(ckpt, fast)
        model = source = find_checkpoint(named, base, loras, vae, variant)
        cut = cut or source.cut
    if cut == NO_CUT:
        for option in typed_options({"max_decode_batch"}):
            raise click.UsageError(f"{option} means nothing without a --cut: nothing is decoded.")
    if source and source.folder is None:  # a single file alone says nothing until it is loaded
        if backend in TENSORRT_BACKENDS:
            raise CheckpointError(f"{ckpt} alone does not say what to compile: add --base.")
        pipeline = _open(source, cut, dtype, backend, None, engine_dir)
        solver = pipeline.scheduler
    else:
        solver = _read_scheduler(source, engine_dir, manifest)
    if scheduler:
        solver = make_scheduler(scheduler, solver)
    wished = Preset(
        steps=steps,
        guidance_scale=guidance_scale,
        stride=stride,
        blend=blend,
        prior_noise=prior_noise,
        cut=cut,
    )
    chosen = resolve(wished, model.preset, model.guidance_scale)
    if key_calls:
        listed = _resolve_key_calls(key_calls, solver, chosen.steps)
        chosen = replace(chosen, policy=replace(chosen.policy, stride=None, key_calls=listed))
    rows_per_picture = chosen.rows
    target = manifest.identity.target if manifest else None
    if target and not comparing:
        batch_size = min(batch_size, max(1, target.rows[1] // rows_per_picture))
    batches = _split(seeds, 1 if comparing else batch_size)
    if target:
        for size in {len(batch) for batch in batches}:
            refuse_beyond(target, rows=size * rows_per_picture, height=height, width=width)
    rows_per_call = len(batches[0]) * rows_per_picture
    most = most_rows(_most_calls(target, backend, cut), rows_per_call, max_decode_batch)
    plan = make_plan(
        solver,
        chosen.steps,
        chosen.policy,
        max_decode_batch=most,
        rows_per_call=rows_per_call,
    )
    policy: dict[str, Any] = {**chosen.policy.arguments, "max_decode_batch": most}
    if dry_run:
        click.echo(plan.to_json())
        return
    if json_path:
        check_new(json_path)
    paths = {} if comparing else _picture_paths(output, wanted, seeds)
    if source and backend in TENSORRT_BACKENDS:
        rows = (len(batches[-1]) * rows_per_picture, rows_per_call)
        target = _exact_target(source, backend, cut, plan, rows, height, width)
    pipeline = pipeline or _open(source, cut, dtype, backend, target, engine_dir)
    pipeline.scheduler = solver
    default_height, default_width = pipeline.spec.picture_size
    call = {
        "negative_prompt": negative_prompt,
        "num_inference_steps": chosen.steps,
        "guidance_scale": chosen.guidance_scale,
        "height": height or default_height,
        "width": width or default_width,
    }
    if source and comparing:
        from encache.evaluate.contenders import Task

        task = Task(
            prompts=tuple(wanted),
            steps=chosen.steps,
            guidance_scale=chosen.guidance_scale,
            height=height,
            width=width,
            policies={},
            negative_prompt=negative_prompt,
        )
        _compare(pipeline, source, chosen, task, seeds, max_decode_batch, json_path)
        return
    settings = {
        **call,
        **policy,
        # As they decide the picture, not as this batch or these engines need them.
        "stride": (
            None
            if chosen.policy.key_calls
            else chosen.policy.stride or min(DEFAULT_STRIDE, plan.num_calls)
        ),
        "max_decode_batch": max_decode_batch,
        "scheduler": full_config(solver),
        "plan": make_plan(solver, chosen.steps, chosen.policy).hash(),
        "model": model.name,
        "fingerprint": source.fingerprint if source else pipeline.engines.identity["model"],
        "engines": pipeline.engines.identity,
        "encache": __version__,
    }
    if output in paths.values():
        facts = {"prompt": wanted[0], "seed": seed, **settings}
        _refuse_taken(output, facts)
    _draw(pipeline, wanted, batches, {**call, **policy}, settings, paths)


def _split(seeds: Sequence[int], size: int) -> list[Sequence[int]]:
    return [seeds[start : start + size] for start in range(0, len(seeds), size)]


def _refuse_what_would_be_ignored(
    engine_folder: Path | None, comparing: bool, listed: bool, backend: str
) -> None:
    """Options that another typed one makes meaningless are refused, never ignored."""
    # One engine folder is one model at one cut, and holds no PyTorch weights to compare with.
    decided = (
        {"ckpt", "fast", "base", "variant", "loras", "vae", "cut", "dtype", "backend", "comparing"}
        if engine_folder
        else set()
    )
    for option in typed_options(decided):
        raise click.UsageError(
            f"{engine_folder} is one engine folder, so {option} cannot be honoured: leave it out, "
            "or give --engine-dir the folder's parent."
        )
    if listed and [*typed_options({"stride"})]:
        raise click.UsageError("--stride means nothing beside --key-calls.")
    if backend == "torch" and [*typed_options({"engine_dir"})]:
        raise click.UsageError("--engine-dir means nothing with --backend torch.")
    idle = {"num_images", "batch_size", "output"} if comparing else {"json_path", "repeats"}
    for option in typed_options(idle):
        raise click.UsageError(
            f"{option} means nothing {'with' if comparing else 'without'} --compare."
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


def _most_calls(target: Target | None, backend: str, cut: Cut) -> int | None:
    """Most calls in a run of the decoder that is there or would be compiled; None if any number."""
    if target:
        return target.decode_calls
    return DECODE_CALLS if backend in TENSORRT_BACKENDS and cut != NO_CUT else None


def _exact_target(
    source: Checkpoint,
    backend: str,
    cut: Cut,
    plan: "Plan",
    rows: Span,
    height: int | None,
    width: int | None,
) -> Target:
    """What this plan needs and no more: static engines are the fastest."""
    return make_target(
        source,
        backend,
        cut,
        rows=rows,
        decode_calls=plan.longest_decode,
        height=(height, height) if height else None,
        width=(width, width) if width else None,
    )


def _open(
    source: Checkpoint | None,
    cut: Cut,
    dtype: str,
    backend: str,
    target: Target | None,
    engine_dir: Path,
) -> "EncachePipeline":
    from encache.runtime.pipeline import EncachePipeline

    if source is None:
        return EncachePipeline.from_engines(engine_dir)
    if (engine_dir / "model_index.json").exists():  # an engine folder that lost its manifest
        read_manifest(engine_dir)
    return EncachePipeline.from_checkpoint(
        source,
        cut=cut,
        backend=backend,
        dtype=dtype,
        target=target,
        engine_dir=engine_dir,
        report=lambda line: click.echo(line, err=True),
    )


def _read_scheduler(
    source: Checkpoint | None, engine_dir: Path, manifest: Manifest | None
) -> "Scheduler":
    from encache.model.loading import read_outline
    from encache.runtime.backends import load_scheduler

    if source:
        return read_outline(source).scheduler
    assert manifest
    return load_scheduler(engine_dir, manifest)


def _resolve_key_calls(
    key_calls: tuple[int, ...] | Literal["paper"], scheduler: "Scheduler", steps: int
) -> tuple[int, ...]:
    from encache.runtime.plan import paper_key_calls
    from encache.runtime.solver import count_calls

    return paper_key_calls(count_calls(scheduler, steps)) if key_calls == "paper" else key_calls


def _draw(
    pipeline: "EncachePipeline",
    prompts: Sequence[str],
    batches: Sequence[Sequence[int]],
    arguments: dict[str, Any],
    settings: dict[str, Any],
    paths: dict[tuple[int, int], Path],
) -> None:
    """Draw and save batch by batch, so that a run that is stopped keeps what it has."""
    import torch

    from encache.runtime.images import find_png, save_png

    for (index, prompt), seeds in product(enumerate(prompts), batches):
        facts = {seed: {"prompt": prompt, "seed": seed, **settings} for seed in seeds}
        drawn = {seed: find_png(paths[index, seed], facts[seed]) for seed in seeds}
        if None in drawn.values():  # the whole batch again, for which engines may be compiled
            pipeline.set_progress_bar_config(desc=prompt[:40])
            images = pipeline(
                prompt,
                num_images_per_prompt=len(seeds),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                **arguments,
            ).images
            for seed, image in zip(seeds, images, strict=True):
                drawn[seed] = drawn[seed] or save_png(image, paths[index, seed], facts[seed])
        for path in filter(None, drawn.values()):
            echo_path(path)


def _compare(
    pipeline: "EncachePipeline",
    source: Checkpoint,
    chosen: Settings,
    task: "Task",
    seeds: Sequence[int],
    max_decode_batch: int | None,
    json_path: Path | None,
) -> None:
    from encache.contract.dtypes import dtype_name
    from encache.evaluate.bench import format_table, matrix_peak, measure
    from encache.evaluate.contenders import comparison
    from encache.evaluate.machine import describe_machine
    from encache.files import write_json
    from encache.model.arithmetic import count_arithmetic
    from encache.model.loading import load_pipeline
    from encache.runtime.pipeline import EncachePipeline

    device = pipeline.device
    # On a GPU precision is part of the speed; on a CPU PyTorch has fp32 alone.
    dtype = pipeline.dtype if device.type == "cuda" else None
    own = load_pipeline(source, dtype, device)
    cached = [EncachePipeline.from_pipe(own, chosen.policy.cut, capturable=True)]
    if pipeline.engines.name != "torch":
        cached.append(pipeline)
    full = own
    if source.preset.steps:
        click.echo(
            f"{source.name} was trained for its own plan alone, so it is compared with the full "
            f"sampler of its base {source.base.name}.",
            err=True,
        )
        full = load_pipeline(source.base, dtype, device)
        scale = source.base.guidance_scale
        task = replace(task, steps=DEFAULT_STEPS, guidance_scale=scale)
    else:
        full.scheduler = pipeline.scheduler
    for one in (full, *cached):
        one.set_progress_bar_config(disable=True)
    for one in cached:
        one.scheduler = pipeline.scheduler
    size = task.latent_size(full)
    length = full.tokenizer.model_max_length
    arithmetic = count_arithmetic(own.unet, chosen.policy.cut, *size, length)
    contenders = comparison(
        full, cached, chosen, arithmetic, task, max_decode_batch=max_decode_batch
    )
    inputs = [
        (prompt, noise)
        for prompt in task.prompts
        for _, noise in replace(task, prompts=(prompt,)).draw_inputs(full, 1, seeds)
    ]
    rows, failures = measure(contenders, inputs, matrix_peak(device, full.unet.dtype))
    for name, reason in failures.items():
        raise EncacheError(f"{name}: {reason}")
    click.echo(format_table(rows))
    if json_path:
        report = {
            "machine": describe_machine(),
            "task": task.facts,
            "seeds": list(seeds),
            "settings": asdict(chosen),
            "dtype": dtype_name(pipeline.dtype),
            "rows": [asdict(row) for row in rows],
        }
        write_json(json_path, report)
