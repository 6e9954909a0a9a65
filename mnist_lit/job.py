"""A command of this project in a process of its own: a job of a sweep, or a trial of a search.

Whatever happens in it, an exception, an exit, a kill, happens to it alone; and it does not outlive who started it.

On Linux the process is forked from a server that has imported torch, Lightning and the rest once (the standard
library's forkserver), so that it starts in a fraction of a second. The server imports and never computes: no threads
and no random numbers are copied. Elsewhere the process imports all that anew.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import connection, reduction
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mnist_lit.launch import loading

SECONDS_TO_STOP = 60.0  # for the step under way and its checkpoint
PROCESSES: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
# What a training run imports, the slowest things first. What is not installed is left out.
PRELOADED = (
    *("torch", "torch._dynamo", "torchvision", "lightning", "matplotlib.backends.backend_agg", "hydra.main"),
    *("mnist_lit.trainer", "mnist_lit.data", "mnist_lit.model", "mnist_lit.randomness", "mnist_lit.recorder"),
    *("mnist_lit.report", "mnist_lit.scores", "mnist_lit.memory", "tqdm.contrib.logging", "jinja2"),
)
_waiting = threading.Lock()  # multiprocessing's processes are not to be started or asked by two threads at once


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


class Command:
    """``python -m <module>`` under way in a process of its own.

    Args:
        module: ``mnist_lit.train``, for instance.
        arguments: As on the command line.
        cwd: The folder that it runs in; None for this process's.
        environment: All of its environment; None for this process's.
        stdout: The open file that it writes to.
        stderr: The same for its errors.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        stdout: int = 1,
        stderr: int = 2,
    ) -> None:
        warm_up()
        outputs = (_Descriptor(stdout), _Descriptor(stderr))
        given = (module, list(arguments), str(cwd or Path.cwd()), dict(environment or os.environ))
        self._process: BaseProcess = PROCESSES.Process(target=_become, args=(*given, *outputs), name=module)
        with _waiting, loading("PyTorch and Lightning"):  # by the server, before its first one
            self._process.start()

    @property
    def pid(self) -> int:
        return int(self._process.pid or 0)

    def poll(self) -> int | None:
        """Its exit code, negative if a signal has killed it; None while it runs."""
        with _waiting:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended.

        Raises:
            TimeoutError: It has not within ``timeout`` seconds.
        """
        if not connection.wait([self._process.sentinel], timeout):
            raise TimeoutError
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


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
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    receive, send = os.pipe()
    with open(os.devnull, "wb") as nowhere:
        try:
            command = Command(f"mnist_lit.{verb}", arguments, cwd, environment, nowhere.fileno() if quiet else 1, send)
        finally:
            os.close(send)
    last: deque[str] = deque(maxlen=300)
    reader = threading.Thread(target=_pass_on, args=(receive, quiet, last), daemon=True)
    reader.start()
    try:
        while True:
            try:
                code = command.wait(every)
                break
            except TimeoutError:
                if look():
                    code = _stop(command, signal.SIGTERM)
                    break
    except BaseException as error:
        _stop(command, signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
        raise
    reader.join(5)  # a process that it left behind may hold the pipe
    return Ended(code, "\n".join(last))


def _pass_on(receive: int, quiet: bool, last: deque[str]) -> None:
    with open(receive, errors="replace") as lines:
        for line in lines:
            if not quiet:
                sys.stderr.write(line)
                sys.stderr.flush()
            if line.strip():
                last.append(line.rstrip())


def _stop(command: Command, number: signal.Signals) -> int:
    command.send_signal(number)
    try:
        return command.wait(SECONDS_TO_STOP)
    except TimeoutError:
        pass
    finally:
        command.send_signal(signal.SIGKILL)  # if it takes too long, or another Ctrl-C came
    return command.wait()


@cache
def warm_up() -> None:
    """Start the server, which then imports while this process does something else."""
    if PROCESSES.get_start_method() != "forkserver":
        return
    from multiprocessing import forkserver

    PROCESSES.set_forkserver_preload([*PRELOADED])
    # Python before 3.12.8 does not tell the server where this process finds its packages.
    package, own = str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")
    # OpenBLAS, which comes with NumPy and with SciPy, starts its threads when it is imported.
    changed = {"PYTHONPATH": os.pathsep.join(filter(None, (package, own))), "OPENBLAS_NUM_THREADS": "1"}
    before = {key: os.environ.get(key) for key in changed}
    os.environ.update(changed)
    try:
        forkserver.ensure_running()
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


class _Descriptor:
    """An open file, which another process gets under another number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _detach, (reduction.DupFd(self.number),)


def _detach(duplicate: Any) -> int:
    return int(duplicate.detach())


def _become(module: str, arguments: list[str], cwd: str, environment: dict[str, str], stdout: int, stderr: int) -> None:
    """In the new process: become what ``python -m <module>`` would be."""
    os.setsid()  # a Ctrl-C on the terminal is for the process that has started this one,
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which passes it on
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for given, own, stream in ((stdout, 1, sys.stdout), (stderr, 2, sys.stderr)):
        os.dup2(given, own)
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if (threads := environment.get("OMP_NUM_THREADS", "")).isdigit() and "torch" in sys.modules:
        import torch

        torch.set_num_threads(int(threads))  # it has read the variable in the server
    multiprocessing.set_start_method(None, force=True)  # what this process starts is not bound to how it was started
    sys.argv[1:] = arguments
    sys.path.insert(0, cwd)
    sys.modules.pop(module, None)  # if the process that has started this one has it as its main module
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # multiprocessing does not in Python 3.11 to 3.13


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    _end()


@cache
def end_with(parent: int) -> None:
    """Have this process stop, as if asked to by SIGTERM, when its parent is gone, killed perhaps."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        _end()

    threading.Thread(target=watch, daemon=True).start()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_STOP)
    os.kill(os.getpid(), signal.SIGKILL)
