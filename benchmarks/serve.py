"""`encache-serve` under load, and under requests that schemathesis makes up.

    python benchmarks/serve.py load                     # four minutes of clients; two alone
    python benchmarks/serve.py fuzz                     # 1,000 requests

Each starts a server of its own on this machine and writes its part of benchmarks/serve.json. The
clients run on the same cores as the server. They ask again as soon as they are answered.
"""

import json
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from typing import Any

import click
import psutil

from encache.evaluate.bench_cli import PROMPTS
from encache.evaluate.machine import describe_machine
from encache.export.options import EngineOptions, ModelOptions, SizeOptions
from encache.files import write_json
from encache.options import takes
from encache.runtime.generator import Generator, Order
from encache.runtime.images import encode_png
from encache.runtime.jobs import Job
from encache.runtime.options import EnginesOptions, SamplingOptions
from encache.serve.building import LimitOptions, Offer, settle

ROUTE = "/v1/images/generations"
JSON = {"Content-Type": "application/json"}
#: What the fuzzed server allows: requests that are drawn should not take long.
SMALL = "--steps 4 --max-steps 4 --max-images 2 --max-side 64"
MIB = 2**20

settings_option = click.option(
    "--settings", default="", help="Options of encache-serve, as it would be typed."
)
output_option = click.option(
    "--output", type=click.Path(path_type=Path), default=Path("benchmarks/serve.json")
)


@click.group(help=__doc__)
def main() -> None:
    """See the module."""


@click.command()
@takes(limits=LimitOptions, sampling=SamplingOptions)
@takes(model=ModelOptions, engine=EngineOptions, engines=EnginesOptions)
def offer_of(**groups: Any) -> Offer:
    """What a server with these options offers."""
    return settle(**groups)


@dataclass
class Server:
    """A running `encache-serve`."""

    process: psutil.Process
    host: str
    log: list[str] = field(default_factory=list)

    def get(self, path: str) -> tuple[int, str]:
        """Status and text."""
        connection = HTTPConnection(self.host, timeout=300)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def numbers(self) -> dict[str, float]:
        """What Prometheus is told, by name and labels."""
        lines = self.get("/metrics")[1].splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    @property
    def rss(self) -> float:
        """Memory of the process, in MiB."""
        return round(self.process.memory_info().rss / MIB, 1)


@contextmanager
def serving(settings: str) -> Iterator[Server]:
    """Start a server on a free port, and stop it at the end as SIGTERM does."""
    command = [sys.executable, "-m", "encache.serve.serve_cli", "--port", "0"]
    with subprocess.Popen(
        command + shlex.split(settings), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        lines = iter(process.stderr)
        said = next((line for line in lines if line.startswith("Serving ")), None)
        if said is None:
            raise SystemExit("The server did not start.")
        server = Server(psutil.Process(process.pid), said.split("://")[1].strip())
        reading = threading.Thread(target=lambda: server.log.extend(lines))
        reading.start()
        try:
            yield server
        finally:
            process.terminate()
            process.wait()
            reading.join()


def job_of(number: int) -> Job:
    """What the clients ask for, one after another."""
    return Job(PROMPTS[number % len(PROMPTS)], number)


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50, p95 and p99 in ms."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive") if seconds[1:] else seconds * 99
    return {f"p{part}_ms": round(1000 * cuts[part - 1], 1) for part in (50, 95, 99)}


def summary(seconds: list[float], duration: float) -> dict[str, Any]:
    """Of requests that took so long, and ended within the duration."""
    if not seconds:
        raise SystemExit("No request ended in time: give more --seconds.")
    own = {"requests": len(seconds), "per_second": round(len(seconds) / duration, 2)}
    return own | percentiles(seconds)


def draw_alone(generator: Generator, offer: Offer, duration: float) -> dict[str, Any]:
    """The same pictures as PNG files, one after another in this process."""
    seconds = []

    def draw(number: int) -> None:
        start = time.perf_counter()
        order = Order(job_of(number), offer.run.settings)
        ((_, image),) = generator([order])
        encode_png(image, generator.describe(order))
        seconds.append(time.perf_counter() - start)

    for number in range(3):
        draw(number)
    seconds.clear()
    start, numbers = time.perf_counter(), count()
    while time.perf_counter() - start < duration:
        draw(next(numbers))
    return summary(seconds, sum(seconds))


