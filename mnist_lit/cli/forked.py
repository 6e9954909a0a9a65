"""Lightning's strategies that fork or spawn their processes, which notebooks need: ``ddp_fork``, ``ddp_notebook``, ``ddp_spawn``.

Lightning would only fit there, and what callbacks have recorded would end with the processes. Here the whole verb
runs in each of them, as it does under ``ddp``, with the same results.
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
from contextlib import ExitStack, contextmanager
from logging.handlers import QueueHandler, QueueListener
from multiprocessing import connection
from typing import Any

from mnist_lit import UserError, compat
from mnist_lit.cli import parent, ranks
from mnist_lit.storage.tables import one_line

START_METHODS = {"ddp_spawn": "spawn", "ddp_fork": "fork", "ddp_notebook": "fork"}


def in_each_process(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: run a function that has an argument ``trainer`` in each process of these strategies.

    Afterwards it returns what it returns in the first process, or raises what it raises there.
    """

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> Any:
        trainer = inspect.signature(verb).bind(*args, **kwargs).arguments["trainer"]
        asked = str(trainer.get("strategy"))
        method = next((method for name, method in START_METHODS.items() if asked.startswith(name)), None)
        if not method or ranks.is_started_by_another():
            return verb(*args, **kwargs)
        return _run(method, _number_of_processes(trainer), run, args, kwargs)

    return run


def _number_of_processes(trainer: dict[str, Any]) -> int:
    """As many as Lightning would start.

    Raises:
        UserError: It would refuse to.
    """
    import lightning as L

    given = {key: trainer[key] for key in ("accelerator", "devices", "strategy") if key in trainer}
    logging.disable(logging.INFO)  # the processes say the same
    try:
        return L.Trainer(**given, logger=False, enable_checkpointing=False, enable_progress_bar=False).num_devices
    except Exception as error:
        raise UserError(f"trainer: {one_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)


def _run(method: str, count: int, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    context: Any = multiprocessing.get_context(method)
    with socket.create_server(("127.0.0.1", 0)) as free:
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    threads = str(max(1, (os.cpu_count() or 1) // count))
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", threads)
    waiting: dict[Any, int] = {}  # where the outcome of each rank comes
    outcomes: dict[int, Any] = {}
    with ExitStack() as stack:
        log = stack.enter_context(_log_of_spawned(context)) if method == "spawn" and logging.root.handlers else None
        processes = []
        for rank in range(count):
            receive, send = context.Pipe(duplex=False)
            given = (rank, environment, os.getpid(), log, send, function, args, kwargs)
            processes.append(context.Process(target=_work, args=given))
            processes[rank].start()
            stack.callback(processes[rank].join)
            stack.callback(processes[rank].kill)  # those that wait for one that has failed would wait for ever
            send.close()
            waiting[receive] = rank
        stack.enter_context(_signals_passed_on(processes))
        while 0 not in outcomes:
            failed = any(isinstance(outcome, BaseException) for outcome in outcomes.values())
            ready: Any = connection.wait([*waiting], ranks.RANK_ZERO_DELAY if failed else None)
            if not ready:
                break
            for receive in ready:
                rank = waiting.pop(receive)
                try:
                    outcomes[rank] = receive.recv()
                except EOFError:
                    outcomes[rank] = RuntimeError(f"process {rank} of this run has been killed")
    outcome = outcomes.get(0, next(iter(outcomes.values())))
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _work(
    rank: int,
    environment: dict[str, str],
    starter: int,
    log: Any,
    send: connection.Connection,
    function: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> None:
    import torch

    os.setsid()  # a Ctrl-C on the terminal is for the process that has started this one, which passes it on
    parent.end_with(starter)
    os.environ |= {**environment, "LOCAL_RANK": str(rank)}
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    compat.leave_notebook()
    if log:
        queue, level = log
        logging.basicConfig(
            format="%(message)s", level=level, handlers=[logging.StreamHandler(sys.stdout), QueueHandler(queue)]
        )
    if rank:
        logging.disable(logging.WARNING)  # the first process says it
    try:
        outcome = function(*args, **kwargs)
    except BaseException as error:  # noqa: BLE001
        outcome = _as_it_travels(error)
        outcome.add_note(f"In process {rank}: {traceback.format_exc()}")
    send.send(outcome)


def _as_it_travels(error: BaseException) -> BaseException:
    """The exception, or one that says the same if it is of a class that cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def _log_of_spawned(context: Any) -> Iterator[tuple[Any, int]]:
    """A queue to this process's log files for the records of processes that inherit no handlers, and their level."""
    queue = context.Queue()
    listener = QueueListener(queue, *(each for each in logging.root.handlers if isinstance(each, logging.FileHandler)))
    listener.start()
    try:
        yield queue, logging.root.level
    finally:
        listener.stop()


@contextmanager
def _signals_passed_on(processes: list[Any]) -> Iterator[None]:
    """In this block, Ctrl-C and SIGTERM are for these processes, which stop at the end of the step."""

    def pass_on(number: int, frame: Any) -> None:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
