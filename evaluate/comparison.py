"""`encache-run --compare`: one plan beside the full sampler and as many full steps as it costs."""

from collections.abc import Sequence
from dataclasses import replace

import click
import torch

from encache.contract.dtypes import torch_dtype
from encache.errors import EncacheError
from encache.evaluate.bench import Row, matrix_peak, measure
from encache.evaluate.contenders import Task, comparison
from encache.model.arithmetic import count_arithmetic
from encache.model.checkpoint import Checkpoint
from encache.model.loading import load_pipeline
from encache.runtime.pipeline import EncachePipeline
from encache.runtime.settings import DEFAULT_STEPS, Settings
from encache.runtime.solver import Scheduler


def compare(
    source: Checkpoint,
    engines: EncachePipeline | None,
    solver: Scheduler,
    settings: Settings,
    task: Task,
    seeds: Sequence[int],
    max_decode_batch: int | None,
    dtype: str,
) -> tuple[Task, list[Row]]:
    """Measure one plan in PyTorch and on engines, beside the full sampler and fewer steps.

    Args:
        source: what is drawn with; weights of few steps are compared with their base.
        engines: opened from it on another backend.
        solver: of the plan.
        settings: how they sample.
        task: what is drawn, by the full sampler with the same steps and guidance.
        seeds: every prompt is drawn with every one.
        max_decode_batch: most rows in one run of the decoder.
        dtype: of PyTorch's weights on a GPU; a CPU's PyTorch has fp32 alone.

    Returns:
        The full sampler's task, and the rows.

    Raises:
        EncacheError: one of them cannot run.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if engines:
        device = engines.device
    precision = torch_dtype(dtype) if device.type == "cuda" else None
    own = load_pipeline(source, precision, device)
    cached = [EncachePipeline.from_pipe(own, settings.policy.cut, capturable=True)]
    if engines:
        cached.append(engines)
    full = own
    if source.preset.steps:
        click.echo(
            f"{source.name} was trained for its own plan alone, so it is compared with the full "
            f"sampler of its base {source.base.name}.",
            err=True,
        )
        full = load_pipeline(source.base, precision, device)
        scale = source.base.guidance_scale
        task = replace(task, steps=DEFAULT_STEPS, guidance_scale=scale)
    else:
        full.scheduler = solver
    for one in (full, *cached):
        one.set_progress_bar_config(disable=True)
    for one in cached:
        one.scheduler = solver
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
