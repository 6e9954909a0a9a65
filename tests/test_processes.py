"""A run in several processes, started by Lightning, torchrun or srun, on CPUs; the numbers are rows of docs/faults.md."""

import csv
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from helpers import ROOT, assert_same, final, is_in_use, results

from mnist_lit import UserError
from mnist_lit.cli import ranks
from mnist_lit.cli.config import ConfigFiles, settings
from mnist_lit.evaluate import evaluate

SMALL = ["data.source=sample", "data.batch_size=400", "trainer.accelerator=cpu", "trainer.limit_test_batches=2"]
ENDLESS = [*SMALL, "trainer.max_epochs=9999", "checkpoint.every_n_steps=5"]

# The command with each process's loss at each step in a file of its own.
RECORDING = """
import sys
from pathlib import Path
from mnist_lit import train
from mnist_lit.model import MNISTClassifier

step = MNISTClassifier.training_step

def recorded(classifier, batch, batch_idx):
    loss = step(classifier, batch, batch_idx)
    with Path(__file__).with_name(f"losses_{classifier.trainer.world_size}_{classifier.global_rank}").open("a") as file:
        print(repr(loss.item()), len(batch[1]), file=file)
    return loss

MNISTClassifier.training_step = recorded
train.main()
"""

# The command, whose second process is killed in the second epoch unless it has been started again.
KILLED_ONCE = """
import os, signal
from mnist_lit import train
from mnist_lit.model import MNISTClassifier

step = MNISTClassifier.training_step

def killed(classifier, batch, batch_idx):
    if (classifier.global_step, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (13, "1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(classifier, batch, batch_idx)

MNISTClassifier.training_step = killed
train.main()
"""


# Lightning without the command: what is counted in the epoch and in the test.
PLAIN = """
import lightning as L
from mnist_lit import MNISTClassifier, MNISTDataModule

class Sizes(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        sizes.append(len(batch[1]))

sizes = []
options = dict(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False)
trainer = L.Trainer(max_epochs=1, callbacks=[Sizes()], **options)
trainer.fit(classifier := MNISTClassifier(), data := MNISTDataModule(source="sample"))
trainer.test(classifier, data)
print("sizes:", sizes, trainer.num_test_batches)
"""


def start(
    *arguments: str, cwd: Path, torchrun: list[str] | None = None, log: str = "terminal", threads: int | None = 1
) -> subprocess.Popen[bytes]:
    """``python -m mnist_lit.train``, or what else the arguments name first, with its output in the file ``log``.

    One thread a process, unless told otherwise, so that the bits do not depend on who has started it.
    """
    what = (
        list(arguments)
        if arguments[0].endswith(".py") or arguments[0] == "-m"
        else ["-m", "mnist_lit.train", *arguments]
    )
    with (cwd / log).open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *(["-m", "torch.distributed.run", *torchrun] if torchrun else []), *what],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), **({"OMP_NUM_THREADS": str(threads)} if threads else {})},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def start_machines(count: int, *arguments: str, cwd: Path) -> list[subprocess.Popen[bytes]]:
    """torchrun on so many machines, all of which are this one, with one process each; the first one comes last."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = ["--master-addr=127.0.0.1", f"--master-port={probe.getsockname()[1]}"]
    agents = []
    for number in reversed(range(count)):
        nodes = [f"--nnodes={count}", "--nproc-per-node=1", f"--node-rank={number}"]
        agents.append(start(*arguments, cwd=cwd, torchrun=[*nodes, *where], log=f"terminal_{number}"))
        time.sleep(1)
    return agents[::-1]


def ranks_of(
    command: Command, machines: int, devices: int, *arguments: str, cwd: Path, **what: str
) -> list["subprocess.CompletedProcess[str]"]:
    """What the processes of a run have ended with that are started as torchrun starts them, by the environment alone."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "False",  # there is no agent: the first process keeps the store
        "GROUP_WORLD_SIZE": str(machines),
        "LOCAL_WORLD_SIZE": str(devices),
        "WORLD_SIZE": str(machines * devices),
    }
    own = [
        {"RANK": str(rank), "GROUP_RANK": str(rank // devices), "LOCAL_RANK": str(rank % devices)}
        for rank in range(machines * devices)
    ]
    return _with_environments(command, shared, own, *arguments, cwd=cwd, **what)


def tasks_of(
    command: Command, processes: int, *arguments: str, cwd: Path, restarts: int | None = None, **what: str
) -> list["subprocess.CompletedProcess[str]"]:
    """What the processes of a run have ended with that are started as Slurm's srun starts them on one machine."""
    shared = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NAME": "digits",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NUM_TASKS": str(processes),
        "SLURM_NODEID": "0",
        **({} if restarts is None else {"SLURM_RESTART_COUNT": str(restarts)}),
    }
    own = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(processes)]
    return _with_environments(command, shared, own, *arguments, cwd=cwd, **what)


