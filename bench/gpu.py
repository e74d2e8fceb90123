"""The whole measurement on one GPU, in three calls of under ten minutes each. bench/gpu.sh runs it with a time limit.

python bench/gpu.py 1    correctness (attention, gradients, generation, out of memory), then a step of SmolLM2's shape
python bench/gpu.py 2    a step of Llama-2-7B's shape; generation against transformers
python bench/gpu.py 3    kills and resumes, torchrun, where the time of a step goes, the toy from beginning to end
python bench/gpu.py 1 --device cpu --tiny    a rehearsal, as of 2 and 3

Each part reports by itself, and one that fails does not stop the next. What was found goes to OUT/gpu-CALL.json after each
part; the rows of README.md's tables are printed at the end. Exit status 1: something was computed wrongly, or could not be
computed at all.
"""

import argparse
import contextlib
import copy
import cProfile
import functools
import json
import os
import pstats
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dipo  # noqa: E402
import toy  # noqa: E402
import train  # noqa: E402
from attention import Packing  # noqa: E402
from bench.machine import matmul_rate  # noqa: E402
from bench.memory import predicted  # noqa: E402
from bench.setting import SHAPES, make_examples, make_model, work  # noqa: E402
from config import Config  # noqa: E402
from data import Example  # noqa: E402
from inference import Text, mean_loss, score  # noqa: E402
from model import Llama, generate  # noqa: E402
from plan import Machine, free_memory  # noqa: E402
from reference import CachedReference  # noqa: E402
from runs import working_in  # noqa: E402

SECONDS = 550  # of a call, without loading torch; what runs then is ended
PEAK = 989e12  # FLOP/s of an H100 or H200 in bfloat16 without sparsity, by its data sheet


class Wrong(Exception):
    """Something was computed wrongly."""


class Bench:
    """The settings of a call."""

    def __init__(self, device: str, tiny: bool, out: Path):
        self.device, self.tiny, self.out, self.began = device, tiny, out, time.monotonic()
        self.cuda, self.shape = device.startswith("cuda"), "tiny" if tiny else "smollm2-135m"

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    @functools.cached_property
    def runs(self) -> Path:
        """A folder for the runs of this call alone: those of an earlier one would be compared in their place."""
        return Path(tempfile.mkdtemp(prefix="runs-", dir=self.out))

    @property
    def left(self) -> float:
        return SECONDS - (time.monotonic() - self.began)

    def settings(self, dtype: str, batch: int, device: str | None = None) -> argparse.Namespace:
        known = {"model": None, "data_dir": None, "vocab": None, "length": None, "shape": self.shape, "batch": batch}
        return argparse.Namespace(**known, dtype=dtype, device=device or self.device)

    def run(self, script: str, *flags: str, timeout: float = 1e9, launcher: Sequence[str] = ()) -> str:
        """What a script prints; its folder is OUT. Raises RuntimeError with the end of it where it fails."""
        command = [sys.executable, *launcher, str(ROOT / script), *flags]
        try:
            done = subprocess.run(
                command, cwd=self.out, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                timeout=max(1, min(timeout, self.left)),
            )  # fmt: skip
        except subprocess.TimeoutExpired as e:
            said = (e.stdout or b"").decode(errors="replace")
            raise RuntimeError(f"{' '.join(command)}: took too long\n{said[-2000:]}") from None
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout[-3000:]}")
        return done.stdout

    def step(self, name: str, *flags: str) -> dict:
        """What step.py found."""
        path = self.out / f"step-{name}.json"
        print(self.run("bench/step.py", "--device", self.device, "--json", str(path), *flags), flush=True)
        return json.loads(path.read_text())


def distance(a: list, b: list) -> float:
    """Relative, of two lists of tensors."""
    pairs = [(x.detach().cpu().double(), y.detach().cpu().double()) for x, y in zip(a, b, strict=True)]
    return float((sum((x - y).square().sum() for x, y in pairs) / sum(y.square().sum() for _, y in pairs)) ** 0.5)


def parts_of(examples: dict[str, list[Example]]) -> dict[str, train.Part]:
    return {role: train.Part("dipo", 1.0, [(e,) for e in x]) for role, x in examples.items()}


