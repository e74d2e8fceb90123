"""eval.py: the numbers against independent formulas, published logs and transformers; logs, reuse, the command line."""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import statistics
from fractions import Fraction
from math import comb
from pathlib import Path

import pytest
import torch
from claims import claim
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("scipy")
pytest.importorskip("rouge_score")

import data
import eval
from data import DataError
from eval import EvalError
from model import Llama, LlamaConfig, ModelError, save_pretrained

LOSSES = st.floats(0, 20)
LOSS_LISTS = st.lists(LOSSES, min_size=1, max_size=6)
RATIOS = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20)


def error_of(call, *args, kind=EvalError, **kwargs) -> str:
    """The message of the error that the call raises: one line."""
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------------------- metrics


@given(LOSSES, LOSS_LISTS)
@claim("truth ratio = geometric mean over the wrong answers / the right one", "TOFU")
def test_truth_ratio_is_the_wrong_answers_geometric_mean_over_the_right_one(correct, wrong):
    geometric_mean = math.prod(math.exp(-loss) for loss in wrong) ** (1 / len(wrong))
    assert eval.truth_ratio(correct, wrong) == pytest.approx(geometric_mean / math.exp(-correct))


@given(LOSSES, LOSS_LISTS)
@claim("probability of an option is its share among the options", "TOFU")
def test_normalised_probability_is_the_right_options_share(correct, wrong):
    p, others = math.exp(-correct), [math.exp(-loss) for loss in wrong]
    assert eval.normalised_probability(correct, wrong) == pytest.approx(p / (p + sum(others)))


@given(RATIOS)
@claim("truth ratios are averaged as min(r, 1/r) on forget, max(0, 1 - r) elsewhere", "TOFU")
def test_truth_ratios_are_averaged_on_the_scale_of_their_set(ratios):
    assert eval.utility_truth_ratio(ratios) == pytest.approx(statistics.fmean([1 - r if r < 1 else 0.0 for r in ratios]))
    assert eval.forget_truth_ratio([0.0]) == 0 and eval.utility_truth_ratio([0.0]) == 1
    assert eval.forget_truth_ratio(ratios) == pytest.approx(statistics.fmean([r if r < 1 else 1 / r for r in ratios]))


@given(st.floats(0, 1e308), st.lists(st.floats(0, 1e308), min_size=1, max_size=3))
def test_a_model_destroyed_by_gradient_ascent_still_has_finite_numbers(correct, wrong):
    ratio = eval.truth_ratio(correct, [w / len(wrong) for w in wrong])
    for number in (
        eval.forget_truth_ratio([ratio]),
        eval.utility_truth_ratio([ratio]),
        eval.normalised_probability(correct, wrong),
    ):
        assert 0 <= number <= 1


@pytest.mark.parametrize("gap, ratio", [(699.0, math.exp(699)), (700.0, math.exp(700)), (1e9, math.exp(700)), (-1e9, 0.0)])
def test_a_truth_ratio_ends_at_e_to_the_700(gap, ratio):
    assert eval.truth_ratio(max(gap, 0.0), [max(-gap, 0.0)]) == ratio


@given(st.lists(st.floats(1e-3, 1) | st.just(0.0), min_size=9, max_size=9))
@claim("model utility = harmonic mean of its nine parts", "TOFU")
def test_model_utility_is_the_harmonic_mean_of_its_nine_parts(values):
    utility = eval.model_utility(dict(zip(eval.UTILITY_PARTS, values, strict=True)) | {"forget_rouge": 0.0})
    assert utility == pytest.approx(statistics.harmonic_mean(values))
    assert (utility == 0) == (0 in values)


