"""Learned concepts, as the scripts of diffusers write them, put into a model's own weights.

Textual inversion adds tokens with embeddings of their own (arXiv 2208.01618). Custom Diffusion also
has other projections in the attention to the text (arXiv 2212.04488).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encache.errors import CheckpointError
from encache.model.edit import Edit
from encache.model.weights import digest_of, read_header, reason_of, refuse_pickle

#: Custom Diffusion keeps its projections in processors; the attention has places for them.
_PROJECTION = re.compile(r"\.processor\.(to_[kvq]|to_out)_custom_diffusion\.")
#: What another program calls the tensor of a token without a name.
_NAMELESS = "emb_params"
#: Tensors of a file for Stable Diffusion XL, by text encoder.
_XL = {"clip_l": "", "clip_g": "_2"}


@dataclass(frozen=True)
class TextualInversion:
    """A token, and the embeddings that it stands for."""

    path: Path
    token: str

    @property
    def name(self) -> str:
        return self.path.stem.strip("<>")

    @property
    def fingerprint(self) -> str:
        return f"concept {digest_of([self.path]).hex()} {self.token}"

    def apply(self, pipeline: Any) -> None:
        """Add the token to the tokenizers and its embeddings to the text encoders.

        Raises:
            CheckpointError: they are as wide as another model's, or the token is known already.
        """
        from safetensors.torch import load_file

        tensors = load_file(self.path)
        places = _XL if tensors.keys() == _XL.keys() else {next(iter(tensors)): ""}
        try:
            for name, suffix in places.items():
                pipeline.load_textual_inversion(
                    tensors[name],
                    token=self.token,
                    tokenizer=getattr(pipeline, f"tokenizer{suffix}"),
                    text_encoder=getattr(pipeline, f"text_encoder{suffix}"),
                )
        except Exception as error:  # of two libraries
            raise CheckpointError(
                f"{self.path} does not fit this model: {reason_of(error)}"
            ) from error


@dataclass(frozen=True)
class CustomDiffusion:
    """Projections of the attention to the text, in place of the model's own."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.parent.name or self.path.stem

    @property
    def fingerprint(self) -> str:
        return f"custom diffusion {digest_of([self.path]).hex()}"

    def apply(self, pipeline: Any) -> None:
        """Copy them into the UNet.

        Raises:
            CheckpointError: some have no place there.
        """
        from safetensors.torch import load_file

        weights = {_PROJECTION.sub(r".\1.", key): one for key, one in load_file(self.path).items()}
        known = pipeline.unet.state_dict()
        lost = [
            key for key, one in weights.items() if key not in known or known[key].shape != one.shape
        ]
        if lost:
            raise CheckpointError(
                f"{self.path} does not fit this model: it has no place for {lost[0]} of shape "
                f"{list(weights[lost[0]].shape)}."
            )
        pipeline.unet.load_state_dict(weights, strict=False)


def find_concept(text: str) -> Edit:
    """Read FILE or FILE:TOKEN, and look at the file without loading it.

    Without TOKEN a textual inversion has the one in the file, or the file's name.

    Raises:
        CheckpointError: no such file, a pickle, corrupt, or neither of both kinds.
    """
    name, _, token = text.rpartition(":")
    if not name.endswith(".safetensors"):  # the colon belongs to the path
        name, token = text, ""
    path = Path(name).expanduser()
    refuse_pickle(path)
    if not path.is_file():
        raise CheckpointError(f"There is no file of a concept at {path}. Check the path.")
    names, _ = read_header(path)
    if names and all(map(_PROJECTION.search, names)):
        if token:
            raise CheckpointError(
                f"{path} is of Custom Diffusion and holds no token: give the token's own file "
                "besides, such as <new1>.safetensors."
            )
        return CustomDiffusion(path)
    if len(names) != 1 and set(names) != set(_XL):
        raise CheckpointError(
            f"{path} is neither of textual inversion nor of Custom Diffusion: its first tensor is "
            f"{min(names, default='missing')!r}. A LoRA goes to --lora."
        )
    written = next(iter(names)) if len(names) == 1 else _NAMELESS
    return TextualInversion(path, token or (path.stem if written == _NAMELESS else written))
