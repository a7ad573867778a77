"""Which weighted sum of key features stands in for a call's own features.

All blends are Lagrange interpolation on the call index: F(s) = sum_m w_m(s) F(t_m), through one
key call (reuse), through the last ones (extrapolate), or through the two around it (interpolate).
"extrapolate-damped" goes half as far as "extrapolate".
"""

from collections.abc import Sequence
from typing import Literal, get_args

Blend = Literal[
    "reuse",
    "extrapolate",
    "extrapolate-damped",
    "extrapolate2",
    "interpolate",
    "interpolate-continued",
    "interpolate-refresh",
]
BLENDS: tuple[Blend, ...] = get_args(Blend)

#: The way to cache that docs/study.md recommends, at the default cut.
DEFAULT_BLEND: Blend = "extrapolate"
DEFAULT_STRIDE = 3

#: How many key calls' features a blend looks at, which is the number of ring slots.
NUM_SLOTS: dict[Blend, int] = {
    "reuse": 1,
    "extrapolate": 2,
    "extrapolate-damped": 2,
    "extrapolate2": 3,
    "interpolate": 2,
    "interpolate-continued": 2,
    "interpolate-refresh": 2,
}


def blend_weights(blend: Blend, nodes: Sequence[int], call: int) -> tuple[float, ...]:
    """Weights of the key calls `nodes`, the last one latest, for the features of `call`."""
    weights = lagrange_weights(nodes, call)
    if blend != "extrapolate-damped":
        return weights
    reused = (*(0.0 for _ in nodes[1:]), 1.0)
    return tuple((ours + theirs) / 2 for ours, theirs in zip(weights, reused, strict=True))


def lagrange_weights(nodes: Sequence[int], call: int) -> tuple[float, ...]:
    """Weights of the polynomial through `nodes` at `call`; they sum to one.

    One node repeats it, two nodes give w = (t_b - s) / (t_b - t_a) of TIEC, with w < 0 beyond.
    """
    weights = []
    for node in nodes:
        weight = 1.0
        for other in nodes:
            if other != node:
                weight *= (call - other) / (node - other)
        weights.append(weight)
    return tuple(weights)
