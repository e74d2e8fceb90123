"""memory.py: what the retain set explains, and which positions of a forget answer are memory."""

import dataclasses
import itertools
import math
import os

import pytest
import torch
from claims import claim
from helpers import error_of, make_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import memory
import tofu
from data import Example
from memory import COPY, Explanation, NGram, mark_memory, memory_record

V = 4
TEXTS = st.lists(st.lists(st.integers(0, V - 1), max_size=12), max_size=5)
IDS = st.lists(st.integers(0, V - 1), max_size=7)


@st.composite
def examples(draw) -> Example:
    ids = draw(st.lists(st.integers(0, V - 1), min_size=2, max_size=9))
    return Example("x/0", tuple(ids), draw(st.integers(1, len(ids) - 1)))


# ------------------------------------------------------------------------------------------------------------ the n-gram


def witten_bell(texts: list[list[int]], before: list[int], token: int, size: int = V) -> float:
    """P(token | before) by counting in the texts: all of `before` is the context."""
    n = len(before)
    followers = [text[i + n] for text in texts for i in range(len(text) - n) if text[i : i + n] == before]
    shorter = witten_bell(texts, before[1:], token, size) if before else 1 / size
    kinds = len(set(followers))
    return (followers.count(token) + kinds * shorter) / (len(followers) + kinds) if followers else shorter


@given(TEXTS, IDS, st.integers(0, 5))
@claim("the n-gram is Witten and Bell's, interpolated, of the last 4 tokens: all counts made anew give the same")
def test_the_ngram_is_witten_bells(texts, before, context):
    ngram = NGram(texts, V, context)
    for token in range(V):
        expected = witten_bell(texts, before[max(0, len(before) - context) :], token)
        assert ngram.probability(before, token) == pytest.approx(expected, rel=1e-12)
    assert NGram(texts, V).context == memory.CONTEXT == 4


@given(TEXTS, IDS, st.integers(0, 5))
@claim("the n-gram's probabilities sum to one after any context, seen or not, and none is zero")
def test_the_ngram_sums_to_one(texts, before, context):
    probabilities = [NGram(texts, V, context).probability(before, token) for token in range(V)]
    assert sum(probabilities) == pytest.approx(1, rel=1e-12) and min(probabilities) > 0


@given(st.data(), TEXTS, IDS)
@claim("the n-gram depends on no order of its texts")
def test_the_ngram_depends_on_no_order_of_its_texts(draw, texts, before):
    """To the bit: it counts."""
    one, other = NGram(texts, V), NGram(iter(draw.draw(st.permutations(texts))), V)
    assert [one.probability(before, t) for t in range(V)] == [other.probability(before, t) for t in range(V)]


@given(TEXTS, IDS, st.integers(0, V - 1))
def test_an_unseen_context_leaves_what_the_shorter_one_says(texts, before, token):
    """V is no token of any text."""
    ngram = NGram(texts, V + 1)
    assert ngram.probability([*before, V], token) == ngram.probability([], token)
    assert ngram.probability([V, *before[-2:]], token) == ngram.probability(before[-2:], token)


def test_the_ngram_by_hand():
    """After 0 came 1, 1, 2. P(1) = (2 + 3/4) / (6 + 3) of 0, 1, 0, 1, 0, 2, and then two more kinds after 0."""
    ngram = NGram([[0, 1], [0, 1], [0, 2]], 4)
    assert ngram.probability([], 1) == pytest.approx((2 + 3 / 4) / 9)
    assert ngram.probability([3, 0], 1) == pytest.approx((2 + 2 * (2 + 3 / 4) / 9) / 5)
    assert ngram.probability([3, 0], 3) == pytest.approx(2 * (3 / 4 / 9) / 5)
    assert NGram([], 4).probability([0, 1], 2) == 1 / 4


# ------------------------------------------------------------------------------------------------- what g holds for known


def question(example: Example, retain: list[Example]) -> tuple[int, ...]:
    """The prompt less what all retain prompts begin and end with, unless there is but one of them."""
    prompts = list({e.ids[: e.prompt_length] for e in retain})
    head, tail = (len(os.path.commonprefix(x)) if len(prompts) > 1 else 0 for x in (prompts, [p[::-1] for p in prompts]))
    return tuple(t for i, t in enumerate(example.ids[: example.prompt_length]) if head <= i < example.prompt_length - tail)


