"""Logs of evaluations, ours, open-unlearning's, the TOFU and the MUSE authors': reading, comparing, writing them."""

import contextlib
import csv
import io
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import metrics
from data import fingerprint
from files import Field, UserError, fault, first_line, read_json, write_json, write_text
from metrics import MEMBERSHIP, MEMORIZATION, SETS, EvalError, Rows, probability, truth_ratio

AUTHORS_FILES = {"retain": "eval_log.json", "ra": "eval_real_author_wo_options.json",
                 "wf": "eval_real_world_wo_options.json", "forget": "eval_log_forget.json"}  # fmt: skip
AUTHORS_COLUMNS = {"loss": "avg_gt_loss", "rouge": "rougeL_recall", "texts": "generated_text"}
# open-unlearning's names of what an item holds: ours. MUSE's items have open-unlearning's names, but for the prompt.
TEXTS = {"rouge1_recall": "rouge1", "rougeL_f1": "rouge_f1", "rougeL_recall": "rouge", "input": "prompt",
         "ground_truth": "answer", "generation": "generation"}  # fmt: skip
SUMMARY_KEYS = ("extraction_strength", "forget_quality", "forget_truth_ratio", "forget_Q_A_Prob", "forget_Q_A_ROUGE",
                "model_utility", "privleak", *(f"{part}_ROUGE" for part in metrics.MUSE_NEW_TOKENS))  # fmt: skip
LOSS = Field(float, -1, 1e30, required=False)  # a little below 0 by rounding
SHARE = Field(float, 0, 1.000001, required=False, null=True)
AUC = Field(float, 0, 1, required=False)
ITEM = {"loss": LOSS, "correct_loss": LOSS, "wrong_losses": Field(list, 1, 1000, required=False, items=LOSS)}
ITEM |= {"truth_ratio": Field(float, 0, 1e308, required=False), "probability": Field(float, 0, 1.000001, required=False)}
ITEM |= dict.fromkeys(("rouge", "rouge_f1", "rouge1"), Field(float, 0, 1, required=False))
ITEM |= dict.fromkeys(MEMORIZATION, SHARE) | dict.fromkeys(MEMBERSHIP, Field(float, -1e30, 1e30, required=False))
ITEM |= dict.fromkeys(("question", "answer", "generation", "prompt"), Field(str, required=False))
ROWS = Field(dict, fields={"forget": Field(dict, 1)}, items=Field(dict, 1, items=Field(dict, fields=ITEM)))
DATA = Field(dict, fields={"fingerprint": Field(str, required=False)})
OURS = {
    "rows": ROWS,
    "protocol": Field(dict, required=False, null=True, fields={
        "epsilon": Field(float, 0, 1, required=False), "sets": Field(dict, required=False, items=DATA),
    }),
    "scores": Field(dict, required=False, fields={"mia_min_k": AUC}),
}  # fmt: skip
SCORED = Field(dict, required=False, fields={
    "value_by_index": Field(dict, 1, items=Field(dict, fields={"score": Field(float, -1e30, 1e30)})),
})  # fmt: skip
MIN_K = Field(dict, fields={"agg_value": Field(float, 0, 1), "forget": SCORED, "holdout": SCORED})
AGREE = 1e-4  # how far what another program stores may be from what its own losses give, relatively


def write_log(path: Path, log: dict) -> None:
    """Our log.json, with a checksum."""
    write_json(path, log | {"checksum": fingerprint([log["protocol"], log["scores"], log["rows"]])})


def read_ours(path: Path, log: dict | None = None) -> dict:
    """{'protocol', 'scores', 'rows'} of a log of ours. Raises EvalError where something in it has changed since."""
    log = read_json(path, EvalError, "remove it and evaluate again") if log is None else log
    protocol, scores, rows = (log.get(name) for name in ("protocol", "scores", "rows"))
    if "checksum" in log and log["checksum"] != fingerprint([protocol, scores, rows]):
        raise EvalError(f"{path}: something in it has changed since it was written; remove it and evaluate again")
    return {"protocol": protocol, "scores": scores, "rows": rows}


