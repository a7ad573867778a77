"""`EncachePipeline`: diffusers' Stable Diffusion call over engines and a plan."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from torch import Tensor

from encache.contract import dtypes
from encache.contract.target import most_rows
from encache.errors import EncacheError
from encache.model.preset import Preset
from encache.model.spec import check_size
from encache.progress import progress
from encache.runtime.blend import Blend
from encache.runtime.codec import decode_pictures, refuse_output_type
from encache.runtime.conditions import (
    Prompt,
    Prompts,
    XLArguments,
    encode_prompts,
    time_ids,
)
from encache.runtime.executor import Executor, Guidance
from encache.runtime.from_pretrained import FromPretrained
from encache.runtime.habits import HonestAttributes, refuse_call_options
from encache.runtime.jobs import draw_noise
from encache.runtime.memory import explaining_want_of_memory, too_many_rows
from encache.runtime.plan import Plan, make_plan
from encache.runtime.settings import Settings, resolve

Callback = Callable[["EncachePipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class EncachePipeline(HonestAttributes, FromPretrained):
    """Stable Diffusion text-to-image with a cached output or cached encoder features.

    Called like diffusers' StableDiffusionPipeline, with the caching policy as further arguments.
    What it cannot honour of diffusers' ways to load, steer and change a pipeline it refuses.
    A pipeline keeps no state between calls except its engines and its scheduler, and on a GPU what
    its `Executor` keeps: there, one thread at a time may call it.
    """

    #: Setting it in a callback stops the run after that call, as in diffusers.
    _interrupt = False
    #: Calls of the latest run, for callbacks.
    num_timesteps = 0
    _progress_bar_config: Mapping[str, Any] = MappingProxyType({})

    @cached_property
    def _executor(self) -> Executor:
        return Executor(self.engines)

    @property
    def tokenizer(self) -> Any:
        """Of the first text encoder."""
        return self.texts.tokenizers[0]

    @property
    def device(self) -> torch.device:
        """Where the engines run."""
        return self.engines.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the engines."""
        return self.engines.dtype

    def to(self, *place: Any, **options: Any) -> "EncachePipeline":
        """The pipeline itself, if it is there already: engines do not move.

        Raises:
            EncacheError: another device or dtype than the engines'.
        """
        here = torch.empty(0, dtype=self.dtype, device=self.device)
        try:
            wanted = here.to(*place, **options)
        except (RuntimeError, AssertionError) as error:  # a device that is not there
            raise EncacheError(str(error).partition("\n")[0]) from error
        if (wanted.device, wanted.dtype) != (here.device, here.dtype):
            raise EncacheError(
                f"This pipeline runs in {self.dtype} on {self.device}, not in {wanted.dtype} on "
                f"{wanted.device}. Choose when it is opened: from_pretrained(..., dtype=, "
                "backend=), or from_pipe of a diffusers pipeline that is there."
            )
        return self

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options for tqdm, as in diffusers; `disable=True` silences it."""
        self._progress_bar_config = options

    @torch.inference_mode()
    def __call__(
        self,
        prompt: Prompt | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: Prompt | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback: Any = None,
        *,
        stride: int | None = None,
        key_calls: Sequence[int] | None = None,
        blend: Blend | None = None,
        prior_noise: bool | None = None,
        plan: Plan | None = None,
        max_decode_batch: int | None = None,
        **of_xl: Any,
    ) -> Any:
        """Make pictures from prompts.

        Args:
            prompt: one or several.
            height, width: in pixels, divisible by 8; by default the model's own size.
            num_inference_steps: steps of the full sampler; by default the model's own, or 50.
            guidance_scale: classifier-free guidance; 1 or less turns it off. By default the
                model's own.
            negative_prompt: one for all prompts, or one each.
            num_images_per_prompt: pictures per prompt, next to each other in the result.
            generator: one per picture makes each independent of its batch mates.
            latents: unit noise [n, 4, h, w] instead of drawing it.
            prompt_embeds, negative_prompt_embeds: text embeddings [len(prompt), L, D].
            output_type: "pil", "np" [n, H, W, 3], "pt" [n, 3, H, W], both in [0, 1], or "latent".
            return_dict: False returns (images, None).
            guidance_rescale: Lin et al. (arXiv 2305.08891, section 3.4).
            clip_skip: last layers of the text encoder to leave out; PyTorch alone can.
            timesteps, sigmas, eta, ip_adapter_image, ip_adapter_image_embeds,
                cross_attention_kwargs, callback: diffusers' arguments that are refused.
            callback_on_step_end: called in order for every call of a decoded segment with
                {"latents"}; it may read but not replace them, and stop the run by setting
                `_interrupt` on the pipeline.
            callback_on_step_end_tensor_inputs: only "latents" exists here.
            stride, key_calls, blend, prior_noise: the caching policy; see `make_plan`. By default
                the model's own, or every third call and straight lines through the last two.
            plan: fitted to this model, its solver, steps and guidance, in place of all these; see
                `encache.runtime.planfile`, whose `check_fits` tells whether it is.
            max_decode_batch: most rows (calls x images x guidance) in one decoder run; where memory
                runs short, runs are split further.
            of_xl: what diffusers' Stable Diffusion XL takes besides; see `XLArguments`.

        Returns:
            StableDiffusionPipelineOutput; `nsfw_content_detected` is None.

        Raises:
            EncacheError: arguments that cannot be honoured.
        """
        refuse_call_options(
            timesteps=timesteps,
            sigmas=sigmas,
            eta=eta,
            ip_adapter_image=ip_adapter_image,
            ip_adapter_image_embeds=ip_adapter_image_embeds,
            cross_attention_kwargs=cross_attention_kwargs,
            callback=callback,
        )
        refuse_output_type(output_type)
        xl = XLArguments.read(of_xl, self._reads("time_ids"))
        _refuse_other_tensors(callback_on_step_end, callback_on_step_end_tensor_inputs)
        wished = Preset(
            steps=num_inference_steps,
            guidance_scale=guidance_scale,
            stride=stride,
            key_calls=None if key_calls is None else tuple(key_calls),
            blend=blend,
            prior_noise=prior_noise,
            cut=self.engines.cut,
        )
        settings = resolve(wished, self.preset, self.default_guidance_scale)
        if plan:
            _refuse_beside_plan(plan, wished, settings.rows)
            settings = replace(settings, policy=replace(settings.policy, plan=plan))
        if not (math.isfinite(settings.guidance_scale) and math.isfinite(guidance_rescale)):
            raise EncacheError("guidance_scale and guidance_rescale must be finite numbers.")
        texts = encode_prompts(
            self.texts,
            Prompts(prompt, xl.prompt_2, prompt_embeds, xl.pooled_prompt_embeds),
            Prompts(
                negative_prompt,
                xl.negative_prompt_2,
                negative_prompt_embeds,
                xl.negative_pooled_prompt_embeds,
            ),
            guided=settings.rows > 1,
            clip_skip=clip_skip or 0,
            empty_is_zero=self.empty_is_zero,
        )
        texts = {
            name: one.repeat_interleave(num_images_per_prompt, dim=1) for name, one in texts.items()
        }
        num_guided, num_images = texts["text"].shape[:2]
        rows = num_guided * num_images
        with explaining_want_of_memory(too_many_rows(rows)):
            size = self.latent_size(height, width)
            noise = draw_noise(self, num_images, size, generator, latents)
        conditions = self.complete(texts, xl, noise)
        plan = self._plan(settings, noise, rows, num_guided, max_decode_batch)
        guidance = Guidance(settings.guidance_scale if num_guided > 1 else None, guidance_rescale)
        with explaining_want_of_memory(too_many_rows(rows)):
            latents = self._sample(plan, noise, conditions, guidance, callback_on_step_end)
        images = self.decode(latents, output_type)
        if not return_dict:
            return images, None
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=None)

    def _reads(self, condition: str) -> bool:
        return any(one.name == condition for one in self.engines.conditions)

    def complete(
        self, texts: dict[str, Tensor], xl: XLArguments, noise: Tensor
    ) -> dict[str, Tensor]:
        """All conditions [G, n, ...] that the denoiser reads, on its device."""
        num_guided, num_images = texts["text"].shape[:2]
        known = {one.name: dtypes.tensor_dtype(one, self.dtype) for one in self.engines.conditions}
        conditions = {name: one for name, one in texts.items() if name in known}
        if "time_ids" in known:
            height, width = (side * self.spec.downscale for side in noise.shape[-2:])
            conditions["time_ids"] = time_ids(
                xl.sizes, xl.negative_sizes, (height, width), num_guided, num_images
            )
        if missing := sorted(known.keys() - conditions.keys()):
            raise EncacheError(f"This model also reads {', '.join(missing)}: give that too.")
        return {name: one.to(self.engines.device, known[name]) for name, one in conditions.items()}

    def _plan(
        self,
        settings: Settings,
        noise: Tensor,
        rows: int,
        num_guided: int,
        max_decode_batch: int | None,
    ) -> Plan:
        """What is run, as far as the engines take it."""
        if target := self.engines.target:
            height, width = (side * self.spec.downscale for side in noise.shape[-2:])
            target.refuse_beyond(rows=rows, height=height, width=width)
            max_decode_batch = most_rows(target.decode_calls, rows, max_decode_batch)
        plan = make_plan(
            self.scheduler,
            settings.steps,
            settings.policy,
            max_decode_batch=max_decode_batch,
            rows_per_call=rows,
        )
        if target and plan.runs_one_branch:
            target.refuse_beyond(rows=rows // num_guided)
        return plan

    def _sample(
        self,
        plan: Plan,
        noise: Tensor,
        conditions: dict[str, Tensor],
        guidance: Guidance,
        callback: Callback | None,
    ) -> Tensor:
        """Latents of a plan, from noise [n, C, h, w] and conditions [G, n, ...]."""
        self.num_timesteps, self._interrupt = plan.num_calls, False
        with progress(total=plan.num_calls, **self._progress_bar_config) as bar:

            def on_finished(calls: range, latents_before: Callable[[int], Tensor]) -> None:
                bar.update(len(calls))
                if callback:
                    self._call_back(callback, calls, plan, latents_before)

            try:
                return self._executor.run(
                    plan, noise, conditions, guidance, on_finished, watched=bool(callback)
                )
            except _InterruptedError as interruption:
                return interruption.latents

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Latent height and width of a picture's, which default to the model's own."""
        check_size(*(side for side in (height, width) if side is not None))
        return self.spec.latent_size(height, width)

    def decode(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Turn latents [n, 4, h, w] into pictures of the given type; see `decode_pictures`."""
        return decode_pictures(self.codec, self.spec, latents, output_type)

    def _call_back(
        self,
        callback: Callback,
        calls: range,
        plan: Plan,
        latents_before: Callable[[int], Tensor],
    ) -> None:
        for call in calls:
            timestep = plan.timesteps[call]
            latents = latents_before(call + 1)
            returned = callback(self, call, torch.tensor(timestep), {"latents": latents}) or {}
            if returned.get("latents", latents) is not latents:
                raise EncacheError(
                    "callback_on_step_end replaced the latents, but the calls of a segment are "
                    "already decoded when it runs. Use the diffusers pipeline for that."
                )
            if self._interrupt:
                raise _InterruptedError(latents)


class _InterruptedError(Exception):
    """A callback asked to stop after the call that ended with these latents."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__()
        self.latents = latents


def _refuse_beside_plan(plan: Plan, wished: Preset, rows: int) -> None:
    """Raise EncacheError for what a fitted plan says already, or cannot be run with."""
    for name in ("stride", "key_calls", "blend", "prior_noise"):
        if getattr(wished, name) is not None:
            raise EncacheError(f"Give a plan or {name}, not both: a plan says it all.")
    if rows == 1 and plan.weighs_guidance:
        raise EncacheError("The plan was fitted with guidance: give a guidance_scale above 1.")


def _refuse_other_tensors(callback: Any, names: Sequence[str]) -> None:
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        names = callback.tensor_inputs
    if set(names) - {"latents"}:
        raise EncacheError("Callbacks receive 'latents'; no other tensor lives between calls.")
