"""A process that another one has started ends soon after it, even if that one is killed: the one way for all of them.

A thread asks every half second, which works on every system and for each kind of process. Linux's ``PR_SET_PDEATHSIG``
would not do: a job's parent is the server that has forked it, and not the process that waits for it.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from functools import cache

PARENT = "MNIST_LIT_PARENT"  # environment variable with the process ID of the run's first process
INTERVAL = 0.5  # seconds


def tell_children() -> None:
    """Tell the processes that this one starts whose end to watch for; it may come before they can look."""
    os.environ[PARENT] = str(os.getpid())


@cache
def end_with(pid: int, grace: float = 0.0) -> None:
    """From now on, this process is killed when the process ``pid`` of this machine has ended, with those of its group.

    Nothing is lost: a run resumes from its last checkpoint.

    Args:
        grace: Seconds for this process to end by itself, with a sentence of its own.
    """
    starter, is_child = multiprocessing.parent_process(), os.getppid() == pid

    def lives() -> bool:
        if is_child:
            return os.getppid() == pid
        if starter and starter.pid == pid:  # by way of a server
            return starter.is_alive()
        return _exists(pid)

    def watch() -> None:
        while lives():
            time.sleep(INTERVAL)
        if grace:
            time.sleep(grace)
            with contextlib.suppress(OSError):
                os.write(2, b"the process that started this one is gone: exiting\n")
        leads_group = os.getpgrp() == os.getpid()
        os.kill(0 if leads_group else os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
