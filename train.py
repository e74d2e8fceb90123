"""Unlearn with DiPO, or finetune: one plain loop. From the command to the gradient: main, run, train, compute_gradients.

python train.py                                             the toy world, offline, a few minutes on two cores
python train.py --forget tofu_forget10 --model llama2-7b    unlearn a published target model
python train.py --finetune tofu_full --model PATH           make a target or a retained model of one's own
"""

import contextlib
import dataclasses
import errno
import importlib.util
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import dipo
import distributed
import eval as evaluation
import files
import plan
import runs
import toy
from checkpoint import NoRoom, RunError, checkpoint_step, load_checkpoint, not_finite, require_room, save_checkpoint
from config import RUNS, Config, Plan, make_config, parse_args
from data import DataError, Example, draw, pack
from dipo import LOSSES, Objective
from eval import Source, benchmark_of
from evaluations import Evaluations
from files import JsonLines, UserError, first_line, write_json
from gpu import device_memory, onto
from hints import find_hints
from inference import PUBLISHED_LOGS, Options, check_length, find_file, on_device, out_of_memory, pick_device, pick_dtype
from memory import mark_memory, memory_record
from metrics import require_extra
from model import Llama, chunk_positions, load_pretrained, save_pretrained, whole
from reference import CachedReference, RecomputedReference, Reference
from runs import Interrupt, Interrupted, opened, require_folder, resume_command, started

TOY_FINETUNE: dict[str, Any] = {"lr": 2e-3, "epochs": 40.0, "batch_size": 32, "micro_batch_size": 32, "warmup_epochs": 2.0}


# ---------------------------------------------------------------------------------------------------------------- step


class Part(NamedTuple):
    """What one role contributes to a step."""

    loss: str  # a row of dipo.LOSSES
    weight: float
    groups: list[tuple[Example, ...]]  # what has a loss together: a sequence, or an answer and a refusal of its question


def draw_parts(config: Config, examples: dict[str, list], first: int, count: int) -> dict[str, Part]:
    """{role: its part of a step} for examples number first to first + count - 1 of each role's stream.

    examples: {role: examples}; for a loss with refusals also 'refusals', a list of examples for each forget example.
    """
    parts = {}
    for role, (name, weight) in config.parts.items():
        rows = draw(list(range(len(examples[role]))), config.seed, role, first, count)
        groups: list[tuple[Example, ...]] = [(examples[role][i],) for i in rows]
        if LOSSES[name].refusals:
            which = draw(list(range(len(examples["refusals"][0]))), config.seed, "refusals", first, count)
            groups = [(*group, examples["refusals"][i][k]) for group, i, k in zip(groups, rows, which, strict=True)]
        parts[role] = Part(name, weight, groups)
    return parts


def queue_of(parts: dict[str, Part]) -> list[tuple[str, tuple[Example, ...]]]:
    """(role, group) of all that is in a step, in the order in which processes and passes take their share of it."""
    return [(role, group) for role, part in parts.items() for group in part.groups]


def whole_sequences(roles: Sequence[str], lengths: Sequence[int], limit: int) -> Iterator[tuple[str, slice, slice]]:
    """(role, which groups, which positions): runs of one role with at most `limit` positions, or one longer group.

    lengths: answer positions of each group.
    """
    starts = [0, *itertools.accumulate(lengths)]
    first = 0
    for i in range(1, len(lengths) + 1):
        if i == len(lengths) or roles[i] != roles[first] or starts[i + 1] - starts[first] > limit:
            yield roles[first], slice(first, i), slice(starts[first], starts[i])
            first = i


