"""Bulk work: batches that depend on the list alone, drawn here or by Ray's workers."""

import logging
import os
import pickle
from collections import abc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from encache.errors import EncacheError
from encache.export.options import SizeOptions
from encache.files import WRITERS
from encache.progress import progress
from encache.runtime.generator import Generator, Order, group
from encache.runtime.images import encode_png
from encache.runtime.opening import Opening, Run
from encache.serve.outputs import Output
from encache.serve.rows import Row

#: Batches that a worker of Ray takes at once: handing them out takes time, and so does a stop.
_BATCHES_AT_ONCE = 4

Batch = list[Order]
#: Batches' places and their pictures as PNG files, in any order.
Drawn = abc.Generator[tuple[int, list[bytes]], None, None]
Draw = Callable[[Sequence[Batch]], Drawn]


@dataclass(frozen=True)
class Recipe:
    """What a worker opens; any process of any machine that has the model can.

    Attributes: see `Generator`.
    """

    opening: Opening
    run: Run
    size: SizeOptions
    max_decode_batch: int | None


class Worker:
    """Draws batches with engines that it opens once."""

    def __init__(self, recipe: Recipe) -> None:
        self._generator = Generator(
            recipe.opening, recipe.run, recipe.size, recipe.max_decode_batch
        )
        self._generator.pipeline.set_progress_bar_config(disable=True)

    def draw(self, batch: Batch) -> list[bytes]:
        """Each order's picture as a PNG file."""
        drawn = dict(self._generator(batch))
        return [
            encode_png(drawn[place], self._generator.describe(order))
            for place, order in enumerate(batch)
        ]

    def __call__(self, work: dict[str, Any]) -> dict[str, Any]:
        """The same for a row of a data set of Ray."""
        try:
            pictures = self.draw(pickle.loads(work["batch"]))
        except EncacheError as error:  # Ray would print a traceback, and try again
            return {"place": work["place"], "pictures": [], "error": str(error)}
        return {"place": work["place"], "pictures": pictures, "error": ""}


def draw_rows(rows: Sequence[Row], recipe: Recipe, output: Output, draw: Draw) -> None:
    """Draw the rows that the output does not have yet.

    Which pictures are drawn together depends on the list alone, and a batch that lacks one is
    drawn again as a whole: so neither a stop nor the number of workers changes a picture.

    Raises:
        EncacheError: a row cannot be drawn.
    """
    orders = [Order(row.job, recipe.run.settings) for row in rows]
    batches = [
        batch
        for batch in group(orders, len(recipe.run.batches[0]))
        if any(rows[place].key not in output.done for place in batch)
    ]
    drawn = draw([[orders[place] for place in batch] for batch in batches])
    there = sum(row.key in output.done for row in rows)
    with (
        progress(total=len(rows), initial=there, unit="picture", desc="Drawing") as bar,
        closing(drawn),
        ThreadPoolExecutor(WRITERS) as writers,
    ):
        for number, pictures in drawn:
            batch = zip((rows[place] for place in batches[number]), pictures, strict=True)
            new = [(row, picture) for row, picture in batch if row.key not in output.done]
            for _ in writers.map(output.save, *zip(*new, strict=True)):
                pass
            output.record([row for row, _ in new])
            bar.update(len(new))
    output.finish()


def draw_here(recipe: Recipe, batches: Sequence[Batch]) -> Drawn:
    """Draw batches one after another in this process; see `Draw`."""
    if not batches:  # then no engine is needed
        return
    worker = Worker(recipe)
    for place, batch in enumerate(batches):
        yield place, worker.draw(batch)


@dataclass(frozen=True)
class Cluster:
    """How work is spread.

    Attributes:
        address: of a Ray cluster; None starts one on this machine.
        workers: how many; None is one per GPU, or one per group of cores.
        cores: of each worker; None is its share of this machine, or 1 in a cluster or with GPUs.
    """

    address: str | None
    workers: int | None
    cores: int | None

    def resources(self, total: dict[str, float]) -> tuple[int, dict[str, float]]:
        """The number of workers, and what Ray sets aside for each."""
        gpus, cores = int(total.get("GPU", 0)), int(total.get("CPU", 1))
        workers = self.workers or gpus or max(1, cores // (self.cores or 1))
        # Machines of a cluster differ: a worker that wants much may fit on none.
        share = 1 if gpus or self.address else max(1, cores // workers)
        own = {"num_cpus": float(self.cores or share)}
        return workers, own | ({"num_gpus": min(1.0, gpus / workers)} if gpus else {})


def draw_with_ray(recipe: Recipe, cluster: Cluster, batches: Sequence[Batch]) -> Drawn:
    """Draw batches with Ray Data; see `Draw`. A worker that dies is replaced, its work repeated.

    Raises:
        EncacheError: Ray is not installed or not reached, or a batch cannot be drawn.
    """
    ray = _import_ray()
    if not batches:
        return
    try:
        ray.init(
            address=cluster.address or "local",
            log_to_driver=False,
            logging_level="ERROR",
            include_dashboard=False if cluster.address is None else None,
        )
    except ConnectionError as error:
        raise EncacheError(f"There is no Ray cluster at {cluster.address}: {error}") from error
    try:
        workers, resources = cluster.resources(ray.cluster_resources())
        ray.data.DataContext.get_current().enable_progress_bars = False
        work = [
            {"place": place, "batch": pickle.dumps(batch)} for place, batch in enumerate(batches)
        ]
        blocks = max(workers, len(work) // _BATCHES_AT_ONCE)
        drawn = ray.data.from_items(work, override_num_blocks=min(len(work), blocks)).map(
            Worker,
            fn_constructor_args=(recipe,),
            compute=ray.data.ActorPoolStrategy(size=workers),
            **resources,
        )
        for one in drawn.iter_rows():
            if one["error"]:
                raise EncacheError(one["error"])
            yield one["place"], list(one["pictures"])
    except ray.exceptions.RayError as error:  # whose last line is a worker's own error
        raise EncacheError(f"Ray's workers failed: {str(error).splitlines()[-1]}") from error
    finally:
        ray.shutdown()


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters comes as an exception
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise EncacheError('Several workers need Ray: pip install ".[ray]".') from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray
