"""Caching for any diffusers pipeline: it keeps its loop, its scheduler and all that it can do."""

import json
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from encache.errors import EncacheError, PlanError
from encache.model.backbone import backbone_of
from encache.model.family import HOSTED
from encache.model.spec import DEFAULT_CUT
from encache.runtime.blend import BLENDS, DEFAULT_BLEND, Blend
from encache.runtime.engines import Engines, TorchEngines
from encache.runtime.folder import open_folder
from encache.runtime.generation import Cache
from encache.runtime.key_calls import NAMED_KEY_CALLS, check_key_calls
from encache.runtime.settings import Policy
from encache.runtime.standins import CachedControlNet, CachedDenoiser, NoisyScheduler, StandIn

#: Names of a pipeline's parts that may be its denoiser.
_DENOISERS = ("unet", "transformer")
#: Names of all parts that may have a stand-in.
_PARTS = (*_DENOISERS, "controlnet", "scheduler")
#: Pipelines that let their denoiser attend across frames while they run.
_ACROSS_FRAMES = [one.pipeline for one in HOSTED.values() if one.across_frames]


def enable(
    pipe: Any,
    stride: int | None = None,
    *,
    engines: str | Path | None = None,
    cut: str | int | None = None,
    key_calls: Sequence[int] | str | None = None,
    blend: Blend = DEFAULT_BLEND,
    prior_noise: bool = False,
    max_decode_batch: int | None = None,
) -> None:
    """Let a diffusers pipeline run its denoiser, or its encoder, at key calls alone.

    The pipeline's own denoiser is not touched; a stand-in takes its place on this pipeline. Its
    scheduler may be any, a stochastic one too. Enabling again replaces the settings. Parts that
    are changed in place later (weights, LoRA, FreeU) are followed; for a new denoiser or ControlNet
    enable again.

    Args:
        pipe: a diffusers pipeline with a `unet` or `transformer` that encache knows.
        stride: every so many calls, from the first that is made, is a key call; 1 runs everything,
            and None is 3.
        engines: an engine folder of the same model (`encache-export`), which runs the denoiser in
            place of PyTorch. What is changed in PyTorch later does not reach it.
        cut: where the denoiser is cut: "none" caches its output, "mid", "up0", "up1", "up2" a
            UNet's features, the number of a block a transformer's. None is the engines' own, and
            "none" without engines.
        key_calls: explicit key calls in place of a stride, as numbers of the scheduler's calls, or
            the name of a published list: "paper", "if-1" or "if-2". Image-to-image begins at a
            later call, which is a key call then.
        blend: "reuse" or "extrapolate".
        prior_noise: inject noise as Faster Diffusion does; see `NoisyScheduler`.
        max_decode_batch: most rows (pictures, times two with guidance) of one decoder run, which
            bounds memory.

    Raises:
        EncacheError: it is no such pipeline, or cannot do what is asked.
    """
    asked = None if cut is None else str(cut)
    policy, name = _policy(stride, asked or DEFAULT_CUT, key_calls, blend, prior_noise)
    part = _denoiser_of(pipe)
    denoiser, controlnet = (_original(getattr(pipe, one, None)) for one in (part, "controlnet"))
    backbone = backbone_of(denoiser)
    if controlnet is not None:
        _refuse_control_of_another_model(controlnet, denoiser)
    open_engines = _opener(
        denoiser,
        asked,
        engines,
        controlled=controlnet is not None,
        across_frames=any(one.__name__ in _ACROSS_FRAMES for one in type(pipe).__mro__),
    )
    # Opening refuses now, not in the middle of a picture.
    policy = replace(policy, cut=open_engines().cut)
    disable(pipe)
    cache = _follow(pipe, open_engines, policy, name, max_decode_batch)
    _put(pipe, part, CachedDenoiser(denoiser, backbone, cache))
    if controlnet is not None:
        _put(pipe, "controlnet", CachedControlNet(controlnet, cache))


def disable(pipe: Any) -> None:
    """Give a pipeline its own parts back; one that was never enabled is left as it is."""
    for name in _PARTS:
        part = vars(pipe).get(name)
        if (original := _original(part)) is not part:
            _put(pipe, name, original)


