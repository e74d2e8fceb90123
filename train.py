"""Unlearn with DiPO, or finetune: one plain loop, its command line, its run folder, exact resume.

python train.py                                             the toy world, offline, a few minutes on two cores
python train.py --forget tofu_forget10 --model llama2-7b    unlearn a published target model
python train.py --finetune tofu_full --model PATH           make a target or a retained model of one's own
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import dipo
import eval as evaluation
from data import (
    CHECKPOINTS,
    MUSE_CHECKPOINTS,
    PROMPT_FORMATS,
    DataError,
    Example,
    Tokenizer,
    complement,
    draw,
    fingerprint,
    is_muse,
    load_refusals,
    load_rows,
    load_texts,
    muse_chunks,
    pack,
    toy_world,
    train_toy_tokenizer,
)
from model import Llama, LlamaConfig, ModelError, first_line, load_pretrained, resolve_folder, save_pretrained

RUNS = Path("runs")


class RunError(Exception):
    """A run that cannot start or go on. The message is one line that names the setting and the remedy."""


# -------------------------------------------------------------------------------------------------------------- config


def option(default, help: str, choices: tuple | None = None, type: type | None = None):
    return field(default=default, metadata={"help": help, "choices": choices, "type": type})


BETAS = {"dipo": 0.05, "npo": 0.1, "simnpo": 4.5, "dpo": 0.1}  # the papers' and open-unlearning's


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. The paper's values are the defaults; PRESETS hold the others."""

    # what
    preset: str = option("paper", "named defaults: paper, muse, smollm2, toy (muse and toy are chosen by themselves)")
    model: str = option("toy", f"model to start from: toy, {', '.join(CHECKPOINTS | MUSE_CHECKPOINTS)}, hub id or folder")
    tokenizer: str | None = option(None, "folder or hub id, where the model has no tokenizer", type=str)
    prompt: str = option("auto", f"prompt format: auto, {', '.join(PROMPT_FORMATS)}")
    forget: str = option(
        "toy_forget10", "forget set: tofu_forget01|05|10, muse_news, muse_books, slices A[:300], sums A+B, or a .jsonl file"
    )
    retain: str | None = option(None, "retain set (default: the forget set's complement)", type=str)
    refusals: str | None = option(None, "file with a refusal per line, for dpo (default: TOFU's, the toy's)", type=str)
    finetune: str | None = option(None, "finetune on this set instead of unlearning", type=str)
    data_dir: str | None = option(None, "local data in hub layout (TOFU/forget10.json, ...), used before the hub", type=str)
    toy_vocabulary: int = option(1000, "tokens in the toy world's vocabulary")
    scal: int = option(0, "MUSE News: forget scal/forget_K, K = 1 to 4 (growing sets); 0 = raw/forget")
    sust: bool = option(False, "MUSE News: forget sust/forget_1 to 4, one request after the other")
    chunking: str = option("open-unlearning", "how MUSE's texts are cut into sequences", ("open-unlearning", "muse"))
    max_length: int = option(2048, "tokens of a sequence of MUSE's texts")
    # losses
    forget_loss: str = option("dipo", "loss on the forget set", ("dipo", "npo", "simnpo", "dpo", "ga"))
    retain_loss: str = option("dipo", "loss on the retain set", ("dipo", "gd", "kl", "none"))
    beta: float | None = option(
        None, "beta of the losses that have one (default: dipo 0.05, npo and dpo 0.1, simnpo 4.5)", type=float
    )
    lam: float = option(1.0, "lambda, weight of the retain loss")
    alpha: float = option(1.0, "strength of the memory vector in the pair softmax(z +- alpha m)")
    p: float = option(0.05, "rank and relative threshold of the memory vector, a fraction")
    filter: str = option("both", "which threshold keeps a logit in the memory vector", dipo.FILTERS)
    pair_from: str = option("policy", "whose logits make the pair", ("policy", "reference"))
    center: bool = option(False, "make the memory vector from logits minus their mean")
    reduction: str = option("sum", "margin of a sequence: sum or mean over its answer tokens", ("sum", "mean"))
    # optimisation
    lr: float = option(1e-5, "peak learning rate of AdamW (betas 0.9, 0.999; eps 1e-8)")
    epochs: float = option(10.0, "passes over the forget (or finetuning) set")
    batch_size: int = option(32, "effective batch, forget sequences per step (and as many retain sequences)")
    micro_batch_size: int = option(8, "sequences per forward pass, forget and retain; changes memory and speed only")
    warmup_epochs: float = option(1.0, "linear warm-up, epochs")
    schedule: str = option(
        "linear", "learning rate after the warm-up: linear decay to zero, or constant", ("linear", "constant")
    )
    weight_decay: float = option(0.01, "decoupled weight decay of matrices")
    max_grad_norm: float = option(0.0, "clip the gradient's norm to this; 0 = off")
    seed: int = option(0, "of data order, pairing, and the toy world")
    # machine
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = option(
        "auto", "of activations; master weights are float32; auto: bfloat16 on GPUs", ("auto", "float32", "bfloat16")
    )
    reference: str = option(
        "cached", "hidden states of one pass before training, or a second model", ("cached", "recompute")
    )
    gradient_checkpointing: bool = option(False, "keep one activation per block, compute the others again: less memory")
    compile: bool | None = option(None, "torch.compile blocks and loss (default: on GPUs)", type=bool)
    # evaluation
    eval: bool = option(True, "evaluate target and unlearned model")
    eval_every: float = option(0.0, "also evaluate every so many epochs; 0 = only at the end")
    eval_retain: str | None = option(None, "rows that stand for the retain set in evaluation", type=str)
    eval_rows: int = option(0, "only the first so many rows of each evaluation set; 0 = all")
    retain_logs: str | None = option(None, "evaluation log of the retrained model, for forget quality", type=str)
    retain_model: str | None = option(None, "the retrained model itself, for forget quality and its column", type=str)
    max_new_tokens: int = option(200, "length of generations in evaluation, tokens")
    # run
    out: str | None = option(None, "run folder (default: runs/<forget>-<losses>-<number>)", type=str)

    @property
    def forget_beta(self) -> float:
        return self.beta if self.beta is not None else BETAS.get(self.forget_loss, 0.0)

    @property
    def retain_beta(self) -> float:
        return self.beta if self.beta is not None and self.forget_loss == "dipo" else 0.05


