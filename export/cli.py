"""`encache-export`: from a checkpoint to an engine folder."""

import time
from pathlib import Path
from typing import Any

import click

from encache.command import Command, echo_path, typed_options
from encache.contract.dtypes import default_dtype
from encache.contract.library import BACKENDS, TENSORRT_BACKENDS
from encache.contract.target import (
    DECODE_CALLS,
    GPUS,
    Span,
    make_target,
    parse_span,
    resolve_compute_capabilities,
    rows_of,
)
from encache.export.build import Request, build_engines, find_engines
from encache.export.options import engine_options, named_model
from encache.model.checkpoint import find_checkpoint
from encache.model.spec import Cut, check_size


class _SpanType(click.ParamType):
    """A size like 512, or a span of sizes like 512:768."""

    name = "SPAN"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> Span:
        try:
            return parse_span(value)
        except ValueError as error:
            self.fail(str(error), parameter, context)


_SPAN = _SpanType()
_COMPILED_ONLY = {"gpus", "compute_capabilities", "batch", "decode_batch", "height", "width"}


@click.command(cls=Command)
@engine_options
@click.option("--backend", type=click.Choice(BACKENDS), default="onnxruntime", show_default=True)
@click.option(
    "--gpu",
    "gpus",
    type=click.Choice(tuple(GPUS)),
    multiple=True,
    help="Compile TensorRT-RTX engines for it, on any machine; repeatable. Default: the one here.",
)
@click.option(
    "--compute-capability",
    "compute_capabilities",
    type=click.Choice(tuple(GPUS.values())),
    multiple=True,
    help="The same by number.",
)
@click.option(
    "--batch",
    type=_SPAN,
    default="1",
    show_default=True,
    help="Pictures at once, for TensorRT, with guidance unless the weights need none: one number, "
    "which is fastest, or a span like 1:4, from one unguided picture to four guided ones.",
)
@click.option(
    "--decode-batch",
    type=click.IntRange(1),
    show_default=f"what the weights' own plan needs, or {DECODE_CALLS}",
    help="Most calls that TensorRT decodes at once, which decides memory; the cut out has none.",
)
@click.option("--height", type=_SPAN, help="Pixels, for TensorRT: a number or a span like 512:768.")
@click.option("--width", type=_SPAN, help="Likewise. Default: the model's own size.")
@click.option(
    "--engine-dir",
    type=click.Path(path_type=Path),
    default=Path("engines"),
    show_default=True,
    help="Parent of the engine folders.",
)
def main(
    ckpt: str | None,
    fast: bool,
    base: str | None,
    variant: str | None,
    loras: tuple[str, ...],
    vae: str | None,
    cut: Cut | None,
    dtype: str | None,
    backend: str,
    gpus: tuple[str, ...],
    compute_capabilities: tuple[str, ...],
    batch: Span,
    decode_batch: int | None,
    height: Span | None,
    width: Span | None,
    engine_dir: Path,
) -> None:
    """Split a Stable Diffusion UNet and export it with its text encoder and image decoder.

    Prints the engine folder. Repeating a finished export does nothing.

    \b
    Examples:
      encache-export --ckpt fcr.safetensors --base path/to/stable-diffusion
      encache-export --ckpt path/to/stable-diffusion --backend tensorrt-rtx --gpu rtx-4090
    """
    target = None
    checkpoint = find_checkpoint(named_model(ckpt, fast), base, loras, vae, variant)
    cut = cut or checkpoint.cut
    if backend in TENSORRT_BACKENDS:
        check_size(*(height or ()), *(width or ()))
        target = make_target(
            checkpoint,
            backend,
            cut,
            compute_capabilities=resolve_compute_capabilities(backend, gpus, compute_capabilities),
            rows=rows_of(checkpoint, batch),
            decode_calls=decode_batch,
            height=height,
            width=width,
        )
    else:
        for option in typed_options(_COMPILED_ONLY):
            raise click.UsageError(
                f"{option} means nothing without TensorRT: ONNX Runtime takes any size, anywhere."
            )
    request = Request(checkpoint, cut, dtype or default_dtype(backend), backend, target)
    if finished := find_engines(request, engine_dir):
        click.echo("Nothing to do: this export is finished.", err=True)
        echo_path(finished)
        return
    start = time.perf_counter()
    folder = build_engines(request, engine_dir, lambda line: click.echo(line, err=True))
    click.echo(f"built in {time.perf_counter() - start:.0f} s", err=True)
    echo_path(folder)
