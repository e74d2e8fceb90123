"""Evaluation: TOFU's numbers as pure functions, then running a model, MUSE, then the command line.

    python eval.py --model RUN --forget tofu_forget10 [--retain-logs FILE | --retain-model PATH]
    python eval.py --logs FILE [--retain-logs FILE]          score a published log, no model
    python eval.py --plot RUN                                draw its trajectory

Words: the *loss* of an answer is its mean negative log-likelihood per token, EOS included, in nats; its *probability*
is exp(-loss), the geometric mean of its token probabilities.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import (
    CHECKPOINTS,
    MUSE_CHECKPOINTS,
    PROMPT_FORMATS,
    TOFU_RETAIN,
    DataError,
    Example,
    Row,
    Tokenizer,
    evaluation_sets,
    fingerprint,
    hub_file,
    is_muse,
    load_muse,
    load_rows,
    pack,
    split_spec,
)
from model import Llama, ModelError, generate, load_pretrained, resolve_folder

try:
    from rouge_score.rouge_scorer import RougeScorer
    from scipy.stats import hmean, ks_2samp, mannwhitneyu
except ImportError:
    RougeScorer = hmean = ks_2samp = mannwhitneyu = None

SETS = ("retain", "ra", "wf", "forget")  # retain_perturbed, real authors, world facts, forget
DETAILED = ("forget", "holdout")  # the sets with memorization and membership scores
UTILITY_PARTS = tuple(f"{s}_{n}" for s in ("retain", "ra", "wf") for n in ("probability", "rouge", "truth_ratio"))
FORGET_PARTS = ("forget_probability", "forget_rouge", "forget_truth_ratio")
MEMORIZATION = ("exact_memorization", "extraction_strength")
MEMBERSHIP = ("mia_loss", "mia_min_k", "mia_min_k_plus_plus", "mia_zlib")


@dataclass(frozen=True)
class Protocol:
    """How a code base of the field evaluates on TOFU."""

    name: str
    rows: int | None  # only the first so many rows of each set
    max_total_tokens: int | None  # of prompt + answer, and of prompt + generation, padding included
    epsilon: float  # added to the denominators of truth ratio and option probability
    truth_ratio: str = "geometric"  # mean over the wrong answers
    mask_quirk: bool = False  # open-unlearning issue 128: where EOS is also the padding, no EOS in a prompt is seen


PROTOCOLS = {
    "open-unlearning": Protocol("open-unlearning", None, None, 1e-10),
    "tofu": Protocol("tofu", 300, 200, 0.0),  # the TOFU authors'
}
OPEN_UNLEARNING = PROTOCOLS["open-unlearning"]
TOFU_GENERATION_BATCH = 30  # of the TOFU authors' code: with a limit on the total, padding shortens generations


class EvalError(Exception):
    """An evaluation that cannot be done. The message is one line that names the file, the key and the remedy."""


def require_extra() -> None:
    """Raises EvalError, before any work is done, where the libraries that define the scores are missing."""
    if RougeScorer is None or ks_2samp is None:
        raise EvalError("evaluation needs scipy and rouge-score: pip install -e '.[eval]' (or pass --no-eval)")


# -------------------------------------------------------------------------------------------------------- pure metrics


def truth_ratio(correct_loss: float, wrong_losses: list[float], mean: str = "geometric", epsilon: float = 0.0) -> float:
    """TR = mean wrong probability / (correct probability + epsilon); small = knows the answer.

    mean: 'geometric', exp(-mean wrong loss), as the TOFU leaderboard, open-unlearning and the NPO code have it;
    'arithmetic', the mean of exp(-wrong loss), as the TOFU authors have it during training.
    """
    if mean == "geometric":
        wrong_loss = sum(wrong_losses) / len(wrong_losses)
    else:
        least = min(wrong_losses)
        wrong_loss = least - math.log(sum(math.exp(least - x) for x in wrong_losses) / len(wrong_losses))
    if epsilon == 0:
        return _exp(correct_loss - wrong_loss)  # exact, also where both probabilities underflow
    return _exp(-wrong_loss) / (_exp(-correct_loss) + epsilon)


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))  # a model destroyed by gradient ascent reaches losses beyond float's range


def normalised_probability(correct_loss: float, wrong_losses: list[float], epsilon: float = 0.0) -> float:
    """P / (P + sum of the wrong options' P + epsilon): the probability on real authors and world facts."""
    return 1 / (1 + sum(_exp(correct_loss - w) for w in wrong_losses) + epsilon * _exp(correct_loss))


def rouge(reference: str, generation: str, stemmer: bool = True) -> dict[str, float]:
    """rouge-score: {'rouge': ROUGE-L recall, TOFU's number, 'rouge_f1': ROUGE-L F1, MUSE's, 'rouge1': ROUGE-1 recall}.

    stemmer: Porter's; TOFU and open-unlearning have it on, the MUSE authors off.
    """
    scores = _scorer(stemmer).score(reference, generation)
    found = {"rouge": scores["rougeL"].recall, "rouge_f1": scores["rougeL"].fmeasure, "rouge1": scores["rouge1"].recall}
    return {name: float(value) for name, value in found.items()}  # rouge-score has the integer 0 for no match


@lru_cache
def _scorer(stemmer: bool) -> "RougeScorer":
    return RougeScorer(["rouge1", "rougeL"], use_stemmer=stemmer)


def forget_truth_ratio(ratios: list[float], epsilon: float = 0.0) -> float:
    """mean of min(TR, 1 / (TR + epsilon)): 1 where right and wrong answers are equally likely."""
    return sum(min(r, 1 / (r + epsilon)) if r > 0 else 0.0 for r in ratios) / len(ratios)


def utility_truth_ratio(ratios: list[float]) -> float:
    """mean of max(0, 1 - TR): 1 where wrong answers are impossible."""
    return sum(max(0.0, 1 - r) for r in ratios) / len(ratios)


def model_utility(parts: dict[str, float]) -> float:
    """Harmonic mean of the nine UTILITY_PARTS; 0 as soon as one of them is 0."""
    return float(hmean([parts[name] for name in UTILITY_PARTS]))


def forget_quality(ratios: list[float], retained_ratios: list[float]) -> float:
    """p-value of the two-sided two-sample Kolmogorov-Smirnov test between the truth ratios of the evaluated and of the
    retrained model on the forget set. 1 = indistinguishable; the target model has about 1e-20."""
    return float(ks_2samp(ratios, retained_ratios).pvalue)


def exact_memorization(correct: list[bool]) -> float:
    """Share of answer tokens, EOS excluded, that are the model's first choice under teacher forcing."""
    return sum(correct[:-1]) / max(1, len(correct) - 1)


def extraction_strength(correct: list[bool]) -> float:
    """1 - k / N for the smallest k from which on every answer token, EOS excluded, is the model's first choice.

    1 / N where not even the last one is, as in open-unlearning.
    """
    n = len(correct) - 1
    k = max((i + 1 for i, right in enumerate(correct[:n]) if not right), default=0)
    return 1 - min(k, n - 1) / n if n else 0.0


def min_k(token_scores: list[float], k: float = 0.4) -> float:
    """Minus the mean of the lowest share k of token scores, EOS excluded; high = unlikely to have been trained on.

    Of log-probabilities this is Min-K; of (log p - mean) / standard deviation under the model's own next-token
    distribution, Min-K++.
    """
    scores = sorted(token_scores[:-1])
    return -sum(scores[: max(1, int(k * len(scores)))]) / max(1, int(k * len(scores)))


def zlib_score(loss: float, answer: str) -> float:
    """Loss over the answer's zlib-compressed size in bytes."""
    return loss / len(zlib.compress(answer.encode("utf-8")))


def membership_auc(forget: list[float], holdout: list[float]) -> float:
    """P(a holdout score exceeds a forget score), ties half: 1 = fully memorised, 0.5 = no trace."""
    return float(mannwhitneyu(holdout, forget).statistic / (len(forget) * len(holdout)))


def privleak(auc: float, retained_auc: float = 0.5) -> float:
    """((1 - AUC) - (1 - AUC_retrained)) / (1 - AUC_retrained) in percent: -100 = fully memorised, 0 = like retrained."""
    return ((1 - auc) - (1 - retained_auc)) / (1 - retained_auc + 1e-10) * 100


def oscillation(values: list[float]) -> float:
    """How far a series goes back and forth: the length of its path beyond its net change, per step. 0 = monotone. Ours."""
    path = sum(abs(b - a) for a, b in zip(values, values[1:], strict=False))
    return (path - abs(values[-1] - values[0])) / max(1, len(values) - 1)


def degenerate_share(samples: dict[str, tuple[str, str, str]]) -> float:
    """Share of the generations that are no language, by (question, reference, generation). Ours, and crude: no words at
    all, more than half of them in no question or reference here, or (of 8 words and more) most pairs of words repeated."""
    known = {w for question, reference, _ in samples.values() for w in _words(question) + _words(reference)}
    return sum(_is_degenerate(generation, known) for _, _, generation in samples.values()) / len(samples)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _is_degenerate(text: str, known: set[str]) -> bool:
    words = _words(text)
    pairs = set(zip(words, words[1:], strict=False))
    strange = sum(w not in known for w in words)
    return not words or strange > len(words) / 2 or (len(words) >= 8 and len(pairs) < (len(words) - 1) / 2)


def aggregate(rows: dict[str, dict[str, dict]], epsilon: float = 0.0) -> dict[str, float]:
    """The nine parts of model utility, the three forget-set numbers and `model_utility`, from per-item results
    {set: {key: item}}; where the items have them, exact memorization, extraction strength and membership AUCs too.

    Of an item it reads loss, wrong_losses, truth_ratio, rouge (see `evaluate`); `probability` where a log stores it.
    """
    scores = {}
    for name in (n for n in SETS if n in rows):
        values = list(rows[name].values())
        probabilities = []
        for v in values:
            if name in ("ra", "wf"):
                computed = normalised_probability(v["loss"], v["wrong_losses"], epsilon)
            else:
                computed = _exp(-v["loss"])
            probabilities.append(v.get("probability", computed))
        ratios = [v["truth_ratio"] for v in values]
        scores[f"{name}_probability"] = sum(probabilities) / len(values)
        scores[f"{name}_rouge"] = sum(v["rouge"] for v in values) / len(values)
        if name == "forget":
            scores["forget_truth_ratio"] = forget_truth_ratio(ratios, epsilon)
        else:
            scores[f"{name}_truth_ratio"] = utility_truth_ratio(ratios)
    if all(name in scores for name in UTILITY_PARTS):
        scores["model_utility"] = model_utility(scores)
    forget, holdout = (list(rows.get(name, {}).values()) for name in ("forget", "holdout"))
    for name in MEMORIZATION:
        if forget and all(name in v for v in forget):
            scores[name] = sum(v[name] for v in forget) / len(forget)
    for name in MEMBERSHIP:
        if forget and holdout and all(name in v for v in (*forget, *holdout)):
            scores[name] = membership_auc([v[name] for v in forget], [v[name] for v in holdout])
    return scores


# -------------------------------------------------------------------------------------------------------- evaluation logs

AUTHORS_FILES = {
    "retain": "eval_log.json",
    "ra": "eval_real_author_wo_options.json",
    "wf": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
_NUMBERS = ("loss", "correct_loss", "truth_ratio", "rouge")


def read_log(path: str | Path) -> dict:
    """{'kind', 'rows', 'protocol', 'epsilon', 'mia_min_k', 'path'} of an evaluation log: ours, open-unlearning's
    `TOFU_EVAL.json`, or the TOFU authors' `eval_log_aggregated.json` (objects by row, or the NPO repository's lists).

    rows: {set: {key: item}} in row order, items as in `evaluate` as far as the log has them; always the forget set's
    truth ratios. protocol: of our logs, else None. Raises EvalError naming the file and what is missing or wrong in it.
    """
    try:
        log = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise EvalError(f"{path}: not a readable JSON log ({e})") from None
    found = {"protocol": None, "epsilon": 0.0, "mia_min_k": None, "path": str(path)}
    try:
        if "rows" in log:
            found |= {"kind": "ours", "rows": log["rows"], "protocol": log.get("protocol")}
            found["epsilon"] = (log.get("protocol") or {}).get("epsilon", 0.0)
            found["mia_min_k"] = log.get("scores", {}).get("mia_min_k")
        elif AUTHORS_FILES["forget"] in log:
            rows = {name: _authors_rows(log[file]) for name, file in AUTHORS_FILES.items() if log.get(file)}
            found |= {"kind": "TOFU authors'", "rows": rows}
        else:
            rows = {name: _open_unlearning_rows(log, name) for name in SETS}
            found |= {"kind": "open-unlearning's", "rows": {k: v for k, v in rows.items() if v}}
            found |= {"epsilon": OPEN_UNLEARNING.epsilon, "mia_min_k": log.get("mia_min_k", {}).get("agg_value")}
        if not found["rows"]["forget"]:
            raise EvalError(f"{path}: its forget set is empty; evaluate the retrained model again")
        for name, items in found["rows"].items():
            _check_items(f"{path}: {name}", items)
            if name == "forget":
                [item["truth_ratio"] for item in items.values()]  # noqa: B018  (KeyError where one lacks it)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, IndexError) as e:
        raise EvalError(f"{path}: no truth ratios of the forget set in it (key {e} is missing or malformed)") from None
    return found


def _in_order(values: dict | list) -> list:
    """The values of an object keyed by row number, or of a list, in row order. KeyError for a gap."""
    return values if isinstance(values, list) else [values[str(i)] for i in range(len(values))]


def _authors_rows(part: dict) -> dict[str, dict]:
    wrong, correct = _in_order(part["average_perturb_loss"]), _in_order(part["avg_paraphrased_loss"])
    columns = {"correct_loss": correct, "wrong_losses": wrong}
    for name, column in (("loss", "avg_gt_loss"), ("rouge", "rougeL_recall"), ("texts", "generated_text")):
        if column in part:
            columns[name] = _in_order(part[column])
    if isinstance(part.get("normalized_gt_loss"), list):
        # The NPO repository's lists come from two data loaders whose rows are ordered differently: this one number is
        # stored joined as it should be.
        columns["probability"] = [_exp(-loss) for loss in part["normalized_gt_loss"]]
    if isinstance(part["avg_paraphrased_loss"], list):
        columns.pop("texts", None)
    rows = {}
    for i, values in enumerate(zip(*columns.values(), strict=True)):
        item = dict(zip(columns, values, strict=True))
        item["truth_ratio"] = truth_ratio(item["correct_loss"], item["wrong_losses"])
        if "texts" in item:
            item["question"], item["generation"], item["answer"] = item.pop("texts")
        rows[str(i)] = item
    return rows


def _open_unlearning_rows(log: dict, name: str) -> dict[str, dict]:
    """Items of one set; {} where the log does not have the set. Truth ratios and probabilities are taken as stored."""

    def column(*keys):
        metric = next((log[key] for key in keys if key in log), {"value_by_index": {}})
        return _in_order(metric["value_by_index"])

    ratios = [item["score"] for item in column(f"{name}_truth_ratio", f"{name}_Truth_Ratio")]
    if not ratios:
        return {}
    right, wrong = column(f"{name}_Q_A_Prob"), column(f"{name}_Q_A_PERT_Prob")
    correct, rouges = column(f"{name}_Q_A_PARA_Prob", f"{name}_Q_A_Prob"), column(f"{name}_Q_A_ROUGE")
    memorized = {m: column(m) for m in MEMORIZATION if name == "forget"}
    rows = {}
    for i, ratio in enumerate(ratios):
        item = {"truth_ratio": ratio}
        if right and wrong and correct:
            item |= {"loss": right[i]["avg_loss"], "correct_loss": correct[i]["avg_loss"]}
            item |= {"wrong_losses": wrong[i]["avg_loss"], "probability": right[i]["prob"]}
            if name in ("ra", "wf"):
                item["probability"] /= item["probability"] + sum(wrong[i]["prob"]) + OPEN_UNLEARNING.epsilon
        if rouges:
            item |= {"rouge": rouges[i]["rougeL_recall"], "rouge1": rouges[i]["rouge1_recall"]}
            item |= {"rouge_f1": rouges[i]["rougeL_f1"], "question": rouges[i]["input"]}
            item |= {"answer": rouges[i]["ground_truth"], "generation": rouges[i]["generation"]}
        item |= {m: values[i]["score"] for m, values in memorized.items() if values}
        rows[str(i)] = item
    return rows


def _check_items(where: str, items: dict[str, dict]) -> None:
    """Raises EvalError for a number that is missing or not finite, and for rows with unequal numbers of wrong answers."""
    wrong = None
    for key, item in items.items():
        numbers = {n: item[n] for n in _NUMBERS if n in item} | {f"wrong answer {i}": x for i, x in
                                                                  enumerate(item.get("wrong_losses", []), 1)}  # fmt: skip
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise EvalError(f"{where}, row {key}: {name} is {value}, no finite number; evaluate that model again")
        if wrong is not None and len(item.get("wrong_losses", [])) != wrong:
            raise EvalError(
                f"{where}, row {key}: holds {len(item.get('wrong_losses', []))} perturbed answers, the others {wrong}; "
                "evaluate that model again"
            )
        wrong = len(item.get("wrong_losses", []))


def truth_ratios(log: dict) -> list[float]:
    """Of the forget set, in row order."""
    return [item["truth_ratio"] for item in log["rows"]["forget"].values()]


def with_truth_ratio(log: dict, mean: str) -> dict:
    """The log with its truth ratios computed again with another mean. Raises EvalError where it holds no losses."""
    rows = {}
    for name, items in log["rows"].items():
        if any("correct_loss" not in item for item in items.values()) and name in SETS:
            raise EvalError(f"{log['path']}: holds no losses of the {name} set; its truth ratios cannot be recomputed")
        rows[name] = {
            key: item | {"truth_ratio": truth_ratio(item["correct_loss"], item["wrong_losses"], mean, log["epsilon"])}
            if name in SETS
            else item
            for key, item in items.items()
        }
    protocol = log["protocol"] and log["protocol"] | {"truth_ratio": mean}
    return log | {"rows": rows, "protocol": protocol}


def _same_text(a: str, b: str) -> bool:
    """Equal as far as two tokenizers and a cut at some length leave texts alone."""
    a, b = ("".join(re.findall(r"[a-z0-9]+", text.lower())) for text in (a, b))
    return a.startswith(b) or b.startswith(a)


def compare(log: dict, reference: dict, where: str) -> tuple[float, str]:
    """(forget quality, note) of two logs, which must hold the same rows, evaluated alike.

    Row counts must agree, but for the TOFU authors' protocol: it stops after 300 rows, and is compared with the first
    300 of the other. Where both logs know them, answers (row by row), protocol, prompt format, mask convention, mean of
    the truth ratio and prompt tokens must agree too. Raises EvalError with the reason.
    """
    ours, theirs = (list(x["rows"]["forget"].values()) for x in (log, reference))
    note = ""
    if len(ours) != len(theirs):
        if min(len(ours), len(theirs)) != 300:
            raise EvalError(f"{where}: holds {len(theirs)} forget rows, this evaluation {len(ours)}; compare the same rows")
        side = "that" if len(theirs) == 300 else "this evaluation"
        note = f"first 300 of {max(len(ours), len(theirs))} rows, all that {where if side == 'that' else side} holds"
        ours, theirs = ours[:300], theirs[:300]
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if "answer" in a and "answer" in b and not _same_text(a["answer"], b["answer"]):
            raise EvalError(
                f"{where}: its forget row {i} is another one ({b['answer'][:40]!r} instead of {a['answer'][:40]!r}); "
                "compare the same rows"
            )
    mine, its = log.get("protocol"), reference.get("protocol")
    if mine and its:
        for name in ("name", "prompt_format", "mask_quirk", "truth_ratio"):
            if name in mine and name in its and mine[name] != its[name]:
                raise EvalError(
                    f"{where}: was evaluated with {name.replace('_', ' ')} {its[name]!r}, this one with {mine[name]!r}; "
                    "evaluate both alike"
                )
        a, b = (p.get("sets", {}).get("forget", {}) for p in (mine, its))
        if not note and "prompt_tokens" in a and a["prompt_tokens"] != b.get("prompt_tokens"):
            raise EvalError(f"{where}: its prompts hold other tokens (another tokenizer or date); evaluate both alike")
    ratios = [[item["truth_ratio"] for item in rows] for rows in (ours, theirs)]
    return forget_quality(*ratios), note


def log10(p: float | None) -> float | None:
    return None if p is None else math.log10(max(p, 5e-324))  # the least float: JSON has no minus infinity


def open_unlearning_eval(log: dict, quality: float | None, retained_auc: float | None = None) -> dict:
    """Our log as open-unlearning's TOFU_EVAL.json: the same keys, sorted, and the same aggregate values.

    Membership scores and `privleak` need a holdout set; `mia_gradnorm` and `mia_reference` are not computed. Without a
    retained_auc, `privleak` is against 0.5, as open-unlearning has it (our own summary leaves it out).
    """
    rows, scores = log["rows"], log["scores"]
    result = {"forget_quality": {"agg_value": quality}}

    def metric(items, value, aggregate_value):
        return {"agg_value": aggregate_value, "value_by_index": {str(i): value(item) for i, item in enumerate(items)}}

    def probability(name):
        losses = [[x] if isinstance(x, float) else x for x in (item[name] for item in items)]
        means = [sum(_exp(-x) for x in row) / len(row) for row in losses]

        def value(item):
            x = item[name]
            return {"prob": [_exp(-y) for y in x] if isinstance(x, list) else _exp(-x), "avg_loss": x}

        return metric(items, value, sum(means) / len(means))

    for name in (n for n in SETS if n in rows):
        items = list(rows[name].values())
        result[f"{name}_Q_A_Prob"] = probability("loss")
        result[f"{name}_Q_A_PERT_Prob"] = probability("wrong_losses")
        if name in ("forget", "retain"):
            result[f"{name}_Q_A_PARA_Prob"] = probability("correct_loss")
        else:
            epsilon = log["protocol"]["epsilon"]
            result[f"{name}_Q_A_Prob_normalised"] = metric(
                items,
                lambda v, e=epsilon: {"prob": normalised_probability(v["loss"], v["wrong_losses"], e)},
                scores[f"{name}_probability"],
            )
        result[f"{name}_Q_A_ROUGE"] = metric(
            items,
            lambda v: {
                "rouge1_recall": v["rouge1"],
                "rougeL_f1": v["rouge_f1"],
                "rougeL_recall": v["rouge"],
                "input": v["prompt"],
                "ground_truth": v["answer"],
                "generation": v["generation"],
            },
            scores[f"{name}_rouge"],
        )
        ratio = "forget_truth_ratio" if name == "forget" else f"{name}_Truth_Ratio"  # sic
        result[ratio] = metric(items, lambda v: {"score": v["truth_ratio"]}, scores[f"{name}_truth_ratio"])
    for name in (n for n in MEMORIZATION if n in scores):
        result[name] = metric(rows["forget"].values(), lambda v, n=name: {"score": v[n]}, scores[name])
    for name in (n for n in MEMBERSHIP if n in scores):
        both = {}
        for part in ("forget", "holdout"):
            values = [v[name] for v in rows[part].values()]
            both[part] = metric(rows[part].values(), lambda v, n=name: {"score": v[n]}, sum(values) / len(values))
        result[name] = both | {"auc": scores[name], "agg_value": scores[name]}
    if "mia_min_k" in scores:
        retained_auc = 0.5 if retained_auc is None else retained_auc
        result["privleak"] = {"agg_value": privleak(scores["mia_min_k"], retained_auc)}
    if "model_utility" in scores:
        result["model_utility"] = {"agg_value": scores["model_utility"]}
    return dict(sorted(result.items()))


SUMMARY_KEYS = ("extraction_strength", "forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_quality", "forget_truth_ratio",
                "model_utility", "privleak")  # fmt: skip


def save_open_unlearning(log: dict, quality: float | None, reference: dict | None) -> None:
    """TOFU_EVAL.json and TOFU_SUMMARY.json beside our log, where that is kept."""
    if log["path"] is None:
        return
    result = open_unlearning_eval(log, quality, (reference or {}).get("mia_min_k"))
    write_json(Path(log["path"]).with_name("TOFU_EVAL.json"), result, indent=4)
    flat = {k: result[k]["agg_value"] for k in SUMMARY_KEYS if k in result}
    write_json(Path(log["path"]).with_name("TOFU_SUMMARY.json"), {k: v for k, v in flat.items() if v is not None}, indent=4)


# ------------------------------------------------------------------------------------------------------ running a model


@torch.no_grad()
def score_answers(
    model: Llama,
    examples: list[Example],
    detailed: list[bool] | None = None,
    hidden_id: int | None = None,
    budget: int = 2048,
    on_batch=lambda scored: None,
) -> list[dict]:
    """{'loss'} of each example's answer, in order; with `detailed`, memorization and membership scores too.

    Teacher-forced in packed batches of about `budget` tokens, the output head at answer positions only.
    hidden_id: a token of the prompts that no later one may see (Protocol.mask_quirk). on_batch: called with {index: scores}.
    """
    results: list[dict] = [{}] * len(examples)
    detailed = detailed or [False] * len(examples)
    for more in (True, False):  # what needs most memory first: running out of it shows at once
        wanted = [i for i, d in enumerate(detailed) if d == more]
        for chunk in _chunks(wanted, examples, budget):
            batch = pack([examples[i] for i in chunk], hidden_id).to(model.device)
            logits = model(**batch.inputs)
            token_losses = F.cross_entropy(logits, batch.targets, reduction="none")
            columns = [token_losses]
            if more:
                log_p = logits.log_softmax(-1)
                expected = (log_p.exp() * log_p).sum(-1)
                # not E x^2 - (E x)^2: it cancels
                variance = (log_p.exp() * (log_p - expected[..., None]).square()).sum(-1)
                deviation = variance.clamp(min=1e-6).sqrt()
                columns += [(logits.argmax(-1) == batch.targets), -token_losses, (-token_losses - expected) / deviation]
            rows = zip(*(c.cpu().split(batch.answer_lengths) for c in columns), strict=True)
            scored = {i: _scores(*row) for i, row in zip(chunk, rows, strict=True)}
            for i, scores in scored.items():
                results[i] = scores
            on_batch(scored)
    return results


def _chunks(wanted: list[int], examples: list[Example], budget: int) -> Iterator[list[int]]:
    """`wanted` in groups of at most `budget` tokens, or of one example that is longer; longest examples first."""
    chunk, tokens = [], 0
    for i in sorted(wanted, key=lambda i: -len(examples[i].ids)):
        if chunk and tokens + len(examples[i].ids) > budget:
            yield chunk
            chunk, tokens = [], 0
        chunk, tokens = [*chunk, i], tokens + len(examples[i].ids)
    if chunk:
        yield chunk


def _scores(losses: Tensor, correct: Tensor | None = None, log_probs: Tensor | None = None, standard=None) -> dict:
    scores = {"loss": losses.mean().item()}
    if correct is not None:
        correct = correct.tolist()
        scores |= {
            "exact_memorization": exact_memorization(correct),
            "extraction_strength": extraction_strength(correct),
            "mia_min_k": min_k(log_probs.tolist()),
            "mia_min_k_plus_plus": min_k(standard.tolist()),
        }
    return scores


class Journal:
    """What an evaluation has done so far, one JSON object per line, so that an interrupted one goes on from there."""

    def __init__(self, path: Path | None):
        """path None: in memory only. A line that a killed process left half written is dropped from the file."""
        self.path, self.done = path, {}
        if path is not None and path.exists():
            whole = path.read_bytes()
            end = whole.rfind(b"\n") + 1
            if end < len(whole):
                os.truncate(path, end)
            for line in whole[:end].decode("utf-8").split("\n")[:-1]:
                self.done |= json.loads(line)

    def __contains__(self, key: str) -> bool:
        return key in self.done

    def __getitem__(self, key: str) -> dict | str:
        return self.done[key]

    def add(self, results: dict[str, dict | str]) -> None:
        self.done |= results
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as f:
                f.write(json.dumps(results, ensure_ascii=False) + "\n")
        except OSError as e:
            raise EvalError(f"{self.path}: could not be written ({e}); free some space or choose another --out") from None


def apply_row_limit(sets: dict[str, list[Row]], protocol: Protocol) -> dict[str, list[Row]]:
    return {name: rows[: protocol.rows] for name, rows in sets.items()}


def cut_to_total(example: Example, limit: int | None) -> Example:
    """An example cut to `limit` tokens; one that reaches it has no EOS to predict, as in the TOFU authors' code.

    Raises EvalError where nothing of the answer is left.
    """
    if limit is None:
        return example
    if example.prompt_length >= limit:
        raise EvalError(
            f"{example.key}: its prompt fills the {limit} tokens of the protocol; leave it out or use another one"
        )
    return replace(example, ids=example.ids[:limit])


def generation_limits(prompt_lengths: list[int], max_new_tokens: int, max_total_tokens: int | None) -> list[int]:
    """New tokens that each prompt of a set may get. A limit on the total counts the padding of its batch of 30."""
    if max_total_tokens is None:
        return [max_new_tokens] * len(prompt_lengths)
    n = TOFU_GENERATION_BATCH
    longest = [max(prompt_lengths[i - i % n : i - i % n + n]) for i in range(len(prompt_lengths))]
    return [min(max_new_tokens, max(0, max_total_tokens - x)) for x in longest]


def _texts(name: str, row: Row) -> dict[str, str]:
    """The answers to a row that are scored: 'answer', 'correct' (its paraphrase), 'wrong 0', 'wrong 1', ..."""
    texts = {"answer": row.answer}
    if name == "holdout":
        return texts
    if not row.perturbed_answers:
        raise DataError(f"{row.key}: has no 'perturbed_answer'; evaluate on a *_perturbed set")
    texts |= {"correct": row.paraphrased_answer} if row.paraphrased_answer else {}
    return texts | {f"wrong {j}": text for j, text in enumerate(row.perturbed_answers)}


def evaluate(
    model: Llama,
    tokenizer: Tokenizer,
    sets: dict[str, list[Row]],
    max_new_tokens: int = 200,
    batch_size: int = 64,
    label: str = "evaluate",
    progress: bool = True,
    protocol: Protocol = OPEN_UNLEARNING,
    journal: Path | None = None,
) -> dict[str, dict[str, dict]]:
    """Per-item results {set: {key: item}} for the sets of `evaluation_sets` (and 'holdout'). One progress bar over all
    answers; with `journal`, an interrupted evaluation goes on from what that file holds.

    item: question, answer, prompt (as decoded), generation (greedy), rouge, rouge_f1, rouge1 (see `rouge`), loss (of
    `answer`), correct_loss (of the paraphrase where there is one, else of `answer`), wrong_losses, truth_ratio; on forget
    and holdout rows also exact_memorization, extraction_strength, mia_loss, mia_min_k, mia_min_k_plus_plus, mia_zlib.
    A holdout row is only scored, not generated from.
    Raises DataError for a row that occurs twice or has no perturbed answers, EvalError for a loss that is not finite.
    """
    if any(p.dtype != model.compute_dtype for p in model.parameters() if p.ndim == 2):
        model = model.frozen_copy()  # cast the master weights once, not in every step of generation
    sets = apply_row_limit(sets, protocol)
    answers: dict[str, Example] = {}  # what is scored, by "set row kind"
    prompts: dict[str, tuple[list[int], int]] = {}  # what is generated from, with the limit of new tokens
    for name, rows in sets.items():
        for row in rows:
            if f"{name} {row.key} answer" in answers:
                raise DataError(f"{row.key}: occurs twice in the {name} set; evaluate on each row once")
            for kind, text in _texts(name, row).items():
                example = tokenizer.encode(row.question, text, row.key)
                answers[f"{name} {row.key} {kind}"] = cut_to_total(example, protocol.max_total_tokens)
        if name != "holdout":
            first = [answers[f"{name} {row.key} answer"] for row in rows]
            ids = [list(example.ids[: example.prompt_length]) for example in first]
            limits = generation_limits([len(x) for x in ids], max_new_tokens, protocol.max_total_tokens)
            prompts |= {f"{name} {row.key}": x for row, x in zip(rows, zip(ids, limits, strict=True), strict=True)}

    done = Journal(journal)
    to_score = [key for key in answers if key not in done]
    to_generate = sorted((k for k in prompts if k not in done), key=lambda k: (prompts[k][1], len(prompts[k][0])))
    total = len(answers) + len(prompts)
    started = total - len(to_score) - len(to_generate)
    with tqdm(total=total, initial=started, desc=label, unit="answer", disable=not progress, leave=False) as bar:

        def keep(results):
            done.add(results)
            bar.update(len(results))

        hidden_id = tokenizer.eos_id if protocol.mask_quirk else None
        detailed = [key.split()[0] in DETAILED and key.endswith(" answer") for key in to_score]
        examples = [answers[key] for key in to_score]
        score_answers(
            model, examples, detailed, hidden_id, on_batch=lambda found: keep({to_score[i]: x for i, x in found.items()})
        )
        # A chat format may end its answers by another token than the model's config names.
        stop = {*model.config.eos_token_ids, tokenizer.eos_id}
        for start in range(0, len(to_generate), batch_size):
            chunk = to_generate[start : start + batch_size]
            ids, limits = zip(*(prompts[key] for key in chunk), strict=True)
            found = generate(model, list(ids), max(limits), stop, hidden_id)
            keep({key: tokenizer.decode(x[:n]) for key, x, n in zip(chunk, found, limits, strict=True)})

    results: dict[str, dict[str, dict]] = {name: {} for name in sets}
    for name, rows in sets.items():
        for row in rows:
            losses = {kind: done[f"{name} {row.key} {kind}"]["loss"] for kind in _texts(name, row)}
            if unusable := [loss for loss in losses.values() if not math.isfinite(loss)]:
                raise EvalError(
                    f"{row.key}: the model's loss is {unusable[0]}; its weights or --dtype {model.compute_dtype} overflow"
                )
            results[name][row.key] = item = {"question": row.question, "answer": row.answer}
            item |= done[f"{name} {row.key} answer"]
            if name in DETAILED:
                item |= {"mia_loss": item["loss"], "mia_zlib": zlib_score(item["loss"], row.answer)}
            if name != "holdout":
                item["correct_loss"] = losses.get("correct", item["loss"])
                item["wrong_losses"] = [loss for kind, loss in losses.items() if kind.startswith("wrong")]
                item["truth_ratio"] = truth_ratio(
                    item["correct_loss"], item["wrong_losses"], protocol.truth_ratio, protocol.epsilon
                )
                item |= {
                    "prompt": tokenizer.decode(prompts[f"{name} {row.key}"][0]),
                    "generation": done[f"{name} {row.key}"],
                }
                item |= rouge(row.answer, item["generation"])
    return results


def evaluate_and_save(
    model: Llama,
    tokenizer: Tokenizer,
    sets: dict[str, list[Row]],
    folder: Path | None,
    name: str,
    max_new_tokens: int = 200,
    label: str = "evaluate",
    protocol: Protocol = OPEN_UNLEARNING,
) -> dict:
    """{'protocol', 'rows', 'scores', 'path'}, written to `folder/eval/NAME-HASH/log.json`, or read from there.

    HASH covers the protocol (questions and answers, prompt tokens, generation length, dtype, ...), so a result is reused
    only for the same evaluation, and an interrupted one goes on. The folder must belong to this one model: a run folder.
    folder None: nothing is kept.
    """
    if protocol.mask_quirk and tokenizer.format_name != "llama3":
        raise EvalError(
            f"--mask-quirk: is one of the llama3 prompt format, this one is {tokenizer.format_name}; drop the flag"
        )
    sets = apply_row_limit(sets, protocol)

    def of_set(rows):
        tokens = [tokenizer.encode(r.question, r.answer, r.key).ids for r in rows]
        digest = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]
        return {"rows": len(rows), "fingerprint": fingerprint(rows), "prompt_tokens": digest}

    record = {
        "name": protocol.name,
        "sets": {k: of_set(v) for k, v in sets.items()},
        "prompt_format": tokenizer.format_name,
        "date": tokenizer.date,
        "mask_quirk": protocol.mask_quirk,
        "truth_ratio": protocol.truth_ratio,
        "epsilon": protocol.epsilon,
        "max_new_tokens": max_new_tokens,
        "max_total_tokens": protocol.max_total_tokens,
        "dtype": str(model.compute_dtype),
    }

    def run(journal):
        rows = evaluate(model, tokenizer, sets, max_new_tokens, label=label, protocol=protocol, journal=journal)
        return rows, aggregate(rows, protocol.epsilon)

    return keep_log(folder, name, record, run)


def keep_log(folder: Path | None, name: str, protocol: dict, run) -> dict:
    """{'protocol', 'scores', 'rows', 'path'} from `folder/eval/NAME-HASH/log.json`, or by run(journal) -> (rows, scores),
    and then kept there. HASH is of the protocol. folder None: nothing is kept."""
    key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:8]
    path = folder / "eval" / f"{name}-{key}" / "log.json" if folder else None
    if path and path.exists():
        return json.loads(path.read_text(encoding="utf-8")) | {"path": str(path)}
    journal = path.with_name("journal.jsonl") if path else None
    rows, scores = run(journal)
    log = {"protocol": protocol, "scores": scores, "rows": rows}
    if path:
        write_json(path, log)
        journal.unlink(missing_ok=True)
    return log | {"path": str(path) if path else None}


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a file with one per line; none where there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_json(path: Path, value: dict, indent: int = 1) -> None:
    """Write or replace a JSON file; it is there whole or not at all. Raises EvalError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")  # two runs may write what one evaluation found
        part.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as e:
        raise EvalError(f"{path}: could not be written ({e}); free some space or choose another --out") from None


# ---------------------------------------------------------------------------------------------------------------- MUSE
# Shi et al. 2024, arXiv 2407.06460: verbatim memory, knowledge memory, privacy leakage, utility. Two code bases measure it:
# 'muse', the authors', and 'open-unlearning'.

MUSE_VARIANTS = ("open-unlearning", "muse")
MUSE_QUESTIONS = {"forget_knowmem": "forget_qa", "retain_knowmem": "retain_qa"}
MUSE_TEXTS = {"privleak_forget": "forget", "privleak_holdout": "holdout"}
MUSE_NEW_TOKENS = {"forget_verbmem": 128, "forget_knowmem": 32, "retain_knowmem": 32}
MUSE_MAX_TOKENS = 2048  # of a text, after BOS; open-unlearning only
MUSE_STOPS = ("\n\n", "\nQuestion", "Question:")
# P(a holdout score is below a forget score) of the retrained models, from the authors' constants: 1 - AUC of
# `membership_auc`. PPL is the mean loss, not its exponential.
MUSE_RETRAIN_AUC = {
    "news": {"Min-5%": 0.5116, "Min-10%": 0.5021, "Min-20%": 0.4931, "Min-30%": 0.4840, "Min-40%": 0.4772,
             "Min-50%": 0.4711, "Min-60%": 0.4671, "PPL": 0.4652, "PPL/lower": 0.3542, "PPL/zlib": 0.4328,
             "PPL/ref": 0.2755},
    "books": {"Min-5%": 0.5325, "Min-10%": 0.5424, "Min-20%": 0.5582, "Min-30%": 0.5570, "Min-40%": 0.5393,
              "Min-50%": 0.5167, "Min-60%": 0.4841, "PPL": 0.4746, "PPL/lower": 0.3957, "PPL/zlib": 0.2773,
              "PPL/ref": 0.3403},
}  # fmt: skip
MUSE_ROUGE = {"rouge1_recall": "rouge1", "rougeL_f1": "rouge_f1", "rougeL_recall": "rouge"}
MUSE_SUMMARY_KEYS = ("extraction_strength", "forget_knowmem_ROUGE", "forget_verbmem_ROUGE", "privleak",
                     "retain_knowmem_ROUGE")  # fmt: skip


def knowmem_prompt(icl_pairs: list[tuple[str, str]], question: str) -> str:
    """The pairs (question, answer) as examples, then the question. Ends with a space, as in both code bases."""
    examples = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in icl_pairs)
    return f"{examples}Question: {question}\nAnswer: "


def cut_at_stop(text: str) -> str:
    """What a KnowMem generation says before it goes on to another question; white space around it is kept."""
    for stop in MUSE_STOPS:
        text = text.split(stop)[0]
    return text


def muse_min_k(log_probs: list[float], variant: str) -> float:
    """Min-40%: minus the mean of the lowest 40 % of a text's token log-probabilities (nats, BOS not among them).

    'muse': of all int(0.4 N) lowest of N, at least one; 'open-unlearning': of the first 2048 but the last of them.
    """
    if variant == "muse":
        return min_k([*log_probs, 0.0])  # min_k leaves the last one out: there it is EOS, here there is none
    return min_k(log_probs[:MUSE_MAX_TOKENS])


def muse_retained_auc(corpus: str) -> float:
    """The AUC, in the direction of `membership_auc`, of MUSE's own retrained model on 'news' or 'books'."""
    return 1 - MUSE_RETRAIN_AUC[corpus]["Min-40%"]


