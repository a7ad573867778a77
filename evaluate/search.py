"""Which calls to run: NSGA-II (Deb et al. 2002) over cost and error, by pymoo.

Faster Diffusion (arXiv 2312.09608) proposes such a search as future work. A candidate is the set of
its key calls; its error is that of a plan fitted to them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.mutation import Mutation
from pymoo.core.problem import ElementwiseProblem
from pymoo.core.repair import Repair
from pymoo.operators.crossover.ux import UniformCrossover
from pymoo.optimize import minimize

from encache.evaluate.fitting import spread_key_calls
from encache.runtime.key_calls import PAPER_KEY_CALLS

KeyCalls = tuple[int, ...]
#: Furthest that a mutation moves a key call.
_FURTHEST = 3


@dataclass(frozen=True)
class Search:
    """How long it is searched.

    Attributes:
        population: candidates per generation.
        generations: how many; each adds a population of candidates.
        seed: of all that is random.
    """

    population: int = 12
    generations: int = 6
    seed: int = 0

    @property
    def candidates(self) -> int:
        """About how many are looked at."""
        return self.population * self.generations


def search_key_calls(
    num_calls: int,
    budgets: Sequence[int],
    error_of: Callable[[KeyCalls], float],
    settings: Search,
    on_candidate: Callable[[], object] = lambda: None,
) -> dict[int, KeyCalls]:
    """The key calls of least error for each number of evaluations.

    Args:
        num_calls: of the full sampler.
        budgets: numbers of evaluations, each between 1 and the calls.
        error_of: of key calls; asked once for each candidate.
        settings: see `Search`.
        on_candidate: called after each that a generation looks at.
    """
    known: dict[KeyCalls, float] = {}

    def ask(keys: KeyCalls) -> float:
        if keys not in known:
            known[keys] = error_of(keys)
        return known[keys]

    class KeyCallProblem(ElementwiseProblem):
        def __init__(self) -> None:
            super().__init__(n_var=num_calls, n_obj=2, xl=0, xu=1, vtype=bool)

        def _evaluate(self, x: np.ndarray, out: dict[str, Any], *_: Any, **__: Any) -> None:
            keys = _keys(x)
            out["F"] = [len(keys), ask(keys)]
            on_candidate()

    algorithm = NSGA2(
        pop_size=settings.population,
        sampling=np.array([_mask(keys, num_calls) for keys in _seeds(num_calls, budgets)]),
        crossover=UniformCrossover(),
        mutation=_MoveKeys(),
        repair=_ToBudget(budgets),
    )
    generations = ("n_gen", settings.generations)
    minimize(KeyCallProblem(), algorithm, generations, seed=settings.seed)
    of_budget = {b: [keys for keys in known if len(keys) == b] for b in budgets}
    return {b: min(found, key=lambda keys: known[keys]) for b, found in of_budget.items()}


def _seeds(num_calls: int, budgets: Sequence[int]) -> list[KeyCalls]:
    """Where the search starts: evenly spread, dense where noise is strong or weak, the papers'."""
    seeds = []
    for budget in budgets:
        seeds.append(spread_key_calls(budget, num_calls))
        for power in (1.4, 0.7):
            places = (np.arange(budget) / budget) ** power * num_calls
            seeds.append(_resize(sorted({int(place) for place in places}), budget, num_calls))
        if num_calls in PAPER_KEY_CALLS:
            seeds.append(_resize(list(PAPER_KEY_CALLS[num_calls]), budget, num_calls))
    return list(dict.fromkeys(seeds))


def _resize(keys: list[int], budget: int, num_calls: int) -> KeyCalls:
    """As many key calls: the closest to its predecessor goes, the widest segment is halved."""
    keys = [0, *(key for key in keys if key)]
    while len(keys) > budget:
        gaps = [later - earlier for earlier, later in pairwise(keys)]
        del keys[gaps.index(min(gaps)) + 1]
    while len(keys) < budget:
        gaps = [later - earlier for earlier, later in pairwise([*keys, num_calls])]
        widest = gaps.index(max(gaps))
        keys.insert(widest + 1, keys[widest] + gaps[widest] // 2)
    return tuple(keys)


def _mask(keys: KeyCalls, num_calls: int) -> np.ndarray:
    return np.isin(np.arange(num_calls), keys)


def _keys(mask: np.ndarray) -> KeyCalls:
    return tuple(map(int, np.flatnonzero(mask)))


class _MoveKeys(Mutation):
    """Moves one key call, but never the first, by a few calls."""

    def _do(
        self, problem: Any, masks: np.ndarray, *_: Any, random_state: Any = None, **__: Any
    ) -> np.ndarray:
        moved = masks.copy()
        for mask in moved:
            keys = np.flatnonzero(mask)[1:]
            if len(keys):
                key = random_state.choice(keys)
                distance = random_state.integers(-_FURTHEST, _FURTHEST + 1)
                mask[key] = False
                mask[np.clip(key + distance, 1, problem.n_var - 1)] = True
        return moved


class _ToBudget(Repair):
    """Makes a candidate as expensive as the nearest budget."""

    def __init__(self, budgets: Sequence[int]) -> None:
        super().__init__()
        self._budgets = budgets

    def _do(self, problem: Any, masks: np.ndarray, **_: Any) -> np.ndarray:
        repaired = []
        for mask in masks:
            keys = _keys(mask)
            budget = min(self._budgets, key=lambda one: abs(one - len(keys)))
            repaired.append(_mask(_resize(list(keys), budget, problem.n_var), problem.n_var))
        return np.array(repaired)
