"""Kills: a run that is killed at a change of a file, or at any moment, and then gone on with ends as it would have ended.

python tests/test_kills.py [--seed N]             every change of a file, and 50 moments: an hour on one core
python tests/test_kills.py --some 3 [--seed N]    a few of them, as the suite does
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import forks
import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "--forget toy_forget10[:4] --retain toy_retain90[:8] --batch-size 2 --micro-batch-size 2 --lr 1e-2 --epochs 2 "
    "--eval-retain toy_retain_perturbed[:3] --max-new-tokens 3 --eval-every 1 --model tiny --retain-model tiny"
)
SCENARIOS = {
    "unlearn": f"{SMALL} --preset anchored --tau=-4 --out run",
    "best": f"{SMALL} --keep-best --keep 2 --save-every 1 --out run",
    "toy": "--epochs 0.1 --toy-vocabulary 400 --no-eval --out run",
}
KILLED = 9
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def child(call: Callable[[], int], folder: Path, wait: float | None = None) -> tuple[int, str]:
    """(exit status, what it printed) of a call in a process of its own, in that folder; killed after `wait` seconds."""
    heard = folder / "printed.txt"
    if (pid := os.fork()) == 0:
        status = 1
        with contextlib.suppress(BaseException):
            os.chdir(folder)
            handle = os.open(heard, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            status = call()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    if wait is not None:
        time.sleep(wait)
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return (KILLED if status == -signal.SIGKILL else status), heard.read_text() if heard.exists() else ""


def count_changes(folder: Path, kill_at: int | None) -> list[int]:
    """Count what changes a file in the folder from now on, in a list of one number; end the process at number `kill_at`. A
    file that is opened for writing counts twice: not there yet, and there with nothing or half a line in it."""
    count, busy = [0], [False]

    def hook(event, arguments):
        if busy[0] or event != "open" and event not in CHANGES:
            return
        path, *rest = arguments
        if not isinstance(path, int):
            path = Path(os.fsdecode(path))
            if path.is_absolute() and not path.is_relative_to(folder) or path.name == "printed.txt":
                return
        places = 1
        if event == "open":
            mode, flags = rest
            if not (set(mode or "") & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
            places = 2
        for place in range(places):
            count[0] += 1
            if count[0] == kill_at:
                busy[0] = True
                if place == 1 and set(rest[0] or "") & set("wax"):
                    with open(path, "ab" if "a" in rest[0] else "wb") as file:
                        file.write(b'{"st' * ("a" in rest[0]))
                os._exit(KILLED)

    sys.addaudithook(hook)
    return count


def state(folder: Path) -> dict:
    """What a run leaves, but for times and names of machines."""
    found: dict = {}
    for out in filter(Path.is_dir, [folder / "run", *folder.glob("runs/*/*")]):
        name = str(out.relative_to(folder))
        found[f"{name}: files"] = sorted(p.name for p in out.iterdir() if p.name != ".lock")  # which holds nobody
        for weights in out.rglob("*.safetensors"):
            found[str(weights.relative_to(folder))] = hashlib.sha256(weights.read_bytes()).hexdigest()
        for file in ("log.jsonl", "trajectory.jsonl", "memory.json", "summary.json"):
            if (path := out / file).exists():
                lines = path.read_text().splitlines() if file.endswith("l") else [path.read_text()]
                records = [json.loads(line) for line in lines]
                found[f"{name}/{file}"] = [
                    {k: v for k, v in record.items() if k not in ("seconds", "tokens_per_s", "model")} for record in records
                ]
    return found


def run(folder: Path, words: list[str], kill_at: int | None = None, counted: bool = False) -> int:
    import train

    count = count_changes(folder, kill_at) if kill_at or counted else [0]
    status = train.main(words)
    if counted:
        (folder / "count.json").write_text(str(count[0]))
    return status


def trial(folder: Path, words: list[str], expected: dict, kill_at: int | None, wait: float | None) -> str:
    """What is wrong after a kill, or ''."""
    status, printed = child(lambda: run(folder, words, kill_at), folder, wait)
    if status not in (0, KILLED):
        return f"before the kill: exit {status}: {printed[-500:]}"
    again = ["--resume", "--out", "run"] if (folder / "run/config.json").exists() else words
    status, printed = child(lambda: run(folder, again), folder)
    if status == 2 and [line for line in printed.splitlines() if line.startswith("error: ")] == printed.splitlines()[-1:]:
        return ""
    if status:
        return f"{again[0]}: exit {status}: {printed[-500:]}"
    found = state(folder)
    wrong = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
    return f"differs in {', '.join(wrong)}: {found.get(wrong[0])}, expected {expected.get(wrong[0])}" if wrong else ""


def main(some: int | None, seed: int, names: list[str]) -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch
    from helpers import make_tiny

    import tofu
    import train

    torch.set_num_threads(1)
    original = tofu.evaluation_sets
    tofu.evaluation_sets = lambda *a: {k: v + "[:2]" if k in ("ra", "wf") else v for k, v in original(*a).items()}
    train.TOY_FINETUNE = train.TOY_FINETUNE | {"epochs": 0.11, "warmup_epochs": 0.0}
    print(f"seed {seed}", flush=True)
    rng, failed, tried = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as home:
        tiny = make_tiny(Path(home) / "tiny").folder
        for name in names:
            words = SCENARIOS[name].split()

            def fresh() -> Path:
                folder = Path(tempfile.mkdtemp(dir=home)).resolve()
                (folder / "tiny").symlink_to(tiny)
                return folder

            began, whole = time.perf_counter(), fresh()
            status, printed = child(lambda: run(whole, words, counted=True), whole)  # noqa: B023
            seconds = time.perf_counter() - began
            assert status == 0, printed
            places, expected = int((whole / "count.json").read_text()), state(whole)
            print(f"{name}: {places} changes of files in {seconds:.1f} s", flush=True)
            kills: list[tuple[int | None, float | None]] = [(n, None) for n in range(1, places + 1)]
            kills = kills if some is None else rng.sample(kills, some)
            moments = 50 if some is None else max(1, some // 4)
            for kill_at, wait in [*kills, *((None, rng.uniform(0, seconds)) for _ in range(moments))]:
                folder, tried = fresh(), tried + 1
                if wrong := trial(folder, words, expected, kill_at, wait):
                    failed += 1
                    print(f"{name}, killed at {kill_at or f'{wait:.3f} s'}: {wrong}", flush=True)
                subprocess.run(["rm", "-rf", folder], check=True)
    print(f"{tried} kills, {failed} of them not made good", flush=True)
    return failed > 0


@pytest.mark.aside
def test_a_killed_run_ends_as_an_undisturbed_one():
    """In another process: once torch has gone backward it cannot be forked."""
    seed = random.SystemRandom().randrange(10**6)
    done = forks.run([__file__, "--some", "2", "--seed", seed, "--only", "best"])
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--some", type=int, help="how many changes of files, and a fourth of it moments; default: all, and 50"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=SCENARIOS, help="one scenario")
    given = parser.parse_args()
    sys.exit(main(given.some, given.seed, [given.only] if given.only else [*SCENARIOS]))
