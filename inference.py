"""What every benchmark does alike: find its files, run a model over texts, keep what came of it, print it.

tofu.py and muse.py say what is asked, as subclasses of `Benchmark`: for each row a `Text` to score, with what is measured of
it, a `Prompt` to continue, or both.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import distributed
import files
import logs
from data import DataError, Example, Tokenizer, fingerprint, hub_file, pack
from gpu import free_on_gpu, has_flash
from metrics import EvalError, Rows, exact_memorization, extraction_strength, min_k, unscorable
from model import Llama, generate

Scores = dict[str, Any]  # numbers, or one for each token
# What is measured of each text of a batch: (logits [A, V], targets [A], how many of A are each text's) -> their scores.
Measure = Callable[[Tensor, Tensor, tuple[int, ...]], list[Scores]]
PUBLISHED_LOGS = "open-unlearning/eval"  # data set on the hub


@dataclass(frozen=True)
class Options:
    """What an evaluation is asked for. TOFU has no use for `stemmer`, MUSE none for what is marked TOFU's."""

    forget: str | None  # None: no data set is loaded, for logs alone
    data_dir: str | Path | None = None
    rows: int | None = None  # only the first so many of each set; None: as many as the protocol has
    protocol: str | None = None  # None: the benchmark's first
    eval_retain: str | None = None  # TOFU's: in place of the retain set
    seed: int = 0  # of the toy world
    max_new_tokens: int = 200  # TOFU's
    truth_ratio: str = "geometric"  # TOFU's: mean over the wrong answers
    mask_quirk: bool = False  # TOFU's: open-unlearning issue 128, where EOS is also the padding, no EOS in a prompt is seen
    stemmer: bool | None = None  # None: as the protocol has it
    holdout: bool = False  # TOFU's: membership scores too, where the forget set has holdout rows
    gradnorm: bool = False  # TOFU's: `mia_gradnorm` among them, a backward pass for each forget and holdout row
    own: bool = False  # TOFU's: of rows of one's own what needs no other sets is evaluated; False: they are refused


@dataclass(frozen=True)
class Checkpoint:
    """Hub ids of a model family on a benchmark."""

    base: str  # before it
    target: str  # finetuned on it
    prompt: str  # key of PROMPT_FORMATS
    logs: dict[str, str]  # {forget set: evaluation log of the model retrained without it, in PUBLISHED_LOGS}
    tokenizer: str | None = None  # None: comes with the models


def find_file(repo: str, name: str, data_dir: str | Path | None, remedy: str, local: Sequence[str] = ()) -> Path:
    """The first of the `local` files that `data_dir` has (default: `repo`/`name`), else `name` of the hub's data set `repo`.
    Raises DataError, with the remedy where neither has it."""
    if data_dir is not None:
        data_dir = Path(data_dir).expanduser()
        if not data_dir.is_dir():
            raise DataError(f"--data-dir {data_dir}: no such folder")
        for path in (Path(data_dir, file) for file in local or [f"{repo}/{name}"]):
            if path.exists():
                return path
    return hub_file(repo, name, remedy)


@dataclass(frozen=True)
class Text:
    """To be scored: the labels of the example, given what stands before them."""

    key: str  # of its result, also in the journal
    example: Example
    measure: Measure


@dataclass(frozen=True)
class Prompt:
    """To be continued, greedily, with at most `limit` tokens."""

    key: str
    ids: tuple[int, ...]
    text: str  # that the ids are
    limit: int
    order: tuple[int, ...]  # prompts are continued in this order; only those with an equal first number share a batch


@dataclass(frozen=True)
class Work:
    """What is asked of a model for one row."""

    row: dict[str, str]  # what is known of it beforehand
    texts: dict[str, Text] = field(default_factory=dict)  # by what they are, such as 'answer'
    prompt: Prompt | None = None


def mean_loss(logits: Tensor, targets: Tensor, lengths: tuple[int, ...]) -> list[Scores]:
    """{'loss'}: the mean negative log-likelihood per token, in nats."""
    losses = F.cross_entropy(logits, targets, reduction="none")
    return [{"loss": x.mean().item()} for x in losses.cpu().split(lengths)]


def token_losses(logits: Tensor, targets: Tensor, lengths: tuple[int, ...]) -> list[Scores]:
    """{'losses': each token's negative log-likelihood, in nats}."""
    losses = F.cross_entropy(logits, targets, reduction="none")
    return [{"losses": x.tolist()} for x in losses.cpu().split(lengths)]


