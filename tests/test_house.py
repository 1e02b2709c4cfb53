"""The house: floors that are entered from above alone, and sizes that a reader can hold."""

import ast
import importlib
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import stepkit as sk
from tools import size

ROOT = Path(sk.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
FLOORS = (  # from the ground up: a part may use what stands in lines before its own
    "_checks",
    "_registry _files",
    "_kernels _compiling _video _workers _keys",
    "_sources",
    "clips",
    "stats removal",
    "models",
    "networks _convolutions",
    "prepare data",
    "training attribution published",
    "store _manifest metrics",
    "sweep viz",
    "_run panels",
    "study _controls",
    "explorer differences",
    "_settings _notebook",
    "report",
    "reproduce",
    "__main__",
)
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names.split()}
OPTIONAL = {"captum", "dask", "distributed", "IPython"}  # packages that may be missing
LATE = {"explorer", "reproduce", "sweep"}  # by `stepkit` and ``python -m stepkit``: they are slow


def place(module: str) -> str:
    """The part of the tree that a module's dotted name belongs to."""
    return module.split(".")[1] if "." in module else ""


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


NAMES = {dotted(path) for path in FILES}


def imports(path: Path):
    """The modules that a file imports, each with the place of the import in the code."""
    tree = ast.parse(path.read_text("utf-8"))
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in NAMES else node.module for name in whole]
        else:
            continue
        yield from ((name, node in inside) for name in found)


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_a_file_imports_from_lower_floors_alone(path):
    here = place(dotted(path))
    for name, _ in imports(path):
        there = place(name)
        if name.split(".")[0] == "stepkit" and there and here and there != here:
            assert FLOOR[there] < FLOOR[here], f"{here} stands below {there}"


def test_no_circle_of_imports():
    graph = {dotted(p): {n for n, _ in imports(p) if n in NAMES - {"stepkit"}} for p in FILES}
    for name, needs in graph.items():
        needs.discard(name)
    assert len([*TopologicalSorter(graph).static_order()]) >= len(FILES) - 1


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_no_function_imports_but_what_may_be_missing(path):
    late = LATE if dotted(path) in ("stepkit", "stepkit.__main__") else set()
    for name, inside in imports(path):
        known = name.split(".")[0] in OPTIONAL or place(name) in late
        assert not inside or known, f"{name} is imported inside a function"


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_a_file_and_its_functions_are_short(path):
    text = path.read_text("utf-8")
    assert text.count("\n") <= size.FILE
    assert {name: n for name, n in size.functions(text).items() if n > size.FUNCTION} == {}


def test_the_library_does_not_grow():
    """The budget is `size.BUDGET`; until it is reached, this number goes down with every change."""
    assert sum(size.code(path.read_text("utf-8")) for path in FILES) <= 8200


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_a_public_module_says_what_is_public(path):
    name = dotted(path)
    if any(part.startswith("_") for part in name.split(".")):
        return
    module = importlib.import_module(name) and sys.modules[name]
    assert isinstance(getattr(module, "__all__", None), list), f"{name} has no __all__"
    for public in module.__all__:
        assert hasattr(module, public)


def test_the_public_face_has_thirty_names_at_most():
    assert len(sk.__all__) <= size.NAMES
    assert all(hasattr(sk, name) for name in sk.__all__)


def test_the_counting_is_right():
    text = '"""Doc\n\nstring."""\n\n# why\nx = 1  # what\n\n\n'
    text += 'def f():\n    """Doc."""\n    return (\n        x\n    )\n'
    assert size.code(text) == 5
    assert size.functions(text) == {"f:9": 4}
