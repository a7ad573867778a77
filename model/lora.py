"""LoRA files, fused into the weights before anything is exported: engines have no adapters."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from encache.errors import CheckpointError
from encache.model.weights import read_header, reason_of, refuse_pickle

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass(frozen=True)
class Lora:
    """Low-rank changes of a model's weights, and how much of them is wanted."""

    path: Path
    scale: float = 1.0


def find_lora(text: str) -> Lora:
    """Read FILE or FILE:SCALE, and look at the file without loading it.

    Raises:
        CheckpointError: no such file, a pickle, corrupt, or no LoRA.
    """
    name, _, number = text.rpartition(":")
    try:
        lora = Lora(Path(name).expanduser(), float(number)) if name else Lora(Path(text))
    except ValueError:  # the colon belongs to the path
        lora = Lora(Path(text))
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


def fuse(pipeline: "StableDiffusionPipeline", lora: Lora) -> None:
    """Add scale * B A to the weights of UNet and text encoder, and forget the adapter.

    Takes the formats that diffusers takes: its own, peft's and kohya's.

    Raises:
        CheckpointError: peft is missing, or the LoRA was made for another architecture.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise CheckpointError('A LoRA needs peft: pip install "encache[lora]".') from error
    try:
        pipeline.load_lora_weights(lora.path.parent, weight_name=lora.path.name)
    except Exception as error:  # two libraries, each with exceptions of its own
        raise CheckpointError(f"{lora.path} does not fit this model: {reason_of(error)}") from error
    adapted = list(pipeline.get_list_adapters())
    if not adapted:
        raise CheckpointError(f"{lora.path} does not fit this model: none of its layers is there.")
    pipeline.fuse_lora(adapted, lora_scale=lora.scale)
    pipeline.unload_lora_weights()
