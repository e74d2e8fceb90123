"""Data: rows of questions, prompt formats, tokenised examples, batches and their order. The sets: tofu.py, muse.py, toy.py.

Everything is keyed by the row's place in its data set ("tofu_forget10/12"), because question texts repeat.
"""

import dataclasses
import hashlib
import itertools
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import tokenizers
import torch
from torch import Tensor

import files

T = TypeVar("T")


class DataError(files.UserError):
    """Data that cannot be used."""


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
    # Not splitlines(): JSON texts may hold U+2028, U+0085 and others of its line ends as they are.
    lines = enumerate(files.read_text(path, DataError).split("\n"), 1)
    filled = [(f"{path}, line {number}", line) for number, line in lines if line.strip()]
    if not filled:
        raise DataError(f"{path}: holds no rows; download it again")
    return [_row(line, f"{key}/{i}", place) for i, (place, line) in enumerate(filled)]


def _row(line: str, key: str, place: str) -> Row:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{place}: broken JSON ({e}); expected one object per line") from None
    if not isinstance(raw, dict):
        raise DataError(f"{place}: expected a JSON object with 'question' and 'answer'")
    for field in ("question", "answer"):
        if not is_text(raw.get(field)):
            raise DataError(f"{place}: key '{field}' is missing or no text")
    paraphrase, perturbed = raw.get("paraphrased_answer"), raw.get("perturbed_answer", [])
    if paraphrase is not None and not is_text(paraphrase):
        raise DataError(f"{place}: key 'paraphrased_answer' is no text")
    perturbed = [perturbed] if isinstance(perturbed, str) else perturbed
    if not isinstance(perturbed, list) or not all(map(is_text, perturbed)):
        raise DataError(f"{place}: key 'perturbed_answer' is no list of texts")
    return Row(key, raw["question"], raw["answer"], paraphrase, tuple(perturbed))


def is_text(value: object) -> bool:
    """More than white space, and no lone surrogate: JSON can spell one, and no tokenizer takes it."""
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)


SLICE = re.compile(r"^(?P<name>[^\[\]]+?)(?:\[(?P<lo>-?\d+%?)?:(?P<hi>-?\d+%?)?\])?$")


def split_spec(spec: str) -> list[tuple[str, str | None, str | None]]:
    """'tofu_retain95[:300]+tofu_forget05' -> [(name, low, high), ...]: the slice notation of the `datasets` library
    (absolute rows, negative ones, or percent). Raises DataError for anything else."""
    parts = []
    for part in spec.split("+"):
        if not (match := SLICE.match(part.strip())):
            raise DataError(f"data set {spec!r}: {part!r} is not of the form NAME, NAME[10:20], NAME[:10%] or A+B")
        parts.append((match["name"], match["lo"], match["hi"]))
    return parts


def cut(rows: list[T], lo: str | None, hi: str | None, spec: str) -> list[T]:
    """The slice [lo:hi] of `split_spec`. Raises DataError, naming the whole `spec`, where nothing is left."""
    first, last = (int(bound.rstrip("%")) if bound else None for bound in (lo, hi))
    if "%" in f"{lo}{hi}":  # one sign makes both bounds percent, and percents are rounded, as in `datasets`
        first, last = (None if bound is None else round(bound * len(rows) / 100) for bound in (first, last))
    if not (part := rows[first:last]):
        raise DataError(f"data set {spec!r}: the slice [{lo or ''}:{hi or ''}] of {len(rows)} rows is empty")
    return part


def hub_file(repo: str, name: str, remedy: str) -> Path:
    """A file of a data set on the hub or in the hub's cache, or DataError saying what to place where."""
    try:
        from huggingface_hub import snapshot_download

        # Not hf_hub_download: without a network it retries for 20 seconds and prints warnings before it gives up.
        path = Path(snapshot_download(repo, repo_type="dataset", allow_patterns=[name])) / name
    except Exception as e:  # the hub client raises its own, requests', httpx's and the system's errors
        why = f"{type(e).__name__}: {files.first_line(e)}"
        raise DataError(f"{repo}/{name}: the hub gave nothing ({why}); {remedy}") from None
    if not path.exists():
        raise DataError(f"{repo}/{name}: not on the hub, or not in its cache while the hub is out of reach; {remedy}")
    return path


