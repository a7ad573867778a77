"""Distances, scores and intervals equal their formulas, other libraries and closed forms."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from encache.errors import EncacheError
from encache.evaluate import distribution
from encache.evaluate.distribution import (
    bootstrap_interval,
    bootstrap_ratio,
    frechet_distance,
    inception_score,
    precision_recall,
    retrieval_accuracy,
)

#: N, M, D: more samples than dimensions, fewer, and one of each.
SIZES = [(200, 150, 12), (20, 15, 40), (200, 15, 40), (15, 200, 40)]


def two_sets(num, num_reference, width):
    """Correlated features with different moments."""
    random = np.random.default_rng(0)
    mix = random.normal(size=(width, width))
    features = random.normal(size=(num, width)) @ mix + 0.5
    return features, random.normal(size=(num_reference, width)) * 1.3


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks, the last one incomplete."""
    monkeypatch.setattr(distribution, "BLOCK_ROWS", 7)
    monkeypatch.setattr(distribution, "BLOCK_INDICES", 700)


@pytest.mark.parametrize("size", SIZES)
def test_frechet_distance_equals_the_formula(size):
    features, reference = two_sets(*size)
    ours, theirs = np.cov(features.T), np.cov(reference.T)
    shift = np.sum((features.mean(0) - reference.mean(0)) ** 2)
    root = scipy.linalg.sqrtm(ours @ theirs).real
    expected = shift + np.trace(ours + theirs - 2 * root)
    # The root of a singular product is itself only good to about the root of float64.
    tolerance = 1e-9 if min(size[:2]) > size[2] else 1e-5
    assert frechet_distance(features, reference) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("size", SIZES)
def test_frechet_distance_equals_torchmetrics(size):
    fid = pytest.importorskip("torchmetrics.image.fid", reason="needs torchmetrics")
    features, reference = (torch.from_numpy(one) for one in two_sets(*size))
    network = torch.nn.Identity()
    network.num_features = size[2]
    metric = fid.FrechetInceptionDistance(network).set_dtype(torch.float64)
    metric.update(features, real=False)
    metric.update(reference, real=True)
    expected = metric.compute().item()
    assert frechet_distance(features, reference) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_gaussians_with_diagonal_covariance():
    # Columns of a Hadamard matrix have mean 0 and no covariance: the moments are exact.
    signs = scipy.linalg.hadamard(16)[:, 1:5] * np.sqrt(15 / 16)
    spread, other, shift = np.array([1, 2, 3, 4]), np.array([2, 2, 1, 0]), np.array([0, 1, 0, -2])
    expected = np.sum(shift**2) + np.sum((spread - other) ** 2)
    found = frechet_distance(signs * spread + shift, signs * other)
    assert found == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_a_set_to_itself_is_zero_and_of_one_picture_refused():
    features, _ = two_sets(20, 2, 40)
    assert frechet_distance(features, features.copy()) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(torch.tensor(features).float(), features) < 1e-9
    with pytest.raises(EncacheError, match="at least 2"):
        frechet_distance(features[:1], features)
    with pytest.raises(EncacheError, match="equal width"):
        frechet_distance(features[:, :3], features)


def naive_precision(features, reference, neighbours):
    """The definition, sample by sample."""
    radii = [np.sort(np.linalg.norm(reference - one, axis=1))[neighbours] for one in reference]
    return np.mean([np.any(np.linalg.norm(reference - one, axis=1) <= radii) for one in features])


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_equal_the_definition(small_blocks, neighbours):
    random = np.random.default_rng(1)
    features, reference = random.normal(size=(50, 3)), 0.5 + 1.5 * random.normal(size=(40, 3))
    precision, recall = precision_recall(features, reference, neighbours)
    assert precision == naive_precision(features, reference, neighbours)
    assert recall == naive_precision(reference, features, neighbours)
    assert 0 < precision < 1
    assert 0 < recall < 1


def test_precision_and_recall_of_a_collapsed_and_of_a_too_wide_set():
    grid = np.stack(np.meshgrid(np.arange(5.0), np.arange(5.0)), axis=-1).reshape(-1, 2)
    middle = np.full((10, 2), 2.0) + 0.01 * np.arange(10)[:, None]
    assert precision_recall(middle, grid) == (1.0, 1 / 25)  # sharp, but one place only
    wide = np.concatenate([grid, grid + 100])
    assert precision_recall(wide, grid) == (0.5, 1.0)
    assert precision_recall(grid + 100, grid) == (0.0, 0.0)
    with pytest.raises(EncacheError, match="at least 4"):
        precision_recall(grid[:3], grid)


def test_inception_score_equals_the_formula():
    random = np.random.default_rng(0)
    rows = random.dirichlet(np.full(7, 0.3), size=53)
    scores = []
    for part in np.array_split(rows, 10):
        marginal = part.mean(0)
        divergences = [np.sum(row * (np.log(row) - np.log(marginal))) for row in part]
        scores.append(np.exp(np.mean(divergences)))
    assert inception_score(rows) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)


