"""From YAML files and overrides to checked, plain Python values."""

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mnist_lit import UserError
from mnist_lit.cli.ranges import RANGES, of_type

# Beside the package in a checkout, inside it once installed.
CONF = next(path for base in Path(__file__).parents[1:3] if (path := base / "conf").is_dir())

# Keys whose values are paths: Hydra's grammar would choke on spaces, =, commas, ~ or umlauts in them.
PATH_KEYS = (
    "data.dir",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "resume",
    "ckpt",
    "images",
    "output",
    "contact_sheet",
    "source",
    "target",
    "storage",
)

# Sections that are arguments of a class: it refuses by itself what it does not know, so they may have more keys. What
# is searched may have more and fewer.
CLASS_SECTIONS = ("model", "optimizer", "trainer", "logger")
FREE_SECTIONS = ("space",)


def settings(verb: str, *overrides: str) -> dict[str, Any]:
    """A verb's configuration as plain values, to call its function with: ``train("folder", **settings("train"))``.

    Args:
        verb: The name of a file in ``conf/``.
        overrides: As on the command line: ``"optimizer=sgd"``, ``"optimizer.lr=0.1"``.

    Raises:
        UserError: As on the command line.
    """
    files = ConfigFiles(verb)
    with files.errors_as_refusals(overrides):
        config = files.compose([quoted(override) for override in overrides])
        return files.checked_values(config, config.hydra.runtime.choices)


