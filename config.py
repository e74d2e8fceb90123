"""What decides a run: every hyper-parameter with its flag, the presets, and what may be asked for."""

import argparse
import dataclasses
import json
import math
import platform
import re
import shutil
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

import dipo
from checkpoint import RunError
from data import PROMPT_FORMATS
from dipo import LOSSES, Objective
from eval import ALIASES, benchmark_of
from files import Field
from memory import FLOOR

RUNS = Path("runs")
AUTO = 0  # the `micro_batch_size` that is chosen by free memory


def option(default, help: str, choices: tuple | None = None, type: type | None = None):
    return field(default=default, metadata={"help": help, "choices": choices, "type": type})


BETAS = ", ".join(f"{name} {row.beta}" for name, row in LOSSES.items() if row.beta)
SOURCES = {role: "; ".join(f"{name}: {LOSSES[name].source}" for name in dipo.loss_names(role)) for role in dipo.ROLES}
KEPT = 0.9
BEST = f"most forget quality with {KEPT:.0%} of the target's utility, else the most utility"
# Neither decides a result beyond rounding: a resumed run may change the first, and has found the second by their content.
MACHINE = (
    "device", "dtype", "reference", "micro_batch_size", "gradient_checkpointing", "cpu_offload", "compile", "save_every",
    "keep",
)  # fmt: skip
PATHS = ("model", "tokenizer", "refusals", "data_dir", "retain_logs", "retain_model", "out")


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. The paper's values are the defaults; PRESETS hold the others."""

    # what
    preset: str = option("paper", "named defaults: paper, anchored, smollm2; muse and toy, which the data choose")
    model: str = option("toy", f"model to start from: toy, {', '.join(ALIASES)}, hub id or folder")
    tokenizer: str | None = option(None, "folder or hub id, where the model has no tokenizer", type=str)
    prompt: str = option("auto", f"prompt format: auto, {', '.join(PROMPT_FORMATS)}")
    forget: str = option(
        "toy_forget10",
        "tofu_forget01|05|10, muse_news|books, slices A[:300], sums A+B, or a .jsonl, .json, .csv or .parquet file",
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
    forget_loss: str = option(Objective.forget_loss, f"of the forget set ({SOURCES['forget']})")
    retain_loss: str = option(Objective.retain_loss, f"of the retain set ({SOURCES['retain']}; none)")
    beta: float | None = option(None, f"beta of the losses that have one (default: {BETAS})", type=float)
    lam: float = option(Objective.lam, "lambda, weight of the retain loss")
    alpha: float = option(Objective.alpha, "strength of the memory vector in the pair softmax(z +- alpha m)")
    p: float = option(Objective.p, "rank and relative threshold of the memory vector, a fraction")
    filter: str = option(Objective.filter, "which threshold keeps a logit in the memory vector", dipo.FILTERS)
    pair_from: str | None = option(
        None, "whose logits make the pair (default: dipo policy, anchored reference)", ("policy", "reference"), str
    )
    center: bool = option(Objective.center, "make the memory vector from logits minus their mean")
    reduction: str = option(Objective.reduction, "margin of a sequence: sum or mean over its answer tokens", ("sum", "mean"))
    kappa: float = option(Objective.kappa, "weight of the anchor of anchored losses")
    positions: str = option(Objective.positions, "what anchored losses forget of an answer", ("memory", "all"))
    tau: float = option(Objective.tau, "nats by which a memory position surprises what the retain set explains")
    # optimisation
    lr: float = option(1e-5, "peak learning rate of AdamW (betas 0.9, 0.999; eps 1e-8)")
    epochs: float = option(10.0, "passes over the forget (or finetuning) set")
    batch_size: int = option(32, "effective batch, forget sequences per step (and as many retain sequences)")
    micro_batch_size: int = option(
        8, "sequences per forward pass, forget and retain, or auto (default on GPUs): as many as memory holds"
    )
    warmup_epochs: float = option(1.0, "linear warm-up, epochs")
    schedule: str = option("linear", "learning rate after the warm-up: decays to zero, or stays", ("linear", "constant"))
    optimizer: str = option("adamw", "AdamW, or with moments of 8 bits (torchao's)", ("adamw", "adamw8bit"))
    weight_decay: float = option(0.01, "decoupled weight decay of matrices")
    max_grad_norm: float = option(0.0, "clip the gradient's norm to this; 0 = off")
    seed: int = option(0, "of data order, pairing, and the toy world")
    # machine
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = option("auto", "of activations; auto: bfloat16 on GPUs", ("auto", "float32", "bfloat16"))
    reference: str = option("cached", "states of one pass before training, or a second model", ("cached", "recompute"))
    gradient_checkpointing: bool = option(False, "keep one activation per block, compute the others again: less memory")
    cpu_offload: bool = option(False, "weights, gradients and moments in host memory, under torchrun: for one small GPU")
    compile: bool | None = option(None, "torch.compile blocks and loss (default: on a GPU, for long runs)", type=bool)
    # evaluation
    eval: bool = option(True, "evaluate target and unlearned model")
    eval_every: float = option(0.0, "also evaluate every so many epochs; 0 = only at the end")
    eval_retain: str | None = option(None, "rows that stand for the retain set in evaluation", type=str)
    eval_rows: int = option(0, "only the first so many rows of each evaluation set; 0 = all")
    retain_logs: str | None = option(None, "evaluation log of the retrained model, for forget quality", type=str)
    retain_model: str | None = option(None, "the retrained model itself, for forget quality and its column", type=str)
    max_new_tokens: int = option(200, "length of generations in evaluation, tokens")
    keep_best: bool = option(False, f"keep the model of the best --eval-every evaluation: {BEST}")
    # run
    save_every: int | None = option(
        None, "save the state every so many steps (default: each minute, at most 2 % of the time); 0 = only when stopped",
        type=int,
    )  # fmt: skip
    keep: int = option(1, "how many saved states stay, each 12 bytes per parameter")
    out: str | None = option(None, "run folder (default: runs/<forget>-<losses>-<number>)", type=str)

    @property
    def objective(self) -> Objective:
        return Objective(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Objective)})

    @property
    def parts(self) -> dict[str, tuple[str, float]]:
        """{role: (its loss, its weight)}. Raises ValueError for a loss that there is not."""
        return dipo.FINETUNING if self.finetune else self.objective.parts()

    @property
    def results(self) -> str:
        """All that decides the results, but for the content of files, as a text."""
        return json.dumps({k: v for k, v in vars(self).items() if k not in MACHINE + PATHS}, sort_keys=True)

    @property
    def sets(self) -> Iterator[tuple[str, str]]:
        """(role, its data set), one after the other. Raises DataError where a retain set must be named."""
        if self.finetune:
            yield "finetune", self.finetune
            return
        yield "forget", f"{self.forget}/scal/forget_{self.scal}" if self.scal else self.forget
        if "retain" in self.parts:
            yield "retain", self.retain or benchmark_of(self.forget).complement(self.forget)


