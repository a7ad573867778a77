"""Prompts as the denoiser reads them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor

from encache.errors import EncacheError
from encache.model.text import TOKENIZING, tokenize
from encache.model.text_encoder import TextEncoder
from encache.runtime.compiling import through_compiler
from encache.runtime.engines import Graph, run_graph

logger = logging.getLogger(__name__)

#: From token ids [n, L] and a number of layers to leave out to "text" [n, L, D], "pooled_text".
Encode = Callable[[Tensor, int], Mapping[str, Tensor]]


class Texts:
    """Turns prompts into the denoiser's text conditions.

    Args:
        tokenizers: of the text encoders, in their order.
        encoders: whose embeddings are joined side by side.
    """

    def __init__(self, tokenizers: Sequence[Any], encoders: Sequence[Encode]) -> None:
        self.tokenizers = tuple(tokenizers)
        self._encoders = tuple(encoders)

    def __call__(
        self, prompts: Sequence[str], clip_skip: int = 0, second: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        """Embeddings "text" [n, L, D] of n prompts, padded or cut to the tokenizer's length.

        Also "pooled_text" [n, P] where the denoiser reads it.

        Args:
            prompts: at least one.
            clip_skip: last layers of the text encoders to leave out.
            second: what the text encoders behind the first are told instead.

        Raises:
            EncacheError: a prompt is no text, or there are fewer layers.
        """
        _refuse_what_is_no_text([*prompts, *second])
        encoded: list[Mapping[str, Tensor]] = []
        for tokenizer, encode in zip(self.tokenizers, self._encoders, strict=True):
            told = second if encoded and second else prompts
            # Twins lose the same words.
            token_ids = _tokenize(tokenizer, told, warn=told is second or not encoded)
            encoded.append(encode(token_ids, clip_skip))
        joined = {**encoded[-1]}
        joined["text"] = torch.cat([one["text"] for one in encoded], dim=-1)
        return joined


class TorchText:
    """A text encoder run by PyTorch, and if `compiled` through torch.compile."""

    def __init__(self, module: TextEncoder, *, compiled: bool = False) -> None:
        self._module = module
        self._run = through_compiler(module) if compiled else module

    @torch.inference_mode()
    def __call__(self, token_ids: Tensor, clip_skip: int) -> dict[str, Tensor]:
        encoded = self._run(token_ids.to(self._module.module.device), clip_skip)
        names = (one.name for one in self._module.outputs)
        return dict(zip(names, encoded, strict=True))


class GraphText:
    """A text encoder run as a graph."""

    def __init__(self, graph: Graph, dtype: torch.dtype, device: torch.device) -> None:
        self._graph = graph
        self._dtype = dtype
        self._device = device

    def __call__(self, token_ids: Tensor, clip_skip: int) -> dict[str, Tensor]:
        if clip_skip:
            raise EncacheError(
                "clip_skip needs PyTorch: the text encoder's engine ends with its last layer. Use "
                'backend="torch", or encode the prompt elsewhere and pass prompt_embeds.'
            )
        inputs = {"token_ids": token_ids.to(self._device)}
        return run_graph(self._graph, inputs, self._dtype, B=len(token_ids))


def _tokenize(tokenizer: Any, prompts: Sequence[str], warn: bool) -> Tensor:
    """Token ids [n, L]; says which words are lost."""
    length = tokenizer.model_max_length
    with TOKENIZING:
        # A concept of textual inversion may be several tokens, which diffusers writes out.
        expand = TextualInversionLoaderMixin().maybe_convert_prompt
        prompts = [expand(prompt, tokenizer) for prompt in prompts]
        whole = tokenizer(prompts).input_ids
        token_ids = tokenize(tokenizer, prompts)
    for prompt, ids in zip(prompts, whole, strict=True):
        if warn and len(ids) > length:
            lost = tokenizer.decode(ids[length - 1 : -1])
            logger.warning("%r is too long, its end is ignored: %r", prompt[:40], lost)
    return token_ids


def _refuse_what_is_no_text(prompts: Sequence[Any]) -> None:
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise EncacheError(f"A prompt is text, or a list of texts, not {prompt!r}.")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise EncacheError(f"{prompt[:40]!r} is no UTF-8 text.") from error