def test_inception_score_at_its_extremes():
    assert inception_score(np.full((20, 5), 0.2)) == pytest.approx((1, 0), abs=1e-12)
    one_hot = torch.eye(5).repeat(4, 1)
    assert inception_score(one_hot, splits=4) == pytest.approx((5, 0), abs=1e-12)
    assert inception_score(one_hot[:1].repeat(10, 1), splits=2)[0] == pytest.approx(1)
    with pytest.raises(EncacheError, match="10 splits"):
        inception_score(one_hot[:9])


def test_retrieval_looks_at_the_nearest_directions(small_blocks):
    angles = np.radians([0, 10, 20, 90, 100, 180])
    reference = 3 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    reference_names = ["apple", "apple", "pear", "banana", "pear", "cat"]
    features = np.array([[1.0, 0.0], [0.0, 7.0], [1.0, 0.0], [0.0, 0.1], [1.0, 0.0]])
    names = ["apple", "pear", "pear", "cat", "dog"]

    def hits(nearest):
        return retrieval_accuracy(features, names, reference, reference_names, nearest).tolist()

    assert hits(1) == [True, False, False, False, False]
    assert hits(2) == [True, True, False, False, False]
    assert hits(3) == [True, True, True, False, False]
    assert hits(100) == [True, True, True, True, False]
    with pytest.raises(EncacheError, match="one name per picture"):
        retrieval_accuracy(features, names[:2], reference, reference_names)


def test_retrieval_equals_a_full_sort(small_blocks):
    random = np.random.default_rng(0)
    features, reference = random.normal(size=(40, 6)), random.normal(size=(60, 6))
    names, known = (
        random.integers(15, size=40).astype(str),
        random.integers(15, size=60).astype(str),
    )
    cosine = features @ reference.T / np.linalg.norm(reference, axis=1)
    order = np.argsort(-cosine, axis=1)[:, :5]
    expected = [name in known[row] for name, row in zip(names, order, strict=True)]
    assert retrieval_accuracy(features, names, reference, known).tolist() == expected


def test_interval_equals_scipy(small_blocks):
    values = np.random.default_rng(0).exponential(size=60)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    found = bootstrap_interval(values, resamples=20000)
    assert found == pytest.approx(tuple(expected), abs=0.02 * values.std())


@pytest.mark.parametrize("level", [0.68, 0.95])
def test_interval_of_a_mean_equals_the_normal_one(level):
    values = np.random.default_rng(3).normal(5, 2, size=2000)
    half = scipy.stats.norm.ppf((1 + level) / 2) * values.std() / np.sqrt(len(values))
    low, high = bootstrap_interval(torch.from_numpy(values), level=level, resamples=10000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 20)


def test_intervals_repeat_with_their_seed():
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap_interval(values) == bootstrap_interval(values, seed=0)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    assert bootstrap_interval([4.0]) == (4.0, 4.0)
    with pytest.raises(EncacheError, match="at least one value"):
        bootstrap_interval([])


def test_groups_are_drawn_whole():
    random = np.random.default_rng(0)
    values = random.exponential(size=40)
    # Copies tell nothing new.
    copies = bootstrap_interval(np.repeat(values, 4), np.repeat(np.arange(40), 4))
    assert copies == pytest.approx(bootstrap_interval(values))
    assert np.ptp(copies) > 1.9 * np.ptp(bootstrap_interval(np.repeat(values, 4)))
    # Groups of unequal size, by a loop.
    names = [f"prompt {i % 7 if i < 30 else i}" for i in range(40)]
    parts = [values[np.array(names) == name] for name in sorted(set(names))]
    drawn = [
        np.concatenate([parts[i] for i in random.integers(len(parts), size=len(parts))]).mean()
        for _ in range(20000)
    ]
    found = bootstrap_interval(values, names, resamples=20000)
    assert found == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02 * values.std())
    # One group alone would give an interval without width.
    assert bootstrap_interval(values, ["same"] * 40) == bootstrap_interval(values)


def test_ratio_equals_scipy_and_is_paired(small_blocks):
    random = np.random.default_rng(0)
    below = random.exponential(size=80) + 0.1
    above = 0.7 * below + 0.05 * random.normal(size=80)
    ratio, low, high = bootstrap_ratio(above, below, resamples=10000)
    assert ratio == above.mean() / below.mean()
    expected = scipy.stats.bootstrap(
        (above, below),
        lambda one, other, axis: one.mean(axis) / other.mean(axis),
        paired=True,
        n_resamples=10000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert (low, high) == pytest.approx(tuple(expected), abs=0.03 * (high - low))
    # Proportional values have a ratio without doubt; unpaired draws would give it a wide interval.
    assert bootstrap_ratio(3 * below, below) == pytest.approx((3, 3, 3))
    with pytest.raises(EncacheError, match="equally many"):
        bootstrap_ratio(above[:3], below)
