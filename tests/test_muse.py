"""MUSE: files in every layout, running text cut into sequences, the numbers against independent ones, running a model."""

import dataclasses
import functools
import json
import math
import os
import statistics
import sys
from pathlib import Path

import pytest
import torch
from claims import claim
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("scipy")
pytest.importorskip("rouge_score")

import helpers
from helpers import score_answers, write_tokenizer
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats

import data
import inference
import logs
import metrics
import muse
import toy
from data import DataError
from inference import Options, memorization
from metrics import EvalError
from model import Llama

error_of = functools.partial(helpers.error_of, kind=DataError)

LETTERS = st.sampled_from("abcdefgh A.,'?\n\né👩")
TEXTS = st.lists(st.text(LETTERS, max_size=60), min_size=1, max_size=4).filter(lambda texts: "".join(texts).strip())
LENGTHS = st.integers(2, 12)
LOG_PROBS = st.lists(st.floats(-30, 0), min_size=3, max_size=60)
SCORES = st.lists(st.integers(-20, 20).map(float), min_size=1, max_size=12)
SENTENCES = st.text(st.sampled_from("abc XYZ running runs ran's\n.,é1"), max_size=60)
ALL = [(config, split) for config, splits in muse.MUSE_SPLITS.items() for split in splits]


def rows_of(config: str, n: int = 3) -> list[dict[str, str]]:
    return [{column: f"{column} é\n\n{i}" for column in muse.MUSE_COLUMNS[config]} for i in range(n)]


# --------------------------------------------------------------------------------------------------------------- files


