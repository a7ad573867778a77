"""Teacher pairs: noise and prompt, and the latents that the full sampler makes of them.

They lie in a folder as shards of `SHARD` pairs. Noise and prompt are functions of the seed and the
pair's number, so only latents are stored, and any number of runs may share or prolong a folder.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import Tensor

from encache.errors import EncacheError
from encache.files import check_writable, digest_of_lines, parse_json, read_lines, write_json
from encache.model.checkpoint import Checkpoint, default_model
from encache.model.spec import ImageSpec
from encache.progress import progress
from encache.runtime.pipeline import EncachePipeline
from encache.runtime.schedulers import full_config
from encache.runtime.solver import count_calls
from encache.train.emoji import STYLES
from encache.train.loop import generator_of
from encache.train.weights import write_tensors

#: Pairs per file. A stop loses those of one file, or of one batch where that is larger.
SHARD = 64
#: Says what the folder holds.
_FACTS = "pairs.json"


@dataclass(frozen=True)
class Teacher:
    """How pairs are drawn.

    Attributes:
        model: fingerprint of the checkpoint.
        scheduler: its solver's whole config, as JSON.
        prompts: drawn from with replacement.
        steps: num_inference_steps of the full sampler.
        guidance_scale: that the student learns to do without; 1 or less is none.
        stride: of the output cache that speeds the drawing up, with the blend "interpolate";
            1 runs every call.
        calls: how many calls were made when the latents are kept, the last one being all.
        shape: of the latents (C, h, w).
        seed: of noise and prompts.
        precision: that its UNet is run in, "fp16" or "no".
    """

    model: str
    scheduler: str
    prompts: tuple[str, ...]
    steps: int
    guidance_scale: float
    stride: int
    calls: tuple[int, ...]
    shape: tuple[int, int, int]
    seed: int = 0
    precision: str = "no"

    @property
    def facts(self) -> dict[str, Any]:
        """What tells it from another, as JSON holds it; of the prompts only a digest."""
        return json.loads(json.dumps({**asdict(self), "prompts": digest_of_lines(self.prompts)}))

    def question(self, index: int) -> tuple[str, Tensor]:
        """Prompt and unit noise [C, h, w] of one pair."""
        draw = generator_of(self.seed, index)
        prompt = self.prompts[int(torch.randint(len(self.prompts), (), generator=draw))]
        return prompt, torch.randn(self.shape, generator=draw)


def make_teacher(
    checkpoint: Checkpoint,
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance_scale: float | None,
    stride: int,
    seed: int,
    precision: str = "no",
    compared_at: Sequence[int] = (),
) -> Teacher:
    """The full sampler of a loaded checkpoint; see `Teacher`.

    Args:
        guidance_scale: None for the checkpoint's own.
        compared_at: calls after which latents are kept besides the last.
    """
    spec = ImageSpec.of(pipeline.unet.config, pipeline.vae.config)
    num_calls = count_calls(pipeline.scheduler, steps)
    return Teacher(
        model=checkpoint.fingerprint,
        scheduler=json.dumps(full_config(pipeline.scheduler)),
        prompts=tuple(prompts),
        steps=steps,
        guidance_scale=checkpoint.guidance_scale if guidance_scale is None else guidance_scale,
        stride=stride,
        calls=tuple(sorted({*compared_at, num_calls})),
        shape=(spec.channels, *spec.sample_size),
        seed=seed,
        precision=precision,
    )


def read_prompts(path: Path | None, checkpoint: Checkpoint) -> list[str]:
    """The lines of a file; without one, what the default model knows, half of it in a style.

    Raises:
        EncacheError: there is no prompt.
    """
    if path:
        prompts = read_lines(path)
    elif checkpoint.folder == default_model():
        words = ("", "", "", *(f"{style.word} " for style in STYLES))
        names = read_lines(default_model() / "prompts.txt")
        prompts = [f"{word}{name}" for name in names for word in words]
    else:
        raise EncacheError("Prompts to draw are missing: give --prompts, a text file of them.")
    if not prompts:
        raise EncacheError(f"{path} holds no prompt.")
    return prompts


class Pairs:
    """The pairs of one teacher in a folder.

    Raises:
        EncacheError: the folder holds another teacher's.
    """

    def __init__(self, folder: Path, teacher: Teacher) -> None:
        self.folder = folder
        self.teacher = teacher
        self._stored_calls = self._read_facts()
        self._kept = [self._stored_calls.index(call) for call in teacher.calls]

    def draw_missing(
        self,
        number: int,
        open_pipeline: Callable[[], EncachePipeline],
        batch_size: int,
        accelerator: Accelerator,
    ) -> None:
        """Draw the first `number` pairs as far as they are not there; processes share the work.

        Args:
            number: how many.
            open_pipeline: opens the teacher without a cut; not called when nothing is missing.
            batch_size: pictures at once.
            accelerator: the processes.
        """
        shards = range(accelerator.process_index, -(-number // SHARD), accelerator.num_processes)
        mine = [shard for shard in shards if not self._path(shard).exists()]
        if mine:
            check_writable(self.folder)
            self._write_facts()
            self._read_facts()  # which another run may have written a moment ago
            pipeline = open_pipeline()
            pipeline.set_progress_bar_config(disable=True)
            with progress(
                desc="teacher pairs",
                total=len(mine) * SHARD,
                disable=not accelerator.is_main_process,
            ) as bar:
                at_once = -(-batch_size // SHARD)
                for first in range(0, len(mine), at_once):
                    together = mine[first : first + at_once]
                    # Those that are not there by now, from another run.
                    missing = [shard for shard in together if not self._path(shard).exists()]
                    drawn = self._draw_shards(pipeline, missing, batch_size, bar)
                    for shard, latents in zip(missing, drawn, strict=True):
                        write_tensors({"latents": latents.half()}, self._path(shard), {})
                    bar.update((len(together) - len(missing)) * SHARD)
        accelerator.wait_for_everyone()

    def latents(self, index: int) -> Tensor:
        """What the teacher makes of a pair's question, after each of its calls [E, C, h, w]."""
        shard, row = divmod(index, SHARD)
        path, shape = self._path(shard), [SHARD, len(self._stored_calls), *self.teacher.shape]
        try:
            with safe_open(path, "pt") as file:
                stored = file.get_slice("latents")
                if stored.get_shape() != shape:
                    raise SafetensorError(f"it holds {stored.get_shape()}, not {shape}")
                latents = stored[row]
        except (OSError, SafetensorError) as error:
            raise EncacheError(
                f"{path} cannot be used ({error}): delete it, and the same command draws it again."
            ) from error
        return latents[self._kept].float()

    def _draw_shards(
        self, pipeline: EncachePipeline, shards: Sequence[int], batch_size: int, bar: Any
    ) -> Sequence[Tensor]:
        """Latents [SHARD, E, C, h, w] of each shard."""
        pairs = [index for shard in shards for index in range(shard * SHARD, (shard + 1) * SHARD)]
        parts = []
        for first in range(0, len(pairs), batch_size):
            batch = pairs[first : first + batch_size]
            parts.append(self._draw(pipeline, batch))
            bar.update(len(batch))
        return torch.cat(parts).split(SHARD) if parts else ()

    def _draw(self, pipeline: EncachePipeline, pairs: Sequence[int]) -> Tensor:
        """Latents [n, E, C, h, w] of some pairs, after each of the stored calls."""
        prompts, noise = zip(*map(self.teacher.question, pairs), strict=True)
        kept: dict[int, Tensor] = {}

        def keep(_: Any, call: int, __: Any, tensors: dict[str, Tensor]) -> None:
            if call + 1 in self._stored_calls:
                kept[call + 1] = tensors["latents"].cpu()

        pipeline(
            list(prompts),
            latents=torch.stack(noise),
            num_inference_steps=self.teacher.steps,
            guidance_scale=self.teacher.guidance_scale,
            stride=self.teacher.stride,
            blend="interpolate" if self.teacher.stride > 1 else "reuse",
            output_type="latent",
            callback_on_step_end=keep,
        )
        return torch.stack([kept[call] for call in self._stored_calls], 1)

    def _path(self, shard: int) -> Path:
        return self.folder / f"pairs-{shard:06d}.safetensors"

    def _write_facts(self) -> None:
        if not (self.folder / _FACTS).exists():
            write_json(self.folder / _FACTS, self.teacher.facts)

    def _read_facts(self) -> Sequence[int]:
        """The calls after which latents are stored; all that this teacher needs are among them."""
        path = self.folder / _FACTS
        if not path.exists():
            if next(self.folder.glob("pairs-*.safetensors"), None):
                raise EncacheError(
                    f"{self.folder} holds pairs, but no {_FACTS} that says of which teacher. "
                    "Choose another --pairs-dir, or delete it."
                )
            return self.teacher.calls
        try:
            theirs = dict(parse_json(path.read_bytes()))
            stored = tuple(map(int, theirs["calls"]))
        except (ValueError, TypeError, KeyError) as error:
            raise EncacheError(f"{path} is damaged ({error}). Choose another folder.") from error
        ours = self.teacher.facts
        different = [name for name in ours if name != "calls" and theirs.get(name) != ours[name]]
        if different or not set(ours["calls"]) <= set(stored):
            raise EncacheError(
                f"{self.folder} holds pairs of another teacher; it differs in "
                f"{', '.join(different) or 'calls'}. Choose another --pairs-dir, or delete it."
            )
        return stored
