"""``python -m mnist_lit.convert``: convert models between Keras and this project."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mnist_lit import UserError, require_packages
from mnist_lit.cli.launch import launch, loading
from mnist_lit.storage.atomic import atomic_path, require_free
from mnist_lit.storage.keras_file import read_description, read_weights, tutorial_layers

TOLERANCE = 1e-5  # largest absolute difference allowed between the two models' probabilities

# The layers with weights, and what .keras files call them.
WITH_WEIGHTS = {"conv1": "conv2d", "conv2": "conv2d_1", "dense1": "dense", "dense2": "dense_1"}


def convert(
    source: str,
    target: str,
    data_format: str = "channels_last",
    overwrite: bool = False,
    trust: Iterable[str] = (),
) -> None:
    """Convert the model in ``source`` to ``target``: one is a .keras file, the other a .ckpt file.

    Weights are copied bit for bit, without the state of the optimizer. The result is written only if both models give
    the same probabilities for random images.

    Args:
        data_format: The layout of a written Keras model's images: [N, 28, 28, 1] (``channels_last``) or [N, 1, 28, 28]
            (``channels_first``).
        overwrite: Replace an existing target.
        trust: Packages whose networks a checkpoint may name, besides this project's.

    Raises:
        UserError: The source is missing or cannot be read, the target cannot be written, or the model's architecture
            is not the tutorial's.
    """
    source_path, target_path = Path(source), Path(target)
    if {source_path.suffix, target_path.suffix} != {".keras", ".ckpt"}:
        older = "; Keras itself can save an .h5 model as .keras" if source_path.suffix in (".h5", ".hdf5") else ""
        raise UserError(f"source={source} target={target}: one must end in .keras and the other in .ckpt{older}")
    if not source_path.is_file():
        raise UserError(f"source={source}: no such file")
    require_free("target", target_path, overwrite)
    os.environ.setdefault("KERAS_BACKEND", "torch")
    require_packages("convert", "keras")
    with loading("Keras"):
        import keras  # noqa: F401
    with atomic_path(target_path) as temporary:
        if source_path.suffix == ".keras":
            save_checkpoint(from_keras(load_keras(source_path)), temporary)
        else:
            to_keras(load_checkpoint(source_path, trust), data_format).save(temporary)
    print(f"{target}: written; its probabilities match those of {source} to {TOLERANCE:g}")


def keras_tutorial(data_format: str = "channels_last", dropout: float = 0.5, flatten_format: str = "") -> Any:
    """The tutorial's Keras model with newly initialized weights."""
    import keras

    layers, layout = keras.layers, {"data_format": data_format}
    images = keras.Input((28, 28, 1) if data_format == "channels_last" else (1, 28, 28))
    x = layers.Conv2D(32, (3, 3), activation="relu", name="conv1", **layout)(images)
    x = layers.Conv2D(64, (3, 3), activation="relu", name="conv2", **layout)(x)
    x = layers.MaxPooling2D((3, 3), name="pool", **layout)(x)
    x = layers.Dropout(dropout, name="dropout")(x)
    x = layers.Flatten(flatten_format or data_format, name="flatten")(x)
    x = layers.Dense(250, activation="sigmoid", name="dense1")(x)
    return keras.Model(images, layers.Dense(10, activation="softmax", name="dense2")(x))


def from_keras(keras_model: Any) -> Any:
    """An ``MNISTClassifier`` with the weights of the tutorial's Keras model, in either data format.

    Raises:
        UserError: The model has another architecture; the message names the first difference.
    """
    import torch

    from mnist_lit.model import TUTORIAL_MODEL, MNISTClassifier
    from mnist_lit.storage.provenance import UNKNOWN_DATA

    layers = _named_layers(keras_model)
    classifier = MNISTClassifier({**TUTORIAL_MODEL, "dropout": float(layers["dropout"].rate)})
    for name in WITH_WEIGHTS:
        kernel, bias = map(torch.tensor, layers[name].get_weights())
        if name == "dense1":
            kernel = kernel[_flatten_order(layers).argsort()]
        state = {"weight": kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T, "bias": bias}
        getattr(classifier.network, name).load_state_dict(state)
    classifier.trained_on = [UNKNOWN_DATA]
    _require_same_probabilities(keras_model, classifier)
    return classifier