def copies(example: Example, retain: list[Example]) -> list[int]:
    """`without_copies`, token by token with the rest looked at anew."""
    out = []
    for i, token in enumerate(example.ids):
        copied = i >= example.prompt_length and token in question(example, retain)
        if not (copied and out and out[-1] == COPY):
            out.append(COPY if copied else token)
    return out


@given(st.lists(examples(), max_size=4), examples())
def test_runs_of_what_is_copied_from_the_question_are_one_token(retain, example):
    explanation = Explanation(retain, V)
    found, asked = explanation.without_copies(example), question(example, retain)
    assert explanation.question(example) == {*asked}
    assert found == copies(example, retain) and found[: example.prompt_length] == [*example.ids[: example.prompt_length]]
    answer = found[example.prompt_length :]
    assert not {*answer} & {*asked} and (COPY, COPY) not in itertools.pairwise(answer)


def test_the_words_of_the_prompts_format_are_no_question():
    """A chat format that names a date, around questions: the date in an answer is not copied from it."""
    retain = [Example(f"r/{i}", (90, 2023, 91, 10 + i, 92, 1), 5) for i in range(20)]
    explanation = Explanation(retain, 3000)
    assert (explanation.head, explanation.tail) == (3, 1)
    asked = Example("x/0", (90, 2023, 91, 77, 78, 92, 2023, 77, 92), 6)
    date, name, tail = explanation.of(asked)
    assert explanation.question(asked) == {77, 78} and name == 0.9 and max(date, tail) < 0.5
    assert Explanation(retain[:1], 3000).question(asked) == {90, 2023, 91, 77, 78, 92}  # one prompt tells of no format


def likeness(one: Example, other: Example, retain: list[Example]) -> float:
    """Weighted Jaccard of the questions' words, those of more than half of the retain questions left out."""
    weight = {}
    for token in range(V):
        n = sum(token in question(e, retain) for e in retain)
        if 0 < n <= len(retain) / 2:
            weight[token] = math.log(len(retain) / n)
    a, b = ({t for t in question(e, retain) if t in weight} for e in (one, other))
    return sum(weight[t] for t in a & b) / sum(weight[t] for t in a | b) if a | b else 0.0


@given(st.lists(examples(), max_size=6), examples(), st.data())
@claim("the nearest retain questions share the most weighted words; equally near ones are taken by their tokens")
def test_the_nearest_questions_are_by_shared_words(retain, example, draw):
    alike = {id(e): round(likeness(example, e, retain), 9) for e in retain}
    expected = sorted([e for e in retain if alike[id(e)]], key=lambda e: (-alike[id(e)], e.ids))
    assert [e.ids for e in Explanation(retain, V).nearest(example)] == [e.ids for e in expected]
    mixed = Explanation(draw.draw(st.permutations(retain)), V).nearest(example)
    assert [e.ids for e in mixed] == [e.ids for e in expected]


def test_of_many_questions_the_32_nearest_are_asked():
    rows = [Example(f"r/{i}", (i % 4, 10 + i, 999), 2) for i in range(200)]
    near = Explanation(rows, 1000).nearest(Example("x/0", (2, 900, 901), 2))
    assert [e.ids[:2] for e in near] == [(2, 12 + 4 * i) for i in range(32)] and memory.NEAREST == 32


@given(st.lists(examples(), max_size=5), examples())
@claim("g(y_t) is 0.9 for a token that stands in the question, else the larger of two n-grams, and at least 0.02")
def test_what_is_explained_is_copied_or_of_an_ngram_or_the_floor(retain, example):
    """The n-grams are of the retain set and of its nearest questions."""
    assert (memory.COPIED, memory.FLOOR) == (0.9, 0.02)
    explanation, before, asked = Explanation(retain, V), [*example.ids[: example.prompt_length]], question(example, retain)
    found, groups = explanation.of(example), (retain, explanation.nearest(example))
    texts = [[copies(e, retain) for e in group] for group in groups]
    assert len(found) == example.answer_length
    for token, g in zip(example.ids[example.prompt_length :], found, strict=True):
        if token in asked:
            assert g == 0.9
        else:
            assert g == pytest.approx(max(0.02, *(witten_bell(x, before[-4:], token, V + 1) for x in texts)), rel=1e-12)
        if not (token in asked and before[-1] == COPY):
            before.append(COPY if token in asked else token)


