"""Prompts and captions as a model's text encoder takes them."""

import copy
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTokenizer


def with_length(tokenizer: "CLIPTokenizer", text_encoder: "CLIPTextModel") -> "CLIPTokenizer":
    """The tokenizer, or a copy whose prompts are as long as its text encoder can read.

    Tokenizers saved without a length take any number of tokens (1e30), and some say too many.
    """
    length = text_encoder.config.max_position_embeddings
    if tokenizer.model_max_length <= length:
        return tokenizer
    bounded = copy.deepcopy(tokenizer)
    bounded.model_max_length = length
    return bounded


def text_length(pipeline: Any) -> int:
    """How many tokens the denoiser of a diffusers pipeline is told.

    CLIP's are 77, of which DeepFloyd-IF takes as many from a T5 that could read more.
    """
    tokenizers = (getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2"))
    return min([77, *(one.model_max_length for one in tokenizers if one is not None)])


#: A tokenizer keeps the padding and truncation of its latest call, so threads take turns.
TOKENIZING = threading.Lock()


def tokenize(tokenizer: "CLIPTokenizer", texts: Sequence[str]) -> "Tensor":
    """Token ids [len(texts), L], padded or cut as StableDiffusionPipeline does."""
    return tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
