"""Objects from the configuration, as in Hydra: ``_target_`` names a class, the other keys are its arguments."""

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mnist_lit import UserError

T = TypeVar("T")

# What their classes raise says what is wrong with an argument; what other classes raise is shown with its traceback.
LIBRARIES = ("lightning", "mnist_lit", "torch")


def build(section: str, config: Mapping[str, Any], kind: type[T], *first: Any) -> T:
    """An instance of the class that ``config`` names, with the values in ``config`` as its arguments.

    The values are taken as they are, so this is safe for what a file has.

    Args:
        section: What ``config`` is called in the configuration.
        kind: What the class must be a subclass of.
        first: Positional arguments before the others.

    Raises:
        UserError: There is no such class, or it does not take the arguments.
    """
    cls = find_class(section, config, kind)
    return call(section, cls, *first, **{key: value for key, value in config.items() if key != "_target_"})


def instantiate(section: str, config: Mapping[str, Any], kind: type[T], **defaults: Any) -> T:
    """As ``build``, but values in ``config`` that have a ``_target_`` themselves become objects, too.

    Args:
        defaults: Arguments for a class that takes them and for which ``config`` has no value.
    """
    import hydra.utils

    cls = find_class(section, config, kind)
    own = hydra.utils.instantiate({key: value for key, value in config.items() if key != "_target_"}, _convert_="all")
    return call(section, cls, **{**accepted(cls, defaults), **own})


def find_class(section: str, config: Mapping[str, Any], kind: type[T]) -> type[T]:
    """
    Raises:
        UserError: ``config`` names no class, or none of this kind.
    """
    target = config.get("_target_")
    try:
        cls = pkgutil.resolve_name(str(target))
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{section}._target_={target}: no such class ({error})") from error
    if not (isinstance(cls, type) and issubclass(cls, kind)):
        raise UserError(f"{section}._target_={target}: not a subclass of {kind.__module__}.{kind.__qualname__}")
    return cls


def call(section: str, cls: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """
    Raises:
        UserError: ``cls`` does not take these arguments, or is of a library that refuses one of the values.
    """
    try:
        inspect.signature(cls).bind(*arguments, **named)
    except TypeError as error:
        raise UserError(f"{section}: {error} (the keys of {section} are the arguments of {cls.__name__})") from error
    try:
        return cls(*arguments, **named)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError) or cls.__module__.partition(".")[0] not in LIBRARIES:
            raise
        raise UserError(f"{section}: {' '.join(str(error).split())}") from error


def accepted(cls: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the ``arguments`` that ``cls`` has parameters for."""
    return {key: value for key, value in arguments.items() if key in inspect.signature(cls).parameters}
