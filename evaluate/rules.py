"""Published forecasts of a denoiser's output, as plans of the output cache.

Each is a function that makes weights: what a call takes of the predictions of earlier key calls.
Where the blends of `encache.runtime.blend` look at two, these look further back.
"""

from collections.abc import Callable, Sequence
from math import factorial

import torch

from encache.runtime.key_calls import check_key_calls
from encache.runtime.plan import Evaluate, Plan, Row
from encache.runtime.solver import Columns, Scheduler, probe_solver

#: Weights of the predictions at the key calls up to a call, for that call; told which key call
#: follows, or the number of calls where none does, and the number of calls.
Weigh = Callable[[Sequence[int], int, int, int], Sequence[float]]


def plan_of_weights(
    scheduler: Scheduler, num_steps: int, key_calls: Sequence[int], weigh: Weigh, name: str
) -> Plan:
    """A plan whose calls take a weighted sum of what the key calls so far have predicted.

    Args:
        scheduler: a deterministic diffusers scheduler.
        num_steps: num_inference_steps.
        key_calls: where the denoiser runs.
        weigh: see `Weigh`.
        name: of the rule.

    Raises:
        PlanError: the numbers do not fit together.
    """
    table = probe_solver(scheduler, num_steps)
    keys = check_key_calls(key_calls, table.num_calls)
    columns = Columns(len(keys))
    # What stands in each column of the solver's history, as a row over ours.
    made = torch.zeros(len(table.columns), len(columns), dtype=torch.float64)
    made[0, 0] = 1
    for call in range(table.num_calls):
        nodes = [key for key in keys if key <= call]
        following = (*keys, table.num_calls)[len(nodes)]
        weights = weigh(nodes, call, following, table.num_calls)
        row = made[table.columns.prediction(call), columns.prediction(0) :]
        row[: len(nodes)] = torch.tensor(weights, dtype=torch.float64)
    inputs, samples = table.inputs.double() @ made, table.samples.double() @ made
    return Plan(
        num_calls=table.num_calls,
        num_slots=0,
        key_calls=keys,
        blend=name,
        steps=tuple(
            Evaluate(key, table.timesteps[key].item(), _row(inputs[key]), None) for key in keys
        ),
        columns=columns,
        samples=tuple(map(_row, samples)),
        timesteps=tuple(table.timesteps.tolist()),
    )


def _row(numbers: torch.Tensor) -> Row:
    return tuple(numbers.tolist())


def _own(nodes: Sequence[int]) -> list[float]:
    """What a key call takes where a rule speaks of the calls between: its own prediction."""
    return [0.0] * (len(nodes) - 1) + [1.0]


def adams_weights(
    nodes: Sequence[int], call: int, following: int, num_calls: int
) -> Sequence[float]:
    """AB2, the Adams-Bashforth method of two steps (as PLMS has it, arXiv 2202.09778).

    F = F_0 + r / 2 (F_0 - F_-1) at every call from one key call to the next, which lie r times as
    far apart as the last two did; in the middle of them a line has that value.

    Args:
        nodes: key calls.
        call: from the last of them on; which one means nothing.
        following: the next key call.
        num_calls: means nothing here.
    """
    if len(nodes) == 1:
        return [1.0]
    half = (following - nodes[-1]) / (nodes[-1] - nodes[-2]) / 2
    return [*_own(nodes[:-1])[:-1], -half, 1 + half]


def zeus_weights(
    nodes: Sequence[int], call: int, following: int, num_calls: int
) -> Sequence[float]:
    """ZEUS (arXiv 2604.01552): one step ahead by the last difference, then that again.

    F = 2 F_0 - F_-1, with what the call before the key call took as F_-1, whether it was run or
    forecast itself; the further calls up to the next key call reuse it, lest errors add up.

    Args:
        nodes: key calls.
        call: from the last of them on.
        following, num_calls: mean nothing here.
    """
    last = nodes[-1]
    if call == last or len(nodes) == 1:
        return _own(nodes)
    before = [*zeus_weights(nodes[:-1], last - 1, last, num_calls), 0.0]
    return [2 * own - earlier for own, earlier in zip(_own(nodes), before, strict=True)]


def hermite_weights(
    nodes: Sequence[int],
    call: int,
    following: int,
    num_calls: int,
    order: int = 2,
    scale: float = 0.5,
) -> Sequence[float]:
    """HiCache (arXiv 2508.16984): Taylor's forecast with scaled Hermite polynomials.

    F(x) = F_0 + sum_k sigma^k H_k(sigma x) / k! D^k F, for x calls after the last key call, with
    the physicists' H_k. D^k are its differences, each over the distance of the key calls where
    it was formed.

    Args:
        nodes: key calls.
        call: from the last of them on.
        following, num_calls: mean nothing here.
        order: largest k.
        scale: sigma.
    """
    if call == nodes[-1]:
        return _own(nodes)
    count = len(nodes)
    differences = [torch.eye(count, dtype=torch.float64)]  # by order, a row per node
    for _ in range(min(order, count - 1)):
        last = differences[-1]
        distances = torch.tensor([1.0, *(nodes[i + 1] - nodes[i] for i in range(count - 1))])
        formed = torch.zeros_like(last)
        formed[1:] = (last[1:] - last[:-1]) / distances[1:, None]
        differences.append(formed)
    weights = torch.zeros(count, dtype=torch.float64)
    for power, difference in enumerate(differences):
        hermite = _hermite(power, scale * (call - nodes[-1]))
        weights += scale**power * hermite / factorial(power) * difference[-1]
    return weights.tolist()


def _hermite(power: int, x: float) -> float:
    """The physicists' polynomial H_n: H_{n+1} = 2 x H_n - 2 n H_{n-1}."""
    previous, current = 0.0, 1.0
    for n in range(power):
        previous, current = current, 2 * x * current - 2 * n * previous
    return current


def ridge_weights(
    nodes: Sequence[int],
    call: int,
    following: int,
    num_calls: int,
    degree: int = 4,
    ridge: float = 0.1,
) -> Sequence[float]:
    """Spectrum (arXiv 2603.01623): a ridge fit of Chebyshev polynomials to all key calls so far.

    w = t (X^T X + lambda I)^-1 X^T, with the polynomials T_0 to T_M at the key calls in X and at
    the call in t, over the whole run scaled to [-1, 1].

    Args:
        nodes: key calls.
        call: from the last of them on.
        following: means nothing here.
        num_calls: N.
        degree: M.
        ridge: lambda.
    """
    if call == nodes[-1]:
        return _own(nodes)
    places = torch.tensor([*nodes, call], dtype=torch.float64) * 2 / num_calls - 1
    powers = torch.arange(degree + 1)
    polynomials = torch.cos(powers * torch.acos(places.clamp(-1, 1))[:, None])
    design, wanted = polynomials[:-1], polynomials[-1]
    gram = design.T @ design + ridge * torch.eye(degree + 1, dtype=torch.float64)
    return (wanted @ torch.linalg.solve(gram, design.T)).tolist()


#: By the name of the rule.
RULES: dict[str, Weigh] = {
    "ab2": adams_weights,
    "zeus": zeus_weights,
    "hicache": hermite_weights,
    "spectrum": ridge_weights,
}
