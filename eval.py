"""Evaluation from the command line: of a model on TOFU or MUSE, of a published log, and the plot of a run.

    python eval.py --model RUN --forget tofu_forget10 [--retain-logs FILE | --retain-model PATH]
    python eval.py --logs FILE [--retain-logs FILE]          score a published log, no model
    python eval.py --plot RUN                                draw its trajectory
    python eval.py --report RUN                              its scores, trajectory and answers as one HTML page

What is asked of a benchmark stands in tofu.py and muse.py, the numbers in metrics.py.
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import distributed
import files
import report
from data import OWN_FILE, PROMPT_FORMATS, Tokenizer
from files import Field, UserError
from hub import commit_of, local_path
from inference import LESS, Benchmark, Options, on_device, out_of_memory, pick_device, pick_dtype
from metrics import EvalError, require_extra
from model import Llama, LlamaConfig, ModelError, load_pretrained, read_config, recorded_prompt, resolve_folder
from muse import Muse
from tofu import Tofu, scored

TOKENIZER_PATTERNS = ("tokenizer*.json", "special_tokens_map.json", "*.jinja")
# Flags by what they are of, and those that each benchmark has no use for.
FLAGS = {
    "plot": (),
    "report": ("device", "dtype", "data_dir"),
    "logs": ("retain_logs", "truth_ratio", "show", "json", "out"),
}
NOT_OF = {"TOFU": ["no_stemmer"], "MUSE": "eval_retain truth_ratio mask_quirk gradnorm max_new_tokens seed".split()}
BENCHMARKS: dict[str, type[Benchmark]] = {"tofu": Tofu, "toy": Tofu, "muse": Muse}  # by the first word of a data set's name
ALIASES = {alias: known for kind in BENCHMARKS.values() for alias, known in kind.checkpoints.items()}


def benchmark_of(spec: str) -> type[Benchmark]:
    """The class of a data set's benchmark. A file of one's own holds questions: TOFU's schema."""
    return Tofu if OWN_FILE.search(spec) else BENCHMARKS.get(spec.partition("_")[0], Tofu)


@dataclass(frozen=True)
class Source:
    """A model before its weights are loaded."""

    name: str  # folder or hub id
    folder: Path
    config: LlamaConfig
    tokenizer: Tokenizer
    run: Path | None  # see `run_folder`
    commit: str | None  # of a model from the hub


def resolve_model(name: str, kind: str) -> str:
    """The folder or hub id that `name` is or, as an alias, stands for; kind: 'target' for the checkpoint finetuned on the
    benchmark, 'base' for the one before. Raises ModelError for a name that is no alias, no folder and cannot be a hub id."""
    if name in ALIASES:
        return f"{getattr(ALIASES[name], kind)}@main"  # a hub id also where a folder is called like its owner
    path = local_path(name)
    if "/" not in name and not os.path.exists(path or name):
        raise ModelError(f"--model {name}: neither an alias ({', '.join(ALIASES)}) nor a folder nor a hub id (owner/name)")
    return name if path is None else str(path)


def run_record(run: Path) -> dict:
    """What config.json keeps of a run of train.py; {} for a folder that is none. Raises ModelError for a broken file."""
    path, fields = run / "config.json", {"config": Field(dict), "prompt_format": Field(str, required=False)}
    if not path.exists() or "config" not in (record := files.read_json(path, ModelError)):
        return {}
    if wrong := files.fault(record, Field(dict, fields=fields)):
        raise ModelError(f"{path}: {wrong}; name the model itself, {run / 'model'}")
    return record


def run_folder(source: str) -> Path | None:
    """The run folder that a model is, if it is one: a place where its evaluations may be kept."""
    run = Path(source)
    return run if (run / "model" / "config.json").exists() and run_record(run) else None


