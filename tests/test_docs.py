"""The documents' examples, run as they stand."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import Command
from helpers import ROOT

from mnist_lit import MNISTClassifier


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
    assert done.returncode == 0 and "500 images of my_data.Stripes" in done.stdout, done.stderr
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


def test_every_row_of_the_fault_table_has_the_tests_that_it_names() -> None:
    tests = re.findall(r"def (test_\w+)", "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py")))
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]+) \|$", (ROOT / "docs" / "faults.md").read_text(), re.MULTILINE)
    assert len(rows) == 44
    for number, named in rows:
        for name in re.findall(r"`(test_\w+)", named):
            assert any(test.startswith(name) for test in tests), name
        assert re.search(rf"test_(\d\d_)*{int(number):02}_", named), number
