"""`encache-bench`: what a picture costs here, beside what a user would pick instead."""

from dataclasses import asdict
from pathlib import Path

import click

from encache.command import Command, FiniteFloat
from encache.contract.dtypes import DTYPES, torch_dtype
from encache.contract.library import BACKENDS, TENSORRT_BACKENDS
from encache.contract.target import DECODE_CALLS, Span, make_target, rows_of
from encache.errors import EncacheError
from encache.model.checkpoint import Checkpoint, find_checkpoint
from encache.model.loading import load_pipeline
from encache.model.preset import UNSAID
from encache.model.spec import CUTS, NO_CUT, Cut, check_size

#: Names of emoji, which the model that ships with encache draws, and any other too.
PROMPTS = (
    *("red apple", "hot dog", "octopus", "butterfly", "slice of pizza", "penguin", "strawberry"),
    *("sunflower", "tiger", "cactus", "whale", "doughnut", "mushroom", "owl", "banana", "tulip"),
)


#: Compared unless others are asked for.
DEFAULT_STRIDES = (3, 5, 10, 20)


@click.command(cls=Command)
@click.option("--ckpt", help="As for encache-export. Default: the model that ships with encache.")
@click.option("--base", help="As for encache-export.")
@click.option(
    "--sd15-shape",
    is_flag=True,
    help="Stable Diffusion v1.5 with random weights, written to the engine folder (2 GB), instead. "
    "In fp32 on a CPU, every cut takes 5 GB of memory.",
)
@click.option(
    "--backend",
    "backends",
    type=click.Choice(("torch", *BACKENDS)),
    multiple=True,
    default=("torch", "onnxruntime"),
    show_default=True,
)
@click.option(
    "--cut",
    "cuts",
    type=click.Choice(CUTS),
    multiple=True,
    default=("mid", "up2", NO_CUT),
    show_default=True,
)
@click.option(
    "--stride",
    "strides",
    type=click.IntRange(2),
    multiple=True,
    help=f"Repeatable. Default: {', '.join(map(str, DEFAULT_STRIDES))}, as far as the calls allow.",
)
@click.option("--paper", is_flag=True, help="Also Faster Diffusion's key calls.")
@click.option("--steps", type=click.IntRange(1), default=50, show_default=True)
@click.option("--guidance-scale", type=FiniteFloat(), help="Default: the model's own.")
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(1),
    multiple=True,
    default=(1,),
    show_default=True,
    help="Pictures at once; repeatable. Each has TensorRT engines of its own.",
)
@click.option("--height", type=click.IntRange(8), help="Pixels. Default: the model's own size.")
@click.option("--width", type=click.IntRange(8), help="Pixels. Default: the model's own size.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: fp16 on a GPU, else fp32.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option("--compile", "compiling", is_flag=True, help="Also diffusers with torch.compile.")
@click.option(
    "--engine-dir", type=click.Path(path_type=Path), default=Path("engines"), show_default=True
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the rows.")
def main(
    ckpt: str | None,
    base: str | None,
    sd15_shape: bool,
    backends: tuple[str, ...],
    cuts: tuple[Cut, ...],
    strides: tuple[int, ...],
    paper: bool,
    steps: int,
    guidance_scale: float | None,
    batches: tuple[int, ...],
    height: int | None,
    width: int | None,
    dtype: str | None,
    repeats: int,
    compiling: bool,
    engine_dir: Path,
    json_path: Path | None,
) -> None:
    """Time full and cached sampling on every backend, beside fewer steps, tomesd and DeepCache.

    Everything is built and warmed up first; then all take turns. Prints a table. Weights that were
    trained for a plan are timed beside the model that they come from.

    Example: encache-bench --sd15-shape --backend torch --backend tensorrt-rtx --compile
    """
    if sd15_shape and (ckpt or base):
        raise click.UsageError("--sd15-shape is a model of its own: leave out --ckpt and --base.")
    check_size(*(side for side in (height, width) if side))

    import torch

    from encache.evaluate.bench import Row, format_table, matrix_peak, measure
    from encache.evaluate.contenders import Task, Trained, assemble
    from encache.evaluate.machine import describe_machine
    from encache.files import check_new, write_json
    from encache.model.random_weights import find_sd15_shape
    from encache.runtime.pipeline import EncachePipeline
    from encache.runtime.plan import paper_key_calls, strides_within
    from encache.runtime.settings import Policy, resolve
    from encache.runtime.solver import count_calls

    if json_path:
        check_new(json_path)
    if sd15_shape:
        checkpoint = find_sd15_shape(engine_dir / "sd15-shape")
    else:
        checkpoint = find_checkpoint(ckpt, base)
    trained = checkpoint if checkpoint.preset != UNSAID else None
    if trained:  # beside what the model that it was trained from can do
        checkpoint = trained.base
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("fp16" if device.type == "cuda" else "fp32")
    pipeline = load_pipeline(checkpoint, torch_dtype(dtype), device)
    num_calls = count_calls(pipeline.scheduler, steps)
    strides = strides or strides_within(DEFAULT_STRIDES, num_calls)
    policies = {f"stride {n}": Policy(stride=n) for n in strides}
    if paper:
        policies["the paper's key calls"] = Policy(key_calls=paper_key_calls(steps))

    if guidance_scale is None:
        guidance_scale = checkpoint.guidance_scale
    task = Task(PROMPTS, steps, guidance_scale, height, width, policies)
    peak = matrix_peak(device, torch_dtype(dtype))
    rows: list[Row] = []
    left_out: dict[str, str] = {}

    def measure_batch(batch: int) -> tuple[list[Row], dict[str, str]]:
        def open_engines(
            source: Checkpoint, backend: str, cut: Cut, rows: Span, decode_calls: int | None
        ) -> EncachePipeline:
            target = None
            if backend in TENSORRT_BACKENDS:
                target = make_target(
                    source,
                    backend,
                    cut,
                    rows=rows,
                    decode_calls=decode_calls,
                    height=(height, height) if height else None,
                    width=(width, width) if width else None,
                )
            return EncachePipeline.from_checkpoint(
                source,
                cut=cut,
                backend=backend,
                dtype=dtype,
                target=target,
                engine_dir=engine_dir,
                exact=True,
                report=lambda line: click.echo(line, err=True),
            )

        def open_backend(backend: str, cut: Cut) -> EncachePipeline:
            if backend == "torch":
                return EncachePipeline.from_pipe(pipeline, cut, capturable=True)
            most_rows = task.rows * batch
            return open_engines(checkpoint, backend, cut, (most_rows, most_rows), DECODE_CALLS)

        def open_trained(backend: str) -> EncachePipeline:
            assert trained
            return open_engines(
                trained, backend, trained.cut, rows_of(trained, (batch, batch)), None
            )

        own = None
        if trained:
            settings = resolve(UNSAID, trained.preset, trained.guidance_scale)
            own = Trained(settings, trained.cut, open_trained)
        contenders, absent = assemble(pipeline, open_backend, backends, cuts, task, compiling, own)
        if not rows and not any(one.pipeline for one in contenders):
            why = "; ".join(f"{name}: {reason}" for name, reason in absent.items())
            raise EncacheError(f"No backend is left to measure. {why}")
        inputs = task.draw_inputs(pipeline, batch, range(repeats))
        measured, failures = measure(contenders, inputs, peak, rows[0] if rows else None)
        return measured, absent | failures

    for batch in batches:
        measured, reasons = measure_batch(batch)
        rows += measured
        left_out |= {f"{name}, batch {batch}": reason for name, reason in reasons.items()}
        torch.cuda.empty_cache()  # for the next batch's engines, which allocate by themselves
        if json_path:
            report = {
                "machine": describe_machine(),
                "model": (trained or checkpoint).name,
                "dtype": dtype,
                "task": task.facts,
                "repeats": repeats,
                "matrix_product_tflops": peak,
                "left_out": left_out,
                "rows": [asdict(row) for row in rows],
            }
            write_json(json_path, report)
    click.echo(format_table(rows))
    for name, reason in left_out.items():
        click.echo(f"{name} is left out: {reason}")
