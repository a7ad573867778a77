"""Draw the protocol's pictures with every setting, and measure each against the full sampler."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from encache import __version__
from encache.contract.dtypes import torch_dtype
from encache.evaluate.drift import measure_drift
from encache.evaluate.fidelity import psnr, relative_error, ssim
from encache.evaluate.results import Drift
from encache.evaluate.settings import Protocol, Setting
from encache.evaluate.store import Arrays, Store, join
from encache.model.arithmetic import Arithmetic, count_arithmetic
from encache.model.checkpoint import Checkpoint
from encache.model.loading import load_pipeline
from encache.model.spec import Cut, ImageSpec
from encache.runtime.jobs import Job, draw
from encache.runtime.pipeline import EncachePipeline
from encache.runtime.plan import Plan, make_plan
from encache.runtime.schedulers import make_scheduler
from encache.runtime.settings import Settings

if TYPE_CHECKING:
    from encache.evaluate.extractors import ClipScorer, Extracted, Extractor


@dataclass(frozen=True)
class Backend:
    """What runs the UNet: "torch" on a device, or "onnxruntime" with engines in a folder."""

    name: str = "torch"
    dtype: str = "fp32"
    device: str = "cpu"
    engine_dir: Path = Path("engines")


class Model:
    """One checkpoint on a backend, opened when it is first needed."""

    def __init__(self, checkpoint: Checkpoint, backend: Backend) -> None:
        self.checkpoint = checkpoint
        self.backend = backend
        self._pipelines: dict[Cut, EncachePipeline] = {}
        self._arithmetic: dict[tuple[Cut, tuple[int, int]], Arithmetic] = {}

    @cached_property
    def diffusers(self) -> Any:
        """The undivided pipeline, on the backend's device."""
        if self.backend.dtype == "fp32":
            torch.backends.cudnn.allow_tf32 = False  # it would put a floor under small errors
        dtype = torch_dtype(self.backend.dtype)
        return load_pipeline(self.checkpoint, dtype, self.backend.device)

    @cached_property
    def spec(self) -> ImageSpec:
        """How its pictures and latents relate."""
        return ImageSpec.of(self.diffusers.unet.config, self.diffusers.vae.config)

    def pipeline(self, cut: Cut) -> EncachePipeline:
        """The model at this cut."""
        if cut not in self._pipelines:
            self._pipelines[cut] = self._open(cut)
            self._pipelines[cut].set_progress_bar_config(disable=True)
        return self._pipelines[cut]

    def _open(self, cut: Cut) -> EncachePipeline:
        if self.backend.name == "torch":
            return EncachePipeline.from_pipe(self.diffusers, cut)
        return EncachePipeline.from_checkpoint(
            self.checkpoint,
            cut=cut,
            backend=self.backend.name,
            dtype=self.backend.dtype,
            engine_dir=self.backend.engine_dir,
        )

    def scheduler(self, setting: Setting) -> Any:
        """The setting's solver."""
        own = self.diffusers.scheduler
        return make_scheduler(setting.scheduler, own) if setting.scheduler else own

    def plan(self, setting: Setting) -> Plan:
        """What the setting runs."""
        return make_plan(self.scheduler(setting), setting.steps, setting.policy)

    def arithmetic(self, cut: Cut, protocol: Protocol) -> Arithmetic:
        """Of one row of one call."""
        size = self.spec.latent_size(protocol.height, protocol.width)
        if (cut, size) not in self._arithmetic:
            length = self.diffusers.tokenizer.model_max_length
            self._arithmetic[cut, size] = count_arithmetic(self.diffusers.unet, cut, *size, length)
        return self._arithmetic[cut, size]