def read_log(path: str | Path, mean: str = "geometric") -> dict:
    """{'kind', 'rows', 'protocol', 'epsilon', 'mia_min_k', 'path'} of an evaluation log of TOFU: ours, open-unlearning's
    `TOFU_EVAL.json`, or the TOFU authors' `eval_log_aggregated.json` (objects by row, or the NPO repository's lists).
    rows: in row order, with what the log has of our items; always the forget set's truth ratios. What is stored beside the
    losses that it is made of is compared with them. protocol: of our logs, else None. mean: if not 'geometric', truth ratios
    are computed again. Raises EvalError naming the file and what is wrong."""
    log = read_json(Path(path), EvalError, "pass the log of an evaluation on TOFU")
    protocol, epsilon, auc = None, 0.0, None
    try:
        if "rows" in log:
            if wrong := fault(log, Field(dict, fields=OURS)):
                raise EvalError(f"{path}: {wrong}; evaluate that model again")
            kind, (protocol, scores, rows) = "ours", read_ours(Path(path), log).values()
            epsilon, auc = (protocol or {}).get("epsilon", 0.0), (scores or {}).get("mia_min_k")
        elif AUTHORS_FILES["forget"] in log:
            kind = "TOFU authors'"
            rows = {name: _authors_rows(log[file]) for name, file in AUTHORS_FILES.items() if log.get(file)}
        else:
            kind, rows = "open-unlearning's", {name: _open_unlearning_rows(log, name) for name in SETS}
            rows = {name: items for name, items in rows.items() if items}
            epsilon, auc = metrics.OPEN_UNLEARNING_EPSILON, _auc(path, log) if "mia_min_k" in log else None
        if wrong := fault(rows, ROWS):
            raise EvalError(f"{path}: {wrong}; evaluate that model again")
        stored = (protocol or {}).get("truth_ratio", "geometric")
        rows = {name: _checked(f"{path}: {name}", items, kind, stored, epsilon) for name, items in rows.items()}
        if not any("truth_ratio" in item for item in rows["forget"].values()) and kind == "ours":
            raise EvalError(
                f"{path}: no truth ratios: its forget rows have no 'perturbed_answer'; --model shows what they have"
            )
        [item["truth_ratio"] for item in rows["forget"].values()]
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        why = f"key {first_line(e)} is missing or malformed"
        raise EvalError(f"{path}: no truth ratios of the forget set in it ({why}); pass a whole log of TOFU") from None
    log = {"kind": kind, "rows": rows, "protocol": protocol, "epsilon": epsilon, "mia_min_k": auc, "path": str(path)}
    return log if mean == "geometric" else with_truth_ratio(log, mean)


def _in_order(values: dict | list) -> list:
    """The values of an object keyed by row number, or of a list, in row order. KeyError for a gap."""
    return values if isinstance(values, list) else [values[str(i)] for i in range(len(values))]


def _authors_rows(part: dict) -> dict[str, dict]:
    columns = {"correct_loss": _in_order(part["avg_paraphrased_loss"])}
    columns["wrong_losses"] = _in_order(part["average_perturb_loss"])
    columns |= {name: _in_order(part[column]) for name, column in AUTHORS_COLUMNS.items() if column in part}
    if isinstance(part.get("normalized_gt_loss"), list):
        # The NPO repository's lists come from two data loaders whose rows are ordered differently: this one number is
        # stored joined as it should be.
        columns["probability"] = [probability(loss) for loss in part["normalized_gt_loss"]]
    if isinstance(part["avg_paraphrased_loss"], list):
        columns.pop("texts", None)
    rows = {}
    for i, values in enumerate(zip(*columns.values(), strict=True)):
        item = dict(zip(columns, values, strict=True))
        if "texts" in item:
            item["question"], item["generation"], item["answer"] = item.pop("texts")
        rows[str(i)] = item
    return rows


