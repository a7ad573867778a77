"""The desk: takes orders of many clients, and draws those that wait together as one batch."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from encache.errors import EncacheError
from encache.runtime.generator import Order, group

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


class FullError(EncacheError):
    """There is no place for more orders.

    Attributes:
        seconds: until there may be one.
    """

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"{waiting} pictures wait already: try again in {seconds} s.")
        self.seconds = seconds


class Watcher(Protocol):
    """Is told what the desk does; from its own thread."""

    def on_drawn(self, orders: Sequence[Order], waited: Sequence[float], seconds: float) -> None:
        """A batch was drawn, after each order had waited for so many seconds."""


@dataclass(frozen=True)
class DeskLimits:
    """How much waits, and how long.

    Attributes:
        batch_size: most pictures at once.
        most_waiting: most pictures that wait; further ones are refused.
        patience: seconds for which an order waits for others like it.
    """

    batch_size: int
    most_waiting: int
    patience: float


@dataclass(frozen=True)
class _Ticket:
    order: Order
    future: "Future[Image]" = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Desk:
    """Draws what is ordered, in one thread of its own; use it in `with`.

    Args:
        draw: from orders to each one's place and picture, as `Generator` has it.
        limits: see there.
        watcher: is told about every batch.
    """

    def __init__(
        self,
        draw: "Callable[[Sequence[Order]], Iterable[tuple[int, Image]]]",
        limits: DeskLimits,
        watcher: Watcher,
    ) -> None:
        self._draw = draw
        self.limits = limits
        self._watcher = watcher
        self._changed = threading.Condition()
        self._tickets: list[_Ticket] = []
        self._open = True
        self._seconds_each = 1.0
        self._thread = threading.Thread(target=self._work, name="desk", daemon=True)

    def __enter__(self) -> "Desk":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Draw what waits, and end the thread."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether orders are drawn."""
        return self._open and self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """How many pictures wait."""
        with self._changed:
            return len(self._waiting())

    def order(self, orders: Sequence[Order]) -> "list[Future[Image]]":
        """Queue orders; a future that is cancelled frees its place.

        Raises:
            FullError: they do not all find a place.
        """
        with self._changed:
            waiting = len(self._waiting())
            if waiting + len(orders) > self.limits.most_waiting:
                raise FullError(waiting, 1 + round(waiting * self._seconds_each))
            tickets = [_Ticket(order) for order in orders]
            self._tickets += tickets
            self._changed.notify_all()
        return [ticket.future for ticket in tickets]

    def _waiting(self) -> list[_Ticket]:
        self._tickets = [one for one in self._tickets if not one.future.cancelled()]
        return self._tickets

    def _work(self) -> None:
        for batch in self._batches():
            start = time.monotonic()
            self._finish(batch)
            seconds = time.monotonic() - start
            self._seconds_each = seconds / len(batch)
            waited = [start - ticket.since for ticket in batch]
            self._watcher.on_drawn([ticket.order for ticket in batch], waited, seconds)

    def _batches(self) -> Iterator[list[_Ticket]]:
        """Whom to draw next: the one that waits longest, and those like it; until closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting() or not self._open)
                if not (batch := self._alike()):
                    if self._open:  # the only one went away just now
                        continue
                    return
                until = batch[0].since + self.limits.patience
                while self._open and len(batch) < self.limits.batch_size:
                    if not self._changed.wait(max(0.0, until - time.monotonic())):
                        break
                    if not (batch := self._alike()):
                        break
                taken = {id(one) for one in batch}
                self._tickets = [one for one in self._tickets if id(one) not in taken]
            if batch := [one for one in batch if one.future.set_running_or_notify_cancel()]:
                yield batch

    def _alike(self) -> list[_Ticket]:
        tickets = self._waiting()
        places = group([one.order for one in tickets], self.limits.batch_size)
        return [tickets[place] for place in places[0]] if places else []

    def _finish(self, batch: Sequence[_Ticket]) -> None:
        """Draw a batch; if it fails, one by one, so that nobody suffers from another's order."""
        try:
            drawn = dict(self._draw([ticket.order for ticket in batch]))
        except Exception as error:
            if not isinstance(error, EncacheError):
                logger.exception("A batch of %d failed.", len(batch))
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            for ticket in batch:
                self._finish([ticket])
            return
        for place, ticket in enumerate(batch):
            ticket.future.set_result(drawn[place])