@dataclass(frozen=True)
class ConfigFiles:
    """The files that a configuration is composed from: ``conf/<name>.yaml``, its groups, and a folder of the user's."""

    name: str
    user_folder: str | None = None

    def compose(self, overrides: Iterable[str]) -> Any:
        """The configuration as Hydra composes it, with Hydra's own part under ``hydra``."""
        import hydra
        from hydra.core.global_hydra import GlobalHydra

        if GlobalHydra.instance().is_initialized():  # inside a job
            return hydra.compose(self.name, [*overrides], return_hydra_config=True)
        path = [f"hydra.searchpath=['file://{Path(self.user_folder).absolute()}']"] if self.user_folder else []
        with hydra.initialize_config_dir(str(CONF), version_base="1.3", job_name=self.name):
            return hydra.compose(self.name, [*overrides, *path], return_hydra_config=True)

    def sweep_jobs(self, overrides: Iterable[str]) -> list[list[str]]:
        """The overrides of each job of a sweep without Hydra's own, as its basic sweeper makes them, in its order.

        Raises:
            UserError: Another sweeper was chosen.
        """
        import hydra
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
        from hydra.core.global_hydra import GlobalHydra
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.core.override_parser.types import ValueType

        with hydra.initialize_config_dir(str(CONF), version_base="1.3", job_name=self.name):
            parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
            parsed = parser.parse_overrides([*overrides])
            fixed = [each.input_line for each in parsed if not each.is_sweep_override() and each.input_line]
        if self.user_folder and any(each.value_type is ValueType.GLOB_CHOICE_SWEEP for each in parsed):
            raise UserError("glob(...) does not look into --config-dir: name the choices")
        sweeper = self.compose(fixed).hydra.sweeper
        if not sweeper._target_.endswith(".BasicSweeper"):
            raise UserError("hydra/sweeper: a sweep is a grid here; python -m mnist_lit.tune searches")
        params = parser.parse_overrides([f"{key}={value}" for key, value in (sweeper.params or {}).items()])
        own = [each for each in parsed if not each.key_or_group.startswith(("hydra.", "hydra/"))]
        (jobs,) = BasicSweeper.split_arguments([*params, *own], max_batch_size=None)
        return jobs

    def outputs_folder(self) -> Path:
        """Where runs have their folders."""
        return Path(self.compose([]).hydra.run.dir).parent

    def checked_values(self, config: Any, choices: Mapping[str, str | None]) -> dict[str, Any]:
        """Everything but Hydra's part of a composed configuration, as plain values.

        Args:
            choices: The file that was chosen of each group.

        Raises:
            UserError: A value that must be given is missing, or ``check`` refuses one.
        """
        from omegaconf import OmegaConf

        if missing := OmegaConf.missing_keys(_own(config)):
            raise UserError(f"{', '.join(f'{key}=' for key in sorted(missing))} must be given (--help shows how)")
        values = plain_values(config)
        check(values, self.defaults(choices))
        return values

    def defaults(self, choices: Mapping[str, str | None]) -> dict[str, Any]:
        """The values of the chosen groups without any other change: what keys there are, and of which types."""
        groups = (
            (group, option) for group, option in choices.items() if "hydra" not in group and group != "experiment"
        )
        return _values(self, tuple(f"{group}={option}" for group, option in groups if option))

    @contextmanager
    def errors_as_refusals(self, overrides: Iterable[str]) -> Iterator[None]:
        """In this block what Hydra and OmegaConf have to say about the command line comes out as one sentence."""
        import yaml
        from hydra.errors import HydraException, MissingConfigException, OverrideParseException
        from omegaconf.errors import OmegaConfBaseException

        try:
            yield
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            text = " ".join(str(error).split())
            if isinstance(error, UserError) or (
                type(error) is ValueError and not text.startswith("Config group override")
            ):
                raise
            unknown = re.search(r"Could not (?:override|delete from config\.)[^']*'([^']+)'", text)
            there = re.search(r"An item is already at '([^']+)'", text)
            match error:
                case MissingConfigException(missing_cfg_file=str(path), options=[*options]):
                    group, _, option = path.rpartition("/")
                    package = option.split("_")[0]
                    if group == "hydra/launcher" and package in ("joblib", "submitit", "ray"):
                        needed = f"pip install hydra-{package}-launcher"
                        raise UserError(f"{group}={option} needs a package that is not installed: {needed}") from error
                    text = f"{group}={option}: there is no such choice; there are {', '.join(sorted(options))}"
                case yaml.YAMLError():
                    text = f"a YAML file cannot be read: {text}"
                case OverrideParseException() if "=" not in error.override:
                    text = f"cannot read {error.override}: arguments are KEY=VALUE (--help shows the keys)"
                case _ if ambiguous := re.search(r"Ambiguous value for argument '([^']+)'", text):
                    text = f"{ambiguous[1]}: several values are a sweep, which needs -m"
                case OverrideParseException():
                    reason = error.message.splitlines()[0]
                    text = f"cannot read {error.override}: {reason} (a value with = ( ) [ ] or a comma needs quotes)"
                case _ if there:
                    text = f"{there[1]} exists: leave out the + before it"
                case _ if type(error) is ValueError:
                    text = "a group takes the name of one of its files; for none, leave it out"
                case _ if unknown:
                    text = f"unknown key {unknown[1]}{suggestion(unknown[1], self._known_keys(overrides))}"
            raise UserError(text) from error

    def _known_keys(self, overrides: Iterable[str]) -> list[str]:
        from hydra.errors import HydraException

        groups = [path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra"]
        pairs = (override.split("=", 1) for override in overrides if "=" in override)
        try:
            known = self.defaults({group: option for group, option in pairs if group in groups})
        except HydraException:  # a choice that does not exist, or several in a sweep
            known = self.defaults({})
        return [*flatten(known), *groups]


@cache
def _values(files: ConfigFiles, overrides: tuple[str, ...]) -> dict[str, Any]:
    return plain_values(files.compose(overrides))


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


def check(values: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuse keys that do not exist, and values of a wrong type or out of range.

    Raises:
        UserError: Names the key, the value and what is allowed.
    """
    known, given = flatten(defaults), flatten(values)
    if gone := {key for key in known.keys() - given.keys() if key.split(".")[0] not in FREE_SECTIONS}:
        raise UserError(f"{min(gone)} is needed: it can be changed, but not taken away")
    for key, value in given.items():
        if key in known:
            rule = RANGES.get(key) or of_type(known[key])
            if not rule.holds(value) and not (value is None and known[key] is None):
                raise UserError(f"{key}={value}: must be {rule.allowed}")
        elif key.split(".")[0] not in CLASS_SECTIONS + FREE_SECTIONS:
            raise UserError(f"unknown key {key}{suggestion(key, known)}")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"data": {"dir": "x"}}`` as ``{"data.dir": "x"}``."""
    pairs: dict[str, Any] = {}
    for key, value in values.items():
        pairs |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return pairs


def suggestion(key: str, known: Iterable[str]) -> str:
    """``"; did you mean data.dir?"``, or where to look if nothing known is near."""
    section, _, name = key.rpartition(".")

    def likeness(other: str) -> tuple[float, bool]:
        other_section, _, other_name = other.rpartition(".")
        return difflib.SequenceMatcher(None, name, other_name).ratio(), section == other_section

    nearest = max((other for other in known if other != key), key=likeness)
    return f"; did you mean {nearest}?" if likeness(nearest)[0] > 0.6 else " (--help shows them all)"


def quoted(argument: str) -> str:
    """``data.dir=a b`` as Hydra's grammar wants it, ``data.dir='a b'``; a leading ~ becomes the home folder."""
    key, equals, value = argument.partition("=")
    is_list = key == "images" and re.fullmatch(r"\[.*\]", value)
    if not equals or key.lstrip("+") not in PATH_KEYS or re.fullmatch(r"'.*'|\".*\"", value) or is_list:
        return argument
    return f"{key}={_in_quotes(os.path.expanduser(value))}"


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """``key=value`` as Hydra's grammar wants it, for keys as ``flatten`` names them."""
    return [
        f"{key}={_in_quotes(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for key, value in values.items()
    ]


def _in_quotes(value: str) -> str:
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)  # backslashes count only before a quote
    return f"'{escaped}'"
