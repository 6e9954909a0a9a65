"""Safe reading of .keras files: nothing in them is built or executed, and only the tutorial's network is accepted."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mnist_lit import UserError
from mnist_lit.storage.archives import read_entry
from mnist_lit.storage.tables import one_line

# What defines a Keras layer; the rest of its configuration (name, initializers) may differ.
COMPARED = ("module", "filters", "kernel_size", "pool_size", "strides", "padding", "dilation_rate", "groups", "units",
            "activation", "use_bias", "noise_shape")  # fmt: skip
SHAPES = {"channels_last": [28, 28, 1], "channels_first": [1, 28, 28]}  # of an image
MAX_DESCRIPTION = 2**20  # bytes; the tutorial's has 7,000
MAX_WEIGHTS = 2**25  # bytes; the tutorial's are 4.2 MB, and with an optimizer's state up to five times that


def read_description(path: Path) -> Any:
    """How the file describes its model; as ``json.loads(model.to_json())``.

    Raises:
        UserError: The file is not a .keras file, damaged or too large.
    """
    with _one_sentence(f"{path} cannot be read"), path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            raise UserError(f"{path} is not a .keras file, as model.save('NAME.keras') writes it")
    content = read_entry(path, "config.json", MAX_DESCRIPTION)
    with _one_sentence(f"{path}: its config.json cannot be read"):
        return json.loads(content)


def read_weights(path: Path, shapes: Mapping[str, Sequence[tuple[int, ...]]]) -> dict[str, list[np.ndarray]]:
    """The weights of the layers in ``shapes``, by the names that .keras files give to layers: conv2d, conv2d_1.

    Raises:
        UserError: They are missing, damaged, not float32 of these shapes, or not finite.
    """
    import h5py

    content, weights = read_entry(path, "model.weights.h5", MAX_WEIGHTS), {}
    with _one_sentence(f"{path}: its weights cannot be read"), h5py.File(io.BytesIO(content)) as file:
        root = "layers" if "layers" in file else "_layer_checkpoint_dependencies"  # as Keras 2.13 calls it
        for layer, wanted in shapes.items():
            datasets = [_dataset(file, root, layer, "vars", str(number)) for number in range(len(wanted))]
            found, expected = (
                [f"{data.dtype} {data.shape}" for data in datasets],
                [f"float32 {each}" for each in wanted],
            )
            if found != expected:
                raise UserError(
                    f"{path}: the weights of {layer} are {', '.join(found)} instead of {', '.join(expected)}"
                )
            weights[layer] = [data[()] for data in datasets]
            if not all(np.isfinite(each).all() for each in weights[layer]):
                raise UserError(f"{path}: the weights of {layer} hold NaN or infinite values")
    return weights


def tutorial_layers(description: Any, tutorial: Any) -> dict[str, dict[str, Any]]:
    """The configurations of a model's layers, by the names that the tutorial's model gives them.

    Args:
        description: As ``read_description`` returns it.
        tutorial: Likewise, of the tutorial's model.

    Raises:
        UserError: The model's architecture is not the tutorial's; the message names the first difference.
    """
    with _one_sentence("another architecture: it is not described as Keras does"):
        images, *found = _in_a_row(description)
        expected = _in_a_row(tutorial)[1:]
        kinds, found_kinds = (", ".join(layer["class_name"] for layer in layers) for layers in (expected, found))
        if kinds != found_kinds:
            raise UserError(f"another architecture: the layers are {found_kinds[:300]} instead of {kinds}")
        for want, have in zip(expected, found, strict=True):
            for key in COMPARED:
                if have.get(key) != want.get(key):
                    raise UserError(
                        f"another architecture: {want['class_name']} {have['name'][:40]!r} (this project's "
                        f"{want['name']}) has {key}={str(have.get(key))[:80]} instead of {want.get(key)}"
                    )
        convolution, second, pool, dropout, flatten = found[:5]
        shape = list(images.get("batch_shape") or images["batch_input_shape"])[1:]  # the second until Keras 2.15
        layout = convolution["data_format"]
        if not layout == second["data_format"] == pool["data_format"] or shape != SHAPES[layout]:
            raise UserError(
                f"another architecture: its images are {str(shape)[:80]} instead of {' or '.join(map(str, SHAPES.values()))}"
            )
        if flatten["data_format"] not in SHAPES or not 0 <= dropout["rate"] < 1:
            raise ValueError(f"dropout {dropout['rate']}")
    return {want["name"]: have for want, have in zip(expected, found, strict=True)}


def _in_a_row(description: Any) -> list[dict[str, Any]]:
    """The configurations of a model's layers, each of which has the one before as its only input."""
    kind, config = description["class_name"], description["config"]
    layers = [{**layer["config"], **layer} for layer in config["layers"]]
    if kind == "Functional":
        inputs = [_inputs(layer["inbound_nodes"]) for layer in layers] + [_inputs(config["output_layers"])]
        if inputs != [[], *([layer["name"]] for layer in layers)]:
            raise UserError("another architecture: its layers do not follow one after the other")
    elif kind != "Sequential":
        raise UserError(f"another architecture: it is a {str(kind)[:80]}, not layers one after the other")
    return layers


def _inputs(node: Any) -> list[str]:
    """The names of the layers that a layer's input comes from: somewhere in ``node``, as [name, number, number]."""
    if isinstance(node, list) and [type(each) for each in node[:3]] == [str, int, int]:
        return [node[0]]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [name for child in children for name in _inputs(child)]


def _dataset(file: Any, *names: str) -> Any:
    """A dataset in an HDF5 file, whose values are all in the file itself, not compressed."""
    import h5py

    item = file
    for name in names:
        if not isinstance(item.get(name, getlink=True), h5py.HardLink):  # the others lead to other files
            raise KeyError(f"there is no {'/'.join(names)}")
        item = item[name]
    if item.chunks or item.external or item.is_virtual:  # a chunk can be larger than the whole
        raise ValueError(f"{'/'.join(names)} is not stored as Keras does")
    return item


@contextmanager
def _one_sentence(start: str) -> Iterator[None]:
    """In this block every error becomes a ``UserError``: what JSON and HDF5 raise for damaged files has no end."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{start} ({type(error).__name__}: {one_line(error)})") from error
