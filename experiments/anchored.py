"""Anchored DiPO: which of its three changes does what, the front over kappa, long training, larger vocabularies.

python experiments/anchored.py --scale toy

The rate and kappa are those that `baselines.py` chose for it, and so are the settings of DiPO and NPO+GD beside it.
"""

import itertools
import statistics
import sys

from common import (
    FLOOR,
    METHODS,
    NEEDED,
    VOCABULARIES,
    Lab,
    color,
    columns,
    describe,
    job,
    main,
    markdown,
    measured,
    note,
    scatter,
    share,
    speaking,
    spread,
    subplots,
    toy_with,
    tune,
)

from dipo import LOSSES

OURS = "anchored DiPO"
# What is as in anchored DiPO stands in no flag, so that its runs are shared.
PAIRS, POSITIONS = {"reference": "", "policy": "--pair-from policy"}, {"memory": "", "all": "--positions all"}
KAPPAS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
SMALLER = ((0.02, 0.01), (0.02, 0.02), (0.005, 0.002), (0.005, 0.005))  # beta and kappa
LONG = ("DiPO", "NPO+GD", OURS)  # the methods that train longer

Setting = dict[str, float]


def ablation(lab: Lab, setting: Setting, axis) -> str:
    """Pair, positions and anchor, each as in anchored DiPO or as in DiPO: all eight, at the chosen rate."""
    scale, seeds = lab.scale, lab.scale.seeds
    anchors = {"yes": setting["kappa"], "no": 0.0}
    every = list(itertools.product(PAIRS, POSITIONS, anchors))[:: 7 if scale.small else 1]
    jobs = {
        (pair, place, anchor): [
            job(scale, scale.forgets[-1], seed, METHODS[OURS], setting | {"kappa": anchors[anchor]},
                f"{PAIRS[pair]} {POSITIONS[place]}")
            for seed in seeds
        ]
        for pair, place, anchor in every
    }  # fmt: skip
    found = iter(lab.run([j for group in jobs.values() for j in group], "the three changes", NEEDED))
    records = {key: [next(found) for _ in seeds] for key in jobs}
    rows = [[*one, *columns(runs).values()] for one, runs in records.items()]
    head = ["pair from", "positions", "anchor", *columns(records[every[0]])]
    told = {f"{pair}, {place}, anchor: {anchor}": speaking(records[pair, place, anchor]) for pair, place, anchor in every}
    level = measured(records[every[0]], "language", "retrained")
    against = "language (dotted: the retrained model's)"
    scatter(axis, told, f"the three changes, rate {setting['lr']:g}", against, statistics.fmean(level) if level else None)
    axis.legend(fontsize=7)
    return f"**The three changes**, rate {setting['lr']:g}. {note(seeds)}\n\n{markdown(head, rows)}\n\n"


def front(lab: Lab, setting: Setting, axis) -> str:
    """How much anchor, forget quality against language; and with a smaller beta, which SmolLM2 needs."""
    scale, seeds = lab.scale, lab.scale.seeds[:3]
    kappas = KAPPAS[: 2 if scale.small else None]
    tried: list[Setting] = [{"kappa": k} for k in kappas]
    tried += [{"beta": beta, "kappa": kappa} for beta, kappa in (() if scale.small else SMALLER)]
    jobs = [job(scale, scale.forgets[-1], seed, METHODS[OURS], setting | one) for one in tried for seed in seeds]
    found = iter(lab.run(jobs, "kappa and beta", NEEDED))
    records = {describe(one): [next(found) for _ in seeds] for one in tried}
    for key, look in (("forget_quality", "o-"), ("language", "s--")):
        groups = zip(kappas, records.values(), strict=False)
        means = {kappa: statistics.fmean(values) for kappa, runs in groups if (values := measured(runs, key))}
        axis.plot([*means], [*means.values()], look, label=key.replace("_", " "))
    axis.set(xlabel="kappa", title=f"the anchor's weight, rate {setting['lr']:g}", ylim=(0, 1.05))
    axis.legend(fontsize=8)
    title = f"**The anchor's weight**, rate {setting['lr']:g}, beta {LOSSES['anchored'].beta:g} where nothing else is said."
    return f"{title} {note(seeds)}\n\n{table('', records)}\n\n"