def compute_gradients(
    model: Llama, reference: Reference | None, objective: Objective, parts: dict[str, Part], micro_batch_size: int,
    position_terms: Callable[..., tuple[Tensor, ...]] = dipo.position_terms,
) -> dict[str, float]:  # fmt: skip
    """Gradients of one effective batch into model.parameters().grad; returns what log.jsonl holds of it.

    Each loss is normalised over all of its part (`Loss.divisor`), so the size of micro-batches changes nothing but rounding.

    Forget and retain sequences share each forward pass. The output head and the loss then run on a few whole sequences
    at a time, forward and backward, and leave the gradient of the final hidden states; the blocks are passed backward
    once, from there. A sequence too long for that goes through the head piece by piece, each computed again going backward.
    Raises RunError for a loss or gradient that is not finite, SwappedRolesError as `dipo.check_roles`.
    """
    tokens = {role: sum(group[0].answer_length for group in part.groups) for role, part in parts.items()}  # no refusals
    divisors = {role: LOSSES[part.loss].divisor(len(part.groups), tokens[role]) for role, part in parts.items()}
    paired = [role for role, part in parts.items() if LOSSES[part.loss].pair]
    logged: dict[str, Tensor | float] = {f"{key}/{role}": 0.0 for role in parts for key in ("loss", "nll")}
    anchored = [role for role, part in parts.items() if LOSSES[part.loss].anchored]
    logged |= {f"margin/{role}": 0.0 for role in paired} | {f"anchor/{role}": 0.0 for role in anchored} | {"swapped": 0}
    chunk = chunk_positions(model.config.vocab_size, device_memory(model.device))

    def terms_of(role: str, hidden: Tensor, targets: Tensor, memory: Tensor, ref_hidden: Tensor | None = None):
        """`position_terms` from final hidden states, [positions, D]."""
        ref_logits = None if ref_hidden is None or reference is None else F.linear(ref_hidden, reference.head)
        inputs = targets.clone(), memory.clone()  # compiled, each place in the batch of a view would be another case
        return position_terms(parts[role].loss, role, objective, model.lm_head(hidden), ref_logits, *inputs)

    queue = queue_of(parts)
    for some_of_it, counts in distributed.passes(queue, micro_batch_size):
        roles, groups = zip(*some_of_it, strict=True)
        batch = pack([e for group in groups for e in group]).to(model.device)
        hidden = model.hidden_states(**batch.inputs)  # [A, D]
        leaf = hidden.detach().requires_grad_()  # the gradient of head and loss stops here
        lengths = [sum(e.answer_length for e in group) for group in groups]
        if not counts:  # another process makes one more pass, of which this one has no part
            (0 * model.lm_head(leaf[:1]).sum()).backward()
        for role, some, at in whole_sequences(roles, lengths, chunk) if counts else ():
            part, examples = parts[role], [e for group in groups[some] for e in group]
            inputs = [leaf[at], batch.targets[at], batch.memory[at]]
            if LOSSES[part.loss].reference and reference is not None:
                inputs.append(reference.answer_states(examples))
            fits = at.stop - at.start <= chunk
            piecewise = terms_of if fits else partial(checkpoint, terms_of, use_reentrant=False)
            pieces = [piecewise(role, *piece) for piece in zip(*(x.split(chunk) for x in inputs), strict=True)]
            terms, nll, swapped, anchor = (torch.cat(x) for x in zip(*pieces, strict=True))
            answers = [e.answer_length for e in examples]
            sizes = onto(torch.tensor(answers), terms.device)  # a list would be copied, and waited for
            per_sequence = partial(torch.segment_reduce, reduce="sum", lengths=sizes, unsafe=True)  # safe: would wait
            sums, *anchors = map(per_sequence, (terms, anchor) if role in anchored else (terms,))
            losses, margins = dipo.losses_of_sums(part.loss, objective, sums, sizes, *anchors)
            loss = losses.sum() / divisors[role]
            (part.weight * loss).backward()  # of L_f or lambda L_r; both add up in leaf.grad and the head's
            logged[f"loss/{role}"] += loss.detach()
            logged[f"nll/{role}"] += torch.cat(nll.split(answers)[:: len(part.groups[0])]).sum() / tokens[role]
            if role in paired and margins is not None:
                logged[f"margin/{role}"] += margins.detach().sum() / divisors[role]
                logged["swapped"] += swapped.sum()
            if role in anchored:
                logged[f"anchor/{role}"] += anchors[0].detach().sum() / divisors[role]
        hidden.backward(leaf.grad)  # through the blocks, once
    sums_of_all = distributed.totals(logged, model.device)
    swapped_positions = int(sums_of_all.pop("swapped"))
    metrics = {"loss": sum(part.weight * sums_of_all[f"loss/{role}"] for role, part in parts.items())} | sums_of_all
    metrics |= {"tokens": sum(len(e.ids) for _, group in queue for e in group)}
    metrics |= {"answer_tokens": sum(e.answer_length for _, group in queue for e in group)}
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    metrics["grad_norm"] = float(whole(torch.nn.utils.get_total_norm(gradients)))
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
            wider = "" if model.compute_dtype == torch.float32 else ", or resume with --dtype float32"
            raise RunError(f"{name} is {metrics[name]}; start anew with a lower --lr{wider}")
    if positions := sum(sum(e.memory) if e.memory else e.answer_length for role in paired for e, *_ in parts[role].groups):
        metrics["swapped"] = swapped_positions / positions
        dipo.check_roles(swapped_positions, positions)
    return metrics


