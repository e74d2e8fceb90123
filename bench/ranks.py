"""Training split over two processes against one process, on the same steps and the same two cores.

python bench/ranks.py --model SMOLLM2 --data-dir DATA [--json FILE]

One process of two threads, and torchrun with two processes of one thread, take turns. Time: the median of a step, but of the
first. Memory: the largest resident set of a process above what Python and PyTorch take before a model is loaded, once as
asked, and once with four sequences a pass and gradient checkpointing, where activations are little: what is left is
weights, gradients, moments and what the split gathers. malloc gives back what is freed (MALLOC_MMAP_THRESHOLD_).
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FLAGS = "--forget tofu_forget10 --retain tofu_retain90[:400] --preset smollm2 --no-eval --save-every 0"
LITTLE = "--micro-batch-size 4 --gradient-checkpointing"


def worker(argv: list[str]) -> int:
    """A run of train.py that leaves its memory in RUN/memory-RANK.json."""
    import train
    from distributed import launch

    before, out = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Path(argv[argv.index("--out") + 1])
    status = launch(lambda: train.main(argv))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rank = os.environ.get("RANK", "0")
    out.with_name(f"{out.name}-{rank}.json").write_text(json.dumps({"above": (peak - before) * 1024}))
    return status


def measure(argv: list[str], processes: int, folder: Path) -> dict:
    """{'seconds' of the steps after the first, 'above': largest bytes of a process} of one run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = command if processes > 1 else [sys.executable]
    environment = os.environ | {"OMP_NUM_THREADS": str(2 // processes), "MALLOC_MMAP_THRESHOLD_": "65536"}
    out = folder / f"{processes}"
    shutil.rmtree(out, ignore_errors=True)
    command += [__file__, "--worker", *argv, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {done.stderr[-2000:]}")
    steps = [json.loads(line)["seconds"] for line in (out / "log.jsonl").read_text().splitlines()]
    return {
        "seconds": steps[1:],
        "above": max(json.loads(path.read_text())["above"] for path in folder.glob(f"{processes}-*.json")),
    }


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a checkpoint")
    parser.add_argument("--data-dir", default=os.environ.get("DIPO_DATA"), help="TOFU in hub layout [$DIPO_DATA]")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--sequences", type=int, default=16, help="forget sequences of a step, and as many retain sequences")
    parser.add_argument("--steps", type=int, default=4, help="of each run")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args()
    fixed = f"{FLAGS} --model {args.model} --data-dir {args.data_dir} --dtype {args.dtype}".split()
    fixed += ["--batch-size", str(args.sequences), "--epochs", str(args.steps * args.sequences / 400)]
    results: dict = {"as asked": {1: [], 2: []}, "little": {1: [], 2: []}}
    folder = Path(tempfile.mkdtemp())
    for turn in range(args.turns):
        for name, more in (("as asked", []), ("little", LITTLE.split())):
            if name == "as asked" or not turn:
                for processes in (1, 2):
                    results[name][processes].append(measure([*fixed, *more], processes, folder))
    shutil.rmtree(folder)
    work = f"{args.sequences} + {args.sequences} sequences, {args.steps - 1} timed steps a turn"
    print(f"{args.model}, {args.dtype}, {work}; {platform.processor()}")
    print("\n| | one process, 2 threads | two processes, 1 thread | ratio |\n| --- | --- | --- | --- |")
    rows = {}
    for name, found in results.items():
        for key, unit in (("seconds", "s per step"), ("above", "GB of a process")):
            if name == "little" and key == "seconds":
                continue
            one, two = (
                statistics.median(s for run in found[n] for s in run["seconds"]) if key == "seconds"
                else max(run["above"] for run in found[n]) / 1e9
                for n in (1, 2)
            )  # fmt: skip
            label = f"{unit}" + (", micro-batch 4, checkpointing" if name == "little" else "")
            rows[label] = one, two, two / one
            print(f"| {label} | {one:.2f} | {two:.2f} | {two / one:.2f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "runs": results, "dtype": args.dtype}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
