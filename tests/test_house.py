"""The house rules that a machine can check."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("model", "contract", "train", "export", "runtime", "evaluate")
MODULES = sorted(
    f"encache.{path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')}"
    for floor in FLOORS
    for path in (ROOT / floor).rglob("*.py")
    if path.stem != "__init__"
)
#: What each floor may import, besides itself and the package root.
BELOW = {
    "model": set(),
    "contract": {"model"},
    "export": {"model", "contract"},
    "runtime": {"model", "contract", "export"},
    "train": {"model", "contract", "export", "runtime"},
    "evaluate": {"model", "contract", "export", "runtime"},
}


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_every_module_can_be_imported():
    code = f"import importlib\nfor name in {MODULES}: importlib.import_module(name)"
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "encache",
        "encache.export.cli",
        "encache.evaluate.bench_cli",
        "encache.runtime.cli",
        "encache.train.cli",
        "encache.evaluate.cli",
    ],
)
def test_light_imports(module):
    heavy = ["torch", "diffusers", "onnxruntime", "onnx", "tensorrt", "transformers"]
    done = run_python(f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_downward(floor):
    root = {path.stem for path in (ROOT / "src" / "encache").glob("*.py")}
    allowed = BELOW[floor] | root | {floor, "__version__"}
    for path in (ROOT / floor).rglob("*.py"):
        if path.stem.endswith("cli"):  # commands stand on the roof: nothing imports them
            continue
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] == ["from"] and words[1].startswith("encache."):
                assert words[1].split(".")[1] in allowed, f"{path}: {line}"
