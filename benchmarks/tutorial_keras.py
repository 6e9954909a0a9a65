"""The tutorial itself, in Keras 3, its learning rate set to 1.0; prints one JSON object.

python benchmarks/tutorial_keras.py DATA SEED [EPOCHS]     in the peers' environment, which `make bench` makes

On TensorFlow, as the tutorial; with `KERAS_BACKEND=jax` in the environment on JAX, and on a GPU if JAX has one.
"""

import importlib
import json
import os
import random
import sys
import time

BACKEND = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
from contenders import mnist
from keras import layers


def main(data: str, seed: int, epochs: int = 12) -> None:
    # Not keras.utils.set_random_seed(seed): it seeds TensorFlow, too, and Keras then shuffles in the same order in every
    # epoch, which the tutorial, without a seed, does not. Weights and dropout get their seeds from Python's generator.
    random.seed(seed)
    np.random.seed(seed)
    x_train, y_train = mnist(data, "train")
    x_test, y_test = mnist(data, "t10k")

    inputs = layers.Input(shape=(28, 28, 1))
    x = layers.Conv2D(32, kernel_size=(3, 3), activation="relu")(inputs)
    x = layers.Conv2D(64, (3, 3), activation="relu")(x)
    x = layers.MaxPooling2D(pool_size=(3, 3))(x)
    x = layers.Dropout(0.5)(x)
    x = layers.Flatten()(x)
    x = layers.Dense(250, activation="sigmoid")(x)
    outputs = layers.Dense(10, activation="softmax")(x)
    model = keras.Model(inputs, outputs)
    model.compile(
        optimizer=keras.optimizers.Adadelta(learning_rate=1.0),
        loss="categorical_crossentropy",
        metrics=["accuracy"],
    )
    started = time.perf_counter()
    history = model.fit(x_train, keras.utils.to_categorical(y_train), epochs=epochs, batch_size=500, verbose=0).history
    seconds = time.perf_counter() - started
    loss, accuracy = model.evaluate(x_test, keras.utils.to_categorical(y_test), verbose=0)
    result = {
        "test/acc": accuracy,
        "test/loss": loss,
        "train/acc": history["accuracy"],
        "train/loss": history["loss"],
        "seconds": seconds,
        "device": device(),
        "versions": {"keras": keras.__version__, BACKEND: importlib.import_module(BACKEND).__version__},
    }
    print(json.dumps(result))


def device() -> str:
    if BACKEND != "jax":
        return "cpu"
    import jax

    return str(jax.devices()[0].device_kind)


if __name__ == "__main__":
    main(sys.argv[1], *(int(argument) for argument in sys.argv[2:]))
