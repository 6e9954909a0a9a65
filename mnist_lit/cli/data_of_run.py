"""The data folder of a run, for the commands that test its network on other days and from other working directories."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mnist_lit import UserError
from mnist_lit.cli import resume
from mnist_lit.cli.keys import CLASSES
from mnist_lit.storage import runs

log = logging.getLogger(__name__)


def with_folder_of_run(data: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """The section ``data`` with the ``dir`` of the run that ``checkpoint`` is of, unless it has one itself.

    It stays as it is if the checkpoint is in no run's folder, the run's data were of another class, or their folder is not
    there any more, of which a line is logged.
    """
    data, folder = dict(data), checkpoint.absolute().parent.parent
    if "dir" in data or not (folder / "config.yaml").is_file():
        return data
    try:
        own = resume.read_config(folder / "config.yaml")["data"]
    except UserError:  # the checkpoint says all that is needed of the network
        return data
    place = own.get("dir")
    if not isinstance(place, str) or own["_target_"] != data.get("_target_", CLASSES["data"]):
        return data
    where = runs.working_directory(folder) / os.path.expanduser(place)
    if where.is_dir():
        return {**data, "dir": runs.display_path(where)}
    if where != Path(place).absolute() and "sample" not in (own.get("source"), data.get("source")):
        log.warning("%s had its data in %s, which is not there now: data.dir= says where they are", folder, where)
    return data
