"""What a finished run shows of the known ways to fail, each in one line with its remedy."""

import math
import statistics
from pathlib import Path

from files import read_jsonl
from metrics import oscillation

COLLAPSE, QUALITY, RESTLESS, NO_LANGUAGE = 0.5, 0.05, 0.05, 0.5  # thresholds of `hints`; our choice, see docs/running.md


def find_hints(out: Path, benchmark, logs: dict[str, dict], reference: dict | None, summary: dict) -> list[str]:
    """`hints` of a finished unlearning run, from its folder, its evaluation logs and their summary; benchmark None: of a run
    without evaluation."""
    log = read_jsonl(out / "log.jsonl")
    if benchmark is None or not benchmark.plots:
        return hints(log, [], None, None)
    later = read_jsonl(out / "trajectory.jsonl") or [summary["unlearned"] | {"epoch": log[-1]["epoch"]}]
    if "kept" in summary:  # a model from before the end
        later = [point for point in later if point["step"] <= summary["kept"]["step"]]
    remembers, degenerate = benchmark.signs(logs["unlearned"], reference)
    usual = 0.0
    if "language" in summary["unlearned"]:
        degenerate, usual = (1 - summary[name]["language"] for name in ("unlearned", "retrained"))
    return hints(log, [summary["target"], *later], remembers, degenerate, usual)


def hints(
    log: list[dict], points: list[dict], remembers: bool | None, degenerate: float | None, usual: float = 0.0
) -> list[str]:
    """The failures that a finished unlearning run shows, each one line with its remedy.

    log: of log.jsonl. points: scores of the target and of each evaluation after it, with forget_quality (or None) and
    model_utility; empty without TOFU's evaluation. remembers: whether the forget answers are still likelier, against their
    wrong ones, than the retrained model has them; None without one. degenerate: share of the forget answers that are no
    language, by `metrics.language` where it is known, else `metrics.degenerate_share`. usual: the retrained model's own.
    """
    lines, start = [], log[0]
    final = math.ceil(log[-1]["epoch"] - 1e-9)
    last_epoch = [record for record in log if math.ceil(record["epoch"] - 1e-9) == final]
    end = {key: statistics.fmean(r[key] for r in last_epoch) for key in ("nll/forget", "nll/retain") if key in start}
    utility = [p["model_utility"] for p in points]
    if utility and utility[-1] < COLLAPSE * utility[0]:
        fell = f"model utility {utility[-1]:.3g}, the target's is {utility[0]:.3g}"
        lines.append(f"utility collapsed: {fell}; lower --lr, train fewer --epochs, raise --lam, or use a retain loss")
    elif not utility and "nll/retain" in end and end["nll/retain"] > start["nll/retain"] + 1:
        rose = f"retain answers cost {end['nll/retain']:.3g} nats per token, at the start {start['nll/retain']:.3g}"
        lines.append(f"utility collapsed: {rose}; lower --lr, train fewer --epochs, or raise --lam")
    quality = points[-1]["forget_quality"] if points else None
    if quality is not None and quality < QUALITY:
        peak = max(points[1:], key=lambda p: p["forget_quality"])
        peaked = peak["forget_quality"] >= QUALITY
        if remembers and not peaked and not lines:  # of a broken model truth ratios say nothing
            known = "the forget answers are better known than to the retrained model"
            lines.append(f"under-unlearning: forget quality {quality:.2g}, {known}; raise --lr or --epochs")
        elif peaked or not remembers:
            earlier = f" (it was {peak['forget_quality']:.2g} at epoch {peak['epoch']:g})" if peaked else ""
            beyond = f"forget quality {quality:.2g}, beyond the retrained model{earlier}"
            lines.append(f"over-unlearning: {beyond}; train fewer --epochs or lower --lr")
    elif quality is None and end["nll/forget"] < start["nll/forget"] + 0.5:
        lines.append("under-unlearning: the forget answers are about as likely as at the start; raise --lr or --epochs")
    swing = oscillation([u / utility[0] for u in utility]) if len(utility) > 4 and utility[0] else 0.0
    if swing > RESTLESS:
        swings = f"model utility goes back and forth by {swing:.0%} of the target's per evaluation"
        lines.append(f"oscillation: {swings}; lower --lr, enlarge --batch-size, or pass --max-grad-norm 1")
    if degenerate is not None and degenerate - usual > NO_LANGUAGE:
        share = f"{degenerate:.0%} of the answers to forget questions are no language, which no other score sees"
        lines.append(f"degenerate text: {share}; lower --lr, or train fewer --epochs")
    return lines
