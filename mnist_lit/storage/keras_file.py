"""Safe reading of Keras' files: nothing in them is built or executed, and only the tutorial's network is accepted.

Keras has written four layouts, told apart by content, as older versions gave them each other's suffixes:

- a zip archive (``.keras`` since Keras 2.13): config.json, and model.weights.h5 in the layout of the next
- HDF5, weights only (``.weights.h5`` since Keras 2.12): a group for each layer, named by its class: layers/conv2d_1/vars
- HDF5, the whole model (``.h5`` and, until Keras 2.12, ``.keras``): its description in the attribute model_config, its
  weights in the group model_weights in the layout of the next
- HDF5, weights only (``save_weights`` of Keras 2): the attribute layer_names has the layers in order, and the attribute
  weight_names of each layer's group has its weights in order
"""

import io
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mnist_lit import UserError
from mnist_lit.storage.archives import MAX_FILE, read_entry
from mnist_lit.storage.tables import one_line

# What defines a Keras layer; the rest of its configuration (name, initializers, dtype) may differ.
COMPARED = ("module", "filters", "kernel_size", "pool_size", "strides", "padding", "dilation_rate", "groups", "units",
            "activation", "use_bias", "noise_shape")  # fmt: skip
LEFT_OUT = {"module": "keras.layers", "groups": 1}  # in a layer's description, by some versions of Keras 2
SHAPES = {"channels_last": [28, 28, 1], "channels_first": [1, 28, 28]}  # of an image
BY_CLASS = ("layers", "_layer_checkpoint_dependencies")  # the second until Keras 2.14

ZIP, HDF5 = b"PK\3\4", b"\x89HDF\r\n\x1a\n"  # first bytes
MAX_DESCRIPTION = 2**20  # bytes; the tutorial's has 7,000
MAX_WEIGHTS = 2**25  # bytes; the tutorial's are 4.2 MB, and with an optimizer's state up to five times that
MAX_NAMES = 8  # in a list; the tutorial has 8 layers, and each name could be as long as the file

# What a file may be instead, by its first bytes.
OTHER_STARTS = {
    rb"\Z": "empty",
    rb"version https://git-lfs": "a pointer of Git LFS in place of the file, which `git lfs pull` brings",
    rb"\x80[\2-\5]": "a pickle, which could execute code",
    rb"(?s)....TFL3": "a TensorFlow Lite model",
    rb"\x1f\x8b": "compressed by gzip, to be unpacked first",
    rb"\s*<": "a web page",
    rb"\s*\{": "JSON, which holds no weights",
}
# Likewise by the end of its name.
OTHER_NAMES = {
    ".onnx": "an ONNX model",
    ".pb": "a graph of TensorFlow",
    ".safetensors": "weights in safetensors",
    **dict.fromkeys((".index", ".data-00000-of-00001"), "part of a TensorFlow checkpoint"),
    **dict.fromkeys((".pt", ".pth", ".ckpt"), "a file of PyTorch"),
    **dict.fromkeys((".npy", ".npz"), "an array of NumPy"),
}


def read_description(path: Path) -> Any:
    """How the file describes its model, as ``json.loads(model.to_json())``; None if it holds weights only.

    Raises:
        UserError: Keras has not written it; it is damaged or too large.
    """
    if _start(path) == ZIP:
        content: str | bytes = read_entry(path, "config.json", MAX_DESCRIPTION)
        place = "config.json"
    else:
        place = "model_config"
        with _hdf5(path) as file:
            if place not in file.attrs:
                if "layer_names" in file.attrs or any(_has(file, root) for root in BY_CLASS):
                    return None
                raise UserError(f"{path} is an HDF5 file, but not one of Keras: it has no model_config, nor layers")
            (content,) = _strings(file, place)
    with _one_sentence(f"{path}: its {place} cannot be read"):
        return json.loads(content)


def read_weights(path: Path, shapes: Mapping[str, Sequence[tuple[int, ...]]]) -> dict[str, list[np.ndarray]]:
    """The weights of the tutorial's layers.

    Args:
        shapes: Of each layer's weights; the layers by name, in the model's order.

    Raises:
        UserError: They are missing, damaged, not float32 of these shapes, or not finite.
    """
    weights = {}
    with _hdf5(path) as file:
        places = [*_places(file)]
        if len(places) != len(shapes):
            raise UserError(f"another architecture: {len(places)} layers have weights instead of {len(shapes)}")
        for (layer, wanted), each in zip(shapes.items(), places, strict=True):
            datasets = [_dataset(file, *place) for place in each]
            found = [f"{data.dtype} {data.shape}" for data in datasets]
            expected = [f"float32 {shape}" for shape in wanted]
            if found != expected:
                raise UserError(
                    f"{path}: the weights of {layer} are {', '.join(found)[:200]} instead of {', '.join(expected)}"
                )
            weights[layer] = [data[()] for data in datasets]
            if not all(np.isfinite(values).all() for values in weights[layer]):
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
    listed = config if isinstance(config, list) else config["layers"]  # the first until Keras 2.2.2
    layers = [{**LEFT_OUT, **layer["config"], **layer} for layer in listed]
    if kind in ("Functional", "Model"):  # the second until Keras 2.3
        inputs = [_inputs(layer["inbound_nodes"]) for layer in layers] + [_inputs(config["output_layers"])]
        if inputs != [[], *([layer["name"]] for layer in layers)]:
            raise UserError("another architecture: its layers do not follow one after the other")
    elif kind != "Sequential":
        raise UserError(f"another architecture: it is a {str(kind)[:80]}, not layers one after the other")
    elif layers[0]["class_name"] != "InputLayer":  # until Keras 2.2 there is none
        shape = layers[0].get("batch_input_shape") or config["build_input_shape"]
        layers.insert(0, {"class_name": "InputLayer", "batch_input_shape": shape})
    return layers


