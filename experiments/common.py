"""What the experiments share: scales, methods and their grids, runs that are made once, tables, plots.

An experiment is a list of jobs, each a command line of train.py, and two functions of their records: one makes a table, one
a plot. The records are one JSON file, {command line: record}. A job that is in it is not run again, so that an experiment
that was stopped goes on where it was, and one that another experiment has run is shared.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import eval as evaluation  # noqa: E402
import train  # noqa: E402
from bench.machine import pick_dtype  # noqa: E402
from config import RUNS, make_config, versions  # noqa: E402
from files import Field, UserError, fault, read_json, read_jsonl, write_json  # noqa: E402
from metrics import forget_quality, require_extra, truth_ratio  # noqa: E402
from tofu import complement  # noqa: E402

RESULTS = ROOT / "experiments" / "results"
FORGETS = ("forget01", "forget05", "forget10")
KEEP = 0.9  # a method keeps the utility if it has this share of the target's


# -------------------------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Method:
    """A pair of losses and the coefficient that is searched beside the learning rate, at two values."""

    forget_loss: str
    retain_loss: str
    coefficient: str | None = None
    values: tuple[float, ...] = ()
    rates: tuple[float, ...] = ()  # its own, in place of the scale's
    more: str = ""  # flags that all its runs have


METHODS = {
    "GA": Method("ga", "none"),
    "GradDiff": Method("ga", "gd", "lam", (1.0, 5.0)),
    "KL": Method("ga", "kl", "lam", (1.0, 5.0)),
    "NPO": Method("npo", "none", "beta", (0.1, 0.5)),
    "NPO+GD": Method("npo", "gd", "lam", (1.0, 5.0)),
    "SimNPO": Method("simnpo", "gd", "lam", (1.0, 8.0)),  # 8: open-unlearning's gamma 0.125
    "DPO": Method("dpo", "gd", "lam", (1.0, 5.0)),
    "UNDIAL": Method("undial", "gd", "beta", (3.0, 10.0)),
    "WGA": Method("wga", "gd", "lam", (1.0, 5.0)),
    "DiPO": Method("dipo", "dipo", "beta", (0.02, 0.05)),
    "anchored NPO+GD": Method("anchored-npo", "gd", "kappa", (0.05, 0.1)),  # the control: anchored DiPO without DiPO
    "anchored DiPO": Method("anchored", "anchored", "kappa", (0.05, 0.1)),
}
TABLE_5 = {
    "DiPO(f)": Method("dipo", "none", "beta", (0.02, 0.05)),
    "DiPO(f)+GD": Method("dipo", "gd", "lam", (1.0, 5.0)),
    "DiPO(f)+KL": Method("dipo", "kl", "lam", (1.0, 5.0)),
    "NPO+DiPO(r)": Method("npo", "dipo", "lam", (1.0, 5.0)),
    "DiPO": METHODS["DiPO"],
}


def grid(method: Method, rates: tuple[float, ...]) -> list[dict[str, float]]:
    """The settings that are tried: every rate with both values. Without a coefficient as many, at twice as many rates."""
    rates = method.rates or rates
    if method.coefficient is None:
        return [{"lr": float(f"{r:.2g}")} for rate in rates for r in (rate / math.sqrt(2), rate)]
    return [{"lr": rate, method.coefficient: value} for rate in rates for value in method.values]


# --------------------------------------------------------------------------------------------------------------- scales


@dataclass(frozen=True)
class Scale:
    """How large an experiment is. Command lines are lists of text, as train.py takes them."""

    name: str
    forgets: tuple[str, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]  # the settings of a method are chosen on these
    rates: tuple[float, ...]
    flags: Callable[[str, int], list[str]]  # (forget set, seed) -> what every run has
    prepare: Callable[[str, int], int]  # makes and evaluates target and retrained model, once; returns an exit status
    small: bool = False  # the least that runs all code; its numbers mean nothing
    methods: dict[str, Method] = field(default_factory=lambda: METHODS)
    remark: str = ""


TOY_ROWS = "toy_retain_perturbed[:60]"  # half of them, for time


def toy_flags(forget: str, seed: int, vocabulary: int = 1000) -> list[str]:
    batch = {"forget10": 16, "forget05": 8, "forget01": 4}[forget]  # about as many steps for each set
    more = "" if vocabulary == 1000 else f" --toy-vocabulary {vocabulary}"
    return f"--forget toy_{forget} --seed {seed} --batch-size {batch} --eval-every 0 --eval-retain {TOY_ROWS}{more}".split()


def prepare_toy(forget: str, seed: int, vocabulary: int = 1000) -> int:
    config = make_config({"forget": f"toy_{forget}", "seed": seed, "toy_vocabulary": vocabulary})
    target, retrained = train.toy_models(config)
    flags = f"--model {target} --retain-model {retrained} --forget toy_{forget} --seed {seed} --max-new-tokens 24"
    return evaluation.main([*flags.split(), "--eval-retain", TOY_ROWS])


VOCABULARIES = (1000, 8000, 49000)


def toy_with(scale: Scale, vocabulary: int) -> Scale:
    """The toy with a tokenizer of that size."""
    flags, prepare = (functools.partial(function, vocabulary=vocabulary) for function in (toy_flags, prepare_toy))
    return dataclasses.replace(scale, flags=flags, prepare=prepare)


def smoke_flags(forget: str, seed: int) -> list[str]:
    short = "--epochs 1 --eval-rows 3 --max-new-tokens 3 --eval-every 0 --batch-size 4"
    return f"--forget toy_{forget}[:4] --retain toy_retain90[:8] --seed {seed} {short}".split()


def prepare_smoke(forget: str, seed: int) -> int:
    train.TOY_FINETUNE = train.TOY_FINETUNE | {"epochs": 0.05, "warmup_epochs": 0.0}  # toy models of their own, by their key
    train.toy_models(make_config({"forget": f"toy_{forget}", "seed": seed}))
    return 0


def smollm2_folder(name: str) -> Path:
    return RUNS / "experiments" / f"smollm2-{name}"


def variable(name: str, what: str) -> Path:
    """The folder that an environment variable names."""
    if not os.environ.get(name):
        raise RuntimeError(f"set {name} to the folder of {what}")
    return Path(os.environ[name]).resolve()


SMOLLM2_DATA = RUNS / "experiments" / "data"  # a link, so that command lines hold no path of this machine


def link_smollm2_data() -> Path:
    """Make SMOLLM2_DATA point to the folder that DIPO_DATA names; returns it."""
    SMOLLM2_DATA.parent.mkdir(parents=True, exist_ok=True)
    SMOLLM2_DATA.unlink(missing_ok=True)
    SMOLLM2_DATA.symlink_to(variable("DIPO_DATA", "TOFU/forget10.json and the other data sets"))
    return SMOLLM2_DATA


def finetune_once(out: Path, base: Path, rows: str, data_dir: Path, flags: str) -> int:
    """A run folder `out` with `base` finetuned on `rows`, made now, gone on with, or there already; an exit status."""
    if (out / "summary.json").exists():
        return 0
    argv = ["--model", str(base), "--finetune", rows, "--data-dir", str(data_dir), "--out", str(out), *flags.split()]
    return train.main(["--resume", "--out", str(out)] if out.exists() else argv)


def smollm2_retain(forget: str) -> str:
    """The retain set: 120 questions of it on a CPU, all on a GPU."""
    retain = complement(f"tofu_{forget}")
    return retain if GPU else f"{retain}[:120]"


@functools.cache
def smollm2_device_flags() -> str:
    """bfloat16 where it is fast; compiled where a compiler is at hand."""
    compiles = GPU or shutil.which("g++")
    return f"--dtype {pick_dtype('auto', 'cuda' if GPU else 'cpu')[0]}{' --compile' if compiles else ''}"


def smollm2_models(forget: str, seed: int, retain: str) -> str:
    flags = f"--model {smollm2_folder(f'{forget}-target')} --retain-model {smollm2_folder(f'{forget}-retrained')}"
    flags += f" --forget tofu_{forget} --retain {retain} --data-dir {SMOLLM2_DATA}"
    return f"{flags} --seed {seed} --preset smollm2 {smollm2_device_flags()}"


def smollm2_flags(forget: str, seed: int) -> list[str]:
    more = "--epochs 10" if GPU else "--batch-size 8 --eval-rows 40 --max-new-tokens 32"
    return f"{smollm2_models(forget, seed, smollm2_retain(forget))} {more}".split()


def prepare_smollm2(forget: str, seed: int, retain: str | None = None) -> int:
    base, data = variable("DIPO_SMOLLM2", "SmolLM2-135M-Instruct"), link_smollm2_data()
    flags = f"--lr 5e-4 --epochs 6 --batch-size 16 --micro-batch-size 16 {smollm2_device_flags()}"
    retain = retain or smollm2_retain(forget)
    for name, rows in (("target", f"{retain}+tofu_{forget}"), ("retrained", retain)):
        if status := finetune_once(smollm2_folder(f"{forget}-{name}"), base, rows, data, flags):
            return status
    return 0


FORGET05_RETAIN = "tofu_retain95[:300]"


def smollm2_forget05_flags(forget: str, seed: int) -> list[str]:
    more = "--epochs 3 --batch-size 16 --eval-retain tofu_retain_perturbed[:50] --max-new-tokens 48"
    return f"{smollm2_models(forget, seed, FORGET05_RETAIN)} {more}".split()


def prepare_smollm2_forget05(forget: str, seed: int) -> int:
    return prepare_smollm2(forget, seed, FORGET05_RETAIN)


def llama_flags(forget: str, seed: int) -> list[str]:
    return f"--forget tofu_{forget} --model llama2-7b --seed {seed} --gradient-checkpointing".split()


def nothing(forget: str, seed: int) -> int:
    return 0


SEEDS = (0, 1, 2, 3, 4)
GPU = torch.cuda.is_available()
SMOLLM2 = dict(forgets=("forget10",), seeds=SEEDS[:3], tuning_seeds=SEEDS[:1], rates=(1e-4, 2e-4, 4e-4)) if GPU else dict(
    forgets=("forget01",), seeds=SEEDS[:1], tuning_seeds=SEEDS[:1], rates=(2e-4, 4e-4),
    methods={name: METHODS[name] for name in ("NPO+GD", "DiPO")},
    remark="A slice for a CPU: 40 forget and 120 retain questions, 3 epochs, evaluated on 40 questions a set, one seed.",
)  # fmt: skip
SMOLLM2_FORGET05 = dict(
    forgets=("forget05",), seeds=SEEDS[:2], tuning_seeds=SEEDS[:1], rates=(),
    methods={
        "NPO+GD": dataclasses.replace(METHODS["NPO+GD"], values=(5.0,), rates=(2e-4, 4e-4)),
        "DiPO": dataclasses.replace(METHODS["DiPO"], values=(0.05, 0.005), rates=(4e-4,)),
        "anchored DiPO": dataclasses.replace(
            METHODS["anchored DiPO"], values=(0.002, 0.005), rates=(4e-4,), more="--beta 0.005"
        ),
    },
    remark="A slice: 200 forget and 300 retain questions, 3 epochs, evaluated on 200 and 50 of them.",
)  # fmt: skip
SMOKE = {name: METHODS[name] for name in ("NPO+GD", "DiPO", "anchored DiPO")}
SCALES = {
    "smoke": Scale("smoke", ("forget01",), (0,), (0,), (1e-3,), smoke_flags, prepare_smoke, small=True, methods=SMOKE),
    "toy": Scale("toy", FORGETS, SEEDS, SEEDS[:2], (1e-4, 2e-4, 4e-4, 8e-4), toy_flags, prepare_toy),
    "smollm2": Scale("smollm2", flags=smollm2_flags, prepare=prepare_smollm2, **SMOLLM2),
    "smollm2-forget05": Scale(
        "smollm2-forget05", flags=smollm2_forget05_flags, prepare=prepare_smollm2_forget05, **SMOLLM2_FORGET05
    ),
    "llama2-7b": Scale("llama2-7b", FORGETS, SEEDS[:3], SEEDS[:1], (5e-6, 1e-5, 2e-5), llama_flags, nothing),
}


# ----------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Job:
    """A run of train.py. `line` is its command line without --out, and the key of its record."""

    forget: str
    seed: int
    line: str


def job(scale: Scale, forget: str, seed: int, method: Method, setting: dict[str, float | str], more: str = "") -> Job:
    flags = [*scale.flags(forget, seed), "--forget-loss", method.forget_loss, "--retain-loss", method.retain_loss]
    for name, value in setting.items():
        flags += [f"--{name.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else value]
    return Job(forget, seed, " ".join([*flags, *method.more.split(), *more.split()]))


class Kept(io.StringIO):
    """Standard error that is kept, and shown as well unless `quiet`."""

    def __init__(self, quiet: bool):
        super().__init__()
        self.shown = None if quiet else sys.stderr

    def write(self, text: str) -> int:
        if self.shown:
            self.shown.write(text)
        return super().write(text)

    def flush(self) -> None:
        if self.shown:
            self.shown.flush()


def call(function, *arguments, quiet: bool) -> str:
    """Call a command line's main; returns '' or the error message of a run that cannot succeed by being repeated (its loss
    is not finite, its roles swap). Raises KeyboardInterrupt or RuntimeError for any other."""
    errors = Kept(quiet)
    with contextlib.redirect_stdout(io.StringIO() if quiet else sys.stdout), contextlib.redirect_stderr(errors):
        status = function(*arguments)
    if status == 130:
        raise KeyboardInterrupt
    if not status:
        return ""
    message = errors.getvalue().strip().splitlines()[-1].removeprefix("error: ")
    if re.search(r"(loss|grad_norm) is (nan|-?inf)|roles swap|overflow", message):
        return message
    raise RuntimeError(message)


def do(item: Job, quiet: bool) -> dict:
    """One run -> its record. A run that was interrupted goes on; its folder is removed when its record is made."""
    out = RUNS / "experiments" / hashlib.sha256(item.line.encode()).hexdigest()[:12]
    began = time.perf_counter()
    argv = ["--resume", "--out", str(out)] if (out / "config.json").exists() else [*item.line.split(), "--out", str(out)]
    if error := call(train.main, argv, quiet=quiet):
        shutil.rmtree(out, ignore_errors=True)
        return {"error": error}
    record = read_json(out / "summary.json")
    made = {"commit": read_json(out / "config.json")["versions"]["commit"]}
    made["seconds"] = round(time.perf_counter() - began, 1)
    if "unlearned" in record:
        del record["model"]
        for model, quality in trained_wording(out).items():
            record[model]["forget_quality_trained"] = quality
    else:  # requests in sequence: the summary of each
        record = {"requests": record}
    if points := read_jsonl(out / "trajectory.jsonl"):
        record["trajectory"] = [{k: p[k] for k in TRAJECTORY if k in p} for p in points]
    shutil.rmtree(out)
    return record | made


TRAJECTORY = ("epoch", "forget_quality", "model_utility", "forget_probability", "forget_truth_ratio")


def trained_wording(out: Path) -> dict[str, float]:
    """{model: forget quality} of a run on TOFU by the answers as they were trained, in place of their paraphrases: where it
    is lower, memory remains in the wording. Of the models whose evaluation is kept in their run folder."""
    config = read_json(out / "config.json")["config"]
    folders = {"target": config["model"], "unlearned": out, "retrained": config["retain_model"]}
    logs, ratios = {}, {}
    for model, folder in folders.items():
        paths = sorted(Path(folder or "", "eval").glob("final-*/log.json"), key=lambda path: path.stat().st_mtime)
        logs[model] = [log for log in map(read_json, paths) if "forget" in log["rows"]]
    for kept, (model, found) in itertools.product(logs["unlearned"], logs.items()):
        for log in found:
            if log["protocol"] | {"weights": ""} == kept["protocol"] | {"weights": ""}:  # the same was asked
                items, epsilon = log["rows"]["forget"].values(), log["protocol"]["epsilon"]
                ratios[model] = [truth_ratio(item["loss"], item["wrong_losses"], epsilon=epsilon) for item in items]
    return {m: forget_quality(found, ratios["retrained"]) for m, found in ratios.items() if "retrained" in ratios}


SHARE = Field(float, 0, 1)
POINT = dict.fromkeys(("forget_quality", "model_utility", "forget_probability"), SHARE)
LATER = dict.fromkeys(("language", "forget_quality_trained"), Field(float, 0, 1, required=False))
TOFU = Field(dict, fields=POINT | LATER | {"parts": Field(dict, items=SHARE)})
ROUGES = ("forget_verbmem_ROUGE", "forget_knowmem_ROUGE", "retain_knowmem_ROUGE")
MUSE = Field(dict, fields=dict.fromkeys(ROUGES, SHARE) | {"privleak": Field(float)})


def read_records(path: Path) -> dict[str, dict]:
    """{command line: record} of a results file. Raises UserError naming the record and what is wrong in it."""
    remedy = "take the repository's, or remove it and run again"
    records = read_json(path, remedy=remedy, fields={"records": Field(dict, items=Field(dict))})["records"]
    points = Field(list, 1, items=Field(dict, fields=POINT | {"epoch": Field(float, 0)}))
    for line, record in records.items():
        kind, every = MUSE if "--forget muse" in line else TOFU, re.findall(r"--eval-every (\S+)", line)[-1:]
        fields = {"target": kind, "unlearned": kind, "retrained": dataclasses.replace(kind, required=False)}
        fields["trajectory"] = dataclasses.replace(points, required=every not in ([], ["0"]))
        if "error" in record:
            fields = {"error": Field(str)}
        elif "requests" in record:
            fields = {"requests": Field(dict, fields={f"request {k}": MUSE for k in range(1, 5)})}
        if wrong := fault(record, Field(dict, fields=fields)):
            raise UserError(f"{path}: record {line!r}: {wrong}; {remedy}")
    return records


class Lab:
    """Where an experiment runs its jobs and leaves its results: `folder`/NAME.json, NAME.md, NAME.png."""

    def __init__(self, name: str, scale: Scale, folder: Path, processes: int):
        self.name, self.scale, self.folder, self.processes = name, scale, folder / scale.name, processes

    def keep(self, records: dict[str, dict]) -> None:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {self.processes} at a time"
        made_by = versions() | {"machine": machine}
        write_json(self.folder / f"{self.name}.json", made_by | {"records": records})

    def run(self, jobs: list[Job], what: str = "runs", needs: tuple[str, ...] = ()) -> list[dict]:
        """The record of each job, in order. Prepares the models that the jobs need. needs: scores of the unlearned model; a
        record without one of them is made again, if the job has a retrained model."""

        def lacks(record: dict | None) -> bool:
            return record is None or ("retrained" in record and not {*needs} <= record["unlearned"].keys())

        mine, others = {}, {}  # what this experiment has run, and what others of this scale
        for path in self.folder.glob("*.json"):
            found = read_records(path)
            if path.stem == self.name:
                mine = found
            else:
                others |= {line: record for line, record in found.items() if lacks(others.get(line))}
        mine |= {j.line: others[j.line] for j in jobs if j.line in others and lacks(mine.get(j.line))}
        todo = list({j.line: j for j in jobs if lacks(mine.get(j.line))}.values())
        firsts = {j.seed: (j.forget, j.seed) for j in reversed(todo)}
        rest = {(j.forget, j.seed) for j in todo} - {*firsts.values()}
        for pairs in (firsts.values(), rest):  # a seed's first forget set makes its target model; no two at a time
            self._each([(self.scale.prepare, *pair) for pair in sorted(pairs)], "models", lambda index, result: None)

        def done(index, record):
            mine[todo[index].line] = record
            self.keep(mine)

        self._each([(do, j) for j in todo], f"{self.name}: {what}", done)
        self.keep(mine)
        return [mine[j.line] for j in jobs]

    def _each(self, calls: list[tuple], label: str, done) -> None:
        if not calls:
            return
        with tqdm(total=len(calls), desc=label, unit="run") as bar:
            if min(self.processes, len(calls)) == 1:  # in this process, with all threads
                for index, (function, *arguments) in enumerate(calls):
                    done(index, _apply(function, arguments, quiet=self.scale.small))
                    bar.update()
                return
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(self.processes, context, initializer=_single_threaded) as pool:
                futures = {pool.submit(_apply, f, arguments, True): i for i, (f, *arguments) in enumerate(calls)}
                try:
                    for future in as_completed(futures):
                        done(futures[future], future.result())
                        bar.update()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    for process in multiprocessing.active_children():
                        process.terminate()  # train.py saves before it ends
                    raise

    def write(self, text: str, figure) -> None:
        from matplotlib import pyplot

        (self.folder / f"{self.name}.md").write_text(text.rstrip() + "\n", encoding="utf-8")
        figure.savefig(self.folder / f"{self.name}.png", dpi=110)
        pyplot.close(figure)
        print(f"{text}\n{self.folder / self.name}.json, .md, .png", flush=True)


class Planned(Exception):
    """The commands have been printed."""


class Plan(Lab):
    """Prints commands in place of running them. What depends on results ends the list."""

    def run(self, jobs: list[Job], what: str = "runs", needs: tuple[str, ...] = ()) -> list[dict]:
        print(f"# {self.name}, {what}: {len(jobs)} runs")
        for j in jobs:
            print(f"python train.py {j.line}")
        raise Planned


def _single_threaded() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the pool


def _apply(function, arguments, quiet: bool):
    if function is do:
        return do(*arguments, quiet)
    call(lambda: function(*arguments), quiet=quiet)


# -------------------------------------------------------------------------------------------------- choosing, tables, plots


def outcome(record: dict, model: str = "unlearned") -> tuple[float, float]:
    """(forget quality, model utility as a share of the target's); a run that broke down has neither."""
    if "error" in record:
        return 0.0, 0.0
    return record[model]["forget_quality"], share(record[model], record)


NEEDED = ("language", "forget_quality_trained")  # scores that older records do not have


def measured(records: list[dict], key: str, model: str = "unlearned") -> list[float]:
    """One score of the runs that did not break down and have it."""
    found = [r[model] | r[model]["parts"] for r in records if "error" not in r]
    return [f[key] for f in found if key in f]


def columns(records: list[dict], model: str = "unlearned") -> dict[str, str]:
    """{head: cell} of a table: a model's scores over the seeds."""
    quality, kept = zip(*(outcome(r, model) for r in records), strict=True)

    def cell(key: str, digits: int = 2) -> str:
        found = measured(records, key, model)
        return spread(found, digits) if found else ""

    return {
        "forget quality": spread(list(quality)),
        "forget quality, trained wording": cell("forget_quality_trained"),
        "utility / target's": spread(list(kept)),
        "retain answers' probability": cell("retain_probability", 3),
        "language": cell("language"),
        "forget answers' probability": cell("forget_probability") or "broke down",
    }


def share(scores: dict, record: dict, key: str = "model_utility") -> float:
    """Of the target's utility; an untrained target of the smoke scale has none."""
    return scores[key] / record["target"][key] if record["target"][key] else 0.0


def tune(lab: Lab, methods: dict[str, Method]) -> dict[str, dict[str, float]]:
    """{method: setting}, chosen on the largest forget set and the tuning seeds by one rule for all: of the settings that
    keep KEEP of the target's utility the one with the highest mean forget quality; if none does, the one that keeps most."""
    scale = lab.scale
    tried = {name: grid(method, scale.rates)[: 1 if scale.small else None] for name, method in methods.items()}
    jobs = {
        name: [
            [job(scale, scale.forgets[-1], seed, methods[name], choice) for seed in scale.tuning_seeds] for choice in choices
        ]
        for name, choices in tried.items()
    }
    found = iter(lab.run([j for choices in jobs.values() for seeds in choices for j in seeds], "search"))
    chosen = {}
    for name, choices in tried.items():
        scores = []
        for _ in choices:
            qualities, shares = zip(*(outcome(next(found)) for _ in scale.tuning_seeds), strict=True)
            quality, share = statistics.fmean(qualities), statistics.fmean(shares)
            scores.append((share >= KEEP, quality if share >= KEEP else share))
        chosen[name] = choices[scores.index(max(scores))]
    return chosen


def budget(scale: Scale, methods: dict[str, Method]) -> str:
    rates = ", ".join(f"{r:g}" for r in scale.rates)
    lines = [
        f"{name}: {m.coefficient} {spell(m.values)}" + (f" at lr {spell(m.rates)}" if m.rates else "")
        + (f" with {m.more}" if m.more else "")
        for name, m in methods.items() if m.coefficient
    ]  # fmt: skip
    start = f"Learning rates {rates} (a method without a coefficient: twice as many), times " if rates else ""
    count = len(grid(next(iter(methods.values())), scale.rates))
    if count == 1:
        return f"No search: {'; '.join(lines)}. {scale.remark}".rstrip()
    return (
        f"Search: {count} settings a method, on {scale.forgets[-1]}, seeds {spell(scale.tuning_seeds)}. "
        f"{start}{'; '.join(lines)}. Chosen is the setting with the highest mean forget quality among those that keep "
        f"{KEEP:.0%} of the target's utility, or if none does, the one that keeps most. {scale.remark}".rstrip()
    )


def spell(values) -> str:
    return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)