def _with_environments(
    command: Command, shared: dict[str, str], own: list[dict[str, str]], *arguments: str, cwd: Path, **what: str
) -> list["subprocess.CompletedProcess[str]"]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # One thread, so that the bits do not depend on who has started it.
    shared = {"OMP_NUM_THREADS": "1", "MASTER_PORT": port, **shared}
    processes = [command.start(*arguments, cwd=cwd, environment={**shared, **each}, **what) for each in own]
    return [process.ended() for process in processes[::-1]][::-1]  # the first one waits for the others


def said(*processes: subprocess.Popen[bytes], cwd: Path, code: int | None = 0) -> str:
    """What the processes and those that they have started have said, once they have ended, within a minute or so."""
    for process in processes:
        process.wait(timeout=100)
    text = "\n".join(path.read_text() for path in sorted(cwd.glob("terminal*")))
    assert code is None or {process.returncode for process in processes} == {code}, text
    return text


def started_by(process: subprocess.Popen[bytes]) -> list[int]:
    """The ids of the living processes that it has started, and those that they have."""
    found, more = [], [process.pid]
    while more:
        found += more
        more = [child for child, parent in _living().items() if parent in more]
    return found[1:]


def _living() -> dict[int, int]:
    """Each process's parent; not those that have ended and that only their parents have not noticed yet."""
    lines = subprocess.check_output(["ps", "-eo", "pid=,ppid=,stat="], text=True).splitlines()
    rows = [line.split() for line in lines]
    return {int(pid): int(parent) for pid, parent, state in rows if not state.startswith("Z")}


def wait_for(what: Callable[[], Any]) -> Any:
    end = time.monotonic() + 90
    while not (value := what()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def only_run(cwd: Path) -> Path:
    (folder,) = (cwd / "outputs").iterdir()
    return folder


def test_two_processes_have_the_losses_of_one_at_each_step_in_one_folder_with_one_log(
    tmp_path: Path, command: Command
) -> None:
    (tmp_path / "recording.py").write_text(RECORDING)
    texts = {}
    for count in (1, 2):
        # Without dropout, of which each process draws its own.
        own = ["model.dropout=0", "trainer.max_epochs=1", f"hydra.run.dir=run {count}"]
        arguments = [*SMALL, *own, "trainer.limit_test_batches=null"]
        ended = ranks_of(command, 1, count, *arguments, cwd=tmp_path, module="recording")
        texts[count] = "".join(each.stdout + each.stderr for each in ended)
        assert all(each.returncode == 0 for each in ended), texts[count]
    (one,), two = losses(tmp_path, 1), losses(tmp_path, 2)
    assert [size for _, size in one] == [400] * 10 and {size for process in two for _, size in process} == {200}
    for (expected, _), *parts in zip(one, *two, strict=True):
        assert sum(loss for loss, _ in parts) / 2 == pytest.approx(expected, rel=1e-5)

    of_one, of_two = results(tmp_path / "run 1"), results(tmp_path / "run 2")
    assert of_two["test/loss"] == pytest.approx(of_one["test/loss"], rel=1e-4)
    assert of_two["test/acc"] == pytest.approx(of_one["test/acc"], abs=1.5e-3)
    assert of_two["test/images"] == 1000 and of_two["device"] == "2 x cpu, 1 thread"
    files = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in tmp_path.glob("run *")]
    assert files[0] == files[1]
    # The other process says nothing, here and in the log.
    for text in (texts[2], (tmp_path / "run 2" / "train.log").read_text()):
        for line in ("1,045,576 parameters", "GLOBAL_RANK: ", "convolutions: ", "epoch 1/1", "`Trainer.fit` stopped"):
            assert sum(line in each for each in text.splitlines()) == 1, line


def losses(folder: Path, count: int) -> list[list[tuple[float, int]]]:
    """Of each process, of each step: the loss, and of how many images."""
    texts = [(folder / f"losses_{count}_{number}").read_text() for number in range(count)]
    pairs = [[line.split() for line in text.splitlines()] for text in texts]
    return [[(float(loss), int(size)) for loss, size in each] for each in pairs]