def _inputs(node: Any) -> list[str]:
    """The names of the layers that a layer's input comes from: somewhere in ``node``, as [name, number, number]."""
    if isinstance(node, list) and [type(each) for each in node[:3]] == [str, int, int]:
        return [node[0]]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [name for child in children for name in _inputs(child)]


def _start(path: Path) -> bytes:
    """The file's first bytes: ``ZIP`` or ``HDF5``.

    Raises:
        UserError: It starts otherwise, or is too large, a folder or not there; the message says what it is.
    """
    if not (what := _folder_or_checkpoint(path)):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        if (size := path.stat().st_size) > MAX_FILE:
            raise UserError(f"{path} has {size:,} bytes, but at most {MAX_FILE:,} are read")
        with _one_sentence(f"{path} cannot be read"), path.open("rb") as file:
            start = file.read(24)
        if start.startswith(HDF5):
            return HDF5
        starting = (what for pattern, what in OTHER_STARTS.items() if re.match(pattern, start))
        named = (what for end, what in OTHER_NAMES.items() if path.name.endswith(end))
        what = next(itertools.chain(starting, named), "")
        if start.startswith(ZIP) and not what:
            return ZIP
    raise UserError(f"{path} is {what}{', ' if what else ''}not a model as Keras saves it: .keras, .h5 or .weights.h5")


def _folder_or_checkpoint(path: Path) -> str:
    """What ``path`` is if it is no single file."""
    how = "the package tf_keras can load it and save it as .h5"
    if (path / "saved_model.pb").exists():
        return f"a SavedModel of TensorFlow ({how})"
    if (path / "checkpoint").exists() or path.with_name(f"{path.name}.index").exists():
        return f"a TensorFlow checkpoint ({how})"
    return "a folder" if path.is_dir() else ""


@contextmanager
def _hdf5(path: Path) -> Iterator[Any]:
    """The HDF5 file that ``path`` is, or that is in the archive ``path``, in memory."""
    import h5py

    content = read_entry(path, "model.weights.h5", MAX_WEIGHTS) if _start(path) == ZIP else path.read_bytes()
    with _one_sentence(f"{path}: its weights cannot be read"), h5py.File(io.BytesIO(content)) as file:
        yield file


def _places(file: Any) -> Iterator[list[list[str]]]:
    """For each layer with weights, in order, where they are: names of groups to go through, and of the dataset."""
    for root in BY_CLASS:
        if not _has(file, root):
            continue
        if (count := len(layers := _inside(file, root))) > MAX_NAMES:
            raise UserError(f"another architecture: {count} layers instead of at most {MAX_NAMES}")
        # By class and number, which is the tutorial's order. Until Keras 2.14 the numbers are 0, 2, 4.
        for name in sorted(layers, key=lambda name: (name.rstrip("_0123456789"), len(name), name)):
            if numbers := sorted(_inside(layers, name, "vars"))[:MAX_NAMES]:
                yield [[root, name, "vars", number] for number in numbers]
        return
    start = [] if "layer_names" in file.attrs else ["model_weights"]
    for layer in _strings(_inside(file, *start), "layer_names"):
        group = [*start, *layer.split("/")]
        if weights := _strings(_inside(file, *group), "weight_names"):
            yield [[*group, *name.split("/")] for name in weights]


def _has(group: Any, name: str) -> bool:
    """Whether an HDF5 group has a member that is in the file itself; h5py's own ``in`` opens files that links lead to."""
    import h5py

    links, key = group.id.links, name.encode()
    return name not in ("", ".") and links.exists(key) and links.get_info(key).type == h5py.h5l.TYPE_HARD


def _inside(group: Any, *names: str) -> Any:
    """The member of an HDF5 group that is reached through ``names``, without leaving the file."""
    for number, name in enumerate(names):
        if not _has(group, name):
            raise KeyError(f"there is no {'/'.join(names[: number + 1])[:200]}")
        group = group[name]
    return group


def _dataset(file: Any, *names: str) -> Any:
    """A dataset in an HDF5 file, whose values are all in the file itself, not compressed."""
    item = _inside(file, *names)
    if item.chunks or item.external or item.is_virtual:  # a chunk can be larger than the whole
        raise ValueError(f"{'/'.join(names)} is not stored as Keras does")
    return item


def _strings(item: Any, name: str) -> list[str]:
    """The text, or the texts, in an attribute of an HDF5 group."""
    import h5py

    attribute = item.attrs.get_id(name)
    if attribute.shape is None or not (count := math.prod(attribute.shape)):
        return []
    if count > MAX_NAMES:
        raise UserError(f"another architecture: {count} {name} instead of at most {MAX_NAMES}")
    if not h5py.check_string_dtype(attribute.dtype) or attribute.get_storage_size() > MAX_DESCRIPTION:
        raise ValueError(f"{name} is not stored as Keras does")
    values = np.ravel(item.attrs[name]).tolist()
    if sum(map(len, values)) > MAX_DESCRIPTION:
        raise ValueError(f"{name} has more than {MAX_DESCRIPTION:,} bytes")
    return [value.decode() if isinstance(value, bytes) else value for value in values]


@contextmanager
def _one_sentence(start: str) -> Iterator[None]:
    """In this block every error becomes a ``UserError``: what JSON and HDF5 raise for damaged files has no end."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{start} ({type(error).__name__}: {one_line(error)})") from error
