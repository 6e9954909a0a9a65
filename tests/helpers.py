"""What several tests use: small runs, what a run ends with, and comparisons that fail in a few lines."""

import copy
import fcntl
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from mnist_lit.cli.config import flatten, settings
from mnist_lit.storage import runs

ROOT = Path(__file__).parents[1]
QUICK = ["data.source=sample", "trainer.accelerator=cpu", "trainer.fast_dev_run=2"]
# What a clock or the system decides, and not the run.
MEASURED = ("epoch_seconds", "images_per_second", "fit_seconds", "test_seconds", "seconds", "peak_memory_bytes")
MAX_LINES = 8
OFF = ("logger", "scheduler", "augment", "loss", "metrics", "callbacks")  # groups of which nothing is chosen


def small(*overrides: str) -> dict[str, Any]:
    """The settings of a run over the sample that takes a few seconds: two epochs of three batches."""
    values = copy.deepcopy(_small(()))
    changes = flatten(OmegaConf.to_container(OmegaConf.from_dotlist([*overrides])))  # type: ignore[arg-type]
    if not changes.keys() <= flatten(values).keys():
        return copy.deepcopy(_small(overrides))
    for key, value in changes.items():  # without Hydra, which takes a fifth of such a run's time
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
    return values


@cache
def _small(overrides: tuple[str, ...]) -> dict[str, Any]:
    return settings(
        "train",
        "data.source=sample",
        "data.batch_size=100",
        "trainer.max_epochs=2",
        "trainer.limit_train_batches=3",
        "trainer.limit_test_batches=2",
        "trainer.accelerator=cpu",
        *overrides,
    )


def is_in_use(folder: Path) -> bool:
    """Whether a process holds the lock of the folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def final(folder: Path) -> Any:
    """Weights, optimizer's state, what was recorded and the results, without what was measured."""
    content = torch.load(folder / runs.LAST, weights_only=True)
    return unmeasured([content["state_dict"], content["optimizer_states"], content["recorded"], results(folder)])


def unmeasured(value: Any) -> Any:
    """``value`` without what a clock or the system decides."""
    if isinstance(value, dict):
        return {key: unmeasured(each) for key, each in value.items() if key not in MEASURED}
    return [unmeasured(each) for each in value] if isinstance(value, (list, tuple)) else value


def assert_same(left: Any, right: Any) -> None:
    """
    Raises:
        AssertionError: They are not the same to the last bit. It says in a few lines what differs, and by how much.
    """
    __tracebackhide__ = True  # for pytest
    if lines := shortened(differences(left, right)):
        raise AssertionError("\n".join(["not the same:", *lines]))


def shortened(lines: Iterator[str]) -> list[str]:
    first = list(itertools.islice(lines, MAX_LINES))
    more = sum(1 for _ in lines)
    return [*first, f"and {more} more"] if more else first


def differences(left: Any, right: Any, place: str = "") -> Iterator[str]:
    """A line for each value, array or file's content in which two structures differ; NaN is the same as NaN."""
    name = place or "value"
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        if left.dtype != right.dtype:
            yield f"{name}: {left.dtype} and {right.dtype}"
        else:
            whole = left.to(torch.float32) if left.dtype == torch.bfloat16 else left
            other = right.to(torch.float32) if right.dtype == torch.bfloat16 else right
            yield from differences(whole.detach().cpu().numpy(), other.detach().cpu().numpy(), place)
    elif isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        if left.shape != right.shape or left.dtype != right.dtype:
            yield f"{name}: {left.dtype} {left.shape} and {right.dtype} {right.shape}"
            return
        both_nan = np.isnan(left) & np.isnan(right) if left.dtype.kind == "f" else False
        differs = np.atleast_1d((left != right) & ~np.asarray(both_nan))
        if count := int(differs.sum()):
            one, other = (np.atleast_1d(each)[differs].astype(float) for each in (left, right))
            yield f"{name}: {count} of {left.size} differ, by at most {np.nanmax(np.abs(one - other)):.3g}"
    elif isinstance(left, Mapping) and isinstance(right, Mapping):
        for keys, side in ((left.keys() - right.keys(), "left"), (right.keys() - left.keys(), "right")):
            yield from (f"{place}[{key!r}]: only in the {side} one" for key in sorted(keys, key=str))
        for key in left:
            if key in right:
                yield from differences(left[key], right[key], f"{place}[{key!r}]")
    elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        if len(left) != len(right):
            yield f"{name}: {len(left)} and {len(right)} items"
        for number, (one, other) in enumerate(zip(left, right, strict=False)):
            yield from differences(one, other, f"{place}[{number}]")
    elif isinstance(left, (bytes, str)) and type(left) is type(right):
        if left != right:
            first = next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), None)
            at = min(len(left), len(right)) if first is None else first
            around = slice(max(0, at - 20), at + 40)
            yield f"{name}: lengths {len(left)} and {len(right)}, differ from {at} on: {left[around]!r} and {right[around]!r}"
    elif left != right and not (_is_nan(left) and _is_nan(right)):
        yield f"{name}: {_short(left)} and {_short(right)}"


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
