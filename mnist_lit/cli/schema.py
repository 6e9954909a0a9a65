"""The types and ranges of this project's own keys.

The arguments of a class (``model``, ``optimizer``, ``trainer``, ``data``, ``logger``) are checked by the class itself;
only those that it would check late are here. Other keys are passed on as they are.
"""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic wants this one below Python 3.12

from mnist_lit import UserError
from mnist_lit.build import must_be
from mnist_lit.cli.errors import suggestion
from mnist_lit.storage.run_config import CLASSES

Count = Annotated[int, Field(ge=1, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]
Switch = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(min_length=1)]
carries_along = with_config(ConfigDict(extra="allow"))
forbids_more = with_config(ConfigDict(extra="forbid"))


@carries_along
class Data(TypedDict, total=False):
    dir: Text
    source: Literal["auto", "mnist", "sample"]
    batch_size: Count
    val_size: Annotated[int, Field(ge=0, lt=60_000, strict=True)]


@carries_along
class Model(TypedDict, total=False):
    compile: Switch


@carries_along
class Checkpoint(TypedDict, total=False):
    monitor: Annotated[str, Field(pattern="^val/.")]
    mode: Literal["max", "min"]
    every_n_epochs: Count
    every_n_steps: Count | None


@carries_along
class Trainer(TypedDict, total=False):
    accumulate_grad_batches: Count
    check_val_every_n_epoch: Count | None
    val_check_interval: Annotated[float, Field(gt=0)] | str | dict[str, Any] | None
    num_sanity_val_steps: Annotated[int, Field(ge=-1)] | None
    gradient_clip_val: Annotated[float, Field(ge=0)] | None
    log_every_n_steps: Annotated[int, Field(ge=0)] | None


@carries_along
class Scheduler(TypedDict, total=False):
    interval: Literal["epoch", "step"]
    frequency: Count


class Verb(TypedDict, total=False):
    trust: Text | list[Text]


@forbids_more
class Evaluate(Verb, total=False):
    ckpt: Text
    data: Data
    metrics: dict[str, Any] | None
    trainer: Trainer


@carries_along
class Train(Verb, total=False):
    seed: Seed
    float32_matmul_precision: Literal["highest", "high", "medium"] | None
    data: Data
    model: Model
    optimizer: dict[str, Any]
    trainer: Trainer
    checkpoint: Checkpoint
    scheduler: Scheduler | None
    augment: dict[str, Any] | None
    loss: dict[str, Any] | None
    metrics: dict[str, Any] | None
    callbacks: dict[str, Any] | None
    logger: dict[str, Any] | None
    resume: Text | None


@carries_along
class Tune(Train, total=False):
    n_trials: Count
    storage: Text
    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    sampler: Literal["tpe", "random"]
    pruner: Literal["median", "none"]
    sampler_seed: Seed | None
    workers: Count
    space: dict[str, Any]


@forbids_more
class Predict(Verb, total=False):
    images: Text | Annotated[list[Text], Field(min_length=1)]
    ckpt: Text
    output: Text | None
    preprocess: Literal["mnist", "none"]
    refuse: Switch
    segments: Switch
    contact_sheet: Text | None
    overwrite: Switch


@forbids_more
class Export(Verb, total=False):
    output: Text
    ckpt: Text
    data: Data
    overwrite: Switch


@forbids_more
class Convert(Verb, total=False):
    source: Text
    target: Text
    data_format: Literal["channels_last", "channels_first"]
    overwrite: Switch


@forbids_more
class Serve(Verb, total=False):
    ckpt: Text
    port: Annotated[int, Field(ge=0, lt=65_536, strict=True)]
    allow_remote: Switch
    open_browser: Switch


@forbids_more
class Runs(TypedDict, total=False):
    folder: Text
    where: Text | None
    sort: Text
    compare: Annotated[list[Text | int], Field(min_length=2, max_length=10)] | None
    output: Text | None
    overwrite: Switch


VERBS: dict[str, Any] = {
    "train": Train,
    "tune": Tune,
    "evaluate": Evaluate,
    "predict": Predict,
    "export": Export,
    "convert": Convert,
    "serve": Serve,
    "runs": Runs,
}


# The mode with which the worst value of a metric would count as its best.
WRONG_MODES = {"loss": "max", "acc": "min"}


@cache
def _adapter(verb: str) -> TypeAdapter[Any]:
    return TypeAdapter(VERBS[verb])


def check(verb: str, values: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: A value has a wrong type or is out of range.
    """
    data = values.get("data")
    if isinstance(data, dict) and data.get("_target_", CLASSES["data"]) != CLASSES["data"]:
        # Another class knows its own arguments, but for those of this project's which are found out late.
        own = data.keys() & {"batch_size"} if str(data["_target_"]).startswith("mnist_lit.") else ()
        values = {**values, "data": {key: data[key] for key in own}}
    try:
        _adapter(verb).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        names = {
            key for cls in (Data, Model, Checkpoint, Trainer, Scheduler, *VERBS.values()) for key in cls.__annotations__
        }
        key = ".".join(str(part) for part in first["loc"] if str(part) in names)
        if first["type"] == "extra_forbidden":
            key = str(first["loc"][0])
            raise UserError(f"unknown key {key}{suggestion(key, names)}") from error
        raise UserError(f"{key}={first['input']}: {must_be(error)}") from error
    _require_right_modes("", values)


def _require_right_modes(prefix: str, values: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: A section, such as ``checkpoint`` or that of a callback, takes the worst of what it monitors for the best.
    """
    metric, mode = str(values.get("monitor")), values.get("mode")
    if mode and WRONG_MODES.get(metric.rpartition("/")[2]) == mode:
        right = "min" if mode == "max" else "max"
        raise UserError(
            f"{prefix}mode={mode}: with {prefix}monitor={metric} the worst epoch would count as the best; set "
            f"{prefix}mode={right}"
        )
    for key, section in values.items():
        if isinstance(section, dict):
            _require_right_modes(f"{prefix}{key}.", section)
