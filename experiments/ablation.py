"""The paper's Table 5: which half of DiPO does what? One half replaced at a time, every variant with the same search.

python experiments/ablation.py --scale toy
"""

import sys

from common import TABLE_5, Lab, budget, describe, job, main, markdown, note, outcome, scatter, spread, subplots, tune


def experiment(lab: Lab) -> None:
    scale = lab.scale
    forget = scale.forgets[-1]
    print(budget(scale, TABLE_5), flush=True)
    chosen = tune(lab, TABLE_5)
    jobs = [job(scale, forget, seed, m, chosen[name]) for name, m in TABLE_5.items() for seed in scale.seeds]
    found = iter(lab.run(jobs, "all seeds"))
    outcomes = {name: [outcome(next(found)) for _ in scale.seeds] for name in TABLE_5}
    rows = []
    for name, points in outcomes.items():
        quality, share = zip(*points, strict=True)
        rows.append([name, spread(quality), spread(share), describe(chosen[name])])
    text = markdown([forget, "forget quality", "utility / target's", "chosen"], rows)
    text += f"\n\n{note(scale.seeds)} {budget(scale, TABLE_5)}"
    figure, axes = subplots(1, 1, size=(5.5, 4.5))
    scatter(axes[0][0], outcomes, f"{scale.name}, {forget}: Table 5")
    axes[0][0].legend(fontsize=8)
    lab.write(text, figure)


if __name__ == "__main__":
    sys.exit(main("ablation", __doc__, experiment))
