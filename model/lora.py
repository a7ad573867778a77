"""LoRA files, fused into the weights before anything is exported: engines have no adapters."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encache.errors import CheckpointError
from encache.model.family import family_of
from encache.model.weights import digest_of, read_header, reason_of, refuse_pickle

#: Ends the name of one tensor per layer, in the formats of diffusers, peft and kohya.
_DOWN = re.compile(r"(lora_down|lora_A|lora\.down|lora_linear_layer\.down)(\.\w+)?\.weight$")
#: Those two go together; what fits is in pyproject.toml.
_INSTALL = 'pip install "peft>=0.20" "transformers<5.24"'


@dataclass(frozen=True)
class Lora:
    """Low-rank changes of a model's weights, and how much of them is wanted."""

    path: Path
    scale: float = 1.0

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def fingerprint(self) -> str:
        return f"lora {digest_of([self.path]).hex()} {self.scale}"

    def apply(self, pipeline: Any) -> None:
        """Add scale * B A to the weights of UNet and text encoders, and forget the adapter.

        Takes the formats that diffusers takes: its own, peft's and kohya's.

        Raises:
            CheckpointError: peft is missing or too old, or some of the LoRA's layers are not in
                this model, which would leave them out without a word.
        """
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise CheckpointError(f"A LoRA needs peft: {_INSTALL}.") from error
        path = self.path
        try:
            pipeline.load_lora_weights(path.parent, weight_name=path.name)
        except Exception as error:  # two libraries, each with exceptions of its own
            reason = reason_of(error)
            if "version of PEFT" in reason:
                raise CheckpointError(f"{reason.rstrip('.')}: {_INSTALL}.") from error
            raise CheckpointError(f"{path} does not fit this model: {reason}") from error
        names, _ = read_header(path)
        num_layers = sum(bool(_DOWN.search(name)) for name in names)
        num_adapted = _count_adapted(pipeline)
        if num_adapted < max(num_layers, 1):
            raise CheckpointError(
                f"{path} does not fit this model: {num_layers - num_adapted} of its {num_layers} "
                "layers are not in it. It was made for another architecture."
            )
        pipeline.fuse_lora(list(pipeline.get_list_adapters()), lora_scale=self.scale)
        pipeline.unload_lora_weights()


def find_lora(text: str) -> Lora:
    """Read FILE or FILE:SCALE, and look at the file without loading it.

    Raises:
        CheckpointError: no such file, a pickle, corrupt, or no LoRA.
    """
    name, _, number = text.rpartition(":")
    try:
        scale = float(number) if name else 1.0
    except ValueError:  # the colon belongs to the path
        name, scale = "", 1.0
    if not math.isfinite(scale):
        raise CheckpointError(f"The scale in {text} is not a finite number.")
    lora = Lora(Path(name or text).expanduser(), scale)
    refuse_pickle(lora.path)
    if not lora.path.is_file():
        raise CheckpointError(f"There is no LoRA file at {lora.path}. Check the path.")
    names, _ = read_header(lora.path)
    if not all("lora" in one or one.endswith((".alpha", ".dora_scale")) for one in names):
        raise CheckpointError(
            f"{lora.path} is no LoRA: its first tensor is {min(names, default='missing')!r}. "
            "Whole weights go to --ckpt."
        )
    return lora


def _count_adapted(pipeline: Any) -> int:
    """How many layers of UNet and text encoders a LoRA has reached."""
    names = ("unet", *family_of(pipeline).text_encoders)
    parts = (getattr(pipeline, name) for name in names)
    modules = (module for part in parts if part is not None for module in part.modules())
    return sum(bool(getattr(module, "lora_A", None)) for module in modules)