def memorization(logits: Tensor, targets: Tensor, lengths: tuple[int, ...]) -> list[Scores]:
    """The loss, and the scores of memorization and membership that need more than it. Holds several tensors of [A, V]."""
    losses = F.cross_entropy(logits, targets, reduction="none")
    log_p = logits.log_softmax(-1)
    expected = (log_p.exp() * log_p).sum(-1)
    variance = (log_p.exp() * (log_p - expected[..., None]).square()).sum(-1)  # not E x^2 - (E x)^2: it cancels
    standard = (-losses - expected) / variance.clamp(min=1e-6).sqrt()
    columns = losses, logits.argmax(-1) == targets, standard
    return [
        {
            "loss": loss.mean().item(),
            "exact_memorization": exact_memorization(right.tolist()),
            "extraction_strength": extraction_strength(right.tolist()),
            "mia_min_k": min_k((-loss).tolist()),
            "mia_min_k_plus_plus": min_k(z.tolist()),
        }
        for loss, right, z in zip(*(x.cpu().split(lengths) for x in columns), strict=True)
    ]


def batches(texts: Sequence[Text], budget: int) -> Iterator[list[Text]]:
    """One measure after the other as the texts first have them, each in groups of at most `budget` tokens, or of one text
    that is longer; those of one prompt together, longest texts first: running out of memory shows at once."""
    for measure in dict.fromkeys(text.measure for text in texts):
        batch, tokens, alike = list[Text](), 0, defaultdict(list)
        for text in sorted((t for t in texts if t.measure == measure), key=lambda t: -len(t.example.ids)):
            alike[text.example.ids[: text.example.prompt_length]].append(text)
        for text in itertools.chain(*alike.values()):
            size = len(text.example.ids)
            if batch and tokens + size > budget:
                yield batch
                batch, tokens = [], 0
            batch, tokens = [*batch, text], tokens + size
        yield batch


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is for want of memory, of a GPU or of the machine."""
    known = "not enough memory|can(no|')t allocate memory|out of memory|ALLOC_FAILED|can't start new thread"
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or isinstance(error, RuntimeError) and bool(re.search(known, str(error), re.I))


LESS = "pass --dtype bfloat16 or another --device, or to eval.py (TOFU) a lower --max-new-tokens"


def halved(size: int, batch: Sequence, key: str, error: Exception) -> int:
    """Half of a batch's size, to go on with where it was too much for the memory. Raises EvalError for a batch of one, and
    the error where it is another one."""
    if not out_of_memory(error):
        raise error
    if len(batch) == 1:
        raise EvalError(f"{key}: too much for the memory even by itself ({files.first_line(error)}); {LESS}") from None
    return max(1, size // 2)


def by_memory(device: torch.device, usual: int, each: int) -> int:
    """How many at a time where each takes so many bytes: `usual`, or on a GPU what half of its free memory holds. An
    estimate: a batch that is too much all the same is halved."""
    if device.type != "cuda":
        return usual
    return max(1, free_on_gpu(device) // (2 * each))


def score(
    model: Llama, texts: Sequence[Text], hidden_id: int | None = None, budget: int | None = None
) -> Iterator[dict[str, Scores]]:
    """{key: scores} of each batch: teacher-forced, packed, a prompt once for its answers, texts of about `budget` tokens
    (None: 2048, on a GPU `by_memory`), the output head at labels only. hidden_id: a token of the prompts that no later one
    may see (`Options.mask_quirk`). Out of memory, it goes on with half the budget. Raises EvalError for a text that is too
    much for the memory by itself."""
    c = model.config  # six float32 tensors as large as the logits, as `memorization` has them, and those of a block
    each = 24 * c.vocab_size + 16 * (c.hidden_size + c.intermediate_size)
    budget, done, batch = budget or by_memory(model.device, 2048, each), set[str](), list[Text]()
    while True:
        try:
            for batch in batches([text for text in texts if text.key not in done], budget):
                packed = pack([text.example for text in batch], hidden_id).to(model.device)
                with torch.no_grad():
                    scores = batch[0].measure(model(**packed.inputs), packed.targets, packed.answer_lengths)
                done |= {text.key for text in batch}
                yield {text.key: found for text, found in zip(batch, scores, strict=True)}
            return
        except (RuntimeError, MemoryError) as e:
            budget = halved(sum(len(text.example.ids) for text in batch), batch, batch[0].example.key, e)


def gradient_norm(model: Llama, example: Example, hidden_id: int | None = None) -> float:
    """open-unlearning's `mia_gradnorm` of an answer: the mean over all parameters (matrices, norms) of the L2 norm of the
    gradient of the mean negative log-likelihood per token, EOS excluded."""
    batch, parameters = pack([example], hidden_id).to(model.device), list(model.parameters())
    wanted = [p.requires_grad for p in parameters]
    try:
        with torch.enable_grad():
            model.requires_grad_()
            loss = F.cross_entropy(model(**batch.inputs)[:-1], batch.targets[:-1])
            gradients = torch.autograd.grad(loss, parameters)
    finally:
        for p, before in zip(parameters, wanted, strict=True):
            p.requires_grad_(before)
    return statistics.fmean(g.float().norm().item() for g in gradients)


def evaluated(model: Llama) -> Llama:
    """The model as it is evaluated: as `save_pretrained` keeps it, cast once, not in every step of generation; and always a
    plain one, because what is compiled for training would be compiled again, block by block, for longer than that saves."""
    if distributed.sharded(model):
        return distributed.gathered(model)
    return model.frozen_copy(norms=True)


def digest_of(model: Llama) -> str:
    """16 hex digits of all that a model computes with: its config, and each parameter's name and bytes as `evaluated`. The
    same in memory and loaded from where it was saved."""

    def one(p: Tensor) -> str:
        return hashlib.sha256(p.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()

    names, parameters = zip(*evaluated(model).named_parameters(), strict=True)
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(names, pool.map(one, parameters), strict=True))
    return fingerprint([dataclasses.asdict(model.config), str(model.compute_dtype), found])


class Journal:
    """What an evaluation has done so far, one JSON object per line, so that an interrupted one goes on from there."""

    def __init__(self, path: Path | None):
        """path None: in memory only. A last line that a killed process left half written is dropped from the file. Each of
        several processes has a file of its own, and begins with what all have. Raises EvalError for any other damage, and
        for a link."""
        self.file, self.done = None, dict[str, Any]()
        if path:
            with distributed.together():
                mine = path.with_stem(f"{path.stem}-{distributed.rank()}") if distributed.rank() else path
                for one in sorted({*path.parent.glob(f"{path.stem}*{path.suffix}"), mine}):
                    journal = files.JsonLines(one, error=EvalError, own=one == mine)
                    self.file = journal if one == mine else self.file
                    for number, record in enumerate(journal.records, 1):
                        if record.get("checksum") != fingerprint([record.get("done")]):
                            raise EvalError(f"{one}, line {number}: has changed since it was written; remove it")
                        self.done |= record["done"]

    def add(self, results: dict[str, Scores] | dict[str, str] | dict[str, float]) -> None:
        """Raises EvalError where the file cannot be written."""
        self.done |= results
        if self.file:
            try:
                self.file.add({"done": results, "checksum": fingerprint([results])})
            except EvalError as e:
                what = str(e).partition(";")[0]
                raise EvalError(f"{what}; free some space: the evaluation goes on from what it has") from None


def check_length(
    key: str, tokens: int, positions: int, more: int = 0, error: type[files.UserError] = EvalError,
    remedy: str = "shorten it, or take a model with more",
) -> None:  # fmt: skip
    """Raises `error` where a model with so many positions cannot read so many tokens and generate so many more."""
    if tokens + max(0, more - 1) > positions:  # the last one is not read
        what = f"{tokens} tokens and {more} new ones" if more else f"{tokens} tokens"
        raise error(f"{key}: {what}, but the model has {positions} positions; {remedy}")


def waiting(folder: Path, process: int) -> None:
    tqdm.write(f"{folder}: process {process} evaluates there; waiting for its result", file=sys.stderr)


class Benchmark:
    """What tofu.py and muse.py share. A subclass has besides what is declared here first."""

    # Its data, also for training alone:
    name: str
    preset: str | None = None  # of config.PRESETS
    load: Callable[..., list]  # (spec, data_dir, seed) -> rows or texts
    complement: Callable[[str], str]  # forget set -> its retain set
    encode: Callable[..., list[Example]]  # (rows, tokenizer, role, max_length, chunking) -> what is trained on
    refusals: Callable[..., list[str]]  # (file, forget set, data_dir) -> lines
    # Its evaluation:
    protocols: dict[str, Any]  # by their names
    first_rows: Callable[[str], int | None]  # forget set -> how many rows of each set its slice asks to evaluate, None: all
    load_sets: Callable[[], dict[str, list]]  # -> {set: rows}, all that an evaluation reads
    record: Callable[[Tokenizer], dict]  # -> what decides the results, besides model and dtype
    plan: Callable[[Tokenizer], dict[str, dict[str, Work]]]  # -> {part: {key: work}}
    batch_size: int  # of generation, but on a GPU (`by_memory`)
    shorter = "take a model with more"  # what to do about a generation beyond the model's positions
    item: Callable[[str, Work, dict[str, Any]], dict]  # (part, work, {key: scores or generation as it is}) -> what is kept
    aggregate: Callable[[Rows], dict]  # items -> scores
    checkpoints: dict[str, Checkpoint]  # by their aliases
    retain_flags: str  # to pass where there is no reference
    read_reference: Callable[[str | Path], tuple[dict, str]]  # its log -> (what `summary` needs and 'mia_min_k', its name)
    summary: Callable[[dict, dict | None, str], tuple[dict, str]]  # (log, *reference) -> scores, where the reference is from
    # What is printed, and read by hints.py:
    plots = False  # whether there is a forget quality to plot, and `signs(log, reference)` for the hints
    samples: Callable[[dict], dict[str, tuple[str, str, str]]]  # log -> {key: (question, reference, generation)}
    headline: Callable[[dict], str]  # summary -> its most important numbers
    cells: Callable[[dict], dict[str, str]]  # summary -> {label: number}, of the table
    label_width: int
    compared: tuple[str, str]  # the number that needs a reference: its key in a summary, its name
    shown: Callable[[dict], tuple]  # item -> (what grows with memory, its scores in one line, {label: text})

    def __init__(self, options: Options):
        """Loads the sets. Raises DataError for those, EvalError for a protocol of another benchmark or less than one row."""
        protocol = options.protocol or next(iter(self.protocols))
        if protocol not in self.protocols:
            raise EvalError(f"--protocol {protocol}: is none of {self.name}'s, which are {', '.join(self.protocols)}")
        if options.rows is not None and options.rows < 1:
            raise EvalError(f"limit {options.rows}: leaves no rows; give at least 1, or none for all of them")
        self.options, self.protocol = dataclasses.replace(options, protocol=protocol), self.protocols[protocol]
        self.no_holdout = ""  # why there are no holdout rows, where they were asked for
        self.sets = self.load_sets()

    def data(self) -> dict[str, dict]:
        """What a run records of the data."""
        return {name: {"rows": len(rows), "fingerprint": fingerprint(rows)} for name, rows in self.sets.items()}

    def rows(self, model: Llama, tokenizer: Tokenizer, label: str = "evaluate", journal: Path | None = None) -> Rows:
        """Per-item results {part: {key: item}}: texts are scored first, then prompts continued. With `journal`, an
        interrupted evaluation goes on from what that file holds, of this model and this evaluation. label: of the progress
        bar. Raises as `plan`, `check_length` and `halved`, and EvalError naming the example whose loss is not finite."""
        model = evaluated(model)
        plan, journaled = self.plan(tokenizer), Journal(journal)
        done, work = journaled.done, [w for part in plan.values() for w in part.values()]
        texts, prompts = [text for w in work for text in w.texts.values()], [w.prompt for w in work if w.prompt]
        for text in texts:
            check_length(text.example.key, len(text.example.ids) - 1, model.config.max_position_embeddings)
        for prompt in prompts:
            positions, remedy = model.config.max_position_embeddings, self.shorter
            check_length(prompt.key, len(prompt.ids), positions, prompt.limit, remedy=remedy)
        gradients = [text for text in texts if self.options.gradnorm and text.measure is memorization]
        # A chat format may end its answers by another token than the model's config names.
        stop = {*model.config.eos_token_ids, tokenizer.eos_id}
        hidden_id = tokenizer.eos_id if self.options.mask_quirk else None
        total = len(texts) + len(prompts) + len(gradients)
        share = distributed.share
        bar = tqdm(total=total, initial=min(total, len(done)), desc=label, unit="text", leave=False)
        with distributed.together(), bar:
            for scores in score(model, share([text for text in texts if text.key not in done]), hidden_id):
                if wrong := next((key for key, found in scores.items() if not math.isfinite(found["loss"])), None):
                    key = next(text.example.key for text in texts if text.key == wrong)
                    why = f"its weights or --dtype {model.compute_dtype} overflow"
                    raise EvalError(f"{key}: the model's loss is {scores[wrong]['loss']}; {why}")
                journaled.add(scores)
                bar.update(len(scores) * distributed.world())
            for text in share([text for text in gradients if f"{text.key} gradient" not in done]):
                journaled.add({f"{text.key} gradient": gradient_norm(model, text.example, hidden_id)})
                bar.update(distributed.world())
            prompts, c = [prompt for prompt in prompts if prompt.key not in done], model.config
            longest = max((len(prompt.ids) + prompt.limit for prompt in prompts), default=1)
            cached = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.compute_dtype.itemsize
            each = longest * (cached + 16 * (c.hidden_size + c.intermediate_size)) + 12 * c.vocab_size
            size = by_memory(model.device, self.batch_size, each)
            for _, group in itertools.groupby(share(sorted(prompts, key=lambda p: p.order)), key=lambda p: p.order[0]):
                left = list(group)
                while batch := left[:size]:
                    longest = max(prompt.limit for prompt in batch)
                    try:
                        found = generate(model, [list(prompt.ids) for prompt in batch], longest, stop, hidden_id)
                    except (RuntimeError, MemoryError) as e:
                        size = halved(len(batch), batch, batch[0].key, e)
                        continue
                    journaled.add({p.key: tokenizer.decode_text(x[: p.limit]) for p, x in zip(batch, found, strict=True)})
                    bar.update(len(batch) * distributed.world())
                    left = left[len(batch) :]
        done |= distributed.merged(done)
        return {part: {key: self.item(part, w, done) for key, w in items.items()} for part, items in plan.items()}

    def evaluate(self, model: Llama, tokenizer: Tokenizer, folder: Path | None, name: str, label: str) -> dict[str, Any]:
        """{'protocol', 'scores', 'rows', 'path'} of a model, read from `folder/eval/NAME-HASH/log.json` or kept there. HASH
        is of the protocol, the model's weights and its tokenizer, so a result is reused only for the same evaluation of the
        same model. Another process that is at it is waited for. None, or a folder that cannot be written: nothing is kept,
        'path' is None. Raises EvalError for a damaged log or journal, and for links that lead out of the folder."""
        model = evaluated(model)
        protocol = self.record(tokenizer) | {"dtype": str(model.compute_dtype), "weights": digest_of(model)}
        protocol |= {"tokenizer": files.digest(tokenizer.path)[:16]}
        key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:8]
        path = folder / "eval" / f"{name}-{key}" / "log.json" if folder else None
        if folder:  # under another name it is the same evaluation
            path = next(iter(sorted(folder.glob(f"eval/*-{key}/log.json"))), path)
        if path and folder and not files.within(path, folder):
            raise EvalError(f"{path}: leads out of {folder} by a link; remove it")
        with contextlib.ExitStack() as held:

            def kept() -> bool | None:
                """Whether there is a log by now; None: nothing can be kept. Holds the folder where there is none."""
                if path and not path.exists():
                    try:
                        held.enter_context(files.lock(path.parent, EvalError, partial(waiting, path.parent)))
                        files.sweep(path.parent)
                    except OSError as e:
                        tqdm.write(f"not kept: {path.parent} cannot be written ({files.first_line(e)})", file=sys.stderr)
                        return None
                return bool(path and path.exists())

            found = distributed.on_first(kept)
            path = None if found is None else path
            if path and found:
                log = logs.read_ours(path)
                if log["protocol"] != json.loads(json.dumps(protocol)):
                    raise EvalError(f"{path}: is not of this evaluation; remove it and evaluate again")
                return log | {"path": str(path)}
            rows = self.rows(model, tokenizer, label, path and path.with_name("journal.jsonl"))
            log = {"protocol": protocol, "scores": self.aggregate(rows), "rows": rows}
            with distributed.together():
                if path and distributed.first():
                    logs.write_log(path, log)
                    for journal in path.parent.glob("journal*.jsonl"):
                        journal.unlink(missing_ok=True)
            return log | {"path": str(path) if path else None}

    def reference(self, alias: str | None, retain_logs: str | None, retrained: dict | None) -> tuple[dict | None, str]:
        """(what is known of a retrained model or None, where it is from or why there is none). Never a default in its place.
        alias: of the evaluated model. retrained: a log that was made here. Raises EvalError for unusable `retain_logs`."""
        if retrained is not None:
            return retrained | {"mia_min_k": retrained.get("scores", {}).get("mia_min_k")}, "the retrained model"
        if retain_logs:
            return self.read_reference(retain_logs)
        known = self.checkpoints[alias].logs if alias in self.checkpoints else {}
        if not (name := known.get(self.options.forget or "")):
            return None, f"no retain reference: pass {self.retain_flags}"
        try:
            path = find_file(PUBLISHED_LOGS, name, self.options.data_dir, f"pass {self.retain_flags}")
            return self.read_reference(path)[0], f"{PUBLISHED_LOGS}/{name}"
        except (DataError, EvalError) as e:
            return None, f"no retain reference: {e}"

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises EvalError where the options cannot apply to a model with this tokenizer."""

    def with_language(
        self, logs: dict[str, dict], load_retrained: Callable[[], Llama], tokenizer: Tokenizer
    ) -> dict[str, dict]:
        """The logs of several models, 'retrained' among them, each with what the retrained model, loaded for it, says of
        the answers: here nothing, TOFU's have it."""
        return logs

    @classmethod
    def report(cls, summaries: dict[str, dict], found: str) -> str:
        """The numbers of several models side by side, and where their reference is from (or why there is none)."""
        columns = {name: cls.cells(summary) for name, summary in summaries.items()}
        lines = [" " * cls.label_width + "".join(name.rjust(13) for name in columns)]
        for label in dict.fromkeys(itertools.chain(*columns.values())):
            row = (cells.get(label, "-").rjust(13) for cells in columns.values())
            lines.append(label.ljust(cls.label_width) + "".join(row))
        key, name = cls.compared
        has = any(summary[key] is not None for summary in summaries.values())
        lines.append(f"{name} against {found}" if has else f"{name} is absent: {found}")
        if share := max((summary.get("unscorable", 0) for summary in summaries.values()), default=0):
            lines.append(
                f"ROUGE is 0 whatever is said for {share:.0%} of the rows: it reads the letters a to z and digits alone"
            )
        return "\n".join(lines)

    @staticmethod
    def unscorable(log: dict, key: str) -> dict[str, float]:
        """{'unscorable': share of the rows with a ROUGE score whose reference, under this key, it cannot read}, or {}."""
        texts = [v[key] for items in log.get("rows", {}).values() for v in items.values() if "generation" in v and key in v]
        share = unscorable(texts) if texts else 0.0
        return {"unscorable": share} if share else {}

    @classmethod
    def worst(cls, log: dict, n: int) -> str:
        """The n worst rows of each part that generates: of forget... the best remembered, of the others the least."""
        lines = []
        for part, items in log["rows"].items():
            rows = [(key, *cls.shown(item)) for key, item in items.items() if "generation" in item]
            rows.sort(key=lambda row: row[1], reverse=part.startswith("forget"))
            for key, _, scores, texts in rows[:n]:
                lines.append(f"\n{part} {key}: {scores}")
                lines += [f"    {label:<11} {text}" for label, text in texts.items()]
        return "\n".join(lines)


def pick_device(device: str) -> torch.device:
    """'auto' -> cuda where there is one, else cpu. Raises EvalError for a device that torch does not see."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and distributed.active():
        device = f"cuda:{distributed.local_rank()}"
    try:
        torch.zeros(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as e:
        raise EvalError(f"--device {device}: not usable here ({files.first_line(e)})") from None


def on_device(device: torch.device, dtype: torch.dtype) -> str:
    """What a run says of them."""
    slow = device.type == "cuda" and dtype == torch.float32
    return f"{device}, {dtype}" + (" (slow on a GPU: attention goes sequence by sequence)" if slow else "")


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """'auto' -> bfloat16 on a GPU that computes in it, else float32."""
    if dtype == "auto":  # not is_bf16_supported(): it counts emulation, in which GPUs before 8.0 have it
        return torch.bfloat16 if has_flash(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
