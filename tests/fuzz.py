"""Damage files in every way that a stranger could, and see what their readers make of them.

python tests/fuzz.py checkpoint|keras|keras_h5|idx|picture [COUNT [SEED]]

Each changed file is read in a child process that ends when reading takes too long, with the most memory that a process
may have, and that notices what no reader may do: import another package, start a process, connect, write a file. Right
is only a refusal with the reader's own exception, or the content of the unchanged file. Change number 7 of seed 0 is
the same every time. Linux only.
"""

import gzip
import hashlib
import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

SECONDS, MEGABYTES = 30, 700  # that reading one file may take; the machine may be busy
HARD_MEGABYTES = 4000  # more is not given
MARKER = "fuzz_marker"  # a module in the working folder that writes a file when it is imported
OUTCOMES = ("refused", "accepted right", "accepted wrong", "exception", "over time", "over memory", "code run")
GOOD = OUTCOMES[:2]

Draw = random.Random
Change = Callable[[bytes, Draw], tuple[str, bytes]]  # returns what it did, and the changed file


def same(found: Any, expected: Any) -> bool:
    from helpers import differences  # takes seconds

    return not [*differences(found, expected)]


@dataclass
class Reader:
    """What is to be tested.

    Attributes:
        original: The unchanged file.
        changes: Ways to damage it, each drawn equally often.
        read: Reads a path and returns the content.
        refusal: The exceptions that refuse a file.
        right: Whether content may be returned; the default is that of the unchanged file.
    """

    original: bytes
    changes: list[Change]
    read: Callable[[Path], Any]
    refusal: tuple[type[Exception], ...]
    name: str
    right: Callable[[Any, Any], bool] = same
    megabytes: int = MEGABYTES


# Changes of any file


def flip(content: bytes, draw: Draw) -> tuple[str, bytes]:
    changed, count = bytearray(content), draw.choice([1, 1, 1, 2, 10])
    # As often near the ends, where headers and lists of entries are, as anywhere.
    spans = [(0, len(content)), (0, min(3000, len(content))), (max(0, len(content) - 3000), len(content))]
    places = [draw.randrange(*draw.choice(spans)) for _ in range(count)]
    for place in places:
        changed[place] ^= 1 << draw.randrange(8)
    return f"bits flipped at {places}", bytes(changed)


def cut(content: bytes, draw: Draw) -> tuple[str, bytes]:
    length = draw.choice([draw.randrange(len(content)), draw.randrange(min(200, len(content))), len(content) - 1])
    return f"cut to {length} bytes", content[:length]


def insert(content: bytes, draw: Draw) -> tuple[str, bytes]:
    place, length = draw.randrange(len(content)), draw.choice([1, 4, 1000, 100_000])
    return f"{length} bytes inserted at {place}", content[:place] + draw.randbytes(length) + content[place:]


# Changes of zip archives


