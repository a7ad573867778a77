"""How a run is sampled, once everybody was asked: the caller, the model, then encache itself."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from encache.model.preset import Preset
from encache.model.spec import DEFAULT_CUT, Cut, rows_per_picture
from encache.runtime.blend import DEFAULT_BLEND, Blend

if TYPE_CHECKING:
    from encache.runtime.plan import Plan

#: Of a model that does not name its own, as in diffusers.
DEFAULT_STEPS = 50


@dataclass(frozen=True)
class Policy:
    """When the network runs, and what stands in for its other calls.

    Attributes:
        stride: distance of uniform key calls; 1 samples without a cache, None is the default
            distance, or all calls if there are fewer.
        key_calls: explicit key calls instead of a stride.
        blend: see `encache.runtime.blend`.
        prior_noise: inject z as Faster Diffusion does.
        cut: what is cached: features at a cut, or at "none" the output.
        plan: that was fitted to the model; then nothing else here but the cut counts.
    """

    stride: int | None = None
    key_calls: tuple[int, ...] | None = None
    blend: Blend = DEFAULT_BLEND
    prior_noise: bool = False
    cut: Cut = DEFAULT_CUT
    plan: "Plan | None" = None

    @property
    def arguments(self) -> dict[str, Any]:
        """As arguments for `EncachePipeline`, whose engines decide the cut."""
        if self.plan:
            return {"plan": self.plan}
        return {name: value for name, value in vars(self).items() if name not in ("cut", "plan")}


#: Samples without a cache.
FULL = Policy(stride=1, blend="reuse")


@dataclass(frozen=True)
class Settings:
    """What `make_plan` and the guidance need.

    Attributes:
        steps: num_inference_steps.
        guidance_scale: 1 or less is without guidance.
        policy: how it is cached.
    """

    steps: int
    guidance_scale: float
    policy: Policy

    @property
    def arguments(self) -> dict[str, Any]:
        """As arguments for `EncachePipeline`."""
        return {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            **self.policy.arguments,
        }

    @property
    def rows(self) -> int:
        """Rows of the UNet per picture and call: two with guidance."""
        return rows_per_picture(self.guidance_scale)


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
        policy=Policy(
            stride=stride,
            key_calls=said.key_calls,
            blend=cast(Blend, said.blend or DEFAULT_BLEND),  # which make_plan checks
            prior_noise=bool(said.prior_noise),
            cut=cast(Cut, said.cut or DEFAULT_CUT),
        ),
    )
