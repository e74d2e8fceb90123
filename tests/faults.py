"""Faults of the machine and of its users, for real: a full disk, folders that cannot be written, closed streams, two
processes at a time, interruptions, little memory, odd names. Each ends well, or in one line and the run goes on to its end.

    python tests/faults.py [--seed N]              all of them, some minutes on one core; exits 1 where anything is at fault
    python tests/faults.py --some 6 [--seed N]     a few of them, as the suite does
    python tests/faults.py --only 'full disk'      of one group
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile
import torch
from hostile import ON_TOFU, ROOT, TO_TRAIN
from tqdm import tqdm

import eval as evaluation
import train

RUN = [
    "--forget",
    "tofu_forget01",
    "--model",
    "model",
    *TO_TRAIN,
    "--epochs",
    "4",
    "--no-eval",
    "--tau=-4",
    "--preset",
    "anchored",
]
LONGER = ["--model", "done", *ON_TOFU, "--max-new-tokens", "4"]  # an evaluation that is not kept yet
GROUPS = ("full disk", "read-only", "closed streams", "two at a time", "interrupts", "little memory", "odd names",
          "damaged files", "links and code")  # fmt: skip
NAMES = ["a b", "é", "a$b'c\"", "=-x", "a\nb", "a\udcffb", "x" * 250, "x" * 300, "..", ".", "/", "own.jsonl", "new/",
         "a%sb{c}", "a[1]*", "~", "a\0b", "new/deeper/still", "model", "half", " ", "\u202eab", "COM1:", "runs"]  # fmt: skip


class Fault(Exception):
    """What should not have been."""


class Faults:
    def __init__(self, world: hostile.World):
        self.world, self.here = world, world.here
        self.fresh()
        status, said = self.wait(self.start(lambda: train.main(["--resume", "--out", "half"])))
        self.good(status == 0, said)
        self.weights, self.records = self.end("half")

    def fresh(self) -> None:
        """The world as it was built; the working folder is in it."""
        shutil.rmtree(self.here.parent, ignore_errors=True)
        shutil.copytree(self.world.template, self.here, symlinks=True)
        os.chdir(self.here)

    def good(self, right: bool, told: object) -> None:
        if not right:
            raise Fault(f"{told}")

    def end(self, run: str) -> tuple[bytes, list[dict]]:
        """Weights and records, times apart, of a finished run."""
        lines = (self.here / run / "log.jsonl").read_text().splitlines()
        records = [{k: v for k, v in json.loads(x).items() if k not in ("seconds", "tokens_per_s")} for x in lines]
        return (self.here / run / "model" / "model.safetensors").read_bytes(), records

    def start(self, call: Callable[[], int], before: Callable[[], object] = lambda: None) -> tuple[int, Path]:
        """A process that makes the call in the working folder, and the file of what it says. before: called in it first."""
        said = Path(tempfile.mkstemp(dir=self.world.root)[1])
        if (pid := os.fork()) == 0:
            status = 70
            try:
                sys.stdout = sys.stderr = said.open("w", buffering=1, errors="backslashreplace")
                before()
                status = call()
            except KeyboardInterrupt:  # before the call, or after it
                status = 130
            except SystemExit as e:
                status = int(e.code or 0)
            except BaseException:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                traceback.print_exc()
            finally:
                os._exit(status)
        return pid, said

    def wait(self, started: tuple[int, Path]) -> tuple[int, str]:
        """(exit status, what was said) of a started process."""
        status = os.waitstatus_to_exitcode(os.waitpid(started[0], 0)[1])
        text = started[1].read_text(errors="replace")
        started[1].unlink()
        return status, text

    def try_(self, call: Callable[[], int], before: Callable[[], object] = lambda: None) -> tuple[int, str]:
        """The same of a call that must end in success or in one line of error."""
        status, text = self.wait(self.start(call, before))
        told = [
            line
            for part in text.split("\r")
            for line in part.replace("\x1b[A", "\n").split("\n")
            if line.startswith("error: ")
        ]
        self.good("Traceback" not in text and (status, len(told)) in ((0, 0), (2, 1)), f"status {status}: {text[-1500:]}")
        return status, told[0] if told else text

    def goes_on(self, run: str) -> None:
        """A run that was stopped ends as the undisturbed one, resumed or, where it had not begun, started again."""
        config = self.here / run / "config.json"
        argv = ["--resume", "--out", run] if config.exists() else [*RUN, "--out", run]
        status, told = self.try_(lambda: train.main(argv))
        self.good(status == 0, f"does not go on: {told}")
        weights, records = self.end(run)
        self.good(weights == self.weights, "other weights")
        self.good(records == self.records, "other records")

    # ---------------------------------------------------------------------------------------------------------- the cases

    def full_disk(self, kilobytes: int) -> None:
        """A file system with so much room for a run, which then has more."""
        disk = self.here / "disk"
        disk.mkdir()
        with mounted("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)):
            self.try_(lambda: train.main([*RUN, "--out", "disk/run"]))
            subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
            self.goes_on("disk/run")

    def file_limit(self, kilobytes: int) -> None:
        """No file may grow beyond so much: what a quota does."""

        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, resource.RLIM_INFINITY))

        self.try_(lambda: train.main([*RUN, "--out", "run"]), limit)
        self.goes_on("run")
        self.try_(lambda: evaluation.main(LONGER), limit)
        status, told = self.try_(lambda: evaluation.main(LONGER))
        self.good(status == 0, told)

    def read_only(self, name: str, program: Callable[[list[str]], int], *argv: str) -> None:
        """A folder that cannot be written. Evaluating prints its result all the same."""
        with mounted("--bind", name, name):
            subprocess.run(["mount", "-o", "remount,ro,bind", name], check=True)
            status, told = self.try_(lambda: program([*argv]))
        if program is evaluation.main and "--model" in argv:
            self.good(status == 0 and "model_utility" in told and "not kept" in told, told)
        else:
            self.good(status == 2 or "complete already" in told, told)

    def streams(self, how: str, program: str, *argv: str) -> None:
        """The program itself, with standard streams that are closed, full or read by nobody."""
        command = f"exec {sys.executable} {ROOT / program} {' '.join(argv)}"
        read, write = os.pipe()
        os.close(read)
        where = {"stdout closed": ">&- 2>said", "stderr closed": ">said 2>&-", "all closed": "<&- >&- 2>&-",
                 "stdout full": ">/dev/full 2>said", "both full": ">/dev/full 2>/dev/full",
                 "nobody reads": f">&{write} 2>said", "nobody reads errors": f">said 2>&{write}"}[how]  # fmt: skip
        done = subprocess.run(["bash", "-c", f"{command} {where}"], pass_fds=[write], timeout=120)
        os.close(write)
        said = (self.here / "said").read_text() if (self.here / "said").exists() else ""
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        self.good("Traceback" not in said and "Exception ignored" not in said and len(lines) <= 1, said[-1500:])
        unheard = (1,) if how in ("both full", "nobody reads errors") else ()  # Python's own, where nothing can be said
        self.good(done.returncode in (0, 2, 141, -signal.SIGPIPE, *unheard), f"status {done.returncode}: {said[-500:]}")
        if program == "train.py":
            self.goes_on("half") if not (self.here / "half" / "summary.json").exists() else None
            self.good(self.end("half") == (self.weights, self.records), "another end")

    def two(self, *calls: Callable[[], int]) -> list[tuple[int, str]]:
        started = [self.start(call) for call in calls]
        found = [self.wait(each) for each in started]
        for status, text in found:
            errors = [line for line in text.replace("\r", "\n").splitlines() if "error: " in line]
            self.good("Traceback" not in text and status in (0, 2) and len(errors) == (status == 2), text[-1500:])
        return found

    def two_resumes(self) -> None:
        resume = lambda: train.main(["--resume", "--out", "half"])  # noqa: E731
        found = self.two(resume, resume)
        self.good(0 in [status for status, _ in found], found)
        self.good(self.end("half") == (self.weights, self.records), "another end")

    def two_starts(self, *out: str) -> None:
        start = lambda: train.main([*RUN, *out])  # noqa: E731
        found = self.two(start, start)
        runs = [Path("run")] if out else sorted(Path("runs").iterdir())
        self.good(sorted(status for status, _ in found) == ([0, 2] if out else [0, 0]), found)
        self.good(len(runs) == (1 if out else 2), runs)
        for run in runs:
            self.good(self.end(str(run)) == (self.weights, self.records), f"{run}: another end")

    def two_evaluations(self) -> None:
        found = self.two(*[lambda: evaluation.main([*LONGER, "--json"])] * 2)
        self.good(all(status == 0 for status, _ in found), found)
        tables = [text[text.index("{\n") :] for _, text in found]
        self.good(tables[0] == tables[1], tables)

    def interrupted(self, number: int, seconds: float, argv: list[str], program=train.main) -> None:
        """A signal after some time."""
        (self.here / "run").mkdir() if "run" in argv and argv[0] == "--resume" else None
        pid, said = self.start(lambda: program(argv), lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        status, text = self.wait((pid, said))
        self.good("Traceback" not in text and status in (0, 130, -number), f"status {status}: {text[-1500:]}")
        if program is train.main:
            self.goes_on("half")
        else:
            self.good(self.try_(lambda: program(argv))[0] == 0, "cannot be repeated")

    def little_memory(self, megabytes: int, program: Callable[[list[str]], int], *argv: str) -> None:
        def limit() -> None:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + megabytes * 2**20, resource.RLIM_INFINITY))

        status, told = self.try_(lambda: program([*argv]), limit)
        self.good(status == 0 or "memory" in told or "could not be" in told or "not readable" in told, told)
        if program is train.main:
            self.goes_on("half")

    def odd_name(self, name: str) -> None:
        """A run folder's name is refused before the training, or the run is there and can be gone on with."""
        status, told = self.try_(lambda: train.main([*RUN, f"--out={name}"]))
        left = {p.name for p in self.here.iterdir()} - {p.name for p in self.world.template.iterdir()}
        if status == 2:
            self.good("unlearn: " not in told and not left, f"{told} {left}")
            return
        self.good(self.end(name) == (self.weights, self.records), "another end")
        status, told = self.try_(lambda: train.main(["--resume", f"--out={name}"]))
        self.good(status == 0 and "complete already" in told, told)

    def damaged(self, name: str, how: str) -> None:
        """A damaged file of an interrupted run is told, or makes no difference."""
        data = bytearray((self.here / name).read_bytes())
        at = {"first": 0, "middle": len(data) // 2, "last": len(data) - 1}.get(how.split()[-1], 0)
        if how.startswith("flipped") and data:
            data[at] ^= 4
        (self.here / name).write_bytes(data if how.startswith("flipped") else data[:at])
        status, _ = self.try_(lambda: train.main(["--resume", "--out", "half"]))
        self.good(status == 2 or self.end("half") == (self.weights, self.records), "not noticed: another end")

    def link(self, name: str, program: Callable[[list[str]], int], *argv: str) -> None:
        """What lies behind a link out of a folder is neither written to nor copied."""
        outside, path = self.here.parent / "outside", self.here / name
        outside.mkdir()
        held = outside / "held"
        if path.exists():
            path.rename(held)
        else:
            held.write_text("kept\n")
        if path.suffix in (".json", ".jinja") and path.parent.name == "model":
            held.write_text(held.read_text().replace("{", '{"secret": "SECRET",', 1))
        path.parent.mkdir(exist_ok=True, parents=True)
        path.symlink_to(held)
        before = {p: (p.is_dir() or p.read_bytes()) for p in [held, *sorted(held.rglob("*"))]}
        self.try_(lambda: program([*argv]))
        after = {p: (p.is_dir() or p.read_bytes()) for p in [*sorted(outside.rglob("*"))]}
        self.good(before == after, f"written: {[str(p) for p in {*before, *after} if before.get(p) != after.get(p)]}")
        for copied in (p for p in (self.here / "new").rglob("*") if p.is_file()):
            self.good(b"SECRET" not in copied.read_bytes(), f"copied into {copied}")

    def code(self, name: str, program: Callable[[list[str]], int], *argv: str) -> None:
        """A pickle in the place of a file is not run."""

        class Code:
            def __reduce__(self):
                return os.mkdir, ("executed",)

        path = self.here / name
        path.unlink(missing_ok=True)
        if path.suffix == ".bin":
            path.with_name("model.safetensors").unlink()
        torch.save(Code(), path)
        status, told = self.try_(lambda: program([*argv]))
        self.good(status == 2 and not (self.here / "executed").exists(), told)

    def leads_out(self, name: str, key: str, value: str, program: Callable[[list[str]], int], *argv: str) -> None:
        """A path in a file that leads out of the folder: nothing is written or read there."""
        outside = self.here.parent / "outside"
        outside.mkdir()
        record = json.loads((self.here / name).read_text())
        holder = record.get("config", record) if key != "weight_map" else record
        holder[key] = dict.fromkeys(record["weight_map"], value) if key == "weight_map" else value
        (self.here / name).write_text(json.dumps(record))
        shutil.copy(self.here / "model" / "model.safetensors", outside)
        status, told = self.try_(lambda: program([*argv]))
        self.good([p.name for p in outside.iterdir()] == ["model.safetensors"], [*outside.iterdir()])
        if key == "weight_map":
            self.good(status == 2 and "outside" in told, told)


@contextlib.contextmanager
def mounted(*how: str) -> Iterator[None]:
    subprocess.run(["mount", *how], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", how[-1]], check=True)


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            with mounted("-t", "tmpfs", "tmpfs", folder):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def cases(faults: Faults, rng: random.Random) -> dict[str, list[tuple[str, Callable[[], None]]]]:
    """{group: [(what, call)]}."""
    resume, evaluate = ("--resume", "--out", "half"), ("--model", "model", *ON_TOFU)
    found: dict[str, list] = {group: [] for group in GROUPS}
    for kilobytes in (1, 2, 4, 8, 16, 50, 100, 200, 300, 500, 700):
        found[GROUPS[0]].append((f"no file beyond {kilobytes} KB", lambda k=kilobytes: faults.file_limit(k)))
    if can_mount():
        for kilobytes in (4, 20, 100, 300, 600, *(rng.randrange(4, 2000, 4) for _ in range(10))):
            found[GROUPS[0]].append((f"a disk of {kilobytes} KB", lambda k=kilobytes: faults.full_disk(k)))
        for name, program, argv in [
            ("done", evaluation.main, LONGER), ("done", evaluation.main, ["--plot", "done"]),
            ("done", evaluation.main, ["--report", "done"]), ("half", train.main, resume),
            ("TOFU", train.main, [*RUN, "--out", "TOFU/run"]), ("done", train.main, ["--resume", "--out", "done"]),
        ]:  # fmt: skip
            found[GROUPS[1]].append((f"{name}: {' '.join(argv)}", lambda a=(name, program, *argv): faults.read_only(*a)))
    else:
        tqdm.write("full and read-only file systems are left out: this user may not mount any")
    for how in (
        "stdout closed",
        "stderr closed",
        "all closed",
        "stdout full",
        "both full",
        "nobody reads",
        "nobody reads errors",
    ):
        for program, argv in (("train.py", resume), ("eval.py", evaluate)):
            found[GROUPS[2]].append((f"{program}: {how}", lambda a=(how, program, *argv): faults.streams(*a)))
    found[GROUPS[3]] = [
        ("two that go on with a run", faults.two_resumes), ("two evaluations", faults.two_evaluations),
        ("two starts", faults.two_starts), ("two starts in one folder", lambda: faults.two_starts("--out", "run")),
    ]  # fmt: skip
    for number in (signal.SIGINT, signal.SIGTERM) * 5:
        for argv, program in ((list(resume), train.main), (LONGER, evaluation.main)):
            a = number, rng.uniform(0, 0.6), argv, program
            if number == signal.SIGINT or program is train.main:
                found[GROUPS[4]].append((f"{number.name} after {a[1]:.3f} s: {argv[0]}", lambda a=a: faults.interrupted(*a)))
    for megabytes in (4, 8, 16, 32, 64, 128):  # at 2 the interpreter itself fails now and then
        for program, argv in ((train.main, resume), (evaluation.main, LONGER)):
            a = megabytes, program, *argv
            found[GROUPS[5]].append((f"{megabytes} MB for {argv[0]}", lambda a=a: faults.little_memory(*a)))
    template = faults.world.template
    for name in sorted(str(p.relative_to(template)) for p in (template / "half").rglob("*") if p.is_file()):
        for how in ("emptied", "cut middle", "cut last", "flipped first", "flipped middle", "flipped last"):
            found[GROUPS[7]].append((f"{name}: {how}", lambda a=(name, how): faults.damaged(*a)))
    report, plot, new = (
        ("--report", "done"),
        ("--plot", "done"),
        ("--finetune", "own.jsonl", "--epochs", "0.5", "--out", "new"),
    )
    learn = "--model", "model", *new
    kept = next((template / "done" / "eval").glob("final-*/TOFU_EVAL.json")).parent.name
    written = (
        "config.json log.jsonl memory.json trajectory.jsonl summary.json checkpoint model eval reference.bin .lock".split()
    )
    for name, program, argv in [
        *((f"half/{name}", train.main, resume) for name in written),
        *((f"done/eval/{n}", evaluation.main, LONGER) for n in (kept, f"{kept}/log.json", f"{kept}/TOFU_EVAL.json")),
        ("done/eval", evaluation.main, LONGER),
        ("done/report.html", evaluation.main, report), ("done/trajectory.png", evaluation.main, plot),
        ("done/.lock", evaluation.main, LONGER), ("out.json", evaluation.main, [*LONGER, "--out", "out.json"]),
        *((f"model/{n}", train.main, learn) for n in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                                                      "chat_template.jinja", "config.json", "generation_config.json")),
    ]:  # fmt: skip
        found[GROUPS[8]].append((f"{name} is a link", lambda a=(name, program, *argv): faults.link(*a)))
    for name, program, argv in [
        ("model/model.safetensors", evaluation.main, evaluate), ("model/pytorch_model.bin", evaluation.main, evaluate),
        ("model/tokenizer.json", train.main, learn), ("own.jsonl", train.main, learn),
        *((f.relative_to(template), train.main, resume)
          for f in sorted((template / "half").rglob("*.safetensors"))),
    ]:  # fmt: skip
        found[GROUPS[8]].append((f"{name} is code", lambda a=(str(name), program, *argv): faults.code(*a)))
    for name, key, value, program, argv in [
        *(("sharded/model.safetensors.index.json", "weight_map", value, evaluation.main, ("--model", "sharded", *ON_TOFU))
          for value in ("../outside/model.safetensors", str(faults.here.parent / "outside/model.safetensors"), "..", "/")),
        *(("half/config.json", "out", value, train.main, resume) for value in ("../outside", "/", "../outside/new")),
        ("done/config.json", "out", "../outside", evaluation.main, report),
        ("model/config.json", "auto_map", "../outside", train.main, learn),
    ]:  # fmt: skip
        a = name, key, value, program, *argv
        found[GROUPS[8]].append((f"{name}: {key} = {value[-30:]}", lambda a=a: faults.leads_out(*a)))
    found[GROUPS[6]] = [(f"--out {name[:30]!r}", lambda name=name: faults.odd_name(name)) for name in NAMES]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--some", type=int, metavar="N", help="only so many, drawn by the seed")
    parser.add_argument("--only", choices=GROUPS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, bad = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory(prefix="faults-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        faults = Faults(hostile.World(Path(folder).resolve()))
        found = [(group, *case) for group, some in cases(faults, rng).items() for case in some if args.only in (None, group)]
        found = rng.sample(found, min(args.some, len(found))) if args.some else found
        for group, what, call in tqdm(found, desc="faults", unit="fault"):
            faults.fresh()
            try:
                call()
            except Exception as e:  # also of what reads the end of a run that is not there
                bad += 1
                tqdm.write(f"FAULT {group}, {what!r}: {type(e).__name__}: {e}")
        os.chdir("/")
    print(f"{len(found) - bad} of {len(found)} end well or in one line; again with: --seed {args.seed}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
