"""MUSE (Shi et al. 2024, arXiv 2407.06460): verbatim memory, knowledge memory, privacy leakage and utility on running text.

Two code bases measure it, here called variants: 'muse', the authors', and 'open-unlearning'.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import files
import logs
import metrics
from data import DataError, Example, Tokenizer, cut, is_text, parquet_rows, split_spec
from inference import Benchmark, Checkpoint, Options, Prompt, Scores, Text, Work, find_file, memorization
from metrics import MUSE_NEW_TOKENS, MUSE_TEXTS, EvalError

MUSE_REPOS = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
MUSE_COLUMNS: dict[str, tuple[str, ...]] = dict.fromkeys(("raw", "privleak", "scal", "sust", "train"), ("text",))
MUSE_COLUMNS |= {"verbmem": ("prompt", "gt"), "knowmem": ("question", "answer")}
MUSE_SPLITS = {
    "raw": ("forget", "retain1", "retain2", "holdout"),  # to remove, to regularise with, to evaluate on, never seen
    "verbmem": ("forget",),
    "knowmem": ("forget_qa", "retain_qa", "forget_qa_icl", "retain_qa_icl"),
    "privleak": ("forget", "retain", "holdout"),
    "scal": ("forget_1", "forget_2", "forget_3", "forget_4"),  # growing forget sets; News only
    "sust": ("forget_1", "forget_2", "forget_3", "forget_4"),  # forget sets one after the other; News only
    "train": ("forget", "retain1", "retain2"),  # what the target was trained on
}
MUSE_DOCUMENTS = ("raw", "scal", "sust", "train")  # running text: kept as .txt too, and an empty document is no error
# Of the copy in MUSE's GitHub repository.
MUSE_OLD_NAMES = {("knowmem", "retain_qa"): "retain2_qa", ("knowmem", "retain_qa_icl"): "retain2_qa_icl",
                  ("privleak", "retain"): "retain2"}  # fmt: skip
MUSE_QUESTIONS = {"forget_knowmem": "forget_qa", "retain_knowmem": "retain_qa"}
MUSE_STOPS = ("\n\n", "\nQuestion", "Question:")

LLAMA = "meta-llama/Llama-2-7b-hf"  # what MUSE finetuned; its own models come without a tokenizer
MUSE_LOGS = {corpus: f"muse_Llama-2-7b-hf_{corpus.capitalize()}_retrain/MUSE_EVAL.json" for corpus in MUSE_REPOS}
MUSE_CHECKPOINTS = {  # 'plain': MUSE's questions have their own format, no chat
    f"muse-{corpus}": Checkpoint(LLAMA, f"muse-bench/MUSE-{corpus}_target", "plain", {f"muse_{corpus}": log}, LLAMA)
    for corpus, log in MUSE_LOGS.items()
}


def load_muse(corpus: str, config: str, split: str, data_dir: str | Path | None = None) -> list[dict[str, str]]:
    """Rows of a MUSE data set ('news' or 'books'), as the columns of its config: MUSE_COLUMNS.

    data_dir: local copies, used before the hub: `data_dir/MUSE-News/<config>/<split>` ending in `-00000-of-00001.parquet`,
    `.parquet`, `.json` (an array of objects, or of strings where `text` is the only column) or `.txt` (running text only:
    the documents joined by a blank line, read as one). Raises DataError for an unknown name, a file that is broken, empty or
    without one of the columns, a value that is no text, a hub that cannot be reached.
    """
    configs = [c for c in MUSE_SPLITS if corpus != "books" or c not in ("scal", "sust")]
    for name, known in ((corpus, MUSE_REPOS), (config, configs), (split, MUSE_SPLITS.get(config, ()))):
        if name not in known:
            raise DataError(f"MUSE data set {corpus}/{config}/{split}: {name!r} is unknown; known are {', '.join(known)}")
    path, columns = muse_file(corpus, config, split, data_dir), MUSE_COLUMNS[config]
    if path.suffix == ".parquet":
        found = [row for _, row in parquet_rows(path, columns)]
    elif path.suffix == ".txt":
        found = [files.read_text(path, DataError, "download it again")]
    else:
        found = files.read_json(path, DataError, "download it again", kind=list)
    rows = []
    for i, values in enumerate(found):
        values = {"text": values} if isinstance(values, str) and columns == ("text",) else values
        for column in columns:
            value = values.get(column) if isinstance(values, dict) else None
            blank = config in MUSE_DOCUMENTS and isinstance(value, str) and not value.strip()
            if not is_text(value) and not blank:
                raise DataError(f"{path}, row {i}: key '{column}' is missing or no text; download it again")
        rows.append({column: values[column] for column in columns})
    if not any(value.strip() for row in rows for value in row.values()):
        raise DataError(f"{path}: holds no rows; download it again")
    return rows


def muse_file(corpus: str, config: str, split: str, data_dir: str | Path | None) -> Path:
    """The file of a MUSE data set: a local one where there is one, else the hub's. Raises DataError as `load_muse`."""
    repo, on_hub = MUSE_REPOS[corpus], f"{split}-00000-of-00001.parquet"
    folder = f"{repo.split('/')[1]}/{config}"
    endings = ["-00000-of-00001.parquet", ".parquet", ".json"] + [".txt"] * (config in MUSE_DOCUMENTS)
    names = split, MUSE_OLD_NAMES.get((config, split), split)
    local = [f"{folder}/{name}{ending}" for name in names for ending in endings]
    remedy = f"place it at DIR/{folder}/{on_hub} (or {split}.json) and pass --data-dir DIR"
    return find_file(repo, f"{config}/{on_hub}", data_dir, remedy, local)