def _open_unlearning_rows(log: dict, name: str) -> dict[str, dict]:
    """Items of one set; {} where the log does not have the set."""

    def column(*keys: str) -> list:
        return next((_in_order(log[key]["value_by_index"]) for key in keys if key in log), [])

    ratios = [item["score"] for item in column(f"{name}_truth_ratio", f"{name}_Truth_Ratio")]
    if not ratios:
        return {}
    right, wrong = column(f"{name}_Q_A_Prob"), column(f"{name}_Q_A_PERT_Prob")
    correct, texts = column(f"{name}_Q_A_PARA_Prob", f"{name}_Q_A_Prob"), column(f"{name}_Q_A_ROUGE")
    memorized = {m: column(m) for m in MEMORIZATION if name == "forget"}
    rows = {}
    for i, ratio in enumerate(ratios):
        item = {"truth_ratio": ratio}
        if right and wrong and correct:
            item |= {"loss": right[i]["avg_loss"], "correct_loss": correct[i]["avg_loss"]}
            item |= {"wrong_losses": wrong[i]["avg_loss"], "probability": right[i]["prob"]}
            if name in ("ra", "wf"):
                item["probability"] /= item["probability"] + sum(wrong[i]["prob"]) + metrics.OPEN_UNLEARNING_EPSILON
        if texts:
            item |= {ours: texts[i][theirs] for theirs, ours in TEXTS.items()}
            item["question"] = item.pop("prompt")
        item |= {m: values[i]["score"] for m, values in memorized.items() if values}
        rows[str(i)] = item
    return rows


def _checked(where: str, items: dict[str, dict], kind: str, mean: str, epsilon: float) -> dict[str, dict]:
    """The items with the truth ratios that their losses give, where they have any. Raises EvalError where a stored number is
    another one, and for rows with unequal numbers of wrong answers."""
    expected, ratios = None, dict[str, tuple[float, ...]]()
    for key, item in items.items():
        if expected not in (None, count := len(item.get("wrong_losses", []))):
            raise EvalError(f"{where}, row {key}: holds {count} perturbed answers, the others {expected}; evaluate again")
        expected = count
        if "correct_loss" in item and "wrong_losses" in item:
            losses = item["correct_loss"], item["wrong_losses"]
            right, wrong = probability(losses[0]), probability(metrics.mean(losses[1]))
            other = right / (right + wrong + metrics.OPEN_UNLEARNING_EPSILON)
            means = [truth_ratio(*losses, *x) for x in ((mean, epsilon), (mean, 0.0), ("arithmetic", epsilon))]
            ratios[key] = *means, other
        if kind == "open-unlearning's" and "probability" in item:
            options = where.endswith((" ra", " wf"))
            p = metrics.normalised_probability(item["loss"], item["wrong_losses"], epsilon) if options else None
            p = probability(item["loss"]) if p is None else p
            _compare(f"{where}, row {key}: its probability", item["probability"], p, 100 * AGREE)

    def differs(i: int) -> str | None:
        """The first row whose stored ratio is another than this one."""
        return next((k for k, x in ratios.items() if not _near(items[k].get("truth_ratio", x[i]), x[i], AGREE)), None)

    if (first := differs(0)) is None or differs(1) is None:  # the epsilon matters where an answer is next to impossible
        return {k: {"truth_ratio": ratios[k][0]} | item if k in ratios else item for k, item in items.items()}
    if kind != "open-unlearning's" or all(map(differs, (2, 3))):
        _compare(f"{where}, row {first}: its truth ratio", items[first]["truth_ratio"], ratios[first][0], AGREE)
    # open-unlearning's `prob_mean`, right / (right + wrong), or our arithmetic mean: other numbers by the same name.
    return {k: item | {"truth_ratio": ratios[k][0] if k in ratios else item["truth_ratio"]} for k, item in items.items()}


def _near(stored: float, computed: float, tolerance: float) -> bool:
    return math.isclose(stored, computed, rel_tol=tolerance, abs_tol=1e-9)


def _compare(what: str, stored: float, computed: float, tolerance: float) -> None:
    if not _near(stored, computed, tolerance):
        raise EvalError(f"{what} is {stored:.6g}, what it is made of gives {computed:.6g}; evaluate that model again")


