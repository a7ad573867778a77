"""Thin objects that take the place of a diffusers pipeline's parts, on that pipeline alone.

Each answers for one thing itself and leaves the rest to what it stands for, which is not touched.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from encache.model.backbone import Backbone
from encache.runtime.generation import Cache
from encache.runtime.solver import PRIOR_NOISE


class StandIn:
    """Is taken for what it stands for: by its class, its attributes, and by what is set on it."""

    def __init__(self, original: Any) -> None:
        self._original = original

    # A pipeline asks of what class its parts are.
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._original)

    def __getattr__(self, name: str) -> Any:
        if name == "_original":  # not yet set, as while somebody makes a copy
            raise AttributeError(name)
        return getattr(self._original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._original, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._original, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._original, memo)


#: Attributes of stand-ins themselves.
_OWN = ("_original", "_cache", "_backbone", "_given", "_noise")


class CachedDenoiser(StandIn):
    """A pipeline's denoiser, which runs as a whole, or its encoder, at key calls alone.

    Args:
        original: the denoiser.
        backbone: describes it.
        cache: what to answer.
    """

    def __init__(self, original: Any, backbone: Backbone, cache: Cache) -> None:
        super().__init__(original)
        self._backbone = backbone
        self._cache = cache

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        latents, timestep, others = _told(self._original, arguments, options)
        as_object = others.pop("return_dict", True)
        if hook := vars(self._original).get("_hf_hook"):
            hook.pre_forward(self._original)  # offloading: it brings the weights to their device
        prediction = self._cache.answer(latents, timestep, self._backbone.read(others))
        return Transformer2DModelOutput(sample=prediction) if as_object else (prediction,)


class CachedControlNet(StandIn):
    """A pipeline's ControlNet, one or several, which runs at key calls alone.

    What it answers at other calls is what it last gave; the denoiser's features hold it already.

    Args:
        original: the ControlNet.
        cache: that of the denoiser, which knows when it runs.
    """

    def __init__(self, original: Any, cache: Cache) -> None:
        super().__init__(original)
        self._cache = cache
        self._given: Any = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        latents, timestep, others = _told(self._original, arguments, options)
        if self._cache.needs_control(timestep, {**others, "shape": tuple(latents.shape)}):
            self._given = self._original(*arguments, **options)
        return self._given


class NoisyScheduler(StandIn):
    """A pipeline's scheduler, which steps from latents with some of a generation's first ones.

    This is prior noise injection as Faster Diffusion's code has it where a segment is decoded in
    one batch, and with a ControlNet: at every call with t < T/2, 0.003 times the latents before
    the first step are added to the latents right before the solver's step. The denoiser and the
    ControlNet of that call have seen the latents without them.
    """

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        self._noise: Tensor | None = None

    def begin(self) -> None:
        """Expect the first step of a generation."""
        self._noise = None

    @property
    def step(self) -> Callable[..., Any]:
        """The scheduler's own step, from other latents."""
        step = self._original.step
        signature = inspect.signature(step)

        @wraps(step)  # pipelines look at its arguments
        def disturbed(*arguments: Any, **options: Any) -> Any:
            bound = signature.bind(*arguments, **options)
            bound.arguments["sample"] = self._disturb(**bound.arguments)
            return step(*bound.args, **bound.kwargs)

        return disturbed

    def _disturb(self, sample: Tensor, timestep: Any, **_: Any) -> Tensor:
        if self._noise is None:
            self._noise = sample.clone()
        # A product instead of a question, for which a GPU would have to wait.
        late = timestep < self._original.config.num_train_timesteps / 2
        return sample + late * PRIOR_NOISE * self._noise


def _told(
    module: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]
) -> tuple[Tensor, Any, dict[str, Any]]:
    """Latents, timestep, and what else a module's forward is given, by name."""
    bound = inspect.signature(module.forward).bind(*arguments, **options).arguments
    first, second, *others = bound
    return bound[first], bound[second], {name: bound[name] for name in others}
