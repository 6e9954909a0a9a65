"""The processes of one run: which of them this one is, how all get the folder that the first one has prepared, and how
none is left behind when another ends.

Lightning starts the further processes of a machine by the first one's command line, which names the folder. torchrun
starts all of them, on one machine or several, and connects them by a store that its agent keeps.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

from mnist_lit import UserError

PARENT = "MNIST_LIT_PARENT"  # the environment's variable with the number of the run's first process
FOLDER_KEYS = ("resume", "hydra.run.dir")  # what the first process decides for all
# The run's folder, its .hydra and its log are the first process's; the others only say what is wrong.
QUIET = ("hydra/job_logging=further_process", "hydra.output_subdir=null")
LONGEST_PREPARATION = timedelta(minutes=5)
GRACE = 20  # seconds that a process has to end by itself, once the one that has started it is gone
FIRST_SAYS_IT = 3  # seconds in which the first process can say what concerns all, and end the others


class LostProcessError(UserError):
    """Another process of the run has ended."""


def by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_started_by_another() -> bool:
    """Whether torchrun's agent or, on its own machine, the run's first process has started this one."""
    return "LOCAL_RANK" in os.environ


def is_first() -> bool:
    return os.environ.get("RANK" if by_torchrun() else "LOCAL_RANK", "0") == "0"


def key(override: str) -> str:
    return override.split("=", 1)[0]


def with_torchruns_numbers(overrides: list[str]) -> list[str]:
    """``overrides`` with as many devices and machines as torchrun has started processes for.

    Without them Lightning would train as many times as there are processes, each on its own.

    Raises:
        UserError: Other numbers were asked for, or the machines have different numbers of processes.
    """
    devices, machines, processes = (os.environ[f"{of}WORLD_SIZE"] for of in ("LOCAL_", "GROUP_", ""))
    if int(devices) * int(machines) != int(processes):
        raise UserError(f"torchrun has started {processes} processes on {machines} machines: give each equally many")
    started = {"trainer.devices": devices, "trainer.num_nodes": machines}
    for override in overrides:
        if override.partition("=")[2] not in ("auto", started.get(key(override), "auto")) and key(override) in started:
            raise UserError(
                f"{override}: torchrun has started {devices} processes on each of {machines} machines; leave it out"
            )
    return [*(each for each in overrides if key(each) not in started), *(f"{k}={v}" for k, v in started.items())]


def prepared_by_first(overrides: list[str], prepare: Callable[[list[str]], tuple[list[str], Any]]) -> Any:
    """What ``prepare(overrides)`` gives, under torchrun: the first process claims the folder, the others take that.

    Args:
        prepare: Gives the overrides that name the folder, among others, as the first of two values.

    Raises:
        UserError: ``prepare`` does.
        SystemExit: It did in the first process, which says so.
    """
    store = _store()
    name = f"mnist_lit/folder/{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    if is_first():
        published: list[str] | None = None
        try:
            prepared = prepare(overrides)
            published = [override for override in prepared[0] if key(override) in FOLDER_KEYS]
        finally:
            store.set(name, json.dumps(published))
        return prepared
    published = json.loads(store.get(name))
    if published is None:
        sys.exit(1)
    return prepare([*(override for override in overrides if key(override) not in FOLDER_KEYS), *published])


@cache  # where it is the first process's, it closes with the last reference, and the others may not have read it yet
def _store() -> Any:
    """The store of torchrun's agent or, where there is none, one in the first process that init_process_group shares."""
    import torch.distributed

    return next(torch.distributed.rendezvous("env://", timeout=LONGEST_PREPARATION))[0]


def tell_children() -> None:
    """Lets the processes that this one starts know whose end they are to notice: it may come before they can look."""
    os.environ[PARENT] = str(os.getpid())


def end_with_parent() -> None:
    """From now on this process ends soon after the one that has started it, whatever it waits for."""
    parent = os.getppid() if by_torchrun() else int(os.environ.get(PARENT, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(GRACE)
        os.write(2, b"the process that has started this one is gone, so this one ends, too\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


@contextmanager
def loss_as_refusal(resume_hint: Callable[[], str]) -> Iterator[None]:
    """In this block a lost connection to another process of the run comes out as one sentence.

    Args:
        resume_hint: Gives the sentence's end.

    Raises:
        LostProcessError
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        raise LostProcessError(
            f"another process of this run has ended, so this one ends, too{resume_hint()}"
        ) from error


def _is_lost_connection(error: RuntimeError) -> bool:
    import torch.distributed

    # gloo's own are plain RuntimeErrors that name the line in gloo's source.
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)
