"""Prompts and captions as a model's text encoder takes them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPTokenizer


def tokenize(tokenizer: "CLIPTokenizer", texts: Sequence[str]) -> "Tensor":
    """Token ids [len(texts), L], padded or cut as StableDiffusionPipeline does."""
    return tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