def worth_compiling(model: Llama, config: Config, examples: dict[str, list], steps: int) -> bool:
    """Whether blocks and loss are compiled where no flag says: on a GPU, if that saves more than the 90 s that it takes. It
    saves a fifth of the time, and that is 6 FLOP a parameter and token at 2e14 a second (half of what such cards can do):
    estimates. 7B pays from two million tokens. On a CPU it takes minutes, and pays for large vocabularies only."""
    tokens = [sum(len(e.ids) for e in rows) / len(rows) for role, rows in examples.items() if role != "refusals"]
    work = 6 * sum(p.numel() for p in model.parameters()) * steps * config.batch_size * sum(tokens)
    return model.device.type == "cuda" and 0.2 * work / 2e14 > 90


def compile_step(model: Llama):
    """Compile the blocks in place, and `dipo.position_terms`, which is returned."""
    # A small model's kernels take less time than their launches: on a GPU the casts of a block's weights become one.
    combined = {"combo_kernels": True, "combo_kernels_pointwise_only": True} if model.device.type == "cuda" else None
    for block in model.model.layers:
        block.compile(dynamic=True, options=combined)
    return torch.compile(dipo.position_terms, dynamic=True)


def learning_rate(config: Config, step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then linear decay to zero, or constant. The first step already learns (Hugging Face's has 0 there)."""
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    return config.lr * (steps - step) / max(1, steps - warmup)


def make_optimizer(model: Llama, config: Config) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]  # norms are not decayed, as in Hugging Face's trainer
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    settings: dict[str, Any] = {"lr": config.lr, "betas": (0.9, 0.999), "eps": 1e-8}
    if config.optimizer == "adamw8bit":
        from torchao.optim import AdamW8bit

        return AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, **settings, fused=True)


def make_reference(model: Llama, config: Config, examples: dict[str, list], steps: int, out: Path) -> Reference | None:
    """The reference of the run's losses, or None where they need none. `model` must be the start of the run."""
    needed = dict[str, list[Example]](forget=[], retain=[])
    compare = {role for role, (loss, _) in config.parts.items() if LOSSES[loss].reference}
    if not compare:
        return None
    if config.reference == "recompute":
        return RecomputedReference(model)
    for step in range(steps):
        parts = draw_parts(config, examples, step * config.batch_size, config.batch_size)
        for role, group in distributed.share(queue_of(parts)):
            needed[role] += group if role in compare else ()
    file = out / (f".reference-{distributed.rank()}.part" if distributed.rank() else "reference.bin")
    every = needed["forget"] + needed["retain"] or examples[min(compare)][:1]  # a process may need none
    return CachedReference(model, every, config.micro_batch_size, file)


# ---------------------------------------------------------------------------------------------------------------- loop


