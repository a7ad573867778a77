"""The house rules that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: What each floor may import, besides itself and the package root.
BELOW: dict[str, set[str]] = {
    "model": set(),
    "contract": {"model"},
    "export": {"model", "contract"},
    "runtime": {"model", "contract", "export"},
    "train": {"model", "contract", "export", "runtime"},
    "evaluate": {"model", "contract", "export", "runtime"},
    "serve": {"model", "contract", "export", "runtime"},
}
COMMANDS = [
    "encache.export.cli",
    "encache.evaluate.bench_cli",
    "encache.runtime.cli",
    "encache.train.cli",
    "encache.evaluate.cli",
    "encache.evaluate.fit_cli",
    "encache.serve.batch_cli",
    "encache.serve.serve_cli",
]
LONGEST_FUNCTION, LONGEST_MODULE = 60, 400


def module_name(path):
    own = path.relative_to(ROOT / "src" / "encache" if "src" in path.parts else ROOT)
    return ".".join(("encache", *own.with_suffix("").parts)).removesuffix(".__init__")


PATHS = {
    module_name(path): path
    for folder in (*BELOW, "src/encache")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in PATHS.items()}


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_every_module_can_be_imported():
    code = f"import importlib\nfor name in {[*PATHS]}: importlib.import_module(name)"
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["encache", *COMMANDS])
def test_light_imports(module):
    heavy = ["torch", "diffusers", "transformers", "onnx", "onnxruntime"]
    heavy += ["tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"]
    heavy += ["ray", "fastapi", "pymoo"]
    done = run_python(f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def imports_of(body):
    """The encache modules that some statements import, wherever they stand."""
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("encache"):
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (name if name in TREES else node.module for name in whole)
            elif isinstance(node, ast.Import):
                yield from (one.name for one in node.names if one.name.startswith("encache"))


@pytest.mark.parametrize("module", PATHS)
def test_imports_point_downward(module):
    floor = PATHS[module].parent.name
    if floor not in BELOW or module.endswith("cli"):  # commands stand on the roof
        return
    for imported in imports_of(TREES[module].body):
        above = imported.split(".")[1:2]
        if above and above[0] in BELOW:
            assert above[0] in BELOW[floor] | {floor}, f"{module} imports {imported}"
        assert not imported.endswith("cli"), f"{module} imports the command {imported}"


def test_imports_run_in_no_circle():
    # Of what is imported as a module is, which type checking and imports inside functions are not.
    graph = {
        name: {*imports_of(n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom))}
        for name, tree in TREES.items()
    }
    done: set[str] = set()

    def visit(name, path):
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for imported in graph.get(name, ()):
                visit(imported, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def functions_of(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("module", PATHS)
def test_functions_and_modules_are_short(module):
    assert PATHS[module].read_text().count("\n") <= LONGEST_MODULE
    for function in functions_of(TREES[module]):
        documented = ast.get_docstring(function) and len(function.body) > 1
        body = function.body[1:] if documented else function.body
        length = body[-1].end_lineno - body[0].lineno + 1
        assert length <= LONGEST_FUNCTION, f"{function.name}: {length} lines without docstring"


def public_of(tree):
    """Public classes and functions of a module, and the methods of these, with their class."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node, None
            if isinstance(node, ast.ClassDef):
                yield from (
                    (one, node)
                    for one in node.body
                    if isinstance(one, ast.FunctionDef) and not one.name.startswith("_")
                )


#: Methods that a protocol documents, or torch.
DOCUMENTED_ELSEWHERE = {"forward"} | {
    one.name
    for tree in TREES.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(b) for b in node.bases)
    for one in functions_of(node)
}


@pytest.mark.parametrize("module", PATHS)
def test_what_is_public_is_documented(module):
    for node, owner in public_of(TREES[module]):
        documentation = ast.get_docstring(node) or ""
        if owner is None or node.name not in DOCUMENTED_ELSEWHERE:
            assert documentation, f"{node.name} has no docstring"
        if owner is None and isinstance(node, ast.FunctionDef):
            types = {ast.unparse(one.annotation) for one in node.args.args if one.annotation}
            if "Tensor" in types | {ast.unparse(node.returns) if node.returns else ""}:
                assert "[" in documentation or "shape" in documentation, f"{node.name}: no shapes"


@pytest.mark.parametrize("module", PATHS)
def test_functions_are_annotated(module):
    for function in functions_of(TREES[module]):
        given = function.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        unsaid = [one.arg for one in arguments if one and one.annotation is None]
        assert set(unsaid) <= {"self", "cls"}, f"{function.name}: {unsaid}"
        assert function.returns is not None, f"{function.name} says not what it returns"
