"""Data: rows of questions, prompt formats, tokenised examples, batches and their order. The sets: tofu.py, muse.py, toy.py.

Everything is keyed by the row's place in its data set ("tofu_forget10/12"), because question texts repeat.
"""

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
import torch
from torch import Tensor

import files
from attention import Packing, lay
from gpu import onto
from hub import TOKENIZER_FILES, again, check_link, fetch

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


OWN_FILE = re.compile(r"\.(jsonl?|csv|parquet)\s*($|[\[+])", re.I)  # in the name of a data set of one's own, maybe sliced
OWN_COLUMNS = ("question", "answer")


def parse_rows(path: Path, key: str) -> list[Row]:
    """Rows of a file: JSON Lines or a JSON array, or by the end of its name CSV with a header line or Parquet. Raises
    DataError naming file and row for what is broken, a missing or empty field."""
    kind = path.suffix.lower()
    rows = csv_rows(path) if kind == ".csv" else parquet_rows(path, OWN_COLUMNS) if kind == ".parquet" else json_rows(path)
    if not rows:
        raise DataError(f"{path}: holds no rows; {again(path)}")
    return [_row(raw, f"{key}/{i}", place) for i, (place, raw) in enumerate(rows)]


def json_rows(path: Path, what: str = "object") -> list[tuple[str, Any]]:
    """(place, value) of each element of a JSON array, or of each line that is not blank."""
    text, values = files.read_text(path, DataError), []
    whole = text.lstrip()[:1] == "["
    # Not splitlines(): JSON texts may hold U+2028, U+0085 and others of its line ends as they are.
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for place, piece in [(str(path), text)] if whole else lines:
        try:
            values.append((place, files.parse_json(piece)))
        except ValueError as e:
            told = f"broken JSON ({files.first_line(e)}); expected one {what} per line, or an array of them"
            raise DataError(f"{place}: {told}") from None
    return [(f"{path}, element {i}", value) for i, value in enumerate(values[0][1], 1)] if whole else values


def csv_rows(path: Path) -> list[tuple[str, Any]]:
    """(place, {column: text}) of a table with commas, whose first line names the columns."""
    try:
        table = csv.reader(io.StringIO(files.read_text(path, DataError), newline=""), strict=True)
        columns = next(table, [])
        if lost := [c for c in OWN_COLUMNS if c not in columns]:
            raise DataError(f"{path}: column '{lost[0]}' is missing; the first line is {','.join(columns)[:80]!r}")
        rows = [(f"{path}, line {table.line_num}", cells) for cells in table if cells]
    except csv.Error as e:
        raise DataError(f"{path}, line {table.line_num}: broken CSV ({e}); put texts in double quotes") from None
    if odd := next((place for place, cells in rows if len(cells) != len(columns)), None):
        raise DataError(f"{odd}: has not {len(columns)} cells, as the first line; put texts with commas in double quotes")
    return [(place, dict(zip(columns, cells, strict=True))) for place, cells in rows]


