"""Decide whether a class that a file names may be imported: only this project's and its libraries', or trusted ones."""

from collections.abc import Iterable, Iterator
from typing import Any

from mnist_lit import UserError
from mnist_lit.storage.tables import one_line

# What a checkpoint may name in each of its sections; a class of another kind could take any memory when it is built.
KNOWN_IN_CHECKPOINT = {
    "model": ("mnist_lit.network", "mnist_lit.other_networks"),
    "optimizer": ("torch.optim",),
    "scheduler": ("torch.optim.lr_scheduler", "mnist_lit.schedulers"),
}
# The classes, and modules of classes, that any file may name. Importing them does nothing else.
KNOWN = (
    *(each for known in KNOWN_IN_CHECKPOINT.values() for each in known),
    "mnist_lit.data",
    "mnist_lit.mnist_like",
    "mnist_lit.image_folder",
    "mnist_lit.training.augment",
    "mnist_lit.training.callbacks",
    "kornia.augmentation",
    "torch.nn.CrossEntropyLoss",
    "torchmetrics.classification",
    "lightning",
    "lightning.pytorch",
    *(f"lightning.pytorch.{kind}" for kind in ("callbacks", "loggers", "plugins", "profilers", "strategies")),
)


def targets(values: Any) -> Iterator[Any]:
    """What every ``_target_`` in a section or configuration names."""
    if isinstance(values, dict):
        for key, value in values.items():
            if key == "_target_":
                yield value
            yield from targets(value)
    elif isinstance(values, (list, tuple, set, frozenset)):
        for value in values:
            yield from targets(value)


def require_trusted(
    values: Any, where: object, trust: Iterable[str], chosen: Iterable[str] = (), known: Iterable[str] = KNOWN
) -> None:
    """Check the classes that ``values``, which come from a file, name.

    Args:
        where: The file, for the message.
        trust: Packages, modules or classes that may be imported.
        chosen: Classes that the user's own configuration names.
        known: Modules and classes that need no trust.

    Raises:
        UserError: One of them may not be imported.
    """
    trust, chosen = [trust] if isinstance(trust, str) else list(trust), set(chosen)
    for target in targets(values):
        is_name = isinstance(target, str) and len(target) < 200 and all(map(str.isidentifier, target.split(".")))
        if not is_name:
            raise UserError(f"{where}: _target_={one_line(target)} is not the dotted name of a class")
        is_trusted = any(f"{target}.".startswith(f"{each}.") for each in trust)
        if not (is_trusted or target in chosen or {target, target.rpartition(".")[0]} & {*known}):
            package = target.partition(".")[0]
            raise UserError(
                f"{where} names {target}, which is not a class of this project, so it was not imported: "
                f"if you trust {package}, add trust=[{package}]"
            )
