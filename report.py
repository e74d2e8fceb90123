"""A run as one HTML page to read: its scores, its trajectory, and answers token by token under all of its models.

`python eval.py --report RUN` writes RUN/report.html: no network, no script, no other file. Texts of data, models and files
are escaped, what could hide or reorder text is spelt out, and the page's own policy allows nothing but inline styles.
"""

import bisect
import dataclasses
import html
import math
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import files
from data import Example, Row, Tokenizer, fingerprint, pack
from dipo import LOSSES
from files import Field, UserError
from inference import digest_of, evaluated, pick_device, pick_dtype
from logs import read_ours
from metrics import EvalError
from model import Llama, generate, load_pretrained
from tofu import Tofu, evaluation_sets

FORGET_ROWS, RETAIN_ROWS = 6, 4  # that are shown
STEPS = (0.001, 0.01, 0.1, 0.5, 0.9)  # probabilities between two colours
# (background, text) from the least probable: after ColorBrewer's YlOrBr, in order also for the colour-blind and in grey.
COLOURS = (("#5e2205", "#fff"), ("#b8440a", "#fff"), ("#ee8420", "#111"), ("#f9ae42", "#111"), ("#fdd87e", "#111"),
           ("#fff8e1", "#111"))  # fmt: skip
SETTINGS = "forget retain model retain_model forget_loss retain_loss beta lam lr schedule epochs batch_size seed".split()
CONFIG = dict.fromkeys(("model", "forget", "prompt", "forget_loss", "retain_loss"), Field(str))
CONFIG |= {"seed": Field(int), "max_new_tokens": Field(int, 1, 1e6), "eval_rows": Field(int, 0)}
CONFIG |= dict.fromkeys(("tokenizer", "eval_retain", "retain_model", "data_dir"), Field(str, null=True))
NUMBERS = Field(dict, items=Field((float, dict), -1e30, 1e30, null=True, items=Field(float, -1e30, 1e30)))
SUMMARY = {"hints": Field(list, items=Field(str)), "retain_reference": Field(str, required=False)}
SUMMARY |= {name: dataclasses.replace(NUMBERS, required=False) for name in ("target", "unlearned", "retrained")}
MEMORY = {
    "tau": Field(float, -1e6, 1e6),
    "share": Field(float, 0, 1),
    "rows": Field(dict, items=Field(list, items=Field(int))),
}
LOG = {"protocol": Field(dict), "rows": Field(dict, items=Field(dict, items=Field(dict, fields={
    "question": Field(str), "generation": Field(str, required=False)})))}  # fmt: skip


@dataclass
class Shown:
    """A row on the page, and what the models make of it: target, unlearned, retrained."""

    row: Row
    example: Example
    pieces: list[tuple[str, slice]]  # see `pieces`
    memory: Sequence[int] = ()  # positions among the answer's tokens, EOS included
    probabilities: dict[str, list[float]] = field(default_factory=dict)  # {model: of each of these tokens}
    generations: dict[str, str] = field(default_factory=dict)


# -------------------------------------------------------------------------------------------------------- what is shown


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[str, slice]]:
    """The text of the tokens in pieces that join to it, each with its tokens: one, or those that share a character."""
    whole, found, text, start = tokenizer.decode_text(list(ids)), list[tuple[str, slice]](), "", 0
    for end in range(1, len(ids) + 1):
        longer = tokenizer.decode_text(list(ids[:end]))
        if end == len(ids) or (whole.startswith(longer) and len(longer) > len(text)):  # else it ends within a character
            found.append((longer[len(text) :], slice(start, end)))
            text, start = longer, end
    return found


