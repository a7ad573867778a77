"""A function of tensors as a CUDA graph: the host launches all its kernels at once."""

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from encache.errors import EncacheError

logger = logging.getLogger(__name__)


class Replay:
    """Runs a function as it is at first, which warms it up, and from then on as a CUDA graph.

    The function must do the same work whatever its arguments hold, and keep its buffers.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False
        self._failed = False

    @property
    def captured(self) -> bool:
        """Whether the next call is a replay."""
        return self._graph is not None

    def __call__(self, *arguments: Any) -> Tensor:
        """The function's value; the tensors in the arguments must have the first call's shapes."""
        if self._warm and not self.captured and not self._failed:
            self._capture(arguments)
        if self._graph is None:
            value = self._function(*arguments)
            self._warm = True
            return value
        places = tree_leaves(self._arguments)
        for place, one in zip(places, tree_leaves(arguments), strict=True):
            place.copy_(one)
        self._graph.replay()
        return self._value.clone()

    def _capture(self, arguments: tuple[Any, ...]) -> None:
        self._arguments = tree_map(torch.clone, arguments)
        stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
        graph = None
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=_pool().id):
                self._value = self._function(*self._arguments)
            self._graph = graph
        except (RuntimeError, EncacheError) as error:
            if stream:  # a failed capture leaves its own behind
                torch.cuda.set_stream(stream)
                _abandon(graph)
            self._failed = True
            logger.warning("no CUDA graph, so runs are launched one by one: %s", error)


#: Graphs whose capture broke off, with their pools.
_abandoned: list[Any] = []


def _abandon(graph: Any) -> None:
    """Let others be captured, and random numbers be drawn, after a capture that broke off.

    PyTorch leaves such a capture open in three places. Its allocator goes on recording into the
    pool, which can be ended. Its allocator of pinned memory does so too, which cannot be ended; it
    asks the broken graph at every allocation. So the graph must stay alive, and others get another
    pool. Its generators wait for the graph's end, until they are given their own state anew.
    """
    with suppress(RuntimeError, AttributeError):  # it was ended properly, or is called otherwise
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), _pool().id)
    _abandoned.append((graph, _pool()))
    _pool.cache_clear()
    for generator in torch.cuda.default_generators:
        generator.graphsafe_set_state(generator.clone_state())


@cache
def _pool() -> Any:
    """The pool of memory of all graphs: they run one at a time, and each value is copied out.

    Held as an object, because a bare handle dies with the last graph that uses it.
    """
    return torch.cuda.MemPool()