def count_steps(config: Config, examples: dict[str, list]) -> int:
    return max(1, int(config.epochs * len(examples["finetune" if config.finetune else "forget"])) // config.batch_size)


def train(model: Llama, config: Config, examples: dict[str, list], out: Path, on_epoch=None, anyway: bool = False) -> int:
    """The loop: returns the number of steps. Resumes from `out/checkpoint` where there is one.

    examples: as in `draw_parts`. anyway: as in `load_checkpoint`.
    on_epoch(step, epoch, last): called whenever another `config.eval_every` epochs are done.
    However it ends but by a kill, the state of the last whole step is saved. Raises Interrupted for Ctrl-C and SIGTERM,
    RunError or SwappedRolesError for a step that cannot be made.
    """
    per_epoch = len(examples["finetune" if config.finetune else "forget"]) / config.batch_size
    steps = count_steps(config, examples)
    warmup = min(steps - 1, max(1, int(config.warmup_epochs * per_epoch))) if config.warmup_epochs else 0
    evaluate_at = {}
    if config.eval_every and on_epoch:
        count = int(config.epochs / config.eval_every + 1e-9)
        evaluate_at = {max(1, int(i * config.eval_every * per_epoch)): i * config.eval_every for i in range(1, count + 1)}
        evaluate_at.setdefault(steps, config.epochs)  # the last epoch in any case
    optimizer, position_terms = make_optimizer(model, config), dipo.position_terms
    if config.save_every != 0 and not checkpoint_step(out):  # now, and not after hours; one more while the next is written
        require_room(out, model, "free some, or pass --save-every 0 and another --out", config.keep + 1)
    if "forget" in config.parts and config.objective.selects and checkpoint_step(out) < steps:
        examples = examples | {"forget": mark_memory(model, examples["forget"], examples["retain"], config.tau)}
        record = memory_record(examples["forget"], config.tau)
        print(f"memory: {record['share']:.0%} of the forget answers' tokens, {out / 'memory.json'}", flush=True)
        write_json(out / "memory.json", record)
    model.checkpointing = config.gradient_checkpointing
    if config.compile if config.compile is not None else worth_compiling(model, config, examples, steps):
        position_terms = compile_step(model)
    # Before the checkpoint is loaded: the model is still the start of the run.
    reference = make_reference(model, config, examples, steps, out) if checkpoint_step(out) < steps else None
    distributed.reshard(model)
    start = saved = done = load_checkpoint(out, model, optimizer, config.results, anyway)
    log = JsonLines(out / "log.jsonl", error=RunError)
    saved_at, cost, intact = time.monotonic(), 0.0, True  # intact: what the model holds can be saved

    def save() -> None:
        nonlocal saved, saved_at, intact, cost
        intact, began = False, time.monotonic()
        save_checkpoint(out, done, model, optimizer, config.results, config.keep)
        saved, saved_at, intact = done, time.monotonic(), True
        cost = saved_at - began

    def due() -> bool:
        if config.save_every is not None:
            return config.save_every > 0 and (done % config.save_every == 0 or done == steps)
        return done == steps or time.monotonic() - saved_at > max(60, 50 * cost)

    bar = tqdm(total=steps, initial=start, desc="finetune" if config.finetune else "unlearn", unit="step")
    try:
        if start in evaluate_at:  # interrupted between the checkpoint and the end of its evaluation
            on_epoch(start, evaluate_at[start], start == steps)
        with Interrupt() as interrupt:
            for step in range(start, steps):
                began = time.perf_counter()
                parts = draw_parts(config, examples, step * config.batch_size, config.batch_size)
                lr = learning_rate(config, step, steps, warmup)
                for group in optimizer.param_groups:
                    old = group["lr"]  # a tensor of torchao's, which compiles with it
                    group["lr"] = old.fill_(lr) if isinstance(old, Tensor) else lr
                try:
                    metrics = compute_gradients(
                        model, reference, config.objective, parts, config.micro_batch_size, position_terms
                    )
                except (RunError, dipo.SwappedRolesError) as e:
                    kept = f"; the state before this step, if whole, is in {out / 'checkpoint'}" if step else ""
                    raise type(e)(f"step {step + 1} of {steps}: {e}{kept}") from None
                if config.max_grad_norm:
                    norm = torch.tensor(metrics["grad_norm"])
                    torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.max_grad_norm, norm)
                intact = False
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                seconds = time.perf_counter() - began
                record = {"step": step + 1, "epoch": (step + 1) / per_epoch, "lr": lr} | metrics
                record |= {"tokens_per_s": metrics["tokens"] / seconds, "seconds": seconds}
                require_folder(out)
                log.add(record)
                done, intact = step + 1, True
                if distributed.any_of(model.device, distributed.first() and due()):
                    try:
                        save()
                    except NoRoom as e:  # as long as nothing stops the run, nothing is lost
                        saved_at, intact = time.monotonic(), True
                        tqdm.write(f"not saved at step {done}: {first_line(e)}")
                shown = {k: f"{metrics[k]:.3g}" for k in ("loss", "margin/forget", "margin/retain") if k in metrics}
                bar.set_postfix(shown | {"tok/s": f"{record['tokens_per_s']:.0f}"}, refresh=False)
                bar.update()
                if done in evaluate_at:
                    with interrupt.lifted():
                        on_epoch(done, evaluate_at[done], done == steps)
                if distributed.any_of(model.device, interrupt.wanted):
                    raise KeyboardInterrupt
    except (Exception, KeyboardInterrupt) as e:
        all_there = distributed.blame(e, less_memory(config, out) if out_of_memory(e) else "")
        if intact and done > saved and all_there:
            try:
                distributed.meet()
                with Interrupt():
                    save()
            except UserError as unsaved:
                raise RunError(f"{first_line(e) or 'interrupted'}; {unsaved}") from None
        if isinstance(e, KeyboardInterrupt) and done:
            raise Interrupted(f"interrupted after step {saved} of {steps}") from None
        raise
    finally:
        bar.close()
    return steps


