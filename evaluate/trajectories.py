"""What a fitted plan is held against: the full sampler's latents before every call.

They are drawn by the engines, a few pictures at a time, and kept in a store, so that a fit which
is stopped goes on, and several fits share them. Pictures fitted on and pictures held out differ in
prompt and in seed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encache import __version__
from encache.evaluate.fit import Batch
from encache.evaluate.store import Store
from encache.progress import progress
from encache.runtime.conditions import Prompts, XLArguments, encode_prompts
from encache.runtime.jobs import Job, draw, noise_of
from encache.runtime.pipeline import EncachePipeline
from encache.runtime.plan import make_plan
from encache.runtime.schedulers import full_config
from encache.runtime.settings import FULL, Settings
from encache.runtime.solver import count_calls

#: Pictures drawn together, and the most that a stop loses.
BATCH_SIZE = 8
#: Seeds, apart from each other and from those of `encache-eval`, which begin at 0.
FIRST_SEED, FIRST_HELD_OUT_SEED = 1_000_000, 2_000_000


@dataclass(frozen=True)
class Pictures:
    """Number i has prompt i (cyclic) and the first seed plus i."""

    prompts: tuple[str, ...]
    first_seed: int
    number: int

    @property
    def batches(self) -> list[range]:
        """Their numbers, batch by batch."""
        starts = range(0, self.number, BATCH_SIZE)
        return [range(start, min(start + BATCH_SIZE, self.number)) for start in starts]

    def jobs(self, numbers: range) -> list[Job]:
        """What is drawn for some of them."""
        count = len(self.prompts)
        return [Job(self.prompts[one % count], self.first_seed + one) for one in numbers]


def split_prompts(
    prompts: Sequence[str], number: int, number_held_out: int
) -> tuple[Pictures, Pictures]:
    """The pictures to fit on, and those held out: every fourth prompt, and other seeds.

    A single prompt can only be held out by its seeds.
    """
    different = list(dict.fromkeys(prompts))
    shuffled = random.Random(0).sample(different, len(different))
    held_out = shuffled[::4]
    fitted = [one for index, one in enumerate(shuffled) if index % 4] or shuffled
    return (
        Pictures(tuple(fitted), FIRST_SEED, number),
        Pictures(tuple(held_out), FIRST_HELD_OUT_SEED, number_held_out),
    )


class Trajectories:
    """The full sampler's way from noise to latents, for some pictures.

    Args:
        pipeline: of an engine without a cut; its scheduler is the solver.
        fingerprint: of the model.
        steps: num_inference_steps.
        guidance_scale: 1 or less is without.
        store: where they are kept.
    """

    def __init__(
        self,
        pipeline: EncachePipeline,
        fingerprint: str,
        steps: int,
        guidance_scale: float,
        store: Store,
    ) -> None:
        self.pipeline = pipeline
        self.fingerprint = fingerprint
        self.settings = Settings(steps, guidance_scale, FULL)
        self.store = store

    @property
    def num_calls(self) -> int:
        """Of the full sampler."""
        return count_calls(self.pipeline.scheduler, self.settings.steps)

    def describe(self, pictures: Pictures, numbers: range) -> dict[str, Any]:
        """All that decides the latents of a batch."""
        return {
            "trajectories": self.fingerprint,
            "scheduler": full_config(self.pipeline.scheduler),
            "steps": self.settings.steps,
            "guidance_scale": self.settings.guidance_scale,
            "engines": dict(self.pipeline.engines.identity),
            "versions": [__version__, *map(version, ("torch", "diffusers", "onnxruntime"))],
            "jobs": [(one.prompt, one.seed) for one in pictures.jobs(numbers)],
        }

    def draw_missing(self, *wanted: Pictures) -> None:
        """Draw what is not in the store yet, with a progress bar."""
        batches = [(one, numbers) for one in wanted for numbers in one.batches]
        with progress(total=sum(one.number for one in wanted), desc="full sampler") as bar:
            for pictures, numbers in batches:
                self.latents(pictures, numbers)
                bar.update(len(numbers))

    def latents(self, pictures: Pictures, numbers: range) -> Tensor:
        """Before every call, and the result [N + 1, n, C, h, w], float32."""
        stored = self.store.get(
            self.describe(pictures, numbers), lambda: self._draw(pictures.jobs(numbers))
        )
        return torch.from_numpy(stored["latents"]).float()

    def batch(self, pictures: Pictures, numbers: range) -> Batch:
        """What a fit needs of some pictures."""
        jobs = pictures.jobs(numbers)
        noise = noise_of(self.pipeline, jobs).to(self.pipeline.device)
        texts = encode_prompts(
            self.pipeline.texts,
            Prompts([job.prompt for job in jobs]),
            Prompts(),
            guided=self.settings.rows > 1,
            empty_is_zero=self.pipeline.empty_is_zero,
        )
        conditions = self.pipeline.complete(texts, XLArguments(), noise)
        rows = {name: one.flatten(0, 1) for name, one in conditions.items()}
        return Batch(noise, rows, lambda: self.latents(pictures, numbers).to(noise.device))

    def _draw(self, jobs: list[Job]) -> dict[str, np.ndarray]:
        plan = make_plan(self.pipeline.scheduler, self.settings.steps)
        first = noise_of(self.pipeline, jobs) * plan.samples[0][0]
        kept = [first]

        def keep(_: Any, __: int, ___: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            kept.append(tensors["latents"].cpu())
            return {}

        draw(self.pipeline, jobs, self.settings, output_type="latent", callback_on_step_end=keep)
        return {"latents": torch.stack(kept).half().numpy()}