PRESETS = {
    "paper": {},
    "muse": {"warmup_epochs": 0.0, "weight_decay": 0.0, "schedule": "constant", "micro_batch_size": 1},
    "smollm2": {"lr": 4e-4, "epochs": 3.0, "batch_size": 16},
    "toy": {"lr": 4e-4, "epochs": 10.0, "batch_size": 16, "micro_batch_size": 16, "max_new_tokens": 24, "eval_every": 2.0},
}
TOY_FINETUNE = {"lr": 2e-3, "epochs": 40.0, "batch_size": 32, "micro_batch_size": 32, "warmup_epochs": 2.0}


def parse_args(argv: list[str]) -> tuple[dict, bool]:
    """({field: value} that the user typed, --resume)."""
    parser = argparse.ArgumentParser("train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Config):
        flag, kind = "--" + f.name.replace("_", "-"), f.metadata["type"] or type(f.default)
        special = {k: v[f.name] for k, v in PRESETS.items() if f.name in v}
        default = ", ".join([f"default {f.default}"] + [f"{k} {v}" for k, v in special.items()])
        text = f"{f.metadata['help']} [{default}]" if f.default is not None else f.metadata["help"]
        text = text.replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(flag, type=kind, choices=f.metadata["choices"], default=argparse.SUPPRESS, help=text)
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")
    given = vars(parser.parse_args(argv))
    return given, given.pop("resume")


def make_config(given: dict) -> Config:
    """Defaults, then the preset, then what was typed. Raises RunError for settings that make no sense."""
    toy = given.get("model", "toy") == "toy" and "finetune" not in given
    muse = is_muse(given.get("finetune") or given.get("forget", ""))
    preset = given.get("preset", "toy" if toy else "muse" if muse else "paper")
    if preset not in PRESETS:
        raise RunError(f"--preset {preset}: unknown; known are {', '.join(PRESETS)}")
    config = Config(**(PRESETS[preset] | given | {"preset": preset}))
    positive = ("alpha", "p", "lr", "epochs", "batch_size", "micro_batch_size", "max_new_tokens")
    for name in positive + (("beta",) if config.beta is not None else ()):
        if not getattr(config, name) > 0 or not math.isfinite(getattr(config, name)):
            raise RunError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be positive")
    for name in ("lam", "warmup_epochs", "weight_decay", "max_grad_norm", "eval_every", "eval_rows"):
        if not getattr(config, name) >= 0:
            raise RunError(f"--{name.replace('_', '-')} {getattr(config, name)}: must not be negative")
    if config.p > 1:
        raise RunError(f"--p {config.p}: is a fraction of the vocabulary, at most 1")
    if config.retain_logs and config.retain_model:
        raise RunError("--retain-logs and --retain-model: pass one of them")
    if (config.scal or config.sust) and (config.finetune or config.forget != "muse_news"):
        raise RunError("--scal and --sust: are MUSE News's; pass --forget muse_news, and one of them")
    if config.toy_vocabulary < 400:  # 256 bytes, the special tokens, and some merges
        raise RunError(f"--toy-vocabulary {config.toy_vocabulary}: must be at least 400")
    if not 0 <= config.scal <= 4 or (config.scal and config.sust):
        raise RunError(f"--scal {config.scal}: is 1 to 4, and not together with --sust")
    if config.model == "toy" and config.finetune:
        raise RunError("--finetune: name the model to start from with --model")
    if config.model == "toy" and not config.forget.startswith("toy_"):
        raise RunError(f"--forget {config.forget}: the toy model has never seen it; pass --model ALIAS_OR_FOLDER")
    return config


# ---------------------------------------------------------------------------------------------------------------- step


NEEDS_REFERENCE = ("dipo", "npo", "dpo", "kl")
PER_SEQUENCE = ("dipo", "npo", "simnpo", "dpo")  # their loss is a mean over sequences, that of the others one over tokens
GROUP = {"dpo": 2}  # sequences that have one loss together: the answer, and a refusal of the same question
CHUNK = 2**25  # logits (positions times vocabulary) that the loss holds at a time: 64 MiB in bfloat16


def position_scores(
    name: str, role: str, config: Config, logits: Tensor, ref_logits: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(score, negative log-likelihood without gradient, whether the roles swap) of each position; logits [n, V] -> [n].

    Summed over a sequence, the scores are what `sequence_losses` turns into its loss.
    """
    if name in ("gd", "ga"):
        nll = dipo.token_nll(logits, targets)
        return (nll if name == "gd" else -nll), nll.detach(), torch.zeros_like(targets)
    nll, swapped = dipo.token_nll(logits.detach(), targets), torch.zeros_like(targets)
    if name == "dipo":
        pair = {"alpha": config.alpha, "p": config.p, "filter": config.filter, "center": config.center}
        scores, swapped = dipo.dipo_scores(logits, ref_logits, role, pair_from=config.pair_from, **pair)
    elif name == "simnpo":
        scores = dipo.token_nll(logits, targets)
    elif name in ("npo", "dpo"):
        scores = dipo.token_nll(logits, targets) - dipo.token_nll(ref_logits, targets)
    else:
        wide = torch.promote_types(logits.dtype, torch.float32)
        scores = dipo.token_kl(*(z.log_softmax(-1, dtype=wide) for z in (ref_logits, logits)))
    return scores, nll, swapped


def sequence_losses(name: str, role: str, config: Config, scores: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """(loss, margin or None) of each sequence, or of each group of them, [b] from the scores of its answer positions."""
    sums = torch.stack([s.sum() for s in scores])
    if name == "simnpo" or (name == "dipo" and config.reduction == "mean"):
        sums = sums / sums.new_tensor([len(s) for s in scores])
    if name == "dipo":
        u = sums * (config.forget_beta if role == "forget" else config.retain_beta)
        return dipo.bradley_terry_loss(u), u.detach()
    if name in ("npo", "simnpo"):
        return dipo.negative_preference_loss(sums, config.forget_beta), None
    if name == "dpo":
        return dipo.dpo_loss(sums[::2], sums[1::2], config.forget_beta), None
    return sums, None


def whole_sequences(roles: list[str], lengths: tuple[int, ...], limit: int) -> Iterator[tuple[str, slice, slice]]:
    """(role, which groups, which positions): runs of one role with at most `limit` positions, or one longer group.

    lengths: answer positions of each group of sequences; a group is one sequence but for dpo.
    """
    starts = [0, *itertools.accumulate(lengths)]
    first = 0
    for i in range(1, len(lengths) + 1):
        if i == len(lengths) or roles[i] != roles[first] or starts[i + 1] - starts[first] > limit:
            yield roles[first], slice(first, i), slice(starts[first], starts[i])
            first = i


def compute_gradients(model: Llama, reference, config: Config, parts: dict[str, tuple], score_fn=position_scores) -> dict:
    """Gradients of one effective batch into model.parameters().grad; returns what log.jsonl holds of it.

    parts: role -> (loss name, weight, examples); for dpo, each answer with its refusal behind it. Each loss is normalised
    over all examples of its part, so the size of micro-batches changes nothing but rounding.

    Forget and retain sequences share each forward pass. The output head and the loss then run on a few whole sequences
    at a time, forward and backward, and leave the gradient of the final hidden states; the blocks are passed backward
    once, from there. A sequence too long for that goes through the head piece by piece, and once more going backward.
    """
    sizes = {role: GROUP.get(name, 1) for role, (name, _, _) in parts.items()}
    groups = {role: [x[i : i + sizes[role]] for i in range(0, len(x), sizes[role])] for role, (_, _, x) in parts.items()}
    tokens = {role: sum(group[0].answer_length for group in x) for role, x in groups.items()}  # without refusals
    divisors = {role: len(groups[role]) if part[0] in PER_SEQUENCE else tokens[role] for role, part in parts.items()}
    sums = {f"{key}/{role}": 0.0 for key in ("loss", "nll", "margin") for role in parts} | {"swapped": 0}
    limit = max(1, CHUNK // model.config.vocab_size)

    def score(name, role, hidden, targets, ref_hidden=None):
        ref_logits = None if ref_hidden is None else F.linear(ref_hidden, reference.head)
        return score_fn(name, role, config, model.lm_head(hidden), ref_logits, targets)

    queue = [(role, group) for role, x in groups.items() for group in x]
    for i in range(0, len(queue), config.micro_batch_size):
        roles, micro = zip(*queue[i : i + config.micro_batch_size], strict=True)
        batch = pack([e for group in micro for e in group]).to(model.device)
        hidden = model.hidden(**batch.inputs)  # [A, D]
        leaf = hidden.detach().requires_grad_()
        lengths = tuple(sum(e.answer_length for e in group) for group in micro)
        for role, rows, at in whole_sequences(roles, lengths, limit):
            name, weight, _ = parts[role]
            examples = [e for group in micro[rows] for e in group]
            inputs = [leaf[at], batch.targets[at]]
            if name in NEEDS_REFERENCE:
                inputs.append(reference.hidden(examples))
            once = at.stop - at.start <= limit
            run = score if once else partial(checkpoint, score, use_reentrant=False)
            scored = [run(name, role, *piece) for piece in zip(*(x.split(limit) for x in inputs), strict=True)]
            scores, nll, swapped = (torch.cat(x) for x in zip(*scored, strict=True))
            answer_lengths = [e.answer_length for e in examples]
            losses, margins = sequence_losses(name, role, config, scores.split(answer_lengths))
            loss = losses.sum() / divisors[role]
            (weight * loss).backward()
            sums[f"loss/{role}"] += loss.detach()
            sums[f"nll/{role}"] += sum(x.sum() for x in nll.split(answer_lengths)[:: sizes[role]]) / tokens[role]
            if name == "dipo":
                sums[f"margin/{role}"] += margins.sum() / divisors[role]
            sums["swapped"] += swapped.sum()
        hidden.backward(leaf.grad)
    metrics = {"loss": sum(weight * float(sums[f"loss/{role}"]) for role, (_, weight, _) in parts.items())}
    for role, (name, _, _) in parts.items():
        keys = ("loss", "nll", "margin") if name == "dipo" else ("loss", "nll")
        metrics |= {f"{key}/{role}": float(sums[f"{key}/{role}"]) for key in keys}
    every = [e for _, group in queue for e in group]
    metrics |= {"tokens": sum(len(e.ids) for e in every), "answer_tokens": sum(e.answer_length for e in every)}
    grad_norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters())
    if config.max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.max_grad_norm, grad_norm)
    metrics["grad_norm"] = float(grad_norm)
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
            raise RunError(f"{name} is {metrics[name]}; lower --lr or pass --dtype float32")
    if positions := sum(tokens[role] for role, (name, _, _) in parts.items() if name == "dipo"):
        metrics["swapped"] = int(sums["swapped"]) / positions
        dipo.check_roles(int(sums["swapped"]), positions)
    return metrics


def compile_step(model: Llama):
    """Compile the blocks in place, and position_scores, which is returned."""
    for block in model.model.layers:
        block.compile(dynamic=True)
    return torch.compile(position_scores, dynamic=True)


def draw_parts(config: Config, data: dict[str, list], first: int, count: int) -> dict[str, tuple]:
    """The parts of `compute_gradients` for examples number first to first + count - 1 of each role's stream.

    data: {'finetune'} or {'forget', 'retain'}, examples; for dpo also 'refusals', one list of examples for each of forget's.
    """

    def drawn(role, items=None):
        return draw(data[role] if items is None else items, config.seed, role, first, count)

    if config.finetune:
        return {"finetune": ("gd", 1.0, drawn("finetune"))}
    if config.forget_loss == "dpo":
        rows, which = drawn("forget", range(len(data["forget"]))), drawn("refusals", range(len(data["refusals"][0])))
        examples = [e for row, i in zip(rows, which, strict=True) for e in (data["forget"][row], data["refusals"][row][i])]
    else:
        examples = drawn("forget")
    parts = {"forget": (config.forget_loss, 1.0, examples)}
    if config.retain_loss != "none":
        parts["retain"] = (config.retain_loss, config.lam, drawn("retain"))
    return parts


def learning_rate(config: Config, step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then linear decay to zero, or constant. The first step already learns (Hugging Face's has 0 there)."""
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    return config.lr * (steps - step) / max(1, steps - warmup)


def make_optimizer(model: Llama, config: Config) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]  # norms are not decayed, as in Hugging Face's trainer
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


# ----------------------------------------------------------------------------------------------------------- reference

IN_MEMORY = 2**32  # bytes of stored states; what is larger lies in a file of the run folder


class CachedReference:
    """The frozen start without a second model: at step 0 the policy *is* the reference.

    One pass stores its final hidden states at the answer positions, [positions, D] in the compute dtype, so that
    z_ref = states times the initial output head is what a second model would compute. In host memory, or past IN_MEMORY
    in a memory-mapped file that is gone when the process ends. Raises RunError where there is no room for it.
    """

    def __init__(self, model: Llama, examples: list[Example], config: Config, file: Path):
        examples = list(dict.fromkeys(examples))
        starts = [0, *itertools.accumulate(e.answer_length for e in examples)]
        self.rows = {e: slice(*ends) for e, ends in zip(examples, itertools.pairwise(starts), strict=True)}
        self.device = model.device
        self.head = model.lm_head.weight.detach().to(model.compute_dtype, copy=True)
        shape = starts[-1], model.config.hidden_size
        size = math.prod(shape) * self.head.element_size()
        where = "in memory"
        if size > IN_MEMORY:
            where = f"in a file of {file.parent}"
            try:
                with file.open("wb") as f:
                    os.posix_fallocate(f.fileno(), 0, size)
                states = torch.from_file(str(file), True, math.prod(shape), dtype=self.head.dtype)
                self.states = states.view(shape)
            except OSError as e:
                raise RunError(
                    f"{file}: no room for {size:,} bytes ({e.strerror}); free some space, or pass --reference recompute "
                    f"and another --out"
                ) from None
            finally:
                file.unlink(missing_ok=True)  # the mapping keeps it until the process ends, however that is
        else:
            self.states = torch.empty(shape, dtype=self.head.dtype)
        print(f"reference: final hidden states at {shape[0]:,} answer positions, {size / 1e6:,.0f} MB {where}", flush=True)
        # Not under no_grad: compiled for training, the model rounds in other places than compiled for inference.
        with tqdm(total=len(examples), desc="reference", unit="sequence", leave=False) as bar:
            for i in range(0, len(examples), config.micro_batch_size):
                part = examples[i : i + config.micro_batch_size]
                batch = pack(part).to(model.device)
                self.states[self.rows[part[0]].start : self.rows[part[-1]].stop] = model.hidden(**batch.inputs).detach()
                bar.update(len(part))

    def hidden(self, examples: list[Example]) -> Tensor:
        """[A, D] on the model's device: the states at the answer positions of these examples."""
        return torch.cat([self.states[self.rows[e]] for e in examples]).to(self.device, non_blocking=True)


class RecomputedReference:
    """The plain way: a frozen copy of the model, and a second forward pass at every step."""

    def __init__(self, model: Llama):
        self.model = model.frozen_copy()
        self.head = self.model.lm_head.weight

    @torch.no_grad()
    def hidden(self, examples: list[Example]) -> Tensor:
        return self.model.hidden(**pack(examples).to(self.model.device).inputs)


def make_reference(model: Llama, config: Config, data: dict[str, list], steps: int, out: Path):
    """The reference of the run's losses, or None where they need none. `model` must be the start of the run."""
    parts = draw_parts(config, data, 0, steps * config.batch_size)
    needed = [e for name, _, examples in parts.values() if name in NEEDS_REFERENCE for e in examples]
    if not needed:
        return None
    if config.reference == "recompute":
        return RecomputedReference(model)
    return CachedReference(model, needed, config, out / "reference.bin")


# ---------------------------------------------------------------------------------------------------------- checkpoint


def save_checkpoint(out: Path, step: int, model: Llama, optimizer: torch.optim.Optimizer) -> None:
    """Replace `out/checkpoint`: fp32 weights and AdamW moments as safetensors, so that `--resume` is exact.

    The old checkpoint goes only when the new one is complete. Raises RunError where it cannot be written.
    """
    part, folder, old = (out / f"checkpoint{suffix}" for suffix in (".part", "", ".old"))
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        names = {p: n for n, p in model.named_parameters()}
        save_file({n: p.detach().contiguous() for p, n in names.items()}, part / "weights.safetensors")
        state = {f"{names[p]}/{k}": v.contiguous() for p, s in optimizer.state.items() for k, v in s.items()}
        save_file(state, part / "optimizer.safetensors")
        (part / "state.json").write_text(json.dumps({"step": step}) + "\n")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(part, ignore_errors=True)
        raise RunError(f"{folder}: could not be written ({first_line(e)}); free some space, then --resume") from None


def checkpoint_folder(out: Path) -> Path | None:
    return next((f for f in (out / "checkpoint", out / "checkpoint.old") if f.exists()), None)


def checkpoint_step(out: Path) -> int:
    """The step to go on with, 0 where there is no checkpoint yet."""
    folder = checkpoint_folder(out)
    if folder is None:
        return 0
    try:
        return int(json.loads((folder / "state.json").read_text())["step"])
    except (OSError, KeyError, ValueError, TypeError) as e:
        raise RunError(f"{folder}: damaged checkpoint ({first_line(e)}); remove {out} and start again") from None


def load_checkpoint(out: Path, model: Llama, optimizer: torch.optim.Optimizer) -> int:
    """Restore weights and moments; returns `checkpoint_step`."""
    folder, step = checkpoint_folder(out), checkpoint_step(out)
    if folder is None:
        return step
    try:
        parameters = dict(model.named_parameters())
        with torch.no_grad(), safe_open(folder / "weights.safetensors", "pt") as f:
            for name, p in parameters.items():
                p.copy_(f.get_tensor(name))
        with safe_open(folder / "optimizer.safetensors", "pt") as f:
            for key in f.keys():  # noqa: SIM118
                name, moment = key.rsplit("/", 1)
                optimizer.state[parameters[name]][moment] = f.get_tensor(key).to(model.device)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as e:
        raise RunError(f"{folder}: damaged checkpoint ({first_line(e)}); remove {out} and start again") from None
    return step


class Interrupt:
    """While a step is in hand, Ctrl-C and SIGTERM only set `wanted`; a second Ctrl-C ends at once, unsaved."""

    def __enter__(self):
        self.wanted, self.old = False, {}
        for s in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread: then nobody can interrupt it this way
                self.old[s] = signal.signal(s, self._handle)
        return self

    def _handle(self, number, frame):
        if self.wanted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.wanted = True

    def __exit__(self, *exc):
        for s, handler in self.old.items():
            signal.signal(s, handler)


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""


# ---------------------------------------------------------------------------------------------------------------- loop


def train(model: Llama, config: Config, data: dict[str, list], out: Path, on_epoch=None) -> int:
    """The loop: returns the number of steps. Resumes from `out/checkpoint` where there is one.

    data: as in `draw_parts`.
    on_epoch(step, epoch, last): called whenever another `config.eval_every` epochs are done.
    Raises Interrupted after saving, RunError or SwappedRolesError (state before the step saved).
    """
    size = len(data["finetune" if config.finetune else "forget"])
    per_epoch = size / config.batch_size
    steps = max(1, int(config.epochs * size) // config.batch_size)
    warmup = min(steps - 1, max(1, int(config.warmup_epochs * per_epoch))) if config.warmup_epochs else 0
    evaluate_at = {}
    if config.eval_every and on_epoch:
        count = int(config.epochs / config.eval_every + 1e-9)
        evaluate_at = {max(1, int(i * config.eval_every * per_epoch)): i * config.eval_every for i in range(1, count + 1)}
        evaluate_at.setdefault(steps, config.epochs)  # the last epoch in any case
    optimizer, score_fn = make_optimizer(model, config), position_scores
    model.checkpointing = config.gradient_checkpointing
    if config.compile if config.compile is not None else model.device.type == "cuda":
        score_fn = compile_step(model)
    reference = make_reference(model, config, data, steps, out) if checkpoint_step(out) < steps else None
    start = load_checkpoint(out, model, optimizer)
    log = out / "log.jsonl"
    log.write_text("".join(json.dumps(r) + "\n" for r in evaluation.read_jsonl(log) if r["step"] <= start))

    if start in evaluate_at:  # interrupted between the checkpoint and the end of its evaluation
        on_epoch(start, evaluate_at[start], start == steps)
    bar = tqdm(total=steps, initial=start, desc="finetune" if config.finetune else "unlearn", unit="step")
    with log.open("a") as log_file, bar:
        for step in range(start, steps):
            began = time.perf_counter()
            parts = draw_parts(config, data, step * config.batch_size, config.batch_size)
            lr = learning_rate(config, step, steps, warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with Interrupt() as interrupt:
                try:
                    metrics = compute_gradients(model, reference, config, parts, score_fn)
                except (RunError, dipo.SwappedRolesError) as e:
                    save_checkpoint(out, step, model, optimizer)
                    where = f"the state before this step is in {out / 'checkpoint'}"
                    raise type(e)(f"step {step + 1} of {steps}: {e}; {where}") from None
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                seconds = time.perf_counter() - began
                record = {"step": step + 1, "epoch": (step + 1) / per_epoch, "lr": lr} | metrics
                record |= {"tokens_per_s": metrics["tokens"] / seconds, "seconds": seconds}
                log_file.write(json.dumps(record) + "\n")
                log_file.flush()
                if interrupt.wanted or step + 1 == steps or int((step + 1) / per_epoch) > int(step / per_epoch):
                    save_checkpoint(out, step + 1, model, optimizer)
            shown = {k: f"{metrics[k]:.3g}" for k in ("loss", "margin/forget", "margin/retain") if k in metrics}
            bar.set_postfix(shown | {"tok/s": f"{record['tokens_per_s']:.0f}"}, refresh=False)
            bar.update()
            if interrupt.wanted and step + 1 < steps:
                raise Interrupted(f"interrupted after step {step + 1} of {steps}; go on with: {resume_command(out)}")
            if step + 1 in evaluate_at:
                on_epoch(step + 1, evaluate_at[step + 1], step + 1 == steps)
    return steps


def resume_command(out: Path) -> str:
    return f"python train.py --resume --out {shlex.quote(str(out))}"


# ----------------------------------------------------------------------------------------------------------------- run


def versions() -> dict:
    commit = None
    if shutil.which("git"):
        command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def next_out(config: Config) -> Path:
    """runs/<data>-<losses>-<number>, the first number that is free."""
    if config.finetune:
        name = f"finetune-{config.finetune}"
    else:
        name = f"{config.forget}-{config.forget_loss}-{config.retain_loss}"
    name = "".join(c if c.isalnum() or c in "_-+" else "_" for c in name)
    return next(p for i in itertools.count(1) if not (p := RUNS / f"{name}-{i:03d}").exists())


def prepare_out(config: Config, out: Path, data: dict, folder: Path, prompt: str) -> None:
    """Make the run folder with its config.json. Raises RunError where the folder exists."""
    if out.exists():
        raise RunError(f"--out {out}: exists already; choose another folder, or go on with: {resume_command(out)}")
    record = {"config": dataclasses.asdict(config), "data": data, "model_folder": str(folder)}
    record |= {"prompt_format": prompt, "versions": versions()}
    evaluation.write_json(out / "config.json", record)


def read_config(out: Path, given: dict) -> Config:
    """The config of the run to resume. Raises RunError where there is none, or a flag says something else."""
    try:
        stored = json.loads((out / "config.json").read_text())["config"]
        config = Config(**stored)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise RunError(f"--resume: {out / 'config.json'} is no run of this program ({first_line(e)})") from None
    for name, value in given.items():
        if name != "out" and getattr(config, name) != value:
            raise RunError(f"--resume: {out} was started with {name} = {getattr(config, name)!r}; drop the flag")
    return config


def load_data(config: Config) -> dict[str, list]:
    """{'finetune'} or {'forget', 'retain'}: rows of questions, or documents of MUSE."""

    def load(spec):
        return load_texts(spec, config.data_dir) if is_muse(spec) else load_rows(spec, config.data_dir, config.seed)

    if config.finetune:
        return {"finetune": load(config.finetune)}
    rows = {"forget": load(f"{config.forget}/scal/forget_{config.scal}" if config.scal else config.forget)}
    if config.retain_loss != "none":
        rows["retain"] = load(config.retain or complement(config.forget))
    return rows


def encode(rows: list, role: str, tokenizer: Tokenizer, config: Config) -> list[Example]:
    if isinstance(rows[0], str):
        return muse_chunks(rows, tokenizer, config.max_length, config.chunking, role)
    return tokenizer.encode_rows(rows)


def data_record(rows: dict[str, list]) -> dict:
    return {role: {"rows": len(r), "fingerprint": fingerprint(r)} for role, r in rows.items()}


def run(config: Config, out: Path, resume: bool) -> dict:
    """One run from data to summary.json, finetuning or unlearning; returns the summary. Resumes what is in `out`."""
    device = evaluation.pick_device(config.device)
    compute_dtype = evaluation.pick_dtype(config.dtype, device)
    if resume and (out / "summary.json").exists():
        print(f"{out}: complete already")
        return json.loads((out / "summary.json").read_text())
    wants_eval = config.eval and not config.finetune
    if wants_eval:
        evaluation.require_extra()

    refusals = load_refusals(config.refusals, config.forget, config.data_dir) if config.forget_loss == "dpo" else []
    rows = load_data(config)
    benchmark = None
    if wants_eval:
        if is_muse(config.forget):
            benchmark = evaluation.Muse(config.forget, config.data_dir, config.eval_rows or None)
        else:
            protocol = dataclasses.replace(evaluation.OPEN_UNLEARNING, rows=config.eval_rows or None)
            options = config.eval_retain, config.data_dir, config.seed, config.max_new_tokens, protocol
            benchmark = evaluation.Tofu(config.forget, *options)
        if config.retain_logs:
            benchmark.reference(config.model, config.retain_logs, None)  # a broken one is told before hours of training

    name, prompt = evaluation.resolve_model(config.model, "base" if config.finetune else "target")
    folder = resolve_folder(name)
    prompt = prompt if prompt and config.prompt == "auto" else config.prompt
    llama = LlamaConfig.from_folder(folder)
    wanted_tokenizer = evaluation.default_tokenizer(config.model, config.tokenizer)
    tokenizer = evaluation.load_tokenizer(wanted_tokenizer, folder, llama.vocab_size, prompt)
    examples = {role: encode(r, role, tokenizer, config) for role, r in rows.items()}
    counts = " + ".join(f"{len(e)} {role}" for role, e in examples.items())
    if refusals:
        examples["refusals"] = [
            [tokenizer.encode(row.question, line, f"{row.key}, refusal {i}") for i, line in enumerate(refusals)]
            for row in rows["forget"]
        ]
    for example in itertools.chain(*(examples[role] for role in rows), *examples.get("refusals", [])):
        if len(example.ids) - 1 > llama.max_position_embeddings:  # the last token is predicted, not read
            raise RunError(
                f"{example.key}: {len(example.ids)} tokens, {name} reaches {llama.max_position_embeddings}; shorten it"
            )
    borders = f", {tokenizer.borders_split} borders split" if tokenizer.borders_split else ""
    print(
        f"{name}: prompt format {tokenizer.format_name}{borders}; {counts} sequences; {device}, {compute_dtype}", flush=True
    )
    model = load_pretrained(folder, device=device, dtype=torch.float32, compute_dtype=compute_dtype)
    if not resume:
        data = data_record(rows | ({"refusals": refusals} if refusals else {}))
        data |= {"evaluation": benchmark.data()} if benchmark else {}
        prepare_out(config, out, data, folder, tokenizer.format_name)

    def score(subject, label, own_folder=None):
        """Evaluate; the per-item log is kept in the model's own run folder where it has one, else in this run's."""
        where = (own_folder, "final") if own_folder else (out, label)
        return benchmark.evaluate(subject, tokenizer, *where, f"evaluate {label}")

    logs, references = {}, (None, "")
    if wants_eval:
        logs["target"] = score(model, "target", evaluation.run_folder(name))
        if config.retain_model:
            retrained_name, _ = evaluation.resolve_model(config.retain_model, "target")
            retrained = load_pretrained(retrained_name, device=device, compute_dtype=compute_dtype)
            logs["retrained"] = score(retrained, "retrained", evaluation.run_folder(retrained_name))
            del retrained
        references = benchmark.reference(config.model, config.retain_logs, logs.get("retrained"))
        benchmark.summary(logs["target"], *references)  # other rows are refused now, not after the training

    def on_epoch(step, epoch, last):
        log = score(model, "unlearned", out) if last else score(model, f"epoch-{epoch:g}")
        record = {"step": step, "epoch": epoch} | benchmark.summary(log, *references)[0]
        path = out / "trajectory.jsonl"
        earlier = [r for r in evaluation.read_jsonl(path) if r["step"] < step]  # a resumed run may come by here again
        path.write_text("".join(json.dumps(r) + "\n" for r in [*earlier, record]))
        tqdm.write(f"epoch {epoch:g}: {benchmark.headline(record)}")

    train(model, config, examples, out, on_epoch if wants_eval else None)
    if not (out / "model").exists():
        save_pretrained(model, out / "model", tokenizer.folder)
    summary = {"model": str(out / "model")}
    if wants_eval:
        logs["unlearned"] = score(model, "unlearned", out)
        logs = {k: logs[k] for k in ("target", "unlearned", "retrained") if k in logs}
        for k, log in logs.items():
            summary[k], found = benchmark.summary(log, *references)
        summary["retain_reference"] = found if references[0] is not None else f"absent; {found}"
        print(f"\n{benchmark.report({k: summary[k] for k in logs}, found)}")
        print_samples({k: benchmark.samples(log) for k, log in logs.items()})
    if not config.finetune:
        summary["hints"] = find_hints(out, benchmark, logs, references[0], summary)
        for line in summary["hints"]:
            print(f"hint: {line}")
    evaluation.write_json(out / "summary.json", summary)
    tofu = isinstance(benchmark, evaluation.Tofu)
    if config.eval_every and tofu and references[0] is not None and importlib.util.find_spec("matplotlib"):
        print(f"trajectory: {evaluation.plot(out)}")
    shutil.rmtree(out / "checkpoint", ignore_errors=True)
    print(f"saved: {out}  (model/ in Hugging Face layout, log.jsonl, summary.json, config.json)")
    return summary


def run_requests(config: Config, out: Path, resume: bool) -> None:
    """MUSE's sustainability: sust/forget_1 to 4 as requests one after the other, each from the model before it.

    Request k is a run in `out/request-k`; `out/summary.json` holds the unlearned model's numbers after each.
    """
    if not resume:
        prepare_out(config, out, {}, Path(config.model), config.prompt)
    if config.eval and not config.retain_logs and config.model in MUSE_CHECKPOINTS:
        with contextlib.suppress(DataError):  # without it, PrivLeak is absent and each request says why
            log = evaluation.muse_retain_log(config.model, config.data_dir)
            config = dataclasses.replace(config, retain_logs=str(log))
    model, after = config.model, {}
    for k in range(1, 5):
        folder = out / f"request-{k}"
        request = {"sust": False, "forget": f"{config.forget}/sust/forget_{k}", "model": model, "out": str(folder)}
        tokenizer = evaluation.default_tokenizer(model, config.tokenizer)
        summary = run(dataclasses.replace(config, **request, tokenizer=tokenizer), folder, resume and folder.exists())
        model, after[f"request {k}"] = str(folder), summary.get("unlearned")
    if config.eval:
        print(evaluation.Muse.report(after, summary["retain_reference"]))
    evaluation.write_json(out / "summary.json", after)


COLLAPSE, QUALITY, RESTLESS, NO_LANGUAGE = 0.5, 0.05, 0.05, 0.5  # thresholds of `hints`; our choice, see the README


def find_hints(out: Path, benchmark, logs: dict[str, dict], reference: dict | None, summary: dict) -> list[str]:
    """`hints` of a finished unlearning run, from its folder, its evaluation logs and their summary."""
    log = evaluation.read_jsonl(out / "log.jsonl")
    points, remembers, degenerate = [], None, None
    if isinstance(benchmark, evaluation.Tofu):
        degenerate = evaluation.degenerate_share(benchmark.samples(logs["unlearned"]))
        later = evaluation.read_jsonl(out / "trajectory.jsonl") or [summary["unlearned"] | {"epoch": log[-1]["epoch"]}]
        points = [summary["target"], *later]
        if reference is not None:
            ours, theirs = (evaluation.truth_ratios(log) for log in (logs["unlearned"], reference))
            remembers = statistics.median(ours) < statistics.median(theirs)
    return hints(log, points, remembers, degenerate)


def hints(log: list[dict], points: list[dict], remembers: bool | None, degenerate: float | None) -> list[str]:
    """The failures that a finished unlearning run shows, each one line with its remedy.

    log: of log.jsonl. points: scores of the target and of each evaluation after it, with forget_quality (or None) and
    model_utility; empty without TOFU's evaluation. remembers: whether the forget answers are still likelier, against their
    wrong ones, than the retrained model has them; None without one. degenerate: `eval.degenerate_share`.
    """
    found, start = [], log[0]
    final = math.ceil(log[-1]["epoch"] - 1e-9)
    last_epoch = [record for record in log if math.ceil(record["epoch"] - 1e-9) == final]
    end = {key: statistics.fmean(r[key] for r in last_epoch) for key in ("nll/forget", "nll/retain") if key in start}
    utility = [p["model_utility"] for p in points]
    if utility and utility[-1] < COLLAPSE * utility[0]:
        found.append(
            f"utility collapsed: model utility {utility[-1]:.3g}, the target's is {utility[0]:.3g}; lower --lr, train fewer "
            "--epochs, raise --lam, or use a retain loss"
        )
    elif not utility and "nll/retain" in end and end["nll/retain"] > start["nll/retain"] + 1:
        found.append(
            f"utility collapsed: retain answers cost {end['nll/retain']:.3g} nats per token, at the start "
            f"{start['nll/retain']:.3g}; lower --lr, train fewer --epochs, or raise --lam"
        )
    quality = points[-1]["forget_quality"] if points else None
    if quality is not None and quality < QUALITY:
        peak = max(points[1:], key=lambda p: p["forget_quality"])
        peaked = peak["forget_quality"] >= QUALITY
        if remembers and not peaked and not found:  # of a broken model truth ratios say nothing
            found.append(
                f"under-unlearning: forget quality {quality:.2g}, the forget answers are better known than to the retrained "
                "model; raise --lr or --epochs"
            )
        elif peaked or not remembers:
            earlier = f" (it was {peak['forget_quality']:.2g} at epoch {peak['epoch']:g})" if peaked else ""
            found.append(
                f"over-unlearning: forget quality {quality:.2g}, beyond the retrained model{earlier}; train fewer --epochs "
                "or lower --lr"
            )
    elif quality is None and end["nll/forget"] < start["nll/forget"] + 0.5:
        found.append("under-unlearning: the forget answers are about as likely as at the start; raise --lr or --epochs")
    swing = evaluation.oscillation([u / utility[0] for u in utility]) if len(utility) > 4 and utility[0] else 0.0
    if swing > RESTLESS:
        found.append(
            f"oscillation: model utility goes back and forth by {swing:.0%} of the target's per evaluation; lower --lr, "
            "enlarge --batch-size, or pass --max-grad-norm 1"
        )
    if degenerate is not None and degenerate > NO_LANGUAGE:
        found.append(
            f"degenerate text: {degenerate:.0%} of the answers to forget questions are no language, which neither score "
            "sees; lower --lr, or train fewer --epochs"
        )
    return found


def print_samples(answers: dict[str, dict[str, tuple[str, str, str]]]) -> None:
    """Three questions with each model's answer. answers: {model: {key: (question, reference, generation)}}."""
    rows = next(iter(answers.values()))
    for key in list(rows)[:: max(1, len(rows) // 3)][:3]:
        question, reference, _ = rows[key]
        print(f"\n{question}\n    {'reference':<11} {reference}")
        for name, found in answers.items():
            print(f"    {name:<11} {found[key][2]}")
    print()


# ----------------------------------------------------------------------------------------------------------------- toy


def toy_base(config: Config) -> Path:
    """The folder of a fresh Llama with the toy world's tokenizer; what is made from it is kept beside it."""
    llama = LlamaConfig(
        vocab_size=config.toy_vocabulary, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=3, head_dim=32, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=0, eos_token_ids=(1,), initializer_range=0.05,
    )  # fmt: skip
    world = {k: fingerprint(v) for k, v in toy_world(config.seed).items()}
    key = hashlib.sha256(json.dumps([world, dataclasses.asdict(llama), TOY_FINETUNE]).encode()).hexdigest()[:8]
    base = RUNS / f"toy-seed{config.seed}-{key}" / "base"
    if not base.exists():
        tokenizer = train_toy_tokenizer(config.seed, base.parent / "tokenizer", config.toy_vocabulary)
        save_pretrained(Llama(llama).init_weights(config.seed), base, tokenizer)
    return base


def toy_models(config: Config) -> tuple[Path, Path]:
    """(target, retrained) run folders of the toy world, trained now or taken from an earlier run.

    Both start from the same fresh Llama and learn by this file's own loop: the target on every author and the world
    knowledge, the retrained model on all of that without the forget set.
    """
    base = toy_base(config)
    knowledge = "+toy_real_authors_perturbed+toy_world_facts_perturbed"
    folders = []
    for authors in ("toy_full", complement(config.forget)):
        out = base.parent / authors
        if not (out / "summary.json").exists():
            name = "target" if authors == "toy_full" else "retrained"
            print(f"toy world, {name} model: training on {authors}{knowledge} (once; kept in {out})", flush=True)
            finetune = Config(model=str(base), finetune=authors + knowledge, out=str(out), seed=config.seed, **TOY_FINETUNE)
            run(finetune, out, resume=out.exists())
        folders.append(out)
    return folders[0], folders[1]


def main(argv: list[str] | None = None) -> int:
    given, resume = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        if resume and "out" not in given:
            raise RunError("--resume: name the run folder with --out")
        config = read_config(Path(given["out"]), given) if resume else make_config(given)
        out = Path(config.out) if config.out else next_out(config)
        if not resume and out.exists():
            raise RunError(f"--out {out}: exists already; choose another folder, or go on with: {resume_command(out)}")
        if config.model == "toy":
            if config.eval:
                evaluation.require_extra()
            target, retrained = toy_models(config)
            retrained = config.retain_model or (None if config.retain_logs else str(retrained))
            config = dataclasses.replace(config, model=str(target), retain_model=retrained)
        if config.sust:
            run_requests(dataclasses.replace(config, out=str(out)), out, resume)
        else:
            run(dataclasses.replace(config, out=str(out)), out, resume)
    except (RunError, DataError, ModelError, evaluation.EvalError, dipo.SwappedRolesError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as e:
        print(f"error: out of memory ({first_line(e)}); lower --micro-batch-size", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"error: {e}; what was written so far is kept, go on with --resume", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as e:
        print(f"\n{e or 'interrupted; go on with --resume --out RUN'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
