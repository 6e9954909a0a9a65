"""Train the network that tells digits from what is none, and write mnist_lit/inference/detector.npz and docs/detector.md.

python benchmarks/detector.py DATA      a folder with MNIST/raw/; a quarter of an hour on two cores
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from kornia.augmentation import RandomAffine
from no_digits import KINDS, Random, prepared, printed_digit
from torch import Tensor
from tqdm import tqdm

from mnist_lit.data import MNISTDataModule
from mnist_lit.inference.detector import WEIGHTS, DigitDetector
from mnist_lit.inference.digit import to_mnist
from mnist_lit.inference.ink import ImageError

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
import pictures

WITHOUT_DIGIT, PRINTED, PHOTOGRAPHED = 28_000, 3_500, 8_000  # pictures for training; beside them MNIST's own digits
TESTED = 1_000  # pictures of each kind
FALSE_ALARMS = 0.002  # of MNIST's validation digits
EPOCHS, BATCH_SIZE, RATE = 12, 256, 4e-3

HEAD = """\
# Is there a digit at all?

`predict` and `serve` ask a small network of its own ([detector.py](../mnist_lit/inference/detector.py), {parameters:,}
parameters) whether a picture shows a digit, before they say which. It was trained on MNIST's training digits, on these
written on paper of many kinds and on printed ones, and on letters, words, shapes, textures and noise, all made by
[no_digits.py](../benchmarks/no_digits.py) from the fonts that come with Matplotlib. Its threshold lets
{passes:.1%} of 5,000 of MNIST's training digits pass that it was not trained on.

What it says of {count:,} new pictures of each kind. Those that the preparation refuses by itself, as blank or as two
shapes, are not among them.

| pictures | refused |
| --- | --- |
"""
TAIL = "\nMade by `python benchmarks/detector.py DATA`.\n"


def save(detector: DigitDetector) -> None:
    """Half precision suffices, and takes half the space."""
    weights = {name: each.numpy().astype(np.float16) for name, each in detector.state_dict().items()}
    np.savez_compressed(WEIGHTS, threshold=np.float32(detector.threshold), **weights)


def main(data: str) -> None:
    torch.manual_seed(0)
    mnist = MNISTDataModule(data, source="mnist", val_size=5000)
    mnist.prepare_data()
    mnist.setup()
    train, validation, test = (
        torch.cat([images for images, _ in loader]) for loader in
        (mnist.train_dataloader(), mnist.val_dataloader(), mnist.test_dataloader())
    )  # fmt: skip
    without = torch.cat([made(kind, int(share * WITHOUT_DIGIT)) for kind, (share, _) in KINDS.items()])
    digits = torch.cat([train, made("printed digit", PRINTED), photographed(train[:PHOTOGRAPHED])])
    detector = trained(digits, without)
    with torch.inference_mode():
        detector.threshold = float(detector(validation).quantile(FALSE_ALARMS))
        save(detector)
        groups = {"MNIST's test digits": test, **{
            kind: made(kind, TESTED, seed=1) for kind in ("printed digit", *KINDS)}}  # fmt: skip
        lines = [f"| {name} | {1 - detector.shows_digit(each).float().mean():.1%} |" for name, each in groups.items()]
    parameters = sum(each.numel() for each in detector.parameters())
    text = HEAD.format(parameters=parameters, passes=1 - FALSE_ALARMS, count=TESTED) + "\n".join(lines) + "\n" + TAIL
    (ROOT / "docs/detector.md").write_text(text)
    print(text)


def made(kind: str, count: int, seed: int = 0) -> Tensor:
    """So many pictures of a kind, in MNIST's form: float32 [count, 1, 28, 28] from 0 to 1."""
    parts = 20
    with ProcessPoolExecutor() as pool:
        images = pool.map(partial(_part, kind, count // parts), [[seed, part] for part in range(parts)])
        return _inputs(np.concatenate([*tqdm(images, kind, parts)]))


def _part(kind: str, count: int, seed: list[int]) -> np.ndarray:
    make = printed_digit if kind == "printed digit" else KINDS[kind][1]
    return np.stack([*prepared(make, np.random.default_rng(seed), count)])


def photographed(digits: Tensor) -> Tensor:
    """The digits, each in a picture of some kind that people have, and back in MNIST's form."""
    random, images = np.random.default_rng(0), []
    makers = [*pictures.KINDS.values()]
    for number, digit in enumerate(tqdm((digits[:, 0] * 255).byte().numpy(), "photographed")):
        try:
            images.append(to_mnist(_grey(makers[number % len(makers)], digit, random)))
        except ImageError:
            continue
    return _inputs(np.stack(images))


def _grey(maker: object, digit: np.ndarray, random: Random) -> np.ndarray:
    picture = np.asarray(maker(digit, random), np.float32)  # type: ignore[operator]
    return (picture * (255 / max(255.0, float(picture.max())))).clip(0, 255)  # some have 16 bits


def _inputs(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).unsqueeze(1) / 255


def trained(digits: Tensor, without: Tensor) -> DigitDetector:
    """A detector, for which both weigh the same."""
    images = torch.cat([digits, without])
    labels = torch.cat([torch.ones(len(digits)), torch.zeros(len(without))])
    weights = torch.where(labels > 0, 1.0, len(digits) / len(without))
    detector = DigitDetector()
    optimizer = torch.optim.AdamW(detector.parameters(), weight_decay=1e-3)
    steps = EPOCHS * (len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    change = RandomAffine(6.0, translate=(0.03, 0.03), scale=(0.93, 1.07), shear=6.0, p=1.0)
    for _ in tqdm(range(EPOCHS), "epochs"):
        for batch in torch.randperm(len(images)).split(BATCH_SIZE)[: steps // EPOCHS]:
            scores = detector(change(images[batch]))
            loss = F.binary_cross_entropy_with_logits(scores, labels[batch], weights[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return detector.eval().requires_grad_(False)


if __name__ == "__main__":
    main(sys.argv[1])
