"""Reading Keras' files: those of its versions, damaged ones, and made to do harm; numbers are rows of docs/faults.md."""

import io
import json
import random
import re
import sys
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers import assert_same

from mnist_lit import UserError
from mnist_lit.convert import convert, keras_tutorial, load_keras
from mnist_lit.storage.archives import MAX_ENTRIES
from mnist_lit.storage.keras_file import MAX_DESCRIPTION, read_description, read_weights

SHAPES = {
    "conv1": [(3, 3, 1, 32), (32,)],
    "conv2": [(3, 3, 32, 64), (64,)],
    "dense1": [(4096, 250), (250,)],
    "dense2": [(250, 10), (10,)],
}
# How real versions of Keras 2 describe the tutorial's network, dropout 0.25.
OF_KERAS_2 = json.loads((Path(__file__).parent / "keras_descriptions.json").read_text())


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keras") / "model.keras"
    keras_tutorial(dropout=0.25).save(path)
    return path


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.keras"
    path.write_bytes(original.read_bytes())
    return path


@pytest.fixture(scope="module")
def weights(original: Path) -> dict[str, list[np.ndarray]]:
    return read_weights(original, SHAPES)


def write_as_keras_2(path: Path, description: Any, weights: dict[str, list[np.ndarray]], whole: bool = True) -> None:
    """As Keras 2 writes an .h5 file: ``model.save``, or ``model.save_weights`` if not ``whole``.

    Up to Keras 2.4 the names in a list have a fixed length, from 2.9 on any length; here one of each.
    """
    layers = {layer["config"]["name"]: layer["class_name"] for layer in description["config"]["layers"]}
    arrays = iter(weights.values())
    with h5py.File(path, "w") as file:
        if whole:
            file.attrs["model_config"] = json.dumps(description).encode()
        group = file.create_group("model_weights") if whole else file
        group.attrs["layer_names"] = np.array([*layers], dtype=h5py.string_dtype())
        for name, kind in layers.items():
            layer = group.create_group(name)
            found = dict(zip(("kernel:0", "bias:0"), next(arrays), strict=True)) if kind in ("Conv2D", "Dense") else {}
            layer.attrs["weight_names"] = np.array([f"{name}/{each}".encode() for each in found])
            for each, values in found.items():
                layer[f"{name}/{each}"] = values


