"""Commands in processes of their own: they start fast, are what a typed command is, and end alone and with their parent."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import Command
from helpers import QUICK, ROOT, results

from mnist_lit.cli import job

PROBE = """
import atexit, os, sys, threading, time
atexit.register(print, "exit handlers run")
threading.Thread(target=lambda: time.sleep(0.1) or print("thread ended")).start()
if sys.argv[1] == "modules":
    sys.argv.pop(1)
    before = set(sys.modules)
    from mnist_lit.train import main
    main()
    print("imported:", *sorted({name.split(".")[0] for name in set(sys.modules) - before}))
elif sys.argv[1] == "says":
    print(__name__, __spec__.name, sys.argv[1:], os.getcwd(), sys.path[0], os.environ.get("OF_THE_TEST"), os.getsid(0) == os.getpid())
    sys.exit("as the test wants it")
elif sys.argv[1] == "server":
    import torch
    threads = open(f"/proc/{os.getppid()}/status").read().split("Threads:")[1].split()[0]
    print(threads, torch.cuda.is_initialized(), os.getppid())
elif sys.argv[1] == "raises":
    raise ZeroDivisionError("as the test wants it")
elif sys.argv[1] == "waits":
    import time
    print(os.getpid(), flush=True)
    time.sleep(100)
"""
PARENT = """
from mnist_lit.cli import job
if __name__ == "__main__":
    job.ChildProcess("probe", ["waits"]).wait()
"""


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    (tmp_path / "probe.py").write_text(PROBE)
    return tmp_path


def test_a_job_finds_everything_imported(probe: Path, command: Command) -> None:
    done = command.start("modules", *QUICK, "hydra.run.dir=run", cwd=probe, module="probe").ended()
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("imported:")]
    assert not {"torch", "torchvision", "torchmetrics", "lightning", "scipy", "sympy", "numpy", "tqdm"} & {
        *line.split()
    }


def test_the_server_has_imported_and_not_computed(probe: Path, command: Command) -> None:
    """A thread of its own, or a GPU that it uses, would not work in what is forked from it."""
    found = [command.start("server", cwd=probe, module="probe").ended().stdout.split() for _ in range(2)]
    assert found[0][:2] == ["1", "False"] and found[0] == found[1]


def test_a_job_is_what_a_typed_command_is(probe: Path, command: Command) -> None:
    done = command.start("says", "a b", cwd=probe, module="probe", environment={"OF_THE_TEST": "ä"}).ended()
    assert done.stdout == f"__main__ probe ['says', 'a b'] {probe} {probe} ä True\nthread ended\nexit handlers run\n"
    assert (done.returncode, done.stderr) == (1, "as the test wants it\n")
    raised = command.start("raises", cwd=probe, module="probe").ended()
    assert raised.returncode == 1 and raised.stderr.endswith("\nZeroDivisionError: as the test wants it\n")


def test_a_job_computes_with_the_threads_that_its_environment_says(tmp_path: Path, command: Command) -> None:
    for threads in ("1", "3"):
        done = command(*QUICK, f"hydra.run.dir={threads}", cwd=tmp_path, environment={"OMP_NUM_THREADS": threads})
        assert done.returncode == 0, done.stderr
        assert results(tmp_path / threads)["device"].startswith(f"cpu, {threads} thread")


def test_what_a_job_says_and_how_it_ends_comes_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ended = job.run("train", ["data.sourc=sample"], cwd=tmp_path)
    assert (ended.code, ended.reason) == (1, "train: unknown key data.sourc; did you mean data.source?")
    # Where importing takes more than a second, that is said first.
    assert capfd.readouterr().err.removeprefix("loading PyTorch and Lightning ...\n") == f"{ended.reason}\n"
    assert job.run("train", ["data.sourc=sample"], cwd=tmp_path, quiet=True) == ended
    assert capfd.readouterr().err == ""
    asked = [*QUICK[:2], "trainer.max_epochs=9999", "hydra.run.dir=run"]
    began = tmp_path / "run" / "checkpoints"
    ended = job.run("train", asked, cwd=tmp_path, quiet=True, should_stop=began.exists)
    assert ended.code == 143 and "stopped by SIGTERM after step" in ended.reason
    assert "killed by SIGKILL" in job.Result(-signal.SIGKILL, "").reason


def test_a_job_that_is_killed_ends_alone(probe: Path, command: Command) -> None:
    one, other = (command.start("waits", cwd=probe, module="probe") for _ in range(2))
    one.send_signal(signal.SIGKILL)
    assert one.wait(20) == -signal.SIGKILL and other.poll() is None
    other.send_signal(signal.SIGTERM)
    assert other.wait(20) == -signal.SIGTERM


def test_a_job_ends_with_who_has_started_it(probe: Path, command: Command) -> None:
    (probe / "parent.py").write_text(PARENT)
    starter = command.start(cwd=probe, module="parent")
    deadline = time.monotonic() + 30
    while not (number := starter.said().strip()):
        assert time.monotonic() < deadline and starter.poll() is None
        time.sleep(0.05)
    starter.send_signal(signal.SIGKILL)
    while Path(f"/proc/{number}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("arguments", "results", "mark"),
    [
        (["mnist_lit.train", "-m", "seed=range(12)", "hydra.sweep.dir=all{}"], "*/metrics.json", 3),
        # It starts Optuna and draws pictures, too.
        (
            ["mnist_lit.tune", "n_trials=12", "data.val_size=500", "study=all{}", "hydra.run.dir=all{}"],
            "trials/*/metrics.json",
            3.5,
        ),
    ],
    ids=["sweep", "search"],
)
def test_twelve_jobs_take_at_most_three_times_one_command(
    tmp_path: Path, arguments: list[str], results: str, mark: float
) -> None:
    """The mark is a ratio, of the quickest of eight at most: other work on the machine only adds."""

    def seconds(*arguments: str) -> float:
        started = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", *arguments, "data.source=sample", "trainer.fast_dev_run=true"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
        )
        return time.monotonic() - started

    singles, twelves = [], []
    for attempt in range(8):
        singles.append(seconds("mnist_lit.train"))
        twelves.append(seconds(*(each.format(attempt) for each in arguments)))
        assert len(list(tmp_path.glob(f"all{attempt}/{results}"))) == 12
        if min(twelves) < mark * min(singles):
            return
    raise AssertionError(f"twelve in {twelves} s, one in {singles} s")


def test_where_there_is_no_such_server_a_job_is_a_process_from_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "warm_up", lambda: multiprocessing.get_context("spawn"))
    ended = job.run("train", ["data.sourc=sample"], cwd=tmp_path)
    assert (ended.code, ended.reason) == (1, "train: unknown key data.sourc; did you mean data.source?")
    # Where importing takes more than a second, that is said first.
    assert capfd.readouterr().err.removeprefix("loading PyTorch and Lightning ...\n") == f"{ended.reason}\n"


def parent(folder: Path, code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A process of its own, with a server that has little to import."""
    (folder / "parent.py").write_text(
        "import os, signal, sys, threading, time\nfrom pathlib import Path\nfrom mnist_lit.cli import job\n"
        "job.PRELOADED = ('json', 'slow_to_import')\n"
        f"if __name__ == '__main__':\n{textwrap.indent(textwrap.dedent(code), '    ')}"
    )
    (folder / "slow_to_import.py").write_text("import time\ntime.sleep(0.5)\n")
    return subprocess.run(
        [sys.executable, "parent.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", **environment},
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
        timeout=60,
    )


