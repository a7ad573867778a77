"""How two sets of pictures compare, on their features; and how sure a mean over pictures is."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from encache.errors import EncacheError

Array = np.ndarray | Tensor

#: Rows of a distance matrix held at once: 123 MB against 30,000 pictures.
BLOCK_ROWS = 512
#: Random indices held at once by the bootstrap, 32 MB.
BLOCK_INDICES = 4_000_000


def frechet_distance(features: Array, reference: Array) -> float:
    """Squared Frechet distance of the Gaussians with the moments of two sets.

    d^2 = ||mu_f - mu_r||^2 + tr(S_f + S_r - 2 (S_f S_r)^(1/2)), with unbiased covariances S
    (Heusel et al., arXiv 1706.08500). Only with Inception's features is it FID.

    With S_f = F^T F and S_r = R^T R, the eigenvalues of S_f S_r are the squared singular values
    of F R^T, so the last trace is their sum. No root of a matrix is taken: nothing turns complex,
    and fewer samples than dimensions make the matrix smaller instead of singular.

    Args:
        features: [N, D].
        reference: [M, D].

    Raises:
        EncacheError: a set has fewer than two samples, or the widths differ.
    """
    ours, theirs = _pair(features, reference, at_least=2)
    shift = (ours.mean(0) - theirs.mean(0)).square().sum()
    first, second = _covariance_root(ours), _covariance_root(theirs)
    traces = first.square().sum() + second.square().sum()
    mixed = torch.linalg.svdvals(first @ second.T).sum()
    return max(0.0, float(shift + traces - 2 * mixed))


def _covariance_root(samples: Tensor) -> Tensor:
    """F [min(N, D), D] with F^T F the unbiased covariance of samples [N, D]."""
    centred = (samples - samples.mean(0)) / (len(samples) - 1) ** 0.5
    tall = centred.shape[0] > centred.shape[1]
    return torch.linalg.qr(centred, mode="r").R if tall else centred


def precision_recall(features: Array, reference: Array, neighbours: int = 3) -> tuple[float, float]:
    """Share of our pictures within the real manifold, and of real pictures within ours.

    A set's manifold is the union of balls around its samples that reach their k-th nearest
    neighbour in the set (Kynkaanniemi et al., arXiv 1904.06991, equations 1 and 2).

    Args:
        features: [N, D].
        reference: [M, D].
        neighbours: k.

    Raises:
        EncacheError: a set has no k-th neighbour, or the widths differ.
    """
    ours, theirs = _pair(features, reference, at_least=neighbours + 1)
    precision = _share_within(theirs, _radii(theirs, neighbours), ours)
    recall = _share_within(ours, _radii(ours, neighbours), theirs)
    return precision, recall


def _radii(samples: Tensor, neighbours: int) -> Tensor:
    """Distance [N] of each sample to its k-th nearest neighbour; itself is the zeroth."""
    blocks = samples.split(BLOCK_ROWS)
    return torch.cat([torch.cdist(one, samples).kthvalue(neighbours + 1).values for one in blocks])


def _share_within(centres: Tensor, radii: Tensor, samples: Tensor) -> float:
    """Share of the samples that lie in at least one ball."""
    blocks = samples.split(BLOCK_ROWS)
    within = [(torch.cdist(one, centres) <= radii).any(1) for one in blocks]
    return float(torch.cat(within).double().mean())


def inception_score(probabilities: Array, splits: int = 10) -> tuple[float, float]:
    """exp(E_x KL(p(y|x) || p(y))), its mean and standard deviation over consecutive splits.

    Source: Salimans et al., arXiv 1606.03498, section 4. It lies between 1 and the number of
    classes.

    Args:
        probabilities: [N, classes], rows that sum to 1.
        splits: parts of nearly equal size that each give one score.

    Raises:
        EncacheError: there are fewer pictures than splits.
    """
    rows = torch.as_tensor(probabilities, dtype=torch.float64)
    if not 1 <= splits <= len(rows):
        raise EncacheError(
            f"An Inception score over {splits} splits needs as many pictures, got {len(rows)}. "
            "Draw more pictures."
        )
    scores = torch.stack([_one_score(part) for part in rows.tensor_split(splits)])
    return float(scores.mean()), float(scores.std(correction=0))


def _one_score(rows: Tensor) -> Tensor:
    marginal = rows.mean(0)
    divergence = torch.xlogy(rows, rows) - torch.xlogy(rows, marginal)
    return divergence.sum(1).mean().exp()


def retrieval_accuracy(
    features: Array,
    names: Sequence[str],
    reference: Array,
    reference_names: Sequence[str],
    nearest: int = 5,
) -> np.ndarray:
    """Which pictures have a real picture of their own name among the nearest real ones.

    Nearness is the cosine of the features. A name that no real picture has is never hit.

    Args:
        features: [N, D].
        names: N prompted names.
        reference: [M, D].
        reference_names: M names, which may repeat.
        nearest: how many real pictures are looked at.

    Returns:
        Hits [N], bool.

    Raises:
        EncacheError: names and pictures do not count the same, or the widths differ.
    """
    ours, theirs = (torch.nn.functional.normalize(one) for one in _pair(features, reference))
    if (len(names), len(reference_names)) != (len(ours), len(theirs)):
        raise EncacheError(
            f"{len(names)} and {len(reference_names)} names do not fit {len(ours)} and "
            f"{len(theirs)} pictures. Give one name per picture."
        )
    nearest = min(nearest, len(theirs))
    found = torch.cat([(one @ theirs.T).topk(nearest).indices for one in ours.split(BLOCK_ROWS)])
    hits = np.asarray(reference_names)[found.numpy()] == np.asarray(names)[:, None]
    return np.asarray(hits.any(axis=1))


def bootstrap_interval(
    values: Array,
    groups: Sequence[object] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, section 13.3.

    Args:
        values: [N].
        groups: N labels. Values of one group, such as pictures of one prompt, depend on each
            other, so whole groups are drawn; by default, and within a single group, values are.
        level: share of resampled means within the interval.
        resamples: how often as many groups as there are are drawn with replacement.
        seed: of the draws.

    Raises:
        EncacheError: there are no values.
    """
    ones = np.ones(len(values))  # a mean is a ratio of sums
    _, low, high = bootstrap_ratio(values, ones, groups, level, resamples, seed)
    return low, high


