"""MUSE News: growing forget sets (scalability) and one request after the other (sustainability), DiPO against NPO+GD, and on
the toy anchored DiPO beside them.

python experiments/muse_news.py --scale toy

The learning rate is searched on the first growing set, the same values for every method: of those that keep 90 % of the
target's utility the one with PrivLeak nearest to zero; if none does, the one that keeps most.

At toy scale the corpus is the toy authors in MUSE's layout (`toy_muse.py`), at smollm2 scale a slice of the real
texts (`muse_slice`).
"""

import dataclasses
import statistics
import sys
from pathlib import Path

from common import (
    KEEP,
    METHODS,
    Lab,
    color,
    finetune_once,
    job,
    link_smollm2_data,
    main,
    markdown,
    note,
    share,
    smollm2_device_flags,
    smollm2_folder,
    spell,
    spread,
    subplots,
    variable,
)
from toy_muse import toy_muse, write_muse

import eval as evaluation
import toy
import train
from config import RUNS, Config
from data import fingerprint
from muse import load_muse

SHOWN = ("DiPO", "NPO+GD", "anchored DiPO")
KAPPA = {"anchored DiPO": {"kappa": 0.05}}  # not searched
SCORES = {"VerbMem": "forget_verbmem_ROUGE", "KnowMem": "forget_knowmem_ROUGE", "PrivLeak": "privleak",
          "utility": "retain_knowmem_ROUGE"}  # fmt: skip
RATES = {"smoke": (1e-3,), "toy": (1e-4, 2e-4, 4e-4, 8e-4), "smollm2": (2e-4, 4e-4), "llama2-7b": (5e-6, 1e-5, 2e-5)}
SIZES = {"smoke": 1, "smollm2": 2}  # how many growing sets, of four
ALONE = ("smollm2",)  # scales without requests in sequence, for time
EVERYTHING = "muse_news/train/forget+muse_news/train/retain1+muse_news/train/retain2"


def models(home: Path, base: Path, seed: int, flags: str) -> int:
    """In `home`, beside its corpus: a target that has read all of it, and one retrained without what can be forgotten."""
    flags = f"--seed {seed} --max-length 128 --preset muse --schedule linear {flags}"
    for name, texts in (("target", EVERYTHING), ("retrained", EVERYTHING.split("+", 1)[1])):
        if status := finetune_once(home / name, base, texts, home, flags):
            return status
    return 0


def run_flags(home: Path, request: str, seed: int) -> list[str]:
    flags = f"--forget muse_news --model {home / 'target'} --retain-model {home / 'retrained'} --data-dir {home}"
    return f"{flags} --seed {seed} --max-length 128 --micro-batch-size 16 {request}".split()


def toy_home(seed: int) -> Path:
    """Named by what the corpus holds."""
    name = f"muse-{fingerprint([*toy_muse(seed).items()])[:8]}"
    return toy.toy_base(seed, Config.toy_vocabulary, RUNS, train.TOY_FINETUNE).parent / name


def prepare_toy(request: str, seed: int, epochs: float = 12.0) -> int:
    home = write_muse(toy_home(seed), toy_muse(seed))
    flags = f"--epochs {epochs:g} --lr 2e-3 --batch-size 16 --micro-batch-size 16 --warmup-epochs 2"
    if (status := models(home, home.parent / "base", seed, flags)) or epochs < 1:  # smoke: its runs evaluate otherwise
        return status
    pair = f"--model {home / 'target'} --retain-model {home / 'retrained'}"
    return evaluation.main(f"{pair} --forget muse_news --data-dir {home}".split())


def toy_flags(request: str, seed: int) -> list[str]:
    return [*run_flags(toy_home(seed), request, seed), "--batch-size", "8", "--epochs", "4"]


def prepare_smoke(request: str, seed: int) -> int:
    return prepare_toy(request, seed, 0.05)


