"""Progress: a bar where it can be redrawn, whole lines where it cannot."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from encache.progress import progress

ROOT = Path(__file__).parent.parent


class Clock:
    """A time that passes only when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(clock, seconds, count=100, **options):
    """What `count` steps of so many seconds write, each with a new loss and description."""
    file = io.StringIO()
    bar = progress(range(count), file=file, desc="fcr", **options)
    for step in bar:
        clock.now += seconds
        bar.set_description(f"fcr {step // 50}")
        bar.set_postfix_str(f"loss {step}")
    return file.getvalue()


def test_short_work_writes_nothing_to_a_file(clock):
    assert run(clock, 0.59) == ""


def test_long_work_writes_a_line_a_minute(clock):
    text = run(clock, 7)
    assert "\r" not in text
    assert "\x1b" not in text
    lines = text.splitlines()
    assert len(lines) == 700 // 63 + 1  # the first step after a minute is the ninth; and the end
    assert lines[0] == "fcr 0:   9% 9/100 [01:03<10:37,  7.00s/it, loss 8]"
    assert lines[-1] == "fcr 1: 100% 100/100 [11:40<00:00,  7.00s/it, loss 99]"


def test_the_last_line_is_written_once(clock):
    assert len(run(clock, 60, count=3).splitlines()) == 3


def test_an_interrupted_run_says_where(clock):
    file = io.StringIO()
    with progress(total=10, file=file) as bar:
        for _ in range(5):
            clock.now += 61
            bar.update()
        clock.now += 1
        bar.update(2)
    assert file.getvalue().splitlines()[-1].startswith("70% 7/10 [05:06<")


def test_the_users_options_win(clock):
    assert run(clock, 7, disable=True) == ""
    assert len(run(clock, 7, mininterval=700).splitlines()) == 1
    lines = run(clock, 7, bar_format="{n_fmt} done").splitlines()
    assert lines[0] == "9 done"
    assert len(run(clock, 1, mininterval=10).splitlines()) == 10


def test_a_terminal_has_tqdms_bar():
    file = Terminal()
    with progress(total=3, file=file, desc="x") as bar:
        bar.update(3)
    assert type(bar) is tqdm
    assert file.getvalue().startswith("\rx:   0%|")


def test_a_notebook_has_tqdms_bar(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert type(progress(total=3, file=io.StringIO())) is tqdm


def test_a_piped_command_is_quiet_and_light():
    code = (
        "import sys; from encache.progress import progress\n"
        "for _ in progress(range(3)): pass\n"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_every_bar_comes_from_here():
    folders = ("src", "model", "train", "export", "runtime", "evaluate")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        imported = re.search(r"^\s*(from|import) tqdm", path.read_text(), re.MULTILINE)
        assert not imported or path.name == "progress.py", path