def spread(rows: list[Row], n: int) -> list[Row]:
    """One of each n-th of the rows: of the first its first, of the second its second..., as sets repeat their questions."""
    borders = [i * len(rows) // n for i in range(n + 1)]
    return [rows[a + i % (b - a)] for i, (a, b) in enumerate(zip(borders, borders[1:], strict=False)) if a < b]


def fill_memory(path: Path, shown: list[Shown]) -> str:
    """Fill in the rows' memory positions from a run's memory.json, if it has one, and return what is to be said of them.
    Raises EvalError for a file that does not fit the rows."""
    if not path.exists():
        return "This run selects no memory positions: to its losses all tokens of an answer are alike."
    record = files.read_json(path, EvalError, "train again", fields=MEMORY)
    for row in shown:
        row.memory = record["rows"].get(row.row.key, (-1,))
        if not all(0 <= i < row.example.answer_length for i in row.memory):
            raise EvalError(f"{path}: does not fit the forget set ({row.row.key} has no such positions); train again")
    return f"Memory positions are {record['share']:.0%} of the forget answers' tokens, tau {record['tau']:g} nats."


def kept_generations(folder: Path, name: str, format_name: str, limit: int, dtype: str, weights: str) -> dict[str, str]:
    """{question: generation} of the evaluations `folder/eval/NAME-*` that asked in this format for as many tokens, and asked
    the model with these `digest_of` its weights. Raises EvalError where others were evaluated in these weights' place: what
    is known of the run is not of this model."""
    asked = {"prompt_format": format_name, "max_new_tokens": limit, "max_total_tokens": None, "mask_quirk": False}
    found, evaluated_weights = dict[str, str](), set[str]()
    for path in sorted((folder / "eval").glob(f"{name}-*/log.json")):
        log = files.read_json(path, EvalError, "remove it", fields={"protocol": files.Field(dict)})
        if not all(key in log["protocol"] and log["protocol"][key] == value for key, value in asked.items()):
            continue
        if log["protocol"].get("dtype") == dtype:
            evaluated_weights.add(log["protocol"].get("weights", weights))
        if log["protocol"].get("weights") == weights:
            if wrong := files.fault(log, files.Field(dict, fields=LOG)):
                raise EvalError(f"{path}: {wrong}; remove it")
            log = read_ours(path, log)
            items = [item for part in ("forget", "retain") for item in log["rows"].get(part, {}).values()]
            found |= {item["question"]: item["generation"] for item in items if "generation" in item}
    if evaluated_weights and weights not in evaluated_weights:
        raise EvalError(f"{folder}: its model is another one than was evaluated; train again, or put that one back")
    return found


@torch.no_grad()
def ask(model: Llama, name: str, shown: list[Shown], tokenizer: Tokenizer, limit: int) -> None:
    """Fill in the model's probabilities, and those generations that are not there. Raises EvalError where a loss is NaN."""
    batch = pack([row.example for row in shown]).to(model.device)
    losses = F.cross_entropy(model(**batch.inputs), batch.targets, reduction="none").cpu()
    for row, loss in zip(shown, losses.split(batch.answer_lengths), strict=True):
        if not loss.isfinite().all():
            raise EvalError(f"{row.row.key}: the {name} model's loss is not finite; its weights or --dtype overflow")
        row.probabilities[name] = loss.neg().exp().tolist()
    missing = [row for row in shown if name not in row.generations]
    prompts = [row.example.ids[: row.example.prompt_length] for row in missing]
    found = generate(model, prompts, limit, {*model.config.eos_token_ids, tokenizer.eos_id})
    for row, ids in zip(missing, found, strict=True):
        row.generations[name] = tokenizer.decode(ids)


# ----------------------------------------------------------------------------------------------------------------- HTML


def visible(text: str) -> str:
    """With control characters, lone surrogates and what changes the direction of text spelt out."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda m: chr(0x2400 + ord(m[0])), text)
    hidden = "[\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
    return re.sub(hidden, lambda m: f"[U+{ord(m[0]):04X}]", text)


def escaped(value: object) -> str:
    return html.escape(visible(str(value)))


def answer_html(shown: Shown, probabilities: list[float]) -> str:
    """The answer's tokens, coloured. A piece of several tokens has the product of their probabilities, which is that of its
    character. The last token, EOS, is no piece."""
    parts, last = [(escaped(text), at) for text, at in shown.pieces], len(probabilities) - 1
    spans = []
    for text, at in [*parts, ("<small>end</small>", slice(last, last + 1))]:
        p, tokens = math.prod(probabilities[at]), range(at.start, at.stop)
        tag, more = ("mark", ", memory") if any(i in shown.memory for i in tokens) else ("span", "")
        title = f"p = {p:.3g}, token {', '.join(map(str, tokens))}{more}"
        spans.append(f'<{tag} class="p{bisect.bisect(STEPS, p)}" title="{title}">{text}</{tag}>')
    return "".join(spans)


def row_html(shown: Shown) -> str:
    lines = [f'<th colspan="3"><bdi>{escaped(shown.row.question)}</bdi> <small>{escaped(shown.row.key)}</small></th>']
    for name, found in shown.probabilities.items():
        mean = math.exp(sum(math.log(max(p, 1e-45)) for p in found) / len(found))
        cells = answer_html(shown, found), escaped(shown.generations[name]) or "<small>nothing</small>"
        lines.append(f"<th>{name} <small>{mean:.3g}</small></th>" + "".join(f'<td dir="auto">{x}</td>' for x in cells))
    return f"<tbody><tr>{'</tr><tr>'.join(lines)}</tr></tbody>"


def chart(title: str, points: list[tuple[float, float]], levels: dict[str, float], log: bool) -> str:
    """An SVG of values from 0 to 1 over epochs, with a dashed line at each level."""
    width, height, left, top, right, bottom = 470, 180, 50, 26, 458, 156
    decades = max(3, *(math.ceil(-math.log10(max(y, 1e-300))) for y in [*levels.values(), *(y for _, y in points)]))
    ticks = [10.0**-e for e in range(0, decades + 1, math.ceil(decades / 5))] if log else [0, 0.25, 0.5, 0.75, 1]

    def place(x: float, y: float) -> tuple[float, float]:
        below = -math.log10(max(y, 1e-300)) / decades if log else 1 - y
        return round(left + x / (points[-1][0] or 1) * (right - left), 1), round(top + below * (bottom - top), 1)

    parts = [f'<text x="{left}" y="14" class="title">{title}</text>']
    for tick in ticks:
        parts.append(f'<path d="M{left} {place(0, tick)[1]}H{right}" class="grid"/>')
        parts.append(f'<text x="{left - 6}" y="{place(0, tick)[1] + 4}" text-anchor="end">{tick:g}</text>')
    for name, y in levels.items():
        parts.append(f'<path d="M{left} {place(0, y)[1]}H{right}" class="{name}"><title>{name}: {y:.4g}</title></path>')
    parts.append(f'<polyline points="{" ".join(f"{x},{y}" for x, y in (place(*point) for point in points))}"/>')
    for i, (x, y) in enumerate(points):
        cx, cy = place(x, y)
        parts.append(f'<circle cx="{cx}" cy="{cy}" r="3.5"><title>epoch {x:g}: {y:.4g}</title></circle>')
        if i % math.ceil(len(points) / 12) == 0:
            parts.append(f'<text x="{cx}" y="{height - 7}" text-anchor="middle">{x:g}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title} over epochs">{"".join(parts)}</svg>'


def trajectory_html(path: Path, summary: dict) -> str:
    """A chart of each score that the trajectory has; nothing without one. Raises EvalError for a broken file."""
    charts = []
    try:
        points = [{"epoch": 0} | summary["target"], *files.read_jsonl(path)]
        for key, title in (("forget_quality", "Forget quality"), ("model_utility", "Model utility")):
            if len(points) > 1 and all(point[key] is not None for point in points):
                values = [(float(point["epoch"]), float(point[key])) for point in points]
                if not all(0 <= x < math.inf and 0 <= y <= 1 for x, y in values) or values != sorted(values):
                    raise ValueError(f"{key} or epoch is out of its range or order")
                levels = {name: float(summary[name][key]) for name in ("target", "retrained") if name in summary}
                charts.append(chart(title, values, levels, key == "forget_quality"))
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, UserError) as e:
        raise EvalError(f"{path}: is no trajectory of this run ({files.first_line(e)}); remove it") from None
    legend = 'Over epochs. Dashed: <b class="target">target</b>, <b class="retrained">retrained</b>.'
    return f'<h2>Trajectory</h2>{"".join(charts)}<p class="note">{legend}</p>' if charts else ""


def settings_html(settings: dict) -> str:
    pairs = (f"<span>{escaped(name)} <b>{escaped(value)}</b></span>" for name, value in settings.items())
    return f'<p class="settings">{" ".join(pairs)}</p>'


STYLE = """
* { box-sizing: border-box } body { font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #222;
  background: #fff; margin: 0 auto; max-width: 1160px; padding: 24px 20px 60px; overflow-wrap: anywhere }
h1 { font-size: 24px; margin: 0 } h2 { font-size: 18px; margin: 26px 0 8px } .note { margin: 6px 0 }
small, .note, .settings { color: #5a5a5a; font-size: 13px; font-weight: normal }
.settings span { display: inline-block; margin-right: 14px }
b { color: #222; font-weight: 600 } .hint { border-left: 4px solid #b8440a; background: #fff5ee; padding: 6px 12px }
table { border-collapse: collapse; width: 100% } th { text-align: left; font-weight: 500 } th, td { vertical-align: top }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 0 44px }
.scores td, .scores th { padding: 2px 10px 2px 0; border-bottom: 1px solid #eee; font-size: 14px }
.scores td { font-variant-numeric: tabular-nums } svg { width: 100%; height: auto; display: block }
svg text { font-size: 11px; fill: #555 } svg .title { font-size: 13px; fill: #222; font-weight: 600 }
polyline { fill: none; stroke: #222; stroke-width: 1.5 } circle { fill: #222 } .grid { stroke: #e6e6e6 }
path.target { stroke: #b8440a; stroke-width: 2; stroke-dasharray: 2 4 } b.target { color: #b8440a }
path.retrained { stroke: #08519c; stroke-width: 2; stroke-dasharray: 9 5 } b.retrained { color: #08519c }
.answers { table-layout: fixed } .answers col:first-child { width: 170px }
.answers td, .answers th { padding: 4px 16px 4px 0; vertical-align: baseline } .answers td { white-space: pre-wrap }
.answers td:nth-child(2) { line-height: 1.9 } .answers tr + tr th small { white-space: nowrap }
.answers thead th { padding: 24px 0 0; color: #5a5a5a; font-size: 13px } thead th:first-child { font-weight: 700 }
.answers th[colspan] { padding: 18px 0 4px; border-bottom: 1px solid #bbb; font-weight: 600 }
[class^=p] { padding: 2px 1px; margin-right: 1px; border-radius: 3px; border-bottom: 3px solid transparent;
  box-decoration-break: clone; -webkit-box-decoration-break: clone; print-color-adjust: exact }
[class^=p] small { color: inherit } mark[class] { border-bottom-color: #08519c; border-radius: 3px 3px 0 0 }
.legend { line-height: 2.1; margin: 6px 0 } .legend [class^=p] { padding: 2px 8px; margin-right: 5px; white-space: nowrap }
"""
HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'">
"""
EXPLAINED = """Each token of the reference answer, given the question and the answer's tokens before it: the darker, the less
expected. Point at one for its number. Tokens that share a character are one piece, with the product of their probabilities;
"end" is the EOS. Beside a model stands the answer's probability to the power 1 / its tokens. """


def page(name: str, settings: dict, config: dict, hints: Sequence[str], scores: dict[str, dict], against: str,
         trajectory: str, memory: str, sets: dict[str, list[Shown]]) -> str:  # fmt: skip
    """The page, of texts as they are; only `trajectory` is HTML. scores: {model: {name: number}}."""
    colours = "".join(f".p{i} {{ background: {back}; color: {text} }} " for i, (back, text) in enumerate(COLOURS))
    lines = ["".join(f"<th>{escaped(x)}</th>" for x in ("", *scores))]
    for label in dict.fromkeys(label for column in scores.values() for label in column):
        cells = (f"<td>{escaped(column.get(label, '-'))}</td>" for column in scores.values())
        lines.append(f"<th>{escaped(label)}</th>{''.join(cells)}")
    steps = [f"below {100 * STEPS[0]:g} %", *(f"to {100 * x:g} %" for x in STEPS[1:]), f"from {100 * STEPS[-1]:g} %"]
    legend = "".join(f'<span class="p{i}">{step}</span>' for i, step in enumerate(steps))
    tables = ""
    for role, shown in sets.items():
        heads = f"<th>{role} set</th><th>reference answer, coloured by each model</th><th>greedy generation</th>"
        tables += f'<table class="answers"><col><col><col><thead><tr>{heads}</tr></thead>'
        tables += "".join(map(row_html, shown)) + "</table>"
    return f"""{HEAD}<title>{escaped(name)}</title><style>{STYLE}{colours}</style></head><body><h1>{escaped(name)}</h1>
{settings_html(settings)}{"".join(f'<p class="hint">{escaped(hint)}</p>' for hint in hints)}
<div class="columns"><div><h2>Scores</h2><table class="scores"><tr>{"</tr><tr>".join(lines)}</tr></table>
<p class="note">Forget quality against: {escaped(against)}. docs/evaluation.md explains each row.</p></div>
<div>{trajectory}</div></div>
<h2>Answers, token by token</h2><p class="legend">Probability: {legend} <mark class="p5">memory position</mark></p>
<p class="note">{EXPLAINED}{escaped(memory)}</p>{tables}
<details><summary>All settings</summary>{settings_html(config)}</details></body></html>
"""


# ----------------------------------------------------------------------------------------------------------------- run


def read_run(run: Path, benchmark_of: Callable[[str], type]) -> tuple[dict, dict]:
    """config.json and summary.json of an unlearning run with TOFU's evaluation. Raises EvalError for any other."""
    record = files.read_json(path := run / "config.json", EvalError, "name a run folder of train.py")
    config = record.get("config")
    if not isinstance(config, dict) or config.get("finetune"):
        raise EvalError(f"{path}: is of no unlearning run; a report shows what one has forgotten")
    if wrong := files.fault(config, Field(dict, fields=CONFIG)):
        raise EvalError(f"{path}: {wrong}; train again")
    if not issubclass(benchmark_of(config["forget"]), Tofu):
        raise EvalError(f"{run}: forgets {config['forget']}, no questions; a report needs a tofu_... or toy_... run")
    remedy = f"finish the run: python train.py --resume --out {shlex.quote(str(run))}"
    summary = files.read_json(run / "summary.json", EvalError, remedy, fields=SUMMARY)
    if not {"target", "unlearned"} <= summary.keys():
        raise EvalError(f"{run / 'summary.json'}: holds no evaluation; train without --no-eval")
    return record, summary


def write(run: Path, open_source: Callable, benchmark_of: Callable[[str], type], args: Any) -> Path:
    """RUN/report.html. Holds one model at a time. open_source, benchmark_of: eval.py's. args: its device, dtype and
    data_dir. Raises UserError naming the file that is missing or broken."""
    record, summary = read_run(run, benchmark_of)
    config = record["config"]
    try:
        scores = {name: Tofu.cells(summary[name]) for name in ("target", "unlearned", "retrained") if name in summary}
        hints, known = [*map(str, summary["hints"])], record["data"]["forget"]["fingerprint"]
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise EvalError(f"{run / 'summary.json'}: is no summary of this run ({files.first_line(e)}); train again") from None
    trajectory = trajectory_html(run / "trajectory.jsonl", summary)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)

    data_dir, first = args.data_dir or config["data_dir"], config["eval_rows"] or None
    forget = Tofu.load(config["forget"], data_dir, config["seed"])
    if fingerprint(forget) != known:
        raise EvalError(f"{config['forget']}: not the rows that {run} was trained on; pass their --data-dir")
    retain = Tofu.load(evaluation_sets(config["forget"], config["eval_retain"])["retain"], data_dir, config["seed"])
    sets = {"forget": spread(forget[:first], FORGET_ROWS), "retain": spread(retain[:first], RETAIN_ROWS)}

    sources = {"target": open_source(config["model"], "target", config["tokenizer"], config["prompt"])}
    tokenizer = sources["target"].tokenizer
    others = {"unlearned": os.path.realpath(run / "model"), "retrained": config["retain_model"]}
    for name, folder in others.items():
        if folder:
            sources[name] = open_source(folder, "target", str(tokenizer.folder), tokenizer.format_name)
    shown = {
        role: [
            Shown(row, e, pieces(tokenizer, e.ids[e.prompt_length : -1]))
            for row, e in zip(rows, Tofu.encode(rows, tokenizer), strict=True)
        ]
        for role, rows in sets.items()
    }
    memory = fill_memory(run / "memory.json", shown["forget"])
    everything, limit = [*shown["forget"], *shown["retain"]], config["max_new_tokens"]
    for name, source in sources.items():
        own = run if name == "unlearned" else source.run
        model = evaluated(load_pretrained(source.folder, device=device, compute_dtype=dtype))
        kept = kept_generations(
            own or run, "final" if own else name, tokenizer.format_name, limit, str(dtype), digest_of(model)
        )
        for row in everything:
            row.generations |= {name: kept[row.row.question]} if row.row.question in kept else {}
        ask(model, name, everything, tokenizer, limit)
        del model  # before the next one is loaded

    anchored = any(LOSSES[name].anchored for name in (config["forget_loss"], config["retain_loss"]) if name in LOSSES)
    names = (*SETTINGS, *(("kappa", "tau", "positions", "pair_from") if anchored else ()))
    settings = {name: config[name] for name in names if config.get(name) is not None}
    against = summary.get("retain_reference", "absent")
    text = page(os.path.basename(os.path.realpath(run)), settings, config, hints, scores, against, trajectory, memory, shown)
    files.write_text(path := run / "report.html", text)
    return path
