"""The search finds the key calls that a known error asks for."""

from encache.evaluate.fitting import spread_key_calls
from encache.evaluate.search import Search, search_key_calls

NUM_CALLS = 20


def test_even_key_calls_are_a_stride_where_it_divides():
    assert spread_key_calls(5, 50) == (0, 10, 20, 30, 40)
    assert spread_key_calls(4, 50) == (0, 13, 25, 38)
    assert spread_key_calls(17, 50) == tuple(range(0, 50, 3))
    assert spread_key_calls(20, 20) == tuple(range(20))


def test_it_finds_planted_key_calls():
    """An error that is the distance to planted key calls, for two budgets in one run."""
    planted = {4: (0, 2, 9, 17), 6: (0, 1, 2, 3, 10, 18)}
    asked = []

    def error_of(keys):
        asked.append(keys)
        pairs = zip(keys, planted[len(keys)], strict=True)
        return 100 / len(keys) + sum(abs(ours - theirs) for ours, theirs in pairs)

    found = search_key_calls(NUM_CALLS, (4, 6), error_of, Search(24, 40))
    assert found == planted
    assert len(asked) == len(set(asked))  # each once
    assert all(keys[0] == 0 and len(keys) in planted for keys in asked)


def test_it_is_never_worse_than_its_seeds():
    found = search_key_calls(NUM_CALLS, (5,), lambda keys: keys != (0, 4, 8, 12, 16), Search(8, 1))
    assert found == {5: spread_key_calls(5, NUM_CALLS)}
