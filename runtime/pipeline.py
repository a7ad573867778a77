"""`EncachePipeline`: diffusers' Stable Diffusion call over an engine pair and a plan."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from encache.errors import EncacheError
from encache.export.build import (
    Request,
    build_engines,
    default_dtype,
    find_covering_engines,
)
from encache.export.graphs import TORCH_DTYPES
from encache.export.library import TENSORRT_BACKENDS
from encache.export.manifest import read_manifest
from encache.export.target import Target, make_target, most_rows
from encache.model.checkpoint import GUIDANCE_SCALE, Checkpoint, find_checkpoint
from encache.model.features import DEFAULT_CUT, Cut, ImageSpec, check_size
from encache.model.loading import load_pipeline
from encache.model.preset import UNSAID, Preset
from encache.model.text import TOKENIZING, tokenize, with_length
from encache.progress import progress
from encache.runtime.backends import load_engines, load_scheduler, load_tokenizer
from encache.runtime.blend import Blend
from encache.runtime.engines import Engines, TorchEngines
from encache.runtime.habits import (
    HonestAttributes,
    refuse_call_options,
    refuse_loading_options,
    refuse_other_pipelines,
)
from encache.runtime.plan import Decode, Plan, make_plan
from encache.runtime.replay import Replay
from encache.runtime.sampler import Guide, Sampling
from encache.runtime.settings import resolve

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    from encache.runtime.solver import Scheduler

logger = logging.getLogger(__name__)

Prompt = str | Sequence[str]
Callback = Callable[["EncachePipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class EncachePipeline(HonestAttributes):
    """Stable Diffusion text-to-image with cached encoder features.

    Called like diffusers' StableDiffusionPipeline, with the caching policy as further arguments.
    What it cannot honour of diffusers' ways to load, steer and change a pipeline it refuses.
    A pipeline keeps no state between calls except its engines and its scheduler, and on a GPU the
    buffers and the CUDA graph of its last call: there, one thread at a time may call it.

    Args:
        engines: what runs the model.
        tokenizer, scheduler: the model's own; another scheduler may be set later.
        spec: how pictures and latents relate.
        guidance_scale: the model's default.
        preset: how else the model wants to be sampled, unless asked otherwise.
    """

    #: Setting it in a callback stops the run after that call, as in diffusers.
    _interrupt = False
    #: Calls of the latest run, for callbacks.
    num_timesteps = 0

    def __init__(
        self,
        engines: Engines,
        tokenizer: "CLIPTokenizer",
        scheduler: "Scheduler",
        spec: ImageSpec,
        guidance_scale: float = GUIDANCE_SCALE,
        preset: Preset = UNSAID,
    ) -> None:
        self.engines = engines
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.spec = spec
        self.default_guidance_scale = guidance_scale
        self.preset = preset
        self.image_processor = VaeImageProcessor(vae_scale_factor=spec.downscale)
        self._progress_bar_config: dict[str, Any] = {}
        self._kept: tuple[Any, tuple[Sampling, Replay | None]] | None = None

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
        pipeline: "StableDiffusionPipeline",
        cut: Cut = DEFAULT_CUT,
        *,
        capturable: bool = False,
    ) -> "EncachePipeline":
        """Wrap a diffusers pipeline; its modules are shared, not copied or changed.

        Args:
            pipeline: what to wrap.
            cut: where its UNet is cut.
            capturable: on a GPU, run equal calls as a CUDA graph from the second on. It does not
                follow later changes of the pipeline's modules, such as a LoRA.

        Raises:
            EncacheError: it is no StableDiffusionPipeline, or has what the cut does not carry.
        """
        refuse_other_pipelines(pipeline)
        spec = ImageSpec.of(pipeline.unet.config, pipeline.vae.config)
        engines = TorchEngines(pipeline, cut, capturable=capturable)
        tokenizer = with_length(pipeline.tokenizer, pipeline.text_encoder)
        return cls(engines, tokenizer, pipeline.scheduler, spec)

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
        checkpoint = find_checkpoint(model, base, loras, vae, variant)
        cut = cut or checkpoint.cut
        dtype = _dtype_name(dtype or torch_dtype) or default_dtype(backend)
        if backend == "torch":
            pipeline = cls.from_checkpoint(checkpoint, cut, dtype)
        else:
            if backend in TENSORRT_BACKENDS and target is None:
                target = make_target(checkpoint, backend, cut)
            request = Request(checkpoint, cut, dtype, backend, target)
            found = find_covering_engines(request, Path(engine_dir))
            pipeline = cls.from_engines(found or build_engines(request, Path(engine_dir)))
        pipeline.scheduler = scheduler or pipeline.scheduler
        return pipeline

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, cut: Cut, dtype: str) -> "EncachePipeline":
        """Load a checkpoint into PyTorch, "fp32" or "fp16", on the GPU if there is one."""
        if dtype not in TORCH_DTYPES:
            raise EncacheError(f"There is no {dtype!r}. Choose one of {', '.join(TORCH_DTYPES)}.")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pipeline = load_pipeline(checkpoint, TORCH_DTYPES[dtype], device)
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
        engines = load_engines(folder, manifest)
        tokenizer = load_tokenizer(folder, manifest)
        scheduler = load_scheduler(folder, manifest)
        return cls(
            engines, tokenizer, scheduler, manifest.spec, manifest.guidance_scale, manifest.preset
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
        )
        settings = resolve(wished, self.preset, self.default_guidance_scale)
        if not (math.isfinite(settings.guidance_scale) and math.isfinite(guidance_rescale)):
            raise EncacheError("guidance_scale and guidance_rescale must be finite numbers.")
        guided = settings.guidance_scale > 1
        text = self._encode_prompts(
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            guided,
            clip_skip or 0,
        )
        text = text.to(self.engines.device, self.engines.dtype)
        text = text.repeat_interleave(num_images_per_prompt, dim=1)
        rows = text.shape[0] * text.shape[1]
        with _explaining_want_of_memory(rows):
            noise = self._draw_noise(text.shape[1], height, width, generator, latents)
        if target := self.engines.target:
            scale = self.spec.downscale
            height, width = (side * scale for side in noise.shape[-2:])
            refuse_beyond(target, rows=rows, height=height, width=width)
            max_decode_batch = most_rows(target.decode_calls, rows, max_decode_batch)
        plan = make_plan(
            self.scheduler,
            settings.steps,
            **settings.policy,
            max_decode_batch=max_decode_batch,
            rows_per_call=rows,
        )
        guidance = (settings.guidance_scale if guided else None, guidance_rescale)
        self.num_timesteps, self._interrupt = plan.num_calls, False
        with _explaining_want_of_memory(rows):
            latents = self._sample(plan, noise, text, guidance, callback_on_step_end)
            images = self.decode(latents, output_type)
        if not return_dict:
            return images, None
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=None)

    def _sample(
        self,
        plan: Plan,
        noise: Tensor,
        text: Tensor,
        guidance: tuple[float | None, float],
        callback: Callback | None,
    ) -> Tensor:
        """Latents of a plan, from noise [n, 4, h, w] and text [G, n, L, D]."""
        sampling, replay = self._prepare(plan, noise.shape, text.shape, guidance)
        with progress(total=plan.num_calls, **self._progress_bar_config) as bar:

            def on_decoded(step: Decode, latents_before: Callable[[int], Tensor]) -> None:
                bar.update(step.stop - step.start)
                if callback:
                    self._call_back(callback, step, latents_before)

            if replay and not callback:
                latents = replay(noise, text.flatten(0, 1))
                bar.update(plan.num_calls)
            else:
                try:
                    latents = sampling.run(noise, text.flatten(0, 1), on_decoded)
                except _InterruptedError as interruption:
                    latents = interruption.latents
        if not latents.isfinite().all():
            raise EncacheError(_explain_not_finite(text, sampling))
        return latents

    def _prepare(
        self,
        plan: Plan,
        noise_shape: Sequence[int],
        text_shape: Sequence[int],
        guidance: tuple[float | None, float],
    ) -> tuple[Sampling, Replay | None]:
        """A plan's buffers, and its CUDA graph where one is possible; kept on a GPU."""
        key = (plan, tuple(noise_shape), tuple(text_shape), guidance)
        if self._kept and self._kept[0] == key:
            return self._kept[1]
        self._kept = None  # frees its memory first
        sampling = Sampling(plan, self.engines, noise_shape, text_shape[0], make_guide(*guidance))
        replay = Replay(sampling.run) if self.engines.capturable else None
        if replay or self.engines.device.type == "cuda":
            self._kept = (key, (sampling, replay))
        return sampling, replay

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Latent height and width of a picture's, which default to the model's own."""
        check_size(*(side for side in (height, width) if side is not None))
        return self.spec.latent_size(height, width)

    def encode_prompts(self, prompts: Sequence[str], clip_skip: int = 0) -> Tensor:
        """Text embeddings [len(prompts), L, D], padded or cut to the tokenizer's length."""
        _refuse_what_is_no_text(prompts)
        length = self.tokenizer.model_max_length
        with TOKENIZING:
            # A concept of textual inversion may be several tokens, which diffusers writes out.
            expand = TextualInversionLoaderMixin().maybe_convert_prompt
            prompts = [expand(prompt, self.tokenizer) for prompt in prompts]
            whole = self.tokenizer(prompts).input_ids
            token_ids = tokenize(self.tokenizer, prompts)
        for prompt, ids in zip(prompts, whole, strict=True):
            if len(ids) > length:
                lost = self.tokenizer.decode(ids[length - 1 : -1])
                logger.warning("%r is too long, its end is ignored: %r", prompt[:40], lost)
        return self.engines.encode_text(token_ids, clip_skip)

    def decode(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Turn latents [n, 4, h, w] into pictures of the given type."""
        if output_type == "latent":
            return latents
        pictures = [
            self.engines.decode_latents(one / self.spec.scaling_factor) for one in latents.split(1)
        ]
        joined = torch.cat(pictures)
        if not joined.isfinite().all():
            raise EncacheError(
                "The latents are finite, but the autoencoder's picture is not: its numbers "
                f"overflow in {self.dtype}. Try fp32, another --vae, or a lower guidance scale."
            )
        return self.image_processor.postprocess(joined, output_type=output_type)

    def _encode_prompts(
        self,
        prompt: Prompt | None,
        negative_prompt: Prompt | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        guided: bool,
        clip_skip: int,
    ) -> Tensor:
        """Embeddings [G, n, L, D], the negative ones first."""
        if (prompt is None) == (prompt_embeds is None):
            raise EncacheError("Give either prompt or prompt_embeds.")
        prompts = _listed(prompt)
        if prompt is not None and not prompts:
            raise EncacheError("The list of prompts is empty.")
        count = len(prompts) if prompt_embeds is None else len(prompt_embeds)
        implied = guided and negative_prompt_embeds is None
        negatives = _listed(negative_prompt or "") if implied else []
        if len(negatives) == 1:
            negatives *= count
        # All at once: a text encoder takes hardly longer for two prompts than for one.
        wanted = [*negatives, *prompts]
        encoded = self.encode_prompts(wanted, clip_skip) if wanted else torch.empty(0)
        positive = encoded[len(negatives) :] if prompt_embeds is None else prompt_embeds
        if not guided:
            return positive[None]
        negative = (
            encoded[: len(negatives)] if negative_prompt_embeds is None else negative_prompt_embeds
        )
        if len(negative) != len(positive):
            raise EncacheError(
                f"There are {len(positive)} prompts and {len(negative)} negative ones; give one "
                "for all, or one each."
            )
        if negative.shape != positive.shape:
            raise EncacheError(
                f"The prompt's embeddings are {list(positive.shape[1:])} and the negative ones "
                f"{list(negative.shape[1:])}: make both equally long."
            )
        return torch.stack([negative, positive])

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
        self, callback: Callback, step: Decode, latents_before: Callable[[int], Tensor]
    ) -> None:
        for call, timestep in zip(range(step.start, step.stop), step.timesteps, strict=True):
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


@contextmanager
def _explaining_want_of_memory(rows: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # PyTorch has a class of its own for a GPU's memory alone.
        if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
            raise
        raise EncacheError(
            f"Memory does not hold one call of {rows} rows (pictures, times two with guidance): "
            "make fewer or smaller pictures at once."
        ) from error


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


def make_guide(scale: float | None, rescale: float = 0.0) -> Guide:
    """Classifier-free guidance eps_u + s (eps_c - eps_u) over [K, 2, n, 4, h, w]; None is off."""

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


def _dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """Ours for torch's."""
    names = {value: name for name, value in TORCH_DTYPES.items()}
    return names.get(dtype, str(dtype)) if isinstance(dtype, torch.dtype) else dtype


def _refuse_what_is_no_text(prompts: Sequence[Any]) -> None:
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise EncacheError(f"A prompt is text, or a list of texts, not {prompt!r}.")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise EncacheError(f"{prompt[:40]!r} is no UTF-8 text.") from error


def _listed(prompt: Any) -> list[Any]:
    if prompt is None:
        return []
    return list(prompt) if isinstance(prompt, list | tuple) else [prompt]
