"""A diffusers pipeline that keeps its own loop, opened for a command: caching goes on inside it."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encache import __version__
from encache.contract.dtypes import default_dtype, torch_dtype
from encache.contract.library import TENSORRT_BACKENDS
from encache.contract.target import exactly, make_target, rows_of
from encache.errors import EncacheError
from encache.export.build import Report, Request, build_engines, find_covering_engines
from encache.export.options import SizeOptions
from encache.model.checkpoint import Checkpoint
from encache.model.controlnet import fingerprint_of, load_controlnet
from encache.model.loading import load_pipeline
from encache.model.spec import Cut
from encache.runtime.enable import disable, enable
from encache.runtime.inputs import Inputs
from encache.runtime.key_calls import check_key_calls, listed_key_calls
from encache.runtime.options import SamplingOptions
from encache.runtime.schedulers import full_config, make_scheduler
from encache.runtime.settings import Settings, resolve
from encache.runtime.solver import count_calls


@dataclass(frozen=True)
class Wish:
    """One picture or clip.

    Attributes:
        seed: of its noise.
        prompt: what to draw, or None where that is a class.
        label: number of the class, or None.
    """

    seed: int
    prompt: str | None = None
    label: int | None = None

    @property
    def words(self) -> str:
        """For file names and progress bars."""
        return self.prompt if self.prompt is not None else f"class {self.label}"


class Host:
    """Such a pipeline, with all that decides what it draws.

    Args:
        checkpoint: of the pipeline.
        source: the same as its own folder has it, which may be a text-to-image model.
        inputs: what it is given beside texts.
        sampling: how; what is not said is the pipeline's own.
        size: of what is drawn, where that is free.
        negative_prompt: what to avoid.
        cut: where its denoiser is cut.
        backend, dtype: of the engines, or "torch".
        controlnets: folders, in the order of their pictures.
        max_decode_batch: most rows in one run of the decoder.

    Raises:
        EncacheError: it cannot be opened, or an option means nothing to it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        source: Checkpoint,
        inputs: Inputs,
        sampling: SamplingOptions,
        size: SizeOptions,
        *,
        negative_prompt: str | None,
        cut: Cut,
        backend: str,
        dtype: str | None,
        controlnets: Sequence[Path],
        max_decode_batch: int | None,
    ) -> None:
        self.checkpoint = checkpoint
        self._source = source
        self.backend = backend
        self.dtype = dtype or default_dtype(backend)
        self.inputs = inputs
        self.pipe = _open(checkpoint, controlnets)
        self._max_decode_batch = max_decode_batch
        self._controls = [fingerprint_of(folder) for folder in controlnets]
        if sampling.scheduler:
            self.pipe.scheduler = make_scheduler(sampling.scheduler, self.pipe.scheduler)
        own = inspect.signature(type(self.pipe).__call__).parameters
        self.settings = _settle(checkpoint, sampling, cut, own)
        self.key_calls = _listed(sampling, self.pipe.scheduler, self.settings.steps)
        self.arguments = {
            **inputs.arguments,
            **_said(checkpoint, own, size, negative_prompt),
            **_sides(inputs, checkpoint, own),
            **(_motion(self.settings.steps) if checkpoint.family.across_frames else {}),
            "num_inference_steps": self.settings.steps,
            "guidance_scale": self.settings.guidance_scale,
        }
        self._defaults = {name: own[name].default for name in ("height", "width") if name in own}
        self.enable()  # refuses what cannot be honoured before engines are built
        disable(self.pipe)

    @property
    def frames(self) -> int:
        """Of a clip; 0 where pictures are drawn."""
        argument = self.checkpoint.family.inputs.get("num_frames", "")
        return self.arguments.get(argument) or self.checkpoint.family.frames

    def enable(self, engines: Path | None = None) -> None:
        """Cache inside the pipeline, in PyTorch or on the engines of a folder."""
        policy = self.settings.policy
        enable(
            self.pipe,
            None if self.key_calls else policy.stride,
            engines=engines,
            cut=policy.cut,
            key_calls=self.key_calls,
            blend=policy.blend,
            prior_noise=policy.prior_noise,
            max_decode_batch=self._max_decode_batch,
        )

    def disable(self) -> None:
        """Let the pipeline draw in full."""
        disable(self.pipe)

    def build(self, engine_dir: Path, report: Report) -> Path:
        """The folder of its engines, which are built when they are missing."""
        family, target = self.checkpoint.family, None
        special = family.controlled or family.across_frames
        # Engines of the text-to-image model serve its other pipelines, too.
        checkpoint = self.checkpoint if special else self._source
        if self.backend in TENSORRT_BACKENDS:
            height, width = self.inputs.size or (None, None)
            rows = rows_of(checkpoint)
            target = make_target(
                checkpoint,
                self.backend,
                self.settings.policy.cut,
                rows=(rows[0] if self.settings.guidance_scale > 1 else 1, rows[1]),
                height=exactly(self.arguments.get("height") or height),
                width=exactly(self.arguments.get("width") or width),
            )
        request = Request(
            checkpoint,
            self.settings.policy.cut,
            self.dtype,
            self.backend,
            target,
            frames=self.frames if family.clips else 0,
        )
        found = find_covering_engines(request, engine_dir)
        if found is None:
            report(f"Building {request.folder_name} in {engine_dir}, once.")
        return found or build_engines(request, engine_dir, report)

    def describe(self, wish: Wish) -> dict[str, Any]:
        """Its metadata: what decides it."""
        said = {k: v for k, v in self.arguments.items() if isinstance(v, str | int | float)}
        policy = self.settings.policy
        return {
            **asdict(wish),
            **self._defaults,
            **said,
            **policy.arguments,
            "key_calls": self.key_calls,
            "cut": policy.cut,
            "inputs": dict(self.inputs.digests),
            "controlnets": self._controls,
            "max_decode_batch": self._max_decode_batch,
            "scheduler": full_config(self.pipe.scheduler),
            "pipeline": type(self.pipe).__name__,
            "model": self.checkpoint.name,
            "fingerprint": self.checkpoint.fingerprint,
            "backend": self.backend,
            "dtype": self.dtype,
            "encache": __version__,
        }

    def refuse_unknown_classes(self, wishes: Sequence[Wish]) -> None:
        """Raise EncacheError for a class that the model does not have."""
        for wish in wishes:
            most = self.pipe.transformer.config.num_embeds_ada_norm if wish.label else 1
            if wish.label and wish.label >= most:
                raise EncacheError(
                    f"This model draws the classes 0 to {most - 1}, not {wish.label}."
                )

    def draw(self, wish: Wish) -> np.ndarray:
        """The picture, or the frames of a clip, [F, H, W, 3] between 0 and 1."""
        asked: dict[str, Any] = {"class_labels": [wish.label]}
        if wish.prompt is not None:
            asked = {"prompt": wish.prompt}
        self.pipe.set_progress_bar_config(desc=wish.words[:40], disable=None)
        drawn = self.pipe(
            **asked,
            **self.arguments,
            generator=torch.Generator().manual_seed(wish.seed),
            output_type="np",
        )
        pictures = drawn.images if "images" in drawn else drawn.frames
        pictures = np.asarray(pictures)
        return pictures.reshape(-1, *pictures.shape[-3:])


