"""The server as a deployment of Ray Serve: replicas of it come and go with the load.

    serve run encache.serve.ray_serve:app stride=5 replicas=4

Each replica is `encache-serve`'s application: requests that wait in it together are drawn as one
batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from encache.command import Command
from encache.export.options import EngineOptions, ModelOptions
from encache.options import option, takes
from encache.runtime.options import EnginesOptions, SamplingOptions
from encache.serve.building import LimitOptions, Offer, build_app, read_token, settle


@dataclass(frozen=True)
class _ReplicaOptions:
    """How many replicas there are, and what each gets."""

    replicas: int = option(type=click.IntRange(1), default=1, help="Most of them; at least one.")
    cores: int = option(type=click.IntRange(1), default=1, help="Of each.")
    gpus: float = option(type=click.FloatRange(0), default=0, help="Of each.")
    token_file: Path | None = option(
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="Its first line is what clients send as a bearer token.",
    )


def app(arguments: Mapping[str, Any]) -> Any:
    """The deployment, for `serve run` or a file of Ray Serve.

    Args:
        arguments: options of `encache-serve` without their dashes, but those of its address; and
            replicas (the most), cores and gpus (of each). Flags take true or false.

    Raises:
        click.ClickException: they are no options, or do not go together.
    """
    words = []
    for name, value in arguments.items():
        said = str(value).lower()
        if said != "false":
            words.append(f"--{name.replace('_', '-')}")
            words += [] if said == "true" else [str(value)]
    return command.main(words, standalone_mode=False)


@click.command(cls=Command)
@takes(place=_ReplicaOptions, limits=LimitOptions, sampling=SamplingOptions)
@takes(model=ModelOptions, engine=EngineOptions, engines=EnginesOptions)
def command(
    place: _ReplicaOptions,
    limits: LimitOptions,
    sampling: SamplingOptions,
    model: ModelOptions,
    engine: EngineOptions,
    engines: EnginesOptions,
) -> Any:
    """What `app` calls with words, as a shell would."""
    token = read_token(place.token_file) if place.token_file else None
    return _deploy(settle(sampling, limits, model, engine, engines), place, token)


def _deploy(offer: Offer, place: _ReplicaOptions, token: str | None) -> Any:
    from ray import serve

    # Called in a replica. Ray asks for a plain function.
    def build() -> Any:
        return build_app(offer, token, keeps=False)

    deployment: Any = serve.deployment(
        serve.ingress(build)(),
        name="encache",
        # Beyond it Ray lets requests wait by itself: those that wait here get an answer, if a 429.
        max_ongoing_requests=2 * (offer.limits.max_waiting + offer.limits.batch_size),
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": place.replicas,
            "target_ongoing_requests": 2 * offer.limits.batch_size,
        },
        ray_actor_options={"num_cpus": place.cores, "num_gpus": place.gpus},
        graceful_shutdown_timeout_s=offer.limits.deadline + 1,
    )
    return deployment.bind()
