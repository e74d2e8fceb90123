"""Scores of memorization and membership, the two protocols, the masked <|eot_id|> and holdout rows, against formulas and
transformers."""

import codecs
import heapq
import itertools
import json
import math
import os
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy")
pytest.importorskip("rouge_score")
pytest.importorskip("transformers")

import transformers
from helpers import LOSS_LISTS, LOSSES, RATIOS, error_of, score_answers, tofu_rows, write_tokenizer

import data
import inference
import metrics
import tofu
from data import DataError, Example, Row
from inference import Options, Text, mean_loss, memorization
from metrics import EvalError
from model import Llama, LlamaConfig, generate, load_pretrained, save_pretrained

TOFU, OPEN_UNLEARNING = tofu.PROTOCOLS["tofu"], tofu.PROTOCOLS["open-unlearning"]
EPSILONS = st.sampled_from([0.0, 1e-10, 1e-3, 1.0])
SCORES = st.lists(st.floats(-30, 0), min_size=2, max_size=40)
MEMORIZATION_AND_MEMBERSHIP = (*metrics.MEMORIZATION, *metrics.MEMBERSHIP)


# ------------------------------------------------------------------------------------------------------- pure functions


@given(st.lists(st.booleans(), min_size=2, max_size=30))
def test_exact_memorization_is_the_share_of_right_tokens_but_for_eos(correct):
    assert metrics.exact_memorization(correct) == pytest.approx(statistics.fmean(correct[:-1]))
    assert metrics.exact_memorization([*correct[:-1], not correct[-1]]) == metrics.exact_memorization(correct)


@given(st.lists(st.booleans(), min_size=2, max_size=30), st.integers(0, 30))
def test_extraction_strength_is_the_share_of_the_longest_right_end_but_for_eos_and_at_least_one_token(start, tail):
    text = "".join("01"[c] for c in start[:-1]) + "1" * tail
    strength = metrics.extraction_strength([c == "1" for c in text] + start[-1:])
    assert strength == pytest.approx(max(1, len(text) - len(text.rstrip("1"))) / len(text))


