"""The findings in plain words, computed from the rows."""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import takewhile

from encache.evaluate.results import Interval, Match, Outcome, Row, match

#: How many settings are named before the rest is only counted.
MOST_NAMES = 3


def headline(rows: Sequence[Row]) -> str:
    """One paragraph: which settings beat the plain sampler at equal arithmetic, which do not."""
    rows = _with_short_names(rows)
    cached = [row for row in rows if not row.plain]
    judged = [row for row in cached if row.error is not None and not row.diverged]
    matches = [found for row in judged if (found := match(row, rows))]
    matched = [found.row for found in matches]
    outcomes: dict[Outcome, list[Match]] = {"closer": [], "further": [], "alike": []}
    for found in sorted(matches, key=lambda found: found.ratio.mean):
        outcomes[found.outcome].append(found)
    sentences = (
        _setup(rows, cached),
        _closer(outcomes["closer"], len(matches)),
        _further(outcomes["further"]),
        _alike(outcomes["alike"]),
        _alone([row for row in judged if row not in matched], {row.name for row in rows}),
        _diverged([row for row in rows if row.diverged]),
    )
    return " ".join(filter(None, sentences))


def significant(value: float, digits: int = 2) -> str:
    """The number with so many significant digits, as a power of ten only if it is tiny."""
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    if places > digits + 3:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-")
    return f"{value:,.{max(places, 0)}f}"


def with_interval(interval: Interval) -> str:
    """The mean, and the interval in brackets."""
    mean, low, high = map(significant, (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def _with_short_names(rows: Sequence[Row]) -> list[Row]:
    """The rows, the cached ones without the words with which all their names begin."""
    words = [row.name.split(", ") for row in rows if not row.plain]
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))
    # At least one word must stay of each.
    shared = min((len(list(columns)), *(len(name) - 1 for name in words)))
    return [
        row if row.plain else replace(row, name=", ".join(row.name.split(", ")[shared:]))
        for row in rows
    ]


def _setup(rows: Sequence[Row], cached: Sequence[Row]) -> str:
    if not cached:
        return "No cached setting was measured, so there is nothing to compare."
    counts = sorted({row.num_images for row in cached})
    images = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    fulls = [row for row in rows if row.full]
    reference = "the full sampler"
    if len(fulls) == 1 and not fulls[0].diverged:
        reference += (
            f" ({fulls[0].name}: {significant(fulls[0].gflop, 3)} GFLOP and "
            f"{significant(fulls[0].seconds, 3)} s an image)"
        )
    settings = "1 cached setting was" if len(cached) == 1 else f"{len(cached)} cached settings were"
    return (
        f"{settings} compared with {reference} by the relative squared error of the latents, on "
        f"{images} pictures at equal seeds."
    )


def _closer(matches: Sequence[Match], num_matches: int) -> str:
    if not num_matches:
        return ""
    if not matches:
        return "None stays closer to it than the plain sampler at equal arithmetic does."
    verb = "stays" if len(matches) == 1 else "stay"
    return (
        f"{len(matches)} of {num_matches} {verb} closer to it than the plain sampler at equal "
        f"arithmetic does: {_names(matches)}. {_example(matches[0], len(matches))}"
    )


def _further(matches: Sequence[Match]) -> str:
    if not matches:
        return ""
    verb = "does" if len(matches) == 1 else "do"
    return (
        f"{len(matches)} {verb} worse than the plain sampler: {_names(matches[::-1])}. "
        f"{_example(matches[-1], len(matches))}"
    )


def _alike(matches: Sequence[Match]) -> str:
    if not matches:
        return ""
    return f"Not to be told apart from the plain sampler: {_names(matches)}."


def _alone(rows: Sequence[Row], measured: Collection[str]) -> str:
    without = [row for row in rows if row.opponent not in measured]
    others = [row for row in rows if row.opponent in measured]
    sentences = []
    if without:
        sentences.append(
            f"No plain sampler at equal arithmetic was measured beside {_listed(without)}."
        )
    if others:
        sentences.append(
            "The plain sampler at equal arithmetic diverged, or is the reference itself, beside "
            f"{_listed(others)}."
        )
    return " ".join(sentences)


def _diverged(rows: Sequence[Row]) -> str:
    return f"{_listed(rows)} diverged." if rows else ""


def _example(found: Match, num_matches: int) -> str:
    row, opponent = found.row, found.opponent
    assert row.error  # or there would be no ratio
    assert opponent.error
    return (
        f"{'Most clearly, at' if num_matches > 1 else 'At'} {row.share:.2f} of the arithmetic, "
        f"“{row.name}” has an error of {with_interval(row.error)} in "
        f"{significant(row.seconds, 3)} s; the plain sampler with as many steps as that buys "
        f"({opponent.steps}, at {opponent.share:.2f}) has {with_interval(opponent.error)} "
        f"in {significant(opponent.seconds, 3)} s."
    )


def _names(matches: Sequence[Match]) -> str:
    return _listed([found.row for found in matches])


def _listed(rows: Sequence[Row]) -> str:
    """The names in quotes, the last ones counted: "a", "b" and "c", or "a", "b" and 3 more."""
    names = [f"“{row.name}”" for row in rows[:MOST_NAMES]]
    if len(rows) > MOST_NAMES:
        names.append(f"{len(rows) - MOST_NAMES} more")
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
