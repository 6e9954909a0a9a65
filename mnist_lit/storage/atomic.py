"""Writing a file so that nobody ever sees half of it."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mnist_lit import UserError

TEMPORARY = ".part-"  # how the names of unfinished files begin


class WriteError(UserError):
    """The disk is full, or the folder is not to be written to."""


def require_free(key: str, path: Path, overwrite: bool) -> None:
    """
    Raises:
        UserError: ``path``, the value of ``key``, cannot be written: it is there already and not to be overwritten, or
            its folder is not there.
    """
    if path.is_dir():
        raise UserError(f"{key}={path}: is a folder")
    if path.exists() and not overwrite:
        raise UserError(f"{key}={path}: exists already (overwrite=true replaces it)")
    if not path.parent.is_dir():
        raise UserError(f"{key}={path}: there is no folder {path.parent}")


def atomic_write(path: Path, content: bytes | memoryview) -> None:
    """Write ``path`` as ``atomic_path`` does.

    Raises:
        WriteError: What was there before is untouched.
    """
    with atomic_path(path, len(content)) as temporary:
        temporary.write_bytes(content)


@contextmanager
def atomic_path(path: Path, size: int | None = None) -> Iterator[Path]:
    """A temporary file to write to, which gets the name ``path`` when the block ends well, and else disappears.

    It lies in the same folder and has the same ending, for those who write by it.

    Args:
        size: How many bytes it will have, for the message when they do not fit.

    Raises:
        WriteError: What was there before is untouched.
    """
    temporary = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY, suffix=path.suffix)
        temporary = Path(name)
        os.close(handle)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are readable by their owner only
        temporary.replace(path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        raise WriteError(_sentence(path, size, error)) from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in ``folder`` on the disk, and not only in the system's memory, where it can do that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(handle)


def remove_unfinished(folder: Path) -> None:
    """Delete what was left by a process that was killed while it wrote into ``folder``."""
    for path in folder.glob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)


def _sentence(path: Path, size: int | None, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        needed = f"{size / 1e6:.1f} MB are needed, " if size else ""
        free = shutil.disk_usage(path.parent).free
        reason = f"disk full ({needed}{free / 1e6:.1f} MB are free)"
    else:
        reason = error.strerror or str(error)
    return f"cannot write {path}: {reason}; what was there before is untouched"
