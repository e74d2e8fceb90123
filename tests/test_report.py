"""report.py: the page of a run holds what its files and models say, and nothing that a text could smuggle in."""

import functools
import gc
import html.parser
import itertools
import json
import math
import re
import shutil
import subprocess
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import BYTE_LEVEL, KINDS, error_of, make_tiny, write_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy")
pytest.importorskip("rouge_score")

import logs
import report
import train
from data import Example, Row, Tokenizer
from eval import benchmark_of
from eval import main as evaluate
from model import load_pretrained, save_pretrained
from report import Shown
from tofu import Tofu

MODELS = ("target", "unlearned", "retrained")
FLAGS = """--forget toy_forget10[:9] --retain toy_retain90[:10] --batch-size 4 --lr 3e-3 --epochs 2 --eval-every 1
--eval-rows 8 --max-new-tokens 4 --forget-loss anchored --retain-loss anchored --tau -2.5 --device cpu""".split()


class Page(html.parser.HTMLParser):
    """What a browser makes of a page: its tags, their attributes, its text, the cells of its tables."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.text, self.inside = list[str](), list[tuple[str, str]](), "", list[str]()
        self.tables = list[SimpleNamespace]()  # {kind, rows: [[cell: {text, tokens: [{tag, kind, title, text}]}]]}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "col"):
            self.inside.append(tag)
        if tag == "table":
            self.tables.append(SimpleNamespace(kind=found["class"], rows=[]))
        elif tag == "tr":
            self.tables[-1].rows.append([])
        elif tag in ("td", "th"):
            self.tables[-1].rows[-1].append(SimpleNamespace(text="", tokens=[]))
        elif re.fullmatch(r"p\d", found.get("class", "")) and "title" in found:
            token = SimpleNamespace(tag=tag, kind=found["class"], title=found["title"], text="")
            self.tables[-1].rows[-1][-1].tokens.append(token)

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag

    def handle_data(self, data):
        if "style" in self.inside:
            return
        self.text += data
        if {"td", "th"} & {*self.inside}:
            cell = self.tables[-1].rows[-1][-1]
            cell.text += data
            if {"span", "mark"} & {*self.inside}:
                cell.tokens[-1].text += data

    @property
    def answers(self) -> list[tuple[str, dict[str, SimpleNamespace]]]:
        """(question and key, {model: its mean, its tokens, its generation}) of each row."""
        found: list[tuple[str, dict[str, SimpleNamespace]]] = []
        for row in (row for table in self.tables if table.kind == "answers" for row in table.rows[1:]):
            if len(row) == 1:
                found.append((row[0].text, {}))
            else:
                (name, mean), answer, generation = row[0].text.split(), row[1], row[2].text
                found[-1][1][name] = SimpleNamespace(mean=float(mean), tokens=answer.tokens, generation=generation)
        return found


@functools.lru_cache
def parsed(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two tiny models: the target, in a run folder, and what stands for the retrained one, in a folder without tokenizer."""
    target, retrained = (make_tiny(tmp_path_factory.mktemp(name), seed) for seed, name in enumerate(("target", "retrained")))
    (target.folder.parent / "config.json").write_text('{"config": {}}')  # as train.py's
    return [target, retrained._replace(folder=save_pretrained(retrained.model, retrained.folder.parent / "bare"))]


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """A finished run with its report."""
    out = tmp_path_factory.mktemp("report") / "run"
    target, retrained = str(models[0].folder.parent), str(models[1].folder)
    assert train.main([*FLAGS, "--model", target, "--retain-model", retrained, "--out", str(out)]) == 0
    assert evaluate(["--report", str(out)]) == 0
    return out


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


def shown_rows(models, run) -> list[tuple[Row, Example]]:
    """Those of the page, forget rows first, chosen and encoded anew."""
    rows = [Tofu.load(name)[:8] for name in ("toy_forget10", "toy_retain_perturbed")]
    chosen = report.spread(rows[0], report.FORGET_ROWS) + report.spread(rows[1], report.RETAIN_ROWS)
    return list(zip(chosen, models[0].tokenizer.encode_rows(chosen), strict=True))


# ------------------------------------------------------------------------------------------------------- a run's page