def entries_of(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive_of(entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", compression) as archive:
        warnings.simplefilter("ignore")  # about names that are there twice
        for name, content in entries:
            archive.writestr(name, content)
    return file.getvalue()


def duplicate(content: bytes, draw: Draw) -> tuple[str, bytes]:
    entries = [*entries_of(content).items()]
    name, old = draw.choice(entries)
    other = (name, draw.choice([b"", draw.randbytes(len(old)), bytes(len(old))]))
    entries.insert(draw.choice([0, len(entries)]), other)
    return f"two entries {name}", archive_of(entries)


def misdeclare(content: bytes, draw: Draw) -> tuple[str, bytes]:
    """Change a field in the archive's list of entries: sizes, checksum, place, flags, method."""
    starts = [place for place in range(len(content) - 4) if content.startswith(b"PK\1\2", place)]
    start = draw.choice(starts[-20:])
    offset, size = draw.choice([(8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (42, 4)])
    number = draw.choice([0, 1, draw.randrange(2 ** (8 * size)), 2 ** (8 * size) - 1, 2 ** (8 * size - 1)])
    changed = content[: start + offset] + number.to_bytes(size, "little") + content[start + offset + size :]
    return f"field {offset} of the entry at {start} is {number}", changed


def bomb(content: bytes, draw: Draw) -> tuple[str, bytes]:
    entries = entries_of(content)
    name = draw.choice([*entries, "another"])
    size = 2 ** draw.choice([20, 28])
    method = draw.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
    changed = archive_of([*({**entries, name: bytes(size)}).items()], method)
    if draw.random() < 0.5:
        changed = changed.replace(size.to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    return f"{name} expands to {size} bytes", changed


ZIP_CHANGES: list[Change] = [flip, flip, cut, insert, duplicate, misdeclare, bomb]


# Readers


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def checkpoint(folder: Path) -> Reader:
    import pydantic
    import torch

    from mnist_lit import UserError
    from mnist_lit.convert import save_checkpoint
    from mnist_lit.inference.trained import load
    from mnist_lit.model import MNISTClassifier

    pydantic.TypeAdapter(float)  # imports what some of the refusals need
    path = folder / "original.ckpt"
    save_checkpoint(MNISTClassifier(), path)
    original = path.read_bytes()
    kernel, bias = "network.conv1.weight", "network.conv1.bias"
    plain: list[Any] = [None, [], {}, "text", 7, float("nan"), b"bytes", [{}], {"a": [None]}, torch.zeros(2)]
    classes = ["antigravity.Net", f"{MARKER}.Net", f"{MARKER}:Net", "os.system", "builtins.eval", "builtins.dict",
               "torch.nn.Identity", "torch.nn.Linear", "torch.hub.load", "", ".", "a" * 10_000, "x\n\x1b[2Jy", 7,
               None, "mnist_lit.network", "mnist_lit.inference.trained.TrainedModel"]  # fmt: skip

    def put(place: dict[Any, Any], key: Any, value: Any) -> Callable[[], None]:
        return lambda: place.__setitem__(key, value)

    def odd(content: bytes, draw: Draw) -> tuple[str, bytes]:
        values = torch.load(io.BytesIO(content), weights_only=True)
        weights, arguments = values["state_dict"], values["hyper_parameters"]
        model = arguments["model"]
        number = draw.choice(plain)
        huge = {"_target_": "torch.nn.Linear", "in_features": 40_000, "out_features": 40_000}
        nested = {"_target_": f"{MARKER}.run"}
        target = draw.choice(classes)
        cases: dict[str, Callable[[], Any]] = {
            f"hyper_parameters {number!r}": put(values, "hyper_parameters", number),
            f"state_dict {number!r}": put(values, "state_dict", number),
            f"data {number!r}": put(values, "data", number),
            f"model {number!r}": put(arguments, "model", number),
            f"optimizer {number!r}": put(arguments, "optimizer", number),
            f"dropout {number!r}": put(model, "dropout", number),
            f"a weight {number!r}": put(weights, kernel, number),
            f"class {str(target)[:40]!r}": put(model, "_target_", target),
            f"optimizer's class {str(target)[:40]!r}": put(arguments["optimizer"], "_target_", target),
            "nested _target_": put(model, "dropout", nested),
            "nested _target_ in the optimizer": put(arguments["optimizer"], "lr", nested),
            "_instantiator": put(arguments, "_instantiator", f"{MARKER}.run"),
            "no model": lambda: arguments.pop("model"),
            "no optimizer": lambda: arguments.pop("optimizer"),
            "no hyper_parameters": lambda: values.pop("hyper_parameters"),
            "huge layer": put(arguments, "model", huge),
            "huge layer with a weight of that shape": lambda: (
                put(arguments, "model", huge)(),
                put(weights, "network.weight", torch.zeros(1).expand(40_000, 40_000))(),
            ),
            "huge older class": put(arguments, "model", {"network": "torch.nn.Linear", **huge}),
            "a weight of a huge shape": put(weights, kernel, torch.zeros(1).expand(40_000, 40_000)),
            "NaN": put(weights, kernel, weights[kernel] * float("nan")),
            "Inf": put(weights, kernel, weights[kernel] + float("inf")),
            "sparse": put(weights, kernel, weights[kernel].to_sparse()),
            "meta": put(weights, kernel, weights[kernel].to("meta")),
            "stride 0": put(weights, bias, torch.zeros(1).expand(32)),  # as before
            "no such key": put(weights, "network.0", torch.zeros(1)),
            "a key that is a number": put(weights, 0, torch.zeros(1)),
            "a key like a number": put(weights, "0", torch.zeros(1)),
            "a weight is missing": lambda: weights.pop(kernel),
            "other shape": put(weights, kernel, torch.zeros(32, 1, 3, 4)),
            "code": put(values, "extra", Payload()),
            "a list": lambda: values.clear(),
        } | {
            f"a weight is {dtype}": put(weights, kernel, weights[kernel].to(dtype))
            # not those of runs in half precision, which are rounded already and load as they are
            for dtype in (torch.float64, torch.float8_e5m2, torch.int32, torch.bool, torch.complex64)
        }
        name = draw.choice([*cases])
        cases[name]()
        file = io.BytesIO()
        torch.save(values, file)
        return name, file.getvalue()

    def pickled(content: bytes, draw: Draw) -> tuple[str, bytes]:
        """Code in place of the archive's pickle, or as the whole file."""
        code = pickle.dumps({"state_dict": Payload()}, draw.choice([0, 2, 4]))
        if draw.random() < 0.3:
            return "a pickle", code
        entries = entries_of(content)
        name = next(name for name in entries if name.endswith("data.pkl"))
        return "code as data.pkl", archive_of([*{**entries, name: code}.items()])

    def flip_inside(content: bytes, draw: Draw) -> tuple[str, bytes]:
        entries = entries_of(content)
        name = next(name for name in entries if name.endswith("data.pkl"))
        what, entries[name] = draw.choice([flip, cut])(entries[name], draw)
        return f"{name}: {what}", archive_of([*entries.items()])

    def read(path: Path) -> Any:
        model, classifier = load(path), MNISTClassifier.load_from_checkpoint(path)
        return [model.network.state_dict(), classifier.network.state_dict()]

    changes = [*ZIP_CHANGES, odd, odd, odd, odd, pickled, flip_inside]
    return Reader(original, changes, read, (UserError,), "file.ckpt")


def keras(folder: Path, suffix: str = ".keras") -> Reader:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import h5py

    from mnist_lit import UserError
    from mnist_lit.convert import WITH_WEIGHTS, keras_tutorial, load_keras

    path = folder / f"original{suffix}"
    keras_tutorial().save(path)
    original = path.read_bytes()
    if zipped := suffix == ".keras":
        entries = entries_of(original)
        described, stored = entries["config.json"], entries["model.weights.h5"]
        datasets = ["layers/conv2d/vars/0", "layers/dense/vars/0", "layers/dense_1/vars/1"]
    else:
        with h5py.File(path) as file:
            described, stored = file.attrs["model_config"].encode(), original
            every = [
                file[f"model_weights/{name}/{name}/{each}"].id for name in WITH_WEIGHTS for each in ("kernel", "bias")
            ]
            values = [range(each.get_offset(), each.get_offset() + each.get_storage_size()) for each in every]
        datasets = [
            f"model_weights/{name}" for name in ("conv1/conv1/kernel", "dense1/dense1/kernel", "dense2/dense2/bias")
        ]

    def with_weights(content: bytes) -> bytes:
        return archive_of([*{**entries, "model.weights.h5": content}.items()]) if zipped else content

    def with_description(content: bytes) -> bytes:
        if zipped:
            return archive_of([*{**entries, "config.json": content}.items()])
        file = io.BytesIO(original)
        with h5py.File(file, "r+") as changed:
            # A string without zeros, as Keras writes it, or of a fixed length.
            changed.attrs["model_config"] = content if b"\0" not in content else np.void(content[:60_000])
        return file.getvalue()

    def places(value: Any) -> Iterator[tuple[Any, Any]]:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            yield value, key
            yield from places(value[key])

    def redescribe(content: bytes, draw: Draw) -> tuple[str, bytes]:
        description = json.loads(described)
        place, key = draw.choice([*places(description)])
        place[key] = draw.choice([None, [], {}, "text", 40_000, -1, 1e300, float("nan"), True, [None], "x" * 10_000,
                                  {"class_name": "Net", "module": MARKER, "config": {}, "registered_name": "Net"},
                                  {"class_name": "__lambda__", "config": {"value": "x"}}])  # fmt: skip
        return f"description: {key} is {str(place[key])[:40]}", with_description(json.dumps(description).encode())

    def other_layer(content: bytes, draw: Draw) -> tuple[str, bytes]:
        description = json.loads(described)
        layer = draw.choice(description["config"]["layers"])
        name, module = draw.choice([("Lambda", "keras.layers"), ("Net", MARKER), ("Net", "antigravity"),
                                    (layer["class_name"], MARKER), ("TorchModuleWrapper", "keras.layers")])  # fmt: skip
        layer.update(class_name=name, module=module)
        layer["config"].update(function={"class_name": "__lambda__", "config": {"value": "eA=="}}, units=40_000)
        return f"a layer is {module}.{name}", with_description(json.dumps(description).encode())

    def describe_at_random(content: bytes, draw: Draw) -> tuple[str, bytes]:
        what, changed = draw.choice([flip, cut, insert])(described, draw)
        return f"description: {what}", with_description(changed)

    def other_weights(content: bytes, draw: Draw) -> tuple[str, bytes]:
        file = io.BytesIO(stored)
        with h5py.File(file, "r+") as weights:
            name = draw.choice(datasets)
            old = weights[name][()]
            cases: dict[str, dict[str, Any]] = {
                "huge": {"shape": (60_000, 60_000), "dtype": "f4"},
                "huge and compressed": {
                    "shape": (60_000, 60_000), "dtype": "f4", "chunks": (20_000, 20_000), "compression": "gzip",
                },
                "compressed": {"data": old, "compression": "gzip"},
                "f8": {"data": old.astype("f8")},
                "f2": {"data": old.astype("f2")},
                "NaN": {"data": old * np.nan},
                "text": {"data": np.full(old.shape, "text", object), "dtype": h5py.string_dtype()},
                "empty": {"data": h5py.Empty("f4")},
                "external": {"shape": old.shape, "dtype": "f4", "external": [("/dev/zero", 0, old.nbytes)]},
            }  # fmt: skip
            what = draw.choice([*cases, "missing", "soft link", "external link"])
            del weights[name]
            if what in cases:
                weights.create_dataset(name, **cases[what])
            elif what != "missing":
                weights[name] = h5py.SoftLink("/a") if what == "soft link" else h5py.ExternalLink("/dev/zero", "/a")
        return f"{name} is {what}", with_weights(file.getvalue())

    def flip_between(content: bytes, draw: Draw) -> tuple[str, bytes]:
        """Flip bits of what HDF5 writes about the values, a hundredth of the file."""
        changed, places = bytearray(content), list[int]()
        while len(places) < draw.choice([1, 1, 2, 5]):
            place = draw.randrange(len(content))
            if not any(place in each for each in values):
                changed[place] ^= 1 << draw.randrange(8)
                places.append(place)
        return f"bits flipped at {places}", bytes(changed)

    def other_attribute(content: bytes, draw: Draw) -> tuple[str, bytes]:
        file = io.BytesIO(content)
        with h5py.File(file, "r+") as changed:
            group, name = draw.choice([
                ("/", "model_config"), ("model_weights", "layer_names"), ("model_weights/conv1", "weight_names"),
                ("model_weights/dense1", "weight_names"), ("model_weights/pool", "weight_names"),
            ])  # fmt: skip
            cases: dict[str, Any] = {
                "a number": 7, "numbers": np.arange(2.0), "empty": h5py.Empty("S8"), "bytes": np.void(b"\0\1"),
                "one text": "conv1/kernel", "others": ["conv2/kernel", "/"], "odd": [b"..", b"."], "no text": np.array([], "S1"),
                "many": np.full(60_000, b"a"), "long": "x" * 60_000, "nowhere": ["a", "b"], "a table": np.full((2, 2), b"a"),
                "any length": np.array(["conv1/kernel", "x" * 10_000], h5py.string_dtype()), "not UTF-8": np.array([b"\xff"] * 2),
                "references": changed["model_weights"].ref,
            }  # fmt: skip
            what = draw.choice([*cases, "missing"])
            del changed[group].attrs[name]
            if what in cases:
                changed[group].attrs[name] = cases[what]
        return f"{name} of {group} is {what}", file.getvalue()

    def read(path: Path) -> Any:
        return load_keras(path).get_weights()

    def right(found: Any, expected: Any) -> bool:
        """Only an archive has a checksum: otherwise any finite weights of the right shapes are right."""
        return (
            same(found, expected)
            if zipped
            else all(
                one.shape == other.shape and one.dtype == other.dtype and np.isfinite(one).all()
                for one, other in zip(found, expected, strict=True)
            )
        )

    changes: list[Change] = [redescribe, redescribe, other_layer, describe_at_random, other_weights, other_weights]
    changes += ZIP_CHANGES if zipped else [flip, cut, insert, *[flip_between] * 4, *[other_attribute] * 3]
    return Reader(original, changes, read, (UserError,), f"file{suffix}", right)


def keras_h5(folder: Path) -> Reader:
    return keras(folder, ".h5")


def idx(folder: Path) -> Reader:
    from torchvision.datasets import MNIST

    from mnist_lit import UserError
    from mnist_lit.data import MNISTDataModule
    from mnist_lit.storage import mnist_files

    draw = np.random.default_rng(0)
    contents = {}
    for prefix, count in (("train", 200), ("t10k", 50)):
        pixels, labels = draw.integers(0, 256, count * 784, np.uint8), np.arange(count, dtype=np.uint8) % 10
        contents[f"{prefix}-images-idx3-ubyte"] = struct.pack(">4i", 2051, count, 28, 28) + pixels.tobytes()
        contents[f"{prefix}-labels-idx1-ubyte"] = struct.pack(">2i", 2049, count) + labels.tobytes()
    # Small files in place of MNIST's, which not every machine has; there is no mirror.
    mnist_files.RAW_FILES = {
        name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()
    }
    MNIST.mirrors = []
    name = "train-labels-idx1-ubyte"

    def compressed(content: bytes, draw: Draw) -> tuple[str, bytes]:
        what, changed = draw.choice([flip, flip, cut, insert])(gzip.compress(content), draw)
        return f"gz: {what}", changed

    def misnumbered(content: bytes, draw: Draw) -> tuple[str, bytes]:
        number = draw.choice([0, 2**31 - 1, 2**32 - 1, 10**6])
        place = draw.choice([0, 4])
        return f"number {place} is {number}", content[:place] + number.to_bytes(4, "big") + content[place + 4 :]

    def expanding(content: bytes, draw: Draw) -> tuple[str, bytes]:
        what = draw.choice(["expands", "is followed by what expands", "is followed by zeros", "has empty members"])
        one = gzip.compress(content)
        return f"gz: {what}", {
            "expands": lambda: gzip.compress(bytes(2**28), 1)[:1000],
            "is followed by what expands": lambda: one + gzip.compress(bytes(2**24), 1),
            "is followed by zeros": lambda: one + bytes(10**7),
            "has empty members": lambda: gzip.compress(b"") * 100 + one,
        }[what]()

    def read(path: Path) -> Any:
        raw = path.parent / "data" / "MNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for other, content in contents.items():
            (raw / other).write_bytes(content)
        (raw / f"{name}.gz").unlink(missing_ok=True)
        changed = path.read_bytes()
        if changed[:2] == b"\x1f\x8b":
            (raw / name).unlink()
            (raw / f"{name}.gz").write_bytes(changed)
        else:
            (raw / name).write_bytes(changed)
        data = MNISTDataModule(dir=str(path.parent / "data"), source="mnist")
        data.prepare_data()
        data.setup()
        return [data.train_images, data.train_labels, data.test_images, data.test_labels]

    changes: list[Change] = [flip, cut, insert, misnumbered, compressed, compressed, expanding]
    return Reader(contents[name], changes, read, (UserError,), name)


def picture(folder: Path) -> Reader:
    """A picture has no checksum for all of its pixels: any image of the right form is right."""
    from PIL import Image

    from mnist_lit.inference.images import ImageError, prepare

    ink = np.zeros((60, 60), np.uint8)
    ink[10:50, 25:35] = 255
    sources = {}
    for format, mode in (("PNG", "L"), ("PNG", "RGBA"), ("JPEG", "RGB"), ("BMP", "RGB"), ("TIFF", "L"), ("TIFF", "I;16"),
                         ("WEBP", "RGB"), ("PNG", "P"), ("GIF", "P"), ("AVIF", "RGB"), ("JPEG2000", "L")):  # fmt: skip
        image = Image.fromarray(ink).convert("L" if mode == "I;16" else mode)
        file = io.BytesIO()
        if mode == "I;16":
            image = Image.fromarray(ink.astype(np.uint16) * 257)
        image.save(file, format, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0") if (
            format in ("PNG", "JPEG", "WEBP")
        ) else image.save(file, format)
        sources[f"{format} {mode}"] = file.getvalue()

    def of(change: Change) -> Change:
        def changed(content: bytes, draw: Draw) -> tuple[str, bytes]:
            name = draw.choice([*sources])
            what, result = change(sources[name], draw)
            return f"{name}: {what}", result

        return changed

    def resized(content: bytes, draw: Draw) -> tuple[str, bytes]:
        """Another width or height, with the checksum that goes with it."""
        header = bytearray(sources["PNG L"])
        number = draw.choice([0, 1, 5000, 2**16, 2**31 - 1, 2**32 - 1])
        place = draw.choice([16, 20])
        header[place : place + 4] = number.to_bytes(4, "big")
        header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
        return f"PNG of {number} at {place}", bytes(header)

    def with_chunk(content: bytes, draw: Draw) -> tuple[str, bytes]:
        kind, text = draw.choice([b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"acTL", b"abCd"]), bytes(2**26)
        data = draw.choice([
            draw.randbytes(50), b"key\0\0" + zlib.compress(text), b"key\0" + bytes(2**20), b"II*\0" + draw.randbytes(2000)
        ])  # fmt: skip
        chunk = len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        png = sources[draw.choice(["PNG L", "PNG RGBA", "PNG P"])]
        return f"{kind!r} of {len(data)} bytes", png[:33] + chunk * draw.choice([1, 20]) + png[33:]

    def read(path: Path) -> Any:
        return prepare(path)

    def right(found: Any, expected: Any) -> bool:
        return found.shape == (28, 28) and found.dtype == np.uint8

    changes = [of(flip), of(flip), of(flip), of(cut), of(insert), resized, with_chunk]
    return Reader(sources["PNG L"], changes, read, (ImageError,), "picture", right, 2000)


READERS = {"checkpoint": checkpoint, "keras": keras, "keras_h5": keras_h5, "idx": idx, "picture": picture}


# Watching


class Watch:
    """Notices in this process what no reader may do; it cannot be taken back."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, list[str]()
        self.known = {name.partition(".")[0] for name in sys.modules} | {"encodings"}
        sys.addaudithook(self.notice)

    def notice(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "import" and arguments[0].partition(".")[0] not in self.known:
            self.seen.append(f"import {arguments[0][:60]}")
        elif event in ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect",
                       "webbrowser.open", "ctypes.dlopen"):  # fmt: skip
            self.seen.append(event)
        elif (
            event == "open"
            and isinstance(arguments[0], str)
            and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            and self.folder not in Path(arguments[0]).absolute().parents
            and arguments[0] != os.devnull
        ):
            self.seen.append(f"open {arguments[0][:60]} to write")

    def take(self) -> str:
        seen, self.seen[:] = [*self.seen], []
        # importlib.import_module, unlike the statement, has no event.
        for name in [name for name in sys.modules if name.partition(".")[0] not in self.known]:
            seen.append(f"import {name}")
            del sys.modules[name]  # so that the next import is noticed too
        if (executed := self.folder / "executed").exists():
            executed.unlink()
            seen.append("executed")
        return ", ".join(seen)


def memory_ran_out(error: BaseException | None) -> bool:
    while error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "enough memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def memory(field: str) -> int:
    """One of this process's figures in bytes: VmRSS now, VmHWM at most, VmData in all."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def judge(reader: Reader, path: Path, expected: Any) -> tuple[str, str]:
    try:
        found = reader.read(path)
    except reader.refusal as error:
        lines = "of several lines: " if "\n" in str(error) else ""
        return ("exception" if lines else "over memory" if memory_ran_out(error) else "refused"), f"{lines}{error}"
    except Exception as error:  # noqa: BLE001
        return ("over memory" if memory_ran_out(error) else "exception"), f"{type(error).__name__}: {error}"
    return ("accepted right" if reader.right(found, expected) else "accepted wrong"), ""


def child(name: str, numbers: range, seed: int, pipe: int) -> None:
    """Write a line for the beginning and one for the outcome of each change."""
    with tempfile.TemporaryDirectory() as place, os.fdopen(pipe, "w") as out:
        folder = Path(place)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        (folder / f"{MARKER}.py").write_text(
            "open('executed', 'w')\ndef run(*_, **__): open('executed', 'w')\nclass Net: ...\n"
        )
        warnings.simplefilter("ignore")
        reader = READERS[name](folder)
        path = folder / reader.name
        path.write_bytes(reader.original)
        expected = reader.read(path)
        assert reader.right(expected, expected)
        for content in (b"", b"text", reader.original[:-1]):  # so that what is needed for a refusal is imported
            path.write_bytes(content)
            judge(reader, path, expected)
        watch, most = Watch(folder), memory("VmData") + HARD_MEGABYTES * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        for number in numbers:
            draw = random.Random(f"{seed}/{number}")
            what, content = draw.choice(reader.changes)(reader.original, draw)
            path.write_bytes(content)
            before = memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
            print(json.dumps([number, what]), file=out, flush=True)
            watch.take()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)  # which ends the process, in whatever code it is
            outcome, reason = judge(reader, path, expected)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if (taken := (memory("VmHWM") - before) / 2**20) > reader.megabytes:
                outcome, reason = "over memory", f"{taken:.0f} MB; {outcome} {reason}"
            if seen := watch.take():
                outcome, reason = "code run", f"{seen}; {outcome} {reason}"
            print(json.dumps([outcome, " ".join(reason.split())[:300]]), file=out, flush=True)


def fuzz(name: str, count: int, seed: int = 0) -> list[tuple[int, str, str, str]]:
    """Change the file ``count`` times; a row for each: its number, what was changed, the outcome and why."""
    rows: list[tuple[int, str, str, str]] = []
    while len(rows) < count:
        incoming, outgoing = os.pipe()
        process = os.fork()
        if not process:
            os.close(incoming)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print about what they find
            code = 1
            try:
                child(name, range(len(rows), count), seed, outgoing)
                code = 0
            except Exception:  # noqa: BLE001
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(outgoing)
        with os.fdopen(incoming) as lines:
            begun = None
            for line in map(json.loads, lines):
                if begun:
                    rows.append((*begun, *line))
                begun = None if begun else line
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if begun:  # and not ended
            rows.append((*begun, "over time" if code == -signal.SIGALRM else "exception", f"it ended with {code}"))
        elif code:
            raise RuntimeError(f"the process that reads ended with {code}")
    return rows


def main(name: str, count: int = 1000, seed: int = 0) -> None:
    if name not in READERS:
        sys.exit(f"{name}: one of {', '.join(READERS)}")
    rows = fuzz(name, count, seed)
    for number, what, outcome, reason in rows:
        if outcome not in GOOD:
            print(f"{number} ({what}): {outcome}: {reason}")
    counts = Counter(outcome for _, _, outcome, _ in rows)
    for outcome in OUTCOMES:
        print(f"{outcome:>15} {counts[outcome]:6,}")
    sys.exit(any(outcome not in GOOD for outcome in counts))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "", *(int(argument) for argument in sys.argv[2:]))
