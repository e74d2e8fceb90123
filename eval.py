"""Evaluation: TOFU's numbers as pure functions, then running a model, then the command line.

    python eval.py --model RUN --forget tofu_forget10 [--retain-logs FILE | --retain-model PATH]

Words: the *loss* of an answer is its mean negative log-likelihood per token, EOS included, in nats; its *probability*
is exp(-loss), the geometric mean of its token probabilities.
"""

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (
    CHECKPOINTS,
    PROMPT_FORMATS,
    TOFU_RETAIN,
    DataError,
    Row,
    Tokenizer,
    collate,
    evaluation_sets,
    fingerprint,
    hub_file,
    load_rows,
    split_spec,
)
from model import Llama, ModelError, generate, load_pretrained, resolve_folder

try:
    from rouge_score.rouge_scorer import RougeScorer
    from scipy.stats import hmean, ks_2samp
except ImportError:
    RougeScorer = hmean = ks_2samp = None

SETS = ("retain", "ra", "wf", "forget")  # retain_perturbed, real authors, world facts, forget
UTILITY_PARTS = tuple(f"{s}_{n}" for s in ("retain", "ra", "wf") for n in ("probability", "rouge", "truth_ratio"))
FORGET_PARTS = ("forget_probability", "forget_rouge", "forget_truth_ratio")


class EvalError(Exception):
    """An evaluation that cannot be done. The message is one line that names the file, the key and the remedy."""


def require_extra() -> None:
    """Raises EvalError, before any work is done, where the libraries that define the scores are missing."""
    if RougeScorer is None or ks_2samp is None:
        raise EvalError("evaluation needs scipy and rouge-score: pip install -e '.[eval]' (or pass --no-eval)")


# -------------------------------------------------------------------------------------------------------- pure metrics


def truth_ratio(correct_loss: float, wrong_losses: list[float]) -> float:
    """TR = exp(-mean wrong loss) / exp(-correct loss): geometric mean over the wrong answers; small = knows the answer.

    The variant of the TOFU leaderboard, of open-unlearning and of the NPO code.
    """
    return _exp(correct_loss - sum(wrong_losses) / len(wrong_losses))


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))  # a model destroyed by gradient ascent reaches losses beyond float's range


def normalised_probability(correct_loss: float, wrong_losses: list[float]) -> float:
    """P / (P + sum of the wrong options' P): the probability on real authors and world facts."""
    return 1 / (1 + sum(_exp(correct_loss - w) for w in wrong_losses))


def rouge_l_recall(reference: str, generation: str) -> float:
    """ROUGE-L recall of rouge-score with the Porter stemmer."""
    return _scorer().score(reference, generation)["rougeL"].recall


def _scorer(cache: list = []) -> "RougeScorer":  # noqa: B006  (built once)
    if not cache:
        cache.append(RougeScorer(["rougeL"], use_stemmer=True))
    return cache[0]


def forget_truth_ratio(ratios: list[float]) -> float:
    """mean of min(TR, 1 / TR): 1 where right and wrong answers are equally likely."""
    return sum(min(r, 1 / r) if r > 0 else 0.0 for r in ratios) / len(ratios)


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


def aggregate(rows: dict[str, dict[str, dict]]) -> dict[str, float]:
    """The nine parts of model utility, the three forget-set numbers, and `model_utility`, from per-item results
    {set: {key: item}}. Of an item it reads loss, wrong_losses, truth_ratio, rouge (see `evaluate`)."""
    scores = {}
    for name, items in rows.items():
        values = list(items.values())
        if name in ("ra", "wf"):
            probabilities = [normalised_probability(v["loss"], v["wrong_losses"]) for v in values]
        else:
            probabilities = [_exp(-v["loss"]) for v in values]
        ratios = [v["truth_ratio"] for v in values]
        scores[f"{name}_probability"] = sum(probabilities) / len(values)
        scores[f"{name}_rouge"] = sum(v["rouge"] for v in values) / len(values)
        scores[f"{name}_truth_ratio"] = forget_truth_ratio(ratios) if name == "forget" else utility_truth_ratio(ratios)
    if all(name in scores for name in UTILITY_PARTS):
        scores["model_utility"] = model_utility(scores)
    return scores


# -------------------------------------------------------------------------------------------- retain references (logs)


