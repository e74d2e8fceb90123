"""eval.py, tofu.py, inference.py: running a model against transformers; logs kept and used again; the command line."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch
from helpers import (
    Tiny,
    error_of,
    generations,
    make_tiny,
    open_unlearning_log,
    our_log,
    published,
    score_answers,
    tofu_rows,
    values,
    whole_authors_log,
    without,
    write_log,
    write_tokenizer,
)
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("scipy")
pytest.importorskip("rouge_score")

import data
import eval
import files
import hints
import inference
import logs
import metrics
import tofu
import toy
import train
from data import DataError, Example
from inference import Options, Text
from metrics import EvalError
from model import Llama, ModelError, load_pretrained, save_pretrained

# ------------------------------------------------------------------------------------------------------- scoring a log


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
def test_main_scores_published_logs_without_a_model(capsys, log, reference, utility, quality):
    found = scored(capsys, "--logs", published(log), "--retain-logs", published(reference))
    assert found["model_utility"] == pytest.approx(utility, abs=5e-7)
    assert found["forget_quality"] == pytest.approx(quality, rel=5e-7)
    assert found["forget_quality_log10"] == pytest.approx(math.log10(quality), abs=1e-6)
    assert set(found["parts"]) == set(metrics.UTILITY_PARTS)
    assert found["model_utility"] == pytest.approx(statistics.harmonic_mean(found["parts"].values()))


@pytest.mark.parametrize("name", ["full_forget10", "retain90"])
def test_open_unlearnings_own_aggregates_are_recomputed_without_error(capsys, name):
    log, reference = (published(f"open-unlearning_Llama-3.2-1B_{n}") for n in (name, "retain90"))
    stored = {k: v["agg_value"] for k, v in json.loads(log.read_text()).items()}
    found = scored(capsys, "--logs", log, "--retain-logs", reference)
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


def test_the_arithmetic_truth_ratio_lowers_the_utility_of_the_authors_log_as_published(capsys):
    log = published("llama2-7b_full")
    assert scored(capsys, "--logs", log)["model_utility"] == pytest.approx(0.6227, abs=5e-5)
    assert scored(capsys, "--logs", log, "--truth-ratio", "arithmetic")["model_utility"] == pytest.approx(0.5859, abs=5e-5)


def test_the_forget_quality_is_geometric_whatever_the_scores_are_of(capsys):
    """As in the TOFU authors' training code, which has the arithmetic mean in the scores."""
    full, retain = (published(f"llama2-7b_{name}") for name in ("full", "retain90"))
    found = scored(capsys, "--logs", full, "--retain-logs", retain, "--truth-ratio", "arithmetic")
    assert found["forget_quality"] == pytest.approx(1.834066e-21, rel=5e-7)


def test_without_a_retain_reference_a_log_has_no_forget_quality(capsys):
    found = scored(capsys, "--logs", published("llama2-7b_full"))
    assert found["forget_quality"] is None and found["forget_quality_log10"] is None
    assert "--retain-logs FILE" in found["retain_reference"]


def test_two_pipelines_measure_the_same(capsys):
    """The authors' and open-unlearning's logs of one model hold the same rows: their answers are compared one by one."""
    ours, theirs = map(published, ("open-unlearning_Llama-3.2-1B_retain90", "llama2-7b_retain90"))
    found = scored(capsys, "--logs", ours, "--retain-logs", theirs)
    assert "first 300 of 400 rows" in found["retain_reference"] and found["forget_quality"] > 1e-9


def changed(log: dict, *keys, value) -> dict:
    log = json.loads(json.dumps(log))
    functools.reduce(dict.__getitem__, keys[:-1], log)[keys[-1]] = value
    return log


