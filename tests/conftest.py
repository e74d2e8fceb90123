"""Settings shared by all tests: no deadlines, a seed that is printed, one thread."""

import random

import hypothesis
import torch

hypothesis.settings.register_profile("suite", deadline=None, print_blob=True, max_examples=50)
hypothesis.settings.load_profile("suite")

torch.set_num_threads(1)  # the tensors are tiny, and two threads stall each other where the machine is busy


def pytest_configure(config):
    """A fresh hypothesis seed for each run, unless --hypothesis-seed names one."""
    if config.getoption("--hypothesis-seed") is None:
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))
    hypothesis.core.global_force_seed = int(config.getoption("--hypothesis-seed"))


def pytest_report_header(config):
    return f"repeat with: pytest --hypothesis-seed={config.getoption('--hypothesis-seed')}"
