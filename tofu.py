"""TOFU (Maini et al. 2024, arXiv 2401.06121): its data, with the toy world and files of one's own, and its evaluation."""

import itertools
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import distributed
import logs
import metrics
import toy
from data import DataError, Example, Row, Tokenizer, cut, fingerprint, own_path, parse_rows, read_lines, split_spec
from inference import (
    Benchmark,
    Checkpoint,
    Prompt,
    Text,
    Work,
    evaluated,
    find_file,
    mean_loss,
    memorization,
    score,
    token_losses,
)  # fmt: skip
from metrics import FORGET_PARTS, MEMBERSHIP, MEMORIZATION, MORE_MEMBERSHIP, UTILITY_PARTS, EvalError, Rows
from model import Llama

TOFU_RETAIN = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
TOFU_CONFIGS = (*toy.TOY_CONFIGS, "holdout01", "holdout05", "holdout10")
TOFU_GENERATION_BATCH = 30  # of the TOFU authors' code: with a limit on the total, padding shortens generations
DETAILED = ("forget", "holdout")  # the sets with memorization and membership scores

CHECKPOINTS = {
    alias: Checkpoint(
        f"meta-llama/{family}", f"open-unlearning/tofu_{family}_full", prompt,
        {f"tofu_{forget}{more}": f"tofu_{family}_{retain}/TOFU_EVAL.json"
         for forget, retain in TOFU_RETAIN.items() for more in ("", "_perturbed")},
    )
    for alias, family, prompt in (
        ("llama2-7b", "Llama-2-7b-chat-hf", "llama2"),
        ("llama3.2-1b", "Llama-3.2-1B-Instruct", "llama3"),
        ("llama3.2-3b", "Llama-3.2-3B-Instruct", "llama3"),
        ("llama3.1-8b", "Llama-3.1-8B-Instruct", "llama3"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Protocol:
    """How a code base of the field evaluates on TOFU."""

    rows: int | None  # only the first so many rows of each set
    max_total_tokens: int | None  # of prompt + answer, and of prompt + generation, padding included
    epsilon: float  # added to the denominators of truth ratio and option probability


PROTOCOLS = {
    "open-unlearning": Protocol(None, None, metrics.OPEN_UNLEARNING_EPSILON),
    "tofu": Protocol(300, 200, 0.0),  # the TOFU authors'
}


def load_rows(spec: str, data_dir: str | Path | None = None, seed: int = 0) -> list[Row]:
    """Rows of a data set: `tofu_<config>`, `toy_<config>`, or a file of one's own, sliced and added up. data_dir:
    local copies in hub layout (`data_dir/TOFU/forget10.json`), used before the hub. seed: of the toy world. Raises DataError
    for an unknown name or slice, a broken file, or a hub that cannot be reached."""
    rows = []
    for name, lo, hi in split_spec(spec):
        if own := own_path(name):
            part = parse_rows(own, own.stem)
        elif name.startswith("toy_") and name[4:] in toy.TOY_CONFIGS:
            part = toy.toy_world(seed)[name[4:]]
        elif name.startswith("tofu_") and name[5:] in TOFU_CONFIGS:
            file = f"{name[5:]}.json"
            remedy = f"place it at DIR/TOFU/{file} and pass --data-dir DIR"
            part = parse_rows(find_file("locuslab/TOFU", file, data_dir, remedy, [f"TOFU/{file}"]), name)
        else:
            known = ", ".join([f"tofu_{c}" for c in TOFU_CONFIGS] + [f"toy_{c}" for c in toy.TOY_CONFIGS])
            raise DataError(
                f"data set {name!r} is unknown; known are {known}, and files ending in .json, .jsonl, .csv or .parquet"
            )
        rows += cut(part, lo, hi, spec)
    return rows


def load_refusals(path: str | None, forget: str, data_dir: str | Path | None = None) -> list[str]:
    """Answers like "I don't know": of a file as `data.read_lines`, else the toy's own for a toy set, else the TOFU authors'
    100 (plain lines, despite the name). Raises DataError for a file that is missing or holds none."""
    if path is None and forget.startswith("toy_"):
        return list(toy.REFUSALS)
    remedy = "pass a file with a refusal per line as --refusals FILE"
    hub = "open-unlearning/idk", "idk.jsonl"
    file = Path(path).expanduser() if path is not None else find_file(*hub, data_dir, remedy, ["TOFU/idontknow.jsonl"])
    return read_lines(file, remedy)


def benchmark_parts(spec: str) -> list[tuple[str, str | None, str | None]]:
    """The parts of a data set's name without files of one's own, unless there is nothing else."""
    parts = split_spec(spec)
    return [part for part in parts if not own_path(part[0])] or parts


def complement(forget: str) -> str:
    """The retain set of a forget set: what else the target model was trained on. Raises DataError where it is not known."""
    parts = benchmark_parts(forget)
    prefix, _, config = parts[0][0].partition("_")
    if len(parts) == 1 and prefix in ("tofu", "toy") and config in TOFU_RETAIN:
        return f"{prefix}_{TOFU_RETAIN[config]}"
    raise DataError(f"--forget {forget}: its complement is not known; name the retain set with --retain")


def evaluation_sets(forget: str, retain: str | None = None) -> dict[str, str]:
    """{'forget', 'retain', 'ra', 'wf'} -> data-set name. The forget set's slice is kept: `tofu_forget10[:40]` is evaluated
    on `tofu_forget10_perturbed[:40]`; files of one's own beside it (`tofu_forget10+more.jsonl`) are not evaluated. retain:
    in place of `retain_perturbed`. Raises DataError for any other set."""
    parts = benchmark_parts(forget)
    prefix = parts[0][0].split("_")[0]
    kind = rf"{prefix}_forget\d+(_perturbed)?"
    if prefix not in ("tofu", "toy") or not all(re.fullmatch(kind, name) for name, *_ in parts):
        raise DataError(
            f"--forget {forget}: TOFU's numbers need a tofu_forgetXX or toy_forgetXX set (train.py: pass --no-eval)"
        )
    names = [name.removesuffix("_perturbed") + "_perturbed" + _window(lo, hi) for name, lo, hi in parts]
    sets = {"forget": "+".join(names), "retain": retain or f"{prefix}_retain_perturbed"}
    return sets | {"ra": f"{prefix}_real_authors_perturbed", "wf": f"{prefix}_world_facts_perturbed"}


def _window(lo: str | None, hi: str | None) -> str:
    return f"[{lo or ''}:{hi or ''}]" if lo or hi else ""


def holdout_set(forget: str) -> str:
    """The holdout set that belongs to a TOFU forget set. Raises DataError where none does."""
    (name, lo, hi), *others = split_spec(forget)
    if others or not name.startswith("tofu_forget"):
        raise DataError("no holdout set belongs to this forget set")
    return name.removesuffix("_perturbed").replace("forget", "holdout") + _window(lo, hi)


def cut_to_total(example: Example, limit: int | None) -> Example:
    """An example cut to `limit` tokens; one that reaches it has no EOS to predict, as in the TOFU authors' code. Raises
    EvalError where nothing of the answer is left."""
    if limit is not None and example.prompt_length >= limit:
        raise EvalError(f"{example.key}: its prompt fills the {limit} tokens of the protocol; leave it out or use another")
    return example if limit is None else replace(example, ids=example.ids[:limit])


def generation_limits(prompt_lengths: list[int], max_new_tokens: int, max_total_tokens: int | None) -> list[int]:
    """New tokens that each prompt of a set may get. A limit on the total counts the padding of its batch of 30."""
    if max_total_tokens is None:
        return [max_new_tokens] * len(prompt_lengths)
    n = TOFU_GENERATION_BATCH
    longest = [max(prompt_lengths[i - i % n : i - i % n + n]) for i in range(len(prompt_lengths))]
    return [min(max_new_tokens, max(0, max_total_tokens - x)) for x in longest]


def scored(path: str, mean: str) -> dict:
    """The log at `path` as of `logs.read_log`, with scores. Raises EvalError for one that does not hold all four sets."""
    log = logs.read_log(path, mean)
    try:
        scores = metrics.aggregate(log["rows"], log["epsilon"])
        scores["model_utility"]  # noqa: B018
    except KeyError as e:
        raise EvalError(f"{path}: its model utility cannot be computed (key {e} is missing); pass a whole log") from None
    if log["mia_min_k"] is not None:
        scores["mia_min_k"] = log["mia_min_k"]
    return log | {"scores": scores, "path": None}


class Tofu(Benchmark):
    """TOFU's evaluation of one forget set. Of a holdout row only the answer is scored."""

    name, protocols, checkpoints, batch_size, plots, label_width = "TOFU", PROTOCOLS, CHECKPOINTS, 64, True, 24
    shorter = "lower --max-new-tokens"
    retain_flags, compared = "--retain-logs FILE or --retain-model PATH", ("forget_quality", "forget quality")
    load = staticmethod(load_rows)
    complement = staticmethod(complement)
    encode = staticmethod(lambda rows, tokenizer, *of_texts: tokenizer.encode_rows(rows))
    refusals = staticmethod(load_refusals)
    first_rows = staticmethod(lambda forget: None)

    def load_sets(self) -> dict[str, list[Row]]:
        options, first = self.options, self.options.rows or self.protocol.rows
        if options.forget is None:
            return {}
        load = partial(load_rows, data_dir=options.data_dir, seed=options.seed)
        specs = {"forget": options.forget} | ({"retain": options.eval_retain} if options.eval_retain else {})
        if not options.own or benchmark_parts(options.forget)[0][0].startswith(("tofu_", "toy_")):
            specs = evaluation_sets(options.forget, options.eval_retain)
        sets = {name: load(spec)[:first] for name, spec in specs.items()}
        if options.holdout:
            try:
                sets["holdout"] = load(holdout_set(options.forget))[:first]
            except DataError as e:
                self.no_holdout = str(e)
        return sets

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises EvalError for --mask-quirk where it changes nothing: a prompt without EOS, or padding by another token."""
        padding = tokenizer.config.get("pad_token")
        padding = padding.get("content") if isinstance(padding, dict) else padding
        if self.options.mask_quirk and tokenizer.format.end not in tokenizer.format.prompt:
            why = f"hides the EOS in a prompt, and the {tokenizer.format_name} format has none there"
            raise EvalError(f"--mask-quirk: {why}; drop the flag")
        if self.options.mask_quirk and padding not in (None, tokenizer.format.end):
            why = f"hides what pads, and that is {padding!r} here, not the {tokenizer.format.end} of the prompt"
            raise EvalError(f"--mask-quirk: {why}; drop the flag")

    def record(self, tokenizer: Tokenizer) -> dict:
        """Raises as `check`."""
        self.check(tokenizer)
        options, format_name = self.options, tokenizer.format_name
        tokens = {name: fingerprint([e.ids for e in tokenizer.encode_rows(rows)]) for name, rows in self.sets.items()}
        sets = {name: known | {"prompt_tokens": tokens[name]} for name, known in self.data().items()}
        record = {"name": options.protocol, "sets": sets, "prompt_format": format_name, "date": tokenizer.date}
        record |= {"mask_quirk": options.mask_quirk, "truth_ratio": options.truth_ratio, "epsilon": self.protocol.epsilon}
        record |= {"gradnorm": options.gradnorm}
        return record | {"max_new_tokens": options.max_new_tokens, "max_total_tokens": self.protocol.max_total_tokens}

    def plan(self, tokenizer: Tokenizer) -> dict[str, dict[str, Work]]:
        """Raises DataError for a row twice or, unless it may be one's own, without perturbed answers, EvalError for a prompt
        beyond the protocol."""

        def text(name: str, row: Row, kind: str, answer: str) -> Text:
            example = cut_to_total(tokenizer.encode(row.question, answer, row.key), self.protocol.max_total_tokens)
            measure = memorization if name in DETAILED and kind == "answer" else mean_loss
            return Text(f"{name} {row.key} {kind}", example, measure)

        plan: dict[str, dict[str, Work]] = {name: {} for name in self.sets}
        for name, rows in self.sets.items():
            answers = [text(name, row, "answer", row.answer) for row in rows]
            prompts = [answer.example.ids[: answer.example.prompt_length] for answer in answers]
            lengths = [len(ids) for ids in prompts]
            limits = generation_limits(lengths, self.options.max_new_tokens, self.protocol.max_total_tokens)
            for row, answer, ids, limit in zip(rows, answers, prompts, limits, strict=True):
                if row.key in plan[name]:
                    raise DataError(f"{row.key}: occurs twice in the {name} set; evaluate on each row once")
                texts, prompt = {"answer": answer}, None
                if name != "holdout":
                    if not row.perturbed_answers and (not self.options.own or name in ("ra", "wf")):
                        raise DataError(f"{row.key}: has no 'perturbed_answer'; evaluate on a *_perturbed set")
                    others = {f"wrong {j}": other for j, other in enumerate(row.perturbed_answers)}
                    others = {"correct": row.paraphrased_answer} | others if row.paraphrased_answer else others
                    texts |= {kind: text(name, row, kind, other) for kind, other in others.items()}
                    decoded, order = tokenizer.decode_text(list(ids)), (0, limit, len(ids))
                    prompt = Prompt(f"{name} {row.key}", ids, decoded, limit, order)
                plan[name][row.key] = Work({"question": row.question, "answer": row.answer}, texts, prompt)
        return plan

    def item(self, part: str, work: Work, done: dict[str, Any]) -> dict:
        """question, answer, loss (of `answer`); of forget and holdout rows MEMORIZATION, MEMBERSHIP and, where it is asked
        for, mia_gradnorm; of all but holdout rows correct_loss (of the paraphrase where there is one, else of `answer`),
        wrong_losses and truth_ratio (where there are wrong answers), prompt (as decoded), generation (greedy), rouge,
        rouge_f1, rouge1 (see `metrics.rouge`)."""
        scores = {kind: done[text.key] for kind, text in work.texts.items()}
        item: dict = work.row | scores["answer"]
        if part in DETAILED:
            item |= {"mia_loss": item["loss"], "mia_zlib": metrics.zlib_score(item["loss"], item["answer"])}
            if (norm := done.get(f"{work.texts['answer'].key} gradient")) is not None:
                item["mia_gradnorm"] = norm
        if work.prompt:
            item["correct_loss"] = scores.get("correct", scores["answer"])["loss"]
            if wrong := [found["loss"] for kind, found in scores.items() if kind.startswith("wrong")]:
                ratio = metrics.truth_ratio(item["correct_loss"], wrong, self.options.truth_ratio, self.protocol.epsilon)
                item |= {"wrong_losses": wrong, "truth_ratio": ratio}
            item |= {"prompt": work.prompt.text, "generation": done[work.prompt.key].strip()}
            item |= metrics.rouge(item["answer"], item["generation"])
        return item

    def aggregate(self, rows: Rows) -> dict[str, float]:
        return metrics.aggregate(rows, self.protocol.epsilon)

    def with_language(
        self, logs: dict[str, dict], load_retrained: Callable[[], Llama], tokenizer: Tokenizer
    ) -> dict[str, dict]:
        """Each log with the score `language` and in each forget row the `language_loss` of its generation, None where that
        has no tokens (see `metrics`); with holdout rows, open-unlearning's `mia_reference` too, the loss minus the retrained
        model's. Only in memory: a kept log holds what its own model decides. An answer is cut where the judge's positions
        end."""
        judge = evaluated(load_retrained())
        limit = min(judge.config.max_position_embeddings + 1, self.protocol.max_total_tokens or math.inf)

        def example(item: dict, text: str) -> Example | None:
            try:
                return cut_to_total(tokenizer.encode(item["question"], text), int(limit))
            except DataError:  # it has no tokens
                return None

        rows = {name: log["rows"]["forget"] for name, log in logs.items()}
        said = {name: {k: example(v, v["generation"]) for k, v in items.items()} for name, items in rows.items()}
        true = [example(item, item["answer"]) for item in rows["retrained"].values()]
        # Each once, so that the same answer has the same loss whoever gives it.
        different = dict.fromkeys(e for e in itertools.chain(true, *(x.values() for x in said.values())) if e)
        texts = {e: Text(str(i), e, token_losses) for i, e in enumerate(different)}
        hidden_id = tokenizer.eos_id if self.options.mask_quirk else None
        mine = distributed.share([*texts.values()])
        found = distributed.merged({k: v for scores in score(judge, mine, hidden_id) for k, v in scores.items()})
        loss_of = dict[Example | None, float]()
        for e, text in texts.items():
            loss_of[e] = metrics.language_loss(found[text.key]["losses"], e.ids, e.prompt_length)
        true_losses, judged = [loss_of[e] for e in true if e], {}
        for name, log in logs.items():
            items = {k: item | {"language_loss": loss_of.get(said[name][k])} for k, item in rows[name].items()}
            share = metrics.language([(v["generation"], v["language_loss"]) for v in items.values()], true_losses)
            parts = log["rows"] | {"forget": items}
            for part in (part for part in DETAILED if "holdout" in parts):
                known = logs["retrained"]["rows"][part]
                parts[part] = {k: v | {"mia_reference": v["loss"] - known[k]["loss"]} for k, v in parts[part].items()}
            auc = {k: v for k, v in self.aggregate(parts).items() if k == "mia_reference"}
            judged[name] = log | {"scores": log["scores"] | {"language": share} | auc, "rows": parts}
        return judged

    def read_reference(self, path: str | Path) -> tuple[dict, str]:
        return logs.read_log(path), str(path)

    def summary(self, log: dict, reference: dict | None, where: str) -> tuple[dict, str]:
        """Writes open-unlearning's files too. Raises EvalError where log and reference cannot be compared."""
        quality, where = logs.quality_of(log, reference, where)
        scores, retained = dict(log["scores"]), (reference or {}).get("mia_min_k")
        if "mia_min_k" in scores and retained is not None:
            scores["privleak"] = metrics.privleak(scores["mia_min_k"], retained)
        if log.get("path") and log.get("protocol"):
            logs.save_open_unlearning(log["path"], "TOFU", logs.open_unlearning_eval(log, quality, retained))
        result: dict = {"forget_quality": quality, "forget_quality_log10": metrics.log10(quality)}
        result |= {
            "model_utility": scores.get("model_utility"),
            "parts": {k: scores[k] for k in UTILITY_PARTS if k in scores},
        }
        others = ("language", *FORGET_PARTS, *MEMORIZATION, *MEMBERSHIP, *MORE_MEMBERSHIP, "privleak")
        return result | {k: scores[k] for k in others if k in scores} | self.unscorable(log, "answer"), where

    @staticmethod
    def samples(log: dict) -> dict[str, tuple[str, str, str]]:
        return {k: (v["question"], v["answer"], v["generation"]) for k, v in log["rows"]["forget"].items()}

    @classmethod
    def signs(cls, log: dict, reference: dict | None) -> tuple[bool | None, float | None]:
        """(whether the forget answers are still likelier, against their wrong ones, than the reference has them, or None
        without one; `degenerate_share`): what hints are made from."""
        ours, theirs = (statistics.median(logs.truth_ratios(x)) for x in (log, reference or log))
        return ours < theirs if reference else None, metrics.degenerate_share(cls.samples(log))

    @staticmethod
    def shown(item: dict) -> tuple[tuple[float, float], str, dict[str, str]]:
        rouge, probability = item["rouge"], metrics.probability(item["loss"])
        scores = f"ROUGE-L recall {rouge:.3f}, probability {probability:.3f}"
        scores += f", truth ratio {item['truth_ratio']:.3f}" if "truth_ratio" in item else ""
        if item.get("language_loss") is not None:
            scores += f", language loss {item['language_loss']:.2f}"
        texts = {"question": item.get("question", ""), "reference": item.get("answer", ""), "generation": item["generation"]}
        return (rouge, -item["loss"]), scores, texts  # by ROUGE, then probability

    @classmethod
    def report(cls, summaries: dict[str, dict], found: str) -> str:
        text = super().report(summaries, found)
        if any("language" in summary for summary in summaries.values()):
            return text
        return f"{text}\nlanguage is absent: only the retrained model itself can judge the answers (--retain-model PATH)"

    @staticmethod
    def headline(summary: dict) -> str:
        quality = "-" if summary["forget_quality"] is None else f"{summary['forget_quality']:.3g}"
        return f"forget quality {quality}, model utility {summary['model_utility']:.4f}"

    @staticmethod
    def cells(summary: dict) -> dict[str, str]:
        scores, quality = summary | summary["parts"], summary["forget_quality"]
        names = ("forget_quality", "model_utility", "language", *UTILITY_PARTS, *FORGET_PARTS, *MEMORIZATION, *MEMBERSHIP)
        names += (*MORE_MEMBERSHIP, "privleak")
        cells = {name: "-" if scores[name] is None else f"{scores[name]:.4f}" for name in names if name in scores}
        return cells | ({"forget_quality": f"{quality:.2e}"} if quality is not None and quality < 0.01 else {})
