"""Reading .keras files that are damaged or made to do harm; the numbers are the rows of docs/faults.md."""

import io
import itertools
import json
import random
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

SHAPES = {"conv2d": [(3, 3, 1, 32), (32,)], "dense_1": [(250, 10), (10,)]}


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
        with pytest.raises(UserError, match="damaged" if length >= 4 else r"not a \.keras file"):
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
        (lambda model: model.update(class_name="Model", module="antigravity"), "it is a Model"),
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
        (lambda file: file.__delitem__("layers/dense_1/vars/1"), r"there is no layers/dense_1/vars/1"),
        (lambda file: file.__delitem__("layers"), "there is no"),
        (
            lambda file: file.move("layers/conv2d", "a") or file.__setitem__("layers/conv2d", h5py.SoftLink("/a")),
            "there is no layers/conv2d/vars/0",
        ),
        (
            lambda file: file.move("layers", "a") or file.__setitem__("layers", h5py.ExternalLink("other", "/")),
            "there is no layers/conv2d/vars/0|its weights cannot be read",
        ),
    ],
)
def test_40_weights_that_are_not_the_tutorials_are_refused_unread(
    path: Path, change: Callable[[h5py.File], Any], reason: str
) -> None:
    restore(path, change)
    with pytest.raises(UserError, match=reason) as refused:
        read_weights(path, SHAPES)
    assert "\n" not in str(refused.value)


def test_a_file_of_keras_2_is_read_too(path: Path) -> None:
    """It names three things differently."""

    def older(model: dict[str, Any]) -> None:
        layers = model["config"]["layers"]
        layers[0]["config"]["batch_input_shape"] = layers[0]["config"].pop("batch_shape")
        for before, layer in itertools.pairwise(layers):
            layer["inbound_nodes"] = [[[before["name"], 0, 0, {}]]]
        model["config"]["output_layers"] = [model["config"]["output_layers"]]

    expected = load_keras(path)
    redescribe(path, older)
    restore(path, lambda file: file.move("layers", "_layer_checkpoint_dependencies"))
    found = load_keras(path)
    assert_same(found.get_weights(), expected.get_weights())
    assert found.get_layer("dropout").rate == 0.25