def write(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def rewrite(path: Path, entries: dict[str, bytes]) -> None:
    """Replace entries of an archive."""
    with zipfile.ZipFile(path) as archive:
        write(path, {name: archive.read(name) for name in archive.namelist()} | entries)


def redescribe(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    description = read_description(path)
    change(description)
    rewrite(path, {"config.json": json.dumps(description).encode()})


def restore(path: Path, change: Callable[[h5py.File], Any]) -> None:
    with zipfile.ZipFile(path) as archive:
        content = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(content, "r+") as file:
        change(file)
    rewrite(path, {"model.weights.h5": content.getvalue()})


def replaced(name: str, *arguments: Any, **options: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, *arguments, **options)

    return change


def test_40_one_changed_byte_is_one_sentence_or_changes_nothing(path: Path) -> None:
    content, draw, refused = path.read_bytes(), random.Random(0), 0
    expected = read_description(path), read_weights(path, SHAPES)
    # Most bytes are weights; as many are drawn from the rest, which is all but the last two thirds of the largest one.
    places = [draw.randrange(len(content)) for _ in range(20)]
    places += [draw.choice([draw.randrange(20_000), len(content) - 1 - draw.randrange(300)]) for _ in range(60)]
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
        try:
            assert_same([read_description(path), read_weights(path, SHAPES)], list(expected))
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 60
    path.write_bytes(content[:100_000] + bytes([content[100_000] ^ 1]) + content[100_001:])
    with pytest.raises(UserError, match=r"is damaged \(Bad CRC-32 for file 'model.weights.h5'\)"):
        convert(str(path), str(path.with_suffix(".ckpt")))
    assert [each.name for each in path.parent.iterdir()] == ["model.keras"]


def test_40_a_file_cut_short_is_one_sentence(path: Path) -> None:
    content = path.read_bytes()
    for length in (0, 1, 4, 100, 5000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="damaged" if length >= 4 else "not a model as Keras saves it"):
            load_keras(path)


def test_40_archives_are_refused_before_they_take_memory(path: Path) -> None:
    def refused(reason: str) -> None:
        with pytest.raises(UserError, match=reason):
            read_description(path)

    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("config.json", "{}")
    refused("two with the same name")
    write(path, {str(number): b"" for number in range(MAX_ENTRIES + 1)})
    refused("too many entries")
    write(path, {"config.json": b" " * (MAX_DESCRIPTION + 1)}, zipfile.ZIP_DEFLATED)
    refused("its config.json has 1,048,577 bytes, but at most 1,048,576 are read")
    write(path, {"config.json": b"{}"}, zipfile.ZIP_LZMA)
    refused("compressed in a way that is not read")
    write(path, {"metadata.json": b"{}"})
    refused(r"has no config\.json")
    with path.open("r+b") as file:
        file.truncate(40 * 2**30)  # takes no space on the disk
    refused("has 42,949,672,960 bytes, but at most")


def test_40_an_entry_that_expands_to_more_than_it_declares_takes_no_more_memory(path: Path) -> None:
    write(path, {"config.json": b" " * 2**26}, zipfile.ZIP_DEFLATED)
    content, declared = path.read_bytes(), (2**26).to_bytes(4, "little")
    assert content.count(declared) == 2  # before the entry, and in the list at the end
    path.write_bytes(content.replace(declared, (100).to_bytes(4, "little")))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"damaged \(Bad CRC-32"):
        read_description(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model["config"]["layers"][6]["config"].update(units=40_000), "units=40000 instead of 250"),
        (lambda model: model["config"]["layers"][1].update(class_name="Lambda"), "the layers are Lambda, Conv2D"),
        (lambda model: model["config"]["layers"][1].update(module="antigravity"), "module=antigravity instead of"),
        (lambda model: model["config"]["layers"][1]["config"].update(activation={"a": 1}), "activation={'a': 1}"),
        (lambda model: model["config"]["layers"][4]["config"].update(rate=1.0), r"\(ValueError: dropout 1\.0\)"),
        (lambda model: model["config"]["layers"][4]["config"].update(rate="a"), "not described as Keras does"),
        (lambda model: model["config"]["layers"][5]["config"].update(data_format="a"), "not described as Keras does"),
        (lambda model: model["config"]["layers"][2]["config"].update(data_format="channels_first"), "its images are"),
        (lambda model: model["config"]["layers"][0]["config"].update(batch_shape=[None, 29, 28, 1]), r"\[29, 28, 1\]"),
        (lambda model: model["config"]["layers"][3].update(inbound_nodes=[]), "do not follow one after the other"),
        (lambda model: model["config"].update(output_layers=["dense1", 0, 0]), "do not follow one after the other"),
        (lambda model: model.update(class_name="Net", module="antigravity"), "it is a Net, not layers"),
        (lambda model: model.update(config=None), "not described as Keras does"),
        (lambda model: model["config"].update(layers=[]), "do not follow one after the other"),
    ],
)
def test_40_only_the_tutorial_is_accepted_and_nothing_else_is_built(
    path: Path, change: Callable[[Any], Any], reason: str
) -> None:
    redescribe(path, change)
    with pytest.raises(UserError, match=reason) as refused:
        load_keras(path)
    assert "\n" not in str(refused.value)
    assert "antigravity" not in sys.modules


def test_40_a_description_that_is_no_json_or_endlessly_nested_is_one_sentence(path: Path) -> None:
    nested = b'{"class_name": "Functional", "config": {"layers": [%s]}}' % (b"[" * 400_000 + b"]" * 400_000)
    for content in (b"", b"{", b"\xff", nested, b"1" * 5000):
        rewrite(path, {"config.json": content})
        with pytest.raises(UserError, match=r"its config\.json cannot be read"):
            read_description(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replaced("layers/conv2d/vars/0", (60_000, 60_000), "f4"), r"\(60000, 60000\).* instead of float32"),
        (replaced("layers/conv2d/vars/1", (32,), "f8"), r"float64.* instead of float32"),
        (replaced("layers/conv2d/vars/1", data=np.full(32, np.nan, "f4")), "hold NaN or infinite values"),
        (replaced("layers/conv2d/vars/1", (32,), "f4", chunks=(32,), compression="gzip"), "not stored as Keras does"),
        (replaced("layers/conv2d/vars/1", (32,), "f4", external=[("other", 0, 128)]), "not stored as Keras does"),
        (
            lambda file: file.__delitem__("layers/dense_1/vars/1"),
            r"the weights of dense2 are float32 \(250, 10\) instead of",
        ),
        (lambda file: file.__delitem__("layers"), "there is no"),
        (
            lambda file: file.move("layers/conv2d", "a") or file.__setitem__("layers/conv2d", h5py.SoftLink("/a")),
            "there is no conv2d",
        ),
        (
            lambda file: file.move("layers", "a") or file.__setitem__("layers", h5py.ExternalLink("other.h5", "/")),
            "there is no model_weights",  # it does not look into the other file
        ),
        (
            lambda file: [file.create_group(f"layers/a{number}") for number in range(9)],
            "17 layers instead of at most 8",
        ),
        (lambda file: file.create_dataset("layers/dropout/vars/0", (3,), "f4"), "5 layers have weights instead of 4"),
    ],
)
def test_40_weights_that_are_not_the_tutorials_are_refused_unread(
    path: Path, change: Callable[[h5py.File], Any], reason: str
) -> None:
    restore(path, change)
    with pytest.raises(UserError, match=reason) as refused:
        read_weights(path, SHAPES)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", OF_KERAS_2)