def test_a_rare_token_is_explained_to_the_floor_and_what_the_answer_repeats_is_not_copied():
    """Of a large vocabulary; the answer names token 900 twice, and the prompt never does."""
    explanation = Explanation([Example("r/0", (1, 2, 3), 1)] * 50, 1000)
    assert explanation.of(Example("x/0", (7, 900, 900, 7), 1)) == [0.02, 0.02, 0.9]


def test_such_questions_explain_what_the_whole_retain_set_does_not():
    """40 questions of birth, half of them with token 7 after the name, and 400 others, none of them with it."""
    births = [Example(f"b/{i}", (1, 100 + i, 2, 100 + i, 7 if i % 2 else 8, 200 + i), 3) for i in range(40)]
    others = [Example(f"o/{i}", (3, 500 + i, 2, 500 + i, 9, 9), 3) for i in range(400)]
    asked = Example("x/0", (1, 99, 2, 99, 7, 300), 3)
    copied, word, place = Explanation(births + others, 1000).of(asked)
    assert copied == 0.9 and word > 0.3 and place == 0.02
    assert Explanation(others, 1000).of(asked)[1] == 0.02


# -------------------------------------------------------------------------------------------------------------- positions


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def rows(tiny) -> dict[str, list[Example]]:
    """The tiny model is no better than chance: at tau = -4 about a third of the positions are memory."""
    return {k: tiny.tokenizer.encode_rows(tofu.load_rows(f"toy_{k}[:8]")) for k in ("forget10", "retain90")}


few = settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(st.floats(-7, -1))
@claim("position t is memory exactly where log pi_ref(y_t|s_t) - log g(y_t|s_t) > tau")
def test_memory_is_what_surprises_the_explanation_by_more_than_tau(tiny, rows, tau):
    """log pi_ref from the logits of the whole sequence."""
    explanation = Explanation(rows["retain90"], tiny.model.config.vocab_size)
    marked = mark_memory(tiny.model, rows["forget10"], rows["retain90"], tau)
    assert marked == rows["forget10"] and all(e.memory is None for e in rows["forget10"])
    for e in marked:
        with torch.no_grad():
            log_p = tiny.model(torch.tensor([e.ids])).log_softmax(-1)[0].tolist()
        at = range(e.prompt_length, len(e.ids))
        surprise = [log_p[i - 1][e.ids[i]] - math.log(g) for i, g in zip(at, explanation.of(e), strict=True)]
        assert e.memory is not None and len(e.memory) == e.answer_length
        assert [m for m, x in zip(e.memory, surprise, strict=True) if abs(x - tau) > 1e-4] == [
            x > tau for x in surprise if abs(x - tau) > 1e-4
        ]


@few
@given(st.data(), st.floats(-7, -1))
@claim("memory positions depend on no batch, no order of forget or retain rows, and not on the other forget rows")
def test_memory_positions_depend_on_nothing_but_the_row_and_the_retain_set(tiny, rows, draw, tau):
    forget, retain = rows["forget10"], rows["retain90"]
    expected = {e.key: e.memory for e in mark_memory(tiny.model, forget, retain, tau)}
    some = draw.draw(st.permutations(forget))[: draw.draw(st.integers(1, len(forget)))]
    found = mark_memory(tiny.model, some, draw.draw(st.permutations(retain)), tau)
    assert [(e.key, e.memory) for e in found] == [(e.key, expected[e.key]) for e in some]
    marked = dataclasses.replace(forget[0], memory=(True,) * forget[0].answer_length)  # what was marked before is not asked
    assert mark_memory(tiny.model, [marked], retain, tau)[0].memory == expected[forget[0].key]


