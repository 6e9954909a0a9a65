"""Predictions for image files, as a function and as a command; the numbers are the rows of docs/faults.md."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command
from helpers import ROOT
from pictures import row_of, two
from PIL import Image

from mnist_lit import UserError, predict
from mnist_lit.inference.trained import load
from mnist_lit.predict import COLUMNS, _load_batch, _shown, find_images, skipped
from mnist_lit.predict import predict as predict_images


@pytest.fixture
def scans(digits, tmp_path: Path) -> Path:
    """Twelve digits as files, some in a subfolder, beside files that are not images."""
    folder = tmp_path / "scans (1), mine"
    (folder / "more").mkdir(parents=True)
    for n in range(12):
        place = folder / "more" if n % 3 == 0 else folder
        Image.fromarray(digits[0][n]).save(place / f"{n:02}.{('png', 'tif', 'bmp')[n % 3]}")
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_text("not an image")
    return folder


def number_of(row: dict) -> int:
    return int(Path(row["file"]).stem)


def test_rows_have_the_networks_own_probabilities(good_run: Path, digits, scans: Path) -> None:
    rows = predict_images(scans, good_run)
    assert sorted(map(number_of, rows)) == list(range(12))
    with torch.inference_mode():
        expected = load(good_run)(torch.from_numpy(digits[0][:12]).unsqueeze(1) / 255)
    for row in rows:
        assert tuple(row) == COLUMNS and row["error"] is None
        probabilities = [row[f"p{digit}"] for digit in range(10)]
        assert probabilities == pytest.approx(expected[number_of(row)].tolist(), abs=2e-6)
        assert row["digit"] == int(np.argmax(probabilities)) and row["probability"] == max(probabilities)


def test_two_digits_in_a_picture_are_refused_unless_asked_for(good_run: Path, clear, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    Image.fromarray(two((clear[0][0], clear[0][-1]), random).clip(0, 255).astype(np.uint8)).save(tmp_path / "two.png")
    (row,) = predict_images(tmp_path / "two.png", good_run)
    assert row["error"] == "shows two shapes side by side instead of one digit" and row["digit"] is None
    (row,) = predict_images(tmp_path / "two.png", good_run, refuse=False)
    assert row["error"] is None and row["digit"] in clear[1][[0, -1]]


def test_many_images_read_by_worker_processes_give_the_same_rows(
    good_run: Path, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (scans / "broken.png").write_text("no image")
    here = predict_images(scans, good_run)
    monkeypatch.setattr(predict, "MIN_PARALLEL", 2)
    monkeypatch.setattr(predict, "BATCH_SIZE", 5)
    there = predict_images(scans, good_run)
    for one, other in zip(here, there, strict=True):
        assert one["file"] == other["file"] and one["error"] == other["error"]
        assert one["probability"] == pytest.approx(other["probability"], abs=2e-6)
    assert sum(row["error"] is not None for row in there) == 1


def test_files_folders_and_patterns_each_image_once(scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scans)
    shutil.copy("01.tif", "[1].tif")
    found = list(find_images(["[1].tif", "0?.bmp", "more/", "more/00.png", "*.xyz", "nowhere.png", "m*"]))
    assert found == [
        ("[1].tif", ""),
        *((f"0{n}.bmp", "") for n in (2, 5, 8)),
        *((f"more/0{n}.png", "") for n in (0, 3, 6, 9)),
        ("*.xyz", "no file matches this pattern"),
        ("nowhere.png", "no such file"),
    ]
    assert len(list(find_images(["**/*"]))) == 14  # files that a pattern names are tried whatever their suffix
    (scans / "empty").mkdir()
    ((_, error),) = find_images(["empty"])
    assert error.startswith("this folder has no images (.png, ")


def test_hidden_folders_are_left_out_and_standard_input_is_read_once(good_run: Path, scans: Path) -> None:
    (scans / ".thumbs").mkdir()
    shutil.copy(scans / "01.tif", scans / ".thumbs" / "01.tif")
    np.save(scans / "images.npy", np.zeros((2, 28, 28)))
    assert not [file for file, _ in find_images([scans]) if ".thumbs" in file]
    reasons = {Path(file).name: reason for file, reason in skipped([scans])}
    assert reasons["01.tif"] == "is hidden" and reasons["images.npy"].startswith("is an array file")
    assert list(find_images(["-", "-"])) == [("-", "")]
    with pytest.raises(UserError, match="images= is empty"):
        predict_images([], good_run)


def test_labels_beside_images_are_no_images(tmp_path: Path) -> None:
    images, one_hot = np.zeros((20, 28, 28), np.uint8), np.eye(20, 10)
    np.savez(tmp_path / "d.npz", x=images, y=one_hot, mean=images[0])
    found = [file.rpartition("/")[2] for file, _ in find_images([tmp_path / "d.npz"])]
    assert found == [*(f"d.npz:x[{n}]" for n in range(20)), "d.npz:mean[0]"]


def test_27_what_is_in_the_way_is_refused_unless_it_may_be_overwritten(good_run: Path, scans: Path) -> None:
    (scans / "old.csv").write_text("mine")
    (scans / "old.png").write_text("mine")
    for values, sentence in (
        ({"output": scans / "old.csv"}, "exists already"),
        ({"contact_sheet": scans / "old.png"}, "exists already"),
        ({"output": scans / "new.xlsx"}, "must end in .csv or .json"),
        ({"output": scans / "nowhere" / "new.csv"}, "there is no folder"),
        ({"images": scans / "nowhere.png"}, "nowhere.png: no such file"),
        ({"images": [str(scans / "*.gif"), str(scans / "x.png")]}, "no file matches this pattern; .*no such file"),
        ({"ckpt": scans / "nowhere"}, "there is no such checkpoint or run"),
    ):
        with pytest.raises(UserError, match=sentence):
            predict_images(**{"images": scans, "ckpt": good_run, **values})  # type: ignore[arg-type]
    assert (scans / "old.csv").read_text() == (scans / "old.png").read_text() == "mine"
    predict_images(scans / "01.tif", good_run, scans / "old.csv", overwrite=True)
    assert (scans / "old.csv").read_text().startswith("file,digit,probability,p0,")


def test_31_predict_as_a_command_with_good_and_bad_images(
    good_run: Path, digits, scans: Path, command: Command
) -> None:
    (scans / "cut.png").write_bytes((scans / "more" / "00.png").read_bytes()[:100])
    (scans / "text.png").write_text("hello")
    Image.new("L", (300, 300), "white").save(scans / "blank.png")
    arguments = [f"ckpt={good_run}", "images=scans (1), mine", "contact_sheet=sheet.png"]
    verb, folder = "predict", scans.parent
    before = {path.name for path in folder.iterdir()}
    done = command(*arguments, "output=result 1.csv", cwd=folder, verb=verb)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stdout == "result 1.csv: 12 images\n"
    skipped = [line for line in done.stderr.splitlines() if "skipped" in line]
    assert skipped == [
        "scans (1), mine/.hidden.png: skipped, is hidden",
        "scans (1), mine/notes.txt: skipped, has no image extension",
        "2 files skipped",
    ]
    summary, blank, cut, text = sorted({*done.stderr.splitlines()} - {*skipped})
    assert summary == "predict: 3 of 15 images could not be predicted"
    assert blank == "scans (1), mine/blank.png: is blank"
    assert cut.startswith("scans (1), mine/cut.png: is damaged (")
    assert (
        text == "scans (1), mine/text.png: is not an image in PNG, JPEG, BMP, TIFF, WEBP, GIF, AVIF or JPEG2000 format"
    )
    with (folder / "result 1.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 15
    for row in rows:
        assert (row["digit"] == "") == (row["p0"] == "") == (row["error"] != "")
    good = [row for row in rows if not row["error"]]
    assert sum(int(row["digit"]) == digits[1][number_of(row)] for row in good) >= 11
    assert Image.open(folder / "sheet.png").size[0] > 400
    # Nothing else is left behind, such as a folder of Hydra's.
    assert {path.name for path in folder.iterdir()} - before == {"result 1.csv", "sheet.png"}

    listed = command("images=['scans (1), mine/01.tif','scans (1), mine/more']", "output=r.json", f"ckpt={good_run}",
                     cwd=folder, verb=verb)  # fmt: skip
    assert listed.returncode == 0, listed.stderr
    assert [number_of(row) for row in json.loads((folder / "r.json").read_text())] == [1, 0, 3, 6, 9]

    shown = command("images=scans (1), mine/01.tif", f"ckpt={good_run}", cwd=folder, verb=verb)
    assert shown.stdout.startswith("scans (1), mine/01.tif: ") and shown.stdout.endswith("%)\n")


def test_it_starts_without_lightning_and_torchvision(good_run: Path, scans: Path) -> None:
    code = (
        "import sys; from mnist_lit.predict import main; main()\n"
        "print([n for n in ('lightning', 'torchvision', 'torchmetrics', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"images={scans}", f"ckpt={good_run}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert len(done.stdout.splitlines()) == 13


def test_what_is_skipped_in_a_folder_is_named(scans: Path) -> None:
    (scans / "folder.png").mkdir()
    (scans / "loop.png").symlink_to("loop.png")
    (scans / "gone.jpg").symlink_to("nowhere.jpg")
    (scans / "noending").write_text("")
    os.mkfifo(scans / "pipe.png")
    reasons = {Path(file).name: reason for file, reason in skipped([scans])}
    assert reasons == {
        ".hidden.png": "is hidden",
        "folder.png": "is a folder",
        "gone.jpg": "is a broken link",
        "loop.png": "is a broken link",
        "noending": "has no image extension",
        "notes.txt": "has no image extension",
        "pipe.png": "is not a regular file",
    }
    assert len(list(find_images([scans]))) == 12 and not list(skipped([scans / "01.tif", scans / "*.png"]))


def test_the_standard_input_is_an_image(good_run: Path, scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = predict_images(scans / "01.tif", good_run)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((scans / "01.tif").read_bytes())))
    (given,) = predict_images("-", good_run)
    assert given == {**file, "file": "-"}


def test_several_digits_are_read_from_left_to_right(good_run: Path, clear, tmp_path: Path) -> None:
    random, (images, labels) = np.random.default_rng(0), clear
    wanted = {}
    for number in range(40):
        chosen = random.choice(len(images), random.integers(1, 5))
        picture = row_of([images[each] for each in chosen], random).clip(0, 255).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
        wanted[number] = "".join(str(labels[each]) for each in chosen)
    rows = predict_images(tmp_path, good_run, segments=True, contact_sheet=tmp_path / "sheet.png")
    assert sum(row["digit"] == wanted[number_of(row)] for row in rows) >= 36
    assert all(tuple(row) == COLUMNS and row["p0"] is None for row in rows)
    (one,) = predict_images(tmp_path / "0.png", good_run, segments=True, refuse=False)
    assert 0 < one["probability"] <= 1
    with pytest.raises(UserError, match="needs preprocess=mnist"):
        predict_images(tmp_path, good_run, segments=True, preprocess="none")


@pytest.fixture
def arrays(digits, tmp_path: Path) -> Path:
    images, labels = digits[0][:6], digits[1][:6]
    np.save(tmp_path / "bytes.npy", images)
    np.save(tmp_path / "flat.npy", images.reshape(6, 784))
    np.save(tmp_path / "channels last.npy", images[..., None] / np.float32(255))
    np.save(tmp_path / "channels first.npy", images[:, None].astype(np.int64))
    np.save(tmp_path / "colour.npy", np.repeat(images[..., None], 3, axis=3))
    np.savez_compressed(tmp_path / "keras.npz", x_test=images, y_test=labels)
    return tmp_path


def test_arrays_of_images_are_predicted_one_by_one(good_run: Path, digits, arrays: Path) -> None:
    with torch.inference_mode():
        expected = load(good_run)(torch.from_numpy(digits[0][:6]).unsqueeze(1) / 255).argmax(1).tolist()
    for file in sorted(arrays.glob("*.np?")):
        rows = predict_images(file, good_run, refuse=False)
        array = ":x_test" if file.suffix == ".npz" else ""
        assert [row["file"] for row in rows] == [f"{file}{array}[{number}]" for number in range(6)]
        assert [row["digit"] for row in rows] == expected
    np.save(arrays / "one.npy", 255 - np.pad(digits[0][0], 20))
    (row,) = predict_images(arrays / "one.npy", good_run)
    assert row["digit"] == expected[0]


def test_arrays_that_cannot_be_read_say_why(good_run: Path, arrays: Path) -> None:
    np.save(arrays / "objects.npy", np.array([{}, None], dtype=object), allow_pickle=True)
    np.save(arrays / "labels.npy", np.arange(10))
    np.savez(arrays / "text.npz", a=np.array(["a", "b"]))
    (arrays / "cut.npz").write_bytes((arrays / "keras.npz").read_bytes()[:-30])
    (arrays / "cut.npy").write_bytes((arrays / "bytes.npy").read_bytes()[:-30])
    with zipfile.ZipFile(arrays / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (2**31, 28, 28)})
        file.write(bytes(2**20))
    for name, shape in (("many.npy", (2**40, 2, 2)), ("large.npy", (1, 2**20, 2**20))):  # files with holes
        np.lib.format.open_memmap(arrays / name, "w+", np.uint8, shape)
    with (
        zipfile.ZipFile(arrays / "negative.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (-1, 28, 28)})
        file.write(bytes(2**20))
    with zipfile.ZipFile(arrays / "bzip2.npz", "w", zipfile.ZIP_BZIP2) as archive, archive.open("x.npy", "w") as file:
        np.save(file, np.zeros((1, 28, 28), np.uint8))
    np.savez_compressed(arrays / "crowd.npz", *(np.zeros((600_000, 2, 2), np.uint8) for _ in range(2)))
    shutil.copy(arrays / "keras.npz", arrays / "zip.npy")
    os.mkfifo(arrays / "pipe.npy")
    reasons = {
        "many.npy": "has more than 1,000,000 images",
        "large.npy": "has 1,099,511,627,776 pixels, more than 80,000,000",
        "objects.npy": "is damaged",
        "labels.npy": "has no images",
        "text.npz": "has no images",
        "cut.npz": "is damaged",
        "cut.npy": "is damaged",
        "bomb.npz": r"is damaged \(an array of 1,683,627,180,032 bytes; at most 1,073,741,824 are read\)",
        "bzip2.npz": r"is damaged \(compressed otherwise than by NumPy\)",
        "negative.npz": r"is damaged \(the shape of an array is negative\)",
        "crowd.npz": "has more than 1,000,000 images",
        "zip.npy": "is damaged",
        "pipe.npy": "is not a regular file",
    }
    for name, reason in reasons.items():
        if name == "large.npy":
            assert predict_images(arrays / name, good_run)[0]["error"] == reason
            continue
        with pytest.raises(UserError, match=reason):
            predict_images(arrays / name, good_run)


def test_mutated_arrays_are_read_or_refused(arrays: Path) -> None:
    draw = np.random.default_rng(0)
    sources = [arrays / name for name in ("flat.npy", "colour.npy", "channels last.npy", "keras.npz")]
    for number in range(300):
        source = sources[number % 4]
        content = bytearray(source.read_bytes())
        for _ in range(draw.integers(1, 5)):
            content[draw.integers(len(content) if draw.random() < 0.3 else 128)] = draw.integers(256)
        file = arrays / f"mutated {number}{source.suffix}"
        file.write_bytes(content[: draw.integers(1, len(content))] if draw.random() < 0.2 else content)
        for name, error in find_images([file]):
            if not error:
                for _, digits, reason in _load_batch([name], "mnist", True, False):
                    assert bool(digits) != bool(reason) and "\n" not in reason
            assert "\n" not in error


def test_heic_is_read_with_its_package(good_run: Path, digits, tmp_path: Path, monkeypatch) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    page = Image.fromarray(255 - np.pad(digits[0][0], 30)).convert("RGB")
    page.save(tmp_path / "phone.heic", quality=95)
    page.save(tmp_path / "phone.png")
    heic, png = predict_images(tmp_path, good_run, refuse=False)
    assert heic["error"] is None and heic["digit"] == png["digit"]
    (tmp_path / "cut.heic").write_bytes((tmp_path / "phone.heic").read_bytes()[:300])
    (cut,) = predict_images(tmp_path / "cut.heic", good_run)
    assert cut["error"].startswith("is")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    (row,) = predict_images(tmp_path / "phone.heic", good_run)
    assert row["error"] == "is a HEIC image, which needs a package: pip install pillow-heif"


def test_arrays_of_other_numbers_and_beside_other_arrays(good_run: Path, digits, tmp_path: Path) -> None:
    images = digits[0][:4]
    colour = np.repeat(images[..., None], 3, axis=3)
    expected = [row["digit"] for row in predict_images(saved_array(tmp_path / "grey.npy", images), good_run)]
    others: dict[str, np.ndarray] = {
        "16 bit": colour.astype(np.uint16) * 257,
        "beyond one": colour / 255 * 1.02,
        "with NaN": np.where(np.arange(3) == 9, np.nan, colour / 255),
        "from -1": (colour / 127.5 - 1).astype(np.float32),
    }
    for name, array in others.items():
        rows = predict_images(saved_array(tmp_path / f"{name}.npy", array), good_run, refuse=False)
        assert [row["digit"] for row in rows] == expected, name
    np.savez(tmp_path / "named.npz", x=images, names=np.array([{}, None], dtype=object))
    np.savez(tmp_path / "odd names.npz", **{"": images[:1], "a.npy": images[1:2]})
    for name, count in (("named.npz", 4), ("odd names.npz", 2)):
        assert [row["digit"] for row in predict_images(tmp_path / name, good_run)] == expected[:count]
    (row,) = predict_images(saved_array(tmp_path / "one.npy", images[0][..., None]), good_run)
    assert row["digit"] == expected[0]


def saved_array(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def test_a_file_of_arrays_that_is_written_anew_is_read_anew(good_run: Path, digits, tmp_path: Path) -> None:
    for images in (digits[0][:3], digits[0][-3:]):
        np.savez(tmp_path / "d.npz", x=images)
        rows = predict_images(tmp_path / "d.npz", good_run)
        with torch.inference_mode():
            expected = load(good_run)(torch.from_numpy(images).unsqueeze(1) / 255).argmax(1).tolist()
        assert [row["digit"] for row in rows] == expected


def test_rows_are_in_the_order_of_the_images_those_that_are_missing_too(good_run: Path, scans: Path) -> None:
    asked = [scans / "nowhere.png", scans / "01.tif", "x" * 300, scans / "more" / "00.png"]
    rows = predict_images(list(map(str, asked)), good_run)
    assert [row["file"] for row in rows] == list(map(str, asked))
    assert [row["error"] for row in rows] == ["no such file", None, "no such file", None]


def test_a_picture_that_nobody_has_thought_of_costs_no_other_answers(
    good_run: Path, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mnist_lit.inference import images

    seen: list[np.ndarray] = []
    usual = images.to_mnist

    def odd(grey: np.ndarray, refuse: bool) -> np.ndarray:
        seen.append(grey)
        return usual(grey if len(seen) != 3 else grey / (1 // 0), refuse)

    monkeypatch.setattr(images, "to_mnist", odd)
    rows = predict_images(scans, good_run)
    assert [row["error"] for row in rows].count(None) == 11
    assert rows[2]["error"] == "cannot be prepared (ZeroDivisionError: integer division or modulo by zero)"


def test_links_to_folders_are_named_and_names_in_no_encoding_are_printed(
    good_run: Path, scans: Path, command: Command
) -> None:
    (scans / "linked").symlink_to(scans / "more")
    shutil.copy(scans / "01.tif", scans / os.fsdecode(b"\xff.tif"))
    assert (str(scans / "linked"), "is a link to a folder") in list(skipped([scans]))
    done = command(f"images={scans}", f"ckpt={good_run}", verb="predict", cwd=scans.parent)
    assert done.returncode == 0 and "\\udcff.tif: " in done.stdout, done


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, "a?[2J.png"), (False, "a\x1b[2J.png")])
def test_a_terminal_gets_no_name_that_it_would_obey_and_a_pipe_gets_all(
    is_terminal: bool, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    assert _shown("a\x1b[2J.png", sys.stdout) == shown
