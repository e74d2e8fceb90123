"""Every script of experiments/ runs to its end at the smallest scale, and once; what they share chooses rightly."""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import runpy
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import error_of, make_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

import eval as evaluation
import metrics
import muse
import tofu
import toy
import train
from config import make_config
from files import UserError
from inference import Options
from model import Llama, LlamaConfig, save_pretrained

pytestmark = pytest.mark.aside
RATIOS = st.lists(st.integers(1, 60).map(lambda n: n / 20), min_size=2, max_size=12)
FOLDER = Path(__file__).resolve().parents[1] / "experiments"
SCRIPTS = {"tofu": "baselines", "muse": "muse_news"}  # results whose script has another name
EXPERIMENTS = ["tofu", "ablation", "beta", "failures", "stability", "anchored", "selection", "filter", "muse"]


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"experiments_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One folder for all scripts: they share the models, and the runs that two of them need."""
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture
def common(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(train, "TOY_FINETUNE", train.TOY_FINETUNE)  # the smoke scale replaces it
    monkeypatch.setattr(evaluation, "plot", lambda out: out)  # of each run; drawn in test_train.py
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    import common

    return common


def run(name: str, monkeypatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", [name, "--scale", "smoke", "--results", "results", *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(FOLDER / f"{SCRIPTS.get(name, name)}.py"), run_name="__main__")
    return end.value.code


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_once_and_leaves_records_table_and_plot(common, monkeypatch, capsys, name):
    assert run(name, monkeypatch) == 0
    results = Path("results/smoke")
    kept = json.loads((results / f"{name}.json").read_text())
    assert kept["commit"] and kept["machine"] and kept["records"]
    assert all({"error", "unlearned", "requests"} & record.keys() for record in kept["records"].values())
    if name in ("tofu", "anchored"):
        assert all(r["retrained"]["forget_quality_trained"] == 1 and r["unlearned"]["language"] >= 0
                   for r in kept["records"].values())  # fmt: skip
    assert (results / f"{name}.md").read_text().count("|") > 20 and (results / f"{name}.png").stat().st_size > 5000
    monkeypatch.setattr(train, "main", lambda argv: pytest.fail("a run that is there was run again"))
    monkeypatch.setattr(common, "do", lambda *_: pytest.fail("a run that is there was run again"))
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    first = (results / f"{name}.md").read_text()
    assert run(name, monkeypatch) == 0
    assert (results / f"{name}.md").read_text() == first and json.loads((results / f"{name}.json").read_text()) == kept


@pytest.mark.parametrize(
    "name, scale",
    [
        *itertools.product(["tofu", "muse", "failures"], ["smoke", "toy", "smollm2", "llama2-7b"]),
        ("tofu", "smollm2-forget05"),
    ],
)
def test_a_plan_prints_commands_that_train_py_takes(common, monkeypatch, capsys, name, scale):
    assert run(name, monkeypatch, "--dry-run", "--results", "nothing", "--scale", scale) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python train.py ")]
    assert lines and len(set(lines)) == len(lines)
    if name == "tofu":
        plan = common.SCALES[scale]
        settings = [1 if plan.small else len(common.grid(method, plan.rates)) for method in plan.methods.values()]
        assert len(lines) == sum(settings) * len(plan.tuning_seeds)
    for line in lines:
        given, _ = train.parse_args(line.split()[2:])
        make_config(given)


def test_the_slice_of_muse_news_holds_together(tmp_path, common):
    """What can be forgotten is in no retain set and is asked for; growing sets contain each other, requests do not."""
    if not os.environ.get("DIPO_DATA"):
        pytest.skip("DIPO_DATA names no folder with MUSE-News")
    source = Path(os.environ["DIPO_DATA"]) / "MUSE-News"
    if not source.is_dir():
        pytest.skip(f"{source}: no such folder")
    from toy_muse import write_muse

    folder = write_muse(tmp_path, script("muse_news").muse_slice(source.parent))

    def texts(name):
        return set(muse.load_texts(f"muse_news/{name}", folder))

    whole, retained = texts("train/forget"), texts("train/retain1") | texts("train/retain2")
    assert len(whole) == 16 and len(retained) == 12 and not whole & retained
    growing, apart = ([texts(f"{kind}/forget_{k}") for k in range(1, 5)] for kind in ("scal", "sust"))
    assert [len(x) for x in growing] == [4, 8, 12, 16] and all(a < b for a, b in itertools.pairwise(growing))
    assert set.union(*apart) == whole and [len(x) for x in apart] == [4] * 4
    assert texts("raw/forget") == growing[0] == apart[0]
    for row in muse.load_muse("news", "verbmem", "forget", folder):
        assert f"{row['prompt']} {row['gt']}" in texts("raw/forget")
    assert all(any(piece in text for text in texts("raw/forget")) for piece in texts("privleak/forget"))
    assert not texts("privleak/holdout") & (texts("privleak/forget") | retained)
    muse.Muse(Options("muse_news", folder))  # has all that an evaluation reads


def test_the_scale_of_smollm2_on_a_tiny_model(tmp_path, common, monkeypatch):
    """Target and retrained model are made once, of the rows that the scale names, and a run's record has no path in it."""
    if not os.environ.get("DIPO_DATA"):
        pytest.skip("DIPO_DATA names no folder with TOFU")
    monkeypatch.chdir(tmp_path)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, bos_token_id=0, eos_token_ids=(1,),
    )  # fmt: skip
    tokenizer = toy.train_toy_tokenizer(0, tmp_path / "tokenizer")
    save_pretrained(Llama(config).init_weights(0), tmp_path / "base", tokenizer)
    monkeypatch.setenv("DIPO_SMOLLM2", str(tmp_path / "base"))
    monkeypatch.setattr(common, "GPU", False)
    monkeypatch.setattr(common, "smollm2_device_flags", lambda: "--dtype float32")
    scale = common.SCALES["smollm2"]
    assert scale.prepare("forget01", 0) == 0
    rows = [
        json.loads((common.smollm2_folder(f"forget01-{m}") / "config.json").read_text()) for m in ("target", "retrained")
    ]
    assert [r["data"]["finetune"]["rows"] for r in rows] == [160, 120]
    item = common.job(scale, "forget01", 0, common.METHODS["DiPO"], {"lr": 1e-3}, "--eval-rows 4 --max-new-tokens 4")
    assert str(tmp_path) not in item.line and os.environ["DIPO_DATA"] not in item.line
    record = common.do(item, quiet=True)
    assert record["target"].keys() == record["unlearned"].keys() == record["retrained"].keys()
    assert str(tmp_path) not in json.dumps(record) and record["retrained"]["forget_quality"] == 1
    monkeypatch.setattr(train, "run", lambda *_, **__: pytest.fail("a model that is there was made again"))
    assert scale.prepare("forget01", 0) == 0


def test_wordings_are_other_answers_to_the_same_questions(tmp_path, common):
    """At most as many as asked for, each once, none the trained answer; train.py takes the file beside the forget set."""
    tiny = make_tiny(tmp_path)
    rows, made = tofu.load_rows("toy_forget10[:12]"), script("wordings")
    found = made.wordings(tiny.model, tiny.tokenizer, rows, 3, 60)
    trained = {row.question: row.answer for row in rows}
    asked = [row.question for row in found]
    assert found and {*asked} <= {*trained} and max(map(asked.count, asked)) <= 3
    assert len({(row.question, row.answer) for row in found}) == len(found)
    assert all(row.answer.strip() and row.answer != trained[row.question] for row in found)
    made.write_rows(tmp_path / "more.jsonl", found)
    both = tofu.load_rows(f"toy_forget10[:12]+{tmp_path / 'more.jsonl'}")
    assert [row.answer for row in both[12:]] == [row.answer for row in found]
    sets = tofu.evaluation_sets(f"toy_forget10[:12]+{tmp_path / 'more.jsonl'}")
    assert sets == tofu.evaluation_sets("toy_forget10[:12]") and tofu.complement("toy_forget10+more.jsonl") == "toy_retain90"


def test_every_method_has_the_same_number_of_settings_and_all_differ(common):
    for scale in common.SCALES.values():
        for method in (common.METHODS | common.TABLE_5 if scale.rates else scale.methods).values():
            settings = common.grid(method, scale.rates)
            assert len({tuple(s.items()) for s in settings}) == len(settings) == (2 * len(scale.rates) or 2)


def test_the_committed_runs_are_of_todays_command_lines(common):
    """A character more in a command line, and its record would be made again, and the old one belong to nothing."""
    scale = common.SCALES["toy"]
    lines = {
        common.job(scale, forget, seed, method, setting).line
        for method in scale.methods.values()
        for setting in common.grid(method, scale.rates)
        for forget in scale.forgets
        for seed in scale.seeds
    }
    committed = json.loads((FOLDER / "results/toy/tofu.json").read_text(encoding="utf-8"))["records"]
    assert len(committed) > 200 and committed.keys() <= lines


SCORES = {"forget_quality": 0.5, "model_utility": 0.4, "forget_probability": 0.3, "parts": {"retain_rouge": 0.2}}
OLD = {"target": SCORES, "unlearned": SCORES, "retrained": SCORES}
NEW = OLD | {"unlearned": SCORES | {"language": 0.9}}
UNMEASURED = {"target": SCORES, "unlearned": SCORES}  # without a retrained model there is no language
BROKEN = {"error": "loss is nan"}


@pytest.mark.parametrize("needs", [(), ("language",)])
@pytest.mark.parametrize("theirs", [None, OLD, NEW, UNMEASURED, BROKEN])
@pytest.mark.parametrize("mine", [None, OLD, NEW, UNMEASURED, BROKEN])
def test_a_record_is_made_again_only_where_it_lacks_what_is_needed(tmp_path, common, monkeypatch, mine, theirs, needs):
    made = {"unlearned": {"language": 0.1}, "retrained": {}}
    monkeypatch.setattr(common, "do", lambda item, quiet: made)
    scale = dataclasses.replace(common.SCALES["toy"], prepare=common.nothing)
    lab = common.Lab("tofu", scale, tmp_path, processes=1)
    for name, record in (("tofu", mine), ("zeta", theirs)):
        common.write_json(lab.folder / f"{name}.json", {"records": {"line": record} if record else {}})
    enough = [r for r in (mine, theirs) if r and not (needs and r is OLD)]
    assert lab.run([common.Job("forget10", 0, "line")], needs=needs) == [enough[0] if enough else made]
    assert json.loads((lab.folder / "tofu.json").read_text())["records"] == {"line": enough[0] if enough else made}


@pytest.mark.parametrize(
    "line, record, told",
    [
        ("toy", {}, "'target' is missing"),
        ("toy", OLD | {"unlearned": SCORES | {"forget_quality": None}}, "'unlearned.forget_quality' is null"),
        ("toy", OLD | {"target": SCORES | {"model_utility": "0.4"}}, "'target.model_utility' is"),
        ("toy", OLD | {"retrained": SCORES | {"parts": [0.1]}}, "'retrained.parts' is a list"),
        ("toy --eval-every 0 --eval-every 1", OLD, "'trajectory' is missing"),
        ("toy", OLD | {"trajectory": [SCORES]}, "'trajectory.0.epoch' is missing"),
        ("toy", {"error": ["nan"]}, "'error' is a list"),
        ("muse_news", OLD, "'target.forget_verbmem_ROUGE' is missing"),
        ("muse_news", {"requests": {}}, "'requests.request 1' is missing"),
    ],
    ids=str,
)
def test_a_record_that_is_none_is_refused_before_any_run(tmp_path, common, monkeypatch, line, record, told):
    line = f"--forget {line}"
    monkeypatch.setattr(common, "do", lambda *_: pytest.fail("a run was made"))
    lab = common.Lab("tofu", dataclasses.replace(common.SCALES["toy"], prepare=common.nothing), tmp_path, processes=1)
    common.write_json(kept := lab.folder / "tofu.json", {"records": {line: record}})
    message = error_of(lab.run, [common.Job("forget10", 0, line)], kind=UserError)
    assert message.startswith(f"{kept}: record '{line}': key ") and told in message and message.endswith("run again")


@settings(max_examples=20)
@given(RATIOS, RATIOS)
def test_forget_quality_of_the_trained_wording(ours, theirs):
    """It is that of the answer's own loss; what the paraphrase's says does not count."""
    module = script("common")

    def log(folder, ratios, rows="forget"):
        items = {
            str(i): {"loss": math.log(r), "wrong_losses": [0.5, -0.5], "correct_loss": 1.0} for i, r in enumerate(ratios)
        }
        module.write_json(folder / "eval/final-0a/log.json", {"rows": {rows: items}, "protocol": {"epsilon": 0.0}})

    with tempfile.TemporaryDirectory() as name:
        run, retrained = Path(name, "run"), Path(name, "retrained")
        config = {"model": f"{name}/target", "retain_model": str(retrained)}
        module.write_json(run / "config.json", {"config": config})
        log(run, ours)
        assert module.trained_wording(run) == {}
        log(retrained, theirs)
        quality = metrics.forget_quality(ours, theirs)
        assert module.trained_wording(run) == {"unlearned": pytest.approx(quality), "retrained": 1.0}
        log(run, ours, "forget_verbmem")
        log(retrained, theirs, "forget_verbmem")
        assert module.trained_wording(run) == {}


def records(*outcomes):
    """A record for each (forget quality, share of the utility); None: a run that broke down."""
    made = []
    for outcome in outcomes:
        if outcome is None:
            made.append({"error": "loss is nan"})
            continue
        scores = {"forget_quality": outcome[0], "model_utility": 0.8 * outcome[1]}
        made.append({"unlearned": scores, "target": {"model_utility": 0.8}})
    return made


class Found:
    """A Lab that has run everything."""

    def __init__(self, scale, found):
        self.scale, self.found = scale, found

    def run(self, jobs, what=""):
        assert len(jobs) == len(self.found)
        return self.found


OUTCOMES = st.lists(st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1.2)), min_size=8, max_size=8)


