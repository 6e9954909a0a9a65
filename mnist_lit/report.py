"""Pictures of one run."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def learning_curve(history: list[dict[str, Any]], results: dict[str, Any], path: Path) -> None:
    """Loss and accuracy over the epochs, with the test's as a dotted line.

    Args:
        history: A row an epoch, as ``RunRecorder.history`` has them.
        results: The content of ``metrics.json``.
        path: The picture's file; its ending decides the format.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axes, key, title in zip(figure.subplots(1, 2), ("loss", "acc"), ("loss", "accuracy"), strict=True):
        axes.plot(epochs, [row[f"train/{key}"] for row in history], marker="o", ms=4, label="train (with dropout)")
        validated = [row for row in history if f"val/{key}" in row]
        if validated:
            values = [row[f"val/{key}"] for row in validated]
            axes.plot([row["epoch"] for row in validated], values, marker="s", ms=4, label="validation")
        test = results[f"test/{key}"]
        axes.axhline(test, color="black", ls=":", label=f"test, {results['tested_weights']} weights: {test:.4f}")
        axes.set(title=title, xlabel="epoch")
        axes.set_xlim(0.5, epochs[-1] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    data = results["data"]
    caption = f"{data['name']}: {data['train']:,} training, {data['test']:,} test images, sha256 {data['sha256'][:16]}"
    figure.suptitle(f"seed {results['seed']} · {caption}", fontsize=9)
    figure.savefig(path, dpi=120, metadata={"Description": f"data {data['name']}, sha256 {data['sha256']}"})