# ----------------------------------------------------------------------------------------------------------------- run


def make_benchmark(config: Config):
    """What evaluates the run, or None. Raises where it cannot: what is broken is told before hours of training."""
    if config.finetune or not config.eval:
        return None
    require_extra()
    options = Options(
        config.forget, config.data_dir, rows=config.eval_rows or None, eval_retain=config.eval_retain, seed=config.seed,
        max_new_tokens=config.max_new_tokens,
    )  # fmt: skip
    benchmark = benchmark_of(config.forget)(options)
    if config.retain_logs:
        benchmark.reference(config.model, config.retain_logs, None)
    return benchmark


def load_rows(config: Config) -> dict[str, list]:
    """{role: rows of its data set}; for a loss with refusals also {'refusals': lines}. Raises DataError."""
    rows = {}
    if any(LOSSES[name].refusals for name, _ in config.parts.values()):
        rows["refusals"] = benchmark_of(config.forget).refusals(config.refusals, config.forget, config.data_dir)
    return rows | {k: benchmark_of(spec).load(spec, config.data_dir, config.seed) for k, spec in config.sets}


def encode(config: Config, rows: dict[str, list], source: Source) -> dict[str, list]:
    """The rows' examples, as `draw_parts` takes them. Raises RunError for a sequence that is longer than the model."""
    tokenizer, longest, examples = source.tokenizer, source.config.max_position_embeddings, dict[str, list]()
    for role, spec in config.sets:
        examples[role] = benchmark_of(spec).encode(rows[role], tokenizer, role, config.max_length, config.chunking)
    every = list(itertools.chain(*examples.values()))
    if "refusals" in rows:
        lines = list(enumerate(rows["refusals"]))
        examples["refusals"] = [
            [tokenizer.encode(row.question, line, f"{row.key}, refusal {i}") for i, line in lines] for row in rows["forget"]
        ]
        every += itertools.chain(*examples["refusals"])
    for example in every:
        check_length(example.key, len(example.ids) - 1, longest, error=RunError)  # the last token is predicted, not read
    return examples


