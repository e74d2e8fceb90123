"""Saturation: beta against the learning rate. A won sequence stops pushing; does a larger beta stop DiPO at the right point?

python experiments/beta.py --scale toy
"""

import sys

from common import METHODS, Lab, job, main, markdown, note, outcome, scatter, spreads, subplots

BETAS = (0.02, 0.05, 0.1, 0.2, 0.5)


def experiment(lab: Lab) -> None:
    scale = lab.scale
    forget = scale.forgets[-1]
    rates = scale.rates[0 if scale.small else 1 :]
    jobs = {
        (beta, rate): [job(scale, forget, seed, METHODS["DiPO"], {"lr": rate, "beta": beta}) for seed in scale.tuning_seeds]
        for beta in BETAS
        for rate in rates
    }
    found = iter(lab.run([j for seeds in jobs.values() for j in seeds]))
    outcomes = {key: [outcome(next(found)) for _ in seeds] for key, seeds in jobs.items()}
    rows = [[f"{beta:g}", *(spreads(outcomes[beta, rate]) for rate in rates)] for beta in BETAS]
    text = f"{scale.name}, {forget}: forget quality / model utility over the target's. {note(scale.tuning_seeds)}\n\n"
    text += markdown(["beta", *(f"rate {rate:g}" for rate in rates)], rows)
    figure, axes = subplots(1, 1, size=(5.5, 4.5))
    groups = {f"beta {beta:g}": [x for rate in rates for x in outcomes[beta, rate]] for beta in BETAS}
    scatter(axes[0][0], groups, f"{scale.name}, {forget}")
    axes[0][0].legend(fontsize=8)
    lab.write(text, figure)


if __name__ == "__main__":
    sys.exit(main("beta", __doc__, experiment))