def quiet_reference(model: Llama, examples: dict[str, list[Example]], size: int, out: Path) -> CachedReference:
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        return CachedReference(model, [e for x in examples.values() for e in x], size, out / "reference.bin")


# --------------------------------------------------------------------------------------------------------- correctness


def attention(
    b: Bench, sizes=((9, 3, 64), (32, 32, 128), (32, 8, 64), (6, 3, 32), (4, 4, 20), (4, 2, 48), (2, 2, 288))
) -> dict:
    """Packed attention and its gradients against float64, head sizes that the kernel refuses among them."""
    found, rng = {}, random.Random(0)
    for heads, groups, k in sizes[:: 3 if b.tiny else 1]:
        lengths = [1, *(rng.randint(1, 40 if b.tiny else 300) for _ in range(19))]
        for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float32, 1e-4)):
            shapes = [(1, h, sum(lengths), k) for h in (heads, groups, groups, heads)]
            *x, g = (torch.randn(shape, device=b.device).to(dtype) for shape in shapes)
            x = [t.requires_grad_() for t in x]
            y = Packing(lengths, torch.device(b.device)).attend(*x)
            exact = [t.detach().cpu().double().requires_grad_() for t in x]
            z = Packing(lengths, torch.device("cpu")).attend(*exact)
            far = [distance([y], [z])]
            pairs = zip(torch.autograd.grad(y, x, g), torch.autograd.grad(z, exact, g.cpu().double()), strict=True)
            far += [distance([a], [c]) for a, c in pairs]
            found[f"{heads} heads, {groups} groups, size {k}, {dtype}"] = far
            print(f"  {heads}, {groups}, {k}, {dtype}: output, dq, dk, dv off by {', '.join(f'{d:.1e}' for d in far)}")
            if not max(far) <= tolerance:
                raise Wrong(f"attention with {heads} heads, {groups} groups of {k} in {dtype} is off by {max(far):.1e}")
    return found


def gradients(b: Bench) -> dict:
    """Of a DiPO step against the CPU's in float32; in bfloat16 no further off than twice what the CPU is in bfloat16."""
    args = b.settings("float32", 6, "cpu")
    model = make_model(args)
    examples = make_examples(args, model.config.vocab_size)
    start = copy.deepcopy(model)  # a reference apart from the policy, so that every term counts
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for p in start.parameters():
            p.add_(0.1 * p.std().nan_to_num() * torch.randn(p.shape, generator=generator))
    found, exact = {}, None
    for name in (
        "CPU, float32", "CPU, bfloat16", "float32", "bfloat16", "bfloat16, checkpointing", "bfloat16, compiled",
        "bfloat16, compiled, checkpointing",
    ):  # fmt: skip
        torch._dynamo.reset()
        device, dtype = "cpu" if "CPU" in name else b.device, torch.float32 if "float32" in name else torch.bfloat16
        policy, frozen = (copy.deepcopy(m).to(device) for m in (model, start))
        policy.compute_dtype = frozen.compute_dtype = dtype
        policy.checkpointing = "checkpointing" in name
        reference = quiet_reference(frozen, examples, 5, b.out)
        terms = train.compile_step(policy) if "compiled" in name else dipo.position_terms
        began = time.perf_counter()
        metrics = train.compute_gradients(policy, reference, dipo.Objective(), parts_of(examples), 5, terms)
        grads = [p.grad for p in policy.parameters()]
        exact = exact or grads
        found[name] = {"loss": metrics["loss"], "off": distance(grads, exact), "seconds": time.perf_counter() - began}
        print(f"  {name}: loss {metrics['loss']:.4f}, gradient off by {found[name]['off']:.1e}", flush=True)
    for name, r in found.items():
        limit = 1e-4 if "float32" in name else 2 * found["CPU, bfloat16"]["off"] + 1e-3
        if not r["off"] <= limit:
            raise Wrong(f"the gradient in {name} is off by {r['off']:.1e}, more than {limit:.1e}")
    return found


