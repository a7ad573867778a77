"""From options to the application: what `encache-serve` and Ray Serve have in common."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from encache.command import FiniteFloat
from encache.errors import EncacheError
from encache.export.options import EngineOptions, ModelOptions, SizeOptions
from encache.files import read_lines
from encache.options import option
from encache.runtime.opening import Opening, Run, resolve_run
from encache.runtime.options import EnginesOptions, SamplingOptions


@dataclass(frozen=True)
class LimitOptions:
    """The most that clients may ask for."""

    batch_size: int = option(type=click.IntRange(1), default=8, help="Most pictures at once.")
    batch_wait: float = option(
        type=FiniteFloat(0, 10),
        default=0.02,
        help="Seconds for which a picture waits for others that can be drawn with it.",
    )
    max_waiting: int = option(type=click.IntRange(1), default=64, help="Pictures in the queue.")
    deadline: float = option(
        type=FiniteFloat(0.1), default=120.0, help="Seconds after which a request ends."
    )
    max_side: int | None = option(
        type=click.IntRange(8), help="Pixels. Default: twice the model's own larger side."
    )
    max_steps: int = option(type=click.IntRange(1), default=150)
    max_images: int = option(type=click.IntRange(1), default=8, help="In one request.")
    max_prompt: int = option(type=click.IntRange(1), default=2000, help="Characters.")
    max_decode_batch: int | None = option(
        type=click.IntRange(1), help="Most rows in one decoder run; bounds memory."
    )


@dataclass(frozen=True)
class Offer:
    """What is served; any process of any machine that has the model can open it.

    Attributes:
        opening, run: what draws; see `Generator`.
        sampling: the defaults of requests.
        limits: the most that they may ask for.
    """

    opening: Opening
    run: Run
    sampling: SamplingOptions
    limits: LimitOptions


def settle(
    sampling: SamplingOptions,
    limits: LimitOptions,
    model: ModelOptions,
    engine: EngineOptions,
    engines: EnginesOptions,
) -> Offer:
    """Settle what is served, without opening it.

    Raises:
        click.UsageError: options do not go together.
        EncacheError: what they name is not there, or cannot be served so.
    """
    engines.refuse_idle_options(sampling)
    if limits.max_images > limits.max_waiting:
        raise click.UsageError("--max-images may not exceed --max-waiting: none would fit.")
    folder = engines.one_folder
    # Another process may run in another working folder.
    place = engines.engine_dir.absolute()
    opening = Opening.of(folder and place, model, engine, engines.backend, place)
    # Batches of every length, up to the largest.
    counts = range(limits.batch_size + 1)
    run = resolve_run(
        opening, sampling, SizeOptions(), counts, limits.batch_size, limits.max_decode_batch
    )
    return Offer(opening, run, sampling, limits)


def read_token(path: Path) -> str:
    """The token in a file's first line.

    Raises:
        EncacheError: it is too short.
    """
    lines = read_lines(path)
    if not lines or len(lines[0]) < 16:
        raise EncacheError(f"{path} needs 16 characters or more: openssl rand -hex 32 > {path}")
    return lines[0]


def build_app(offer: Offer, token: str | None, *, keeps: bool = True) -> Any:
    """The application, its engines open.

    Args:
        offer: what it serves.
        token: that requests must bring, if any.
        keeps: whether pictures may be asked for as addresses, which this process knows alone.

    Raises:
        EncacheError: the packages of `.[serve]` are missing, or the engines cannot be opened.
    """
    try:
        from encache.serve.app import Service, make_app
        from encache.serve.asking import Intake, Limits
        from encache.serve.desk import Desk, DeskLimits
        from encache.serve.metrics import Metrics
    except ModuleNotFoundError as error:
        raise EncacheError(f'{error.name} is missing: pip install ".[serve]".') from error
    from encache.runtime.generator import Generator

    opening, run, sampling, limits = offer.opening, offer.run, offer.sampling, offer.limits
    generator = Generator(opening, run, SizeOptions(), limits.max_decode_batch)
    generator.pipeline.set_progress_bar_config(disable=True)
    base = sampling.wished(opening.cut)
    if sampling.key_calls:  # which were settled with the solver
        base = replace(base, stride=None, key_calls=run.settings.policy.key_calls)
    if run.settings.policy.plan:  # who leaves it out keeps its steps
        base = replace(base, steps=run.settings.steps)
    most = Limits(
        limits.max_side or 2 * max(generator.pipeline.spec.picture_size),
        limits.max_steps,
        limits.max_images,
        limits.max_prompt,
    )
    model = opening.model
    intake = Intake(generator, run.settings, base, model.preset, model.guidance_scale, most)
    metrics = Metrics(run.solver)
    bounds = DeskLimits(len(run.batches[0]), limits.max_waiting, limits.batch_wait)
    desk = Desk(generator, bounds, metrics)
    service = Service(model.name, intake, desk, limits.deadline, keeps=keeps)
    return make_app(service, metrics, token)
