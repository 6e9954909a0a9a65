"""Multi-process runs: rank detection, sharing the run folder, and cleanup when a process dies.

Lightning starts the other processes of a machine with the command line of the first, and names the folder. torchrun
starts all processes, on one machine or several, and connects them through a store that its agent keeps. Slurm's srun
starts them, too; ``adopt_srun`` makes that look like torchrun without an agent.
"""

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from mnist_lit import UserError
from mnist_lit.cli import parent
from mnist_lit.cli.config import key_of
from mnist_lit.storage.runs import resume_hint, step_of_job

T = TypeVar("T")

RENDEZVOUS_TIMEOUT = timedelta(minutes=5)
GRACE = 3  # seconds for a process to say that another one has died, once the one that started it is gone
SHELLS = ("bash", "interactive")  # names of Slurm jobs in which people type commands; Lightning has the same
RANK_ZERO_DELAY = 10  # seconds for the first process to report an error that all of them have, and to end the others

_kept: Any = None  # a store in the first process, which ends with its last reference


class LostProcessError(UserError):
    """Another process of the run has died."""


def started_together() -> bool:
    """Whether torchrun, or srun, has started all processes of this run."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def by_srun() -> bool:
    """Whether srun has; not, if it has started torchrun or a shell."""
    if "SLURM_STEP_ID" not in os.environ or os.environ.get("SLURM_JOB_NAME") in SHELLS:
        return False
    return os.environ.get("TORCHELASTIC_RUN_ID", step_of_job()) == step_of_job()


def adopt_srun() -> None:
    """If srun has started this process, set the variables that torchrun would have set."""
    if not by_srun() or started_together():  # torchrun can run in a Slurm job
        return
    slurm_variables = {
        key.removeprefix("SLURM_"): value for key, value in os.environ.items() if key.startswith("SLURM_")
    }
    job, step = int(slurm_variables["JOB_ID"]), int(slurm_variables["STEP_ID"])
    processes, nodes = int(slurm_variables["STEP_NUM_TASKS"]), int(slurm_variables["STEP_NUM_NODES"])
    os.environ |= {
        "TORCHELASTIC_RUN_ID": step_of_job(),
        "TORCHELASTIC_RESTART_COUNT": slurm_variables.get("RESTART_COUNT", "0"),
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "RANK": slurm_variables["PROCID"],
        "LOCAL_RANK": slurm_variables["LOCALID"],
        "GROUP_RANK": slurm_variables["NODEID"],
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes // nodes),
        "GROUP_WORLD_SIZE": str(nodes),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(20_000 + (100 * job + step) % 10_000)),
    }


def leave_srun(multirun: bool) -> None:
    """Hide from this process, and from those that it starts, that srun has started others beside it.

    Raises:
        UserError: It is a multirun, which each of them would run.
    """
    if not by_srun():
        return
    if multirun and os.environ["SLURM_STEP_NUM_TASKS"] != "1":
        raise UserError("srun starts the processes of one run: leave out -m, or start one process")
    for name in ("SLURM_STEP_ID", "SLURM_NTASKS", "SLURM_PROCID"):  # what Lightning looks at
        os.environ.pop(name, None)


def folder_of_job(usual: Path) -> Path:
    """The run folder: ``usual``, or in a Slurm job one beside it, which the job finds again when it is requeued."""
    if not by_srun():
        return usual
    return usual.with_name(f"slurm_{os.environ['TORCHELASTIC_RUN_ID'].removesuffix('.0')}")


def is_requeued() -> bool:
    """Whether Slurm has started the job again, after a preemption or the failure of a node."""
    return by_srun() and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"


def is_started_by_another() -> bool:
    """Whether torchrun's agent, srun, or the run's first process on this machine has started this process."""
    return "LOCAL_RANK" in os.environ


def is_rank_zero() -> bool:
    return os.environ.get("RANK" if started_together() else "LOCAL_RANK", "0") == "0"


def take_starters_numbers(config: Any) -> None:
    """Set as many devices and nodes in ``config`` as torchrun or srun has started processes for.

    Without them Lightning would train as many times as there are processes, each on its own.

    Raises:
        UserError: Other numbers were asked for, or the nodes have different numbers of processes.
    """
    starter = "srun" if by_srun() else "torchrun"
    devices, nodes, processes = (int(os.environ[f"{of}WORLD_SIZE"]) for of in ("LOCAL_", "GROUP_", ""))
    if devices * nodes != processes:
        raise UserError(f"{starter} has started {processes} processes on {nodes} nodes: give each equally many")
    for key, started in (("trainer.devices", devices), ("trainer.num_nodes", nodes)):
        for override in config.hydra.overrides.task:
            if key_of(override) == key and override.partition("=")[2] not in ("auto", str(started)):
                raise UserError(
                    f"{override}: {starter} has started {devices} processes on each of {nodes} nodes; leave it out"
                )
    config.trainer.devices, config.trainer.num_nodes = devices, nodes


def decided_by_first(decide: Callable[[T | None], T]) -> T:
    """The result of ``decide`` in the first of torchrun's processes, for all of them. It must be JSON-serializable.

    Args:
        decide: Is given what it returned before torchrun started the processes again, or None.

    Raises:
        UserError: ``decide`` does.
        SystemExit: ``decide`` failed in the first process, which reports it.
    """
    if os.environ["WORLD_SIZE"] == "1" and by_srun():
        return decide(None)
    store, attempt = _store(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    earlier, name = (f"mnist_lit/decided/{number}" for number in (attempt - 1, attempt))
    if is_rank_zero():
        decided = None
        try:
            decided = decide(json.loads(store.get(earlier))[0] if store.check([earlier]) else None)
        finally:
            store.set(name, json.dumps([decided, _new_meeting_place() if attempt else {}]))
    published, place = json.loads(store.get(name))
    if published is None:
        sys.exit(1)
    os.environ |= place
    return published


def _new_meeting_place() -> dict[str, str]:
    """Environment variables for processes that torchrun has started again, so that they meet in a new store.

    In that of PyTorch 2.15's agent they would find the addresses of those that have died, and wait for them in vain
    (https://github.com/pytorch/pytorch/issues/135712).
    """
    global _kept
    import torch.distributed

    if os.environ["TORCHELASTIC_USE_AGENT_STORE"] != "True":
        return {}
    host = os.environ["MASTER_ADDR"] if os.environ["GROUP_WORLD_SIZE"] == "1" else socket.getfqdn()
    _kept = torch.distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    return {"MASTER_ADDR": host, "MASTER_PORT": str(_kept.port), "TORCHELASTIC_USE_AGENT_STORE": "False"}


@cache  # the first process may own it, and would close it with the last reference before the others have read
def _store() -> Any:
    """The store of torchrun's agent or, if there is none, one in the first process, which init_process_group shares."""
    import torch.distributed

    if by_srun():
        from lightning.fabric.plugins.environments import SLURMEnvironment

        first = SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"])
        os.environ.setdefault("MASTER_ADDR", first)
    store = next(torch.distributed.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))[0]
    # PyTorch's versions differ in whether each start of the processes has a part of the store for itself.
    return store.underlying_store if isinstance(store, torch.distributed.PrefixStore) else store


def end_with_starter() -> None:
    """From now on, this process ends soon after torchrun's agent, srun's, or the first process, which has started it."""
    parent.end_with(os.getppid() if started_together() else int(os.environ.get(parent.PARENT, os.getppid())), GRACE)


@contextmanager
def lost_process_as_user_error(folder: Path) -> Iterator[None]:
    """In this block, a lost connection to another process of the run in ``folder`` raises ``LostProcessError``."""
    try:
        yield
    except RuntimeError as error:
        import torch.distributed

        # gloo's own are plain RuntimeErrors that name the line in gloo's source.
        if not isinstance(error, torch.distributed.DistError) and "gloo/transport" not in str(error):
            raise
        said = f"another process of this run has died, so this one ends, too{resume_hint(folder)}"
        raise LostProcessError(said) from error