@pytest.mark.parametrize("suffix", [".h5", ".keras"])  # the second until Keras 2.12
def test_whole_models_of_keras_2(suffix: str, name: str, weights: dict[str, list[np.ndarray]], tmp_path: Path) -> None:
    write_as_keras_2(tmp_path / f"model{suffix}", OF_KERAS_2[name], weights)
    found = load_keras(tmp_path / f"model{suffix}")
    assert_same(found.get_weights(), [each for layer in weights.values() for each in layer])
    assert found.get_layer("dropout").rate == 0.25
    assert {layer.compute_dtype for layer in found.layers} == {"float32"}


def test_weights_of_keras_2(weights: dict[str, list[np.ndarray]], path: Path) -> None:
    expected = [each for layer in weights.values() for each in layer]
    for number, description in enumerate(OF_KERAS_2.values()):
        written = path.with_name(f"{number}.h5")
        write_as_keras_2(written, description, weights, whole=False)
        assert read_description(written) is None
        assert_same(load_keras(written).get_weights(), expected)


def test_the_layout_of_keras_2_13(path: Path, weights: dict[str, list[np.ndarray]]) -> None:
    def older(file: h5py.File) -> None:
        file.move("layers", "_layer_checkpoint_dependencies")
        for name in ("conv2d", "dense"):  # it counts every layer twice
            file.move(f"_layer_checkpoint_dependencies/{name}_1", f"_layer_checkpoint_dependencies/{name}_2")

    def described(model: dict[str, Any]) -> None:
        model["config"] = OF_KERAS_2["Keras 2.4.0: Functional"]["config"]

    redescribe(path, described)
    restore(path, older)
    assert_same(read_weights(path, SHAPES), weights)
    assert load_keras(path).get_layer("dropout").rate == 0.25


def test_40_the_order_of_the_layers_is_that_of_their_list(weights: dict[str, list[np.ndarray]], tmp_path: Path) -> None:
    description = json.loads(json.dumps(OF_KERAS_2["Keras 2.4.0: Functional"]))
    write_as_keras_2(tmp_path / "model.h5", description, weights, whole=False)
    with h5py.File(tmp_path / "model.h5", "r+") as file:
        file.attrs["layer_names"] = file.attrs["layer_names"][::-1]
    with pytest.raises(UserError, match=r"the weights of conv1 are float32 \(250, 10\), float32 \(10,\) instead of"):
        load_keras(tmp_path / "model.h5")


def attribute(name: str, value: Any, group: str = "/") -> Callable[[h5py.File], None]:
    return lambda file: file[group].attrs.__setitem__(name, value)