def read_truth_ratios(path: str | Path) -> tuple[list[float], str]:
    """(truth ratios on the forget set in row order, format) of an evaluation log: ours, open-unlearning's
    `TOFU_EVAL.json`, or the TOFU authors' `eval_log_aggregated.json`. Raises EvalError naming what is missing."""
    try:
        log = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise EvalError(f"{path}: not a readable JSON log ({e})") from None
    try:
        if "rows" in log:
            ratios, kind = [v["truth_ratio"] for v in log["rows"]["forget"].values()], "ours"
        elif "eval_log_forget.json" in log:
            part, kind = log["eval_log_forget.json"], "TOFU authors'"
            columns = [part["avg_paraphrased_loss"], part["average_perturb_loss"]]
            if isinstance(columns[0], dict):  # objects keyed by row; plain lists in the NPO repository
                columns = [[c[str(i)] for i in range(len(c))] for c in columns]
            ratios = [truth_ratio(right, wrong) for right, wrong in zip(*columns, strict=True)]
        else:
            items, kind = log["forget_truth_ratio"]["value_by_index"], "open-unlearning's"
            ratios = [items[str(i)]["score"] for i in range(len(items))]
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as e:
        raise EvalError(f"{path}: no truth ratios of the forget set in it (key {e} is missing or malformed)") from None
    if not ratios or not all(isinstance(r, int | float) and math.isfinite(r) for r in ratios):
        raise EvalError(f"{path}: its truth ratios are empty or not finite; evaluate the retrained model again")
    return ratios, kind


def compare(ratios: list[float], reference: list[float], where: str) -> tuple[float, str]:
    """(forget quality, note). Both must hold the same rows; a log of the TOFU authors' protocol, which stops after 300
    rows, is compared with our first 300. Raises EvalError for any other difference."""
    if len(ratios) == len(reference):
        return forget_quality(ratios, reference), ""
    if len(reference) == 300 < len(ratios):
        return forget_quality(ratios[:300], reference), f"first 300 of {len(ratios)} rows, all that {where} holds"
    raise EvalError(f"{where}: holds {len(reference)} forget rows, this evaluation {len(ratios)}; compare the same rows")


# ------------------------------------------------------------------------------------------------------ running a model