def test_the_server_lives_through_signals_to_the_whole_group(probe: Path) -> None:
    done = parent(
        probe,
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: os.write(1, b"signal\\n"))
        job.warm_up()
        from multiprocessing.forkserver import _forkserver
        blocked = int(Path(f"/proc/{_forkserver._forkserver_pid}/status").read_text().split("SigBlk:")[1].split()[0], 16)
        print([number for number in job.SIGNALS if not blocked >> number - 1 & 1])
        for pause in (0.2, 1.0):  # while it imports, and when it waits
            time.sleep(pause)
            os.killpg(0, signal.SIGINT)
            os.killpg(0, signal.SIGTERM)
        print(job.ChildProcess("probe", ["says"]).wait())
        """,
    )
    assert done.returncode == 0 and done.stdout.count("signal\n") == 4, done
    assert "[]\n" in done.stdout and done.stdout.endswith("exit handlers run\n1\n")
    assert "Traceback" not in done.stderr


def test_a_job_whose_server_was_killed_ends(probe: Path) -> None:
    done = parent(
        probe,
        """
        with open("number", "w") as file:
            waiting = job.ChildProcess("probe", ["waits"], stdout=file.fileno())
        while not (text := Path("number").read_text()):
            time.sleep(0.05)
        server = int(Path(f"/proc/{text.strip()}/stat").read_text().split()[3])
        os.kill(server, signal.SIGKILL)
        print(waiting.wait(20))
        time.sleep(0.2)
        stat = Path(f"/proc/{waiting.pid}/stat")
        print(not stat.exists() or stat.read_text().split()[2] == "Z")
        waiting.send_signal(signal.SIGTERM)
        print(job.ChildProcess("probe", ["says"]).wait(20))  # by another server
        """,
    )
    assert done.stdout.splitlines()[:2] == ["-9", "True"], done.stderr
    assert done.stdout.endswith("\n1\n")


def test_several_threads_start_jobs_and_leave_the_environment_as_it_was(probe: Path) -> None:
    done = parent(
        probe,
        """
        before, codes = dict(os.environ), []
        threads = [threading.Thread(target=lambda: codes.append(job.ChildProcess("probe", ["says"]).wait())) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(codes, dict(os.environ) == before)
        """,
    )
    assert done.stdout.endswith("[1, 1, 1, 1] True\n"), done.stderr


def test_where_no_socket_can_be_made_a_job_is_a_process_from_nothing(probe: Path) -> None:
    folder = probe / ("long" * 25)
    folder.mkdir()
    done = parent(probe, 'print(job.ChildProcess("probe", ["says"]).wait())', TMPDIR=str(folder))
    assert done.stdout.endswith("exit handlers run\n1\n"), done.stderr


def test_a_process_whose_own_way_to_start_others_is_unknown_elsewhere_starts_jobs(probe: Path) -> None:
    """As joblib's have."""
    done = parent(
        probe,
        """
        import multiprocessing.context
        class OtherContext(multiprocessing.context.SpawnContext):
            _name = "other"
        multiprocessing.context._concrete_contexts["other"] = OtherContext()
        multiprocessing.set_start_method("other")
        print(job.ChildProcess("probe", ["says"]).wait(), multiprocessing.get_start_method())
        """,
    )
    assert done.stdout.endswith("exit handlers run\n1 other\n"), done.stderr
