"""Short samples of hostile.py, mutated files of every kind that is read, and of faults.py, faults of machine and users.
For the long runs see there."""

import random
from pathlib import Path

import forks
import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")
pytest.importorskip("rouge_score")


@pytest.mark.aside
@pytest.mark.parametrize(
    "sample", [("hostile.py", "--count", "30"), ("faults.py", "--some", "3")], ids=lambda sample: sample[0]
)
def test_hostile_input_and_faults_end_well_or_in_one_line(sample):
    """A process of its own: once autograd has run in one, its children cannot train."""
    script, *size = sample
    seed = str(random.SystemRandom().randrange(2**32))
    done = forks.run([Path(__file__).with_name(script), *size, "--seed", seed])
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
