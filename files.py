"""Files in one way everywhere: read whole and checked, written whole or not at all, locked, digested. Needs only Python."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

writing = True  # False in all processes of a run but the first: what all would write is written once
LARGEST = 2**31  # bytes of a text that is read as a whole; a log of all of MUSE has less than a tenth


class UserError(Exception):
    """What a user can mend. The message is one line that names the file, the key or flag, and the remedy."""

    def __str__(self) -> str:
        """No key of a file and no path's name breaks the line, is a command to the terminal, or fills the screen."""
        text = "".join(c if c.isprintable() else " " for c in super().__str__())
        return text if len(text) <= 2000 else f"{text[:1500]} ... {text[-400:]}"


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:200]


def open_streams() -> None:
    """Standard output and error that the caller has closed lead nowhere from now on; Python has None in their place."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


# ---------------------------------------------------------------------------------------------------------------- reading


def read_bytes(path: Path, error: type[UserError] = UserError, remedy: str = "name another file", limit: int = LARGEST):
    """The bytes of a regular file. Raises `error`, naming the file, where there is none: no folder, no pipe (it would wait
    for ever), nothing larger than `limit` bytes."""
    try:
        if not stat.S_ISREG((found := os.stat(path)).st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or device"
            raise error(f"{path}: is {kind}, not a file; {remedy}")
        if found.st_size > limit:
            raise error(f"{path}: has {found.st_size:,} bytes, more than {limit:,}; {remedy}")
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise error(f"{path}: no such file; {remedy}") from None
    except (OSError, ValueError) as e:  # ValueError: a null byte in the name
        raise error(f"{path}: not readable ({first_line(e)}); {remedy}") from None


def read_text(
    path: Path, error: type[UserError] = UserError, remedy: str = "name another file", limit: int = LARGEST
) -> str:
    """A UTF-8 text, with or without a byte order mark. Raises `error` as `read_bytes`, and for other encodings."""
    try:
        return read_bytes(path, error, remedy, limit).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise error(f"{path}: not readable as UTF-8 text ({first_line(e)}); {remedy}") from None


def parse_json(text: str) -> Any:
    """Strict JSON: ValueError for NaN, Infinity, numbers beyond float64's range or of thousands of digits, a lone surrogate
    (which no file can hold again), and nesting deeper than Python's own limit."""

    def refuse(constant: str):
        raise ValueError(f"{constant} is no number of JSON")

    def finite(digits: str) -> float:
        return value if math.isfinite(value := float(digits)) else refuse(digits[:40])

    def whole(digits: str) -> int:
        return int(digits) if len(digits) < 309 else refuse(f"{digits[:40]}...")

    try:
        value = json.loads(text, parse_constant=refuse, parse_float=finite, parse_int=whole)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()  # a UnicodeEncodeError is a ValueError
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def read_json(
    path: Path, error: type[UserError] = UserError, remedy: str = "name another file", kind: type = dict,
    fields: "dict[str, Field] | None" = None,
):  # fmt: skip
    """A JSON object, or with kind=list an array, whose declared `fields` hold what they may. Raises `error`, naming file and
    key, for anything else."""
    text = read_text(path, error, remedy)
    try:
        value = parse_json(text)
    except ValueError as e:
        raise error(f"{path}: not readable JSON ({first_line(e)}); {remedy}") from None
    if not isinstance(value, kind):
        raise error(
            f"{path}: expected a JSON {'array' if kind is list else 'object'}, found {type(value).__name__}; {remedy}"
        )
    if fields and (wrong := fault(value, Field(dict, fields=fields))):
        raise error(f"{path}: {wrong}; {remedy}")
    return value


@dataclass(frozen=True)
class Field:
    """What a key of a JSON object may hold. Keys that are not declared may hold anything."""

    kind: type | tuple[type, ...]  # int, float, bool, str, list, dict; an int is a float too, a bool is neither
    low: float = -math.inf  # of a number, or the least length of a text, list or object
    high: float = math.inf  # the same, included
    required: bool = True
    null: bool = False  # null is allowed as well
    items: "Field | None" = None  # what each element of a list, or each value of an object, may be
    fields: "dict[str, Field] | None" = None  # of an object


KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", list: "a list", dict: "an object"}


def fault(value: Any, field: Field, name: str = "") -> str:
    """The first thing that is wrong with a value, "key 'a.b.0' is ..., expected ...", or ''."""
    kinds = field.kind if isinstance(field.kind, tuple) else (field.kind,)
    if value is None and field.null:
        return ""
    if isinstance(value, bool):
        right, size = bool in kinds, None
    elif isinstance(value, (int, float)):
        right, size = isinstance(value, kinds) or float in kinds, value
    else:
        right = isinstance(value, kinds)
        size = len(value) if right else None
    if not right or size is not None and not field.low <= size <= field.high:
        expected = " or ".join(KINDS[k] for k in kinds) + (" or null" if field.null else "")
        expected += " of a length" if right and not isinstance(value, (int, float)) else ""
        expected += f" from {field.low:g}" if field.low > -math.inf else ""
        expected += f" to {field.high:g}" if field.high < math.inf else ""
        shown = KINDS[type(value)] if isinstance(value, (list, dict)) else json.dumps(value)[:40]
        return f"key {name!r} is {shown}, expected {expected}"
    inside: list[tuple[Any, Field, str]] = []
    for key, declared in (field.fields or {}).items() if isinstance(value, dict) else ():
        if key in value:
            inside.append((key, declared, key))
        elif declared.required:
            return f"key {f'{name}.{key}'.lstrip('.')!r} is missing"
    if field.items and isinstance(value, (list, dict)):
        inside += [(key, field.items, str(key)) for key in (value if isinstance(value, dict) else range(len(value)))]
    return next(
        (wrong for key, inner, last in inside if (wrong := fault(value[key], inner, f"{name}.{last}".lstrip(".")))), ""
    )


def read_jsonl(path: Path, error: type[UserError] = UserError, remedy: str = "remove it") -> list[dict]:
    """The objects of a file with one per line; none where there is no such file. A last line without its end is what a
    killed process left, and is not counted. Raises `error`, naming file and line, for a line that is no object."""
    return _objects(path, read_bytes(path, error, remedy), error, remedy) if Path(path).exists() else []


def _objects(path: Path, data: bytes, error: type[UserError], remedy: str) -> list[dict]:
    """Those of `read_jsonl`, of a file's bytes."""
    found = []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            found.append(parse_json(line.decode()))
            if not isinstance(found[-1], dict):
                raise ValueError("no JSON object")
        except ValueError as e:
            raise error(f"{path}, line {number}: not readable ({first_line(e)}); {remedy}") from None
    return found


# ---------------------------------------------------------------------------------------------------------------- writing


def room(path: Path, error: BaseException, what: type[UserError] = UserError) -> UserError:
    """The error of a file that could not be written."""
    remedy = "free some space" if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) else "mend that"
    return what(f"{path}: could not be written ({first_line(error)}); {remedy}, or write elsewhere")


