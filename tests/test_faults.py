"""A few of faults.py: a machine's and its users' faults, for real. For all of them see there."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")
pytest.importorskip("rouge_score")

SCRIPT = Path(__file__).with_name("faults.py")


def test_faults_end_well_or_in_one_line():
    """A process of its own: once autograd has run in one, its children cannot train."""
    command = [sys.executable, str(SCRIPT), "--some", "5", "--seed", str(random.SystemRandom().randrange(2**32))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