def long_training(lab: Lab, chosen: dict[str, Setting], axis) -> str:
    """Many more epochs: does it stay where the anchor stops it?"""
    scale, seeds = lab.scale, lab.scale.seeds[:2]
    names, epochs, every = (LONG[-1:], 2, 1) if scale.small else (LONG, 50 if scale.name == "toy" else 20, 5)
    more = f"--epochs {epochs} --eval-every {every}"
    jobs = [job(scale, scale.forgets[-1], seed, METHODS[name], chosen[name], more) for name in names for seed in seeds]
    found = iter(lab.run(jobs, f"{epochs} epochs", NEEDED))
    rows = []
    for i, name in enumerate(names):
        records = [next(found) for _ in seeds]
        ended = [r for r in records if "error" not in r]
        best = [max(r["trajectory"], key=lambda p: p["forget_quality"]) for r in ended]
        then = [[p["forget_quality"] for p in best], [share(p, r) for p, r in zip(best, ended, strict=True)]]
        cells = [spread([float(p["epoch"]) for p in best], 0), *map(spread, then)] if best else ["broke down", "", ""]
        at_the_end = columns(records)
        rows.append([name, *cells, *at_the_end.values(), describe(chosen[name])])
        for run in ended:
            curve = [(p["epoch"], max(p["forget_quality"], FLOOR)) for p in run["trajectory"]]
            look = {"color": color(name, i)} | ({"label": name} if run is ended[0] else {"alpha": 0.4})
            axis.semilogy(*zip(*curve, strict=True), ".-", **look)
    axis.axhline(0.05, color="gray", linewidth=0.8, linestyle=":")
    axis.set(xlabel="epoch", ylabel="forget quality", ylim=(FLOOR / 2, 2), title=f"{epochs} epochs")
    axis.legend(fontsize=8)
    head = ["", "best at epoch", "best forget quality", "utility / target's then"]
    head += [*(f"at the end: {label}" for label in at_the_end), "setting"]
    return f"**{epochs} epochs**, evaluated every {every}. {note(seeds)}\n\n{markdown(head, rows)}\n\n"


def vocabularies(lab: Lab, chosen: dict[str, Setting], axis) -> str:
    """Larger tokenizers, with what was chosen for 1,000 tokens: is it the size that the methods live by?"""
    scale, seed = lab.scale, lab.scale.seeds[0]
    records: dict[tuple[str, int], dict] = {}
    for size in VOCABULARIES if scale.name == "toy" else ():
        lab.scale = toy_with(scale, size)
        jobs = [job(lab.scale, scale.forgets[-1], seed, METHODS[name], chosen[name]) for name in LONG]
        records |= zip([(name, size) for name in LONG], lab.run(jobs, f"vocabulary {size}", NEEDED), strict=True)
    lab.scale = scale
    if not records:
        axis.set_axis_off()
        return ""
    for i, name in enumerate(LONG):
        for key, look in (("forget_quality", "o-"), ("language", "s--")):
            points = {size: values[0] for size in VOCABULARIES if (values := measured([records[name, size]], key))}
            label = f"{name}, {key.replace('_', ' ')}"
            axis.semilogx([*points], [*points.values()], look, color=color(name, i), label=label)
    axis.set(xlabel="tokens in the vocabulary", title=f"vocabularies, seed {seed}", ylim=(0, 1.05))
    axis.legend(fontsize=7)
    told = {f"{size:,} tokens, {name}": [records[name, size]] for size in VOCABULARIES for name in LONG}
    return f"**Larger vocabularies**, the settings chosen for 1,000 tokens, seed {seed}.\n\n{table('', told)}\n\n"


def table(first: str, groups: dict[str, list[dict]]) -> str:
    """A row of `columns` for each group of records."""
    rows = {name: columns(records) for name, records in groups.items()}
    return markdown([first, *next(iter(rows.values()))], [[name, *row.values()] for name, row in rows.items()])


def experiment(lab: Lab) -> None:
    scale = lab.scale
    chosen = tune(lab, {name: METHODS[name] for name in LONG})
    figure, axes = subplots(1, 4, size=(5.5, 4.5))
    text = ablation(lab, chosen[OURS], axes[0][0])
    text += front(lab, chosen[OURS], axes[0][1])
    text += long_training(lab, chosen, axes[0][2])
    text += vocabularies(lab, chosen, axes[0][3])
    settings = "; ".join(f"{name} {describe(setting)}" for name, setting in chosen.items())
    lab.write(f"{text}{scale.name}, {scale.forgets[-1]}. Settings where nothing else is said: {settings}.", figure)


if __name__ == "__main__":
    sys.exit(main("anchored", __doc__, experiment))
