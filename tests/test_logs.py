"""logs.py: every format that the field has, what is wrong in a log, comparing two, writing open-unlearning's."""

import contextlib
import copy
import functools
import io
import json
import math
import statistics

import pytest
from helpers import (
    ABOVE_ONE,
    PAIRS,
    RATIOS,
    SET_ITEMS,
    authors_log,
    error_of,
    open_unlearning_log,
    our_log,
    published,
    whole_authors_log,
    without,
    write_log,
)
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy")
pytest.importorskip("rouge_score")

import eval
import logs
import metrics
import muse
import tofu
from inference import Options


def read(path) -> tuple[list[float], str]:
    """(truth ratios of the forget set, format) of a log."""
    log = logs.read_log(path)
    return logs.truth_ratios(log), log["kind"]


def as_log(ratios: list[float]) -> dict:
    return {"rows": {"forget": {str(i): {"truth_ratio": r} for i, r in enumerate(ratios)}}}


# ------------------------------------------------------------------------------------------------------- published logs


@pytest.mark.parametrize(
    "full, retain90, kind, n, quality",
    [
        ("llama2-7b_full", "llama2-7b_retain90", "TOFU authors'", 300, 1.834066e-21),
        (
            "open-unlearning_Llama-3.2-1B_full_forget10",
            "open-unlearning_Llama-3.2-1B_retain90",
            "open-unlearning's",
            400,
            3.905471e-22,
        ),
    ],
)
def test_forget_quality_of_two_published_logs_is_the_published_one(full, retain90, kind, n, quality):
    (ratios, first_kind), (reference, second_kind) = (read(published(name)) for name in (full, retain90))
    assert first_kind == second_kind == kind and len(ratios) == len(reference) == n
    assert metrics.forget_quality(ratios, reference) == pytest.approx(quality, rel=1e-6)


def test_our_400_rows_are_compared_with_the_first_300_of_the_authors_protocol():
    paths = [published(name) for name in ("open-unlearning_Llama-3.2-1B_retain90", "llama2-7b_retain90")]
    ours, reference = map(logs.read_log, paths)
    expected = metrics.forget_quality(read(paths[0])[0][:300], read(paths[1])[0])
    for one, other in ((ours, reference), (reference, ours)):
        quality, where = logs.quality_of(one, other, "the log")
        assert quality == expected and where.startswith("the log (first 300 of 400")


# -------------------------------------------------------------------------------------------------------- reading logs


LOG_FORMATS = {
    "ours": our_log,
    "open-unlearning's": open_unlearning_log,
    "TOFU authors'": lambda ratios: authors_log(ratios, lists=False),
    "TOFU authors', lists": lambda ratios: authors_log(ratios, lists=True),
}


@pytest.mark.parametrize("kind", LOG_FORMATS)
@given(ratios=RATIOS)
def test_truth_ratios_are_read_in_row_order_from_every_format(tmp_path_factory, kind, ratios):
    path = write_log(tmp_path_factory.mktemp("logs") / "log.json", LOG_FORMATS[kind](ratios))
    found, name = read(path)
    assert found == pytest.approx(ratios) and name == kind.removesuffix(", lists")


def test_rows_are_ordered_by_their_number_and_not_as_the_file_has_them(tmp_path):
    ratios = [float(i + 1) for i in range(12)]
    log = open_unlearning_log(ratios)["forget_truth_ratio"]["value_by_index"]
    shuffled = {"forget_truth_ratio": {"value_by_index": dict(sorted(log.items()))}}  # "10" before "2"
    assert read(write_log(tmp_path / "a.json", shuffled))[0] == ratios
    part = authors_log(ratios, lists=False)["eval_log_forget.json"]
    part["average_perturb_loss"] = dict(sorted(part["average_perturb_loss"].items()))
    log = {"eval_log_forget.json": part}
    assert read(write_log(tmp_path / "b.json", log))[0] == pytest.approx(ratios)


