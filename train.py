"""Unlearn with DiPO, or finetune: one plain loop. From the command to the gradient: main, run, train, compute_gradients.

python train.py                                             the toy world, offline, a few minutes on two cores
python train.py --forget tofu_forget10 --model llama2-7b    unlearn a published target model
python train.py --finetune tofu_full --model PATH           make a target or a retained model of one's own
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import shutil
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
import eval as evaluation
import toy
from checkpoint import Interrupt, Interrupted, RunError, checkpoint_step, load_checkpoint, save_checkpoint
from config import RUNS, Config, make_config, next_out, parse_args, prepare_out, read_config, resume_command
from data import DataError, Example, draw, fingerprint, pack
from dipo import LOSSES, Objective
from eval import Source, benchmark_of
from files import UserError, first_line, read_json, read_jsonl, write_json
from hints import find_hints
from inference import PUBLISHED_LOGS, Options, find_file, pick_device, pick_dtype
from memory import mark_memory, memory_record
from metrics import require_extra
from model import Llama, load_pretrained, save_pretrained
from reference import CachedReference, RecomputedReference, Reference

TOY_FINETUNE: dict[str, Any] = {"lr": 2e-3, "epochs": 40.0, "batch_size": 32, "micro_batch_size": 32, "warmup_epochs": 2.0}


# ---------------------------------------------------------------------------------------------------------------- step


CHUNK = 2**25  # logits (positions times vocabulary) that the loss holds at a time: 64 MiB in bfloat16


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
    chunk = max(1, CHUNK // model.config.vocab_size)  # positions

    def terms_of(role: str, hidden: Tensor, targets: Tensor, memory: Tensor, ref_hidden: Tensor | None = None):
        """`position_terms` from final hidden states, [positions, D]."""
        ref_logits = None if ref_hidden is None or reference is None else F.linear(ref_hidden, reference.head)
        return position_terms(parts[role].loss, role, objective, model.lm_head(hidden), ref_logits, targets, memory)

    queue = [(role, group) for role, part in parts.items() for group in part.groups]
    for first in range(0, len(queue), micro_batch_size):
        roles, groups = zip(*queue[first : first + micro_batch_size], strict=True)
        batch = pack([e for group in groups for e in group]).to(model.device)
        hidden = model.hidden_states(**batch.inputs)  # [A, D]
        leaf = hidden.detach().requires_grad_()  # the gradient of head and loss stops here
        lengths = [sum(e.answer_length for e in group) for group in groups]
        for role, some, at in whole_sequences(roles, lengths, chunk):
            part, examples = parts[role], [e for group in groups[some] for e in group]
            inputs = [leaf[at], batch.targets[at], batch.memory[at]]
            if LOSSES[part.loss].reference and reference is not None:
                inputs.append(reference.answer_states(examples))
            fits = at.stop - at.start <= chunk
            piecewise = terms_of if fits else partial(checkpoint, terms_of, use_reentrant=False)
            pieces = [piecewise(role, *piece) for piece in zip(*(x.split(chunk) for x in inputs), strict=True)]
            terms, nll, swapped, anchor = (torch.cat(x) for x in zip(*pieces, strict=True))
            answers = [e.answer_length for e in examples]
            sums, anchors = (torch.stack([x.sum() for x in y.split(answers)]) for y in (terms, anchor))
            losses, margins = dipo.losses_of_sums(part.loss, objective, sums, answers, anchors)
            loss = losses.sum() / divisors[role]
            (part.weight * loss).backward()  # of L_f or lambda L_r; both add up in leaf.grad and the head's
            logged[f"loss/{role}"] += loss.detach()
            logged[f"nll/{role}"] += sum(x.sum() for x in nll.split(answers)[:: len(part.groups[0])]) / tokens[role]
            if role in paired and margins is not None:
                logged[f"margin/{role}"] += margins.detach().sum() / divisors[role]
                logged["swapped"] += swapped.sum()
            if role in anchored:
                logged[f"anchor/{role}"] += anchors.detach().sum() / divisors[role]
        hidden.backward(leaf.grad)  # through the blocks, once
    metrics = {"loss": sum(part.weight * float(logged[f"loss/{role}"]) for role, part in parts.items())}
    metrics |= {key: float(value) for key, value in logged.items() if key != "swapped"}
    metrics |= {"tokens": sum(len(e.ids) for _, group in queue for e in group)}
    metrics |= {"answer_tokens": sum(e.answer_length for _, group in queue for e in group)}
    metrics["grad_norm"] = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
            raise RunError(f"{name} is {metrics[name]}; lower --lr or pass --dtype float32")
    if positions := sum(sum(e.memory) if e.memory else e.answer_length for role in paired for e, *_ in parts[role].groups):
        metrics["swapped"] = int(logged["swapped"]) / positions
        dipo.check_roles(int(logged["swapped"]), positions)
    return metrics


def compile_step(model: Llama):
    """Compile the blocks in place, and `dipo.position_terms`, which is returned."""
    for block in model.model.layers:
        block.compile(dynamic=True)
    return torch.compile(dipo.position_terms, dynamic=True)


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


def make_reference(model: Llama, config: Config, examples: dict[str, list], steps: int, out: Path) -> Reference | None:
    """The reference of the run's losses, or None where they need none. `model` must be the start of the run."""
    parts = draw_parts(config, examples, 0, steps * config.batch_size).values()
    needed = [e for part in parts if LOSSES[part.loss].reference for group in part.groups for e in group]
    if not needed:
        return None
    if config.reference == "recompute":
        return RecomputedReference(model)
    return CachedReference(model, needed, config.micro_batch_size, out / "reference.bin")