def _auc(path: str | Path, log: dict) -> float:
    """`mia_min_k` of open-unlearning's log. Raises EvalError where there is none or its scores give another one."""
    if wrong := fault(log, Field(dict, fields={"mia_min_k": MIN_K})):
        raise EvalError(f"{path}: {wrong}; pass the retrained model's log, which has 'mia_min_k.agg_value'")
    auc = log["mia_min_k"]["agg_value"]
    parts = [log["mia_min_k"].get(part, {}).get("value_by_index", {}).values() for part in ("forget", "holdout")]
    if all(parts):
        computed = metrics.membership_auc(*([item["score"] for item in part] for part in parts))
        _compare(f"{path}: its AUC of mia_min_k", auc, computed, AGREE)
    return float(auc)


def read_muse_retain(path: str | Path) -> dict[str, float]:
    """{'mia_min_k': the retrained model's AUC} from its MUSE_EVAL.json, open-unlearning's or ours, or from our log. Raises
    EvalError naming the file and what is missing or wrong in it."""
    log = read_json(Path(path), EvalError, "pass the retrained model's MUSE_EVAL.json, which has 'mia_min_k.agg_value'")
    if "scores" not in log:
        return {"mia_min_k": _auc(path, log)}
    if wrong := fault(log, Field(dict, fields={"scores": Field(dict, fields={"mia_min_k": Field(float, 0, 1)})})):
        raise EvalError(f"{path}: {wrong}; evaluate on MUSE again")
    return {"mia_min_k": float(read_ours(Path(path), log)["scores"]["mia_min_k"])}


def truth_ratios(log: dict) -> list[float]:
    """Of the forget set, in row order: of the geometric mean, which forget quality is of, also in the TOFU authors' training
    code, whatever the scores are of. Raises KeyError where a row has none."""
    protocol, items = log.get("protocol") or {}, log["rows"]["forget"].values()
    if protocol.get("truth_ratio", "geometric") == "geometric":
        return [item["truth_ratio"] for item in items]
    return [truth_ratio(item["correct_loss"], item["wrong_losses"], epsilon=protocol["epsilon"]) for item in items]


def with_truth_ratio(log: dict, mean: str) -> dict:
    """The log with its truth ratios computed again with another mean. Raises EvalError where it holds no losses."""
    rows = dict(log["rows"])
    for name in (n for n in rows if n in SETS):
        if any(not {"correct_loss", "wrong_losses"} <= item.keys() for item in rows[name].values()):
            raise EvalError(f"{log['path']}: holds no losses of the {name} set; its truth ratios cannot be recomputed")
        rows[name] = {
            key: item | {"truth_ratio": truth_ratio(item["correct_loss"], item["wrong_losses"], mean, log["epsilon"])}
            for key, item in rows[name].items()
        }
    return log | {"rows": rows, "protocol": (log["protocol"] or {}) | {"truth_ratio": mean, "epsilon": log["epsilon"]}}