def ask(server: Server, clients: int, duration: float) -> dict[str, Any]:
    """So many clients, each with one request at a time, after each has been answered twice."""
    numbers, statuses, seconds = count(), Counter[str](), list[float]()
    warm = threading.Barrier(clients + 1)
    until = 0.0

    def work() -> None:
        connection = HTTPConnection(server.host, timeout=300)
        for _ in range(2):
            post(connection)
        warm.wait()
        warm.wait()
        while (start := time.perf_counter()) < until:
            status = post(connection)
            end = time.perf_counter()
            if end <= until:
                statuses[status] += 1
                seconds.append(end - start)
        connection.close()

    def post(connection: HTTPConnection) -> str:
        job = job_of(next(numbers))
        body = json.dumps({"prompt": job.prompt, "seed": job.seed})
        try:
            connection.request("POST", ROUTE, body, JSON)
            answer = connection.getresponse()
            answer.read()
        except OSError as error:
            connection.close()
            return type(error).__name__
        return str(answer.status)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for one in threads:
        one.start()
    warm.wait()
    before, rss = server.numbers(), server.rss
    until = time.perf_counter() + duration
    warm.wait()
    for one in threads:
        one.join()
    return {
        "clients": clients,
        **summary(seconds, duration),
        "statuses": dict(statuses),
        "batches": batches(before, server.numbers()),
        "rss_mib": [rss, server.rss],
    }


def batches(before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """How many pictures were drawn at once between two looks at the numbers."""
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    total, drawn = grown["encache_batch_size_count"], grown["encache_batch_size_sum"]
    sizes, below = {}, 0.0
    for name, value in grown.items():
        if found := re.fullmatch(r'encache_batch_size_bucket\{le="([\d.]+)"\}', name):
            sizes[f"up to {float(found[1]):g}"] = int(value - below)
            below = value
    return {"mean": round(drawn / max(1, total), 2), **{k: v for k, v in sizes.items() if v}}


def keep(output: Path, part: str, content: dict[str, Any]) -> None:
    """Write one part of the results, and leave the others."""
    whole = json.loads(output.read_text()) if output.exists() else {}
    command = " ".join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]])
    write_json(
        output, {**whole, part: {"machine": describe_machine(), "command": command} | content}
    )


@main.command()
@settings_option
@click.option("--clients", type=click.IntRange(1), multiple=True, default=(1, 8, 64))
@click.option("--seconds", type=click.FloatRange(0.1), default=60.0, help="Of each.")
@output_option
def load(settings: str, clients: tuple[int, ...], seconds: float, output: Path) -> None:
    """Requests per second and latencies, against the same pipeline called one by one.

    It is called before and after the clients, because machines change their speed.
    """
    offer = offer_of.main(shlex.split(settings), standalone_mode=False)
    generator = Generator(offer.opening, offer.run, SizeOptions())
    generator.pipeline.set_progress_bar_config(disable=True)
    alone = [draw_alone(generator, offer, seconds)]
    with serving(settings) as server:
        start = server.rss
        asked = [ask(server, number, seconds) for number in clients]
        end = server.rss
        errors = sum('"level": "error"' in line for line in server.log)
    alone.append(draw_alone(generator, offer, seconds))
    each = statistics.mean(one["per_second"] for one in alone)
    for one in asked:
        one["speedup"] = round(one["per_second"] / each, 2)
        click.echo(json.dumps(one))
    content = {
        "settings": settings,
        "seconds": seconds,
        "alone": alone,
        "served": asked,
        "rss_mib": [start, end],
        "errors_in_log": errors,
    }
    keep(output, "load", content)


@main.command()
@click.option("--requests", type=click.IntRange(1), default=1000, help="At least so many.")
@settings_option
@output_option
def fuzz(requests: int, settings: str, output: Path) -> None:
    """Requests from the OpenAPI schema; ends with 1 if an answer is not as documented."""
    with serving(f"{SMALL} {settings}") as server:
        seed = count()
        answered: dict[str, int] = {}
        failed = 0
        while sum(answered.values()) < requests and not failed:
            failed = make_requests(server, next(seed))
            answered = answers(server)
            click.echo(f"{sum(answered.values())} requests", err=True)
        alive = server.get("/readyz")[0] == 200
        errors = sum('"level": "error"' in line for line in server.log)
    content = {
        "settings": f"{SMALL} {settings}".strip(),
        "requests": sum(answered.values()),
        "answers": answered,
        "as_documented": not failed,
        "alive_afterwards": alive,
        "errors_in_log": errors,
    }
    click.echo(json.dumps(content))
    keep(output, "fuzz", content)
    sys.exit(failed or errors or not alive)


def make_requests(server: Server, seed: int) -> int:
    """One run of schemathesis, of some hundred requests."""
    command = [Path(sys.executable).with_name("schemathesis"), "run"]
    command += [f"http://{server.host}/openapi.json", "--seed", str(seed), "--max-examples", "50"]
    # What fits the schema may still be impossible: a stride beyond the steps, a size of 7 pixels.
    command += ["--exclude-checks", "positive_data_acceptance", "--phases", "coverage,fuzzing"]
    return subprocess.run([*map(str, command)], stdout=sys.stderr).returncode


def answers(server: Server) -> dict[str, int]:
    """How many there were of each status, but of the page, health and metrics."""
    total = Counter[str]()
    for name, value in server.numbers().items():
        found = re.fullmatch(r'encache_requests_total\{route="(.*)",status="(\d+)"\}', name)
        if found and found[1].startswith(("/v1", "/sdapi")):
            total[found[2]] += int(value)
    return dict(total)


if __name__ == "__main__":
    main()
