"""The process's memory: how much it took, and how a training run keeps what it has."""

import ctypes
import resource
import sys


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep large blocks that are freed, instead of handing them back to the system.

    A step frees and asks for the same large blocks again, in plain PyTorch 200 MB of them; mapping and clearing those
    pages anew each time takes longer than the arithmetic. No effect where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def peak_memory_bytes() -> int:
    """The most memory that this process has held at a time."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
