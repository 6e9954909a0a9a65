"""Runs a command of this project in its own process: a job of a sweep, or a trial of a search.

An exception, an exit or a kill in it affects nothing else, and it does not outlive the process that started it.

On Linux it is forked from a server that has imported torch, Lightning and the rest once (the standard library's
forkserver), so it starts in a fraction of a second. The server only imports and never computes: no threads are forked,
and no GPU is in use. Elsewhere the process imports everything anew.
"""

import atexit
import contextlib
import logging
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mnist_lit import compat
from mnist_lit.cli import launch, parent

STOP_TIMEOUT = 60.0  # for the current step and its checkpoint
SERVER_LOST = 255  # the exit code that multiprocessing reports for a process whose server was killed
HYDRAS_LAST_LINE = "\nSet the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace."
SIGNALS = (signal.SIGINT, signal.SIGTERM)
PRELOADED = ("mnist_lit.cli.preloaded",)
_one_at_a_time = threading.Lock()  # multiprocessing's processes must not be started or polled by two threads at once


@dataclass(frozen=True)
class Result:
    """How a command ended.

    Attributes:
        code: Its exit code; negative: the signal that killed it.
        error_output: The last lines of its standard error.
    """

    code: int
    error_output: str

    @property
    def reason(self) -> str:
        """Why it failed, in a few words."""
        if self.code < 0:
            name = signal.Signals(-self.code).name
            return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        last = self.error_output.removesuffix(HYDRAS_LAST_LINE).rpartition("\n")[2]
        return last if self.code == 1 and last else f"exit code {self.code} {last}".strip()


