"""Multi-process runs: rank detection, sharing the run folder, and cleanup when a process dies.

Lightning starts the other processes of a machine with the command line of the first, and names the folder. torchrun
starts all processes, on one machine or several, and connects them through a store that its agent keeps.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from mnist_lit import UserError
from mnist_lit.cli import parent
from mnist_lit.cli.config import key_of

T = TypeVar("T")

LONGEST_PREPARATION = timedelta(minutes=5)
GRACE = 3  # seconds for a process to say that another one has died, once the one that started it is gone
FIRST_SAYS_IT = 3  # seconds for the first process to report an error that all of them have, and to end the others


class LostProcessError(UserError):
    """Another process of the run has died."""


def by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_started_by_another() -> bool:
    """Whether torchrun's agent, or the run's first process on this machine, has started this process."""
    return "LOCAL_RANK" in os.environ


def is_first() -> bool:
    return os.environ.get("RANK" if by_torchrun() else "LOCAL_RANK", "0") == "0"


def take_torchruns_numbers(config: Any) -> None:
    """Set as many devices and nodes in ``config`` as torchrun has started processes for.

    Without them Lightning would train as many times as there are processes, each on its own.

    Raises:
        UserError: Other numbers were asked for, or the nodes have different numbers of processes.
    """
    devices, nodes, processes = (int(os.environ[f"{of}WORLD_SIZE"]) for of in ("LOCAL_", "GROUP_", ""))
    if devices * nodes != processes:
        raise UserError(f"torchrun has started {processes} processes on {nodes} nodes: give each equally many")
    for key, started in (("trainer.devices", devices), ("trainer.num_nodes", nodes)):
        for override in config.hydra.overrides.task:
            if key_of(override) == key and override.partition("=")[2] not in ("auto", str(started)):
                raise UserError(
                    f"{override}: torchrun has started {devices} processes on each of {nodes} nodes; leave it out"
                )
    config.trainer.devices, config.trainer.num_nodes = devices, nodes


def decided_by_first(decide: Callable[[], T]) -> T:
    """The result of ``decide()`` in the first of torchrun's processes, for all of them. It must be JSON-serializable.

    Raises:
        UserError: ``decide`` does.
        SystemExit: ``decide`` failed in the first process, which reports it.
    """
    store = _store()
    name = f"mnist_lit/decided/{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    if is_first():
        decided = None
        try:
            decided = decide()
        finally:
            store.set(name, json.dumps(decided))
        return decided
    published: T | None = json.loads(store.get(name))
    if published is None:
        sys.exit(1)
    return published


@cache  # the first process may own it, and would close it with the last reference before the others have read
def _store() -> Any:
    """The store of torchrun's agent or, if there is none, one in the first process, which init_process_group shares."""
    import torch.distributed

    return next(torch.distributed.rendezvous("env://", timeout=LONGEST_PREPARATION))[0]


def end_with_starter() -> None:
    """From now on, this process ends soon after torchrun's agent, or the first process, which has started it."""
    parent.end_with(os.getppid() if by_torchrun() else int(os.environ.get(parent.PARENT, os.getppid())), GRACE)


@contextmanager
def loss_as_user_error(resume_hint: Callable[[], str]) -> Iterator[None]:
    """In this block, a lost connection to another process of the run raises ``LostProcessError``.

    Args:
        resume_hint: Gives the end of the message.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        raise LostProcessError(f"another process of this run has died, so this one ends, too{resume_hint()}") from error


def _is_lost_connection(error: RuntimeError) -> bool:
    import torch.distributed

    # gloo's own are plain RuntimeErrors that name the line in gloo's source.
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)
