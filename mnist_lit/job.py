"""A command of this project in a process of its own: a job of a sweep, or a trial of a search.

Whatever happens in it, an exception, an exit, a kill, happens to it alone; and it does not outlive who started it.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PARENT = "MNIST_LIT_PARENT"  # the environment's variable with the number of the process that such a command ends with
SECONDS_TO_STOP = 60.0  # for the step under way and its checkpoint


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Its exit code; negative: the signal that killed it.
        error_output: The last lines that it wrote to its standard error.
    """

    code: int
    error_output: str

    @property
    def reason(self) -> str:
        """Why it did not end well, in a few words."""
        if self.code < 0:
            name = signal.Signals(-self.code).name
            return f"killed by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
        last = self.error_output.rpartition("\n")[2]
        return last if self.code == 1 and last else f"exit code {self.code} {last}".strip()


def run(
    verb: str,
    arguments: Sequence[str],
    cwd: Path | None = None,
    quiet: bool = False,
    look: Callable[[], bool] = lambda: False,
    every: float = 0.5,
    threads: int | None = None,
) -> Ended:
    """Run ``python -m mnist_lit.<verb>`` to its end.

    Args:
        cwd: The folder that it runs in, if another than this process's.
        quiet: Without what it has to say on the terminal.
        look: Called ``every`` so many seconds; true asks the command to stop.
        threads: How many it may compute with on a CPU; None leaves that to the environment.

    Raises:
        KeyboardInterrupt, Stopped: This process was asked to stop; so was the command then, and it has ended.
    """
    environment = {**os.environ, PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    process = subprocess.Popen(
        [sys.executable, "-m", f"mnist_lit.{verb}", *arguments],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if quiet else None,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # a Ctrl-C on the terminal is for this process, which passes it on
    )
    last: deque[str] = deque(maxlen=300)
    reader = threading.Thread(target=_pass_on, args=(process, quiet, last), daemon=True)
    reader.start()
    try:
        while True:
            try:
                code = process.wait(every)
                break
            except subprocess.TimeoutExpired:
                if look():
                    code = _stop(process, signal.SIGTERM)
                    break
    except BaseException as error:
        _stop(process, signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
        raise
    reader.join(5)  # a process that it left behind may hold the pipe
    return Ended(code, "\n".join(last))


def _pass_on(process: subprocess.Popen[str], quiet: bool, last: deque[str]) -> None:
    assert process.stderr
    for line in process.stderr:
        if not quiet:
            sys.stderr.write(line)
            sys.stderr.flush()
        if line.strip():
            last.append(line.rstrip())


def _stop(process: subprocess.Popen[str], number: signal.Signals) -> int:
    process.send_signal(number)
    try:
        return process.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()  # if it takes too long, or another Ctrl-C came
    return process.wait()


def end_with_parent() -> None:
    """Have this process stop, as if asked to by SIGTERM, when the command that started it is gone, killed perhaps."""
    if parent := os.environ.get(PARENT):
        os.environ[PARENT] = str(os.getpid())  # for the processes that this one starts
        end_with(int(parent))


@cache
def end_with(parent: int) -> None:
    """The same, for a process that its parent did not start with ``run``."""
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_STOP)
    os.kill(os.getpid(), signal.SIGKILL)