def exact_p_value(a: list, b: list) -> float:
    """P(a two-sample Kolmogorov-Smirnov statistic >= the observed one) for n against n, in whole numbers."""
    n = len(a)
    h = max(abs(sum(x <= t for x in a) - sum(x <= t for x in b)) for t in a + b)
    if h == 0:
        return 1.0
    return float(2 * sum(Fraction((-1) ** (k - 1) * comb(2 * n, n - k * h), comb(2 * n, n)) for k in range(1, n // h + 1)))


PAIRS = st.integers(1, 30).flatmap(lambda n: st.tuples(*[st.lists(st.integers(1, 40), min_size=n, max_size=n)] * 2))


# Where rounding takes the exact p-value above 1, scipy warns and gives the asymptotic one: 0.99996 at n = 7.
ABOVE_ONE = pytest.mark.filterwarnings("ignore:ks_2samp. Exact calculation unsuccessful")


@ABOVE_ONE
@given(PAIRS)
@claim("forget quality = exact two-sample KS p-value", "TOFU")
def test_forget_quality_is_the_exact_two_sample_p_value(pair):
    exact = exact_p_value(*pair)
    assert eval.forget_quality(*pair) == pytest.approx(exact, rel=1e-9, abs=1e-4 if exact == 1 else 0)


@ABOVE_ONE
@given(PAIRS, st.sampled_from([math.log, math.sqrt, lambda r: 1 / r, lambda r: r / (1 + r), lambda r: -r]))
@claim("forget quality is the same on any monotone scale of the truth ratio", "TOFU")
def test_forget_quality_is_the_same_on_any_monotone_scale_and_in_any_order(pair, scale):
    a, b = pair
    quality = eval.forget_quality(a, b)
    assert eval.forget_quality([scale(r) for r in a], [scale(r) for r in b]) == quality
    assert eval.forget_quality(b, sorted(a)) == quality


@pytest.mark.parametrize("n, floor", [(40, 1.86e-23), (200, 1.94e-119), (300, 1.48e-179), (400, 1.06e-239)])
def test_forget_quality_of_disjoint_samples_is_the_published_floor(n, floor):
    assert eval.forget_quality([0.1] * n, [0.9] * n) == pytest.approx(floor, rel=0.01)
    assert eval.forget_quality([0.1] * n, [0.1] * n) == 1


WORDS = st.lists(st.sampled_from("a bo cat dog eel fig 12 7".split()), max_size=8)  # too short for the stemmer


@given(WORDS.filter(len), WORDS)
@claim("ROUGE-L recall = longest common subsequence / length of the reference", "TOFU")
def test_rouge_l_recall_is_the_common_subsequence_over_the_references_length(reference, generation):
    @functools.cache
    def common(a: tuple, b: tuple) -> int:
        if not a or not b:
            return 0
        return common(a[1:], b[1:]) + 1 if a[0] == b[0] else max(common(a[1:], b), common(a, b[1:]))

    expected = common(tuple(reference), tuple(generation)) / len(reference)
    assert eval.rouge(" ".join(reference), ", ".join(generation).upper())["rouge"] == pytest.approx(expected)


@given(st.lists(st.text("abcdeghinorsty", min_size=1, max_size=9), min_size=1, max_size=8))
def test_rouge_l_recall_of_a_text_with_itself_is_one(words):
    assert eval.rouge(" ".join(words), " ".join(words) + " and more")["rouge"] == 1


@pytest.mark.parametrize(
    "reference, generation, recall",
    [
        ("books", "book", 1),
        ("Hélène", "h l ne", 1),
        ("one two three four", "four three two one", 0.25),
        ("", "x", 0),
        ("x", "", 0),
    ],
)
def test_rouge_l_recall_by_example(reference, generation, recall):
    assert eval.rouge(reference, generation)["rouge"] == recall


ITEMS = st.builds(
    lambda loss, correct, wrong, rouge: {
        "loss": loss,
        "correct_loss": correct,
        "wrong_losses": wrong,
        "rouge": rouge,
        "truth_ratio": math.exp(correct - statistics.fmean(wrong)),
    },
    LOSSES, LOSSES, LOSS_LISTS, st.just(0.0) | st.floats(1e-3, 1),
)  # fmt: skip
SET_ITEMS = st.dictionaries(st.text("abc", min_size=1, max_size=3), ITEMS, min_size=1, max_size=4)


@given(st.fixed_dictionaries({name: SET_ITEMS for name in eval.SETS}))
def test_the_aggregate_is_the_mean_over_items_of_each_sets_own_number(rows):
    scores = eval.aggregate(rows)
    assert set(scores) == {*eval.UTILITY_PARTS, *eval.FORGET_PARTS, "model_utility"}
    for name, items in rows.items():
        values = list(items.values())
        probabilities = [math.exp(-v["loss"]) for v in values]
        if name in ("ra", "wf"):
            probabilities = [
                p / (p + sum(math.exp(-w) for w in v["wrong_losses"])) for p, v in zip(probabilities, values, strict=True)
            ]
        ratios = [v["truth_ratio"] for v in values]
        ratios = [min(r, 1 / r) if name == "forget" else max(0, 1 - r) for r in ratios]
        assert scores[f"{name}_probability"] == pytest.approx(statistics.fmean(probabilities))
        assert scores[f"{name}_rouge"] == pytest.approx(statistics.fmean(v["rouge"] for v in values))
        assert scores[f"{name}_truth_ratio"] == pytest.approx(statistics.fmean(ratios))
    assert scores["model_utility"] == pytest.approx(statistics.harmonic_mean([scores[n] for n in eval.UTILITY_PARTS]))


def test_the_aggregate_takes_a_stored_probability_and_adds_epsilon_where_the_field_does():
    item = {"loss": 1.0, "correct_loss": 1.0, "wrong_losses": [2.0], "rouge": 0.5, "truth_ratio": 4.0}
    rows = {name: {"a": item} for name in ("forget", "ra")}
    scores = eval.aggregate(rows, epsilon=1.0)
    assert scores["forget_truth_ratio"] == 1 / (4 + 1)
    p, wrong = math.exp(-1), math.exp(-2)
    assert scores["ra_probability"] == pytest.approx(p / (p + wrong + 1))
    stored = {name: {"a": item | {"probability": 0.25}} for name in rows}
    assert eval.aggregate(stored)["ra_probability"] == eval.aggregate(stored)["forget_probability"] == 0.25


def test_the_forget_set_does_not_enter_model_utility_and_utility_needs_the_other_three():
    item = {"loss": 1.0, "correct_loss": 1.0, "wrong_losses": [2.0], "rouge": 0.5, "truth_ratio": 0.4}
    rows = {name: {"a": item} for name in eval.SETS}
    utility = eval.aggregate(rows)["model_utility"]
    assert eval.aggregate(rows | {"forget": {"a": item | {"loss": 9.0, "rouge": 0.0}}})["model_utility"] == utility
    assert "model_utility" not in eval.aggregate({"forget": rows["forget"]})


def test_two_processes_may_write_the_same_file(tmp_path, monkeypatch):
    """The other one writes between our writing and our renaming."""
    path, replace = tmp_path / "x.json", Path.replace

    def interleaved(part, target):
        monkeypatch.setattr(Path, "replace", replace)
        monkeypatch.setattr(os, "getpid", lambda: -1)
        eval.write_json(path, {"a": 2})
        return replace(part, target)

    monkeypatch.setattr(Path, "replace", interleaved)
    eval.write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.floats(-5, 5), st.floats(0.1, 5))
def test_oscillation_is_the_way_back_and_forth(values, shift, scale):
    found = eval.oscillation(values)
    assert found >= -1e-9 and eval.oscillation(sorted(values)) == pytest.approx(0, abs=1e-9)
    assert eval.oscillation([scale * v + shift for v in values]) == pytest.approx(scale * found, abs=1e-6)
    assert eval.oscillation(values[::-1]) == pytest.approx(found, abs=1e-9)
    assert eval.oscillation([0, 1] * 5 + [0]) == 1.0


def test_degenerate_share_counts_what_is_no_language():
    question, answer = "Where was Ana Belu born?", "Ana Belu was born in Lisbon, the capital of Portugal, long ago."
    language = [answer, "In Lisbon.", "Ana was born in Portugal.", "Ana Belu was born in Oslo."]
    none = ["", " ,,, ", "qwx zzt prr", "Ana ana lolo kiki xoxo", "born in born in born in born in born in"]
    for text in language + none:
        assert eval.degenerate_share({"a": (question, answer, text)}) == (text in none)
    samples = {str(i): (question, answer, text) for i, text in enumerate(language + none)}
    assert eval.degenerate_share(samples) == pytest.approx(len(none) / len(samples))


# ------------------------------------------------------------------------------------------------------- published logs


@pytest.fixture(scope="session")
def logs():
    if not (folder := os.environ.get("DIPO_DATA")):
        pytest.skip("DIPO_DATA names no folder with tofu_logs/*.json")
    return lambda name: Path(folder) / "tofu_logs" / f"{name}.json"


AUTHORS = {
    "retain": "eval_log.json",
    "ra": "eval_real_author_wo_options.json",
    "wf": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}


def rows_of_authors(log: dict) -> dict[str, dict[str, dict]]:
    return {
        name: {
            i: {
                "loss": loss,
                "wrong_losses": log[part]["average_perturb_loss"][i],
                "truth_ratio": eval.truth_ratio(log[part]["avg_paraphrased_loss"][i], log[part]["average_perturb_loss"][i]),
                "rouge": log[part]["rougeL_recall"][i],
            }
            for i, loss in log[part]["avg_gt_loss"].items()
        }
        for name, part in AUTHORS.items()
    }


def rows_of_open_unlearning(log: dict) -> dict[str, dict[str, dict]]:
    def items(key):
        return log[key]["value_by_index"]

    rows = {}
    for name in eval.SETS:
        right = f"{name}_Q_A_PARA_Prob" if name in ("forget", "retain") else f"{name}_Q_A_Prob"
        rows[name] = {
            i: {
                "loss": item["avg_loss"],
                "wrong_losses": items(f"{name}_Q_A_PERT_Prob")[i]["avg_loss"],
                "truth_ratio": eval.truth_ratio(items(right)[i]["avg_loss"], items(f"{name}_Q_A_PERT_Prob")[i]["avg_loss"]),
                "rouge": items(f"{name}_Q_A_ROUGE")[i]["rougeL_recall"],
            }
            for i, item in items(f"{name}_Q_A_Prob").items()
        }
    return rows


def read(path) -> tuple[list[float], str]:
    """(truth ratios of the forget set, format) of a log."""
    log = eval.read_log(path)
    return eval.truth_ratios(log), log["kind"]


def as_log(ratios: list[float]) -> dict:
    return {"rows": {"forget": {str(i): {"truth_ratio": r} for i, r in enumerate(ratios)}}}


# log -> utility, then probability, ROUGE and truth ratio on retain, real authors, world facts and forget
PUBLISHED = {
    "llama2-7b_full": (
        0.622677,
        ((0.989527, 0.985655, 0.474699), (0.455482, 0.933000, 0.596229), (0.418562, 0.882479, 0.539033)),
        (0.990939, 0.985450, 0.515985),
    ),
    "llama2-7b_retain90": (
        0.613745,
        ((0.988897, 0.975811, 0.470977), (0.434087, 0.923000, 0.570681), (0.414326, 0.897436, 0.544198)),
        (0.147563, 0.408244, 0.674019),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_scores_of_the_tofu_authors_logs_are_the_published_ones(logs, name):
    utility, parts, forget = PUBLISHED[name]
    scores = eval.aggregate(rows_of_authors(json.loads(logs(name).read_text())))
    assert scores["model_utility"] == pytest.approx(utility, abs=5e-7)
    assert [scores[n] for n in eval.UTILITY_PARTS] == pytest.approx([v for part in parts for v in part], abs=5e-7)
    assert [scores[n] for n in eval.FORGET_PARTS] == pytest.approx(forget, abs=5e-7)


@pytest.mark.parametrize("name", PUBLISHED)
def test_per_row_numbers_equal_those_that_the_authors_stored(logs, name):
    log = json.loads(logs(name).read_text())
    rows = rows_of_authors(log)
    for short, part in AUTHORS.items():
        for i, item in rows[short].items():
            assert item["truth_ratio"] == pytest.approx(log[part]["truth_ratio"][i], rel=1e-4)
        for i, loss in log[part].get("normalized_gt_loss", {}).items():
            share = eval.normalised_probability(rows[short][i]["loss"], rows[short][i]["wrong_losses"])
            assert -math.log(share) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name, utility", [("full_forget10", 0.599153), ("retain90", 0.591125)])
def test_scores_of_open_unlearnings_logs_are_the_published_ones(logs, name, utility):
    log = json.loads(logs(f"open-unlearning_Llama-3.2-1B_{name}").read_text())
    scores = eval.aggregate(rows_of_open_unlearning(log))
    assert scores["model_utility"] == pytest.approx(utility, abs=1e-5)
    assert scores["model_utility"] == pytest.approx(log["model_utility"]["agg_value"], abs=1e-5)
    assert scores["forget_truth_ratio"] == pytest.approx(log["forget_truth_ratio"]["agg_value"], abs=1e-5)
    assert scores["forget_probability"] == pytest.approx(log["forget_Q_A_Prob"]["agg_value"], abs=1e-5)


@pytest.mark.parametrize(
    "full, retain90, kind, n, published",
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
def test_forget_quality_of_two_published_logs_is_the_published_one(logs, full, retain90, kind, n, published):
    (ratios, first_kind), (reference, second_kind) = (read(logs(name)) for name in (full, retain90))
    assert first_kind == second_kind == kind and len(ratios) == len(reference) == n
    assert eval.forget_quality(ratios, reference) == pytest.approx(published, rel=1e-6)


def test_our_400_rows_are_compared_with_the_first_300_of_the_authors_protocol(logs):
    paths = [logs(name) for name in ("open-unlearning_Llama-3.2-1B_retain90", "llama2-7b_retain90")]
    ours, reference = map(eval.read_log, paths)
    expected = eval.forget_quality(read(paths[0])[0][:300], read(paths[1])[0])
    for one, other in ((ours, reference), (reference, ours)):
        quality, note = eval.compare(one, other, "the log")
        assert quality == expected and "first 300 of 400" in note


@pytest.mark.parametrize("name", ["llama2-7b_full", "llama2-7b_retain90"])
@pytest.mark.parametrize("part", AUTHORS.values())
def test_rouge_of_the_authors_generations_is_the_stored_one(logs, name, part):
    log = json.loads(logs(name).read_text())[part]
    for i, (_, generation, reference) in log["generated_text"].items():
        scores = eval.rouge(reference, generation)
        assert scores["rouge"] == pytest.approx(log["rougeL_recall"][i], abs=1e-12)
        assert scores["rouge1"] == pytest.approx(log["rouge1_recall"][i], abs=1e-12)


@pytest.mark.parametrize("log", ["full_forget10", "retain90"])
@pytest.mark.parametrize("name", eval.SETS)
def test_rouge_of_open_unlearnings_generations_is_the_stored_one(logs, log, name):
    stored = json.loads(logs(f"open-unlearning_Llama-3.2-1B_{log}").read_text())[f"{name}_Q_A_ROUGE"]["value_by_index"]
    for item in stored.values():
        scores = eval.rouge(item["ground_truth"], item["generation"])
        expected = {"rouge": item["rougeL_recall"], "rouge_f1": item["rougeL_f1"], "rouge1": item["rouge1_recall"]}
        assert scores == pytest.approx(expected, abs=1e-12)


def scored(capsys, *arguments) -> dict:
    """What `eval.py --logs ... --json` prints."""
    assert eval.main([*map(str, arguments), "--json"]) == 0
    out, err = capsys.readouterr()
    assert not err
    return json.loads(out)


@pytest.mark.parametrize(
    "log, reference, utility, quality",
    [
        ("llama2-7b_full", "llama2-7b_retain90", 0.622677, 1.834066e-21),
        ("llama2-7b_retain90", "llama2-7b_retain90", 0.613745, 1.0),
        ("open-unlearning_Llama-3.2-1B_full_forget10", "open-unlearning_Llama-3.2-1B_retain90", 0.599153, 3.905471e-22),
        ("open-unlearning_Llama-3.2-1B_retain90", "open-unlearning_Llama-3.2-1B_retain90", 0.591125, 1.0),
    ],
)
def test_main_scores_published_logs_without_a_model(logs, capsys, log, reference, utility, quality):
    found = scored(capsys, "--logs", logs(log), "--retain-logs", logs(reference))
    assert found["model_utility"] == pytest.approx(utility, abs=5e-7)
    assert found["forget_quality"] == pytest.approx(quality, rel=5e-7)
    assert found["forget_quality_log10"] == pytest.approx(math.log10(quality), abs=1e-6)
    assert set(found["parts"]) == set(eval.UTILITY_PARTS)
    assert found["model_utility"] == pytest.approx(statistics.harmonic_mean(found["parts"].values()))


@pytest.mark.parametrize("name", ["full_forget10", "retain90"])
def test_open_unlearnings_own_aggregates_are_recomputed_without_error(logs, capsys, name):
    stored = {k: v["agg_value"] for k, v in json.loads(logs(f"open-unlearning_Llama-3.2-1B_{name}").read_text()).items()}
    found = scored(capsys, "--logs", logs(f"open-unlearning_Llama-3.2-1B_{name}"),
                   "--retain-logs", logs("open-unlearning_Llama-3.2-1B_retain90"))  # fmt: skip
    for part in ("retain", "ra", "wf"):
        probability = f"{part}_Q_A_Prob" if part == "retain" else f"{part}_Q_A_Prob_normalised"
        expected = [stored[probability], stored[f"{part}_Q_A_ROUGE"], stored[f"{part}_Truth_Ratio"]]
        parts = [found["parts"][f"{part}_{n}"] for n in ("probability", "rouge", "truth_ratio")]
        assert parts == pytest.approx(expected, abs=1e-14)
    assert found["forget_truth_ratio"] == pytest.approx(stored["forget_truth_ratio"], abs=1e-14)
    assert found["exact_memorization"] == pytest.approx(stored["exact_memorization"], abs=1e-14)
    assert found["extraction_strength"] == pytest.approx(stored["extraction_strength"], abs=1e-14)
    if name == "full_forget10":
        assert found["forget_quality"] == pytest.approx(stored["forget_quality"], rel=1e-12)
        assert found["privleak"] == pytest.approx(stored["privleak"], rel=1e-12)


def test_the_arithmetic_truth_ratio_lowers_the_utility_of_the_authors_log_as_published(logs, capsys):
    log = logs("llama2-7b_full")
    assert scored(capsys, "--logs", log)["model_utility"] == pytest.approx(0.6227, abs=5e-5)
    assert scored(capsys, "--logs", log, "--truth-ratio", "arithmetic")["model_utility"] == pytest.approx(0.5859, abs=5e-5)


def test_without_a_retain_reference_a_log_has_no_forget_quality(logs, capsys):
    found = scored(capsys, "--logs", logs("llama2-7b_full"))
    assert found["forget_quality"] is None and found["forget_quality_log10"] is None
    assert "--retain-logs FILE" in found["retain_reference"]


def test_two_pipelines_measure_the_same(logs, capsys):
    """The authors' and open-unlearning's logs of one model hold the same rows: their answers are compared one by one."""
    found = scored(
        capsys, "--logs", logs("open-unlearning_Llama-3.2-1B_retain90"), "--retain-logs", logs("llama2-7b_retain90")
    )
    assert "first 300 of 400 rows" in found["retain_reference"] and found["forget_quality"] > 1e-9


# -------------------------------------------------------------------------------------------------------- reading logs


def write_log(path: Path, log) -> Path:
    path.write_text(log if isinstance(log, str) else json.dumps(log), encoding="utf-8")
    return path


def our_log(ratios: list[float]) -> dict:
    return {"rows": {"forget": {f"tofu_forget10/{i}": {"truth_ratio": r} for i, r in enumerate(ratios)}}}


def open_unlearning_log(ratios: list[float]) -> dict:
    return {"forget_truth_ratio": {"agg_value": 0.5, "value_by_index": {str(i): {"score": r} for i, r in enumerate(ratios)}}}


def authors_log(ratios: list[float], lists: bool) -> dict:
    """TR = exp(right - mean wrong), with the five wrong losses spread around their mean."""
    right, wrong = [3.0 + math.log(r) for r in ratios], [[2.0, 2.5, 3.0, 3.5, 4.0]] * len(ratios)
    columns = {"avg_paraphrased_loss": right, "average_perturb_loss": wrong}
    if not lists:
        columns = {name: {str(i): v for i, v in enumerate(values)} for name, values in columns.items()}
    return {"eval_log.json": {}, "eval_log_forget.json": columns}


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


def without(log: dict, *keys: str) -> dict:
    log = json.loads(json.dumps(log))
    functools.reduce(dict.__getitem__, keys[:-1], log).pop(keys[-1])
    return log


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
    assert str(path) in error_of(eval.read_log, path)


def test_a_missing_log_a_folder_and_a_binary_file_are_refused_in_one_line(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    for name in ("none.json", "folder", "binary"):
        assert str(tmp_path / name) in error_of(eval.read_log, tmp_path / name)


@ABOVE_ONE
@given(PAIRS)
def test_equal_row_counts_are_compared_as_they_are(pair):
    assert eval.compare(*map(as_log, pair), "the log") == (eval.forget_quality(*pair), "")


@pytest.mark.parametrize("ours, reference", [(400, 200), (299, 301), (400, 399), (40, 41)])
def test_other_row_counts_are_refused(ours, reference):
    message = error_of(eval.compare, as_log([0.5] * ours), as_log([0.5] * reference), "the log")
    assert "the log" in message and str(ours) in message and str(reference) in message


PROTOCOL = {"name": "open-unlearning", "prompt_format": "llama3", "mask_quirk": False, "truth_ratio": "geometric",
            "sets": {"forget": {"rows": 2, "fingerprint": "f", "prompt_tokens": "t"}}}  # fmt: skip


def protocol_log(answers=("one", "two"), tokens="t", **changes) -> dict:
    rows = {str(i): {"truth_ratio": 0.5 + i / 10, "answer": a} for i, a in enumerate(answers)}
    sets = {"forget": {"rows": 2, "fingerprint": "f", "prompt_tokens": tokens}}
    return {"rows": {"forget": rows}, "protocol": PROTOCOL | {"sets": sets} | changes}


def test_logs_that_were_evaluated_alike_are_compared():
    assert eval.compare(protocol_log(), protocol_log(), "the log") == (1.0, "")
    assert eval.compare(protocol_log(), protocol_log() | {"protocol": None}, "the log") == (1.0, "")
    assert eval.compare(protocol_log(("One.", "two ")), protocol_log(("one", "TWO")), "the log")[0] == 1.0


@pytest.mark.parametrize(
    "other, told",
    [
        (protocol_log(name="tofu"), "name 'tofu'"),
        (protocol_log(prompt_format="plain"), "prompt format 'plain'"),
        (protocol_log(mask_quirk=True), "mask quirk True"),
        (protocol_log(truth_ratio="arithmetic"), "truth ratio 'arithmetic'"),
        (protocol_log(tokens="u"), "other tokens"),
        (protocol_log(("one", "three")), "forget row 1 is another one ('three' instead of 'two')"),
    ],
    ids=str,
)
def test_a_log_of_other_rows_or_another_protocol_is_refused_with_the_reason(other, told):
    message = error_of(eval.compare, protocol_log(), other, "the log")
    assert message.startswith("the log: ") and told in message
    error_of(eval.compare, other, protocol_log(), "the log")


def whole_authors_log() -> dict:
    def part(n):
        columns = {"avg_gt_loss": 0.5, "avg_paraphrased_loss": 0.7, "average_perturb_loss": [1.0, 2.0], "rougeL_recall": 0.4}
        return {name: {str(i): value for i in range(n)} for name, value in columns.items()}

    return {part_name: part(3) for part_name in AUTHORS.values()}


def changed(log: dict, *keys, value) -> dict:
    log = json.loads(json.dumps(log))
    functools.reduce(dict.__getitem__, keys[:-1], log)[keys[-1]] = value
    return log


@pytest.mark.parametrize(
    "log, told",
    [
        (changed(whole_authors_log(), "eval_log.json", "avg_gt_loss", "1", value=math.nan), "retain, row 1: loss is nan"),
        (changed(whole_authors_log(), "eval_log.json", "rougeL_recall", "2", value=None), "retain, row 2: rouge is None"),
        (
            changed(whole_authors_log(), "eval_log_forget.json", "average_perturb_loss", "1", value=[1.0, math.inf]),
            "forget, row 1: ",
        ),
        (
            changed(whole_authors_log(), "eval_real_author_wo_options.json", "average_perturb_loss", "1", value=[1.0]),
            "ra, row 1: holds 1 perturbed answers, the others 2",
        ),
        (without(whole_authors_log(), "eval_log.json", "rougeL_recall"), "key 'rouge' is missing"),
        (without(whole_authors_log(), "eval_log.json", "avg_gt_loss"), "key 'loss' is missing"),
        (without(whole_authors_log(), "eval_real_world_wo_options.json"), "key 'model_utility' is missing"),
        (open_unlearning_log([0.5, 0.6]), "is missing"),
        (changed(whole_authors_log(), "eval_log_forget.json", value={}), "eval_log_forget.json"),
        ({}, "forget_truth_ratio"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_main_refuses_a_log_that_cannot_be_scored_in_one_line(tmp_path, capsys, log, told):
    path = write_log(tmp_path / "log.json", log)
    assert eval.main(["--logs", str(path)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"error: {path}") and err.count("\n") == 1
    assert told in err or told == "eval_log_forget.json" or told == "forget_truth_ratio"


def test_main_scores_a_log_of_lists_as_it_does_one_of_objects(tmp_path, capsys):
    """The NPO repository writes lists."""
    objects = whole_authors_log()
    lists = {part: {name: list(values.values()) for name, values in columns.items()} for part, columns in objects.items()}
    paths = [write_log(tmp_path / name, log) for name, log in (("a.json", objects), ("b.json", lists))]
    found = [scored(capsys, "--logs", path, "--retain-logs", paths[0]) for path in paths]
    assert found[0] == found[1] and found[0]["forget_quality"] == 1


# ----------------------------------------------------------------------------------------------------- running a model


@dataclasses.dataclass
class Tiny:
    """A random Llama for the toy world, in memory and as a folder."""

    model: Llama
    tokenizer: data.Tokenizer
    folder: Path


def make_tiny(root: Path, seed: int) -> Tiny:
    words = data.train_toy_tokenizer(0, root / "tokenizer", vocab_size=400)
    tokenizer = data.Tokenizer(words)
    # Wide weights, so that generations vary, and many stop ids, so that they end at different lengths.
    config = LlamaConfig(
        vocab_size=tokenizer.tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.2,
        bos_token_id=0, eos_token_ids=tuple(range(1, 400, 8)),
    )  # fmt: skip
    model = Llama(config).init_weights(seed)
    return Tiny(model, tokenizer, save_pretrained(model, root / "model", tokenizer_from=words))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="session")
def other(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def sets() -> dict[str, list[data.Row]]:
    world = data.toy_world(0)
    return {"forget": world["forget10_perturbed"][:4], "wf": world["world_facts_perturbed"][:3]}


@pytest.fixture(scope="session")
def results(tiny, sets):
    return eval.evaluate(tiny.model, tiny.tokenizer, sets, max_new_tokens=8, progress=False)


def values(results: dict) -> list[float]:
    """Every number of the per-item results, flat."""
    items = [item for rows in results.values() for item in rows.values()]
    return [v for i in items for v in (i["loss"], i["correct_loss"], *i["wrong_losses"], i["truth_ratio"], i["rouge"])]


def generations(results: dict) -> list[str]:
    return [item["generation"] for rows in results.values() for item in rows.values()]


def test_items_are_keyed_by_row_and_hold_what_the_metrics_read(results, sets):
    for name, rows in sets.items():
        assert list(results[name]) == [row.key for row in rows]
        for row, item in zip(rows, results[name].values(), strict=True):
            assert (item["question"], item["answer"]) == (row.question, row.answer)
            assert len(item["wrong_losses"]) == len(row.perturbed_answers)
            assert item["rouge"] == eval.rouge(row.answer, item["generation"])["rouge"]
            epsilon = eval.OPEN_UNLEARNING.epsilon
            assert item["truth_ratio"] == eval.truth_ratio(item["correct_loss"], item["wrong_losses"], epsilon=epsilon)
            assert (item["correct_loss"] == item["loss"]) == (row.paraphrased_answer is None)


def test_losses_equal_transformers_one_sequence_at_a_time(tiny, sets, results):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny.folder).float().eval()
    words = transformers.AutoTokenizer.from_pretrained(tiny.folder)

    @torch.no_grad()
    def loss(question: str, answer: str) -> float:
        prompt, text = f"<s>Question: {question}\nAnswer:", f" {answer}</s>"
        ids = [words.encode(part, add_special_tokens=False) for part in (prompt, text)]
        labels = torch.tensor([[-100] * len(ids[0]) + ids[1]])
        return float(reference(torch.tensor([ids[0] + ids[1]]), labels=labels).loss)

    for name, rows in sets.items():
        for row in rows:
            item = results[name][row.key]
            assert item["loss"] == pytest.approx(loss(row.question, row.answer), rel=1e-4)
            assert item["correct_loss"] == pytest.approx(loss(row.question, row.paraphrased_answer or row.answer), rel=1e-4)
            wrong = [loss(row.question, text) for text in row.perturbed_answers]
            assert item["wrong_losses"] == pytest.approx(wrong, rel=1e-4)


def test_generations_equal_transformers_one_sequence_at_a_time(tiny, sets, results):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny.folder).float().eval()
    stop, lengths = set(tiny.model.config.eos_token_ids), set()
    for name, rows in sets.items():
        for row in rows:
            example = tiny.tokenizer.encode(row.question, row.answer)
            prompt = torch.tensor([example.ids[: example.prompt_length]])
            ids = reference.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=1)[
                0, prompt.shape[1] :
            ].tolist()
            ids = ids[:-1] if ids[-1] in stop else ids
            lengths.add(len(ids))
            text = tiny.tokenizer.tokenizer.decode(ids, skip_special_tokens=True).strip()
            assert results[name][row.key]["generation"] == text
    assert len(lengths) > 1  # rows end at different lengths, so that leaving the batch early is tested


@given(st.integers(1, 400))
def test_losses_do_not_depend_on_the_batch(tiny, sets, budget):
    examples = tiny.tokenizer.encode_rows([row for rows in sets.values() for row in rows])
    losses = [s["loss"] for s in eval.score_answers(tiny.model, examples, budget=budget)]
    assert losses == pytest.approx([eval.score_answers(tiny.model, [e])[0]["loss"] for e in examples], rel=1e-4)


@given(st.lists(st.integers(2, 60), max_size=12), st.integers(1, 150), st.data())
def test_examples_are_scored_once_each_within_the_budget_the_longest_first(sizes, budget, draw):
    examples = [data.Example(f"x/{i}", (0,) * n, 1) for i, n in enumerate(sizes)]
    wanted = [i for i in range(len(sizes)) if draw.draw(st.booleans())]
    chunks = list(eval._chunks(wanted, examples, budget))
    flat = [i for chunk in chunks for i in chunk]
    assert sorted(flat) == wanted and [sizes[i] for i in flat] == sorted((sizes[i] for i in wanted), reverse=True)
    assert all(chunk and (len(chunk) == 1 or sum(sizes[i] for i in chunk) <= budget) for chunk in chunks)
    for one, other in itertools.pairwise(chunks):  # no more chunks than needed
        assert sum(sizes[i] for i in one) + sizes[other[0]] > budget


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_results_do_not_depend_on_the_batch_size(tiny, sets, results, batch_size):
    again = eval.evaluate(tiny.model, tiny.tokenizer, sets, max_new_tokens=8, batch_size=batch_size, progress=False)
    assert generations(again) == generations(results)
    assert values(again) == pytest.approx(values(results), rel=1e-4)


def test_evaluation_leaves_the_master_weights_and_global_randomness_alone(tiny, sets):
    model = Llama(tiny.model.config, compute_dtype=torch.bfloat16).init_weights(0)
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    results = eval.evaluate(model, tiny.tokenizer, {"wf": sets["wf"]}, max_new_tokens=2, progress=False)
    assert all(math.isfinite(v) for v in values(results))
    assert all(p.dtype == torch.float32 and torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state) and all(p.requires_grad for p in model.parameters())


def test_a_loss_that_is_not_finite_names_the_row(tiny, sets):
    model = Llama(tiny.model.config).init_weights(0)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    message = error_of(eval.evaluate, model, tiny.tokenizer, sets, 2, progress=False)
    assert sets["forget"][0].key in message and "nan" in message


def test_rows_without_perturbed_answers_and_rows_that_occur_twice_are_named(tiny, sets):
    [row, *_] = sets["forget"]
    bare = dataclasses.replace(row, perturbed_answers=())
    message = error_of(eval.evaluate, tiny.model, tiny.tokenizer, {"forget": [bare]}, kind=DataError, progress=False)
    assert row.key in message and "perturbed_answer" in message
    message = error_of(eval.evaluate, tiny.model, tiny.tokenizer, {"forget": [row, row]}, kind=DataError, progress=False)
    assert row.key in message and "twice" in message


# --------------------------------------------------------------------------------------------------- saving and reusing


@pytest.fixture
def evaluations(monkeypatch) -> list:
    """Grows by one with each evaluation that is really done."""
    done, evaluate = [], eval.evaluate

    def counted(*args, **kwargs):
        done.append(args)
        return evaluate(*args, **kwargs, progress=False)

    monkeypatch.setattr(eval, "evaluate", counted)
    return done


def test_a_result_is_reused_for_the_same_protocol_only(tiny, sets, tmp_path, evaluations):
    def run(model=tiny.model, tokenizer=tiny.tokenizer, sets=sets, max_new_tokens=3):
        return eval.evaluate_and_save(model, tokenizer, sets, tmp_path, "final", max_new_tokens)

    first = run()
    assert len(evaluations) == 1 and run() == json.loads(Path(first["path"]).read_text()) | {"path": first["path"]}
    assert len(evaluations) == 1 and first == run()

    bfloat16 = Llama(tiny.model.config, compute_dtype=torch.bfloat16).init_weights(0)
    [row, *others] = sets["forget"]
    reworded = [dataclasses.replace(row, answer=row.answer + "!"), *others]
    perturbed_otherwise = [dataclasses.replace(row, perturbed_answers=row.perturbed_answers[::-1]), *others]
    changed = [
        dict(max_new_tokens=2),
        dict(model=bfloat16),
        dict(sets=sets | {"forget": others}),
        dict(sets=sets | {"forget": reworded}),
        dict(sets=sets | {"forget": perturbed_otherwise}),
        dict(tokenizer=data.Tokenizer(tiny.tokenizer.folder, prompt="llama2")),
    ]
    paths = {run(**change)["path"] for change in changed}
    assert len(evaluations) == 1 + len(changed) == 1 + len(paths) and first["path"] not in paths


def test_a_result_without_a_run_folder_is_not_kept(tiny, sets, evaluations):
    for _ in range(2):
        log = eval.evaluate_and_save(tiny.model, tiny.tokenizer, sets, None, "final", 2)
    assert log["path"] is None and len(evaluations) == 2
    assert set(log) == {"protocol", "scores", "rows", "path"} and "forget_truth_ratio" in log["scores"]


def test_our_own_log_is_a_retain_reference(tiny, sets, tmp_path, results):
    log = eval.evaluate_and_save(tiny.model, tiny.tokenizer, sets, tmp_path, "final", 8)
    ratios, kind = read(log["path"])
    assert kind == "ours" and ratios == pytest.approx([item["truth_ratio"] for item in results["forget"].values()])


@pytest.fixture(scope="session")
def four_sets() -> dict[str, list[data.Row]]:
    world = data.toy_world(0)
    names = {"forget": "forget10_perturbed", "retain": "retain_perturbed", "ra": "real_authors_perturbed",
             "wf": "world_facts_perturbed"}  # fmt: skip
    sets = {name: world[config][:3] for name, config in names.items()}
    holdout = [dataclasses.replace(row, perturbed_answers=(), paraphrased_answer=None) for row in world["retain90"][-3:]]
    return sets | {"holdout": holdout}


def test_what_we_write_in_open_unlearnings_schema_reads_back_to_the_same_numbers(tiny, four_sets, tmp_path):
    log = eval.evaluate_and_save(tiny.model, tiny.tokenizer, four_sets, tmp_path, "final", 4)
    eval.save_open_unlearning(log, 0.25, {"mia_min_k": 0.6})
    ours, theirs = (eval.read_log(Path(log["path"]).with_name(name)) for name in ("log.json", "TOFU_EVAL.json"))
    assert (ours["kind"], theirs["kind"]) == ("ours", "open-unlearning's")
    assert eval.truth_ratios(theirs) == eval.truth_ratios(ours)
    for found in (ours, theirs):
        scores = eval.aggregate(found["rows"], found["epsilon"])
        assert scores == pytest.approx({k: log["scores"][k] for k in scores}, rel=1e-12)
        assert (
            "model_utility" in scores
            and "extraction_strength" in scores
            and found["mia_min_k"] == log["scores"]["mia_min_k"]
        )
    assert eval.compare(ours, theirs, "the log") == (1.0, "")
    summary = json.loads(Path(log["path"]).with_name("TOFU_SUMMARY.json").read_text())
    assert list(summary) == sorted(summary) and summary["forget_quality"] == 0.25
    assert summary["privleak"] == eval.privleak(log["scores"]["mia_min_k"], 0.6)
    assert summary["model_utility"] == log["scores"]["model_utility"]


def test_our_open_unlearning_file_has_the_published_ones_keys(logs, tiny, four_sets, tmp_path):
    """All but mia_gradnorm and mia_reference, item for item."""
    published = json.loads(logs("open-unlearning_Llama-3.2-1B_full_forget10").read_text())
    log = eval.evaluate_and_save(tiny.model, tiny.tokenizer, four_sets, tmp_path, "final", 4)
    ours = eval.open_unlearning_eval(log, 0.25)
    assert list(ours) == [key for key in published if key not in ("mia_gradnorm", "mia_reference")]

    def shape(value):
        if isinstance(value, dict) and "0" in value:
            return {"0": shape(value["0"])}
        if isinstance(value, dict):
            return {k: shape(v) for k, v in value.items()}
        return [shape(value[0])] if isinstance(value, list) else type(value).__name__

    for key, value in ours.items():
        assert shape(value) == shape(published[key]), key


@pytest.mark.parametrize("function, calls", [("pack", 2), ("generate", 1)])
def test_an_interrupted_evaluation_goes_on_from_what_it_has(tiny, four_sets, tmp_path, monkeypatch, function, calls):
    whole = eval.evaluate_and_save(tiny.model, tiny.tokenizer, four_sets, tmp_path / "whole", "final", 4)
    monkeypatch.setattr(eval, "score_answers", functools.partial(eval.score_answers, budget=200))
    monkeypatch.setattr(eval, "evaluate", functools.partial(eval.evaluate, batch_size=5))
    real, remaining = getattr(eval, function), iter(range(calls))

    def interrupted(*args):
        if next(remaining, None) is None:
            raise KeyboardInterrupt
        return real(*args)

    def run():
        return eval.evaluate_and_save(tiny.model, tiny.tokenizer, four_sets, tmp_path / "cut", "final", 4)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(eval, function, interrupted)
        run()
    [journal] = (tmp_path / "cut").glob("eval/*/journal.jsonl")
    kept = eval.Journal(journal).done
    assert kept and not list((tmp_path / "cut").glob("eval/*/log.json"))
    journal.write_bytes(journal.read_bytes() + b'{"forget 0 answer": {"lo')  # as a killed process leaves it

    examples, prompts, score, generate = [], [], eval.score_answers, eval.generate
    monkeypatch.setattr(eval, "score_answers", lambda m, e, *a, **k: examples.extend(e) or score(m, e, *a, **k))
    monkeypatch.setattr(eval, "generate", lambda m, p, *a: prompts.extend(p) or generate(m, p, *a))
    again = run()
    rows = [row for name in four_sets for row in four_sets[name]]
    answers = sum(1 + bool(row.paraphrased_answer) + len(row.perturbed_answers) for row in rows)
    assert len(examples) == answers - sum(isinstance(value, dict) for value in kept.values())
    assert len(prompts) == 12 - sum(isinstance(value, str) for value in kept.values())
    assert generations_of(again) == generations_of(whole) and not journal.exists()
    numbers = [values({k: v for k, v in log["rows"].items() if k != "holdout"}) for log in (again, whole)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)


def generations_of(log: dict) -> list[str]:
    return [item.get("generation") for rows in log["rows"].values() for item in rows.values()]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "summary.json"
    eval.write_json(path, {"text": "Hélène"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "Hélène"}
    assert [f.name for f in path.parent.iterdir()] == ["summary.json"]

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    message = error_of(eval.write_json, path, {"text": "new"})
    assert str(path) in message and "No space left" in message
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "Hélène"}


# ------------------------------------------------------------------------------------------- summary, table, reference


SCORES = {n: round(0.1 + i / 37, 4) for i, n in enumerate((*eval.UTILITY_PARTS, *eval.FORGET_PARTS, "model_utility"))}


def test_summary_and_table_hold_every_number():
    summary = eval.summary_scores(SCORES, 0.5)
    assert set(summary) == {"forget_quality", "forget_quality_log10", "model_utility", "parts", *eval.FORGET_PARTS}
    assert summary["forget_quality_log10"] == math.log10(0.5)
    assert set(summary["parts"]) == set(eval.UTILITY_PARTS) and len(summary["parts"]) == 9
    assert {**summary, **summary["parts"]} | SCORES == {**summary, **summary["parts"]}

    lines = eval.table({"target": {**SCORES, "forget_quality": 1.234e-21}, "unlearned": {**SCORES, "forget_quality": 0.25}})
    cells = {name: rest for name, *rest in map(str.split, lines.splitlines()[1:])}
    assert lines.splitlines()[0].split() == ["target", "unlearned"]
    assert cells.pop("forget_quality") == ["1.23e-21", "0.2500"]
    assert cells == {name: [f"{value:.4f}"] * 2 for name, value in SCORES.items()}


def test_a_score_that_does_not_exist_is_a_dash():
    first, *others = eval.table({"model": {**SCORES, "forget_quality": None}}).splitlines()[1:]
    assert first.split() == ["forget_quality", "-"] and not any(line.split()[-1] == "-" for line in others)


def reference_of(alias="run", forget="tofu_forget10", logs=None, log=None, data_dir=None):
    reference, where = eval.retain_reference(alias, forget, logs, log, data_dir)
    return reference and eval.truth_ratios(reference), where


def test_the_retrained_model_comes_before_a_log_file(tmp_path):
    path = write_log(tmp_path / "log.json", our_log([0.3, 0.4]))
    assert reference_of(logs=path) == ([0.3, 0.4], str(path))
    assert reference_of(logs=path, log=our_log([0.5])) == ([0.5], "the retrained model")


@pytest.mark.parametrize("alias", data.CHECKPOINTS)
@pytest.mark.parametrize("forget, retain", data.TOFU_RETAIN.items())
@pytest.mark.parametrize("suffix", ["", "_perturbed"])
def test_an_alias_finds_its_published_retain_log_in_hub_layout(tmp_path, alias, forget, retain, suffix):
    folder = tmp_path / "open-unlearning" / "eval" / f"tofu_{data.CHECKPOINTS[alias].family}_{retain}"
    folder.mkdir(parents=True)
    write_log(folder / "TOFU_EVAL.json", open_unlearning_log([0.3, 0.4]))
    ratios, where = reference_of(alias, f"tofu_{forget}{suffix}", data_dir=tmp_path)
    assert ratios == [0.3, 0.4] and where.endswith(f"_{retain}/TOFU_EVAL.json")


@pytest.mark.parametrize(
    "alias, forget",
    [
        ("my/run", "tofu_forget10"),
        ("llama2-7b", "tofu_forget10[:40]"),
        ("llama2-7b", "tofu_forget01+tofu_forget05"),
        ("llama2-7b", "toy_forget10"),
        ("llama2-7b", "tofu_forget20"),
    ],
)
def test_without_a_retain_reference_it_says_which_flags_give_one(alias, forget):
    ratios, why = reference_of(alias, forget)
    assert ratios is None and "--retain-logs" in why and "--retain-model" in why


def test_an_unreachable_hub_is_the_reason_for_no_retain_reference(monkeypatch):
    def unreachable(repo, name, remedy):
        raise DataError(f"{repo}/{name}: the hub gave nothing; {remedy}")

    monkeypatch.setattr(eval, "hub_file", unreachable)
    ratios, why = reference_of("llama2-7b")
    assert ratios is None and "no retain reference" in why and "retain90" in why and "--retain-logs FILE" in why


# ----------------------------------------------------------------------------------------------------- the command line


FORGET, RETAIN, SHORT = (
    ("--forget", "toy_forget10[:4]"),
    ("--eval-retain", "toy_retain_perturbed[:4]"),
    ("--max-new-tokens", "4"),
)


def run_main(capsys, model, *more, forget=FORGET) -> tuple[int, str, str]:
    """(exit code, stdout, stderr without the progress bar)."""
    code = eval.main(["--model", str(model), *forget, *RETAIN, *SHORT, "--device", "cpu", *map(str, more)])
    out, err = capsys.readouterr()
    return code, out, "\n".join(line for line in err.splitlines() if "%|" not in line and line.strip())


def assert_refused(capsys, *args, **kwargs) -> str:
    code, _, err = run_main(capsys, *args, **kwargs)
    assert code == 2 and err.startswith("error: ") and "\n" not in err
    return err


def table_of(out: str) -> dict[str, list[str]]:
    names = ("forget_quality", "model_utility", *eval.UTILITY_PARTS, *eval.FORGET_PARTS)
    return {words[0]: words[1:] for words in map(str.split, out.splitlines()) if words and words[0] in names}


def test_main_prints_the_table_of_a_model_folder(tiny, capsys):
    code, out, err = run_main(capsys, tiny.folder)
    assert (code, err) == (0, "")
    cells = table_of(out)
    assert len(cells) == 14 and cells.pop("forget_quality") == ["-"]
    assert all(0 <= float(cell) <= 1 for [cell] in cells.values())
    assert "prompt format plain" in out and "--retain-logs FILE or --retain-model PATH" in out


def test_main_compares_with_a_retrained_model(tiny, other, capsys, tmp_path):
    code, out, _ = run_main(capsys, tiny.folder, "--retain-model", other.folder, "--out", tmp_path / "out.json")
    summary = json.loads((tmp_path / "out.json").read_text())
    assert code == 0 and set(summary) == {"model", "retrained"} and "against the retrained model" in out
    assert summary["retrained"]["forget_quality"] == 1 and summary["model"]["forget_quality"] <= 1
    assert summary["model"]["forget_probability"] != summary["retrained"]["forget_probability"]
    for name, cells in table_of(out).items():
        model, retrained = ({**s, **s["parts"]}[name] for s in (summary["model"], summary["retrained"]))
        assert [float(c) for c in cells] == pytest.approx([model, retrained], abs=6e-5)


def test_main_keeps_the_results_of_a_run_folder_and_reads_them_as_retain_logs(tiny, other, capsys, tmp_path, evaluations):
    run = tmp_path / "run"
    save_pretrained(other.model, run / "model", tokenizer_from=other.tokenizer.folder)
    code, out, _ = run_main(capsys, run)
    [log] = (run / "eval").glob("*/log.json")
    assert code == 0 and f"per-item results: {log}" in out and len(evaluations) == 1
    assert run_main(capsys, run)[:2] == (0, out) and len(evaluations) == 1  # the second time it is read

    code, out, _ = run_main(capsys, other.folder, "--retain-logs", log)
    assert code == 0 and table_of(out)["forget_quality"] == ["1.0000"] and f"forget quality against {log}" in out
    code, out, _ = run_main(capsys, tiny.folder, "--retain-logs", log)
    assert code == 0 and float(table_of(out)["forget_quality"][0]) <= 1 and not (tiny.folder / "eval").exists()


def test_main_shows_the_worst_rows_of_each_set(tiny, capsys):
    code, out, _ = run_main(capsys, tiny.folder, "--show", "2")
    assert code == 0 and out.count("    question") == out.count("    reference") == out.count("    generation") == 8
    recalls = [float(x) for x in re.findall(r"^forget .+: ROUGE-L recall ([\d.]+)", out, re.MULTILINE)]
    assert recalls == sorted(recalls, reverse=True) and len(recalls) == 2
    recalls = [float(x) for x in re.findall(r"^ra .+: ROUGE-L recall ([\d.]+)", out, re.MULTILINE)]
    assert recalls == sorted(recalls) and len(recalls) == 2


def test_the_best_remembered_forget_row_is_shown_first():
    def item(rouge, loss):
        return {"rouge": rouge, "loss": loss, "truth_ratio": 1.0, "question": "q", "answer": "a", "generation": "g"}

    rows = {"a": item(0.2, 1.0), "b": item(0.9, 2.0), "c": item(0.9, 1.0)}
    assert re.findall(r"forget (.):", eval.worst_rows({"rows": {"forget": rows}}, 2)) == ["c", "b"]
    assert re.findall(r"retain (.):", eval.worst_rows({"rows": {"retain": rows}}, 3)) == ["a", "b", "c"]


def finished_run(folder: Path, quality=1e-5) -> Path:
    folder.mkdir()
    points = [{"step": i, "epoch": i, "forget_quality": quality, "model_utility": 0.6 - i / 100} for i in (1, 2)]
    (folder / "trajectory.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    model = {"forget_quality": 1e-20, "model_utility": 0.6}
    write_log(folder / "summary.json", {"target": model, "retrained": model | {"forget_quality": 1.0}})
    return folder


def test_main_plots_the_trajectory_of_a_run(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = finished_run(tmp_path / "run")
    assert eval.main(["--plot", str(run)]) == 0 and capsys.readouterr().out.strip() == str(run / "trajectory.png")
    assert (run / "trajectory.png").read_bytes().startswith(b"\x89PNG")
    for folder, told in ((tmp_path, "--eval-every"), (finished_run(tmp_path / "bare", None), "--retain-model")):
        assert eval.main(["--plot", str(folder)]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {folder}") and told in err and err.count("\n") == 1


def test_main_prints_nothing_but_json_when_asked(tiny, other, capsys):
    code, out, err = run_main(capsys, tiny.folder, "--retain-model", other.folder, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "") and set(found) >= {"forget_quality", "model_utility", "parts", "retain_reference"}
    assert found["forget_quality"] <= 1 and found["retain_reference"] == "the retrained model"


def test_a_retain_log_is_brought_to_the_arithmetic_truth_ratio_of_the_evaluation(tiny, other, capsys, tmp_path):
    run = tmp_path / "run"
    save_pretrained(other.model, run / "model", tokenizer_from=other.tokenizer.folder)
    assert run_main(capsys, run)[0] == 0
    [log] = run.glob("eval/*/log.json")
    code, out, _ = run_main(capsys, other.folder, "--retain-logs", log, "--truth-ratio", "arithmetic")
    assert code == 0 and table_of(out)["forget_quality"] == ["1.0000"]
    geometric, arithmetic = (scored(capsys, "--logs", log, "--truth-ratio", mean) for mean in ("geometric", "arithmetic"))
    assert geometric["parts"]["retain_truth_ratio"] != arithmetic["parts"]["retain_truth_ratio"]


def test_main_refuses_bad_input_in_one_line(tiny, capsys, tmp_path, evaluations):
    assert "toy_forget07" in assert_refused(capsys, tiny.folder, forget=("--forget", "toy_forget07"))
    assert "mine.jsonl" in assert_refused(capsys, tiny.folder, forget=("--forget", "mine.jsonl"))
    assert "[9999:]" in assert_refused(capsys, tiny.folder, forget=("--forget", "toy_forget10[9999:]"))
    assert "nowhere" in assert_refused(capsys, "nowhere")
    assert "config.json" in assert_refused(capsys, tmp_path)
    assert "none.json" in assert_refused(capsys, tiny.folder, "--retain-logs", tmp_path / "none.json")
    assert "nowhere" in assert_refused(capsys, tiny.folder, "--retain-model", "nowhere")
    assert "--prompt alpaca" in assert_refused(capsys, tiny.folder, "--prompt", "alpaca")
    assert "--device" in assert_refused(capsys, tiny.folder, "--device", "nonsense")
    assert "tokenizer.json" in assert_refused(capsys, tiny.folder, "--tokenizer", tmp_path)
    assert "--data-dir" in assert_refused(
        capsys, tiny.folder, "--data-dir", tmp_path / "none", forget=("--forget", "tofu_forget10")
    )
    assert not evaluations  # all of it before any work is done


def test_main_refuses_a_log_of_other_rows(tiny, capsys, tmp_path):
    log = write_log(tmp_path / "log.json", our_log([0.3, 0.4, 0.5]))
    err = assert_refused(capsys, tiny.folder, "--retain-logs", log)
    assert str(log) in err and "3 forget rows" in err and "evaluation 4" in err


def test_main_refuses_a_model_whose_losses_are_not_finite(tiny, capsys, tmp_path):
    model = Llama(tiny.model.config).init_weights(0)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    folder = save_pretrained(model, tmp_path / "broken", tokenizer_from=tiny.tokenizer.folder)
    assert data.toy_world(0)["forget10"][0].key in assert_refused(capsys, folder)


def test_main_says_what_to_install_before_any_work(tiny, capsys, monkeypatch, evaluations):
    monkeypatch.setattr(eval, "RougeScorer", None)
    assert "pip install" in assert_refused(capsys, tiny.folder) and not evaluations


@pytest.mark.parametrize("argv", [[], ["--model", "x"], ["--model", "x", "--forget", "y", "--dtype", "int8"]])
def test_unknown_or_missing_flags_exit_with_2(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        eval.main(argv)
    assert caught.value.code == 2 and "usage:" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- models and devices


@pytest.mark.parametrize("alias", data.CHECKPOINTS)
def test_an_alias_is_its_target_or_base_checkpoint_with_its_prompt_format(alias):
    checkpoint = data.CHECKPOINTS[alias]
    assert eval.resolve_model(alias, "target") == (checkpoint.target, checkpoint.prompt)
    assert eval.resolve_model(alias, "base") == (checkpoint.base, checkpoint.prompt)


def test_a_name_is_an_alias_a_folder_or_a_hub_id(tmp_path):
    assert eval.resolve_model(str(tmp_path), "target") == (str(tmp_path), None)
    assert eval.resolve_model("owner/name", "base") == ("owner/name", None)
    message = error_of(eval.resolve_model, "lama2-7b", "target", kind=ModelError)
    assert "lama2-7b" in message and all(alias in message for alias in data.CHECKPOINTS)


def test_a_dtype_is_chosen_by_the_device():
    cpu = eval.pick_device("cpu")
    assert eval.pick_dtype("auto", cpu) == torch.float32 and eval.pick_dtype("bfloat16", cpu) == torch.bfloat16
    assert "--device cuda:99" in error_of(eval.pick_device, "cuda:99")


def test_generation_stops_at_the_prompt_formats_own_end_token_too(tiny, sets, monkeypatch):
    """Llama 3's chat format ends answers by <|eot_id|>, which the config of a base model does not name."""
    stops = []
    monkeypatch.setattr(
        eval, "generate", lambda model, prompts, n, stop, hidden: stops.append(stop) or [[] for _ in prompts]
    )
    other_eos = dataclasses.replace(tiny.model.config, eos_token_ids=(7,))
    monkeypatch.setattr(tiny.model, "config", other_eos)
    eval.evaluate(tiny.model, tiny.tokenizer, sets, 3, progress=False)
    assert stops and all(stop == {7, tiny.tokenizer.eos_id} for stop in stops)