def parquet_rows(path: Path, columns: Sequence[str]) -> list[tuple[str, Any]]:
    """(place, {column: value}) of these columns. Raises DataError where one is missing."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"{path}: Parquet needs pyarrow: pip install -e '.[eval]', or place it as JSON") from None
    try:
        with parquet.ParquetFile(io.BytesIO(files.read_bytes(path, DataError))) as file:
            if lost := [c for c in columns if c not in file.schema_arrow.names]:
                raise DataError(f"{path}: column '{lost[0]}' is missing; {again(path)}")
            rows = file.read(columns=list(columns)).to_pylist()
    except (ArrowException, OSError, ValueError, OverflowError) as e:  # the last of dates beyond Python's
        raise DataError(f"{path}: not a readable Parquet file ({files.first_line(e)}); {again(path)}") from None
    return [(f"{path}, row {i}", row) for i, row in enumerate(rows)]


def _row(raw: Any, key: str, place: str) -> Row:
    if not isinstance(raw, dict):
        raise DataError(f"{place}: expected a JSON object with 'question' and 'answer'")
    for field in OWN_COLUMNS:
        if not is_text(raw.get(field)):
            raise DataError(f"{place}: key '{field}' is missing or no text")
    paraphrase, perturbed = raw.get("paraphrased_answer"), raw.get("perturbed_answer", [])
    if paraphrase is not None and not is_text(paraphrase):
        raise DataError(f"{place}: key 'paraphrased_answer' is no text")
    perturbed = [perturbed] if isinstance(perturbed, str) else perturbed
    if not isinstance(perturbed, list) or not all(map(is_text, perturbed)):
        raise DataError(f"{place}: key 'perturbed_answer' is no list of texts")
    return Row(key, raw["question"], raw["answer"], paraphrase, tuple(perturbed))


def read_lines(path: Path, remedy: str) -> list[str]:
    """Texts, one a line that is not blank, or as JSON: an array or lines of strings. Raises DataError for other JSON, and
    for none at all."""
    lines = [line.strip() for line in files.read_text(path, DataError, remedy).split("\n") if line.strip()]
    if lines and (lines[0][0] in "[{" or all(line[0] == line[-1] == '"' for line in lines)):
        found = json_rows(path, "string")
        if wrong := next((place for place, value in found if not is_text(value)), None):
            raise DataError(f"{wrong}: expected a string that is not blank; {remedy}")
        lines = [value.strip() for _, value in found]
    if not lines:
        raise DataError(f"{path}: holds no line; {remedy}")
    return lines


def is_text(value: object) -> bool:
    """More than white space, and no lone surrogate: JSON can spell one, and no tokenizer takes it."""
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)


SLICE = re.compile(r"(?P<name>.+?)(?:\[(?P<lo>-?\d{1,9}%?)?:(?P<hi>-?\d{1,9}%?)?\])?", re.ASCII)


def own_path(name: str) -> Path | None:
    """The file of one's own that a data set's name is, if it is one."""
    return Path(os.path.expanduser(name)) if OWN_FILE.search(name) else None


def split_spec(spec: str) -> list[tuple[str, str | None, str | None]]:
    """'tofu_retain95[:300]+tofu_forget05' -> [(name, low, high), ...]: the slice notation of the `datasets` library
    (absolute rows, negative ones, or percent). A file of one's own that is there may have + and [ in its name. Raises
    DataError for anything else."""
    parts, pieces = [], spec.split("+")
    while pieces:
        for count in range(len(pieces), 0, -1):
            match = SLICE.fullmatch("+".join(pieces[:count]).strip())
            own = own_path(match["name"]) if match else None
            if match and (own and own.is_file() or count == 1 and not set(match["name"]) & set("[]")):
                break
        else:
            raise DataError(f"data set {spec!r}: {pieces[0]!r} is not of the form NAME, NAME[10:20], NAME[:10%] or A+B")
        parts.append((match["name"], match["lo"], match["hi"]))
        del pieces[:count]
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
    path = fetch(repo, [name], DataError, remedy, "dataset") / name
    if not path.exists():
        raise DataError(f"{repo}/{name}: not on the hub, or not in its cache while the hub is out of reach; {remedy}")
    return path


def fingerprint(rows: Sequence) -> str:
    """16 hex digits that change with any text of the rows, documents or JSON values, or with their order."""
    text = json.dumps([vars(r) if isinstance(r, Row) else r for r in rows], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PromptFormat:
    """Text around a question and its answer. `{bos}` and `{eos}` are the tokenizer's; special tokens are written out."""

    prompt: str  # holds {question}; generation starts after it
    answer: str  # holds {answer}
    end: str  # the one token that ends an answer and is labelled
    mark: str  # by which the family's chat templates are known
    special: tuple[str, ...] = ()
    trim: bool = False  # the family's own template strips question and answer


