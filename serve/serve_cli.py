"""`encache-serve`: a model behind HTTP."""

import ipaddress
import logging
import socket
from dataclasses import dataclass
from pathlib import Path

import click

from encache.command import Command
from encache.errors import EncacheError
from encache.export.options import EngineOptions, ModelOptions
from encache.options import option, takes
from encache.runtime.options import EnginesOptions, SamplingOptions
from encache.serve.building import LimitOptions, build_app, read_token, settle


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
            return read_token(self.token_file)
        if not _is_here(self.host):
            raise EncacheError(
                f"--host {self.host} lets other machines in: add --token-file with a secret, for "
                "example from openssl rand -hex 32."
            )
        return None


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
    token = place.token()
    offer = settle(sampling, limits, model, engine, engines)
    app = build_app(offer, token)
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
        click.echo(f"Serving {offer.opening.model.name} at http://{shown}:{port}", err=True)
        uvicorn.Server(config).run(sockets=[listening])


def _is_here(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
