"""`encache-serve`: a model behind HTTP."""

import ipaddress
import logging
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from encache.command import Command, FiniteFloat
from encache.errors import EncacheError
from encache.export.options import EngineOptions, ModelOptions, SizeOptions
from encache.files import read_lines
from encache.options import option, takes
from encache.runtime.opening import Opening, Run, resolve_run
from encache.runtime.options import EnginesOptions, SamplingOptions


@dataclass(frozen=True)
class _PlaceOptions:
    """Where it listens, and to whom."""

    host: str = option(default="127.0.0.1", help="Another one than this machine needs a token.")
    port: int = option(type=click.IntRange(0, 65535), default=8000)
    token_file: Path | None = option(
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="Its first line is what clients send as a bearer token.",
    )

    def token(self) -> str | None:
        """The token.

        Raises:
            EncacheError: there is none, though other machines can reach the server.
        """
        if self.token_file:
            lines = read_lines(self.token_file)
            if not lines or len(lines[0]) < 16:
                raise EncacheError(
                    f"{self.token_file} needs 16 characters or more: openssl rand -hex 32 > "
                    f"{self.token_file}"
                )
            return lines[0]
        if not _is_here(self.host):
            raise EncacheError(
                f"--host {self.host} lets other machines in: add --token-file with a secret, for "
                "example from openssl rand -hex 32."
            )
        return None


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


@click.command(cls=Command)
@takes(place=_PlaceOptions, limits=LimitOptions, sampling=SamplingOptions)
@takes(model=ModelOptions, engine=EngineOptions, engines=EnginesOptions)
def main(
    place: _PlaceOptions,
    limits: LimitOptions,
    sampling: SamplingOptions,
    model: ModelOptions,
    engine: EngineOptions,
    engines: EnginesOptions,
) -> None:
    """Serve a model: OpenAI's images, txt2img, models, health, and Prometheus metrics.

    Requests choose their own plans; the sampling options are the defaults. Requests of equal plan
    and size that wait together are drawn as one batch. SIGTERM lets what was begun end.

    Example: encache-serve --stride 5 --port 8000
    """
    engines.refuse_idle_options(sampling)
    token = place.token()
    if limits.max_images > limits.max_waiting:
        raise click.UsageError("--max-images may not exceed --max-waiting: none would fit.")
    opening = Opening.of(engines.one_folder, model, engine, engines.backend, engines.engine_dir)
    size = SizeOptions()
    # Batches of every length, up to the largest.
    run = resolve_run(
        opening,
        sampling,
        size,
        range(limits.batch_size + 1),
        limits.batch_size,
        limits.max_decode_batch,
    )
    app = build_app(opening, run, sampling, limits, token)
    _log_json()
    import uvicorn

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(limits.deadline) + 1,
    )
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    with socket.create_server((place.host, place.port), family=family) as listening:
        address, port, *_ = listening.getsockname()
        shown = f"[{address}]" if ":" in address else address
        click.echo(f"Serving {opening.model.name} at http://{shown}:{port}", err=True)
        uvicorn.Server(config).run(sockets=[listening])


def _is_here(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def build_app(
    opening: Opening,
    run: Run,
    sampling: SamplingOptions,
    limits: LimitOptions,
    token: str | None,
) -> Any:
    """The application, its engines open.

    Args:
        opening, run: what draws; see `Generator`.
        sampling: the defaults of requests.
        limits: the most that they may ask for.
        token: that they must bring, if any.

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

    generator = Generator(opening, run, SizeOptions(), limits.max_decode_batch)
    generator.pipeline.set_progress_bar_config(disable=True)
    base = sampling.wished(opening.cut)
    if sampling.key_calls:  # which were settled with the solver
        base = replace(base, stride=None, key_calls=run.settings.policy.key_calls)
    most = Limits(
        limits.max_side or 2 * max(generator.pipeline.spec.picture_size),
        limits.max_steps,
        limits.max_images,
        limits.max_prompt,
    )
    intake = Intake(generator, base, opening.model.preset, opening.model.guidance_scale, most)
    metrics = Metrics(run.solver)
    bounds = DeskLimits(len(run.batches[0]), limits.max_waiting, limits.batch_wait)
    desk = Desk(generator, bounds, metrics)
    return make_app(Service(opening.model.name, intake, desk, limits.deadline), metrics, token)


def _log_json() -> None:
    from encache.serve.guard import JsonLines

    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, level in (("encache", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)


if __name__ == "__main__":
    main()
