"""Folders that are new, and files that are whole."""

import json
import os

import pytest

from programs.files import new_folder, printable, write_json, write_text, written_whole


def test_a_new_folder_is_made(tmp_path, monkeypatch):
    assert new_folder("run", tmp_path / "a" / "b").is_dir()
    assert new_folder("run", tmp_path / "a" / "b") == tmp_path / "a" / "b"  # empty still
    monkeypatch.chdir(tmp_path)
    first, second = new_folder("run", None), new_folder("run", None)
    assert first != second
    assert first.parent.name == "results"
    assert first.name.startswith("run-")


def test_what_is_no_new_folder_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "note.txt"):
        with pytest.raises(ValueError, match="already exists and is not an empty folder; nothing was changed there"):
            new_folder("run", out)
    with pytest.raises(ValueError, match="cannot be made: Not a directory"):
        new_folder("run", tmp_path / "note.txt" / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def write_half_of(path):
    with written_whole(path) as partial:
        partial.write_text("half")
        raise RuntimeError


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "values.json"
    write_json(path, {"µ": 1})
    with pytest.raises(TypeError):
        write_json(path, {"µ": object()})
    with pytest.raises(RuntimeError):
        write_half_of(path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"µ": 1}


def test_names_that_are_not_utf8_can_be_shown_and_written(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    assert printable(name) == r"caf\xe9"
    assert printable("β = 1") == "β = 1"
    write_json(tmp_path / "x.json", [name])
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == [name]
    write_text(tmp_path / "x.md", f"{name}, β")
    assert (tmp_path / "x.md").read_text(encoding="utf-8") == "caf\\udce9, β"
