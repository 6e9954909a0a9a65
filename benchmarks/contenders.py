"""The tutorial's training by this project and by its peers, one contender a process; prints JSON.

python benchmarks/contenders.py NAME DATA losses           ten losses from given weights, without dropout
python benchmarks/contenders.py NAME DATA EPOCHS BATCHES   seconds of each epoch, and peak memory

Every contender has 500 images a step, Adadelta(1.0, 0.95, 1e-7), dropout 0.5 and single precision, and is written as
its own documentation writes it. Two threads at most are this machine's business: each takes what it takes by itself.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

BATCH = 500
FIRST = [slice(number * BATCH, (number + 1) * BATCH) for number in range(10)]  # the first ten batches


def initial_weights() -> list[np.ndarray]:
    """Glorot-uniform weights in PyTorch's layout, for the agreement of the losses: the same for every contender."""
    draw = np.random.default_rng(0)
    weights: list[np.ndarray] = []
    for shape, fan_in, fan_out in (
        ((32, 1, 3, 3), 9, 288),
        ((64, 32, 3, 3), 288, 576),
        ((250, 4096), 4096, 250),
        ((10, 250), 250, 10),
    ):
        limit = (6 / (fan_in + fan_out)) ** 0.5
        weights += [draw.uniform(-limit, limit, shape).astype(np.float32), np.zeros(shape[0], np.float32)]
    return weights


def for_channels_last(weights: list[np.ndarray]) -> list[np.ndarray]:
    """The same for networks that flatten H,W,C: kernels [H, W, in, out] and [in, out]."""
    w1, b1, w2, b2, w3, b3, w4, b4 = weights
    w3 = w3.reshape(250, 64, 8, 8).transpose(2, 3, 1, 0).reshape(4096, 250)
    return [w1.transpose(2, 3, 1, 0), b1, w2.transpose(2, 3, 1, 0), b2, w3, b3, w4.T, b4]


