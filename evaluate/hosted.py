"""`encache-run --compare` for a pipeline that keeps its own loop: cached beside full."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from encache.errors import EncacheError
from encache.evaluate.bench import Row, matrix_peak, measure
from encache.evaluate.contenders import Contender
from encache.runtime.blend import DEFAULT_STRIDE
from encache.runtime.host import Host, Wish


def compare(host: Host, wishes: Sequence[Wish], engines: Path | None) -> list[Row]:
    """Measure the pipeline untouched, cached in PyTorch, and cached on engines.

    Args:
        host: the opened pipeline.
        wishes: each is drawn once by every contender.
        engines: folder of its engines, if they are compared.

    Raises:
        EncacheError: one of them cannot run.
    """
    device, policy = host.pipe.device, host.settings.policy
    sampling = f"cut {policy.cut}, stride {policy.stride or DEFAULT_STRIDE}"
    if host.key_calls:
        sampling = f"cut {policy.cut}, {len(host.key_calls)} key calls"
    full = f"{host.settings.steps} steps"

    def draw(_: str, number: Tensor) -> Tensor:
        return torch.from_numpy(host.draw(wishes[int(number)]))

    def contender(backend: str, how: str, enable: Callable[[], None]) -> Contender:
        return Contender(backend, how, device, draw, patch=_enabled(host, enable))

    contenders = [
        contender("diffusers", full, host.disable),
        contender("torch", sampling, host.enable),
    ]
    if engines:
        contenders.append(contender(host.backend, sampling, lambda: host.enable(engines)))
    inputs = [(one.words, torch.tensor([number])) for number, one in enumerate(wishes)]
    rows, failures = measure(contenders, inputs, matrix_peak(device, torch.float32))
    for name, reason in failures.items():
        raise EncacheError(f"{name}: {reason}")
    return rows


def _enabled(host: Host, enable: Callable[[], None]) -> Callable[[], AbstractContextManager[None]]:
    """What puts a way to cache in place, and takes it back."""

    @contextmanager
    def patch() -> Iterator[None]:
        enable()
        try:
            yield
        finally:
            host.disable()

    return patch