def generation(b: Bench) -> dict:
    """Greedy continuations in float32 equal the CPU's but for a tie, also where rows stop; ms of a step in bfloat16."""
    args, rng, new = b.settings("float32", 1, "cpu"), random.Random(0), 12
    model = make_model(args)

    def prompts(n: int, longest: int = 60) -> list[list[int]]:
        return [[rng.randrange(3, model.config.vocab_size) for _ in range(rng.randint(3, longest))] for _ in range(n)]

    asked = prompts(16)
    stop = range(0, model.config.vocab_size, 8)
    expected = generate(model, asked, new, stop)
    model = model.to(b.device)
    equal = sum(x == y for x, y in zip(generate(model, asked, new, stop), expected, strict=True))
    print(f"  float32: {equal} of 16 continuations equal the CPU's")
    found: dict = {"equal": equal, "ms_per_step": {}}
    model.compute_dtype = torch.bfloat16
    model = model.frozen_copy()
    for n in (2, 4) if b.tiny else (64, 256, 1024):
        asked = prompts(n)
        generate(model, asked, 2, ())
        b.sync()
        began = time.perf_counter()
        generate(model, asked, new, ())
        b.sync()
        found["ms_per_step"][n] = 1e3 * (time.perf_counter() - began) / new
        print(f"  bfloat16, {n} rows: {found['ms_per_step'][n]:.1f} ms a step", flush=True)
    if equal < 15:
        raise Wrong(f"only {equal} of 16 greedy continuations in float32 equal the CPU's")
    return found


def crowded(b: Bench) -> dict:
    """Scores where a batch of the predicted size is too much for the memory: it is halved, and nothing changes but rounding.
    On a CPU nothing is short."""
    model = make_model(b.settings("bfloat16", 1)).frozen_copy()
    every = make_examples(b.settings("bfloat16", 4 if b.tiny else 200), model.config.vocab_size)["forget"]
    texts = [Text(e.key, e, mean_loss) for e in every]

    def losses() -> list[float]:
        found = {key: scores["loss"] for batch in score(model, texts) for key, scores in batch.items()}
        return [found[text.key] for text in texts]

    expected = losses()
    if b.cuda:
        used, card = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((used + 1e9) / card)
    try:
        found, retries = losses(), torch.cuda.memory_stats()["num_ooms"] if b.cuda else 0
    finally:
        if b.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
    off = max(abs(x - y) for x, y in zip(found, expected, strict=True))
    print(f"  out of memory {retries} times, losses off by {off:.1e}")
    if b.cuda and not retries:
        raise RuntimeError("memory was not short")
    if not off <= 0.05:
        raise Wrong(f"losses are off by {off:.1e} after batches are halved")
    return {"retries": retries, "off": off}


# ----------------------------------------------------------------------------------------------------------- the tables


def steps(b: Bench) -> dict:
    """Time, host synchronisations, graphs and graph breaks of steps on batches of other lengths."""
    found = {}
    for compiled in (False, True):
        for size in (2, 8) if b.tiny else (8, 64):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            args = b.settings("bfloat16", 4 if b.tiny else 32)
            model, batches = make_model(args), []
            for i in range(6):
                examples = make_examples(args, model.config.vocab_size)
                batches.append(
                    {
                        role: [Example(f"{i} {e.key}", e.ids[i:], e.prompt_length - i) for e in x]
                        for role, x in examples.items()
                    }
                )
            optimizer = train.make_optimizer(model, Config(lr=1e-5))
            terms = train.compile_step(model) if compiled else dipo.position_terms
            every = {role: [e for examples in batches for e in examples[role]] for role in batches[0]}
            reference, seconds, waits = quiet_reference(model, every, size, b.out), [], 0
            for i, examples in enumerate(batches):
                if b.cuda and i == 1:
                    torch.cuda.reset_peak_memory_stats()
                b.sync()
                began = time.perf_counter()
                with warnings.catch_warnings(record=True) as heard:
                    warnings.simplefilter("always")
                    if b.cuda and i == 5:
                        torch.cuda.set_sync_debug_mode("warn")
                    train.compute_gradients(model, reference, dipo.Objective(), parts_of(examples), size, terms)
                    if b.cuda:
                        torch.cuda.set_sync_debug_mode("default")
                waits = sum("synchroniz" in str(w.message) for w in heard)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                b.sync()
                seconds.append(time.perf_counter() - began)
            counters, name = torch._dynamo.utils.counters, f"{'compiled' if compiled else 'eager'}, {size} sequences a pass"
            found[name] = {
                "first": seconds[0], "then": min(seconds[1:5]), "all": seconds, "synchronisations": waits,
                "peak": torch.cuda.max_memory_allocated() if b.cuda else 0,
                "graphs": counters["stats"].get("unique_graphs", 0), "breaks": sum(counters["graph_break"].values()),
            }  # fmt: skip
            print(f"  {name}: {json.dumps(found[name])}", flush=True)
    return found


