"""Want of memory in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from encache.errors import EncacheError


@contextmanager
def explaining_want_of_memory(sentence: str) -> Iterator[None]:
    """Let too little memory be an EncacheError with this sentence."""
    try:
        yield
    except RuntimeError as error:
        # PyTorch has a class of its own for a GPU's memory alone.
        if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
            raise
        raise EncacheError(sentence) from error


def too_many_rows(rows: int) -> str:
    """What to say where memory does not hold one call of so many rows."""
    return (
        f"Memory does not hold one call of {rows} rows (pictures, times two with guidance): make "
        "fewer or smaller pictures at once."
    )