def open_source(name: str, kind: str, tokenizer: str | None = None, prompt: str = "auto") -> Source:
    """Everything of a model but its weights. What it was trained in here decides its prompt format, or its alias, which has
    a tokenizer too where its models have none. tokenizer: folder or hub id, else the model's own. What is named otherwise is
    taken, and the difference told. Raises ModelError as `resolve_model`, DataError as `Tokenizer`."""
    source = resolve_model(name, kind)
    folder = resolve_folder(source)
    config = read_config(folder)
    run = run_folder(str(folder.parent))  # also where RUN/model is named
    known = recorded_prompt(folder) or (run_record(run).get("prompt_format") if run else None)
    if alias := ALIASES.get(name):
        known, tokenizer = alias.prompt, tokenizer or alias.tokenizer
    if known and prompt not in ("auto", known):
        print(f"--prompt {prompt}: {name} was trained in the {known} format", file=sys.stderr, flush=True)
    words = resolve_folder(tokenizer, TOKENIZER_PATTERNS) if tokenizer else folder
    found = Tokenizer(words, config.vocab_size, known or prompt if prompt == "auto" else prompt)
    if not alias and (own := folder / "tokenizer.json").is_file() and own.read_bytes() != found.path.read_bytes():
        print(f"--tokenizer {tokenizer}: is another than the model's own", file=sys.stderr, flush=True)
    return Source(source, folder, config, found, run_folder(source), commit_of(folder))


