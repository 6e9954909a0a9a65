"""Paths at which the system lets nobody look, each as every verb may get it: one sentence, whatever is asked about them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import small

from mnist_lit import UserError
from mnist_lit.cli.config import settings
from mnist_lit.convert import convert
from mnist_lit.evaluate import evaluate
from mnist_lit.export import export
from mnist_lit.predict import predict
from mnist_lit.runs import runs
from mnist_lit.train import train

# A name too long for any file system. Path.exists() and its like raise OSError, as they do for a folder that is closed to
# this user, which root, and so this test, would not notice.
NAME = "n" * 300

ASKED: dict[str, Callable[[Path], object]] = {
    "runs folder": lambda run: runs(folder=NAME),
    "runs compare": lambda run: runs(folder=run.parent, compare=[run.name, NAME]),
    "runs output": lambda run: runs(folder=run.parent, output=f"{NAME}/a.csv"),
    "predict images": lambda run: predict(images=NAME, ckpt=run),
    "predict output": lambda run: predict(images=NAME, ckpt=run, output=f"{NAME}.csv"),
    "evaluate ckpt": lambda run: evaluate(run.parent / "new", **settings("evaluate", f"ckpt={NAME}")),
    "export output": lambda run: export(output=f"{NAME}.pt2", ckpt=run),
    "convert source": lambda run: convert(source=f"{NAME}.keras", target=str(run / "a.ckpt")),
    "convert target": lambda run: convert(source=str(run / "checkpoints" / "last.ckpt"), target=f"{NAME}/a.keras"),
    "train data.dir": lambda run: train(run.parent / "new", **small(f"data.dir={NAME}", "data.source=mnist")),
    "train pictures": lambda run: train(
        run.parent / "new", **settings("train", "data=image_folder", f"data.dir={NAME}")
    ),
    "train others": lambda run: train(
        run.parent / "new", **settings("train", "data=fashion_mnist", f"data.dir={NAME}")
    ),
    "train folder": lambda run: train(run.parent / NAME, **small()),
}


@pytest.mark.parametrize("what", ASKED)
def test_it_is_refused_in_one_sentence(what: str, finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(finished_run)
    with pytest.raises(UserError) as error:
        ASKED[what](tmp_path / "run")
    assert NAME in str(error.value) and "\n" not in str(error.value)