def _open(checkpoint: Checkpoint, controlnets: Sequence[Path]) -> Any:
    """Load the pipeline: on a GPU, if there is one, in half precision."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch_dtype("fp16" if device == "cuda" else "fp32")
    opened = [load_controlnet(folder, dtype) for folder in controlnets]
    parts: dict[str, Any] = {}
    if opened:
        parts["controlnet"] = opened if len(opened) > 1 else opened[0]
    pipe = load_pipeline(checkpoint, dtype, device, **parts)
    if checkpoint.family.text_encoders and not any(
        getattr(pipe, name) for name in checkpoint.family.text_encoders
    ):
        raise EncacheError(
            f"{checkpoint.folder} holds no text encoder, so it reads no prompt: put it there, or "
            "give embeddings in Python (encache.enable)."
        )
    return pipe


def _settle(
    checkpoint: Checkpoint, sampling: SamplingOptions, cut: Cut, own: Mapping[str, Any]
) -> Settings:
    """What the caller says, then the weights, then the pipeline's own defaults."""
    scale = own["guidance_scale"].default
    if checkpoint.guidance_scale != checkpoint.family.guidance_scale:  # it names its own
        scale = checkpoint.guidance_scale
    settings = resolve(sampling.wished(cut), checkpoint.preset, scale)
    if sampling.steps is None and checkpoint.preset.steps is None:
        return replace(settings, steps=own["num_inference_steps"].default)
    return settings


def _listed(sampling: SamplingOptions, scheduler: Any, steps: int) -> tuple[int, ...] | None:
    """The key calls that were listed, if any; or raise PlanError if there are no such calls."""
    calls = count_calls(scheduler, steps)
    if sampling.key_calls is None:
        return None
    return check_key_calls(listed_key_calls(sampling.key_calls, calls), calls)


def _sides(inputs: Inputs, checkpoint: Checkpoint, own: Mapping[str, Any]) -> dict[str, int]:
    """Height and width of the given pictures, where a pipeline would take the model's own."""
    if not (inputs.size and checkpoint.family.codec and "height" in own):
        return {}
    return dict(zip(("height", "width"), inputs.size, strict=True))


def _motion(steps: int) -> dict[str, int]:
    """Between which steps Text2Video-Zero moves its frames: 44 and 47 of 50, as published."""
    if steps < 2:
        raise EncacheError("Text2Video-Zero makes 2 steps or more.")
    last = min(round(steps * 47 / 50), steps - 1)
    return {"t0": min(round(steps * 44 / 50), last - 1), "t1": last}


def _said(
    checkpoint: Checkpoint, own: Mapping[str, Any], size: SizeOptions, negative_prompt: str | None
) -> dict[str, Any]:
    """Sizes and what to avoid, as arguments; or raise EncacheError where they mean nothing."""
    family = checkpoint.family
    reason = ""
    if {"image", "control_image"} & family.inputs.keys():
        reason = "whose size is that of the picture"
    elif not family.codec or family.denoiser == "transformer":
        reason = "which draws at the size that it was trained for"
    for name in ("height", "width") if reason else ():
        if getattr(size, name):
            raise EncacheError(f"--{name} means nothing for {family.title}, {reason}.")
    if negative_prompt is not None and "negative_prompt" not in own:
        raise EncacheError(f"--negative-prompt means nothing for {family.title}.")
    said = {"height": size.height, "width": size.width, "negative_prompt": negative_prompt}
    return {name: value for name, value in said.items() if value is not None}
