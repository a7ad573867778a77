"""What Prometheus is told."""

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from encache.runtime.generator import Order, cost_of
from encache.runtime.solver import Scheduler

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_SIZES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """The numbers of one server; also a `Watcher` of its desk.

    Args:
        solver: of its pictures, for their costs.
    """

    def __init__(self, solver: Scheduler) -> None:
        self._solver = solver
        self._registry = own = CollectorRegistry()
        self._requests = Counter("encache_requests", "Answers.", ["route", "status"], registry=own)
        self._stages = Histogram(
            "encache_stage_seconds",
            "Of a picture's wait, a batch's drawing, a whole request.",
            ["stage"],
            buckets=_SECONDS,
            registry=own,
        )
        self._batches = Histogram(
            "encache_batch_size", "Pictures drawn at once.", buckets=_SIZES, registry=own
        )
        self._evaluations = Counter(
            "encache_evaluations", "Runs of the denoiser, counted per picture.", registry=own
        )
        self._rows = Counter("encache_rows", "Rows of these runs.", registry=own)
        self._queue = Gauge("encache_queue", "Pictures that wait.", registry=own)

    def watch_queue(self, count: Callable[[], int]) -> None:
        """Report what `count` gives as the number of waiting pictures."""
        self._queue.set_function(count)

    def on_answered(self, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(route, status).inc()
        self._stages.labels("request").observe(seconds)

    def on_drawn(self, orders: Sequence[Order], waited: Sequence[float], seconds: float) -> None:
        """See `Watcher`."""
        self._batches.observe(len(orders))
        self._stages.labels("draw").observe(seconds)
        for order, own in zip(orders, waited, strict=True):
            cost = cost_of(self._solver, order.settings)
            self._stages.labels("wait").observe(own)
            self._evaluations.inc(cost.evaluations)
            self._rows.inc(cost.rows)

    def to_text(self) -> bytes:
        """In Prometheus' own format."""
        return generate_latest(self._registry)