def load_texts(spec: str, data_dir: str | Path | None = None, seed: int = 0) -> list[str]:
    """Documents of MUSE: `muse_news` (for muse_news/raw/forget), `muse_books/raw/retain1`, ..., sliced and added up as in
    `tofu.load_rows`; seed: of no use here. Raises DataError for an unknown name or slice, and as `load_muse`."""
    texts = []
    for name, lo, hi in split_spec(spec):
        match = re.fullmatch(r"muse_(\w+?)(?:/(\w+)/(\w+))?", name)
        config, split = (match[2] or "raw", match[3] or "forget") if match else ("", "")
        if not match or "text" not in MUSE_COLUMNS.get(config, ("text",)):
            raise DataError(f"data set {name!r} is unknown; known are muse_news, muse_books, muse_news/CONFIG/SPLIT of text")
        texts += cut([row["text"] for row in load_muse(match[1], config, split, data_dir)], lo, hi, spec)
    return texts


def muse_chunks(
    texts: list[str], tokenizer: Tokenizer, key: str = "text", length: int = 2048, chunking: str = "muse"
) -> list[Example]:
    """Running text as training sequences: BOS, then labels only, no EOS. The texts are joined by blank lines and tokenised
    once. Raises DataError for texts without tokens, an unknown chunking, a length below 2.

    'muse', as the MUSE authors' code: pieces of `length` - 1 tokens, BOS put in front; the last one is filled up to `length`
    with the first sequence, BOS included (once: it stays shorter where that is not enough). 'open-unlearning': pieces of
    `length` tokens, each decoded and tokenised again, BOS put in front, cut to 1 + `length`; the last one stays short, what
    has no tokens is dropped.
    """
    if chunking not in MUSE_VARIANTS:
        raise DataError(f"chunking {chunking!r} is unknown; known are {', '.join(MUSE_VARIANTS)}")
    if length < 2:
        raise DataError(f"chunks of {length} tokens: BOS leaves nothing to predict; 2 is the least")
    ids, bos = tokenizer.encode_text("\n\n".join(texts), key), tokenizer.bos_id
    if chunking == "muse":
        step = length - 1
        pieces = [[bos, *ids[i : i + step]] for i in range(0, len(ids), step)]
        if pieces:
            pieces[-1] = (pieces[-1] + pieces[0])[:length]
    else:
        parts = [tokenizer.decode_text(ids[i : i + length]) for i in range(0, len(ids), length)]
        pieces = [[bos, *tokenizer.encode_text(part, key)[:length]] for part in parts]
        pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise DataError(f"{key}: its texts tokenise to nothing; remove them or fill them in")
    return [Example(f"{key}/{i}", tuple(piece), 1) for i, piece in enumerate(pieces)]


def corpus_of(forget: str) -> str:
    """'news' of muse_news[:10], of muse_news/scal/forget_2, ..."""
    return split_spec(forget)[0][0].split("/")[0].removeprefix("muse_")


def knowmem_prompt(icl_pairs: list[tuple[str, str]], question: str) -> str:
    """The pairs (question, answer) as examples, then the question. Ends with a space, as in both code bases."""
    examples = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in icl_pairs)
    return f"{examples}Question: {question}\nAnswer: "


def cut_at_stop(text: str) -> str:
    """What a KnowMem generation says before it goes on to another question; white space around it is kept."""
    return re.split("|".join(MUSE_STOPS), text, maxsplit=1)[0]