def aggregate_muse(rows: dict[str, dict[str, dict]], retained_auc: float | None = None) -> dict[str, float | None]:
    """MUSE's numbers from the items of `evaluate_muse`: three mean ROUGE-L F1 and two memorization scores (0 to 1), the AUC
    `mia_min_k` (1 = fully memorised) and `privleak` (percent).

    retained_auc: of the retrained model, by `read_muse_retain` or `muse_retained_auc`; without it `privleak` is None.
    """

    def mean(part, name):
        return sum(item[name] for item in rows[part].values()) / len(rows[part])

    scores = {f"{part}_ROUGE": mean(part, "rougeL_f1") for part in MUSE_NEW_TOKENS}
    scores |= {name: mean("forget_verbmem", name) for name in MEMORIZATION}
    forget, holdout = ([item["score"] for item in rows[part].values()] for part in MUSE_TEXTS)
    auc = membership_auc(forget, holdout)
    return scores | {"mia_min_k": auc, "privleak": None if retained_auc is None else privleak(auc, retained_auc)}


def muse_eval_json(rows: dict[str, dict[str, dict]], scores: dict[str, float]) -> dict:
    """open-unlearning's MUSE_EVAL.json: its keys, sorted, and its shapes. Of its membership scores, `mia_min_k` only."""

    def metric(part, names, value):
        items = rows[part].values()
        by_index = {str(i): {to: item[name] for to, name in names.items()} for i, item in enumerate(items)}
        return {"agg_value": value, "value_by_index": by_index}

    text = {name: name for name in ("rouge1_recall", "rougeL_f1", "rougeL_recall")}
    text |= {"input": "prompt", "ground_truth": "ground_truth", "generation": "generation"}
    result = {f"{part}_ROUGE": metric(part, text, scores[f"{part}_ROUGE"]) for part in MUSE_NEW_TOKENS}
    for name in MEMORIZATION:
        result[name] = metric("forget_verbmem", {"score": name}, scores[name])
    both = {}
    for part, name in MUSE_TEXTS.items():
        values = [item["score"] for item in rows[part].values()]
        both[name] = metric(part, {"score": "score"}, sum(values) / len(values))
    result["mia_min_k"] = both | {"auc": scores["mia_min_k"], "agg_value": scores["mia_min_k"]}
    result["privleak"] = {"agg_value": scores["privleak"]}
    return dict(sorted(result.items()))


