"""Read untrusted zip archives: checked before they take memory, and by their checksums."""

import struct
import zipfile
import zlib
from pathlib import Path

from mnist_lit import UserError

# What zipfile raises for a malformed archive.
BROKEN = (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, struct.error, zlib.error)

MAX_FILE = 2**25  # bytes
MAX_ENTRIES = 1000
MAX_LIST = 2**21  # bytes of an archive's list of entries, about 150 for each


def require_short_list(path: Path) -> None:
    """Check the length that an archive declares for its list of entries, all of which zipfile keeps in memory.

    Raises:
        zipfile.BadZipFile: It is longer than ``MAX_LIST``.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**17))  # a comment may follow, of up to 2**16 bytes
        end = file.read()
    fields = [(b"PK\5\6", 12, 4), (b"PK\6\6", 40, 8)]  # the record at the end, and the one for large archives
    lengths = [
        int.from_bytes(end[at + offset : at + offset + size], "little")
        for signature, offset, size in fields
        if (at := end.rfind(signature)) >= 0
    ]
    if any(length > MAX_LIST and length != 2**32 - 1 for length in lengths):  # the latter refers to the other record
        raise zipfile.BadZipFile("too many entries")


def read_entry(path: Path, name: str, most: int) -> bytes:
    """The content of an entry of the archive ``path``.

    Args:
        most: The largest content to accept, in bytes. Nothing larger is ever in memory.

    Raises:
        UserError: The file is too large, not a zip archive or damaged, two entries have the same name, there is no
            such entry, or it is too large or compressed in an unusual way.
    """
    try:
        if (size := path.stat().st_size) > MAX_FILE:
            raise UserError(f"{path} has {size:,} bytes, but at most {MAX_FILE:,} are read")
        require_short_list(path)
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(names) > MAX_ENTRIES or len(set(names)) < len(names):
                raise UserError(f"{path} is damaged (too many entries, or two with the same name)")
            if name not in names:
                raise UserError(f"{path} has no {name}")
            entry = archive.getinfo(name)
            if entry.file_size > most:
                raise UserError(f"{path}: its {name} has {entry.file_size:,} bytes, but at most {most:,} are read")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile limits no others
                raise UserError(f"{path}: its {name} is compressed in a way that is not read")
            with archive.open(entry) as file:
                content = file.read(entry.file_size)  # without a size, it would take whatever it expands to
    except UserError:
        raise
    except BROKEN as error:
        raise UserError(f"{path} is damaged ({str(error).rstrip('.') or type(error).__name__})") from error
    if len(content) != entry.file_size:
        raise UserError(f"{path} is damaged ({name} is shorter than declared)")
    return content
