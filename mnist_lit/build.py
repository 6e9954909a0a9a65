"""Objects from the configuration, as in Hydra: ``_target_`` names a class, the other keys are its arguments."""

import inspect
import pkgutil
import re
import typing
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
    built = call(section, cls, **{**accepted(cls, defaults), **own})
    if cls.__module__.partition(".")[0] in LIBRARIES:  # some find out late
        key, reason = wrong_type(cls, own)
        if key:
            raise UserError(f"{section}.{key}={own[key]}: {reason}")
    return built


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
    except UserError:
        raise
    except Exception as error:
        if cls.__module__.partition(".")[0] not in LIBRARIES:
            raise
        key, reason = wrong_type(cls, named)
        if not isinstance(error, TypeError) or not key:
            reason = " ".join(str(error).split())
        raise UserError(f"{section}.{key}={named[key]}: {reason}" if key else f"{section}: {reason}") from error


def wrong_type(cls: Callable[..., Any], named: Mapping[str, Any]) -> tuple[str, str]:
    """The first argument that is not of the type that ``cls`` says, and what it must be; empty if there is none."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    try:
        hints = typing.get_type_hints(cls.__init__)
    except NameError:  # of a module that is imported for type checkers only
        return "", ""
    parameters = inspect.signature(cls).parameters
    for key, value in named.items():
        if key in hints and key in parameters and value != parameters[key].default:
            try:
                TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
            except ValidationError as error:
                return key, must_be(error)
    return "", ""


def must_be(error: Any) -> str:
    """The first finding of a pydantic ``ValidationError``: "must be greater than 0"."""
    message: str = error.errors()[0]["msg"]
    return re.sub(r"^(Input|String|List|Value) should ", "must ", message)


def accepted(cls: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the ``arguments`` that ``cls`` has parameters for."""
    return {key: value for key, value in arguments.items() if key in inspect.signature(cls).parameters}
