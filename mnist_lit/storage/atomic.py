"""Atomic file writes: a file appears complete or not at all."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mnist_lit import UserError

TEMPORARY = ".part-"  # prefix of unfinished files


class WriteError(UserError):
    """A file cannot be written: the disk is full, or the folder is not writable."""


def require_free(key: str, path: Path, overwrite: bool) -> None:
    """
    Raises:
        UserError: ``path``, the value of ``key``, must not be overwritten, or its folder does not exist.
    """
    # Not by Path's methods, which raise where this user may not look.
    if os.path.isdir(path):
        raise UserError(f"{key}={path}: is a folder")
    if os.path.exists(path) and not overwrite:
        raise UserError(f"{key}={path}: exists already (overwrite=true replaces it)")
    if not os.path.isdir(path.parent):
        raise UserError(f"{key}={path}: there is no folder {path.parent}")


def atomic_write(path: Path, content: bytes | memoryview) -> None:
    """Write ``content`` to ``path`` atomically.

    Raises:
        WriteError: As ``atomic_path``.
    """
    with atomic_path(path, len(content)) as temporary:
        temporary.write_bytes(content)


@contextmanager
def atomic_path(path: Path, size: int | None = None) -> Iterator[Path]:
    """Yield a temporary file that replaces ``path`` when the block succeeds, and is deleted when it fails.

    It is in the same folder and has the same suffix, which some writers choose the format by.

    Args:
        size: The number of bytes to be written, for the error message when the disk is full.

    Raises:
        WriteError: ``path`` could not be written; any previous file is unchanged.
    """
    temporary = None
    try:
        unfinished = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}{path.suffix}"
        unfinished.touch(exist_ok=False)  # tempfile's files are readable by their owner only
        temporary = unfinished
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        raise WriteError(_sentence(path, size, error)) from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush the folder's entries to disk, so that a rename survives a power failure, where the system supports it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not supported by some network file systems
            raise
    finally:
        os.close(handle)


def remove_unfinished(folder: Path) -> None:
    """Delete temporary files left in ``folder`` by a killed process."""
    for path in folder.glob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)


def _sentence(path: Path, size: int | None, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        needed = f"{size / 1e6:.1f} MB needed, " if size else ""
        free = shutil.disk_usage(path.parent).free
        reason = f"disk full ({needed}{free / 1e6:.1f} MB free)"
    else:
        reason = error.strerror or str(error)
    return f"cannot write {path}: {reason}; any previous file is unchanged"
