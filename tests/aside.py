"""Slow tests on a second core: another pytest runs them from the beginning on, and their reports come at the end.

    @pytest.mark.aside
    def test_...

So it is where other tests and several files are asked for, without a debugger and with output captured; `-p no:aside`
forbids it.
The other process ends with this one: it listens for the end of its input, and then interrupts itself and its children, and
kills them if that is not enough.
"""

import ast
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import TextIO

import claims
import pytest

MARK = "aside: a slow test that runs in a second process, beside the others"
GRACE = float(os.environ.get("ASIDE_GRACE", "60"))  # seconds from the interrupt
ALONE = ("collectonly", "usepdb", "trace", "setupshow")


class Aside(pytest.Item):
    """Stands for a test that the other process runs."""

    def __init__(self, *, test: pytest.Item, other: "Other", **kwargs):
        super().__init__(**kwargs)
        self.test, self.other, self.reports = test, other, {}

    def setup(self) -> None:
        self.reports = self.other.reports_of(self.nodeid)

    def runtest(self) -> None:
        pass  # the other process did

    def reportinfo(self):
        return self.test.reportinfo()


class Other:
    """The other process: what it has told."""

    def __init__(self, config: pytest.Config, process: subprocess.Popen, lines: TextIO, printed: TextIO):
        self.config, self.process, self.lines, self.printed = config, process, lines, printed
        self.line, self.found = "", dict[str, dict[str, pytest.TestReport]]()

    def reports_of(self, test: str) -> dict[str, pytest.TestReport]:
        """By phase, as soon as all are there. Raises RuntimeError where the process ended without."""
        while "teardown" not in self.found.get(test, {}):
            ended = self.process.poll() is not None  # before the last look
            self.line += self.lines.readline()
            if self.line.endswith("\n"):
                told, self.line = ast.literal_eval(self.line), ""
                report = self.config.hook.pytest_report_from_serializable(config=self.config, data=told["report"])
                self.found.setdefault(report.nodeid, {})[report.when] = report
                if found := claims.of(report.nodeid):
                    found.examples = told["examples"]
            elif ended:
                self.printed.seek(0)
                raise RuntimeError(f"the other pytest ended ({self.process.returncode}):\n{self.printed.read()[-4000:]}")
            else:
                time.sleep(0.05)
        return self.found[test]


@contextlib.contextmanager
def begun(config: pytest.Config, tests: list[str]) -> Iterator[Other]:
    """Its reports, one a line, and what else it prints go into files, so that it never waits for this process."""
    values = {name: config.getoption(name, None) for name in ("--hypothesis-seed", "--hypothesis-profile", "--tb")}
    flags = [f"{name}={value}" for name, value in values.items() if value is not None]
    flags += [f"-W{warning}" for warning in config.getoption("pythonwarnings") or ()]
    flags += [f"-o{setting}" for setting in config.getoption("override_ini") or ()]
    flags += ["--runxfail"] * bool(config.getoption("runxfail"))
    with (
        tempfile.TemporaryDirectory() as folder,
        open(f"{folder}/lines", "w+") as lines,
        open(f"{folder}/printed", "w+", errors="replace") as out,
    ):
        command = [sys.executable, __file__, lines.name, f"--rootdir={config.rootpath}", *flags, *tests]
        files = {"stdin": subprocess.PIPE, "stdout": out, "stderr": out}
        env = os.environ | {"PYTEST_ADDOPTS": ""}  # --lf or a folder: what it chooses is in `tests`
        process = subprocess.Popen(command, cwd=config.rootpath, env=env, start_new_session=True, **files)
        try:
            yield Other(config, process, lines, out)
        finally:
            process.stdin.close()
            try:
                process.wait(GRACE + 10)
            except subprocess.TimeoutExpired:  # it is stopped
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class Plugin:
    """In the first process."""

    def __init__(self):
        self.until_the_end = contextlib.ExitStack()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        config, items = session.config, session.items
        alone = config.getoption("capture") == "no" or any(map(config.getoption, ALONE)) or os.cpu_count() == 1
        tests = [item for item in items if item.get_closest_marker("aside")]
        if alone or not 0 < len(tests) < len(items) or len({item.path for item in items}) == 1:
            return  # as in the other process, whose tests are all of this kind
        other = self.until_the_end.enter_context(begun(config, [item.nodeid for item in tests]))
        told = [Aside.from_parent(item.parent, name=item.name, test=item, other=other) for item in tests]
        items[:] = [*(item for item in items if item not in tests), *told]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> pytest.TestReport | None:
        return item.reports.get(call.when) if isinstance(item, Aside) else None

    def pytest_sessionfinish(self) -> None:
        self.until_the_end.close()


class Reports:
    """In the other process."""

    def __init__(self, lines):
        self.lines = lines

    def pytest_configure(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        found = claims.of(report.nodeid)
        print(ascii({"report": data, "examples": found and found.examples}), file=self.lines, flush=True)


def interrupt_at_end(of: int) -> None:
    """By force where it goes on all the same, as a test may that expects an interrupt, also where nobody is left to wait."""
    os.read(of, 1)
    os.killpg(0, signal.SIGINT)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


def main(path: str, *words: str) -> int:
    threading.Thread(target=interrupt_at_end, args=(os.dup(0),), daemon=True).start()  # pytest takes 0 for itself
    with open(path, "w") as lines:
        return pytest.main(["-p", "no:cacheprovider", "-p", "no:aside", *words], plugins=[Reports(lines)])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
