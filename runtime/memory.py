"""Want of memory in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from encache.errors import EncacheError


@contextmanager
def explaining_want_of_memory(rows: int) -> Iterator[None]:
    """Let too little memory for one call of so many rows be an EncacheError."""
    try:
        yield
    except RuntimeError as error:
        # PyTorch has a class of its own for a GPU's memory alone.
        if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
            raise
        raise EncacheError(
            f"Memory does not hold one call of {rows} rows (pictures, times two with guidance): "
            "make fewer or smaller pictures at once."
        ) from error
