"""Safe reading of checkpoint files: no code in them is executed, and damaged ones are refused."""

import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mnist_lit import UserError

# What zipfile raises for a malformed archive, besides BadZipFile.
BROKEN = (OSError, EOFError, RuntimeError, ValueError, struct.error, zlib.error)


def corruption(path: Path) -> str:
    """Why ``path`` is not an intact checkpoint; empty if it is.

    PyTorch's files are zip archives with a checksum for each tensor, which ``torch.load`` does not verify.
    """
    if path.is_dir():
        return f"{path} is a folder, not a checkpoint"
    if not path.is_file():
        return f"{path}: there is no such file"
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return f"{path} is empty, not a checkpoint"
    if start != b"PK\3\4":
        return f"{path} is not a checkpoint"
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except zipfile.BadZipFile as error:
        return f"{path} is damaged ({str(error).rstrip('.')})"
    except BROKEN as error:
        return f"{path} is damaged ({error or type(error).__name__})"
    return f"{path} is damaged (the checksum of {wrong} is wrong)" if wrong else ""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint with its tensors on the CPU.

    Raises:
        UserError: It is missing, damaged, not a Lightning checkpoint, or holds more than tensors and plain values.
    """
    import torch

    if reason := corruption(path):
        raise UserError(reason)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and plain values; loading it could execute code, so nothing was loaded"
        ) from error
    except (RuntimeError, KeyError, ValueError, EOFError) as error:
        raise UserError(f"{path} is not a checkpoint ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path} is not a checkpoint of this project: it has no state_dict")
    if "_instantiator" in content.get("hyper_parameters", {}):  # a function for Lightning to call
        raise UserError(f"{path} names a function to call on loading (_instantiator): refused, nothing was called")
    return content


def hyper_parameters(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The ``model`` and ``optimizer`` sections of the configuration that a checkpoint was trained with.

    Raises:
        UserError: The checkpoint lacks them.
    """
    arguments: dict[str, Any] = checkpoint.get("hyper_parameters", {})
    if not arguments.keys() >= {"model", "optimizer"}:
        raise UserError(
            f"{path} is not a checkpoint of this project: its hyper_parameters lack the model or the optimizer"
        )
    return {section: with_current_names(arguments[section]) for section in ("model", "optimizer")}


def with_current_names(section: Mapping[str, Any]) -> dict[str, Any]:
    """A ``model`` or ``optimizer`` section with today's keys; files of older versions name some of them differently."""
    values = dict(section)
    if "network" in values and "_target_" not in values:
        values = {"_target_": values.pop("network"), **values}
        if "compiled" in values:
            values["cpu_kernel"] = values.pop("compiled")
    if "name" in values and "_target_" not in values:
        values = {"_target_": f"torch.optim.{values.pop('name')}", **values}
    return values


def require_same_shapes(own: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Compare the tensors ``found`` in a checkpoint with the network's ``own``, by name and shape.

    Raises:
        UserError: They differ; the message lists every difference.
    """
    differences = [f"missing {key}" for key in own if key not in found]
    differences += [f"unexpected {key}" for key in found if key not in own]
    differences += [
        f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}"
        for key, value in found.items()
        if key in own and value.shape != own[key].shape
    ]
    if differences:
        raise UserError(f"the checkpoint does not fit this architecture: {', '.join(differences)}")
