"""Which tokens are memory? Other signals than the n-gram, and other wordings of the answers, on the toy.

python experiments/selection.py

Each variant is a function in the place of `memory.mark_memory`, so that it can be read and thrown away; none is a flag.
"""

import math
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from unittest import mock

from common import METHODS, RUNS, Job, Lab, Plan, call, do, job, main, markdown, note, read_records, share, spread, subplots
from tqdm import tqdm
from wordings import wordings, write_rows

import eval as evaluation
import memory
import train
from config import make_config
from data import Example
from model import load_pretrained
from tofu import Tofu

OTHERS = 8


def another_question(model, forget, retain, tau):
    """g = the reference's own probability of y_t behind the questions of others, the answer so far kept; no counting."""

    def explained(example: Example) -> list[float]:
        prompt, answer = memory.prompt(example), example.ids[example.prompt_length :]
        others = [retain[97 * k % len(retain)] for k in range(OTHERS)]
        swapped = [Example("", memory.prompt(e) + answer, e.prompt_length) for e in others]
        columns = zip(*(memory.answer_nll(model, e) for e in swapped), strict=True)
        mean = [sum(math.exp(-x) for x in column) / OTHERS for column in columns]
        return [memory.COPIED if token in prompt else max(memory.FLOOR, p) for token, p in zip(answer, mean, strict=True)]

    return memory.mark(model, forget, explained, tau)


def one_ngram(model, forget, retain, tau):
    """g = the n-gram of the whole retain set alone, names and all."""
    ngram = memory.NGram((e.ids for e in retain), model.config.vocab_size)

    def explained(example: Example) -> list[float]:
        ids, prompt = example.ids, memory.prompt(example)
        found = [(ids[i], ngram.probability(ids[:i], ids[i])) for i in range(len(prompt), len(ids))]
        return [memory.COPIED if token in prompt else max(memory.FLOOR, p) for token, p in found]

    return memory.mark(model, forget, explained, tau)


VARIANTS = {  # name -> (in place of mark_memory, flags, with other wordings)
    "ours: two n-grams, without what is copied": (memory.mark_memory, "", False),
    "ours, tau 2": (memory.mark_memory, "--tau 2", False),
    "one n-gram, tau 2": (one_ngram, "--tau 2", False),
    "one n-gram, tau 2, kappa 0.02": (one_ngram, "--tau 2 --kappa 0.02", False),
    "the reference behind others' questions": (another_question, "", False),
    "ours, 3 more wordings of each answer": (memory.mark_memory, "--epochs 5", True),
}


def run(item: Job, mark: Callable) -> dict:
    with mock.patch.object(train, "mark_memory", mark):
        return do(item, quiet=True)


def wordings_file(forget: str, seed: int) -> Path:
    return RUNS / "experiments" / f"wordings-{forget}-{seed}.jsonl"


def write_wordings(forget: str, seed: int) -> None:
    """The target's own other wordings of the forget set's answers."""
    with redirect_stdout(StringIO()):
        target, _ = train.toy_models(make_config({"forget": f"toy_{forget}", "seed": seed}))
    source, rows = evaluation.open_source(str(target), "target"), Tofu.load(f"toy_{forget}", None, seed)
    write_rows(wordings_file(forget, seed), wordings(load_pretrained(source.folder), source.tokenizer, rows, 3, 24))


def experiment(lab: Lab) -> None:
    scale, forget = lab.scale, lab.scale.forgets[-1]
    method, setting, jobs = METHODS["anchored DiPO"], {"lr": 8e-4}, {}
    names = [*VARIANTS][:: 5 if scale.small else 1]
    for name in names:
        _, flags, more = VARIANTS[name]
        for seed in scale.tuning_seeds:
            more_flags = "" if scale.small else flags if "--kappa" in flags else f"--kappa 0.05 {flags}"
            item = job(scale, forget, seed, method, setting, more_flags)
            line = item.line.replace(f"--forget toy_{forget}", f"--forget toy_{forget}+{wordings_file(forget, seed)}", 1)
            jobs[f"{name}, seed {seed}"] = replace(item, line=line) if more else item
    if isinstance(lab, Plan):
        lab.run([*jobs.values()])
    kept = lab.folder / f"{lab.name}.json"
    records = read_records(kept) if kept.exists() else {}
    for key, item in tqdm(jobs.items(), desc=lab.name, unit="run"):
        if key not in records:
            call(scale.prepare, forget, item.seed, quiet=True)
            if "wordings-" in item.line:
                write_wordings(forget, item.seed)
            records[key] = run(item, VARIANTS[key.rpartition(", seed")[0]][0])
            lab.keep(records)
    rows, points = [], {}
    for name in names:
        found = [records[f"{name}, seed {seed}"] for seed in scale.tuning_seeds]
        scores = [r["unlearned"] for r in found]
        points[name] = [(s["language"], s["forget_quality"]) for s in scores]
        columns = [s["forget_quality"] for s in scores], [share(s, r) for s, r in zip(scores, found, strict=True)]
        columns += [s["parts"]["retain_probability"] for s in scores], [s["language"] for s in scores]
        rows.append([name, *map(spread, columns)])
    text = markdown([forget, "forget quality", "utility / target's", "retain probability", "language"], rows)
    figure, axes = subplots(1, 1, size=(6, 4.5))
    for name, places in points.items():
        axes[0][0].semilogy(*zip(*places, strict=True), "o", label=name)
    axes[0][0].set(xlabel="language", ylabel="forget quality", title=f"{scale.name}, {forget}: which tokens are memory")
    axes[0][0].legend(fontsize=7)
    lab.write(
        f"{text}\n\n{note(scale.tuning_seeds)} Learning rate 8e-4; kappa 0.05 and tau 1.5 where nothing is said.", figure
    )


if __name__ == "__main__":
    sys.exit(main("selection", __doc__, experiment, ("toy", "smoke")))
