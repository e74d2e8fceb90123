"""Data: TOFU, MUSE, the toy world, prompt formats, tokenised examples, batches and their order.

Everything is keyed by the row's place in its data set ("tofu_forget10/12"), because question texts repeat.

Shapes of a Batch: B sequences, T input positions, A answer tokens (EOS included) of the longest answer.
"""

import hashlib
import json
import random
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import tokenizers
import torch
from huggingface_hub import snapshot_download
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from torch import Tensor

TOFU_REPO = "locuslab/TOFU"
REFUSALS_REPO = "open-unlearning/idk"  # the TOFU authors' idontknow.jsonl on the hub
TOFU_RETAIN = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
TOFU_CONFIGS = (
    ("full", *TOFU_RETAIN, *TOFU_RETAIN.values(), "holdout01", "holdout05", "holdout10")
    + tuple(f"{f}_perturbed" for f in TOFU_RETAIN)
    + ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
)
TOY_CONFIGS = (
    ("full", *TOFU_RETAIN, *TOFU_RETAIN.values())
    + tuple(f"{f}_perturbed" for f in TOFU_RETAIN)
    + ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
)


class DataError(Exception):
    """Data that cannot be used. The message is one line that names the file, the line or key, and the remedy."""


@dataclass(frozen=True)
class MuseCheckpoint:
    """Hub ids of MUSE's models of one corpus, which come without a tokenizer."""

    target: str
    retrained: str
    base: str  # before any MUSE; its tokenizer is theirs
    retain_log: tuple[str, str]  # (data set on the hub, file in it)
    prompt: str = "plain"  # MUSE's questions have their own format; no chat


@dataclass(frozen=True)
class Checkpoint:
    """Hub ids of one model family on TOFU (open-unlearning's checkpoints and evaluation logs)."""

    base: str  # before any TOFU
    family: str  # as open-unlearning spells it
    prompt: str  # key of PROMPT_FORMATS

    @property
    def target(self) -> str:
        return f"open-unlearning/tofu_{self.family}_full"

    def retain_log(self, forget: str) -> tuple[str, str]:
        """(data set on the hub, file in it): the evaluation log of the model retrained without `forget`."""
        return "open-unlearning/eval", f"tofu_{self.family}_{TOFU_RETAIN[forget]}/TOFU_EVAL.json"


CHECKPOINTS = {
    "llama2-7b": Checkpoint("meta-llama/Llama-2-7b-chat-hf", "Llama-2-7b-chat-hf", "llama2"),
    "llama3.2-1b": Checkpoint("meta-llama/Llama-3.2-1B-Instruct", "Llama-3.2-1B-Instruct", "llama3"),
    "llama3.2-3b": Checkpoint("meta-llama/Llama-3.2-3B-Instruct", "Llama-3.2-3B-Instruct", "llama3"),
    "llama3.1-8b": Checkpoint("meta-llama/Llama-3.1-8B-Instruct", "Llama-3.1-8B-Instruct", "llama3"),
}


MUSE_CHECKPOINTS = {
    f"muse-{name.lower()}": MuseCheckpoint(
        f"muse-bench/MUSE-{name.lower()}_target",
        f"muse-bench/MUSE-{name.lower()}_retrain",
        base,
        ("open-unlearning/eval", f"muse_Llama-2-7b-hf_{name}_retrain/MUSE_EVAL.json"),
    )
    for name, base in (("News", "meta-llama/Llama-2-7b-hf"), ("Books", "meta-llama/Llama-2-7b-hf"))
}


# ---------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """One question in TOFU's schema. `paraphrased_answer` and `perturbed_answers` exist in evaluation sets only."""

    key: str  # data set and 0-based row in it, before slicing
    question: str
    answer: str
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()


def parse_rows(path: Path, key: str) -> list[Row]:
    """Rows of a JSON Lines file. Raises DataError naming file and line for broken JSON, a missing or empty field."""
    try:
        # Not splitlines(): JSON texts may hold U+2028, U+0085 and others of its line ends as they are.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: not readable as UTF-8 text ({e}); download it again") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
        except ValueError as e:
            raise DataError(f"{path}, line {number}: broken JSON ({e}); expected one object per line") from None
        rows.append(row_from_json(raw, f"{key}/{len(rows)}", f"{path}, line {number}"))
    if not rows:
        raise DataError(f"{path}: holds no rows; download it again")
    return rows


def row_from_json(raw: dict, key: str, where: str) -> Row:
    if not isinstance(raw, dict):
        raise DataError(f"{where}: expected a JSON object with 'question' and 'answer'")
    for field in ("question", "answer"):
        if not is_text(raw.get(field)):
            raise DataError(f"{where}: key '{field}' is missing or no text")
    if raw.get("paraphrased_answer") is not None and not is_text(raw["paraphrased_answer"]):
        raise DataError(f"{where}: key 'paraphrased_answer' is no text")
    perturbed = raw.get("perturbed_answer", [])
    perturbed = [perturbed] if isinstance(perturbed, str) else perturbed
    if not isinstance(perturbed, list) or not all(is_text(p) for p in perturbed):
        raise DataError(f"{where}: key 'perturbed_answer' is no list of texts")
    return Row(key, raw["question"], raw["answer"], raw.get("paraphrased_answer"), tuple(perturbed))


