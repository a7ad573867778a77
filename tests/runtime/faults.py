"""Engine folders as accidents leave them: `python -m tests.runtime.faults --faults 1000`.

Each fault damages a store of three engine folders at random and lets encache-run draw from it. The
result must be the right picture, or one sentence that is true; never a traceback, another picture
or a wait without end.
"""

import argparse
import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from click.testing import CliRunner
from PIL import Image

from encache.contract.manifest import MANIFEST
from encache.export import build
from encache.export.build import Request, build_engines
from encache.model.checkpoint import find_checkpoint
from encache.model.spec import Cut
from encache.runtime.cli import main as encache_run
from tests.conftest import make_pipeline

#: Seconds after which a command counts as hanging.
PATIENCE = 60


class Store:
    """Engine folders side by side, each with the request that it was built for.

    Args:
        folder: an empty one.
        built: checkpoint folder, cut, dtype and finished engine folder, at least two.
    """

    def __init__(self, folder: Path, built: Sequence[tuple[Path, Cut, str, Path]]) -> None:
        self.engines = folder / "engines"
        self.requests = []
        for checkpoint, cut, dtype, engines in built:
            copied = folder / checkpoint.name
            if not copied.exists():
                shutil.copytree(checkpoint, copied)
            self.requests.append(Request(find_checkpoint(copied), cut, dtype))
            shutil.copytree(engines, self.engines / engines.name)
        self.names = [request.folder_name for request in self.requests]

    def copy(self, place: Path) -> Path:
        """Hard links are enough: faults replace files, and never write into them."""
        return Path(shutil.copytree(self.engines, place, copy_function=os.link))