def small_table(b: Bench) -> dict:
    """README's table: ours, fine-tuning, the field's way."""
    size = ("--batch", "4", "--micro-batch-size", "8") if b.tiny else ("--batch", "32", "--micro-batch-size", "64")
    flags = "--shape", b.shape, "--dtype", "bfloat16", "--only", "ours,finetune,field,ours-eager", "--steps", "5", *size
    found = b.step("smollm2", *flags)
    found["planned / peak"] = planned(b, found["settings"]) / found["variants"]["ours"]["peak"]
    print(f"  planned / peak, ours: {found['planned / peak']:.2f}", flush=True)
    return found


def planned(b: Bench, settings: dict) -> int:
    """Bytes of what `--plan` predicts of a step that step.py has measured on this card."""
    args, shape = b.settings("bfloat16", settings["batch"]), SHAPES[settings["shape"]]
    asked = {k: settings[k] for k in ("micro_batch_size", "gradient_checkpointing", "optimizer")}
    config = Config(**asked, batch_size=args.batch, dtype="bfloat16", compile=True, device=b.device)
    card = torch.cuda.get_device_properties(0).total_memory if b.cuda else 0
    return predicted(shape, config, make_examples(args, shape.vocab_size), Machine(card))


def large_table(b: Bench) -> dict:
    """Llama-2-7B's shape: whether it fits, and the FLOPs used of what the data sheet has."""
    found: dict = {}
    size = ["--shape", "tiny", "--batch", "4"] if b.tiny else ["--shape", "llama2-7b", "--batch", "32"]
    thin = ["64", "--gradient-checkpointing"]
    for name, flags in (
        ("64", ["64"]), ("64 (checkpointing)", thin), ("8", ["8"]),
        ("64 (checkpointing, adamw8bit)", [*thin, "--optimizer", "adamw8bit"]),
    ):  # fmt: skip
        flags = [*size, "--dtype", "bfloat16", "--only", "ours", "--steps", "2", "--micro-batch-size", *flags]
        try:
            measured = b.step("7b-" + "-".join(re.findall(r"\w+", name)), *flags)
            if "ours" in measured["variants"]:
                r = measured["variants"]["ours"]
                found[name] = {k: r[k] for k in ("seconds", "first_seconds", "peak")}
                found[name]["mfu"] = measured["work"]["dipo"] / r["seconds"] / PEAK
                found[name]["planned / peak"] = planned(b, measured["settings"]) / r["peak"]
                print(f"  {name}: {json.dumps(found[name])}", flush=True)
            else:
                found[name] = {"left out": "too little memory"}
        except RuntimeError as e:
            found[name] = {"failed": str(e)}
            print(f"  {name}: FAILED, {e}", flush=True)
    return found


