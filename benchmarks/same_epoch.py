"""Train one epoch here and in Keras from the same weights, on the same batches, with the same features dropped.

python benchmarks/same_epoch.py DATA     in the peers' environment; writes docs/same_epoch.json, which fidelity.py shows

Everything that is random is given to both, so what differs afterwards is the arithmetic: rounding, or a mistake. Plain
PyTorch in place of the compiled operator shows what rounding alone does.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import torch
import torch.nn.functional as F
from contenders import BATCH, for_channels_last, initial_weights, mnist
from torch import Tensor

from mnist_lit.kernels.convolutions import convolutions

DOCS = Path(__file__).parents[1] / "docs"
LOOK_AFTER = (1, 10, 30, 60, 120)  # steps

Weights = list[np.ndarray]
Batches = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]


def batches(images: np.ndarray, labels: np.ndarray) -> Batches:
    """Images [500, 28, 28, 1], labels, and which pooled features [500, 64, 8, 8] dropout keeps."""
    draw = np.random.default_rng(1)
    order = draw.permutation(len(labels))
    for chosen in np.split(order, range(BATCH, len(order), BATCH)):
        yield images[chosen], labels[chosen], draw.random((len(chosen), 64, 8, 8)) < 0.5


def plain(
    images: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, kept: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """``convolutions`` in plain PyTorch."""
    x = F.max_pool2d(F.conv2d(F.conv2d(images, w1, b1).relu(), w2, b2), 3).relu()
    return x * (scale if kept is None else kept * scale)


def here(operator: Callable[..., torch.Tensor], given: Batches) -> Iterator[Weights]:
    weights = [torch.tensor(array, requires_grad=True) for array in initial_weights()]
    w1, b1, w2, b2, w3, b3, w4, b4 = weights
    optimizer = torch.optim.Adadelta(weights, lr=1.0, rho=0.95, eps=1e-7)
    for images, labels, kept in given:
        pixels = torch.from_numpy(images).reshape(-1, 1, 28, 28)
        features = operator(pixels, w1, b1, w2, b2, kept=torch.from_numpy(kept), scale=2.0)
        logits = F.linear(F.linear(features.flatten(1), w3, b3).sigmoid(), w4, b4)
        optimizer.zero_grad()
        F.cross_entropy(logits, torch.from_numpy(labels)).backward()
        optimizer.step()
        yield for_channels_last([weight.detach().numpy().copy() for weight in weights])


def in_keras(given: Batches) -> Iterator[Weights]:
    import keras
    from keras import layers

    inputs, kept = layers.Input((28, 28, 1)), layers.Input((8, 8, 64))
    x = layers.Conv2D(32, 3, activation="relu")(inputs)
    x = layers.Conv2D(64, 3, activation="relu")(x)
    x = layers.MaxPooling2D(3)(x)
    x = layers.Multiply()([x, kept])
    x = layers.Flatten()(x)
    x = layers.Dense(250, activation="sigmoid")(x)
    model = keras.Model([inputs, kept], layers.Dense(10, activation="softmax")(x))
    model.compile(keras.optimizers.Adadelta(1.0), "categorical_crossentropy")
    model.set_weights(for_channels_last(initial_weights()))
    for images, labels, mask in given:
        scaled = 2 * mask.transpose(0, 2, 3, 1).astype(np.float32)
        model.train_on_batch([images, scaled], keras.utils.to_categorical(labels, 10))
        yield model.get_weights()


def norm(one: Weights, other: Weights) -> float:
    return float(np.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(one, other, strict=True))))


def accuracy(weights: Weights, images: np.ndarray, labels: np.ndarray) -> float:
    w1, b1, w2, b2, w3, b3, w4, b4 = (torch.from_numpy(array) for array in weights)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    features = plain(pixels, w1.permute(3, 2, 0, 1), b1, w2.permute(3, 2, 0, 1), b2).permute(0, 2, 3, 1)
    logits = (features.flatten(1) @ w3 + b3).sigmoid() @ w4 + b4
    return float((logits.argmax(1).numpy() == labels).mean())


def main(data: str) -> None:
    train, test, start = mnist(data), mnist(data, "t10k"), for_channels_last(initial_weights())
    trainings = zip(
        here(convolutions, batches(*train)), here(plain, batches(*train)), in_keras(batches(*train)), strict=True
    )
    rows: list[dict[str, Any]] = []
    for step, (ours, ours_plain, keras) in enumerate(trainings, 1):
        if step in LOOK_AFTER:
            moved = norm(keras, start)
            pairs = {
                "ours, keras": (ours, keras),
                "plain, keras": (ours_plain, keras),
                "ours, plain": (ours, ours_plain),
            }
            rows.append({"step": step, **{name: norm(*pair) / moved for name, pair in pairs.items()}})
            print(rows[-1], flush=True)
    found = {"ours": accuracy(ours, *test), "plain": accuracy(ours_plain, *test), "keras": accuracy(keras, *test)}
    (DOCS / "same_epoch.json").write_text(json.dumps({"rows": rows, "test/acc": found}, indent=1) + "\n")
    print(found)


if __name__ == "__main__":
    main(sys.argv[1])
