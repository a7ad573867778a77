"""What changes a loaded model before anything runs or exports it."""

from typing import Any, Protocol


class Edit(Protocol):
    """A change that belongs to a checkpoint: a LoRA, a concept, another codec, merged tokens."""

    @property
    def name(self) -> str:
        """In the names of folders and reports."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal changes, wherever their files lie."""

    def apply(self, pipeline: Any) -> None:
        """Change a loaded diffusers pipeline.

        Raises:
            CheckpointError: it does not fit.
        """
