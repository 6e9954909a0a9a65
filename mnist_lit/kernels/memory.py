"""Process memory: keeping freed blocks for reuse, and the peak usage."""

import ctypes
import resource
import sys


def keep_freed_memory(most: int = 2**31 - 1) -> None:
    """Make glibc's allocator keep large freed blocks instead of returning them to the system.

    Every step frees and reallocates the same large blocks, 200 MB of them in plain PyTorch; mapping and zeroing those
    pages each time takes longer than the arithmetic. Does nothing without glibc.

    Args:
        most: The number of bytes to keep for each thread.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX in malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, most)


def peak_memory_bytes() -> int:
    """The peak resident set size of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