def fingerprint(rows: Sequence) -> str:
    """16 hex digits that change with any text of the rows, documents or JSON values, or with their order."""
    text = json.dumps([dataclasses.asdict(r) if isinstance(r, Row) else r for r in rows], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PromptFormat:
    """Text around a question and its answer. `{bos}` and `{eos}` are the tokenizer's; special tokens are written out."""

    prompt: str  # holds {question}; generation starts after it
    answer: str  # holds {answer}
    end: str  # the one token that ends an answer and is labelled
    special: tuple[str, ...] = ()
    trim: bool = False  # the family's own template strips question and answer


PROMPT_FORMATS = {
    # No space after [/INST]: TOFU's authors' format, in which the published checkpoints were trained.
    "llama2": PromptFormat("{bos}[INST] {question} [/INST]", "{answer}", "{eos}"),
    # The date that open-unlearning pins, so that prompts equal those of its published logs.
    "llama3": PromptFormat(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 10 Apr 2025\n\nYou are a helpful assistant.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "{question}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "{answer}", "<|eot_id|>",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), trim=True,
    ),
    "smollm2": PromptFormat(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
        "{answer}", "<|im_end|>", ("<|im_start|>", "<|im_end|>"),
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
    memory: tuple[bool, ...] | None = dataclasses.field(default=None, compare=False)  # of each label, see memory.py

    @property
    def answer_length(self) -> int:
        """Label tokens: the answer and its EOS, or a text, which ends without one."""
        return len(self.ids) - self.prompt_length


class Tokenizer:
    """A `tokenizers` tokenizer with a prompt format. Texts are encoded as text: a question that spells a special token
    does not become one. No template code from a checkpoint is executed."""

    def __init__(self, folder: str | Path, vocab_size: int | None = None, prompt: str = "auto"):
        """vocab_size: rows of the embedding. prompt: a key of PROMPT_FORMATS, or 'auto' to recognise the family. Raises
        DataError for missing or broken files, an unknown format, a vocabulary larger than the embedding."""
        self.folder, self.path = Path(folder), Path(folder) / "tokenizer.json"
        if not self.path.exists():
            raise DataError(f"{self.path}: no such file; a fast tokenizer is needed (--tokenizer FOLDER_OR_HUB_ID)")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as e:  # `tokenizers` raises plain Exception
            raise DataError(f"{self.path}: not a readable tokenizer ({e}); download it again") from None
        self.config: dict = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (file := self.folder / name).exists():
                self.config |= files.read_json(file, DataError)
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.vocab_size = vocab_size
        # Tokens added on top of the vocabulary may lie beyond the embedding as long as no text produces them.
        if vocab_size is not None and (n := self.tokenizer.get_vocab_size(with_added_tokens=False)) > vocab_size:
            raise DataError(f"{self.path}: {n} tokens, but the model embeds {vocab_size}; the two do not belong together")
        self.format_name = self._recognise() if prompt == "auto" else prompt
        if self.format_name not in PROMPT_FORMATS:
            raise DataError(f"--prompt {prompt}: unknown; known are auto, {', '.join(PROMPT_FORMATS)}")
        self.format = PROMPT_FORMATS[self.format_name]
        self.eos_id = self._id(self.format.end)
        date = re.search(r"Today Date: (.+)", self.format.prompt)
        self.date = date[1] if date else None  # that the prompt tells the model
        self.borders_split = 0  # how many times `encode` encoded a prompt and its answer apart

    def _recognise(self) -> str:
        template, vocab = str(self.config.get("chat_template", "")), self.tokenizer.get_vocab(True)
        if (path := self.folder / "chat_template.jinja").exists():  # where transformers 5 writes it
            template += path.read_text(encoding="utf-8", errors="replace")
        if "<|start_header_id|>" in vocab and "<|eot_id|>" in vocab:
            return "llama3"
        if "<|im_start|>" in vocab:
            return "smollm2"
        return "llama2" if "[INST]" in template else "plain"

    def _id(self, token: str) -> int:
        if token in ("{bos}", "{eos}"):
            name = f"{token[1:4]}_token"
            special = self.config.get(name)
            special = special.get("content") if isinstance(special, dict) else special
            if not isinstance(special, str):
                raise DataError(
                    f"{self.folder / 'tokenizer_config.json'}: key '{name}' is missing or no text; write it there"
                )
            token = special
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise DataError(f"{self.path}: the {self.format_name} format needs the token {token!r}")
        return token_id

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode(self, question: str, answer: str, key: str = "") -> Example:
        """Prompt, answer and EOS. The labels decode to exactly the answer, whatever the texts.

        Like the field, prompt and answer are encoded as one text and split behind the prompt's tokens. Where a token would
        straddle that border, the two are encoded apart and counted. Raises DataError naming the row for an empty answer.
        """
        f = self.format
        if f.trim:
            question, answer = question.strip(), answer.strip()
        special = (*f.special, "{bos}")
        *head, tail = filter(None, re.split("(" + "|".join(map(re.escape, special)) + ")", f.prompt))
        ids: list[int] = []
        for piece in head:
            ids += [self._id(piece)] if piece in special else self._ids(piece.replace("{question}", question))
        tail, response = tail.replace("{question}", question), f.answer.replace("{answer}", answer)
        prompt, whole = self._ids(tail), self._ids(tail + response)
        if whole[: len(prompt)] == prompt:
            labels = whole[len(prompt) :]
        else:
            labels = self._ids(response)
            self.borders_split += 1
        if not labels or not answer.strip():
            raise DataError(f"{key or 'row'}: the answer {answer!r} tokenises to nothing; remove the row or fill it in")
        ids += prompt
        example = Example(key, (*ids, *labels, self.eos_id), len(ids))
        self._check_embedded(example.ids, key)
        return example

    def _check_embedded(self, ids: tuple[int, ...] | list[int], key: str) -> None:
        if self.vocab_size is not None and max(ids, default=0) >= self.vocab_size:
            what = f"{key or 'row'}: token id {max(ids)} of {self.path} is beyond the model's {self.vocab_size} embeddings"
            raise DataError(f"{what}; the two do not belong together")

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
        ids = self._ids(text)
        self._check_embedded(ids, key)
        return ids

    def decode_text(self, ids: list[int]) -> str:
        """The text of the tokens, special ones left out, white space kept."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


@dataclass(frozen=True)
class Batch:
    """B sequences for teacher forcing, packed back to back in one row of N tokens. A of these predict an answer token."""

    input_ids: Tensor  # [1, N] int64, everything but each sequence's last token
    positions: Tensor  # [1, N] int64, 0, 1, ... anew for each sequence
    at: Tensor  # [A] int64, where in N the next token is an answer token
    targets: Tensor  # [A] int64, those answer tokens
    memory: Tensor  # [A] bool, the memory positions; all, where an example has none marked
    lengths: tuple[int, ...]  # B numbers, their sum is N
    answer_lengths: tuple[int, ...]  # B numbers, their sum is A

    def to(self, device: str | torch.device) -> "Batch":
        moved: dict = {k: x.to(device, non_blocking=True) for k, x in vars(self).items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, **moved)

    @property
    def inputs(self) -> dict:
        """Arguments of the model."""
        return {k: getattr(self, k) for k in ("input_ids", "at", "positions", "lengths")}


def pack(examples: Sequence[Example], hidden_id: int | None = None) -> Batch:
    """hidden_id: a token of the prompts that is left out, its position too, so that no later token sees it."""
    # Positions that are read, of each example: all but the last, which is only predicted.
    read = [[i for i, t in enumerate(e.ids[:-1]) if t != hidden_id or i >= e.prompt_length - 1] for e in examples]
    lengths, answers = tuple(map(len, read)), tuple(e.answer_length for e in examples)
    integers = partial(torch.tensor, dtype=torch.int64)
    return Batch(
        integers([[e.ids[i] for e, positions in zip(examples, read, strict=True) for i in positions]]),
        integers([list(itertools.chain(*read))]),
        integers([i for end, a in zip(itertools.accumulate(lengths), answers, strict=True) for i in range(end - a, end)]),
        integers([t for e in examples for t in e.ids[e.prompt_length :]]),
        torch.tensor([m for e in examples for m in e.memory or (True,) * e.answer_length], dtype=torch.bool),
        lengths,
        answers,
    )


@lru_cache(maxsize=8)
def _permutation(seed: int, what: str, epoch: int, n: int) -> tuple[int, ...]:
    order = list(range(n))
    random.Random(f"{seed}/{what}/{epoch}").shuffle(order)
    return tuple(order)


def draw(items: Sequence[T], seed: int, what: str, start: int, count: int) -> list[T]:
    """Items number start .. start+count-1 of an endless stream of permutations of `items`, one per epoch.

    The stream depends on (seed, what) alone, so a step's data depends on (seed, step) alone: not on ranks, workers,
    micro-batches or where a run was resumed. Forget example number k is paired with retain example number k of a stream
    of its own, which visits all of the retain set before any row twice.
    """
    n = len(items)
    return [items[_permutation(seed, what, k // n, n)[k % n]] for k in range(start, start + count)]
