"""Present the results of a run: learning curves as a figure, and ``report.html``, a self-contained page."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import make_grid

from mnist_lit.inference.explain import feature_maps
from mnist_lit.reports.results import extra_metrics, kind_of_class
from mnist_lit.reports.scores import MAX_MISTAKES
from mnist_lit.storage.atomic import atomic_write
from mnist_lit.storage.provenance import SAMPLE_NAME, described

CURVES = {"loss": "loss", "acc": "accuracy"}  # of any run
TEXT_COLOR = "#010203"  # placeholder for the text colour of the page, which depends on light or dark mode


def learning_curve(history: list[dict[str, Any]], results: dict[str, Any], path: Path) -> None:
    """Plot loss and accuracy per epoch, with the test results as dotted lines.

    Args:
        history: A row per epoch, as in ``RunRecorder.history``. If it is empty, nothing is drawn.
        results: The content of ``metrics.json``.
        path: The PNG file to write.
    """
    if not history:
        return
    figure = Figure(figsize=(9, 3.8))
    # Set by hand, because a layout engine takes as long as the drawing itself.
    figure.subplots_adjust(left=0.07, right=0.985, top=0.86, bottom=0.13, wspace=0.16)
    for axes, key in zip(figure.subplots(1, 2), CURVES, strict=True):
        _draw_curve(axes, key, history, results)
        axes.set_title(CURVES[key])
    data = described(results["data"])
    figure.suptitle(f"seed {results['seed']} · {data}", fontsize=9)
    figure.savefig(path, dpi=120, metadata={"Description": f"data {data}"}, pil_kwargs={"compress_level": 1})


def write_report(
    path: Path,
    results: dict[str, Any],
    config: dict[str, Any],
    predictions: Any,
    network: nn.Module,
    history: list[dict[str, Any]] | None = None,
) -> None:
    """Write the HTML page about a run; it refers to no other file.

    Args:
        results: The content of ``metrics.json``.
        config: The resolved configuration.
        predictions: The ``PredictionCollector`` of the test.
        network: The tested network.
        history: A row per epoch, as in ``RunRecorder.history``, if the run trained the network.

    Raises:
        WriteError: The page cannot be written; an existing one is unchanged.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mnist_lit.reports"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    confusion, others = results["test/confusion_matrix"], extra_metrics(results)
    titles = CURVES | {name: name for name in others}
    page = environment.get_template("report.html").render(
        results=results,
        trained="epochs" in results,
        data=described(results["data"]),
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        is_sample=results["data"]["name"] == SAMPLE_NAME,
        curves=[(title, _curve_svg(key, history, results)) for key, title in titles.items()] if history else [],
        others=others,
        kind=kind_of_class(results),
        labels=[row.get("name", row["digit"]) for row in results["test/digits"]],
        filters=_filters(network),
        feature_maps=_feature_maps(network, predictions.examples),
        wrong=int((predictions.probabilities.argmax(1) != predictions.labels).sum()),
        mistakes=_worst_mistakes(predictions),
        most_confused=max((n for i, row in enumerate(confusion) for j, n in enumerate(row) if i != j), default=0),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
    )
    atomic_write(path, page.encode())


def _draw_curve(axes: Axes, key: str, history: list[dict[str, Any]], results: dict[str, Any]) -> None:
    for stage, label, marker in (("train", "train (during the epoch)", "o"), ("val", "validation", "s")):
        points = [(row["epoch"], row[f"{stage}/{key}"]) for row in history if f"{stage}/{key}" in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, ms=4, label=label)
    test, color = results[f"test/{key}"], matplotlib.rcParams["text.color"]
    axes.axhline(test, color=color, ls=":", label=f"test, {results['tested_weights']} weights: {test:.4f}")
    axes.set_xlabel("epoch")
    axes.set_xlim(0.5, history[-1]["epoch"] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))  # few ticks: each takes 1 % of the drawing time
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(alpha=0.3)
    axes.legend()


def _curve_svg(key: str, history: list[dict[str, Any]], results: dict[str, Any]) -> str:
    """An inline SVG that takes its colours and fonts from the page."""
    colors = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: Any = {**dict.fromkeys(colors, TEXT_COLOR), "svg.fonttype": "none", "legend.framealpha": 0.0}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5, 3.6))
        figure.subplots_adjust(left=0.13, right=0.96, top=0.97, bottom=0.14)
        _draw_curve(figure.subplots(), key, history, results)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(TEXT_COLOR, "currentColor")
    # Keep only the ids that something refers to: the others repeat in each figure, but must be unique in the page.
    referenced = set(re.findall(r"#([\w.]+)", svg))
    return re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in referenced else "", svg)


def _filters(network: nn.Module) -> list[str]:
    """Images of the first layer's kernels, red for positive and blue for negative, if it is a convolution."""
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or first.in_channels != 1:
        return []
    kernels = first.weight.detach().cpu().float().numpy()[:, 0]
    colors = matplotlib.colormaps["RdBu_r"](kernels / (2 * abs(kernels).max() or 1) + 0.5, bytes=True)
    return [_data_url(Image.fromarray(kernel[:, :, :3])) for kernel in colors]


def _feature_maps(network: nn.Module, images: Tensor | None) -> list[dict[str, Any]]:
    """What the first two convolutions make of each image: a picture of all their channels side by side."""
    if images is None or not (outputs := feature_maps(network, images)):
        return []
    maps = [output.cpu().float() for output in outputs.values()]
    return [
        {"image": _picture(image), "maps": [_grid(each[number] / each.max().clamp(min=1e-9)) for each in maps]}
        for number, image in enumerate(images.cpu().float())
    ]


def _grid(maps: Tensor) -> str:
    """A picture of maps [C, H, W] from 0 to 1, in rows of sixteen."""
    grid = make_grid(maps[:, None], nrow=16, padding=1)[0]
    colors = matplotlib.colormaps["viridis"](range(256), bytes=True)[:, :3]
    image = Image.fromarray((grid * 255).byte().numpy())
    image.putpalette(colors.tobytes())  # a third of the bytes to compress
    return _data_url(image)


def _worst_mistakes(predictions: Any) -> list[dict[str, Any]]:
    """The wrong predictions with the highest probabilities."""
    confidence, predicted = predictions.probabilities.max(dim=1)
    order = confidence.argsort(descending=True, stable=True)
    wrong = order[(predicted != predictions.labels)[order]]
    return [
        {
            "number": i,
            "image": _picture(predictions.images[i]),
            "true": int(predictions.labels[i]),
            "predicted": int(predicted[i]),
            "confidence": float(confidence[i]),
        }
        for i in wrong[:MAX_MISTAKES].tolist()
    ]


def _picture(image: Tensor) -> str:
    """An image [C, H, W] for the page; empty if it is neither grey nor RGB. Values outside [0, 1] were normalized."""
    if image.dim() != 3 or len(image) not in (1, 3):
        return ""
    low, high = min(0.0, float(image.min())), max(1.0, float(image.max()))
    pixels = ((image - low) / (high - low) * 255).round().to(torch.uint8)
    return _data_url(Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy()))


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
