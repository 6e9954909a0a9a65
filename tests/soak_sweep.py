"""A night's sweep in minutes: 30 jobs side by side, of which one raises, one exits and one is killed with kill -9; the
sweep itself is killed with kill -9 in its midst and started again by the same command.

python tests/soak_sweep.py

Required at the end: 27 good results, three failures with their reasons, none of the 27 run twice, no process left.
"""

import contextlib
import csv
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
NETWORK = """\
import os, signal, sys
from mnist_lit.network import TutorialCNN

class Odd(TutorialCNN):
    def __init__(self, number=0):
        super().__init__()
        self.number = number

    def forward(self, images):
        if self.number == 3:
            raise ZeroDivisionError("as the soak wants it")
        if self.number == 11:
            sys.exit(5)
        if self.number == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)
"""
COMMAND = [
    *(sys.executable, "-m", "mnist_lit.train", "-m", "--config-dir=conf", "model=odd", "model.number=range(30)"),
    *("data.source=sample", "data.val_size=200", "trainer.accelerator=cpu", "trainer.max_epochs=2"),
    *("trainer.limit_train_batches=3", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep"),
]


def finished(folder: Path) -> dict[str, tuple[int, bytes]]:
    """The jobs that have results: when these were written, and what the job has logged."""
    paths = folder.glob("*/metrics.json")
    return {path.parent.name: (path.stat().st_mtime_ns, (path.parent / "train.log").read_bytes()) for path in paths}


def processes(sweep: int) -> list[int]:
    """The processes of the sweep: those that it has started, and those that they have."""
    lines = subprocess.check_output(["ps", "-eo", "pid=,ppid="], text=True).splitlines()
    parents = {int(process): int(parent) for process, parent in map(str.split, lines)}
    found, more = [], [sweep]
    while more:
        more = [process for process, parent in parents.items() if parent in more]
        found += more
    return found


def trains() -> bool:
    """Whether a process has the folder of a job open."""
    for path in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it has been closed
            if Path(os.readlink(path)).parent == Path.cwd() / "sweep":
                return True
    return False


def main() -> None:
    from mnist_lit.sweeps.jobs import read_jobs

    os.chdir(tempfile.mkdtemp())
    Path("odd_networks.py").write_text(NETWORK)
    Path("conf/model").mkdir(parents=True)
    Path("conf/model/odd.yaml").write_text("_target_: odd_networks.Odd\nnumber: 0\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    sweep = subprocess.Popen(COMMAND, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(finished(Path("sweep"))) < 10:
        time.sleep(0.1)
        assert sweep.poll() is None, f"the sweep ended by itself: {Path.cwd()}"
    its = processes(sweep.pid)
    assert len(its) >= 6, its  # two of joblib, their two servers, two that train
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    deadline = time.monotonic() + 60
    while (left := [number for number in its if Path(f"/proc/{number}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left and not trains(), f"processes are left behind: {left}"
    before = finished(Path("sweep"))
    print(
        f"killed with {len(before)} of 30 finished; no process is left {60 - (deadline - time.monotonic()):.1f} s later"
    )

    again = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, check=False)
    print(again.stdout[again.stdout.index("\n\n") :], again.stderr, sep="")
    after, jobs = finished(Path("sweep")), read_jobs(Path("sweep"))
    reasons = {job.overrides["model.number"]: job.reason for job in jobs if not job.results}
    ended = {name: len(re.findall(r"everything is in", log.decode())) for name, (_, log) in after.items()}
    with Path("sweep/summary.csv").open() as file:
        statuses = [row["status"] for row in csv.DictReader(file)]

    assert again.returncode == 1 and "3 of 30 jobs failed" in again.stderr
    assert len(jobs) == 30 and len(after) == 27 and statuses.count("finished") == 27 and statuses.count("failed") == 3
    assert reasons.keys() == {"3", "11", "20"}, reasons
    assert "as the soak wants it" in reasons["3"] and "code 5" in reasons["11"] and "SIGKILL" in reasons["20"]
    assert all(after[name] == it for name, it in before.items()), "a finished job was run again"
    assert set(ended.values()) == {1}, ended
    print("27 good results, 3 failures named, none of the 27 run twice")


if __name__ == "__main__":
    main()