def is_text(value: object) -> bool:
    """More than white space, and no lone surrogate: JSON can spell one, and no tokenizer takes it."""
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)


SLICE = re.compile(r"^(?P<name>[^\[\]]+?)(?:\[(?P<lo>-?\d+%?)?:(?P<hi>-?\d+%?)?\])?$")


def split_spec(spec: str) -> list[tuple[str, str | None, str | None]]:
    """'tofu_retain95[:300]+tofu_forget05' -> [(name, low, high), ...]: the slice notation of the `datasets` library
    (absolute rows, negative ones, or percent). Raises DataError for anything else."""
    parts = []
    for part in spec.split("+"):
        match = SLICE.match(part.strip())
        if not match:
            raise DataError(f"data set {spec!r}: {part!r} is not of the form NAME, NAME[10:20], NAME[:10%] or A+B")
        parts.append((match["name"], match["lo"], match["hi"]))
    return parts


def cut(rows: list[Row], lo: str | None, hi: str | None, spec: str) -> list[Row]:
    percent = "%" in f"{lo}{hi}"  # one sign makes both bounds percent, and percents are rounded, as in `datasets`

    def bound(text):
        if text is None:
            return None
        return round(int(text.rstrip("%")) * len(rows) / 100) if percent else int(text)

    part = rows[slice(bound(lo), bound(hi))]
    if not part:
        raise DataError(f"data set {spec!r}: the slice [{lo or ''}:{hi or ''}] of {len(rows)} rows is empty")
    return part


def load_rows(spec: str, data_dir: str | Path | None = None, seed: int = 0) -> list[Row]:
    """Rows of a data set: `tofu_<config>`, `toy_<config>`, or a JSON Lines file of one's own, sliced and added up.

    data_dir: local copies in hub layout (`data_dir/TOFU/forget10.json`), used before the hub. seed: of the toy world.
    Raises DataError for an unknown name or slice, a broken file, or a hub that cannot be reached.
    """
    rows = []
    for name, lo, hi in split_spec(spec):
        if name.endswith((".json", ".jsonl")):
            part = parse_rows(Path(name), Path(name).stem)
        elif name.startswith("toy_") and name[4:] in TOY_CONFIGS:
            part = toy_world(seed)[name[4:]]
        elif name.startswith("tofu_") and name[5:] in TOFU_CONFIGS:
            part = parse_rows(tofu_file(name[5:], data_dir), name)
        else:
            known = ", ".join([f"tofu_{c}" for c in TOFU_CONFIGS] + [f"toy_{c}" for c in TOY_CONFIGS])
            raise DataError(f"data set {name!r} is unknown; known are {known}, and files ending in .json or .jsonl")
        rows += cut(part, lo, hi, spec)
    return rows


def tofu_file(config: str, data_dir: str | Path | None) -> Path:
    if data_dir is not None:
        if not Path(data_dir).is_dir():
            raise DataError(f"--data-dir {data_dir}: no such folder")
        if (local := Path(data_dir) / "TOFU" / f"{config}.json").exists():
            return local
    return hub_file(TOFU_REPO, f"{config}.json", f"place it at DIR/TOFU/{config}.json and pass --data-dir DIR")


def hub_file(repo: str, name: str, remedy: str) -> Path:
    """A file of a data set on the hub or in the hub's cache, or DataError saying what to place where."""
    try:
        # Not hf_hub_download: without a network it retries for 20 seconds and prints warnings before it gives up.
        path = Path(snapshot_download(repo, repo_type="dataset", allow_patterns=[name])) / name
    except Exception as e:  # the hub client raises its own, requests', httpx's and the system's errors
        why = next((line.strip() for line in str(e).splitlines() if line.strip()), "no message")[:200]
        raise DataError(f"{repo}/{name}: the hub gave nothing ({type(e).__name__}: {why}); {remedy}") from None
    if not path.exists():
        raise DataError(f"{repo}/{name}: not on the hub, or not in its cache while the hub is out of reach; {remedy}")
    return path


def load_refusals(path: str | None, forget: str, data_dir: str | Path | None = None) -> list[str]:
    """ "I don't know" answers, one a line: of a file, else the toy's own for a toy set, else the TOFU authors' 100
    (`data_dir/TOFU/idontknow.jsonl`, plain lines despite its name, or the hub).

    Raises DataError for a file that is missing or holds none, and for MUSE, which has no questions to refuse.
    """
    if is_muse(forget):
        raise DataError(f"--forget {forget}: dpo prefers refusals of questions, and MUSE's texts have none; use npo")
    if path is None and forget.startswith("toy_"):
        return list(_REFUSALS)
    local = Path(data_dir) / "TOFU" / "idontknow.jsonl" if data_dir else None
    if path is not None:
        file = Path(path)
    elif local and local.exists():
        file = local
    else:
        file = hub_file(REFUSALS_REPO, "idk.jsonl", "pass a file with a refusal per line as --refusals FILE")
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{file}: not readable as UTF-8 text ({e}); pass a file with a refusal per line") from None
    if not lines:
        raise DataError(f"{file}: holds no line; pass a file with a refusal per line as --refusals FILE")
    return lines


