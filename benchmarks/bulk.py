"""`encache-batch` against `encache-run`, and on a cluster that loses a node.

    python benchmarks/bulk.py pace                      # 10,000 pictures by each, in turns
    python benchmarks/bulk.py cluster                   # two nodes on this machine

Each writes its part of benchmarks/bulk.json. Both commands draw the same pictures, byte for byte,
or the benchmark fails; and so do the cluster and one process.
"""

import hashlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click

from encache.evaluate.machine import describe_machine
from encache.evaluate.settings import read_prompts
from encache.files import WRITERS, write_json, write_new
from encache.model.checkpoint import default_model

RUN, BATCH = "encache.runtime.cli", "encache.serve.batch_cli"

settings_option = click.option(
    "--settings", default="--fast", help="Options of both commands, as they would be typed."
)
batch_option = click.option("--batch-size", type=click.IntRange(1), default=8)
output_option = click.option(
    "--output", type=click.Path(path_type=Path), default=Path("benchmarks/bulk.json")
)


@click.group(help=__doc__)
def main() -> None:
    """See the module."""


def keep(output: Path, part: str, content: dict[str, Any]) -> None:
    """Write one part of the results, and leave the others."""
    whole = json.loads(output.read_text()) if output.exists() else {}
    command = " ".join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]])
    write_json(
        output, {**whole, part: {"machine": describe_machine(), "command": command} | content}
    )


def write_prompts(path: Path, number: int) -> Path:
    """So many different prompts, and the same again if there are not enough."""
    known = read_prompts(default_model() / "prompts.txt")
    path.write_text("".join(f"{known[place % len(known)]}\n" for place in range(number)))
    return path


def words_of(module: str, arguments: Sequence[object]) -> list[str]:
    """A command of this environment, as a shell would run it."""
    program = [sys.executable, "-c", f"from {module} import main; main()"]
    return [*program, *map(str, arguments)]


