"""The contestants of the benchmarks do the same work: the same losses, step after step, in float32."""

import argparse
import importlib.util
from pathlib import Path

import pytest
import torch

import dipo
import reference
import train
from model import LlamaConfig

pytest.importorskip("transformers")
TINY = LlamaConfig(300, 32, 48, 2, 4, 2, 8, 256, tie_word_embeddings=True, initializer_range=0.1)


def script(name: str):
    path = Path(__file__).resolve().parents[1] / "bench" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"bench_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def step():
    return script("step")


def losses(step, monkeypatch, variant: str) -> list[float]:
    monkeypatch.setitem(step.SHAPES, "small", TINY)
    monkeypatch.setattr(train, "compile_step", lambda model: dipo.position_terms)
    for module, name in ((train, "pack"), (reference, "pack"), (train, "chunk_positions")):  # a variant may replace it
        monkeypatch.setattr(module, name, getattr(module, name))
    args = argparse.Namespace(
        model=None, data_dir=None, shape="small", vocab=None, length=None, dtype="float32", device="cpu", batch=4,
        micro_batch_size=3, gradient_checkpointing=False,
    )  # fmt: skip
    make = step.field_step if variant.startswith("field") else step.our_step
    _, _, start = make(args, variant)
    do = start()
    return [do() for _ in range(3)]


VARIANTS = ["ours", "ours-eager", "ours-checkpointing", "ours-recompute", "ours-two-passes", "ours-padded", "ours-one-chunk"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_ours_and_the_fields_way_have_the_same_losses(step, monkeypatch, variant):
    field = losses(step, monkeypatch, "field")
    assert len(set(field)) == 3  # it moves
    assert losses(step, monkeypatch, variant) == pytest.approx(field, rel=1e-4)


def test_finetuning_and_npo_fall(step, monkeypatch):
    for variant in ("finetune", "field-npo"):
        first, _, last = losses(step, monkeypatch, variant)
        assert last < first


def test_an_exponent_is_the_slope_of_the_logarithms(step):
    xs = [64.0, 128.0, 512.0]
    assert step.exponent(xs, [3 * x**1.5 for x in xs]) == pytest.approx(1.5)


def test_work_counts_what_a_step_must_compute(step):
    """One layer's matrices six times per token, the head three times per answer token, once more for the reference."""
    args = argparse.Namespace(model=None, data_dir=None, length=20, batch=2)
    counted = step.work(TINY, step.make_examples(args, TINY.vocab_size))
    assert counted["tokens"] == 4 * 19 and counted["answer_tokens"] == 4 * 10
    matrices = sum(p.numel() for n, p in step.on_meta(TINY).named_parameters() if p.ndim == 2 and "embed" not in n)
    head = 2 * TINY.vocab_size * TINY.hidden_size * 40
    attention = 6 * TINY.num_hidden_layers * 32 * 4 * 19 * 19
    assert counted["finetuning"] == 6 * matrices * 4 * 19 + attention + 3 * head
    assert counted["dipo"] - counted["finetuning"] == head


def test_scoring_and_generation_equal_transformers(monkeypatch):
    bench = script("generation")
    monkeypatch.setattr(bench, "SMOLLM2", TINY)
    args = argparse.Namespace(model=None, data_dir=None)
    ours = bench.load(args, torch.float32)
    theirs = bench.load_reference(ours, torch.float32)
    examples, _, _ = bench.load_examples(args, TINY.vocab_size, 5)
    prompts, stop = [list(e.ids[: e.prompt_length]) for e in examples], list(TINY.eos_token_ids)
    assert bench.score_ours(ours, examples) == pytest.approx(bench.score_reference(theirs, examples), rel=1e-4)
    assert bench.generate_ours(ours, prompts, 6, stop) == bench.generate_reference(theirs, prompts, 6, stop)
