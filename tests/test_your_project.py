"""A user's own project outside of this one, as ``docs/your-project.md`` tells it: its files, and every command there."""

import csv
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
from conftest import Command
from helpers import ROOT, assert_same, final, results

pytestmark = pytest.mark.slow
PAGE = (ROOT / "docs" / "your-project.md").read_text()
(COMMANDS,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
TRAIN, RESUME, EVALUATE, EXPORT, SWEEP, TUNE = (shlex.split(line)[2:] for line in COMMANDS.splitlines())
CPU = "trainer.accelerator=cpu"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the page's files."""
    folder = tmp_path_factory.mktemp("project")
    for name, text in re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def run(words: list[str], project: Path, *more: str) -> str:
    """What a command of the page prints."""
    command = Command()
    module, *arguments = words
    done = command.start(*arguments, *more, cwd=project, module=module).ended()
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(project: Path) -> Path:
    run(TRAIN, project, CPU)
    return project / "outputs" / "RUN"


def test_it_trains_with_every_part_of_its_own(trained: Path) -> None:
    found = results(trained)
    assert found["test/acc"] > 0.5 and 0 < found["test/confidence"] < 1 and found["data"]["name"] == "stripes"
    assert max(weight.abs().max() for weight in final(trained)[0].values() if weight.numel()) <= 0.2
    with (trained / "metrics.csv").open() as file:
        assert {"train/confidence", "val/confidence"} <= {*(csv.DictReader(file).fieldnames or ())}
    assert "far left" in (trained / "report.html").read_text()
    lines = (trained / "lines.txt").read_text()
    assert "stripes.parts.Net" in lines and "'val/confidence'" in lines and "'test/acc'" in lines


def test_killed_it_goes_on_exactly(project: Path, command: Command) -> None:
    asked = [*TRAIN[1:], CPU, "trainer.max_epochs=12"]
    killed, whole = project / "outputs" / "killed", project / "outputs" / "whole"
    process = command.start(*asked, "hydra.run.dir=outputs/killed", cwd=project, module=TRAIN[0])
    deadline = time.monotonic() + 60
    while not (killed / "checkpoints" / "last.ckpt").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait(20) == -signal.SIGKILL
    run([word.replace("RUN", "killed").replace("=8", "=12") for word in RESUME], project)
    run([TRAIN[0], *asked], project, "hydra.run.dir=outputs/whole")
    assert_same(final(killed), final(whole))


def test_more_epochs_evaluation_and_export(trained: Path, project: Path) -> None:
    before = results(trained)
    said = run(EVALUATE, project, "hydra.run.dir=outputs/evaluated")
    assert "500 images of stripes" in said and f"test {'confidence':26}{before['test/confidence']:.4f}" in said
    assert "its predictions for 500 test images match" in run(EXPORT, project)
    assert "epoch 8/8" in run(RESUME, project) and results(trained)["epochs"] == 8


def test_a_sweep_and_a_search(project: Path) -> None:
    run(SWEEP, project, CPU, "trainer.max_epochs=1", "hydra.sweep.dir=outputs/sweep")
    with (project / "outputs" / "sweep" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and all(row["status"] == "finished" and float(row["val/confidence"]) for row in rows)
    said = run(TUNE, project, CPU, "trainer.max_epochs=1", "checkpoint.monitor=val/confidence", "n_trials=2")
    assert "2 trials completed" in said and "val/confidence" in said


def test_its_keys_are_shown_and_mistakes_are_named(project: Path, command: Command) -> None:
    assert "_target_: stripes.parts.Net" in run([TRAIN[0], "--config-dir", "conf", "model=net", "--help"], project)
    done = command("--config-dir", "conf", "experiment=stripes", "model.chanels=3", cwd=project)
    assert done.returncode == 1 and "did you mean model.channels?" in done.stderr
