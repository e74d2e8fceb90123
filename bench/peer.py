"""Ours beside open-unlearning's own code on a CPU, in float32: a TOFU evaluation, and a step of NPO+GD. They take turns.

python bench/peer.py --open-unlearning DIR --model SMOLLM2 --data-dir DATA --json peer.json

DIR: a clone of the repository locuslab/open-unlearning. It needs what we do not: pip install hydra-core hydra-colorlog
datasets accelerate scikit-learn. bench/open_unlearning.py says what is changed of it. Losses and generations are compared.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dipo  # noqa: E402
import train  # noqa: E402
from bench.machine import matmul_rate  # noqa: E402
from bench.setting import work  # noqa: E402
from config import Config  # noqa: E402
from data import Example, Tokenizer, draw, pack  # noqa: E402
from files import UserError  # noqa: E402
from inference import Options  # noqa: E402
from model import Llama, load_pretrained, resolve_folder  # noqa: E402
from reference import CachedReference  # noqa: E402
from tofu import Tofu, load_rows  # noqa: E402

NEEDS = "hydra-core hydra-colorlog datasets accelerate scikit-learn"
LOSS_TOLERANCE = 1e-3
SETS = "forget", "retain", "ra", "wf"


def template_of(tokenizer: Tokenizer) -> dict:
    """Our prompt as open-unlearning has it: all that stands before a question, and after it."""
    before, after = tokenizer.format.prompt.removeprefix("{bos}").split("{question}")
    tags = {"user_start_tag": "", "user_end_tag": after, "asst_start_tag": "", "asst_end_tag": ""}
    return {"apply_chat_template": False, "system_prompt_with_special_tokens": before} | tags


class Theirs:
    """open-unlearning in a process of its own."""

    def __init__(self, args, template: dict, files: dict[str, str]):
        settings = {"root": str(args.open_unlearning), "model": str(resolve_folder(args.model)), "data": args.data_dir}
        settings |= {"rows": args.rows, "template": template} | files
        worker = Path(__file__).with_name("open_unlearning.py")
        command = [sys.executable, str(worker), json.dumps(settings)]
        quiet = None if args.verbose else subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet, text=True)

    def __call__(self, what: str) -> tuple[float, Any]:
        """(seconds, what was found) of 'evaluate' or 'step'."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        if not (answer := self.process.stdout.readline()):
            status = self.process.wait()
            sys.exit(f"error: open-unlearning's side ended with status {status}; --verbose shows why. It needs: {NEEDS}")
        answer = json.loads(answer)
        return answer["seconds"], answer["found"]


def evaluate_ours(args, model: Llama, tokenizer: Tokenizer) -> dict:
    benchmark = Tofu(Options("tofu_forget10", args.data_dir, rows=args.rows))
    rows = benchmark.rows(model, tokenizer)
    return {"scores": benchmark.aggregate(rows), "rows": rows}


def evaluation_flops(args, model: Llama, tokenizer: Tokenizer, rows: dict) -> float:
    """What must be computed: what texts begin with alike through the blocks once, and the rest of each, each answer token
    through the head, each prompt token through the blocks once, each generated token through blocks and head."""
    head = model.lm_head.weight.numel()
    block = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    flops, texts = 0.0, list[Example]()
    for part, items in Tofu(Options("tofu_forget10", args.data_dir, rows=args.rows)).plan(tokenizer).items():
        for key, asked in items.items():
            for text in asked.texts.values():
                flops += 2 * head * text.example.answer_length
                texts.append(text.example)
            new = len(tokenizer.tokenizer.encode(rows[part][key]["generation"]).ids) + 1
            flops += 2 * block * (len(asked.prompt.ids) + new) + 2 * head * new
    return flops + 2 * block * pack(texts).input_ids.numel()