def _policy(
    stride: int | None,
    cut: str,
    key_calls: Sequence[int] | str | None,
    blend: Blend,
    prior_noise: bool,
) -> tuple[Policy, str | None]:
    """What was asked for, and the name of a published list of key calls."""
    if blend not in BLENDS or blend.startswith("interpolate"):
        raise PlanError(
            f"A pipeline that keeps its own loop takes the blends reuse and extrapolate, not "
            f"{blend!r}: to look ahead needs the solver as a table, which EncachePipeline has."
        )
    if stride is not None and key_calls is not None:
        raise PlanError("Give a stride or key calls, not both.")
    if stride is not None and stride < 1:
        raise PlanError(f"The stride must be 1 (every call is a key call) or more, not {stride}.")
    if isinstance(key_calls, str):
        if key_calls not in NAMED_KEY_CALLS:
            raise PlanError(
                f"There are no key calls {key_calls!r}. Choose one of "
                f"{', '.join(NAMED_KEY_CALLS)}, or list them."
            )
        return Policy(None, None, blend, prior_noise, cut), key_calls
    if key_calls is not None:  # how many calls there are shows when a generation begins
        key_calls = check_key_calls(tuple(key_calls), sys.maxsize)
    return Policy(stride, key_calls, blend, prior_noise, cut), None


def _opener(
    denoiser: Any, cut: str | None, folder: str | Path | None, **adding: bool
) -> Callable[[], Engines]:
    """What makes the engines of a generation: PyTorch's anew, as the denoiser may have changed."""
    if folder is None:
        return lambda: TorchEngines(denoiser, cut or DEFAULT_CUT)
    engines = open_folder(Path(folder), denoiser, cut, **adding)
    return lambda: engines


def _follow(
    pipe: Any,
    open_engines: Callable[[], Engines],
    policy: Policy,
    key_calls: str | None,
    max_decode_batch: int | None,
) -> Cache:
    """The cache of a pipeline, which holds its cache in turn and so is only looked at from here."""
    reference = weakref.ref(pipe)

    def owner() -> Any:
        if (alive := reference()) is None:
            raise EncacheError(
                "The pipeline that this denoiser was enabled for is gone. Enable the pipeline "
                "that now has it: encache.enable(pipe)."
            )
        return alive

    return Cache(
        pipe=owner,
        open_engines=open_engines,
        policy=policy,
        key_calls=key_calls,
        max_decode_batch=max_decode_batch,
        begin=lambda: _begin_prior_noise(owner()) if policy.prior_noise else None,
    )


def _denoiser_of(pipe: Any) -> str:
    """The name of a pipeline's denoiser."""
    names = [name for name in _DENOISERS if vars(pipe).get(name) is not None]
    if len(names) != 1 or vars(pipe).get("scheduler") is None:
        raise EncacheError(
            f"A {type(pipe).__name__} cannot be enabled: encache.enable takes a diffusers pipeline "
            "with a scheduler and one denoiser, its unet or its transformer."
        )
    return names[0]


def _original(part: Any) -> Any:
    """What a stand-in stands for, or the part itself."""
    while issubclass(type(part), StandIn):
        part = part._original
    return part


def _put(pipe: Any, name: str, part: Any) -> None:
    # Setting an attribute of a pipeline would also change its config.
    vars(pipe)[name] = part


def _begin_prior_noise(pipe: Any) -> None:
    """Let the pipeline's scheduler, whichever it has now, step as the first time."""
    scheduler = vars(pipe)["scheduler"]
    if not issubclass(type(scheduler), NoisyScheduler):
        scheduler = NoisyScheduler(scheduler)
        _put(pipe, "scheduler", scheduler)
    scheduler.begin()


def _refuse_control_of_another_model(controlnet: Any, denoiser: Any) -> None:
    for one in getattr(controlnet, "nets", [controlnet]):
        for name in ("block_out_channels", "cross_attention_dim"):
            ours, theirs = (each.config.get(name) for each in (denoiser, one))
            if json.dumps(ours) != json.dumps(theirs):  # where lists and tuples are equal
                raise EncacheError(
                    f"The ControlNet belongs to another model: its {name} is {theirs}, the "
                    f"{type(denoiser).__name__}'s is {ours}."
                )
