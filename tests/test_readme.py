"""What README.md and the pages of docs/ tell a user to type, and what they name, is there.

Run, in an empty folder, with the tiny test model in place of every `path/to/...`, of NAME-KEY and
of the default model:
    encache-run      all but those for TensorRT or OpenVINO, with a LoRA or a fitted plan, with
                     weights of encache-train or --fast, or with models of other pipelines
                     (tests/runtime/test_host.py runs these); --compare with one seed instead of
                     five
    encache-export   those whose engines the tests have built already: they say so
    encache-eval     with --dry-run, which opens the models and lists what would be drawn
    python blocks    all

Only parsed, by the command itself, with its body replaced, so that a wrong option, a wrong value
or a missing file fails:
    all other commands, and the other lines of encache-run and encache-export

Only looked at:
    pip, uv          every extra that they name is in pyproject.toml, every file is there
    python FILE      the file is there, and knows the options
    python -m        the module is there; pytest is not run again
    serve run        the deployment is there, and knows the options
    venv, grep, .    nothing more than that they are one of these
"""

import importlib
import json
import re
import shlex
import shutil
import sys
import tomllib
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from PIL import Image

from tests.conftest import ONE_SEGMENT, save_tuned, write_rules

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "model/emoji/README.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Models of the pages that the tiny one stands in for.
MODELS = ("path/to/stable-diffusion-v1-5", "path/to/folder")
TUNED = ("runs/shared/shared.safetensors", "runs/fcr/fcr.safetensors", "fcr.safetensors")


def blocks(language):
    """The fenced blocks of all pages in a language, with their page's name."""
    for page in PAGES:
        for found, text in FENCED.findall(page.read_text()):
            if found == language:
                yield str(page.relative_to(ROOT)), text


def split(block):
    """The commands of a block, as a shell splits them."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|<>")
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, "&&"]:
            if word not in ("&&", "|"):
                words.append(word)
            elif words:
                yield tuple(words)
                words = []


def commands():
    """Every command of all pages, once, in their order."""
    found = {}
    for page, block in blocks("sh"):
        for words in split(block):
            found.setdefault(words, page)
    return [pytest.param(words, id=f"{page}: {' '.join(words)}") for words, page in found.items()]


@cache
def console_command(name):
    """The click command behind a console script."""
    module, _, attribute = PROJECT["scripts"][name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def leaf(command, arguments):
    """The command that the arguments reach, and what is left of them."""
    while isinstance(command, click.Group) and arguments and arguments[0] in command.commands:
        command, arguments = command.commands[arguments[0]], arguments[1:]
    return command, arguments


def options_of(command):
    """Every option that a command, or one of its subcommands, takes."""
    if isinstance(command, click.Group):
        return set().union(*map(options_of, command.commands.values()))
    names = {"--help"}
    for one in command.params:
        names |= {*one.opts, *one.secondary_opts}
    return names


@pytest.fixture(scope="module")
def terminal(tmp_path_factory, model_folder, engine_folder):
    """Work in one folder, in which everything lies that the pages take for granted."""
    from encache.model import checkpoint

    folder, other = tmp_path_factory.mktemp("terminal"), tmp_path_factory.mktemp("models")
    default = other / model_folder.name
    shutil.copytree(model_folder, default)
    (default / "prompts.txt").write_text("red apple\nhot dog\n")
    for name in MODELS:
        link(folder / name, model_folder)
    link(folder / "engines" / engine_folder.name, engine_folder)
    link(folder / "engines" / "NAME-KEY", engine_folder)
    tuned = save_tuned(other, model_folder, ONE_SEGMENT).weights
    for name in TUNED:
        link(folder / name, tuned)
    write_rules(folder / "plans.json", model_folder)
    for name in ("prompts.csv", "prompts.parquet", "token.txt"):
        (folder / name).write_text("a file that only has to be there")
    (folder / "path/to/pictures").mkdir()
    for name in ("photo.png", "mask.png", "edges.png"):
        Image.new("RGB", (16, 16), "gray").save(folder / name)
    (folder / "val2014").mkdir()
    (folder / "prompts.txt").write_text("a red apple\na green pear\n")
    captions = {"annotations": [{"image_id": 1, "id": 1, "caption": "a red apple"}]}
    (folder / "captions_val2014.json").write_text(json.dumps(captions))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(checkpoint, "default_model", lambda: default)
        yield


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def call(command, arguments):
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, f"{arguments}: {result.output} {result.exception!r}"
    return result


def parse(command, arguments, monkeypatch):
    """Let the command read its arguments, and do nothing with them."""
    reached, _ = leaf(command, arguments)
    reads = []
    with monkeypatch.context() as patch:
        patch.setattr(reached, "callback", lambda **values: reads.append(values))
        call(command, arguments)
    assert len(reads) == 1


def type_command(name, arguments, monkeypatch):
    """Run or parse one of encache's commands; see the module."""
    command, text = console_command(name), " ".join(arguments)
    heavy = ("tensorrt", "openvino", "--lora", "--fast", "--plan", ".safetensors", "--variant")
    heavy += ("--controlnet", "--class-label", "--num-frames", "path/to/inpainting", "--pipeline")
    if name == "encache-eval":
        assert call(command, [*arguments, "--dry-run"]).stdout.splitlines()
    elif name == "encache-run" and not any(word in text for word in heavy):
        # At another cut than the built engines', PyTorch draws the same without an export.
        more = ["--backend", "torch"] if "--cut" in arguments else []
        if "--compare" in arguments:
            assert "equal" in call(command, [*arguments, "--repeats", "1"]).stdout
            return
        for path in call(command, [*arguments, *more]).stdout.splitlines():
            assert Image.open(path).size == (16, 16)
    elif name == "encache-export" and not any(word in text for word in heavy):
        assert "this export is finished" in call(command, arguments).stderr
    else:
        parse(command, arguments, monkeypatch)