@pytest.mark.slow
def test_with_a_plain_trainer_each_image_is_in_one_process_too(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(PLAIN)
    text = said(start("plain.py", cwd=tmp_path), cwd=tmp_path)
    assert text.count(f"sizes: {[250] * 8} [2]") == 2, text


@pytest.mark.slow
def test_processes_share_the_batches_that_are_learned_by_heart(tmp_path: Path) -> None:
    asked = ["debug=overfit", "trainer.overfit_batches=2", "trainer.max_epochs=1", "trainer.devices=2"]
    said(start(*SMALL[:3], *asked, "hydra.run.dir=run", cwd=tmp_path), cwd=tmp_path)
    found = results(tmp_path / "run")
    assert found["test/images"] == 1000
    with (tmp_path / "run" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["images_per_second"]) * float(row["epoch_seconds"]) == pytest.approx(800)


@pytest.mark.slow
def test_the_processes_of_a_machine_share_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    process = start(
        *SMALL, "trainer.fast_dev_run=1", "trainer.devices=2", "hydra.run.dir=run", cwd=tmp_path, threads=None
    )
    said(process, cwd=tmp_path)
    threads = max(1, (os.cpu_count() or 1) // 2)
    assert results(tmp_path / "run")["device"].startswith(f"2 x cpu, {threads} thread")


def test_03_two_processes_stopped_at_any_step_go_on_with_the_same_bits(tmp_path: Path, command: Command) -> None:
    ended = ranks_of(command, 1, 2, cwd=tmp_path, module="every_step")
    text = "".join(each.stdout + each.stderr for each in ended)
    assert all(each.returncode == 0 for each in ended), text
    assert text.count(": the same bits") == 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in two processes that nothing has stopped."""
    cwd = tmp_path_factory.mktemp("whole")
    said(start(*SMALL, "trainer.max_epochs=4", "trainer.devices=2", "hydra.run.dir=run", cwd=cwd), cwd=cwd)
    return cwd / "run"


@pytest.mark.slow
def test_03_two_processes_stopped_by_sigterm_go_on_with_the_same_bits(whole: Path, tmp_path: Path) -> None:
    process = start(*SMALL, "trainer.max_epochs=4", "trainer.devices=2", "checkpoint.every_n_steps=1", cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("outputs/*/checkpoints/last.ckpt")))
    process.terminate()
    text = said(process, cwd=tmp_path, code=143)
    assert text.count("\nstopping after this step") == 1 and "Traceback" not in text
    assert len(sentences := re.findall("^train: .*", text, re.MULTILINE)) == 1 and "stopped by SIGTERM" in sentences[0]
    said(start("resume=latest", cwd=tmp_path), cwd=tmp_path)
    assert_same(final(only_run(tmp_path)), final(whole))


@pytest.mark.slow
def test_03_two_machines_stopped_by_sigterm_go_on_with_the_same_bits(whole: Path, tmp_path: Path) -> None:
    """The second one's signal alone stops both; both go on with the run that the first one finds to be the latest."""
    agents = start_machines(2, *SMALL, "trainer.max_epochs=4", "checkpoint.every_n_steps=1", cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("outputs/*/checkpoints/last.ckpt")))
    agents[1].terminate()
    text = said(*agents, cwd=tmp_path, code=None)
    assert len(re.findall("^train: stopped by SIGTERM", text, re.MULTILINE)) == 1
    for log in tmp_path.glob("terminal_*"):
        log.unlink()
    folder = only_run(tmp_path)
    text = said(*start_machines(2, "resume=latest", cwd=tmp_path), cwd=tmp_path)
    assert text.count("accuracy=") == 1 and only_run(tmp_path) == folder
    assert {path.name for path in folder.glob("*.log")} == {"train.log"}
    assert_same(final(folder), final(whole))


def test_three_machines_test_each_image_once(good_run: Path, tmp_path: Path, command: Command) -> None:
    """480 images a batch: the last one has 400 of 10,000 (or 40 of the sample's 1,000), which three do not divide."""
    full = os.environ.get("MNIST_LIT_DATA")
    data = [f"data.dir={full}", "data.source=mnist"] if full else ["data.source=sample"]
    asked = [f"ckpt={good_run}", "data.batch_size=480", "trainer.accelerator=cpu", *data]
    for ended in ranks_of(command, 3, 1, *asked, "hydra.run.dir=three", cwd=tmp_path, verb="evaluate"):
        assert ended.returncode == 0, ended.stderr
    three, one = results(tmp_path / "three"), evaluate(tmp_path / "one", **settings("evaluate", *asked))
    assert three["test/images"] == (10000 if full else 1000) and three["device"].startswith("3 x cpu")
    assert three["test/loss"] == pytest.approx(one["test/loss"], rel=1e-5)
    for key in ("test/acc", "test/digits", "test/confusion_matrix"):
        assert three[key] == one[key], key


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_26_when_a_process_dies_the_other_ends_with_a_sentence(dead: int, tmp_path: Path) -> None:
    first = start(*ENDLESS, "trainer.devices=2", cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("outputs/*/checkpoints/last.ckpt")))
    (second,) = started_by(first)
    os.kill((first.pid, second)[dead], signal.SIGKILL)
    killed = time.monotonic()
    text = said(first, cwd=tmp_path, code=(-9, 1)[dead])
    wait_for(lambda: second not in _living())
    assert time.monotonic() - killed < 60
    text = (tmp_path / "terminal").read_text()
    assert "Traceback" not in text
    (sentence,) = re.findall("^train: .*", text, re.MULTILINE)
    assert sentence == (
        "train: another process of this run has died, so this one ends, too; "
        f"resume with: python -m mnist_lit.train resume={only_run(tmp_path).relative_to(tmp_path)}"
    )


