"""What one unlearning step costs: ours, ours without each of its savings, the field's way, plain fine-tuning. Side by side.

python bench/step.py --quick --json step.json                    10 minutes on 2 cores: the ratios, what each saving earns
python bench/step.py --model SMOLLM2 --data-dir DATA             25 minutes: real weights and text, all variants
python bench/step.py --only ours,field --sweep sweep.png         how both grow with length, batch, vocabulary, model
python bench/step.py --shape llama2-7b --device cuda --only ours --gradient-checkpointing

Each variant is a fresh process with the same weights, batch and dtype, so that its peak memory is its own; their steps take
turns, so that a machine that slows down slows all of them down. `Field's way`: transformers' model under autocast, a frozen
deep copy, padded batches, logits at all positions, the four KLs of Eq. 14 as they stand in the paper.
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import gc
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import dipo  # noqa: E402
import reference  # noqa: E402
import train  # noqa: E402
from bench.machine import matmul_rate, pick_dtype, resident  # noqa: E402
from bench.setting import SHAPES, config_of, make_examples, make_model, on_meta, predicted_memory, work  # noqa: E402
from config import Config  # noqa: E402
from files import UserError  # noqa: E402
from plan import free_memory  # noqa: E402

WITHOUT = {
    "1 cached reference": "ours-recompute",
    "2 head at answer positions": "ours-all-positions",
    "3 one pass for both sets": "ours-two-passes",
    "4 packing (padded, length-sorted)": "ours-padded",
    "5 loss in chunks": "ours-one-chunk",
}
NAMES = {
    "ours": "ours, compiled",
    "ours-eager": "ours, eager",
    "ours-compiled-loss": "ours, loss compiled alone",
    "ours-checkpointing": "ours, gradient checkpointing",
    **{variant: f"ours without {what}" for what, variant in WITHOUT.items()},
    "finetune": "plain fine-tuning, ours, compiled",
    "finetune-eager": "plain fine-tuning, ours, eager",
    "field": "DiPO, the field's way",
    "field-npo": "NPO+GD, the field's way",
}


# ------------------------------------------------------------------------------------------------------------ variants


def padded(examples: list[data.Example]) -> data.Batch:
    """`data.pack` with padding instead: [B, T], attention over all of T."""
    T = max(len(e.ids) for e in examples) - 1
    input_ids = torch.tensor([[*e.ids[:-1]] + [0] * (T + 1 - len(e.ids)) for e in examples])
    at = [i * T + t for i, e in enumerate(examples) for t in range(e.prompt_length - 1, len(e.ids) - 1)]
    moved = {"input_ids": input_ids, "positions": torch.arange(T)[None], "at": torch.tensor(at)}
    return dataclasses.replace(data.pack(examples), packing=SimpleNamespace(to=lambda device: None), **moved)


def our_step(args, variant: str):
    """(model, what to call once the weights, gradients and moments are there, to get a function that does one step)."""
    model = make_model(args)
    examples = make_examples(args, model.config.vocab_size)
    config = Config(lr=1e-4, optimizer=args.optimizer)
    optimizer = train.make_optimizer(model, config)
    model.checkpointing = args.gradient_checkpointing or variant == "ours-checkpointing"
    if variant == "ours-all-positions":
        examples = {role: [dataclasses.replace(e, prompt_length=1) for e in x] for role, x in examples.items()}
    if variant == "ours-one-chunk":
        train.chunk_positions = lambda *_: 2**62
    if variant == "ours-padded":
        train.pack = reference.pack = padded
        examples = {role: sorted(x, key=lambda e: len(e.ids)) for role, x in examples.items()}
    every = [e for x in examples.values() for e in x]
    parts = {role: train.Part("dipo", 1.0, [(e,) for e in x]) for role, x in examples.items()}
    if variant.startswith("finetune"):
        parts = {"finetune": train.Part("gd", 1.0, [(e,) for e in every])}
    passes = [{role: part} for role, part in parts.items()] if variant == "ours-two-passes" else [parts]
    objective, terms = config.objective, dipo.position_terms
    if variant == "ours-compiled-loss":
        terms = torch.compile(terms, dynamic=True)
    elif not variant.endswith("eager"):
        terms = train.compile_step(model)

    def start():
        frozen = None
        if not variant.startswith("finetune"):
            with contextlib.redirect_stdout(sys.stderr):
                if variant == "ours-recompute":
                    frozen = reference.RecomputedReference(model)
                else:
                    frozen = reference.CachedReference(model, every, args.micro_batch_size, Path("reference.bin"))

        def step():
            arguments = args.micro_batch_size, terms
            losses = [train.compute_gradients(model, frozen, objective, p, *arguments)["loss"] for p in passes]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return sum(losses)

        return step

    return model, optimizer, start


def four_kl_loss(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, role: str, beta: float = 0.05, p: float = 0.05
) -> Tensor:
    """Eq. 14 as one would first write it: every KL over the whole vocabulary, at every position. labels: -100 = ignored."""
    logits, ref_logits, mask = logits[:, :-1].float(), ref_logits[:, :-1].float(), labels[:, 1:] != -100
    with torch.no_grad():
        kth = logits.topk(int(p * logits.shape[-1]), dim=-1).values[..., -1:]
        confident = (logits >= kth) & (logits >= logits.max(-1, keepdim=True).values + math.log(p))
        m = torch.where(confident, logits, 0.0)
        memory, forgetting = F.log_softmax(logits + m, -1), F.log_softmax(logits - m, -1)
        ref_log_probs = F.log_softmax(ref_logits, -1)
    preferred, dispreferred = (forgetting, memory) if role == "forget" else (memory, forgetting)
    log_probs = F.log_softmax(logits, -1)

    def sequence_kl(target, log_q):
        return (F.kl_div(log_q, target, log_target=True, reduction="none").sum(-1) * mask).sum(-1)

    policy = sequence_kl(dispreferred, log_probs) - sequence_kl(preferred, log_probs)
    reference = sequence_kl(dispreferred, ref_log_probs) - sequence_kl(preferred, ref_log_probs)
    return -F.logsigmoid(beta * (policy - reference)).mean()


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return losses.sum(-1)


def field_step(args, variant: str):
    """The same weights and batch in transformers, trained as the field does (transformers' trainer with bf16=True)."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    ours = make_model(args)
    examples = make_examples(args, ours.config.vocab_size)
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(HFConfig(**ours.config.to_dict(torch.float32)), attn_implementation="sdpa")
    model.load_state_dict(dict(ours.named_parameters()), strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(args.device)  # its buffers are not stored
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batches = {}
    for role, x in examples.items():
        T = max(len(e.ids) for e in x)
        ids = torch.tensor([[*e.ids] + [0] * (T - len(e.ids)) for e in x])
        mask = torch.tensor([[1] * len(e.ids) + [0] * (T - len(e.ids)) for e in x])
        prompt = torch.tensor([[e.prompt_length] for e in x])
        labels = ids.masked_fill((torch.arange(T) < prompt) | (mask == 0), -100)
        batches[role] = {
            k: v.to(args.device) for k, v in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()
        }

    def start():
        reference = copy.deepcopy(model).eval().requires_grad_(False)

        def logits(network, batch):
            return network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits

        def step():
            with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.dtype == "bfloat16"):
                loss = 0.0
                for role, batch in batches.items():
                    labels, z = batch["labels"], logits(model, batch)
                    if variant == "field-npo" and role == "retain":
                        loss = loss + nll(z, labels).sum() / (labels[:, 1:] != -100).sum()
                        continue
                    with torch.no_grad():
                        z_ref = logits(reference, batch)
                    if variant == "field-npo":
                        gap = nll(z, labels) - nll(z_ref, labels)
                        loss = loss - 2 / 0.1 * F.logsigmoid(0.1 * gap).mean()
                    else:
                        loss = loss + four_kl_loss(z, z_ref, labels, role)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    return model, optimizer, start


# -------------------------------------------------------------------------------------------------------------- worker


def worker(args) -> None:
    """Do steps for each line on stdin, and answer with the time of one, its loss and the peak memory so far, as JSON."""
    make = field_step if args.worker.startswith("field") else our_step
    model, optimizer, start = make(args, args.worker)
    cuda = args.device.startswith("cuda")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0 * group["lr"]  # a tensor, of torchao's
    optimizer.step()  # the moments exist from here on; nothing moves
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        base = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        base = resident("VmRSS")
    optimizer.zero_grad(set_to_none=True)
    step = start()
    for count, _ in enumerate(sys.stdin):
        if count == 1:  # the first step compiles
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            else:
                gc.collect()
                ctypes.CDLL(None).malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        began = time.perf_counter()
        for _ in range(args.in_a_row):
            loss = step()
        if cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / args.in_a_row
        peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
        print(json.dumps({"seconds": seconds, "loss": float(loss), "above": peak - base, "peak": peak}), flush=True)


class Worker:
    """A variant in a process of its own."""

    def __init__(self, variant: str, args, **changed):
        settings = {k: v for k, v in (vars(args) | changed).items() if k in SETTINGS and v not in (None, False)}
        flags = [x for k, v in settings.items() for x in ([f"--{k.replace('_', '-')}"] + ([] if v is True else [str(v)]))]
        command = [sys.executable, __file__, "--worker", variant, *flags]
        self.variant, self.results = variant, []
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(
                f"error: {NAMES[self.variant]} failed (exit status {self.process.wait()}); its message is above"
            )
        self.results.append(json.loads(answer))

    def close(self) -> dict:
        self.process.stdin.close()
        self.process.wait()
        measured = self.results[1:]
        return {
            "seconds": statistics.median(r["seconds"] for r in measured),
            "all_seconds": [r["seconds"] for r in measured],
            "first_seconds": self.results[0]["seconds"],
            "losses": [r["loss"] for r in self.results],
            "above": max(r["above"] for r in measured),
            "peak": max(r["peak"] for r in measured),
        }


def measure(variants: list[str], args, steps: int, **changed) -> dict[str, dict]:
    """Steps of several variants, in turns where they fit into memory together; {variant: medians}."""
    found: dict[str, dict] = {}
    for some in fitting(variants, args, **changed):
        found |= in_turns(some, args, steps, **changed)
    return found


def in_turns(variants: list[str], args, steps: int, **changed) -> dict[str, dict]:
    workers: list[Worker] = []
    try:
        for variant in variants:  # one after the other: compiling takes all cores
            workers.append(Worker(variant, args, **changed))
            workers[-1].step()
        for _ in range(steps):
            for w in workers:
                w.step()
        return {w.variant: w.close() for w in workers}
    finally:
        for w in workers:
            w.process.kill()


# -------------------------------------------------------------------------------------------------------------- tables


def matmul_ceiling(args) -> float:
    """FLOP/s of the best of a few matrix products in the compute dtype."""
    sizes = (2048, 2048, 2048), (4096, 1024, 4096), (8192, 8192, 8192)
    return matmul_rate(getattr(torch, args.dtype), args.device, sizes[: 3 if args.device.startswith("cuda") else 2])


PROCESS = 500e6  # bytes of a process without a model, on a CPU


def fitting(variants: list[str], args, **changed) -> list[list[str]]:
    """The variants in sets that fit into memory side by side: all, or where they only fit one by one, each alone. Says what
    each needs and leaves out, by name, what does not fit at all."""
    args = argparse.Namespace(**(vars(args) | changed))
    config = config_of(args)
    examples, left, needed = make_examples(args, config.vocab_size), free_memory(torch.device(args.device)), {}
    for v in variants:
        state, above = predicted_memory(v, args, config, examples)
        needed[v] = state + above + (0 if args.device.startswith("cuda") else PROCESS)
        fits = "" if needed[v] <= left else f": LEFT OUT, {left / 1e9:.1f} are available"
        print(f"{NAMES[v]}: needs {needed[v] / 1e9:.1f} GB, {state / 1e9:.1f} of it state (predicted){fits}", flush=True)
    rest = [v for v in variants if needed[v] <= left]
    if (total := sum(needed[v] for v in rest)) <= left:
        return [rest] if rest else []
    print(f"one after the other, not in turns: together {total / 1e9:.1f} GB, {left / 1e9:.1f} are available", flush=True)
    return [[v] for v in rest]


def table(results: dict[str, dict], counted: dict, ceiling: float) -> str:
    field, floor = results.get("field"), results.get("finetune") or results.get("finetune-eager")
    head = [
        "",
        "ms/step",
        "real tokens/s",
        "answer tokens/s",
        "peak above state, MB",
        "peak, MB",
        "FLOPs used",
        "field / this",
        "memory / field",
        "this / fine-tuning",
    ]
    rows = [head, ["---"] * len(head)]
    for variant, r in results.items():
        flops = counted["finetuning" if variant.startswith("finetune") else "dipo"]
        rows.append([
            NAMES[variant], f"{1e3 * r['seconds']:,.0f}", f"{counted['tokens'] / r['seconds']:,.0f}",
            f"{counted['answer_tokens'] / r['seconds']:,.0f}", f"{r['above'] / 1e6:,.0f}", f"{r['peak'] / 1e6:,.0f}",
            f"{flops / r['seconds'] / ceiling:.0%}", f"{r['field_ratio']:.2f}" if field else "",
            f"{r['above'] / field['above']:.2f}" if field else "",
            f"{r['ratio_to_first'] / floor['ratio_to_first']:.2f}" if floor else "",
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


SWEEPS = {
    "tokens per sequence": ("length", (64, 128, 256, 512)),
    "sequences per set": ("batch", (4, 8, 16, 32)),
    "vocabulary": ("vocab", (32000, 49152, 128256)),
    "model": ("shape", ("small", "smollm2-135m", "smollm2-360m")),
}


def exponent(xs: list[float], ys: list[float]) -> float:
    """The slope of log y against log x, by least squares, without what was left out (nan)."""
    x, y = zip(*((math.log(a), math.log(b)) for a, b in zip(xs, ys, strict=True) if not math.isnan(b)), strict=True)
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def sweep(args) -> dict:
    """{axis: {'x', variant: {'seconds', 'above'}, exponents}}, one axis varied at a time from --shape small, 8 sequences."""
    found = {}
    for axis, (name, values) in SWEEPS.items():
        xs, rows = [], {"ours": [], "field": []}
        for value in values:
            changed = {"shape": "small", "batch": 8, "model": None, "data_dir": None, "length": 128} | {name: value}
            config = SHAPES[changed["shape"]]
            parameters = sum(p.numel() for p in on_meta(config).parameters())
            xs.append(parameters if axis == "model" else value)
            measured = measure(list(rows), args, 3, **changed)
            for variant in rows:
                rows[variant].append(measured.get(variant, {"seconds": math.nan, "above": math.nan}))
            both = ", ".join(f"{v} {r[-1]['seconds']:.2f} s, {r[-1]['above'] / 1e6:,.0f} MB" for v, r in rows.items())
            print(f"{axis} {value}: {both}", flush=True)
        found[axis] = {"x": xs}
        for variant, results in rows.items():
            found[axis][variant] = {key: [r[key] for r in results] for key in ("seconds", "above")}
            found[axis][variant] |= {f"exponent_{k}": exponent(xs, found[axis][variant][k]) for k in ("seconds", "above")}
    return found


def draw_sweeps(found: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(found), figsize=(4 * len(found), 7), squeeze=False)
    for column, (axis, values) in enumerate(found.items()):
        for row, (key, label, scale) in enumerate((("seconds", "s per step", 1), ("above", "MB above the state", 1e6))):
            plot = axes[row][column]
            for variant, name in (("ours", "ours"), ("field", "field's way")):
                r = values[variant]
                plot.loglog(
                    values["x"], [y / scale for y in r[key]], "o-", label=f"{name}, exponent {r[f'exponent_{key}']:.2f}"
                )
            plot.set(xlabel="million parameters" if axis == "model" else axis, ylabel=label)
            shown = [f"{x / 1e6:.0f}" if axis == "model" else f"{x}" for x in values["x"]]
            plot.set_xticks(values["x"], shown)
            plot.set_xticks([], minor=True)
            plot.yaxis.set_major_formatter("{x:g}")
            plot.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:.0e}"[0] in "25" else "")
            plot.legend(fontsize=8)
            plot.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


QUICK_SECONDS = 240  # --quick starts no further group of variants after this time
SETTINGS = (
    "model",
    "shape",
    "vocab",
    "length",
    "data_dir",
    "dtype",
    "device",
    "batch",
    "micro_batch_size",
    "gradient_checkpointing",
    "optimizer",
    "in_a_row",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a Llama checkpoint (default: random weights of --shape)")
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES, help="of the random model")
    parser.add_argument("--vocab", type=int, help="another vocabulary for --shape")
    parser.add_argument(
        "--data-dir", help="TOFU in hub layout; with --model the batch is its text, else random tokens of such lengths"
    )
    parser.add_argument("--length", type=int, help="all sequences of this many tokens, half of them answer")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float32"),
        help="of activations; weights are float32; auto: bfloat16 where its matrix products are not slower",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=16, help="forget sequences, and as many retain sequences")
    parser.add_argument("--micro-batch-size", type=int, default=16, help="ours: sequences per forward pass")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="ours")
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "adamw8bit"), help="ours")
    parser.add_argument(
        "--in-a-row", type=int, help="steps of a turn, between which nothing waits for a GPU, as in training (1, on a GPU 4)"
    )
    parser.add_argument("--steps", type=int, default=3, help="timed turns of each variant, after one that is not timed")
    parser.add_argument("--only", help="variants to measure, with commas: " + ", ".join(NAMES))
    parser.add_argument(
        "--quick", action="store_true", help="two timed steps for the ratios, one for each saving in 10 minutes"
    )
    parser.add_argument(
        "--sweep", metavar="PNG", help="also vary length, batch, vocabulary and model size, and plot it here"
    )
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.in_a_row = args.in_a_row or (4 if args.device.startswith("cuda") else 1)
    if args.worker:
        worker(args)
        return 0
    without = list(WITHOUT.values())
    groups = [["ours", "finetune", "field"], ["ours", *without[:3]], ["ours", *without[3:], "ours-eager"]]
    if not args.quick:
        groups += [["ours", "field-npo"], ["ours", "ours-compiled-loss", "ours-checkpointing", "finetune-eager"]]
    if args.only:
        groups = [args.only.split(",")]
    if unknown := [v for group in groups for v in group if v not in NAMES]:
        raise SystemExit(f"error: --only {unknown[0]}: unknown; known are {', '.join(NAMES)}")
    args.dtype, why = pick_dtype(args.dtype, args.device)
    config = config_of(args)
    counted, ceiling = work(config, make_examples(args, config.vocab_size)), matmul_ceiling(args)
    print(
        f"{args.model or args.shape + ', random weights'}; {args.device}, {args.dtype} ({why}), "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; {args.batch} + {args.batch} sequences, "
        f"{counted['tokens']:,} tokens, {counted['answer_tokens']:,} of them predict answers; "
        f"DiPO {counted['dipo'] / 1e12:.2f} TFLOP, fine-tuning {counted['finetuning'] / 1e12:.2f}; "
        f"matrix products reach {ceiling / 1e12:.2f} TFLOP/s\n",
        flush=True,
    )
    results, began = {}, time.perf_counter()
    for number, group in enumerate(groups):
        if args.quick and time.perf_counter() - began > QUICK_SECONDS:
            left = sorted({v for g in groups[number:] for v in g} - results.keys())
            print(f"left out, this machine being slow: {', '.join(left)}; measure them without --quick", flush=True)
            break
        steps = (1 if number else 2) if args.quick else args.steps
        measured = measure(group, args, steps)
        if not measured:
            continue
        first = measured[group[0]]["all_seconds"] if group[0] in measured else [math.nan] * steps
        for variant, r in measured.items():
            r["ratio_to_first"] = statistics.median(a / b for a, b in zip(r["all_seconds"], first, strict=True))
            results.setdefault(variant, r)
            print(f"{NAMES[variant]}: {r['seconds']:.2f} s per step, {r['above'] / 1e6:,.0f} MB above the state", flush=True)
    if "field" in results:
        for r in results.values():
            r["field_ratio"] = results["field"]["ratio_to_first"] / r["ratio_to_first"]
    print("\n" + table(results, counted, ceiling))
    if {"ours", "field"} <= results.keys():
        a, b = results["ours"]["losses"], results["field"]["losses"]
        print(
            "\nloss of the last step of each turn, ours | field: "
            + ", ".join(f"{x:.4f} | {y:.4f}" for x, y in zip(a, b, strict=True))
        )
    summary = {}
    if {"ours", "field", "finetune"} <= results.keys():
        summary["time_ratio_to_field"] = results["ours"]["field_ratio"]
        summary["memory_ratio_to_field"] = results["ours"]["above"] / results["field"]["above"]
        summary["time_ratio_to_finetuning"] = 1 / results["finetune"]["ratio_to_first"]
        print("\n" + ", ".join(f"{k} {v:.2f}" for k, v in summary.items()))
    sweeps = sweep(args) if args.sweep else None
    if sweeps:
        draw_sweeps(sweeps, Path(args.sweep))
        print(f"plot: {args.sweep}")
    if args.json:
        record = summary | {
            "machine": platform.processor() or platform.machine(),
            "settings": {k: getattr(args, k) for k in SETTINGS},
        }
        record |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "work": counted, "ceiling": ceiling}
        args.json.write_text(json.dumps(record | {"variants": results, "sweeps": sweeps}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as e:
        sys.exit(f"error: {e}")
