"""Lightning's strategies that fork or spawn processes: called from Python as in a notebook, and from the command line."""

import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import nbformat
import pytest
from conftest import Command
from helpers import ROOT, assert_same, final, results, small
from nbclient import NotebookClient
from test_processes import SMALL, start

from mnist_lit import Interrupted, UserError
from mnist_lit.cli.forked import in_each_process
from mnist_lit.train import train

TWO = ["trainer.devices=2", "trainer.max_epochs=1"]
FROM_PYTHON = """
import sys
import torch
from mnist_lit import settings
from mnist_lit.train import train

if __name__ == "__main__":
    torch.ones(2_000_000).sum()
    results = train(sys.argv[1], **settings("train", *sys.argv[2:]))
    print("returned", results["test/loss"], len(results["test/confusion_matrix"]))
"""


def in_a_notebook(*cells: str, log: Path) -> None:
    """Run the cells in a kernel of Jupyter's, and write what they print to ``log``."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(each) for each in cells])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.delenv("PYTEST_CURRENT_TEST", raising=False)  # ipykernel would not show what processes print
        environment.setenv("PYTHONPATH", str(ROOT))
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(log.parent)}}).execute()
    log.write_text("".join(output.get("text", "") for cell in notebook.cells for output in cell.outputs))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook", "ddp_spawn_find_unused_parameters_false"])
def test_the_same_bits_as_under_ddp(strategy: str, tmp_path: Path, command: Command) -> None:
    there = command(*SMALL, *TWO, "trainer.strategy=ddp", f"hydra.run.dir={tmp_path}/ddp", cwd=tmp_path)
    assert there.returncode == 0, there.stderr
    arguments = [str(tmp_path / "here"), *SMALL, *TWO, f"trainer.strategy={strategy}"]
    if strategy == "ddp_notebook":
        in_a_notebook(f"import sys; sys.argv[1:] = {arguments}", FROM_PYTHON, log=tmp_path / "terminal")
    else:
        (tmp_path / "script.py").write_text(FROM_PYTHON)
        process = start("script.py", *arguments, cwd=tmp_path)
        assert process.wait(120) == 0, (tmp_path / "terminal").read_text()
    assert_same(final(tmp_path / "here"), final(tmp_path / "ddp"))
    returned = re.search(r"returned (\S+) 10\n", (tmp_path / "terminal").read_text())
    assert returned and float(returned[1]) == final(tmp_path / "ddp")[3]["test/loss"]
    assert (tmp_path / "here" / "report.html").exists()
    assert (tmp_path / "terminal").read_text().count("accuracy=") == 1
    tested = [
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "data.batch_size=500",
        "ckpt=here",
        "hydra.run.dir=tested",
    ]
    done = command(*tested, f"trainer.strategy={strategy}", cwd=tmp_path, verb="evaluate")
    assert done.returncode == 0, done.stderr
    assert "1,000 images of mnist-sample" in done.stdout and results(tmp_path / "tested")["test/images"] == 1000


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_on_the_command_line_it_logs_once_stops_and_goes_on(strategy: str, tmp_path: Path, command: Command) -> None:
    run, terminal = tmp_path / "run", tmp_path / "terminal"
    process = start(
        *SMALL,
        "trainer.max_epochs=20",
        "trainer.devices=2",
        f"trainer.strategy={strategy}",
        f"hydra.run.dir={run}",
        cwd=tmp_path,
    )
    deadline = time.monotonic() + 100
    while "epoch 2/" not in terminal.read_text():
        assert process.poll() is None and time.monotonic() < deadline, terminal.read_text()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    said = terminal.read_text()
    assert (
        said.count("epoch 1/20") == 1 and said.count("stopped by SIGTERM after step") == 1 and "Traceback" not in said
    )
    assert "epoch 1/20" in (run / "train.log").read_text()
    done = command(f"resume={run}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 20/20") == 1 and "20 epochs in" in done.stdout and results(run)["epochs"] == 20


@pytest.mark.slow
def test_a_mistake_is_the_same_sentence(tmp_path: Path, command: Command) -> None:
    done = command(*SMALL, *TWO, "trainer.strategy=ddp_fork", "data.batch_size=333", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("must divide equally among the 2 processes") == 1
    done = command(*SMALL, "trainer.devices=0", "trainer.strategy=ddp_fork", cwd=tmp_path)
    assert done.returncode == 1 and "devices" in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(UserError, match=r"limit_test_batches=0: every run ends with a test"):
        train(tmp_path / "run", **small("trainer.strategy=ddp_fork", "trainer.limit_test_batches=0"))


class Odd(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} {two}")  # cannot be unpickled: one argument is missing


def _fails(trainer: dict[str, object]) -> None:
    rank = os.environ["LOCAL_RANK"]
    if trainer["case"] == "waits":  # as for another process that has failed
        if rank == "0":
            raise KeyError("zero")
        time.sleep(1000)
    if trainer["case"] == "killed" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if trainer["case"] == "the other":  # and this one loses its connection to it
        if rank == "1":
            raise KeyError("one")
        time.sleep(0.3)
        raise RuntimeError("gloo/transport: connection closed by peer")
    if trainer["case"] == "odd":
        raise Odd(1, 2)
    if trainer["case"] == "interrupted":
        raise Interrupted(15, "stopped")
    time.sleep(1000)


@pytest.mark.parametrize(
    ("case", "error", "said"),
    [
        ("waits", KeyError, "zero"),
        ("killed", UserError, r"process 1 of this run has died \(exit code -9\)"),
        ("the other", KeyError, "one"),
        ("odd", RuntimeError, "Odd: 1 2"),
        ("interrupted", Interrupted, "stopped"),
    ],
)
def test_a_failure_of_one_process_ends_all(
    case: str, error: type[BaseException], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_lit.cli.ranks.RANK_ZERO_DELAY", 0.5)
    started = time.monotonic()
    with pytest.raises(error, match=said) as raised:
        in_each_process(_fails)({"strategy": "ddp_fork", "devices": 2, "accelerator": "cpu", "case": case})
    assert time.monotonic() - started < 60
    assert case == "killed" or "in _fails" in str(raised.value.__cause__)
    assert not multiprocessing.active_children()
    if isinstance(raised.value, Interrupted):
        assert raised.value.signal == 15
