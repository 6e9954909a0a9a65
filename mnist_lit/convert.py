"""``python -m mnist_lit.convert``: move a model between Keras and this project."""

import contextlib
import os
from pathlib import Path
from typing import Any

from mnist_lit import UserError, compat, require_packages
from mnist_lit.cli.launch import launch, loading
from mnist_lit.storage.atomic import atomic_path, require_free

# How far the two models' probabilities may lie apart on random images before a conversion counts as wrong.
TOLERANCE = 1e-5

# What makes a layer the tutorial's layer; of a layer's configuration, the rest (names, initializers) is free.
COMPARED = {
    "Conv2D": ("filters", "kernel_size", "strides", "padding", "dilation_rate", "groups", "activation", "use_bias"),
    "MaxPooling2D": ("pool_size", "strides", "padding"),
    "Dense": ("units", "activation", "use_bias"),
}


def convert(source: str, target: str, data_format: str = "channels_last", overwrite: bool = False) -> None:
    """Write the model in ``source`` as ``target``; the endings, .keras and .ckpt, say which way.

    Weights move bit for bit; the result is compared with its source on random images before it gets its name.
    The optimizer's state is not moved.

    Args:
        data_format: The layout of the images that a written Keras model takes, [N, 28, 28, 1] or [N, 1, 28, 28].
        overwrite: Replace a target that is there.

    Raises:
        UserError: A file that is missing, in the way or not what it should be, or a model of another architecture.
    """
    source_path, target_path = Path(source), Path(target)
    endings = (source_path.suffix, target_path.suffix)
    if endings not in ((".keras", ".ckpt"), (".ckpt", ".keras")):
        raise UserError(f"source={source} target={target}: one must end in .keras and the other in .ckpt")
    if not source_path.is_file():
        raise UserError(f"source={source}: there is no such file")
    require_free("target", target_path, overwrite)
    os.environ.setdefault("KERAS_BACKEND", "torch")
    require_packages("convert", "keras")
    with loading("Keras"):
        import keras  # noqa: F401
    with atomic_path(target_path) as temporary:
        if endings[0] == ".keras":
            save_checkpoint(from_keras(load_keras(source_path)), temporary)
        else:
            to_keras(load_checkpoint(source_path), data_format).save(temporary)
    print(f"{target}: written, and gives the same probabilities as {source} to {TOLERANCE:g}")


def keras_tutorial(data_format: str = "channels_last", dropout: float = 0.5) -> Any:
    """The tutorial's Keras model, with fresh weights."""
    import keras

    layers, form = keras.layers, {"data_format": data_format}
    images = keras.Input((28, 28, 1) if data_format == "channels_last" else (1, 28, 28))
    x = layers.Conv2D(32, (3, 3), activation="relu", **form)(images)
    x = layers.Conv2D(64, (3, 3), activation="relu", **form)(x)
    x = layers.MaxPooling2D((3, 3), **form)(x)
    x = layers.Dropout(dropout)(x)
    x = layers.Flatten(**form)(x)
    x = layers.Dense(250, activation="sigmoid")(x)
    return keras.Model(images, layers.Dense(10, activation="softmax")(x))


def from_keras(keras_model: Any) -> Any:
    """An ``MNISTClassifier`` with the weights of the tutorial's Keras model, of either data format.

    Raises:
        UserError: The model's architecture is another one; the message names the first difference.
    """
    import numpy as np
    import torch

    from mnist_lit.model import TUTORIAL_MODEL, MNISTClassifier
    from mnist_lit.storage.provenance import UNKNOWN_DATA

    layers = _named_layers(keras_model)
    classifier = MNISTClassifier({**TUTORIAL_MODEL, "dropout": float(layers["dropout"].rate)})
    order = _flatten_order(keras_model)
    with torch.no_grad():
        for name in ("conv1", "conv2", "dense1", "dense2"):
            kernel, bias = (np.asarray(weights) for weights in layers[name].get_weights())
            if name == "dense1":
                kernel = kernel[order.argsort()]
            layer = getattr(classifier.network, name)
            layer.weight.copy_(torch.from_numpy(kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T))
            layer.bias.copy_(torch.from_numpy(bias))
    classifier.trained_on = [UNKNOWN_DATA]
    _require_same_probabilities(keras_model, classifier)
    return classifier