PROMPT_FORMATS = {
    # No space after [/INST]: TOFU's authors' format, in which the published checkpoints were trained.
    "llama2": PromptFormat("{bos}[INST] {question} [/INST]", "{answer}", "{eos}", "[INST]"),
    # The date that open-unlearning pins, so that prompts equal those of its published logs.
    "llama3": PromptFormat(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 10 Apr 2025\n\nYou are a helpful assistant.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "{question}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "{answer}", "<|eot_id|>", "<|start_header_id|>",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), trim=True,
    ),
    "smollm2": PromptFormat(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
        "{answer}", "<|im_end|>", "<|im_start|>", ("<|im_start|>", "<|im_end|>"),
    ),
    # For models without a chat format; the space belongs to the answer, so that the border falls between tokens.
    "plain": PromptFormat("{bos}Question: {question}\nAnswer:", " {answer}", "{eos}", "Question: "),
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


TOKEN = files.Field((str, dict), required=False, null=True, fields={"content": files.Field(str)})
TOKENIZER_FIELDS = {
    "bos_token": TOKEN, "eos_token": TOKEN, "add_prefix_space": files.Field(bool, required=False, null=True),
    "chat_template": files.Field((str, list, dict), required=False, null=True),
    "added_tokens_decoder": files.Field(dict, required=False, items=files.Field(dict)),
}  # fmt: skip
# What a process of its own does with a tokenizer before this one loads it: the library may panic, abort, hang, or take all
# memory. Limits: 2 GiB, a few seconds of computing, 16 tokens per byte.
PROBE = """
import json, resource, sys
packages, seconds, texts = json.loads(sys.argv[1])
for what, limit in (("AS", 2**31), ("CPU", seconds), ("CORE", 0)):
    resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (limit, limit))
sys.path.insert(0, packages)
import tokenizers
tokenizer = tokenizers.Tokenizer.from_buffer(sys.stdin.buffer.read())
tokenizer.no_padding()
for text in texts:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.decode(ids)
    assert len(ids) <= 16 * len(text.encode()), f"makes {len(ids)} tokens of {text[:20]!r}..."
"""


@lru_cache(maxsize=64)
def tokenizer_fault(content: bytes) -> str:
    """What the library does with a tokenizer.json that it should not, or ''. It is tried on letters, digits and signs, one
    by one, and on every prompt format; other texts may still be too much for it."""
    signs = [chr(i) for i in range(32, 127)] + ["\n\n", "\u00df", "\u5317", "\U0001f642"]
    texts = ["".join(signs), *signs, *(f.prompt + f.answer for f in PROMPT_FORMATS.values())]
    asked = json.dumps([str(Path(tokenizers.__file__).parent.parent), 2 + len(content) // 2**21, texts])
    one_thread = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-I", "-S", "-c", PROBE, asked]
    done = subprocess.run(command, input=content, capture_output=True, env=os.environ | one_thread)
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    died = f"the tokenizers library takes too long, or dies on it with status {done.returncode}"
    return lines[-1][:200] if lines else died


def steps_of(component: Any) -> list[dict]:
    """The steps of a normaliser or pre-tokeniser, as tokenizer.json has them."""
    state = json.loads(component.__getstate__())
    return state.get("normalizers") or state.get("pretokenizers") or [state]


class Tokenizer:
    """A `tokenizers` tokenizer with a prompt format. Texts are encoded as text: a question that spells a special token
    does not become one. No template code from a checkpoint is executed."""

    def __init__(self, folder: str | Path, vocab_size: int | None = None, prompt: str = "auto"):
        """vocab_size: rows of the embedding. prompt: a key of PROMPT_FORMATS, or 'auto' to recognise the family. Raises
        DataError for missing or broken files, an unknown format or template, a vocabulary larger than the embedding, and
        settings that transformers would tokenise otherwise with."""
        self.folder, self.path = Path(folder), Path(folder) / "tokenizer.json"
        if not self.path.exists():
            raise DataError(f"{self.path}: no such file; a fast tokenizer is needed (--tokenizer FOLDER_OR_HUB_ID)")
        for file in (self.folder / name for name in TOKENIZER_FILES):
            check_link(file, DataError)
        content = files.read_bytes(self.path, DataError, again(self.path), limit=2**27)
        if fault := tokenizer_fault(content):
            raise DataError(f"{self.path}: not a usable tokenizer ({fault}); {again(self.path)}")
        self.tokenizer = tokenizers.Tokenizer.from_buffer(content)
        self.config: dict = {}
        for name in TOKENIZER_FILES[2:0:-1]:
            if (file := self.folder / name).exists():
                self.config |= files.read_json(file, DataError, again(file), fields=TOKENIZER_FIELDS)
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
        self._check_settings()
        if self.format_name == "plain" and self.config.get("bos_token") is None:
            self.format = dataclasses.replace(self.format, prompt=self.format.prompt.removeprefix("{bos}"))
        self.eos_id = self._id(self.format.end)
        date = re.search(r"Today Date: (.+)", self.format.prompt)
        self.date = date[1] if date else None  # that the prompt tells the model
        self.borders_split = 0  # how many times `encode` encoded a prompt and its answer apart

    def _recognise(self) -> str:
        """The family of the chat template; without one, of the vocabulary."""
        template, vocab = str(self.config.get("chat_template") or ""), self.tokenizer.get_vocab(True)
        if (path := self.folder / "chat_template.jinja").exists():  # where transformers 5 writes it
            template += files.read_text(path, DataError, again(path))
        if template.strip():
            if known := [name for name, f in PROMPT_FORMATS.items() if f.mark in template]:
                return known[0]
            how = f"choose with --prompt: {', '.join(PROMPT_FORMATS)}"
            raise DataError(f"{self.folder}: its chat template is none of those known here; {how}")
        if "<|start_header_id|>" in vocab and "<|eot_id|>" in vocab:
            return "llama3"
        return "smollm2" if "<|im_start|>" in vocab else "plain"

    def _check_settings(self) -> None:
        """Raises DataError where tokenizer_config.json has transformers make other tokens than tokenizer.json says."""
        path, t = self.folder / "tokenizer_config.json", self.tokenizer
        steps = [step for component in (t.normalizer, t.pre_tokenizer) if component for step in steps_of(component)]
        schemes = [step.get("prepend_scheme") for step in steps]
        prefix = any(step.get("add_prefix_space") or step["type"] == "Prepend" for step in steps)
        prefix = prefix or "always" in schemes or "first" in schemes
        # transformers' default is False for byte-level tokenizers, what tokenizer.json says for others.
        default = prefix and all(step["type"] != "ByteLevel" for step in steps)
        declared = self.config.get("add_prefix_space")
        if prefix != (default if declared is None else declared):
            what = f"add_prefix_space is {str(bool(declared)).lower()}, tokenizer.json says the opposite"
            raise DataError(f"{path}: {what}, so that tokens depend on who reads them; change one of them")
        if self.format.special and "first" in schemes:
            what = f"prepend_scheme 'first' puts no space behind the special tokens of the {self.format_name} format"
            raise DataError(f"{self.path}: {what}, which is not implemented; choose another --prompt")
        if getattr(t.model, "dropout", None):
            raise DataError(f"{self.path}: dropout {t.model.dropout} leaves merges out at random; set it to null")
        if self.config.get("bos_token") is None and (front := self._call(t.encode, "").tokens):
            raise DataError(f"{path}: key 'bos_token' is missing, yet tokenizer.json adds {front[0]!r}; write it there")
        own = {str(i): token for i, token in t.get_added_tokens_decoder().items()}
        for i, token in self.config.get("added_tokens_decoder", {}).items():
            if not token.get("special") and any(
                getattr(own.get(i), k, None) != v for k, v in token.items() if k != "special"
            ):
                what = f"added token {i} ({token.get('content')!r}) is not tokenizer.json's"
                raise DataError(f"{path}: {what}, so that tokens depend on who reads them; save the tokenizer again")

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

    def _call(self, function: Callable[..., Any], *args, **kwargs):
        """Raises DataError for whatever the library does not take, also where it panics."""
        try:
            return function(*args, **kwargs)
        except BaseException as e:
            if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
                raise
            raise DataError(f"{self.path}: cannot tokenise a text ({files.first_line(e)}); {again(self.path)}") from None

    def _ids(self, text: str) -> list[int]:
        return self._call(self.tokenizer.encode, text, add_special_tokens=False).ids

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
        return self._call(self.tokenizer.decode, list(ids), skip_special_tokens=True)


@dataclass(frozen=True)
class Batch:
    """Examples for teacher forcing, packed back to back in one row of N tokens. A times one predicts an answer token."""

    input_ids: Tensor  # [1, N] int64, everything but each example's last token
    positions: Tensor  # [1, N] int64, 0, 1, ... anew for each example
    at: Tensor  # [A] int64, where in N the next token is an answer token, of one example after the other
    targets: Tensor  # [A] int64, those answer tokens
    memory: Tensor  # [A] bool, the memory positions; all, where an example has none marked
    packing: Packing  # of the N
    answer_lengths: tuple[int, ...]  # of each example, their sum is A

    def to(self, device: str | torch.device) -> "Batch":
        moved: dict = {k: onto(x, device) for k, x in vars(self).items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, packing=self.packing.to(device), **moved)

    @property
    def inputs(self) -> dict:
        """Arguments of the model."""
        return {k: getattr(self, k) for k in ("input_ids", "at", "positions", "packing")}


def pack(examples: Sequence[Example], hidden_id: int | None = None, share: bool = True) -> Batch:
    """hidden_id: a token of the prompts that is left out, its position too, so that no later token sees it.
    share: as of `lay`."""
    # Positions that are read, of each example: all but the last, which is only predicted.
    read = [[*zip(e.ids[:-1], itertools.count(), strict=False)] for e in examples]
    if hidden_id is not None:
        read = [
            [x for x in own if x[0] != hidden_id or x[1] >= e.prompt_length - 1]
            for own, e in zip(read, examples, strict=True)
        ]
    tokens, rows, packing = lay(read, share)
    answers, integers = tuple(e.answer_length for e in examples), partial(torch.tensor, dtype=torch.int64)
    ids, positions = zip(*tokens, strict=True)
    return Batch(
        integers([ids]),
        integers([positions]),
        integers([row for own, n in zip(rows, answers, strict=True) for row in own[len(own) - n :]]),
        integers([t for e in examples for t in e.ids[e.prompt_length :]]),
        torch.tensor([m for e in examples for m in e.memory or (True,) * e.answer_length], dtype=torch.bool),
        packing,
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
