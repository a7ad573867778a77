"""What the commands share: errors as one sentence, and quiet libraries."""

import errno
import logging
import math
import os
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from encache.errors import EncacheError

_REMEDIES = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some of your quota, or write to another disk",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EROFS: "choose a place that is not read-only",
    errno.ENOTDIR: "a part of this path is a file; choose another",
    errno.EISDIR: "this is a folder; choose a file",
    errno.EADDRINUSE: "another program listens there; choose another --port",
    errno.EEXIST: "a file of this name is in the way; choose another",
}
_OTHER_REMEDY = "check the path and the disk"


class Command(click.Command):
    """A click command that ends with exit code 1 and one sentence when a user can repair it."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; see the class."""
        _quiet_libraries()
        try:
            return super().invoke(ctx)
        except EncacheError as error:
            raise click.ClickException(str(error)) from error
        except BrokenPipeError:
            raise  # click ends quietly when the reader of our output has gone
        except OSError as error:
            raise click.ClickException(_explain(error)) from error


class FiniteFloat(click.FloatRange):
    """A click.FloatRange that also refuses nan and the infinities; the bounds may be left out."""

    name = "float"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read the number, or fail with a usage error."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number

    def _describe_range(self) -> str:
        # Without bounds click's help would say "x<=None".
        return "" if self.min is None and self.max is None else super()._describe_range()


class Text(click.ParamType):
    """What can be written as UTF-8; a shell may hand over any bytes."""

    name = "TEXT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text itself, or fail with a usage error."""
        try:
            str(value).encode()
        except UnicodeEncodeError:
            self.fail(f"{value!r} is not UTF-8 text.", param, ctx)
        return str(value)


def echo_path(path: Path) -> None:
    """Print a path to stdout, whatever bytes the file system has for it."""
    click.echo(os.fsencode(path))


def typed_options(names: Collection[str]) -> Iterator[str]:
    """Which of these parameters of the running command the user gave, as its options are typed."""
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is not ParameterSource.DEFAULT
        if parameter.name in names and given:
            yield parameter.opts[0]


def _explain(error: OSError) -> str:
    """Say what the operating system refused, where, and what to do: one sentence."""
    where = f" ({error.filename})" if error.filename else ""
    remedy = _REMEDIES.get(error.errno or 0, _OTHER_REMEDY)
    return f"{error.strerror or error}{where}: {remedy}."


def _quiet_libraries() -> None:
    """Leave stderr to our own lines; what matters in the libraries' warnings is checked by us."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
