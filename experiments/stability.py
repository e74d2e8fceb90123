"""Stability: forget quality and utility at every epoch of a run five times as long as the others.

python experiments/stability.py --scale toy

Every method runs with the setting that `baselines.py` chose for it. Oscillation is `metrics.oscillation`: the length of a
curve's path beyond its net change, per epoch; of forget quality on the scale of its logarithm to base 10, from 1e-12 up.
"""

import math
import sys

from common import FLOOR, KEEP, Lab, color, describe, job, main, markdown, note, share, spread, subplots, tune

from metrics import oscillation

METHODS = ("GA", "GradDiff", "KL", "NPO", "NPO+GD", "SimNPO", "DPO", "DiPO")  # anchored DiPO is in anchored.py
SHOWN = ("DiPO", "NPO+GD", "GradDiff")  # in the plot's first column
SEEDS = {"DiPO": 3, "NPO+GD": 3}  # the others have one, for time


def experiment(lab: Lab) -> None:
    scale = lab.scale
    forget = scale.forgets[-1]
    methods = {name: scale.methods[name] for name in (SHOWN if scale.small else METHODS) if name in scale.methods}
    chosen = tune(lab, methods)
    epochs = 2 if scale.small else 50 if scale.name == "toy" else 20
    more = f"--epochs {epochs} --eval-every 1"
    seeds = {name: scale.seeds[: SEEDS.get(name, 1)] for name in methods}
    jobs = [job(scale, forget, seed, methods[name], chosen[name], more) for name in methods for seed in seeds[name]]
    found = iter(lab.run(jobs))
    records = {name: [next(found) for _ in seeds[name]] for name in methods}
    rows = []
    figure, axes = subplots(3, 2, size=(6, 3.2))
    for i, (name, runs) in enumerate(records.items()):
        measured = []
        for run, seed in zip(runs, seeds[name], strict=True):
            if "error" in run:
                continue
            points = run["trajectory"]
            quality = [max(p["forget_quality"], FLOOR) for p in points]
            utility = [share(p, run) for p in points]
            logs = [math.log10(q) for q in quality]
            best = quality.index(max(quality))
            good = sum(q >= 0.05 and s >= KEEP for q, s in zip(quality, utility, strict=True))
            restless = [round(oscillation(curve), 6) for curve in (logs, utility)]
            measured.append((quality[best], points[best]["epoch"], quality[-1], utility[-1], good, *restless))
            x = [p["epoch"] for p in points]
            style = {"color": color(name, i), "alpha": 0.35 if seed != seeds[name][0] else 1.0, "linewidth": 1.2}
            label = name if seed == seeds[name][0] else None
            column = 0 if name in SHOWN else 1
            axes[0][column].semilogy(x, quality, label=label, **style)
            axes[1][column].plot(x, utility, **style)
            axes[2][column].semilogy(x, [max(p["forget_probability"], FLOOR) for p in points], **style)
            if label and name in ("DiPO", "NPO"):
                axes[2][column].axhline(run["retrained"]["forget_probability"], color="black", linewidth=0.8, linestyle="--")
        columns = list(zip(*measured, strict=True))
        cells = [spread([float(v) for v in c]) for c in columns] if columns else ["broke down"] + [""] * 6
        rows.append([name, str(len(runs)), *cells, describe(chosen[name])])
    for column, title in enumerate((", ".join(SHOWN), "the other baselines")):
        axes[0][column].axhline(0.05, color="gray", linewidth=0.8, linestyle=":")
        axes[0][column].set(ylabel="forget quality", title=f"{scale.name}, {forget}: {title}", ylim=(FLOOR / 2, 2))
        axes[1][column].axhline(KEEP, color="gray", linewidth=0.8, linestyle=":")
        axes[1][column].set(ylabel="model utility / target's", ylim=(0, 1.1))
        axes[2][column].set(ylabel="forget answers' probability\n(dashed: retrained)", xlabel="epoch")
        if axes[0][column].lines[1:]:  # beside the line at 0.05
            axes[0][column].legend(fontsize=8)
    head = [f"{forget}, {epochs} epochs", "seeds", "best forget quality", "at epoch", "last forget quality",
            "last utility / target's", f"epochs with forget quality ≥ 0.05 and {KEEP:.0%} of the utility",
            "oscillation of log10 forget quality", "oscillation of utility", "setting"]  # fmt: skip
    text = markdown(head, rows) + f"\n\n{note(scale.seeds[:3])} Where there is one, seed {scale.seeds[0]}."
    lab.write(text, figure)


if __name__ == "__main__":
    sys.exit(main("stability", __doc__, experiment))
