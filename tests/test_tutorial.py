"""The tutorial notebook: what it imports, its committed outputs, and the same outputs when it runs afresh."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from helpers import ROOT
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

import mnist_lit

NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
# What the cells with these names print, whatever machine they run on.
PRINTED = {
    "split": [
        "train  3,500 images  (3500, 28, 28)  torch.uint8",
        "val      500 images  (500, 28, 28)  torch.uint8",
        "test   1,000 images  (1000, 28, 28)  torch.uint8",
    ],
    "to-tensor": ["equal to ToTensor, bit for bit: True", "255 becomes 1.0 and 128 becomes 0.501960813999176"],
    "conv1-maps": ["output (1, 32, 26, 26), 320 parameters"],
    "conv2-maps": ["output (1, 64, 24, 24), 18,496 parameters"],
    "pool-maps": ["output (1, 64, 8, 8), 0 parameters", "the same: True"],
    "dropout-maps": ["in eval mode nothing changes: True"],
    "dense-layers": [
        "output (1, 250), 1,024,250 parameters",
        "output (1, 10), 2,510 parameters",
        "in total 1,045,576 parameters",
        "layer by layer or at once, the same up to rounding: True",
    ],
    "save-and-load": ["the same predictions: True"],
}
PROBE = """
import json
print(json.dumps({
    "baseline": (nearest == data.test_labels).float().mean().item(),
    "adadelta": history[-1]["val"]["acc"],
    "slow": slow_history[-1]["val"]["acc"],
    "adam": changed_history[-1]["val"]["acc"],
    "confusion": [confusion.sum().item(), confusion.diag().sum().item() / len(data.test_labels)],
    "drawn": [int(number) for _, number in answers][2],
}))
"""


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def python(cell: Any) -> str:
    """The cell's code with ``%pip`` as the function call that IPython makes of it."""
    return TransformerManager().transform_cell(cell.source)


def text_of(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def shape_of(cell: Any) -> list[str]:
    """What a cell has printed and drawn, without the numbers."""
    return [
        re.sub(r"[-+\d.,%e]+", "#", output.text) if output.output_type == "stream" else " ".join(sorted(output.data))
        for output in cell.outputs
    ]


def test_the_notebook_uses_what_the_readme_names() -> None:
    readme = (ROOT / "README.md").read_text()
    found = set()
    for cell in code_cells(read()):
        for node in ast.walk(ast.parse(python(cell))):
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "mnist_lit":
                found |= {(str(node.module), alias.name) for alias in node.names}
    assert ("mnist_lit", "MNISTClassifier") in found
    for module, name in found:
        assert hasattr(importlib.import_module(module), name) and not f".{module}.{name}".count("._"), name
        assert name in mnist_lit.__all__ or f"{module.replace('.', '/')}.py" in readme, name


def test_the_notebook_is_small_and_was_run_from_the_top() -> None:
    notebook = read()
    cells = code_cells(notebook)
    assert 25 <= len(cells) <= 36
    assert max(len([line for line in cell.source.splitlines() if line]) for cell in cells) <= 12
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert NOTEBOOK.stat().st_size < 1_500_000
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert not any(cell.metadata for cell in notebook.cells)
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) >= 18


def test_the_committed_outputs_are_clean() -> None:
    for cell in code_cells(read()):
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data", "execute_result"), cell.id
            assert output.get("name", "stdout") == "stdout", cell.id  # no warnings
            written = json.dumps({key: value for key, value in output.get("data", {}).items() if key != "image/png"})
            assert len(written) < 200, cell.id
            shown = output.get("text", "") + written
            assert not re.search(r"/tmp|/root|/home|/Users|[A-Z]:\\|Warning|it/s", shown), cell.id
        for line in PRINTED.get(cell.id, []):
            assert line in text_of(cell).splitlines(), cell.id


def test_the_changes_that_it_suggests_exist() -> None:
    (suggestions,) = [cell.source for cell in read().cells if cell.id == "next"]
    changes = re.findall(r"^- `\"(.+?)\"`", suggestions, re.MULTILINE)
    assert len(changes) >= 4
    for change in changes:
        chosen = mnist_lit.settings("train", change)
        assert mnist_lit.MNISTClassifier(chosen["model"], chosen["optimizer"])
        assert chosen != mnist_lit.settings("train")


def test_links_of_the_notebook_lead_somewhere() -> None:
    links = [link for cell in read().cells for link in re.findall(r"\]\(([^)]+)\)", cell.source) if ":" not in link]
    assert len(links) >= 5
    assert all((NOTEBOOK.parent / link).exists() for link in links), links


def test_without_the_repository_the_first_cell_says_what_to_do(tmp_path: Path) -> None:
    code = python(code_cells(read())[0])
    # -S: a Python without any installed package.
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("FileNotFoundError: Clone or upload the whole repository")


@pytest.mark.slow
def test_the_notebook_run_afresh_prints_and_draws_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    committed, notebook = code_cells(read()), read()
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE))
    resources = {"metadata": {"path": tmp_path}}
    NotebookClient(notebook, timeout=1200, kernel_name="python3", coalesce_streams=True, resources=resources).execute()
    *cells, probe = code_cells(notebook)
    for before, now in zip(committed, cells, strict=True):
        assert shape_of(now) == shape_of(before), now.id
        assert all(line in text_of(now).splitlines() for line in PRINTED.get(now.id, [])), now.id
    (scores,) = [ast.literal_eval(text_of(cell)) for cell in cells if cell.id == "test-scores"]
    found = json.loads(text_of(probe))
    assert 0.75 < found["baseline"] < 0.85
    assert 0.94 < scores["test/acc"] < 0.99 and found["adadelta"] > 0.94 and found["adam"] > 0.94
    assert found["slow"] < 0.4
    assert found["confusion"] == [1000, pytest.approx(scores["test/acc"], abs=1e-4)]
    assert found["drawn"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ipython"]  # it leaves nothing behind