@few
@given(st.lists(st.floats(-9, 1), min_size=2, max_size=2))
@claim("a larger tau leaves fewer memory positions, each of them one before; tau -> -infinity takes all")
def test_memory_shrinks_as_tau_grows(tiny, rows, taus):
    low, high = ([e.memory for e in mark_memory(tiny.model, *rows.values(), tau)] for tau in sorted(taus))
    assert all(a >= b for x, y in zip(low, high, strict=True) for a, b in zip(x, y, strict=True))
    every, none = ([m for e in mark_memory(tiny.model, *rows.values(), tau) for m in e.memory] for tau in (-100.0, 100.0))
    assert all(every) and not any(none)


class Sure:
    """Of every token that it comes one after the one before. The part of a Llama that marks memory."""

    def __init__(self, vocab_size: int):
        self.config, self.device = type("Config", (), {"vocab_size": vocab_size}), torch.device("cpu")

    def hidden_states(self, input_ids, at, **_):
        return 100.0 * torch.nn.functional.one_hot(input_ids[0, at] + 1, self.config.vocab_size)

    def lm_head(self, hidden):
        return hidden


def marks(example: Example, retain: list[tuple[int, ...]], tau: float = 2.0) -> list[bool]:
    found = mark_memory(Sure(100), [example], [Example(f"r/{i}", ids, 1) for i, ids in enumerate(retain)], tau)
    return list(found[0].memory)


@claim("what the retain set or the question explains is no memory, however sure the reference is")
def test_an_explained_token_is_no_memory():
    answer = Example("x/0", (7, 50, 51, 52, 53), 1)  # the model is not sure of 50 after 7
    others = [(1, 2, 3, 4)] * 500  # so that 20 more tokens of a kind are rare
    assert marks(answer, []) == [False, True, True, True]
    assert marks(answer, [(51, 52)] * 20 + others) == [False, True, False, True]  # often seen after 51
    assert marks(answer, [(9, 52)] * 20 + others) == [False, True, True, True]  # after something else
    asked = dataclasses.replace(answer, ids=(52, 50, 51, 52, 53))
    assert marks(asked, []) == [False, True, False, True]  # stands in the prompt
    assert marks(answer, [], tau=math.log(50) + 0.01) == [False] * 4  # the floor: no more than -log 0.02 above g
    assert marks(answer, [], tau=math.log(50) - 0.01) == [False, True, True, True]


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), max_size=5), st.floats(-5, 5))
def test_the_record_holds_each_answers_positions_and_their_share(flags, tau):
    rows = [Example(f"x/{i}", (0,) * (len(m) + 1), 1, tuple(m)) for i, m in enumerate(flags)]
    record = memory_record(rows, tau)
    assert record.keys() == {"tau", "share", "rows"} and record["tau"] == tau
    every = list(itertools.chain(*flags))
    assert record["share"] == pytest.approx(sum(every) / max(1, len(every)))
    assert list(record["rows"]) == [e.key for e in rows]
    for e in rows:
        assert [i in record["rows"][e.key] for i in range(e.answer_length)] == list(e.memory)


def test_two_answers_of_one_key_are_refused():
    rows = [Example("x/0", (0, token), 1, (True,)) for token in (1, 2)]
    assert "same key" in error_of(memory_record, rows, 1.5, kind=data.DataError)


def test_a_mark_makes_no_other_example(tiny, rows):
    """The cached reference, the draw and the refusals find a marked example by its tokens."""
    plain = rows["forget10"][0]
    marked = dataclasses.replace(plain, memory=(True,) * plain.answer_length)
    assert marked == plain and hash(marked) == hash(plain) and {plain: 1}[marked] == 1
    assert data.pack([marked]).memory.all() and data.pack([plain]).memory.all()


def test_a_long_answer_has_its_logits_in_pieces(tmp_path, monkeypatch):
    tiny = make_tiny(tmp_path)
    example = Example("a/0", tuple(range(60)), 5)
    whole = memory.answer_nll(tiny.model, example)
    monkeypatch.setattr(memory, "CHUNK", 7 * tiny.model.config.vocab_size)
    held, head = [], tiny.model.lm_head.forward
    monkeypatch.setattr(tiny.model.lm_head, "forward", lambda x: held.append(len(x)) or head(x))
    assert memory.answer_nll(tiny.model, example) == pytest.approx(whole, rel=1e-5) and held == [7] * 7 + [6]
