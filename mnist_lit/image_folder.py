"""``ImageFolderDataModule``: pictures in a folder for each class, brought to the form of MNIST's images."""

import logging
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mnist_lit import UserError, require_packages
from mnist_lit.data import MNISTDataModule, stratified_choice
from mnist_lit.storage.tables import one_line

log = logging.getLogger(__name__)

TRAIN, TEST = ("train", "training", "trainingset"), ("test", "testing", "testset")  # in upper or lower case
TEST_FRACTION = 0.2  # of the pictures, if they have no folder for the test
MAX_NAMED = 5  # unreadable pictures in a message


class ImageFolderDataModule(MNISTDataModule):
    """Pictures in folders whose names are those of the classes, as for torchvision's ``ImageFolder``.

    Pictures of 28x28 pixels stay as they are, but for being made light on dark; others are prepared as by ``predict``.

    Args:
        dir: Has the folders ``train`` and ``test`` (or ``training`` and ``testing``) with a folder for each class in them;
            other folders beside them are not read. Or has the classes' folders itself, or in ``train`` alone: then a fifth
            of the pictures of each class are the test images, chosen by their order by name, whatever the seed.
        batch_size, val_size, seed: As in ``MNISTDataModule``.

    Raises:
        UserError: There are no such folders, the test has a class that the training lacks, or a class has no picture that
            can be read. Single pictures that cannot be read are left out with a warning.
    """

    def __init__(self, dir: str = "data", batch_size: int = 500, val_size: int = 0, seed: int = 0) -> None:
        require_packages("data=image_folder", "scipy")
        super().__init__(dir, batch_size=batch_size, val_size=val_size, seed=seed)

    def prepare_data(self) -> None:
        """There is nothing to download."""

    def read(self) -> tuple[dict[str, Any], tuple[Tensor, Tensor, Tensor, Tensor]]:
        if not os.path.isdir(self.dir):
            raise UserError(f"data.dir={self.dir}: there is no such folder")
        train, test = (_part(self.dir, names) for names in (TRAIN, TEST))
        if test and not train:
            raise UserError(f"{self.dir} has {test.name}/, but no folder {' or '.join(TRAIN[:2])} for the training")
        training, testing = _pictures(train or self.dir), _pictures(test) if test else {}
        if len(training) < 2:
            raise UserError(
                f"{train or self.dir} has no folders of several classes with pictures in them: data=image_folder takes "
                "DIR/train/CLASS/*.png and DIR/test/CLASS/*.png, or DIR/CLASS/*.png"
            )
        if unknown := testing.keys() - training.keys():
            raise UserError(f"{test} has classes that {train} lacks: {', '.join(sorted(unknown, key=_natural))}")
        self.classes = sorted(training, key=_natural)
        facts = {"name": "image_folder", "classes": self.classes}
        images, labels = self._read(training, train or self.dir)
        if testing:
            return facts, (images, labels, *self._read(testing, test))
        held_out = stratified_choice(labels, max(1, round(TEST_FRACTION * len(labels))))
        log.info("%s has no pictures for the test: %d of the %d are held out", self.dir, held_out.sum(), len(labels))
        return facts, (images[~held_out], labels[~held_out], images[held_out], labels[held_out])

    def _read(self, pictures: dict[str, list[Path]], where: Path | None) -> tuple[Tensor, Tensor]:
        """The images uint8 [N, 28, 28] and labels int64 [N] of the pictures of each class."""
        from mnist_lit.inference.ink import ImageError

        files = [(path, label) for label, name in enumerate(self.classes) for path in pictures.get(name, ())]
        images, labels, unreadable = [], [], []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about unusual files
            for path, label in tqdm(files, desc=f"reading {where}", unit=" pictures", disable=None, leave=False):
                try:
                    images.append(_pixels(path))
                    labels.append(label)
                except ImageError as error:
                    unreadable.append(f"{path} {error}")
                except Exception as error:  # noqa: BLE001  # one odd picture must not cost the training on all others
                    unreadable.append(f"{path} cannot be prepared ({type(error).__name__}: {one_line(error, 200)})")
        if unreadable:
            named = "; ".join([*unreadable[:MAX_NAMED], *(["..."] if len(unreadable) > MAX_NAMED else [])])
            said = f"{len(unreadable):,} of the {len(files):,} pictures in {where} cannot be read: {named}"
            if empty := [self.classes[label] for label in sorted({label for _, label in files} - {*labels})]:
                raise UserError(f"{said}; no others are in {', '.join(empty)}")
            log.warning("left out, since %s", said)
        return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def _part(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The folder in ``folder`` that has one of the names; Kaggle's archives have it twice, one inside the other.

    With pictures and no folders of them, it is that of a class with this name.
    """
    named = (each for name in names for each in _folders(folder) if each.name.lower() == name)
    found = next((each for each in named if _pictures(each) or not _pictures_in(each)), None)
    return (_part(found, names) or found) if found else None


def _folders(folder: Path) -> list[Path]:
    _, names, _ = next(os.walk(folder), ("", [], []))  # none where it may not look
    return [folder / name for name in sorted(names, key=_natural) if not name.startswith(".")]


def _pictures(folder: Path) -> dict[str, list[Path]]:
    """The pictures in each of the folders in ``folder`` that has any, in the order of their names."""
    return {each.name: pictures for each in _folders(folder) if (pictures := _pictures_in(each))}


def _pictures_in(folder: Path) -> list[Path]:
    from mnist_lit.inference.images import EXTENSIONS

    _, _, names = next(os.walk(folder), ("", [], []))
    pictures = [name for name in names if Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".")]
    return [folder / name for name in sorted(pictures, key=_natural)]


def _natural(name: str) -> Any:
    """A key that sorts 2 before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)], name


def _pixels(path: Path) -> np.ndarray:
    """The picture as uint8 [28, 28], light on dark.

    Raises:
        ImageError: It cannot be read, or has other sizes and shows no shape.
    """
    from mnist_lit.inference.digit import to_mnist
    from mnist_lit.inference.images import read_grey
    from mnist_lit.inference.ink import SIDE, border

    grey = read_grey(path)
    if grey.shape != (SIDE, SIDE):
        return to_mnist(grey, refuse=False)
    # Light nearly all around is paper; something light that only touches the border, as clothes do, is not.
    is_on_paper = (border(grey) > (grey.min() + grey.max()) / 2).mean() >= 0.9
    return (255 - grey if is_on_paper else grey).round().astype(np.uint8)
