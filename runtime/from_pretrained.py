"""The ways to open a pipeline, under the names that diffusers has for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from encache.contract import dtypes
from encache.contract.calibration import make_calibration
from encache.contract.library import COMPILED, TENSORRT_BACKENDS, TORCH_BACKENDS
from encache.contract.manifest import read_manifest
from encache.contract.target import Target, make_target
from encache.errors import EncacheError
from encache.export.build import (
    Report,
    Request,
    build_engines,
    find_covering_engines,
    find_engines,
)
from encache.model.checkpoint import Checkpoint, find_checkpoint
from encache.model.family import FAMILIES, empty_is_zero, family_of, must_upcast, runs
from encache.model.loading import load_pipeline
from encache.model.preset import UNSAID, Preset
from encache.model.spec import DEFAULT_CUT, NO_CUT, Cut, ImageSpec
from encache.model.text_encoder import text_encoders_of
from encache.runtime.backends import Parts, load_scheduler, open_parts
from encache.runtime.codec import TorchCodec
from encache.runtime.engines import TorchEngines
from encache.runtime.habits import refuse_loading_options
from encache.runtime.text import Texts, TorchText

if TYPE_CHECKING:
    from encache.runtime.solver import Scheduler


class FromPretrained:
    """What a pipeline is made of, and the ways to it.

    Args:
        parts: what runs the denoiser, the text encoders and the autoencoder.
        scheduler: the model's own; another may be set later.
        spec: how pictures and latents relate.
        guidance_scale: the model's default.
        preset: how else the model wants to be sampled, unless asked otherwise.
        empty_is_zero: whether no negative prompt means zeros, as for Stable Diffusion XL.
    """

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

    def with_parts(self, **parts: Any) -> Self:
        """Another pipeline like this one, with other `engines`, `texts` or `codec`."""
        return type(self)(
            Parts(self.engines, self.texts, self.codec)._replace(**parts),
            self.scheduler,
            self.spec,
            self.default_guidance_scale,
            self.preset,
            self.empty_is_zero,
        )

    @classmethod
    def from_pipe(
        cls,
        pipeline: Any,
        cut: Cut = DEFAULT_CUT,
        *,
        capturable: bool = False,
        compiled: bool = False,
    ) -> Self:
        """Wrap a diffusers pipeline; its modules are shared, not copied or changed.

        Args:
            pipeline: a diffusers pipeline, such as StableDiffusionPipeline.
            cut: where its UNet is cut.
            capturable: on a GPU, run equal calls as a CUDA graph from the second on. It does not
                follow later changes of the pipeline's modules, such as a LoRA.
            compiled: run its parts through torch.compile, whose first picture takes minutes.

        Raises:
            EncacheError: encache runs no such pipeline, or it reads what encache does not carry.
        """
        family = family_of(pipeline)
        if family.hosted:
            raise EncacheError(
                f"This is a {family.pipeline}, which keeps its own loop; encache.enable(pipe) "
                f"caches inside it. Here {runs(FAMILIES.values())}."
            )
        if cut != NO_CUT and hasattr(pipeline.unet, "_hf_hook"):
            raise EncacheError(
                "This pipeline's weights are offloaded to the CPU, which a cut does not follow "
                "here. Use encache.enable(pipe), which does, or wrap it before."
            )
        spec = ImageSpec.of(pipeline.unet.config, pipeline.vae.config)
        encoders = text_encoders_of(pipeline)
        upcast = must_upcast(family, pipeline.vae)
        parts = Parts(
            TorchEngines(pipeline.unet, cut, capturable=capturable, compiled=compiled),
            Texts(
                [one.tokenizer for one in encoders],
                [TorchText(one, compiled=compiled) for one in encoders],
            ),
            TorchCodec(pipeline.vae, upcast=upcast, compiled=compiled),
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
        concepts: Sequence[str] = (),
        vae: str | Path | None = None,
        variant: str | None = None,
        tome: float | None = None,
        scheduler: "Scheduler | None" = None,
        cut: Cut | None = None,
        backend: str = "onnxruntime",
        dtype: str | torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        target: Target | None = None,
        engine_dir: str | Path = "engines",
        **diffusers_options: Any,
    ) -> Self:
        """Open a model on a backend, building its engines when they are missing.

        Args:
            model: diffusers folder, hub id, `.safetensors` file, or None for the default model.
            base: what completes a `.safetensors` file.
            loras: LoRA files, each as FILE or FILE:SCALE, fused into the weights.
            concepts: files of textual inversion (FILE or FILE:TOKEN) or Custom Diffusion.
            vae: folder or hub id of an autoencoder that replaces the model's own.
            variant: of the folder's weights, such as "fp16".
            tome: ratio of tokens to merge in self-attention (ToMe), such as 0.5.
            scheduler: in place of the model's own.
            cut: where the UNet is cut; by default where the model wants it, or behind its output.
            backend: "torch", "torch.compile", "onnxruntime", "openvino", "tensorrt-rtx" or
                "tensorrt".
            dtype: "fp32", "fp16", "bf16" (OpenVINO), "int8", "fp8" (TensorRT-RTX), or torch's; by
                default fp32, fp16 for TensorRT and bf16 for OpenVINO.
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
            find_checkpoint(model, base, loras, vae, variant, tome, concepts=concepts),
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
    ) -> Self:
        """Open a checkpoint on a backend, building its engines when they are missing.

        Args:
            checkpoint: from `find_checkpoint`.
            cut, backend, dtype, target, engine_dir: as for `from_pretrained`.
            exact: take no engines that were compiled for more than the target: they are slower.
            report: receives a line for each part that is built.
        """
        cut, dtype = cut or checkpoint.cut, dtype or dtypes.default_dtype(backend)
        dtypes.refuse_dtype(backend, dtype)
        if backend in TORCH_BACKENDS:
            return cls._from_torch(checkpoint, cut, dtype, compiled=backend == COMPILED)
        if backend in TENSORRT_BACKENDS and target is None:
            target = make_target(checkpoint, backend, cut)
        calibration = make_calibration(checkpoint) if dtype in dtypes.EIGHT_BITS else None
        request = Request(checkpoint, cut, dtype, backend, target, calibration)
        found = (find_engines if exact else find_covering_engines)(request, engine_dir)
        if found is None:
            report(f"Building {request.folder_name} in {engine_dir}, once.")
        return cls.from_engines(found or build_engines(request, engine_dir, report))

    @classmethod
    def _from_torch(cls, checkpoint: Checkpoint, cut: Cut, dtype: str, *, compiled: bool) -> Self:
        """Loaded into PyTorch, "fp32" or "fp16", on the GPU if there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pipeline = load_pipeline(checkpoint, dtypes.torch_dtype(dtype), device)
        wrapped = cls.from_pipe(pipeline, cut, capturable=True, compiled=compiled)
        wrapped.default_guidance_scale = checkpoint.guidance_scale
        wrapped.preset = checkpoint.preset
        return wrapped

    @classmethod
    def from_single_file(
        cls, path: str | Path, config: str | Path | None = None, **options: Any
    ) -> Self:
        """Open a single-file `.safetensors` checkpoint; options as for `from_pretrained`.

        `config`, diffusers' name for `base`, is the folder or hub id that completes it.
        """
        if config is not None:
            options["base"] = config
        return cls.from_pretrained(path, **options)

    @classmethod
    def from_engines(cls, folder: str | Path) -> Self:
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
