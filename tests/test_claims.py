"""The table of claims that pytest prints and that docs/theory.md shows."""

import re
import shutil
from pathlib import Path

import claims
import forks
import pytest

HERE = Path(__file__).parent


def test_the_theory_page_shows_every_claim_with_its_verdict():
    """Of the test files that this run has imported; if this fails: pytest --claims=docs/theory.md."""
    page = (HERE.parent / "docs" / "theory.md").read_text(encoding="utf-8")
    table = page.split(claims.START)[1].split(claims.END)[0]
    for c in claims.CLAIMS.values():
        start = f"| {claims.escaped(c.text)} | {c.where} | [`{c.test}`](../tests/{c.file}) | "
        rows = [line for line in table.splitlines() if line.startswith(start) and line.endswith(f" | {c.verdict} |")]
        assert len(rows) == 1, f"{c.test} is missing or differs"
    for name, file in re.findall(r"\[`(\w+)`\]\(\.\./tests/(\w+\.py)\)", table):
        assert f"def {name}(" in (HERE / file).read_text(encoding="utf-8")


@pytest.mark.aside
def test_a_claim_is_counted_reported_and_written(tmp_path):
    for name in ("aside.py", "claims.py", "conftest.py"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "test_some.py").write_text(
        "from claims import claim\n"
        "from hypothesis import assume, given, settings, strategies as st\n"
        "@settings(max_examples=7)\n@given(st.integers(0, 10**6))\n"
        "@claim('D(p||q) >= 0', 'Eq. 1')\n"
        "def test_true(x):\n    assume(x != 3)\n    assert x >= 0\n"
        "@claim('a false one', verdict='holds where tried')\n"
        "def test_false():\n    assert False\n"
    )
    page = tmp_path / "page.md"
    page.write_text(f"before\n{claims.START}\nstale\n{claims.END}\nafter\n", encoding="utf-8")
    command = ["-m", "pytest", "-p", "no:cacheprovider", "--rootdir", ".", "--claims", "page.md", "test_some.py"]
    done = forks.run(command, cwd=tmp_path)
    assert done.returncode == 1
    rows = [re.split(r"  +", line.strip()) for line in done.stdout.splitlines()]
    assert ["D(p||q) >= 0", "Eq. 1", "test_true", "7", "holds"] in rows
    assert ["a false one", "ours", "test_false", "0", "FAILED"] in rows
    assert re.search(r"^repeat with: pytest --hypothesis-seed=\d+$", done.stdout, re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert r"| D(p\|\|q) >= 0 | Eq. 1 | [`test_true`](../tests/test_some.py) | 7 | holds |" in text
    assert "| a false one | ours | [`test_false`](../tests/test_some.py) | 0 | FAILED |" in text
    page.write_text("no markers", encoding="utf-8")
    done = forks.run(command, cwd=tmp_path)
    assert "are missing" in done.stdout + done.stderr and page.read_text(encoding="utf-8") == "no markers"