def min_k_and_loss(variant: str, logits: Tensor, targets: Tensor, lengths: tuple[int, ...]) -> list[Scores]:
    """{'score': Min-40% of the variant, 'loss': mean negative log-likelihood per token} of texts, BOS in front. All their
    positions are labels: what `inference.memorization` holds at a time would not fit beside the logits."""
    log_probs = -F.cross_entropy(logits, targets, reduction="none")
    values = [text.tolist() for text in log_probs.split(lengths)]
    return [{"score": metrics.muse_min_k(x, variant), "loss": -sum(x) / len(x)} for x in values]


MUSE_VARIANTS = {variant: partial(min_k_and_loss, variant) for variant in ("open-unlearning", "muse")}  # of whole texts


class Muse(Benchmark):
    """MUSE's evaluation of one corpus."""

    name, preset, protocols, checkpoints, batch_size, label_width = "MUSE", "muse", MUSE_VARIANTS, MUSE_CHECKPOINTS, 8, 28
    retain_flags = "--retain-logs FILE, --retain-logs muse, or --retain-model PATH"
    compared = "privleak", "PrivLeak"
    load = staticmethod(load_texts)
    complement = staticmethod(lambda forget: f"muse_{corpus_of(forget)}/raw/retain1")
    encode = staticmethod(muse_chunks)
    aggregate = staticmethod(metrics.aggregate_muse)

    @staticmethod
    def refusals(path: str | None, forget: str, data_dir: str | Path | None = None) -> list[str]:
        raise DataError(f"--forget {forget}: dpo prefers refusals of questions, and MUSE's texts have none; use npo")

    @staticmethod
    def first_rows(forget: str) -> int | None:
        """N of muse_news[:N]. Raises EvalError for any other slice."""
        (_, first, last), *others = split_spec(forget)
        if others or first is not None or "%" in (last or ""):
            raise EvalError(f"--forget {forget}: MUSE is evaluated on all rows or on the first N: muse_news[:N]")
        return int(last) if last else None

    def __init__(self, options: Options):
        self.corpus = corpus_of(options.forget or "muse_news")
        super().__init__(replace(options, forget=f"muse_{self.corpus}", mask_quirk=False))

    def load_sets(self) -> dict[str, list[dict[str, str]]]:
        parts = [("verbmem", "forget"), ("privleak", "forget"), ("privleak", "holdout")]
        parts += [("knowmem", split + icl) for split in MUSE_QUESTIONS.values() for icl in ("", "_icl")]
        data_dir = self.options.data_dir
        return {f"{config}/{split}": load_muse(self.corpus, config, split, data_dir) for config, split in parts}

    def record(self, tokenizer: Tokenizer) -> dict:
        sample = tokenizer.encode_text(self.sets["verbmem/forget"][0]["prompt"])
        options, name = self.options, f"MUSE {self.corpus}, {self.options.protocol}"
        return {"name": name, "limit": options.rows, "stemmer": options.stemmer, "sets": self.data(), "tokens": sample}

    def plan(self, tokenizer: Tokenizer) -> dict[str, dict[str, Work]]:
        """Prompts and texts stand behind BOS, without a chat format. Protocol 'muse' scores all of a text and cuts the
        reference of VerbMem to 127 tokens. The examples in KnowMem's prompt are not cut to `Options.rows`."""
        muse = self.options.protocol == "muse"

        def rows(name: str) -> Iterator[tuple[str, dict[str, str]]]:
            return ((f"muse_{self.corpus}/{name}/{i}", row) for i, row in enumerate(self.sets[name][: self.options.rows]))

        def with_bos(text: str, key: str) -> tuple[int, ...]:
            return (tokenizer.bos_id, *tokenizer.encode_text(text, key))

        def prompt(part: str, key: str, text: str) -> Prompt:
            ids, order = with_bos(text, key), list(MUSE_NEW_TOKENS).index(part)
            return Prompt(f"generation {key}", ids, text, MUSE_NEW_TOKENS[part], (order, -len(ids)))

        plan: dict[str, dict[str, Work]] = {part: {} for part in (*MUSE_NEW_TOKENS, *MUSE_TEXTS)}
        for key, row in rows("verbmem/forget"):
            asked, reference = prompt("forget_verbmem", key, row["prompt"]), row["gt"].strip()
            if muse:  # 128 tokens, BOS among them
                reference = tokenizer.decode(tokenizer.encode_text(row["gt"], key)[: asked.limit - 1])
            # With a space between them, as in open-unlearning; MUSE itself does not score the reference.
            example = Example(key, with_bos(f"{row['prompt']} {row['gt']}", key), len(asked.ids))
            if example.answer_length <= 0:
                raise DataError(f"{key}: its 'gt' tokenises to nothing behind its 'prompt'; download it again")
            text = Text(f"score {key}", example, memorization)
            plan["forget_verbmem"][key] = Work({"ground_truth": reference}, {"text": text}, asked)
        for part, split in MUSE_QUESTIONS.items():
            pairs = [(row["question"], row["answer"]) for row in self.sets[f"knowmem/{split}_icl"]]
            for key, row in rows(f"knowmem/{split}"):
                asked = prompt(part, key, knowmem_prompt(pairs, row["question"]))
                plan[part][key] = Work({"ground_truth": row["answer"]}, {}, asked)
        for part, split in MUSE_TEXTS.items():
            for key, row in rows(f"privleak/{split}"):
                ids = with_bos(row["text"], key)
                example = Example(key, ids if muse else ids[: 1 + metrics.MUSE_MAX_TOKENS], 1)
                plan[part][key] = Work({}, {"text": Text(f"score {key}", example, self.protocol)})
        return plan

    def item(self, part: str, work: Work, done: dict[str, Any]) -> dict:
        """Of privleak_forget and privleak_holdout: score (Min-40%), loss. Of the others: prompt, ground_truth, generation
        (greedy: 128 new tokens, or 32 cut at the stop strings), rouge1_recall, rougeL_f1, rougeL_recall, and on verbmem
        exact_memorization, extraction_strength."""
        measured = done[work.texts["text"].key] if work.texts else {}
        if not work.prompt:
            return measured
        generation = done[work.prompt.key]
        # A leading blank line ends a KnowMem answer.
        generation = (cut_at_stop(generation) if part in MUSE_QUESTIONS else generation).strip()
        stemmer = self.options.protocol != "muse" if self.options.stemmer is None else self.options.stemmer
        found = metrics.rouge(work.row["ground_truth"], generation, stemmer)
        item: dict = {"prompt": work.prompt.text} | work.row | {"generation": generation}
        item |= {"rouge1_recall": found["rouge1"], "rougeL_f1": found["rouge_f1"], "rougeL_recall": found["rouge"]}
        return item | {name: measured[name] for name in metrics.MEMORIZATION if name in measured}

    def read_reference(self, path: str | Path) -> tuple[dict, str]:
        """path: a MUSE_EVAL.json or our log, or 'muse' for MUSE's constant."""
        if path == "muse":
            return {"mia_min_k": metrics.MUSE_RETRAIN_AUC[self.corpus]}, "MUSE's published constant of its retrained model"
        return logs.read_muse_retain(path), str(path)

    @staticmethod
    def summary(log: dict, reference: dict | None, where: str) -> tuple[dict, str]:
        """Writes MUSE_EVAL.json, MUSE_SUMMARY.json and MUSE.csv too."""
        scores = metrics.aggregate_muse(log["rows"], reference["mia_min_k"] if reference else None)
        if log["path"]:
            logs.save_muse(log["path"], log["rows"], scores)
        return scores | Muse.unscorable(log, "ground_truth"), where

    @staticmethod
    def samples(log: dict) -> dict[str, tuple[str, str, str]]:
        items = log["rows"]["forget_knowmem"].items()
        asked = {k: v["prompt"].rsplit("Question: ", 1)[1].removesuffix("\nAnswer: ") for k, v in items}
        return {k: (asked[k], v["ground_truth"], v["generation"]) for k, v in items}

    @staticmethod
    def shown(item: dict) -> tuple[float, str, dict[str, str]]:
        texts = {"prompt": item["prompt"][-200:], "reference": item["ground_truth"], "generation": item["generation"]}
        return item["rougeL_f1"], f"ROUGE-L F1 {item['rougeL_f1']:.3f}", texts

    @classmethod
    def headline(cls, summary: dict) -> str:
        verbmem, knowmem, utility, leak = cls.cells(summary, digits=1).values()
        return f"VerbMem {verbmem}, KnowMem {knowmem}, PrivLeak {leak}, utility {utility}"

    @staticmethod
    def cells(summary: dict, digits: int = 2) -> dict[str, str]:
        row = logs.muse_csv_row("", summary)  # MUSE's scale, x 100
        labels = {"VerbMem, forget": "verbmem_f", "KnowMem, forget": "knowmem_f", "KnowMem, retain (utility)": "knowmem_r",
                  "PrivLeak": "privleak"}  # fmt: skip
        return {label: "-" if row[key] is None else f"{row[key]:.{digits}f}" for label, key in labels.items()}
