"""What the denoiser is told beside latents and timestep: prompts, and for XL sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from encache.errors import EncacheError
from encache.runtime.text import Texts

Prompt = str | Sequence[str]


@dataclass(frozen=True)
class Prompts:
    """What a caller says of one branch of the guidance, as in diffusers.

    Attributes:
        prompt: one or several texts.
        prompt_2: for the second text encoder; by default the same.
        embeds: text embeddings [n, L, D] instead.
        pooled: pooled ones [n, P] beside these, where the model reads them.
    """

    prompt: Prompt | None = None
    prompt_2: Prompt | None = None
    embeds: Tensor | None = None
    pooled: Tensor | None = None

    def encode(self, texts: Texts, clip_skip: int = 0) -> dict[str, Tensor]:
        """Text conditions of n rows each.

        Raises:
            EncacheError: both texts and embeddings are given.
        """
        if self.embeds is not None:
            if self.prompt is not None or self.prompt_2 is not None:
                raise EncacheError("Give a prompt as text or as embeddings, not as both.")
            given = {"text": self.embeds, "pooled_text": self.pooled}
            return {name: one for name, one in given.items() if one is not None}
        prompts, second = _listed(self.prompt), _listed(self.prompt_2)
        if second and len(second) != len(prompts):
            raise EncacheError(f"There are {len(prompts)} prompts and {len(second)} second ones.")
        return texts(prompts, clip_skip, second)

    def repeated(self, count: int) -> "Prompts":
        """One text for each of `count` pictures, where there is one for all."""

        def repeat(one: Any) -> Any:
            return one if one is None or len(one) != 1 else one.repeat_interleave(count, 0)

        first, second = _listed(self.prompt), _listed(self.prompt_2)
        return Prompts(
            prompt=None if self.prompt is None else first * (count if len(first) == 1 else 1),
            prompt_2=None if self.prompt_2 is None else second * (count if len(second) == 1 else 1),
            embeds=repeat(self.embeds),
            pooled=repeat(self.pooled),
        )


def encode_prompts(
    texts: Texts,
    wanted: Prompts,
    unwanted: Prompts,
    *,
    guided: bool,
    clip_skip: int = 0,
    empty_is_zero: bool = False,
) -> dict[str, Tensor]:
    """Text conditions [G, n, ...] by name, those of the unwanted first.

    Args:
        texts: the model's text encoders.
        wanted, unwanted: the prompts; the latter count with guidance alone.
        guided: whether G is 2.
        clip_skip: last layers to leave out for what is wanted; diffusers keeps them for the rest.
        empty_is_zero: whether no negative prompt means zeros, as Stable Diffusion XL has it.

    Raises:
        EncacheError: the arguments contradict each other.
    """
    if wanted.prompt is None and wanted.embeds is None:
        raise EncacheError("Give either prompt or prompt_embeds.")
    if wanted.prompt is not None and not _listed(wanted.prompt):
        raise EncacheError("The list of prompts is empty.")
    if not guided:
        return {name: one[None] for name, one in wanted.encode(texts, clip_skip).items()}
    count = len(_listed(wanted.prompt) if wanted.embeds is None else wanted.embeds)
    said_nothing = unwanted.prompt is None and unwanted.embeds is None
    if said_nothing and empty_is_zero:
        positive = wanted.encode(texts, clip_skip)
        return {name: torch.stack([one * 0, one]) for name, one in positive.items()}
    if said_nothing:
        unwanted = replace(unwanted, prompt="")
    unwanted = unwanted.repeated(count)
    if clip_skip or wanted.embeds is not None or unwanted.embeds is not None:
        negative, positive = unwanted.encode(texts), wanted.encode(texts, clip_skip)
    else:  # all at once: a text encoder takes hardly longer for two prompts than for one
        negative, positive = _encode_together(texts, unwanted, wanted)
    return {name: _stack(negative.get(name), one) for name, one in positive.items()}


def _encode_together(
    texts: Texts, unwanted: Prompts, wanted: Prompts
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    first = [*_listed(unwanted.prompt), *_listed(wanted.prompt)]
    second: list[str] = []
    if wanted.prompt_2 or unwanted.prompt_2:
        for one in (unwanted, wanted):
            second += _listed(one.prompt_2 or one.prompt)
    encoded = Prompts(first, second).encode(texts)
    stop = len(_listed(unwanted.prompt))
    negative = {name: one[:stop] for name, one in encoded.items()}
    return negative, {name: one[stop:] for name, one in encoded.items()}


def _stack(negative: Tensor | None, positive: Tensor) -> Tensor:
    if negative is None:
        raise EncacheError("Give pooled embeddings for the negative prompt too, or for neither.")
    if len(negative) != len(positive):
        raise EncacheError(
            f"There are {len(positive)} prompts and {len(negative)} negative ones; give one for "
            "all, or one each."
        )
    if negative.shape != positive.shape:
        raise EncacheError(
            f"The prompt's embeddings are {list(positive.shape[1:])} and the negative ones "
            f"{list(negative.shape[1:])}: make both equally long."
        )
    return torch.stack([negative, positive])


@dataclass(frozen=True)
class Sizes:
    """Stable Diffusion XL's sizes and crop (height, width); None is the picture's own size.

    Attributes:
        original: of the picture before it was resized.
        crop: its top left corner.
        target: what is asked for.
    """

    original: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None

    def ids(self, size: tuple[int, int]) -> Tensor:
        """As the denoiser reads them [6], for a picture of this size."""
        return torch.tensor([*(self.original or size), *self.crop, *(self.target or size)])


def time_ids(
    wanted: Sizes, unwanted: Sizes, size: tuple[int, int], num_guided: int, num_images: int
) -> Tensor:
    """Sizes [G, n, 6] of pictures of one size.

    Where nothing is said of the unwanted, it has the wanted's.

    Raises:
        EncacheError: one of the unwanted's sizes is said without the other: diffusers ignores it.
    """
    if unwanted != Sizes() and not (unwanted.original and unwanted.target):
        raise EncacheError("Give both negative_original_size and negative_target_size, or neither.")
    said = unwanted if unwanted != Sizes() else wanted
    branches = [said, wanted][-num_guided:]
    return torch.stack([one.ids(size).expand(num_images, -1) for one in branches])


@dataclass(frozen=True)
class XLArguments:
    """What diffusers' call of Stable Diffusion XL takes besides Stable Diffusion's, named as there.

    Attributes:
        prompt_2, negative_prompt_2: for the second text encoder; by default the same as the first.
        pooled_prompt_embeds, negative_pooled_prompt_embeds: [n, P], beside embeddings of prompts.
        original_size, crops_coords_top_left, target_size, negative_original_size,
            negative_crops_coords_top_left, negative_target_size: see `Sizes`.
    """

    prompt_2: Prompt | None = None
    negative_prompt_2: Prompt | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_crops_coords_top_left: tuple[int, int] = (0, 0)
    negative_target_size: tuple[int, int] | None = None

    @classmethod
    def read(cls, arguments: Mapping[str, Any], of_this_model: bool) -> "XLArguments":
        """Read a call's further arguments.

        Raises:
            EncacheError: encache takes no such argument, or this model is no Stable Diffusion XL.
        """
        known = {one.name for one in fields(cls)}
        for name, value in arguments.items():
            if name not in known:
                raise EncacheError(f"encache's pipelines take no argument {name!r}.")
            if not (of_this_model or value is None or value == (0, 0)):
                raise EncacheError(f"{name} belongs to Stable Diffusion XL; this model has none.")
        return cls(**arguments)

    @property
    def sizes(self) -> Sizes:
        """Of what is wanted."""
        return Sizes(self.original_size, self.crops_coords_top_left, self.target_size)

    @property
    def negative_sizes(self) -> Sizes:
        """Of what is to be avoided."""
        return Sizes(
            self.negative_original_size,
            self.negative_crops_coords_top_left,
            self.negative_target_size,
        )


def _listed(prompt: Any) -> list[Any]:
    if prompt is None:
        return []
    return list(prompt) if isinstance(prompt, list | tuple) else [prompt]