@pytest.mark.slow
def test_26_a_process_that_is_to_wait_for_a_dead_first_one_ends(tmp_path: Path) -> None:
    """It dies while the other one still imports, which would then look for it for half an hour."""
    first = start(*ENDLESS, "trainer.devices=2", cwd=tmp_path)
    (second,) = wait_for(lambda: started_by(first))
    time.sleep(1)
    first.kill()
    killed = time.monotonic()
    first.wait()
    wait_for(lambda: second not in _living())
    assert time.monotonic() - killed < 60


@pytest.mark.slow
def test_26_when_torchrun_is_killed_its_processes_end_and_leave_the_folder(tmp_path: Path) -> None:
    agent = start(*ENDLESS, "hydra.run.dir=run", torchrun=["--nproc-per-node=2", "--standalone"], cwd=tmp_path)
    wait_for((tmp_path / "run" / "checkpoints" / "last.ckpt").exists)
    assert is_in_use(tmp_path / "run")
    agent.kill()
    killed = time.monotonic()
    wait_for(lambda: not is_in_use(tmp_path / "run"))
    assert time.monotonic() - killed < 5
    said(agent, cwd=tmp_path, code=-9)


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_26_when_a_machines_process_dies_those_of_the_others_end(dead: int, tmp_path: Path) -> None:
    agents = start_machines(2, *ENDLESS, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("outputs/*/checkpoints/last.ckpt")))
    everybody = [each for agent in agents for each in started_by(agent)]
    os.kill(started_by(agents[dead])[0], signal.SIGKILL)
    killed = time.monotonic()
    text = said(*agents, cwd=tmp_path, code=1)
    wait_for(lambda: not _living().keys() & set(everybody))
    assert time.monotonic() - killed < 60
    (sentence,) = re.findall("^train: .*", text, re.MULTILINE)
    assert sentence.startswith("train: another process of this run has died") and "torchrun ... -m" in sentence


@pytest.mark.slow
def test_28_29_torchruns_processes_refuse_once(tmp_path: Path) -> None:
    for arguments, sentence in (
        (["optimizer.lrr=1"], "train: unknown key optimizer.lrr; did you mean optimizer.lr?"),
        (["data.batch_size=99"], "train: data.batch_size=99: each batch of the 4,000 training images, the last one"),
    ):
        process = start("data.source=sample", *arguments, torchrun=["--nproc-per-node=2", "--standalone"], cwd=tmp_path)
        text = said(process, cwd=tmp_path, code=1)
        assert len(re.findall("^train: .*", text, re.MULTILINE)) == 1 and sentence in text, text
        assert not (tmp_path / "outputs").exists() or not list((tmp_path / "outputs").iterdir())


def test_41_a_crash_in_another_process_is_in_the_log(tmp_path: Path, command: Command) -> None:
    (tmp_path / "crash.py").write_text(
        "import os\nfrom mnist_lit import train\nfrom mnist_lit.model import MNISTClassifier\n"
        "if os.environ['RANK'] == '1':\n    MNISTClassifier.training_step = lambda *_: 1 / 0\ntrain.main()\n"
    )
    first, second = ranks_of(command, 1, 2, *SMALL, "hydra.run.dir=run", cwd=tmp_path, module="crash")
    assert second.stderr.count("\nZeroDivisionError: ") == 1 and "another process of this run" in first.stderr
    assert (tmp_path / "run" / "train.log").read_text().count("\nZeroDivisionError: ") == 1


