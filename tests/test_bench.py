"""The contestants of the benchmarks do the same work: the same losses, step after step, in float32."""

import argparse
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

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
        micro_batch_size=3, gradient_checkpointing=False, optimizer="adamw",
    )  # fmt: skip
    make = step.field_step if variant.startswith("field") else step.our_step
    _, _, start = make(args, variant)
    do = start()
    return [float(do()) for _ in range(3)]


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


def settings(**changed) -> argparse.Namespace:
    known = {"model": None, "data_dir": None, "shape": "small", "vocab": None, "length": 64, "dtype": "float32"}
    known |= {"device": "cpu", "batch": 4, "micro_batch_size": 4, "gradient_checkpointing": False, "optimizer": "adamw"}
    return argparse.Namespace(**(known | changed))


@pytest.mark.parametrize("variant", ["ours", "ours-eager", "ours-checkpointing", "ours-padded", "field", "finetune"])
def test_more_of_anything_needs_no_less_memory(step, variant):
    needs = []
    for changed in ({}, {"length": 128}, {"vocab": 2**17}, {"shape": "smollm2-135m"}, {"batch": 16}):
        args = settings(**changed)
        config = step.config_of(args)
        needs.append(step.predicted_memory(variant, args, config, step.make_examples(args, config.vocab_size)))
    (state, above), *larger = needs
    assert all(s >= state and a >= above > 0 for s, a in larger)
    assert state == 16 * sum(p.numel() for p in step.on_meta(step.config_of(settings())).parameters())


def test_what_does_not_fit_is_left_out_by_name_before_it_starts(step, monkeypatch, capsys):
    """Side by side where all fit, else one after the other; what does not fit alone is named, and never started."""
    args, variants = settings(batch=32), ["ours", "finetune", "field"]
    examples = step.make_examples(args, step.config_of(args).vocab_size)
    needs = {v: sum(step.predicted_memory(v, args, step.config_of(args), examples)) + step.PROCESS for v in variants}
    assert needs["field"] > needs["ours"] + needs["finetune"] + 1
    started = []

    def started_with(variants, args, steps, **changed):
        started.append(variants)
        return dict.fromkeys(variants, {})

    monkeypatch.setattr(step, "in_turns", started_with)
    for left, expected in (
        (sum(needs.values()) + 1, [variants]),
        (sum(needs.values()) - 1, [["ours"], ["finetune"], ["field"]]),
        (needs["ours"] + needs["finetune"] + 1, [["ours", "finetune"]]),
        (1e6, []),
    ):
        monkeypatch.setattr(step, "free_memory", lambda device, left=left: left)
        started.clear()
        found = step.measure(variants, args, 1)
        assert started == expected and [*found] == [v for some in expected for v in some]
        said = capsys.readouterr().out
        assert f"{step.NAMES['field']}: needs {needs['field'] / 1e9:.1f} GB" in said
        assert ("one after the other" in said) == (len(expected) == 3)
        assert (f"LEFT OUT, {left / 1e9:.1f} are available" in said) == ("field" not in found)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """(the module, a function of its parts: rehearse them, -> (exit status, {part: how it ended}))."""
    bench = script("gpu")
    monkeypatch.setattr(bench.train, "compile_step", lambda model: dipo.position_terms)

    def rehearse(call: str, *parts: str) -> tuple[int, dict[str, str]]:
        flags = ["--device", "cpu", "--tiny", "--out", str(tmp_path), *(["--only", ",".join(parts)] if parts else [])]
        status = bench.main([call, *flags])
        return status, json.loads((tmp_path / f"gpu-{call}.json").read_text())["status"]

    return bench, rehearse


def test_what_a_gpu_must_compute_rightly_is_rehearsed_on_the_cpu(gpu, monkeypatch):
    bench, rehearse = gpu
    parts = "attention", "gradients", "generation"
    assert rehearse("1", *parts) == (0, dict.fromkeys(parts, "ok"))
    exact = bench.Packing.attend
    monkeypatch.setattr(
        bench.Packing, "attend", lambda self, q, k, v: exact(self, q, k, v * (1.02 if q.dtype != torch.float64 else 1))
    )
    status, ended = rehearse("1", "attention")
    assert status == 1 and ended["attention"].startswith("WRONG: attention with 9 heads, 3 groups of 64")


def test_runs_of_an_earlier_call_are_not_compared(gpu, monkeypatch, tmp_path):
    bench, rehearse = gpu

    def kills(b) -> dict:
        found = len(bench.losses(b.runs / "SIGTERM"))
        (b.runs / "SIGTERM").mkdir()
        (b.runs / "SIGTERM/log.jsonl").write_text('{"loss": 1.0}\n')
        return {"before": found, "after": len(bench.losses(b.runs / "SIGTERM"))}

    monkeypatch.setitem(bench.CALLS, "3", [kills])
    for _ in range(2):
        assert rehearse("3") == (0, {"kills": "ok"})
        assert json.loads((tmp_path / "gpu-3.json").read_text())["found"]["kills"] == {"before": 0, "after": 1}


def test_the_time_of_a_kernel_counts_once():
    """torch's profiler charges a product, its kernel, and the range that the optimizer names."""
    kinds = torch.autograd.DeviceType
    rows = [(kinds.CPU, False, 5e6), (kinds.CUDA, False, 5e6), (kinds.CUDA, True, 2e6), (kinds.CUDA, False, 1e6)]
    averages = [SimpleNamespace(device_type=d, is_user_annotation=u, self_device_time_total=t, count=3) for d, u, t in rows]
    assert script("gpu").busy(averages) == (6, 6)


def test_a_part_that_fails_does_not_stop_the_next(gpu, monkeypatch, capsys):
    bench, rehearse = gpu

    def broken(b):
        raise ValueError("no such kernel")

    def fine(b):
        return {"n": 1}

    for name, status in (("attention", 1), ("steps", 0)):  # the first must be right, the second only measures
        broken.__name__ = name
        monkeypatch.setitem(bench.CALLS, "1", [broken, fine])
        assert rehearse("1") == (status, {name: "failed: no such kernel", "fine": "ok"})
        assert "ValueError: no such kernel" in capsys.readouterr().err


def test_open_unlearning_gets_our_prompt():
    from bench.peer import summary, template_of
    from data import PROMPT_FORMATS

    for name in ("smollm2", "llama2"):
        t = template_of(argparse.Namespace(format=PROMPT_FORMATS[name]))
        prompt = (
            t["system_prompt_with_special_tokens"] + t["user_start_tag"] + "Who?" + t["user_end_tag"] + t["asst_start_tag"]
        )
        assert "{bos}" * (name == "llama2") + prompt == PROMPT_FORMATS[name].prompt.format(question="Who?", bos="{bos}")
    turns = {"ours": [(1.0, None), (2.0, None), (1.0, None)], "open-unlearning": [(3.0, None), (8.0, None), (2.0, None)]}
    found = summary(turns, 6e9, 2e9)
    assert (found["ratio"], found["floor"], found["median"]["ours"]) == (3.0, 3.0, 1.0)