def file_of(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def truncate(folder: Path, draw: random.Random) -> None:
    path = file_of(folder, draw)
    content = path.read_bytes()
    rewrite(path, content[: draw.randrange(max(len(content), 1))])


def flip(folder: Path, draw: random.Random) -> None:
    path = file_of(folder, draw)
    content = bytearray(path.read_bytes())
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    rewrite(path, bytes(content))


def append(folder: Path, draw: random.Random) -> None:
    path = file_of(folder, draw)
    rewrite(path, path.read_bytes() + draw.choice([b"\n", b"\0", b"more"]))


def delete(folder: Path, draw: random.Random) -> None:
    file_of(folder, draw).unlink()


def delete_part(folder: Path, draw: random.Random) -> None:
    shutil.rmtree(draw.choice(sorted(path for path in folder.iterdir() if path.is_dir())))


def make_folder(folder: Path, draw: random.Random) -> None:
    path = file_of(folder, draw)
    path.unlink()
    path.mkdir()


def make_pipe(folder: Path, draw: random.Random) -> None:
    path = file_of(folder, draw)
    path.unlink()
    os.mkfifo(path)


def link(folder: Path, draw: random.Random) -> None:
    """To a copy, to nothing, or to itself."""
    path = file_of(folder, draw)
    copy = folder.parent.parent / "linked"
    shutil.copyfile(path, copy)
    path.unlink()
    path.symlink_to(draw.choice([copy, "nowhere", path]))


def exchange_files(folder: Path, draw: random.Random) -> None:
    one, other = file_of(folder, draw), file_of(folder, draw)
    contents = one.read_bytes(), other.read_bytes()
    rewrite(one, contents[1])
    rewrite(other, contents[0])


def exchange_with_another(folder: Path, draw: random.Random) -> None:
    path = file_of(folder, draw)
    others = [one for one in sorted(folder.parent.iterdir()) if one.is_dir() and one != folder]
    other = draw.choice(others) / path.relative_to(folder)
    if other.is_file():
        rewrite(path, other.read_bytes())


def exchange_folders(folder: Path, draw: random.Random) -> None:
    others = [one for one in sorted(folder.parent.iterdir()) if one.is_dir() and one != folder]
    other, aside = draw.choice(others), folder.parent / "aside"
    folder.rename(aside)
    other.rename(folder)
    aside.rename(other)


def take_the_place(folder: Path, draw: random.Random) -> None:
    others = [one for one in sorted(folder.parent.iterdir()) if one.is_dir() and one != folder]
    shutil.rmtree(folder)
    draw.choice(others).rename(folder)


def foreign(folder: Path, draw: random.Random) -> None:
    """What file managers and people leave behind."""
    places = [folder, *(path for path in sorted(folder.iterdir()) if path.is_dir())]
    names = [".DS_Store", "README.md", "._manifest.json", "model.onnx.bak", "Thumbs.db"]
    names += ["added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json"]
    for _ in range(draw.randrange(1, 4)):
        path = draw.choice(places) / draw.choice(names)
        if not path.exists():
            path.write_bytes(draw.randbytes(50))
    (folder / "notes").mkdir(exist_ok=True)


def forbid(folder: Path, draw: random.Random) -> None:
    places = [folder, *sorted(folder.rglob("*"))]
    path = draw.choice(places)
    if not path.is_dir():  # the hard link's other names would be forbidden, too
        rewrite(path, path.read_bytes())
    path.chmod(0)


def confuse_manifest(folder: Path, draw: random.Random) -> None:
    path = folder / MANIFEST
    whole = json.loads(path.read_bytes())
    rewrite(
        path,
        draw.choice(
            [
                b"",
                b"null",
                b"[" * 200_000,
                b"1" * 10_000,
                json.dumps({**whole, "identity": draw.choice([None, [], 3, {}])}).encode(),
                json.dumps({**whole, "files": draw.choice([None, [], {"../x": {}}])}).encode(),
                json.dumps({**whole, "digest": draw.choice([None, "0" * 64, [1]])}).encode(),
                json.dumps(whole, indent=7).encode(),  # says the same
                b"\xef\xbb\xbf" + path.read_bytes(),
            ]
        ),
    )


FAULTS: tuple[Callable[[Path, random.Random], None], ...] = (
    *(truncate, flip, append, delete, delete_part, make_folder, make_pipe, link, exchange_files),
    *(exchange_with_another, exchange_folders, take_the_place, foreign, forbid, confuse_manifest),
)


def override_modes(allowed: bool) -> None:
    """Take from this process what lets root read files that their mode forbids, or give it back."""
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, low and high words
    assert libc.capget(header, sets) == 0
    override = sets[1] & 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, where root has them
    sets[0] = sets[0] | override if allowed else sets[0] & ~override
    assert libc.capset(header, sets) == 0


@contextlib.contextmanager
def limited(rights: bool) -> Iterator[None]:
    """Raise TimeoutError in a command that hangs; on request bind root by file modes, too."""

    def give_up(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    if not rights:
        override_modes(False)
    try:
        yield
    finally:
        if not rights:
            override_modes(True)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Trial:
    """Faults one after another, each on a fresh copy of the store."""

    def __init__(self, folder: Path, built: Sequence[tuple[Path, Cut, str, Path]]) -> None:
        self.folder = folder
        (folder / "store").mkdir()
        self.store = Store(folder / "store", built)
        self.references = {
            index: self.draw(self.store.engines, index, alone=False)[1]
            for index in range(len(self.store.names))
        }
        assert len(set(self.references.values())) == len(self.references)

    def draw(
        self, engines: Path, index: int, alone: bool, dry: bool = False, rights: bool = True
    ) -> tuple[object, bytes | None]:
        """Run encache-run for one of the store's folders; its result and the picture's pixels."""
        request = self.store.requests[index]
        output = Path(tempfile.mkdtemp(dir=self.folder))
        arguments = ["--prompt", "red apple", "--steps", "2", "--output", output / "a.png"]
        if alone:
            arguments += ["--engine-dir", engines / self.store.names[index]]
        else:
            arguments += ["--engine-dir", engines, "--ckpt", request.checkpoint.folder]
            arguments += ["--cut", request.cut, "--dtype", request.dtype]
        if dry:
            arguments.append("--dry-run")
        with limited(rights):
            result = CliRunner().invoke(encache_run, list(map(str, arguments)))
        picture = output / "a.png"
        pixels = Image.open(picture).tobytes() if picture.exists() else None
        shutil.rmtree(output)
        return result, pixels

    def run(self, seed: int) -> str:
        """Do one fault; return its kind and how it ended, or raise AssertionError."""
        draw = random.Random(seed)
        fault = FAULTS[seed % len(FAULTS)]
        place = Path(tempfile.mkdtemp(dir=self.folder))
        engines = self.store.copy(place / "engines")
        index = draw.randrange(len(self.store.names))
        folder = engines / self.store.names[index]
        alone, dry = draw.random() < 0.5, draw.random() < 0.2
        fault(folder, draw)
        try:
            result, pixels = self.draw(engines, index, alone, dry, rights=fault is not forbid)
            self.judge(seed, fault.__name__, result, pixels, folder, index, alone, dry)
        finally:
            os.system(f"chmod -R u+rwX {place}")
            shutil.rmtree(place)
        return f"{fault.__name__}: {'drawn' if result.exit_code == 0 else 'refused'}"

    def judge(self, seed, name, result, pixels, folder, index, alone, dry) -> None:
        told = f"fault {seed} ({name}, alone={alone}, dry={dry}): {result.output[-500:]}"
        assert result.exception is None or isinstance(result.exception, SystemExit), (
            f"{told} {result.exception!r}"
        )
        assert name != "foreign" or result.exit_code == 0, told
        if result.exit_code == 0:
            if not dry:
                # A folder that was exchanged is, alone, simply the other model.
                wanted = set(self.references.values()) if alone else {self.references[index]}
                assert pixels in wanted, f"{told}: another picture"
                if alone and "exchange_folders" not in name and "take_the_place" not in name:
                    assert pixels == self.references[index], f"{told}: another picture"
            return
        assert result.exit_code == 1, told
        assert pixels is None, told
        *_, message = result.stderr.strip().splitlines()
        assert message.startswith("Error: "), told
        assert_true(message, folder, told)


def assert_true(message: str, folder: Path, told: str) -> None:
    """Hold what a refusal says about a file against the file."""
    words = message.removeprefix("Error: ")
    if "Permission denied (" in words:
        path = Path(words.partition("Permission denied (")[2].partition("):")[0])
        blocked = [one for one in (path, *path.parents) if is_forbidden(one)]
        assert blocked, told
        return
    path = Path(words.split(" ")[0])
    assert path.is_relative_to(folder.parent), told
    if " is missing." in words:
        assert not path.exists(), told
    elif " is not a file." in words:
        assert os.path.lexists(path), told
        assert not path.is_file(), told
    elif " is not what was built" in words:
        assert path.is_file(), told
    elif " was renamed:" in words:
        identity = json.loads((path / MANIFEST).read_bytes())["identity"]
        assert identity, told
    else:
        assert " is damaged (" in words or " is not an engine folder:" in words, told


def is_forbidden(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_IMODE(path.stat().st_mode) == 0
    return False


@contextlib.contextmanager
def copying_instead_of_building(store: Store) -> Iterator[None]:
    """Where a folder is gone encache-run builds it again, which takes long and is tested apart."""
    write = build._write_engines

    def copy(request: Request, folder: Path, report: object) -> None:
        folder.rmdir()
        shutil.copytree(store.engines / request.folder_name, folder)

    build._write_engines = copy
    try:
        yield
    finally:
        build._write_engines = write


def build_store(folder: Path) -> list[tuple[Path, Cut, str, Path]]:
    """Two models, two cuts of the first."""
    built: list[tuple[Path, Cut, str, Path]] = []
    for seed, cut in ((0, "none"), (0, "up2"), (1, "none")):
        model = folder / f"model{seed}"
        if not model.exists():
            make_pipeline(seed).save_pretrained(model)
        request = Request(find_checkpoint(model), cut)
        built.append((model, cut, "fp32", build_engines(request, folder / "built")))
    return built


def main() -> None:
    """Count how faults end; stop at the first that ends badly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=1000)
    count = parser.parse_args().faults
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        trial = Trial(folder, build_store(folder))
        with copying_instead_of_building(trial.store):
            ends = Counter(trial.run(seed) for seed in range(count))
    print(json.dumps(dict(sorted(ends.items())), indent=1))
    print(f"{sum(ends.values())} faults: no wrong picture, no traceback, no hang, no false refusal")


if __name__ == "__main__":
    main()
