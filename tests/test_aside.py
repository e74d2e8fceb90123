"""Tests that run in a second process are reported as if they had run in the first; nothing is left of it."""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import textwrap
import time
from pathlib import Path

import forks
import pytest

pytestmark = pytest.mark.aside
HERE = Path(__file__).parent
CONFTEST = """
    import aside

    def pytest_configure(config):
        open("sessions", "a").write("begun\\n")
        config.addinivalue_line("markers", aside.MARK)
        config.pluginmanager.register(aside.Plugin(), "aside")

    def pytest_terminal_summary(terminalreporter):
        import claims

        terminalreporter.line(str([(c.test, c.examples) for c in claims.tried()]))
"""
FIRST = """
    import os
    from pathlib import Path

    import pytest

    @pytest.mark.aside
    def test_there():
        Path("there").write_text(str(os.getpid()))

    def test_here():
        Path("here").write_text(str(os.getpid()))
"""
SECOND = """
    import os

    import pytest
    from claims import claim

    pytestmark = pytest.mark.aside

    @claim("1 = 1")
    def test_good():
        pass

    def test_bad():
        print("some output")
        assert "one" == "two"

    @pytest.mark.parametrize("x", ["a::b", "[c]"])
    def test_skipped(x):
        pytest.skip("no reason")

    @pytest.fixture
    def broken():
        yield
        raise KeyError("too late")

    def test_cannot_end(broken):
        pass

    @pytest.mark.xfail(strict=True)
    def test_fails_as_expected():
        assert False

    def test_dies():
        os._exit(7)

    def test_after():
        pass
"""


def run(folder: Path, first: str, second: str, *words: str, **more: str):
    shutil.copy(HERE / "aside.py", folder)
    shutil.copy(HERE / "claims.py", folder)
    for name, text in {"conftest.py": CONFTEST, "test_first.py": first, "test_second.py": second}.items():
        (folder / name).write_text(textwrap.dedent(text))
    env = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **more}  # quicker
    return forks.run(["-m", "pytest", "-p", "no:cacheprovider", "--rootdir", ".", "-vrA", *words], folder, env)


def results(printed: str) -> list[tuple[str, str]]:
    return re.findall(r"^test_\w+\.py::(\S+) (\w+)", printed, re.MULTILINE)


SLOW = [
    ("test_good", "PASSED"), ("test_bad", "FAILED"), ("test_skipped[a::b]", "SKIPPED"), ("test_skipped[[c]]", "SKIPPED"),
    ("test_cannot_end", "PASSED"), ("test_cannot_end", "ERROR"), ("test_fails_as_expected", "XFAIL"),
]  # fmt: skip
QUICK = [("test_here", "PASSED"), ("test_there", "PASSED")]


def test_reports_are_those_of_the_tests(tmp_path):
    done = run(tmp_path, FIRST, SECOND, "--durations=1")
    assert done.returncode == 1 and done.stderr == ""
    assert results(done.stdout) == [*QUICK, *SLOW, ("test_dies", "ERROR"), ("test_after", "ERROR")]
    assert (tmp_path / "here").read_text() != (tmp_path / "there").read_text()
    assert (tmp_path / "sessions").read_text() == "begun\nbegun\n"
    assert "[('test_good', 1)]" in done.stdout
    for told in ("assert 'one' == 'two'", "some output", "KeyError: 'too late'", "no reason", "the other pytest ended (7):"):
        assert told in done.stdout
    assert "1 failed, 4 passed, 2 skipped, 1 xfailed, 3 errors" in done.stdout


@pytest.mark.parametrize("words", [["test_second.py"], ["test_first.py"], ["-m", "aside"], ["-s"], ["-p", "no:aside"]])
def test_a_file_alone_slow_tests_alone_and_output_to_be_seen_need_one_process(tmp_path, words):
    done = run(tmp_path, FIRST, SECOND.split("    def test_dies")[0], *words)
    here = {"test_second.py": [], "aside": QUICK[1:]}.get(words[-1], QUICK[::-1])
    slow = SLOW * (words != ["test_first.py"])
    assert results(done.stdout.replace("some output\n", "")) == here + slow
    assert (tmp_path / "sessions").read_text() == "begun\n"


EXPECTED = """
    import pytest

    pytestmark = [pytest.mark.aside, pytest.mark.xfail]

    def test_fails():
        assert False

    def test_passes():
        pass
"""


@pytest.mark.parametrize(
    "more, fails, passes",
    [(".", "XFAIL", "XPASS"), ("--lf", "XFAIL", "XPASS"), ("--runxfail", "FAILED", "PASSED"),
     ("-oxfail_strict=1", "XFAIL", "FAILED")],
)  # fmt: skip
@pytest.mark.parametrize("environment", [True, False])
def test_what_pytest_is_told_reaches_the_other_process_once(tmp_path, more, fails, passes, environment):
    """A folder in PYTEST_ADDOPTS, above all: the other process would take it too, and start a third for it, and so on."""
    words, given = ([], {"PYTEST_ADDOPTS": more}) if environment else ([more], {})
    done = run(tmp_path, FIRST, EXPECTED, "-p", "cacheprovider", *words, **given)
    assert results(done.stdout) == [*QUICK, ("test_fails", fails), ("test_passes", passes)]
    assert done.returncode == ("FAILED" in (fails, passes))
    assert (tmp_path / "sessions").read_text() == "begun\nbegun\n"


LONG = """
    import subprocess, sys

    import pytest

    CHILD = "import fcntl, time; fcntl.flock(open('lock', 'w'), fcntl.LOCK_EX); open('locked', 'w'); time.sleep(600)"

    @pytest.mark.aside
    def test_long():
        subprocess.run([sys.executable, "-c", CHILD])
"""


STUBBORN = LONG.replace("fcntl, time;", "fcntl, time, signal; signal.signal(2, signal.SIG_IGN);").replace(
    '        subprocess.run([sys.executable, "-c", CHILD])',
    """
        child = subprocess.Popen([sys.executable, "-c", CHILD])
        while True:
            try:
                child.wait()
            except KeyboardInterrupt:
                pass
    """,
)


@pytest.mark.parametrize("long", [LONG, STUBBORN], ids=["long", "stubborn"])
@pytest.mark.parametrize(
    "status, end",
    {2: "raise KeyboardInterrupt", -signal.SIGKILL: "os.kill(os.getpid(), signal.SIGKILL)", 1: "1 / 0"}.items(),
)
def test_nothing_is_left_of_an_interrupted_run(tmp_path, status, end, long):
    first = f"""
    import os, signal, time

    def test_here():
        while not os.path.exists("locked"):
            time.sleep(0.01)
        {end}
    """
    assert run(tmp_path, first, long, "-x", ASIDE_GRACE="2").returncode == status
    with open(tmp_path / "lock") as lock:
        for _ in range(300):
            with contextlib.suppress(BlockingIOError):
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(0.1)
    raise AssertionError("its child is there")
