"""Which test verifies which claim of the paper, and the table that pytest prints of them at its end.

    @given(...)
    @claim("u = 0 and L = log 2 at the reference", "Eq. 14")
    def test_...

`python -m pytest --claims=docs/theory.md` writes the same table between the two `claims` comments of a Markdown file.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

START, END = "<!-- claims: pytest --claims=docs/theory.md -->", "<!-- end of claims -->"


@dataclass
class Claim:
    text: str
    where: str  # in the paper, or "ours"
    verdict: str  # what it means for the claim that its test passes
    file: str
    test: str
    examples: int = 0  # calls that ran to their end
    failed: bool = False


CLAIMS: dict[str, Claim] = {}  # by test name, in the order of the files


def claim(text: str, where: str = "ours", verdict: str = "holds"):
    """Mark a test as the one that verifies this claim. Stands below @given, so that it sees every example.

    verdict: 'holds', 'holds if ...' for a condition that the test makes, 'refuted' for a counterexample that the test
    keeps, 'holds where tried' where there is no proof. A failing test is reported as FAILED whatever stands here.
    """

    def mark(function):
        assert function.__name__ not in CLAIMS, f"{function.__name__} verifies a claim already"
        record = Claim(text, where, verdict, Path(function.__code__.co_filename).name, function.__name__)
        CLAIMS[function.__name__] = record

        @functools.wraps(function)
        def counted(*args, **kwargs):
            function(*args, **kwargs)
            record.examples += 1

        return counted

    return mark


def of(nodeid: str) -> Claim | None:
    """The claim that the test of this node verifies."""
    return CLAIMS.get(nodeid.split("::")[-1].split("[")[0])


def tried() -> list[Claim]:
    """Claims whose test has run, those of dipo.py first."""
    found = [c for c in CLAIMS.values() if c.examples or c.failed]
    return sorted(found, key=lambda c: c.file != "test_dipo.py")


def verdict(c: Claim) -> str:
    return "FAILED" if c.failed else c.verdict


def as_text() -> list[str]:
    rows = [("claim", "where", "property", "examples", "verdict")]
    rows += [(c.text, c.where, c.test, str(c.examples), verdict(c)) for c in tried()]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


def write_markdown(path: Path) -> None:
    """Replace what stands between START and END in `path`. Raises ValueError where they are missing."""
    text = path.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise ValueError(f"{path}: the lines {START!r} and {END!r} are missing")
    for name, file in re.findall(r"\[`(\w+)`\]\(\.\./tests/(\w+\.py)\)", text.split(START)[1].split(END)[0]):
        source = Path(__file__).with_name(file)
        if (
            name not in [c.test for c in tried()]
            and source.exists()
            and f"def {name}(" in source.read_text(encoding="utf-8")
        ):
            raise ValueError(f"{path}: {name} was not run, and its row would be lost; run the whole suite")
    lines = ["| claim | where | property | examples | verdict |", "| --- | --- | --- | --- | --- |"]
    for c in tried():
        lines.append(f"| {escaped(c.text)} | {c.where} | [`{c.test}`](../tests/{c.file}) | {c.examples} | {verdict(c)} |")
    before, after = text.split(START)[0], text.split(END)[1]
    path.write_text(before + "\n".join([START, *lines, END]) + after, encoding="utf-8")
