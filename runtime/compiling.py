"""torch.compile, whose failures become one sentence."""

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from encache.errors import EngineError


def through_compiler(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through torch.compile, which compiles it when it first runs.

    Raises:
        EngineError: when it runs, and torch.compile lacks what it needs.
    """
    run = torch.compile(function)

    def checked(*arguments: Any) -> Any:
        try:
            return run(*arguments)
        except TorchDynamoException as error:
            reason = " ".join(str(error).split("\n")[:2]).strip()
            raise EngineError(
                f"torch.compile failed ({reason}). It needs a C++ compiler, and Triton on a GPU: "
                "install them, or use --backend torch."
            ) from error

    return checked