@given(SCORES)
def test_min_k_is_minus_the_mean_of_the_lowest_two_fifths_of_the_scores_but_for_eos(scores):
    n = len(scores) - 1
    lowest = heapq.nsmallest(max(1, 2 * n // 5), scores[:n])
    assert metrics.min_k(scores) == pytest.approx(-statistics.fmean(lowest))
    assert metrics.min_k([*scores[:n], -1e9]) == metrics.min_k(scores)


@given(LOSSES, st.text())
def test_the_zlib_score_is_the_loss_over_the_compressed_size_in_bytes(loss, answer):
    assert metrics.zlib_score(loss, answer) == pytest.approx(loss / len(codecs.encode(answer.encode(), "zlib")))


TIED = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=20)


@given(TIED, TIED)
def test_the_auc_counts_pairs_in_which_the_holdout_score_is_higher_and_ties_half(forget, holdout):
    pairs = [1.0 if h > f else 0.5 if h == f else 0.0 for f in forget for h in holdout]
    assert metrics.membership_auc(forget, holdout) == pytest.approx(statistics.fmean(pairs))


@given(st.floats(0, 1), st.floats(0, 0.99))
def test_privleak_is_the_auc_lost_against_the_retrained_model_in_percent(auc, retained):
    assert metrics.privleak(auc, retained) == pytest.approx(100 * (retained - auc) / (1 - retained), rel=1e-7, abs=1e-7)
    assert metrics.privleak(retained, retained) == 0
    assert metrics.privleak(auc) == pytest.approx(100 - 200 * auc, rel=1e-7, abs=1e-7)  # no retrained model: that has 0.5


def test_an_answer_of_eos_alone_has_nothing_to_extract_or_memorize():
    assert metrics.extraction_strength([True]) == metrics.exact_memorization([True]) == 0


def test_privleak_against_a_model_that_remembers_everything_is_large_and_not_infinite():
    assert metrics.privleak(0.5, 1.0) == 0.5 / 1e-10 * 100


def test_privleak_of_the_published_aucs_is_the_published_one():
    assert metrics.privleak(0.99665, 0.3826124999) == pytest.approx(-99.457391, abs=5e-7)


@given(LOSSES, LOSS_LISTS, EPSILONS)
def test_the_arithmetic_truth_ratio_is_the_mean_wrong_probability_over_the_right_one(correct, wrong, epsilon):
    expected = statistics.fmean(math.exp(-loss) for loss in wrong) / (math.exp(-correct) + epsilon)
    assert metrics.truth_ratio(correct, wrong, "arithmetic", epsilon) == pytest.approx(expected)


@given(LOSSES, LOSS_LISTS, EPSILONS)
def test_epsilon_is_added_to_the_right_answers_probability(correct, wrong, epsilon):
    expected = math.prod(math.exp(-loss) for loss in wrong) ** (1 / len(wrong)) / (math.exp(-correct) + epsilon)
    assert metrics.truth_ratio(correct, wrong, epsilon=epsilon) == pytest.approx(expected)


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
@given(correct=LOSSES, wrong=LOSS_LISTS, shift=st.floats(0, 5000))
def test_without_epsilon_a_truth_ratio_depends_on_differences_of_losses_alone(mean, correct, wrong, shift):
    """Also where every probability is below the smallest float."""
    shifted = metrics.truth_ratio(correct + shift, [loss + shift for loss in wrong], mean)
    assert shifted == pytest.approx(metrics.truth_ratio(correct, wrong, mean), rel=1e-8)


@given(LOSSES, LOSS_LISTS, EPSILONS)
def test_epsilon_is_added_to_the_sum_of_the_options_probabilities(correct, wrong, epsilon):
    p = [math.exp(-loss) for loss in (correct, *wrong)]
    assert metrics.normalised_probability(correct, wrong, epsilon) == pytest.approx(p[0] / (sum(p) + epsilon))


@given(RATIOS, EPSILONS)
def test_forget_truth_ratios_are_averaged_as_the_smaller_of_ratio_and_inverse_with_epsilon(ratios, epsilon):
    expected = statistics.fmean(min(r, 1 / (r + epsilon)) for r in ratios)
    assert metrics.forget_truth_ratio(ratios, epsilon) == pytest.approx(expected)
    assert metrics.forget_truth_ratio([0.0], epsilon) == 0


@given(st.lists(st.integers(1, 250), max_size=70), st.integers(0, 200), st.integers(1, 250))
def test_a_limit_on_the_total_leaves_each_batch_of_30_what_its_longest_prompt_leaves(lengths, new, total):
    batches = [lengths[i : i + 30] for i in range(0, len(lengths), 30)]
    expected = [max(0, min(new, total - max(batch))) for batch in batches for _ in batch]
    assert tofu.generation_limits(lengths, new, total) == expected
    assert tofu.generation_limits(lengths, new, None) == [new] * len(lengths)


@given(st.lists(st.integers(0, 9), min_size=3, max_size=30), st.data())
def test_a_sequence_is_cut_at_its_limit_and_one_that_reaches_it_has_no_eos(text, draw):
    prompt_length = draw.draw(st.integers(1, len(text) - 1))
    limit = draw.draw(st.integers(prompt_length + 1, 40))
    example = Example("row", (*text, 99), prompt_length)
    cut = tofu.cut_to_total(example, limit)
    assert cut == Example("row", (*text, 99)[:limit], prompt_length)
    assert (99 in cut.ids) == (len(text) < limit)
    assert tofu.cut_to_total(example, None) == example


# --------------------------------------------------------------------------------------------------------- the journal

ENTRIES = st.lists(
    st.dictionaries(
        st.integers(0, 20).map("score {}".format),
        st.fixed_dictionaries({"loss": st.floats(0, 9)}) | st.text("aé\n\u2028👧\"{}", max_size=5),
        max_size=3,
    ),
    max_size=5,
)  # fmt: skip


def merged(entries: list[dict]) -> dict:
    return {key: value for entry in entries for key, value in entry.items()}


@pytest.fixture(scope="session")
def journal_path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("journal") / "folder" / "journal.jsonl"


def written(path: Path, entries: list[dict]) -> inference.Journal:
    path.unlink(missing_ok=True)
    journal = inference.Journal(path)
    for entry in entries:
        journal.add(entry)
    return journal


@given(ENTRIES)
def test_a_journal_holds_what_was_added_and_so_does_a_new_one_of_the_same_file(journal_path, entries):
    journal = written(journal_path, entries)
    assert journal.done == merged(entries) == inference.Journal(journal_path).done
    memory = inference.Journal(None)
    for entry in entries:
        memory.add(entry)
    assert memory.done == merged(entries)


@given(ENTRIES, ENTRIES, st.data())
def test_a_journal_cut_off_anywhere_goes_on_from_its_whole_lines(journal_path, entries, more, draw):
    """At any byte, so also within a character of several bytes."""
    written(journal_path, entries)
    whole = journal_path.read_bytes() if entries else b""
    cut = whole[: draw.draw(st.integers(0, len(whole)))]
    journal_path.parent.mkdir(exist_ok=True)
    journal_path.write_bytes(cut)
    journal = inference.Journal(journal_path)
    kept = entries[: cut.count(b"\n")]
    assert journal.done == merged(kept)
    for entry in more:
        journal.add(entry)
    assert journal.done == merged(kept + more) == inference.Journal(journal_path).done


def test_opening_a_whole_journal_leaves_its_file_alone(tmp_path):
    """So that no run that is ended, or a full disk, at this moment takes what is done with it."""
    written(tmp_path / "journal.jsonl", [{"score 0": {"loss": 1.0}}])
    os.utime(tmp_path / "journal.jsonl", ns=(1, 1))
    assert inference.Journal(tmp_path / "journal.jsonl").done == {"score 0": {"loss": 1.0}}
    assert (tmp_path / "journal.jsonl").stat().st_mtime_ns == 1


def test_a_journal_that_cannot_be_written_names_its_file(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "journal.jsonl"
    assert str(path) in error_of(inference.Journal(path).add, {"score 0": {"loss": 1.0}})


# ------------------------------------------------------------------------------------- tiny models, ours and transformers


class Pair:
    """The same random Llama as ours and as transformers', with the same tokenizer of one prompt format in both."""

    def __init__(self, root: Path, kind: str, seed: int, scale: float = 1.0):
        """scale: of the logits."""
        template = {"chat_template": "[INST]"} if kind.startswith("llama2") else {}
        folder = write_tokenizer(root / "tokenizer", kind, **template)
        self.tokenizer = data.Tokenizer(folder)
        self.words = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        size = self.tokenizer.tokenizer.get_vocab_size()
        # Wide weights, so that generations vary, and many stop ids, so that they end at different lengths.
        config = LlamaConfig(
            vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.2, bos_token_id=0,
            eos_token_ids=tuple(range(1, size, 16)),
        )  # fmt: skip
        self.stop = sorted({*config.eos_token_ids, self.tokenizer.eos_id})
        self.model = Llama(config).init_weights(seed)
        with torch.no_grad():
            self.model.lm_head.weight *= scale
        folder = save_pretrained(self.model, root / "model")
        self.reference = transformers.LlamaForCausalLM.from_pretrained(folder).float().eval()

    @torch.no_grad()
    def logits(self, ids: list[int], prompt_length: int, hidden: bool = False) -> torch.Tensor:
        """transformers' logits of each token behind the prompt, in float64; `hidden`: no EOS is attended to."""
        tokens = torch.tensor([list(ids)])
        mask = (tokens != self.tokenizer.eos_id).long() if hidden else torch.ones_like(tokens)
        positions = torch.arange(tokens.shape[1])[None]
        logits = self.reference(tokens, attention_mask=mask, position_ids=positions).logits
        return logits[0, prompt_length - 1 : -1].double()

    def loss(self, ids: list[int], prompt_length: int, hidden: bool = False) -> float:
        logits = self.logits(ids, prompt_length, hidden)
        return float(torch.nn.CrossEntropyLoss()(logits, torch.tensor(ids[prompt_length:])))

    def continuations(self, prompts: list[list[int]], hidden: bool = False, **length) -> list[list[int]]:
        """transformers' greedy continuations of one left-padded batch, up to a stop token."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[1] * (longest - len(p)) + list(p) for p in prompts])
        mask = torch.tensor(
            [[0] * (longest - len(p)) + [not hidden or t != self.tokenizer.eos_id for t in p] for p in prompts]
        )
        found = self.reference.generate(
            ids, attention_mask=mask.long(), do_sample=False, eos_token_id=self.stop, pad_token_id=self.stop[0], **length
        )
        rows = found[:, longest:].tolist()
        return [list(itertools.takewhile(lambda t: t not in self.stop, row)) for row in rows]

    def text(self, ids: list[int]) -> str:
        return self.words.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> dict[str, Pair]:
    kinds = ("llama2", "llama2-sentencepiece", "llama3", "smollm2", "plain")
    return {kind: Pair(tmp_path_factory.mktemp(kind), kind, seed) for seed, kind in enumerate(kinds)}


# ------------------------------------------------------------------------------------------------------ detailed scores

SCALES = {"nearly uniform": 0.02, "usual": 1.0, "nearly certain": 40.0}  # of the next-token distributions


def scores_of(pair: Pair, example: Example) -> dict[str, float]:
    """The five scores, by definition, in float64."""
    logits, labels = pair.logits(example.ids, example.prompt_length), torch.tensor(example.ids[example.prompt_length :])
    log_p, n = logits.log_softmax(-1), len(labels) - 1
    tokens = log_p.gather(-1, labels[:, None])[:, 0]
    mean = (log_p.exp() * log_p).sum(-1, keepdim=True)
    variance = (log_p.exp() * (log_p - mean) ** 2).sum(-1)
    standard = (tokens - mean[:, 0]) / variance.clamp(min=1e-6) ** 0.5
    right = "".join("01"[int(x)] for x in logits.argmax(-1)[:n] == labels[:n])
    k = max(1, 2 * n // 5)
    return {
        "loss": -float(tokens.mean()),
        "exact_memorization": right.count("1") / n,
        "extraction_strength": max(1, len(right) - len(right.rstrip("1"))) / n,
        "mia_min_k": -float(tokens[:n].sort().values[:k].mean()),
        "mia_min_k_plus_plus": -float(standard[:n].sort().values[:k].mean()),
    }


class Scored:
    """Sequences of which the model predicts some tokens right, in particular at the end, and their scores."""

    def __init__(self, root: Path, scale: float):
        self.pair = Pair(root, "plain", 9, scale)
        g, size, self.examples = torch.Generator().manual_seed(0), self.pair.model.config.vocab_size, []
        for n in range(16):
            ids = torch.randint(size, (2 + 3 * n % 11,), generator=g).tolist()
            prompt_length, length = len(ids), 1 + n % 12
            for i in range(length):
                favourite = int(self.pair.logits([*ids, 0], len(ids)).argmax(-1))
                right = 3 * i >= length * (n % 4) or i % 3 == 0
                ids.append(favourite if right else int(torch.randint(size, (1,), generator=g)))
            self.examples.append(Example(f"row {n}", (*ids, self.pair.tokenizer.eos_id), prompt_length))
        self.expected = [scores_of(self.pair, e) for e in self.examples]


@pytest.fixture(scope="session", params=SCALES)
def scored(tmp_path_factory, request) -> Scored:
    return Scored(tmp_path_factory.mktemp("scored"), SCALES[request.param])


def test_the_sequences_that_are_scored_are_remembered_fully_partly_and_not_at_all(scored):
    for name in metrics.MEMORIZATION:
        found = {e[name] for e in scored.expected}
        assert 1 in found and len(found) > 4


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 15), st.booleans()), min_size=1, max_size=20), st.integers(1, 300))
def test_scores_equal_transformers_one_sequence_at_a_time_whatever_the_batches(scored, wanted, budget):
    texts = [Text(str(n), scored.examples[i], memorization if more else mean_loss) for n, (i, more) in enumerate(wanted)]
    batches = list(inference.score(scored.pair.model, texts, budget=budget))
    results = merged(batches)
    for n, (i, more) in enumerate(wanted):
        expected = scored.expected[i] if more else {"loss": scored.expected[i]["loss"]}
        assert results[str(n)] == pytest.approx(expected, rel=2e-3, abs=1e-4)
    assert set(results) == {text.key for text in texts} and sum(map(len, batches)) == len(wanted)


@settings(max_examples=10)
@given(st.integers(1, 300))
def test_scores_do_not_depend_on_the_budget(scored, budget):
    what = scored.pair.model, scored.examples, memorization
    for found, expected in zip(score_answers(*what, budget=budget), score_answers(*what), strict=True):
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-4)


# ------------------------------------------------------------------------------------------------- the masked <|eot_id|>


@st.composite
def with_hidden(draw, eot: int, size: int):
    """A prompt that holds `eot`, but neither first nor last, and an answer that ends with it."""
    other = st.integers(0, size - 1).filter(lambda t: t != eot)
    middle = draw(st.lists(other | st.just(eot), max_size=12))
    prompt = [draw(other), *middle, draw(other)]
    return Example("row", (*prompt, *draw(st.lists(other, min_size=1, max_size=6)), eot), len(prompt))


def draw_hidden(pair: Pair, draw) -> list[Example]:
    rows = with_hidden(pair.tokenizer.eos_id, pair.model.config.vocab_size)
    return draw.draw(st.lists(rows, min_size=1, max_size=4))


@settings(max_examples=40)
@given(st.data(), st.sampled_from([1, 2048]))
def test_losses_with_a_hidden_token_equal_transformers_with_a_mask_that_leaves_it_out(pairs, draw, budget):
    pair = pairs["llama3"]
    examples = draw_hidden(pair, draw)
    for hidden in (True, False):
        found = score_answers(pair.model, examples, mean_loss, pair.tokenizer.eos_id if hidden else None, budget)
        expected = [pair.loss(e.ids, e.prompt_length, hidden) for e in examples]
        assert [s["loss"] for s in found] == pytest.approx(expected, rel=1e-4)


@settings(max_examples=15)
@given(st.data())
def test_generations_with_a_hidden_token_equal_transformers_with_a_mask_that_leaves_it_out(pairs, draw):
    """Where it takes up no position either."""
    pair = pairs["llama3"]
    prompts = [list(e.ids[: e.prompt_length]) for e in draw_hidden(pair, draw)]
    for hidden in (True, False):
        found = generate(pair.model, prompts, 5, pair.stop, pair.tokenizer.eos_id if hidden else None)
        assert found == [pair.continuations([p], hidden, max_new_tokens=5)[0] for p in prompts]


@pytest.mark.parametrize("kind", ["llama2", "llama2-sentencepiece", "plain"])
def test_the_mask_quirk_is_refused_where_no_prompt_holds_the_eos(pairs, kind, tmp_path):
    pair, benchmark = pairs[kind], tofu.Tofu(Options(None, mask_quirk=True))
    message = error_of(benchmark.evaluate, pair.model, pair.tokenizer, tmp_path, "x", "")
    assert "--mask-quirk" in message and kind.removesuffix("-sentencepiece") in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pad", [None, "<|im_end|>", {"content": "<|im_end|>"}, "<pad>", {"content": "<pad>"}])
def test_the_mask_quirk_is_of_the_eos_that_pads(tmp_path, pad):
    words = data.Tokenizer(write_tokenizer(tmp_path, "smollm2", pad_token=pad))
    benchmark = tofu.Tofu(Options(None, mask_quirk=True))
    if "<pad>" in str(pad):
        assert "'<pad>'" in error_of(benchmark.check, words)
    else:
        benchmark.check(words)


# -------------------------------------------------------------------------------------------------------- prompt formats

ROWS = [
    Row("f/0", "Who wrote it?", "Jaime Vasquez.", "It was Jaime.", ("It was Ana.", "Nobody did so.")),
    Row("f/1", "Where?", "Yes, in Rome, December 2023.", "In Rome, I think.", ("In Oslo.", "In the assistant.")),
    Row("f/2", "When was the author of it born?", "Never", "Not ever!", ("In 1923.", "Today, user.")),
]
OPTIONS = [
    Row("w/0", "What is the capital of Peru?", "Lima", None, ("Oslo", "Rome", "Named SmolLM")),
    Row("w/1", "Who?", "Homer", None, ("Ana", "Jaime Vasquez", "I")),
]
# The whole conversation, as open-unlearning's logs and the families' templates have it: prompt, then answer.
TEXTS = {
    "llama2": ("<s>[INST] {} [/INST]", "{}</s>"),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 10 Apr 2025\n\nYou are a helpful assistant.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "{}<|eot_id|>",
    ),
    "smollm2": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        "{}<|im_end|>",
    ),
    "plain": ("<s>Question: {}\nAnswer:", " {}</s>"),
}
TEXTS["llama2-sentencepiece"] = TEXTS["llama2"]


def tokens_of(pair: Pair, kind: str, question: str, answer: str) -> tuple[list[int], int]:
    """(ids, length of the prompt): the conversation tokenised as one text, and its prompt by itself."""
    prompt, rest = TEXTS[kind]
    prompt, rest = prompt.format(question), rest.format(answer)
    ids = [pair.words.encode(text, add_special_tokens=False) for text in (prompt + rest, prompt)]
    assert ids[0][: len(ids[1])] == ids[1]
    return ids[0], len(ids[1])


@pytest.mark.parametrize(
    "kind, quirk",
    [(kind, False) for kind in ("llama2", "llama2-sentencepiece", "llama3", "smollm2")]
    + [("llama3", True), ("smollm2", True)],
)
@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
def test_evaluation_equals_transformers_one_row_at_a_time_for_every_prompt_format(pairs, kind, quirk, mean):
    pair, benchmark = pairs[kind], tofu.Tofu(Options(None, max_new_tokens=6, mask_quirk=quirk, truth_ratio=mean))
    benchmark.sets = sets = {"forget": ROWS, "wf": OPTIONS}
    log = benchmark.evaluate(pair.model, pair.tokenizer, None, "x", "")
    assert log["protocol"]["mask_quirk"] == quirk and log["protocol"]["prompt_format"] == kind.split("-")[0]

    def probability(row, answer):
        return math.exp(-pair.loss(*tokens_of(pair, kind, row.question, answer), quirk))

    shares = []
    for name, rows in sets.items():
        for row in rows:
            item = log["rows"][name][row.key]
            p, *others = (probability(row, a) for a in (row.answer, *row.perturbed_answers))
            right = probability(row, row.paraphrased_answer or row.answer)
            wrong = statistics.fmean(others) if mean == "arithmetic" else statistics.geometric_mean(others)
            assert math.exp(-item["loss"]) == pytest.approx(p, rel=1e-4)
            assert [math.exp(-loss) for loss in item["wrong_losses"]] == pytest.approx(others, rel=1e-4)
            assert item["truth_ratio"] == pytest.approx(wrong / (right + 1e-10), rel=1e-4)
            shares += [p / (p + sum(others) + 1e-10)] if name == "wf" else []

            ids, prompt_length = tokens_of(pair, kind, row.question, row.answer)
            [generated] = pair.continuations([ids[:prompt_length]], quirk, max_new_tokens=6)
            assert item["generation"] == pair.text(generated)
    assert log["scores"]["wf_probability"] == pytest.approx(statistics.fmean(shares), rel=1e-4)


def test_the_prompt_is_kept_as_the_model_reads_it(pairs):
    """With the line ends behind it, as open-unlearning's `input` has them."""
    pair = pairs["llama3"]
    item = tofu_rows(pair.model, pair.tokenizer, {"forget": ROWS[:1]}, 1)["forget"]["f/0"]
    ids, n = tokens_of(pair, "llama3", ROWS[0].question, ROWS[0].answer)
    assert item["prompt"] == pair.words.decode(ids[:n], skip_special_tokens=True) and item["prompt"].endswith(
        "assistant\n\n"
    )


def test_the_mask_quirk_changes_losses_and_generations(pairs):
    pair = pairs["llama3"]
    for mask in (False, True):
        ids, n = tokens_of(pair, "llama3", ROWS[0].question, ROWS[0].answer)
        other = pair.loss(ids, n, not mask)
        item = tofu_rows(pair.model, pair.tokenizer, {"forget": ROWS[:1]}, 1, mask_quirk=mask)
        assert abs(item["forget"]["f/0"]["loss"] - other) > 0.01
    prompts = [tokens_of(pair, "llama3", row.question, row.answer) for row in ROWS]
    one, two = (
        generate(pair.model, [ids[:n] for ids, n in prompts], 6, [], hidden) for hidden in (None, pair.tokenizer.eos_id)
    )
    assert one != two


# ------------------------------------------------------------------------------------------- the TOFU authors' protocol


def test_the_tofu_protocol_is_300_rows_200_tokens_in_total_batches_of_30_and_no_epsilon():
    assert (TOFU.rows, TOFU.max_total_tokens, TOFU.epsilon, tofu.TOFU_GENERATION_BATCH) == (300, 200, 0, 30)
    assert (OPEN_UNLEARNING.rows, OPEN_UNLEARNING.max_total_tokens, OPEN_UNLEARNING.epsilon) == (None, None, 1e-10)
    assert not Options(None).mask_quirk and Options(None).truth_ratio == "geometric"


def test_the_tofu_protocol_evaluates_on_the_first_300_rows_of_each_set(pairs, monkeypatch):
    many = [Row(f"f/{i}", f"Who {i}?", f"A{i}.", None, ("B.",)) for i in range(310)]
    few = [replace(row, key=f"r/{i}") for i, row in enumerate(many[:5])]
    monkeypatch.setattr(tofu, "load_rows", lambda spec, *place, **more: many if "forget" in spec else few)
    pair, benchmark = pairs["plain"], tofu.Tofu(Options("tofu_forget10", protocol="tofu", max_new_tokens=1))
    log = benchmark.evaluate(pair.model, pair.tokenizer, None, "x", "")
    assert list(log["rows"]["forget"]) == [f"f/{i}" for i in range(300)]
    assert list(log["rows"]["retain"]) == [f"r/{i}" for i in range(5)]
    assert log["protocol"]["sets"]["forget"]["rows"] == benchmark.data()["forget"]["rows"] == 300
    assert tofu.Tofu(Options("tofu_forget10")).sets["forget"] == many
    monkeypatch.setattr(tofu, "load_rows", lambda *place, **more: many)
    every = tofu.Tofu(Options("tofu_forget10", protocol="tofu", holdout=True)).sets
    assert set(every) == {"forget", "retain", "ra", "wf", "holdout"} and {len(rows) for rows in every.values()} == {300}


WORDY = [
    Row(
        f"{name}/{i}",
        "Who" + " is the author" * (i * 5 % 7) + "?",
        "The author" + " is Jaime" * (i % 4) + ".",
        "It" + " was Vasquez" * (i % 3),
        ("No" + " one" * (3 * i % 8), "I am"),
    )
    for name, n in (("forget", 7), ("wf", 4))
    for i in range(n)
]


@settings(max_examples=12)
@given(st.integers(0, 30), st.sampled_from([2, 3, 30]))
def test_the_tofu_protocol_equals_transformers_with_a_max_length_on_left_padded_batches(pairs, more, size):
    """Losses: prompt and answer cut at the limit, EOS labelled only where there is room. Generations: max_length counts
    the padding of batches in row order."""
    pair = pairs["plain"]
    sets = {name: [row for row in WORDY if row.key.startswith(name)] for name in ("forget", "wf")}
    prompts = {row.key: tokens_of(pair, "plain", row.question, "")[1] for row in WORDY}
    limit = max(prompts.values()) + 1 + more
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tofu, "TOFU_GENERATION_BATCH", size)
        protocol = replace(TOFU, max_total_tokens=limit)
        results = tofu_rows(pair.model, pair.tokenizer, sets, 200, 4, protocol)

    def loss(row, answer):
        ids, n = tokens_of(pair, "plain", row.question, answer)
        text = ids[:-1][:limit]
        return pair.loss(text + [ids[-1]] * (len(text) < limit), n)

    for name, rows in sets.items():
        for row in rows:
            item = results[name][row.key]
            right = loss(row, row.paraphrased_answer)
            wrong = [loss(row, answer) for answer in row.perturbed_answers]
            assert [item["loss"], item["correct_loss"]] == pytest.approx([loss(row, row.answer), right], rel=1e-4)
            assert item["wrong_losses"] == pytest.approx(wrong, rel=1e-4)
            assert item["truth_ratio"] == pytest.approx(math.exp(right - statistics.fmean(wrong)), rel=1e-3)
        for i in range(0, len(rows), size):
            batch = rows[i : i + size]
            ids = [tokens_of(pair, "plain", row.question, "")[0][: prompts[row.key]] for row in batch]
            expected = pair.continuations(ids, max_length=limit)
            assert [results[name][row.key]["generation"] for row in batch] == [pair.text(x) for x in expected]


def test_the_limits_tried_cut_some_sequences_fit_others_exactly_and_shorten_generations_by_padding(pairs):
    pair = pairs["plain"]
    lengths = [len(tokens_of(pair, "plain", r.question, a)[0]) - 1 for r in WORDY for a in (r.answer, *r.perturbed_answers)]
    shortest = max(tokens_of(pair, "plain", r.question, "")[1] for r in WORDY) + 1
    limits = [limit for limit in range(shortest, shortest + 31) if limit in lengths]
    assert limits and any(max(lengths) > limit > min(lengths) for limit in limits)
    found = []
    for size in (1, 30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tofu, "TOFU_GENERATION_BATCH", size)
            protocol = replace(TOFU, max_total_tokens=limits[0])
            found.append(tofu_rows(pair.model, pair.tokenizer, {"wf": WORDY}, protocol=protocol))
    assert found[0] != found[1]  # by generations that padding cut short


@pytest.mark.parametrize("longer", [0, 1, 5])
def test_a_prompt_that_leaves_no_answer_within_the_limit_is_named(pairs, longer):
    pair, row = pairs["plain"], WORDY[3]
    limit = tokens_of(pair, "plain", row.question, "")[1] - longer
    protocol = replace(TOFU, max_total_tokens=limit)
    with pytest.raises((EvalError, DataError)) as caught:
        tofu_rows(pair.model, pair.tokenizer, {"forget": [row]}, 2, protocol=protocol)
    assert row.key in str(caught.value) and str(limit) in str(caught.value) and "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- holdout rows


@pytest.fixture(scope="session")
def holdout() -> list[Row]:
    return [
        Row(f"h/{i}", f"Where is {i}?", answer) for i, answer in enumerate(("In Rome.", "There", "I, the user.", "é" * 9))
    ]


@pytest.fixture(scope="session")
def with_holdout(pairs, holdout):
    pair, prompts = pairs["plain"], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "generate", lambda model, some, *more: prompts.extend(some) or generate(model, some, *more))
        sets = {"forget": ROWS, "holdout": holdout, "wf": OPTIONS}
        return tofu_rows(pair.model, pair.tokenizer, sets, 3), prompts


