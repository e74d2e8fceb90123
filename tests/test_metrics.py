"""metrics.py: the numbers against independent formulas, and against those of published logs."""

import functools
import json
import math
import statistics
from fractions import Fraction
from math import comb

import pytest
from claims import claim
from helpers import ABOVE_ONE, AUTHORS, LOSS_LISTS, LOSSES, PAIRS, RATIOS, SET_ITEMS, error_of, published
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("scipy")
pytest.importorskip("rouge_score")

import metrics


@given(LOSSES, LOSS_LISTS)
@claim("truth ratio = geometric mean over the wrong answers / the right one", "TOFU")
def test_truth_ratio_is_the_wrong_answers_geometric_mean_over_the_right_one(correct, wrong):
    geometric_mean = math.prod(math.exp(-loss) for loss in wrong) ** (1 / len(wrong))
    assert metrics.truth_ratio(correct, wrong) == pytest.approx(geometric_mean / math.exp(-correct))


@given(LOSSES, LOSS_LISTS)
@claim("probability of an option is its share among the options", "TOFU")
def test_normalised_probability_is_the_right_options_share(correct, wrong):
    p, others = math.exp(-correct), [math.exp(-loss) for loss in wrong]
    assert metrics.normalised_probability(correct, wrong) == pytest.approx(p / (p + sum(others)))


@given(RATIOS)
@claim("truth ratios are averaged as min(r, 1/r) on forget, max(0, 1 - r) elsewhere", "TOFU")
def test_truth_ratios_are_averaged_on_the_scale_of_their_set(ratios):
    assert metrics.utility_truth_ratio(ratios) == pytest.approx(statistics.fmean([1 - r if r < 1 else 0.0 for r in ratios]))
    assert metrics.forget_truth_ratio([0.0]) == 0 and metrics.utility_truth_ratio([0.0]) == 1
    assert metrics.forget_truth_ratio(ratios) == pytest.approx(statistics.fmean([r if r < 1 else 1 / r for r in ratios]))


@given(st.floats(0, 1e308), st.lists(st.floats(0, 1e308), min_size=1, max_size=3))
def test_a_model_destroyed_by_gradient_ascent_still_has_finite_numbers(correct, wrong):
    ratio = metrics.truth_ratio(correct, [w / len(wrong) for w in wrong])
    for number in (
        metrics.forget_truth_ratio([ratio]),
        metrics.utility_truth_ratio([ratio]),
        metrics.normalised_probability(correct, wrong),
    ):
        assert 0 <= number <= 1


@pytest.mark.parametrize("gap, ratio", [(699.0, math.exp(699)), (700.0, math.exp(700)), (1e9, math.exp(700)), (-1e9, 0.0)])
def test_a_truth_ratio_ends_at_e_to_the_700(gap, ratio):
    assert metrics.truth_ratio(max(gap, 0.0), [max(-gap, 0.0)]) == ratio


@given(st.lists(st.floats(1e-3, 1) | st.just(0.0), min_size=9, max_size=9))
@claim("model utility = harmonic mean of its nine parts", "TOFU")
def test_model_utility_is_the_harmonic_mean_of_its_nine_parts(values):
    utility = metrics.model_utility(dict(zip(metrics.UTILITY_PARTS, values, strict=True)) | {"forget_rouge": 0.0})
    assert utility == pytest.approx(statistics.harmonic_mean(values))
    assert (utility == 0) == (0 in values)


