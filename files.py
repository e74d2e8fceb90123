"""Small files of text, read and written in one way everywhere: JSON objects, JSON lines. Needs nothing but Python."""

import json
import os
from pathlib import Path


class UserError(Exception):
    """What a user can mend. The message is one line that names the file, the key or flag, and the remedy."""


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:200]


def read_text(path: Path, error: type[UserError] = UserError, remedy: str = "download it again") -> str:
    """A UTF-8 text. Raises `error`, naming the file, where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise error(f"{path}: no such file; {remedy}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise error(f"{path}: not readable as UTF-8 text ({first_line(e)}); {remedy}") from None


def read_json(path: Path, error: type[UserError] = UserError, remedy: str = "download it again", kind: type = dict):
    """A JSON object, or with kind=list an array. Raises `error`, naming the file, for anything else."""
    text = read_text(path, error, remedy)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise error(f"{path}: not readable JSON ({first_line(e)}); {remedy}") from None
    if not isinstance(value, kind):
        raise error(
            f"{path}: expected a JSON {'array' if kind is list else 'object'}, found {type(value).__name__}; {remedy}"
        )
    return value


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a file with one per line; none where there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_json(path: Path, value: dict, indent: int = 1) -> None:
    """Write or replace a JSON file; it is there whole or not at all. Raises UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")  # two runs may write what one evaluation found
        part.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as e:
        raise UserError(f"{path}: could not be written ({e}); free some space or choose another --out") from None
