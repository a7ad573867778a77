"""The training side of diffusion: noising, targets, and the weight of each noise level."""

from typing import Literal

from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]


def add_noise(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, with alpha_bar [B]."""
    alpha_bar = alpha_bar.view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise


def target(clean: Tensor, noise: Tensor, alpha_bar: Tensor, prediction: Prediction) -> Tensor:
    """What the UNet should say: eps, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0.

    Args:
        clean, noise: x_0 and eps [B, C, h, w].
        alpha_bar: [B].
        prediction: which of the two is said [B, C, h, w].
    """
    if prediction == "epsilon":
        return noise
    alpha_bar = alpha_bar.view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean


def noise_of(noisy: Tensor, output: Tensor, alpha_bar: Tensor, prediction: Prediction) -> Tensor:
    """The noise that the UNet's output on `noisy` [B, 4, h, w] stands for: itself, or v's."""
    if prediction == "epsilon":
        return output
    a = alpha_bar.view(-1, 1, 1, 1)
    return a.sqrt() * output + (1 - a).sqrt() * noisy


def ddim_step(
    noisy: Tensor, output: Tensor, before: Tensor, after: Tensor, prediction: Prediction
) -> Tensor:
    """One deterministic step from alpha_bar `before` [B] to `after` [B] (DDIM, arXiv 2010.02502).

    Args:
        noisy: x at `before` [B, 4, h, w].
        output: what the UNet says there.
        before, after: alpha_bar on both sides.
        prediction: what `output` is.
    """
    a = before.view(-1, 1, 1, 1)
    noise = noise_of(noisy, output, before, prediction)
    if prediction == "epsilon":
        clean = (noisy - (1 - a).sqrt() * noise) / a.sqrt()
    else:
        clean = a.sqrt() * noisy - (1 - a).sqrt() * output
    return add_noise(clean, noise, after)


def weighted_error(predicted: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Mean over the batch of weight [B] times each row's mean squared difference, in float32."""
    squared = (predicted.float() - wanted.float()).square().mean(dim=(1, 2, 3))
    return (weight * squared).mean()


def min_snr_weight(
    alpha_bar: Tensor, gamma: float | None, prediction: Prediction = "epsilon"
) -> Tensor:
    """Weights [B] of noise levels: min(SNR, gamma) / SNR for eps, / (SNR + 1) for v.

    Hang et al., arXiv 2303.09556; gamma None weighs all levels alike.
    """
    if gamma is None:
        return alpha_bar.new_ones(alpha_bar.shape)
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)
