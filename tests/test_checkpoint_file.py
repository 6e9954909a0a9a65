"""Checkpoint files: written atomically, refused when damaged; the numbers are the rows of docs/faults.md."""

import copy
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, assert_same, small

from mnist_lit import UserError
from mnist_lit.cli.resume import find
from mnist_lit.inference import trained
from mnist_lit.model import MNISTClassifier
from mnist_lit.network import TutorialCNN
from mnist_lit.storage import runs
from mnist_lit.storage.atomic import TEMPORARY, WriteError
from mnist_lit.storage.checkpoint_file import corruption, read_checkpoint
from mnist_lit.train import train
from mnist_lit.training.checkpoints import AtomicCheckpointIO


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run, tmp_path / "run")


def test_02_what_a_kill_left_half_written_is_cleaned_up(run: Path) -> None:
    for folder in (run, run / "checkpoints"):
        (folder / f"{TEMPORARY}x.ckpt").write_bytes(b"half")
    (run / "metrics.json").unlink()
    train(run, **{**small(), "resume": str(find(str(run), run.parent).start)})
    assert not list(run.rglob(f"{TEMPORARY}*"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk takes root")
def test_05_a_full_disk_says_what_is_needed_and_keeps_the_checkpoint_before(run: Path, tmp_path: Path) -> None:
    # Half again as much as a checkpoint: one fits, two do not. In a mount namespace of its own, which ends with it.
    size = int((run / runs.LAST).stat().st_size * 1.5)
    script = f"""
import sys, pathlib
sys.path.insert(0, {str(ROOT)!r})
import torch
from mnist_lit.training.checkpoints import AtomicCheckpointIO
from mnist_lit.storage.atomic import WriteError
path = pathlib.Path({str(tmp_path / "disk" / "last.ckpt")!r})
content = torch.load({str(run / runs.LAST)!r}, weights_only=True)
AtomicCheckpointIO().save_checkpoint(content, path)
before = path.read_bytes()
try:
    AtomicCheckpointIO().save_checkpoint(content, path)
except WriteError as error:
    print(error, path.read_bytes() == before, len(list(path.parent.iterdir())))
"""
    (tmp_path / "disk").mkdir()
    mount = f"mount -t tmpfs -o size={size} tmpfs '{tmp_path / 'disk'}' && exec '{sys.executable}' -c \"$0\""
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount, script], capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("this system does not let a test mount a disk")
    assert "disk full (12." in done.stdout and "MB needed" in done.stdout, done.stdout + done.stderr
    assert done.stdout.endswith("any previous file is unchanged True 1\n")


def test_06_a_folder_that_cannot_be_written_to_later_ends_the_run_loudly(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "run"
    original = MNISTClassifier.on_train_start

    def on_train_start(model: MNISTClassifier) -> None:
        original(model)
        shutil.rmtree(folder)
        folder.write_text("a file in place of the folder")

    monkeypatch.setattr(MNISTClassifier, "on_train_start", on_train_start)
    with pytest.raises(WriteError, match="cannot write"):
        train(folder, **small())


def test_07_a_checkpoint_cut_short_is_refused_and_the_newest_whole_one_named(run: Path) -> None:
    last = run / runs.LAST
    content = last.read_bytes()
    for length in (1, 100, len(content) // 2, len(content) - 1):
        last.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"damaged|not a checkpoint") as refused:
            find(str(run), run.parent)
        assert str(refused.value).endswith(f"the newest intact one: resume={run / runs.PREVIOUS}")
    (run / runs.PREVIOUS).write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match="this run has no intact checkpoint"):
        find(str(run), run.parent)


def test_07_one_flipped_bit_is_found_wherever_it_changes_anything(run: Path) -> None:
    last = run / runs.LAST
    content, draw, found = last.read_bytes(), random.Random(0), 0
    expected = read_checkpoint(last)["state_dict"]
    for _ in range(40):
        place = draw.randrange(len(content))
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        last.write_bytes(damaged)
        if corruption(last):
            found += 1
        else:  # the filling between two tensors
            state = read_checkpoint(last)["state_dict"]
            assert_same({key: state[key] for key in expected}, expected)
    assert found >= 39
    with zipfile.ZipFile(run / runs.PREVIOUS) as archive:  # PyTorch reads without a word what has other bits
        record = max(archive.infolist(), key=lambda each: each.file_size)
    damaged = bytearray((run / runs.PREVIOUS).read_bytes())
    damaged[record.header_offset + 1000] ^= 1
    (run / runs.PREVIOUS).write_bytes(damaged)
    torch.load(run / runs.PREVIOUS, weights_only=True)
    with pytest.raises(UserError, match="damaged"):
        AtomicCheckpointIO().load_checkpoint(run / runs.PREVIOUS)


def test_08_what_is_no_checkpoint_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("hello")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("a", "b")
    torch.save([1, 2], tmp_path / "list")
    torch.save({"state_dict": {}}, tmp_path / "weights")
    for name, reason in {
        "": "is a folder, not a checkpoint",
        "nowhere": "there is no such file",
        "empty": "is empty",
        "text": "is not a checkpoint",
        "zip": "is not a checkpoint",
        "list": "not a checkpoint of this project: it must be a valid dictionary",
        "weights": "has no hyper_parameters",
    }.items():
        with pytest.raises(UserError, match=reason) as refused:
            MNISTClassifier.load_from_checkpoint(tmp_path / name)
        assert "\n" not in str(refused.value)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_09_nothing_in_a_checkpoint_is_executed(run: Path, tmp_path: Path) -> None:
    content = torch.load(run / runs.LAST, weights_only=True)
    torch.save({**content, "extra": Payload(tmp_path / "executed")}, tmp_path / "pickle.ckpt")
    with pytest.raises(UserError, match="nothing was loaded"):
        MNISTClassifier.load_from_checkpoint(tmp_path / "pickle.ckpt")
    content["hyper_parameters"]["_instantiator"] = "os.abort"
    torch.save(content, tmp_path / "instantiator.ckpt")
    with pytest.raises(UserError, match="nothing was called"):
        MNISTClassifier.load_from_checkpoint(tmp_path / "instantiator.ckpt")
    assert not (tmp_path / "executed").exists()


def test_10_weights_of_another_architecture_are_refused_with_the_difference(run: Path, tmp_path: Path) -> None:
    content = torch.load(run / runs.LAST, weights_only=True)
    weights = content["state_dict"]
    weights["network.dense2.weight"] = torch.zeros(10, 128)
    weights["network.dense3.bias"] = weights.pop("network.dense1.bias")
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(UserError) as refused:
        MNISTClassifier.load_from_checkpoint(tmp_path / "other.ckpt")
    for part in (
        "missing network.dense1.bias",
        "network.dense2.weight (10, 128) instead of (10, 250)",
        "unexpected network.dense3.bias",
    ):
        assert part in str(refused.value)


def test_a_checkpoint_of_an_older_version_loads_with_the_same_outputs(run: Path, tmp_path: Path, sample: Any) -> None:
    content = torch.load(run / runs.LAST, weights_only=True)
    model, optimizer = content["hyper_parameters"]["model"], content["hyper_parameters"]["optimizer"]
    model["dropout"], optimizer["lr"] = 0.25, 0.5  # not the defaults
    expected_arguments = copy.deepcopy(content["hyper_parameters"])
    model["network"], model["compiled"] = model.pop("_target_"), model.pop("cpu_kernel")
    optimizer["name"] = optimizer.pop("_target_").removeprefix("torch.optim.")
    assert model.keys() == {"network", "dropout", "compiled"} and optimizer["name"] == "Adadelta"
    torch.save(content, tmp_path / "older.ckpt")

    images = next(iter(sample.test_dataloader()))[0]
    loaded: list[Any] = [load(tmp_path / "older.ckpt") for load in (trained.load, MNISTClassifier.load_from_checkpoint)]
    with torch.no_grad():
        expected = trained.load(run / runs.LAST)(images)
        for each in loaded:
            assert_same(each.eval()(images), expected)
            assert (type(each.network), each.network.dropout.p) == (TutorialCNN, 0.25)
    for each in loaded[1:]:
        assert dict(each.hparams) == expected_arguments  # so what is saved next has today's keys
        assert each.configure_optimizers().defaults["lr"] == 0.5


def test_11_a_checkpoint_made_on_a_gpu_loads_on_a_cpu(run: Path, tmp_path: Path) -> None:
    """What a GPU writes differs in one word, the place of each tensor; without a GPU that word is put in by hand."""
    path = tmp_path / "gpu.ckpt"
    with zipfile.ZipFile(run / runs.LAST) as source, zipfile.ZipFile(path, "w") as target:
        for record in source.infolist():
            content = source.read(record)
            if record.filename.endswith("data.pkl"):
                # The first is that of all tensors; later ones refer to it.
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0", 1)
            target.writestr(record.filename, content)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(path, weights_only=True)
    assert next(MNISTClassifier.load_from_checkpoint(path).parameters()).device.type == "cpu"
