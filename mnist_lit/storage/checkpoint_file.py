"""Safe reading of checkpoint files: no code in them is executed, and damaged ones are refused."""

import os
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mnist_lit import UserError
from mnist_lit.storage.archives import BROKEN, require_short_list
from mnist_lit.storage.tables import one_line
from mnist_lit.storage.trust import KNOWN_IN_CHECKPOINT, require_trusted, targets

# Bounds of what is read. PyTorch does not compress, so a checkpoint takes no more memory than its file.
MAX_BYTES = 4 * 2**30
MAX_PICKLE = 4 * 2**20  # of everything but the tensors' values; a run of the tutorial has 5 kB
MAX_ENTRIES = 10_000  # one for each tensor; a run of the tutorial has 36

# The instructions of a pickle that refer to a callable; PyTorch writes the first one only.
CALLABLES = ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")
# The callables that a checkpoint may contain. Others of those that PyTorch allows, such as bytearray and legacy tensor
# types, can take any amount of memory.
SAFE = re.compile(
    r"collections (OrderedDict|Counter)|builtins set|torch ((?!Untyped|Typed)\w+Storage|Size|device|u?int\d+|b?float\d+|bool)"
    r"|torch\._utils _rebuild_(tensor_v2|parameter)"
)


def corruption(path: Path) -> str:
    """Why ``path`` is not an intact checkpoint that is safe to load; empty if it is.

    PyTorch's files are zip archives with a checksum for each tensor, which ``torch.load`` does not verify, and a pickle
    that refers to them.
    """
    if os.path.isdir(path):
        return f"{path} is a folder, not a checkpoint"
    if not os.path.isfile(path):
        return f"{path}: there is no such file"
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    if not start:
        return f"{path} is empty, not a checkpoint"
    if start != b"PK\3\4":
        return f"{path} is not a checkpoint"
    if (size := path.stat().st_size) > MAX_BYTES:
        return f"{path} has {size / 2**30:.1f} GiB; checkpoints have at most {MAX_BYTES / 2**30:g}"
    try:
        require_short_list(path)
        with zipfile.ZipFile(path) as archive:
            if reason := _oddity(archive.infolist(), size):
                return f"{path} is not a checkpoint as PyTorch writes them ({reason})"
            if wrong := archive.testzip():
                return f"{path} is damaged (the checksum of {wrong} is wrong)"
            record = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            if unsafe := _unsafe_callables(archive.read(record)):
                what = f"more than tensors and plain values ({unsafe})"
                return f"{path} holds {what}; loading it could execute code, so nothing was loaded"
    except BROKEN as error:
        return f"{path} is damaged ({str(error).rstrip('.') or type(error).__name__})"
    return ""


def _oddity(entries: list[zipfile.ZipInfo], size: int) -> str:
    """What none of PyTorch's archives has; empty if there is nothing. Each could make a small file a large object."""
    names = [entry.filename.casefold() for entry in entries]  # PyTorch ignores the case, too
    if len(entries) > MAX_ENTRIES:
        return f"{len(entries):,} entries"
    if len(set(names)) < len(names):
        return "two entries of one name"
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return "compressed entries"
    if sum(entry.file_size for entry in entries) > size:
        return "overlapping entries"
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if pickles and pickles[0].file_size > MAX_PICKLE:
        return f"a data.pkl of {pickles[0].file_size:,} bytes"
    return "" if len(pickles) == 1 else "no data.pkl, or several"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint with its tensors on the CPU, and validate its structure.

    Raises:
        UserError: It is missing, damaged, not a checkpoint of this project, or holds more than tensors and plain values.
    """
    import torch

    from mnist_lit.storage.checkpoint_content import require_structure

    if reason := corruption(path):
        raise UserError(reason)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the pickle of an intact archive can be anything
        raise UserError(f"{path} is not a checkpoint ({one_line(error)})") from error
    if isinstance(content, dict) and isinstance(of_model := content.get("hyper_parameters"), dict):
        if "_instantiator" in of_model:  # a function for Lightning to call
            raise UserError(f"{path} names a function to call on loading (_instantiator): refused, nothing was called")
        for section in ("model", "optimizer"):
            if isinstance(of_model.get(section), Mapping):
                of_model[section] = with_current_names(of_model[section])
    require_structure(content, path)
    return dict(content)


def _unsafe_callables(content: bytes) -> str:
    """The names in a pickle that are not ``SAFE``, or that cannot be told; empty if there are none."""
    named = [str(value or code.name) for code, value, _ in pickletools.genops(content) if code.name in CALLABLES]
    return ", ".join(dict.fromkeys(name.replace(" ", ".") for name in named if not SAFE.fullmatch(name)))[:200]


def hyper_parameters(
    checkpoint: Mapping[str, Any], path: Path, trust: Iterable[str] = (), **chosen: Any
) -> dict[str, Any]:
    """The sections of the configuration that a checkpoint was trained with: ``model``, ``optimizer`` and ``scheduler``.

    Args:
        trust: Packages whose classes it may name, besides this project's.
        chosen: Sections of the caller's own that replace those of the checkpoint.

    Raises:
        UserError: It names a class of another package.
    """
    found = checkpoint["hyper_parameters"]
    sections = {section: found.get(section) for section in ("model", "optimizer", "scheduler")} | chosen
    for section, known in KNOWN_IN_CHECKPOINT.items():
        require_trusted(sections[section], path, trust, targets(chosen), known)
    return sections


def network_weights(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a checkpoint that belong to the network, not to the rest of the ``MNISTClassifier``."""
    return {key: value for key, value in checkpoint["state_dict"].items() if key.startswith("network.")}


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
    """Compare the tensors ``found`` in a checkpoint with the network's ``own``, by name, shape and kind.

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
    differences += [
        f"{key} {value.dtype} instead of {own[key].dtype}"
        for key, value in found.items()
        if key in own and value.is_floating_point() != own[key].is_floating_point()
    ]
    if differences:
        others = f" and {len(differences) - 12} more" if len(differences) > 12 else ""
        listed = ", ".join(map(one_line, differences[:12]))
        raise UserError(f"the checkpoint does not fit this architecture: {listed}{others}")
