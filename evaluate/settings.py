"""Which ways to sample are compared, and on which prompts and seeds."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from encache.errors import EncacheError
from encache.files import read_lines, read_text
from encache.model.checkpoint import Checkpoint
from encache.model.preset import UNSAID
from encache.model.spec import DEFAULT_CUT, Cut, rows_per_picture
from encache.runtime.blend import DEFAULT_BLEND, DEFAULT_STRIDE, Blend
from encache.runtime.plan import Plan
from encache.runtime.settings import Policy, resolve


@dataclass(frozen=True)
class Setting:
    """One way to sample.

    Attributes:
        model: label of the checkpoint.
        scheduler: option name of the solver; "" for the model's own.
        steps: num_inference_steps.
        cut, blend, stride, key_calls, prior_noise: the caching policy; stride 1 caches nothing.
        guidance_scale: None for the protocol's.
        fitted: a plan that was fitted to the model, in place of a policy.
    """

    model: str
    scheduler: str
    steps: int
    cut: Cut = DEFAULT_CUT
    blend: Blend = DEFAULT_BLEND
    stride: int = 1
    key_calls: tuple[int, ...] | None = None
    prior_noise: bool = False
    guidance_scale: float | None = None
    fitted: Plan | None = None

    @property
    def plain(self) -> bool:
        """Whether the encoder runs at every call."""
        return self.stride == 1 and self.key_calls is None and self.fitted is None

    @property
    def policy(self) -> Policy:
        """How it is cached."""
        if self.fitted:
            return Policy(cut=self.cut, plan=self.fitted)
        # Plain sampling has each call's own features: a second slot would cost for naught.
        blend: Blend = "reuse" if self.plain else self.blend
        return Policy(self.stride, self.key_calls, blend, self.prior_noise, self.cut)

    @property
    def name(self) -> str:
        """What it is, in a few words that differ from those of any other setting."""
        words = [self.model, self.scheduler, f"{self.steps} steps"]
        if self.fitted:
            words += [f"fitted plan of {self.fitted.num_evaluations} runs", self.fitted.hash()[:6]]
        elif not self.plain:
            keys = self.key_calls and "keys " + " ".join(map(str, self.key_calls))
            words += [self.cut, self.blend, keys or f"stride {self.stride}"]
        words += ["prior noise"] * self.prior_noise
        if self.guidance_scale is not None:
            words.append(f"guidance {self.guidance_scale:g}")
        return ", ".join(word for word in words if word)


@dataclass(frozen=True)
class Protocol:
    """The pictures that every setting draws: number i has prompt i (cyclic) and seed i.

    Attributes:
        guidance_scale: 1 or less turns guidance off.
        height, width: in pixels; None for the model's own size.
        batch_size: pictures sampled together.
        max_decode_batch: most rows in one decoder run, which bounds memory and changes nothing.
    """

    prompts: tuple[str, ...]
    num_images: int
    guidance_scale: float = 7.5
    height: int | None = None
    width: int | None = None
    batch_size: int = 16
    max_decode_batch: int | None = None

    @property
    def batches(self) -> list[range]:
        """Indices of the pictures, batch by batch."""
        starts = range(0, self.num_images, self.batch_size)
        return [range(i, min(i + self.batch_size, self.num_images)) for i in starts]

    def guidance_of(self, setting: Setting) -> float:
        """The setting's own guidance, or that of all."""
        return self.guidance_scale if setting.guidance_scale is None else setting.guidance_scale

    def rows_of(self, setting: Setting) -> int:
        """Rows of the UNet per picture: two with guidance."""
        return rows_per_picture(self.guidance_of(setting))

    def prompts_of(self, pictures: range) -> list[str]:
        """Prompts of the pictures with these indices."""
        return [self.prompts[index % len(self.prompts)] for index in pictures]


def read_prompts(path: Path) -> list[str]:
    """One prompt per line, or the captions of a COCO annotation file (.json) in a fixed shuffle.

    Raises:
        EncacheError: there is none, or the file cannot be understood.
    """
    prompts = _coco_captions(path) if path.suffix.lower() == ".json" else read_lines(path)
    if not prompts:
        raise EncacheError(f"{path} holds no prompt.")
    return prompts


def _coco_captions(path: Path) -> list[str]:
    text = read_text(path)
    try:
        captions = [one["caption"].strip() for one in json.loads(text)["annotations"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EncacheError(f"{path} is no file of COCO captions ({error}).") from error
    prompts = [caption for caption in captions if caption]
    random.Random(0).shuffle(prompts)
    return prompts


def own_setting(label: str, checkpoint: Checkpoint) -> Setting:
    """How weights that were trained for a plan want to be sampled, as their header says."""
    own = resolve(UNSAID, checkpoint.preset, checkpoint.guidance_scale)
    return Setting(
        model=label,
        scheduler="",
        steps=own.steps,
        cut=own.policy.cut,
        blend=own.policy.blend,
        stride=own.policy.stride or (1 if own.policy.key_calls else min(DEFAULT_STRIDE, own.steps)),
        key_calls=own.policy.key_calls,
        prior_noise=own.policy.prior_noise,
        guidance_scale=own.guidance_scale,
    )


def cached_settings(
    fulls: Sequence[Setting],
    cuts: Sequence[Cut],
    blends: Sequence[Blend],
    strides: Sequence[int],
    key_calls: Sequence[tuple[int, ...]] = (),
    prior_noises: Sequence[bool] = (False,),
) -> list[Setting]:
    """Every full sampler with every cut, blend, stride or list of key calls, and noise."""
    keys = [*((stride, None) for stride in strides), *((1, calls) for calls in key_calls)]
    return [
        replace(full, cut=cut, blend=blend, stride=stride, key_calls=calls, prior_noise=prior_noise)
        for full, cut, blend, prior_noise, (stride, calls) in product(
            fulls, cuts, blends, prior_noises, keys
        )
    ]
