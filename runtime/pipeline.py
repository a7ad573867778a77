"""`EncachePipeline`: diffusers' Stable Diffusion call over an engine pair and a plan."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from encache.contract import dtypes
from encache.contract.library import TENSORRT_BACKENDS
from encache.contract.manifest import read_manifest
from encache.contract.target import Target, make_target, most_rows
from encache.errors import EncacheError
from encache.export.build import (
    Report,
    Request,
    build_engines,
    find_covering_engines,
    find_engines,
)
from encache.model.checkpoint import Checkpoint, find_checkpoint
from encache.model.family import empty_is_zero, family_of
from encache.model.loading import load_pipeline
from encache.model.preset import UNSAID, Preset
from encache.model.spec import DEFAULT_CUT, Cut, ImageSpec, check_size
from encache.model.text_encoder import text_encoders_of
from encache.progress import progress
from encache.runtime.backends import Parts, load_scheduler, open_parts
from encache.runtime.blend import Blend
from encache.runtime.codec import TorchCodec
from encache.runtime.conditions import (
    Prompt,
    Prompts,
    Sizes,
    encode_prompts,
    refuse_unread,
    time_ids,
)
from encache.runtime.engines import TorchEngines
from encache.runtime.guidance import make_guide
from encache.runtime.habits import (
    HonestAttributes,
    refuse_call_options,
    refuse_loading_options,
)
from encache.runtime.memory import explaining_want_of_memory
from encache.runtime.plan import Plan, make_plan
from encache.runtime.replay import Replay
from encache.runtime.sampler import Sampling
from encache.runtime.settings import resolve
from encache.runtime.text import Texts, TorchText

if TYPE_CHECKING:
    from encache.runtime.solver import Scheduler

logger = logging.getLogger(__name__)

Callback = Callable[["EncachePipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class EncachePipeline(HonestAttributes):
    """Stable Diffusion text-to-image with cached encoder features.

    Called like diffusers' StableDiffusionPipeline, with the caching policy as further arguments.
    What it cannot honour of diffusers' ways to load, steer and change a pipeline it refuses.
    A pipeline keeps no state between calls except its engines and its scheduler, and on a GPU the
    buffers and the CUDA graph of its last call: there, one thread at a time may call it.

    Args:
        parts: what runs the denoiser, the text encoders and the autoencoder.
        scheduler: the model's own; another may be set later.
        spec: how pictures and latents relate.
        guidance_scale: the model's default.
        preset: how else the model wants to be sampled, unless asked otherwise.
        empty_is_zero: whether no negative prompt means zeros, as for Stable Diffusion XL.
    """

    #: Setting it in a callback stops the run after that call, as in diffusers.
    _interrupt = False
    #: Calls of the latest run, for callbacks.
    num_timesteps = 0

    def __init__(
        self,
        parts: Parts,
        scheduler: "Scheduler",
        spec: ImageSpec,
        guidance_scale: float,
        preset: Preset = UNSAID,
        empty_is_zero: bool = False,
    ) -> None:
        self.engines, self.texts, self.codec = parts
        self.scheduler = scheduler
        self.spec = spec
        self.default_guidance_scale = guidance_scale
        self.preset = preset
        self.empty_is_zero = empty_is_zero
        self.image_processor = VaeImageProcessor(vae_scale_factor=spec.downscale)
        self._progress_bar_config: dict[str, Any] = {}
        self._kept: tuple[Any, tuple[Sampling, Replay | None]] | None = None

    @property
    def tokenizer(self) -> Any:
        """Of the first text encoder."""
        return self.texts.tokenizers[0]

    def with_parts(self, **parts: Any) -> "EncachePipeline":
        """Another pipeline like this one, with other `engines`, `texts` or `codec`."""
        return type(self)(
            Parts(self.engines, self.texts, self.codec)._replace(**parts),
            self.scheduler,
            self.spec,
            self.default_guidance_scale,
            self.preset,
            self.empty_is_zero,
        )

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

    @classmethod
    def from_pipe(
        cls,
        pipeline: Any,
        cut: Cut = DEFAULT_CUT,
        *,
        capturable: bool = False,
    ) -> "EncachePipeline":
        """Wrap a diffusers pipeline; its modules are shared, not copied or changed.

        Args:
            pipeline: a diffusers pipeline, such as StableDiffusionPipeline.
            cut: where its UNet is cut.
            capturable: on a GPU, run equal calls as a CUDA graph from the second on. It does not
                follow later changes of the pipeline's modules, such as a LoRA.

        Raises:
            EncacheError: encache runs no such pipeline, or it reads what encache does not carry.
        """
        family = family_of(pipeline)
        spec = ImageSpec.of(pipeline.unet.config, pipeline.vae.config)
        encoders = text_encoders_of(pipeline)
        parts = Parts(
            TorchEngines(pipeline.unet, cut, capturable=capturable),
            Texts([one.tokenizer for one in encoders], [TorchText(one) for one in encoders]),
            TorchCodec(pipeline.vae),
        )
        return cls(
            parts,
            pipeline.scheduler,
            spec,
            family.guidance_scale,
            empty_is_zero=empty_is_zero(pipeline),
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        base: str | Path | None = None,
        loras: Sequence[str] = (),
        vae: str | Path | None = None,
        variant: str | None = None,
        scheduler: "Scheduler | None" = None,
        cut: Cut | None = None,
        backend: str = "onnxruntime",
        dtype: str | torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        target: Target | None = None,
        engine_dir: str | Path = "engines",
        **diffusers_options: Any,
    ) -> "EncachePipeline":
        """Open a model on a backend, building its engines when they are missing.

        Args:
            model: diffusers folder, hub id, `.safetensors` file, or None for the default model.
            base: what completes a `.safetensors` file.
            loras: LoRA files, each as FILE or FILE:SCALE, fused into the weights.
            vae: folder or hub id of an autoencoder that replaces the model's own.
            variant: of the folder's weights, such as "fp16".
            scheduler: in place of the model's own.
            cut: where the UNet is cut; by default where the model wants it, or behind its output.
            backend: "torch", "onnxruntime", "tensorrt-rtx" or "tensorrt".
            dtype: "fp32" or "fp16", or torch's; by default fp32, and fp16 for TensorRT.
            torch_dtype: diffusers' older name of it.
            target: what to compile TensorRT engines for; by default one picture of the model's own
                size with its own guidance, on this machine's GPU.
            engine_dir: where engine folders are found and built.
            diffusers_options: those that ask for what is done anyway (`safety_checker=None`,
                `use_safetensors=True`); others are refused.

        Raises:
            EncacheError: the model or the engines cannot be used, or an option be honoured.
        """
        refuse_loading_options(diffusers_options)
        dtype = dtype or torch_dtype
        pipeline = cls.from_checkpoint(
            find_checkpoint(model, base, loras, vae, variant),
            cut=cut,
            backend=backend,
            dtype=dtypes.dtype_name(dtype) if dtype else None,
            target=target,
            engine_dir=Path(engine_dir),
        )
        pipeline.scheduler = scheduler or pipeline.scheduler
        return pipeline

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        cut: Cut | None = None,
        backend: str = "onnxruntime",
        dtype: str | None = None,
        target: Target | None = None,
        engine_dir: Path = Path("engines"),
        exact: bool = False,
        report: Report = lambda line: None,
    ) -> "EncachePipeline":
        """Open a checkpoint on a backend, building its engines when they are missing.

        Args:
            checkpoint: from `find_checkpoint`.
            cut, backend, dtype, target, engine_dir: as for `from_pretrained`.
            exact: take no engines that were compiled for more than the target: they are slower.
            report: receives a line for each part that is built.
        """
        cut, dtype = cut or checkpoint.cut, dtype or dtypes.default_dtype(backend)
        if backend == "torch":
            return cls._from_torch(checkpoint, cut, dtype)
        if backend in TENSORRT_BACKENDS and target is None:
            target = make_target(checkpoint, backend, cut)
        request = Request(checkpoint, cut, dtype, backend, target)
        found = (find_engines if exact else find_covering_engines)(request, engine_dir)
        if found is None:
            report(f"Building {request.folder_name} in {engine_dir}, once.")
        return cls.from_engines(found or build_engines(request, engine_dir, report))

    @classmethod
    def _from_torch(cls, checkpoint: Checkpoint, cut: Cut, dtype: str) -> "EncachePipeline":
        """Loaded into PyTorch, "fp32" or "fp16", on the GPU if there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pipeline = load_pipeline(checkpoint, dtypes.torch_dtype(dtype), device)
        wrapped = cls.from_pipe(pipeline, cut, capturable=True)
        wrapped.default_guidance_scale = checkpoint.guidance_scale
        wrapped.preset = checkpoint.preset
        return wrapped

    @classmethod
    def from_single_file(
        cls, path: str | Path, config: str | Path | None = None, **options: Any
    ) -> "EncachePipeline":
        """Open a single-file `.safetensors` checkpoint; options as for `from_pretrained`.

        `config`, diffusers' name for `base`, is the folder or hub id that completes it.
        """
        if config is not None:
            options["base"] = config
        return cls.from_pretrained(path, **options)

    @classmethod
    def from_engines(cls, folder: str | Path) -> "EncachePipeline":
        """Open one engine folder, which is complete in itself: no checkpoint is needed."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        parts, scheduler = open_parts(folder, manifest), load_scheduler(folder, manifest)
        return cls(
            parts,
            scheduler,
            manifest.spec,
            manifest.guidance_scale,
            manifest.preset,
            manifest.empty_is_zero,
        )

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
        max_decode_batch: int | None = None,
        prompt_2: Prompt | None = None,
        negative_prompt_2: Prompt | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
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
            max_decode_batch: most rows (calls x images x guidance) in one decoder run; where memory
                runs short, runs are split further.
            prompt_2, negative_prompt_2, pooled_prompt_embeds, negative_pooled_prompt_embeds,
                original_size, crops_coords_top_left, target_size, negative_original_size,
                negative_crops_coords_top_left, negative_target_size: of Stable Diffusion XL, as in
                diffusers.

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
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise EncacheError("Callbacks receive 'latents'; no other tensor lives between calls.")
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
        if not (math.isfinite(settings.guidance_scale) and math.isfinite(guidance_rescale)):
            raise EncacheError("guidance_scale and guidance_rescale must be finite numbers.")
        refuse_unread(
            [one.name for one in self.engines.conditions],
            prompt_2=prompt_2,
            negative_prompt_2=negative_prompt_2,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            original_size=original_size,
            crops_coords_top_left=crops_coords_top_left,
            target_size=target_size,
            negative_original_size=negative_original_size,
            negative_crops_coords_top_left=negative_crops_coords_top_left,
            negative_target_size=negative_target_size,
        )
        texts = encode_prompts(
            self.texts,
            Prompts(prompt, prompt_2, prompt_embeds, pooled_prompt_embeds),
            Prompts(
                negative_prompt,
                negative_prompt_2,
                negative_prompt_embeds,
                negative_pooled_prompt_embeds,
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
        with explaining_want_of_memory(rows):
            noise = self._draw_noise(num_images, height, width, generator, latents)
        conditions = self._complete(
            texts,
            Sizes(original_size, crops_coords_top_left, target_size),
            Sizes(negative_original_size, negative_crops_coords_top_left, negative_target_size),
            noise,
        )
        if target := self.engines.target:
            scale = self.spec.downscale
            height, width = (side * scale for side in noise.shape[-2:])
            refuse_beyond(target, rows=rows, height=height, width=width)
            max_decode_batch = most_rows(target.decode_calls, rows, max_decode_batch)
        plan = make_plan(
            self.scheduler,
            settings.steps,
            settings.policy,
            max_decode_batch=max_decode_batch,
            rows_per_call=rows,
        )
        guidance = (settings.guidance_scale if num_guided > 1 else None, guidance_rescale)
        self.num_timesteps, self._interrupt = plan.num_calls, False
        with explaining_want_of_memory(rows):
            latents = self._sample(plan, noise, conditions, guidance, callback_on_step_end)
            images = self.decode(latents, output_type)
        if not return_dict:
            return images, None
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=None)

    def _complete(
        self, texts: Mapping[str, Tensor], wanted: Sizes, unwanted: Sizes, noise: Tensor
    ) -> dict[str, Tensor]:
        """All conditions [G, n, ...] that the denoiser reads, on its device."""
        num_guided, num_images = texts["text"].shape[:2]
        known = {one.name: dtypes.tensor_dtype(one, self.dtype) for one in self.engines.conditions}
        conditions = {name: one for name, one in texts.items() if name in known}
        if "time_ids" in known:
            height, width = (side * self.spec.downscale for side in noise.shape[-2:])
            conditions["time_ids"] = time_ids(
                wanted, unwanted, (height, width), num_guided, num_images
            )
        if missing := sorted(known.keys() - conditions.keys()):
            raise EncacheError(f"This model also reads {', '.join(missing)}: give that too.")
        return {name: one.to(self.engines.device, known[name]) for name, one in conditions.items()}

    def _sample(
        self,
        plan: Plan,
        noise: Tensor,
        conditions: Mapping[str, Tensor],
        guidance: tuple[float | None, float],
        callback: Callback | None,
    ) -> Tensor:
        """Latents of a plan, from noise [n, C, h, w] and conditions [G, n, ...]."""
        sampling, replay = self._prepare(plan, noise, conditions, guidance)
        rows = {name: one.flatten(0, 1) for name, one in conditions.items()}
        with progress(total=plan.num_calls, **self._progress_bar_config) as bar:

            def on_finished(calls: range, latents_before: Callable[[int], Tensor]) -> None:
                bar.update(len(calls))
                if callback:
                    self._call_back(callback, calls, plan, latents_before)

            if replay and not callback:
                latents = replay(noise, rows)
                bar.update(plan.num_calls)
            else:
                try:
                    latents = sampling.run(noise, rows, on_finished)
                except _InterruptedError as interruption:
                    latents = interruption.latents
        if not latents.isfinite().all():
            raise EncacheError(_explain_not_finite(conditions["text"], sampling))
        return latents

    def _prepare(
        self,
        plan: Plan,
        noise: Tensor,
        conditions: Mapping[str, Tensor],
        guidance: tuple[float | None, float],
    ) -> tuple[Sampling, Replay | None]:
        """A plan's buffers, and its CUDA graph where one is possible; kept on a GPU."""
        shapes = {name: one.shape for name, one in conditions.items()}
        key = (plan, noise.shape, *shapes.items(), guidance)
        if self._kept and self._kept[0] == key:
            return self._kept[1]
        self._kept = None  # frees its memory first
        num_guided = len(conditions["text"])
        sampling = Sampling(plan, self.engines, noise.shape, num_guided, make_guide(*guidance))
        replay = Replay(sampling.run) if self.engines.capturable else None
        if replay or self.engines.device.type == "cuda":
            self._kept = (key, (sampling, replay))
        return sampling, replay

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Latent height and width of a picture's, which default to the model's own."""
        check_size(*(side for side in (height, width) if side is not None))
        return self.spec.latent_size(height, width)

    def decode(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Turn latents [n, 4, h, w] into pictures of the given type."""
        if output_type == "latent":
            return latents
        pictures = [self.codec.decode(one / self.spec.scaling_factor) for one in latents.split(1)]
        joined = torch.cat(pictures)
        if not joined.isfinite().all():
            raise EncacheError(
                "The latents are finite, but the autoencoder's picture is not: its numbers "
                f"overflow in {self.dtype}. Try fp32, another --vae, or a lower guidance scale."
            )
        return self.image_processor.postprocess(joined, output_type=output_type)

    def _draw_noise(
        self,
        num_images: int,
        height: int | None,
        width: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
    ) -> Tensor:
        shape = (num_images, self.spec.channels, *self.latent_size(height, width))
        if isinstance(generator, list) and len(generator) != num_images:
            raise EncacheError(f"{len(generator)} generators were given for {num_images} images.")
        if latents is None:
            device, dtype = self.engines.device, self.engines.dtype
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if latents.shape != shape:
            raise EncacheError(f"latents must be {list(shape)}, not {list(latents.shape)}.")
        return latents.to(self.engines.device, torch.float32)

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


def _explain_not_finite(text: Tensor, sampling: Sampling) -> str:
    """Where numbers that are not finite began, and what to try."""
    remedy = "Try fp32, or a lower guidance scale; if both fail, the weights are damaged."
    if not text.isfinite().all():
        return f"The text encoder gives numbers that are not finite. {remedy}"
    call = sampling.first_broken_call()
    where = "the solver's latents" if call is None else f"call {call} of the UNet"
    return f"The picture would be black: {where} is not finite. {remedy}"


def refuse_beyond(target: Target, **asked: int | None) -> None:
    """Raise EncacheError unless engines for this target take these rows, height and width."""
    for name, size in asked.items():
        least, most = getattr(target, name)
        if size and not least <= size <= most:
            span = least if least == most else f"{least} to {most}"
            raise EncacheError(
                f"These engines were compiled for {name} {span}, not {size} (rows are pictures, "
                "times two with guidance). Export them again with another --batch, --height or "
                "--width, or export for onnxruntime, which takes any."
            )
