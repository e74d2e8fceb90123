"""files.py: what a file holds is read or refused in one line, and a file is written whole or not at all."""

import json
import os
from pathlib import Path

import pytest
from helpers import error_of

import files
from files import UserError


@pytest.mark.parametrize(
    "content, json_kind, told",
    [
        (None, dict, "no such file"),
        (b"\xff", dict, "not readable as UTF-8"),
        (b"{", dict, "not readable JSON"),
        (b"[" * 100_000, list, "not readable JSON"),
        (b"[1]", dict, "expected a JSON object, found list"),
        (b"{}", list, "expected a JSON array, found dict"),
        (b"null", dict, "expected a JSON object, found NoneType"),
    ],
    ids=str,
)
def test_what_is_no_json_of_its_kind_is_refused_in_one_line(tmp_path, content, json_kind, told):
    class OtherError(UserError):
        pass

    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    message = error_of(files.read_json, path, OtherError, "do this", json_kind, kind=OtherError)
    assert message.startswith(f"{path}: ") and told in message and message.endswith("; do this")


def test_two_processes_may_write_the_same_file(tmp_path, monkeypatch):
    """The other one writes between our writing and our renaming."""
    path, replace = tmp_path / "x.json", Path.replace

    def interleaved(part, target):
        monkeypatch.setattr(Path, "replace", replace)
        monkeypatch.setattr(os, "getpid", lambda: -1)
        files.write_json(path, {"a": 2})
        return replace(part, target)

    monkeypatch.setattr(Path, "replace", interleaved)
    files.write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "summary.json"
    files.write_json(path, {"text": "Hélène"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "Hélène"}
    assert [f.name for f in path.parent.iterdir()] == ["summary.json"]

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    message = error_of(files.write_json, path, {"text": "new"}, kind=UserError)
    assert str(path) in message and "No space left" in message
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "Hélène"}