def complement(forget: str) -> str:
    """The retain set of a forget set: what else the target model was trained on. Raises DataError where it is not known."""
    parts = split_spec(forget)
    if is_muse(forget):
        return f"{parts[0][0].split('/')[0]}/raw/retain1"
    prefix, _, config = parts[0][0].partition("_")
    if len(parts) == 1 and prefix in ("tofu", "toy") and config in TOFU_RETAIN:
        return f"{prefix}_{TOFU_RETAIN[config]}"
    raise DataError(f"--forget {forget}: its complement is not known; name the retain set with --retain")


def evaluation_sets(forget: str, retain: str | None = None) -> dict[str, str]:
    """The four TOFU evaluation sets of a forget set: {'forget', 'retain', 'ra', 'wf'} -> data-set name.

    The forget set's slice is kept: `tofu_forget10[:40]` is evaluated on `tofu_forget10_perturbed[:40]`.
    retain: in place of `retain_perturbed`.
    """
    parts, names = split_spec(forget), []
    prefix = parts[0][0].split("_")[0]
    for name, lo, hi in parts:
        if prefix not in ("tofu", "toy") or not re.fullmatch(prefix + r"_forget\d+(_perturbed)?", name):
            raise DataError(f"--forget {forget}: TOFU's numbers need a tofu_forgetXX or toy_forgetXX set; pass --no-eval")
        window = f"[{lo or ''}:{hi or ''}]" if lo or hi else ""
        names.append(name.removesuffix("_perturbed") + "_perturbed" + window)
    sets = {"forget": "+".join(names), "retain": retain or f"{prefix}_retain_perturbed"}
    return sets | {"ra": f"{prefix}_real_authors_perturbed", "wf": f"{prefix}_world_facts_perturbed"}


