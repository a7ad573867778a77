"""The generator: orders in, pictures out, whoever asks: a command, a server, a worker."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from encache import __version__
from encache.export.options import SizeOptions
from encache.runtime.blend import DEFAULT_STRIDE
from encache.runtime.jobs import Job, draw
from encache.runtime.opening import Opening, Run
from encache.runtime.plan import Decode, Plan, make_plan
from encache.runtime.schedulers import full_config
from encache.runtime.settings import Policy, Settings
from encache.runtime.solver import Scheduler

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Order:
    """One picture, and how it is sampled."""

    job: Job
    settings: Settings


@dataclass(frozen=True)
class Cost:
    """What an order costs, known before it starts.

    Attributes:
        evaluations: runs of the denoiser, or of its encoder where it is cut.
        rows: of these runs; guidance doubles them.
        decoder_rows: of the decoder's runs; 0 without a cut.
    """

    evaluations: int
    rows: int
    decoder_rows: int


def cost_of(solver: Scheduler, settings: Settings) -> Cost:
    """What a picture of these settings costs.

    Raises:
        PlanError: they do not fit together.
    """
    plan = make_plan(solver, settings.steps, settings.policy)
    decoded = sum(step.stop - step.start for step in plan.steps if isinstance(step, Decode))
    rows = settings.rows
    return Cost(plan.num_evaluations, plan.count_rows(rows), decoded * rows)


def stride_of(policy: Policy, plan: Plan) -> int | None:
    """The distance of a plan's key calls, or None where they are listed or fitted."""
    if policy.key_calls or policy.plan:
        return None
    return policy.stride or min(DEFAULT_STRIDE, plan.num_calls)


def _describe(solver: Scheduler, settings: Settings) -> dict[str, Any]:
    plan = make_plan(solver, settings.steps, settings.policy)
    stride = stride_of(settings.policy, plan)
    return {**settings.arguments, "stride": stride, "plan": plan.hash()}


def group(orders: Sequence[Order], most: int) -> list[list[int]]:
    """The orders' places in batches: of equal plan and size, and at most so many."""
    batches: dict[object, list[list[int]]] = {}
    for place, order in enumerate(orders):
        job = order.job
        alike = (order.settings, job.height, job.width, job.negative_prompt is None)
        found = batches.setdefault(alike, [[]])
        if len(found[-1]) == most:
            found.append([])
        found[-1].append(place)
    return sorted(batch for found in batches.values() for batch in found)


class Generator:
    """Draws orders with one pipeline, which is opened once and stays open.

    Like its pipeline, one thread at a time may call it.

    Args:
        opening: what draws.
        run: its solver, and in its batches how many pictures are drawn at once.
        size: for which engines that are missing are compiled.
        max_decode_batch: most rows in one run of the decoder, as it was asked for.
    """

    def __init__(
        self, opening: Opening, run: Run, size: SizeOptions, max_decode_batch: int | None = None
    ) -> None:
        self.pipeline = opening.open(run, size)
        self.pipeline.scheduler = run.solver
        self._run = run
        # A plan's hash takes as long as some pictures do.
        self._describe_settings = lru_cache(maxsize=128)(partial(_describe, run.solver))
        self._origin = {
            "max_decode_batch": max_decode_batch,
            "scheduler": full_config(run.solver),
            "model": opening.model.name,
            "fingerprint": opening.fingerprint,
            "engines": self.pipeline.engines.identity,
            "encache": __version__,
        }

    def cost(self, order: Order) -> Cost:
        """What the order costs.

        Raises:
            EncacheError: it cannot be drawn: its size, its plan, or the engines forbid it.
        """
        job, settings = order.job, order.settings
        self.pipeline.latent_size(job.height, job.width)
        if target := self.pipeline.engines.target:
            height, width = self._size(job)
            target.refuse_beyond(rows=settings.rows, height=height, width=width)
        return cost_of(self._run.solver, settings)

    def describe(self, order: Order) -> dict[str, Any]:
        """A picture's metadata: what decides it, not how it is batched."""
        height, width = self._size(order.job)
        own = {**asdict(order.job), "height": height, "width": width}
        return {**own, **self._describe_settings(order.settings), **self._origin}

    def __call__(self, orders: Sequence[Order]) -> Iterator[tuple[int, "Image"]]:
        """Each order's place and its picture, as soon as its batch is drawn.

        Raises:
            EncacheError: an order cannot be drawn.
        """
        for batch in group(orders, len(self._run.batches[0])):
            pictures = draw(
                self.pipeline,
                [orders[place].job for place in batch],
                orders[batch[0]].settings,
                max_decode_batch=self._run.max_decode_batch,
            )
            yield from zip(batch, pictures, strict=True)

    def _size(self, job: Job) -> tuple[int, int]:
        height, width = self.pipeline.spec.picture_size
        return job.height or height, job.width or width
