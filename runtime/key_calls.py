"""Where the network runs: at a uniform distance, at listed calls, or as published."""

from collections.abc import Sequence
from itertools import pairwise

from encache.errors import PlanError

#: The key calls of Faster Diffusion (arXiv 2312.09608, section 4) by number of calls.
PAPER_KEY_CALLS: dict[int, tuple[int, ...]] = {
    50: (0, 1, 2, 3, 5, 10, 15, 25, 35),
    20: (0, 1, 2, 3, 5, 10, 15),
}
#: Published key calls by name, then by number of calls: the paper's, and those that its authors'
#: code has for the two stages of DeepFloyd-IF.
NAMED_KEY_CALLS: dict[str, dict[int, tuple[int, ...]]] = {
    "paper": PAPER_KEY_CALLS,
    "if-1": {100: (*range(10), *range(10, 86, 5), *range(86, 100))},
    "if-2": {50: (*range(20), *range(20, 41, 2), *range(41, 50))},
}


def uniform_key_calls(stride: int, num_calls: int) -> tuple[int, ...]:
    """Every `stride`-th call: (0, stride, 2 stride, ...)."""
    if not 1 <= stride <= num_calls:
        raise PlanError(
            f"The stride must be between 1 (the full sampler) and the {num_calls} calls, "
            f"not {stride}."
        )
    return tuple(range(0, num_calls, stride))


def strides_within(strides: Sequence[int], num_calls: int) -> tuple[int, ...]:
    """Those of some default strides that so many calls allow, or the longest one if none."""
    return tuple(stride for stride in strides if stride <= num_calls) or (num_calls,)


def paper_key_calls(num_calls: int) -> tuple[int, ...]:
    """The key calls that Faster Diffusion publishes for this number of calls."""
    return named_key_calls("paper", num_calls)


def named_key_calls(name: str, num_calls: int) -> tuple[int, ...]:
    """The key calls that are published under a name for this number of calls."""
    if name not in NAMED_KEY_CALLS:
        raise PlanError(
            f"There are no key calls {name!r}. Choose one of {', '.join(NAMED_KEY_CALLS)}."
        )
    lists = NAMED_KEY_CALLS[name]
    if num_calls not in lists:
        known = " and ".join(map(str, lists))
        source = "The paper" if name == "paper" else f"{name!r}"
        raise PlanError(
            f"{source} gives key calls for {known} calls, not for {num_calls}. Use a stride, or "
            "list the key calls."
        )
    return lists[num_calls]


def listed_key_calls(asked: Sequence[int] | str, num_calls: int) -> tuple[int, ...]:
    """The key calls themselves, or what is published under a name for this number of calls."""
    return named_key_calls(asked, num_calls) if isinstance(asked, str) else tuple(asked)


def check_key_calls(key_calls: Sequence[int], num_calls: int) -> tuple[int, ...]:
    """Return the key calls, or raise PlanError unless they rise from 0 within the calls."""
    calls = tuple(key_calls)
    if not calls or calls[0] != 0:
        raise PlanError(f"Key calls must start at 0: there is nothing to reuse yet, got {calls}.")
    if any(later <= earlier for earlier, later in pairwise(calls)):
        raise PlanError(f"Key calls must rise without repeats, got {calls}.")
    if calls[-1] >= num_calls:
        raise PlanError(f"Key call {calls[-1]} is beyond the last of {num_calls} calls.")
    return calls
