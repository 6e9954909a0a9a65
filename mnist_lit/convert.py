"""``python -m mnist_lit.convert``: convert models between Keras and this project."""

import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mnist_lit import UserError, require_packages
from mnist_lit.cli.launch import launch, loading
from mnist_lit.storage.atomic import atomic_path, require_free
from mnist_lit.storage.keras_file import read_description, read_weights, tutorial_layers

TOLERANCE = 1e-5  # largest absolute difference allowed between the two models' probabilities

# What a Keras model's file name ends in; the longest first.
KERAS = (".weights.h5", ".keras", ".hdf5", ".h5")
WITH_WEIGHTS = ("conv1", "conv2", "dense1", "dense2")  # the layers that have some


def convert(
    source: str,
    target: str,
    data_format: str = "channels_last",
    overwrite: bool = False,
    trust: Iterable[str] = (),
) -> None:
    """Convert the model in ``source`` to ``target``: one is a .ckpt file, the other a file of Keras.

    That may be a .keras or .h5 file of Keras 2 or 3, or weights without a description (.weights.h5), which are
    taken to be the tutorial's. Weights are copied bit for bit, without the state of the optimizer. The result is
    written only if both models give the same probabilities for random images, and a file for Keras only if it reads
    back with the same weights. Keras runs on PyTorch, unless it is imported already.

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
    to_checkpoint = target_path.suffix == ".ckpt"
    if not to_checkpoint and (source_path.suffix != ".ckpt" or not target_path.name.endswith(KERAS)):
        raise UserError(f"source={source} target={target}: one must end in .ckpt, the other in {' or '.join(KERAS)}")
    if not os.path.exists(source_path) and not os.path.exists(f"{source}.index"):  # that is a TensorFlow checkpoint
        raise UserError(f"source={source}: no such file")
    require_packages("convert", "keras")
    description = read_description(source_path) if to_checkpoint else {}
    require_free("target", target_path, overwrite)
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = "torch"  # another choice, in the environment or ~/.keras, may not be installed
        os.environ["KERAS_TORCH_DEVICE"] = "cpu"  # a GPU's convolutions round to ten bits
    with loading("Keras"):
        import keras  # noqa: F401
    if to_checkpoint:
        converted = from_keras(load_keras(source_path))
    else:
        converted = to_keras(load_checkpoint(source_path, trust), data_format)
    with atomic_path(target_path) as temporary:
        if to_checkpoint:
            save_checkpoint(converted, temporary)
        else:
            save_keras(converted, temporary, target_path.name)
    print(f"{target}: written; its probabilities match those of {source} to {TOLERANCE:g}")
    if description is None:
        print(
            f"{source} has weights only: taken for the tutorial's network, in which Flatten has the data_format of the "
            "convolutions (a whole model, .keras or .h5, says it)"
        )


def keras_tutorial(
    data_format: str = "channels_last", dropout: float = 0.5, flatten_format: str = "", dtype: str | None = None
) -> Any:
    """The tutorial's Keras model with newly initialized weights.

    Args:
        dtype: The type of its weights and of what it computes; None is Keras' own setting.
    """
    import keras

    layers, layout = keras.layers, {"data_format": data_format, "dtype": dtype}
    images = keras.Input((28, 28, 1) if data_format == "channels_last" else (1, 28, 28), dtype=dtype)
    x = layers.Conv2D(32, (3, 3), activation="relu", name="conv1", **layout)(images)
    x = layers.Conv2D(64, (3, 3), activation="relu", name="conv2", **layout)(x)
    x = layers.MaxPooling2D((3, 3), name="pool", **layout)(x)
    x = layers.Dropout(dropout, name="dropout", dtype=dtype)(x)
    x = layers.Flatten(flatten_format or data_format, name="flatten", dtype=dtype)(x)
    x = layers.Dense(250, activation="sigmoid", name="dense1", dtype=dtype)(x)
    return keras.Model(images, layers.Dense(10, activation="softmax", name="dense2", dtype=dtype)(x))


def from_keras(keras_model: Any) -> Any:
    """An ``MNISTClassifier`` with the weights of the tutorial's Keras model, in either data format.

    Raises:
        UserError: The model has another architecture; the message names the first difference.
    """
    import torch

    from mnist_lit.model import TUTORIAL_MODEL, MNISTClassifier
    from mnist_lit.storage.provenance import UNKNOWN_DATA

    layers = _named_layers(keras_model)
    if any("16" in layer.compute_dtype for layer in layers.values()):  # mixed precision: too coarse to compare
        keras_model = _in_single_precision(layers)
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
    keras_model = keras_tutorial(data_format, classifier.network.dropout.p, dtype="float32")
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
    """The tutorial's Keras model, in single precision, with the weights of a Keras file, which Keras does not read.

    Weights without a description are taken for those of ``keras_tutorial()``, in either data format: where Flatten knows
    it, both flatten in the same order.

    Raises:
        UserError: The file cannot be read, or its architecture is not the tutorial's.
    """
    if (description := read_description(path)) is None:
        keras_model = keras_tutorial(dtype="float32")
    else:
        described = tutorial_layers(description, _description(keras_tutorial()))
        keras_model = keras_tutorial(
            described["conv1"]["data_format"],
            described["dropout"]["rate"],
            described["flatten"]["data_format"],
            "float32",
        )
    layers = _named_layers(keras_model)
    shapes = {name: [each.shape for each in layers[name].weights] for name in WITH_WEIGHTS}
    for name, weights in read_weights(path, shapes).items():
        layers[name].set_weights(weights)
    return keras_model


def save_keras(keras_model: Any, path: Path, name: str) -> None:
    """Save a Keras model in the format that the end of ``name`` stands for, and read it back.

    Raises:
        UserError: What is read has other weights.
    """
    import numpy as np

    ending = next(each for each in KERAS if name.endswith(each))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / f"model{ending}"
        logging.getLogger("absl").setLevel(logging.ERROR)  # by which Keras advises against .h5
        (keras_model.save_weights if ending == ".weights.h5" else keras_model.save)(written)
        if not all(map(np.array_equal, load_keras(written).get_weights(), keras_model.get_weights())):
            raise UserError(f"{name}: Keras has written other weights than those of the model")
        shutil.copyfile(written, path)


def load_checkpoint(path: Path, trust: Iterable[str] = ()) -> Any:
    """The classifier of a checkpoint, its probabilities those that ``predict`` gives.

    The temperature that was measured on validation images, which Keras knows nothing of, becomes a part of the last layer.

    Raises:
        UserError: The checkpoint cannot be loaded, or its network is not a ``TutorialCNN``.
    """
    import torch

    from mnist_lit.model import MNISTClassifier
    from mnist_lit.network import TutorialCNN

    classifier = MNISTClassifier.load_from_checkpoint(path, trust=trust)
    if type(classifier.network) is not TutorialCNN:
        raise UserError(f"{path}: holds a {type(classifier.network).__name__}; only a TutorialCNN can be converted")
    with torch.no_grad():
        for parameter in classifier.network.dense2.parameters():
            parameter.div_(classifier.temperature or 1.0)
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


def _in_single_precision(layers: dict[str, Any]) -> Any:
    """A copy of the tutorial's Keras model with ``layers`` that computes in float32."""
    formats = layers["conv1"].data_format, layers["dropout"].rate, layers["flatten"].data_format
    copy = keras_tutorial(*formats, dtype="float32")
    for name, layer in _named_layers(copy).items():
        layer.set_weights(layers[name].get_weights())
    return copy


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
    import keras
    import numpy as np
    import torch

    images = torch.rand(32, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    was_training = classifier.training
    with torch.no_grad():
        ours = classifier.eval()(images).numpy()
    classifier.train(was_training)
    # Not by predict, which rounds the images to Keras' own floatx.
    theirs = keras_model(images.numpy().reshape(32, *keras_model.input_shape[1:]), training=False)
    theirs = keras.ops.convert_to_numpy(theirs)
    if not (difference := float(np.abs(ours - theirs).max())) <= TOLERANCE:
        raise UserError(f"another architecture: with the same weights, its probabilities differ by {difference:.2g}")


def main() -> None:
    launch("convert", convert)


if __name__ == "__main__":
    main()
