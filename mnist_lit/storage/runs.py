"""Run folders: creating, locking, reopening and finding them, and the files in them."""

import fcntl
import importlib.metadata
import json
import math
import os
import platform
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mnist_lit import UserError, __version__
from mnist_lit.storage.atomic import WriteError, atomic_write, remove_unfinished
from mnist_lit.storage.checkpoint_file import corruption

BEST, LAST, PREVIOUS, NEW = (f"checkpoints/{name}.ckpt" for name in ("best", "last", "previous", "new"))
STARTED_IN, MAX_LINE = "# working directory: ", 2**15  # a line of config.yaml, in characters
SECONDS_TO_WAIT = 5.0  # for the lock: processes whose parent was killed end within this time
PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "hydra-core", "numpy")


def claim(folder: Path) -> Path:
    """Create ``folder``, with _2, _3 ... appended if it exists: no two runs ever get the same one."""
    for name in (folder.name, *(f"{folder.name}_{n}" for n in range(2, 1000))):
        try:
            folder.with_name(name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
        return folder.with_name(name)
    raise UserError(f"{folder} and a thousand folders like it exist already: give hydra.run.dir=")


def make_folder(folder: Path) -> None:
    """Create a folder that the user has named, if it does not exist."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to the folder {folder}")


def contains_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.yaml", "metrics.json", "multirun.yaml"))


def newest_first(outputs: Path) -> list[Path]:
    """The folders of the training runs in ``outputs`` and of the jobs of its sweeps, the newest first."""
    configs = [*outputs.glob("*/config.yaml"), *outputs.glob("*/*/config.yaml")]
    configs = [file for file in configs if file.parent.name != ".hydra"]
    return [file.parent for file in sorted(configs, key=lambda file: file.stat().st_mtime, reverse=True)]


def suggest_intact(folder: Path, damaged: Path, key: str) -> str:
    """The end of a message about a damaged checkpoint: which checkpoint of the run to pass as ``key`` instead."""
    for path in (folder / LAST, folder / PREVIOUS):
        if path != damaged and not corruption(path):
            return f"; the newest intact one: {key}={path}"
    return "; this run has no intact checkpoint"


def checkpoint_of(folder: Path) -> Path | None:
    """A run's best checkpoint by validation, else its last; None if it has neither."""
    return next((path for name in (BEST, LAST) if os.path.isfile(path := folder / name)), None)


def display_path(folder: Path) -> str:
    """``folder``, relative to the working directory if it is inside."""
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def resume_hint(folder: Path) -> str:
    """The end of a message about a stopped run: how to resume it; empty if it has not begun."""
    if not (folder / "config.yaml").exists():
        return ""
    if not (folder / LAST).exists():
        return "; there is no checkpoint"
    started = os.environ.get("TORCHELASTIC_RUN_ID")
    start = "srun ... python" if started == step_of_job() else "torchrun ..." if started else "python"
    return f"; resume with: {start} -m mnist_lit.train {shlex.quote(f'resume={display_path(folder)}')}"


def step_of_job() -> str:
    """Slurm's number of the job and of the step in it that this process is part of."""
    return f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_STEP_ID')}"


def create(folder: Path, config: dict[str, Any], data_facts: dict[str, Any]) -> None:
    """Start a run in ``folder`` by writing its resolved configuration, ``config.yaml``.

    Raises:
        UserError: The folder holds a run already, or is not writable.
    """
    try:
        with (folder / "config.yaml").open("x", encoding="utf-8") as file:  # x: fails if it exists
            file.write(_config_text(config, data_facts))
    except FileExistsError as error:
        raise UserError(f"{folder} holds a run already: choose another hydra.run.dir") from error
    except OSError as error:
        raise WriteError(f"cannot write to {folder}: {error.strerror}") from error


def reopen(folder: Path, config: dict[str, Any], data_facts: dict[str, Any]) -> None:
    """Prepare to resume the run in ``folder``: write its new configuration and remove unfinished files.

    Raises:
        UserError: The data differ from the run's, or the folder is not writable.
    """
    head = (folder / "config.yaml").read_text(encoding="utf-8").splitlines()[0]
    if head != _head(data_facts):
        raise UserError(
            f"{folder} was trained on other data ({head.removeprefix('# data: ')}) than this "
            f"({_head(data_facts).removeprefix('# data: ')})"
        )
    for place in (folder, folder / "checkpoints"):
        remove_unfinished(place)
    atomic_write(folder / "config.yaml", _config_text(config, data_facts).encode())


_held: list[int] = []  # the handles of the folders that this process has locked


def _release_in_fork() -> None:
    """A forked process, such as a DataLoader's worker, would hold the lock as long as it lives."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_release_in_fork)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on the run in ``folder``; the system releases it when the process ends, however it ends.

    It waits a few seconds for the processes of a killed run to end.

    Raises:
        UserError: Another process holds it, or the folder cannot be created.
    """
    make_folder(folder)
    handle = os.open(folder, os.O_RDONLY)
    _held.append(handle)
    try:
        _lock(handle, folder)
        yield
    finally:
        if handle in _held:  # not in a fork
            _held.remove(handle)
            os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    end = time.monotonic() + SECONDS_TO_WAIT
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise UserError(f"{folder}: another process is using this folder") from error
            time.sleep(0.2)


def working_directory(folder: Path) -> Path:
    """Where the run in ``folder`` was started or resumed, which its relative paths are relative to.

    It is the current one if the run does not say.
    """
    with (folder / "config.yaml").open(encoding="utf-8", errors="replace") as file:
        _, second = file.readline(MAX_LINE), file.readline(MAX_LINE)
    try:
        place = json.loads(second.removeprefix(STARTED_IN))
    except (ValueError, RecursionError):  # it is another line, as in older runs
        return Path.cwd()
    return Path(place) if isinstance(place, str) else Path.cwd()


def _config_text(config: dict[str, Any], data_facts: dict[str, Any]) -> str:
    started_in = f"{STARTED_IN}{json.dumps(str(Path.cwd()))}"  # in JSON it is one line, whatever its name
    return f"{_head(data_facts)}\n{started_in}\n{yaml.dump(config, Dumper=_WithoutAliases, sort_keys=False, allow_unicode=True)}"


class _WithoutAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _head(data_facts: dict[str, Any]) -> str:
    return f"# data: {data_facts['name']}, sha256 {data_facts.get('sha256', 'unknown')}"


def is_in_use(folder: Path) -> bool:
    """Whether a process has locked the run in ``folder``; False where the system cannot tell."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: those who ask are not in each other's way
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def read_text(path: Path, most: int) -> str:
    """The content of a file that may be untrusted.

    Args:
        most: The largest content to accept, in bytes.

    Raises:
        ValueError: It is longer, not UTF-8, or no regular file: a pipe would be waited for, and a device has no end.
    """
    if not path.is_file():
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content.decode()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as JSON, with null for NaN and infinity, which JSON lacks."""
    content = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in content.items()
    }
    atomic_write(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


@cache
def versions() -> dict[str, str]:
    own = {"mnist_lit": __version__, "python": platform.python_version()}
    return own | {name: importlib.metadata.version(name) for name in PACKAGES}
