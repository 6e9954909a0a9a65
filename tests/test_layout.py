"""Which part of the package may import which: downwards only, so that each can be read without those above it."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "mnist_lit"
# From the lowest floor to the highest; a name is a module or a sub-package.
FLOORS = [
    ["__init__", "compat"],
    ["storage", "kernels"],
    ["network", "other_networks", "build", "batches", "metrics"],
    ["schedulers", "checkpointed"],
    ["data", "model"],
    ["mnist_like"],
    ["training", "inference"],
    ["reports"],
    ["image_folder"],
    ["cli"],
    ["sweeps"],
    ["train", "evaluate", "predict", "export", "convert", "serve", "tune", "runs"],
]
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}


def imports(path: Path) -> set[str]:
    """The modules and sub-packages of this project that a file imports, wherever in it, but for type checkers only."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body.clear()  # before ast.walk comes to it
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = [name.split(".") for name in names if name.startswith("mnist_lit.")]
        found |= {each[1] for each in parts if each[1] in FLOOR_OF}
    return found


def test_every_module_has_its_floor() -> None:
    there = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert there == FLOOR_OF.keys()


@pytest.mark.parametrize("name", FLOOR_OF)
def test_imports_go_down(name: str) -> None:
    files = [PACKAGE / f"{name}.py"] if (PACKAGE / f"{name}.py").exists() else [*(PACKAGE / name).glob("*.py")]
    assert files
    for path in files:
        up = {each for each in imports(path) - {name} if FLOOR_OF[each] >= FLOOR_OF[name]}
        assert not up, f"{path.relative_to(ROOT)} imports {up}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        found = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
        graph[name] = {each for each in found | {str(node.module) for node in nodes} if each in names}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("mnist_lit.data", ["hydra", "mnist_lit.cli", "multiprocessing.forkserver"]),
        ("mnist_lit.model", ["hydra", "mnist_lit.cli", "mnist_lit.data"]),
        ("mnist_lit.network", ["lightning", "hydra", "torchmetrics", "mnist_lit.data"]),
        ("mnist_lit.kernels.memory", ["lightning", "torch"]),
        ("mnist_lit", ["torch", "hydra"]),
    ],
)
def test_the_tutorial_stands_alone(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
