"""The configuration: composed by Hydra from ``conf/`` and overrides, checked, and handed on as plain values."""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist_lit import UserError
from mnist_lit.cli.errors import as_user_errors
from mnist_lit.cli.keys import (
    DATA_DIR,
    GLOBAL_GROUPS,
    MULTI_GROUPS,
    NULLABLE,
    PATHS,
    QUOTED,
    SINGLE_GROUPS,
    TUNE_KEYS,
    is_under,
)
from mnist_lit.storage import runs

# Beside the package in a checkout, inside it once installed.
SQLITE = "sqlite:///"  # before the path, which may be relative
CONF = next(path for base in Path(__file__).parents[1:3] if (path := base / "conf").is_dir())


def settings(verb: str, *overrides: str) -> dict[str, Any]:
    """The configuration of a verb as plain values, to call its function with: ``train("folder", **settings("train"))``.

    Args:
        verb: The name of a file in ``conf/``.
        overrides: As on the command line: ``"optimizer=sgd"``, ``"optimizer.lr=0.1"``.

    Raises:
        UserError: As on the command line.
    """
    files, typed = ConfigFiles(verb), [quoted(override) for override in overrides]
    with files.errors_as_user_errors(overrides):
        composed = files.compose(typed)
        values = arguments(verb, checked_values(verb, composed))
    if verb != "tune":
        return values
    return arguments_of_tune(values, typed, composed.hydra.runtime.choices)