def smoke_flags(request: str, seed: int) -> list[str]:
    return [*toy_flags(request, seed), "--epochs", "0.2", "--eval-rows", "2"]


def muse_slice(source: Path) -> dict[str, list[dict[str, str]]]:
    """A slice of MUSE-News that two cores can do, {'config/split': rows}, of what is at hand in `source`.

    Documents of the forget set are 16 VerbMem passages, their prompts cut to the last 1,200 characters: raw/forget holds the
    first four, scal/forget_k the first 4k, sust/forget_k the k-th four. retain1 and retain2 are eight and four texts of
    privleak/retain. The members of PrivLeak are pieces of raw/forget. Questions are the first 20 of each set, behind
    four examples, as they are: few of them are about these passages.
    """

    def rows(config, split, count):
        return load_muse("news", config, split, source)[:count]

    def documents(texts):
        return [{"text": text} for text in texts]

    def pieces(texts, length=400):
        return documents(text[i : i + length] for text in texts for i in range(0, len(text) - length + 1, length))

    verbmem = [{"prompt": row["prompt"][-1200:].split(" ", 1)[1], "gt": row["gt"]} for row in rows("verbmem", "forget", 16)]
    forget = [f"{row['prompt']} {row['gt']}" for row in verbmem]
    retain = [row["text"][:1600] for row in rows("privleak", "retain", 12)]
    holdout = [row["text"][:1600] for row in rows("privleak", "holdout", 4)]
    sets = {"raw/forget": documents(forget[:4]), "raw/retain1": documents(retain[:8]), "raw/retain2": documents(retain[8:])}
    sets |= {f"scal/forget_{k}": documents(forget[: 4 * k]) for k in range(1, 5)}
    sets |= {f"sust/forget_{k}": documents(forget[4 * k - 4 : 4 * k]) for k in range(1, 5)}
    sets |= {"train/forget": documents(forget)} | {f"train/retain{k}": sets[f"raw/retain{k}"] for k in (1, 2)}
    sets |= {"privleak/forget": pieces(forget[:4]), "privleak/holdout": pieces(holdout), "verbmem/forget": verbmem[:4]}
    for split in ("forget_qa", "retain_qa"):
        sets |= {f"knowmem/{split}": rows("knowmem", split, 20), f"knowmem/{split}_icl": rows("knowmem", f"{split}_icl", 4)}
    return sets


def prepare_smollm2(request: str, seed: int) -> int:
    base = variable("DIPO_SMOLLM2", "SmolLM2-135M-Instruct")
    home = write_muse(smollm2_folder("muse"), muse_slice(link_smollm2_data()))
    return models(home, base, seed, f"--epochs 6 --lr 5e-4 --batch-size 4 --micro-batch-size 4 {smollm2_device_flags()}")


def smollm2_flags(request: str, seed: int) -> list[str]:
    more = f"--batch-size 4 --epochs 4 --eval-rows 16 {smollm2_device_flags()}"
    return [*run_flags(smollm2_folder("muse"), request, seed), *more.split()]


def llama_flags(request: str, seed: int) -> list[str]:
    return f"--forget muse_news --model muse-news --seed {seed} --gradient-checkpointing {request}".split()


FLAGS = {"smoke": smoke_flags, "toy": toy_flags, "smollm2": smollm2_flags, "llama2-7b": llama_flags}
PREPARE = {"smoke": prepare_smoke, "toy": prepare_toy, "smollm2": prepare_smollm2}


def kept_utility(record: dict) -> float:
    return 0.0 if "error" in record else share(record["unlearned"], record, SCORES["utility"])


