"""Instantiate objects from the configuration, as Hydra does: ``_target_`` names a class, other keys its arguments."""

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mnist_lit import UserError

T = TypeVar("T")

# Exceptions from these packages' constructors become a UserError; any other keeps its traceback.
LIBRARIES = ("lightning", "mnist_lit", "torch")


def build(section: str, config: Mapping[str, Any], kind: type[T], *first: Any) -> T:
    """An instance of the class named by ``config["_target_"]``, with the other values as keyword arguments.

    Values are passed unchanged, nested ``_target_`` keys included, so a configuration from a checkpoint is safe.

    Args:
        section: The name of ``config`` for error messages.
        kind: Required base class.
        first: Positional arguments.

    Raises:
        UserError: There is no such class, or it does not accept the arguments.
    """
    return call(section, find_class(section, config, kind), *first, **_arguments(config))


def instantiate(section: str, config: Mapping[str, Any], kind: type[T], **defaults: Any) -> T:
    """Like ``build``, but nested values with a ``_target_`` are instantiated as well.

    Args:
        defaults: Arguments to pass if the class accepts them and ``config`` does not give them.
    """
    import hydra.utils

    cls = find_class(section, config, kind)
    given = hydra.utils.instantiate(_arguments(config), _convert_="all")
    return call(section, cls, **{**accepted(cls, defaults), **given})


def find_class(section: str, config: Mapping[str, Any], kind: type[T]) -> type[T]:
    """
    Raises:
        UserError: ``config`` names no class, or not a subclass of ``kind``.
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
        UserError: ``cls`` does not accept these arguments, or refuses one of the values.
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
    """The subset of ``arguments`` that ``cls`` has parameters for."""
    return {key: value for key, value in arguments.items() if key in inspect.signature(cls).parameters}


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "_target_"}