def sync(path: Path) -> None:
    """Have the system put a file, or the names in a folder, on the disk now. Not every file system can for a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def part_of(path: Path) -> Path:
    """The name that `replacing` writes to. Two processes may write one file."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, a file or a folder, which takes the place of `path` when the block ends without an
    error: whole or not at all, also for a process that is killed. A folder must not be there yet. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    remove(part)
    try:
        yield part
        for file in [*part.rglob("*"), part] if part.is_dir() else [part]:
            sync(file)
        part.replace(path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            remove(part)


def remove(path: Path) -> None:
    """A file, link or folder, or nothing. Raises OSError."""
    if not writing:
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what `replacing` left in a folder when it was killed. Only for who holds the folder's lock."""
    for part in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            remove(part)


def write_text(path: Path, text: str) -> None:
    """Write or replace a text; it is there whole or not at all. Raises UserError where it cannot be written."""
    if not writing:
        return
    try:
        with replacing(Path(path)) as part:
            part.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as e:
        raise room(path, e) from None


def write_json(path: Path, value: dict, indent: int = 1) -> None:
    """The same for a JSON object."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


class JsonLines:
    """A file that grows by a JSON object per line. `records` are its objects; a last line that is not whole is cut off."""

    def __init__(
        self, path: Path, keep: Callable[[dict], bool] | None = None, error: type[UserError] = UserError, own: bool = False
    ):
        """keep: the others are removed from the file. own: of this process, which writes it also where `writing` is off.
        Raises `error` for what cannot be read, or lies behind a link."""
        self.path, self.error, self.writes = Path(path), error, own or writing
        if self.path.is_symlink():
            raise error(f"{path}: is a link to another file, which would be written to; remove it")
        data = read_bytes(path, error, "remove it") if self.path.exists() else b""
        found = _objects(self.path, data, error, "remove it")
        self.records = [r for r in found if keep is None or keep(r)]
        if len(self.records) < len(found):
            write_text(self.path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in self.records))
        elif (whole := data.rfind(b"\n") + 1) < len(data) and self.writes:
            os.truncate(self.path, whole)

    def add(self, record: dict) -> None:
        """Append one line, whole or not at all. Raises `error` where it cannot be written (no space)."""
        try:
            if self.writes:
                self._append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        except (OSError, ValueError) as e:  # ValueError: a lone surrogate
            raise room(self.path, e, self.error) from None
        self.records.append(record)

    def _append(self, line: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            if file.write(line) < len(line):  # what a full disk does to the last bytes that fit
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---------------------------------------------------------------------------------------------------------- one at a time


_held: dict[Path, int] = {}  # folders that this process holds, and how many times


@contextlib.contextmanager
def lock(folder: Path, error: type[UserError] = UserError, wait: Callable[[int], None] | None = None) -> Iterator[None]:
    """Hold a folder: no other process that asks has it meanwhile. The system lets go when the process dies, however.

    wait(process): called once where another process holds the folder, which is then waited for; None: raises `error`,
    naming the process. Raises OSError where no file can be made in the folder. On a file system without locks it says so
    and goes on.
    """
    folder = Path(os.path.realpath(folder))
    if folder in _held:  # by a caller of ours
        _held[folder] += 1
        try:
            yield
        finally:
            _held[folder] -= 1
        return
    folder.mkdir(parents=True, exist_ok=True)
    path, asked = folder / ".lock", False
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = int(re.sub(rb"\D", b"", os.read(handle, 20)) or b"0")
                if wait is None:
                    raise error(f"{folder}: process {owner} works in it; wait for its end, or stop it") from None
                if not asked:
                    wait(owner)
                    asked = True
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as e:
                if e.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                    raise
                print(f"{folder}: its file system has no locks; see that one process works in it", file=sys.stderr)
            if os.fstat(handle).st_nlink:
                break  # else it was removed by who held it before
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    with contextlib.suppress(OSError):  # no space: it is held all the same
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
    _held[folder] = 1
    try:
        yield
    finally:
        del _held[folder]
        path.unlink(missing_ok=True)  # before it is let go
        os.close(handle)


# ----------------------------------------------------------------------------------------------------------------- digests


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal. Raises OSError, also for what is no file (a pipe would be waited for)."""
    if not os.path.isfile(path):
        raise OSError(errno.ENOENT, "no such file", str(path))
    found, block = hashlib.sha256(), memoryview(bytearray(2**20))
    with Path(path).open("rb", buffering=0) as file:
        while count := file.readinto(block):
            found.update(block[:count])
    return found.hexdigest()


def within(path: Path, folder: Path) -> bool:
    """Whether a path, links followed, lies in a folder."""
    # Not Path.resolve(): a link to itself is its RuntimeError.
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