def experiment(lab: Lab) -> None:
    name = lab.scale.name
    seeds, shown = lab.scale.seeds[:3], SHOWN[: {"smoke": 1, "toy": 3}.get(name, 2)]
    prepare = PREPARE.get(name, lab.scale.prepare)
    lab.scale = scale = dataclasses.replace(lab.scale, flags=FLAGS[name], prepare=prepare)
    growing = [f"--scal {k}" for k in range(1, 1 + SIZES.get(name, 4))]
    sequence = [] if name in ALONE else ["--sust"]
    chosen = {}
    tried = {
        (m, lr): job(scale, growing[0], seeds[0], METHODS[m], {"lr": lr} | KAPPA.get(m, {}))
        for m in shown
        for lr in RATES[name]
    }
    found = dict(zip(tried, lab.run([*tried.values()], "search"), strict=True))
    for m in shown:
        scores = {}
        for lr in RATES[name]:
            kept = kept_utility(found[m, lr])
            scores[kept >= KEEP, -abs(found[m, lr]["unlearned"]["privleak"]) if kept >= KEEP else kept] = lr
        chosen[m] = scores[max(scores)]
    jobs = {
        (m, request, seed): job(scale, request, seed, METHODS[m], {"lr": chosen[m]} | KAPPA.get(m, {}))
        for m in shown
        for request in [*growing, *sequence]
        for seed in seeds
    }
    records = dict(zip(jobs, lab.run([*jobs.values()]), strict=True))
    bounds = [records[shown[0], growing[0], seed] for seed in seeds]

    def cells(scores: list[dict]) -> list[str]:
        return [spread([s[key] * (1 if label == "PrivLeak" else 100) for s in scores], 1) for label, key in SCORES.items()]

    rows = [[label, *cells([b[label] for b in bounds])] for label in ("target", "retrained") if label in bounds[0]]
    curves = {}
    for m in shown:
        for k, request in enumerate(growing, 1):
            runs = [r["unlearned"] for seed in seeds if "error" not in (r := records[m, request, seed])]
            rows.append([f"{m}, {k} x the forget set", *(cells(runs) if runs else ["broke down", "", "", ""])])
            curves[m, "growing", k] = runs
        for k in range(1, 5) if sequence else ():
            runs = [r["requests"][f"request {k}"] for seed in seeds if "error" not in (r := records[m, "--sust", seed])]
            rows.append([f"{m}, after request {k}", *(cells(runs) if runs else ["broke down", "", "", ""])])
            curves[m, "in sequence", k] = runs
    text = markdown(["MUSE News", *SCORES], rows) + f"\n\nIn percent. {note(seeds)} Learning rates "
    text += ", ".join(f"{m} {lr:g}" for m, lr in chosen.items())
    text += f" (tried: {spell(RATES[name])}). VerbMem, KnowMem and PrivLeak always on the first forget set."
    text += " A slice of the texts for a CPU: `muse_slice` in experiments/muse_news.py." if name == "smollm2" else ""
    figure, axes = subplots(1 + len(sequence), 4, size=(3.4, 3.0))
    for row, way in enumerate(("growing", "in sequence")[: 1 + len(sequence)]):
        for axis, (label, key) in zip(axes[row], SCORES.items(), strict=True):
            for i, m in enumerate(shown):
                points = [(k, curves[m, way, k]) for k in range(1, 5) if curves.get((m, way, k))]
                factor = 1 if label == "PrivLeak" else 100
                axis.plot([k for k, _ in points], [factor * statistics.fmean(s[key] for s in runs) for _, runs in points],
                          "o-", label=m, color=color(m, i))  # fmt: skip
            if "retrained" in bounds[0]:
                level = statistics.fmean(b["retrained"][key] for b in bounds) * (1 if label == "PrivLeak" else 100)
                axis.axhline(level, color="black", linewidth=0.8, linestyle="--", label="retrained")
            axis.set(title=label, xlabel="times the forget set" if way == "growing" else "requests", xticks=range(1, 5))
    axes[0][0].legend(fontsize=8)
    lab.write(text, figure)


if __name__ == "__main__":
    sys.exit(main("muse", __doc__, experiment, tuple(FLAGS)))