def quality_of(log: dict, reference: dict | None, where: str) -> tuple[float | None, str]:
    """(forget quality, where its reference is from), or (None, where) without one. `where` names it in errors too.

    Both logs must hold the same rows, evaluated alike: as many, but for the TOFU authors' protocol, which stops after 300
    and is compared with the first 300 of the other. Where both know them, answers (row by row), the set's fingerprint,
    protocol, prompt format, mask convention and prompt tokens must agree too. Raises EvalError with the reason.
    """
    if any("truth_ratio" not in item for x in (log, reference) if x for item in x["rows"]["forget"].values()):
        return None, "no truth ratios: the forget rows have no 'perturbed_answer'"
    if reference is None:
        return None, where
    ours, theirs = (list(x["rows"]["forget"].values()) for x in (log, reference))
    note = ""
    if len(ours) != len(theirs):
        if min(len(ours), len(theirs)) != 300:
            raise EvalError(f"{where}: holds {len(theirs)} forget rows, this evaluation {len(ours)}; compare the same rows")
        side = where if len(theirs) == 300 else "this evaluation"
        note = f"first 300 of {max(len(ours), len(theirs))} rows, all that {side} holds"
        ours, theirs = ours[:300], theirs[:300]
    for i, rows in enumerate(zip(ours, theirs, strict=True)):
        a, b = (re.sub("[^a-z0-9]", "", row.get("answer", "").lower()) for row in rows)
        if not a.startswith(b) and not b.startswith(a):  # as far as two tokenizers and a cut at some length leave it alone
            texts = f"{rows[1]['answer'][:40]!r} instead of {rows[0]['answer'][:40]!r}"
            raise EvalError(f"{where}: its forget row {i} is another one ({texts}); compare the same rows")
    mine, its = (x.get("protocol") or {} for x in (log, reference))
    for name in ("name", "prompt_format", "mask_quirk"):
        if name in mine and name in its and mine[name] != its[name]:
            differs = f"{name.replace('_', ' ')} {its[name]!r}, this one with {mine[name]!r}"
            raise EvalError(f"{where}: was evaluated with {differs}; evaluate both alike")
    sets = [protocol.get("sets", {}).get("forget", {}) for protocol in (mine, its)]
    if not note and len({s["fingerprint"] for s in sets if "fingerprint" in s}) > 1:
        raise EvalError(f"{where}: its forget set has other texts, wrong answers or names of rows; evaluate both on one set")
    tokens, others = (s.get("prompt_tokens") for s in sets)
    if its and tokens and tokens != others and not note:
        raise EvalError(f"{where}: its prompts hold other tokens (another tokenizer or date); evaluate both alike")
    quality = metrics.forget_quality(truth_ratios(log)[: len(ours)], truth_ratios(reference)[: len(ours)])
    return quality, f"{where} ({note})" if note else where


def _metric(items: Iterable[dict], names: dict[str, str], value: float | None) -> dict:
    """open-unlearning's form of a metric. names: {its name: ours} of what is kept of an item."""
    by_index = {str(i): {theirs: item[ours] for theirs, ours in names.items()} for i, item in enumerate(items)}
    return {"agg_value": value, "value_by_index": by_index}


def _probabilities(items: Iterable[dict], name: str) -> dict:
    """Of a loss, or of each in a list of losses: then the aggregate is the mean over items of an item's mean."""
    losses = [item[name] for item in items]
    found = [[probability(x) for x in loss] if isinstance(loss, list) else probability(loss) for loss in losses]
    values = [{"prob": p, "avg_loss": loss} for p, loss in zip(found, losses, strict=True)]
    value = metrics.mean(metrics.mean(p) if isinstance(p, list) else p for p in found)
    return _metric(values, {"prob": "prob", "avg_loss": "avg_loss"}, value)


def _membership(parts: dict[str, dict[str, dict]], name: str, auc: float | None) -> dict:
    """parts: {'forget': {key: item}, 'holdout': {key: item}}."""
    means = {part: metrics.mean(item[name] for item in items.values()) for part, items in parts.items()}
    found: dict = {part: _metric(items.values(), {"score": name}, means[part]) for part, items in parts.items()}
    return found | {"auc": auc, "agg_value": auc}


def open_unlearning_eval(log: dict, quality: float | None, retained_auc: float | None = None) -> dict:
    """Our log as open-unlearning's TOFU_EVAL.json: the same keys, sorted, and the same aggregate values. Membership scores
    and `privleak` need a holdout set, `mia_reference` the retrained model, `mia_gradnorm` to be asked for. Without a
    retained_auc, `privleak` is against 0.5, as open-unlearning has it (our own summary leaves it out)."""
    rows, scores = log["rows"], log["scores"]
    result: dict = {"forget_quality": {"agg_value": quality}}
    for name in (n for n in SETS if n in rows):
        items = rows[name].values()
        result[f"{name}_Q_A_Prob"] = _probabilities(items, "loss")
        result[f"{name}_Q_A_ROUGE"] = _metric(items, TEXTS, scores[f"{name}_rouge"])
        if f"{name}_truth_ratio" not in scores:  # rows of one's own without wrong answers
            continue
        result[f"{name}_Q_A_PERT_Prob"] = _probabilities(items, "wrong_losses")
        if name in ("forget", "retain"):
            result[f"{name}_Q_A_PARA_Prob"] = _probabilities(items, "correct_loss")
        else:
            epsilon = log["protocol"]["epsilon"]
            shares = [{"prob": metrics.normalised_probability(v["loss"], v["wrong_losses"], epsilon)} for v in items]
            result[f"{name}_Q_A_Prob_normalised"] = _metric(shares, {"prob": "prob"}, scores[f"{name}_probability"])
        ratio = "forget_truth_ratio" if name == "forget" else f"{name}_Truth_Ratio"  # sic
        result[ratio] = _metric(items, {"score": "truth_ratio"}, scores[f"{name}_truth_ratio"])
    result |= {n: _metric(rows["forget"].values(), {"score": n}, scores[n]) for n in MEMORIZATION if n in scores}
    for name in (n for n in (*MEMBERSHIP, *metrics.MORE_MEMBERSHIP) if n in scores):
        result[name] = _membership({part: rows[part] for part in ("forget", "holdout")}, name, scores[name])
    if "mia_min_k" in scores:
        auc = 0.5 if retained_auc is None else retained_auc
        result["privleak"] = {"agg_value": metrics.privleak(scores["mia_min_k"], auc)}
    if "model_utility" in scores:
        result["model_utility"] = {"agg_value": scores["model_utility"]}
    return dict(sorted(result.items()))


