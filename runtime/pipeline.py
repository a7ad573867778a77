"""`EncachePipeline`: diffusers' Stable Diffusion call over an engine pair and a plan."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from tqdm import tqdm

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
from encache.model.checkpoint import Checkpoint, find_checkpoint, load_pipeline
from encache.model.features import DEFAULT_CUT, Cut, ImageSpec, check_size
from encache.model.text import tokenize
from encache.runtime.backends import load_engines, load_scheduler, load_tokenizer
from encache.runtime.blend import DEFAULT_BLEND, DEFAULT_STRIDE, Blend
from encache.runtime.engines import Engines, TorchEngines
from encache.runtime.plan import Decode, Plan, make_plan
from encache.runtime.replay import Replay
from encache.runtime.sampler import Guide, Sampling

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    from encache.runtime.solver import Scheduler

logger = logging.getLogger(__name__)

Prompt = str | Sequence[str]
Callback = Callable[["EncachePipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class EncachePipeline:
    """Stable Diffusion text-to-image with cached encoder features.

    Called like diffusers' StableDiffusionPipeline, with the caching policy as further arguments.
    A pipeline keeps no state between calls except its engines and its scheduler, and on a GPU the
    buffers and the CUDA graph of its last call: there, one thread at a time may call it.
    """

    def __init__(
        self,
        engines: Engines,
        tokenizer: "CLIPTokenizer",
        scheduler: "Scheduler",
        spec: ImageSpec,
    ) -> None:
        self.engines = engines
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.spec = spec
        self.image_processor = VaeImageProcessor(vae_scale_factor=spec.downscale)
        self._progress_bar_config: dict[str, Any] = {}
        self._kept: tuple[Any, tuple[Sampling, Replay | None]] | None = None

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
        """
        spec = ImageSpec.of(pipeline.unet.config, pipeline.vae.config)
        engines = TorchEngines(pipeline, cut, capturable=capturable)
        return cls(engines, pipeline.tokenizer, pipeline.scheduler, spec)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        base: str | Path | None = None,
        loras: Sequence[str] = (),
        vae: str | Path | None = None,
        cut: Cut = DEFAULT_CUT,
        backend: str = "onnxruntime",
        dtype: str | None = None,
        target: Target | None = None,
        engine_dir: str | Path = "engines",
    ) -> "EncachePipeline":
        """Open a model on a backend, building its engines when they are missing.

        Args:
            model: diffusers folder, hub id, `.safetensors` file, or None for the default model.
            base: what completes a `.safetensors` file.
            loras: LoRA files, each as FILE or FILE:SCALE, fused into the weights.
            vae: folder or hub id of an autoencoder that replaces the model's own.
            cut: where the UNet is cut.
            backend: "torch", "onnxruntime", "tensorrt-rtx" or "tensorrt".
            dtype: "fp32" or "fp16"; by default fp32, and fp16 for TensorRT.
            target: what to compile TensorRT engines for; by default one guided picture of the
                model's own size, on this machine's GPU.
            engine_dir: where engine folders are found and built.

        Raises:
            EncacheError: the model or the engines cannot be used.
        """
        checkpoint = find_checkpoint(model, base, loras, vae)
        dtype = dtype or default_dtype(backend)
        if backend == "torch":
            return cls.from_checkpoint(checkpoint, cut, dtype)
        if backend in TENSORRT_BACKENDS and target is None:
            target = make_target(checkpoint, backend, cut)
        request = Request(checkpoint, cut, dtype, backend, target)
        found = find_covering_engines(request, Path(engine_dir))
        return cls.from_engines(found or build_engines(request, Path(engine_dir)))

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, cut: Cut, dtype: str) -> "EncachePipeline":
        """Load a checkpoint into PyTorch, "fp32" or "fp16", on the GPU if there is one."""
        if dtype not in TORCH_DTYPES:
            raise EncacheError(f"There is no {dtype!r}. Choose one of {', '.join(TORCH_DTYPES)}.")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pipeline = load_pipeline(checkpoint, TORCH_DTYPES[dtype], device)
        return cls.from_pipe(pipeline, cut, capturable=True)

    @classmethod
    def from_single_file(cls, path: str | Path, **options: Any) -> "EncachePipeline":
        """Open a single-file `.safetensors` checkpoint; options as for `from_pretrained`."""
        return cls.from_pretrained(path, **options)

    @classmethod
    def from_engines(cls, folder: str | Path) -> "EncachePipeline":
        """Open one engine folder, which is complete in itself: no checkpoint is needed."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        engines = load_engines(folder, manifest)
        tokenizer = load_tokenizer(folder, manifest)
        return cls(engines, tokenizer, load_scheduler(folder, manifest), manifest.spec)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options for tqdm, as in diffusers; `disable=True` silences it."""
        self._progress_bar_config = options

    @torch.inference_mode()
    def __call__(
        self,
        prompt: Prompt | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: Prompt | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_rescale: float = 0.0,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        stride: int = DEFAULT_STRIDE,
        key_calls: Sequence[int] | None = None,
        blend: Blend = DEFAULT_BLEND,
        prior_noise: bool = False,
        max_decode_batch: int | None = None,
    ) -> Any:
        """Make pictures from prompts.

        Args:
            prompt: one or several.
            height, width: in pixels, divisible by 8; by default the model's own size.
            num_inference_steps: steps of the full sampler.
            guidance_scale: classifier-free guidance; 1 or less turns it off.
            negative_prompt: one for all prompts, or one each.
            num_images_per_prompt: pictures per prompt, next to each other in the result.
            generator: one per picture makes each independent of its batch mates.
            latents: unit noise [n, 4, h, w] instead of drawing it.
            prompt_embeds, negative_prompt_embeds: text embeddings [len(prompt), L, D].
            output_type: "pil", "np" [n, H, W, 3], "pt" [n, 3, H, W], both in [0, 1], or "latent".
            return_dict: False returns (images, None).
            guidance_rescale: Lin et al. (arXiv 2305.08891, section 3.4).
            callback_on_step_end: called in order for every call of a decoded segment with
                {"latents"}; it may read but not replace them.
            callback_on_step_end_tensor_inputs: only "latents" exists here.
            stride, key_calls, blend, prior_noise: the caching policy; see `make_plan`.
            max_decode_batch: most rows (calls x images x guidance) in one decoder run; where memory
                runs short, runs are split further.

        Returns:
            StableDiffusionPipelineOutput; `nsfw_content_detected` is None.

        Raises:
            EncacheError: arguments that cannot be honoured.
        """
        if set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise EncacheError("Callbacks receive 'latents'; no other tensor lives between calls.")
        guided = guidance_scale > 1
        text = self._encode_prompts(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, guided
        )
        text = text.to(self.engines.device, self.engines.dtype)
        text = text.repeat_interleave(num_images_per_prompt, dim=1)
        noise = self._draw_noise(text.shape[1], height, width, generator, latents)
        rows = text.shape[0] * text.shape[1]
        if target := self.engines.target:
            scale = self.spec.downscale
            refuse_beyond(target, rows, noise.shape[-2] * scale, noise.shape[-1] * scale)
            max_decode_batch = most_rows(target.decode_calls, rows, max_decode_batch)
        plan = make_plan(
            self.scheduler,
            num_inference_steps,
            stride=stride,
            key_calls=key_calls,
            blend=blend,
            prior_noise=prior_noise,
            max_decode_batch=max_decode_batch,
            rows_per_call=rows,
        )
        guidance = (guidance_scale if guided else None, guidance_rescale)
        try:
            latents = self._sample(plan, noise, text, guidance, callback_on_step_end)
            images = self.decode(latents, output_type)
        except torch.OutOfMemoryError as error:
            raise EncacheError(
                f"Memory does not hold one call of {rows} rows (pictures, times two with "
                "guidance): make fewer or smaller pictures at once."
            ) from error
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
        with tqdm(total=plan.num_calls, **self._progress_bar_config) as bar:
            if replay and not callback:
                latents = replay(noise, text.flatten(0, 1))
                bar.update(plan.num_calls)
                return latents

            def on_decoded(step: Decode, latents_before: Callable[[int], Tensor]) -> None:
                bar.update(step.stop - step.start)
                if callback:
                    self._call_back(callback, step, latents_before)

            return sampling.run(noise, text.flatten(0, 1), on_decoded)

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
        check_size(*(side or self.spec.picture_size for side in (height, width)))
        return self.spec.latent_size(height, width)

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings [len(prompts), L, D], padded or cut to the tokenizer's length."""
        length = self.tokenizer.model_max_length
        for prompt, ids in zip(prompts, self.tokenizer(list(prompts)).input_ids, strict=True):
            if len(ids) > length:
                lost = self.tokenizer.decode(ids[length - 1 : -1])
                logger.warning("%r is too long, its end is ignored: %r", prompt[:40], lost)
        return self.engines.encode_text(tokenize(self.tokenizer, prompts))

    def decode(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Turn latents [n, 4, h, w] into pictures of the given type."""
        if output_type == "latent":
            return latents
        pictures = [
            self.engines.decode_latents(one / self.spec.scaling_factor) for one in latents.split(1)
        ]
        return self.image_processor.postprocess(torch.cat(pictures), output_type=output_type)

    def _encode_prompts(
        self,
        prompt: Prompt | None,
        negative_prompt: Prompt | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        guided: bool,
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
        encoded = self.encode_prompts(wanted) if wanted else torch.empty(0)
        positive = encoded[len(negatives) :] if prompt_embeds is None else prompt_embeds
        if not guided:
            return positive[None]
        negative = (
            encoded[: len(negatives)] if negative_prompt_embeds is None else negative_prompt_embeds
        )
        if negative.shape != positive.shape:
            raise EncacheError(
                f"There are {len(positive)} prompts and {len(negative)} negative ones; give one "
                "for all, or one each."
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


def refuse_beyond(target: Target, rows: int, height: int, width: int) -> None:
    """Raise EncacheError unless engines for this target take so many rows of this size."""
    asked = {"rows": rows, "height": height, "width": width}
    for name, size in asked.items():
        least, most = getattr(target, name)
        if not least <= size <= most:
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


def _listed(prompt: Prompt | None) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt or ())
