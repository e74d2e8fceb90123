"""How far `--plan` is from what a training run takes: peak memory of a CPU process above that before the model is loaded.

python bench/memory.py --model FOLDER --forget tofu_forget10 --data-dir DATA
python bench/memory.py --model runs/toy-seed0-.../toy_full --forget toy_forget10 --micro-batches 1,16

Each row is a fresh process that makes two steps by train.train; one on a tiny model comes first, so that code, threads and
the compiler are there before it is measured. QUIET: malloc gives back what is freed, oneDNN keeps nothing of a shape.
"""

import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import plan  # noqa: E402
import train  # noqa: E402
from bench.machine import resident  # noqa: E402
from config import Config  # noqa: E402
from data import pack  # noqa: E402
from eval import open_source  # noqa: E402
from model import Llama, LlamaConfig, load_pretrained  # noqa: E402

STEPS = 2
QUIET = {"MALLOC_MMAP_THRESHOLD_": "65536", "LRU_CACHE_CAPACITY": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}


def predicted(shape: LlamaConfig, config: Config, examples: dict[str, list], machine: plan.Machine) -> int:
    """Bytes by the plan, for the passes that the steps really have."""
    most = 0
    for first in range(0, STEPS * config.batch_size, config.batch_size):
        parts = train.draw_parts(config, examples, first, config.batch_size)
        groups = [(role, group) for role, part in parts.items() for group in part.groups]
        for i in range(0, len(groups), config.micro_batch_size):
            some = [(role, e) for role, group in groups[i : i + config.micro_batch_size] for e in group]
            answers = [sum(e.answer_length for of, e in some if of == role) for role in parts]
            tokens = pack([e for _, e in some]).input_ids.numel()  # what they begin with alike once
            work = plan.Pass(tokens, sum(answers), max(answers), i == 0)
            most = max(most, sum(plan.step(shape, config, work, machine).values()))
    return most


def measured(source, config: Config, examples: dict[str, list]) -> int:
    """Peak bytes of the process above what it has before the model is loaded."""
    dtype = getattr(torch, config.dtype)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        tiny = LlamaConfig(source.config.vocab_size, 16, 16, 1, 2, 1, 8, source.config.max_position_embeddings)
        Path(folder, "config.json").write_text("{}")  # a run's folder
        train.train(Llama(tiny, dtype).init_weights(0), config, examples, Path(folder))
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        model = load_pretrained(source.folder, dtype=torch.float32, compute_dtype=dtype)
        train.train(model, config, examples, Path(folder))
        return resident("VmHWM") - before


def row(settings: dict) -> dict:
    config = Config(**settings, device="cpu", save_every=0, eval=False)
    source = open_source(config.model, "target")
    examples = train.encode(config, train.load_rows(config), source)
    size = len(examples["forget"])
    config = Config(**vars(config) | {"epochs": STEPS * config.batch_size / size + 1e-6})
    return {
        "predicted": predicted(source.config, config, examples, plan.Machine()),
        "measured": measured(source, config, examples),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a Llama checkpoint with its tokenizer")
    parser.add_argument("--forget", default="toy_forget10", help="data set")
    parser.add_argument("--data-dir", help="of it, in hub layout")
    parser.add_argument("--losses", default="dipo,dipo", help="of the forget and the retain set")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batches", default="1,4,16", help="sizes, with commas")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--kinds", default="eager,checkpointing,compiled", help="words joined by + are one kind")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(row(json.loads(args.worker))))
        return 0
    print("| dtype | kind | micro-batch | predicted, MB | measured, MB | predicted / measured |")
    print("| --- | --- | --- | --- | --- | --- |")
    worst = 0.0
    for dtype, kind, micro in itertools.product(
        args.dtypes.split(","), args.kinds.split(","), args.micro_batches.split(",")
    ):
        forget_loss, retain_loss = args.losses.split(",")
        settings = {
            "model": args.model, "forget": args.forget, "data_dir": args.data_dir, "dtype": dtype,
            "batch_size": args.batch_size, "micro_batch_size": int(micro), "compile": "compiled" in kind,
            "gradient_checkpointing": "checkpointing" in kind, "forget_loss": forget_loss, "retain_loss": retain_loss,
        }  # fmt: skip
        command = [sys.executable, __file__, "--worker", json.dumps(settings)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | QUIET)
        if done.returncode:
            raise SystemExit(f"error: {settings} failed; its message is above")
        found = json.loads(done.stdout)
        ratio = found["predicted"] / found["measured"]
        worst = max(worst, abs(math.log(ratio)))
        sizes = " | ".join(f"{found[key] / 1e6:,.0f}" for key in ("predicted", "measured"))
        print(f"| {dtype} | {kind} | {micro} | {sizes} | {ratio:.2f} |", flush=True)
    print(f"\nfurthest from 1: {math.exp(worst):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