def our_step(model: Llama, examples: dict[str, list[Example]], compiled: bool):
    """(function that makes a step of NPO+GD, seconds of the cached reference's one pass)."""
    objective, optimizer = dipo.Objective(forget_loss="npo", retain_loss="gd"), train.make_optimizer(model, Config(lr=1e-4))
    parts = {
        role: train.Part(loss, 1.0, [(e,) for e in examples[role]]) for role, loss in (("forget", "npo"), ("retain", "gd"))
    }
    terms = train.compile_step(model) if compiled else dipo.position_terms
    size = len(examples["forget"])
    CachedReference(model, examples["forget"][:1], size, Path("reference.bin"))  # compiles
    began = time.perf_counter()
    reference = CachedReference(model, examples["forget"], size, Path("reference.bin"))
    once = time.perf_counter() - began

    def step() -> float:
        loss = train.compute_gradients(model, reference, objective, parts, size, terms)["loss"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step, once


def timed(function) -> tuple[float, Any]:
    began = time.perf_counter()
    found = function()
    return time.perf_counter() - began, found


def in_turns(sides: dict[str, Callable[[], tuple[float, Any]]], turns: int) -> dict[str, list[tuple[float, Any]]]:
    """{side: (seconds, what was found) of each turn}, after one turn that does not count."""
    found: dict[str, list] = {side: [] for side in sides}
    for _ in range(turns + 1):
        for side, function in sides.items():
            found[side].append(function())
            print(f"  {side}: {found[side][-1][0]:.2f} s", flush=True)
    return {side: turns[1:] for side, turns in found.items()}


def summary(found: dict[str, list[tuple[float, Any]]], flops: float, rate: float) -> dict:
    """Medians, and the medians of the ratios to `ours` in the same turn."""
    seconds = {side: [s for s, _ in turns] for side, turns in found.items()}
    ratio = [b / a for a, b in zip(seconds["ours"], seconds["open-unlearning"], strict=True)]
    record = {"ratio": statistics.median(ratio), "ratios": ratio, "flops": flops, "floor": flops / rate, "seconds": seconds}
    return record | {"median": {side: statistics.median(s) for side, s in seconds.items()}}


def row(name: str, record: dict) -> str:
    ours, theirs = record["median"]["ours"], record["median"]["open-unlearning"]
    return f"| {name} | {ours:.2f} | {theirs:.2f} | {record['ratio']:.2f} | {record['floor']:.2f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--open-unlearning", type=Path, required=True, help="folder of its repository")
    parser.add_argument("--model", required=True, help="folder of a Llama checkpoint")
    parser.add_argument("--data-dir", default=os.environ.get("DIPO_DATA"), help="TOFU in hub layout (default: $DIPO_DATA)")
    parser.add_argument("--rows", type=int, default=10, help="evaluated of each set")
    parser.add_argument("--batch", type=int, default=16, help="forget sequences of a step, and as many retain sequences")
    parser.add_argument("--turns", type=int, default=3, help="how often each side is timed, after once that does not count")
    parser.add_argument("--only", choices=("evaluation", "step"), help="one of the two")
    parser.add_argument("--eager", action="store_true", help="ours, not compiled")
    parser.add_argument("--verbose", action="store_true", help="what open-unlearning writes")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args()
    if not (args.open_unlearning / "src" / "evals").is_dir():
        sys.exit(f"error: --open-unlearning {args.open_unlearning}: is no clone of locuslab/open-unlearning; clone it there")
    if not args.data_dir:
        sys.exit("error: --data-dir: name the folder that holds TOFU/forget10.json")
    try:
        model = load_pretrained(args.model, dtype=torch.float32, compute_dtype=torch.float32)
        tokenizer = Tokenizer(resolve_folder(args.model), model.config.vocab_size)
        with tempfile.TemporaryDirectory() as folder:
            record = measure(args, model, tokenizer, Path(folder))
    except UserError as e:
        sys.exit(f"error: {e}")
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if record["difference"] > LOSS_TOLERANCE:
        sys.exit("error: the two do not compute the same")
    return 0


def measure(args, model: Llama, tokenizer: Tokenizer, folder: Path) -> dict:
    rows, paths = {}, {}
    for role, name in (("forget", "forget10"), ("retain", "retain90")):
        rows[role] = draw(load_rows(f"tofu_{name}", args.data_dir), 0, role, 0, args.batch)
        lines = [json.dumps({"question": r.question, "answer": r.answer}) for r in rows[role]]
        paths[role] = str(folder / f"{role}.json")
        Path(paths[role]).write_text("\n".join(lines))
    theirs = Theirs(args, template_of(tokenizer), paths)
    rate = matmul_rate(torch.float32, "cpu", ((2048, 2048, 2048), (4096, 1024, 4096)))
    print(f"float32, {torch.get_num_threads()} threads, torch {torch.__version__}; products reach {rate / 1e12:.3f} TFLOP/s")
    record, table, differences = {"rate": rate, "threads": torch.get_num_threads()}, [], [0.0]
    if args.only != "step":
        sides = {"ours": lambda: timed(partial(evaluate_ours, args, model, tokenizer))}
        found = in_turns(sides | {"open-unlearning": lambda: theirs("evaluate")}, args.turns)
        ours, other = (found[side][-1][1] for side in ("ours", "open-unlearning"))
        flops = evaluation_flops(args, model, tokenizer, ours["rows"])
        record["evaluation"] = summary(found, flops, rate)
        table.append(row(f"TOFU evaluation, {args.rows} rows a set", record["evaluation"]))
        losses = [v["avg_loss"] for v in other["forget_Q_A_Prob"]["value_by_index"].values()]
        mine = [item["loss"] for item in ours["rows"]["forget"].values()]
        differences += [abs(a - b) for a, b in zip(mine, losses, strict=True)]
        pairs = [
            (a["generation"], b["generation"])
            for part in SETS
            for a, b in zip(ours["rows"][part].values(), other[f"{part}_Q_A_ROUGE"]["value_by_index"].values(), strict=True)
        ]
        record["equal_generations"] = sum(a == b for a, b in pairs) / len(pairs)
        print(f"{record['equal_generations']:.0%} of the generations equal")
    if args.only != "evaluation":
        examples = {role: tokenizer.encode_rows(r) for role, r in rows.items()}
        step, record["reference_seconds"] = our_step(model, examples, not args.eager)
        sides = {"ours": lambda: timed(step), "open-unlearning": lambda: theirs("step")}
        found = in_turns(sides, args.turns)
        counted = work(model.config, examples)
        head = 2 * model.lm_head.weight.numel() * sum(e.answer_length for e in examples["forget"])  # the reference's
        record["step"] = summary(found, counted["finetuning"] + head, rate)
        table.append(row(f"step of NPO+GD, {args.batch} + {args.batch}", record["step"]))
        record["losses"] = [[loss for _, loss in turns] for turns in found.values()]
        differences += [abs(a / b - 1) for a, b in zip(*record["losses"], strict=True)]
        print(f"the cached reference's one pass over the forget sequences: {record['reference_seconds']:.2f} s")
    record["difference"] = max(differences)
    print(f"largest difference of a loss {record['difference']:.1g}\n")
    print("| | ours, s | open-unlearning, s | open-unlearning / ours | floor, s |\n| --- | --- | --- | --- | --- |")
    print("\n".join(table))
    return record


if __name__ == "__main__":
    sys.exit(main())
