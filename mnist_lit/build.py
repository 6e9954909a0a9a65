"""Instantiate objects from the configuration, as Hydra does: ``_target_`` names a class, other keys its arguments."""

import inspect
import pkgutil
import re
import sys
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mnist_lit import UserError
from mnist_lit.storage.checkpoint_file import require_same_shapes

T = TypeVar("T")

# Exceptions from these packages' constructors become a UserError; any other keeps its traceback.
LIBRARIES = ("kornia", "lightning", "mnist_lit", "torch", "torchmetrics")


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


def require_fitting_weights(config: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    """Compare a network, built without taking memory for its parameters, with the ``weights`` it is to have.

    Args:
        config: The section ``model`` of a checkpoint.
        weights: The tensors of the network in a checkpoint.

    Raises:
        UserError: There is no such network, or names or shapes differ; the message lists every difference.
    """
    import torch

    try:
        with torch.device("meta"):
            own = build("model", config, torch.nn.Module).state_dict()
    except UserError:
        raise
    except (RuntimeError, TypeError, ValueError):  # the user's own network, whose constructor computes with values
        return
    require_same_shapes({f"network.{key}": value for key, value in own.items()}, weights)


def instantiate(section: str, config: Mapping[str, Any], kind: type[T], **defaults: Any) -> T:
    """Like ``build``, but nested values with a ``_target_`` are instantiated as well.

    Args:
        defaults: Arguments to pass if the class accepts them and ``config`` does not give them.
    """
    import hydra.utils

    cls = find_class(section, config, kind)
    own = hydra.utils.instantiate(_arguments(config), _convert_="all")
    return call(section, cls, **{**accepted(cls, defaults), **own})


def find_class(section: str, config: Mapping[str, Any], kind: type[T]) -> type[T]:
    """
    Raises:
        UserError: ``config`` names no class, or not a subclass of ``kind``. What the class's own module raises while it is
            imported keeps its traceback.
    """
    if not (target := config.get("_target_")):
        raise UserError(f"{section} has no _target_, so no class: choose a file of conf/ first, {section}=NAME")
    if not all(map(str.isidentifier, names := str(target).split("."))) or len(names) == 1:
        raise UserError(f"{section}._target_={target}: no such class (it is to be MODULE.CLASS)")
    for count in range(len(names) - 1, 0, -1):  # fewer names are the module's if the class is inside another class
        module = ".".join(names[:count])
        try:
            # With a colon it imports the module itself, and what is wrong inside is not taken for a missing one.
            cls = pkgutil.resolve_name(f"{module}:{'.'.join(names[count:])}")
            break
        except (ImportError, AttributeError, ValueError) as error:
            if getattr(error, "name", None) == module and count > 1:
                continue
            if _is_users_own(module, error):
                raise
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
    if cls.__module__.partition(".")[0] not in LIBRARIES:
        return cls(*arguments, **named)
    key, reason = wrong_type(cls, named)
    try:
        built = cls(*arguments, **named)
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, TypeError) or not key:
            reason = " ".join(str(error).split())
        raise UserError(f"{section}.{key}={named[key]}: {reason}" if key else f"{section}: {reason}") from error
    if key:  # some find out late
        raise UserError(f"{section}.{key}={named[key]}: {reason}")
    return built


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
    return re.sub(r"^(Input|String|List|Value) should ", "must ", error.errors()[0]["msg"])


def accepted(cls: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The subset of ``arguments`` that ``cls`` has parameters for, or as ``**kwargs`` is taken to pass on to a base class."""
    names: set[str] = set()
    for each in inspect.getmro(cls) if isinstance(cls, type) else [cls]:
        parameters = inspect.signature(each).parameters
        names |= parameters.keys()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return {key: value for key, value in arguments.items() if key in names}


def _is_users_own(module: str, error: Exception) -> bool:
    """Whether ``error`` comes from the code in a module that is no library's, and not because there is none."""
    if module.partition(".")[0] in LIBRARIES:
        return False
    if isinstance(error, ModuleNotFoundError):
        return not f"{module}.".startswith(f"{error.name}.")
    return module not in sys.modules  # Python takes it out when its import fails


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "_target_"}