# The data set's own comes first (muse, toy), the one that is named over it.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "anchored": {"forget_loss": "anchored", "retain_loss": "anchored"},
    "muse": {"warmup_epochs": 0.0, "weight_decay": 0.0, "schedule": "constant", "micro_batch_size": 1},
    "smollm2": {"lr": 4e-4, "epochs": 3.0, "batch_size": 16},
    "toy": {"lr": 4e-4, "epochs": 10.0, "batch_size": 16, "micro_batch_size": 16, "max_new_tokens": 24, "eval_every": 2.0},
}
TOY_ANCHORED = {"lr": 8e-4}  # of the toy with both losses anchored, which it has where none is named


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def kind_of(f: dataclasses.Field) -> type:
    return f.metadata["type"] or type(f.default)


# What config.json of a run folder holds.
FIELDS = {f.name: Field(kind_of(f), null=f.default is None) for f in dataclasses.fields(Config)}


class Plan(NamedTuple):
    """What `--plan` asks: of how many ranks, and the sequences that are counted with."""

    world_size: int
    tokens: int
    answers: int  # of the tokens


TOFU_LENGTHS = 85, 37  # tokens of a TOFU sequence, prompt and answer, and of its answer: means in SmolLM2's tokens


def number_or_auto(text: str) -> int:
    if text != "auto" and not re.fullmatch(r"-?\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'auto'")
    return AUTO if text == "auto" else int(text)


