"""What a denoiser reads of its text encoders, as modules that run and export alike."""

from typing import Any

from torch import Tensor, nn

from encache.errors import EncacheError
from encache.model.family import family_of, tokenizer_of
from encache.model.spec import TensorSpec
from encache.model.text import with_length


class TextEncoder(nn.Module):
    """One CLIP text encoder with its tokenizer.

    Stable Diffusion 1.x and 2.x read the last hidden state. XL reads the last but one of two
    encoders, side by side, and the second one's pooled embedding.

    Args:
        name: of its graph, which is the component's name in diffusers.
        tokenizer: its own.
        module: a transformers CLIPTextModel, or CLIPTextModelWithProjection.
        penultimate: read the last hidden state but one, before the final norm.
    """

    def __init__(self, name: str, tokenizer: Any, module: Any, penultimate: bool) -> None:
        super().__init__()
        self.name = name
        self.tokenizer = with_length(tokenizer, module)
        self.module: Any = module
        self.penultimate = penultimate
        self.pooled = penultimate and hasattr(module, "text_projection")

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Token ids, padded to the tokenizer's length."""
        shape = ("B", self.tokenizer.model_max_length)
        return (TensorSpec("token_ids", shape, "int64", (0, len(self.tokenizer))),)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Embeddings [B, L, D], and pooled ones [B, P] where the denoiser reads them."""
        config = self.module.config
        text = TensorSpec("text", ("B", self.tokenizer.model_max_length, config.hidden_size))
        pooled = TensorSpec("pooled_text", ("B", config.projection_dim))
        return (text, pooled) if self.pooled else (text,)

    def forward(self, token_ids: Tensor, clip_skip: int = 0) -> tuple[Tensor, ...]:
        """Encode token ids [B, L] without the last `clip_skip` layers.

        Raises:
            EncacheError: there are not so many layers.
        """
        if clip_skip < 0:
            raise EncacheError(f"clip_skip leaves out layers, of which there are not {clip_skip}.")
        skipped = clip_skip + self.penultimate
        encoded = self.module(token_ids, output_hidden_states=bool(skipped))
        if not skipped:
            return (encoded.last_hidden_state,)
        if not clip_skip < len(encoded.hidden_states) - self.penultimate:
            most = len(encoded.hidden_states) - 1 - self.penultimate
            raise EncacheError(f"clip_skip leaves out 1 to {most} layers, not {clip_skip}.")
        text = encoded.hidden_states[-(skipped + 1)]
        if self.penultimate:
            return (text, encoded.text_embeds) if self.pooled else (text,)
        # Once inside a text_model, as diffusers still expects it.
        return (getattr(self.module, "text_model", self.module).final_layer_norm(text),)


def text_encoders_of(pipeline: Any) -> tuple[TextEncoder, ...]:
    """The text encoders of a diffusers pipeline, in the order in which it joins them."""
    family = family_of(pipeline)
    several = len(family.text_encoders) > 1
    return tuple(
        TextEncoder(name, getattr(pipeline, tokenizer_of(name)), module, penultimate=several)
        for name in family.text_encoders
        if (module := getattr(pipeline, name)) is not None
    )