def call(module: str, arguments: Sequence[object]) -> float:
    """Seconds of a command from its start to its end."""
    start = time.perf_counter()
    subprocess.run(words_of(module, arguments), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def digests(folder: Path) -> list[str]:
    """Of the pictures, whatever their names."""
    return sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.png"))


def draw_both(prompts: Path, fixed: list[str], turn: int) -> dict[str, float]:
    """Seconds of both commands for the same pictures; each goes first every second time."""
    folder = prompts.parent
    commands = {
        "run": (RUN, ["--prompts-file", prompts, *fixed, "--output", folder / "run"]),
        "batch": (BATCH, [prompts, *fixed, "--output", folder / "batch"]),
    }
    names = ["run", "batch"] if turn % 2 else ["batch", "run"]
    seconds = {name: call(*commands[name]) for name in names}
    if digests(folder / "run") != digests(folder / "batch"):
        raise SystemExit("The two commands drew different pictures.")
    return seconds


@main.command()
@click.option("--pictures", type=click.IntRange(1), default=10_000)
@click.option("--chunks", type=click.IntRange(1), default=10)
@batch_option
@settings_option
@output_option
def pace(pictures: int, chunks: int, batch_size: int, settings: str, output: Path) -> None:
    """Pictures per second of `encache-batch` and `encache-run`, in turns, chunk by chunk.

    encache-run draws the pictures of one prompt together, so a prompt has as many as a batch.
    """
    chunk = max(1, pictures // (chunks * batch_size))
    fixed = [*shlex.split(settings), "--batch-size", str(batch_size)]
    fixed += ["--num-images", str(batch_size)]
    rows, sizes = [], []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for turn in range(-1, chunks):  # the first one builds what is missing, and is a start alone
            place = Path(folder) / f"{turn}"
            place.mkdir()
            prompts = write_prompts(place / "prompts.txt", chunk if turn >= 0 else 1)
            fresh = [*fixed, "--seed", str(max(0, turn) * batch_size)]
            seconds = draw_both(prompts, fresh, turn)
            if turn < 0:
                shutil.rmtree(place)
                place.mkdir()
                start = draw_both(write_prompts(prompts, 1), fresh, turn)
            else:
                rows.append(seconds)
            sizes += [path.stat().st_size for path in place.rglob("batch/*/*.png")]
            shutil.rmtree(place)
            click.echo(json.dumps(seconds), err=True)
        flushing = {
            name: time_writing(Path(folder), round(statistics.mean(sizes)), flushed)
            for name, flushed in (("flushed", True), ("not_flushed", False))
        }
    number = chunk * batch_size
    ratios = [row["batch"] / row["run"] for row in rows]
    content = {
        "settings": settings,
        "batch_size": batch_size,
        "pictures": number * chunks,
        "seconds": rows,
        "seconds_of_one_batch": start,
        "pictures_per_second": {
            name: round(number / statistics.mean(row[name] for row in rows), 2) for name in start
        },
        "overhead_percent": {
            "median": round(100 * (statistics.median(ratios) - 1), 2),
            "chunks": [round(100 * (ratio - 1), 2) for ratio in ratios],
        },
        "writing_ms_per_picture": flushing,
    }
    click.echo(json.dumps(content))
    keep(output, "pace", content)


def time_writing(folder: Path, size: int, flushed: bool) -> float:
    """Milliseconds to write a picture, as encache-batch does, with and without waiting for disk."""
    content, number = os.urandom(size), 512
    wait = os.fsync if flushed else (lambda descriptor: None)
    with patch.object(os, "fsync", wait), ThreadPoolExecutor(WRITERS) as writers:
        start = time.perf_counter()
        for batch in range(0, number, WRITERS):
            names = [folder / f"{flushed}-{batch + one}" for one in range(WRITERS)]
            for _ in writers.map(write_new, names, [content] * WRITERS):
                pass
        return round(1000 * (time.perf_counter() - start) / number, 3)


@main.command()
@click.option("--pictures", type=click.IntRange(16), default=400)
@batch_option
@settings_option
@output_option
def cluster(pictures: int, batch_size: int, settings: str, output: Path) -> None:
    """Take a node away from a cluster of two while it draws; made by Ray's own test tools."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    from ray.cluster_utils import Cluster

    fixed = [*shlex.split(settings), "--batch-size", str(batch_size)]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        one, two = Path(folder) / "one", Path(folder) / "two"
        prompts = write_prompts(Path(folder) / "prompts.txt", pictures)
        call(BATCH, [prompts, *fixed, "--output", one])
        nodes = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        try:
            second = nodes.add_node(num_cpus=1)
            arguments = [prompts, *fixed, "--output", two, "--ray-address", nodes.address]
            start = time.perf_counter()
            with subprocess.Popen(words_of(BATCH, arguments)) as process:
                while (drawn := len(digests(two))) < pictures // 4 and process.poll() is None:
                    time.sleep(0.1)
                if drawn >= pictures:
                    raise SystemExit("All was drawn before a node could be removed.")
                nodes.remove_node(second, allow_graceful=False)
                removed = time.perf_counter() - start
            seconds = time.perf_counter() - start
        finally:
            nodes.shutdown()
        if process.returncode:
            raise SystemExit("encache-batch failed.")
        lines = [(path / "metadata.jsonl").read_text() for path in (one, two)]
        content = {
            "settings": settings,
            "batch_size": batch_size,
            "pictures": pictures,
            "drawn_before_the_node_was_removed": drawn,
            "seconds": round(seconds, 1),
            "seconds_after_the_node_was_removed": round(seconds - removed, 1),
            "same_bytes_as_one_process": digests(one) == digests(two) and lines[0] == lines[1],
            "pictures_found": len(digests(two)),
        }
    click.echo(json.dumps(content))
    keep(output, "cluster", content)
    sys.exit(not content["same_bytes_as_one_process"])


if __name__ == "__main__":
    main()
