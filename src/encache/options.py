"""Command-line options, written once: the fields of dataclasses, which commands share."""

from collections.abc import Callable
from dataclasses import field, fields
from functools import wraps
from typing import Any

import click


def option(*names: str, default: Any = None, **click_options: Any) -> Any:
    """A field of a dataclass that is an option of every command that takes the dataclass.

    Args:
        names: as it is typed; by default the field's name. An option may be typed in several ways.
        default: of the field and the option.
        click_options: as for click.option; a default that is neither None, False nor () is shown.
    """
    if default is not None and default is not False and default != ():
        click_options = {"show_default": True, **click_options}
    return field(default=default, metadata={"names": names, "click": click_options})


def takes(**groups: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options of dataclasses to a command, which receives one value of each.

    Args:
        groups: dataclasses with `option` fields, by the names of the command's arguments.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def command(**given: Any) -> Any:
            values = {
                name: group(**{one.name: given.pop(one.name) for one in fields(group)})
                for name, group in groups.items()
            }
            return function(**values, **given)

        decorated: Callable[..., Any] = command
        # click adds from the last to the first.
        for group in reversed(groups.values()):
            for one in reversed(fields(group)):
                names = one.metadata["names"] or (f"--{one.name.replace('_', '-')}",)
                extra = {"default": one.default, **one.metadata["click"]}
                decorated = click.option(*names, one.name, **extra)(decorated)
        return decorated

    return decorate


def names_of(group: Any) -> set[str]:
    """The names of a dataclass's options."""
    return {one.name for one in fields(group)}
