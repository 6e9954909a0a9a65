"""Pictures in a folder for each class: the same images as the files', split, named, trained on and tested again."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, results
from PIL import Image

from mnist_lit import UserError, image_folder
from mnist_lit.cli.config import settings
from mnist_lit.evaluate import evaluate
from mnist_lit.image_folder import ImageFolderDataModule
from mnist_lit.predict import predict
from mnist_lit.storage import runs
from mnist_lit.train import train


def write(folder: Path, images: torch.Tensor, labels: torch.Tensor, ending: str = "png") -> Path:
    """A picture for each image, in a folder for each label."""
    for number, (image, label) in enumerate(zip(images.numpy(), labels.tolist(), strict=True)):
        path = folder / str(label) / f"{number}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def set_up(folder: Path, **options: Any) -> ImageFolderDataModule:
    data = ImageFolderDataModule(str(folder), **options)
    data.prepare_data()
    data.setup()
    return data


def in_order(images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """As a folder has them: by their label, and then as they were."""
    order = labels.argsort(stable=True)
    return [images[order], labels[order]]


@pytest.mark.parametrize(
    ("train_in", "test_in"),
    [("train", "test"), ("training", "testing"), ("Train", "TEST"), ("trainingSet/trainingSet", "testing/testing")],
)
def test_pictures_of_28x28_are_the_images_to_the_last_bit(train_in: str, test_in: str, sample, tmp_path: Path) -> None:
    expected = []
    for place, images, labels in (
        (train_in, sample.train_images[::10], sample.train_labels[::10]),
        (test_in, sample.test_images[::10], sample.test_labels[::10]),
    ):
        write(tmp_path / place, images, labels)
        expected += in_order(images, labels)
    write(tmp_path / "valid", 255 - sample.test_images[:3], sample.test_labels[:3])  # not read
    (tmp_path / train_in / ".ipynb_checkpoints").mkdir()
    (tmp_path / train_in / "3" / "Thumbs.db").write_bytes(b"no picture")
    (tmp_path / train_in / "3" / "._1.png").write_bytes(b"no picture")
    data = set_up(tmp_path)
    assert_same([data.train_images, data.train_labels, data.test_images, data.test_labels], expected)
    assert data.facts["classes"] == sorted({str(n) for n in range(10)})
    assert [data.facts[key] for key in ("name", "train", "val", "test")] == ["image_folder", 400, 0, 100]
    assert data.facts["sha256"] == set_up(tmp_path).facts["sha256"]
    split = set_up(tmp_path, val_size=50)
    assert (len(split.train_labels), len(split.val_labels), split.facts["sha256"]) == (350, 50, data.facts["sha256"])


def test_dark_on_light_is_inverted_and_other_sizes_are_prepared(sample, tmp_path: Path) -> None:
    some = slice(0, None, 100)
    images, labels = in_order(sample.train_images[some], sample.train_labels[some])
    write(tmp_path / "1" / "train", 255 - images, labels)
    write(tmp_path / "1" / "test", images, labels)
    data = set_up(tmp_path / "1")
    assert_same(data.train_images, data.test_images)

    large = torch.from_numpy(np.kron(images.numpy(), np.ones((1, 4, 4), np.uint8)))
    write(tmp_path / "2" / "train", 255 - large, labels, "jpg")
    write(tmp_path / "2" / "test", images, labels)
    data = set_up(tmp_path / "2")
    difference = (data.train_images.float() - data.test_images.float()).abs().mean(dim=(1, 2))
    assert data.train_images.shape == (40, 28, 28) and difference.median() < 12  # and 30 between neighbours
    assert_same(data.train_labels, data.test_labels)


@pytest.mark.parametrize("place", [".", "train"])
def test_without_a_test_folder_a_fifth_of_each_class_is_held_out_whatever_the_seed(
    place: str, sample, tmp_path: Path
) -> None:
    write(tmp_path / place, sample.test_images, sample.test_labels)
    one, other = set_up(tmp_path), set_up(tmp_path, seed=1)
    assert one.test_labels.bincount().tolist() == [20] * 10 and one.train_labels.bincount().tolist() == [80] * 10
    assert_same(one.test_images, other.test_images)
    together = torch.cat([one.train_images, one.test_images]).flatten(1)
    assert sorted(map(bytes, together.numpy())) == sorted(map(bytes, sample.test_images.flatten(1).numpy()))


@pytest.mark.parametrize("place", [".", "train"])
def test_a_class_may_be_called_train_or_test(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "data" / place
    for label, name in enumerate(("bus", "test", "train")):
        write(folder, torch.zeros(5, 28, 28, dtype=torch.uint8), torch.full((5,), label))
        (folder / str(label)).rename(folder / name)
    assert set_up(tmp_path / "data").facts["classes"] == ["bus", "test", "train"]


def test_a_picture_beside_the_classes_is_left_out(sample, tmp_path: Path) -> None:
    for part in ("train", "test"):
        write(tmp_path / part, sample.test_images[::10], sample.test_labels[::10])
        shutil.copy(next((tmp_path / part).glob("*/*")), tmp_path / part / "preview.png")
    assert len(set_up(tmp_path).train_labels) == 100


def test_classes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("10", "9", "b", "a10", "a2", "²"):
        write(tmp_path / name, torch.zeros(5, 28, 28, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64))
        for file in (tmp_path / name / "0").iterdir():
            file.rename(tmp_path / name / file.name)
    assert set_up(tmp_path).facts["classes"] == ["9", "10", "a2", "a10", "b", "²"]


def test_31_what_cannot_be_read_is_left_out_and_named_with_the_count(sample, tmp_path: Path, caplog) -> None:
    write(tmp_path, sample.test_images, sample.test_labels)
    bad = sorted((tmp_path / "7").iterdir())[:7]
    for file in bad:
        file.write_bytes(file.read_bytes()[:60])
    blank = tmp_path / "7" / "0.png"
    Image.new("L", (90, 90)).save(blank)
    data = set_up(tmp_path)
    assert data.facts["train"] + data.facts["test"] == 993
    (message,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert message.startswith(
        f"left out, since 8 of the 1,001 pictures in {tmp_path} cannot be read: {blank} is blank; "
    )
    assert "is damaged (" in message and message.endswith("; ...") and "\n" not in message
    for file in (tmp_path / "7").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"101 of the 1,001 pictures in .*; no others are in 7$"):
        set_up(tmp_path)


def test_31_a_picture_that_cannot_be_prepared_is_left_out(
    sample, tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "train", sample.test_images[::25], sample.test_labels[::25])
    odd = next((tmp_path / "train" / "7").glob("*.png"))
    pixels = image_folder._pixels
    monkeypatch.setattr(image_folder, "_pixels", lambda path: pixels(path) if path != odd else 1 // 0)
    data = set_up(tmp_path)
    assert len(data.train_labels) + len(data.test_labels) == 39
    assert f"{odd} cannot be prepared (ZeroDivisionError: " in caplog.text


def test_other_folders_are_refused_with_what_they_should_be_like(sample, tmp_path: Path) -> None:
    few = sample.test_images[::33], sample.test_labels[::33]

    def refusal() -> str:
        with pytest.raises(UserError) as refused:
            set_up(tmp_path / "data")
        return str(refused.value)

    assert refusal() == f"data.dir={tmp_path / 'data'}: there is no such folder"
    layout = "takes DIR/train/CLASS/*.png and DIR/test/CLASS/*.png, or DIR/CLASS/*.png"
    (tmp_path / "data").mkdir()
    assert layout in refusal()
    write(tmp_path / "data" / "mnist_png" / "training", *few)  # one level too high
    assert layout in refusal()
    shutil.move(tmp_path / "data" / "mnist_png" / "training", tmp_path / "data" / "test")
    assert refusal() == f"{tmp_path / 'data'} has test/, but no folder train or training for the training"
    write(tmp_path / "data" / "train", *few)
    (tmp_path / "data" / "test" / "0").rename(tmp_path / "data" / "test" / "zero")
    assert refusal() == f"{tmp_path / 'data' / 'test'} has classes that {tmp_path / 'data' / 'train'} lacks: zero"


@pytest.fixture
def pictures(sample, tmp_path: Path) -> Path:
    """Digits whose classes have names."""
    folder = tmp_path / "pictures"
    write(folder / "train", sample.train_images[::10], sample.train_labels[::10])
    write(folder / "test", sample.test_images[::10], sample.test_labels[::10])
    for each in folder.glob("*/*"):
        each.rename(each.with_name(f"digit {each.name}"))
    return folder


def test_it_is_trained_on_resumed_and_evaluated_with_the_names_of_its_classes(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["data=image_folder", "data.dir=pictures", "data.batch_size=100", "trainer.accelerator=cpu"]
    run, names = (
        tmp_path / "run",
        [f"digit {n}" for n in sorted({int(each.name[-1]) for each in pictures.glob("train/*")})],
    )
    values = settings("train", *asked, "trainer.max_epochs=1")
    train(run, **values)
    longer = settings("train", *asked, "trainer.max_epochs=2")
    assert train(run, **{**longer, "resume": run / runs.LAST})["epochs"] == 2
    assert [row["name"] for row in results(run)["test/digits"]] == names
    assert torch.load(run / runs.LAST, weights_only=True)["data"][0]["classes"] == names
    assert names[1] in (run / "report.html").read_text()

    (tmp_path / "later").mkdir()
    monkeypatch.chdir(tmp_path / "later")
    again = evaluate("test", **settings("evaluate", f"ckpt={run}", "data=image_folder", "trainer.accelerator=cpu"))
    assert again["test/confusion_matrix"] == results(run)["test/confusion_matrix"]
    shutil.copytree(next((pictures / "test").glob("*7")), tmp_path / "two" / "seven")
    shutil.copytree(next((pictures / "test").glob("*3")), tmp_path / "two" / "three")
    with pytest.raises(UserError, match="the classes of these data are not those that"):
        others = f"ckpt={run}", "data=image_folder", f"data.dir={tmp_path}/two", "trainer.accelerator=cpu"
        evaluate("other", **settings("evaluate", *others))
    (row,) = predict(next((pictures / "test").glob("*7/*")), run, preprocess="none")
    assert row["name"] == names[row["digit"]]

    next((pictures / "train").glob("*/*")).unlink()
    still_longer = settings("train", *asked, "trainer.max_epochs=3")
    with pytest.raises(UserError, match="was trained on other data"):
        train(
            run, **{**still_longer, "data": {**still_longer["data"], "dir": str(pictures)}, "resume": run / runs.LAST}
        )


def test_more_classes_than_the_network_has_outputs_are_refused(pictures: Path, tmp_path: Path) -> None:
    for n in range(3):
        shutil.copytree(pictures / "train" / "digit 1", pictures / "train" / f"letter {n}")
    asked = ["data=image_folder", f"data.dir={pictures}", "trainer.accelerator=cpu", "trainer.max_epochs=1"]
    with pytest.raises(
        UserError, match=r"have a class 1\d, counted from 0, and the network has fewer outputs: model=mlp"
    ):
        train(tmp_path / "run", **settings("train", *asked))
    train(tmp_path / "mlp", **settings("train", *asked, "model=mlp", "model.classes=13"))