def muse_summary(result: dict) -> dict[str, float]:
    """open-unlearning's MUSE_SUMMARY.json of a MUSE_EVAL.json."""
    return {name: result[name]["agg_value"] for name in MUSE_SUMMARY_KEYS}


def muse_csv_row(name: str, scores: dict[str, float]) -> dict[str, str | float]:
    """A row of the MUSE authors' CSV: all four numbers in percent."""
    row = {"name": name, "verbmem_f": scores["forget_verbmem_ROUGE"] * 100, "privleak": scores["privleak"]}
    return row | {f"knowmem_{part[0]}": scores[f"{part}_ROUGE"] * 100 for part in MUSE_QUESTIONS}


def read_muse_retain(path: str | Path) -> float:
    """The retrained model's AUC (`mia_min_k`) from its MUSE_EVAL.json, open-unlearning's or ours, or from our log.

    Raises EvalError naming the file and what is missing or wrong in it.
    """
    try:
        log = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise EvalError(f"{path}: not a readable JSON log ({e})") from None
    ours = isinstance(log, dict) and "scores" in log
    first, second = ("scores", "mia_min_k") if ours else ("mia_min_k", "agg_value")
    try:
        auc = log[first][second]
    except (KeyError, TypeError, IndexError):
        auc = None
    if isinstance(auc, bool) or not isinstance(auc, int | float) or not 0 <= auc <= 1:
        raise EvalError(
            f"{path}: key '{first}.{second}' is missing or no number from 0 to 1; evaluate the retrained model on MUSE again"
        )
    return float(auc)


