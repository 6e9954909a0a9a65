"""The data and metrics of a run, for the commands that test its network on other days and from other directories."""

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mnist_lit import UserError
from mnist_lit.storage import runs
from mnist_lit.storage.run_config import CLASSES, read_config
from mnist_lit.storage.trust import require_trusted

log = logging.getLogger(__name__)


def with_data_of_run(data: Mapping[str, Any], checkpoint: Path, trust: Iterable[str] = ()) -> dict[str, Any]:
    """The section ``data``, completed by that of the run whose folder ``checkpoint`` is in.

    Without ``_target_`` it is the run's section, with the given keys changed; with the class of the run's, it only gets its
    ``dir``. It stays as it is, MNIST by default, if the checkpoint is in no run's folder, or the run's data were of another
    class than the one that is given or that a ``source`` stands for. A ``dir`` that is not there any more is not taken, and
    a line of the log says so.

    Raises:
        UserError: The class of the run's data is neither of this project nor trusted.
    """
    data, folder = dict(data), run_of(checkpoint)
    own = config_of_run(checkpoint).get("data")
    if not own or ("source" in data and own["_target_"] != CLASSES["data"]):  # only MNIST has sources
        return {"_target_": CLASSES["data"], **data}
    if "_target_" not in data:
        require_trusted(own, folder / "config.yaml", trust)
        data = {**{key: value for key, value in own.items() if key != "dir"}, **data}
    place = own.get("dir")
    if "dir" in data or not isinstance(place, str) or own["_target_"] != data["_target_"]:
        return data
    where = runs.working_directory(folder) / os.path.expanduser(place)
    if os.path.isdir(where):  # Path's would raise where it may not look
        return {**data, "dir": runs.display_path(where)}
    if where != Path(place).absolute() and "sample" not in (own.get("source"), data.get("source")):
        log.warning("%s had its data in %s, which is not there now: data.dir= says where they are", folder, where)
    return data


def metrics_of_run(checkpoint: Path, trust: Iterable[str] = ()) -> dict[str, Any] | None:
    """The section ``metrics`` of the run whose folder ``checkpoint`` is in, if it has one.

    Raises:
        UserError: One of the classes is neither of this project nor its libraries', nor trusted.
    """
    metrics = config_of_run(checkpoint).get("metrics")
    require_trusted(metrics, run_of(checkpoint) / "config.yaml", trust)
    return metrics


def config_of_run(checkpoint: Path) -> dict[str, Any]:
    """The configuration of the run whose folder ``checkpoint`` is in; empty if there is none, or it cannot be read."""
    try:
        return read_config(run_of(checkpoint) / "config.yaml")
    except UserError:  # the checkpoint says all that is needed of the network
        return {}


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint is from, or would be; links to it are followed if they lie elsewhere."""
    folder = checkpoint.absolute().parent.parent
    return folder if (folder / "config.yaml").is_file() else checkpoint.resolve().parent.parent