class Evaluation:
    """The settings' pictures and measurements, batch by batch, kept in a store."""

    def __init__(
        self,
        models: Mapping[str, Model],
        protocol: Protocol,
        store: Store,
        extractor: "Extractor | None" = None,
        clip: "ClipScorer | None" = None,
    ) -> None:
        self.models = models
        self.protocol = protocol
        self.store = store
        self.extractor = extractor
        self.clip = clip
        self._warm: set[tuple[str, Cut]] = set()
        # The reference and the setting at hand: each is compared, extracted and shown.
        self.pictures = lru_cache(maxsize=2)(self._decode)

    def latents(self, setting: Setting, pictures: range) -> Arrays:
        """`latents` [n, 4, h, w] float32 and `seconds` (of the whole batch) for one batch."""
        model = self.models[setting.model]

        def sample() -> Arrays:
            pipeline = model.pipeline(setting.cut)
            if (setting.model, setting.cut) not in self._warm:
                short = replace(setting, steps=2, stride=1, key_calls=None, fitted=None)
                self._sample(pipeline, short, pictures)
                self._warm.add((setting.model, setting.cut))
            start = time.perf_counter()
            latents = self._sample(pipeline, setting, pictures)
            seconds = time.perf_counter() - start
            return {"latents": latents, "seconds": np.array(seconds)}

        return self.store.get(self._describe(setting, pictures), sample)

    def compare(self, setting: Setting, reference: Setting, pictures: range) -> Arrays:
        """How far one batch is from the reference's: `latent_error`, `psnr`, `ssim` [n] each.

        With an extractor that has layers also `perceptual` [n].
        """
        description = {
            "compared": self._describe(setting, pictures),
            "reference": self._describe(reference, pictures),
        }
        found = self.store.get(description, lambda: self._compare(setting, reference, pictures))
        if not (self.extractor and self.extractor.layers):
            return found
        seen = {**description, "extractor": self.extractor.name}
        return {
            **found,
            **self.store.get(seen, lambda: self._perceive(setting, reference, pictures)),
        }

    def compare_all(self, setting: Setting, reference: Setting) -> Arrays:
        """What `compare` finds in all batches, joined."""
        return join(self.compare(setting, reference, one) for one in self.protocol.batches)

    def extract(self, setting: Setting, pictures: range) -> Arrays:
        """What the networks see in one batch, as far as there are any.

        `features` [n, D], `probabilities`, `spatial` of the extractor, `clip_score` [n] of CLIP.
        """
        drawn = {"extracted": self._describe(setting, pictures)}
        found: dict[str, np.ndarray] = {}
        if extractor := self.extractor:
            found |= self.store.get(
                {**drawn, "extractor": extractor.name},
                lambda: _by_name(extractor(self.pictures(setting, pictures))),
            )
        if clip := self.clip:
            prompts = self.protocol.prompts_of(pictures)
            found |= self.store.get(
                {**drawn, "clip": clip.name},
                lambda: {"clip_score": clip(self.pictures(setting, pictures), prompts).numpy()},
            )
        return found

    def extract_all(self, setting: Setting) -> Arrays:
        """What `extract` finds in all batches, joined."""
        return join(self.extract(setting, one) for one in self.protocol.batches)

    def drift(self, full: Setting, num_images: int = 2) -> Drift:
        """How fast the features at the cut "mid" change over the calls of the full sampler.

        Few pictures are enough, and the features of many calls are kept at once.
        """
        pictures = range(min(num_images, self.protocol.num_images))

        def measure() -> Arrays:
            model = self.models[full.model]
            # By PyTorch on any backend, which needs no engines for a cut that nobody asked for.
            pipeline = EncachePipeline.from_pipe(model.diffusers, "mid")
            pipeline.scheduler = model.scheduler(full)
            found = measure_drift(
                pipeline,
                self.protocol.prompts_of(pictures),
                pictures,
                height=self.protocol.height,
                width=self.protocol.width,
                num_inference_steps=full.steps,
                guidance_scale=self.protocol.guidance_of(full),
            )
            return {"drift": np.array(json.dumps(asdict(found)))}

        stored = self.store.get({"drift": self._describe(full, pictures)}, measure)
        return Drift(**json.loads(stored["drift"].item()))

    def _decode(self, setting: Setting, pictures: range) -> Tensor:
        """Decoded pictures [n, 3, H, W] in [0, 1] of one batch."""
        latents = torch.from_numpy(self.latents(setting, pictures)["latents"])
        pipeline = self.models[setting.model].pipeline(setting.cut)
        latents = latents.nan_to_num(0, 0, 0).to(pipeline.engines.device)
        return pipeline.decode(latents, "pt").float().cpu()

    def _compare(self, setting: Setting, reference: Setting, pictures: range) -> Arrays:
        ours, theirs = (self.latents(one, pictures)["latents"] for one in (setting, reference))
        wanted, drawn = self.pictures(reference, pictures), self.pictures(setting, pictures)
        return {
            "latent_error": relative_error(ours, theirs),
            "psnr": psnr(drawn.numpy(), wanted.numpy()),
            "ssim": ssim(drawn, wanted).numpy(),
        }

    def _perceive(self, setting: Setting, reference: Setting, pictures: range) -> Arrays:
        assert self.extractor
        wanted, drawn = self.pictures(reference, pictures), self.pictures(setting, pictures)
        return {"perceptual": self.extractor.distance(drawn, wanted).numpy()}

    def _sample(self, pipeline: EncachePipeline, setting: Setting, pictures: range) -> np.ndarray:
        pipeline.scheduler = self.models[setting.model].scheduler(setting)
        size = self.protocol.height, self.protocol.width
        prompts = self.protocol.prompts_of(pictures)
        jobs = [Job(*one, None, *size) for one in zip(prompts, pictures, strict=True)]
        settings = Settings(setting.steps, self.protocol.guidance_of(setting), setting.policy)
        most = self.protocol.max_decode_batch
        latents = draw(pipeline, jobs, settings, output_type="latent", max_decode_batch=most)
        return latents.cpu().numpy()  # waits for the device

    def _describe(self, setting: Setting, pictures: range) -> dict[str, Any]:
        """All that determines the setting's latents, and not what their model is called."""
        model = self.models[setting.model]
        return {
            "checkpoint": model.checkpoint.fingerprint,
            "plan": model.plan(setting).hash(),
            "cut": setting.cut,
            "versions": [__version__, *map(version, ("torch", "diffusers", "onnxruntime"))],
            "backend": model.backend.name,
            "dtype": model.backend.dtype,
            "device": model.backend.device,
            "prompts": self.protocol.prompts_of(pictures),
            "seeds": [pictures.start, pictures.stop],
            "guidance_scale": self.protocol.guidance_of(setting),
            "size": [self.protocol.height, self.protocol.width],
        }


def _by_name(extracted: "Extracted") -> Arrays:
    return {name: one.numpy() for name, one in vars(extracted).items() if one is not None}