def test_the_page_shows_each_answer_and_generation_of_each_model(run, models):
    page, rows = parsed(run / "report.html"), shown_rows(models, run)
    places = {"target": (models[0].folder.parent, "final"), "unlearned": (run, "final"), "retrained": (run, "retrained")}
    found = {name: next(folder.glob(f"eval/{kept}-*/log.json")) for name, (folder, kept) in places.items()}
    logs = {name: json.loads(path.read_text()) for name, path in found.items()}
    assert len(page.answers) == len(rows) == report.FORGET_ROWS + report.RETAIN_ROWS
    for i, ((head, lines), (row, _)) in enumerate(zip(page.answers, rows, strict=True)):
        assert head == f"{row.question} {row.key}" and tuple(lines) == MODELS
        for name, line in lines.items():
            assert "".join(token.text for token in line.tokens) == f" {row.answer}end"  # as the plain format has it
            kept = logs[name]["rows"]["forget" if i < report.FORGET_ROWS else "retain"][row.key]["generation"]
            assert line.generation == (report.visible(kept) or "nothing")
    assert len({line.generation for _, lines in page.answers for line in lines.values()}) > 3


def test_the_page_shows_the_scores_settings_and_hints_of_the_run(run):
    page, summary = parsed(run / "report.html"), json.loads((run / "summary.json").read_text())
    [table] = [table for table in page.tables if table.kind == "scores"]
    cells = {name: Tofu.cells(summary[name]) for name in MODELS}
    assert [x.text for x in table.rows[0]] == ["", *MODELS]
    assert [[x.text for x in row] for row in table.rows[1:]] == [
        [label, *(cells[name][label] for name in MODELS)] for label in cells["target"]
    ]
    assert {"forget_quality", "model_utility"} <= cells["target"].keys()
    assert all(report.visible(hint) in page.text for hint in summary["hints"])
    settings = page.text.split("Scores")[0]
    assert (
        "forget_loss anchored" in settings and "lr 0.003" in settings and "kappa 0.05" in settings and "tau -2.5" in settings
    )
    assert page.tags.count("svg") == 2 and page.tags.count("polyline") == 2 and page.tags.count("circle") == 6


def test_the_probabilities_are_those_that_each_model_gives(run, models):
    page, folders = parsed(run / "report.html"), (models[0].folder, run / "model", models[1].folder)
    for name, folder in zip(MODELS, folders, strict=True):
        model = load_pretrained(folder)
        for (_, lines), (_, e) in zip(page.answers, shown_rows(models, run), strict=True):
            logits = model(torch.tensor([e.ids]))[0, e.prompt_length - 1 : -1]
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor(e.ids[e.prompt_length :]), reduction="none")
            found = [float(re.match(r"p = (\S+), token \d+(, memory)?$", token.title)[1]) for token in lines[name].tokens]
            assert found == pytest.approx(losses.neg().exp().tolist(), rel=6e-3)  # three digits
            assert lines[name].mean == pytest.approx(losses.mean().neg().exp().item(), rel=6e-3)
            for token, p in zip(lines[name].tokens, found, strict=True):
                near = any(abs(p / step - 1) < 0.01 for step in report.STEPS)  # and rounded may lie beyond it
                assert near or token.kind == f"p{sum(step <= p for step in report.STEPS)}"


def test_memory_positions_are_marked_where_the_file_has_them(run, models):
    page, record = parsed(run / "report.html"), json.loads((run / "memory.json").read_text())
    assert f"{record['share']:.0%} of the forget answers' tokens, tau -2.5 nats" in page.text
    found = 0
    for i, ((_, lines), (row, _)) in enumerate(zip(page.answers, shown_rows(models, run), strict=True)):
        expected = record["rows"][row.key] if i < report.FORGET_ROWS else []
        for line in lines.values():
            assert [j for j, token in enumerate(line.tokens) if token.tag == "mark"] == expected
            assert all(("memory" in token.title) == (token.tag == "mark") for token in line.tokens)
        found += 0 < len(expected) < len(line.tokens)
    assert found  # some, but not all


def test_what_no_log_holds_is_generated_to_the_same_page(run, copy):
    shutil.rmtree(copy / "eval")
    assert evaluate(["--report", str(copy)]) == 0
    assert parsed(copy / "report.html").answers == parsed(run / "report.html").answers


def test_kept_generations_are_shown_unless_they_were_asked_for_otherwise(copy):
    [path] = copy.glob("eval/final-*/log.json")
    log = json.loads(path.read_text())
    for item in log["rows"]["forget"].values():
        item["generation"] = "planted"
    for limit, count in ((4, report.FORGET_ROWS), (5, 0)):
        logs.write_log(path, log | {"protocol": log["protocol"] | {"max_new_tokens": limit}})
        assert evaluate(["--report", str(copy)]) == 0
        found = [line.generation for _, lines in Page((copy / "report.html").read_text()).answers for line in lines.values()]
        assert found.count("planted") == count