def bootstrap_ratio(
    numerator: Array,
    denominator: Array,
    groups: Sequence[object] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Ratio of two means over the same pictures, and its percentile bootstrap interval.

    Both means are resampled with the same indices, so what the pictures share cancels.

    Args:
        numerator, denominator: [N], entry i of both from picture i.
        groups, level, resamples, seed: see `bootstrap_interval`.

    Returns:
        (ratio, low, high).

    Raises:
        EncacheError: there are no values, or their numbers differ.
    """
    above, below = (np.asarray(one, dtype=np.float64) for one in (numerator, denominator))
    if above.shape != below.shape:
        raise EncacheError(
            f"A paired ratio needs equally many values, got {above.shape} and {below.shape}. "
            "Measure both on the same pictures."
        )
    tops, bottoms = above, below  # of what is drawn: values, or sums over groups
    if groups is not None and len(set(groups)) > 1:
        _, group = np.unique(np.asarray(groups), return_inverse=True)
        tops, bottoms = (np.bincount(group, one).astype(np.float64) for one in (above, below))
    drawn = [tops[one].sum(1) / bottoms[one].sum(1) for one in _draws(len(tops), resamples, seed)]
    return float(above.mean() / below.mean()), *_percentiles(np.concatenate(drawn), level)


def _draws(num_values: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Indices [rows, N] drawn with replacement, `resamples` rows in all."""
    if not num_values:
        raise EncacheError("A bootstrap needs at least one value; draw some pictures first.")
    generator = np.random.default_rng(seed)
    rows = max(1, BLOCK_INDICES // num_values)
    for start in range(0, resamples, rows):
        yield generator.integers(num_values, size=(min(rows, resamples - start), num_values))


def _percentiles(statistics: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(statistics, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _pair(features: Array, reference: Array, at_least: int = 1) -> tuple[Tensor, Tensor]:
    """Both sets in float64, or EncacheError when they are too small or of different widths."""
    ours, theirs = (torch.as_tensor(one, dtype=torch.float64) for one in (features, reference))
    if ours.ndim != 2 or theirs.ndim != 2 or ours.shape[1] != theirs.shape[1]:
        raise EncacheError(
            f"Features {tuple(ours.shape)} and {tuple(theirs.shape)} are not two sets of equal "
            "width. Extract both with the same extractor."
        )
    if min(len(ours), len(theirs)) < at_least:
        raise EncacheError(
            f"Sets of {len(ours)} and {len(theirs)} pictures are too small; at least {at_least} "
            "are needed on both sides. Draw more pictures, or give more real ones."
        )
    return ours, theirs