@torch.no_grad()
def score_texts(
    model: Llama, examples: list, variant: str = "open-unlearning", budget: int = 2048, on_batch=lambda scored: None
) -> list[dict]:
    """{'score': Min-40%, 'loss': mean negative log-likelihood per token} of texts (BOS, then labels only), in order.

    Batches and `on_batch` as in `score_answers`, which also computes what needs several more tensors of the size of all
    positions' logits: for a text, that is all of it.
    """
    results: list[dict] = [{}] * len(examples)
    for chunk in _chunks(list(range(len(examples))), examples, budget):
        batch = pack([examples[i] for i in chunk]).to(model.device)
        log_probs = -F.cross_entropy(model(**batch.inputs), batch.targets, reduction="none")
        scored = {}
        for i, values in zip(chunk, log_probs.split(batch.answer_lengths), strict=True):
            values = values.tolist()
            scored[i] = {"score": muse_min_k(values, variant), "loss": -sum(values) / len(values)}
            results[i] = scored[i]
        on_batch(scored)
    return results


def evaluate_muse(
    model: Llama,
    tokenizer: Tokenizer,
    corpus: str,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    stemmer: bool | None = None,
    variant: str = "open-unlearning",
    batch_size: int = 8,
    label: str = "evaluate",
    progress: bool = True,
    journal: Path | None = None,
) -> dict[str, dict[str, dict]]:
    """Per-item results {part: {key: item}} of MUSE on 'news' or 'books'. One progress bar over all texts and generations;
    with `journal`, an interrupted evaluation goes on from what that file holds: it belongs to one model, variant and data.

    Parts: forget_verbmem, forget_knowmem, retain_knowmem; item: prompt, ground_truth, generation (greedy: 128 new tokens, or
    32 cut at the stop strings), rougeL_f1, rougeL_recall, rouge1_recall; on verbmem also exact_memorization and
    extraction_strength. privleak_forget, privleak_holdout; item: score (Min-40%), loss.
    Prompts are text behind BOS, without a chat format. data_dir: as in `load_muse`. limit: only the first so many rows of
    each part (the examples of KnowMem's prompt are not cut). stemmer: of ROUGE; None: on, but for the variant 'muse' off.
    variant: 'muse' scores all of a text and cuts VerbMem's reference to 127 tokens; see `muse_min_k`, `rouge`.
    Raises DataError for missing or broken data, EvalError for an unknown variant, a limit below 1, a loss not finite.
    """
    require_extra()
    if variant not in MUSE_VARIANTS:
        raise EvalError(f"MUSE variant {variant!r}: unknown; known are {', '.join(MUSE_VARIANTS)}")
    if limit is not None and limit < 1:
        raise EvalError(f"limit {limit}: leaves no rows; give at least 1, or none for all of them")
    stemmer = variant != "muse" if stemmer is None else stemmer
    if any(p.dtype != model.compute_dtype for p in model.parameters() if p.ndim == 2):
        model = model.frozen_copy()  # cast the master weights once, not in every step of generation
    rows, prompts, texts = _muse_work(tokenizer, corpus, data_dir, limit, variant)
    stop = {*model.config.eos_token_ids, tokenizer.eos_id}

    done = Journal(journal)
    to_score = {kind: [e for e in texts[kind] if f"score {e.key}" not in done] for kind in texts}
    to_generate = {part: {k: p for k, p in prompts[part].items() if f"generation {k}" not in done} for part in prompts}
    total = sum(map(len, (*texts.values(), *prompts.values())))
    started = total - sum(map(len, (*to_score.values(), *to_generate.values())))
    with tqdm(total=total, initial=started, desc=label, unit="text", disable=not progress, leave=False) as bar:

        def keep(results):
            done.add(results)
            bar.update(len(results))

        def keep_scores(examples):
            return lambda scored: keep({f"score {examples[i].key}": scores for i, scores in scored.items()})

        whole, verbatim = to_score["whole"], to_score["verbatim"]
        score_texts(model, whole, variant, on_batch=keep_scores(whole))
        score_answers(model, verbatim, [True] * len(verbatim), on_batch=keep_scores(verbatim))
        for part, found in to_generate.items():
            order = sorted(found, key=lambda key: -len(found[key]))  # longest first: running out of memory shows at once
            for start in range(0, len(order), batch_size):
                keys = order[start : start + batch_size]
                outputs = generate(model, [found[key] for key in keys], MUSE_NEW_TOKENS[part], stop)
                # As generated: what is cut off is found again in it, and a leading blank line ends a KnowMem answer.
                keep({f"generation {k}": tokenizer.decode_text(ids) for k, ids in zip(keys, outputs, strict=True)})

    for part, items in rows.items():
        for key, item in items.items():
            scores = done.done.get(f"score {key}", {"loss": 0.0})
            if not math.isfinite(scores["loss"]):
                raise EvalError(
                    f"{key}: the model's loss is {scores['loss']}; its weights or --dtype {model.compute_dtype} overflow"
                )
            if part in MUSE_TEXTS:
                item |= scores
                continue
            generation = done[f"generation {key}"]
            item["generation"] = (cut_at_stop(generation) if part in MUSE_QUESTIONS else generation).strip()
            scores_of_text = rouge(item["ground_truth"], item["generation"], stemmer)
            item |= {to: scores_of_text[name] for to, name in MUSE_ROUGE.items()}
            item |= {name: scores[name] for name in MEMORIZATION if name in scores}
    return rows


