"""``trainer.strategy=ddp_fork``, ``ddp_notebook`` and ``ddp_spawn``: processes that need no script to start again.

Lightning would run only ``fit`` or ``test`` in them, and what callbacks had recorded there would be lost. Here each process
runs the whole verb, as under ``ddp``, with the same results.
"""

import functools
import inspect
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import connection
from typing import Any, ParamSpec, TypeVar

from mnist_lit import Interrupted, UserError, compat
from mnist_lit.cli import parent, ranks
from mnist_lit.cli.launch import loading
from mnist_lit.storage.tables import one_line

P = ParamSpec("P")
T = TypeVar("T")

# A notebook's process has often used torch before, whose threads do not survive a fork.
START_METHODS = {"ddp_spawn": "spawn", "ddp_fork": "fork", "ddp_notebook": "spawn"}
ENDING = 10  # seconds for a process to end by itself once it has returned


class _InProcess(Exception):
    """The traceback of an exception in another process, as its cause."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def in_each_process(verb: Callable[P, T]) -> Callable[P, T]:
    """Decorator for a verb: with one of these strategies, it runs in each of the processes.

    It returns what the first process returns, and raises what a process raises.
    """

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        trainer = inspect.signature(verb).bind(*args, **kwargs).arguments["trainer"]
        asked = str(trainer.get("strategy"))
        method = next((method for name, method in START_METHODS.items() if asked.startswith(name)), None)
        if not method or ranks.is_started_by_another():
            return verb(*args, **kwargs)
        if trainer.get("num_nodes") not in (None, 1):
            raise UserError(
                f"trainer.strategy={asked}: its processes are on one machine; for several, use ddp and torchrun"
            )
        result: T = _run(method, _number_of_processes(trainer), run, args, kwargs)
        return result

    return run


def _number_of_processes(trainer: dict[str, Any]) -> int:
    """As many as Lightning would start.

    Raises:
        UserError: It would refuse to.
    """
    with loading("PyTorch and Lightning"):
        import lightning as L

    given = {key: trainer[key] for key in ("accelerator", "devices", "strategy") if key in trainer}
    before = logging.root.manager.disable
    logging.disable(logging.INFO)  # the processes say the same
    try:
        return L.Trainer(**given, logger=False, enable_checkpointing=False, enable_progress_bar=False).num_devices
    except Exception as error:
        raise UserError(f"trainer: {one_line(error)}") from error
    finally:
        logging.disable(before)


def _run(method: str, count: int, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    context: Any = multiprocessing.get_context(method)
    with socket.create_server(("127.0.0.1", 0)) as free:
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if not (asked.isdigit() and int(asked)):  # as Lightning does for those that it starts
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment["OMP_NUM_THREADS"] = str(max(1, cores // count))
    log = _log_handlers() if method == "spawn" else None
    waiting: dict[Any, int] = {}  # where the outcome of each rank comes
    outcomes: dict[int, Any] = {}
    failure: BaseException | None = None
    with ExitStack() as stack:
        processes = []
        for rank in range(count):
            receive, send = context.Pipe(duplex=False)
            given = (rank, environment, os.getpid(), log, send, function, args, kwargs)
            processes.append(context.Process(target=_work, args=given))
            processes[rank].start()
            stack.callback(_end, processes[rank], rank, outcomes)
            send.close()
            waiting[receive] = rank
        asked_to_stop = stack.enter_context(_signals_passed_on(processes))
        while 0 not in outcomes:
            ready: Any = connection.wait([*waiting], ranks.RANK_ZERO_DELAY if failure else None)
            if not ready:
                break
            for receive in sorted(ready, key=waiting.__getitem__):
                rank = waiting.pop(receive)
                try:
                    outcomes[rank], cause = receive.recv()
                except (EOFError, OSError):
                    outcomes[rank], cause = _lost(processes[rank], rank, asked_to_stop), ""
                if isinstance(outcomes[rank], BaseException) and not failure:  # those of others follow from the first
                    failure = outcomes[rank]
                    failure.__cause__ = _InProcess(cause) if cause else None
    if failure:
        raise failure
    return outcomes[0]


def _lost(process: Any, rank: int, asked_to_stop: list[int]) -> BaseException:
    if asked_to_stop:
        return Interrupted(asked_to_stop[0], f"stopped by {signal.Signals(asked_to_stop[0]).name}")
    process.join(ENDING)
    return ranks.LostProcessError(f"process {rank} of this run has died (exit code {process.exitcode})")


def _end(process: Any, rank: int, outcomes: dict[int, Any]) -> None:
    """End a process, and those that it has started; one that waits for a process that has failed would wait for ever."""
    if rank in outcomes:
        process.join(ENDING)
    with suppress(OSError):  # it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _log_handlers() -> list[tuple[str, Any]] | None:
    """The log files of this process, for those that inherit none, and how they are written; None if nothing is logged."""
    files = [each for each in logging.root.handlers if isinstance(each, logging.FileHandler)]
    return [(each.baseFilename, each.formatter) for each in files] if logging.root.handlers else None


def _work(
    rank: int,
    environment: dict[str, str],
    starter: int,
    log: list[tuple[str, Any]] | None,
    send: connection.Connection,
    function: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> None:
    cause = ""
    try:
        os.setsid()  # a Ctrl-C on the terminal is for the process that has started this one, which passes it on
        parent.end_with(starter)
        os.environ |= {**environment, "LOCAL_RANK": str(rank)}
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        compat.leave_notebook()
        if log is not None:
            handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
            for path, formatter in log:
                handlers.append(logging.FileHandler(path, encoding="utf-8", delay=True))
                handlers[-1].setFormatter(formatter)
            logging.basicConfig(format="%(message)s", level=logging.INFO, handlers=handlers)
        if rank:
            logging.disable(logging.WARNING)  # the first process says it
        result = function(*args, **kwargs)
        outcome: Any = None if rank else result
    except BaseException as error:  # noqa: BLE001
        outcome = _as_it_travels(error)
        if error.__cause__ or not isinstance(error, UserError):  # otherwise its sentence says it all
            cause = traceback.format_exc()
    if log is not None:  # spawned: what atexit has to do is this process's own
        compat.shut_down_like_interpreter()
    sys.stdout.flush()
    send.send((outcome, cause))


def _as_it_travels(error: BaseException) -> BaseException:
    """The exception, or one that says the same if it is of a class that cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def _signals_passed_on(processes: list[Any]) -> Iterator[list[int]]:
    """While in this block, Ctrl-C and SIGTERM are passed on to the processes, which stop at the end of the step.

    Yields:
        The signals so far.
    """
    asked: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        asked.append(number)
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
