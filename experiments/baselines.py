"""TOFU: which method forgets best at the same utility, and does the model still speak? Forget 1, 5, 10 %; the same search
for each method.

python experiments/baselines.py --scale toy
"""

import statistics
import sys

from common import (
    NEEDED,
    SCALES,
    Lab,
    budget,
    columns,
    describe,
    job,
    main,
    markdown,
    measured,
    note,
    outcome,
    scatter,
    speaking,
    spell,
    spread,
    subplots,
    tune,
)

OURS = ("DiPO", "anchored DiPO")  # the paper's and this repository's


def experiment(lab: Lab) -> None:
    scale = lab.scale
    print(budget(scale, scale.methods), flush=True)
    chosen = tune(lab, scale.methods)
    jobs = {
        (forget, name): [job(scale, forget, seed, scale.methods[name], chosen[name]) for seed in scale.seeds]
        for forget in scale.forgets
        for name in scale.methods
    }
    found = iter(lab.run([j for group in jobs.values() for j in group], "all seeds", NEEDED))
    records = {key: [next(found) for _ in group] for key, group in jobs.items()}
    held_out = [i for i, seed in enumerate(scale.seeds) if seed not in scale.tuning_seeds]
    unseen = f"on seeds {spell([scale.seeds[i] for i in held_out]) or 'not searched on'}"
    text, (figure, axes) = "", subplots(2, len(scale.forgets), size=(5, 4.2))
    for forget, axis, below in zip(scale.forgets, *axes, strict=True):
        runs = {name: records[forget, name] for name in scale.methods}
        bounds = [r for r in next(iter(runs.values())) if "error" not in r]
        rows = [
            {"": label, "forget quality": "", unseen: ""} | columns(bounds, model) | {"chosen": ""}
            for label, model in (("original", "target"), ("retrained", "retrained"))
        ]
        for name, group in runs.items():
            label = f"**{name}**" if name in OURS else name
            quality = [outcome(group[i])[0] for i in held_out]
            rows.append(
                {"": label, "forget quality": "", unseen: spread(quality) if quality else ""}
                | columns(group) | {"chosen": describe(chosen[name])}
            )  # fmt: skip
        text += f"**{forget}**\n\n{markdown([*rows[0]], [[*row.values()] for row in rows])}\n\n"
        kept = [head for head in rows[0] if head not in ("forget quality, trained wording", "chosen")]
        short = markdown([forget, *kept[1:]], [[row[head] for head in kept] for row in rows])  # of the last, the largest
        text += "".join(paired(*pair, runs) for pair in (("DiPO", "NPO+GD"), ("anchored DiPO", "NPO+GD"), OURS[::-1]))
        scatter(axis, {name: [outcome(r) for r in group] for name, group in runs.items()}, f"{scale.name}, {forget}")
        told = {name: speaking(group) for name, group in runs.items()}
        level = measured(bounds, "language", "retrained")
        line = statistics.fmean(level) if level else None
        scatter(below, told, "", "language (dotted: the retrained model's)", line)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    text += f"{note(scale.seeds)} {budget(scale, scale.methods)}"
    lab.write(text, figure)
    (lab.folder / "tofu-short.md").write_text(f"{short}\n", encoding="utf-8")
    picture, [[axis]] = subplots(1, 1, size=(7, 4.2))
    scatter(axis, told, f"{scale.name}, {forget}", "language (dotted: the retrained model's)", line)
    picture.legend(loc="outside right center", fontsize=8)
    picture.savefig(lab.folder / "tofu-language.png", dpi=110)


def paired(ours: str, theirs: str, runs: dict[str, list[dict]]) -> str:
    """The mean difference between two methods on the same seeds, with its standard error."""
    if not {ours, theirs} <= runs.keys() or len(runs[ours]) == 1:
        return ""
    scores = []
    for name in (ours, theirs):
        quality, share = zip(*map(outcome, runs[name]), strict=True)
        scores.append({"forget quality": quality, "utility": share, "language": measured(runs[name], "language")})
    differences = []
    for label in scores[0]:
        each = [a - b for a, b in zip(*(s[label] for s in scores), strict=False)]
        if len(each) == len(runs[ours]):  # none of them broke down
            error = statistics.stdev(each) / len(each) ** 0.5
            differences.append(f"{label} {statistics.fmean(each):+.2f} ± {error:.2f}")
    return f"{ours} minus {theirs}, by seed (± standard error): {', '.join(differences)}.\n\n"


if __name__ == "__main__":
    sys.exit(main("tofu", __doc__, experiment, tuple(SCALES)))