def _muse_work(tokenizer: Tokenizer, corpus: str, data_dir: str | Path | None, limit: int | None, variant: str) -> tuple:
    """(items without results, {part: {key: prompt ids}}, {'whole': examples of texts, 'verbatim': of VerbMem})."""
    rows: dict[str, dict] = {part: {} for part in (*MUSE_NEW_TOKENS, *MUSE_TEXTS)}
    prompts: dict[str, dict] = {part: {} for part in MUSE_NEW_TOKENS}
    texts: dict[str, list] = {"whole": [], "verbatim": []}

    def load(config, split):
        found = load_muse(corpus, config, split, data_dir)[:limit]
        return [(f"muse_{corpus}/{config}/{split}/{i}", row) for i, row in enumerate(found)]

    def with_bos(text, key):
        return [tokenizer.bos_id, *tokenizer.encode_text(text, key)]

    for key, row in load("verbmem", "forget"):
        prompt, reference = with_bos(row["prompt"], key), row["gt"].strip()
        if variant == "muse":  # 128 tokens, BOS among them
            reference = tokenizer.decode(tokenizer.encode_text(row["gt"], key)[: MUSE_NEW_TOKENS["forget_verbmem"] - 1])
        rows["forget_verbmem"][key] = {"prompt": row["prompt"], "ground_truth": reference}
        prompts["forget_verbmem"][key] = prompt
        # With a space between them, as in open-unlearning; MUSE itself does not score the reference.
        ids = with_bos(f"{row['prompt']} {row['gt']}", key)
        if len(ids) <= len(prompt):
            raise DataError(f"{key}: its 'gt' tokenises to nothing behind its 'prompt'; download it again")
        texts["verbatim"].append(Example(key, tuple(ids), len(prompt)))
    for part, split in MUSE_QUESTIONS.items():
        pairs = [(r["question"], r["answer"]) for r in load_muse(corpus, "knowmem", f"{split}_icl", data_dir)]
        for key, row in load("knowmem", split):
            prompt = knowmem_prompt(pairs, row["question"])
            rows[part][key] = {"prompt": prompt, "ground_truth": row["answer"]}
            prompts[part][key] = with_bos(prompt, key)
    for part, split in MUSE_TEXTS.items():
        for key, row in load("privleak", split):
            ids = with_bos(row["text"], key)
            rows[part][key] = {}
            texts["whole"].append(Example(key, tuple(ids if variant == "muse" else ids[: 1 + MUSE_MAX_TOKENS]), 1))
    return rows, prompts, texts