def look_at_install(words):
    """Every extra that pip or uv is asked for is one of this project's, every file is there."""
    extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
    extras += [after for before, after in pairwise(words) if before == "--extra"]
    for extra in ",".join(extras).split(",") if extras else []:
        assert extra in PROJECT["optional-dependencies"], f"{words}: no extra {extra}"
    for before, after in pairwise(words):
        if before in ("-c", "-r"):
            assert (ROOT / after).is_file(), f"{words}: no file {after}"


def look_at_python(words):
    """The script or module is there, and knows its options."""
    if words[:1] == ["-m"]:
        assert words[1] in ("venv", "pytest") or find_spec(words[1]), f"no module {words[1]}"
        return
    script = ROOT / words[0]
    assert script.is_file(), f"no script {words[0]}"
    for word in words[1:]:
        if word.startswith("--"):
            assert f'"{word}"' in script.read_text(), f"{words[0]} has no {word}"


def look_at_deployment(words):
    """What Ray Serve is to run is there, and knows its options."""
    assert words[0] == "run"
    module, _, attribute = words[1].partition(":")
    deployment = importlib.import_module(module)
    assert callable(getattr(deployment, attribute))
    named = {f"--{word.partition('=')[0]}" for word in words[2:]}
    assert named <= options_of(deployment.command), named


@pytest.mark.parametrize("words", commands())
@pytest.mark.usefixtures("terminal")
def test_what_a_user_types(words, monkeypatch):
    program, *arguments = words
    name = program.removeprefix(".venv/bin/")
    if name in PROJECT["scripts"]:
        type_command(name, arguments, monkeypatch)
    elif name in ("pip", "uv"):
        look_at_install(arguments)
    elif name in ("python", "python3"):
        look_at_python(arguments)
    elif name == "serve":
        look_at_deployment(arguments)
    else:
        assert name in (".", "grep"), f"Nobody has said how {program} is tested."


@pytest.mark.parametrize(("page", "block"), list(blocks("python")))
@pytest.mark.usefixtures("terminal")
def test_what_a_user_writes(page, block):
    names = {}
    exec(compile(block, page, "exec"), names)
    assert names["image"].size == (16, 16)


@pytest.mark.parametrize("wrong", ["--strid 5", "--stride five", "--blend mix", "--ckpt"])
def test_a_wrong_option_does_not_pass(wrong, monkeypatch):
    with pytest.raises(AssertionError, match="Error"):
        parse(console_command("encache-run"), shlex.split(wrong), monkeypatch)


def test_both_commands_at_the_top_are_there():
    """The second one is what continuous integration runs."""
    top = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt"
    page = PAGES[0].read_text()
    assert f'```sh\n{top} . && .venv/bin/encache-run --prompt "red apple" --stride 10\n```' in page
    tests = f'<!-- tests -->\n```sh\n{top} ".[test]" && .venv/bin/python -m pytest\n```'
    assert tests in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_is_one(page):
    """A span of code that begins with a command names its options; others name anybody's."""
    everyones = set().union(*(options_of(console_command(name)) for name in PROJECT["scripts"]))
    for path in (ROOT / "benchmarks").glob("*.py"):
        everyones |= set(re.findall(r'"(--[a-z][\w-]*)"', path.read_text()))
    for span in code_spans(page):
        words = span.split()
        named = {word for word in words if re.fullmatch(r"--[a-z0-9][\w-]*", word)}
        if words[0] in PROJECT["scripts"]:
            command, _ = leaf(console_command(words[0]), words[1:])
            assert named <= options_of(command), f"{span}: {named - options_of(command)}"
        else:
            assert named <= everyones, f"{span}: {named - everyones}"


def code_spans(page):
    return re.findall(r"`([^`\n]+)`", FENCED.sub("", page.read_text()).replace("``", ""))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_file_is_there(page):
    text = FENCED.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"no {target}"
        if anchor:
            assert anchor in anchors(path), f"no section {target}"
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir())
    for span in code_spans(page):
        if re.fullmatch(rf"({folders})/[\w./-]*", span) and not span.startswith(GENERATED):
            assert (ROOT / span).exists(), f"no file {span}"


#: Folders that commands make.
GENERATED = ("engines/", "outputs/", "runs/")


def anchors(page):
    """What links may name of a page's sections, as GitHub makes it of their titles."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_tables_are_those_of_the_results(monkeypatch):
    """`python benchmarks/pages.py` would change no page."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pages = importlib.import_module("pages")
    try:
        for name, fill in pages.PAGES.items():
            text = (ROOT / name).read_text()
            marked = re.findall(r"^<!-- (.*) -->\n\|", text, re.MULTILINE)
            assert marked, f"{name} has no tables"
            emptied = re.sub(r"(?m)^(<!-- .* -->\n)(?:\|.*\n)+(?=<!-- end -->)", r"\1", text)
            assert emptied != text
            assert fill(emptied) == text, f"run: python benchmarks/pages.py ({name})"
    finally:
        for module in ("pages", "study_page"):
            sys.modules.pop(module, None)
