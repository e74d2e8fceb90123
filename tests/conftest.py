"""Settings shared by all tests: no deadlines, a seed that is printed, one thread, the table of claims at the end."""

import random
import signal
from pathlib import Path

import aside
import claims
import hypothesis
import pytest
import torch
from hypothesis import Phase

hypothesis.settings.register_profile("suite", deadline=None, print_blob=True, max_examples=100)
hypothesis.settings.register_profile(
    "mutation", hypothesis.settings.get_profile("suite"), phases=[Phase.explicit, Phase.generate]
)
hypothesis.settings.load_profile("suite")

torch.set_num_threads(1)  # the tensors are tiny, and two threads stall each other where the machine is busy


def pytest_addoption(parser):
    parser.addoption("--claims", type=Path, metavar="FILE", help="write the table of claims into this Markdown file")


def pytest_configure(config):
    """A fresh hypothesis seed for each run, unless --hypothesis-seed names one; Ctrl-C as in a terminal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts us in the background has it ignored
    if config.getoption("--hypothesis-seed") is None:
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))
    hypothesis.core.global_force_seed = int(config.getoption("--hypothesis-seed"))
    config.addinivalue_line("markers", aside.MARK)
    config.pluginmanager.register(aside.Plugin(), "aside")


def pytest_runtest_logreport(report):
    if (found := claims.of(report.nodeid)) and report.failed:
        found.failed = True


def pytest_terminal_summary(terminalreporter, config):
    if claims.tried():
        terminalreporter.section("the paper's claims")
        for line in claims.as_text():
            terminalreporter.line(line)
    terminalreporter.line(f"repeat with: pytest --hypothesis-seed={config.getoption('--hypothesis-seed')}")
    if path := config.getoption("--claims"):
        try:
            claims.write_markdown(path)
        except (OSError, ValueError) as e:
            raise pytest.UsageError(f"--claims: {e}") from None
        terminalreporter.line(f"written to {path}")