@given(OUTCOMES, OUTCOMES)
def test_the_chosen_setting_forgets_best_among_those_that_keep_the_utility(one, two):
    sys.path.insert(0, str(FOLDER))
    import common

    sys.path.remove(str(FOLDER))
    found = records(*(x for pair in zip(one, two, strict=True) for x in pair))  # two seeds for each of eight settings
    scale, methods = common.SCALES["toy"], {"DiPO": common.METHODS["DiPO"]}
    chosen = common.tune(Found(scale, found), methods)["DiPO"]
    settings = common.grid(methods["DiPO"], scale.rates)
    means = [[(a + b) / 2 for a, b in zip(p or (0, 0), q or (0, 0), strict=True)] for p, q in zip(one, two, strict=True)]
    quality, share = means[settings.index(chosen)]
    keeping = [m for m in means if m[1] >= 0.9 + 1e-9]
    if keeping:
        assert share >= 0.9 - 1e-9 and quality >= max(q for q, _ in keeping) - 1e-9
    elif all(s < 0.9 - 1e-9 for _, s in means):
        assert share >= max(s for _, s in means) - 1e-9


def test_the_readmes_tables_are_those_of_the_results():
    for readme, tables in ((FOLDER / "README.md", 7), (FOLDER.parent / "README.md", 1)):
        found = re.findall(r"<!-- (\S+\.md) -->\n(.*?)<!-- end -->", readme.read_text(encoding="utf-8"), re.DOTALL)
        assert len(found) >= tables
        for path, table in found:
            assert (readme.parent / path).read_text(encoding="utf-8") == table


