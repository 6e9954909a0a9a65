"""The HTML page about a run, as text and in a browser."""

import base64
import html.parser
import io
import re
import shutil
from pathlib import Path

import colour
import numpy as np
import pytest
import torch
from conftest import Browser, Command
from helpers import QUICK, results
from PIL import Image

from mnist_lit import UserError
from mnist_lit.cli.config import settings
from mnist_lit.evaluate import evaluate
from mnist_lit.inference.explain import feature_maps
from mnist_lit.network import TutorialCNN
from mnist_lit.reports.report import write_report
from mnist_lit.reports.results import training_table
from mnist_lit.reports.scores import PredictionCollector, scores
from mnist_lit.storage import runs
from mnist_lit.train import train

WITHOUT_END = {"meta", "img", "br", "path", "use", "rect"}


class Nesting(html.parser.HTMLParser):
    """Checks that elements are nested properly, and collects ids, references and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.places: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attributes) -> None:
        if tag not in WITHOUT_END:
            self.open.append(tag)
        named = dict(attributes)
        self.ids += [named["id"]] if "id" in named else []
        self.places += [named[key] for key in ("src", "href", "xlink:href", "action") if key in named]

    def handle_startendtag(self, tag, attributes) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in WITHOUT_END:
            self.open.pop()

    def handle_endtag(self, tag) -> None:
        if tag not in WITHOUT_END:
            assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data if self.open[-1:] != ["style"] else ""


def read(path: Path) -> Nesting:
    page = Nesting()
    page.feed(path.read_text(encoding="utf-8"))
    assert not page.open
    return page


def test_the_page_of_a_run_is_self_contained(validated_run: Path) -> None:
    page = read(validated_run / "report.html")
    assert all(place.startswith(("data:image/png;base64,", "#")) for place in page.places)
    assert {place[1:] for place in page.places if place.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    text = (validated_run / "report.html").read_text()
    assert not re.search(r"url\((?!#)|@import|<script", text)
    for part in (
        "Not the full MNIST",
        "3,800 training, 200 validation, 1,000 test images",
        "lr: 50",
        "torch ",
        "best (epoch",
    ):
        assert part in page.text, part
    assert page.text.count("no. ") == 40  # the worst of many mistakes
    assert len(re.findall(r'alt="filter \d+"', text)) == 32
    assert len(re.findall(r'alt="feature maps of convolution [12] for test image [012]"', text)) == 6


def test_the_most_confident_mistakes_come_first(tmp_path: Path) -> None:
    predictions = PredictionCollector()
    predictions.labels = torch.tensor([3, 3, 3, 3])
    predictions.probabilities = torch.full((4, 10), 0.01)
    for row, (digit, probability) in enumerate([(3, 0.9), (5, 0.5), (8, 0.8), (7, 0.6)]):
        predictions.probabilities[row, digit] = probability
    predictions.images = dict(enumerate(torch.zeros(4, 1, 28, 28)))
    write(tmp_path, predictions, network=torch.nn.Linear(1, 1), config={"text": "<script>alert(1)</script>"})
    page = read(tmp_path / "report.html")
    assert [int(n) for n in re.findall(r"no\. (\d)", page.text)] == [2, 3, 1]
    assert re.findall(r"3 → (\d)", page.text) == ["8", "7", "5"]
    assert "All 3 wrong predictions, most confident first" in page.text and "80.0 %" in page.text
    assert "Filters" not in page.text and "Feature maps" not in page.text  # there is no convolution
    assert "<script>alert(1)</script>" in page.text  # as text


def test_41_a_report_that_cannot_be_written_loses_no_results(tmp_path: Path) -> None:
    asked = settings("train", *colour.ASKED, "trainer.fast_dev_run=false", "trainer.max_steps=2")
    with pytest.raises(
        UserError, match=r"the report cannot be written \(IndexError: .*; the results are in .*/metrics"
    ):
        train(tmp_path / "run", **asked)
    found = results(tmp_path / "run")
    assert found["test/images"] == 1000 and len(found["test/confusion_matrix"]) == len(found["test/digits"]) == 12

    again = settings("evaluate", *colour.ASKED[:3], f"ckpt={tmp_path / 'run'}", "trust=[colour]")
    with pytest.raises(UserError, match=r"the report cannot be written \(IndexError: "):
        evaluate(tmp_path / "again", **again)
    assert results(tmp_path / "again")["test/confusion_matrix"] == found["test/confusion_matrix"]


def test_41_what_was_found_is_on_the_terminal_and_what_failed_in_the_log(tmp_path: Path, command: Command) -> None:
    (tmp_path / "run" / "learning_curve.png").mkdir(parents=True)
    done = command(*QUICK, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 1 and re.search(r"^accuracy= 0\.\d+$", done.stdout, re.MULTILINE)
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("train: ")]
    assert sentence.startswith("train: the report cannot be written (IsADirectoryError: ")
    assert sentence.endswith("; the results are in run/metrics.json") and "Traceback" not in done.stderr
    log = (tmp_path / "run" / "train.log").read_text()
    assert "Traceback" in log and 'report.py", line ' in log and "IsADirectoryError" in log
    assert results(tmp_path / "run")["test/images"] > 0


def write(folder: Path, predictions: PredictionCollector, network: torch.nn.Module, config: dict) -> None:
    found = {
        "test/loss": float("nan"),
        "test/acc": 0.25,
        **scores(predictions.probabilities, predictions.labels),
        "ckpt": "outputs/a run/checkpoints/last.ckpt",
        "trained_on": [{"name": "unknown"}],
        "test_seconds": 0.1,
        "peak_memory_bytes": 10**9,
        "device": "cpu, 2 threads",
        "precision": "32-true",
        "data": {"name": "mnist", "train": 1, "val": 0, "test": 4, "sha256": "ab" * 32},
        "versions": runs.versions(),
    }
    write_report(folder / "report.html", found, config, predictions, network)


def test_the_feature_maps_are_those_of_the_network(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    predictions = PredictionCollector()
    predictions.labels, predictions.probabilities, predictions.images = torch.arange(10), torch.eye(10), {}
    predictions.examples = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    network = TutorialCNN().train()
    write(tmp_path, predictions, network, {})
    pictures = re.findall(
        r'src="data:image/png;base64,([^"]+)" alt="feature maps', (tmp_path / "report.html").read_text()
    )
    first, second = (np.asarray(Image.open(io.BytesIO(base64.b64decode(each))).convert("RGB")) for each in pictures[:2])
    assert first.shape == (2 * 27 + 1, 16 * 27 + 1, 3) and second.shape == (4 * 25 + 1, 16 * 25 + 1, 3)
    with torch.no_grad():
        expected = network.conv1(predictions.examples).relu()
    channel = int(expected[0].amax(dim=(1, 2)).argmax())
    place = divmod(int(expected[0, channel].argmax()), 26)
    row, column = divmod(channel, 16)
    top, left = 27 * row + 1, 27 * column + 1
    found = first[top : top + 26, left : left + 26, 1].astype(int)  # green rises in viridis
    assert found[place] == found.max() and network.training
    assert not network.conv1._forward_hooks and network.cpu_kernel and "plain PyTorch" not in caplog.text


def test_feature_maps_are_of_their_image_whatever_else_the_network_is_asked_meanwhile() -> None:
    class Asked(TutorialCNN):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = super().forward(images)
            if self is not network:
                network(torch.zeros_like(images))  # as another thread of a server may
            return logits

    network = Asked().eval()
    images = torch.rand(1, 1, 28, 28)
    maps = feature_maps(network, images)
    with torch.no_grad():
        torch.testing.assert_close(maps["conv1"], network.conv1(images).relu())


def test_a_convolution_that_is_not_called_has_no_feature_maps(tmp_path: Path) -> None:
    class Halfway(TutorialCNN):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.conv1(images).flatten(1)[:, :10]

    predictions = PredictionCollector()
    predictions.labels, predictions.probabilities, predictions.images = torch.arange(10), torch.eye(10), {}
    predictions.examples = torch.zeros(3, 1, 28, 28)
    write(tmp_path, predictions, Halfway(), {})
    assert (tmp_path / "report.html").read_text().count('alt="feature maps of convolution 1') == 3


def test_a_metric_of_one_stage_alone_has_an_empty_cell_in_the_others(finished_run: Path) -> None:
    found = {**results(finished_run), "test/extra": 0.25}
    head, train, test, *_ = training_table(found, finished_run).splitlines()
    assert head.split() == ["loss", "accuracy", "extra"]
    assert len(train.split()) == 5 and test.endswith("0.2500") and len(train) < len(test)


def test_a_network_without_mistakes_has_a_page_too(tmp_path: Path) -> None:
    predictions = PredictionCollector()
    predictions.labels, predictions.probabilities = torch.arange(10), torch.eye(10)
    predictions.images = {}
    write(tmp_path, predictions, TutorialCNN(), {})
    assert "There are none." in read(tmp_path / "report.html").text


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_in_a_browser_the_page_fits_a_laptop_and_a_phone(
    browser: Browser, validated_run: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    shutil.copy(validated_run / "report.html", tmp_path / "report.html")  # the page alone, without the rest of the run
    page = browser(width, 800, scheme)
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    size = ".map(i => [i.naturalWidth, i.clientWidth, i.clientHeight])"
    maps = page.evaluate(f"""[...document.querySelectorAll('[alt^="feature maps"]')]{size}""")
    assert len(maps) == 6 and all(natural > w / 2 and w > 250 for natural, w, _ in maps)
    sizes = page.evaluate(f"""[...document.querySelectorAll('img:not([alt^="feature maps"])')]{size}""")
    assert len(sizes) == 75 and all(natural and abs(w - h) <= 1 and w > 20 for natural, w, h in sizes)
    assert page.evaluate("[...document.querySelectorAll('svg')].every(s => s.clientWidth > 250)")
    # Axis labels have the page's text colour, so they are legible in dark mode.
    color, back = (
        page.evaluate(f"getComputedStyle(document.querySelector('{element}')).{what}")
        for element, what in (("svg text", "fill"), ("body", "backgroundColor"))
    )
    bright, dark = sorted((sum(map(int, re.findall(r"\d+", each)[:3])) for each in (color, back)), reverse=True)
    assert bright - dark > 450