# ----------------------------------------------------------------------------------------------------- command line


def pick_device(device: str) -> torch.device:
    """'auto' -> cuda where there is one, else cpu. Raises EvalError for a device that torch does not see."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as e:
        raise EvalError(f"--device {device}: not usable here ({str(e).splitlines()[0]})") from None


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """'auto' -> bfloat16 on a GPU that has it, else float32."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def resolve_model(name: str, kind: str) -> tuple[str, str | None]:
    """(folder or hub id, prompt format or None) of an alias of CHECKPOINTS or MUSE_CHECKPOINTS, or (name, None).

    kind: 'target' for the checkpoint finetuned on the benchmark, 'base' for the one before.
    Raises ModelError for a name that is no alias, no folder and cannot be a hub id.
    """
    aliases = CHECKPOINTS | MUSE_CHECKPOINTS
    if name in aliases:
        return getattr(aliases[name], kind), aliases[name].prompt
    if not Path(name).exists() and "/" not in name:
        raise ModelError(f"--model {name}: neither an alias ({', '.join(aliases)}) nor a folder nor a hub id (owner/name)")
    return name, None


def load_tokenizer(tokenizer: str | None, model_folder: Path, vocab_size: int, prompt: str) -> Tokenizer:
    folder = (
        resolve_folder(tokenizer, ("tokenizer*.json", "special_tokens_map.json", "*.jinja")) if tokenizer else model_folder
    )
    return Tokenizer(folder, vocab_size, prompt)


def run_folder(name: str) -> Path | None:
    """The run folder that a model name is, or None: a place where its evaluations may be kept."""
    return Path(name) if (Path(name) / "model" / "config.json").exists() else None


def default_tokenizer(name: str, tokenizer: str | None) -> str | None:
    """`tokenizer`, or that of an alias whose checkpoint comes without one."""
    return tokenizer or (MUSE_CHECKPOINTS[name].base if name in MUSE_CHECKPOINTS else None)


def retain_reference(
    alias: str | None, forget: str | None, retain_logs: str | None, retained_log: dict | None, data_dir: str | None
) -> tuple[dict | None, str]:
    """(log of a retrained model or None, where it is from or why there is none). Never a default in its place."""
    if retained_log is not None:
        return retained_log | {"mia_min_k": retained_log.get("scores", {}).get("mia_min_k")}, "the retrained model"
    if retain_logs:
        return read_log(retain_logs), str(retain_logs)
    parts = split_spec(forget or "none")
    config = parts[0][0].removeprefix("tofu_").removesuffix("_perturbed")
    if alias not in CHECKPOINTS or config not in TOFU_RETAIN or len(parts) > 1 or parts[0][1:] != (None, None):
        return None, "no retain reference: pass --retain-logs FILE or --retain-model PATH"
    repo, name = CHECKPOINTS[alias].retain_log(config)
    local = Path(data_dir) / repo / name if data_dir else None
    try:
        path = local if local and local.exists() else hub_file(repo, name, "pass --retain-logs FILE")
        return read_log(path), f"{repo}/{name}"
    except (DataError, EvalError) as e:
        return None, f"no retain reference: {e}"


def quality_of(log: dict, reference: dict | None, where: str) -> tuple[float | None, str]:
    """(forget quality, where its reference is from) or (None, why there is none). Raises EvalError as `compare` does."""
    if reference is None:
        return None, where
    quality, note = compare(log, reference, where)
    return quality, f"{where} ({note})" if note else where


def table(columns: dict[str, dict]) -> str:
    """The scores of several models side by side, as text. A score that does not exist is a dash."""
    names = ["forget_quality", "model_utility", *UTILITY_PARTS, *FORGET_PARTS]
    names += [n for n in (*MEMORIZATION, *MEMBERSHIP, "privleak") if any(n in scores for scores in columns.values())]

    def cell(scores, name):
        value = scores.get(name)
        if value is None:
            return "-"
        return f"{value:.2e}" if name == "forget_quality" and value < 0.01 else f"{value:.4f}"

    lines = ["".ljust(24) + "".join(c.rjust(13) for c in columns)]
    lines += [n.ljust(24) + "".join(cell(s, n).rjust(13) for s in columns.values()) for n in names]
    return "\n".join(lines)


def summary_scores(scores: dict, quality: float | None) -> dict:
    """What summary.json holds for one model."""
    parts = {k: scores[k] for k in UTILITY_PARTS}
    others = {k: scores[k] for k in (*FORGET_PARTS, *MEMORIZATION, *MEMBERSHIP, "privleak") if k in scores}
    result = {"forget_quality": quality, "forget_quality_log10": log10(quality), "model_utility": scores["model_utility"]}
    return result | {"parts": parts} | others


