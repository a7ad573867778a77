"""How a run is sampled, once everybody was asked: the caller, the model, then encache itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from encache.model.preset import Preset
from encache.runtime.blend import DEFAULT_BLEND, Blend

#: Of a model that does not name its own, as in diffusers.
DEFAULT_STEPS = 50


@dataclass(frozen=True)
class Settings:
    """What `make_plan` and the guidance need.

    Attributes:
        steps: num_inference_steps.
        guidance_scale: 1 or less is without guidance.
        stride, key_calls, blend, prior_noise: the caching policy; see `make_plan`.
    """

    steps: int
    guidance_scale: float
    stride: int | None
    key_calls: Sequence[int] | None
    blend: Blend
    prior_noise: bool

    @property
    def rows(self) -> int:
        """Rows of the UNet per picture and call: two with guidance."""
        return 2 if self.guidance_scale > 1 else 1

    @property
    def policy(self) -> dict[str, Any]:
        """As arguments for `EncachePipeline` and `make_plan`."""
        return {
            "stride": self.stride,
            "key_calls": self.key_calls,
            "blend": self.blend,
            "prior_noise": self.prior_noise,
        }


def resolve(wished: Preset, model: Preset, guidance_scale: float) -> Settings:
    """Settle every question by who answers it first: the caller, the model, encache's defaults.

    Args:
        wished: what the caller says.
        model: what the model says.
        guidance_scale: the model's default, which its preset may have named.
    """
    said = wished.over(model)
    steps = DEFAULT_STEPS if said.steps is None else said.steps
    stride = said.stride
    if stride and wished.stride is None:  # made for the model's own steps, and there may be fewer
        stride = min(stride, steps)
    return Settings(
        steps=steps,
        guidance_scale=(guidance_scale if wished.guidance_scale is None else wished.guidance_scale),
        stride=stride,
        key_calls=said.key_calls,
        blend=cast(Blend, said.blend or DEFAULT_BLEND),  # which make_plan checks
        prior_noise=bool(said.prior_noise),
    )
