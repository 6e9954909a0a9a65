"""Which data a model has seen, and on which it can therefore be tested."""

from collections.abc import Iterable, Mapping
from typing import Any

MNIST_NAME, SAMPLE_NAME = "mnist", "mnist-sample"  # as everything that a run writes calls the data
UNKNOWN_DATA = {"name": "unknown"}  # what a checkpoint says of training data that do not come from MNISTDataModule


def trained_on(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The data sets that a checkpoint says it was trained on."""
    data: list[dict[str, Any]] = checkpoint.get("data", [UNKNOWN_DATA])
    return data


def why_not_to_test(trained_on: Iterable[Mapping[str, Any]], data: str) -> str:
    """Why a model's accuracy on the test digits of ``data`` would mean nothing; empty if it means something.

    The sample's test digits are training digits of the full set.
    """
    others = [facts["name"] for facts in trained_on if facts["name"] != SAMPLE_NAME]
    if not others or data != SAMPLE_NAME:
        return ""
    return (
        f"this model was trained on other data than the sample ({', '.join(others)}), and the sample's test "
        "digits are training digits of the full MNIST: test it on that (data.source=mnist)"
    )
