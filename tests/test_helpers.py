"""A failing comparison says in a few lines what differs and by how much."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pytest_assertrepr_compare
from helpers import assert_same, differences, final, unmeasured

BIG = torch.zeros(1000, 1000)


def changed(place: int, by: float) -> torch.Tensor:
    other = BIG.clone()
    other.view(-1)[place] += by
    return other


@pytest.mark.parametrize(
    ("left", "right", "line"),
    [
        (BIG, changed(7, 0.25), "value: 1 of 1000000 differ, by at most 0.25"),
        (BIG, BIG.double(), "value: torch.float32 and torch.float64"),
        (BIG, BIG[1:], "value: float32 (1000, 1000) and float32 (999, 1000)"),
        (np.arange(3), np.arange(3) * 2, "value: 2 of 3 differ, by at most 2"),
        (torch.tensor(1.0), torch.tensor(1.0 + 2**-20), "value: 1 of 1 differ, by at most 9.54e-07"),
        (
            torch.zeros(2, dtype=torch.bfloat16),
            torch.ones(2, dtype=torch.bfloat16),
            "value: 2 of 2 differ, by at most 1",
        ),
        ({"a": [1, {"b": BIG}]}, {"a": [1, {"b": changed(0, -2)}]}, "['a'][1]['b']: 1 of 1000000 differ, by at most 2"),
        ({"a": 1}, {"b": 1}, "['a']: only in the left one"),
        ([1, 2], [1], "value: 2 and 1 items"),
        (b"x" * 10**6, b"x" * 999_999 + b"y", "value: lengths 1000000 and 1000000, differ from 999999 on: b"),
        ("ab", "abc", "value: lengths 2 and 3, differ from 2 on: 'ab' and 'abc'"),
        ("z" * 500, 1, "value: 'zzz"),
        (2.088034152984619, 2.08803391456604, "value: 2.088034152984619 and 2.08803391456604"),
        (1, None, "value: 1 and None"),
    ],
)
def test_what_differs_and_by_how_much(left: Any, right: Any, line: str) -> None:
    found = [*differences(left, right)]
    assert found[0].startswith(line) and all(len(each) < 250 for each in found)


@pytest.mark.parametrize("value", [float("nan"), torch.tensor([1.0, float("nan")]), {"a": [BIG, b"x", None, "y", 2]}])
def test_the_same_is_the_same(value: Any) -> None:
    assert [*differences(value, value)] == []
    assert_same(value, value)


def test_a_million_differences_are_a_few_lines(finished_run: Path, validated_run: Path) -> None:
    with pytest.raises(AssertionError) as failed:
        assert_same(final(finished_run), final(validated_run))
    lines = str(failed.value).splitlines()
    assert 5 < len(lines) <= 10 and max(map(len, lines)) < 250 and lines[-1].startswith("and ")


def test_pytests_own_comparison_of_large_values_too() -> None:
    left, right = [*range(100_000)], [*range(99_999), 5]
    assert pytest_assertrepr_compare("==", left, right) == ["two values of list and list:", "[99999]: 99999 and 5"]
    assert pytest_assertrepr_compare("==", [1], [2]) is None and pytest_assertrepr_compare("in", left, right) is None


def test_what_was_measured_is_left_out() -> None:
    assert unmeasured({"a": [{"seconds": 1, "b": 2}], "fit_seconds": 3}) == {"a": [{"b": 2}]}