@torch.no_grad()
def answer_losses(model: Llama, examples: list, budget: int = 2048, bar: tqdm | None = None) -> list[float]:
    """Loss of each example's answer, in order. Teacher-forced in length-sorted batches of about `budget` tokens."""
    losses = [0.0] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    while order:
        n = max(1, min(len(order), budget // len(examples[order[-1]].ids)))
        chunk, order = order[-n:], order[:-n]  # longest first: running out of memory shows at once
        batch = collate([examples[i] for i in chunk]).to(model.device)
        logits = model(batch.input_ids, batch.at)
        token_losses = F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
        mean = token_losses.masked_fill(~batch.mask, 0).sum(-1) / batch.mask.sum(-1)
        for i, loss in zip(chunk, mean.tolist(), strict=True):
            losses[i] = loss
        if bar is not None:
            bar.update(n)
    return losses


def evaluate(
    model: Llama,
    tokenizer: Tokenizer,
    sets: dict[str, list[Row]],
    max_new_tokens: int = 200,
    batch_size: int = 64,
    label: str = "evaluate",
    progress: bool = True,
) -> dict[str, dict[str, dict]]:
    """Per-item results {set: {key: item}} for the sets of `evaluation_sets`. One progress bar over all answers.

    item: question, answer, generation (greedy, at most max_new_tokens), rouge (ROUGE-L recall), loss (of `answer`),
    correct_loss (of the paraphrase where there is one, else of `answer`), wrong_losses, truth_ratio.
    Raises DataError for a row that occurs twice or has no perturbed answers, EvalError for a loss that is not finite.
    """
    if any(p.dtype != model.compute_dtype for p in model.parameters() if p.ndim == 2):
        model = model.frozen_copy()  # cast the master weights once, not in every step of generation
    for name, rows in sets.items():
        keys = [row.key for row in rows]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise DataError(f"{twice[0]}: occurs twice in the {name} set; evaluate on each row once")
    work = [(name, row) for name, rows in sets.items() for row in rows]
    texts = []  # (index into work, kind, text)
    for i, (_, row) in enumerate(work):
        if not row.perturbed_answers:
            raise DataError(f"{row.key}: has no 'perturbed_answer'; evaluate on a *_perturbed set")
        texts.append((i, "answer", row.answer))
        texts += [(i, "correct", row.paraphrased_answer)] if row.paraphrased_answer else []
        texts += [(i, "wrong", text) for text in row.perturbed_answers]
    examples = [tokenizer.encode(work[i][1].question, text, work[i][1].key) for i, _, text in texts]
    first = [example for example, (_, kind, _) in zip(examples, texts, strict=True) if kind == "answer"]

    with tqdm(total=len(examples) + len(work), desc=label, unit="answer", disable=not progress, leave=False) as bar:
        losses = answer_losses(model, examples, bar=bar)
        generations = [""] * len(work)
        # A chat format may end its answers by another token than the model's config names.
        stop = {*model.config.eos_token_ids, tokenizer.eos_id}
        order = sorted(range(len(work)), key=lambda i: first[i].prompt_length)
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            prompts = [list(first[i].ids[: first[i].prompt_length]) for i in chunk]
            for i, ids in zip(chunk, generate(model, prompts, max_new_tokens, stop), strict=True):
                generations[i] = tokenizer.decode(ids)
            bar.update(len(chunk))

    by_row: list[dict[str, list[float]]] = [{"answer": [], "correct": [], "wrong": []} for _ in work]
    for (i, kind, _), loss in zip(texts, losses, strict=True):
        if not math.isfinite(loss):
            raise EvalError(
                f"{work[i][1].key}: the model's loss is {loss}; its weights or --dtype {model.compute_dtype} overflow"
            )
        by_row[i][kind].append(loss)
    results: dict[str, dict[str, dict]] = {name: {} for name in sets}
    for (name, row), found, generation in zip(work, by_row, generations, strict=True):
        [loss] = found["answer"]
        correct = found["correct"][0] if found["correct"] else loss
        results[name][row.key] = {
            "question": row.question,
            "answer": row.answer,
            "generation": generation,
            "rouge": rouge_l_recall(row.answer, generation),
            "loss": loss,
            "correct_loss": correct,
            "wrong_losses": found["wrong"],
            "truth_ratio": truth_ratio(correct, found["wrong"]),
        }
    return results


def evaluate_and_save(
    model: Llama,
    tokenizer: Tokenizer,
    sets: dict[str, list[Row]],
    folder: Path | None,
    name: str,
    max_new_tokens: int = 200,
    label: str = "evaluate",
) -> dict:
    """{'protocol', 'rows', 'scores'}, written to `folder/eval/NAME-HASH.json`, or read from there.

    HASH covers the protocol (questions and answers, prompt tokens, generation length, dtype), so a result is reused
    only for the same evaluation. The folder must belong to this one model: a run folder. folder None: nothing is kept.
    """
    sample = [tokenizer.encode(r.question, r.answer, r.key).ids for rows in sets.values() for r in rows]
    protocol = {
        "sets": {k: fingerprint(v) for k, v in sets.items()},
        "prompt_format": tokenizer.format_name,
        "prompt_tokens": hashlib.sha256(json.dumps(sample).encode()).hexdigest()[:16],
        "max_new_tokens": max_new_tokens,
        "dtype": str(model.compute_dtype),
    }
    key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:8]
    path = folder / "eval" / f"{name}-{key}.json" if folder else None
    if path and path.exists():
        log = json.loads(path.read_text(encoding="utf-8"))
        return log | {"path": str(path)}
    rows = evaluate(model, tokenizer, sets, max_new_tokens, label=label)
    log = {"protocol": protocol, "scores": aggregate(rows), "rows": rows}
    if path:
        write_json(path, log)
    return log | {"path": str(path) if path else None}


def write_json(path: Path, value: dict) -> None:
    """Write or replace a JSON file; it is there whole or not at all. Raises EvalError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as e:
        raise EvalError(f"{path}: could not be written ({e}); free some space or choose another --out") from None


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
    """(folder or hub id, prompt format or None) of an alias of CHECKPOINTS, or (name, None).

    kind: 'target' for the TOFU-finetuned checkpoint, 'base' for the one before.
    Raises ModelError for a name that is no alias, no folder and cannot be a hub id.
    """
    if name in CHECKPOINTS:
        return getattr(CHECKPOINTS[name], kind), CHECKPOINTS[name].prompt
    if not Path(name).exists() and "/" not in name:
        raise ModelError(
            f"--model {name}: neither an alias ({', '.join(CHECKPOINTS)}) nor a folder nor a hub id (owner/name)"
        )
    return name, None


def load_tokenizer(tokenizer: str | None, model_folder: Path, vocab_size: int, prompt: str) -> Tokenizer:
    folder = (
        resolve_folder(tokenizer, ("tokenizer*.json", "special_tokens_map.json", "*.jinja")) if tokenizer else model_folder
    )
    return Tokenizer(folder, vocab_size, prompt)


def run_folder(name: str) -> Path | None:
    """The run folder that a model name is, or None: a place where its evaluations may be kept."""
    return Path(name) if (Path(name) / "model" / "config.json").exists() else None


def retain_reference(
    alias: str, forget: str, retain_logs: str | None, retained_log: dict | None, data_dir: str | None
) -> tuple[list[float] | None, str]:
    """(truth ratios of a retrained model or None, where they are from or why there are none)."""
    if retained_log is not None:
        return [v["truth_ratio"] for v in retained_log["rows"]["forget"].values()], "the retrained model"
    if retain_logs:
        return read_truth_ratios(retain_logs)[0], str(retain_logs)
    parts = split_spec(forget)
    config = parts[0][0].removeprefix("tofu_").removesuffix("_perturbed")
    if alias not in CHECKPOINTS or config not in TOFU_RETAIN or len(parts) > 1 or parts[0][1:] != (None, None):
        return None, "no retain reference: pass --retain-logs FILE or --retain-model PATH"
    repo, name = CHECKPOINTS[alias].retain_log(config)
    local = Path(data_dir) / repo / name if data_dir else None
    try:
        path = local if local and local.exists() else hub_file(repo, name, "pass --retain-logs FILE")
        return read_truth_ratios(path)[0], f"{repo}/{name}"
    except (DataError, EvalError) as e:
        return None, f"no retain reference: {e}"


def table(columns: dict[str, dict]) -> str:
    """The scores of several models side by side, as text. A score that does not exist is a dash."""
    names = ("forget_quality", "model_utility", *UTILITY_PARTS, *FORGET_PARTS)

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
    forget = {k: scores[k] for k in FORGET_PARTS}
    return {"forget_quality": quality, "model_utility": scores["model_utility"], "parts": parts, **forget}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    a = argparse.ArgumentParser("eval.py", description="Evaluate a model on TOFU.", formatter_class=formatter)
    a.add_argument("--model", required=True, help="run folder of train.py, model folder, hub id or alias")
    a.add_argument("--forget", required=True, help="forget set, e.g. tofu_forget10 or tofu_forget05[:40]")
    a.add_argument(
        "--retain-logs", help="evaluation log of the retrained model (ours, open-unlearning's, the TOFU authors')"
    )
    a.add_argument("--retain-model", help="the retrained model itself; evaluated first")
    a.add_argument("--eval-retain", help="rows that stand for the retain set, e.g. tofu_retain_perturbed[:100]")
    a.add_argument("--tokenizer", help="folder or hub id, where the model has none")
    a.add_argument("--prompt", default="auto", help=f"prompt format: auto, {', '.join(PROMPT_FORMATS)}")
    a.add_argument("--data-dir", help="folder with local data in hub layout (TOFU/forget10.json, ...)")
    a.add_argument("--max-new-tokens", type=int, default=200, help="length of generations, tokens")
    a.add_argument("--seed", type=int, default=0, help="of the toy world")
    a.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    a.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of activations")
    a.add_argument("--out", help="write the summary to this JSON file")
    return a.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        require_extra()
        device = pick_device(args.device)
        dtype = pick_dtype(args.dtype, device)
        sets = evaluation_sets(args.forget, args.eval_retain)
        rows = {k: load_rows(v, args.data_dir, args.seed) for k, v in sets.items()}
        if args.retain_logs:
            read_truth_ratios(args.retain_logs)  # an unusable log ends the run now, not after the evaluation

        def run(name, label):
            source, prompt = resolve_model(name, "target")
            folder = resolve_folder(source)
            model = load_pretrained(folder, device=device, compute_dtype=dtype)
            wanted = prompt if args.prompt == "auto" and prompt else args.prompt
            tokenizer = load_tokenizer(args.tokenizer, folder, model.config.vocab_size, wanted)
            print(f"{label}: {source}  prompt format {tokenizer.format_name}, {device}, {dtype}", flush=True)
            return evaluate_and_save(model, tokenizer, rows, run_folder(name), "final", args.max_new_tokens, label)

        logs = {"retrained": run(args.retain_model, "retrained")} if args.retain_model else {}
        logs["model"] = run(args.model, "model")
        reference, where = retain_reference(args.model, args.forget, args.retain_logs, logs.get("retrained"), args.data_dir)
        summary = {}
        for name, log in reversed(logs.items()):
            quality = None
            if reference is not None:
                ratios = [v["truth_ratio"] for v in log["rows"]["forget"].values()]
                quality, note = compare(ratios, reference, where)
                where = f"{where} ({note})" if note else where
            summary[name] = summary_scores(log["scores"], quality)
        print(table({k: v | v["parts"] for k, v in summary.items()}))
        print(f"forget quality against {where}" if reference is not None else where)
        if kept := logs["model"]["path"]:
            print(f"per-item results: {kept}")
        if args.out:
            write_json(Path(args.out), summary)
    except (EvalError, DataError, ModelError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
