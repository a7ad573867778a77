"""What compiled engines are for: which GPUs, how many rows, which sizes of pictures.

ONNX graphs run anywhere and at any size; TensorRT engines only where and as they were asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from encache.contract.library import describe_library
from encache.errors import EngineError
from encache.model.checkpoint import Checkpoint
from encache.model.loading import read_outline
from encache.model.spec import NO_CUT, Cut, rows_per_picture

#: The smallest and the largest value of a size.
Span = tuple[int, int]

#: Compute capabilities of the GPUs that TensorRT-RTX compiles for on any machine.
GPUS = {
    "rtx-2080": "7.5",
    "a100": "8.0",
    "rtx-3090": "8.6",
    "rtx-4090": "8.9",
    "rtx-5090": "12.0",
    "dgx-spark": "12.1",
}


#: Most calls in one run of the decoder, unless asked otherwise: memory grows with it, and a batch
#: of so many keeps a GPU busy.
DECODE_CALLS = 10


@dataclass(frozen=True)
class Target:
    """What an engine folder was compiled for.

    Attributes:
        library: compiler and version; the same must run the engines.
        compute_capabilities: of the GPUs, such as "8.9".
        rows: of the UNet: pictures at once, times two with guidance.
        decode_calls: most calls in one run of the decoder; None without a cut.
        height, width: of the pictures, in pixels.
    """

    library: str
    compute_capabilities: tuple[str, ...]
    rows: Span
    decode_calls: int | None
    height: Span
    width: Span

    def covers(self, wanted: "Target") -> bool:
        """Whether engines for this target also serve the wanted one."""
        spans = [
            (self.rows, wanted.rows),
            (self.height, wanted.height),
            (self.width, wanted.width),
        ]
        return (
            self.library == wanted.library
            and set(wanted.compute_capabilities) <= set(self.compute_capabilities)
            and (wanted.decode_calls or 0) <= (self.decode_calls or 0)
            and all(ours[0] <= theirs[0] and theirs[1] <= ours[1] for ours, theirs in spans)
        )

    def refuse_beyond(self, **asked: int | None) -> None:
        """Raise EngineError unless engines for this target take these rows, height and width."""
        for name, size in asked.items():
            least, most = getattr(self, name)
            if size and not least <= size <= most:
                span = least if least == most else f"{least} to {most}"
                raise EngineError(
                    f"These engines were compiled for {name} {span}, not {size} (rows are "
                    "pictures, times two with guidance). Export them again with another --batch, "
                    "--height or --width, or export for onnxruntime, which takes any."
                )


def make_target(
    checkpoint: Checkpoint,
    backend: str,
    cut: Cut,
    *,
    compute_capabilities: tuple[str, ...] | None = None,
    rows: Span | None = None,
    decode_calls: int | None = None,
    height: Span | None = None,
    width: Span | None = None,
) -> Target:
    """A target, by default for one picture as the model wants it, on this machine's GPU.

    Raises:
        EngineError: the library or the GPU is missing, or they do not go together.
        CheckpointError: a size is missing, and the checkpoint does not say its own.
    """
    if not (height and width):
        default_height, default_width = read_outline(checkpoint).spec.picture_size
        height = height or (default_height, default_height)
        width = width or (default_width, default_width)
    if cut == NO_CUT:
        decode_calls = None
    else:
        decode_calls = decode_calls or _longest_segment(checkpoint) or DECODE_CALLS
    return Target(
        describe_library(backend),
        compute_capabilities or resolve_compute_capabilities(backend, (), ()),
        rows or rows_of(checkpoint),
        decode_calls,
        height,
        width,
    )


def rows_of(checkpoint: Checkpoint, pictures: Span = (1, 1)) -> Span:
    """Rows of so many pictures at once: two for each, or one where the model wants no guidance.

    A span of pictures begins with one row for each: without guidance they come too.
    """
    least, most = pictures
    family, rows = checkpoint.family, rows_per_picture(checkpoint.guidance_scale)
    if family.across_frames:  # a clip's first frame comes alone, then all of them do
        return least * rows, most * rows * family.frames
    return least * (rows if least == most else 1), most * rows


def _longest_segment(checkpoint: Checkpoint) -> int | None:
    """Most calls between two key calls of the model's own plan; None if it says too little.

    At most `DECODE_CALLS`: longer segments are decoded in parts.
    """
    preset = checkpoint.preset
    if preset.stride:
        return min(preset.stride, DECODE_CALLS)
    if preset.key_calls and preset.steps:
        # Some solvers make a few calls more than steps; they cost one more run.
        ends = pairwise((*preset.key_calls, preset.steps))
        return min(max(1, *(stop - start for start, stop in ends)), DECODE_CALLS)
    return None


def most_rows(decode_calls: int | None, rows_per_call: int, asked: int | None) -> int | None:
    """Most rows in one run of the decoder: as compiled, or as asked for if that is fewer.

    Without a limit of engines what is asked for decides, and without that nothing.
    """
    compiled = decode_calls and decode_calls * rows_per_call
    return min(filter(None, (asked, compiled)), default=None)


def exactly(size: int | None) -> Span | None:
    """The span of one size, if there is one."""
    return (size, size) if size else None


def parse_span(text: str) -> Span:
    """Read "512" or "512:768".

    Raises:
        ValueError: it is neither.
    """
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split(":")]
    if len(numbers) > 2 or not 1 <= numbers[0] <= numbers[-1]:
        raise ValueError(f"{text!r} is neither a number like 512 nor a span like 512:768.")
    return numbers[0], numbers[-1]


def resolve_compute_capabilities(
    backend: str, gpus: Sequence[str], numbers: Sequence[str]
) -> tuple[str, ...]:
    """The compute capabilities of named GPUs and plain numbers; of this machine's GPU if none are.

    Raises:
        EngineError: there is no GPU, or the backend cannot compile for what is asked.
    """
    named = {*(GPUS[gpu] for gpu in gpus), *numbers}
    if backend == "tensorrt":
        if named:
            raise EngineError(
                "Standard TensorRT compiles on the GPU that runs the engine, so no other can be "
                "named. Leave it out there, or use --backend tensorrt-rtx."
            )
        return (local_compute_capability(),)
    named = named or {local_compute_capability()}
    if unknown := sorted(named - set(GPUS.values())):
        raise EngineError(
            f"TensorRT-RTX compiles for compute capability {', '.join(GPUS.values())}, not for "
            f"{', '.join(unknown)}. Try --backend tensorrt on that GPU."
        )
    return tuple(sorted(named, key=float))


def local_compute_capability() -> str:
    """Of this machine's GPU.

    Raises:
        EngineError: there is none that PyTorch can use.
    """
    import torch

    if not torch.cuda.is_available():
        raise EngineError(
            "PyTorch finds no NVIDIA GPU and driver here. Run engines on the machine that has "
            "them; to compile for it from here, add --backend tensorrt-rtx --gpu rtx-4090 to "
            "encache-export."
        )
    return ".".join(map(str, torch.cuda.get_device_capability()))
