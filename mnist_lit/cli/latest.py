"""Resolves ``ckpt=latest`` to the newest run that has a trained model."""

import os
from pathlib import Path

from mnist_lit import UserError
from mnist_lit.cli.config import ConfigFiles
from mnist_lit.cli.resume import preferred
from mnist_lit.storage import runs


def resolve(ckpt: str | Path) -> Path:
    """``ckpt`` as a path; for ``latest`` the folder of the newest run, or job of a sweep, that has a checkpoint.

    Runs that used all images come before others, whose models know little.

    Raises:
        UserError: There is none.
    """
    path = Path(os.path.expanduser(ckpt))
    if str(ckpt) != "latest" or path.exists():
        return path
    outputs = ConfigFiles("train").outputs_folder()
    trained = [folder for folder in runs.newest_first(outputs) if runs.checkpoint_of(folder)]
    if not trained:
        raise UserError(
            f"ckpt=latest: there is no trained model in {outputs} (python -m mnist_lit.train makes one; "
            "ckpt= takes a checkpoint or a run's folder elsewhere)"
        )
    return preferred(trained)