# ---------------------------------------------------------------------------------------------------------------- loop


def train(model: Llama, config: Config, examples: dict[str, list], out: Path, on_epoch=None) -> int:
    """The loop: returns the number of steps. Resumes from `out/checkpoint` where there is one.

    examples: as in `draw_parts`.
    on_epoch(step, epoch, last): called whenever another `config.eval_every` epochs are done.
    Raises Interrupted after saving, RunError or SwappedRolesError (state before the step saved).
    """
    size = len(examples["finetune" if config.finetune else "forget"])
    per_epoch = size / config.batch_size
    steps = max(1, int(config.epochs * size) // config.batch_size)
    warmup = min(steps - 1, max(1, int(config.warmup_epochs * per_epoch))) if config.warmup_epochs else 0
    evaluate_at = {}
    if config.eval_every and on_epoch:
        count = int(config.epochs / config.eval_every + 1e-9)
        evaluate_at = {max(1, int(i * config.eval_every * per_epoch)): i * config.eval_every for i in range(1, count + 1)}
        evaluate_at.setdefault(steps, config.epochs)  # the last epoch in any case
    optimizer, position_terms = make_optimizer(model, config), dipo.position_terms
    if "forget" in config.parts and config.objective.selects and checkpoint_step(out) < steps:
        examples = examples | {"forget": mark_memory(model, examples["forget"], examples["retain"], config.tau)}
        record = memory_record(examples["forget"], config.tau)
        print(f"memory: {record['share']:.0%} of the forget answers' tokens, {out / 'memory.json'}", flush=True)
        write_json(out / "memory.json", record)
    model.checkpointing = config.gradient_checkpointing
    if config.compile if config.compile is not None else model.device.type == "cuda":
        position_terms = compile_step(model)
    # Before the checkpoint is loaded: the model is still the start of the run.
    reference = make_reference(model, config, examples, steps, out) if checkpoint_step(out) < steps else None
    start = load_checkpoint(out, model, optimizer)
    log = out / "log.jsonl"
    log.write_text("".join(json.dumps(r) + "\n" for r in read_jsonl(log) if r["step"] <= start))

    if start in evaluate_at:  # interrupted between the checkpoint and the end of its evaluation
        on_epoch(start, evaluate_at[start], start == steps)
    bar = tqdm(total=steps, initial=start, desc="finetune" if config.finetune else "unlearn", unit="step")
    with log.open("a") as log_file, bar:
        for step in range(start, steps):
            began = time.perf_counter()
            parts = draw_parts(config, examples, step * config.batch_size, config.batch_size)
            lr = learning_rate(config, step, steps, warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with Interrupt() as interrupt:
                try:
                    metrics = compute_gradients(
                        model, reference, config.objective, parts, config.micro_batch_size, position_terms
                    )
                except (RunError, dipo.SwappedRolesError) as e:
                    save_checkpoint(out, step, model, optimizer)
                    kept = f"the state before this step is in {out / 'checkpoint'}"
                    raise type(e)(f"step {step + 1} of {steps}: {e}; {kept}") from None
                if config.max_grad_norm:
                    norm = torch.tensor(metrics["grad_norm"])
                    torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.max_grad_norm, norm)
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
        if len(example.ids) - 1 > longest:  # the last token is predicted, not read
            raise RunError(f"{example.key}: {len(example.ids)} tokens, {source.name} reaches {longest}; shorten it")
    return examples


class Evaluations:
    """What is evaluated of a run: target and retrained model before the training, the policy on the way and at its end."""

    def __init__(self, config: Config, benchmark, out: Path, source: Source, model: Llama):
        """Raises where the target cannot be compared with the retrained model: now, not after the training."""
        self.benchmark, self.out, self.tokenizer = benchmark, out, source.tokenizer
        self.logs = {"target": self.score(model, "target", source.run)}
        self.load_retrained: Callable[[], Llama] | None = None
        if config.retain_model:
            name = evaluation.resolve_model(config.retain_model, "target")
            self.load_retrained = partial(load_pretrained, name, device=model.device, compute_dtype=model.compute_dtype)
            self.logs["retrained"] = self.score(self.load_retrained(), "retrained", evaluation.run_folder(name))
        self.reference = benchmark.reference(config.model, config.retain_logs, self.logs.get("retrained"))
        benchmark.summary(self.logs["target"], *self.reference)

    def score(self, model: Llama, label: str, own: Path | None = None) -> dict:
        """The log of a model; kept in the run folder that it came from (`own`) where it has one, else in this run's."""
        place = (own, "final") if own else (self.out, label)
        return self.benchmark.evaluate(model, self.tokenizer, *place, f"evaluate {label}")

    def on_epoch(self, model: Llama, step: int, epoch: float, last: bool) -> None:
        log = self.score(model, "unlearned", self.out) if last else self.score(model, f"epoch-{epoch:g}")
        record = {"step": step, "epoch": epoch} | self.benchmark.summary(log, *self.reference)[0]
        path = self.out / "trajectory.jsonl"
        earlier = [r for r in read_jsonl(path) if r["step"] < step]  # a resumed run may come by here again
        path.write_text("".join(json.dumps(r) + "\n" for r in [*earlier, record]))
        tqdm.write(f"epoch {epoch:g}: {self.benchmark.headline(record)}")

    def finish(self, model: Llama) -> dict:
        """Evaluates the end of the run and prints table and samples; returns what summary.json holds of all models."""
        self.logs["unlearned"] = self.score(model, "unlearned", self.out)
        logs: dict[str, dict] = {k: self.logs[k] for k in ("target", "unlearned", "retrained") if k in self.logs}
        if self.load_retrained:
            logs = self.benchmark.with_language(logs, self.load_retrained, self.tokenizer)
        self.logs = logs
        summaries = {k: self.benchmark.summary(log, *self.reference) for k, log in logs.items()}
        *_, (_, against) = summaries.values()
        scores = {k: summary for k, (summary, _) in summaries.items()}
        print(f"\n{self.benchmark.report(scores, against)}")
        print_samples({k: self.benchmark.samples(log) for k, log in logs.items()})
        return scores | {"retain_reference": against if self.reference[0] is not None else f"absent; {against}"}


def run(config: Config, out: Path, resume: bool) -> dict:
    """One run from data to summary.json, finetuning or unlearning; returns the summary. Resumes what is in `out`."""
    device = pick_device(config.device)
    compute_dtype = pick_dtype(config.dtype, device)
    if resume and (out / "summary.json").exists():
        print(f"{out}: complete already")
        return read_json(out / "summary.json")
    rows = load_rows(config)
    benchmark = make_benchmark(config)
    source = evaluation.open_source(config.model, "base" if config.finetune else "target", config.tokenizer, config.prompt)
    examples = encode(config, rows, source)
    counts = " + ".join(f"{len(examples[role])} {role}" for role, _ in config.sets)
    tokenizer = source.tokenizer
    borders = f", {tokenizer.borders_split} borders split" if tokenizer.borders_split else ""
    on = f"{counts} sequences; {device}, {compute_dtype}"
    print(f"{source.name}: prompt format {tokenizer.format_name}{borders}; {on}", flush=True)
    model = load_pretrained(source.folder, device=device, dtype=torch.float32, compute_dtype=compute_dtype)
    if not resume:
        record = {name: {"rows": len(x), "fingerprint": fingerprint(x)} for name, x in rows.items()}
        record |= {"evaluation": benchmark.data()} if benchmark else {}
        prepare_out(config, out, record, source.folder, tokenizer.format_name)

    evaluations = Evaluations(config, benchmark, out, source, model) if benchmark else None
    train(model, config, examples, out, partial(evaluations.on_epoch, model) if evaluations else None)
    if not (out / "model").exists():
        save_pretrained(model, out / "model", tokenizer.folder, tokenizer.format_name)
    summary: dict[str, Any] = {"model": str(out / "model")}
    if evaluations:
        summary |= evaluations.finish(model)
    if not config.finetune:
        logs, reference = (evaluations.logs, evaluations.reference[0]) if evaluations else ({}, None)
        summary["hints"] = find_hints(out, benchmark, logs, reference, summary)
        for line in summary["hints"]:
            print(f"hint: {line}")
    write_json(out / "summary.json", summary)
    has_quality = evaluations is not None and benchmark.plots and evaluations.reference[0] is not None
    if config.eval_every and has_quality and importlib.util.find_spec("matplotlib"):
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
    known = evaluation.ALIASES[config.model].logs if config.model in evaluation.ALIASES else {}
    if config.eval and not config.retain_logs and config.forget in known:
        with contextlib.suppress(DataError):  # without it, PrivLeak is absent and each request says why
            log = find_file(PUBLISHED_LOGS, known[config.forget], config.data_dir, "pass --retain-logs FILE")
            config = dataclasses.replace(config, retain_logs=str(log))
    model, after, summary = config.model, dict[str, Any](), dict[str, Any]()
    for k in range(1, 5):
        folder = out / f"request-{k}"
        request: dict[str, Any] = {
            "sust": False,
            "forget": f"{config.forget}/sust/forget_{k}",
            "model": model,
            "out": str(folder),
        }
        summary = run(dataclasses.replace(config, **request), folder, resume and folder.exists())
        model, after[f"request {k}"] = str(folder), summary.get("unlearned")
    if config.eval:
        print(benchmark_of(config.forget).report(after, summary["retain_reference"]))
    write_json(out / "summary.json", after)


def print_samples(answers: dict[str, dict[str, tuple[str, str, str]]]) -> None:
    """Three questions with each model's answer. answers: {model: {key: (question, reference, generation)}}."""
    rows = next(iter(answers.values()))
    for key in list(rows)[:: max(1, len(rows) // 3)][:3]:
        question, reference, _ = rows[key]
        print(f"\n{question}\n    {'reference':<11} {reference}")
        for name, generations in answers.items():
            print(f"    {name:<11} {generations[key][2]}")
    print()


def toy_models(config: Config) -> tuple[Path, Path]:
    """(target, retrained) run folders of the toy world, as `toy.toy_models`, trained by this file's own loop."""
    base = toy.toy_base(config.seed, config.toy_vocabulary, RUNS, TOY_FINETUNE)

    def finetune(start: Path, rows: str, out: Path) -> None:
        settings = Config(model=str(start), finetune=rows, out=str(out), seed=config.seed, **TOY_FINETUNE)
        run(settings, out, resume=out.exists())

    return toy.toy_models(base, benchmark_of(config.forget).complement(config.forget), finetune)


def main(argv: list[str] | None = None) -> int:
    given, resume = parse_args(sys.argv[1:] if argv is None else argv, __doc__)
    try:
        if resume and "out" not in given:
            raise RunError("--resume: name the run folder with --out")
        config = read_config(Path(given["out"]), given) if resume else make_config(given)
        out = Path(given["out"]) if "out" in given else next_out(config)  # of a run that was moved: where it is now
        if not resume and out.exists():
            raise RunError(f"--out {out}: exists already; choose another folder, or go on with: {resume_command(out)}")
        if config.model == "toy":
            if config.eval:
                require_extra()
            target, retrained = map(str, toy_models(config))
            against = config.retain_model or (None if config.retain_logs else retrained)
            config = dataclasses.replace(config, model=target, retain_model=against)
        if config.sust:
            run_requests(dataclasses.replace(config, out=str(out)), out, resume)
        else:
            run(dataclasses.replace(config, out=str(out)), out, resume)
    except (UserError, dipo.SwappedRolesError) as e:
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