class Tofu:
    """TOFU's evaluation of one forget set, in the steps that train.py and the command line below take."""

    def __init__(
        self,
        forget: str | None,
        eval_retain: str | None = None,
        data_dir: str | None = None,
        seed: int = 0,
        max_new_tokens: int = 200,
        protocol: Protocol = OPEN_UNLEARNING,
        holdout: bool = False,
    ):
        """Loads the sets; forget None: none, for logs alone. holdout: also the holdout set, for membership scores, where
        there is one."""
        self.forget, self.data_dir, self.max_new_tokens, self.protocol = forget, data_dir, max_new_tokens, protocol
        names = evaluation_sets(forget, eval_retain) if forget else {}
        self.sets = {k: load_rows(v, data_dir, seed) for k, v in names.items()}
        self.no_holdout = ""
        if holdout:
            rows, self.no_holdout = holdout_rows(forget, data_dir, seed)
            self.sets |= {"holdout": rows} if rows else {}

    def data(self) -> dict[str, dict]:
        """What a run records of the data."""
        sets = apply_row_limit(self.sets, self.protocol)
        return {name: {"rows": len(rows), "fingerprint": fingerprint(rows)} for name, rows in sets.items()}

    def evaluate(self, model: Llama, tokenizer: Tokenizer, folder: Path | None, name: str, label: str) -> dict:
        """The log of `evaluate_and_save`."""
        place = folder, name, self.max_new_tokens, label, self.protocol
        return evaluate_and_save(model, tokenizer, self.sets, *place)

    def reference(self, alias: str, retain_logs: str | None, retrained: dict | None) -> tuple[dict | None, str]:
        """As `retain_reference`."""
        reference, where = retain_reference(alias, self.forget, retain_logs, retrained, self.data_dir)
        if reference is not None and retrained is None and self.protocol.truth_ratio != "geometric":
            reference = with_truth_ratio(reference, self.protocol.truth_ratio)
        return reference, where

    def summary(self, log: dict, reference: dict | None, where: str) -> tuple[dict, str]:
        """(what summary.json holds of a model, where its reference is from); writes open-unlearning's files too.

        Raises EvalError where log and reference cannot be compared.
        """
        quality, where = quality_of(log, reference, where)
        scores = dict(log["scores"])
        retained = (reference or {}).get("mia_min_k")
        if "mia_min_k" in scores and retained is not None:
            scores["privleak"] = privleak(scores["mia_min_k"], retained)
        if log.get("path") and log.get("protocol"):
            save_open_unlearning(log, quality, reference)
        return summary_scores(scores, quality), where

    @staticmethod
    def samples(log: dict) -> dict[str, tuple[str, str, str]]:
        """{key: (question, reference, generation)} of the forget set."""
        return {k: (v["question"], v["answer"], v["generation"]) for k, v in log["rows"]["forget"].items()}

    @staticmethod
    def worst(log: dict, n: int) -> str:
        return worst_rows(log, n)

    @staticmethod
    def headline(summary: dict) -> str:
        quality = "-" if summary["forget_quality"] is None else f"{summary['forget_quality']:.3g}"
        return f"forget quality {quality}, model utility {summary['model_utility']:.4f}"

    @staticmethod
    def report(summaries: dict[str, dict], found: str) -> str:
        """The table, and where the reference of forget quality is from."""
        text = table({k: v | v["parts"] for k, v in summaries.items()})
        has = any(v["forget_quality"] is not None for v in summaries.values())
        return f"{text}\n{'forget quality against ' if has else 'forget quality is absent: '}{found}"


class Muse:
    """MUSE's evaluation of one corpus, in the same steps as `Tofu`."""

    def __init__(
        self,
        forget: str,
        data_dir: str | None = None,
        limit: int | None = None,
        variant: str = "open-unlearning",
        stemmer: bool | None = None,
    ):
        """forget: `muse_news` or `muse_books`, also with a config and a split behind. limit: rows of each part."""
        self.corpus = split_spec(forget)[0][0].split("/")[0].removeprefix("muse_")
        self.data_dir, self.limit, self.variant, self.stemmer = data_dir, limit, variant, stemmer
        if variant not in MUSE_VARIANTS:
            raise EvalError(f"--protocol {variant}: is none of MUSE's, which are {', '.join(MUSE_VARIANTS)}")
        parts = [("verbmem", "forget"), ("privleak", "forget"), ("privleak", "holdout")]
        parts += [("knowmem", split + icl) for split in MUSE_QUESTIONS.values() for icl in ("", "_icl")]
        self.rows = {f"{config}/{split}": load_muse(self.corpus, config, split, data_dir) for config, split in parts}

    def data(self) -> dict[str, dict]:
        return {name: {"rows": len(rows), "fingerprint": fingerprint(rows)} for name, rows in self.rows.items()}

    def evaluate(self, model: Llama, tokenizer: Tokenizer, folder: Path | None, name: str, label: str) -> dict:
        """A log as of `evaluate_and_save`, with the items of `evaluate_muse`."""
        sample = tokenizer.encode_text(self.rows["verbmem/forget"][0]["prompt"])
        record = {"name": f"MUSE {self.corpus}, {self.variant}", "limit": self.limit, "stemmer": self.stemmer}
        record |= {"sets": self.data(), "tokens": sample, "dtype": str(model.compute_dtype)}

        def run(journal):
            options = self.limit, self.stemmer, self.variant
            rows = evaluate_muse(model, tokenizer, self.corpus, self.data_dir, *options, label=label, journal=journal)
            return rows, aggregate_muse(rows)

        return keep_log(folder, name, record, run)

    def reference(self, alias: str, retain_logs: str | None, retrained: dict | None) -> tuple[dict | None, str]:
        """({'mia_min_k': AUC of the retrained model} or None, where it is from or why there is none).

        retain_logs: a MUSE_EVAL.json or our log of the retrained model, or 'muse' for MUSE's published constant.
        """
        if retrained is not None:
            return {"mia_min_k": retrained["scores"]["mia_min_k"]}, "the retrained model"
        if retain_logs == "muse":
            return {"mia_min_k": muse_retained_auc(self.corpus)}, "MUSE's published constant of its retrained model"
        if retain_logs:
            return {"mia_min_k": read_muse_retain(retain_logs)}, retain_logs
        if alias not in MUSE_CHECKPOINTS:
            return None, "no retain reference: pass --retain-logs FILE, --retain-logs muse, or --retain-model PATH"
        try:
            path = muse_retain_log(alias, self.data_dir)
            return {"mia_min_k": read_muse_retain(path)}, "/".join(MUSE_CHECKPOINTS[alias].retain_log)
        except (DataError, EvalError) as e:
            return None, f"no retain reference: {e}"

    def summary(self, log: dict, reference: dict | None, where: str) -> tuple[dict, str]:
        """(MUSE's four numbers and more of a model, where); writes MUSE_EVAL.json, MUSE_SUMMARY.json and MUSE.csv too."""
        scores = aggregate_muse(log["rows"], reference and reference["mia_min_k"])
        if log["path"]:
            path, result = Path(log["path"]), muse_eval_json(log["rows"], scores)
            write_json(path.with_name("MUSE_EVAL.json"), result, indent=4)
            flat = {k: v for k, v in muse_summary(result).items() if v is not None}
            write_json(path.with_name("MUSE_SUMMARY.json"), flat, indent=4)
            with path.with_name("MUSE.csv").open("w", newline="") as f:
                row = muse_csv_row(path.parents[2].name, scores)
                writer = csv.DictWriter(f, row)
                writer.writeheader()
                writer.writerow(row)
        return scores, where

    @staticmethod
    def samples(log: dict) -> dict[str, tuple[str, str, str]]:
        """{key: (question, reference, generation)} of KnowMem on the forget set."""
        items = log["rows"]["forget_knowmem"].items()
        asked = {k: v["prompt"].rsplit("Question: ", 1)[1].removesuffix("\nAnswer: ") for k, v in items}
        return {k: (asked[k], v["ground_truth"], v["generation"]) for k, v in items}

    @staticmethod
    def worst(log: dict, n: int) -> str:
        """The n worst rows of each part: the best remembered of forget_..., the least of retain_... (ROUGE-L F1)."""
        lines = []
        for part in MUSE_NEW_TOKENS:
            ranked = sorted(log["rows"][part].items(), key=lambda x: x[1]["rougeL_f1"], reverse=part.startswith("forget"))
            for key, item in ranked[:n]:
                lines.append(f"\n{part} {key}: ROUGE-L F1 {item['rougeL_f1']:.3f}")
                for label, text in (("prompt", item["prompt"][-200:]), ("reference", item["ground_truth"])):
                    lines.append(f"    {label:<11} {text}")
                lines.append(f"    {'generation':<11} {item['generation']}")
        return "\n".join(lines)

    @staticmethod
    def headline(summary: dict) -> str:
        row = muse_csv_row("", summary)
        leak = "-" if row["privleak"] is None else f"{row['privleak']:.1f}"
        verbmem, knowmem, utility = (f"{row[key]:.1f}" for key in ("verbmem_f", "knowmem_f", "knowmem_r"))
        return f"VerbMem {verbmem}, KnowMem {knowmem}, PrivLeak {leak}, utility {utility}"

    @staticmethod
    def report(summaries: dict[str, dict], found: str) -> str:
        """The table (MUSE's scale, x 100), and where the reference of PrivLeak is from."""
        labels = {"verbmem_f": "VerbMem, forget", "knowmem_f": "KnowMem, forget", "knowmem_r": "KnowMem, retain (utility)",
                  "privleak": "PrivLeak"}  # fmt: skip
        rows = {name: muse_csv_row(name, scores) for name, scores in summaries.items()}
        lines = [" " * 28 + "".join(name.rjust(13) for name in rows)]
        for key, label in labels.items():
            cells = ["-" if row[key] is None else f"{row[key]:.2f}" for row in rows.values()]
            lines.append(label.ljust(28) + "".join(cell.rjust(13) for cell in cells))
        has = any(row["privleak"] is not None for row in rows.values())
        return "\n".join([*lines, ("PrivLeak against " if has else "PrivLeak is absent: ") + found])


def muse_retain_log(alias: str, data_dir: str | None) -> Path:
    """open-unlearning's log of MUSE's retrained model, local or from the hub. Raises DataError where there is none."""
    repo, name = MUSE_CHECKPOINTS[alias].retain_log
    local = Path(data_dir) / repo / name if data_dir else None
    return local if local and local.exists() else hub_file(repo, name, "pass --retain-logs FILE, or --retain-logs muse")


