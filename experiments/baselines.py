"""TOFU: does DiPO forget better than the baselines at the same utility? Forget 1, 5, 10 %; the same search for each method.

python experiments/baselines.py --scale toy
"""

import statistics
import sys

from common import (
    Lab,
    budget,
    describe,
    job,
    main,
    markdown,
    note,
    outcome,
    scatter,
    share,
    spell,
    spread,
    subplots,
    tune,
)


def experiment(lab: Lab) -> None:
    scale = lab.scale
    print(budget(scale, scale.methods), flush=True)
    chosen = tune(lab, scale.methods)
    jobs = {
        (forget, name): [job(scale, forget, seed, scale.methods[name], chosen[name]) for seed in scale.seeds]
        for forget in scale.forgets
        for name in scale.methods
    }
    found = iter(lab.run([j for group in jobs.values() for j in group], "all seeds"))
    records = {key: [next(found) for _ in group] for key, group in jobs.items()}
    text, (figure, axes) = "", subplots(1, len(scale.forgets), size=(5, 4.5))
    for forget, axis in zip(scale.forgets, axes[0], strict=True):
        bounds = [r for r in records[forget, "DiPO"] if "error" not in r]
        outcomes = {name: [outcome(r) for r in records[forget, name]] for name in scale.methods}
        rows = []
        for label, name in (("original", "target"), ("retrained", "retrained")):
            quality = [r[name]["forget_quality"] for r in bounds]
            kept = [share(r[name], r) for r in bounds]
            probability = [r[name]["forget_probability"] for r in bounds]
            rows.append([label, spread(quality), "", spread(kept), spread(probability), ""])
        held_out = [i for i, seed in enumerate(scale.seeds) if seed not in scale.tuning_seeds]
        for name, points in outcomes.items():
            quality, kept = zip(*points, strict=True)
            probability = [r["unlearned"]["forget_probability"] for r in records[forget, name] if "error" not in r]
            rows.append([
                f"**{name}**" if name == "DiPO" else name, spread(quality),
                spread([quality[i] for i in held_out]) if held_out else "", spread(kept),
                spread(probability) if probability else "broke down", describe(chosen[name]),
            ])  # fmt: skip
        unseen = spell([scale.seeds[i] for i in held_out]) or "not searched on"
        head = ["", "forget quality", f"on seeds {unseen}", "utility / target's", "forget answers' probability"]
        text += f"**{forget}**\n\n" + markdown([*head, "chosen"], rows) + "\n\n"
        short = markdown([forget, *head[1:]], [row[:-1] for row in rows])  # the last one, the largest, for the main README
        text += paired("DiPO", "NPO+GD", outcomes)
        scatter(axis, outcomes, f"{scale.name}, {forget}")
    axes[0][-1].legend(fontsize=8)
    text += f"{note(scale.seeds)} {budget(scale, scale.methods)}"
    lab.write(text, figure)
    (lab.folder / "tofu-short.md").write_text(f"{short}\n", encoding="utf-8")


def paired(ours: str, theirs: str, outcomes: dict[str, list[tuple[float, float]]]) -> str:
    """The mean difference between two methods on the same seeds, with its standard error."""
    if len(outcomes[ours]) == 1:
        return ""
    differences = []
    for values in zip(*(zip(*outcomes[name], strict=True) for name in (ours, theirs)), strict=True):
        each = [a - b for a, b in zip(*values, strict=True)]
        differences.append(f"{statistics.fmean(each):+.2f} ± {statistics.stdev(each) / len(each) ** 0.5:.2f}")
    quality, share = differences
    return f"{ours} minus {theirs}, by seed (± standard error): forget quality {quality}, utility {share}.\n\n"


if __name__ == "__main__":
    sys.exit(main("tofu", __doc__, experiment))