KERNEL = "model_weights/conv2d/conv2d/kernel:0"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (attribute("model_config", b"{"), "its model_config cannot be read"),
        (attribute("model_config", b"\xff"), "its model_config cannot be read"),
        (attribute("model_config", b" " * (MAX_DESCRIPTION + 1)), "model_config has more than 1,048,576 bytes"),
        (attribute("model_config", 7), "model_config is not stored as Keras does"),
        (attribute("model_config", np.array([b"{}", b"{}"])), "its .* cannot be read"),
        (attribute("model_config", h5py.Empty("S4")), "its .* cannot be read"),
        (lambda file: file.attrs.__delitem__("model_config"), "not one of Keras: it has no model_config, nor layers"),
        (
            attribute("layer_names", np.array([b"a"] * 10_000), "model_weights"),
            "10000 layer_names instead of at most 8",
        ),
        (attribute("layer_names", np.array([b"a"]), "model_weights"), "there is no model_weights/a"),
        (attribute("layer_names", np.array([b"..", b"."]), "model_weights"), "there is no "),
        (attribute("layer_names", np.array([b"dense"]), "model_weights"), "1 layers have weights instead of 4"),
        (attribute("weight_names", np.array([b"/model_weights"]), "model_weights/dense"), "there is no "),
        (attribute("weight_names", np.array([b"a"]), "model_weights/dense"), "there is no model_weights/dense/a"),
        (attribute("weight_names", np.array([1.0]), "model_weights/dense"), "not stored as Keras does"),
        (lambda file: file.__delitem__("model_weights"), "there is no model_weights"),
        (replaced(KERNEL, (60_000, 60_000), "f4"), r"\(60000, 60000\).* instead of float32"),
        (replaced(KERNEL, (3, 3, 1, 32), "f2"), "float16 .* instead of float32"),
        (replaced(KERNEL, data=np.full((3, 3, 1, 32), np.inf, "f4")), "hold NaN or infinite values"),
        (replaced(KERNEL, (3, 3, 1, 32), "f4", compression="gzip"), "not stored as Keras does"),
        (replaced(KERNEL, (3, 3, 1, 32), "f4", external=[("/dev/zero", 0, 1152)]), "not stored as Keras does"),
        (
            lambda file: file.move("model_weights", "a") or file.__setitem__("model_weights", h5py.SoftLink("/a")),
            "there is no model_weights",
        ),
    ],
)
def test_40_h5_files_that_are_not_the_tutorials_are_refused(
    change: Callable[[h5py.File], Any], reason: str, weights: dict[str, list[np.ndarray]], tmp_path: Path
) -> None:
    path = tmp_path / "model.h5"
    write_as_keras_2(path, OF_KERAS_2["Keras 2.4.0: Functional"], weights)
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(UserError, match=reason) as refused:
        load_keras(path)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value) or "another architecture" in str(refused.value)


def test_40_a_virtual_dataset_is_refused(weights: dict[str, list[np.ndarray]], tmp_path: Path) -> None:
    path = tmp_path / "model.h5"
    write_as_keras_2(path, OF_KERAS_2["Keras 2.4.0: Functional"], weights)
    layout = h5py.VirtualLayout((3, 3, 1, 32), "f4")
    layout[:] = h5py.VirtualSource("/other.h5", "a", (3, 3, 1, 32))
    with h5py.File(path, "r+") as file:
        del file[KERNEL]
        file.create_virtual_dataset(KERNEL, layout)
    with pytest.raises(UserError, match="not stored as Keras does"):
        load_keras(path)


def test_40_an_h5_file_cut_short_or_huge_is_one_sentence(weights: dict[str, list[np.ndarray]], tmp_path: Path) -> None:
    path = tmp_path / "model.h5"
    write_as_keras_2(path, OF_KERAS_2["Keras 2.4.0: Functional"], weights)
    content = path.read_bytes()
    for length in (4, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cannot be read|not a model as Keras saves it") as refused:
            load_keras(path)
        assert "\n" not in str(refused.value)
    with path.open("r+b") as file:
        file.truncate(40 * 2**30)  # takes no space on the disk
    with pytest.raises(UserError, match="has 42,949,672,960 bytes, but at most"):
        load_keras(path)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("model", None, "a folder, not a model"),
        ("model/saved_model.pb", b"", "model is a SavedModel of TensorFlow (the package tf_keras can load it"),
        ("model/checkpoint", b"", "model is a TensorFlow checkpoint (the package tf_keras can load it"),
        ("model.index", b"", "model is a TensorFlow checkpoint (the package tf_keras can load it"),
        ("cp.data-00000-of-00001", b"1234", "part of a TensorFlow checkpoint"),
        ("model.h5", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS in place of the file"),
        ("model.keras", b"", "empty, not a model as Keras saves it: .keras, .h5 or .weights.h5"),
        ("model.h5", b"<!DOCTYPE html>", "a web page"),
        ("model.json", b'{"class_name": "Sequential"}', "JSON, which holds no weights"),
        ("model.tflite", b"\x1c\0\0\0TFL3", "a TensorFlow Lite model"),
        ("model.onnx", b"\x08\x07", "an ONNX model"),
        ("model.pb", b"\n", "a graph of TensorFlow"),
        ("model.pkl", b"\x80\x04\x95", "a pickle, which could execute code"),
        ("model.pth", b"PK\3\4", "a file of PyTorch"),
        ("model.h5.gz", b"\x1f\x8b", "compressed by gzip"),
        ("model.h5", b"text", "model.h5 is not a model as Keras saves it"),
    ],
)
def test_40_what_is_no_keras_file_is_named(name: str, content: bytes | None, what: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    source = path if path.parent == tmp_path and path.suffix != ".index" else tmp_path / "model"
    with pytest.raises(UserError, match=re.escape(what)) as refused:
        convert(str(source), str(tmp_path / "model.ckpt"))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "model.ckpt").exists()
