"""MUSE News: growing forget sets (scalability) and one request after the other (sustainability), DiPO against NPO+GD.

python experiments/muse.py --scale toy

At toy scale the corpus is the toy authors in MUSE's layout (`data.write_toy_muse`). The learning rate is searched on the
first growing set, the same values for both methods: of those that keep 90 % of the target's utility the one with PrivLeak
nearest to zero; if none does, the one that keeps most.
"""

import dataclasses
import statistics
import sys

from common import KEEP, METHODS, Lab, color, evaluation, job, main, markdown, note, share, spell, spread, subplots, train

from data import write_toy_muse

SHOWN = ("DiPO", "NPO+GD")
SCORES = {"VerbMem": "forget_verbmem_ROUGE", "KnowMem": "forget_knowmem_ROUGE", "PrivLeak": "privleak",
          "utility": "retain_knowmem_ROUGE"}  # fmt: skip
RATES = {"smoke": (1e-3,), "toy": (1e-4, 2e-4, 4e-4, 8e-4), "llama2-7b": (5e-6, 1e-5, 2e-5)}
EVERYTHING = "muse_news/train/forget+muse_news/train/retain1+muse_news/train/retain2"


def toy_home(seed: int):
    """The folder of the toy corpus and its models."""
    return train.toy_base(train.make_config({"seed": seed})).parent / "muse"


def prepare(request: str, seed: int, epochs: float = 40.0) -> int:
    """The toy corpus, a target that has read all of it, and a model retrained without what can be forgotten."""
    home = toy_home(seed)
    for name, texts in (("target", EVERYTHING), ("retrained", EVERYTHING.split("+", 1)[1])):
        out = home / name
        if not (out / "summary.json").exists():
            write_toy_muse(home, seed)
            flags = f"--model {home.parent / 'base'} --finetune {texts} --data-dir {home} --seed {seed} --max-length 128"
            flags += f" --preset muse --epochs {epochs:g} --lr 2e-3 --batch-size 16 --micro-batch-size 16 --warmup-epochs 2"
            argv = [*flags.split(), "--schedule", "linear", "--out", str(out)]
            if status := train.main(["--resume", "--out", str(out)] if out.exists() else argv):
                return status
    if epochs < 1:  # the smoke scale, whose runs evaluate otherwise
        return 0
    models = f"--model {home / 'target'} --retain-model {home / 'retrained'}"
    return evaluation.main(f"{models} --forget muse_news --data-dir {home}".split())


def prepare_smoke(request: str, seed: int) -> int:
    return prepare(request, seed, 0.2)


def toy_flags(request: str, seed: int) -> list[str]:
    home = toy_home(seed)
    flags = f"--forget muse_news --model {home / 'target'} --retain-model {home / 'retrained'} --data-dir {home}"
    return f"{flags} --seed {seed} --max-length 128 --batch-size 8 --micro-batch-size 16 {request}".split()


def smoke_flags(request: str, seed: int) -> list[str]:
    return [*toy_flags(request, seed), "--epochs", "0.5", "--eval-rows", "2"]


def llama_flags(request: str, seed: int) -> list[str]:
    return f"--forget muse_news --model muse-news --seed {seed} --gradient-checkpointing {request}".split()


FLAGS = {"smoke": smoke_flags, "toy": toy_flags, "llama2-7b": llama_flags}


def kept_utility(record: dict) -> float:
    return 0.0 if "error" in record else share(record["unlearned"], record, SCORES["utility"])


def experiment(lab: Lab) -> None:
    name = lab.scale.name
    seeds, shown = lab.scale.seeds[:3], SHOWN[: 1 if lab.scale.small else 2]
    lab.scale = scale = dataclasses.replace(
        lab.scale, flags=FLAGS[name], prepare={"smoke": prepare_smoke, "toy": prepare}.get(name, lab.scale.prepare)
    )
    growing = [f"--scal {k}" for k in range(1, 2 if scale.small else 5)]
    chosen = {}
    tried = {(m, lr): job(scale, growing[0], seeds[0], METHODS[m], {"lr": lr}) for m in shown for lr in RATES[name]}
    found = dict(zip(tried, lab.run([*tried.values()], "search"), strict=True))
    for m in shown:
        scores = {}
        for lr in RATES[name]:
            kept = kept_utility(found[m, lr])
            scores[kept >= KEEP, -abs(found[m, lr]["unlearned"]["privleak"]) if kept >= KEEP else kept] = lr
        chosen[m] = scores[max(scores)]
    jobs = {
        (m, request, seed): job(scale, request, seed, METHODS[m], {"lr": chosen[m]})
        for m in shown
        for request in [*growing, "--sust"]
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
        for k in range(1, 5):
            runs = [r["requests"][f"request {k}"] for seed in seeds if "error" not in (r := records[m, "--sust", seed])]
            rows.append([f"{m}, after request {k}", *(cells(runs) if runs else ["broke down", "", "", ""])])
            curves[m, "in sequence", k] = runs
    text = markdown(["MUSE News", *SCORES], rows) + f"\n\nIn percent. {note(seeds)} Learning rates "
    text += ", ".join(f"{m} {lr:g}" for m, lr in chosen.items())
    text += f" (tried: {spell(RATES[name])}). VerbMem, KnowMem and PrivLeak always on the first forget set."
    figure, axes = subplots(2, 4, size=(3.4, 3.0))
    for row, way in enumerate(("growing", "in sequence")):
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