def exact_p_value(a: list, b: list) -> float:
    """P(a two-sample Kolmogorov-Smirnov statistic >= the observed one) for n against n, in whole numbers."""
    n = len(a)
    h = max(abs(sum(x <= t for x in a) - sum(x <= t for x in b)) for t in a + b)
    if h == 0:
        return 1.0
    return float(2 * sum(Fraction((-1) ** (k - 1) * comb(2 * n, n - k * h), comb(2 * n, n)) for k in range(1, n // h + 1)))


@ABOVE_ONE
@given(PAIRS)
@claim("forget quality = exact two-sample KS p-value", "TOFU")
def test_forget_quality_is_the_exact_two_sample_p_value(pair):
    exact = exact_p_value(*pair)
    assert metrics.forget_quality(*pair) == pytest.approx(exact, rel=1e-9, abs=1e-4 if exact == 1 else 0)


@ABOVE_ONE
@given(PAIRS, st.sampled_from([math.log, math.sqrt, lambda r: 1 / r, lambda r: r / (1 + r), lambda r: -r]))
@claim("forget quality is the same on any monotone scale of the truth ratio", "TOFU")
def test_forget_quality_is_the_same_on_any_monotone_scale_and_in_any_order(pair, scale):
    a, b = pair
    quality = metrics.forget_quality(a, b)
    assert metrics.forget_quality([scale(r) for r in a], [scale(r) for r in b]) == quality
    assert metrics.forget_quality(b, sorted(a)) == quality


@pytest.mark.parametrize("n, floor", [(40, 1.86e-23), (200, 1.94e-119), (300, 1.48e-179), (400, 1.06e-239)])
def test_forget_quality_of_disjoint_samples_is_the_published_floor(n, floor):
    assert metrics.forget_quality([0.1] * n, [0.9] * n) == pytest.approx(floor, rel=0.01)
    assert metrics.forget_quality([0.1] * n, [0.1] * n) == 1


@pytest.mark.parametrize("name", ["RougeScorer", "ks_2samp"])
def test_it_says_what_to_install(monkeypatch, name):
    metrics.require_extra()
    monkeypatch.setattr(metrics, name, None)
    told = "evaluation needs scipy and rouge-score: pip install -e '.[eval]' (or pass --no-eval)"
    assert error_of(metrics.require_extra) == told


@given(st.floats(5e-324, 1) | st.just(0.0))
def test_the_logarithm_of_a_p_value_is_finite(p):
    assert metrics.log10(p) == (math.log10(p) if p else math.log10(5e-324))
    assert metrics.log10(None) is None


@given(st.floats(0, 700))
def test_a_probability_is_e_to_minus_the_loss(loss):
    assert metrics.probability(loss) == math.exp(-loss)


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
    assert metrics.rouge(" ".join(reference), ", ".join(generation).upper())["rouge"] == pytest.approx(expected)


@given(st.lists(st.text("abcdeghinorsty", min_size=1, max_size=9), min_size=1, max_size=8))
def test_rouge_l_recall_of_a_text_with_itself_is_one(words):
    assert metrics.rouge(" ".join(words), " ".join(words) + " and more")["rouge"] == 1


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
    assert metrics.rouge(reference, generation)["rouge"] == recall


@given(st.fixed_dictionaries({name: SET_ITEMS for name in metrics.SETS}))
def test_the_aggregate_is_the_mean_over_items_of_each_sets_own_number(rows):
    scores = metrics.aggregate(rows)
    assert set(scores) == {*metrics.UTILITY_PARTS, *metrics.FORGET_PARTS, "model_utility"}
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
    assert scores["model_utility"] == pytest.approx(statistics.harmonic_mean([scores[n] for n in metrics.UTILITY_PARTS]))


def test_the_aggregate_takes_a_stored_probability_and_adds_epsilon_where_the_field_does():
    item = {"loss": 1.0, "correct_loss": 1.0, "wrong_losses": [2.0], "rouge": 0.5, "truth_ratio": 4.0}
    rows = {name: {"a": item} for name in ("forget", "ra")}
    scores = metrics.aggregate(rows, epsilon=1.0)
    assert scores["forget_truth_ratio"] == 1 / (4 + 1)
    p, wrong = math.exp(-1), math.exp(-2)
    assert scores["ra_probability"] == pytest.approx(p / (p + wrong + 1))
    stored = {name: {"a": item | {"probability": 0.25}} for name in rows}
    assert metrics.aggregate(stored)["ra_probability"] == metrics.aggregate(stored)["forget_probability"] == 0.25


def test_the_forget_set_does_not_enter_model_utility_and_utility_needs_the_other_three():
    item = {"loss": 1.0, "correct_loss": 1.0, "wrong_losses": [2.0], "rouge": 0.5, "truth_ratio": 0.4}
    rows = {name: {"a": item} for name in metrics.SETS}
    utility = metrics.aggregate(rows)["model_utility"]
    assert metrics.aggregate(rows | {"forget": {"a": item | {"loss": 9.0, "rouge": 0.0}}})["model_utility"] == utility
    assert "model_utility" not in metrics.aggregate({"forget": rows["forget"]})


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.floats(-5, 5), st.floats(0.1, 5))
def test_oscillation_is_the_way_back_and_forth(values, shift, scale):
    found = metrics.oscillation(values)
    assert found >= -1e-9 and metrics.oscillation(sorted(values)) == pytest.approx(0, abs=1e-9)
    assert metrics.oscillation([scale * v + shift for v in values]) == pytest.approx(scale * found, abs=1e-6)
    assert metrics.oscillation(values[::-1]) == pytest.approx(found, abs=1e-9)
    assert metrics.oscillation([0, 1] * 5 + [0]) == 1.0


def test_degenerate_share_counts_what_is_no_language():
    question, answer = "Where was Ana Belu born?", "Ana Belu was born in Lisbon, the capital of Portugal, long ago."
    language = [answer, "In Lisbon.", "Ana was born in Portugal.", "Ana Belu was born in Oslo."]
    none = ["", " ,,, ", "qwx zzt prr", "Ana ana lolo kiki xoxo", "born in born in born in born in born in"]
    for text in language + none:
        assert metrics.degenerate_share({"a": (question, answer, text)}) == (text in none)
    samples = {str(i): (question, answer, text) for i, text in enumerate(language + none)}
    assert metrics.degenerate_share(samples) == pytest.approx(len(none) / len(samples))


TRUE_LOSSES = st.lists(LOSSES, min_size=1, max_size=70)
TEXTS = st.sampled_from(["Ana Belu was born in Oslo.", "qwx", "", "born in born in born in born in born in"])
ANSWERS = st.lists(st.tuples(TEXTS, st.none() | LOSSES), min_size=1, max_size=12)


@given(TRUE_LOSSES)
def test_the_limit_is_the_least_true_loss_that_95_in_100_do_not_exceed(losses):
    reached = [limit for limit in losses if 100 * sum(loss <= limit for loss in losses) >= 95 * len(losses)]
    assert metrics.language_limit(losses) == min(reached)


@given(TRUE_LOSSES)
@claim("at least 95 % of the true answers are language")
def test_at_least_95_in_100_true_answers_are_language(losses):
    share = metrics.language([("Ana Belu was born in Oslo.", loss) for loss in losses], losses)
    assert 0.95 <= share <= 1
    if len(set(losses)) == len(losses):
        assert share == pytest.approx(1 - len(losses) // 20 / len(losses))


@given(ANSWERS, TRUE_LOSSES, st.randoms())
def test_language_counts_each_answer_by_itself(answers, losses, random):
    share = metrics.language(answers, losses)
    assert share == pytest.approx(statistics.fmean(metrics.language([answer], losses) for answer in answers))
    for items in (answers, losses):
        random.shuffle(items)
    assert metrics.language(answers, losses) == share


@given(ANSWERS, TRUE_LOSSES, st.floats(0, 9))
def test_what_the_judge_finds_less_likely_is_no_more_often_language(answers, losses, more):
    raised = [(text, None if loss is None else loss + more) for text, loss in answers]
    assert metrics.language(raised, losses) <= metrics.language(answers, losses)
    assert metrics.language(answers, [loss + more for loss in losses]) >= metrics.language(answers, losses)


@given(TRUE_LOSSES)
def test_no_tokens_and_loops_are_no_language_however_likely(losses):
    least = min(losses)
    assert metrics.language([("", None), ("born in " * 4, least), ("in Oslo " * 3, least)], losses) == pytest.approx(1 / 3)


@given(st.lists(st.integers(0, 4), max_size=5), st.lists(st.tuples(st.integers(0, 4), LOSSES), min_size=1, max_size=9))
def test_a_token_of_the_prompt_costs_nothing_once_and_the_last_token_always_counts(prompt, answer):
    tokens, losses = [token for token, _ in answer], [loss for _, loss in answer]
    counted = [losses[-1]]
    for i in range(len(answer) - 1):
        if tokens[i] not in prompt or tokens[i] in tokens[:i]:
            counted.append(losses[i])
    found = metrics.language_loss(losses, [*prompt, *tokens], len(prompt))
    assert found == pytest.approx(sum(counted) / len(losses))
    assert found <= statistics.fmean(losses) + 1e-9


# ------------------------------------------------------------------------------------------------------- published logs


def rows_of_authors(log: dict) -> dict[str, dict[str, dict]]:
    rows = {}
    for name, part in AUTHORS.items():
        columns = ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall")
        losses, right, wrong, rouges = (log[part][column] for column in columns)
        rows[name] = {
            i: {
                "loss": loss,
                "wrong_losses": wrong[i],
                "truth_ratio": metrics.truth_ratio(right[i], wrong[i]),
                "rouge": rouges[i],
            }
            for i, loss in losses.items()
        }
    return rows


def rows_of_open_unlearning(log: dict) -> dict[str, dict[str, dict]]:
    def items(key):
        return log[key]["value_by_index"]

    rows = {}
    for name in metrics.SETS:
        right = items(f"{name}_Q_A_PARA_Prob" if name in ("forget", "retain") else f"{name}_Q_A_Prob")
        wrong = items(f"{name}_Q_A_PERT_Prob")
        rows[name] = {
            i: {
                "loss": item["avg_loss"],
                "wrong_losses": wrong[i]["avg_loss"],
                "truth_ratio": metrics.truth_ratio(right[i]["avg_loss"], wrong[i]["avg_loss"]),
                "rouge": items(f"{name}_Q_A_ROUGE")[i]["rougeL_recall"],
            }
            for i, item in items(f"{name}_Q_A_Prob").items()
        }
    return rows


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
def test_scores_of_the_tofu_authors_logs_are_the_published_ones(name):
    utility, parts, forget = PUBLISHED[name]
    scores = metrics.aggregate(rows_of_authors(json.loads(published(name).read_text())))
    assert scores["model_utility"] == pytest.approx(utility, abs=5e-7)
    assert [scores[n] for n in metrics.UTILITY_PARTS] == pytest.approx([v for part in parts for v in part], abs=5e-7)
    assert [scores[n] for n in metrics.FORGET_PARTS] == pytest.approx(forget, abs=5e-7)


@pytest.mark.parametrize("name", PUBLISHED)
def test_per_row_numbers_equal_those_that_the_authors_stored(name):
    log = json.loads(published(name).read_text())
    rows = rows_of_authors(log)
    for short, part in AUTHORS.items():
        for i, item in rows[short].items():
            assert item["truth_ratio"] == pytest.approx(log[part]["truth_ratio"][i], rel=1e-4)
        for i, loss in log[part].get("normalized_gt_loss", {}).items():
            share = metrics.normalised_probability(rows[short][i]["loss"], rows[short][i]["wrong_losses"])
            assert -math.log(share) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name, utility", [("full_forget10", 0.599153), ("retain90", 0.591125)])
def test_scores_of_open_unlearnings_logs_are_the_published_ones(name, utility):
    log = json.loads(published(f"open-unlearning_Llama-3.2-1B_{name}").read_text())
    scores = metrics.aggregate(rows_of_open_unlearning(log))
    assert scores["model_utility"] == pytest.approx(utility, abs=1e-5)
    assert scores["model_utility"] == pytest.approx(log["model_utility"]["agg_value"], abs=1e-5)
    assert scores["forget_truth_ratio"] == pytest.approx(log["forget_truth_ratio"]["agg_value"], abs=1e-5)
    assert scores["forget_probability"] == pytest.approx(log["forget_Q_A_Prob"]["agg_value"], abs=1e-5)


@pytest.mark.parametrize("name", ["llama2-7b_full", "llama2-7b_retain90"])
@pytest.mark.parametrize("part", AUTHORS.values())
def test_rouge_of_the_authors_generations_is_the_stored_one(name, part):
    log = json.loads(published(name).read_text())[part]
    for i, (_, generation, reference) in log["generated_text"].items():
        scores = metrics.rouge(reference, generation)
        assert scores["rouge"] == pytest.approx(log["rougeL_recall"][i], abs=1e-12)
        assert scores["rouge1"] == pytest.approx(log["rouge1_recall"][i], abs=1e-12)


@pytest.mark.parametrize("log", ["full_forget10", "retain90"])
@pytest.mark.parametrize("name", metrics.SETS)
def test_rouge_of_open_unlearnings_generations_is_the_stored_one(log, name):
    stored = json.loads(published(f"open-unlearning_Llama-3.2-1B_{log}").read_text())[f"{name}_Q_A_ROUGE"]["value_by_index"]
    for item in stored.values():
        scores = metrics.rouge(item["ground_truth"], item["generation"])
        expected = {"rouge": item["rougeL_recall"], "rouge_f1": item["rougeL_f1"], "rouge1": item["rouge1_recall"]}
        assert scores == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "generation, degenerate",
    [
        ("", True),
        ("a x", False),  # half of the words are strange, not more
        ("a x y", True),
        ("a b a b a b a", False),  # seven words: too short to go round in circles
        ("a b a b a b a b", True),
        ("a b c a b c a b", True),  # 3 of 7 pairs are different
        ("a b c d a b c d", False),  # 4 of 7
        ("a b c d a b c d a", False),  # 4 of 8: half
        ("a b b a a c b c a c c", False),  # three words only, but 9 of 10 pairs
        ("a b a c a b a c", False),
    ],
)
def test_no_language_is_no_words_strange_words_or_going_round_in_circles(generation, degenerate):
    samples = {"0": ("A b c", "d, a", generation), "1": ("a", "b", "a b c")}
    assert metrics.degenerate_share(samples) == (0.5 if degenerate else 0.0)
