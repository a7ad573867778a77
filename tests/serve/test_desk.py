"""The desk with a draughtsman of our own: what is drawn together, refused, given up."""

import threading
import time
from dataclasses import replace

import pytest

from encache.errors import EncacheError
from encache.runtime.generator import Order
from encache.runtime.jobs import Job
from encache.runtime.settings import FULL, Settings
from encache.serve.desk import Desk, DeskLimits, FullError

SETTINGS = Settings(steps=10, guidance_scale=3.0, policy=FULL)
LIMITS = DeskLimits(batch_size=3, most_waiting=5, patience=0.0)


def order(seed, **changes):
    return Order(Job("x", seed, **changes), SETTINGS)


class Draughtsman:
    """Draws seeds as numbers, when it may."""

    def __init__(self):
        self.batches = []
        self.may = threading.Event()
        self.started = threading.Event()
        self.watched = []

    def __call__(self, orders):
        self.batches.append([one.job.seed for one in orders])
        self.started.set()
        assert self.may.wait(30)
        if any(one.job.seed == 13 for one in orders):
            raise EncacheError("13 is black")
        return [(place, one.job.seed * 10) for place, one in enumerate(orders)]

    def on_drawn(self, orders, waited, seconds):
        self.watched.append((len(orders), len(waited)))


@pytest.fixture
def drawn():
    return Draughtsman()


def busy(desk, drawn):
    """Let the desk draw something that does not end yet."""
    (first,) = desk.order([order(0)])
    assert drawn.started.wait(30)
    return first


def test_those_alike_are_drawn_together(drawn):
    with Desk(drawn, LIMITS, drawn) as desk:
        first = busy(desk, drawn)
        mixed = desk.order([order(1), order(2, height=8), order(3), order(4), order(5)])
        drawn.may.set()
        assert first.result(30) == 0
        assert [one.result(30) for one in mixed] == [10, 20, 30, 40, 50]
    assert drawn.batches == [[0], [1, 3, 4], [2], [5]]
    assert drawn.watched == [(1, 1), (3, 3), (1, 1), (1, 1)]


def test_patience_brings_company(drawn):
    drawn.may.set()
    with Desk(drawn, replace(LIMITS, patience=30), drawn) as desk:
        (first,) = desk.order([order(1)])
        others = desk.order([order(2), order(3)])  # a full batch waits no longer
        assert [one.result(20) for one in (first, *others)] == [10, 20, 30]
    assert drawn.batches == [[1, 2, 3]]


def test_a_full_queue_refuses(drawn):
    with Desk(drawn, LIMITS, drawn) as desk:
        busy(desk, drawn)
        waiting = desk.order([order(seed) for seed in range(1, 5)])
        with pytest.raises(FullError, match="4 pictures wait") as refused:
            desk.order([order(5), order(6)])
        assert refused.value.seconds >= 1
        assert desk.waiting == 4
        waiting[0].cancel()  # its client went away
        waiting[1].cancel()
        assert len(desk.order([order(5), order(6)])) == 2
        drawn.may.set()
    assert drawn.batches == [[0], [3, 4, 5], [6]]


def test_one_that_fails_does_not_take_others_along(drawn):
    with Desk(drawn, LIMITS, drawn) as desk:
        busy(desk, drawn)
        one, black, other = desk.order([order(1), order(13), order(2)])
        drawn.may.set()
        assert (one.result(30), other.result(30)) == (10, 20)
        with pytest.raises(EncacheError, match="13 is black"):
            black.result(30)
        (later,) = desk.order([order(4)])
        assert later.result(30) == 40


def test_closing_draws_what_waits(drawn):
    with Desk(drawn, replace(LIMITS, patience=30), drawn) as desk:
        waiting = desk.order([order(1), order(2, height=8)])
        assert desk.alive
        drawn.may.set()
        start = time.monotonic()
    assert time.monotonic() - start < 20  # without patience
    assert [one.result(0) for one in waiting] == [10, 20]
    assert not desk.alive