def to_keras(classifier: Any, data_format: str = "channels_last") -> Any:
    """The tutorial's Keras model with the weights of an ``MNISTClassifier`` whose network is a ``TutorialCNN``."""
    keras_model = keras_tutorial(data_format, classifier.network.dropout.p)
    layers = _named_layers(keras_model)
    for name in WITH_WEIGHTS:
        kernel, bias = (getattr(classifier.network, name).state_dict()[key].cpu() for key in ("weight", "bias"))
        kernel = kernel.permute(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T
        if name == "dense1":
            kernel = kernel[_flatten_order(layers)]
        layers[name].set_weights([kernel.numpy(), bias.numpy()])
    _require_same_probabilities(keras_model, classifier)
    return keras_model


def load_keras(path: Path) -> Any:
    """The tutorial's Keras model with the weights of a .keras file; Keras itself does not read the file.

    Raises:
        UserError: The file cannot be read, or its architecture is not the tutorial's.
    """
    described = tutorial_layers(read_description(path), _description(keras_tutorial()))
    keras_model = keras_tutorial(
        described["conv1"]["data_format"], described["dropout"]["rate"], described["flatten"]["data_format"]
    )
    layers = _named_layers(keras_model)
    shapes = {file_name: [each.shape for each in layers[name].weights] for name, file_name in WITH_WEIGHTS.items()}
    weights = read_weights(path, shapes)
    for name, file_name in WITH_WEIGHTS.items():
        layers[name].set_weights(weights[file_name])
    return keras_model


def load_checkpoint(path: Path, trust: Iterable[str] = ()) -> Any:
    from mnist_lit.inference.trained import load_classifier
    from mnist_lit.network import TutorialCNN

    classifier = load_classifier(path, trust)
    if type(classifier.network) is not TutorialCNN:
        raise UserError(f"{path}: holds a {type(classifier.network).__name__}; only a TutorialCNN can be converted")
    return classifier


def save_checkpoint(classifier: Any, path: Path) -> None:
    """Save a checkpoint as Lightning's Trainer does, without the state of a training run."""
    import lightning as L
    import torch

    checkpoint = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": L.__version__,
        "state_dict": classifier.state_dict(),
        "hyper_parameters": dict(classifier.hparams),
    }
    classifier.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)


def _description(keras_model: Any) -> Any:
    return json.loads(keras_model.to_json())


def _named_layers(keras_model: Any) -> dict[str, Any]:
    """The layers of a Keras model by their names in this project; a UserError if they are not those of the tutorial."""
    names = tutorial_layers(_description(keras_model), _description(keras_tutorial()))
    return dict(zip(names, (each for each in keras_model.layers if type(each).__name__ != "InputLayer"), strict=True))


def _flatten_order(layers: dict[str, Any]) -> Any:
    """For each of the 4,096 values that Keras flattens, its index in PyTorch's order (C, H, W): int64 [4096]."""
    import torch

    indices = torch.arange(4096).reshape(64, 8, 8)
    if layers["conv2"].data_format == "channels_last":
        indices = indices.permute(1, 2, 0)
    if layers["flatten"].data_format == "channels_first":  # then Keras moves the first axis to the end
        indices = indices.movedim(0, -1)
    return indices.reshape(-1)


def _require_same_probabilities(keras_model: Any, classifier: Any) -> None:
    import numpy as np
    import torch

    images = torch.rand(32, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    was_training = classifier.training
    with torch.no_grad():
        ours = classifier.eval()(images).numpy()
    classifier.train(was_training)
    theirs = np.asarray(keras_model.predict(images.numpy().reshape(32, *keras_model.input_shape[1:]), verbose=0))
    if not (difference := float(np.abs(ours - theirs).max())) <= TOLERANCE:
        raise UserError(f"another architecture: with the same weights, its probabilities differ by {difference:.2g}")


def main() -> None:
    launch("convert", convert)


if __name__ == "__main__":
    main()
