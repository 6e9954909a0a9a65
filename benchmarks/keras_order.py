"""Does Keras shuffle anew in each epoch? Prints the sums of the first three batches of four epochs.

KERAS_BACKEND=tensorflow python benchmarks/keras_order.py [SEED]     in the peers' environment; without a seed, none is set
"""

import sys
from typing import Any

import keras
import numpy as np


class Sums(keras.callbacks.Callback):
    """The loss is the mean of the images: it tells the batches apart."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seen.append(logs["loss"])  # the mean over the batches so far

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        print(f"epoch {epoch + 1}:", *(f"{loss:.3f}" for loss in self.seen[:3]))


def main(seed: str = "") -> None:
    if seed:
        keras.utils.set_random_seed(int(seed))
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
    model.compile(keras.optimizers.SGD(0.0), loss=lambda _, predicted: predicted)
    images = np.arange(1000, dtype=np.float32)[:, None]
    model.fit(images, images, batch_size=100, epochs=4, verbose=0, callbacks=[Sums()])


if __name__ == "__main__":
    main(*sys.argv[1:])
