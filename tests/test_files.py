"""files.py: what a file holds is read or refused in one line, and a file is written whole or not at all."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import error_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import files
from files import Field, JsonLines, UserError

same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # each example replaces the file
NUMBERS = st.integers(-(10**300), 10**300) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), max_size=5)
KINDS_OF_JSON = [int, float, bool, str, list, dict]


# ---------------------------------------------------------------------------------------------------------------- reading


@given(VALUES, st.booleans())
def test_strict_json_reads_all_of_json(value, ascii_only):
    assert files.parse_json(json.dumps(value, ensure_ascii=ascii_only)) == value


@given(
    st.sampled_from(
        [
            "NaN",
            "Infinity",
            "-Infinity",
            "1e309",
            "-1e999",
            "1" * 5000,
            "9" * 400,
            r'"\ud800"',
            r'"a\uDFFFb"',
            r'{"\udc00": 1}',
        ]
        + [start * n + "1" + end * n for start, end in (("[", "]"), ('{"a":', "}")) for n in (2000, 100_000)]
    ),
    st.sampled_from(["%s", "[1, %s]", '{"a": {"b": %s}}']),
)
def test_strict_json_refuses_what_python_reads_and_json_is_not_or_no_number_holds(token, around):
    with pytest.raises(ValueError):
        files.parse_json(around % token)


@given(st.text())
def test_an_error_is_one_line_that_a_terminal_only_prints(text):
    told = str(UserError(f"file: {text}"))
    assert told.isprintable() and told.startswith("file: ")
    assert told == f"file: {text}" or not text.isprintable()


def test_a_long_error_keeps_its_beginning_and_its_remedy():
    told = str(UserError(f"FILE: {'x' * 10**6}; REMEDY"))
    assert told.startswith("FILE: x") and told.endswith("x; REMEDY") and len(told) < 2000


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "loop", "dangling", "null", "long", "in a file"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "x.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind in ("loop", "dangling"):
        path.symlink_to(path if kind == "loop" else tmp_path / "nothing")
    elif kind == "in a file":
        path.write_text("{}")
    path = {"null": Path("a\0b"), "long": tmp_path / ("x" * 5000), "in a file": path / "y.json"}.get(kind, path)
    for read in (files.read_bytes, files.read_text, files.read_json):
        assert error_of(read, path, kind=UserError).endswith("; name another file")
    if kind not in ("dangling", "null", "long", "in a file", "loop"):  # there is such a thing, and it is no file
        assert error_of(files.read_jsonl, path, kind=UserError).endswith("; remove it")
    with pytest.raises((OSError, ValueError)):
        files.digest(path)
    if kind != "null":
        assert files.within(path, tmp_path) == (kind != "device")


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
    path = tmp_path / "x.json"
    with path.open("wb") as f:
        f.truncate(files.LARGEST + 1)  # holds nothing on the disk
    assert "more than" in error_of(files.read_text, path, kind=UserError)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_a_byte_order_mark_is_no_text_and_other_encodings_are_refused(tmp_path, encoding):
    path = tmp_path / "x.json"
    path.write_text('{"é": "Hélène"}', encoding=encoding)
    if encoding == "utf-8-sig":
        assert files.read_json(path) == {"é": "Hélène"}
    else:
        assert "not readable as UTF-8" in error_of(files.read_json, path, kind=UserError)


@given(VALUES, st.sampled_from(KINDS_OF_JSON), st.floats(-3, 3), st.booleans())
def test_a_field_holds_its_kind_and_bounds_and_nothing_else(value, kind, low, null):
    told = files.fault({"a": [value]}, Field(dict, fields={"a": Field(list, items=Field(kind, low=low, null=null))}))
    if value is None:
        fits = null
    elif isinstance(value, bool):
        fits = kind is bool
    elif isinstance(value, (int, float)):
        fits = (type(value) is kind or kind is float) and value >= low
    else:
        fits = type(value) is kind and len(value) >= low
    assert (told == "") == fits
    assert fits or "'a.0'" in told and "expected" in told and "\n" not in told


@given(VALUES.filter(lambda v: not isinstance(v, dict)))
def test_a_key_that_must_be_there_is_named_by_its_whole_path(value):
    inner = Field(dict, fields={"b": Field(int), "c": Field(str, required=False)})
    assert files.fault({"a": {"c": "x"}}, Field(dict, fields={"a": inner})) == "key 'a.b' is missing"
    assert files.fault({"a": {"b": 1}}, Field(dict, fields={"a": inner})) == ""
    assert "'a' is" in files.fault({"a": value}, Field(dict, fields={"a": inner}))
    assert "'x'" in files.fault({"x": value}, Field(dict, items=inner))


# ----------------------------------------------------------------------------------------------------------------- lines


def write_lines(path: Path, records: list[dict]) -> bytes:
    path.unlink(missing_ok=True)
    lines = JsonLines(path)
    for record in records:
        lines.add(record)
    assert lines.records == records
    return path.read_bytes() if path.exists() else b""


@same_folder
@given(RECORDS, st.data())
def test_lines_cut_at_any_byte_are_the_whole_ones_before_it(tmp_path, records, draw):
    path = tmp_path / "log.jsonl"
    whole = write_lines(path, records)
    end = draw.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:end])
    left = records[: whole[:end].count(b"\n")]
    assert files.read_jsonl(path) == left
    assert path.read_bytes() == whole[:end], "reading changes nothing"
    again = JsonLines(path)
    assert again.records == left and path.read_bytes() == b"".join(whole.splitlines(keepends=True)[: len(left)])
    for record in records[len(left) :]:
        again.add(record)
    assert path.read_bytes() == whole and files.read_jsonl(path) == records


@same_folder
@given(RECORDS, st.data())
def test_lines_that_are_not_kept_leave_the_file(tmp_path, records, draw):
    path = tmp_path / "log.jsonl"
    records = [r | {"step": i} for i, r in enumerate(records)]
    write_lines(path, records)
    first = draw.draw(st.integers(0, len(records)))
    assert JsonLines(path, keep=lambda r: r["step"] < first).records == records[:first] == files.read_jsonl(path)


@pytest.mark.parametrize(
    "line", [b"{", b"[1]", b"", b"\xff", b'{"a": NaN}', b"\xef\xbb\xbf{}", b"[" * 10_000, b'{"a": "\\ud800"}']
)
def test_a_broken_line_is_named_and_nothing_is_changed(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes(content := b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    for read in (files.read_jsonl, JsonLines):
        message = error_of(read, path, kind=UserError)
        assert message.startswith(f"{path}, line 2: not readable") and message.endswith("; remove it")
    assert path.read_bytes() == content


def test_lines_behind_a_link_are_not_touched(tmp_path):
    (tmp_path / "elsewhere").write_bytes(b'{"a": 1}\n{"half')
    (tmp_path / "log.jsonl").symlink_to("elsewhere")
    assert "is a link" in error_of(JsonLines, tmp_path / "log.jsonl", kind=UserError)
    assert (tmp_path / "elsewhere").read_bytes() == b'{"a": 1}\n{"half'


@pytest.mark.parametrize("fits", range(0, 12))
def test_a_line_that_finds_no_room_is_not_there_at_all(tmp_path, fits):
    """A process of its own, whose files may not grow beyond so many bytes."""
    path = tmp_path / "log.jsonl"
    write_lines(path, [{"a": 1}])
    size = path.stat().st_size
    if (child := os.fork()) == 0:
        import resource
        import signal

        status = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            lines = JsonLines(path)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + fits, -1))
            status = 0 if "could not be written" in error_of(lines.add, {"a": 1234567}, kind=UserError) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert path.read_bytes() == b'{"a": 1}\n'


def test_what_no_file_can_hold_is_refused_and_not_half_written(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = JsonLines(path)
    assert "could not be written" in error_of(lines.add, {"a": "\ud800"}, kind=UserError)
    assert "could not be written" in error_of(files.write_json, path, {"a": "\ud800"}, kind=UserError)
    assert not path.exists() or path.read_bytes() == b""
    assert [p.name for p in tmp_path.iterdir()] in ([], ["log.jsonl"])


# ----------------------------------------------------------------------------------------------------------------- whole


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_an_error_while_writing_leaves_what_was_there(tmp_path, error, folder, before):
    path = tmp_path / "x"
    if before and not folder:
        path.write_text("before")
    with pytest.raises(error), files.replacing(path) as part:
        if folder:
            (part / "inner").mkdir(parents=True)
            (part / "inner" / "y").write_text("half")
        else:
            part.write_text("half")
        raise error
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == ([("x", "before")] if before and not folder else [])


def test_a_folder_appears_whole_and_what_a_killed_process_left_is_swept(tmp_path):
    if (child := os.fork()) == 0:  # dies in the middle
        with files.replacing(tmp_path / "model") as part:
            part.mkdir()
            (part / "weights").write_text("half")
            os._exit(9)
    os.waitpid(child, 0)
    (tmp_path / "notes.part").write_text("not ours")
    assert len([*tmp_path.iterdir()]) == 2 and not (tmp_path / "model").exists()
    files.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.part"]
    with files.replacing(tmp_path / "model") as part:
        part.mkdir()
        (part / "weights").write_text("whole")
    assert (tmp_path / "model" / "weights").read_text() == "whole" and len([*tmp_path.iterdir()]) == 2


@same_folder
@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_what_is_written_is_read_back(tmp_path, value):
    files.write_json(tmp_path / "x.json", value)
    assert files.read_json(tmp_path / "x.json") == value and [p.name for p in tmp_path.iterdir()] == ["x.json"]


# --------------------------------------------------------------------------------------------------------- one at a time


HOLDER = """
import sys, time
sys.path.insert(0, {root!r})
import files
from pathlib import Path
with files.lock(Path({folder!r})):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder until it is told to let go, or is killed."""
    code = HOLDER.format(root=str(Path(files.__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_is_held_by_one_process_which_is_named(tmp_path, holder):
    with pytest.raises(UserError, match=f"process {holder.pid} works in it"), files.lock(tmp_path):
        pass
    assert tmp_path not in files._held
    (another := tmp_path / "another").mkdir()  # not the parent: pytest keeps a .lock of its own there
    holder.kill()
    holder.wait()
    with files.lock(tmp_path):  # the system let go
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
        with files.lock(another, UserError), files.lock(tmp_path):  # ours already
            pass
        assert (tmp_path / ".lock").exists()
    assert not (tmp_path / ".lock").exists()


def test_waiting_says_for_whom_once_and_gets_the_folder(tmp_path, holder):
    said = []

    def wait(process):
        said.append(process)
        holder.stdin.write("\n")
        holder.stdin.flush()

    with files.lock(tmp_path, wait=wait):
        assert (tmp_path / ".lock").exists()
    assert said == [holder.pid]


@pytest.mark.parametrize("content", [b"", b"no number", b"\xff" * 100, b"12345678901234567890123"])
def test_what_stands_in_an_old_lock_does_not_matter(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    handle = os.open(tmp_path / ".lock", os.O_RDWR)
    files.fcntl.flock(handle, files.fcntl.LOCK_EX)
    with pytest.raises(UserError, match="works in it"), files.lock(tmp_path):
        pass
    os.close(handle)
    with files.lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_file_system_without_locks_or_syncs_of_folders_is_worked_on(tmp_path, monkeypatch, capsys):
    def refused(number):
        def call(*arguments):
            raise OSError(number, os.strerror(number))

        return call

    with monkeypatch.context() as patch:
        patch.setattr(files.fcntl, "flock", refused(errno.ENOSYS))
        with files.lock(tmp_path):
            assert "no locks" in capsys.readouterr().err
        patch.setattr(files.fcntl, "flock", refused(errno.EIO))
        with pytest.raises(OSError), files.lock(tmp_path):
            pass
    monkeypatch.setattr(os, "fsync", refused(errno.EINVAL))
    files.sync(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        files.sync(tmp_path / "file")


def test_a_lock_behind_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / ".lock").symlink_to("elsewhere")
    with pytest.raises(OSError), files.lock(tmp_path):
        pass
    assert (tmp_path / "elsewhere").read_text() == "kept"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError), files.lock(tmp_path / "loop"):
        pass


# --------------------------------------------------------------------------------------------------------------- digests


@same_folder
@given(st.binary(max_size=100), st.integers(0, 2**20 + 1))
def test_the_digest_is_of_all_bytes(tmp_path, content, zeros):
    (tmp_path / "x").write_bytes(content + bytes(zeros))
    assert files.digest(tmp_path / "x") == hashlib.sha256(content + bytes(zeros)).hexdigest()


def test_within_follows_links(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "in").write_text("")
    (tmp_path / "out").write_text("")
    (tmp_path / "run" / "link in").symlink_to("in")
    (tmp_path / "run" / "link out").symlink_to("../out")
    found = {p.name: files.within(p, tmp_path / "run") for p in (tmp_path / "run").iterdir()}
    assert found == {"in": True, "link in": True, "link out": False}
    assert not files.within(tmp_path / "run" / ".." / "out", tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------- examples


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