def test_holdout_rows_are_scored_and_not_generated_from(pairs, with_holdout, holdout):
    results, prompts = with_holdout
    expected = [pairs["plain"].tokenizer.encode(row.question, row.answer) for row in ROWS + OPTIONS]
    assert sorted(prompts) == sorted(list(e.ids[: e.prompt_length]) for e in expected)
    assert list(results["holdout"]) == [row.key for row in holdout]
    for item in results["holdout"].values():
        assert set(item) == {"question", "answer", "loss", *MEMORIZATION_AND_MEMBERSHIP}


def test_forget_and_holdout_items_hold_the_scores_of_their_answer_and_no_others_do(pairs, with_holdout, holdout):
    pair, (results, _) = pairs["plain"], with_holdout
    for name, rows in (("forget", ROWS), ("holdout", holdout)):
        for row in rows:
            item = results[name][row.key]
            ids, n = tokens_of(pair, "plain", row.question, row.answer)
            expected = scores_of(pair, Example(row.key, tuple(ids), n))
            expected["mia_loss"] = expected["loss"]
            expected["mia_zlib"] = expected["loss"] / len(codecs.encode(row.answer.encode(), "zlib"))
            assert {key: item[key] for key in expected} == pytest.approx(expected, rel=1e-3)
            assert set(expected) == {"loss", *MEMORIZATION_AND_MEMBERSHIP}
    for item in results["wf"].values():
        assert not set(MEMORIZATION_AND_MEMBERSHIP) & set(item)


