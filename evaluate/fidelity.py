"""How near a picture is to another one of the same noise and prompt."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize


def relative_error(latents: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """||x - r||^2 / ||r||^2 per picture [n]; inf where the latents diverged."""
    axes = (1, 2, 3)
    error = ((latents - reference) ** 2).sum(axes) / (reference**2).sum(axes)
    return np.where(np.isfinite(error), error, np.inf)


def ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity [n] of pictures in [0, 1] (Wang et al. 2004, 11x11 Gaussian)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(
        pictures, reference, data_range=1.0, reduction="none"
    )
    assert isinstance(value, Tensor)
    return value.reshape(-1)


def psnr(pictures: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB [n] of pictures [n, ...] in [0, 1]; equal ones give 99."""
    error = ((pictures - reference) ** 2).reshape(len(pictures), -1).mean(axis=1)
    with np.errstate(divide="ignore"):
        return np.minimum(-10 * np.log10(error), 99.0)


def perceptual_distance(maps: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """How different two sets of pictures look to a network [n]; 0 for equal ones.

    d = sum_l mean over places of ||a_l / ||a_l|| - b_l / ||b_l||||^2, over layers l. That is LPIPS
    (Zhang et al., arXiv 1801.03924, equation 1) with all its learned weights w_l at 1.

    Args:
        maps: features by layer [n, C_l, h_l, w_l].
        reference: those of the other pictures.
    """
    distances = [
        (normalize(ours) - normalize(theirs)).square().sum(1).mean((1, 2))
        for ours, theirs in zip(maps, reference, strict=True)
    ]
    return torch.stack(distances).sum(0)
