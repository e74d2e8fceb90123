"""All experiments of a scale, one after the other; each goes on where it was.

python experiments/all.py --scale toy                          over two hours on 2 CPU cores from nothing
python experiments/all.py --scale toy --results again          from nothing, in another folder than the committed results
"""

import subprocess
import sys
import time
from pathlib import Path

# Later ones share runs of earlier ones.
NAMES = ("baselines", "ablation", "beta", "failures", "stability", "anchored", "filter", "muse_news")


def run_all() -> int:
    for name in NAMES:
        began = time.perf_counter()
        command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *sys.argv[1:]]
        if status := subprocess.run(command).returncode:
            return status
        print(f"{name}: {(time.perf_counter() - began) / 60:.1f} minutes\n", flush=True)
    return 0


if __name__ == "__main__":
    if "-h" in sys.argv or "--help" in sys.argv:
        print(__doc__)
        sys.exit(0)
    sys.exit(run_all())
