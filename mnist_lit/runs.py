"""The folder of a run: how it is claimed, what stands in it, and how its files are written."""

import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import yaml

from mnist_lit import Refusal, __version__
from mnist_lit.files import appears_whole

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "hydra-core", "numpy")


def claim(folder: Path) -> Path:
    """Make ``folder``, or with _2, _3 ... at its end where another run was faster: no two runs get the same one."""
    for name in (folder.name, *(f"{folder.name}_{n}" for n in range(2, 1000))):
        try:
            folder.with_name(name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise Refusal(f"cannot make the folder {folder}: {error.strerror}") from error
        return folder.with_name(name)
    raise Refusal(f"{folder} and a thousand folders like it exist already: give hydra.run.dir=")


def make(folder: Path) -> None:
    """Make a folder that a user has named, if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"cannot make the folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise Refusal(f"cannot write to the folder {folder}")


def holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.yaml", "metrics.json", "multirun.yaml"))


def begin(folder: Path, config: dict[str, Any], data_facts: dict[str, Any]) -> None:
    """Mark ``folder`` as a run's own by writing its resolved configuration, ``config.yaml``.

    Raises:
        Refusal: The folder holds a run already, or cannot be written.
    """
    head = f"# data: {data_facts['name']}, sha256 {data_facts['sha256']}\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "config.yaml").open("x", encoding="utf-8") as file:
            file.write(head + yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    except FileExistsError as error:
        raise Refusal(f"{folder} holds a run already: choose another hydra.run.dir") from error
    except OSError as error:
        raise Refusal(f"cannot write to {folder}: {error.strerror}") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Values of ``content`` that are no number (NaN) or infinite become null, which JSON has."""
    content = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in content.items()
    }
    with appears_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    own = {"mnist_lit": __version__, "python": platform.python_version()}
    return own | {name: importlib.metadata.version(name) for name in PACKAGES}
