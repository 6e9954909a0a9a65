"""What one run gave, to look at: a picture of its curves, and ``report.html``, a page in a single file."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor, nn

from mnist_lit.storage.atomic import atomic_write
from mnist_lit.storage.provenance import SAMPLE_NAME

MISTAKES = 40  # how many the page shows
CURVES = {"loss": "loss", "acc": "accuracy"}
TEXT_COLOR = "#010203"  # stands in a drawing for the colour of the page's text, which may be light or dark


def learning_curve(history: list[dict[str, Any]], results: dict[str, Any], path: Path) -> None:
    """Loss and accuracy over the epochs, with the test's as a dotted line.

    Args:
        history: A row an epoch, as ``RunRecorder.history`` has them.
        results: The content of ``metrics.json``.
        path: The picture's file; its ending decides the format.
    """
    figure = Figure(figsize=(9, 3.8))
    # A layout engine would take as long as the drawing itself.
    figure.subplots_adjust(left=0.07, right=0.985, top=0.86, bottom=0.13, wspace=0.16)
    for axes, key in zip(figure.subplots(1, 2), CURVES, strict=True):
        _draw_curve(axes, key, history, results)
        axes.set_title(CURVES[key])
    data = results["data"]
    caption = f"{data['name']}: {data['train']:,} training, {data['test']:,} test images, sha256 {data['sha256'][:16]}"
    figure.suptitle(f"seed {results['seed']} · {caption}", fontsize=9)
    figure.savefig(path, dpi=120, metadata={"Description": f"data {data['name']}, sha256 {data['sha256']}"})


def write_report(
    path: Path,
    results: dict[str, Any],
    config: dict[str, Any],
    answers: Any,
    network: nn.Module,
    history: list[dict[str, Any]] | None = None,
) -> None:
    """Write the page about a run; it needs nothing but itself.

    Args:
        results: The content of ``metrics.json``.
        config: What was asked for.
        answers: The test's ``PredictionCollector``.
        network: The one that was tested.
        history: A row an epoch, as ``RunRecorder.history`` has them, if the run trained it.

    Raises:
        WriteError: What was there before is untouched.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mnist_lit.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    wrong = (answers.probabilities.argmax(1) != answers.labels).sum().item()
    confusion = results["test/confusion_matrix"]
    page = environment.get_template("report.html").render(
        results=results,
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        is_sample=results["data"]["name"] == SAMPLE_NAME,
        curves=[(title, _curve_svg(key, history, results)) for key, title in CURVES.items()] if history else [],
        filters=_filters(network),
        wrong=wrong,
        mistakes=_worst_mistakes(answers),
        most_confused=max((n for i, row in enumerate(confusion) for j, n in enumerate(row) if i != j), default=0),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
    )
    atomic_write(path, page.encode())


def _draw_curve(axes: Axes, key: str, history: list[dict[str, Any]], results: dict[str, Any]) -> None:
    epochs = [row["epoch"] for row in history]
    axes.plot(epochs, [row[f"train/{key}"] for row in history], marker="o", ms=4, label="train (with dropout)")
    validated = [row for row in history if f"val/{key}" in row]
    if validated:
        values = [row[f"val/{key}"] for row in validated]
        axes.plot([row["epoch"] for row in validated], values, marker="s", ms=4, label="validation")
    test, color = results[f"test/{key}"], matplotlib.rcParams["text.color"]
    axes.axhline(test, color=color, ls=":", label=f"test, {results['tested_weights']} weights: {test:.4f}")
    axes.set_xlabel("epoch")
    axes.set_xlim(0.5, epochs[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))  # each tick and its line takes a hundredth of the time
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(alpha=0.3)
    axes.legend()


def _curve_svg(key: str, history: list[dict[str, Any]], results: dict[str, Any]) -> str:
    """A drawing to put into the page, in the colours and with the letters of the page."""
    colors = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: Any = {**dict.fromkeys(colors, TEXT_COLOR), "svg.fonttype": "none", "legend.framealpha": 0.0}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5, 3.6))
        figure.subplots_adjust(left=0.13, right=0.96, top=0.97, bottom=0.14)
        _draw_curve(figure.subplots(), key, history, results)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    drawing = file.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(TEXT_COLOR, "currentColor")
    referred = set(re.findall(r"#([\w.]+)", drawing))
    # Other names are the same in every drawing, and in one page each must be another.
    drawing = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in referred else "", drawing)
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg)', r"\1\2", drawing, count=1)


def _filters(network: nn.Module) -> list[str]:
    """Pictures of the first layer's kernels, if it is a convolution: blue is negative, red positive."""
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or first.in_channels != 1:
        return []
    kernels = first.weight.detach().cpu().float().numpy()[:, 0]
    colors = matplotlib.colormaps["RdBu_r"](kernels / (2 * abs(kernels).max() or 1) + 0.5, bytes=True)
    return [_data_url(kernel[:, :, :3]) for kernel in colors]


def _worst_mistakes(answers: Any) -> list[dict[str, Any]]:
    """The wrong answers that were given with the highest probability."""
    confidence, guesses = answers.probabilities.max(dim=1)
    wrong = (guesses != answers.labels).nonzero()[:, 0]
    worst: Tensor = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MISTAKES]
    return [
        {
            "number": i,
            "picture": _data_url(answers.images[i].numpy()),
            "truth": int(answers.labels[i]),
            "guess": int(guesses[i]),
            "confidence": float(confidence[i]),
        }
        for i in worst.tolist()
    ]


def _data_url(pixels: Any) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
