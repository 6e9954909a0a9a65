"""Data provenance: which data a model was trained on, and whether it may be tested on a given data set."""

from collections.abc import Mapping, Sequence
from typing import Any

MNIST_NAME, SAMPLE_NAME = "mnist", "mnist-sample"  # how all of a run's files name the data
UNKNOWN_DATA = {"name": "unknown"}  # training data from elsewhere than MNISTDataModule


def facts_of(datamodule: Any) -> dict[str, Any]:
    """Name, counts and checksum of the data, or only the class's name if the module does not say more (``facts``)."""
    own: dict[str, Any] = getattr(datamodule, "facts", {})
    return own or {"name": f"{type(datamodule).__module__}.{type(datamodule).__qualname__}"}


def described(facts: Mapping[str, Any]) -> str:
    """Such as ``mnist: 60,000 training, 10,000 test images, sha256 1e35582d42a90940``, as far as it is known."""
    kinds = {"train": "training", "val": "validation", "test": "test"}
    counts = ", ".join(f"{facts[key]:,} {kind}" for key, kind in kinds.items() if facts.get(key))
    text = f"{facts['name']}: {counts} images" if counts else str(facts["name"])
    return f"{text}, sha256 {facts['sha256'][:16]}" if "sha256" in facts else text


def trained_on(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The data sets that a checkpoint was trained on, according to itself."""
    return checkpoint.get("data", [UNKNOWN_DATA])


def why_not_to_test(trained_on: Sequence[Mapping[str, Any]], data: Mapping[str, Any]) -> str:
    """Why the test accuracy on ``data``, its facts, would be meaningless; empty if it is not.

    The sample's test images are training images of the full MNIST, so testing on them would leak training data. Labels are
    numbers, which stand for the same classes only if the names are the same.
    """
    alike = [facts["classes"] for facts in trained_on if facts["name"] == data["name"] and facts.get("classes")]
    if alike and data.get("classes") not in (None, alike[-1]):
        names, own = (", ".join(map(str, each)) for each in (data["classes"], alike[-1]))
        return f"the classes of these data are not those that the model was trained on: {names} instead of {own}"
    others = [facts["name"] for facts in trained_on if facts["name"] != SAMPLE_NAME]
    if not others or data["name"] != SAMPLE_NAME:
        return ""
    return (
        f"this model was trained on other data than the sample ({', '.join(others)}), and the sample's test images "
        "are training images of the full MNIST: test on the full MNIST instead (data.source=mnist)"
    )