def test_a_model_in_the_place_of_the_one_that_was_evaluated_is_refused(copy, capsys):
    [path] = copy.glob("eval/final-*/log.json")
    log = json.loads(path.read_text())
    logs.write_log(path, log | {"protocol": log["protocol"] | {"weights": "another"}})
    assert evaluate(["--report", str(copy)]) == 2
    assert "its model is another one than was evaluated" in capsys.readouterr().err


def test_one_model_is_held_at_a_time(copy, monkeypatch):
    load, held, names = report.load_pretrained, weakref.WeakSet(), []

    def watched(folder, **settings):
        gc.collect()
        assert not held
        names.append(folder)
        held.add(model := load(folder, **settings))
        return model

    monkeypatch.setattr(report, "load_pretrained", watched)
    assert evaluate(["--report", str(copy)]) == 0 and len(names) == 3


def test_the_page_needs_nothing_else_and_forbids_it(run):
    text, page = (run / "report.html").read_text(), parsed(run / "report.html")
    [policy] = [value for name, value in page.attributes if name == "content" and "default-src" in value]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'"
    assert text.index("Content-Security-Policy") < text.index("<style>")
    assert not {"script", "link", "img", "iframe", "a", "form"} & {*page.tags} and not re.search(r"url\(|@import|//", text)
    assert not [name for name, _ in page.attributes if name in ("src", "href", "style") or name.startswith("on")]


