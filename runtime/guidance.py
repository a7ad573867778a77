"""Classifier-free guidance."""

from torch import Tensor

from encache.runtime.sampler import Guide


def make_guide(scale: float | None, rescale: float = 0.0) -> Guide:
    """Classifier-free guidance eps_u + s (eps_c - eps_u) over [K, 2, n, C, h, w]; None is off."""

    def guide(predicted: Tensor) -> Tensor:
        if scale is None:
            return predicted[:, 0]
        unconditional, conditional = predicted.unbind(1)
        noise = unconditional + scale * (conditional - unconditional)
        if not rescale:
            return noise
        axes = (2, 3, 4)
        matched = noise * (conditional.std(axes, keepdim=True) / noise.std(axes, keepdim=True))
        return rescale * matched + (1 - rescale) * noise

    return guide
