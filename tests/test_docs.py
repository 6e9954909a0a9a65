"""The documents' examples, run as they stand."""

import csv
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import Command
from helpers import ROOT
from PIL import Image

import mnist_lit
from mnist_lit import MNISTClassifier
from mnist_lit.cli.config import flatten, settings

DOCS = sorted((ROOT / "docs").glob("*.md"))
FENCES = re.compile(r"^(<!-- not run: .+ -->\n)?```(\S*).*?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Their blocks are unpacked, all of them, by tests of their own.
RUN_BY_OTHER_TESTS = ["another-network.md", "own-data.md", "your-project.md"]
RUN_HERE = [page for page in DOCS if "```bash" in page.read_text() and page.name not in RUN_BY_OTHER_TESTS]
SHORT = ["data.source=sample", "trainer.accelerator=cpu", "trainer.limit_train_batches=2"]
ADDED = {"train": [*SHORT, "trainer.max_epochs=1"], "tune": SHORT, "export": SHORT[:1], "evaluate": SHORT[:1]}


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_another_network_is_one_class_and_one_yaml_file(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, load = blocks("docs/another-network.md", "python")
    (config,) = blocks("docs/another-network.md", "yaml")
    line, evaluate = blocks("docs/another-network.md", "bash")
    (tmp_path / "my_networks.py").write_text(module)
    (tmp_path / "my_conf" / "model").mkdir(parents=True)
    (tmp_path / "my_conf" / "model" / "perceptron.yaml").write_text(config)
    arguments = line.strip().removeprefix("python -m mnist_lit.train ").split()
    short = ["data.source=sample", "trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=2"]
    done = command(*arguments, *short, "--config-dir", "my_conf", "hydra.run.dir=outputs/RUN", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "outputs" / "RUN" / "metrics.json").read_text())["test/loss"] < 5
    assert "203,530 parameters" in done.stdout  # 784 x 256 + 256 + 256 x 10 + 10

    arguments = shlex.split(evaluate.strip().removeprefix("python -m mnist_lit.evaluate "))
    done = command(*arguments, "data.source=sample", verb="evaluate", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names: dict[str, object] = {"MNISTClassifier": MNISTClassifier}
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    exec(load, names)
    assert type(names["classifier"].network).__name__ == "Perceptron"  # type: ignore[attr-defined]

    wrong = command("model=perceptron", "model.hiden=3", "--config-dir", "my_conf", cwd=tmp_path)
    assert wrong.stderr == "train: unknown key model.hiden; did you mean model.hidden?\n"


def test_other_data_are_a_module_and_a_line(tmp_path: Path, command: Command) -> None:
    (module,), (config,) = blocks("docs/own-data.md", "python"), blocks("docs/own-data.md", "yaml")
    train, evaluate = (shlex.split(line)[3:] for line in blocks("docs/own-data.md", "bash"))
    (tmp_path / "my_data.py").write_text(module)
    (tmp_path / "my_conf" / "data").mkdir(parents=True)
    (tmp_path / "my_conf" / "data" / "stripes.yaml").write_text(config)
    short = ["trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=2"]
    done = command(*train, *short, "hydra.run.dir=outputs/RUN", cwd=tmp_path)
    assert done.returncode == 0 and "15,365 parameters" in done.stdout, done.stderr  # 3 x 32 x 32 x 5 + 5
    assert json.loads((tmp_path / "outputs" / "RUN" / "metrics.json").read_text())["test/images"] == 1000
    done = command(*evaluate, verb="evaluate", cwd=tmp_path)
    assert done.returncode == 0 and "1,000 images of my_data.Stripes" in done.stdout, done.stderr
    by_file = ["data=stripes", "model._target_=my_data.Linear", *short, "--config-dir", "my_conf"]
    done = command(*by_file, "hydra.run.dir=outputs/2", cwd=tmp_path)
    assert json.loads((tmp_path / "outputs" / "2" / "metrics.json").read_text())["test/images"] == 1000, done.stderr


def test_the_readmes_lines_for_a_notebook_run(monkeypatch, tmp_path: Path) -> None:
    (code,) = blocks("README.md", "python")
    monkeypatch.chdir(tmp_path)
    quick = code.replace("max_epochs=12", "fast_dev_run=True, accelerator='cpu'").replace(
        'MNISTDataModule("data")', "MNISTDataModule(source='sample')"
    )
    names: dict[str, object] = {}
    exec(quick, names)
    assert abs(names["probabilities"][0].sum(dim=1) - 1).max() < 1e-5  # type: ignore[index]


README_LINES = [
    line
    for block in blocks("README.md", "bash")
    for line in block.replace("\\\n", " ").splitlines()
    if "-m mnist_lit." in line
    and not {"-m", "--help", "--config-dir=outputs/tune"} & {*line.split("mnist_lit.")[1].split()}
]


@pytest.mark.parametrize("line", README_LINES)
def test_the_readmes_commands_have_keys_and_values_that_there_are(line: str) -> None:
    """Those of one run; the other pages' commands are run as they stand."""
    _, _, rest = line.partition("-m mnist_lit.")
    verb, *overrides = shlex.split(rest, comments=True)
    settings(verb, *overrides)


def test_every_row_of_the_fault_table_has_the_tests_that_it_names() -> None:
    tests = re.findall(r"def (test_\w+)", "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py")))
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]+) \|$", (ROOT / "docs" / "faults.md").read_text(), re.MULTILINE)
    assert len(rows) == 44
    for number, named in rows:
        for name in re.findall(r"`(test_\w+)", named):
            assert any(test.startswith(name) for test in tests), name
        assert re.search(rf"test_(\d\d_)*{int(number):02}_", named), number


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_what_is_to_be_typed_is_in_blocks_that_are_run(page: Path) -> None:
    text = page.read_text()
    languages = {language for _, language, _ in FENCES.findall(text)}
    assert languages <= {"bash", "python", "yaml", "{toctree}", "{eval-rst}", "{literalinclude}"}
    assert text.count("```") == 2 * len(FENCES.findall(text)), "a fence that is indented, or not closed"


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_HERE, ids=lambda page: page.stem)
def test_every_command_of_a_page_runs(
    page: Path,
    tmp_path: Path,
    command: Command,
    good_run: Path,
    digits: tuple[np.ndarray, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a folder with the page's files, after a run in outputs/RUN; all of its blocks but those marked as not run."""
    text = page.read_text()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good_run, tmp_path / "outputs" / "RUN")
    Image.fromarray(digits[0][digits[1].tolist().index(3)]).save("three.png")
    files = {code: name for name, code in re.findall(r"`(\S+)`:\n\n```\w+\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)}
    for code, name in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(code)
    for number, (not_run, language, code) in enumerate(FENCES.findall(text)):
        if language == "python" and not not_run and code not in files:
            exec(code, {})
        for line in code.splitlines() if language == "bash" and not not_run else ():
            python, option, module, *arguments = shlex.split(line)
            assert (python, option, module.split(".")[0]) == ("python", "-m", "mnist_lit")
            verb = module.split(".")[1]
            where = (
                [f"hydra.run.dir=outputs/{number}_{len(list(Path('outputs').iterdir()))}"] if verb == "train" else []
            )
            done = command(*arguments, *ADDED.get(verb, []), *where, cwd=tmp_path, verb=verb)
            assert done.returncode == 0, f"{line}\n{done.stderr}"


@pytest.mark.slow
def test_what_the_callback_of_the_page_logs_is_recorded(tmp_path: Path, command: Command) -> None:
    (tmp_path / "my_conf" / "callbacks").mkdir(parents=True)
    (tmp_path / "my_callbacks.py").write_text(*blocks("docs/callbacks.md", "python"))
    (tmp_path / "my_conf" / "callbacks" / "gradient_norm.yaml").write_text(*blocks("docs/callbacks.md", "yaml"))
    arguments = shlex.split(blocks("docs/callbacks.md", "bash")[-1])[3:]
    done = command(*arguments, *ADDED["train"], "hydra.run.dir=outputs/RUN", cwd=tmp_path)
    with (tmp_path / "outputs" / "RUN" / "csv" / "metrics.csv").open() as file:
        found = [row["train/gradient_norm"] for row in csv.DictReader(file)]
    assert any(value and float(value) > 0 for value in found), done.stderr


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *DOCS], ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text()
    headings = [
        re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    ]
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#]*)#?([^)]*)\)", text):
        assert not target or (page.parent / target).exists(), target
        assert target or anchor in headings, anchor


@pytest.mark.parametrize("verb", ["train", "evaluate", "predict", "export", "convert", "serve", "tune", "runs"])
def test_the_page_of_the_configuration_has_every_key_default_and_comment(verb: str) -> None:
    text = (ROOT / "conf" / f"{verb}.yaml").read_text()
    expected = yaml.safe_load(text)
    del expected["hydra"]
    for entry in expected.pop("defaults"):
        for key, value in entry.items() if isinstance(entry, dict) else ():
            expected |= {} if key.startswith("override ") else {key.removeprefix("optional "): value}
    rows = list(runpy.run_path(str(ROOT / "docs" / "conf.py"))["keys"](text, ""))
    assert flatten({key: yaml.safe_load(default) for key, default, _ in rows if default}) == flatten(expected)
    assert all(comment for _, default, comment in rows if default)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Links, anchors and docstrings that are wrong are warnings."""
    arguments = ["--fail-on-warning", "--keep-going", "--quiet", "-d", str(tmp_path / "doctrees"), "docs"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *arguments, str(tmp_path / "site")],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    inventory = zlib.decompress((tmp_path / "site" / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    documented = {line.split(" ")[0] for line in inventory.splitlines()}
    assert {f"mnist_lit.{name}" for name in mnist_lit.__all__} <= documented
    pages = {page.name: page.read_text() for page in (tmp_path / "site").glob("*.html")}
    assert "passes over the training images; -1: no limit" in pages["configuration.html"]
    assert not [name for name, page in pages.items() if str(ROOT) in page or "<!-- README" in page]