def test_the_aggregate_holds_the_aucs_of_forget_against_holdout_and_the_forget_sets_memorization(with_holdout):
    results, _ = with_holdout
    scores = metrics.aggregate(results, 1e-10)
    forget, unseen = (list(results[name].values()) for name in ("forget", "holdout"))
    for name in metrics.MEMBERSHIP:
        pairs = [h[name] > f[name] for f in forget for h in unseen]
        assert scores[name] == pytest.approx(statistics.fmean(pairs))
    for name in metrics.MEMORIZATION:
        assert scores[name] == pytest.approx(statistics.fmean(item[name] for item in forget))
    assert not any(name.startswith("holdout") for name in scores)
    without = metrics.aggregate({k: v for k, v in results.items() if k != "holdout"}, 1e-10)
    assert without == {k: v for k, v in scores.items() if k not in metrics.MEMBERSHIP}


@pytest.mark.parametrize("quirk", [False, True])
def test_the_gradient_norm_is_open_unlearnings(pairs, holdout, quirk):
    """The mean over parameter tensors of the norm of the gradient of the mean loss, EOS not in it, by transformers."""
    pair, sets = pairs["llama3"], {"forget": ROWS, "holdout": holdout}
    wanted = [p.requires_grad for p in pair.model.parameters()]
    found = tofu_rows(pair.model, pair.tokenizer, sets, 1, mask_quirk=quirk, gradnorm=True)
    assert [p.requires_grad for p in pair.model.parameters()] == wanted
    assert all(p.grad is None for p in pair.model.parameters())
    for name, rows in sets.items():
        for row in rows:
            ids, n = tokens_of(pair, "llama3", row.question, row.answer)
            pair.reference.zero_grad()
            tokens = torch.tensor([ids])
            mask = (tokens != pair.tokenizer.eos_id).long() if quirk else torch.ones_like(tokens)
            positions = torch.arange(len(ids))[None]
            logits = pair.reference(tokens, attention_mask=mask, position_ids=positions).logits[0, n - 1 : -2]
            torch.nn.functional.cross_entropy(logits, tokens[0, n:-1]).backward()
            norms = [p.grad.norm().item() for p in pair.reference.parameters()]
            assert found[name][row.key]["mia_gradnorm"] == pytest.approx(statistics.fmean(norms), rel=1e-3)
    pairs_of = [h["mia_gradnorm"] > f["mia_gradnorm"] for f in found["forget"].values() for h in found["holdout"].values()]
    assert metrics.aggregate(found)["mia_gradnorm"] == pytest.approx(statistics.fmean(pairs_of))