def to_keras(classifier: Any, data_format: str = "channels_last") -> Any:
    """The tutorial's Keras model with the weights of an ``MNISTClassifier`` around a ``TutorialCNN``."""
    network = classifier.network
    keras_model = keras_tutorial(data_format, network.dropout.p)
    layers, order = _named_layers(keras_model), _flatten_order(keras_model)
    for name in ("conv1", "conv2", "dense1", "dense2"):
        kernel = getattr(network, name).weight.detach().cpu().numpy()
        kernel = kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T
        layers[name].set_weights(
            [kernel[order] if name == "dense1" else kernel, getattr(network, name).bias.detach().cpu().numpy()]
        )
    _require_same_probabilities(keras_model, classifier)
    return keras_model


def load_keras(path: Path) -> Any:
    import keras

    try:
        return keras.saving.load_model(path, compile=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: Keras cannot read it ({' '.join(str(error).split())[:300]})") from error


def load_checkpoint(path: Path) -> Any:
    from mnist_lit.inference.trained import load_classifier
    from mnist_lit.network import TutorialCNN

    classifier = load_classifier(path)
    if type(classifier.network) is not TutorialCNN:
        raise UserError(
            f"{path}: holds a {type(classifier.network).__name__}; only the tutorial's network has a Keras twin"
        )
    return classifier


def save_checkpoint(classifier: Any, path: Path) -> None:
    """A checkpoint as a run writes it, without an optimizer's state."""
    import logging

    import lightning as L

    messages = logging.getLogger("lightning.pytorch")
    level = messages.level
    messages.setLevel(logging.WARNING)  # which devices there are is nobody's question here
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    messages.setLevel(level)
    compat.attach_model(trainer, classifier)
    trainer.save_checkpoint(path, weights_only=True)


def _named_layers(keras_model: Any) -> dict[str, Any]:
    """The layers of a Keras model by this project's names, once each is known to be the tutorial's."""
    names = ("conv1", "conv2", "pool", "dropout", "flatten", "dense1", "dense2")
    expected = _layers(keras_tutorial())
    found = _layers(keras_model)
    kinds, found_kinds = ([type(layer).__name__ for layer in layers] for layers in (expected, found))
    if kinds != found_kinds:
        raise UserError(f"another architecture: the layers are {', '.join(found_kinds)} instead of {', '.join(kinds)}")
    for name, want, have in zip(names, expected, found, strict=True):
        want_config, have_config = want.get_config(), have.get_config()
        for key in COMPARED.get(type(want).__name__, ()):
            if want_config[key] != have_config[key]:
                raise UserError(
                    f"another architecture: {type(have).__name__} '{have.name}' (this project's {name}) has "
                    f"{key}={have_config[key]} instead of {want_config[key]}"
                )
    shape, allowed = tuple(keras_model.input_shape[1:]), ((28, 28, 1), (1, 28, 28))
    if shape not in allowed:
        raise UserError(f"another architecture: its images are {shape} instead of {allowed[0]} or {allowed[1]}")
    return dict(zip(names, found, strict=True))


def _layers(keras_model: Any) -> list[Any]:
    return [layer for layer in keras_model.layers if type(layer).__name__ != "InputLayer"]


def _flatten_order(keras_model: Any) -> Any:
    """Which of PyTorch's 4,096 flattened values (C, H, W) stands at each place of Keras' (int [4096])."""
    import numpy as np

    layers = _named_layers(keras_model)
    images, flatten = layers["conv2"].data_format, layers["flatten"].data_format
    places = np.arange(4096).reshape(64, 8, 8)
    if images == "channels_last":
        places = places.transpose(1, 2, 0)
    if flatten == "channels_first":  # Keras' Flatten then takes the first axis for the channels and puts it last
        places = np.moveaxis(places, 0, -1)
    return places.reshape(-1)


def _require_same_probabilities(keras_model: Any, classifier: Any) -> None:
    import numpy as np
    import torch

    images = torch.rand(32, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), contextlib.ExitStack() as stack:
        stack.callback(classifier.train, classifier.training)
        ours = classifier.eval()(images).numpy()
    shape = (32, *keras_model.input_shape[1:])
    theirs = np.asarray(keras_model.predict(images.numpy().reshape(shape), verbose=0))
    if not (difference := float(np.abs(ours - theirs).max())) <= TOLERANCE:
        raise UserError(f"another architecture: the same weights give probabilities that differ by {difference:.2g}")


def main() -> None:
    launch("convert", convert)


if __name__ == "__main__":
    main()
