"""Which weighted sum of what key calls gave stands in for a call's own.

All blends are Lagrange interpolation on the call index: F(s) = sum_m w_m(s) F(t_m), through one
key call (reuse), through the last two (extrapolate), or through the two around it (interpolate).
F is a call's features, or its prediction where the denoiser is not cut.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

Blend = Literal["reuse", "extrapolate", "interpolate", "interpolate-refresh"]
BLENDS: tuple[Blend, ...] = get_args(Blend)

#: The way to cache that docs/study.md recommends, at the default cut.
DEFAULT_BLEND: Blend = "extrapolate"
DEFAULT_STRIDE = 3


def slots_for(rule: Blend, key_calls: Sequence[int]) -> int:
    """How many slots a ring needs: as many as the blend looks at of these key calls."""
    return min(1 if rule == "reuse" else 2, len(key_calls))


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


def ring_weights(nodes: Mapping[int, int], num_slots: int, call: int) -> tuple[float, ...]:
    """Weights of a call over a ring, where `nodes` says which slot each key call fills."""
    row = [0.0] * num_slots
    for slot, weight in zip(nodes.values(), lagrange_weights(tuple(nodes), call), strict=True):
        row[slot] = weight
    return tuple(row)