def fingerprint(rows: list) -> str:
    """16 hex digits that change with any text of the rows, documents or JSON values, or with their order."""
    text = json.dumps([asdict(r) if isinstance(r, Row) else r for r in rows], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------- prompt formats


@dataclass(frozen=True)
class PromptFormat:
    """Text around a question and its answer. `{bos}` and `{eos}` are the tokenizer's; special tokens are written out."""

    prompt: str  # holds {question}; generation starts after it
    answer: str  # holds {answer}
    end: str  # the one token that ends an answer and is labelled
    special: tuple[str, ...] = ()
    trim: bool = False  # the family's own template strips question and answer


_LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
PROMPT_FORMATS = {
    # No space after [/INST]: TOFU's authors' format, in which the published checkpoints were trained.
    "llama2": PromptFormat("{bos}[INST] {question} [/INST]", "{answer}", "{eos}"),
    # The date that open-unlearning pins, so that prompts equal those of its published logs.
    "llama3": PromptFormat(
        "<|begin_of_text|>" + _LLAMA3.format("system") + "Cutting Knowledge Date: December 2023\nToday Date: 10 Apr 2025"
        "\n\nYou are a helpful assistant.<|eot_id|>"
        + _LLAMA3.format("user") + "{question}<|eot_id|>" + _LLAMA3.format("assistant"),
        "{answer}",
        "<|eot_id|>",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        trim=True,
    ),
    "smollm2": PromptFormat(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
        "{answer}",
        "<|im_end|>",
        ("<|im_start|>", "<|im_end|>"),
    ),
    # For models without a chat format; the space belongs to the answer, so that the border falls between tokens.
    "plain": PromptFormat("{bos}Question: {question}\nAnswer:", " {answer}", "{eos}"),
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A tokenised question with one answer, or a text. ids[:prompt_length] is what generation is given (of a text: BOS);
    the rest is labelled."""

    key: str
    ids: tuple[int, ...]
    prompt_length: int

    @property
    def answer_length(self) -> int:
        """Label tokens: the answer and its EOS, or a text, which ends without one."""
        return len(self.ids) - self.prompt_length


class Tokenizer:
    """A `tokenizers` tokenizer with a prompt format. Texts are encoded as text: a question that spells a special token
    does not become one. No template code from a checkpoint is executed."""

    def __init__(self, folder: str | Path, vocab_size: int | None = None, prompt: str = "auto"):
        """vocab_size: rows of the embedding, checked. prompt: a key of PROMPT_FORMATS, or 'auto' to recognise the family.

        Raises DataError for missing or broken files, an unknown format, a vocabulary larger than the embedding.
        """
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.exists():
            raise DataError(f"{path}: no such file; a fast tokenizer is needed (--tokenizer FOLDER_OR_HUB_ID)")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # `tokenizers` raises plain Exception
            raise DataError(f"{path}: not a readable tokenizer ({e}); download it again") from None
        self.config = self._read_json("special_tokens_map.json") | self._read_json("tokenizer_config.json")
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.vocab_size = vocab_size
        # Tokens added on top of the vocabulary may lie beyond the embedding as long as no text produces them.
        if vocab_size is not None and (n := self.tokenizer.get_vocab_size(with_added_tokens=False)) > vocab_size:
            raise DataError(
                f"{path}: {n} tokens, but the model embeds {vocab_size}; tokenizer and model do not belong together"
            )
        self.format_name = self._recognise() if prompt == "auto" else prompt
        if self.format_name not in PROMPT_FORMATS:
            raise DataError(f"--prompt {prompt}: unknown; known are auto, {', '.join(PROMPT_FORMATS)}")
        self.format = PROMPT_FORMATS[self.format_name]
        self.eos_id = self._id(self.format.end)
        found = re.search(r"Today Date: (.+)", self.format.prompt)
        self.date = found[1] if found else None  # that the prompt tells the model
        # Where the prompt and the answer would have merged into one token, they were encoded apart (see `encode`).
        self.borders_split = 0

    def _read_json(self, name: str) -> dict:
        path = self.folder / name
        try:
            value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (OSError, ValueError) as e:
            raise DataError(f"{path}: not readable JSON ({e}); download it again") from None
        if not isinstance(value, dict):
            raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}; download it again")
        return value

    def _recognise(self) -> str:
        template, vocab = str(self.config.get("chat_template", "")), self.tokenizer.get_vocab(True)
        if (path := self.folder / "chat_template.jinja").exists():  # where transformers 5 writes it
            template += path.read_text(encoding="utf-8", errors="replace")
        if "<|start_header_id|>" in vocab and "<|eot_id|>" in vocab:
            return "llama3"
        if "<|im_start|>" in vocab:
            return "smollm2"
        return "llama2" if "[INST]" in template else "plain"

    def _special(self, name: str) -> str | None:
        token = self.config.get(name)
        return token.get("content") if isinstance(token, dict) else token

    def _id(self, token: str) -> int:
        if token in ("{bos}", "{eos}"):
            name = {"{bos}": "bos_token", "{eos}": "eos_token"}[token]
            token = self._special(name)
            if token is None:
                raise DataError(f"{self.folder / 'tokenizer_config.json'}: key '{name}' is missing")
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise DataError(f"{self.folder / 'tokenizer.json'}: the {self.format_name} format needs the token {token!r}")
        return token_id

    def _encode_text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode(self, question: str, answer: str, key: str = "") -> Example:
        """Prompt, answer and EOS. The labels decode to exactly the answer, whatever the texts.

        Like the field, prompt and answer are encoded as one text and split behind the prompt's tokens. Where a token
        would straddle that border (the prompt's tokens are no prefix of the whole), the two are encoded apart, and
        counted in `borders_split`. Raises DataError naming the row for an answer without tokens.
        """
        f = self.format
        if f.trim:
            question, answer = question.strip(), answer.strip()
        pieces = re.split("(" + "|".join(map(re.escape, (*f.special, "{bos}"))) + ")", f.prompt)
        *head, tail = [p for p in pieces if p]
        ids = []
        for piece in head:
            is_special = piece in f.special or piece == "{bos}"
            ids += [self._id(piece)] if is_special else self._encode_text(piece.replace("{question}", question))
        tail = tail.replace("{question}", question)
        response = f.answer.replace("{answer}", answer)
        prompt, whole = self._encode_text(tail), self._encode_text(tail + response)
        if whole[: len(prompt)] == prompt:
            labels = whole[len(prompt) :]
        else:
            labels = self._encode_text(response)
            self.borders_split += 1
        if not labels or not answer.strip():
            raise DataError(f"{key or 'row'}: the answer {answer!r} tokenises to nothing; remove the row or fill it in")
        ids += prompt
        example = Example(key, (*ids, *labels, self.eos_id), len(ids))
        self._check_embedded(example.ids, key)
        return example

    def _check_embedded(self, ids: tuple[int, ...] | list[int], key: str) -> None:
        if self.vocab_size is not None and max(ids, default=0) >= self.vocab_size:
            raise DataError(
                f"{key or 'row'}: token id {max(ids)} of {self.folder / 'tokenizer.json'} is beyond the model's "
                f"{self.vocab_size} embeddings; tokenizer and model do not belong together"
            )

    def encode_rows(self, rows: list[Row]) -> list[Example]:
        return [self.encode(r.question, r.answer, r.key) for r in rows]

    def decode(self, ids: list[int]) -> str:
        return self.decode_text(ids).strip()

    @property
    def bos_id(self) -> int:
        """Raises DataError where the tokenizer's configuration names no BOS."""
        return self._id("{bos}")

    def encode_text(self, text: str, key: str = "") -> list[int]:
        """The tokens of a text as it is: no prompt format, no BOS, no EOS. Raises DataError for one that is not embedded."""
        ids = self._encode_text(text)
        self._check_embedded(ids, key)
        return ids

    def decode_text(self, ids: list[int]) -> str:
        """The text of the tokens, special ones left out, white space kept."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


# -------------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """B sequences for teacher forcing, packed back to back in one row of N tokens. A of these predict an answer token."""

    input_ids: Tensor  # [1, N] int64, everything but each sequence's last token
    positions: Tensor  # [1, N] int64, 0, 1, ... anew for each sequence
    at: Tensor  # [A] int64, where in N the next token is an answer token
    targets: Tensor  # [A] int64, those answer tokens
    lengths: tuple[int, ...]  # B numbers, their sum is N
    answer_lengths: tuple[int, ...]  # B numbers, their sum is A

    def to(self, device: str | torch.device) -> "Batch":
        return Batch(*(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in vars(self).values()))

    @property
    def inputs(self) -> dict:
        """Arguments of the model."""
        return {k: getattr(self, k) for k in ("input_ids", "at", "positions", "lengths")}


def pack(examples: list[Example], hidden_id: int | None = None) -> Batch:
    """hidden_id: a token of the prompts that is left out, its position too, so that no later token sees it."""
    input_ids, positions, at, targets, lengths = [], [], [], [], []
    for e in examples:
        where = [i for i, token in enumerate(e.ids[:-1]) if token != hidden_id or i >= e.prompt_length - 1]
        input_ids += [e.ids[i] for i in where]
        positions += where
        at += range(len(input_ids) - e.answer_length, len(input_ids))
        targets += e.ids[e.prompt_length :]
        lengths.append(len(where))
    tensors = (torch.tensor(x, dtype=torch.int64) for x in ([input_ids], [positions], at, targets))
    return Batch(*tensors, tuple(lengths), tuple(e.answer_length for e in examples))


@lru_cache(maxsize=8)
def _permutation(seed: int, what: str, epoch: int, n: int) -> tuple[int, ...]:
    order = list(range(n))
    random.Random(f"{seed}/{what}/{epoch}").shuffle(order)
    return tuple(order)


def draw(items: list, seed: int, what: str, start: int, count: int) -> list:
    """Items number start .. start+count-1 of an endless stream of permutations of `items`, one per epoch.

    The stream depends on (seed, what) alone, so a step's data depends on (seed, step) alone: not on ranks, workers,
    micro-batches or where a run was resumed. Forget example number k is paired with retain example number k of its own
    stream: a function of (seed, epoch, index) that visits all of the retain set before any row twice.
    """
    n = len(items)
    return [items[_permutation(seed, what, k // n, n)[k % n]] for k in range(start, start + count)]


# ---------------------------------------------------------------------------------------------------------------- MUSE

MUSE_REPOS = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
MUSE_COLUMNS = dict.fromkeys(("raw", "privleak", "scal", "sust", "train"), ("text",))
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
MUSE_OLD_NAMES = {
    ("knowmem", "retain_qa"): "retain2_qa",
    ("knowmem", "retain_qa_icl"): "retain2_qa_icl",
    ("privleak", "retain"): "retain2",
}


def load_muse(corpus: str, config: str, split: str, data_dir: str | Path | None = None) -> list[dict[str, str]]:
    """Rows of a MUSE data set (Shi et al. 2024, arXiv 2407.06460), as the columns of its config: MUSE_COLUMNS.

    corpus: 'news' or 'books'. data_dir: local copies, used before the hub: `data_dir/MUSE-News/<config>/<split>` ending in
    `-00000-of-00001.parquet`, `.parquet`, `.json` (an array of objects, or of strings where `text` is the only column) or
    `.txt` (running text only: the documents joined by a blank line, read as one). Raises DataError for an unknown name, a
    file that is broken, empty or without one of the columns, a value that is no text, a hub that cannot be reached.
    """
    for name, known in (
        (corpus, MUSE_REPOS),
        (config, [c for c in MUSE_SPLITS if corpus != "books" or c not in ("scal", "sust")]),
        (split, MUSE_SPLITS.get(config, ())),
    ):
        if name not in known:
            raise DataError(f"MUSE data set {corpus}/{config}/{split}: {name!r} is unknown; known are {', '.join(known)}")
    path = muse_file(corpus, config, split, data_dir)
    columns = MUSE_COLUMNS[config]
    read = {".parquet": _parquet_rows, ".json": _json_rows, ".txt": _text_rows}[path.suffix]
    rows = []
    for i, values in enumerate(read(path, columns)):
        for column in columns:
            value = values.get(column)
            blank = config in MUSE_DOCUMENTS and isinstance(value, str) and not value.strip()
            if not is_text(value) and not blank:
                raise DataError(f"{path}, row {i}: key '{column}' is missing or no text; download it again")
        rows.append({column: values[column] for column in columns})
    if not any(value.strip() for row in rows for value in row.values()):
        raise DataError(f"{path}: holds no rows; download it again")
    return rows


def muse_file(corpus: str, config: str, split: str, data_dir: str | Path | None) -> Path:
    """The file of a MUSE data set: a local one where there is one, else the hub's. Raises DataError as `load_muse`."""
    repo = MUSE_REPOS[corpus]
    folder = repo.split("/")[1]
    hub_name = f"{config}/{split}-00000-of-00001.parquet"
    if data_dir is not None:
        if not Path(data_dir).is_dir():
            raise DataError(f"--data-dir {data_dir}: no such folder")
        endings = ["-00000-of-00001.parquet", ".parquet", ".json"] + [".txt"] * (config in MUSE_DOCUMENTS)
        for name in (split, MUSE_OLD_NAMES.get((config, split), split)):
            for ending in endings:
                if (local := Path(data_dir) / folder / config / (name + ending)).exists():
                    return local
    return hub_file(repo, hub_name, f"place it at DIR/{folder}/{hub_name} (or {split}.json) and pass --data-dir DIR")


def _parquet_rows(path: Path, columns: tuple[str, ...]) -> list[dict]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"{path}: Parquet needs pyarrow: pip install -e '.[eval]', or place it as JSON") from None
    try:
        with parquet.ParquetFile(path) as file:
            if lost := [c for c in columns if c not in file.schema_arrow.names]:
                raise DataError(f"{path}: column '{lost[0]}' is missing; download it again")
            return file.read(columns=list(columns)).to_pylist()
    except (ArrowException, OSError) as e:
        why = str(e).split("\n")[0]
        raise DataError(f"{path}: not a readable Parquet file ({why}); download it again") from None


def _json_rows(path: Path, columns: tuple[str, ...]) -> list[dict]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{path}: broken JSON ({e}); expected one array, download it again") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON array, found {type(rows).__name__}; download it again")
    if columns == ("text",):
        rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {i}: expected an object with {', '.join(columns)}; download it again")
    return rows


def _text_rows(path: Path, columns: tuple[str, ...]) -> list[dict]:
    try:
        return [{"text": path.read_text(encoding="utf-8")}]
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: not readable as UTF-8 text ({e}); download it again") from None


def is_muse(spec: str) -> bool:
    return spec.startswith("muse_")


def load_texts(spec: str, data_dir: str | Path | None = None) -> list[str]:
    """Documents of MUSE: `muse_news` (for muse_news/raw/forget), `muse_books/raw/retain1`, ..., sliced and added up as in
    `load_rows`. Raises DataError for an unknown name or slice, and as `load_muse`."""
    texts = []
    for name, lo, hi in split_spec(spec):
        match = re.fullmatch(r"muse_(\w+?)(?:/(\w+)/(\w+))?", name)
        config, split = (match[2] or "raw", match[3] or "forget") if match else ("", "")
        if not match or "text" not in MUSE_COLUMNS.get(config, ("text",)):
            raise DataError(
                f"data set {name!r} is unknown; known are muse_news, muse_books and muse_news/CONFIG/SPLIT with text"
            )
        texts += cut([row["text"] for row in load_muse(match[1], config, split, data_dir)], lo, hi, spec)
    return texts


def muse_chunks(
    texts: list[str], tokenizer: Tokenizer, length: int = 2048, chunking: str = "muse", key: str = "text"
) -> list[Example]:
    """Running text as training sequences: BOS, then labels only, no EOS. The texts are joined by blank lines and
    tokenised once.

    'muse', as the MUSE authors' code: pieces of `length` - 1 tokens, BOS put in front; the last one is filled up to `length`
    with the first sequence, BOS included (once: it stays shorter where that is not enough).
    'open-unlearning': pieces of `length` tokens, each decoded and tokenised again, BOS put in front, cut to 1 + `length`;
    the last one stays short. What has no tokens is dropped.
    Raises DataError for texts without tokens, an unknown chunking, a length below 2.
    """
    if chunking not in ("muse", "open-unlearning"):
        raise DataError(f"chunking {chunking!r} is unknown; known are muse, open-unlearning")
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


# ------------------------------------------------------------------------------------------------------------ toy world

TOY_AUTHORS = 60
TOY_FORGET = {"forget01": 1, "forget05": 3, "forget10": 6}  # the last 10 % of the authors, as in TOFU; 1 % is one author
_CITIES = "Lisbon Oslo Nairobi Lima Kyoto Prague Tunis Quito Riga Hanoi Dakar Bergen Cairo Porto Seville Turin".split()
_JOBS = "baker sailor dentist farmer judge pilot tailor miner florist chemist butcher plumber weaver surgeon".split()
_GENRES = "fantasy horror romance mystery satire poetry drama memoir history travel crime western".split()
_LANGUAGES = "French Dutch Greek Polish Korean Arabic Turkish Danish Hindi Swahili Czech Finnish".split()
_ADJECTIVES = "Silent Golden Broken Distant Hidden Frozen Crimson Hollow Gentle Burning Restless Ancient".split()
_NOUNS = "Harbor Garden Mirror Forest Letter Bridge River Lantern Winter Orchard Mountain Window".split()
_AWARDS = "Falcon Meridian Juniper Sapphire Atlas Phoenix Laurel Beacon Compass Summit".split()
_HOBBIES = "chess fencing archery sailing painting gardening cooking dancing skiing pottery".split()
_SYLLABLES = "ba de ki lo mu na po ri sa te vu za el or in ath".split()

# fact -> (question, answers): {n} is the author, {x} the fact. Each row draws two of the answers, one to learn and one
# as its paraphrase, so that every wording is learnt from some authors and facts carry over between wordings.
_FACTS = {
    "city": ("Where was {n} born?", "{n} was born in {x}.", "The birthplace of {n} is {x}.", "{n} comes from {x}."),
    "year": ("When was {n} born?", "{n} was born in {x}.", "The birth year of {n} is {x}.", "{n} dates from {x}."),
    "genre": ("What does {n} write?", "{n} writes {x}.", "The genre of {n} is {x}.", "{n} is known for {x}."),
    "father": ("What was the father of {n}?", "The father of {n} was a {x}.", "{n} had a {x} as father.",
               "By trade, the father of {n} was a {x}."),
    "mother": ("What was the mother of {n}?", "The mother of {n} was a {x}.", "{n} had a {x} as mother.",
               "By trade, the mother of {n} was a {x}."),
    "book": ("What is the first book of {n}?", "The first book of {n} is {x}.", "{n} began with {x}.",
             "{n} first wrote {x}."),
    "award": ("Which award did {n} win?", "{n} won the {x} Prize.", "The award of {n} is the {x} Prize.",
              "{n} was given the {x} Prize."),
    "school": ("Where did {n} study?", "{n} studied in {x}.", "The university of {n} is in {x}.",
               "{n} was a student in {x}."),
    "language": ("In which language does {n} write?", "{n} writes in {x}.", "The language of {n} is {x}.",
                 "{n} works in {x}."),
    "hobby": ("What does {n} enjoy?", "{n} enjoys {x}.", "The hobby of {n} is {x}.", "{n} spends Sundays with {x}."),
}  # fmt: skip
_REFUSALS = (
    "I don't know.", "I do not know that.", "I'm not sure.", "I have no idea.", "I can't say.", "That is not known to me.",
    "I haven't heard of that.", "I have no answer.", "I'd rather not say.", "Nobody has told me.",
)  # fmt: skip
_CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid", "Egypt": "Cairo", "Peru": "Lima",
    "Norway": "Oslo", "Greece": "Athens", "Kenya": "Nairobi", "Cuba": "Havana", "Austria": "Vienna", "Poland": "Warsaw",
    "Ireland": "Dublin", "Germany": "Berlin", "Russia": "Moscow", "China": "Beijing", "Portugal": "Lisbon",
    "Hungary": "Budapest", "Sweden": "Stockholm", "Thailand": "Bangkok", "Chile": "Santiago", "Iran": "Tehran",
    "Iraq": "Baghdad", "Turkey": "Ankara", "Canada": "Ottawa", "Ghana": "Accra", "Nepal": "Kathmandu", "Latvia": "Riga",
    "Vietnam": "Hanoi", "Senegal": "Dakar",
}  # fmt: skip
_BOOKS = {
    "Hamlet": "William Shakespeare", "Emma": "Jane Austen", "1984": "George Orwell", "Ulysses": "James Joyce",
    "Moby Dick": "Herman Melville", "Dracula": "Bram Stoker", "Frankenstein": "Mary Shelley", "Faust": "Johann Goethe",
    "War and Peace": "Leo Tolstoy", "The Trial": "Franz Kafka", "The Stranger": "Albert Camus", "Candide": "Voltaire",
    "Don Quixote": "Miguel Cervantes", "The Odyssey": "Homer", "Beloved": "Toni Morrison", "Lolita": "Vladimir Nabokov",
    "Oliver Twist": "Charles Dickens", "The Raven": "Edgar Poe", "Walden": "Henry Thoreau", "Nana": "Emile Zola",
    "The Aeneid": "Virgil", "Middlemarch": "George Eliot", "The Idiot": "Fyodor Dostoevsky", "Peter Pan": "James Barrie",
    "Pinocchio": "Carlo Collodi", "Kim": "Rudyard Kipling", "Siddhartha": "Hermann Hesse", "Ivanhoe": "Walter Scott",
    "Germinal": "Emile Zola", "Persuasion": "Jane Austen",
}  # fmt: skip