def test_a_run_without_retrained_model_trajectory_or_selection_says_so(models, tmp_path, capsys):
    flags = [*FLAGS, "--forget-loss", "dipo", "--retain-loss", "none", "--eval-every", "0", "--out", str(tmp_path / "run")]
    assert train.main([*(f for f in flags if f not in ("--tau", "-2.5")), "--model", str(models[0].folder)]) == 0
    capsys.readouterr()
    assert evaluate(["--report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run/report.html")
    page = parsed(tmp_path / "run/report.html")
    assert all(tuple(lines) == MODELS[:2] for _, lines in page.answers) and len(page.answers) == 10
    assert "svg" not in page.tags and "Trajectory" not in page.text
    assert page.tags.count("mark") == 1 and "selects no memory positions" in page.text  # the legend's
    assert "--retain-logs FILE" in page.text and "kappa" not in page.text.split("Scores")[0]


# ------------------------------------------------------------------------------------------------------- bad input


def refused(capsys, folder: Path) -> str:
    capsys.readouterr()
    assert evaluate(["--report", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_run_of_another_kind_is_refused_in_one_line(copy, tmp_path, capsys):
    assert "no such file; name a run folder" in refused(capsys, tmp_path / "nowhere")
    config = json.loads((copy / "config.json").read_text())["config"]
    for other, told in (
        ({"finetune": "toy_full"}, "no unlearning run"),
        ({"forget": "muse_news"}, "forgets muse_news"),
        ({"forget": 5}, "'forget'"),
        ({"forget": "toy_forget10[:8]"}, "--data-dir"),  # not what it was trained on
        ({"model": "nowhere"}, "nowhere"),
        ({"retain_model": str(tmp_path / "gone")}, "gone"),
    ):
        change(copy / "config.json", config=config | other)
        assert told in refused(capsys, copy)
    change(copy / "config.json", config={key: value for key, value in config.items() if key != "seed"})
    assert "config.json: key 'seed'" in refused(capsys, copy)


def test_a_run_that_is_not_finished_or_not_evaluated_is_refused(copy, capsys):
    (copy / "summary.json").write_text(json.dumps({"model": "m", "hints": []}))
    assert "summary.json: holds no evaluation; train without --no-eval" in refused(capsys, copy)
    (copy / "summary.json").unlink()
    assert f"--resume --out {copy}" in refused(capsys, copy)


ROWS = {f"toy_full/{540 + i}": [0] for i in range(9)}


@pytest.mark.parametrize(
    "name, text",
    [
        ("config.json", "{"),
        ("summary.json", "[]"),
        ("summary.json", json.dumps({"target": {}, "unlearned": {}, "hints": []})),
        ("memory.json", '{"tau": 2.0'),
        ("memory.json", json.dumps({"tau": 2.0, "share": 0.5, "rows": {}})),
        ("memory.json", json.dumps({"tau": "high", "share": 0.5, "rows": ROWS})),
        ("memory.json", json.dumps({"tau": 2.0, "share": 0.5, "rows": ROWS | {"toy_full/540": [-1]}})),
        ("memory.json", json.dumps({"tau": 2.0, "share": 0.5, "rows": ROWS | {"toy_full/540": 3}})),
        ("trajectory.jsonl", "{}\n"),
        ("trajectory.jsonl", "no JSON\n"),
        ("trajectory.jsonl", '{"epoch": 1, "forget_quality": 2, "model_utility": 0.5}\n'),
        ("trajectory.jsonl", '{"epoch": 1, "forget_quality": 0.1, "model_utility": NaN}\n'),
        ("trajectory.jsonl", "".join(f'{{"epoch": {x}, "forget_quality": 0.1, "model_utility": 0.5}}\n' for x in (2, 1))),
        ("eval/final-*/log.json", "{}"),
        ("eval/final-*/log.json", "broken"),
        ("model/model.safetensors", "broken"),
    ],
)
def test_a_broken_file_is_named(copy, capsys, name, text):
    path = next(iter(sorted(copy.glob(name))))
    path.write_text(text)
    assert str(path) in refused(capsys, copy)
    assert (copy / "report.html").exists()  # the earlier one stays


HOSTILE = st.sampled_from([None, True, "x", "\ud800", -1, 10**400, 1e308, math.nan, math.inf, [], {}, [[]], {"0": 1}])


@settings(max_examples=60)
@given(st.sampled_from(["config", "summary", "memory"]), st.data())
def test_a_hostile_file_is_read_or_refused_in_one_line(run, tmp_path_factory, name, draw):
    folder = tmp_path_factory.mktemp("hostile")
    for other in ("config", "summary", "memory"):
        shutil.copy(run / f"{other}.json", folder)
    record = json.loads((path := folder / f"{name}.json").read_text())
    around, key = record, draw.draw(st.sampled_from(list(record)))
    while isinstance(around[key], dict) and around[key] and draw.draw(st.booleans()):
        around, key = around[key], draw.draw(st.sampled_from(list(around[key])))
    around[key] = draw.draw(HOSTILE)
    path.write_text(json.dumps(record))
    shown = Shown(Row("toy_full/540", "q", "a"), Example("toy_full/540", (0,) * 40, 3), [])
    try:
        _, summary = report.read_run(folder, benchmark_of)
        report.fill_memory(folder / "memory.json", [shown])
        report.trajectory_html(run / "trajectory.jsonl", summary)
        for model in ("target", "unlearned", "retrained"):
            Tofu.cells(summary[model])
    except (KeyError, TypeError):  # what `write` says in one line
        assert name == "summary"
    except report.EvalError as e:
        assert "\n" not in str(e) and (str(folder) in str(e) or str(run) in str(e))


@pytest.mark.parametrize("positions", ([], [0], [1, 3], [0, 3], [4], [-1], [0, 4], [1.0], ["1"], [True]))
def test_memory_positions_are_those_of_the_answers_tokens(tmp_path, positions):
    path, row = tmp_path / "memory.json", Row("a/0", "q", "a")
    path.write_text(json.dumps({"tau": 2.0, "share": 0.25, "rows": {"a/0": positions}}))
    shown = Shown(row, Example(row.key, (0,) * 7, 3), [])  # an answer of four tokens
    if all(type(i) is int and 0 <= i <= 3 for i in positions):
        assert "25% of" in report.fill_memory(path, [shown]) and shown.memory == positions
    else:
        message = error_of(report.fill_memory, path, [shown])
        assert "a/0 has no such positions" in message or "key 'rows.a/0." in message


def test_a_model_that_gives_no_number_is_refused(models, run, tmp_path):
    model = load_pretrained(models[0].folder)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    [(row, e), *_] = shown_rows(models, run)
    shown = [Shown(row, e, [])]
    with pytest.raises(report.EvalError, match=f"{row.key}: the target model's loss is not finite"):
        report.ask(model, "target", shown, models[0].tokenizer, 3)


# ------------------------------------------------------------------------------------------------------- its parts

NASTY = ["<script>alert(1)</script>", "</style>", "\"'", "&lt;", "<!--", "]]>", "\u202e", "\x00", "\x1b[31m", "\r", "\n",
         "\U0001f9d1\u200d\U0001f680", "\u0645\u0631\u062d\u0628\u0627", "\u2067", "\ud800", "<svg onload=x>"]  # fmt: skip
TEXTS = st.lists(st.sampled_from(NASTY) | st.text(max_size=5), max_size=5).map("".join)
PROBABILITIES = st.floats(0, 1) | st.sampled_from(report.STEPS)
TAGS = "html head meta title style body h1 h2 p span b div table tr th td bdi small mark col thead tbody details summary"
ATTRIBUTES = "lang charset name content http-equiv class title dir colspan"


@st.composite
def shown_of(draw) -> Shown:
    """A row of hostile texts, its tokens grouped at random."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    borders = [0, *itertools.accumulate(sizes)]
    parts = [(draw(TEXTS), slice(a, b)) for a, b in itertools.pairwise(borders)]
    n = borders[-1] + 1
    names = draw(st.lists(st.sampled_from(MODELS), unique=True, min_size=1))
    row = Row(draw(TEXTS), draw(TEXTS), "".join(text for text, _ in parts))
    found = {name: draw(st.lists(PROBABILITIES, min_size=n, max_size=n)) for name in names}
    memory = draw(st.lists(st.integers(0, n - 1), unique=True))
    return Shown(row, Example(row.key, (0,) * n, 0), parts, memory, found, {name: draw(TEXTS) for name in names})


@given(shown_of(), st.lists(TEXTS, min_size=6, max_size=6))
def test_no_text_becomes_markup(shown, texts):
    name, key, value, hint, against, memory = texts
    scores, sets = {hint: {value: key}}, {"forget": [shown]}
    whole = report.page(name, {key: value}, {value: key}, [hint], scores, against, "", memory, sets)
    whole.encode("utf-8")
    page, seen = Page(whole), report.visible
    assert {*page.tags} <= {*TAGS.split()} and {a for a, _ in page.attributes} <= {*ATTRIBUTES.split()} and page.inside == []
    assert [text for text in texts if seen(text) not in page.text] == []
    [(head, lines)] = page.answers
    assert head == f"{seen(shown.row.question)} {seen(shown.row.key)}"
    last = len(shown.example.ids) - 1
    slices = [*(at for _, at in shown.pieces), slice(last, last + 1)]
    for model, line in lines.items():
        assert [token.text for token in line.tokens] == [*(seen(text) for text, _ in shown.pieces), "end"]
        assert line.generation == (seen(shown.generations[model]) or "nothing")
        for token, at in zip(line.tokens, slices, strict=True):
            assert (token.tag == "mark") == any(at.start <= i < at.stop for i in shown.memory)
            p = math.prod(shown.probabilities[model][at])
            assert token.title.startswith(f"p = {p:.3g}, token ")
            assert token.kind == f"p{sum(step <= p for step in report.STEPS)}"


HIDDEN = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"


@given(st.text() | TEXTS)
@example("a\u202eb\r\n\x00\x7f\x85\ud800\ufeff\t")
def test_what_could_hide_or_reorder_text_is_spelt_out_and_nothing_else_is_changed(text):
    found = report.visible(text)
    assert not re.search(HIDDEN, found)
    parts = re.split(HIDDEN, text)
    assert re.fullmatch(r"(?:[\u2400-\u241f]|\[U\+[0-9A-F]{4}\])".join(map(re.escape, parts)), found)


@pytest.fixture(scope="module")
def tokenizers_of(tmp_path_factory):
    folders = {kind: write_tokenizer(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}
    return {kind: Tokenizer(folder, prompt=kind.split("-")[0]) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_join_to_the_answer_and_no_character_is_split(tokenizers_of, kind):
    tokenizer = tokenizers_of[kind]

    @given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), min_size=1, max_size=12))
    @example("naïve 🧑‍🚀 مرحبا, \t“x”\n\n  end")
    def check(text):
        ids = tokenizer.encode_text(text)
        if not ids:
            return
        found = report.pieces(tokenizer, ids)
        assert "".join(piece for piece, _ in found) == tokenizer.decode_text(ids)
        assert [i for _, at in found for i in range(at.start, at.stop)] == list(range(len(ids)))
        assert all(piece for piece, _ in found[:-1])
        if kind in BYTE_LEVEL:
            assert tokenizer.decode_text(ids) == text and not any("\ufffd" in piece for piece, _ in found)
            if text.isascii():
                assert len(found) == len(ids)

    check()


@given(st.integers(0, 60), st.integers(1, 8))
def test_rows_are_spread_evenly_and_taken_once(n, k):
    rows = [Row(str(i), "q", "a") for i in range(n)]
    found = [int(row.key) for row in report.spread(rows, k)]
    assert found == sorted(set(found)) and len(found) == min(n, k)
    assert all(i * n // k <= j < max(1, (i + 1) * n // k) for i, j in enumerate(found)) or n < k


def test_rows_of_a_set_that_repeats_its_questions_ask_different_ones():
    found = report.spread(Tofu.load("toy_forget10"), report.FORGET_ROWS)
    assert len({int(row.key.split("/")[1]) % 10 for row in found}) == report.FORGET_ROWS


VALUES = st.floats(0, 1) | st.sampled_from([0.0, 5e-324, 1e-20, 2e-12, 5e-5, 1.0])


@given(st.lists(st.tuples(st.floats(0, 100), VALUES), min_size=1, max_size=30), VALUES, st.booleans())
@example([(0.0, 5e-5), (1.0, 0.5)], 1.0, True)
def test_a_chart_stays_in_its_frame_and_higher_is_higher(points, level, log):
    points = sorted(points)
    svg = report.chart("A title", points, {"target": level}, log)
    page = Page(svg)
    numbers = {name: [float(y) for a, y in page.attributes if a == name] for name in ("cx", "cy", "x", "y")}
    [line] = [value for name, value in page.attributes if name == "points"]
    corners = [tuple(map(float, corner.split(","))) for corner in line.split()]
    assert corners == list(zip(numbers["cx"], numbers["cy"], strict=True))
    assert all(50 <= x <= 458 for x in numbers["cx"]) and all(26 <= y <= 156 for y in numbers["cy"])
    assert all(0 <= x <= 470 for x in numbers["x"]) and all(0 <= y <= 180 for y in numbers["y"])
    for (_, a), (_, b), y, z in zip(points, points[1:], numbers["cy"], numbers["cy"][1:], strict=False):
        assert y == z or (a < b) == (y > z)
    assert f"target: {level:.4g}" in page.text and len(numbers["cx"]) == len(points)


def luminance(colour: str) -> float:
    """Of WCAG 2, relative: 0 is black, 1 is white."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_each_colour_can_be_read_and_told_from_the_next_without_its_hue():
    grey = [luminance(back) for back, _ in report.COLOURS]
    assert len(grey) == len(report.STEPS) + 1
    assert all((b + 0.05) / (a + 0.05) > 1.25 for a, b in itertools.pairwise(grey))
    for back, text in report.COLOURS:
        dark, light = sorted((luminance(back), luminance(text)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2, level AA


# ------------------------------------------------------------------------------------------------------- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def browse(tmp_path):
    """browse(page) -> (the page as the browser has it, its picture [1400, 1200, 3], colours from 0 to 1)."""
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed")
    image = pytest.importorskip("matplotlib.image")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--hide-scrollbars", "--window-size=1200,1400"]

    def call(path: Path) -> tuple[Page, torch.Tensor]:
        flags = "--dump-dom", f"--screenshot={tmp_path / 'shot.png'}"
        done = [subprocess.run([*command, x, path.resolve().as_uri()], capture_output=True, timeout=120) for x in flags]
        assert [x.returncode for x in done] == [0, 0] and not any(b"CONSOLE" in x.stderr for x in done)
        return Page(done[0].stdout.decode()), torch.tensor(image.imread(tmp_path / "shot.png"))[..., :3]

    return call


def test_a_report_opens_in_chromium_without_an_error(run, models, browse):
    page, pixels = browse(run / "report.html")
    assert page.answers == parsed(run / "report.html").answers
    assert shown_rows(models, run)[0][0].answer in page.text
    assert pixels.shape == (1400, 1200, 3)
    unlikely = torch.tensor([int(report.COLOURS[0][0][i : i + 2], 16) for i in (1, 3, 5)]) / 255  # as most tokens are here
    assert ((pixels - unlikely).abs().amax(-1) < 0.01).sum() > 1000
    assert (pixels.mean(-1) > 0.99).float().mean() > 0.3  # and white paper around it


def test_hostile_text_stays_text_in_chromium(browse, tmp_path):
    nasty = "".join(NASTY)
    shown = Shown(Row(nasty, nasty, nasty), Example(nasty, (0, 0), 0), [(nasty, slice(0, 1))], (0,))
    shown.probabilities["target"], shown.generations["target"] = [0.5, 0.5], nasty
    pairs = {nasty: nasty}
    text = report.page(nasty, pairs, pairs, [nasty], {nasty: pairs}, nasty, "", nasty, {"forget": [shown]})
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    page, _ = browse(tmp_path / "page.html")
    assert "script" not in page.tags and "svg" not in page.tags and page.answers == Page(text).answers