def describe(setting: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


def number(value: float, digits: int = 2) -> str:
    """Rounded; what rounds to nothing, but is not zero, as a power of ten."""
    return f"{value:.0e}" if 0 < abs(value) < 0.5 * 10**-digits else f"{value:.{digits}f}"


def spread(values: list[float], digits: int = 2) -> str:
    """mean ± standard deviation."""
    mean = number(statistics.fmean(values), digits)
    return mean if len(values) == 1 or "e" in mean else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def spreads(outcomes: list[tuple[float, float]]) -> str:
    """Forget quality / share of the utility."""
    return " / ".join(spread(list(values)) for values in zip(*outcomes, strict=True))


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def subplots(*shape: int, size: tuple[float, float] = (4.5, 4.0)):
    """(figure, axes [rows][columns]) of matplotlib, drawn without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        *shape, figsize=(size[0] * shape[1], size[1] * shape[0]), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return figure, axes


FLOOR = 1e-12  # forget qualities below are drawn here


OTHERS = ("C0", "C1", "C2", "C4", "C5", "C6", "C7", "C8", "C9", "navy", "peru")  # C3 is nearly red


def color(name: str, i: int) -> str:
    return {"DiPO": "black", "anchored DiPO": "red"}.get(name, OTHERS[i % len(OTHERS)])


def scatter(
    axis, outcomes: dict[str, list[tuple[float, float]]], title: str,
    against: str = "model utility / target's", line: float | None = KEEP,
) -> None:  # fmt: skip
    """Forget quality (log axis) against the share of utility kept, or another score with a line at a value of note: small
    marks for seeds, large ones for their means."""
    for i, (name, points) in enumerate(outcomes.items()):
        if not points:
            continue
        quality, share = zip(*points, strict=True)
        look = {"marker": "osD^vP*X<>hd"[i % 12], "color": color(name, i), "linestyle": "none"}
        axis.plot(share, [max(q, FLOOR) for q in quality], markersize=3, alpha=0.5, **look)
        means = statistics.fmean(share), max(statistics.fmean(quality), FLOOR)
        axis.plot(*means, markersize=9, label=name, **look)
    axis.axhline(0.05, color="gray", linewidth=0.8, linestyle=":")
    if line is not None:
        axis.axvline(line, color="gray", linewidth=0.8, linestyle=":")
    axis.set(yscale="log", xlabel=against, ylabel="forget quality", title=title)


def speaking(records: list[dict]) -> list[tuple[float, float]]:
    """(forget quality, language) of each run that has both."""
    return [pair for r in records for pair in zip(measured([r], "forget_quality"), measured([r], "language"), strict=False)]


def note(seeds) -> str:
    return f"Mean ± standard deviation over seeds {spell(seeds)}." if len(seeds) > 1 else f"Seed {seeds[0]}."


EVERYWHERE = ("smoke", "toy", "smollm2", "llama2-7b")


def main(name: str, doc: str, experiment: Callable[[Lab], None], scales: tuple[str, ...] = EVERYWHERE) -> int:
    """The command line of one experiment."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="toy", choices=scales)
    parser.add_argument("--results", type=Path, default=RESULTS, help="what is in it is not run again [experiments/results]")
    parser.add_argument(
        "--processes", type=int, help="runs at a time, one thread each [toy: one per core; else 1, all cores]"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands of train.py, run nothing")
    args = parser.parse_args()
    processes = args.processes or ((os.cpu_count() or 1) if args.scale == "toy" else 1)
    try:
        require_extra()
        lab = (Plan if args.dry_run else Lab)(name, SCALES[args.scale], args.results, processes)
        experiment(lab)
    except Planned:
        return 0
    except (RuntimeError, UserError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0
