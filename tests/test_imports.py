"""Imports of the package go one way: from the command lines down to the rule of acceptance."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (  # from the ground up; parts on the same floor do not know one another
    {"arrays", "decisions", "files", "resources"},
    {"kernels"},
    {"distributed"},
    {"data", "attacks"},
    {"models"},
    {"svm"},
    {"features"},
    {"rejection", "export"},
    {"dnr", "adapters"},
    {"evaluation"},
    {"cli"},
    {"__init__", "predict"},
)
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}
FILES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in ROOT.glob("torchdnr/**/*.py")
}


def imported(path):
    """Modules of the package that a file imports, wherever in the file it does.

    Imports that only a type checker sees do not run.
    """
    tree = ast.parse(path.read_text())
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torchdnr":
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield module if module in FILES else node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "torchdnr")


@pytest.mark.parametrize("module", FILES)
def test_a_file_imports_from_floors_below_or_its_own_folder(module):
    part = module.split(".")[1]
    for other in imported(FILES[module]):
        parts = other.split(".")
        assert len(parts) > 1, f"{module} imports the package itself"
        assert parts[1] == part or FLOOR[parts[1]] < FLOOR[part], f"{module} imports {other}"


def test_no_circle_of_imports():
    graph = {name: set(imported(path)) & set(FILES) for name, path in FILES.items()}
    while leaves := [name for name, others in graph.items() if not others & set(graph)]:
        for name in leaves:
            del graph[name]
    assert not graph, "these files import one another"


def test_the_top_of_the_package_is_taken_in_at_a_glance():
    entries = [p.name for p in (ROOT / "torchdnr").iterdir() if p.name != "__pycache__"]
    assert len(entries) <= 20, entries