@pytest.mark.parametrize(
    "log",
    [
        "",
        "{",
        "\x00\x01",
        "3",
        '"rows"',
        "[]",
        '["rows"]',
        "null",
        {},
        {"rows": {}},
        {"rows": None},
        {"rows": {"forget": []}},
        {"rows": {"forget": {"a": 1.0}}},
        {"rows": {"forget": {"a": {"loss": 1.0}}}},
        our_log([]),
        our_log([1.0, float("nan")]),
        our_log([1.0, float("inf")]),
        our_log([1.0, None]),
        our_log([1.0, "0.5"]),
        open_unlearning_log([]),
        {"forget_truth_ratio": {"agg_value": 0.5}},
        {"forget_truth_ratio": {"value_by_index": [0.5]}},
        {"forget_truth_ratio": {"value_by_index": {"1": {"score": 0.5}}}},
        {"forget_truth_ratio": {"value_by_index": {"0": {"prob": 0.5}}}},
        {"forget_truth_ratio": None},
        authors_log([], lists=True),
        without(authors_log([1.0, 2.0], lists=True), "eval_log_forget.json", "average_perturb_loss"),
        without(authors_log([1.0, 2.0], lists=False), "eval_log_forget.json", "avg_paraphrased_loss"),
        without(authors_log([1.0, 2.0], lists=False), "eval_log_forget.json", "avg_paraphrased_loss", "1"),
        {"eval_log_forget.json": {"avg_paraphrased_loss": [1.0], "average_perturb_loss": [[]]}},
        {"eval_log_forget.json": {"avg_paraphrased_loss": [1.0], "average_perturb_loss": [["x"]]}},
        {"eval_log_forget.json": {"avg_paraphrased_loss": ["x"], "average_perturb_loss": [[1.0]]}},
        {"eval_log_forget.json": {"avg_paraphrased_loss": [float("nan")], "average_perturb_loss": [[1.0]]}},
        {"eval_log_forget.json": []},
    ],
    ids=lambda log: json.dumps(log)[:40],
)
def test_a_log_without_truth_ratios_is_refused_in_one_line(tmp_path, log):
    path = write_log(tmp_path / "log.json", log)
    assert str(path) in error_of(logs.read_log, path)