def plot(run: Path) -> Path:
    """Forget quality (log axis) against model utility over the epochs of a run, target and retrained model marked ->
    RUN/trajectory.png. Raises EvalError without matplotlib, a trajectory, or a retain reference."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise EvalError("plots need matplotlib: pip install -e '.[eval]'") from None
    fields = {"model_utility": files.Field(float, 0, 1), "forget_quality": files.Field(float, 0, 1, null=True)}
    point, mark = fields | {"epoch": files.Field(float, 0, 1e9)}, files.Field(dict, required=False, fields=fields)
    try:
        points = files.read_jsonl(run / "trajectory.jsonl", EvalError)
        absent = not (run / "trajectory.jsonl").exists()
        wrong = next((x for p in points if (x := files.fault(p, files.Field(dict, fields=point)))), None)
        if wrong or not points:
            raise EvalError(f"{run / 'trajectory.jsonl'}: {wrong or ('is not there' if absent else 'holds nothing')}")
        summary = files.read_json(run / "summary.json", EvalError, fields={"target": mark, "retrained": mark})
    except EvalError as e:
        raise EvalError(f"{run}: no trajectory of a finished run (train with --eval-every) ({e})") from None
    marks = {name: summary[name] for name in ("target", "retrained") if name in summary}
    points = [marks["target"] | {"epoch": 0}] + points if "target" in marks else points
    path = [(p["model_utility"], p["forget_quality"], p["epoch"]) for p in points]
    places = {name: (m["model_utility"], m["forget_quality"]) for name, m in marks.items()}
    if any(quality is None for _, quality, *_ in [*path, *places.values()]):
        raise EvalError(f"{run}: has no forget quality; train with --retain-model or --retain-logs")
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([x for x, _, _ in path], [max(y, 1e-300) for _, y, _ in path], ".-", color="tab:blue", label="unlearning")
    for x, y, epoch in path[1:]:
        axes.annotate(f"{epoch:g}", (x, max(y, 1e-300)), textcoords="offset points", xytext=(4, 4), fontsize=8)
    for name, (x, y) in places.items():
        look = {"target": ("s", "tab:red"), "retrained": ("*", "tab:green")}[name]
        axes.plot(x, max(y, 1e-300), look[0], color=look[1], markersize=11, label=name)
    axes.axhline(0.05, color="gray", linewidth=0.8, linestyle=":")
    axes.set_xlim(left=0)
    axes.set(yscale="log", xlabel="model utility", ylabel="forget quality (KS p-value)")
    axes.set_title(f"{report.visible(os.path.basename(os.path.realpath(run)))}, by epoch", parse_math=False)
    axes.legend()
    try:
        with files.replacing(run / "trajectory.png") as part:
            figure.savefig(part, dpi=150, format="png")
    except OSError as e:
        raise files.room(run / "trajectory.png", e, EvalError) from None
    return run / "trajectory.png"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "eval.py", description="Evaluate a model on TOFU or MUSE, or a TOFU log.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", help="run folder of train.py, model folder, hub id or alias")
    add("--forget", help="forget set, e.g. tofu_forget10, tofu_forget05[:40], muse_news, muse_news[:10], own.jsonl")
    add("--logs", help="score this evaluation log instead of a model (formats as --retain-logs)")
    add("--plot", metavar="RUN", help="draw the trajectory of a run of train.py into RUN/trajectory.png")
    add("--report", metavar="RUN", help="write scores, trajectory and answers of a TOFU run into RUN/report.html")
    add("--retain-logs", help="evaluation log of the retrained model (ours, open-unlearning's, the TOFU authors')")
    add("--retain-model", help="the retrained model itself; evaluated first")
    add("--eval-retain", help="rows that stand for the retain set, e.g. tofu_retain_perturbed[:100]")
    protocols = [*dict.fromkeys(itertools.chain(*(kind.protocols for kind in BENCHMARKS.values())))]
    meant = "open-unlearning, or the authors': tofu (first 300 rows, 200 tokens in total), muse"
    add("--protocol", default="open-unlearning", choices=protocols, help=meant)
    add("--truth-ratio", default="geometric", choices=["geometric", "arithmetic"], help="mean over the wrong answers")
    add("--no-stemmer", action="store_true", help="MUSE: ROUGE without stemmer (off by itself in protocol muse)")
    add("--mask-quirk", action="store_true", help="hide EOS in prompts that pads too, as open-unlearning does (#128)")
    add("--gradnorm", action="store_true", help="mia_gradnorm too: a backward pass for each forget and holdout row")
    add("--tokenizer", help="folder or hub id, where the model has none")
    add("--prompt", default="auto", help=f"prompt format: auto, {', '.join(PROMPT_FORMATS)}")
    add("--data-dir", help="folder with local data in hub layout (TOFU/forget10.json, ...)")
    add("--max-new-tokens", type=int, default=200, help="length of generations, tokens")
    add("--seed", type=int, default=0, help="of the toy world")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of activations")
    add("--show", type=int, default=0, metavar="N", help="print the worst N rows of each set")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    add("--out", help="write the summary to this JSON file")
    args = parser.parse_args(argv)
    if sum(x is not None for x in (args.model, args.logs, args.plot, args.report)) != 1:
        parser.error("pass one of --model, --logs, --plot, --report")
    if args.model is not None and args.forget is None:
        parser.error("--model needs --forget")
    if args.retain_logs and args.retain_model:
        parser.error("--retain-logs and --retain-model: pass one of them")
    args.given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    return args


def check_flags(args: argparse.Namespace) -> None:
    """Raises EvalError for a flag that cannot apply, and for an --out that cannot be written."""
    what, sense = "model", args.given
    for name, useful in FLAGS.items():
        if getattr(args, name) is not None:
            what, sense = f"--{name}", {name, *useful}
    if what == "model":
        kind = benchmark_of(args.forget).name
        what, sense = kind, args.given - {*NOT_OF[kind]}
    if useless := sorted(args.given - sense):
        raise EvalError(f"--{useless[0].replace('_', '-')}: has no meaning for {what}; drop the flag")
    if args.json and args.show:
        raise EvalError("--show: prints rows, and --json prints one object and nothing else; drop one of them")
    if args.out:
        try:
            folder = Path(os.path.realpath(args.out)).parent
            existing = next(path for path in (folder, *folder.parents) if path.exists())
            why = "is no file; name one" if os.path.lexists(args.out) and not os.path.isfile(args.out) else ""
            why = why or ("" if existing.is_dir() and os.access(existing, os.W_OK) else f"{existing} cannot be written in")
        except (OSError, ValueError) as e:
            why = f"is no name for a file ({files.first_line(e)})"
        if why:
            raise EvalError(f"--out {args.out!r}: {why}")


def make_benchmark(args: argparse.Namespace) -> Benchmark:
    """What the flags ask for, its data loaded; with --logs, none is, and it is TOFU. Raises as the benchmarks do."""
    kind, forget = (Tofu, None) if args.logs is not None else (benchmark_of(args.forget), args.forget)
    asked = {f.name: getattr(args, f.name) for f in dataclasses.fields(Options) if f.name in args}
    asked |= {"forget": forget, "rows": kind.first_rows(args.forget), "stemmer": False if args.no_stemmer else None}
    return kind(Options(**asked, holdout=True, own=True))


def evaluate_models(args: argparse.Namespace, benchmark: Benchmark, say: Callable[[str], None]) -> dict[str, dict]:
    """{'model', and 'retrained' where --retain-model names it: log}."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.retain_logs:
        benchmark.reference(args.model, args.retain_logs, None)  # an unusable log ends the run now, not after the work

    def load(source: Source) -> Llama:
        return load_pretrained(source.folder, device=device, compute_dtype=dtype)

    def run(name: str, label: str) -> tuple[Source, dict]:
        source = open_source(name, "target", args.tokenizer, args.prompt)
        benchmark.check(source.tokenizer)
        model = load(source)
        on = f"{on_device(device, dtype)}, protocol {args.protocol}"
        say(f"{label}: {source.name}  prompt format {source.tokenizer.format_name}, {on}")
        return source, benchmark.evaluate(model, source.tokenizer, source.run, "final", label)

    if not args.retain_model:
        return {"model": run(args.model, "model")[1]}
    judge, retrained = run(args.retain_model, "retrained")
    logs = {"model": run(args.model, "model")[1], "retrained": retrained}
    return benchmark.with_language(logs, partial(load, judge), judge.tokenizer)