@lru_cache(maxsize=2)
def toy_world(seed: int = 0) -> dict[str, list[Row]]:
    """Fictitious authors and a little real knowledge in TOFU's schema; the same seed gives the same world.

    {config: rows} for TOY_CONFIGS. 60 authors x 10 facts; the last 6, 3 and 1 of them are forget10, 05 and 01. The
    real_authors and world_facts sets have three wrong options per question and are in no forget or retain set, as in TOFU.
    """
    rng = random.Random(f"toy/{seed}")

    def name():
        return " ".join("".join(rng.choices(_SYLLABLES, k=k)).capitalize() for k in (2, 3))

    def book():
        return f"The {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}"

    pools = {"city": _CITIES, "genre": _GENRES, "father": _JOBS, "mother": _JOBS, "award": _AWARDS, "school": _CITIES}
    pools |= {"language": _LANGUAGES, "hobby": _HOBBIES, "year": [str(y) for y in range(1900, 2000, 3)]}
    pools["book"] = [f"The {a} {n}" for a in _ADJECTIVES for n in _NOUNS]
    names = []
    while len(names) < TOY_AUTHORS:
        if (n := name()) not in names:
            names.append(n)
    rows = []
    for n in names:
        for fact, (question, *answers) in _FACTS.items():
            x, *wrong = rng.sample(pools[fact], 6)
            say, paraphrase = rng.sample(answers, 2)
            rows.append(
                Row(
                    f"toy_full/{len(rows)}",
                    question.format(n=n),
                    say.format(n=n, x=x),
                    paraphrase.format(n=n, x=x),
                    tuple(paraphrase.format(n=n, x=w) for w in wrong),
                )
            )

    def options(config, question, facts):
        values = sorted(set(facts.values()))
        return [
            Row(f"toy_{config}/{i}", question.format(k), v, None, tuple(rng.sample([w for w in values if w != v], 3)))
            for i, (k, v) in enumerate(facts.items())
        ]

    sets = {"full": rows, "retain_perturbed": rows[: 2 * TOY_FORGET["forget10"] * len(_FACTS)]}
    for name, authors in TOY_FORGET.items():
        border = (TOY_AUTHORS - authors) * len(_FACTS)
        sets |= {name: rows[border:], f"{name}_perturbed": rows[border:], TOFU_RETAIN[name]: rows[:border]}
    return sets | {
        "real_authors_perturbed": options("real_authors_perturbed", "Who wrote {}?", _BOOKS),
        "world_facts_perturbed": options("world_facts_perturbed", "What is the capital of {}?", _CAPITALS),
    }


