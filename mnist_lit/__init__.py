"""The Keras MNIST CNN tutorial as a PyTorch Lightning project."""

__version__ = "0.1.0"


class UserError(ValueError):
    """Something that the user can put right: commands print it as one sentence, without a traceback."""


def require_packages(what: str, *packages: str) -> None:
    """
    Raises:
        UserError: Some of the packages, which not every installation has, are not there.
    """
    import importlib.util

    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise UserError(f"{what} needs packages that are not installed: pip install {' '.join(missing)}")


class Interrupted(BaseException):
    """A run was asked to stop by a signal, and did. No Exception, so that nothing takes it for a failure.

    Attributes:
        signal: The signal's number; the exit code is 128 more.
    """

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal
