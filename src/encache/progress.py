"""Progress on stderr: a bar in a terminal, a line a minute in a log file."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

#: Least seconds between two lines of a log file.
LOG_INTERVAL = 60.0


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """Return tqdm's bar over `iterable`, or one that `update` moves; options are tqdm's.

    Where nothing can be drawn over (a pipe, a log file), it writes a plain line every
    `mininterval` seconds, by default LOG_INTERVAL, and one at the end if there was any before;
    work that takes less writes nothing.
    """
    if _can_redraw(options.get("file") or sys.stderr):
        return tqdm(iterable, **options)
    plain = {} if options.get("bar_format") else {"ncols": 0}
    defaults = {"mininterval": LOG_INTERVAL, "miniters": 1, **plain}
    return _Lines(iterable, **{**defaults, **options, "leave": False})


def _can_redraw(file: Any) -> bool:
    # A notebook can, but its stderr does not say so.
    return "ipykernel" in sys.modules or not hasattr(file, "isatty") or file.isatty()


class _Lines(tqdm):
    """Progress as whole lines. tqdm's own drawings do nothing: they move a cursor."""

    def update(self, n: float = 1) -> bool | None:
        """Move on, and write a line if the last one is old enough."""
        due = super().update(n)
        if due:
            self._write_line()
        return due

    def close(self) -> None:
        """Write the last state, unless it stands there or nothing does."""
        if not self.disable and self.start_t < self.last_print_t and self.last_print_n < self.n:
            self._write_line()
        super().close()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw nothing, at a new description for instance."""

    def clear(self, nolock: bool = False) -> None:
        """Take nothing away."""

    def _write_line(self) -> None:
        self.fp.write(str(self).strip() + "\n")
        self.fp.flush()
