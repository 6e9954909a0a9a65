"""Atomic file writes."""

import stat
from pathlib import Path

import pytest

from mnist_lit.storage.atomic import WriteError, atomic_path, atomic_write
from mnist_lit.storage.runs import write_json


def test_a_write_that_fails_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(WriteError, match="something"), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise OSError("something")
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"] and path.read_text() == "before"


def test_a_write_that_ends_well_replaces_with_the_usual_permissions(tmp_path: Path) -> None:
    path, usual = tmp_path / "file.txt", tmp_path / "usual.txt"
    path.write_text("before")
    usual.write_text("")
    with atomic_path(path) as temporary:
        assert temporary.suffix == ".txt"
        temporary.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


def test_the_process_keeps_its_umask_while_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise what another thread creates at that moment could be written by anyone."""
    monkeypatch.setattr("os.umask", None)
    atomic_write(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_json_has_null_where_a_number_is_none(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"loss": float("nan"), "acc": 0.5, "n": 1})
    assert (tmp_path / "x.json").read_text() == '{\n  "loss": null,\n  "acc": 0.5,\n  "n": 1\n}\n'