@pytest.mark.parametrize(
    "log, told",
    [
        (changed(whole_authors_log(), "eval_log.json", "avg_gt_loss", "1", value=math.nan), "NaN is no number of JSON"),
        (
            changed(whole_authors_log(), "eval_log.json", "rougeL_recall", "2", value=None),
            "key 'retain.2.rouge' is null, expected a number from 0 to 1",
        ),
        (
            changed(whole_authors_log(), "eval_log_forget.json", "average_perturb_loss", "1", value=[1.0, "2"]),
            "key 'forget.1.wrong_losses.1' is \"2\"",
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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="session")
def other(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def sets() -> dict[str, list[data.Row]]:
    world = toy.toy_world(0)
    return {"forget": world["forget10_perturbed"][:4], "wf": world["world_facts_perturbed"][:3]}


@pytest.fixture(scope="session")
def results(tiny, sets):
    return tofu_rows(tiny.model, tiny.tokenizer, sets, 8)


def test_items_are_keyed_by_row_and_hold_what_the_metrics_read(results, sets):
    for name, rows in sets.items():
        assert list(results[name]) == [row.key for row in rows]
        for row, item in zip(rows, results[name].values(), strict=True):
            assert (item["question"], item["answer"]) == (row.question, row.answer)
            assert len(item["wrong_losses"]) == len(row.perturbed_answers)
            assert item["rouge"] == metrics.rouge(row.answer, item["generation"])["rouge"]
            epsilon = tofu.PROTOCOLS["open-unlearning"].epsilon
            assert item["truth_ratio"] == metrics.truth_ratio(item["correct_loss"], item["wrong_losses"], epsilon=epsilon)
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
    losses = [s["loss"] for s in score_answers(tiny.model, examples, budget=budget)]
    assert losses == pytest.approx([score_answers(tiny.model, [e])[0]["loss"] for e in examples], rel=1e-4)


@given(st.lists(st.tuples(st.integers(2, 60), st.booleans()), max_size=12), st.integers(1, 150))
def test_texts_are_scored_once_each_within_the_budget_the_longest_of_a_measure_first(wanted, budget):
    measures = (inference.mean_loss, inference.memorization)
    texts = [Text(f"x/{i}", Example(f"x/{i}", (0,) * n, 1), measures[more]) for i, (n, more) in enumerate(wanted)]
    batches = list(inference.batches(texts, budget))
    sizes = [[len(text.example.ids) for text in batch] for batch in batches]
    flat = [text for batch in batches for text in batch]
    assert sorted(text.key for text in flat) == sorted(text.key for text in texts)
    assert all(batch and len({text.measure for text in batch}) == 1 for batch in batches)
    assert all(len(batch) == 1 or sum(batch) <= budget for batch in sizes)
    ends = [measure for measure, _ in itertools.groupby(text.measure for text in flat)]
    assert ends == list(dict.fromkeys(text.measure for text in texts))  # one measure after the other, as they come
    for measure in measures:
        own = [len(text.example.ids) for text in flat if text.measure == measure]
        assert own == sorted(own, reverse=True)
    for i, (one, other) in enumerate(itertools.pairwise(sizes)):  # no more batches than needed
        assert sum(one) + other[0] > budget or batches[i][0].measure != batches[i + 1][0].measure


def test_a_prompt_is_computed_once_for_its_answers_and_no_number_changes(tiny, sets, results, monkeypatch):
    pack, sizes = inference.pack, []

    def packed(examples, hidden_id=None):
        alone = pack(examples, hidden_id, share=False)
        sizes.append((pack(examples, hidden_id).input_ids.numel(), alone.input_ids.numel()))
        return alone

    monkeypatch.setattr(inference, "pack", packed)
    again = tofu_rows(tiny.model, tiny.tokenizer, sets, 8)
    assert generations(again) == generations(results) and values(again) == pytest.approx(values(results), rel=1e-4)
    shared, alone = map(sum, zip(*sizes, strict=True))
    assert shared < 0.7 * alone


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_results_do_not_depend_on_the_batch_size(tiny, sets, results, batch_size):
    again = tofu_rows(tiny.model, tiny.tokenizer, sets, 8, batch_size)
    assert generations(again) == generations(results)
    assert values(again) == pytest.approx(values(results), rel=1e-4)


def test_evaluation_leaves_the_master_weights_and_global_randomness_alone(tiny, sets):
    model = Llama(tiny.model.config, compute_dtype=torch.bfloat16).init_weights(0)
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    results = tofu_rows(model, tiny.tokenizer, {"wf": sets["wf"]}, 2)
    assert all(math.isfinite(v) for v in values(results))
    assert all(p.dtype == torch.float32 and torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state) and all(p.requires_grad for p in model.parameters())


def test_a_loss_that_is_not_finite_names_the_row(tiny, sets, tmp_path):
    model = Llama(tiny.model.config).init_weights(0)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    for _ in range(2):  # the journal does not hold it
        message = error_of(tofu_rows, model, tiny.tokenizer, sets, 2, journal=tmp_path / "journal.jsonl")
        assert sets["forget"][0].key in message and "nan" in message


def test_rows_without_perturbed_answers_and_rows_that_occur_twice_are_named(tiny, sets):
    [row, *_] = sets["forget"]
    bare = dataclasses.replace(row, perturbed_answers=())
    message = error_of(tofu_rows, tiny.model, tiny.tokenizer, {"forget": [bare]}, kind=DataError)
    assert row.key in message and "perturbed_answer" in message
    message = error_of(tofu_rows, tiny.model, tiny.tokenizer, {"wf": [bare]}, own=True, kind=DataError)
    assert row.key in message and "perturbed_answer" in message
    message = error_of(tofu_rows, tiny.model, tiny.tokenizer, {"forget": [row, row]}, kind=DataError)
    assert row.key in message and "twice" in message


# --------------------------------------------------------------------------------------------------- saving and reusing


def evaluated(tiny: Tiny, sets: dict, folder: Path | None, max_new_tokens: int, **other) -> dict:
    """The log of an evaluation on these sets. other: a model, a tokenizer."""
    benchmark = tofu.Tofu(Options(None, max_new_tokens=max_new_tokens, gradnorm=other.get("gradnorm", False)))
    benchmark.sets = sets
    return benchmark.evaluate(other.get("model", tiny.model), other.get("tokenizer", tiny.tokenizer), folder, "final", "")


@pytest.fixture
def evaluations(monkeypatch) -> list:
    """Grows by one with each evaluation that is really done."""
    done, rows = [], tofu.Tofu.rows
    monkeypatch.setattr(tofu.Tofu, "rows", lambda *args: done.append(args) or rows(*args))
    return done


def test_a_result_is_reused_for_the_same_protocol_only(tiny, sets, tmp_path, evaluations):
    def run(sets=sets, max_new_tokens=3, **other):
        return evaluated(tiny, sets, tmp_path, max_new_tokens, **other)

    first = run()
    assert len(evaluations) == 1 and run() == first
    kept = json.loads(Path(first["path"]).read_text())
    assert len(evaluations) == 1 and first == {k: kept[k] for k in ("protocol", "scores", "rows")} | {"path": first["path"]}

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
    Path(first["path"]).write_text(Path(paths.pop()).read_text())  # whole, and another evaluation's
    assert "is not of this evaluation" in error_of(run)


def test_a_result_without_a_run_folder_is_not_kept(tiny, sets, evaluations):
    for _ in range(2):
        log = evaluated(tiny, sets, None, 2)
    assert log["path"] is None and len(evaluations) == 2
    assert set(log) == {"protocol", "scores", "rows", "path"} and "forget_truth_ratio" in log["scores"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_the_place_of_another_is_evaluated_anew_and_the_same_one_is_not(tiny, sets, tmp_path, evaluations, dtype):
    def run(model):
        return evaluated(tiny, sets, tmp_path, 3, model=model)

    trained = Llama(tiny.model.config, compute_dtype=dtype).init_weights(0)
    first = run(trained)
    folder = save_pretrained(trained, tmp_path / "model", tokenizer_from=tiny.tokenizer.folder)
    assert run(load_pretrained(folder, compute_dtype=dtype)) == first and len(evaluations) == 1
    other = load_pretrained(folder, compute_dtype=dtype)
    with torch.no_grad():
        other.lm_head.weight[7, 3] *= 1.5
    assert run(other)["path"] != first["path"] and len(evaluations) == 2
    slower = load_pretrained(folder, compute_dtype=dtype)
    slower.config = dataclasses.replace(slower.config, rms_norm_eps=1e-2)
    assert run(slower)["path"] not in (first["path"], run(other)["path"]) and len(evaluations) == 3


@given(st.data())
def test_a_damaged_log_or_journal_is_never_taken_for_what_was_written(results, tmp_path_factory, draw):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    log = {"protocol": {"name": "x"}, "scores": {}, "rows": results}
    logs.write_log(folder / "log.json", log)
    (folder / "journal.jsonl").unlink(missing_ok=True)
    journal = inference.Journal(folder / "journal.jsonl")
    for name, items in results.items():
        journal.add({f"{name} {key}": item for key, item in items.items()})
    path, read = draw.draw(
        st.sampled_from(
            [
                (folder / "log.json", logs.read_ours),
                (folder / "journal.jsonl", lambda path: inference.Journal(path).done),
            ]
        )
    )
    whole = bytearray(path.read_bytes())
    place, bit = draw.draw(st.integers(0, len(whole) - 1)), draw.draw(st.integers(0, 7))
    whole[place] ^= 1 << bit
    path.write_bytes(whole)
    try:
        found = read(path)
        assert found == log or path.suffix == ".jsonl" and found.items() <= journal.done.items()
    except EvalError as e:
        assert str(path) in str(e) and "\n" not in str(e) and "remove it" in str(e)


def test_what_lies_behind_a_link_is_not_written_to(tiny, sets, tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    (run / "eval").symlink_to(elsewhere)
    assert "by a link" in error_of(evaluated, tiny, sets, run, 2) and not list(elsewhere.iterdir())
    (elsewhere / "file").write_text("kept\nthis")
    (run / "journal.jsonl").symlink_to(elsewhere / "file")
    assert "is a link" in error_of(inference.Journal, run / "journal.jsonl")
    assert (elsewhere / "file").read_text() == "kept\nthis"


def test_a_folder_that_cannot_be_written_keeps_nothing_and_the_result_is_told(tiny, four_sets, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "eval").write_text("in its place")  # as root, permissions keep nobody out
    log = evaluated(tiny, four_sets, tmp_path / "run", 2)
    assert log["path"] is None and "model_utility" in log["scores"] and "not kept: " in capsys.readouterr().err
    kept = evaluated(tiny, four_sets, tmp_path, 2)
    for name in ("TOFU_EVAL.json", "TOFU_SUMMARY.json"):
        (Path(kept["path"]).with_name(name) / "in its place").mkdir(parents=True)
    assert tofu.Tofu(Options(None)).summary(kept, None, "")[0]["model_utility"] == log["scores"]["model_utility"]
    assert "not kept: " in capsys.readouterr().err


def test_the_second_of_two_evaluations_waits_and_uses_the_firsts_result(
    tiny, sets, tmp_path, monkeypatch, capsys, evaluations
):
    first = evaluated(tiny, sets, tmp_path, 2)
    path = Path(first["path"])
    path.rename(tmp_path / "log.json")  # not there yet when the second one starts

    @contextlib.contextmanager
    def held(folder, error, wait):
        wait(1234)
        (tmp_path / "log.json").rename(path)
        yield

    monkeypatch.setattr(files, "lock", held)
    assert evaluated(tiny, sets, tmp_path, 2) == first and len(evaluations) == 1
    assert "process 1234" in capsys.readouterr().err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: not enough memory: you tried")])  # fmt: skip
def test_batches_are_halved_where_the_memory_ends(tiny, sets, results, monkeypatch, error):
    pack, generate, sizes = inference.pack, inference.generate, []

    def packed(examples, *more):
        if len(examples) > limit:
            raise error
        sizes.append(len(examples))
        return pack(examples, *more)

    def generated(model, prompts, *more):
        if len(prompts) > limit:
            raise error
        sizes.append(len(prompts))
        return generate(model, prompts, *more)

    monkeypatch.setattr(inference, "pack", packed)
    monkeypatch.setattr(inference, "generate", generated)
    limit = 3
    again = tofu_rows(tiny.model, tiny.tokenizer, sets, 8)
    assert 1 < max(sizes) <= 3 and generations(again) == generations(results)
    assert values(again) == pytest.approx(values(results), rel=1e-4)
    limit = 0
    message = error_of(tofu_rows, tiny.model, tiny.tokenizer, sets, 8)
    assert "by itself" in message and "--max-new-tokens" in message and "--dtype" in message


def test_another_error_is_not_taken_for_want_of_memory(tiny, sets, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(inference, "generate", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        tofu_rows(tiny.model, tiny.tokenizer, sets, 8)


@given(st.integers(1, 60), st.integers(0, 60), st.integers(1, 80))
def test_a_model_reads_as_many_tokens_as_it_has_positions(tokens, more, positions):
    """Of the generated tokens all but the last are read."""
    if max(tokens, tokens + more - 1) <= positions:
        inference.check_length("row", tokens, positions, more)
    else:
        message = error_of(inference.check_length, "row", tokens, positions, more)
        assert f"{positions} positions" in message and (f"{more} new ones" in message) == (more > 0)


def test_our_own_log_is_a_retain_reference(tiny, sets, tmp_path, results):
    found = logs.read_log(evaluated(tiny, sets, tmp_path, 8)["path"])
    ratios = [item["truth_ratio"] for item in results["forget"].values()]
    assert found["kind"] == "ours" and logs.truth_ratios(found) == pytest.approx(ratios)


@pytest.fixture(scope="session")
def four_sets() -> dict[str, list[data.Row]]:
    world = toy.toy_world(0)
    names = {"forget": "forget10_perturbed", "retain": "retain_perturbed", "ra": "real_authors_perturbed",
             "wf": "world_facts_perturbed"}  # fmt: skip
    sets = {name: world[config][:3] for name, config in names.items()}
    holdout = [dataclasses.replace(row, perturbed_answers=(), paraphrased_answer=None) for row in world["retain90"][-3:]]
    return sets | {"holdout": holdout}


def test_what_we_write_in_open_unlearnings_schema_reads_back_to_the_same_numbers(tiny, four_sets, tmp_path):
    log = evaluated(tiny, four_sets, tmp_path, 4)
    logs.save_open_unlearning(log["path"], "TOFU", logs.open_unlearning_eval(log, 0.25, 0.6))
    ours, theirs = (logs.read_log(Path(log["path"]).with_name(name)) for name in ("log.json", "TOFU_EVAL.json"))
    assert (ours["kind"], theirs["kind"]) == ("ours", "open-unlearning's")
    assert logs.truth_ratios(theirs) == logs.truth_ratios(ours)
    for found in (ours, theirs):
        scores = metrics.aggregate(found["rows"], found["epsilon"])
        assert scores == pytest.approx({k: log["scores"][k] for k in scores}, rel=1e-12)
        assert (
            "model_utility" in scores
            and "extraction_strength" in scores
            and found["mia_min_k"] == log["scores"]["mia_min_k"]
        )
    assert logs.quality_of(ours, theirs, "the log") == (1.0, "the log")
    summary = json.loads(Path(log["path"]).with_name("TOFU_SUMMARY.json").read_text())
    assert list(summary) == sorted(summary) and summary["forget_quality"] == 0.25
    assert summary["privleak"] == metrics.privleak(log["scores"]["mia_min_k"], 0.6)
    assert summary["model_utility"] == log["scores"]["model_utility"]


def test_our_open_unlearning_file_has_the_published_ones_keys(tiny, four_sets, tmp_path):
    """All but mia_reference, which needs the retrained model itself, item for item."""
    theirs = json.loads(published("open-unlearning_Llama-3.2-1B_full_forget10").read_text())
    log = evaluated(tiny, four_sets, tmp_path, 4, gradnorm=True)
    ours = logs.open_unlearning_eval(log, 0.25)
    assert list(ours) == [key for key in theirs if key != "mia_reference"]

    def shape(value):
        if isinstance(value, dict) and "0" in value:
            return {"0": shape(value["0"])}
        if isinstance(value, dict):
            return {k: shape(v) for k, v in value.items()}
        return [shape(value[0])] if isinstance(value, list) else type(value).__name__

    for key, value in ours.items():
        assert shape(value) == shape(theirs[key]), key


@pytest.mark.parametrize("function, calls", [("pack", 2), ("generate", 1)])
def test_an_interrupted_evaluation_goes_on_from_what_it_has(tiny, four_sets, tmp_path, monkeypatch, function, calls):
    whole = evaluated(tiny, four_sets, tmp_path / "whole", 4)
    monkeypatch.setattr(inference, "score", functools.partial(inference.score, budget=200))
    monkeypatch.setattr(tofu.Tofu, "batch_size", 5)
    real, remaining = getattr(inference, function), iter(range(calls))

    def interrupted(*args):
        if next(remaining, None) is None:
            raise KeyboardInterrupt
        return real(*args)

    def run():
        return evaluated(tiny, four_sets, tmp_path / "cut", 4)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(inference, function, interrupted)
        run()
    [journal] = (tmp_path / "cut").glob("eval/*/journal.jsonl")
    kept = inference.Journal(journal).done
    assert kept and not list((tmp_path / "cut").glob("eval/*/log.json"))
    journal.write_bytes(journal.read_bytes() + b'{"forget 0 answer": {"lo')  # as a killed process leaves it

    texts, prompts, score, generate = [], [], inference.score, inference.generate
    monkeypatch.setattr(inference, "score", lambda m, t, *a: texts.extend(t) or score(m, t, *a))
    monkeypatch.setattr(inference, "generate", lambda m, p, *a: prompts.extend(p) or generate(m, p, *a))
    again = run()
    rows = [row for name in four_sets for row in four_sets[name]]
    answers = sum(1 + bool(row.paraphrased_answer) + len(row.perturbed_answers) for row in rows)
    assert len(texts) == answers - sum(isinstance(value, dict) for value in kept.values())
    assert len(prompts) == 12 - sum(isinstance(value, str) for value in kept.values())
    assert generations_of(again) == generations_of(whole) and not journal.exists()
    numbers = [values({k: v for k, v in log["rows"].items() if k != "holdout"}) for log in (again, whole)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)


def generations_of(log: dict) -> list[str]:
    return [item.get("generation") for rows in log["rows"].values() for item in rows.values()]


# ------------------------------------------------------------------------------------------- summary, table, reference


PARTS = (*metrics.UTILITY_PARTS, *metrics.FORGET_PARTS, "model_utility")
SCORES = {n: round(0.1 + i / 37, 4) for i, n in enumerate(PARTS)}


@pytest.fixture
def summary_of(monkeypatch):
    """summary_of(quality) -> what summary.json holds of a model with SCORES."""

    def summary(quality):
        monkeypatch.setattr(logs, "quality_of", lambda log, reference, where: (quality, where))
        return tofu.Tofu(Options(None)).summary({"scores": SCORES}, None, "there")[0]

    return summary


def test_summary_and_table_hold_every_number(summary_of):
    summary = summary_of(0.5)
    assert set(summary) == {"forget_quality", "forget_quality_log10", "model_utility", "parts", *metrics.FORGET_PARTS}
    assert summary["forget_quality_log10"] == math.log10(0.5)
    assert set(summary["parts"]) == set(metrics.UTILITY_PARTS) and len(summary["parts"]) == 9
    assert {**summary, **summary["parts"]} | SCORES == {**summary, **summary["parts"]}

    report = tofu.Tofu.report({"target": summary_of(1.234e-21), "unlearned": summary_of(0.25)}, "there")
    first, *lines, against, absent = report.splitlines()
    cells = {name: rest for name, *rest in map(str.split, lines)}
    assert first.split() == ["target", "unlearned"] and against == "forget quality against there"
    assert absent.startswith("language is absent: ") and "--retain-model" in absent
    assert cells.pop("forget_quality") == ["1.23e-21", "0.2500"]
    assert cells == {name: [f"{value:.4f}"] * 2 for name, value in SCORES.items()}


def test_a_score_that_does_not_exist_is_a_dash(summary_of):
    _, first, *others, why, _ = tofu.Tofu.report({"model": summary_of(None)}, "why").splitlines()
    assert first.split() == ["forget_quality", "-"] and not any(line.split()[-1] == "-" for line in others)
    assert why == "forget quality is absent: why"


def test_language_stands_beside_forget_quality_and_model_utility(summary_of):
    summaries = {name: summary_of(0.5) | {"language": x} for name, x in (("target", 0.95), ("unlearned", 0.25))}
    _, *lines = tofu.Tofu.report(summaries, "there").splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["forget_quality", "model_utility", "language"]
    assert lines[2].split() == ["language", "0.9500", "0.2500"] and lines[-1] == "forget quality against there"


# ------------------------------------------------------------------------------------------- language of the forget answers


def judged_by_hand(judge: Tiny, question: str, answer: str, total: int | None = None) -> float:
    """`language_loss`, one sequence at a time, from the model's own log-probabilities."""
    example = judge.tokenizer.encode(question, answer)
    ids = example.ids[:total]
    with torch.no_grad():
        log_p = judge.model(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
    free, counted = set(ids[: example.prompt_length]), []
    for i in range(example.prompt_length, len(ids)):
        if ids[i] not in free or i == len(ids) - 1:
            counted.append(-log_p[i - 1, ids[i]].item())
        free -= {ids[i]}
    return sum(counted) / (len(ids) - example.prompt_length)


def language_by_hand(judge: Tiny, items: list[dict], total: int | None = None) -> float:
    """The share of these forget items whose generation is language."""
    truth = sorted(judged_by_hand(judge, v["question"], v["answer"], total) for v in items)
    limit = truth[math.ceil(len(truth) * 95 / 100) - 1]
    said = [(v["question"], v["generation"]) for v in items]
    good = [bool(g) and not metrics.loops(g) and judged_by_hand(judge, q, g, total) <= limit + 1e-6 for q, g in said]
    return sum(good) / len(good)


@pytest.fixture(scope="session")
def forget_rows() -> list[data.Row]:
    return toy.toy_world(0)["forget10_perturbed"][:24]


@pytest.mark.parametrize("protocol", [None, tofu.Protocol(None, 30, 0.0)], ids=["whole", "cut"])
def test_language_is_what_the_judge_says_of_each_answer_alone(tiny, other, forget_rows, protocol):
    benchmark = tofu.Tofu(Options(None))
    benchmark.protocol = protocol or benchmark.protocol
    made = {
        name: tofu_rows(model.model, model.tokenizer, {"forget": forget_rows}, 8, protocol=protocol)
        for name, model in (("model", tiny), ("retrained", other))
    }
    for i, text in enumerate(["", "born in " * 6, forget_rows[2].answer, "\ufffd\x06"]):
        made["model"]["forget"][forget_rows[i].key]["generation"] = text.strip()
    logs = {name: {"scores": {"forget_rouge": 0.5}, "rows": rows} for name, rows in made.items()}
    loaded = []
    judged = benchmark.with_language(logs, lambda: loaded.append(1) or other.model, other.tokenizer)
    assert list(judged) == list(logs) and len(loaded) == 1 and "language" not in logs["model"]["scores"]
    total = protocol and protocol.max_total_tokens
    for log in judged.values():
        items = list(log["rows"]["forget"].values())
        assert log["scores"] == {"forget_rouge": 0.5, "language": pytest.approx(language_by_hand(other, items, total))}
        for v in items:
            by_hand = judged_by_hand(other, v["question"], v["generation"], total) if v["generation"] else None
            assert v["language_loss"] == (by_hand and pytest.approx(by_hand, rel=1e-4))
    shares = [log["scores"]["language"] for log in judged.values()]
    assert 0 < min(shares) <= max(shares) < 1  # or this test compares nothing


def test_the_true_answers_are_language_to_the_judge_whoever_gives_them(other, forget_rows):
    rows = tofu_rows(other.model, other.tokenizer, {"forget": forget_rows}, 2)
    items = {key: item | {"generation": item["answer"]} for key, item in rows["forget"].items()}
    logs = {name: {"scores": {}, "rows": rows | {"forget": items}} for name in ("target", "retrained")}
    judged = tofu.Tofu(Options(None)).with_language(logs, lambda: other.model, other.tokenizer)
    assert {log["scores"]["language"] for log in judged.values()} == {23 / 24}


def test_the_reference_attack_is_the_loss_beyond_the_retrained_models(tiny, other, four_sets):
    logs = {name: evaluated(one, four_sets, None, 2) for name, one in (("model", tiny), ("retrained", other))}
    judged = tofu.Tofu(Options(None)).with_language(logs, lambda: other.model, other.tokenizer)
    beyond = {part: [v["loss"] - logs["retrained"]["rows"][part][k]["loss"] for k, v in logs["model"]["rows"][part].items()]
              for part in ("forget", "holdout")}  # fmt: skip
    wins = [h > f for f in beyond["forget"] for h in beyond["holdout"]]
    assert judged["model"]["scores"]["mia_reference"] == pytest.approx(statistics.fmean(wins))
    assert judged["retrained"]["scores"]["mia_reference"] == 0.5 and "mia_reference" not in logs["model"]["scores"]
    field = inference.logs.open_unlearning_eval(judged["model"], None)["mia_reference"]
    assert [v["score"] for v in field["forget"]["value_by_index"].values()] == beyond["forget"]


def test_an_answer_longer_than_the_judge_is_cut_at_its_positions(tiny, tmp_path):
    judge = make_tiny(tmp_path, seed=1, positions=40)
    rows = tofu_rows(judge.model, judge.tokenizer, {"forget": toy.toy_world(0)["forget10_perturbed"][:2]}, 2)
    for item in rows["forget"].values():
        item["generation"] = "The author was born in " * 20
    seen, tokens = tofu.score, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tofu, "score", lambda m, texts, h: tokens.extend(len(t.example.ids) - 1 for t in texts) or seen(m, texts, h)
        )
        tofu.Tofu(Options(None)).with_language(
            {"retrained": {"scores": {}, "rows": rows}}, lambda: judge.model, judge.tokenizer
        )
    assert max(tokens) == 40


@pytest.mark.parametrize("quirk", [False, True])
def test_the_judge_reads_prompts_as_the_evaluation_does(other, forget_rows, monkeypatch, quirk):
    rows, hidden, score = tofu_rows(other.model, other.tokenizer, {"forget": forget_rows[:2]}, 2), [], tofu.score
    monkeypatch.setattr(tofu, "score", lambda model, texts, hidden_id: hidden.append(hidden_id) or score(model, texts))
    benchmark = tofu.Tofu(Options(None, mask_quirk=quirk))
    benchmark.with_language({"retrained": {"scores": {}, "rows": rows}}, lambda: other.model, other.tokenizer)
    assert hidden == [other.tokenizer.eos_id if quirk else None]


def test_the_summary_of_a_run_has_the_language_of_all_models(tiny, other, tmp_path, monkeypatch, capsys):
    sets = tofu.evaluation_sets
    few = {"ra": "[:3]", "wf": "[:3]"}
    monkeypatch.setattr(tofu, "evaluation_sets", lambda *a: {k: v + few.get(k, "") for k, v in sets(*a).items()})
    monkeypatch.chdir(tmp_path)
    arguments = ["--forget", "toy_forget10[:24]", "--eval-retain", "toy_retain_perturbed[:3]", "--max-new-tokens", "8"]
    training = ["--retain", "toy_retain90[:24]", "--epochs", "1", "--batch-size", "8", "--lr", "1e-3", "--eval-every", "0"]
    models = ["--model", str(tiny.folder), "--retain-model", str(other.folder)]
    assert train.main([*arguments, *training, *models, "--forget-loss", "ga", "--retain-loss", "gd", "--out", "run"]) == 0
    table = capsys.readouterr().out
    summary, kept = json.loads(Path("run/summary.json").read_text()), {}
    for name in ("target", "unlearned", "retrained"):
        [log] = Path("run/eval").glob(f"{'final' if name == 'unlearned' else name}-*/log.json")
        kept[name] = json.loads(log.read_text())
        field = json.loads(log.with_name("TOFU_EVAL.json").read_text())
        assert not [key for key in (*kept[name]["scores"], *field) if "language" in key]  # of one model alone
        by_hand = language_by_hand(other, list(kept[name]["rows"]["forget"].values()))
        assert summary[name]["language"] == pytest.approx(by_hand)
    [shown] = [line.split()[1:] for line in table.splitlines() if line.startswith("language ")]
    assert [float(cell) for cell in shown] == pytest.approx([summary[n]["language"] for n in kept], abs=6e-5)

    rows = tofu.Tofu.rows  # what the run has kept is read, and its language is told all the same
    monkeypatch.setattr(tofu.Tofu, "rows", lambda *a: pytest.fail("evaluated again") if a[3] == "model" else rows(*a))
    for _ in range(2):
        assert eval.main([*arguments, "--model", "run", "--retain-model", str(other.folder), "--out", "again.json"]) == 0
        again = json.loads(Path("again.json").read_text())
        assert again["model"]["language"] == summary["unlearned"]["language"]
        assert again["retrained"]["language"] == summary["retrained"]["language"]


def test_a_run_is_told_of_degenerate_text_by_its_language_where_that_is_known(tmp_path):
    class Signs:
        plots, signs = True, staticmethod(lambda log, reference: (None, 0.9))

    (tmp_path / "log.jsonl").write_text('{"epoch": 1.0, "nll/forget": 9.0}\n')
    scores = {"model_utility": 0.8, "forget_quality": 0.5}

    def told(unlearned: dict, retrained: dict) -> bool:
        summary = {"target": scores, "unlearned": scores | unlearned, "retrained": scores | retrained}
        return any("degenerate" in line for line in hints.find_hints(tmp_path, Signs, {"unlearned": {}}, None, summary))

    assert told({}, {})
    assert not told({"language": 0.55}, {"language": 1.0}) and told({"language": 0.45}, {"language": 1.0})
    assert not told({"language": 0.45}, {"language": 0.9})  # the retrained model's own answers are the measure


def reference_of(alias="run", forget="tofu_forget10", retain_logs=None, log=None, data_dir=None):
    benchmark = tofu.Tofu(Options(None))
    benchmark.options = Options(forget, data_dir)
    reference, where = benchmark.reference(alias, retain_logs, log)
    return reference and logs.truth_ratios(reference), where


def test_the_retrained_model_comes_before_a_log_file(tmp_path):
    path = write_log(tmp_path / "log.json", our_log([0.3, 0.4]))
    assert reference_of(retain_logs=path) == ([0.3, 0.4], str(path))
    assert reference_of(retain_logs=path, log=our_log([0.5])) == ([0.5], "the retrained model")


@pytest.mark.parametrize("alias", tofu.CHECKPOINTS)
@pytest.mark.parametrize("forget, retain", tofu.TOFU_RETAIN.items())
@pytest.mark.parametrize("suffix", ["", "_perturbed"])
def test_an_alias_finds_its_published_retain_log_in_hub_layout(tmp_path, alias, forget, retain, suffix):
    family = tofu.CHECKPOINTS[alias].base.removeprefix("meta-llama/")
    folder = tmp_path / "open-unlearning" / "eval" / f"tofu_{family}_{retain}"
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

    monkeypatch.setattr(inference, "hub_file", unreachable)
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
    names = ("forget_quality", "model_utility", "language", *metrics.UTILITY_PARTS, *metrics.FORGET_PARTS)
    lines = [line.split() for line in out.splitlines() if " is absent: " not in line]
    return {words[0]: words[1:] for words in lines if words and words[0] in names}


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
    write_log(run / "config.json", {"config": {}})  # as train.py's
    code, out, _ = run_main(capsys, run)
    [log] = (run / "eval").glob("*/log.json")
    assert code == 0 and f"per-item results: {log}" in out and len(evaluations) == 1
    assert run_main(capsys, run)[:2] == (0, out) and len(evaluations) == 1  # the second time it is read

    code, out, _ = run_main(capsys, other.folder, "--retain-logs", log)
    assert code == 0 and table_of(out)["forget_quality"] == ["1.0000"] and f"forget quality against {log}" in out
    code, out, _ = run_main(capsys, tiny.folder, "--retain-logs", log)
    assert code == 0 and float(table_of(out)["forget_quality"][0]) <= 1 and not (tiny.folder / "eval").exists()


def test_main_refuses_what_is_longer_than_the_model(tiny, capsys):
    err = assert_refused(capsys, tiny.folder, "--max-new-tokens", "250")
    assert "256 positions" in err and "250 new ones" in err and "--max-new-tokens" in err


def test_own_rows_are_evaluated_as_far_as_they_go(tiny, other, capsys, tmp_path):
    path = tmp_path / "own.jsonl"
    own = [
        {"question": f"Who is {i}?", "answer": answer}
        for i, answer in enumerate(("Ann.", "\u041e\u043d\u0430.", "It is Bo."))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in own))
    forget = ("--forget", str(path))
    code, out, err = run_main(capsys, tiny.folder, "--json", forget=forget)
    found = json.loads(out)
    assert code == 0 and found["forget_quality"] is None and found["model_utility"] is None and not err
    assert {"forget_probability", "forget_rouge", "exact_memorization", "extraction_strength"} <= found.keys()
    assert found["unscorable"] == pytest.approx(1 / 7) and [*found["parts"]] == ["retain_probability", "retain_rouge",
                                                                                "retain_truth_ratio"]  # fmt: skip
    code, out, _ = run_main(capsys, tiny.folder, "--retain-model", other.folder, "--show", "2", forget=forget)
    assert code == 0 and "ROUGE is 0 whatever is said for 14% of the rows" in out
    assert "forget quality is absent: no truth ratios" in out and re.search(r"^language +\d", out, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments, flag",
    [
        (["--logs", "x", "--retain-model", "y"], "--retain-model"),
        (["--logs", "x", "--protocol", "tofu"], "--protocol"),
        (["--logs", "x", "--forget", "tofu_forget10"], "--forget"),
        (["--plot", "x", "--json"], "--json"),
        (["--report", "x", "--show", "3"], "--show"),
        (["--model", "x", "--forget", "muse_news", "--max-new-tokens", "5"], "--max-new-tokens"),
        (["--model", "x", "--forget", "muse_news", "--mask-quirk"], "--mask-quirk"),
        (["--model", "x", "--forget", "tofu_forget10", "--no-stemmer"], "--no-stemmer"),
        (["--model", "x", "--forget", "tofu_forget10", "--json", "--show", "3"], "--show"),
        (["--logs", "x", "--out", "."], "--out"),
        (["--logs", "x", "--out", __file__ + "/x.json"], "--out"),
        (["--logs", "x", "--out", "a\0b"], "--out"),
    ],
)
def test_a_flag_that_cannot_apply_is_refused_before_anything_is_read(capsys, arguments, flag):
    assert eval.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"error: {flag}") and err.count("\n") == 1


def test_an_interrupted_evaluation_says_whether_it_goes_on(tiny, capsys, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "generate", interrupted)
    run = tmp_path / "run"
    save_pretrained(tiny.model, run / "model", tokenizer_from=tiny.tokenizer.folder)
    write_log(run / "config.json", {"config": {}})  # as train.py's
    for model, told in ((run, "interrupted; the same command goes on from here"), (tiny.folder, "interrupted")):
        code, _, err = run_main(capsys, model)
        assert code == 130 and err.endswith(told) and "Traceback" not in err
    [journal] = run.glob("eval/*/journal.jsonl")
    assert inference.Journal(journal).done and not list(run.glob("eval/*/.lock"))


def test_a_reader_that_has_gone_and_no_memory_for_the_model_are_no_tracebacks(tiny, capsys, monkeypatch):
    def fail(error):
        def raising(*arguments, **settings):
            raise error

        return raising

    with monkeypatch.context() as patch:
        patch.setattr(eval, "load_pretrained", fail(MemoryError()))
        assert "out of memory" in assert_refused(capsys, tiny.folder)
    with monkeypatch.context() as patch:
        patch.setattr(eval, "load_pretrained", fail(BrokenPipeError()))
        assert run_main(capsys, tiny.folder)[0] == 141


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
    assert re.findall(r"forget (.):", tofu.Tofu.worst({"rows": {"forget": rows}}, 2)) == ["c", "b"]
    assert re.findall(r"retain (.):", tofu.Tofu.worst({"rows": {"retain": rows}}, 3)) == ["a", "b", "c"]
    judged = {"a": item(0.9, 1.0) | {"language_loss": 1.234}, "b": item(0.2, 1.0) | {"language_loss": None}}
    assert re.findall(r"language loss.*", tofu.Tofu.worst({"rows": {"forget": judged}}, 2)) == ["language loss 1.23"]


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


HOSTILE = [math.nan, math.inf, -1.0, 2.0, 10**400, "x", None, True, [], {}, "\ud800"]


@given(st.sampled_from(["epoch", "forget_quality", "model_utility", "target", "retrained"]), st.sampled_from(HOSTILE))
def test_a_hostile_trajectory_is_drawn_or_refused_in_one_line(tmp_path_factory, key, value):
    pytest.importorskip("matplotlib")
    run = tmp_path_factory.mktemp("$x^{plots") / "run$\\frac"
    finished_run(run)
    lines = (run / "trajectory.jsonl").read_text().splitlines()
    name, text = ("summary.json", json.loads((run / "summary.json").read_text())), json.loads(lines[-1])
    if key in name[1]:
        write_log(run / "summary.json", name[1] | {key: value})
    else:
        (run / "trajectory.jsonl").write_text(lines[0] + "\n" + json.dumps(text | {key: value}) + "\n")
    try:
        assert eval.plot(run).read_bytes().startswith(b"\x89PNG")
    except EvalError as e:
        assert str(e).startswith(str(run)) and "\n" not in str(e)


def test_main_prints_nothing_but_json_when_asked(tiny, other, capsys):
    code, out, err = run_main(capsys, tiny.folder, "--retain-model", other.folder, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "") and set(found) >= {"forget_quality", "model_utility", "parts", "retain_reference"}
    assert found["forget_quality"] <= 1 and found["retain_reference"] == "the retrained model"


def test_a_retain_log_is_brought_to_the_arithmetic_truth_ratio_of_the_evaluation(tiny, other, capsys, tmp_path):
    run = tmp_path / "run"
    save_pretrained(other.model, run / "model", tokenizer_from=other.tokenizer.folder)
    write_log(run / "config.json", {"config": {}})  # as train.py's
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
    assert toy.toy_world(0)["forget10"][0].key in assert_refused(capsys, folder)


def test_main_says_what_to_install_before_any_work(tiny, capsys, monkeypatch, evaluations):
    monkeypatch.setattr(metrics, "RougeScorer", None)
    assert "pip install" in assert_refused(capsys, tiny.folder) and not evaluations


@pytest.mark.parametrize("argv", [[], ["--model", "x"], ["--model", "x", "--forget", "y", "--dtype", "int8"]])
def test_unknown_or_missing_flags_exit_with_2(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        eval.main(argv)
    assert caught.value.code == 2 and "usage:" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- models and devices


@pytest.mark.parametrize("alias", eval.ALIASES)
@pytest.mark.parametrize("kind", ["target", "base"])
def test_an_alias_is_its_target_or_base_checkpoint_with_its_prompt_format_and_tokenizer(
    tiny, alias, kind, tmp_path, monkeypatch
):
    checkpoint, asked = eval.ALIASES[alias], []
    folder = write_tokenizer(tmp_path, checkpoint.prompt)
    config = json.loads((tiny.folder / "config.json").read_text())
    write_log(folder / "config.json", config | {"vocab_size": 1000})
    monkeypatch.setattr(eval, "resolve_folder", lambda name, *patterns: asked.append(name) or folder)
    source = eval.open_source(alias, kind)
    assert source.name == eval.resolve_model(alias, kind) == f"{getattr(checkpoint, kind)}@main"
    assert asked == [source.name, *([checkpoint.tokenizer] if checkpoint.tokenizer else [])]
    assert source.tokenizer.format_name == checkpoint.prompt and (source.folder, source.run) == (folder, None)
    own = eval.open_source(alias, kind, "my/tokenizer", "plain")  # flags come before what an alias says
    assert own.tokenizer.format_name == "plain" and asked[-1] == "my/tokenizer"


def test_a_name_is_an_alias_a_folder_or_a_hub_id(tmp_path):
    assert eval.resolve_model(str(tmp_path), "target") == str(tmp_path)
    assert eval.resolve_model("owner/name", "base") == "owner/name"
    message = error_of(eval.resolve_model, "lama2-7b", "target", kind=ModelError)
    assert "lama2-7b" in message and all(alias in message for alias in eval.ALIASES)


def test_a_run_folder_is_a_place_to_keep_its_evaluations(tiny, tmp_path):
    run = tmp_path / "run"
    save_pretrained(tiny.model, run / "model", tokenizer_from=tiny.tokenizer.folder)
    write_log(run / "config.json", {"config": {}})  # as train.py's
    assert eval.open_source(str(run), "target").run == run and eval.open_source(str(tiny.folder), "target").run is None
    write_log(run / "config.json", {"model_type": "llama"})  # a folder with a model in it
    assert eval.open_source(str(run), "target").run is None


@pytest.mark.parametrize(
    "spec, name",
    [
        ("tofu_forget10[:4]", "TOFU"),
        ("toy_forget10", "TOFU"),
        ("mine.jsonl", "TOFU"),
        ("muse_news", "MUSE"),
        ("muse_mine.jsonl[:3]", "TOFU"),
    ],
)
def test_a_data_set_belongs_to_the_benchmark_of_its_first_word(spec, name):
    assert eval.benchmark_of(spec).name == name


@pytest.mark.parametrize("kind", dict.fromkeys(eval.BENCHMARKS.values()), ids=lambda kind: kind.name)
def test_a_benchmark_has_all_that_is_declared(kind):
    declared = inference.Benchmark.__annotations__
    assert len(declared) > 20 and not [name for name in declared if not hasattr(kind, name)]
    assert not kind.plots or hasattr(kind, "signs")


def test_a_dtype_is_chosen_by_the_device():
    cpu = inference.pick_device("cpu")
    assert inference.pick_dtype("auto", cpu) == torch.float32 and inference.pick_dtype("bfloat16", cpu) == torch.bfloat16
    assert "--device cuda:99" in error_of(inference.pick_device, "cuda:99")


def test_generation_stops_at_the_prompt_formats_own_end_token_too(tiny, sets, monkeypatch):
    """Llama 3's chat format ends answers by <|eot_id|>, which the config of a base model does not name."""
    stops = []
    monkeypatch.setattr(inference, "generate", lambda model, p, n, stop, hidden: stops.append(stop) or [[] for _ in p])
    other_eos = dataclasses.replace(tiny.model.config, eos_token_ids=(7,))
    monkeypatch.setattr(tiny.model, "config", other_eos)
    tofu_rows(tiny.model, tiny.tokenizer, sets, 3)
    assert stops and all(stop == {7, tiny.tokenizer.eos_id} for stop in stops)
