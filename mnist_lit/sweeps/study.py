"""An Optuna study: where it is kept, what it searches, how it draws and prunes."""

import json
import random
import re
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mnist_lit import UserError
from mnist_lit.cli.config import ConfigFiles, flatten, plain_values
from mnist_lit.cli.errors import suggestion

HEARTBEAT, GRACE = 5, 15  # seconds between two signs of life of a trial, and after which it is taken for dead


def distributions(
    space: dict[str, Any], overrides: Sequence[str], files: ConfigFiles
) -> dict[str, Callable[[Any], Any]]:
    """What draws each key's value in a trial.

    Raises:
        UserError: A key that train does not have or that was given a value, or a range that is none.
    """
    with files.errors_as_user_errors(overrides):
        known = flatten(plain_values(files.compose(overrides), resolve=False))
    ranges: dict[str, dict[str, Any]] = {}
    for path, value in flatten(space).items():
        key, _, name = path.rpartition(".")
        ranges.setdefault(key, {})[name] = value
    draws = {}
    for key, given in ranges.items():
        if key not in known:
            raise UserError(
                f"space.{key}: train has no key {key}{suggestion(key, known)}; '~space.{key}' leaves it out"
            )
        if any(override.lstrip("+~").split("=")[0] == key for override in overrides):
            raise UserError(f"{key} is searched, so it cannot be given; '~space.{key}' leaves it out of the search")
        draws[key] = _distribution(key, given, known[key])
    if not draws:
        raise UserError("space is empty: there is nothing to search")
    return draws


def _distribution(key: str, given: dict[str, Any], default: Any) -> Callable[[Any], Any]:
    match given:
        case {"choices": [_, *_] as choices, **rest} if not rest:
            return lambda trial: trial.suggest_categorical(key, choices)
        case {"low": int() | float() as low, "high": int() | float() as high, **rest} if (
            low < high and rest.keys() <= {"log"} and not (rest.get("log") and low <= 0)
        ):
            logarithmic = bool(rest.get("log", False))
            if all(type(value) is int for value in (low, high, default)):
                return lambda trial: trial.suggest_int(key, low, high, log=logarithmic)
            return lambda trial: trial.suggest_float(key, low, high, log=logarithmic)
    raise UserError(
        f"space.{key}: must be choices: [...], or low: and high: with low < high, and log: true only above 0; "
        f"it is {given}"
    )


def make_sampler(name: str, seed: int | None, trials: int = 0) -> Any:
    """
    Args:
        trials: How many there are already, so that another start does not draw the same ones again.
    """
    import optuna

    seed = None if seed is None else random.Random(f"{seed} {trials}").getrandbits(32)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    # constant_liar: trials under way count as bad ones, so that those beside them are not the same.
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


def make_pruner(name: str) -> Any:
    import optuna

    return (
        optuna.pruners.NopPruner() if name == "none" else optuna.pruners.MedianPruner(n_warmup_steps=2)
    )  # not by the first epoch


def open_study(storage: str, name: str, pruner: Any) -> Any:
    """
    Raises:
        UserError: The storage is out of reach, or there is no such kind.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # signs of life, since 2.9
    optuna.logging.disable_default_handler()
    optuna.logging.enable_propagation()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for attempt in range(5):
        try:
            if storage.startswith("sqlite:///"):
                Path(storage.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            opened = optuna.storages.RDBStorage(
                storage,
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            )
            return optuna.create_study(
                study_name=name,
                storage=opened,
                pruner=pruner,
                direction="maximize",
                load_if_exists=True,
            )
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError, OSError, ValueError) as error:
            if attempt == 4 or not isinstance(error, SQLAlchemyError | optuna.exceptions.StorageInternalError):
                reason = " ".join(str(error).split())
                shown = re.sub(r"(//[^/:@]*):[^@]*@", r"\1:***@", storage)
                raise UserError(f"storage={shown}: cannot be opened ({reason[:300]})") from error
            time.sleep(0.5 * (attempt + 1))  # another process may be making its tables
    raise AssertionError("not reached")


def require_same_search(study: Any, name: str, asked: dict[str, Any]) -> None:
    """
    Raises:
        UserError: The study was begun with other settings, with which its trials cannot be compared.
    """
    before = study.user_attrs.get("asked")
    if before is None:
        study.set_user_attr("asked", asked)
        return
    now = json.loads(json.dumps(asked))
    for key in now:
        if before[key] != now[key]:
            old, new = flatten(before[key]), flatten(now[key])
            keys = [each for each in {**old, **new} if old.get(each) != new.get(each)]
            differ = ", ".join(f"{each} was {old.get(each)} and not {new.get(each)}" for each in keys)
            raise UserError(f"study={name} was begun with other {key}: {differ}; choose another study=")