def muse_eval_json(rows: Rows, scores: dict[str, float | None]) -> dict:
    """open-unlearning's MUSE_EVAL.json: its keys, sorted, and its shapes. Of its membership scores, `mia_min_k` only; its
    `privleak` is against 0.5 where no retrained model is known (our own summary leaves it out)."""
    texts, parts = {name: name for name in TEXTS} | {"input": "prompt"}, metrics.MUSE_NEW_TOKENS
    result = {f"{part}_ROUGE": _metric(rows[part].values(), texts, scores[f"{part}_ROUGE"]) for part in parts}
    for name in MEMORIZATION:
        result[name] = _metric(rows["forget_verbmem"].values(), {"score": name}, scores[name])
    whole = {split: rows[part] for part, split in metrics.MUSE_TEXTS.items()}
    auc = scores["mia_min_k"]
    leak = metrics.privleak(auc) if scores["privleak"] is None and auc is not None else scores["privleak"]
    result |= {"mia_min_k": _membership(whole, "score", auc), "privleak": {"agg_value": leak}}
    return dict(sorted(result.items()))


def save_open_unlearning(path: str | Path, benchmark: str, result: dict) -> None:
    """open-unlearning's TOFU_EVAL.json, TOFU_SUMMARY.json or MUSE_... beside our log, which is `path`. Where they cannot be
    written (a read-only run), says so: they hold nothing that the log does not."""
    flat = {name: metric["agg_value"] for name, metric in result.items() if name in SUMMARY_KEYS}
    summary = {name: value for name, value in flat.items() if value is not None}
    try:
        write_json(Path(path).with_name(f"{benchmark}_EVAL.json"), result, indent=4)
        write_json(Path(path).with_name(f"{benchmark}_SUMMARY.json"), summary, indent=4)
    except UserError as e:
        print(f"not kept: {e}", file=sys.stderr)


def muse_csv_row(name: str, scores: dict) -> dict[str, str | float | None]:
    """A row of the MUSE authors' CSV: all four numbers in percent, `privleak` None where no retrained model is known."""
    row = {"name": name, "verbmem_f": scores["forget_verbmem_ROUGE"] * 100, "privleak": scores["privleak"]}
    return row | {f"knowmem_{part[0]}": scores[f"{part}_knowmem_ROUGE"] * 100 for part in ("forget", "retain")}


def save_muse(path: str | Path, rows: Rows, scores: dict[str, float | None]) -> None:
    """MUSE_EVAL.json, MUSE_SUMMARY.json and the authors' MUSE.csv beside our log: `path` is RUN/eval/NAME/log.json."""
    row, text = muse_csv_row(Path(path).parents[2].name, scores), io.StringIO(newline="")
    csv.writer(text).writerows([row.keys(), row.values()])
    with contextlib.suppress(UserError):  # what cannot be written is said once
        write_text(Path(path).with_name("MUSE.csv"), text.getvalue())
    save_open_unlearning(path, "MUSE", muse_eval_json(rows, scores))