def continuations(b: Bench) -> dict:
    """1,017 prompts of TOFU's lengths, at most 200 new tokens, ours and transformers, each in its best batch size.

    Weights are random, so EOS would never come: one token in 64 counts as one, and rows end at all lengths.
    """
    from bench.generation import generate_ours, generate_reference, load_reference

    args = b.settings("bfloat16", 3 if b.tiny else 509)
    model = make_model(args)
    config = model.config
    examples = [e for x in make_examples(args, config.vocab_size).values() for e in x][: 5 if b.tiny else 1017]
    prompts, new = [list(e.ids[: e.prompt_length]) for e in examples], 10 if b.tiny else 200
    stop = list(range(5, config.vocab_size, 64))
    other = load_reference(model, torch.bfloat16).to(b.device)
    found: dict = {"prompts": len(prompts), "seconds": {}}
    rows: dict = {}
    for side, function, network in (("ours", generate_ours, model), ("transformers", generate_reference, other)):
        for size in (5, 2) if b.tiny else (1024, 256):
            with contextlib.suppress(torch.OutOfMemoryError):
                function(network, prompts[:4], 2, stop, size)
                b.sync()
                began = time.perf_counter()
                rows[side] = function(network, prompts, new, stop, size)
                b.sync()
                found["seconds"].setdefault(side, {})[size] = time.perf_counter() - began
                print(f"  {side}, {size} rows: {found['seconds'][side][size]:.1f} s", flush=True)
    best = {side: min(s.values()) for side, s in found["seconds"].items()}
    found |= {"best": best, "ratio": best["transformers"] / best["ours"], "tokens": sum(map(len, rows["ours"]))}
    found["equal"] = sum(x == y for x, y in zip(rows["ours"], rows["transformers"], strict=True)) / len(prompts)
    print(f"  transformers / ours {found['ratio']:.2f}; {found['equal']:.0%} equal, {found['tokens']:,} tokens", flush=True)
    return found


# ---------------------------------------------------------------------------------------------------------- whole runs


def whole_toy(b: Bench) -> dict:
    """`python train.py` from its models to summary.json, or without evaluation where its extras are not installed."""
    folder, began = b.runs / "toy", time.perf_counter()
    flags = ["--epochs", "0.2", "--eval-rows", "2"] if b.tiny else []
    if not has_extra():
        flags.append("--no-eval")
    flags = ["--device", b.device, "--out", str(folder), *flags]
    if b.tiny:  # in this process, with models that have learned next to nothing
        train.TOY_FINETUNE |= {"epochs": 1.0}
        with working_in(b.out):
            if status := train.main(flags):
                raise RuntimeError(f"exit status {status}")
    else:
        print(b.run("train.py", *flags)[-3000:], flush=True)
    summary = json.loads((folder / "summary.json").read_text())
    return {"seconds": time.perf_counter() - began, "evaluated": "--no-eval" not in flags, "summary": summary}


def has_extra() -> bool:
    try:
        train.require_extra()
        return True
    except train.UserError as e:
        print(f"  without evaluation: {e}")
        return False


def losses(folder: Path) -> list[float]:
    lines = (folder / "log.jsonl").read_text().splitlines() if (folder / "log.jsonl").exists() else []
    return [json.loads(line)["loss"] for line in lines if line.endswith("}")]


def short(b: Bench) -> list[str]:
    """Flags of a short run on a small model, without --out."""
    base = toy.toy_base(0, 400 if b.tiny else 1000, b.runs, {})
    flags = ["--device", b.device, "--model", str(base), "--forget", "toy_forget10", "--center", "--no-eval"]
    flags += [
        "--dtype",
        "bfloat16",
        "--forget-loss",
        "dipo",
        "--retain-loss",
        "dipo",
        "--lr",
        "1e-3",
        "--batch-size",
        "8",
        "--save-every",
        "3",
    ]
    return [*flags, "--epochs", "2" if b.tiny else "6", "--no-compile"]


def whole_run(b: Bench) -> list[float]:
    """Losses of `short`, with nothing in its way."""
    out = b.runs / "whole"
    if not (out / "summary.json").exists():
        b.run("train.py", *short(b), "--out", str(out), timeout=240)
    return losses(out)


def off_by(b: Bench, found: list[float], first: int | None = None) -> float:
    """The largest relative difference from the losses of `whole_run`, of all steps or the first ones."""
    expected = whole_run(b)
    if len(found) != len(expected):
        return float("inf")
    return max(abs(x / y - 1) for x, y in zip(found[:first], expected[:first], strict=True))