@given(st.floats(0, 1), st.floats(0.1, 0.5), st.floats(-1, 1))
def test_means_agree_within_the_larger_spread(mean, deviation, shift):
    pair = [f"{mean:.2f} ± {deviation:.2f} / 1.00 ± 0.00", f"{mean + shift:.2f} ± 0.05 / 1.00 ± 0.00"]
    for ours, theirs in (pair, pair[::-1]):
        spread, other = script("compare").compare(ours, theirs)
        assert spread[1] and not other
        if abs(abs(shift) - float(f"{deviation:.2f}")) > 0.02:  # the table rounds
            assert spread[0] == (abs(shift) < deviation)


@pytest.mark.parametrize(
    "ours, theirs, agree", [("lr 1", "lr 1", 1), ("lr 1", "lr 2", 0), ("0.81", "0.66", 0), ("5e-04", "0.03", 1)]
)
def test_what_has_no_spread_is_compared_apart(ours, theirs, agree):
    assert script("compare").compare(ours, theirs) == ([], [bool(agree)])


def test_two_folders_of_results_are_compared_cell_by_cell(tmp_path, capsys):
    module = script("compare")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a/x.md").write_text(
        "**one**\n\n| | q |\n| --- | --- |\n| A | 0.80 ± 0.10 |\n\n| | q |\n| --- | --- |\n| A | 0.5 |\n"
    )
    text = (tmp_path / "a/x.md").read_text()
    for now, status in ((text, 0), (text.replace("0.80", "0.75"), 0), (text.replace("0.80", "0.60"), 1), (text[:30], 1)):
        (tmp_path / "b/x.md").write_text(now)
        assert module.main(tmp_path / "a", tmp_path / "b") == status
        assert ("A, q: 0.80 ± 0.10, now" in capsys.readouterr().out) == bool(status)
    assert module.main(tmp_path / "b", tmp_path) == 2 and "no such file" in capsys.readouterr().err
    assert module.main(tmp_path / "c", tmp_path) == 2 and "no tables" in capsys.readouterr().err
