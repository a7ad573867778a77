"""What a sampling run costs, counted."""

from typing import Any

from encache.model.arithmetic import Arithmetic
from encache.runtime.plan import Plan
from encache.runtime.solver import count_calls


def gflop_of(plan: Plan, arithmetic: Arithmetic, rows: int) -> float:
    """Of one picture.

    Args:
        plan: whose evaluations may leave guidance out.
        arithmetic: of one row.
        rows: of a guided call, per picture.
    """
    return arithmetic.total(plan.count_rows(rows), rows * plan.num_calls)


def steps_within(scheduler: Any, steps: int, gflop: float, arithmetic: Arithmetic) -> int:
    """Most steps of the plain sampler whose calls cost at most `gflop` per row; at least one."""
    for fewer in range(steps, 1, -1):
        if count_calls(scheduler, fewer) * arithmetic.full <= gflop:
            return fewer
    return 1