def kills(b: Bench) -> dict:
    """Runs that are stopped by SIGTERM and by SIGKILL, and gone on with, end as one that nothing stopped."""
    flags, steps, found = short(b), len(whole_run(b)), {}
    for name in ("SIGTERM", "SIGKILL"):
        out = b.runs / name
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *flags, "--out", str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + min(120, b.left)
        while process.poll() is None and len(losses(out)) < 4 and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(getattr(signal, name))
        status, stopped = process.wait(), len(losses(out))
        b.run("train.py", "--resume", "--out", str(out), timeout=240)
        found[name] = {"status": status, "stopped_after": stopped, "steps": steps, "off": off_by(b, losses(out))}
        print(f"  {name}: {json.dumps(found[name])}", flush=True)
        if status == 0:
            raise RuntimeError(f"the run had ended before {name}")
        if not found[name]["off"] <= (1e-3 if b.cuda else 0):
            raise Wrong(f"after {name} and --resume the losses differ by {found[name]['off']:.1e}")
    return found


PLAINLY = """
import sys
sys.path.insert(0, {root!r})
import torch, train
AdamW = torch.optim.AdamW
torch.optim.AdamW = lambda *args, **how: AdamW(*args, **how | {{"fused": False}})
sys.exit(train.main({flags!r}))
"""


def sharded(b: Bench) -> dict:
    """Under torchrun, also with --cpu-offload, the first losses are those of one process. Rounding grows from step to step:
    how far, one process shows whose AdamW is the plain one. One rank: NCCL takes no two on one GPU."""
    found: dict = {}
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"
    for name, more in (("torchrun", []), ("torchrun, --cpu-offload", ["--cpu-offload"]), ("AdamW, not fused", [])):
        if more and not b.cuda:
            continue
        out, began = b.runs / name.replace(", ", ""), time.perf_counter()
        flags = [*short(b), *more, "--out", str(out)]
        if "torchrun" in name:
            b.run("train.py", *flags, timeout=240, launcher=torchrun)
        else:
            script = b.out / "plainly.py"
            script.write_text(PLAINLY.format(root=str(ROOT), flags=flags))
            b.run(str(script), timeout=240)
        found[name] = {"off": off_by(b, losses(out), 5), "off in all": off_by(b, losses(out))}
        found[name]["seconds"] = time.perf_counter() - began
        print(f"  {name}: {json.dumps(found[name])}", flush=True)
        if not found[name]["off"] <= 1e-3:
            raise Wrong(f"{name}: the first losses differ by {found[name]['off']:.1e}")
    return found


