"""diffusers' habits that a cached pipeline cannot honour: each is refused in one sentence.

What would be ignored would be believed to work.
"""

from collections.abc import Mapping
from typing import Any

import diffusers

from encache.errors import EncacheError
from encache.model.family import FAMILIES

#: Options of from_pretrained, with the value that asks for what is done anyway.
_DONE_ANYWAY: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "image_encoder": None,
    "requires_safety_checker": False,
    "use_safetensors": True,
    "low_cpu_mem_usage": True,
    "device_map": None,
}
#: Arguments of the call that are refused unless they mean nothing, and why.
_REFUSED_ARGUMENTS = {
    "timesteps": "Choose num_inference_steps and the scheduler's timestep_spacing instead.",
    "sigmas": "Choose a scheduler with use_karras_sigmas or the like instead.",
    "eta": "It adds noise at every call, and calls cannot be planned ahead then.",
    "ip_adapter_image": "The cut does not carry picture prompts.",
    "ip_adapter_image_embeds": "The cut does not carry picture prompts.",
    "cross_attention_kwargs": "A LoRA's scale is chosen when it is loaded: FILE:SCALE.",
    "callback": "Use callback_on_step_end.",
}
#: Parts of diffusers' pipelines; set in their constructors, so that the classes do not have them.
_COMPONENTS = {
    *(part for family in FAMILIES.values() for part in (*family.parts, *family.loading)),
    "watermark",
} - {"scheduler"}
_PIPELINES: tuple[Any, ...] = tuple(getattr(diffusers, name) for name in FAMILIES)
_WRAP = "Do it on a diffusers pipeline and wrap that: EncachePipeline.from_pipe(pipeline)."


class UnsupportedAttributeError(EncacheError, AttributeError):
    """A diffusers pipeline has it, a cached one has not."""


class HonestAttributes:
    """Refuses attributes of diffusers' pipelines that would have no effect here."""

    def __getattr__(self, name: str) -> Any:
        if _is_diffusers(name):
            raise UnsupportedAttributeError(f"A cached pipeline has no {name}. {_WRAP}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        ours = name in self.__dict__ or hasattr(type(self), name)
        if name in _COMPONENTS or (not ours and _is_diffusers(name)):
            if name in _DONE_ANYWAY and value is _DONE_ANYWAY[name]:
                return
            raise UnsupportedAttributeError(f"Setting {name} would change nothing here. {_WRAP}")
        super().__setattr__(name, value)


def _is_diffusers(name: str) -> bool:
    return name in _COMPONENTS or any(hasattr(one, name) for one in _PIPELINES)


def refuse_loading_options(options: Mapping[str, Any]) -> None:
    """Raise EncacheError for options of diffusers' from_pretrained that would be ignored."""
    for name, value in options.items():
        if name not in _DONE_ANYWAY or value is not _DONE_ANYWAY[name]:
            raise EncacheError(
                f"{name}={value!r} cannot be honoured when engines are opened. Load a diffusers "
                "pipeline with it and wrap that: EncachePipeline.from_pipe(pipeline)."
            )


def refuse_call_options(**arguments: Any) -> None:
    """Raise EncacheError for arguments of diffusers' call that would be ignored."""
    for name, value in arguments.items():
        means_nothing = value is None or (isinstance(value, dict | float | int) and not value)
        if not means_nothing:
            raise EncacheError(f"{name} cannot be honoured. {_REFUSED_ARGUMENTS[name]}")