def run(config: Config, out: Path, resume: str = "") -> dict:
    """One run from data to summary.json, finetuning or unlearning; returns the summary. resume: as of `parse_args`; goes on
    with what is in `out`, which the caller holds (`opened`)."""
    if config.optimizer == "adamw8bit" and not importlib.util.find_spec("torchao"):
        raise RunError("--optimizer adamw8bit: needs torchao; pip install -e '.[8bit]', or drop the flag")
    device = pick_device(config.device)
    compute_dtype = pick_dtype(config.dtype, device)
    config = dataclasses.replace(config, dtype=str(compute_dtype).removeprefix("torch."))  # also on another machine
    if resume and (summary := runs.finished(config, out)) is not None:
        clean_up(config, out, summary)
        return summary
    if config.cpu_offload and not distributed.active():
        raise RunError("--cpu-offload: is of sharded training; start with torchrun --nproc-per-node 1 train.py ...")
    if config.reference == "recompute" and distributed.active():
        raise RunError("--reference recompute: would be a second, unsharded model; pass --reference cached")
    rows = load_rows(config)
    benchmark = make_benchmark(config)
    source = evaluation.open_source(config.model, "base" if config.finetune else "target", config.tokenizer, config.prompt)
    examples = encode(config, rows, source)
    counts = " + ".join(f"{len(examples[role])} {role}" for role, _ in config.sets)
    tokenizer = source.tokenizer
    borders = f", {tokenizer.borders_split} borders split" if tokenizer.borders_split else ""
    on = on_device(device, compute_dtype)
    print(f"{source.name}: prompt format {tokenizer.format_name}{borders}; {counts} sequences; {on}", flush=True)
    record = runs.inputs(config, rows, benchmark, source)
    if resume:
        runs.check_inputs(config, out, record, resume == "anyway")
    load = partial(load_pretrained, device=device, dtype=torch.float32, compute_dtype=compute_dtype)
    if distributed.active():
        compiled = config.compile if config.compile is not None else device.type == "cuda"
        split = partial(distributed.shard, device=device, compiled=compiled, cpu_offload=config.cpu_offload)
        load = partial(load, shard=split)
    with enough_memory("take a smaller model, or another --device"):
        model = load(source.folder)
    if not resume:
        runs.prepare_out(config, out, record, source.folder, tokenizer.format_name, source.commit)

    evaluations = Evaluations(config, benchmark, out, source, model) if benchmark else None
    if config.compile is None:
        config = dataclasses.replace(config, compile=worth_compiling(model, config, examples, count_steps(config, examples)))
    size = plan.micro_batch_size(config, model.config, examples, device, distributed.world())
    config = dataclasses.replace(config, micro_batch_size=min(distributed.gather(size)))
    with enough_memory(less_memory(config, out)):
        train(
            model, config, examples, out, partial(evaluations.on_epoch, model) if evaluations else None, resume == "anyway"
        )
    require_folder(out)
    summary = {"model": str(out / "model")}
    if evaluations and config.keep_best:
        summary["kept"] = evaluations.keep()
        del model  # before the next one is loaded
        model = load(out / "model")
    elif not (out / "model").exists():
        with distributed.together():
            if name := not_finite({n: distributed.local(p) for n, p in distributed.parameters(model).items()}):
                raise RunError(f"{name} is not finite (overflow): nothing was saved as model/; start anew with a lower --lr")
        save_pretrained(model, out / "model", tokenizer.folder, tokenizer.format_name, distributed.gather)
    distributed.gather()  # model/ is there
    if evaluations:
        summary |= evaluations.finish(model)
    if not config.finetune:
        logs, reference = (evaluations.logs, evaluations.reference[0]) if evaluations else ({}, None)
        summary["hints"] = find_hints(out, benchmark, logs, reference, summary)
        for line in summary["hints"]:
            print(f"hint: {line}")
    require_folder(out)
    write_json(out / "summary.json", summary)
    clean_up(config, out, summary)
    return summary


def clean_up(config: Config, out: Path, summary: dict) -> None:
    """What is done once summary.json is there: a plot, and no checkpoint."""
    if not distributed.first():
        return
    has_quality = summary.get("unlearned", {}).get("forget_quality") is not None
    if config.eval_every and has_quality and importlib.util.find_spec("matplotlib"):
        try:
            print(f"trajectory: {evaluation.plot(out)}")
        except (UserError, OSError, ValueError, RuntimeError) as e:  # the run itself is done
            print(f"trajectory: not drawn ({first_line(e)})")
    for folder in (out / "checkpoint", *out.glob("best-*")):
        files.remove(folder)
    print(f"saved: {out}  (model/ in Hugging Face layout, log.jsonl, summary.json, config.json)")


@contextlib.contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Raises RunError with the remedy where there is too little memory, of the host or of the GPU."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        raise RunError(f"out of memory ({first_line(e)}); {remedy}") from None


def less_memory(config: Config, out: Path) -> str:
    """How training can do with less."""
    if config.micro_batch_size > 1:
        return f"go on with: {resume_command(out, f' --micro-batch-size {config.micro_batch_size // 2}')}"
    if not config.gradient_checkpointing:
        return f"go on with: {resume_command(out, ' --gradient-checkpointing')}"
    return "take a smaller model, shorter texts, or another --device"