def arguments(verb: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` without those that only the command line reads."""
    return {key: value for key, value in values.items() if key != "trust" or verb not in ("train", "tune")}


def checked_values(verb: str, config: Any) -> dict[str, Any]:
    """The ``plain_values`` of a composed configuration, checked, and without the keys that no longer apply.

    These are the keys of a class that another one has replaced, of a group that ``none`` switches off, and, for evaluate
    and export, those of the data that nobody has chosen.

    Raises:
        UserError: A required value is missing, or one has a wrong type or is out of range.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from mnist_lit.cli.schema import check

    if missing := OmegaConf.missing_keys(_own(config)):
        raise UserError(f"{', '.join(f'{key}=' for key in sorted(missing))} must be given (--help shows how)")
    hydra_config = config.hydra if "hydra" in config else HydraConfig.get()  # inside a command Hydra keeps it apart
    typed = [key_of(override) for override in hydra_config.overrides.task]
    config = _own(config)
    if OmegaConf.is_dict(config.get("space")):  # a search sets these
        typed += flatten(plain_values(config.space, resolve=False))
    for section in (*SINGLE_GROUPS, *MULTI_GROUPS):
        is_off = hydra_config.runtime.choices.get(section) == "none"
        if (is_off or f"{section}._target_" in typed) and OmegaConf.is_dict(config.get(section)):
            kept = [key.split(".")[1] for key in typed if key.startswith(f"{section}.")]  # the others: another class's
            config[section] = OmegaConf.masked_copy(config[section], [key for key in kept if key in config[section]])
    values = plain_values(config)
    if verb in ("evaluate", "export") and not hydra_config.job.chdir and isinstance(data := values.get("data"), dict):
        # What nobody has chosen, these take from the run.
        if hydra_config.runtime.choices.get("data") == "mnist" and not {"data", "data._target_"} & {*typed}:
            values["data"] = {key: value for key, value in data.items() if f"data.{key}" in typed}
        elif "data.dir" not in typed and data.get("dir") == DATA_DIR:
            values["data"] = {key: value for key, value in data.items() if key != "dir"}
    check(verb, values)
    return values


@dataclass(frozen=True)
class ConfigFiles:
    """The files that a configuration is composed from: ``conf/<name>.yaml``, its groups, and a folder of the user's."""

    name: str
    user_folder: str | None = None

    def compose(self, overrides: Iterable[str]) -> Any:
        """The configuration as Hydra composes it, with Hydra's own part under ``hydra``."""
        import hydra
        from hydra.core.global_hydra import GlobalHydra

        if GlobalHydra.instance().is_initialized():  # inside a command
            return hydra.compose(self.name, [*overrides], return_hydra_config=True)
        path = [f"hydra.searchpath=['file://{Path(self.user_folder).absolute()}']"] if self.user_folder else []
        with hydra.initialize_config_dir(str(CONF), version_base="1.3", job_name=self.name):
            return hydra.compose(self.name, [*overrides, *path], return_hydra_config=True)

    def errors_as_user_errors(self, overrides: Iterable[str]) -> AbstractContextManager[None]:
        """In this block what Hydra says about ``overrides`` becomes a ``UserError``, with the nearest key."""
        return as_user_errors(lambda: self._keys(overrides), self._groups())

    def _keys(self, overrides: Iterable[str]) -> list[str]:
        from hydra.errors import HydraException

        choices = [override for override in overrides if key_of(override) in self._groups()]
        # Without them, because one may not exist, or be several in a sweep; at last that of the verb, for a file of one's own.
        for files, chosen in ((self, choices), (self, []), (ConfigFiles("train"), [])):
            with contextlib.suppress(HydraException):
                return [*flatten(plain_values(files.compose(chosen), resolve=False)), *self._groups()]
        return self._groups()

    def _groups(self) -> list[str]:
        return [path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra"]

    def outputs_folder(self) -> Path:
        """Where runs have their folders, whatever folder Hydra has changed to."""
        from hydra.utils import to_absolute_path

        return Path(runs.display_path(Path(to_absolute_path(self.compose([]).hydra.run.dir)).parent))


def arguments_of_tune(
    values: Mapping[str, Any], typed: Sequence[str], choices: Mapping[str, Any], config_dir: str | None = None
) -> dict[str, Any]:
    """The arguments of ``tune`` but for the folder.

    Args:
        values: The configuration ``conf/tune.yaml``.
        typed: The overrides that it was composed with.
        choices: The files that were chosen for it, by group.

    Raises:
        UserError: It lacks what every trial needs, or is to resume a run.
    """
    if values.get("resume"):
        raise UserError("resume= continues a run; a search continues with the same storage= and study=")
    if "checkpoint" not in values:
        raise UserError("a search needs the section checkpoint")
    if missing := [key for key in TUNE_KEYS if key not in values and key != "space"]:
        raise UserError(f"a search needs {', '.join(missing)}")
    own = {key: values.get(key, {}) for key in TUNE_KEYS}
    of_trials = {key: value for key, value in values.items() if key not in own}
    others = [each for each in typed if not is_under(key_of(each), TUNE_KEYS)]
    overrides = overrides_of_train(others, of_trials, choices, ConfigFiles("train", config_dir))
    return {**own, "overrides": overrides, "config_dir": config_dir}


def overrides_of_train(
    typed: list[str], values: dict[str, Any], choices: Mapping[str, Any], files: ConfigFiles
) -> list[str]:
    """``typed``, and as further overrides of ``train`` what ``tune.yaml``, or one of the user's own, has otherwise.

    Args:
        values: The configuration without the keys that are tune's alone.
        choices: The files that were chosen for it, by group.
    """
    own = {group: name or "none" for group, name in choices.items() if not group.startswith("hydra/")}
    usual = files.compose([each for each in typed if key_of(each) in own]).hydra.runtime.choices
    own = {group: name for group, name in own.items() if group in usual}
    overrides = [*(f"{group}={name}" for group, name in own.items() if (usual[group] or "none") != name), *typed]
    chosen = [f"{group}={name}" for group, name in own.items() if name != "none" and group not in GLOBAL_GROUPS]
    default, train = (flatten(plain_values(files.compose(each))) for each in (chosen, overrides))
    # What an experiment changes stays as it has it.
    changed = {
        key: value
        for key, value in flatten(values).items()
        if key in train and train[key] != value and train[key] == default.get(key, train[key])
    }
    # data.val_size is in tune.yaml for any data, and not all have it.
    added = {f"+{key}": value for key, value in flatten(values).items() if key not in (*train, "data.val_size")}
    return [*overrides, *as_overrides({**changed, **added})]


def _own(config: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])


def plain_values(config: Any, resolve: bool = True) -> dict[str, Any]:
    """Everything but Hydra's part of a composed configuration, as plain values.

    Args:
        resolve: Whether references, ``${...}``, become what they refer to.
    """
    from omegaconf import OmegaConf

    return {str(key): value for key, value in OmegaConf.to_container(_own(config), resolve=resolve).items()}  # type: ignore


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"data": {"dir": "x"}}`` as ``{"data.dir": "x"}``."""
    pairs: dict[str, Any] = {}
    for key, value in values.items():
        pairs |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return pairs


def key_of(override: str) -> str:
    """``optimizer.lr`` of ``+optimizer.lr=0.1``."""
    return override.split("=", 1)[0].lstrip("+~")


def absolute_paths(values: dict[str, Any], folder: str) -> dict[str, Any]:
    """``values`` with relative paths made absolute, as if taken from ``folder``."""
    changed = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for key in PATHS:
        section, _, name = key.rpartition(".")
        place = changed.get(section, {}) if section else changed
        if isinstance(value := place.get(name), str) and value.startswith(SQLITE):
            place[name] = SQLITE + os.path.join(folder, os.path.expanduser(value.removeprefix(SQLITE)))
        elif isinstance(value, str) and value != "latest" and "://" not in value:
            place[name] = os.path.join(folder, os.path.expanduser(value))
        elif isinstance(value, list):
            place[name] = [os.path.join(folder, os.path.expanduser(each)) for each in value]
    return changed


def quoted(argument: str, multirun: bool = False) -> str:
    """``data.dir=a b`` as Hydra's grammar wants it, ``data.dir='a b'``; a leading ~ becomes the home folder.

    In a multirun commas separate values, each of which is quoted.
    """
    key, equals, value = argument.partition("=")
    is_list = key == "images" and re.fullmatch(r"\[.*\]", value)
    if not equals or key.lstrip("+") not in QUOTED or re.fullmatch(r"'.*'|\".*\"", value) or is_list:
        return argument
    if value == "null" and key in NULLABLE:
        return argument
    values = value.split(",") if multirun and not key.startswith("hydra.") else [value]
    if len(values) > 1 and ("(" in value or value[0] in "'\""):  # choice(a,b), or in quotes already
        return argument
    return f"{key}={','.join(_in_quotes(os.path.expanduser(each)) for each in values)}"


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """``key=value`` as Hydra's grammar wants it, for keys as ``flatten`` names them."""
    return [
        f"{key}={_in_quotes(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for key, value in values.items()
    ]


def _in_quotes(value: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(value, Quote.single).with_quotes()