def lengths(text: str) -> tuple[int, int]:
    found = [int(x) for x in re.findall(r"\d+", text)]
    if not re.fullmatch(r"\d+,\d+", text) or not 0 < found[1] <= found[0]:
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKENS,ANSWER: of a sequence, and how many of them are answer")
    return found[0], found[1]


def parse_args(argv: list[str], description: str | None = None) -> tuple[dict, str | Plan]:
    """({field: value} that the user typed, '' for a new run, else 'resume', 'anyway' or what is to be planned)."""
    parser = argparse.ArgumentParser(
        "train.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for f in dataclasses.fields(Config):
        flag, kind = flag_of(f.name), kind_of(f)
        special = {k: v[f.name] for k, v in PRESETS.items() if f.name in v}
        default = ", ".join([f"default {f.default}"] + [f"preset {k}: {v}" for k, v in special.items()])
        text = (f"{f.metadata['help']} [{default}]" if f.default is not None else f.metadata["help"]).replace("%", "%%")
        how: dict[str, Any] = (
            {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "choices": f.metadata["choices"]}
        )
        if f.name == "micro_batch_size":
            how["type"] = number_or_auto
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **how)
    how = {"dest": "resume", "action": "store_const", "default": ""}
    parser.add_argument("--resume", const="resume", help="go on with the interrupted run in --out", **how)
    parser.add_argument("--resume-anyway", const="anyway", help="the same, though its model or data has changed", **how)
    text = "print what these settings need, and stop; of sequences of so many tokens, so many of them answer"
    text += " [{},{}; of MUSE --max-length]".format(*TOFU_LENGTHS)
    parser.add_argument("--plan", nargs="?", const=(), type=lengths, metavar="TOKENS,ANSWER", help=text)
    parser.add_argument("--world-size", type=int, default=1, help="with --plan: on so many ranks")
    given = vars(parser.parse_args(argv))
    resume, plan, world_size = (given.pop(name) for name in ("resume", "plan", "world_size"))
    if not 1 <= world_size <= 2**20 or (world_size > 1 and plan is None):
        parser.error("--world-size: is --plan's, 1 rank or more; what starts them is torchrun --nproc-per-node")
    if plan is None:
        return given, resume
    if str(given.get("finetune") or given.get("forget") or given.get("model")).startswith("muse"):
        plan = plan or (given.get("max_length", Config.max_length),) * 2  # every token is answer
    if given.get("device") != "cpu":  # what is planned is a GPU's
        given.setdefault("micro_batch_size", AUTO)
    return given, Plan(world_size, *(plan or TOFU_LENGTHS))


def make_config(given: dict) -> Config:
    """Defaults, then the preset, then what was typed. Raises RunError for settings that make no sense."""
    toy = given.get("model", "toy") == "toy" and "finetune" not in given
    usual = "toy" if toy else benchmark_of(given.get("finetune") or given.get("forget", "")).preset or "paper"
    preset = given.get("preset", "anchored" if toy and not {"forget_loss", "retain_loss"} & {*given} else usual)
    if preset not in PRESETS:
        raise RunError(f"--preset {preset}: unknown; known are {', '.join(PRESETS)}")
    settings = PRESETS[usual] | PRESETS[preset] | given
    if toy and settings.get("forget_loss") == settings.get("retain_loss") == "anchored":
        settings |= TOY_ANCHORED | given
    if "micro_batch_size" not in given and torch.cuda.is_available() and settings.get("device") != "cpu":
        settings["micro_batch_size"] = AUTO
    config = Config(**(settings | {"preset": preset}))
    validate(config, given)
    return config