@pytest.mark.slow
def test_42_processes_that_torchrun_starts_again_go_on_with_the_same_bits(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "killed_once.py").write_text(KILLED_ONCE)
    torchrun = ["--nproc-per-node=2", "--standalone", "--max-restarts=1"]
    arguments = [*SMALL, "trainer.max_epochs=4", "checkpoint.every_n_steps=5"]
    text = said(start("killed_once.py", *arguments, torchrun=torchrun, cwd=tmp_path), cwd=tmp_path)
    folder = only_run(tmp_path)
    assert f"resuming outputs/{folder.name} from last.ckpt" in text
    assert_same(final(folder), final(whole))


def test_42_a_job_that_slurm_starts_again_goes_on_in_its_folder(tmp_path: Path, command: Command) -> None:
    (tmp_path / "killed_once.py").write_text(KILLED_ONCE)
    arguments = [*SMALL, "trainer.max_epochs=2", "checkpoint.every_n_steps=5"]
    first, second = tasks_of(command, 2, *arguments, cwd=tmp_path, module="killed_once")
    assert second.returncode == -signal.SIGKILL
    assert (
        first.stderr.rpartition("; ")[2] == "resume with: srun ... python -m mnist_lit.train resume=outputs/slurm_7\n"
    )
    ended = tasks_of(command, 2, *arguments, cwd=tmp_path, module="killed_once", restarts=1)
    assert [each.returncode for each in ended] == [0, 0], ended
    assert "resuming outputs/slurm_7 from last.ckpt" in ended[0].stdout and not ended[1].stdout
    assert only_run(tmp_path).name == "slurm_7" and results(only_run(tmp_path))["device"] == "2 x cpu, 1 thread"
    # Once more, it has nothing to do; another command of the job does not touch what the first has made.
    first, second = tasks_of(command, 2, *arguments, "trainer.devices=auto", cwd=tmp_path, restarts=2)
    assert (first.returncode, second.returncode) == (0, 0) and "outputs/slurm_7 is finished" in first.stdout
    tasks_of(command, 1, *SMALL, "trainer.fast_dev_run=true", cwd=tmp_path)
    assert {folder.name for folder in (tmp_path / "outputs").iterdir()} == {"slurm_7", "slurm_7_2"}


def test_42_a_job_that_slurm_starts_again_before_its_run_had_begun(tmp_path: Path, command: Command) -> None:
    (tmp_path / "outputs" / "slurm_7").mkdir(parents=True)
    (ended,) = tasks_of(command, 1, "trainer.fast_dev_run=true", *SMALL, cwd=tmp_path, restarts=1)
    assert ended.returncode == 0 and only_run(tmp_path).name == "slurm_7"


def test_srun_starts_one_run_or_several_searches(tmp_path: Path, command: Command) -> None:
    first, second = tasks_of(command, 2, "-m", "seed=0,1", cwd=tmp_path)
    sentence = "train: srun starts the processes of one run: leave out -m, or start one process\n"
    assert (first.stderr, first.returncode, second.returncode) == (sentence, 1, 1)
    (swept,) = tasks_of(command, 1, *SMALL, "-m", "seed=0,1", "trainer.fast_dev_run=true", cwd=tmp_path)
    assert swept.returncode == 0, swept.stderr


def test_torchruns_numbers_are_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LOCAL_WORLD_SIZE", "4"), ("GROUP_WORLD_SIZE", "2"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    files = ConfigFiles("train")
    for typed in ([], ["trainer.devices=4"], ["trainer.num_nodes=2", "trainer.devices=auto"]):
        config = files.compose(typed)
        ranks.take_starters_numbers(config)
        assert (config.trainer.devices, config.trainer.num_nodes) == (4, 2)
    with pytest.raises(UserError, match="devices=2: torchrun has started 4 processes on each of 2 nodes"):
        ranks.take_starters_numbers(files.compose(["trainer.devices=2"]))
    monkeypatch.setenv("WORLD_SIZE", "7")
    with pytest.raises(UserError, match="torchrun has started 7 processes on 2 nodes: give each equally many"):
        ranks.take_starters_numbers(files.compose([]))


def test_28_several_machines_without_torchrun_are_refused(tmp_path: Path, command: Command) -> None:
    done = command("trainer.num_nodes=2", cwd=tmp_path)
    assert (done.returncode, list(tmp_path.iterdir())) == (1, [])
    assert done.stderr == "train: trainer.num_nodes=2: start several machines with torchrun or srun (see README.md)\n"
