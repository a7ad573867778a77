"""What engines of 8 bits are calibrated on, and what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from encache.contract.target import Target
from encache.errors import EncacheError, EngineError
from encache.files import read_lines
from encache.model.checkpoint import Checkpoint, default_model

#: Of a model that does not name its own, as in diffusers.
_STEPS = 50
#: A few suffice: what matters is that all calls are seen.
_PROMPTS = 6
#: GPUs before it compute in INT8, but not in FP8.
_FIRST_FP8 = 8.9


@dataclass(frozen=True)
class Calibration:
    """The pictures that engines of 8 bits are calibrated on, drawn by the model itself.

    Together with the model it decides the scales, and which layers are kept in fp16.

    Attributes:
        prompts: one picture each, with seeds 0, 1, 2, ..., in full and with the model's guidance.
        steps: of the full sampler.
        samples: calls on which the layers' errors are measured, spread over all of them.
        kept_share: of the arithmetic, at most, that stays in fp16 because it costs most precision.
    """

    prompts: tuple[str, ...]
    steps: int
    samples: int = 24
    kept_share: float = 0.15


@dataclass(frozen=True)
class EightBits:
    """How much of one graph computes in 8 bits, as the compiler says it.

    Attributes:
        share: of the arithmetic of convolutions, matrix products and attention.
        kept: layers that were left in fp16, because they cost most precision.
        fallen_back: layers that were meant to compute in 8 bits and do not.
        maxima: the largest magnitude that goes into each layer, from which its scale follows.
    """

    share: float
    kept: tuple[str, ...]
    fallen_back: tuple[str, ...]
    maxima: Mapping[str, float]


def make_calibration(checkpoint: Checkpoint, prompts: Path | None = None) -> Calibration:
    """The calibration of a model, by default with the prompts of the one that ships with encache.

    Args:
        checkpoint: the model.
        prompts: a text file with one prompt in a line.

    Raises:
        EncacheError: it is another model, and there are no prompts.
        OSError: the file may not be read.
    """
    lines: list[str] = []
    if prompts:
        lines = read_lines(prompts)
    elif checkpoint.folder == default_model():
        listed = read_lines(default_model() / "prompts.txt")
        lines = listed[:: len(listed) // _PROMPTS][:_PROMPTS]
    if not lines:
        raise EncacheError(
            "Engines of 8 bits are calibrated on pictures that the model draws: add "
            f"--calibration-prompts FILE with about {_PROMPTS} prompts, one in a line."
        )
    return Calibration(tuple(lines), checkpoint.preset.steps or _STEPS)


def has_fp8(target: Target) -> bool:
    """Whether all GPUs of a target compute in FP8."""
    return all(float(one) >= _FIRST_FP8 for one in target.compute_capabilities)


def refuse_without_fp8(target: Target) -> None:
    """Raise EngineError unless all GPUs of a target compute in FP8."""
    if not has_fp8(target):
        raise EngineError(
            f"FP8 begins with compute capability {_FIRST_FP8}, and these engines are for "
            f"{', '.join(target.compute_capabilities)}: use --dtype int8 or fp16."
        )
