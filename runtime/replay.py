"""A function of tensors as a CUDA graph: the host launches all its kernels at once."""

from collections.abc import Callable

import torch
from torch import Tensor


class Replay:
    """Runs a function as it is at first, which warms it up, and from then on as a CUDA graph.

    The function must do the same work whatever its arguments hold, and keep its buffers.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False

    def __call__(self, *arguments: Tensor) -> Tensor:
        """The function's value; the arguments must have the shapes of the first call."""
        if not self._warm:
            self._warm = True
            return self._function(*arguments)
        if self._graph is None:
            self._arguments = [one.clone() for one in arguments]
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = self._function(*self._arguments)
        for place, one in zip(self._arguments, arguments, strict=True):
            place.copy_(one)
        self._graph.replay()
        return self._result.clone()
