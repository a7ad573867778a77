"""What clients may ask for: OpenAI's images, and the txt2img of Stable Diffusion web front ends."""

import math
import re
import secrets
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from encache.errors import EncacheError
from encache.model.preset import UNSAID, Preset
from encache.runtime.generator import Cost, Generator, Order, cost_of, stride_of
from encache.runtime.jobs import Job
from encache.runtime.plan import make_plan
from encache.runtime.settings import Settings, resolve

Format = Literal["png", "jpeg", "webp"]
_LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Limits:
    """The most that a request may ask for.

    Attributes:
        side: of a picture, in pixels.
        steps: of the full sampler.
        images: of one request.
        prompt: length in characters, of the negative prompt too.
    """

    side: int
    steps: int
    images: int
    prompt: int


class Policy(BaseModel):
    """How pictures are sampled; what is not said is the server's own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    seed: int | None = Field(None, ge=0, le=_LARGEST_SEED, description="Of the first picture.")
    negative_prompt: str | None = None
    steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, description="1 or less turns it off.")
    stride: int | None = Field(None, ge=1, description="Every stride-th call is a key call.")
    key_calls: list[int] | None = Field(None, description="Key calls instead of a stride.")
    blend: str | None = Field(None, description="How other calls follow from the key calls.")

    @property
    def wished(self) -> Preset:
        """What is said of the sampling."""
        return Preset(
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            stride=self.stride,
            key_calls=None if self.key_calls is None else tuple(self.key_calls),
            blend=self.blend,
        )


class OpenAIImages(Policy):
    """OpenAI's request for images, with encache's policy as further fields.

    What encache cannot honour of OpenAI's fields is refused, unless it is the default.
    """

    prompt: str
    model: str | None = Field(None, description="One that GET /v1/models lists.")
    n: int = Field(1, ge=1)
    size: str | None = Field(None, description='"auto", or width and height as "512x512".')
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    output_format: Format | None = "png"
    user: str | None = Field(None, description="Whom the client draws for; not used.")
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: Literal[False] | None = None

    @property
    def sides(self) -> tuple[int | None, int | None]:
        """Height and width, or None for the model's own."""
        if self.size in (None, "auto"):
            return None, None
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", self.size or "", re.ASCII)
        if not match:
            raise EncacheError(f'size must be "auto" or like "512x512", not {self.size!r}.')
        return int(match[2]), int(match[1])


class TextToImage(BaseModel):
    """The web front ends' request; fields that are not listed may hold what means nothing there."""

    model_config = ConfigDict(extra="allow", strict=True)

    prompt: str = ""
    negative_prompt: str | None = None
    seed: int = Field(-1, ge=-1, le=_LARGEST_SEED, description="-1 is any.")
    steps: int | None = Field(None, ge=1)
    cfg_scale: float | None = None
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    batch_size: int = Field(1, ge=1)
    n_iter: int = Field(1, ge=1)
    stride: int | None = Field(None, ge=1)
    key_calls: list[int] | None = None
    blend: str | None = None

    def policy(self) -> Policy:
        """The same in encache's words.

        Raises:
            EncacheError: a further field asks for what encache does not do.
        """
        for name, value in (self.model_extra or {}).items():
            if value not in (None, False, 0, -1, "", [], {}) and name not in _IDLE:
                raise EncacheError(f"{name} cannot be honoured: leave it out.")
        return Policy(
            seed=None if self.seed < 0 else self.seed,
            negative_prompt=self.negative_prompt or None,
            steps=self.steps,
            guidance_scale=self.cfg_scale,
            stride=self.stride,
            key_calls=self.key_calls,
            blend=self.blend,
        )


#: Fields of front ends that say how to do what must be asked for by another field.
_IDLE = {
    *("denoising_strength", "hr_scale", "hr_upscaler", "hr_second_pass_steps", "send_images"),
    *("s_noise", "s_tmin", "s_tmax", "override_settings_restore_afterwards"),
    *("do_not_save_samples", "do_not_save_grid"),
}


@dataclass(frozen=True)
class Intake:
    """What turns requests into orders.

    Attributes:
        generator: knows what can be drawn, and its cost.
        default: how pictures are sampled if a request does not say; a fitted plan, perhaps.
        base: what the server's own options say of the sampling.
        model: what the model says.
        guidance_scale: the model's default.
        limits: the most that a request may ask for.
    """

    generator: Generator
    default: Settings
    base: Preset
    model: Preset
    guidance_scale: float
    limits: Limits

    def settle(self, policy: Policy) -> Settings:
        """The settings of a policy.

        Raises:
            EncacheError: a number is none, or there are too many steps.
        """
        settings, wished = self.default, policy.wished
        names = ("steps", "guidance_scale")
        same = {one: None for one in names if getattr(wished, one) == getattr(settings, one)}
        if replace(wished, **same) != UNSAID:  # else it may be a fitted plan
            settings = resolve(wished.over(self.base), self.model, self.guidance_scale)
        if not math.isfinite(settings.guidance_scale):
            raise EncacheError("guidance_scale must be a finite number.")
        if settings.steps > self.limits.steps:
            raise EncacheError(f"steps may be {self.limits.steps} at most, not {settings.steps}.")
        return settings

    def outline(self, policy: Policy) -> dict[str, Any]:
        """A policy's plan and cost, in numbers for a person.

        Raises:
            EncacheError: it cannot be drawn.
        """
        settings = self.settle(policy)
        solver = self.generator.pipeline.scheduler
        plan = make_plan(solver, settings.steps, settings.policy)
        return {
            "num_calls": plan.num_calls,
            "key_calls": plan.key_calls,
            "stride": stride_of(settings.policy, plan),
            "blend": plan.blend,
            "full_rows": plan.num_calls * settings.rows,
            **vars(cost_of(solver, settings)),
        }

    def take(
        self, prompt: str, policy: Policy, count: int, height: int | None, width: int | None
    ) -> tuple[list[Order], Cost]:
        """The orders of a request, and what each costs.

        Raises:
            EncacheError: it asks for too much, or for what cannot be drawn.
        """
        limits = self.limits
        if count > limits.images:
            raise EncacheError(f"{limits.images} pictures are the most at once, not {count}.")
        for text in (prompt, policy.negative_prompt or ""):
            if len(text) > limits.prompt:
                raise EncacheError(
                    f"Prompts may have {limits.prompt} characters at most, not {len(text)}."
                )
            if not _is_unicode(text):
                raise EncacheError("A prompt is no UTF-8 text.")
        for side in (height, width):
            if side and side > limits.side:
                raise EncacheError(f"A side may have {limits.side} pixels at most, not {side}.")
        seed = secrets.randbelow(2**32) if policy.seed is None else policy.seed
        if seed > _LARGEST_SEED - count:
            raise EncacheError(f"seed {seed} is too large.")
        settings = self.settle(policy)
        default_height, default_width = self.generator.pipeline.spec.picture_size
        size = height or default_height, width or default_width
        jobs = [Job(prompt, seed + one, policy.negative_prompt, *size) for one in range(count)]
        orders = [Order(job, settings) for job in jobs]
        return orders, self.generator.cost(orders[0])


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