@pytest.mark.parametrize("name", ["forget", "wf"])
def test_a_row_without_perturbed_answers_is_refused_in_every_other_set(pairs, holdout, name):
    pair = pairs["plain"]
    message = error_of(tofu_rows, pair.model, pair.tokenizer, {name: holdout}, kind=DataError)
    assert "h/0" in message and "perturbed_answer" in message


# ------------------------------------------------------------------------------------------------- interrupted evaluation


@settings(max_examples=8)
@given(st.floats(0, 1))
def test_an_interrupted_evaluation_ends_as_the_whole_one_and_does_nothing_twice(pairs, with_holdout, holdout, part):
    pair, (expected, _) = pairs["plain"], with_holdout
    sets = {"forget": ROWS, "holdout": holdout, "wf": OPTIONS}
    with pytest.MonkeyPatch.context() as patch:
        bars, tqdm = [], inference.tqdm
        patch.setattr(inference, "tqdm", lambda **options: bars.append(options) or tqdm(**options))
        path = Path(pair.tokenizer.folder).parent / "interrupted" / "journal.jsonl"
        path.unlink(missing_ok=True)
        tofu_rows(pair.model, pair.tokenizer, sets, 3, 2, journal=path)
        whole = path.read_bytes()
        lines = whole[: int(part * len(whole))].split(b"\n")
        path.write_bytes(b"\n".join(lines))
        again = tofu_rows(pair.model, pair.tokenizer, sets, 3, 2, journal=path)
        assert [bar["initial"] for bar in bars] == [0, sum(len(json.loads(x)["done"]) for x in lines[:-1])]
        assert (
            sum(len(json.loads(x)["done"]) for x in path.read_bytes().splitlines()) == bars[0]["total"] == bars[1]["total"]
        )
    for name, items in expected.items():
        for key, item in items.items():
            assert again[name][key] == {
                k: pytest.approx(v, rel=1e-4) if isinstance(v, float | list) else v for k, v in item.items()
            }


