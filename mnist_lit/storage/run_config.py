"""Read a run's ``config.yaml``, which may be untrusted: under bounds, and with today's keys."""

from pathlib import Path
from typing import Any

import yaml

from mnist_lit import UserError
from mnist_lit.storage import runs
from mnist_lit.storage.checkpoint_file import with_current_names
from mnist_lit.storage.tables import one_line

SECTIONS = ("data", "model", "optimizer", "trainer")  # what a run's ``config.yaml`` has at least
# Bounds of a ``config.yaml``; a run of the tutorial has 1.5 kB with 70 values, none nested deeper than twice.
MAX_BYTES = 2**20
MAX_VALUES = 10_000
MAX_LENGTH = 3_000  # of a value: Python prints no integer of 4,300 digits, and never ends reading one of a million
MAX_DEPTH = 10
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C takes a tenth of the time
# The classes of sections that need not name one: those of older runs.
CLASSES = {"data": "mnist_lit.data.MNISTDataModule", "trainer": "lightning.Trainer"}


def read_config(path: Path) -> dict[str, Any]:
    """The content of a run's ``config.yaml``, which may be untrusted, with today's keys.

    Raises:
        UserError: It is not the configuration of a run.
    """
    try:
        text = runs.read_text(path, MAX_BYTES)
        _require_plain(text)
        config: dict[str, Any] = yaml.load(text, LOADER)
        if not (isinstance(config, dict) and all(isinstance(config.get(each), dict) for each in SECTIONS)):
            raise ValueError(f"it lacks one of the sections {', '.join(SECTIONS)}")
    except Exception as error:  # PyYAML raises anything for such as ``!!bool x``
        raise UserError(f"{path} is not the configuration of a run ({one_line(error)})") from error
    config |= {section: with_current_names(config[section]) for section in ("model", "optimizer")}
    return config | {section: {"_target_": target, **config[section]} for section, target in CLASSES.items()}


def _require_plain(text: str) -> None:
    """
    Raises:
        ValueError: What the YAML text stands for is larger than a configuration, or more than plain values.
    """
    depth = values = 0
    for event in yaml.parse(text, LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        values += isinstance(event, yaml.ScalarEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has aliases")  # noqa: TRY004  # a few of which stand for any number of values
        # Both would become other values, with classes that nobody has looked at, once the configuration is used.
        if getattr(event, "tag", None) or "${" in str(getattr(event, "value", "")):
            raise ValueError("it has tags or interpolations, which no run writes")
        if depth > MAX_DEPTH or values > MAX_VALUES or len(getattr(event, "value", "")) > MAX_LENGTH:
            raise ValueError("it is nested too deeply, or has too many or too long values")
