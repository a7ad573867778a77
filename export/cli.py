"""`encache-export`: from a checkpoint to an engine folder."""

import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from encache.command import Command, echo_path, typed_options
from encache.contract.calibration import make_calibration
from encache.contract.dtypes import EIGHT_BITS, default_dtype, refuse_dtype
from encache.contract.library import BACKENDS, TENSORRT_BACKENDS
from encache.contract.target import (
    DECODE_CALLS,
    GPUS,
    Span,
    Target,
    make_target,
    parse_span,
    resolve_compute_capabilities,
    rows_of,
)
from encache.errors import EncacheError
from encache.export.build import Request, build_engines, find_engines
from encache.export.options import EngineDir, EngineOptions, ModelOptions, refuse_without_cut
from encache.model.checkpoint import Checkpoint, for_pipeline
from encache.model.family import HOSTED
from encache.model.spec import Cut, check_size
from encache.options import option, takes


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


@dataclass(frozen=True)
class _CompileOptions:
    """What TensorRT compiles for."""

    gpus: tuple[str, ...] = option(
        "--gpu",
        default=(),
        type=click.Choice(tuple(GPUS)),
        multiple=True,
        help="Compile TensorRT-RTX engines for it, on any machine; repeatable. Default: the one "
        "here.",
    )
    compute_capabilities: tuple[str, ...] = option(
        "--compute-capability",
        default=(),
        type=click.Choice(tuple(GPUS.values())),
        multiple=True,
        help="The same by number.",
    )
    batch: Span = option(
        type=_SPAN,
        default="1",
        help="Pictures at once, for TensorRT, with guidance unless the weights need none: one "
        "number, which is fastest, or a span like 1:4, from one unguided picture to four guided "
        "ones.",
    )
    decode_batch: int | None = option(
        type=click.IntRange(1),
        show_default=f"what the weights' own plan needs, or {DECODE_CALLS}",
        help="Most calls that TensorRT decodes at once, which decides memory; without a cut there "
        "are none.",
    )
    height: Span | None = option(
        type=_SPAN, help="Pixels, for TensorRT: a number or a span like 512:768."
    )
    width: Span | None = option(type=_SPAN, help="Likewise. Default: the model's own size.")


@dataclass(frozen=True)
class _PipelineOptions:
    """What the denoiser is exported for."""

    pipeline: str | None = option(
        type=click.Choice(tuple(HOSTED)),
        help="Of a text-to-image checkpoint, export the denoiser for this diffusers pipeline: with "
        "what a ControlNet adds, or with attention across frames.",
    )
    num_frames: int | None = option(
        type=click.IntRange(2), help="Of a clip, for VideoFusion. Default: the pipeline's."
    )

    def settle(self, checkpoint: Checkpoint) -> tuple[Checkpoint, int]:
        """The checkpoint of that pipeline, and how many frames its graphs keep.

        Raises:
            EncacheError: an option means nothing for this checkpoint.
        """
        if self.pipeline:
            checkpoint = for_pipeline(checkpoint, HOSTED[self.pipeline])
        family = checkpoint.family
        if self.num_frames and not family.clips:
            raise EncacheError(
                f"--num-frames means nothing for {family.title}, whose graphs take any number."
            )
        return checkpoint, (self.num_frames or family.frames) if family.clips else 0


@click.command(cls=Command)
@takes(model=ModelOptions, engine=EngineOptions)
@click.option("--backend", type=click.Choice(BACKENDS), default="onnxruntime", show_default=True)
@takes(wanted=_PipelineOptions, compiled=_CompileOptions, place=EngineDir)
@click.option(
    "--calibration-prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="For int8 and fp8: a few prompts, one in a line, whose pictures the model draws to see "
    "how large its numbers become. The model that ships with encache has its own.",
)
def main(
    model: ModelOptions,
    engine: EngineOptions,
    backend: str,
    wanted: _PipelineOptions,
    compiled: _CompileOptions,
    place: EngineDir,
    calibration_prompts: Path | None,
) -> None:
    """Export a Stable Diffusion UNet, whole or in two halves, with its text encoder and decoder.

    Of pipelines that keep their own loop, such as inpainting, a ControlNet's, DeepFloyd-IF or DiT,
    the denoiser alone is exported, because all else runs there.

    Prints the engine folder. Repeating a finished export does nothing.

    \b
    Examples:
      encache-export --ckpt fcr.safetensors --base path/to/stable-diffusion
      encache-export --ckpt path/to/stable-diffusion --backend tensorrt-rtx --gpu rtx-4090
      encache-export --backend tensorrt-rtx --gpu rtx-4090 --dtype int8
    """
    checkpoint, frames = wanted.settle(model.find(hosted=True))
    cut, target = engine.cut or checkpoint.cut, None
    if backend in TENSORRT_BACKENDS:
        target = _target(checkpoint, backend, cut, compiled)
    else:
        for name in typed_options({one.name for one in fields(_CompileOptions)}):
            raise click.UsageError(
                f"{name} means nothing without TensorRT: ONNX graphs take any size, anywhere."
            )
    dtype, calibration = engine.dtype or default_dtype(backend), None
    refuse_dtype(backend, dtype)
    if dtype in EIGHT_BITS:
        calibration = make_calibration(checkpoint, calibration_prompts)
    elif calibration_prompts:
        raise click.UsageError("--calibration-prompts means nothing without --dtype int8 or fp8.")
    request = Request(checkpoint, cut, dtype, backend, target, calibration, frames)
    if finished := find_engines(request, place.engine_dir):
        click.echo("Nothing to do: this export is finished.", err=True)
        echo_path(finished)
        return
    start = time.perf_counter()
    folder = build_engines(request, place.engine_dir, lambda line: click.echo(line, err=True))
    click.echo(f"built in {time.perf_counter() - start:.0f} s", err=True)
    echo_path(folder)


def _target(checkpoint: Checkpoint, backend: str, cut: Cut, compiled: _CompileOptions) -> Target:
    check_size(*(compiled.height or ()), *(compiled.width or ()))
    refuse_without_cut(cut, "decode_batch")
    capabilities = resolve_compute_capabilities(
        backend, compiled.gpus, compiled.compute_capabilities
    )
    return make_target(
        checkpoint,
        backend,
        cut,
        compute_capabilities=capabilities,
        rows=rows_of(checkpoint, compiled.batch),
        decode_calls=compiled.decode_batch,
        height=compiled.height,
        width=compiled.width,
    )