def worst_rows(log: dict, n: int) -> str:
    """The n worst rows of each set, as text: on forget rows the best remembered (highest ROUGE, then probability), on
    others the least (lowest). Question, reference, generation and scores of each."""
    lines = []
    for name, items in log["rows"].items():
        shown = {k: v for k, v in items.items() if "generation" in v}
        sign = -1 if name == "forget" else 1

        def badness(item, sign=sign):
            return sign * item["rouge"], -sign * item["loss"]

        for key, item in sorted(shown.items(), key=lambda pair: badness(pair[1]))[:n]:
            scores = f"ROUGE-L recall {item['rouge']:.3f}, probability {_exp(-item['loss']):.3f}"
            lines.append(f"\n{name} {key}: {scores}, truth ratio {item['truth_ratio']:.3f}")
            for label, text in (("question", "question"), ("reference", "answer"), ("generation", "generation")):
                lines.append(f"    {label:<11} {item[text]}")
    return "\n".join(lines)


def plot(run: Path) -> Path:
    """Forget quality (log axis) against model utility over the epochs of a run -> RUN/trajectory.png.

    Target and retrained model are marked. Raises EvalError without matplotlib, a trajectory, or a retain reference.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise EvalError("plots need matplotlib: pip install -e '.[eval]'") from None
    try:
        if not (points := read_jsonl(run / "trajectory.jsonl")):
            raise FileNotFoundError(f"{run / 'trajectory.jsonl'} holds nothing")
        summary = json.loads((run / "summary.json").read_text())
        marks = {name: summary[name] for name in ("target", "retrained") if name in summary}
        path = [(marks["target"] | {"epoch": 0})] + points if "target" in marks else points
        path = [(p["model_utility"], p["forget_quality"], p["epoch"]) for p in path]
        marks = {name: (m["model_utility"], m["forget_quality"]) for name, m in marks.items()}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise EvalError(f"{run}: no trajectory of a finished run (train with --eval-every) ({e})") from None
    if any(quality is None for _, quality, _ in path):
        raise EvalError(f"{run}: has no forget quality; train with --retain-model or --retain-logs")
    figure, axes = pyplot.subplots(figsize=(6, 4.5), layout="constrained")
    axes.plot([x for x, _, _ in path], [max(y, 1e-300) for _, y, _ in path], ".-", color="tab:blue", label="unlearning")
    for x, y, epoch in path[1:]:
        axes.annotate(f"{epoch:g}", (x, max(y, 1e-300)), textcoords="offset points", xytext=(4, 4), fontsize=8)
    for name, (x, y) in marks.items():
        look = {"target": ("s", "tab:red"), "retrained": ("*", "tab:green")}[name]
        axes.plot(x, max(y, 1e-300), look[0], color=look[1], markersize=11, label=name)
    axes.axhline(0.05, color="gray", linewidth=0.8, linestyle=":")
    axes.set_xlim(left=0)
    axes.set(yscale="log", xlabel="model utility", ylabel="forget quality (KS p-value)", title=f"{run.name}, by epoch")
    axes.legend()
    figure.savefig(run / "trajectory.png", dpi=150)
    pyplot.close(figure)
    return run / "trajectory.png"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    a = argparse.ArgumentParser(
        "eval.py", description="Evaluate a model on TOFU or MUSE, or a TOFU log.", formatter_class=formatter
    )
    a.add_argument("--model", help="run folder of train.py, model folder, hub id or alias")
    a.add_argument("--forget", help="forget set, e.g. tofu_forget10, tofu_forget05[:40], muse_news, muse_news[:10]")
    a.add_argument("--logs", help="score this evaluation log instead of a model (formats as --retain-logs)")
    a.add_argument("--plot", metavar="RUN", help="draw the trajectory of a run of train.py into RUN/trajectory.png")
    a.add_argument(
        "--retain-logs", help="evaluation log of the retrained model (ours, open-unlearning's, the TOFU authors')"
    )
    a.add_argument("--retain-model", help="the retrained model itself; evaluated first")
    a.add_argument("--eval-retain", help="rows that stand for the retain set, e.g. tofu_retain_perturbed[:100]")
    a.add_argument(
        "--protocol",
        default="open-unlearning",
        choices=[*PROTOCOLS, "muse"],
        help="open-unlearning, or the authors': tofu (first 300 rows, 200 tokens in total), muse",
    )
    a.add_argument(
        "--truth-ratio", default="geometric", choices=["geometric", "arithmetic"], help="mean over the wrong answers"
    )
    a.add_argument("--no-stemmer", action="store_true", help="MUSE: ROUGE without stemmer (off by itself in protocol muse)")
    a.add_argument("--mask-quirk", action="store_true", help="hide <|eot_id|> in prompts, as open-unlearning does (#128)")
    a.add_argument("--tokenizer", help="folder or hub id, where the model has none")
    a.add_argument("--prompt", default="auto", help=f"prompt format: auto, {', '.join(PROMPT_FORMATS)}")
    a.add_argument("--data-dir", help="folder with local data in hub layout (TOFU/forget10.json, ...)")
    a.add_argument("--max-new-tokens", type=int, default=200, help="length of generations, tokens")
    a.add_argument("--seed", type=int, default=0, help="of the toy world")
    a.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    a.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of activations")
    a.add_argument("--show", type=int, default=0, metavar="N", help="print the worst N rows of each set")
    a.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    a.add_argument("--out", help="write the summary to this JSON file")
    args = a.parse_args(argv)
    if sum(x is not None for x in (args.model, args.logs, args.plot)) != 1:
        a.error("pass one of --model, --logs, --plot")
    if args.model is not None and args.forget is None:
        a.error("--model needs --forget")
    return args


def holdout_rows(forget: str, data_dir: str | None, seed: int) -> tuple[list[Row], str]:
    """(rows of the holdout set that belongs to a TOFU forget set, '') or ([], why there are none)."""
    parts = split_spec(forget)
    name = parts[0][0].removesuffix("_perturbed")
    if len(parts) > 1 or not name.startswith("tofu_forget"):
        return [], "no holdout set belongs to this forget set"
    window = f"[{parts[0][1] or ''}:{parts[0][2] or ''}]" if parts[0][1:] != (None, None) else ""
    try:
        return load_rows(name.replace("forget", "holdout") + window, data_dir, seed), ""
    except DataError as e:
        return [], str(e)


def make_benchmark(args: argparse.Namespace) -> Tofu | Muse:
    """What the flags ask for. Raises EvalError for a protocol of the other benchmark."""
    if args.forget and is_muse(args.forget):
        parts = split_spec(args.forget)
        if len(parts) > 1 or parts[0][1] is not None or "%" in (parts[0][2] or ""):
            raise EvalError(f"--forget {args.forget}: MUSE is evaluated on all rows or on the first N: muse_news[:N]")
        limit = int(parts[0][2]) if parts[0][2] else None
        return Muse(args.forget, args.data_dir, limit, args.protocol, False if args.no_stemmer else None)
    if args.protocol not in PROTOCOLS:
        raise EvalError(f"--protocol {args.protocol}: is none of TOFU's, which are {', '.join(PROTOCOLS)}")
    protocol = replace(PROTOCOLS[args.protocol], mask_quirk=args.mask_quirk, truth_ratio=args.truth_ratio)
    if args.logs:
        return Tofu(None, protocol=protocol)
    options = args.eval_retain, args.data_dir, args.seed, args.max_new_tokens, protocol
    return Tofu(args.forget, *options, holdout=True)


def evaluate_models(args: argparse.Namespace, benchmark: Tofu | Muse, say) -> dict[str, dict]:
    """{'model', and 'retrained' where --retain-model names it: log}."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.retain_logs:
        benchmark.reference(args.model, args.retain_logs, None)  # an unusable log ends the run now, not after the work

    def run(name, label):
        source, prompt = resolve_model(name, "target")
        folder = resolve_folder(source)
        model = load_pretrained(folder, device=device, compute_dtype=dtype)
        wanted = prompt if args.prompt == "auto" and prompt else args.prompt
        wanted_tokenizer = default_tokenizer(name, args.tokenizer)
        tokenizer = load_tokenizer(wanted_tokenizer, folder, model.config.vocab_size, wanted)
        say(f"{label}: {source}  prompt format {tokenizer.format_name}, {device}, {dtype}, protocol {args.protocol}")
        return benchmark.evaluate(model, tokenizer, run_folder(name), "final", label)

    retrained = run(args.retain_model, "retrained") if args.retain_model else None
    logs = {"model": run(args.model, "model")}
    return logs | ({"retrained": retrained} if retrained else {})


def read_scored_log(path: str, mean: str) -> dict:
    """The log at `path` with its scores. Raises EvalError for one that does not hold all four sets."""
    log = read_log(path)
    log = log if mean == "geometric" else with_truth_ratio(log, mean)
    try:
        scores = aggregate(log["rows"], log["epsilon"])
        scores["model_utility"]  # noqa: B018
    except KeyError as e:
        raise EvalError(f"{path}: its model utility cannot be computed (key {e} is missing); pass a whole log") from None
    if log["mia_min_k"] is not None:
        scores["mia_min_k"] = log["mia_min_k"]
    return log | {"scores": scores, "path": None}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    def say(text):
        if not args.json:
            print(text, flush=True)

    try:
        if args.plot:
            print(plot(Path(args.plot)))
            return 0
        require_extra()
        benchmark = make_benchmark(args)
        logs = {"log": read_scored_log(args.logs, args.truth_ratio)} if args.logs else evaluate_models(args, benchmark, say)
        if args.model and (why := getattr(benchmark, "no_holdout", "")):
            say(f"membership scores and PrivLeak are absent: {why}")
        reference, where = benchmark.reference(args.model, args.retain_logs, logs.get("retrained"))
        summaries, found = {}, where
        for name, log in logs.items():
            summaries[name], found = benchmark.summary(log, reference, where)
        if args.out:
            write_json(Path(args.out), summaries)
        [first, *_] = summaries
        if args.json:
            print(json.dumps(summaries[first] | {"retain_reference": found}, indent=1))
        say(benchmark.report(summaries, found))
        if args.show:
            say(benchmark.worst(logs[first], args.show))
        if logs[first]["path"]:
            say(f"per-item results: {logs[first]['path']}")
    except (EvalError, DataError, ModelError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
