"""Shallow copies of a module with other children: its own forward runs, nothing is set on it."""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any


class ChildStandIn:
    """Takes a child's place in a copy of its parent; what else the parent asks, the child says."""

    def __init__(self, child: Any, function: Callable[..., Any]) -> None:
        self._child = child
        self._function = function

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._function(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._child, name)


def with_children(module: Any, children: Mapping[str, Any]) -> Any:
    """A copy, along the paths alone, such as "up_blocks.1"; all else is shared.

    A child hides what is given for the paths below it.
    """
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    below: dict[str, dict[str, Any]] = defaultdict(dict)
    for path, child in children.items():
        name, _, rest = path.partition(".")
        if rest:
            below[name][rest] = child
        else:
            copied._modules[name] = child
    for name in below.keys() - children.keys():
        copied._modules[name] = with_children(module._modules[name], below[name])
    return copied
