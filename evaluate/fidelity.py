"""How near a picture is to another one of the same noise and prompt."""

import numpy as np
from torch import Tensor


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
