"""Writing a file so that nobody ever sees half of it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def appears_whole(path: Path) -> Iterator[Path]:
    """A temporary file to write to, which gets the name ``path`` when the block ends well, and else disappears.

    It lies in the same folder and has the same ending, for those who write by it.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".part-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are readable by their owner only
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
