"""`encache-bench`: what a picture costs here, beside what a user would pick instead."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from encache.command import Command, FiniteFloat, typed_options
from encache.contract.dtypes import DTYPES, torch_dtype
from encache.contract.library import BACKENDS, COMPILED, TENSORRT_BACKENDS, TORCH_BACKENDS
from encache.contract.target import DECODE_CALLS, exactly, make_target, rows_of
from encache.errors import EncacheError
from encache.export.options import EngineDir, ModelOptions, SizeOptions
from encache.model.checkpoint import Checkpoint
from encache.model.loading import load_pipeline
from encache.model.preset import UNSAID
from encache.model.spec import CUTS, NO_CUT, Cut
from encache.options import names_of, option, takes
from encache.runtime.options import plans_option, strides_option

if TYPE_CHECKING:
    from encache.evaluate.bench import Row
    from encache.evaluate.contenders import Task
    from encache.runtime.pipeline import EncachePipeline

#: Names of emoji, which the model that ships with encache draws, and any other too.
PROMPTS = (
    *("red apple", "hot dog", "octopus", "butterfly", "slice of pizza", "penguin", "strawberry"),
    *("sunflower", "tiger", "cactus", "whale", "doughnut", "mushroom", "owl", "banana", "tulip"),
)
#: Compared unless others are asked for.
DEFAULT_STRIDES = (3, 5, 10, 20)


@dataclass(frozen=True)
class _BenchOptions:
    """What is compared."""

    sd15_shape: bool = option(
        is_flag=True,
        default=False,
        help="Stable Diffusion v1.5 with random weights, written to the engine folder (2 GB), "
        "instead. In fp32 on a CPU, every cut takes 5 GB of memory.",
    )
    backends: tuple[str, ...] = option(
        "--backend",
        type=click.Choice((*TORCH_BACKENDS, *BACKENDS)),
        multiple=True,
        default=("torch", "onnxruntime"),
    )
    cuts: tuple[Cut, ...] = option(
        "--cut", type=click.Choice(CUTS), multiple=True, default=("mid", "up2", NO_CUT)
    )
    strides: tuple[int, ...] = strides_option(DEFAULT_STRIDES)
    paper: bool = option(is_flag=True, default=False, help="Also Faster Diffusion's key calls.")
    plan_files: tuple[Path, ...] = plans_option()
    steps: int = option(type=click.IntRange(1), default=50)
    guidance_scale: float | None = option(type=FiniteFloat(), help="Default: the model's own.")
    batches: tuple[int, ...] = option(
        "--batch",
        type=click.IntRange(1),
        multiple=True,
        default=(1,),
        help="Pictures at once; repeatable. Each has TensorRT engines of its own.",
    )
    dtype: str | None = option(
        type=click.Choice(DTYPES), help="Default: fp16 on a GPU, else fp32, and bf16 for OpenVINO."
    )
    repeats: int = option(type=click.IntRange(1), default=5)
    compiling: bool = option(
        "--compile",
        is_flag=True,
        default=False,
        help="Also diffusers with torch.compile; for encache itself use --backend torch.compile.",
    )


@click.command(cls=Command)
@takes(model=ModelOptions, bench=_BenchOptions, size=SizeOptions, place=EngineDir)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the rows.")
def main(
    model: ModelOptions,
    bench: _BenchOptions,
    size: SizeOptions,
    place: EngineDir,
    json_path: Path | None,
) -> None:
    """Time full and cached sampling on every backend, beside fewer steps, tomesd and DeepCache.

    Everything is built and warmed up first; then all take turns. Prints a table. Weights that were
    trained for a plan are timed beside the model that they come from.

    Example: encache-bench --sd15-shape --backend torch.compile --backend tensorrt-rtx --compile
    """
    if bench.sd15_shape:
        for name in typed_options(names_of(ModelOptions)):
            raise click.UsageError(f"--sd15-shape is a model of its own: leave out {name}.")
    if bench.plan_files and NO_CUT not in bench.cuts:
        raise click.UsageError("--plan caches the output: add --cut none.")
    size.check()

    import torch

    from encache.evaluate.bench import format_table, matrix_peak
    from encache.evaluate.machine import describe_machine
    from encache.evaluate.random_weights import find_shape
    from encache.files import check_new, write_json

    if json_path:
        check_new(json_path)
    asked = (
        find_shape("sd15", place.engine_dir / "sd15-shape") if bench.sd15_shape else model.find()
    )
    session = _Session.of(asked, bench, size, place.engine_dir)
    peak = matrix_peak(session.device, torch_dtype(session.dtype))
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    for batch in bench.batches:
        measured, reasons = session.measure(batch, peak, rows[0] if rows else None)
        rows += measured
        left_out |= {f"{name}, batch {batch}": reason for name, reason in reasons.items()}
        torch.cuda.empty_cache()  # for the next batch's engines, which allocate by themselves
        if json_path:
            report = {
                "machine": describe_machine(),
                "model": asked.name,
                "dtype": session.dtype,
                "task": session.task.facts,
                "repeats": bench.repeats,
                "matrix_product_tflops": peak,
                "left_out": left_out,
                "rows": [asdict(row) for row in rows],
            }
            write_json(json_path, report)
    click.echo(format_table(rows))
    for name, reason in left_out.items():
        click.echo(f"{name} is left out: {reason}")


@dataclass(frozen=True)
class _Session:
    """A model that is measured, and weights that were trained from it for a plan, if any."""

    checkpoint: Checkpoint
    trained: Checkpoint | None
    bench: _BenchOptions
    size: SizeOptions
    engine_dir: Path
    device: Any
    dtype: str
    pipeline: Any
    task: "Task"

    @classmethod
    def of(
        cls, asked: Checkpoint, bench: _BenchOptions, size: SizeOptions, engine_dir: Path
    ) -> "_Session":
        """Load the model, and settle what all contenders draw."""
        import torch

        from encache.evaluate.contenders import Task
        from encache.evaluate.selection import read_fitting
        from encache.runtime.key_calls import paper_key_calls, strides_within
        from encache.runtime.settings import Policy
        from encache.runtime.solver import count_calls

        # Trained weights are held against what the model that they come from can do.
        trained = asked if asked.preset != UNSAID else None
        checkpoint = trained.base if trained else asked
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = bench.dtype or ("fp16" if device.type == "cuda" else "fp32")
        pipeline = load_pipeline(checkpoint, torch_dtype(dtype), device)
        num_calls = count_calls(pipeline.scheduler, bench.steps)
        strides = bench.strides or strides_within(DEFAULT_STRIDES, num_calls)
        policies = {f"stride {n}": Policy(stride=n) for n in strides}
        if bench.paper:
            policies["the paper's key calls"] = Policy(key_calls=paper_key_calls(num_calls))
        scale = bench.guidance_scale
        scale = checkpoint.guidance_scale if scale is None else scale
        for fitted in read_fitting(
            bench.plan_files, checkpoint.fingerprint, pipeline.scheduler, bench.steps, scale
        ):
            name = f"fitted plan of {fitted.num_evaluations} runs"
            if policies.get(name, Policy(plan=fitted)) != Policy(plan=fitted):
                name += f" {fitted.hash()[:6]}"
            policies[name] = Policy(plan=fitted)
        task = Task(PROMPTS, bench.steps, scale, size.height, size.width, policies)
        return cls(checkpoint, trained, bench, size, engine_dir, device, dtype, pipeline, task)

    def measure(
        self, batch: int, peak: float, baseline: "Row | None"
    ) -> "tuple[list[Row], dict[str, str]]":
        """The rows of one batch size, and of what is left out the reason."""
        from encache.evaluate.bench import measure
        from encache.evaluate.contenders import Trained, assemble
        from encache.runtime.settings import resolve

        own = None
        if self.trained:
            settings = resolve(UNSAID, self.trained.preset, self.trained.guidance_scale)
            own = Trained(
                settings, self.trained.cut, lambda backend: self._open_trained(backend, batch)
            )
        contenders, absent = assemble(
            self.pipeline,
            lambda backend, cut: self._open(backend, cut, batch),
            self.bench.backends,
            self.bench.cuts,
            self.task,
            self.bench.compiling,
            own,
        )
        if not baseline and not any(one.pipeline for one in contenders):
            why = "; ".join(f"{name}: {reason}" for name, reason in absent.items())
            raise EncacheError(f"No backend is left to measure. {why}")
        inputs = self.task.draw_inputs(self.pipeline, batch, range(self.bench.repeats))
        measured, failures = measure(contenders, inputs, peak, baseline)
        return measured, absent | failures

    def _open(self, backend: str, cut: Cut, batch: int) -> "EncachePipeline":
        from encache.runtime.pipeline import EncachePipeline

        if backend in TORCH_BACKENDS:
            compiled = backend == COMPILED
            return EncachePipeline.from_pipe(self.pipeline, cut, capturable=True, compiled=compiled)
        rows = self.task.rows * batch
        return self._open_engines(self.checkpoint, backend, cut, (rows, rows), DECODE_CALLS)

    def _open_trained(self, backend: str, batch: int) -> "EncachePipeline":
        assert self.trained
        rows = rows_of(self.trained, (batch, batch))
        return self._open_engines(self.trained, backend, self.trained.cut, rows, None)

    def _open_engines(
        self,
        source: Checkpoint,
        backend: str,
        cut: Cut,
        rows: tuple[int, int],
        decode_calls: int | None,
    ) -> "EncachePipeline":
        from encache.runtime.pipeline import EncachePipeline

        target, size = None, self.size
        if backend in TENSORRT_BACKENDS:
            target = make_target(
                source,
                backend,
                cut,
                rows=rows,
                decode_calls=decode_calls,
                height=exactly(size.height),
                width=exactly(size.width),
            )
        return EncachePipeline.from_checkpoint(
            source,
            cut=cut,
            backend=backend,
            dtype=self.bench.dtype or ("bf16" if backend == "openvino" else self.dtype),
            target=target,
            engine_dir=self.engine_dir,
            exact=True,
            report=lambda line: click.echo(line, err=True),
        )