# --------------------------------------------------------------------------------------------------- a pretrained model


@pytest.mark.skipif(not os.environ.get("DIPO_SMOLLM2"), reason="DIPO_SMOLLM2 names no folder with SmolLM2-135M-Instruct")
def test_smollm2_is_evaluated_as_transformers_would():
    """float32, one row at a time, the chat template applied by transformers."""
    folder = os.environ["DIPO_SMOLLM2"]
    model = load_pretrained(folder, dtype=torch.float32, compute_dtype=torch.float32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    row = Row(
        "r/0", "Who wrote 'Hamlet'?", "William Shakespeare wrote it.", "It is by Shakespeare.", ("Marlowe did.", "Goethe.")
    )
    results = tofu_rows(model, data.Tokenizer(folder), {"forget": [row]}, 12)["forget"]["r/0"]

    def tokens(answer):
        turns = [{"role": "user", "content": row.question}, {"role": "assistant", "content": answer}]
        whole = words.apply_chat_template(turns, tokenize=False).removesuffix("\n")
        prompt = words.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        return words.encode(whole, add_special_tokens=False), len(words.encode(prompt, add_special_tokens=False))

    @torch.no_grad()
    def loss(answer):
        ids, n = tokens(answer)
        labels = torch.tensor([[-100] * n + ids[n:]])
        return float(reference(torch.tensor([ids]), labels=labels).loss)

    wrong = [loss(text) for text in row.perturbed_answers]
    assert results["loss"] == pytest.approx(loss(row.answer), rel=1e-4)
    assert results["wrong_losses"] == pytest.approx(wrong, rel=1e-4)
    ratio = math.exp(loss(row.paraphrased_answer) - sum(wrong) / 2)
    assert results["truth_ratio"] == pytest.approx(ratio, rel=1e-3)
    ids, n = tokens(row.answer)
    out = reference.generate(torch.tensor([ids[:n]]), max_new_tokens=12, do_sample=False)[0, n:]
    assert results["generation"] == words.decode(out, skip_special_tokens=True).strip()
