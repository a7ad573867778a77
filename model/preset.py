"""How weights want to be sampled, as their own file says it.

Weights that were trained for one plan, such as one encoder run and four decoder calls without
guidance, are of little use under another. Needs no torch.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from encache.errors import CheckpointError
from encache.files import parse_json
from encache.model.spec import CUTS, Cut

#: Key of the JSON text in a safetensors header.
PRESET_KEY = "encache_plan"


@dataclass(frozen=True)
class Preset:
    """What is said of a sampling run; None is not said, and left to others.

    Attributes:
        scheduler: config of a diffusers scheduler, its `_class_name` included.
        steps: num_inference_steps.
        guidance_scale: classifier-free guidance; 1 or less turns it off.
        cut: where the UNet is cut.
        stride: distance of uniform key calls.
        key_calls: explicit key calls instead.
        blend: name of the rule that mixes the key calls' features.
        prior_noise: whether Faster Diffusion's prior noise is injected.
    """

    scheduler: Mapping[str, Any] | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    cut: Cut | None = None
    stride: int | None = None
    key_calls: tuple[int, ...] | None = None
    blend: str | None = None
    prior_noise: bool | None = None

    def over(self, other: "Preset") -> "Preset":
        """What this one says, and where it says nothing what the other does.

        A stride and key calls answer the same question, so either replaces both.
        """
        said = self._said()
        if said.keys() & {"stride", "key_calls"}:
            other = replace(other, stride=None, key_calls=None)
        return replace(other, **said)

    def to_json(self) -> str:
        """What is said, for a header."""
        return json.dumps(self._said(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: object) -> "Preset":
        """Read what `to_json` wrote; the text may be anybody's, and nothing in it is executed.

        Raises:
            CheckpointError: it is anything else; the sentence begins with `where`.
        """
        try:
            return parse_preset(parse_json(text.encode()))
        except ValueError as error:
            raise CheckpointError(
                f"{where} cannot be sampled as its header wants ({PRESET_KEY}: {error}). Fetch the "
                "file again, or write it without that key and choose the options yourself."
            ) from error

    def _said(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


#: Of a model that says nothing.
UNSAID = Preset()


def parse_preset(data: Any) -> Preset:
    """The preset that parsed JSON describes; null is not said.

    Raises:
        ValueError: it describes none.
    """
    if not isinstance(data, dict):
        raise ValueError("it is not an object with names")
    json.dumps(data, allow_nan=False)  # numbers that are none may lie deep in the scheduler
    said = {name: value for name, value in data.items() if value is not None}
    for name, value in said.items():
        if name not in _KINDS:
            raise ValueError(f"{name!r} is unknown, perhaps of a newer encache")
        fits, kind = _KINDS[name]
        if not fits(value):
            raise ValueError(f"{name} must be {kind}, not {str(value)[:60]!r}")
    if {"stride", "key_calls"} <= said.keys():
        raise ValueError("it has both a stride and key_calls")
    if "key_calls" in said:
        said["key_calls"] = tuple(said["key_calls"])
    return Preset(**said)


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("_class_name"), str)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def _are_calls(value: Any) -> bool:
    return isinstance(value, list) and all(_is_whole(call, 0) for call in value)


#: Of each attribute whether a value of JSON fits it, and what would. Which key calls, blends and
#: solvers go together is the plan's business.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "scheduler": (_is_config, "a scheduler's config with its _class_name"),
    "steps": (lambda value: _is_whole(value, 1), "a whole number from 1"),
    "guidance_scale": (_is_number, "a finite number"),
    "cut": (lambda value: value in CUTS, f"one of {', '.join(CUTS)}"),
    "stride": (lambda value: _is_whole(value, 1), "a whole number from 1"),
    "key_calls": (_are_calls, "a list of calls like [0, 2]"),
    "blend": (lambda value: isinstance(value, str), "a blend's name"),
    "prior_noise": (lambda value: isinstance(value, bool), "true or false"),
}
