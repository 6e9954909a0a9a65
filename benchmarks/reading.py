"""How many pictures of each kind are read rightly: docs/pictures.md.

python benchmarks/reading.py CKPT DATA            CKPT: a run trained on the full MNIST; DATA: a folder with MNIST/raw/
python benchmarks/reading.py CKPT DATA FOLDER     also pictures of yours, FOLDER/KIND/NAME_DIGIT.png, on the terminal alone

Each picture is a file, and goes through the command ``predict`` as a user's would.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mnist_lit import load
from mnist_lit.predict import predict
from mnist_lit.storage.mnist_files import read_mnist

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
import pictures

COUNT, SEED = 600, 1_000_003  # of each kind; the tests, by which the preparation was tuned, draw from other seeds
SURE = 0.9

HEAD = """\
# Which pictures are read

{count} pictures of each kind, made by [tests/pictures.py](../tests/pictures.py) from test images of MNIST that the network
reads rightly and is at least 95 % sure of: what is lost here is lost by the picture, not by the handwriting. They are files,
read by the command `predict`, and drawn from another seed than those the preparation was tuned on. Two digits, or none,
are to be refused.

| pictures | right | wrong | of these, over {sure:.0%} sure | refused |
| --- | --- | --- | --- | --- |
"""
TAIL = "\nMade by `python benchmarks/reading.py CKPT DATA`, with a run of the tutorial as CKPT.\n"


def main(ckpt: str, data: str, folder: str = "") -> None:
    images, labels = clear(ckpt, data)
    random = np.random.default_rng(SEED)
    lines = [row(name, measured(ckpt, made(make, images, labels, random))) for name, make in pictures.KINDS.items()]
    pairs = list(zip(images[:COUNT], images[COUNT : 2 * COUNT], strict=True))
    lines.append(row("two digits", measured(ckpt, ((pictures.two(pair, random), None) for pair in pairs))))
    lines += [
        row(f"none: {name}", measured(ckpt, ((make(random), None) for _ in range(COUNT))))
        for name, make in pictures.NO_DIGITS.items()
    ]
    text = HEAD.format(count=COUNT, sure=SURE) + "\n".join(lines) + "\n" + TAIL
    (ROOT / "docs" / "pictures.md").write_text(text)
    print(text)
    for kind in sorted(each for each in Path(folder).iterdir() if each.is_dir()) if folder else ():
        files = sorted(path for path in kind.iterdir() if path.suffix)
        digits = None if kind.name == "two" else [int(path.stem.rpartition("_")[2]) for path in files]
        print(row(f"{kind.name} of {folder}", counts(predict(files, ckpt), digits)))


def clear(ckpt: str, data: str) -> tuple[np.ndarray, np.ndarray]:
    *_, images, labels = read_mnist(Path(data))
    with torch.inference_mode():
        certainty, answers = load(ckpt)(images[:4000].unsqueeze(1) / 255).max(dim=1)
    chosen = (answers == labels[:4000]) & (certainty > 0.95)
    return images[:4000][chosen].numpy(), labels[:4000][chosen].numpy()


def made(make: Any, images: np.ndarray, labels: np.ndarray, random: np.random.Generator) -> Iterator[tuple[Any, int]]:
    for image, label in zip(images[:COUNT], labels[:COUNT], strict=True):
        yield make(image, random), int(label)


def measured(ckpt: str, drawn: Iterator[tuple[np.ndarray, int | None]]) -> tuple[int, int, int, int]:
    with tempfile.TemporaryDirectory() as folder:
        files, labels = [], []
        for number, (picture, label) in enumerate(drawn):
            pixels = picture if picture.dtype == np.uint16 else picture.clip(0, 255).round().astype(np.uint8)
            files.append(Path(folder, f"{number}.png"))
            Image.fromarray(pixels).save(files[-1])
            labels.append(label)
        return counts(predict(files, ckpt), labels)


def counts(rows: list[dict[str, Any]], labels: list[Any] | None) -> tuple[int, int, int, int]:
    """How many are right, wrong, wrong and sure, and refused."""
    answered = [(row, label) for row, label in zip(rows, labels or [None] * len(rows), strict=True) if not row["error"]]
    wrong = [row for row, label in answered if row["digit"] != label]
    sure = sum(row["probability"] > SURE for row in wrong)
    return len(answered) - len(wrong), len(wrong), sure, len(rows) - len(answered)


def row(name: str, figures: tuple[int, int, int, int]) -> str:
    return f"| {name} | {' | '.join(map(str, figures))} |"


if __name__ == "__main__":
    main(*sys.argv[1:])