def pixels(data: str, part: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 28, 28] and int64 [N] of the ``train`` or ``t10k`` files; not by ``read_mnist``, which would bring torch
    into every peer's memory."""
    raw = Path(data) / "MNIST" / "raw"
    images = np.frombuffer((raw / f"{part}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16).reshape(-1, 28, 28)
    labels = np.frombuffer((raw / f"{part}-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)
    return images, labels.astype(np.int64)


def mnist(data: str, part: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """float32 [N, 28, 28, 1] from 0 to 1, and int64 [N]."""
    images, labels = pixels(data, part)
    return images[..., None].astype(np.float32) / 255, labels


def shuffled(count: int, batches: int) -> Iterator[np.ndarray]:
    order = np.random.default_rng().permutation(count)
    return iter(np.split(order, range(BATCH, count, BATCH))[:batches])


def timed(epochs: int, epoch: Callable[[], Any]) -> list[float]:
    seconds = []
    for _ in range(epochs):
        started = time.perf_counter()
        epoch()
        seconds.append(time.perf_counter() - started)
    return seconds


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def literal_network(dropout: float = 0.5) -> Any:
    """As one writes it down from the tutorial."""
    from torch import nn

    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(3), nn.Dropout(dropout)),
        *(nn.Flatten(), nn.Linear(4096, 250), nn.Sigmoid(), nn.Linear(250, 10)),
    )


def torch_loop(network_of: Callable[[float], Any], data: str, epochs: int, batches: int) -> Any:
    """A hand-written loop over tensors in memory; with no epochs, the losses of the first ten steps."""
    import torch
    from torch import nn

    images, labels = (torch.tensor(array) for array in pixels(data))
    network = network_of(0.5 if epochs else 0.0).train()
    optimizer = torch.optim.Adadelta(network.parameters(), lr=1.0, rho=0.95, eps=1e-7)
    if not epochs:
        with torch.no_grad():
            for parameter, weights in zip(network.parameters(), initial_weights(), strict=True):
                parameter.copy_(torch.tensor(weights))

    def step(batch: Any) -> Any:
        loss = nn.functional.cross_entropy(network(images[batch].unsqueeze(1).float().div(255)), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    if not epochs:
        return [step(batch).item() for batch in FIRST]

    def epoch() -> None:
        for batch in shuffled(len(labels), batches):
            step(torch.from_numpy(batch))

    return timed(epochs, epoch)


def own_step(cpu_kernel: bool, data: str, epochs: int, batches: int) -> Any:
    """Without the kernel it is what runs where there is no compiler."""
    from mnist_lit.kernels.memory import keep_freed_memory
    from mnist_lit.network import TutorialCNN

    keep_freed_memory()
    return torch_loop(partial(TutorialCNN, cpu_kernel=cpu_kernel), data, epochs, batches)


def lightning(workers: int, data: str, epochs: int, batches: int, accelerator: str = "cpu") -> Any:
    """As tutorials write it: torchvision's data set with ToTensor, a loss logged at every step, the default bar."""
    import lightning as L
    import torch
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import MNIST

    class Port(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = literal_network()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            images, labels = batch
            loss = nn.functional.cross_entropy(self.network(images), labels)
            self.log("train_loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adadelta(self.parameters(), lr=1.0, rho=0.95, eps=1e-7)

    class Clock(L.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            self.started = time.perf_counter()

        def on_train_epoch_end(self, *_: Any) -> None:
            clocked.append(time.perf_counter() - self.started)

    clocked: list[float] = []
    dataset = MNIST(data, train=True, transform=transforms.ToTensor())
    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    trainer = L.Trainer(
        max_epochs=epochs,
        limit_train_batches=batches,
        accelerator=accelerator,
        logger=False,
        enable_checkpointing=False,
        callbacks=[Clock()],
    )
    trainer.fit(Port(), loader)
    return clocked


# --- Keras -----------------------------------------------------------------------------------------------------------


def keras(backend: str, data: str, epochs: int, batches: int) -> Any:
    os.environ["KERAS_BACKEND"] = backend
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import keras as k
    from keras import layers

    model = k.Sequential(
        [
            k.Input((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(3),
            layers.Dropout(0.5 if epochs else 0.0),
            layers.Flatten(),
            layers.Dense(250, activation="sigmoid"),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(k.optimizers.Adadelta(1.0, rho=0.95, epsilon=1e-7), "categorical_crossentropy")
    images, labels = mnist(data)
    one_hot = k.utils.to_categorical(labels, 10)
    if not epochs:
        model.set_weights(for_channels_last(initial_weights()))
        return [float(model.train_on_batch(images[batch], one_hot[batch])) for batch in FIRST]
    some = batches * BATCH
    return timed(epochs, lambda: model.fit(images[:some], one_hot[:some], BATCH, epochs=1, verbose=0))


# --- JAX -------------------------------------------------------------------------------------------------------------


def flax_optax(data: str, epochs: int, batches: int) -> Any:
    import jax
    import optax
    from flax import linen as nn

    class Network(nn.Module):
        dropout: float

        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.relu(nn.Conv(32, (3, 3), padding="VALID")(x))
            x = nn.relu(nn.Conv(64, (3, 3), padding="VALID")(x))
            x = nn.max_pool(x, (3, 3), strides=(3, 3))
            x = nn.Dropout(self.dropout, deterministic=False)(x)
            x = nn.sigmoid(nn.Dense(250)(x.reshape(len(x), -1)))
            return nn.Dense(10)(x)

    network = Network(0.5 if epochs else 0.0)
    images, labels = mnist(data)
    keys = iter(jax.random.split(jax.random.key(0), 100_000))
    parameters = network.init({"params": next(keys), "dropout": next(keys)}, images[:1])
    if not epochs:
        names = ("Conv_0", "Conv_1", "Dense_0", "Dense_1")
        values = for_channels_last(initial_weights())
        pairs = zip(values[::2], values[1::2], strict=True)
        parameters = {"params": {n: {"kernel": w, "bias": b} for n, (w, b) in zip(names, pairs, strict=True)}}
    optimizer = optax.adadelta(1.0, rho=0.95, eps=1e-7)
    state = optimizer.init(parameters)

    def loss_of(parameters: Any, x: Any, y: Any, key: Any) -> Any:
        logits = network.apply(parameters, x, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(parameters: Any, state: Any, x: Any, y: Any, key: Any) -> Any:
        loss, gradient = jax.value_and_grad(loss_of)(parameters, x, y, key)
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss

    def run(parts: Iterable[Any]) -> list[float]:
        nonlocal parameters, state
        losses = []
        for part in parts:
            parameters, state, loss = step(parameters, state, images[part], labels[part], next(keys))
            losses.append(loss)
        return [float(loss) for loss in losses]

    if not epochs:
        return run(FIRST)
    return timed(epochs, lambda: run(shuffled(len(labels), batches)))


def tinygrad(data: str, epochs: int, batches: int) -> Any:
    from tinygrad import Tensor, TinyJit, nn

    class Network:
        def __init__(self) -> None:
            self.layers = [nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3), nn.Linear(4096, 250), nn.Linear(250, 10)]

        def __call__(self, x: Tensor) -> Tensor:
            x = self.layers[1](self.layers[0](x).relu()).relu().max_pool2d((3, 3))
            return self.layers[3](self.layers[2](x.dropout(0.5 if epochs else 0.0).flatten(1)).sigmoid())

    class Adadelta(nn.optim.Optimizer):
        """tinygrad has none."""

        def __init__(self, parameters: list[Tensor]) -> None:
            super().__init__(parameters, 1.0)
            self.squares, self.steps = self._new_optim_param(), self._new_optim_param()

        def _step(self, parameters: list[Tensor], gradients: list[Tensor]) -> Any:
            updates = []
            for gradient, square, step in zip(gradients, self.squares, self.steps, strict=True):
                square.assign(0.95 * square + 0.05 * gradient * gradient)
                update = (step + 1e-7).sqrt() / (square + 1e-7).sqrt() * gradient
                step.assign(0.95 * step + 0.05 * update * update)
                updates.append(update)
            return updates, self.squares + self.steps

    network = Network()
    parameters = nn.state.get_parameters(network)
    if not epochs:
        for parameter, weights in zip(parameters, initial_weights(), strict=True):
            parameter.assign(Tensor(weights)).realize()
    optimizer = Adadelta(parameters)
    images, labels = mnist(data)

    @TinyJit
    @Tensor.train()
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = network(x).sparse_categorical_crossentropy(y)
        optimizer.zero_grad()
        loss.backward()
        return loss.realize(*optimizer.schedule_step())

    def run(parts: Iterable[Any]) -> list[float]:
        return [step(Tensor(images[p].reshape(-1, 1, 28, 28)), Tensor(labels[p])).item() for p in parts]

    if not epochs:
        return run(FIRST)
    return timed(epochs, lambda: run(shuffled(len(labels), batches)))


# --- this project, as shipped ----------------------------------------------------------------------------------------


def mnist_lit(data: str, epochs: int, batches: int) -> Any:
    import tempfile

    from mnist_lit.cli.config import settings
    from mnist_lit.train import train

    with tempfile.TemporaryDirectory() as folder:
        limits = [f"trainer.max_epochs={epochs}", f"trainer.limit_train_batches={batches}", "trainer.accelerator=cpu"]
        run = settings("train", f"data.dir={data}", "data.source=mnist", "trainer.limit_test_batches=1", *limits)
        return train(Path(folder) / "run", **run)["epoch_seconds"]


CONTENDERS: dict[str, Callable[[str, int, int], Any]] = {
    "mnist_lit, as shipped": mnist_lit,
    "mnist_lit's step without Lightning": partial(own_step, True),
    "the same without the compiled operator": partial(own_step, False),
    "plain PyTorch loop": partial(torch_loop, literal_network),
    "Lightning as tutorials write it": partial(lightning, 0),
    "Lightning as tutorials write it, 1 worker": partial(lightning, 1),
    "Lightning as tutorials write it, 2 workers": partial(lightning, 2),
    "Keras 3 on TensorFlow": partial(keras, "tensorflow"),
    "Keras 3 on JAX": partial(keras, "jax"),
    "Keras 3 on PyTorch": partial(keras, "torch"),
    "Flax and Optax": flax_optax,
    "tinygrad": tinygrad,
}
# Those that train another's network and optimizer, step for step: their losses need no check of their own.
SAME_STEP = ("mnist_lit, as shipped", "Lightning as tutorials")


def main(name: str, data: str, epochs: str, batches: str = "0") -> None:
    from mnist_lit.kernels.memory import peak_memory_bytes

    if epochs == "losses":
        print(json.dumps(CONTENDERS[name](data, 0, 0)))
        return
    seconds = CONTENDERS[name](data, int(epochs), int(batches))
    print(json.dumps({"epoch_seconds": seconds, "peak_memory_bytes": peak_memory_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