POSITIVE = ("alpha", "p", "lr", "epochs", "batch_size", "max_new_tokens", "max_length", "beta", "keep")
NOT_NEGATIVE = (
    *("lam", "kappa", "warmup_epochs", "weight_decay", "max_grad_norm", "eval_every", "eval_rows", "save_every"),
    "micro_batch_size",
)
LARGEST = {"epochs": 1e4, "batch_size": 2**16, "toy_vocabulary": 10**6, "seed": 2**63 - 1}


def validate(config: Config, given: Collection[str] = ()) -> None:
    """given: the names of what was typed. Raises RunError for settings that make no sense."""
    for f in dataclasses.fields(config):
        value, flag = getattr(config, f.name), flag_of(f.name)
        if isinstance(value, str):
            if re.search("[\x00-\x1f\x7f\ud800-\udfff]", value):
                raise RunError(f"{flag} {ascii(value)}: holds what is no text in one line; rename it")
            if f.metadata["choices"] and value not in f.metadata["choices"]:
                raise RunError(f"{flag} {value}: is none of {', '.join(f.metadata['choices'])}")
        elif value is not None and not isinstance(value, bool):
            if math.inf != abs(value) > (most := LARGEST.get(f.name, 1e9)):
                raise RunError(f"{flag} {str(value)[:20]}: is beyond {most:g}; pass less")
            if f.name in POSITIVE and (not value > 0 or not math.isfinite(value)):
                raise RunError(f"{flag} {value}: must be positive")
            if f.name in NOT_NEGATIVE and not 0 <= value < math.inf:
                raise RunError(f"{flag} {value}: must be 0 or more, and finite")
    if 0 < config.eval_every < 1e-3:
        raise RunError(f"--eval-every {config.eval_every}: is more than once a step; pass 0.001 or more, or 0")
    if config.keep_best and (
        config.finetune or not config.eval or not config.eval_every or config.forget.startswith("muse_")
    ):
        raise RunError("--keep-best: needs evaluations of forget quality on the way; pass --eval-every, or drop the flag")
    try:
        config.parts  # noqa: B018
    except ValueError as e:
        raise RunError(f"--forget-loss, --retain-loss: {e}") from None
    if config.beta is not None and not config.finetune and not LOSSES[config.forget_loss].beta:
        raise RunError(f"--beta: is the forget loss's, and {config.forget_loss} has none; drop the flag")
    if not math.isfinite(config.tau):
        raise RunError(f"--tau {config.tau}: must be a number of nats; --positions all is no threshold at all")
    if config.tau >= -math.log(FLOOR):
        raise RunError(f"--tau {config.tau}: no token surprises by {-math.log(FLOOR):.2f} nats or more; pass less")
    for name, roles in (("kappa", dipo.ROLES), ("positions", ("forget",)), ("tau", ("forget",))):
        losses = [config.parts[role][0] for role in roles if role in config.parts]
        if name in given and not any(LOSSES[loss].anchored for loss in losses):
            of = " or ".join(dict.fromkeys(losses)) or "finetuning"
            raise RunError(f"--{name}: is of anchored losses, not of {of}; drop the flag")
    if "tau" in given and config.positions == "all":
        raise RunError("--tau: tells memory positions apart, and --positions all takes every one; drop one of them")
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


def versions() -> dict:
    commit = None
    if shutil.which("git"):
        command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {"python": platform.python_version(), "torch": torch.__version__, "commit": commit, "machine": machine}