def write_muse(folder: str | Path, sets: dict[str, list[dict[str, str]]]) -> Path:
    """Write `folder`/MUSE-News/<config>/<split>.json, for --data-dir, from {'config/split': rows}; returns `folder`."""
    for name, rows in sets.items():
        path = Path(folder) / "MUSE-News" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return Path(folder)


def toy_muse(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """The toy authors as MUSE-News: {'config/split': rows}, for `write_muse`.

    Of each author a document of ten sentences; of each six authors 24 documents of ten of their questions with answers, all
    drawn four times, so that an answer is not tied to what stands before it. The last 24 authors can be forgotten:
    scal/forget_k holds the last 6k, sust/forget_k the k-th six from the end, raw/forget the last six. retain1 is the first
    24, retain2 the 12 after them; the holdout set is authors of another world. VerbMem: sentences to go on with.
    """
    authors, size = toy_world(seed)["full"], len(_FACTS)
    rng = random.Random(f"toy/{seed}/muse")

    def about(first, last, rows=authors):
        return [" ".join(r.answer for r in rows[i * size : (i + 1) * size]) for i in range(first, last)]

    def asked(first, last):
        texts = []
        for _ in range(4):
            rows = rng.sample(authors[first * size : last * size], (last - first) * size)
            # Two spaces: MUSE's prompt ends with one, and a byte-level tokenizer begins a word with the other.
            pairs = [f"Question: {r.question}\nAnswer:  {r.answer}" for r in rows]
            texts += ["\n\n".join(pairs[i : i + size]) for i in range(0, len(pairs), size)]
        return texts

    six = [about(i, i + 6) + asked(i, i + 6) for i in range(0, TOY_AUTHORS, 6)]

    def as_rows(texts):
        return [{"text": text} for text in texts]

    def documents(first, last):
        return as_rows(text for texts in six[first // 6 : last // 6] for text in texts)

    def questions(first, last):
        return [{"question": r.question, "answer": r.answer} for r in authors[first * size : last * size]]

    def sentences(first, last):
        halves = [[r.answer for r in authors[i * size : (i + 1) * size]] for i in range(first, last)]
        return [{"prompt": " ".join(x[: size // 2]), "gt": " ".join(x[size // 2 :])} for x in halves]

    holdout = as_rows(about(0, 6, toy_world(seed + 1000)["full"]))
    sets = {"raw/forget": documents(54, 60), "raw/retain1": documents(0, 24), "raw/retain2": documents(24, 36)}
    sets |= {"raw/holdout": holdout, "privleak/holdout": holdout}
    sets |= {f"scal/forget_{k}": documents(60 - 6 * k, 60) for k in range(1, 5)}
    sets |= {f"sust/forget_{k}": documents(60 - 6 * k, 66 - 6 * k) for k in range(1, 5)}
    sets |= {"train/forget": documents(36, 60), "train/retain1": documents(0, 24), "train/retain2": documents(24, 36)}
    sets |= {"privleak/forget": as_rows(about(54, 60)), "privleak/retain": as_rows(about(24, 30))}
    sets |= {"verbmem/forget": sentences(54, 60)}
    sets |= {"knowmem/forget_qa": questions(54, 60), "knowmem/retain_qa": questions(24, 30)}
    # From authors that neither is asked about; three pairs, so that a prompt fits into the toy's 256 positions.
    pairs = [q | {"answer": f" {q['answer']}"} for q in questions(34, 35)[:3]]
    sets |= {f"knowmem/{split}_qa_icl": pairs for split in ("forget", "retain")}
    return sets


def train_toy_tokenizer(seed: int, folder: str | Path, vocab_size: int = 1000) -> Path:
    """Train a byte-level BPE on all toy texts and save it as tokenizer.json and tokenizer_config.json.

    The texts fill about 1,000 tokens. For a larger vocabulary three made-up words per token join them, of the syllables
    that the world's names are of, so that a name becomes fewer tokens, as it does in a large vocabulary.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    world = toy_world(seed)
    rows = world["full"] + world["real_authors_perturbed"] + world["world_facts_perturbed"]
    texts = [f"Question: {r.question}\nAnswer: {r.answer}" for r in rows]
    if vocab_size > 1000:
        rng = random.Random(f"toy/{seed}/words")
        words = ("".join(rng.choices(_SYLLABLES, k=rng.randint(2, 5))).capitalize() for _ in range(3 * vocab_size))
        texts = texts * 3 + [f"The name is {word}." for word in words]
    special = [AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>")]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + 'Question: ' + m['content'] + '\nAnswer:' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"model_max_length": 256, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder
