"""The memory vector's filter: p, rule, alpha, whose logits, raw or centred, size of the vocabulary. Is p = 0.05 special?

python experiments/filter.py --scale toy

The rate and beta are those that `baselines.py` chose for DiPO with the default filter; they are not searched anew.
"""

import itertools
import sys

from common import (
    METHODS,
    VOCABULARIES,
    Job,
    Lab,
    Scale,
    describe,
    job,
    main,
    markdown,
    outcome,
    scatter,
    spell,
    spreads,
    subplots,
    toy_with,
    tune,
)

P = (0.01, 0.05, 0.1, 0.2)
RULES = ("both", "either", "rank", "relative")
ALPHAS = (0.5, 1.0, 2.0)
LARGE_P = (0.05, 0.2)  # of the vocabularies beyond the first, for time: a model of 49,000 tokens takes four minutes


def filters(small: bool) -> list[dict]:
    """p x rule x alpha x pair x raw or centred; alpha other than 1 with the paper's pair only."""
    ps, rules, alphas = (P[1:2], RULES[:2], ALPHAS[1:2]) if small else (P, RULES, ALPHAS)
    every = itertools.product(ps, rules, alphas, ("policy", "reference"), ("no-center", "center"))
    return [
        {"p": p, "filter": rule, "alpha": alpha, "pair_from": pair, "center": center}
        for p, rule, alpha, pair, center in every
        if alpha == 1 or (pair, center) == ("policy", "no-center")
    ]


def with_filter(scale: Scale, forget: str, seed: int, setting: dict, choice: dict) -> Job:
    flags = {k: v for k, v in choice.items() if k != "center"}
    return job(scale, forget, seed, METHODS["DiPO"], setting | flags, f"--{choice['center']}")


def experiment(lab: Lab) -> None:
    scale = lab.scale
    forget = scale.forgets[-1]
    setting = tune(lab, {"DiPO": METHODS["DiPO"]})["DiPO"]
    choices = filters(scale.small)
    rules = list(dict.fromkeys(c["filter"] for c in choices))
    papers = [c for c in choices if c["alpha"] == 1 and (c["pair_from"], c["center"]) == ("policy", "no-center")]
    more_seeds = scale.seeds[1:3]
    plan = [(c, scale.seeds[0]) for c in choices] + [(c, seed) for c in papers for seed in more_seeds]
    found = lab.run([with_filter(scale, forget, seed, setting, c) for c, seed in plan])
    outcomes: dict[tuple, list] = {}
    for (choice, _), record in zip(plan, found, strict=True):
        outcomes.setdefault(tuple(choice.values()), []).append(outcome(record))

    def cell(choice, **changed):
        points = outcomes.get(tuple((choice | changed).values()))
        return spreads(points) if points else ""

    ps = sorted({c["p"] for c in choices})
    text = f"{scale.name}, {forget}: forget quality / model utility over the target's; {describe(setting)}.\n\n"
    seeds = spell((scale.seeds[0], *more_seeds))
    text += f"Raw logits of the policy, alpha 1, mean ± standard deviation over seeds {seeds}:\n\n"
    default = {"p": 0.05, "filter": "both", "alpha": 1.0, "pair_from": "policy", "center": "no-center"}
    rows = [[rule, *(cell(default, filter=rule, p=p) for p in ps)] for rule in rules]
    text += markdown(["rule", *(f"p = {p:g}" for p in ps)], rows) + f"\n\nSeed {scale.seeds[0]} alone:\n\n"
    variants = [{"alpha": a} for a in ALPHAS if a != 1 and not scale.small]
    variants += [{"center": "center"}, {"pair_from": "reference"}, {"pair_from": "reference", "center": "center"}]
    rows = [
        [f"{rule}, {describe_variant(variant)}", *(cell(default, filter=rule, p=p, **variant) for p in ps)]
        for variant in variants
        for rule in rules
    ]
    text += markdown(["rule, variant", *(f"p = {p:g}" for p in ps)], rows)

    vocabularies = VOCABULARIES if scale.name == "toy" else ()
    figure, axes = subplots(1, 1 + max(1, len(vocabularies)), size=(4.8, 4.4))
    for rule in rules:
        series = [(p, outcomes[tuple((default | {"filter": rule, "p": p}).values())]) for p in ps]
        means = [sum(q for q, _ in points) / len(points) for _, points in series]
        axes[0][0].semilogx(ps, means, "o-", label=rule)
    axes[0][0].set(xlabel="p", ylabel="mean forget quality", title=f"{scale.name}, {forget}", ylim=(0, 1))
    axes[0][0].legend(fontsize=8)
    if not vocabularies:
        groups = {
            f"{rule}": [x for c in choices if c["filter"] == rule for x in outcomes[tuple(c.values())]] for rule in rules
        }
        scatter(axes[0][1], groups, "all filters")
        axes[0][1].legend(fontsize=8)
    for axis, size in zip(axes[0][1:], vocabularies, strict=False):
        lab.scale = large = toy_with(scale, size)
        tried = P if size == VOCABULARIES[0] else LARGE_P
        jobs = {(rule, p): with_filter(large, forget, scale.seeds[0], setting, default | {"filter": rule, "p": p})
                for rule in rules for p in tried}  # fmt: skip
        points = dict(zip(jobs, map(outcome, lab.run([*jobs.values()], f"vocabulary {size}")), strict=True))
        scatter(axis, {rule: [points[rule, p] for p in tried] for rule in rules}, f"{size:,} tokens, seed {scale.seeds[0]}")
        rows = [[rule, *(spreads([points[rule, p]]) for p in tried)] for rule in rules]
        text += f"\n\nVocabulary of {size:,} tokens, seed {scale.seeds[0]}:\n\n"
        text += markdown(["rule", *(f"p = {p:g}" for p in tried)], rows)
    lab.write(text, figure)


def describe_variant(variant: dict) -> str:
    names = {"center": "centred logits", "reference": "pair from the reference"}
    return ", ".join(names.get(v, f"{k} {v}") for k, v in variant.items())


if __name__ == "__main__":
    sys.exit(main("filter", __doc__, experiment))