def busy(averages: Sequence) -> tuple[float, int]:
    """(seconds that the device works, kernels): of its kernels alone, for what launches one is charged with its time too."""
    kernels = [e for e in averages if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    return sum(e.self_device_time_total for e in kernels) / 1e6, sum(e.count for e in kernels)


def profile(b: Bench) -> dict:
    """Where the time of a compiled step goes, by torch's profiler; the whole table is in OUT/profile.txt."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    args, size = b.settings("bfloat16", 4 if b.tiny else 32), 64
    model = make_model(args)
    examples, optimizer = make_examples(args, model.config.vocab_size), train.make_optimizer(model, Config(lr=1e-5))
    terms, reference = train.compile_step(model), quiet_reference(model, examples, size, b.out)

    def step() -> None:
        train.compute_gradients(model, reference, dipo.Objective(), parts_of(examples), size, terms)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        b.sync()

    for _ in range(3):
        step()
    began = time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    host = cProfile.Profile()
    host.runcall(step)
    host.dump_stats(b.out / "profile.host")
    pstats.Stats(host).sort_stats("tottime").print_stats(25)
    with profiler(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if b.cuda else [])]) as found:
        step()
    by = "self_device_time_total" if b.cuda else "self_cpu_time_total"
    averages = found.key_averages()
    (b.out / "profile.txt").write_text(averages.table(sort_by=by, row_limit=60, max_name_column_width=80))
    print(averages.table(sort_by=by, row_limit=20, max_name_column_width=60), flush=True)
    total, kernels = busy(averages) if b.cuda else (sum(getattr(e, by) for e in averages) / 1e6, 0)
    rate = matmul_rate(torch.bfloat16, b.device, ((512, 512, 512) if b.tiny else (8192, 8192, 8192),))
    floor = work(model.config, examples)["dipo"] / rate
    print(f"  a step takes {seconds:.3f} s, the device is busy for {total:.3f} of it; its matrix products need {floor:.3f}")
    print(f"  kernels: {kernels}")
    top = {e.key: getattr(e, by) / 1e6 for e in sorted(averages, key=lambda e: -getattr(e, by))[:20]}
    return {"seconds": seconds, "busy": total, "kernels": kernels, "floor": floor, "rate": rate, "top": top}


CALLS: dict[str, list[Callable[[Bench], dict]]] = {
    "1": [attention, gradients, generation, crowded, small_table, steps],
    "2": [large_table, continuations],
    "3": [kills, sharded, profile, whole_toy],
}
MUST_BE_OK = "attention", "gradients", "generation", "crowded", "kills", "sharded"


def readme_rows(found: dict[str, dict], device: str) -> list[str]:
    """Rows of README.md's table of numbers to reach, of the parts that ended."""
    rows = []
    if (r := found.get("small_table")) and "time_ratio_to_field" in r:
        rows.append(f"| {device}: SmolLM2-135M, a step, field's way / ours | 4 | {r['time_ratio_to_field']:.2f} |")
        rows.append(f"| {device}: memory above the state, ours / field's way | 0.25 | {r['memory_ratio_to_field']:.2f} |")
        rows.append(f"| {device}: DiPO / plain fine-tuning | 1.10 | {r['time_ratio_to_finetuning']:.2f} |")
    for name, r in found.get("large_table", {}).items():
        value = f"{r['mfu']:.2f} ({r['peak'] / 1e9:.0f} GB, {r['seconds']:.2f} s)" if "mfu" in r else next(iter(r))
        rows.append(f"| {device}: Llama-2-7B, full AdamW, {name} sequences in a pass: FLOPs utilisation | 0.5 | {value} |")
    if r := found.get("continuations"):
        rows.append(f"| {device}: {r['prompts']:,} generations, transformers / ours | 2 | {r['ratio']:.2f} |")
    if r := found.get("whole_toy"):
        rows.append(f"| {device}: the toy, `python train.py`, s | | {r['seconds']:.0f} |")
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=CALLS)
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "gpu")), help="folder (default: $OUT, or gpu)"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to rehearse")
    parser.add_argument("--only", help="parts, with commas: " + ", ".join(f.__name__ for x in CALLS.values() for f in x))
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU here; rehearse with --device cpu --tiny")
    args.out.mkdir(parents=True, exist_ok=True)
    b, path = Bench(args.device, args.tiny, args.out.resolve()), args.out / f"gpu-{args.call}.json"
    device = (torch.cuda.get_device_name() if b.cuda else "CPU") + " (a tiny shape, no measurement)" * args.tiny
    print(
        f"{device}, torch {torch.__version__}, {free_memory(torch.device(args.device)) / 1e9:.0f} GB available", flush=True
    )
    record: dict = {"device": device, "torch": torch.__version__, "tiny": args.tiny, "status": {}, "found": {}}
    for part in CALLS[args.call]:
        name, began = part.__name__, time.perf_counter()
        if args.only and name not in args.only.split(","):
            continue
        print(f"-- {name}", flush=True)
        try:
            if b.left < 20:
                raise RuntimeError("no time left for it")
            record["found"][name] = part(b)
            record["status"][name] = "ok"
        except Wrong as e:
            record["status"][name] = f"WRONG: {e}"
        except Exception as e:  # whatever it is, the next part goes on
            traceback.print_exc()
            record["status"][name] = f"failed: {e}"
        print(f"-- {name}: {record['status'][name]}, {time.perf_counter() - began:.0f} s", flush=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        if b.cuda:
            torch.cuda.empty_cache()
    print("\n" + "\n".join(readme_rows(record["found"], device)))
    print(f"\n{path}: " + ", ".join(f"{name} {status.split(':')[0]}" for name, status in record["status"].items()))
    return int(any(record["status"].get(name, "ok") != "ok" for name in MUST_BE_OK))


if __name__ == "__main__":
    sys.exit(main())
