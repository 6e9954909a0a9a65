"""The Keras MNIST CNN tutorial as a PyTorch Lightning project.

To read it: ``network.py``, ``data.py``, ``model.py``, ``train.py``, in this order. To use it from Python::

    from mnist_lit import MNISTClassifier, MNISTDataModule, TutorialCNN, load, settings
    from mnist_lit.train import train

Each verb of the command line is a function of the same name in a module of the same name.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist_lit.cli.config import settings
    from mnist_lit.data import MNISTDataModule
    from mnist_lit.inference.trained import load
    from mnist_lit.model import MNISTClassifier
    from mnist_lit.network import TutorialCNN

__all__ = [
    "Interrupted",
    "MNISTClassifier",
    "MNISTDataModule",
    "TutorialCNN",
    "UserError",
    "load",
    "settings",
]
__version__ = "0.1.0"

# Loaded on first use: they take seconds.
_PLACES = {
    "MNISTClassifier": "mnist_lit.model",
    "MNISTDataModule": "mnist_lit.data",
    "TutorialCNN": "mnist_lit.network",
    "load": "mnist_lit.inference.trained",
    "settings": "mnist_lit.cli.config",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})


class UserError(ValueError):
    """Something that the user can put right: commands print it as one sentence, without a traceback."""


class Interrupted(BaseException):
    """A run was asked to stop by a signal, and did. No Exception, so that nothing takes it for a failure.

    Attributes:
        signal: The signal's number; the exit code is 128 more.
    """

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal

    def __reduce__(self) -> tuple[Any, ...]:  # to be pickled: BaseException would call it with the message alone
        return type(self), (self.signal, str(self)), self.__dict__


def require_packages(what: str, *packages: str) -> None:
    """
    Raises:
        UserError: Some of the packages, which not every installation has, are not there.
    """
    import importlib.util

    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise UserError(f"{what} needs packages that are not installed: pip install {' '.join(missing)}")
