"""What Hydra says about a command line, as one sentence with the nearest key."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from mnist_lit import UserError


@contextmanager
def as_user_errors(keys: Callable[[], Iterable[str]], groups: Iterable[str]) -> Iterator[None]:
    """In this block what Hydra and OmegaConf raise while they compose becomes a ``UserError``.

    Args:
        keys: Gives the keys that there are, for a suggestion.
        groups: The groups that files can be chosen from.
    """
    import yaml
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        text = " ".join(str(error).split())
        of_hydra = ("Config group override", "Only one of --", "The --resolve flag")  # its plain ValueErrors
        if isinstance(error, UserError) or (type(error) is ValueError and not text.startswith(of_hydra)):
            raise
        # Hydra has the key only in its text.
        unknown = re.search(r"Could not (?:override|delete from config\.)[^']*'([^']+)'", text)
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
            case _ if there := re.search(r"An item is already at '([^']+)'", text):
                text = f"{there[1]} exists already: leave out the +"
            case _ if text.startswith(of_hydra[0]):
                text = "a group takes the name of one of its files (--help shows them); none switches off those that have it"
            case _ if unknown and text.startswith("Could not delete") and unknown[1] in keys():
                text = f"{unknown[1]} is null: there is nothing to delete"
            case _ if unknown:
                group, dot, _ = unknown[1].partition(".")
                is_null = dot and group in groups and not any(key.startswith(f"{group}.") for key in keys())
                choose = f": {group} is null; choose one first, {group}=NAME (--help shows them)"
                text = f"unknown key {unknown[1]}{choose if is_null else suggestion(unknown[1], keys())}"
        raise UserError(text) from error


def suggestion(key: str, known: Iterable[str]) -> str:
    """``"; did you mean data.dir?"``, or where to look if nothing known is near."""
    section, _, name = key.rpartition(".")

    def likeness(other: str) -> tuple[float, bool]:
        other_section, _, other_name = other.rpartition(".")
        return difflib.SequenceMatcher(None, name, other_name).ratio(), section == other_section

    nearest = max((other for other in known if other != key), key=likeness)
    return f"; did you mean {nearest}?" if likeness(nearest)[0] > 0.6 else " (--help shows them all; + adds a new one)"
