"""The structure of a checkpoint: what this project and Lightning rely on, checked before anything uses it."""

from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from packaging.version import Version
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic wants this one below Python 3.12

from mnist_lit import UserError
from mnist_lit.storage.tables import one_line


def _check_tensor(value: Any) -> Any:
    """A dense tensor whose values are all in the file, each once: stride 0 makes a large one out of a single number."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided:
        raise ValueError("must be a dense tensor")
    if value.device.type != "cpu" or value.is_quantized or value.is_complex():
        raise ValueError(f"must be a tensor of real numbers, not {value.dtype} on {value.device}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"must hold all its {value.numel():,} values")
    last = 0  # the place of the last value, along the dimensions so far
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride <= last:
            raise ValueError("must hold each of its values once")
        last += (size - 1) * stride
    return value


def _check_plain(value: Any) -> Any:
    """Plain values, as in YAML: a tensor in place of a number would fail late, or mean something else."""
    inside = [value]
    while inside:
        each = inside.pop()
        if isinstance(each, dict):
            inside += [*each, *each.values()]
        elif isinstance(each, (list, tuple)):
            inside += each
        elif not isinstance(each, (str, int, float, bool, type(None))):
            raise ValueError(f"must have plain values only, not a {type(each).__name__}")  # noqa: TRY004  # for pydantic
    return value


def _check_progress(value: Any) -> Any:
    """Lightning's loops: where they stand is in counts, which it would only add to long after loading."""
    inside = [value]
    while inside:
        each = inside.pop()
        counts = each.values() if "ready" in each else [each.get("_batches_that_stepped", 0)]
        if any(type(count) is not int or count < 0 for count in counts):
            raise ValueError("must have counts that are integers and not negative")
        inside += [one for one in each.values() if isinstance(one, dict)]
    return value


def _check_states(value: dict[Any, Any]) -> dict[Any, Any]:
    """What an optimizer keeps for each weight, by its number, is of one kind for all of them, or its first step fails."""
    kinds: dict[str, str] = {}
    for state in (state for weight, state in value.items() if isinstance(weight, int)):
        if not isinstance(state, dict):
            raise ValueError(f"must have a dictionary for each weight, not a {type(state).__name__}")  # noqa: TRY004
        for key, entry in ((key, entry) for key, entry in state.items() if entry is not None):
            numeric = (
                "tensor" if isinstance(entry, torch.Tensor) else "number" if isinstance(entry, (int, float)) else ""
            )
            kind = numeric or type(entry).__name__
            if kinds.setdefault(key, kind) != kind:
                raise ValueError(
                    f"must have the same kind of {one_line(key)} for all weights, not {kinds[key]} and {kind}"
                )
    return value


_carries_along = with_config(ConfigDict(extra="allow", strict=True))
Section = dict[str, Any]
PlainSection = Annotated[Section, AfterValidator(_check_plain)]


@_carries_along
class HyperParameters(TypedDict):
    model: PlainSection
    optimizer: PlainSection
    scheduler: NotRequired[PlainSection | None]


@_carries_along
class Data(TypedDict):
    name: str


@_carries_along
class Machine(TypedDict):
    versions: dict[str, str]
    processes: int


@_carries_along
class OptimizerState(TypedDict):
    state: Annotated[dict[Any, Any], AfterValidator(_check_states)]
    param_groups: list[Section]


@_carries_along
class Recorded(TypedDict):
    history: list[dict[str, float]]
    validations: list[dict[str, float]]
    seconds: float
    fit_seconds: float


@_carries_along
class Checkpoint(TypedDict):
    state_dict: dict[str, Annotated[Any, AfterValidator(_check_tensor)]]
    hyper_parameters: HyperParameters
    data: NotRequired[list[Data]]
    temperature: NotRequired[Annotated[float, Field(ge=0.01, le=100)]]
    machine: NotRequired[Machine]
    epoch: NotRequired[Annotated[int, Field(ge=0)]]
    global_step: NotRequired[Annotated[int, Field(ge=0)]]
    lightning: NotRequired[Annotated[str, AfterValidator(Version), Field(alias="pytorch-lightning_version")]]
    loops: NotRequired[Annotated[Section, AfterValidator(_check_progress)]]
    recorded: NotRequired[Recorded]
    callbacks: NotRequired[Section]
    optimizer_states: NotRequired[list[OptimizerState]]
    lr_schedulers: NotRequired[list[Section]]


_STRUCTURE = TypeAdapter(Checkpoint)


def require_structure(content: Any, path: Path) -> None:
    """
    Raises:
        UserError: ``content`` lacks a part that other code relies on, or one is of another type.
    """
    try:
        _STRUCTURE.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = one_line(".".join(str(part) for part in first["loc"] if part != "[key]"))
        if first["type"] == "missing":
            raise UserError(f"{path} is not a checkpoint of this project: it has no {key}") from error
        reason = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
        raise UserError(f"{path} is not a checkpoint of this project: {key or 'it'} {reason}") from error
    for name, tensor in content["state_dict"].items():
        if not tensor.isfinite().all():
            raise UserError(f"{path} has NaN or infinite values in {one_line(name)}: it cannot be used")