def main(argv: list[str] | None = None) -> int:
    files.open_streams()
    args = parse_args(argv)

    def say(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    try:
        check_flags(args)
        if args.plot is not None:
            print(plot(Path(args.plot)))
            return 0
        if args.report is not None:
            print(report.write(Path(args.report), open_source, benchmark_of, args))
            return 0
        require_extra()
        benchmark = make_benchmark(args)
        if args.logs is not None:
            logs = {"log": scored(args.logs, args.truth_ratio)}
        else:
            logs = evaluate_models(args, benchmark, say)
            if benchmark.no_holdout:
                say(f"membership scores and PrivLeak are absent: {benchmark.no_holdout}")
        reference = benchmark.reference(args.model, args.retain_logs, logs.get("retrained"))
        found = {name: benchmark.summary(log, *reference) for name, log in logs.items()}
        summaries = {name: summary for name, (summary, _) in found.items()}
        first, (_, where) = next(iter(logs)), list(found.values())[-1]
        if args.json:
            print(json.dumps(summaries[first] | {"retain_reference": where}, indent=1))
        say(benchmark.report(summaries, where))
        if args.show:
            say(benchmark.worst(logs[first], args.show))
        if logs[first]["path"]:
            say(f"per-item results: {logs[first]['path']}")
        if args.out:
            files.write_json(Path(args.out), summaries)
        sys.stdout.flush()
    except UserError as e:
        distributed.tell(f"error: {e}")
        return 2
    except KeyboardInterrupt:
        kept = args.model and run_folder(args.model)
        distributed.tell("\ninterrupted" + ("; the same command goes on from here" if kept else ""))
        return 130
    except BrokenPipeError:  # who reads the output has ended, as `head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 141
    except OSError as e:
        distributed.tell(f"error: {e}")
        return 2
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        distributed.tell(f"error: out of memory ({files.first_line(e)}); {LESS}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(distributed.launch(main))
