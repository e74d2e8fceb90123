"""Failure signatures: each provoked on purpose by wrong hyper-parameters, and what train.py says of it at the end.

python experiments/failures.py --scale toy
"""

import sys

from common import FLOOR, METHODS, Lab, job, main, markdown, share, spell, subplots

# name -> (method, setting, beginning of the hint). Rates are multiples of the preset's.
FAILURES = {
    "healthy": ("anchored DiPO", {"lr": 2.0, "kappa": 0.05}, None),
    "under-unlearning": ("DiPO", {"lr": 0.1}, "under-unlearning"),
    "over-unlearning": ("DiPO", {"lr": 3.0, "beta": 0.02, "pair_from": "reference"}, "over-unlearning"),
    "utility collapse": ("GA", {"lr": 2.0}, "utility collapsed"),
    "oscillation": ("NPO+GD", {"lr": 2.0, "batch_size": "2", "schedule": "constant"}, "oscillation"),
    "degenerate text": ("DiPO", {"lr": 2.0, "epochs": 20.0}, "degenerate text"),
}


def experiment(lab: Lab) -> None:
    scale = lab.scale
    preset = {"toy": 4e-4, "smoke": 4e-4, "smollm2": 4e-4, "llama2-7b": 1e-5}[scale.name]
    jobs = []
    for method, setting, _ in FAILURES.values():
        setting = setting | {"lr": preset * setting["lr"]} | ({"epochs": 1.0} if scale.small else {})
        jobs.append(job(scale, scale.forgets[-1], scale.seeds[0], METHODS[method], setting, "--eval-every 1"))
    rows = []
    figure, axes = subplots(2, len(FAILURES), size=(3.2, 2.8))
    for i, ((name, (method, setting, expected)), record) in enumerate(zip(FAILURES.items(), lab.run(jobs), strict=True)):
        hints = [record["error"]] if "error" in record else record["hints"]
        seen = any(h.startswith(expected) for h in hints) if expected else not hints
        wrong = ", ".join(f"{v:g} x the rate" if k == "lr" else f"{k} {spell([v])}" for k, v in setting.items())
        rows.append([name, f"{method}, {wrong}", "yes" if seen else "no", "<br>".join(hints) or "none"])
        axes[0][i].set(title=name, ylim=(FLOOR / 2, 2), yscale="log")
        axes[1][i].set(xlabel="epoch", ylim=(0, 1.1))
        if "trajectory" in record:
            start, points = record["target"], record["trajectory"]
            x = [0, *(p["epoch"] for p in points)]
            quality = [max(p["forget_quality"], FLOOR) for p in (start, *points)]
            utility = [share(p, record) for p in (start, *points)]
            axes[0][i].plot(x, quality, ".-")
            axes[1][i].plot(x, utility, ".-", color="C1")
        axes[0][i].axhline(0.05, color="gray", linewidth=0.8, linestyle=":")
    axes[0][0].set_ylabel("forget quality")
    axes[1][0].set_ylabel("model utility / target's")
    text = markdown(["failure", "provoked by", "recognised", "hints of train.py"], rows)
    lab.write(
        text + f"\n\n{scale.name}, {scale.forgets[-1]}, seed {scale.seeds[0]}; the preset's rate is {preset:g}.", figure
    )


if __name__ == "__main__":
    sys.exit(main("failures", __doc__, experiment))