def run_requests(config: Config, out: Path, resume: str) -> None:
    """MUSE's sustainability: sust/forget_1 to 4 as requests one after the other, each from the model before it.

    Request k is a run in `out/request-k`; `out/summary.json` holds the unlearned model's numbers after each.
    """
    if not resume:
        runs.prepare_out(config, out, {}, Path(config.model), config.prompt)
    known = evaluation.ALIASES[config.model].logs if config.model in evaluation.ALIASES else {}
    if config.eval and not config.retain_logs and config.forget in known:
        with contextlib.suppress(DataError):  # without it, PrivLeak is absent and each request says why
            log = find_file(PUBLISHED_LOGS, known[config.forget], config.data_dir, "pass --retain-logs FILE")
            config = dataclasses.replace(config, retain_logs=str(log))
    model, after, summary = config.model, dict[str, Any](), dict[str, Any]()
    for k in range(1, 5):
        folder = out / f"request-{k}"
        request: dict[str, Any] = {"sust": False, "forget": f"{config.forget}/sust/forget_{k}", "model": model}
        summary = run_in(folder, dataclasses.replace(config, **request, out=str(folder)), resume)
        model, after[f"request {k}"] = str(folder), summary.get("unlearned")
    if config.eval:
        print(benchmark_of(config.forget).report(after, summary["retain_reference"]))
    write_json(out / "summary.json", after)


def run_in(out: Path, config: Config, resume: str = "resume") -> dict:
    """`run` in a folder that another run is made of; goes on there if it has begun."""
    resume = resume if started(out) else ""
    with opened(out, config, resume):
        return run(config, out, resume)


def toy_models(config: Config) -> tuple[Path, Path]:
    """(target, retrained) run folders of the toy world, as `toy.toy_models`, trained by this file's own loop."""
    base = toy.toy_base(config.seed, config.toy_vocabulary, RUNS, TOY_FINETUNE)

    def finetune(start: Path, rows: str, out: Path) -> None:
        settings: dict[str, Any] = {"model": str(start), "finetune": rows, "out": str(out), "seed": config.seed}
        run_in(out, Config(**settings, **TOY_FINETUNE))

    return toy.toy_models(base, benchmark_of(config.forget).complement(config.forget), finetune)


def made_alone(config: Config) -> list[str]:
    with distributed.alone():
        return [*map(str, toy_models(config))]


def work(config: Config, out: Path, resume: str) -> None:
    if config.model == "toy":
        if config.eval:
            require_extra()
        target, retrained = distributed.on_first(lambda: made_alone(config))
        against = config.retain_model or (None if config.retain_logs else retrained)
        config = dataclasses.replace(config, model=target, retain_model=against)
    (run_requests if config.sust else run)(dataclasses.replace(config, out=str(out)), out, resume)


def main(argv: list[str] | None = None) -> int:
    files.open_streams()
    given, resume = parse_args(sys.argv[1:] if argv is None else argv, __doc__)
    out = Path(given["out"]) if "out" in given else None
    try:
        if isinstance(resume, Plan):
            print(plan.report(make_config(given), resume))
            return 0
        if resume and out is None:
            raise RunError("--resume: name the run folder with --out")
        new, directory = None if resume else make_config(given), Path.cwd()
        with distributed.terminable(), opened(out, new, resume) as out:
            config, directory = (new, directory) if new else runs.read_config(out, given)
            out = out if directory == Path.cwd() else out.absolute()
            with runs.working_in(directory), enough_memory("take a smaller model, or another --device"):
                work(config, out, resume)
    except (UserError, dipo.SwappedRolesError) as e:
        distributed.tell(f"error: {e}")
        return 2
    except OSError as e:
        kept = (
            f"what was written is kept, go on with: {resume_command(out)}" if out and started(out) else "pass another --out"
        )
        if e.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            kept = "make that folder writable, or work in a copy of it"
        distributed.tell(f"error: {e}; {kept}")
        return 2
    except RuntimeError as e:
        if not distributed.is_lost(e):
            raise
        distributed.tell(f"error: {distributed.lost(e)}")
        return 2
    except (Interrupted, KeyboardInterrupt) as e:
        what = str(e) or "interrupted"
        again = resume_command(out) if out and started(out) else "the same command"
        distributed.tell(f"\n{what}; go on with: {again}")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(distributed.launch(main))