def write_json(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def no_hub(monkeypatch):
    """The hub gives nothing, at once."""

    def unreachable(repo, name, remedy):
        raise DataError(f"{repo}/{name}: the hub gave nothing; {remedy}")

    monkeypatch.setattr(inference, "hub_file", unreachable)


@pytest.mark.parametrize("config, split", ALL)
@pytest.mark.parametrize("ending", ["-00000-of-00001.parquet", ".parquet", ".json"])
def test_every_config_and_split_is_read_from_every_layout(tmp_path, no_hub, config, split, ending):
    rows = rows_of(config)
    write = write_json if ending == ".json" else write_parquet
    write(tmp_path / "MUSE-News" / config / (split + ending), [row | {"extra": "1"} for row in rows])
    assert muse.load_muse("news", config, split, tmp_path) == rows


@pytest.mark.parametrize("config", [c for c, columns in muse.MUSE_COLUMNS.items() if columns == ("text",)])
def test_texts_may_be_an_array_of_strings(tmp_path, config):
    split, rows = muse.MUSE_SPLITS[config][0], rows_of(config)
    write_json(tmp_path / "MUSE-News" / config / f"{split}.json", [row["text"] for row in rows])
    assert muse.load_muse("news", config, split, tmp_path) == rows


def test_a_text_file_is_one_document_and_its_blank_lines_are_those_between_documents(tmp_path):
    texts = ["One.", "Two é.", "", "Three."]
    write_json(tmp_path / "MUSE-Books" / "raw" / "forget.txt", "\n\n".join(texts))
    [row] = muse.load_muse("books", "raw", "forget", tmp_path)
    assert row == {"text": "\n\n".join(texts)}


def test_only_running_text_is_read_from_a_text_file(tmp_path, no_hub):
    write_json(tmp_path / "MUSE-News" / "privleak" / "forget.txt", "One.")
    assert "hub" in error_of(muse.load_muse, "news", "privleak", "forget", tmp_path)


@pytest.mark.parametrize("config, split", list(muse.MUSE_OLD_NAMES))
def test_the_old_names_of_muses_repository_are_known_and_the_new_ones_come_first(tmp_path, config, split):
    folder, [new, old] = tmp_path / "MUSE-News" / config, [rows_of(config, n) for n in (2, 3)]
    write_json(folder / f"{muse.MUSE_OLD_NAMES[config, split]}.json", old)
    assert muse.load_muse("news", config, split, tmp_path) == old
    write_json(folder / f"{split}.json", new)
    assert muse.load_muse("news", config, split, tmp_path) == new


def test_parquet_comes_before_json_and_local_files_before_the_hub(tmp_path, monkeypatch):
    asked = []

    def hub_file(repo, name, remedy):
        asked.append((repo, name))
        return write_parquet(tmp_path / "hub.parquet", rows_of("raw", 5))

    monkeypatch.setattr(inference, "hub_file", hub_file)
    assert len(muse.load_muse("books", "raw", "retain1")) == len(muse.load_muse("news", "raw", "forget", tmp_path)) == 5
    assert asked == [
        ("muse-bench/MUSE-Books", "raw/retain1-00000-of-00001.parquet"),
        ("muse-bench/MUSE-News", "raw/forget-00000-of-00001.parquet"),
    ]
    write_json(tmp_path / "MUSE-News" / "raw" / "forget.json", rows_of("raw", 1))
    assert len(muse.load_muse("news", "raw", "forget", tmp_path)) == 1
    write_parquet(tmp_path / "MUSE-News" / "raw" / "forget.parquet", rows_of("raw", 2))
    assert len(muse.load_muse("news", "raw", "forget", tmp_path)) == len(asked) == 2


@pytest.mark.parametrize(
    "names, wrong",
    [
        (("bbc", "raw", "forget"), "bbc"),
        (("news", "tofu", "forget"), "tofu"),
        (("news", "raw", "retain"), "retain"),
        (("books", "scal", "forget_1"), "scal"),
        (("books", "sust", "forget_1"), "sust"),
        (("news", "knowmem", "retain2_qa"), "retain2_qa"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(names, wrong, tmp_path):
    message = error_of(muse.load_muse, *names, tmp_path)
    assert repr(wrong) in message and "known are" in message


@pytest.mark.parametrize(
    "config, content, says",
    [
        ("verbmem", "[{", "not readable JSON"),
        ("verbmem", {"prompt": "a", "gt": "b"}, "array"),
        ("verbmem", [], "no rows"),
        ("verbmem", ["a"], "row 0"),
        ("verbmem", [{"prompt": "a", "gt": "b"}, {"prompt": "a"}], "row 1: key 'gt'"),
        ("knowmem", [{"question": "a", "answer": " "}], "key 'answer'"),
        ("knowmem", [{"question": 3, "answer": "a"}], "key 'question'"),
        ("privleak", ["a", None], "row 1"),
        ("privleak", ["a", ""], "row 1: key 'text'"),
        ("privleak", ["\ud800"], "surrogates"),
        ("raw", ["", " "], "no rows"),
        ("raw", ["a", 3], "row 1"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path, config, content, says):
    path = write_json(tmp_path / "MUSE-News" / config / f"{muse.MUSE_SPLITS[config][0]}.json", content)
    message = error_of(muse.load_muse, "news", config, muse.MUSE_SPLITS[config][0], tmp_path)
    assert str(path) in message and says in message and "download it again" in message


@pytest.mark.parametrize("rows, says", [([{"prompt": "a"}], "column 'gt'"), ([{"prompt": "a", "gt": 3}], "key 'gt'"),
                                        ([{"prompt": "a", "gt": None}], "key 'gt'")])  # fmt: skip
def test_a_parquet_file_without_the_texts_is_refused(tmp_path, rows, says):
    path = write_parquet(tmp_path / "MUSE-News" / "verbmem" / "forget.parquet", rows)
    message = error_of(muse.load_muse, "news", "verbmem", "forget", tmp_path)
    assert str(path) in message and says in message


@pytest.mark.parametrize(
    "ending, content", [(".parquet", b"PAR1 no"), (".parquet", b""), (".json", b"\xff"), (".txt", b"\xff")]
)
def test_a_file_of_other_bytes_is_refused(tmp_path, ending, content):
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / "MUSE-News" / "raw" / f"forget{ending}"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert str(path) in error_of(muse.load_muse, "news", "raw", "forget", tmp_path)


def test_an_empty_document_is_no_error_in_running_text(tmp_path):
    write_json(tmp_path / "MUSE-News" / "raw" / "forget.json", ["a", "", "b"])
    assert [row["text"] for row in muse.load_muse("news", "raw", "forget", tmp_path)] == ["a", "", "b"]


def test_what_is_missing_is_named_with_where_to_place_it(tmp_path, no_hub, monkeypatch):
    message = error_of(muse.load_muse, "news", "raw", "retain1", tmp_path)
    assert (
        "muse-bench/MUSE-News/raw/retain1" in message and "DIR/MUSE-News/raw/retain1" in message and "--data-dir" in message
    )
    assert "no such folder" in error_of(muse.load_muse, "news", "raw", "retain1", tmp_path / "none")
    path = write_parquet(tmp_path / "MUSE-News" / "raw" / "retain1.parquet", rows_of("raw"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = error_of(muse.load_muse, "news", "raw", "retain1", tmp_path)
    assert str(path) in message and "pip install -e '.[eval]'" in message


# ------------------------------------------------------------------------------------------------------------ sequences


@pytest.fixture(scope="session", params=["llama2-sentencepiece", "smollm2"])
def words(request, tmp_path_factory):
    """(our tokenizer, transformers' of the same files): with spaces in front of words, and byte-level."""
    transformers = pytest.importorskip("transformers")
    folder = write_tokenizer(tmp_path_factory.mktemp("words"), request.param)
    return data.Tokenizer(folder), transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def stream_of(oracle, texts: list[str]) -> list[int]:
    return oracle("\n\n".join(texts), add_special_tokens=False)["input_ids"]


@given(texts=TEXTS, length=LENGTHS)
@claim("MUSE's sequences are the token stream in pieces behind BOS, the last filled up from the first", "MUSE")
def test_muses_sequences_are_the_token_stream_in_pieces(words, texts, length):
    ours, oracle = words
    stream = stream_of(oracle, texts)
    chunks = muse.muse_chunks(texts, ours, "news", length, "muse")
    assert len(chunks) == math.ceil(len(stream) / (length - 1))
    joined = [token for chunk in chunks for token in chunk.ids[1:]]
    assert joined[: len(stream)] == stream
    first = (chunks[0].ids[0], *stream[: length - 1])
    assert first == chunks[0].ids[: len(first)]
    rest = len(stream) - (len(chunks) - 1) * (length - 1)
    assert chunks[-1].ids[1 + rest :] == first[: length - 1 - rest]  # BOS included, and once round at most
    for i, chunk in enumerate(chunks):
        assert chunk.key == f"news/{i}" and chunk.ids[0] == ours.bos_id == ours.tokenizer.token_to_id(
            ours.config["bos_token"]
        )
        assert chunk.prompt_length == 1 and chunk.answer_length == len(chunk.ids) - 1
        assert len(chunk.ids) == length or len(stream) < length - 1


@given(texts=TEXTS, length=LENGTHS)
@claim("open-unlearning's sequences are pieces of the token stream, decoded and tokenised again", "MUSE")
def test_open_unlearnings_sequences_are_pieces_decoded_and_tokenised_again(words, texts, length):
    ours, oracle = words
    stream, expected = stream_of(oracle, texts), []
    for i in range(len(stream) // length + 1):
        text = oracle.decode(stream[i * length : (i + 1) * length], clean_up_tokenization_spaces=False)
        expected.append([ours.bos_id, *oracle(text, add_special_tokens=False)["input_ids"]][: 1 + length])
    expected = [ids for ids in expected if len(ids) > 1]
    if not expected:  # nothing but spaces that decoding strips
        assert "nothing" in error_of(muse.muse_chunks, texts, ours, "news", length, "open-unlearning")
        return
    chunks = muse.muse_chunks(texts, ours, "news", length, "open-unlearning")
    assert [list(chunk.ids) for chunk in chunks] == expected
    assert {chunk.prompt_length for chunk in chunks} == {1} and max(len(chunk.ids) for chunk in chunks) <= 1 + length


def test_a_multiple_of_the_length_leaves_no_empty_sequence(words):
    ours, oracle = words
    n = len(stream_of(oracle, ["abcabc"]))
    assert [chunk.answer_length for chunk in muse.muse_chunks(["abcabc"], ours, "", n, "open-unlearning")] == [n]
    assert [chunk.answer_length for chunk in muse.muse_chunks(["abcabc"], ours, "", n + 1, "muse")] == [n]


@given(texts=TEXTS, length=LENGTHS, chunking=st.sampled_from(["muse", "open-unlearning"]))
def test_every_token_behind_bos_is_predicted_from_those_before_it(words, texts, length, chunking):
    try:
        chunks = muse.muse_chunks(texts, words[0], "news", length, chunking)
    except DataError:
        return
    batch = data.pack(chunks, share=False)
    assert batch.packing.lengths == batch.answer_lengths
    rows = zip(*(x.split(batch.packing.lengths) for x in (batch.input_ids[0], batch.at, batch.targets)), strict=True)
    start = 0
    for chunk, n, (input_ids, at, targets) in zip(chunks, batch.answer_lengths, rows, strict=True):
        assert len(at) == n == chunk.answer_length == len(chunk.ids) - 1
        assert tuple(targets.tolist()) == chunk.ids[1:] and at.tolist() == list(range(start, start + n))
        assert tuple(input_ids.tolist()) == chunk.ids[:-1]
        start += n


@pytest.mark.parametrize(
    "texts, length, chunking, says",
    [
        ([], 9, "muse", "nothing"),
        ([""], 9, "open-unlearning", "nothing"),
        (["a"], 1, "muse", "2"),
        (["a"], 9, "tofu", "known"),
    ],
)
def test_what_cannot_be_cut_is_refused(words, texts, length, chunking, says):
    assert says in error_of(muse.muse_chunks, texts, words[0], "news", length, chunking)


def test_a_token_beyond_the_embedding_and_a_missing_bos_are_named(tmp_path):
    folder = write_tokenizer(tmp_path, "smollm2", bos_token=None)
    tokenizer = data.Tokenizer(folder)
    assert "bos_token" in error_of(muse.muse_chunks, ["abc"], tokenizer)
    tokenizer.vocab_size = 10
    assert "news" in error_of(muse.muse_chunks, ["abc"], tokenizer, key="news")


# -------------------------------------------------------------------------------------------------------------- metrics


@given(SENTENCES, SENTENCES, st.booleans())
@claim("ROUGE-L F1 is rouge-score's, with or without the stemmer", "MUSE")
def test_rouge_f1_is_that_of_rouge_score(reference, generation, stemmer):
    scores = RougeScorer(["rouge1", "rougeL"], use_stemmer=stemmer).score(reference, generation)
    assert metrics.rouge(reference, generation, stemmer)["rouge_f1"] == scores["rougeL"].fmeasure
    found = metrics.rouge(reference, generation, stemmer)
    assert (found["rouge"], found["rouge1"]) == (scores["rougeL"].recall, scores["rouge1"].recall)


def test_the_stemmer_makes_inflected_words_equal():
    texts = "he was running", "he was runs"
    assert metrics.rouge(*texts) == metrics.rouge(*texts, stemmer=True) != metrics.rouge(*texts, stemmer=False)
    assert metrics.rouge(*texts)["rouge_f1"] == 1


@given(LOG_PROBS)
@claim("Min-40% of all tokens (MUSE), or of the first 2048 without the last (open-unlearning)", "MUSE")
def test_min_k_is_minus_the_mean_of_the_lowest_forty_percent(log_probs):
    def lowest(values):
        return -statistics.fmean(sorted(values)[: max(1, int(0.4 * len(values)))])

    assert metrics.muse_min_k(log_probs, "muse") == pytest.approx(lowest(log_probs))
    assert metrics.muse_min_k(log_probs, "open-unlearning") == pytest.approx(lowest(log_probs[:-1]))
    long = [*log_probs, *[-1.0] * (2048 - len(log_probs)), *log_probs]
    assert metrics.muse_min_k(long, "open-unlearning") == pytest.approx(lowest(long[:2047]))
    assert metrics.muse_min_k(long, "muse") == pytest.approx(lowest(long))


@given(st.lists(st.tuples(SENTENCES, SENTENCES), max_size=3), SENTENCES)
def test_a_knowmem_prompt_is_its_examples_and_the_question(pairs, question):
    prompt = muse.knowmem_prompt(pairs, question)
    lines = [line for q, a in pairs for line in (f"Question: {q}", f"Answer: {a}", "")]
    assert prompt == "\n".join([*lines, f"Question: {question}", "Answer: "])


@given(st.lists(st.sampled_from([*muse.MUSE_STOPS, "\n", "Question", "a", " b"]), max_size=8).map("".join))
def test_a_generation_is_cut_before_the_first_stop_string(text):
    first = min((text.find(stop) for stop in muse.MUSE_STOPS if stop in text), default=len(text))
    assert muse.cut_at_stop(text) == text[:first]


def muse_rows(forget: list[float], holdout: list[float], value=0.5) -> dict:
    text = {"prompt": "p", "ground_truth": "g", "generation": "o", "rouge1_recall": 0.1, "rougeL_recall": 0.2}
    rows = {
        "forget_verbmem": {"a": text | {"rougeL_f1": 0.0, "exact_memorization": 1.0, "extraction_strength": 0.25},
                           "b": text | {"rougeL_f1": value, "exact_memorization": 0.0, "extraction_strength": 0.75}},
        "forget_knowmem": {"a": text | {"rougeL_f1": value}},
        "retain_knowmem": {"a": text | {"rougeL_f1": 1.0}, "b": text | {"rougeL_f1": value}},
    }  # fmt: skip
    for part, scores in (("privleak_forget", forget), ("privleak_holdout", holdout)):
        rows[part] = {str(i): {"score": score, "loss": 1.0} for i, score in enumerate(scores)}
    return rows


@given(SCORES, SCORES, st.floats(0.05, 0.95))
@claim("PrivLeak = (A - A_retrained) / A_retrained in percent, A = P(holdout below forget)", "MUSE")
def test_privleak_is_the_relative_distance_of_muses_auc(forget, holdout, retained):
    below = statistics.fmean([(h < f) + (h == f) / 2 for h in holdout for f in forget])
    scores = metrics.aggregate_muse(muse_rows(forget, holdout), 1 - retained)
    assert scores["mia_min_k"] == pytest.approx(1 - below)
    u = stats.mannwhitneyu(holdout, forget).statistic / (len(forget) * len(holdout))
    assert scores["mia_min_k"] == pytest.approx(u)
    assert scores["privleak"] == pytest.approx((below - retained) / retained * 100, abs=1e-5)


def test_muses_own_numbers_come_out_of_its_constants():
    """-100 for what is fully memorised, 0 for the retrained; open-unlearning's log of the News target has -99.8111."""
    assert pytest.approx({"news": 0.5228, "books": 0.4607}) == metrics.MUSE_RETRAIN_AUC
    memorised, alike = (metrics.aggregate_muse(muse_rows([1.0], [h]), 0.5)["privleak"] for h in (2.0, 1.0))
    assert memorised == pytest.approx(-100) and alike == pytest.approx(0)
    assert metrics.privleak(0.9991, 0.5236) == pytest.approx(-99.8111, abs=0.01)
    assert list(metrics.MUSE_RETRAIN_AUC) == list(muse.MUSE_REPOS)


def test_files_have_the_published_keys_and_shapes(tmp_path):
    rows = muse_rows([1.0, 2.0], [3.0], value=0.5)
    scores = metrics.aggregate_muse(rows, 0.5)
    assert scores == {
        "forget_verbmem_ROUGE": 0.25, "forget_knowmem_ROUGE": 0.5, "retain_knowmem_ROUGE": 0.75, "mia_min_k": 1.0,
        "privleak": pytest.approx(-100), "exact_memorization": 0.5, "extraction_strength": 0.5,
    }  # fmt: skip
    result = logs.muse_eval_json(rows, scores)
    assert list(result) == [
        "exact_memorization", "extraction_strength", "forget_knowmem_ROUGE", "forget_verbmem_ROUGE", "mia_min_k", "privleak",
        "retain_knowmem_ROUGE",
    ]  # fmt: skip
    assert result["extraction_strength"] == {
        "agg_value": 0.5,
        "value_by_index": {"0": {"score": 0.25}, "1": {"score": 0.75}},
    }
    assert result["forget_knowmem_ROUGE"]["value_by_index"] == {
        "0": {
            "rouge1_recall": 0.1,
            "rougeL_f1": 0.5,
            "rougeL_recall": 0.2,
            "input": "p",
            "ground_truth": "g",
            "generation": "o",
        }
    }
    assert result["retain_knowmem_ROUGE"]["agg_value"] == 0.75 and result["privleak"] == {"agg_value": scores["privleak"]}
    forget = {"agg_value": 1.5, "value_by_index": {"0": {"score": 1.0}, "1": {"score": 2.0}}}
    holdout = {"agg_value": 3.0, "value_by_index": {"0": {"score": 3.0}}}
    assert result["mia_min_k"] == {"forget": forget, "holdout": holdout, "auc": 1.0, "agg_value": 1.0}
    names = ("extraction_strength", "forget_knowmem_ROUGE", "forget_verbmem_ROUGE", "privleak", "retain_knowmem_ROUGE")
    folder = tmp_path / "x" / "eval" / "final"
    folder.mkdir(parents=True)
    logs.save_muse(folder / "log.json", rows, scores)
    found = {path.name: path.read_text() for path in folder.iterdir()}
    assert (
        set(found) == {"MUSE_EVAL.json", "MUSE_SUMMARY.json", "MUSE.csv"} and json.loads(found["MUSE_EVAL.json"]) == result
    )
    assert json.loads(found["MUSE_SUMMARY.json"]) == {name: scores[name] for name in names}
    row = {"name": "x", "verbmem_f": 25.0, "privleak": scores["privleak"], "knowmem_f": 50.0, "knowmem_r": 75.0}
    assert logs.muse_csv_row("x", scores) == row and list(logs.muse_csv_row("x", scores)) == list(row)
    assert [line.split(",") for line in found["MUSE.csv"].split()] == [list(row), [str(value) for value in row.values()]]


@given(SCORES, SCORES)
def test_the_retrained_models_auc_is_read_from_its_file(tmp_path_factory, forget, holdout):
    rows = muse_rows(forget, holdout)
    scores = metrics.aggregate_muse(rows)
    path = tmp_path_factory.getbasetemp() / "MUSE_EVAL.json"
    for log in (logs.muse_eval_json(rows, scores), {"rows": rows, "scores": scores}):
        assert logs.read_muse_retain(write_json(path, log)) == {"mia_min_k": scores["mia_min_k"]}


@pytest.mark.parametrize(
    "log, key",
    [(log, "mia_min_k.agg_value") for log in ({}, [], "x", {"mia_min_k": None}, {"mia_min_k": {}}, {"mia_min_k": [1]})]
    + [({"mia_min_k": {"agg_value": value}}, "mia_min_k.agg_value") for value in (None, "0.5", True, math.nan, -0.1, 1.1)]
    + [(log, "scores.mia_min_k") for log in ({"scores": {}}, {"scores": {"mia_min_k": None}})]
    + [({"scores": None}, "'scores'")],
)
def test_a_file_without_the_auc_is_refused(tmp_path, log, key):
    path = write_json(tmp_path / "MUSE_EVAL.json", json.dumps(log))
    message = error_of(logs.read_muse_retain, path, kind=EvalError)
    assert str(path) in message and key in message


@pytest.mark.parametrize("content", [None, b"{", b"\xff"])
def test_a_file_that_is_no_json_is_refused(tmp_path, content):
    path = tmp_path / "MUSE_EVAL.json"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in error_of(logs.read_muse_retain, path, kind=EvalError)


# ------------------------------------------------------------------------------------------------------ running a model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return helpers.make_tiny(tmp_path_factory.mktemp("tiny"), positions=8192)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A little MUSE-News in the toy world's words, with one text beyond open-unlearning's limit."""
    root, world = tmp_path_factory.mktemp("data"), toy.toy_world(0)["full"]
    news, text = root / "MUSE-News", [f"{r.question} {r.answer}" for r in world]
    pairs = [{"question": r.question, "answer": r.answer} for r in world]
    verbatim = [{"prompt": " ".join(text[i : i + 1 + i % 3]), "gt": " ".join(text[i + 3 : i + 9])} for i in range(5)]
    write_json(news / "verbmem" / "forget.json", verbatim)
    for i, split in enumerate(muse.MUSE_SPLITS["knowmem"]):
        write_json(news / "knowmem" / f"{split}.json", pairs[20 * i : 20 * i + (10 if "icl" in split else 4)])
    write_json(news / "privleak" / "forget.json", [" ".join(text[i : i + 2 * i + 1]) for i in range(4)])
    write_json(news / "privleak" / "holdout.json", [" ".join(text[50 : 51 + i]) for i in range(3)] + [" ".join(text[:200])])
    return root


def evaluate(
    tiny, corpus: Path, limit=None, stemmer=None, variant="open-unlearning", batch_size=8, journal=None
) -> dict[str, dict[str, dict]]:
    """MUSE's per-item results."""
    benchmark = muse.Muse(Options("muse_news", corpus, limit, variant, stemmer=stemmer))
    benchmark.batch_size = batch_size
    return benchmark.rows(tiny.model, tiny.tokenizer, journal=journal)


@pytest.fixture(scope="session", params=muse.MUSE_VARIANTS)
def results(request, tiny, corpus):
    return request.param, evaluate(tiny, corpus, variant=request.param)


def generations(rows: dict) -> list[str]:
    return [item["generation"] for part in metrics.MUSE_NEW_TOKENS for item in rows[part].values()]


def numbers(rows: dict) -> list[float]:
    return [x for items in rows.values() for item in items.values() for x in item.values() if isinstance(x, float)]


def test_items_are_keyed_by_row_and_hold_what_the_results_need(results, corpus):
    variant, rows = results
    assert {part: len(items) for part, items in rows.items()} == {
        "forget_verbmem": 5, "forget_knowmem": 4, "retain_knowmem": 4, "privleak_forget": 4, "privleak_holdout": 4
    }  # fmt: skip
    text = {"prompt", "ground_truth", "generation", "rougeL_f1", "rougeL_recall", "rouge1_recall"}
    for part, items in rows.items():
        more = {"exact_memorization", "extraction_strength"} if part == "forget_verbmem" else set()
        assert all(set(item) == ({"score", "loss"} if "privleak" in part else text | more) for item in items.values())
    assert "muse_news/knowmem/retain_qa/3" in rows["retain_knowmem"]
    assert rows["retain_knowmem"]["muse_news/knowmem/retain_qa/3"]["prompt"].count("Question: ") == 11
    for item in (item for part in metrics.MUSE_NEW_TOKENS for item in rows[part].values()):
        expected = RougeScorer(["rougeL"], use_stemmer=variant != "muse").score(item["ground_truth"], item["generation"])
        assert item["rougeL_f1"] == expected["rougeL"].fmeasure
    assert json.loads(json.dumps(logs.muse_eval_json(rows, metrics.aggregate_muse(rows))))


def test_generations_and_scores_equal_transformers_one_row_at_a_time(tiny, corpus, results):
    transformers = pytest.importorskip("transformers")
    (model, _, folder), (variant, rows) = tiny, results
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    stop, lengths = set(model.config.eos_token_ids), set()

    def ids_of(text):
        return [words.bos_token_id, *words(text, add_special_tokens=False)["input_ids"]]

    @torch.no_grad()
    def log_probs(ids):
        found = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        return found[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist(), found[:-1].argmax(-1).tolist()

    for part, new_tokens in metrics.MUSE_NEW_TOKENS.items():
        for item in rows[part].values():
            prompt = ids_of(item["prompt"])
            output = reference.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, pad_token_id=1)
            new = output[0, len(prompt) :].tolist()
            new = new[:-1] if new[-1] in stop else new
            lengths.add(len(new))
            text = words.decode(new, skip_special_tokens=True)
            for end in ("\n\n", "\nQuestion", "Question:") if "knowmem" in part else ():
                text = text.split(end)[0]
            assert item["generation"] == text.strip()
    assert len(lengths) > 3

    raw = json.loads((corpus / "MUSE-News" / "verbmem" / "forget.json").read_text())
    for row, item in zip(raw, rows["forget_verbmem"].values(), strict=True):
        gt = row["gt"] if variant != "muse" else words.decode(ids_of(row["gt"])[1:128], skip_special_tokens=True)
        assert item["ground_truth"] == gt
        prompt, ids = ids_of(row["prompt"]), ids_of(row["prompt"] + " " + row["gt"])
        labels, best = (x[len(prompt) - 1 :][:-1] for x in (ids[1:], log_probs(ids)[1]))  # the last label is left out
        right = [a == b for a, b in zip(labels, best, strict=True)]
        assert item["exact_memorization"] == pytest.approx(statistics.fmean(right))
        k = next(k for k in range(len(right)) if all(right[k:]) or k == len(right) - 1)
        assert item["extraction_strength"] == pytest.approx(1 - k / len(right))

    seen = set()
    for split in ("forget", "holdout"):
        raw = json.loads((corpus / "MUSE-News" / "privleak" / f"{split}.json").read_text())
        for text, item in zip(raw, rows[f"privleak_{split}"].values(), strict=True):
            ids = ids_of(text)
            seen.add(len(ids) > 2049)
            scores, _ = log_probs(ids if variant == "muse" else ids[:2049])
            assert item["loss"] == pytest.approx(-statistics.fmean(scores), rel=1e-4)
            scores = sorted(scores if variant == "muse" else scores[:-1])
            assert item["score"] == pytest.approx(-statistics.fmean(scores[: int(0.4 * len(scores))]), rel=1e-4)
    assert seen == {True, False}


@pytest.mark.parametrize(
    "text, answer",
    [(" cats\n\nQuestion: x", "cats"), ("cats\nQuestion", "cats"), ("\n\ncats", ""), ("cats\ndogs ", "cats\ndogs")],
)
def test_knowmem_is_cut_as_generated_and_then_stripped_and_verbmem_is_only_stripped(tiny, corpus, monkeypatch, text, answer):
    ids = tiny.tokenizer.encode_text(text)
    monkeypatch.setattr(inference, "generate", lambda model, prompts, *more: [ids] * len(prompts))
    rows = evaluate(tiny, corpus, limit=1)
    assert [item["generation"] for part in metrics.MUSE_NEW_TOKENS for item in rows[part].values()] == [
        text.strip(),
        answer,
        answer,
    ]


@pytest.mark.parametrize("variant, f1", [("open-unlearning", 1.0), ("muse", 0.0)])
def test_open_unlearning_stems_and_muse_does_not(tiny, corpus, monkeypatch, variant, f1):
    ids = tiny.tokenizer.encode_text("running")
    monkeypatch.setattr(inference, "generate", lambda model, prompts, *more: [ids] * len(prompts))
    inflected = {"question": "runs", "answer": "runs", "prompt": "runs", "gt": "runs runs", "text": "runs and runs"}
    monkeypatch.setattr(muse, "load_muse", lambda *names: [inflected])
    rows = evaluate(tiny, corpus, variant=variant)
    assert [item["rougeL_f1"] for item in rows["forget_knowmem"].values()] == [f1]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_results_do_not_depend_on_the_batch_size(tiny, corpus, results, batch_size):
    variant, rows = results
    again = evaluate(tiny, corpus, variant=variant, batch_size=batch_size)
    assert generations(again) == generations(rows) and numbers(again) == pytest.approx(numbers(rows), rel=1e-4)


@given(st.integers(1, 3000))
def test_scores_do_not_depend_on_the_batch(tiny, corpus, budget):
    model, tokenizer, _ = tiny
    texts = [row["text"] for row in muse.load_muse("news", "privleak", "forget", corpus)]
    examples = [data.Example(str(i), (tokenizer.bos_id, *tokenizer.encode_text(text)), 1) for i, text in enumerate(texts)]
    found = score_answers(model, examples, muse.MUSE_VARIANTS["muse"], budget=budget)
    alone = [score_answers(model, [example], muse.MUSE_VARIANTS["muse"])[0] for example in examples]
    assert [s["score"] for s in found] == pytest.approx([s["score"] for s in alone], rel=1e-4)
    assert [s["loss"] for s in found] == pytest.approx([s["loss"] for s in alone], rel=1e-4)
    by_answers = score_answers(model, examples, memorization)
    assert [s["loss"] for s in found] == pytest.approx([s["loss"] for s in by_answers], rel=1e-4)
    ours = score_answers(model, examples, muse.MUSE_VARIANTS["open-unlearning"])
    assert [s["score"] for s in ours] == pytest.approx([s["mia_min_k"] for s in by_answers], rel=1e-4)


def test_a_limit_takes_the_first_rows_of_each_part(tiny, corpus, results):
    variant, rows = results
    some = evaluate(tiny, corpus, limit=2, variant=variant)
    assert {part: list(items) for part, items in some.items()} == {part: list(items)[:2] for part, items in rows.items()}
    assert [some[p][k].get("generation") for p in some for k in some[p]] == [
        rows[p][k].get("generation") for p in some for k in some[p]
    ]


def test_an_interrupted_evaluation_goes_on_where_it_was(tiny, corpus, results, tmp_path, monkeypatch):
    variant, rows = results
    path, work = tmp_path / "journal.jsonl", []

    def run():
        return evaluate(tiny, corpus, variant=variant, batch_size=2, journal=path)

    add = inference.Journal.add

    def interrupted(self, found):
        if len(work) == 5:
            raise KeyboardInterrupt
        work.append(set(found))
        add(self, found)

    monkeypatch.setattr(inference.Journal, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    first, again = set().union(*work), []
    monkeypatch.setattr(inference.Journal, "add", lambda self, found: (again.append(set(found)), add(self, found)))
    second = run()
    assert generations(second) == generations(rows) and numbers(second) == pytest.approx(numbers(rows), rel=1e-4)
    done = set().union(*again)
    assert first and done and not first & done and sum(map(len, again)) == len(done)
    again.clear()
    assert run() == second and not again


def test_evaluation_leaves_the_master_weights_alone_and_the_stemmer_can_be_chosen(tiny, corpus):
    model = Llama(tiny[0].config, compute_dtype=torch.bfloat16).init_weights(0)
    before = [p.clone() for p in model.parameters()]
    rows = evaluate(tiny._replace(model=model), corpus, limit=1, stemmer=False)
    assert all(p.dtype == torch.float32 and torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    [item] = rows["forget_verbmem"].values()
    assert item["rougeL_f1"] == metrics.rouge(item["ground_truth"], item["generation"], stemmer=False)["rouge_f1"]


def test_bad_arguments_missing_data_and_overflow_are_refused_in_one_line(tiny, corpus, tmp_path, no_hub):
    for change, says in (({"protocol": "tofu"}, "tofu"), ({"rows": 0}, "limit 0")):
        assert says in error_of(muse.Muse, Options("muse_news", corpus, **change), kind=EvalError)
    assert "verbmem" in error_of(muse.Muse, Options("muse_books", corpus))
    broken = Llama(tiny.model.config).init_weights(0)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    message = error_of(evaluate, tiny._replace(model=broken), corpus, limit=1, kind=EvalError)
    assert "muse_news/" in message and "nan" in message


def test_the_reference_is_the_retrained_model_a_file_the_constant_or_the_aliass_published_log(corpus, tmp_path, no_hub):
    benchmark = muse.Muse(Options("muse_news[:2]", corpus))
    benchmark.options = dataclasses.replace(benchmark.options, data_dir=tmp_path)
    path = write_json(
        tmp_path / "open-unlearning" / "eval" / "muse_Llama-2-7b-hf_News_retrain" / "MUSE_EVAL.json",
        {"mia_min_k": {"agg_value": 0.25}},
    )

    def auc(alias=None, retain_logs=None, retrained=None):
        reference, where = benchmark.reference(alias, retain_logs, retrained)
        return reference and reference["mia_min_k"], where

    retrained = {"scores": {"mia_min_k": 0.5}}
    assert auc("muse-news", "muse", retrained) == (0.5, "the retrained model")
    assert auc("muse-news", str(path)) == (0.25, str(path))
    assert auc("muse-news", "muse") == (metrics.MUSE_RETRAIN_AUC["news"], "MUSE's published constant of its retrained model")
    assert auc("muse-news") == (0.25, "/".join(path.parts[-4:]))
    for alias in ("my/run", "muse-books", "llama2-7b"):  # a log is of one corpus
        assert auc(alias)[0] is None and "--retain-logs muse" in auc(alias)[1]
    path.unlink()
    assert auc("muse-news")[0] is None and "the hub gave nothing" in auc("muse-news")[1]


@pytest.mark.parametrize("forget, rows", [("muse_news", None), ("muse_news[:10]", 10), ("muse_books/raw/forget[:3]", 3)])
def test_a_slice_from_the_start_is_how_many_rows_are_evaluated(forget, rows):
    assert muse.Muse.first_rows(forget) == rows


@pytest.mark.parametrize("forget", ["muse_news[1:3]", "muse_news[:10%]", "muse_news[2:]", "muse_news+muse_books"])
def test_any_other_slice_is_refused(forget):
    message = error_of(muse.Muse.first_rows, forget, kind=EvalError)
    assert f"--forget {forget}" in message and "muse_news[:N]" in message


# ------------------------------------------------------------------------------------------------------------- real data


@pytest.fixture(scope="session")
def news():
    folder = Path(os.environ.get("DIPO_DATA", ""), "MUSE-News")
    if "DIPO_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("DIPO_DATA names no folder with MUSE-News/")
    return lambda config, split: muse.load_muse("news", config, split, folder.parent)


@pytest.mark.parametrize(
    "config, split, count",
    [("raw", "forget", 889), ("verbmem", "forget", 100)]
    + [("knowmem", s, 10 if "icl" in s else 100) for s in muse.MUSE_SPLITS["knowmem"]]
    + [("privleak", s, 100) for s in muse.MUSE_SPLITS["privleak"]],
)
def test_the_published_files_have_their_row_counts(news, config, split, count):
    rows = news(config, split)
    assert len(rows) == count and all(tuple(row) == muse.MUSE_COLUMNS[config] for row in rows)


def test_verbatim_and_member_texts_stand_in_the_forget_corpus_and_the_others_do_not(news):
    raw = [row["text"] for row in news("raw", "forget")]
    assert raw.count("") == 1  # an article without text is no error
    assert len("\n\n".join(raw)) == 3_277_912

    def letters(text):
        return "".join(c for c in text.lower() if c.isascii() and c.isalnum())

    corpus = letters("".join(raw))
    for row in news("verbmem", "forget"):
        assert letters(row["prompt"] + row["gt"]) in corpus and len(row["gt"].split()) >= 69
    texts = {split: [row["text"] for row in news("privleak", split)] for split in muse.MUSE_SPLITS["privleak"]}
    assert len({text for found in texts.values() for text in found}) == 300
    found = {split: sum(letters(text) in corpus for text in rows) for split, rows in texts.items()}
    assert found == {"forget": 100, "retain": 0, "holdout": 0}
    for split in ("forget_qa", "retain_qa"):
        icl = {row["question"] for row in news("knowmem", f"{split}_icl")}
        assert not icl & {row["question"] for row in news("knowmem", split)}  # no example gives an answer away
