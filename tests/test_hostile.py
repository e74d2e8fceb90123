"""A short sample of hostile.py: mutated files of every kind that the program reads. For the long run see there."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")
pytest.importorskip("rouge_score")

SCRIPT = Path(__file__).with_name("hostile.py")


def test_hostile_input_ends_in_success_or_one_line():
    """A process of its own: once autograd has run in one, its children cannot train."""
    command = [sys.executable, str(SCRIPT), "--count", "60", "--seed", str(random.SystemRandom().randrange(2**32))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:] if not done.stdout else ''}"
