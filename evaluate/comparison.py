"""`encache-run --compare`: one plan beside the full sampler and as many full steps as it costs."""

from collections.abc import Sequence
from dataclasses import replace

import click

from encache.errors import EncacheError
from encache.evaluate.bench import Row, matrix_peak, measure
from encache.evaluate.contenders import Task, comparison
from encache.model.arithmetic import count_arithmetic
from encache.model.checkpoint import Checkpoint
from encache.model.loading import load_pipeline
from encache.runtime.pipeline import EncachePipeline
from encache.runtime.settings import DEFAULT_STEPS, Settings


def compare(
    pipeline: EncachePipeline,
    source: Checkpoint,
    settings: Settings,
    task: Task,
    seeds: Sequence[int],
    max_decode_batch: int | None,
) -> tuple[Task, list[Row]]:
    """Measure a pipeline and PyTorch on one plan, beside the full sampler and fewer steps.

    Args:
        pipeline: opened from `source`.
        source: weights of few steps are compared with their base.
        settings: how they sample.
        task: what is drawn, by the full sampler with the same steps and guidance.
        seeds: every prompt is drawn with every one.
        max_decode_batch: most rows in one run of the decoder.

    Returns:
        The full sampler's task, and the rows.

    Raises:
        EncacheError: one of them cannot run.
    """
    device = pipeline.device
    # On a GPU precision is part of the speed; on a CPU PyTorch has fp32 alone.
    dtype = pipeline.dtype if device.type == "cuda" else None
    own = load_pipeline(source, dtype, device)
    cached = [EncachePipeline.from_pipe(own, settings.policy.cut, capturable=True)]
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
    arithmetic = count_arithmetic(own.unet, settings.policy.cut, *size, length)
    contenders = comparison(
        full, cached, settings, arithmetic, task, max_decode_batch=max_decode_batch
    )
    inputs = [
        (prompt, noise)
        for prompt in task.prompts
        for _, noise in replace(task, prompts=(prompt,)).draw_inputs(full, 1, seeds)
    ]
    rows, failures = measure(contenders, inputs, matrix_peak(device, full.unet.dtype))
    for name, reason in failures.items():
        raise EncacheError(f"{name}: {reason}")
    return task, rows