class ChildProcess:
    """A running ``python -m <module>``, in its own process.

    Args:
        module: Such as ``mnist_lit.train``.
        arguments: As on the command line.
        cwd: Its working directory; None for that of this process.
        environment: Its whole environment; None for that of this process.
        stdout: File descriptor of its standard output.
        stderr: File descriptor of its standard error.
        composed: The configuration that the arguments give, if it has been composed and checked already.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        stdout: int = 1,
        stderr: int = 2,
        composed: Any = None,
    ) -> None:
        outputs = [connection.Connection(os.dup(number)) for number in (stdout, stderr)]  # can be sent
        given = (module, list(arguments), str(cwd or Path.cwd()), dict(environment or os.environ), composed)
        with _one_at_a_time, launch.loading("PyTorch and Lightning"):  # by the server, before its first one
            self._process: BaseProcess = warm_up().Process(target=_become, args=(*given, *outputs), name=module)
            own = multiprocessing.get_start_method(allow_none=True)
            multiprocessing.set_start_method(None, force=True)  # in joblib's processes it is one that only they know
            try:
                self._process.start()
            finally:
                multiprocessing.set_start_method(own, force=True)
                for each in outputs:
                    each.close()

    @property
    def pid(self) -> int:
        return int(self._process.pid or 0)

    def poll(self) -> int | None:
        """Its exit code, negative if a signal killed it; None while it runs."""
        with _one_at_a_time:
            code = self._process.exitcode
        if code == SERVER_LOST:  # or its own
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
                return -signal.SIGKILL
        return code

    def wait(self, timeout: float | None = None) -> int:
        """Wait for it to end, and return its exit code.

        Raises:
            TimeoutError: It is still running after ``timeout`` seconds.
        """
        if not connection.wait([self._process.sentinel], timeout):
            raise TimeoutError
        with _one_at_a_time:
            self._process.join()  # it may have closed its files and not yet ended
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, number)


def run(
    verb: str,
    arguments: Sequence[str],
    cwd: Path | None = None,
    quiet: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    threads: int | None = None,
    composed: Any = None,
) -> Result:
    """Run ``python -m mnist_lit.<verb>`` to its end.

    Args:
        cwd: Its working directory; None for that of this process.
        quiet: Whether to hide its output.
        should_stop: Called every half second; true asks the command to stop.
        threads: The number of CPU threads it may use; None leaves that to the environment.
        composed: The configuration that the arguments give, if it has been composed and checked already.

    Raises:
        KeyboardInterrupt, Interrupted: This process was asked to stop. The command was stopped, too.
    """
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    receive, send = os.pipe()
    with open(os.devnull, "wb") as nowhere:
        try:
            stdout = nowhere.fileno() if quiet else 1
            command = ChildProcess(f"mnist_lit.{verb}", arguments, cwd, environment, stdout, send, composed)
        finally:
            os.close(send)
    last: deque[str] = deque(maxlen=300)
    reader = threading.Thread(target=_pass_on, args=(receive, quiet, last), daemon=True)
    reader.start()
    code: int | None = None
    try:
        while code is None:
            try:
                code = command.wait(0.5)
            except TimeoutError:
                code = _stop(command, signal.SIGTERM) if should_stop() else None
    except BaseException as error:
        _stop(command, signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
        raise
    reader.join(5)  # a process that it left behind may hold the pipe
    return Result(code, "\n".join(last))


def _pass_on(receive: int, quiet: bool, last: deque[str]) -> None:
    with open(receive, errors="replace") as lines:
        for line in lines:
            if not quiet:
                sys.stderr.write(line)
                sys.stderr.flush()
            if line.strip():
                last.append(line.rstrip())


def _stop(command: ChildProcess, number: signal.Signals) -> int:
    command.send_signal(number)
    try:
        return command.wait(STOP_TIMEOUT)
    except TimeoutError:
        pass
    finally:
        command.send_signal(signal.SIGKILL)  # if it takes too long, or another Ctrl-C came
    return command.wait()


@cache
def warm_up() -> Any:
    """The ``multiprocessing`` context to start commands with. Its server, if any, starts importing in the background."""
    if sys.platform != "linux":  # on a Mac what is forked must not use the system's libraries
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver, resource_tracker

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    resource_tracker.ensure_running()  # the server starts it otherwise, which unblocks signals
    # Its life is decided by those who use it, and not by a Ctrl-C on the terminal or a signal to the whole group.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    before = dict(os.environ)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's OpenBLAS starts its threads when it is imported
    find_package()
    try:
        forkserver.ensure_running()
    except OSError:  # the folder for temporary files has too long a name for a socket, or holds none
        return multiprocessing.get_context("spawn")
    finally:
        os.environ.clear()
        os.environ.update(before)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return context


def find_package() -> None:
    """Make the package importable in Python processes that this one starts, whatever their working directory."""
    own = str(Path(__file__).parents[2])
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([own, *(place for place in places if place not in ("", own))])


def _become(
    module: str,
    arguments: list[str],
    cwd: str,
    environment: dict[str, str],
    composed: Any,
    stdout: connection.Connection,
    stderr: connection.Connection,
) -> None:
    """Turn the new process into what ``python -m <module>`` would be."""
    os.setsid()  # a Ctrl-C on the terminal is for the process that has started this one,
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which passes it on
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    starter = multiprocessing.parent_process()
    assert starter and starter.pid
    parent.end_with(starter.pid)
    for given, own, stream in ((stdout, 1, sys.stdout), (stderr, 2, sys.stderr)):
        os.dup2(given.fileno(), own)
        given.close()
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.chdir(cwd)
    os.environ.update(environment)  # the others are from imports in the server: Lightning sets one
    if (threads := environment.get("OMP_NUM_THREADS", "")).isdigit() and int(threads) and "torch" in sys.modules:
        import torch

        torch.set_num_threads(int(threads))  # it has read the variable in the server
    multiprocessing.set_start_method(None, force=True)  # what this process starts is not bound to how it was started
    sys.argv[1:] = arguments
    launch.composed = composed
    sys.path.insert(0, cwd)
    sys.modules.pop(module, None)  # if the process that has started this one has it as its main module
    atexit.unregister(os._exit)  # is meant for the server
    for function in (logging.shutdown, compat.run_finalizers):
        atexit.register(function)  # Python 3.13 has forgotten what imports in the server have registered
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        # As Python ends a process, and multiprocessing does not, or in another order.
        compat.shut_down_like_interpreter()