def test_a_missing_log_a_folder_and_a_binary_file_are_refused_in_one_line(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    for name in ("none.json", "folder", "binary"):
        assert str(tmp_path / name) in error_of(logs.read_log, tmp_path / name)


@ABOVE_ONE
@given(PAIRS)
def test_equal_row_counts_are_compared_as_they_are(pair):
    assert logs.quality_of(*map(as_log, pair), "the log") == (metrics.forget_quality(*pair), "the log")


@pytest.mark.parametrize("ours, reference", [(400, 200), (299, 301), (400, 399), (40, 41)])
def test_other_row_counts_are_refused(ours, reference):
    message = error_of(logs.quality_of, as_log([0.5] * ours), as_log([0.5] * reference), "the log")
    assert "the log" in message and str(ours) in message and str(reference) in message


PROTOCOL = {"name": "open-unlearning", "prompt_format": "llama3", "mask_quirk": False, "truth_ratio": "geometric",
            "sets": {"forget": {"rows": 2, "fingerprint": "f", "prompt_tokens": "t"}}}  # fmt: skip


def protocol_log(answers=("one", "two"), tokens="t", fingerprint="f", **changes) -> dict:
    rows = {str(i): {"truth_ratio": 0.5 + i / 10, "answer": a} for i, a in enumerate(answers)}
    sets = {"forget": {"rows": 2, "fingerprint": fingerprint, "prompt_tokens": tokens}}
    return {"rows": {"forget": rows}, "protocol": PROTOCOL | {"sets": sets} | changes}


def test_logs_that_were_evaluated_alike_are_compared():
    assert logs.quality_of(protocol_log(), protocol_log(), "the log") == (1.0, "the log")
    assert logs.quality_of(protocol_log(), protocol_log() | {"protocol": None}, "the log") == (1.0, "the log")
    assert logs.quality_of(protocol_log(("One.", "two ")), protocol_log(("one", "TWO")), "the log")[0] == 1.0


@pytest.mark.parametrize(
    "other, told",
    [
        (protocol_log(name="tofu"), "name 'tofu'"),
        (protocol_log(prompt_format="plain"), "prompt format 'plain'"),
        (protocol_log(mask_quirk=True), "mask quirk True"),
        (protocol_log(fingerprint="g"), "its forget set has other texts"),
        (protocol_log(tokens="u"), "other tokens"),
        (protocol_log(("one", "three")), "forget row 1 is another one ('three' instead of 'two')"),
    ],
    ids=str,
)
def test_a_log_of_other_rows_or_another_protocol_is_refused_with_the_reason(other, told):
    message = error_of(logs.quality_of, protocol_log(), other, "the log")
    assert message.startswith("the log: ") and told in message
    error_of(logs.quality_of, other, protocol_log(), "the log")


# ------------------------------------------------------------------------------------- numbers that another program stores


def completed(name: str, items: dict[str, dict]) -> dict[str, dict]:
    """Items as an evaluation has them: texts, other scores, as many wrong answers in each row."""
    least = min(len(v["wrong_losses"]) for v in items.values())
    names = (*metrics.MEMORIZATION, *metrics.MEMBERSHIP)
    texts = {"prompt": "p é", "question": "q", "answer": "a", "generation": "g", "rouge1": 0.5, "rouge_f1": 0.25}
    result = {}
    for key, item in items.items():
        wrong = item["wrong_losses"][:least]
        item = item | texts | {"wrong_losses": wrong, "truth_ratio": metrics.truth_ratio(item["correct_loss"], wrong)}
        if name in ("ra", "wf"):
            item["correct_loss"] = item["loss"]  # these sets have no answer in other words
            item["truth_ratio"] = metrics.truth_ratio(item["loss"], item["wrong_losses"])
        if name in ("forget", "holdout"):
            item |= {n: item["loss"] / 70 + i / 10 for i, n in enumerate(names)}
        result[key] = item
    return result


def whole_log(losses: list[tuple[float, float, list[float]]], ratio) -> dict:
    """open-unlearning's log of four equal sets, with truth ratios of `ratio`(right probability, wrong one)."""
    items = [{"loss": a, "correct_loss": b, "wrong_losses": c, "rouge": 0.5} for a, b, c in losses]
    rows = {name: completed(name, {str(i): item for i, item in enumerate(items)}) for name in (*metrics.SETS, "holdout")}
    epsilon = metrics.OPEN_UNLEARNING_EPSILON
    for name in metrics.SETS:
        for item in rows[name].values():
            right, wrong = math.exp(-item["correct_loss"]), math.exp(-statistics.fmean(item["wrong_losses"]))
            item["truth_ratio"] = ratio(right, wrong)
    log = {"rows": rows, "scores": metrics.aggregate(rows, epsilon), "protocol": {"epsilon": epsilon}}
    return logs.open_unlearning_eval(log, None)


LOSS = st.floats(0.01, 8)
MANY = st.lists(st.tuples(LOSS, LOSS, st.lists(LOSS, min_size=2, max_size=2)), min_size=3, max_size=8)


@settings(max_examples=40)
@given(MANY)
def test_another_truth_ratio_by_the_same_name_is_told_by_its_losses(tmp_path_factory, losses):
    """open-unlearning's `prob_mean`, right / (right + wrong): the same model is the same model in either."""
    folder = tmp_path_factory.getbasetemp()
    kinds = lambda right, wrong: wrong / (right + 1e-10), lambda right, wrong: right / (right + wrong + 1e-10)  # noqa: E731
    ours, theirs = (logs.read_log(write_log(folder / "log.json", whole_log(losses, kind))) for kind in kinds)
    for name in metrics.SETS:
        pairs = zip(ours["rows"][name].values(), theirs["rows"][name].values(), strict=True)
        assert all(a["truth_ratio"] == pytest.approx(b["truth_ratio"], rel=1e-3) for a, b in pairs)
    assert logs.truth_ratios(ours) == pytest.approx(logs.truth_ratios(theirs), rel=1e-3)


@settings(max_examples=50)
@given(MANY, st.data(), st.sampled_from([0.5, 2.0, 1.01]))
def test_a_stored_number_that_its_losses_do_not_give_is_refused(tmp_path_factory, losses, draw, factor):
    log = whole_log(losses, lambda right, wrong: wrong / (right + 1e-10))
    name = draw.draw(st.sampled_from(["forget_truth_ratio", "wf_Truth_Ratio", "forget_Q_A_Prob", "retain_Q_A_Prob"]))
    row = draw.draw(st.sampled_from(list(log[name]["value_by_index"].values())))
    key = "score" if "score" in row else "prob"
    row[key] *= factor if key == "score" else factor**3
    path = write_log(tmp_path_factory.getbasetemp() / "log.json", log)
    message = error_of(logs.read_log, path)
    assert str(path) in message and ("made of gives" in message or "expected a number" in message)


@given(st.lists(st.integers(0, 9), min_size=3, max_size=9))
def test_an_auc_that_its_scores_do_not_give_is_refused(tmp_path_factory, scores):
    part = {"value_by_index": {str(i): {"score": x} for i, x in enumerate(scores)}}
    other = {"value_by_index": {str(i): {"score": x + 1} for i, x in enumerate(scores)}}
    auc = metrics.membership_auc(scores, [x + 1 for x in scores])
    path = tmp_path_factory.getbasetemp() / "MUSE_EVAL.json"
    metric = {"forget": part, "holdout": other, "agg_value": auc}
    assert logs.read_muse_retain(write_log(path, {"mia_min_k": metric})) == {"mia_min_k": auc}
    if abs(auc - 0.5) > 1e-3:
        write_log(path, {"mia_min_k": metric | {"agg_value": 1 - auc}})  # of the MUSE authors' direction
        assert "AUC of mia_min_k" in error_of(logs.read_muse_retain, path)


def places(value, here=()) -> list[tuple]:
    """Of everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(place for key, x in inner for place in places(x, (*here, key)))]


HOSTILE = st.sampled_from(
    ["absent", None, True, "x", "1", "\ud800", -1, 10**400, 1e308, math.nan, math.inf, [], {}, [[]], {"0": 1}]
)
KINDS = {
    "authors": whole_authors_log(),
    "open-unlearning": whole_log([(1.0, 0.5, [1.0, 2.0]), (2.0, 1.5, [2.0, 3.0])], lambda a, b: b / (a + 1e-10)),
    "ours": {"rows": {n: completed(n, {"a": {"loss": 1.0, "correct_loss": 1.0, "wrong_losses": [2.0], "rouge": 0.5}})
                      for n in metrics.SETS}, "protocol": PROTOCOL | {"epsilon": 0.0}, "scores": {"mia_min_k": 0.5}},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(draw=st.data())
def test_a_hostile_log_is_scored_or_refused_in_one_line(tmp_path_factory, kind, draw):
    log = json.loads(json.dumps(KINDS[kind]))
    for place in draw.draw(st.lists(st.sampled_from(places(log)[1:]), min_size=1, max_size=2)):
        with contextlib.suppress(LookupError, TypeError):  # the first one may have taken the place of the second
            around, value = functools.reduce(lambda value, key: value[key], place[:-1], log), draw.draw(HOSTILE)
            around[place[-1]] = copy.deepcopy(value)  # the same list may be drawn twice, and put into itself
            if value == "absent":
                del around[place[-1]]
    path = write_log(tmp_path_factory.getbasetemp() / "log.json", log)
    flags = draw.draw(st.sampled_from([[], ["--retain-logs", str(path)], ["--show", "2"], ["--truth-ratio", "arithmetic"]]))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
        code = eval.main(["--logs", str(path), *flags])
    err = told.getvalue()
    assert (code, err) == (0, "") or code == 2 and err.startswith("error: ") and err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------- writing logs


@given(st.fixed_dictionaries({name: SET_ITEMS for name in (*metrics.SETS, "holdout")}), st.none() | st.floats(0.01, 0.99))
def test_every_number_that_we_write_for_open_unlearning_is_read_again(tmp_path_factory, rows, auc):
    rows = {name: completed(name, items) for name, items in rows.items()}
    epsilon = metrics.OPEN_UNLEARNING_EPSILON
    path = tmp_path_factory.mktemp("logs") / "log.json"
    log = {"rows": rows, "scores": metrics.aggregate(rows, epsilon), "protocol": {"epsilon": epsilon}, "path": str(path)}
    logs.save_open_unlearning(path, "TOFU", logs.open_unlearning_eval(log, 0.25, auc))
    found = logs.read_log(path.with_name("TOFU_EVAL.json"))
    scores = {name: value for name, value in log["scores"].items() if name not in metrics.MEMBERSHIP}
    assert metrics.aggregate(found["rows"], found["epsilon"]) == pytest.approx(scores, rel=1e-9)
    assert found["mia_min_k"] == log["scores"]["mia_min_k"]
    for name, items in found["rows"].items():
        for item, ours in zip(items.values(), rows[name].values(), strict=True):
            assert item.pop("question") == ours["prompt"]  # as decoded: open-unlearning keeps no other
            assert item.pop("probability") > 0 and item == {key: ours[key] for key in item} and len(item) >= 9
    summary = json.loads(path.with_name("TOFU_SUMMARY.json").read_text())
    assert summary["privleak"] == metrics.privleak(log["scores"]["mia_min_k"], 0.5 if auc is None else auc)
    assert list(summary) == sorted(summary) and len(summary) == 7


def muse_log(path=None) -> dict:
    item = {"prompt": "p", "ground_truth": "g é", "generation": "x", "rougeL_f1": 0.5, "rougeL_recall": 1.0}
    item |= {"rouge1_recall": 0.75, "exact_memorization": 0.5, "extraction_strength": 0.25}
    rows = {part: {f"{part}/0": item} for part in metrics.MUSE_NEW_TOKENS}
    rows |= {part: {f"{part}/{i}": {"score": float(i)} for i in range(2)} for part in metrics.MUSE_TEXTS}
    return {"rows": rows, "path": path and str(path)}


@pytest.mark.parametrize(
    "auc, privleak, cell", [(None, {"privleak": pytest.approx(0)}, ""), (0.5, {"privleak": pytest.approx(0)}, None)]
)
def test_muses_files_stand_beside_our_log(tmp_path, auc, privleak, cell):
    path = tmp_path / "run" / "eval" / "final" / "log.json"
    path.parent.mkdir(parents=True)
    log = muse_log(path)
    scores = metrics.aggregate_muse(log["rows"], auc)
    logs.save_muse(path, log["rows"], scores)
    assert sorted(f.name for f in path.parent.iterdir()) == ["MUSE.csv", "MUSE_EVAL.json", "MUSE_SUMMARY.json"]
    written = path.with_name("MUSE_EVAL.json").read_text(encoding="utf-8")
    assert json.loads(written) == logs.muse_eval_json(log["rows"], scores) and "é" in written
    summary = {"extraction_strength": 0.25, "forget_knowmem_ROUGE": 0.5, "forget_verbmem_ROUGE": 0.5, **privleak}
    assert json.loads(path.with_name("MUSE_SUMMARY.json").read_text()) == summary | {"retain_knowmem_ROUGE": 0.5}
    cell = str(scores["privleak"]) if cell is None else cell
    csv = path.with_name("MUSE.csv").read_bytes().decode()
    assert csv == f"name,verbmem_f,privleak,knowmem_f,knowmem_r\r\nrun,50.0,{cell},50.0,50.0\r\n"


def test_what_is_not_kept_is_not_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    muse.Muse.summary(muse_log(), None, "")
    item = {"loss": 1.0, "correct_loss": 1.0, "wrong_losses": [2.0], "rouge": 0.5, "truth_ratio": 0.4}
    rows = {name: completed(name, {"a": item}) for name in metrics.SETS}
    log = {"rows": rows, "scores": metrics.aggregate(rows), "protocol": {"epsilon": 0.0}}
    tofu.Tofu(Options(None)).summary(log | {"path": None}, None, "")
    assert not list(tmp_path.iterdir())
    tofu.Tofu(Options(None)).summary(log | {"path": str(tmp_path / "log.json")}, None, "")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["TOFU_EVAL.json", "TOFU_SUMMARY.json"]
