"""model.py: properties of the forward pass and of generation, parity with transformers, checkpoints good and bad.

Everything is float32 and a few thousand parameters unless a test says otherwise.
"""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import forks
import huggingface_hub
import pytest
import torch
import transformers
from claims import claim
from helpers import make_tiny, tofu_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import inference
import model as model_module
from attention import Packing
from model import (
    TOKENIZER_FILES,
    Llama,
    LlamaConfig,
    ModelError,
    generate,
    load_pretrained,
    read_config,
    recorded_prompt,
    rope_frequencies,
    save_pretrained,
)
from toy import toy_world

TOLERANCE = 1e-4  # of logits, absolute
ROOT = Path(model_module.__file__).parent
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
V = 61  # vocabulary of every tiny model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors are so small that threads would only wait for each other, very long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------ what is tested

TINY = LlamaConfig(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    initializer_range=0.3,  # large enough that logits differ clearly from each other
    eos_token_ids=(),
)
TINY_CONFIGS = {
    "llama2": TINY,
    "llama3": dataclasses.replace(
        TINY, num_key_value_heads=2, head_dim=10, rope_scaling=LLAMA3_ROPE, tie_word_embeddings=True
    ),
}


@lru_cache
def tiny(name: str = "llama3", compute_dtype: torch.dtype = torch.float32) -> Llama:
    """A random model that no test changes; its norms are not one, as in a trained model."""
    model = Llama(TINY_CONFIGS[name], compute_dtype).init_weights(seed=0).eval()
    shake_norms(model)
    return model


@torch.no_grad()
def shake_norms(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.ndim == 1:
            p.copy_(0.5 + torch.rand(p.shape, generator=generator))


def stopping_at(model: Llama, *eos: int) -> Llama:
    """The same weights with other stop tokens."""
    twin = copy.copy(model)
    twin.config = dataclasses.replace(model.config, eos_token_ids=eos)
    return twin


def until(ids: list[int], eos) -> list[int]:
    """ids before the first stop token."""
    return next((ids[:i] for i, t in enumerate(ids) if t in eos), ids)


@torch.no_grad()
def logits_of(model: Llama, *rows: list[int], **options) -> torch.Tensor:
    return model(torch.tensor(rows), **options)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


names = st.sampled_from(sorted(TINY_CONFIGS))
tokens = st.integers(0, V - 1)
sequences = st.lists(tokens, min_size=1, max_size=24)  # beyond the 16 original positions of LLAMA3_ROPE
batches = st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1, max_size=5)
quick = settings(deadline=None, max_examples=25)


# ------------------------------------------------------------------------------------------- properties of the forward


@quick
@given(names, sequences, sequences, sequences)
@claim("a later token changes no earlier logit", "ours")
def test_a_later_token_changes_no_earlier_logit(name, start, one_end, other_end):
    n = min(len(one_end), len(other_end))
    one, other = (logits_of(tiny(name), start + end[:n])[:, : len(start)] for end in (one_end, other_end))
    assert distance(one, other) < TOLERANCE


@quick
@given(names, st.integers(1, 3), st.integers(1, 24), st.data())
def test_logits_at_positions_are_the_slice_of_all_logits(name, B, T, data):
    """Counted through all rows, one after the other, in any order and repeated."""
    rows = data.draw(st.lists(st.lists(tokens, min_size=T, max_size=T), min_size=B, max_size=B))
    at = data.draw(st.lists(st.integers(0, B * T - 1), min_size=1, max_size=6))
    found = logits_of(tiny(name), *rows, at=torch.tensor(at))
    assert distance(found, logits_of(tiny(name), *rows).flatten(0, 1)[at]) < TOLERANCE


@quick
@given(names, sequences)
def test_logits_are_the_head_of_the_hidden_states(name, ids):
    model = tiny(name)
    with torch.no_grad():
        hidden = model.hidden_states(torch.tensor([ids]))
    assert hidden.shape == (1, len(ids), model.config.hidden_size) and hidden.dtype == model.compute_dtype
    assert torch.equal(model.lm_head(hidden), logits_of(model, ids))


@quick
@given(names, batches, tokens)
@claim("padding changes no logit", "ours")
def test_padding_to_the_right_changes_nothing(name, rows, pad):
    longest = max(map(len, rows))
    together = logits_of(tiny(name), *(row + [pad] * (longest - len(row)) for row in rows))
    for row, batched in zip(rows, together, strict=True):
        assert distance(logits_of(tiny(name), row)[0], batched[: len(row)]) < TOLERANCE


@lru_cache
def float64(name: str, checkpointing: bool = False) -> Llama:
    """`tiny` in float64, but for its norms, angles and logits, which are float32 whatever the rest is."""
    model = copy.deepcopy(tiny(name)).double()
    model.compute_dtype, model.checkpointing = torch.float64, checkpointing
    return model


def packed(rows: list[list[int]]) -> dict:
    """Arguments of the model."""
    positions = [i for row in rows for i in range(len(row))]
    return {
        "input_ids": torch.tensor([sum(rows, [])]),
        "positions": torch.tensor([positions]),
        "packing": Packing([len(row) for row in rows], torch.device("cpu")),
    }


def padded(rows: list[list[int]], pad: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


def gradients(model: Llama, logits: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Of every parameter, for a loss that weighs each logit of each sequence [T, V] differently."""
    generator = torch.Generator().manual_seed(0)
    loss = sum((z.softmax(-1) * torch.randn(z.shape, generator=generator)).sum() for z in logits)
    return torch.autograd.grad(loss, list(model.parameters()))


def assert_same_gradients(found, expected) -> None:
    size = max(g.abs().max().item() for g in expected)
    assert size > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * size)


@quick
@given(names, batches, tokens, st.booleans())
@claim("packing changes no logit and no gradient", "ours")
def test_packing_changes_no_logit_and_no_gradient(name, rows, pad, checkpointing):
    model, plain = float64(name, checkpointing), float64(name)
    together = model(**packed(rows))[0].split([len(row) for row in rows])
    one_by_one = [plain(torch.tensor([row]))[0] for row in rows]
    batch = [z[: len(row)] for z, row in zip(plain(padded(rows, pad)), rows, strict=True)]
    for z, *others in zip(together, one_by_one, batch, strict=True):
        assert all(distance(z, other) < 1e-5 for other in others)
    found = gradients(model, together)
    assert_same_gradients(found, gradients(plain, one_by_one))
    assert_same_gradients(found, gradients(plain, batch))


@quick
@given(names, batches, batches, batches, batches)
def test_a_packed_sequence_changes_nothing_in_another(name, before, after, other_before, other_after):
    row = [7, 8, 9, 10]
    found = []
    for first, last in ((before, after), (other_before, other_after), ([], after), (before, [])):
        with torch.no_grad():
            z = float64(name)(**packed([*first, row, *last]))[0]
        start = sum(map(len, first))
        found.append(z[start : start + len(row)])
    assert all(distance(found[0], z) < 1e-5 for z in found[1:])


@quick
@given(names, batches, st.data())
def test_no_gradient_flows_from_a_packed_sequence_into_another(name, rows, data):
    which, embedded = data.draw(st.integers(0, len(rows) - 1)), []
    model = float64(name)
    with model.model.embed_tokens.register_forward_hook(lambda *a: embedded.append(a[-1])):
        z = model(**packed(rows))[0].split([len(row) for row in rows])[which]
    (grad,) = torch.autograd.grad(z.square().sum(), embedded)
    flows = (grad[0] != 0).any(-1)
    start = sum(map(len, rows[:which]))
    assert flows[start : start + len(rows[which])].all() and flows.sum() == len(rows[which])


@quick
@given(names, batches, st.booleans())
@claim("gradient checkpointing changes no logit and no gradient", "ours")
def test_gradient_checkpointing_changes_no_logit_and_no_gradient(name, rows, is_packed):
    arguments = packed(rows) if is_packed else {"input_ids": padded(rows, 0)}
    one, other = (float64(name, checkpointing) for checkpointing in (False, True))
    found, expected = other(**arguments), one(**arguments)
    assert torch.equal(found, expected)
    for a, b in zip(gradients(other, [*found]), gradients(one, [*expected]), strict=True):
        assert torch.equal(a, b)


def test_the_gradient_of_positions_that_several_read_is_the_same_each_time():
    """With two threads, which indexing has add up in any order."""
    model, made = Llama(TINY).init_weights(0), torch.Generator().manual_seed(0)
    ids, at = torch.ones(1, 500, dtype=torch.int64), torch.randint(500, (4000,), generator=made)
    packing, weight = Packing([1] * 500, torch.device("cpu")), torch.randn(4000, model.config.hidden_size, generator=made)

    def gradient() -> torch.Tensor:
        y = model.hidden_states(ids, at, packing=packing)
        return torch.autograd.grad(y, model.model.embed_tokens.weight, weight)[0]

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    first = gradient()
    assert all(torch.equal(gradient(), first) for _ in range(5))  # indexing: not one of 1000
    torch.set_num_threads(threads)


def test_gradient_checkpointing_passes_each_block_twice_and_only_where_gradients_are_wanted():
    model, calls = copy.deepcopy(float64("llama3", True)), []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda *a: calls.append(torch.is_grad_enabled()))
    arguments = packed([[1, 2, 3], [4]])
    with torch.no_grad():
        model(**arguments)
    assert len(calls) == len(model.model.layers)
    model(**arguments).sum().backward()
    assert len(calls) == 3 * len(model.model.layers)


@quick
@given(names, sequences, st.integers(1, 100))
@claim("rotary positions count only by their differences", "RoPE")
def test_only_relative_positions_count(name, ids, shift):
    positions = torch.arange(len(ids))[None]
    moved = logits_of(tiny(name), ids, positions=positions + shift)
    assert distance(logits_of(tiny(name), ids, positions=positions), moved) < TOLERANCE


@quick
@given(names, sequences, st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_frozen_copy_computes_bit_for_bit_the_same(name, ids, compute_dtype):
    model = tiny(name, compute_dtype)
    assert torch.equal(logits_of(model, ids), logits_of(model.frozen_copy(), ids))


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_a_frozen_copy_has_no_gradients_and_leaves_the_original_as_it_was(name):
    model = copy.deepcopy(tiny(name, torch.bfloat16))
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    twin = model.frozen_copy()
    assert not any(p.requires_grad or p.grad is not None for p in twin.parameters())
    assert {p.dtype for p in twin.parameters() if p.ndim == 2} == {torch.bfloat16}
    assert (twin.lm_head.weight is twin.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert all(p.requires_grad and p.grad is not None and p.dtype == torch.float32 for p in model.parameters())


def test_positions_do_count():
    ids = [5, 6, 5, 6, 7]
    apart = torch.tensor([[0, 1, 2, 3, 40]])
    assert distance(logits_of(tiny(), ids), logits_of(tiny(), ids, positions=apart)) > 0.01


def test_the_same_seed_gives_the_same_weights():
    one, same, other = (Llama(TINY).init_weights(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


# --------------------------------------------------------------------------------------------- properties of generation


@quick
@given(names, batches, st.sets(tokens, max_size=25))
def test_generation_of_a_row_does_not_depend_on_the_other_rows(name, prompts, eos):
    model = stopping_at(tiny(name), *eos)
    assert generate(model, prompts, 10) == [generate(model, [prompt], 10)[0] for prompt in prompts]


@quick
@given(names, batches)
@claim("generation with a KV cache = full recomputation", "ours")
def test_generation_with_the_cache_is_full_recomputation(name, prompts):
    for prompt, out in zip(prompts, generate(tiny(name), prompts, 8), strict=True):
        for i, token in enumerate(out):
            logits = logits_of(tiny(name), prompt + out[:i])[0, -1]
            assert logits[token] >= logits.max() - 1e-5  # two may be equal but for rounding


@quick
@given(names, batches, st.sets(tokens, min_size=1, max_size=25))
def test_generation_with_eos_is_unlimited_generation_cut_at_the_first_of_them(name, prompts, eos):
    free = generate(tiny(name), prompts, 12)
    assert generate(stopping_at(tiny(name), *eos), prompts, 12) == [until(ids, eos) for ids in free]


def test_generation_of_no_prompt_is_no_row():
    assert generate(tiny(), [], 5) == []


def test_generation_of_no_token_is_an_empty_row_each():
    assert generate(tiny(), [[1, 2], [3]], 0) == [[], []]


def test_generation_of_one_token_is_the_argmax():
    prompt = [4, 5, 6]
    assert generate(tiny(), [prompt], 1) == [[logits_of(tiny(), prompt)[0, -1].argmax().item()]]


# -------------------------------------------------------------------------------------------- parity with transformers

ARCHITECTURES = {
    "llama-2": {},
    "gqa": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "llama3-rope": {"num_key_value_heads": 1, "rope_theta": 5000.0, "rope_scaling": dict(LLAMA3_ROPE)},
    "head-dim": {"head_dim": 10, "rms_norm_eps": 1e-3},
}


@torch.no_grad()
def random_reference(**changes) -> transformers.LlamaForCausalLM:
    """transformers' own Llama with random matrices and norms."""
    sizes = {"vocab_size": V, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **sizes | {"max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1} | changes
    )
    reference = transformers.LlamaForCausalLM(config).eval()
    for p in reference.parameters():
        p.copy_(torch.randn_like(p) * 0.2)
    shake_norms(reference)
    return reference


@pytest.fixture(scope="module", params=ARCHITECTURES)
def parity(request, tmp_path_factory):
    """(transformers' model, model.py's model loaded from what transformers wrote)."""
    reference = random_reference(**ARCHITECTURES[request.param])
    folder = tmp_path_factory.mktemp("reference") / request.param
    reference.save_pretrained(folder)
    return reference, load_pretrained(folder)


@torch.no_grad()
def reference_generation(reference, prompts, max_new_tokens, eos: list[int]) -> list[list[int]]:
    """transformers' greedy generation of a left-padded batch, cut before EOS. The padding token is an EOS."""
    T = max(map(len, prompts))
    ids = torch.tensor([[eos[0]] * (T - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts])
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "eos_token_id": eos, "pad_token_id": eos[0]}
    return [until(row[T:], eos) for row in reference.generate(ids, attention_mask=mask, **options).tolist()]


PROMPTS = [[7], [8, 9, 10, 11, 12, 13, 14], [20, 21, 22], [1, 1, 30], list(range(40, 61))]


@torch.no_grad()
def test_logits_equal_transformers(parity):
    reference, ours = parity
    ids = torch.randint(V, (3, 100), generator=torch.Generator().manual_seed(0))  # far beyond 16 original positions
    assert distance(ours(ids), reference(ids).logits) < TOLERANCE


@torch.no_grad()
def test_what_we_save_has_the_same_logits_in_transformers(parity, tmp_path):
    _, ours = parity
    folder = save_pretrained(ours, tmp_path / "saved")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
    assert type(reloaded) is transformers.LlamaForCausalLM
    ids = torch.randint(V, (2, 70), generator=torch.Generator().manual_seed(1))
    assert distance(ours(ids), reloaded(ids).logits) < TOLERANCE


@pytest.mark.parametrize("max_new_tokens", [1, 24])
def test_greedy_generation_equals_transformers(parity, max_new_tokens):
    reference, ours = parity
    eos = [1]
    assert generate(stopping_at(ours, *eos), PROMPTS, max_new_tokens) == reference_generation(
        reference, PROMPTS, max_new_tokens, eos
    )


def test_rows_that_stop_at_different_times_equal_transformers(parity):
    reference, ours = parity
    free = generate(stopping_at(ours), PROMPTS, 24)
    eos = [free[0][3], free[1][9], free[2][1]]  # tokens that do occur, at several steps
    out = generate(stopping_at(ours, *eos), PROMPTS, 24)
    assert out == reference_generation(reference, PROMPTS, 24, eos)
    assert len({len(row) for row in out}) >= 3


@torch.no_grad()
def test_sharded_checkpoints_equal_transformers_in_both_directions(tmp_path, monkeypatch):
    reference = random_reference()
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    ours = load_pretrained(tmp_path / "theirs")
    name = "split_torch_state_dict_into_shards"
    split = getattr(huggingface_hub, name)
    monkeypatch.setattr(huggingface_hub, name, lambda state: split(state, max_shard_size="20KB"))
    save_pretrained(ours, tmp_path / "ours")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").float()
    for folder in ("theirs", "ours"):
        assert len(list((tmp_path / folder).glob("model-*.safetensors"))) > 2
        assert (tmp_path / folder / "model.safetensors.index.json").exists()
    ids = torch.tensor([list(range(V))])
    for other in (reference(ids).logits, reloaded(ids).logits, load_pretrained(tmp_path / "ours")(ids)):
        assert distance(ours(ids), other) < TOLERANCE


@pytest.fixture(scope="module")
def smollm2():
    """(transformers' SmolLM2, ours), both float32."""
    if not (folder := os.environ.get("DIPO_SMOLLM2")):
        pytest.skip("set DIPO_SMOLLM2 to a folder that holds SmolLM2-135M")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    return reference, load_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def test_logits_of_smollm2_equal_transformers(smollm2):
    reference, ours = smollm2
    ids = torch.randint(ours.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    assert distance(ours(ids), reference(ids).logits) < TOLERANCE


def test_greedy_generation_of_smollm2_equals_transformers(smollm2):
    reference, ours = smollm2
    prompts = [[504, 3575, 282, 4649, 314], [1, 520, 9531], [28, 29, 30, 31, 32, 33, 34, 35]]
    assert generate(ours, prompts, 24) == reference_generation(reference, prompts, 24, list(ours.config.eos_token_ids))


# -------------------------------------------------------------------------------------------------- config and examples


@pytest.mark.parametrize(
    ("head_dim", "factor", "kept", "blended", "divided"),
    [(64, 32.0, 15, 3, 14), (128, 32.0, 29, 6, 29), (128, 8.0, 29, 6, 29)],
)
def test_llama3_frequencies_are_kept_blended_or_divided(head_dim, factor, kept, blended, divided):
    """Llama-3.2-1B, Llama-3.2-3B and Llama-3.1-8B."""
    scaling = LLAMA3_ROPE | {"factor": factor, "original_max_position_embeddings": 8192}
    config = LlamaConfig(head_dim=head_dim, rope_theta=500000.0, rope_scaling=scaling)
    ratio = rope_frequencies(dataclasses.replace(config, rope_scaling=None)) / rope_frequencies(config)
    is_kept, is_divided = (torch.isclose(ratio, torch.tensor(r)) for r in (1.0, factor))
    assert (is_kept.sum(), (~is_kept & ~is_divided).sum(), is_divided.sum()) == (kept, blended, divided)
    assert (ratio.diff() >= 0).all()


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value))


def config_of(folder: Path, raw: dict) -> LlamaConfig:
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", raw)
    return read_config(folder)


@pytest.mark.parametrize(
    "rope_keys",
    [
        {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0}},  # transformers 5
        {"rope_parameters": LLAMA3_ROPE, "rope_theta": 500000.0},  # a mixture that transformers 5 reads, too
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},  # transformers 4
    ],
)
def test_all_ways_to_write_rope_give_the_same_config(tmp_path, rope_keys):
    plain = TINY.to_dict(torch.float32)
    del plain["rope_theta"], plain["rope_scaling"]
    expected = dataclasses.replace(TINY, rope_theta=500000.0, rope_scaling=LLAMA3_ROPE)
    assert config_of(tmp_path, plain | rope_keys) == expected
    reference = transformers.LlamaConfig.from_pretrained(tmp_path)
    if hasattr(reference, "rope_parameters"):  # transformers 5
        assert reference.rope_parameters == LLAMA3_ROPE | {"rope_theta": 500000.0}


@pytest.mark.parametrize("kind", [{"type": "default"}, {"rope_type": "default"}, None])
def test_default_rope_is_no_scaling(tmp_path, kind):
    assert config_of(tmp_path, TINY.to_dict(torch.float32) | {"rope_scaling": kind}) == TINY


def test_absent_optional_keys_have_transformers_defaults(tmp_path):
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    raw = {"model_type": "llama"} | {k: v for k, v in TINY.to_dict(torch.float32).items() if k in sizes}
    config, reference = config_of(tmp_path, raw), transformers.LlamaConfig.from_pretrained(tmp_path)
    for key in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, key) == getattr(reference, key), key
    assert config.rope_theta == 10000.0


@pytest.mark.parametrize(
    ("in_config", "in_generation_config", "expected"),
    [(7, [8, 9], (8, 9)), ([7, 8], {}, (7, 8)), (7, None, (7,)), (None, None, ()), (7, 8, (8,))],
)
def test_generation_config_tells_the_stop_tokens_before_config(tmp_path, in_config, in_generation_config, expected):
    if in_generation_config is not None:
        raw = {"eos_token_id": in_generation_config} if in_generation_config else {}
        write_json(tmp_path / "generation_config.json", raw)
    assert config_of(tmp_path, TINY.to_dict(torch.float32) | {"eos_token_id": in_config}).eos_token_ids == expected


@pytest.mark.parametrize("eos", [(), (5,), (5, 6, 7)])
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_a_saved_config_reads_back_as_it_was(tmp_path, name, eos):
    config = dataclasses.replace(TINY_CONFIGS[name], eos_token_ids=eos)
    assert config_of(tmp_path, config.to_dict(torch.float32)) == config


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A good checkpoint that a test may change."""
    return save_pretrained(tiny("llama2"), tmp_path / "checkpoint")


@pytest.fixture
def shards(tmp_path, checkpoint) -> Path:
    """A good checkpoint in two shards, with an index."""
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    weight_map = {n: f"model-{1 + ('layers' in n)}.safetensors" for n in tensors}
    for shard in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, checkpoint / shard)
    write_json(checkpoint / "model.safetensors.index.json", {"weight_map": weight_map})
    return checkpoint


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors")


def change_json(path: Path, **changes) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def same_logits(a: Llama, b: Llama) -> bool:
    ids = list(range(V))
    return torch.equal(logits_of(a, ids), logits_of(b, ids))


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_a_saved_model_reads_back_bit_for_bit(tmp_path, name):
    assert same_logits(load_pretrained(save_pretrained(tiny(name), tmp_path / "saved")), tiny(name))


def test_a_sharded_model_reads_back_bit_for_bit(shards):
    assert same_logits(load_pretrained(shards), tiny("llama2"))


def test_a_run_folder_stands_for_the_model_inside(tmp_path):
    save_pretrained(tiny(), tmp_path / "run" / "model")
    assert same_logits(load_pretrained(tmp_path / "run"), tiny())


def test_stored_rotary_frequencies_of_old_checkpoints_are_ignored(checkpoint):
    change_tensors(checkpoint, **{"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert same_logits(load_pretrained(checkpoint), tiny("llama2"))


def test_a_tied_checkpoint_that_stores_its_head_again_loads_tied(tmp_path):
    folder = save_pretrained(tiny("llama3"), tmp_path / "tied")
    change_tensors(folder, **{"lm_head.weight": tiny("llama3").lm_head.weight.detach().clone()})
    loaded = load_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert same_logits(loaded, tiny("llama3"))


def test_master_weights_are_float32_copies_of_a_bfloat16_file(tmp_path):
    folder = save_pretrained(tiny("llama2", torch.bfloat16), tmp_path / "bf16")
    stored = load_file(folder / "model.safetensors")
    loaded = load_pretrained(folder, dtype=torch.float32, compute_dtype=torch.bfloat16)
    for n, p in loaded.named_parameters():
        assert p.dtype == torch.float32 and p.requires_grad
        assert torch.equal(p, stored[n].float())
    assert loaded.compute_dtype == torch.bfloat16


def test_bfloat16_compute_gives_float32_logits_close_to_float32_compute():
    ids = list(range(V))
    exact, rounded = logits_of(tiny("llama2"), ids), logits_of(tiny("llama2", torch.bfloat16), ids)
    assert rounded.dtype == torch.float32
    assert 0 < distance(exact, rounded) < 0.1 * exact.abs().max()


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_saving_stores_all_tensors_as_they_are_used(tmp_path, name):
    model = tiny(name, torch.bfloat16)
    folder = save_pretrained(model, tmp_path / "bf16")
    stored = load_file(folder / "model.safetensors")
    for n, p in model.named_parameters():
        assert stored[n].dtype == torch.bfloat16 and torch.equal(stored[n], p.to(torch.bfloat16)), n
    loaded = load_pretrained(folder)
    assert loaded.compute_dtype == torch.bfloat16
    assert same_logits(loaded, model.frozen_copy(norms=True)) and not same_logits(loaded, model)


def test_tokenizer_files_are_copied_along_and_nothing_else(tmp_path, checkpoint):
    for name in (*TOKENIZER_FILES, "pytorch_model.bin", "modeling_llama.py"):
        (checkpoint / name).write_text(f'{{"from": "{name}"}}')
    folder = save_pretrained(tiny(), tmp_path / "saved", tokenizer_from=checkpoint)
    own = {"config.json", "generation_config.json", "model.safetensors"}
    assert {p.name for p in folder.iterdir()} == {*TOKENIZER_FILES, *own}
    assert all((folder / n).read_text() == (checkpoint / n).read_text() for n in TOKENIZER_FILES)


@pytest.mark.parametrize("eos", [(), (5,), (5, 6, 7)])
def test_a_saved_model_keeps_its_stop_tokens_here_and_in_transformers(tmp_path, checkpoint, eos):
    write_json(checkpoint / "generation_config.json", {"eos_token_id": 9})  # of another model: the tokenizer's
    folder = save_pretrained(stopping_at(tiny(), *eos), tmp_path / "saved", tokenizer_from=checkpoint)
    assert load_pretrained(folder).config.eos_token_ids == eos
    found = transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    assert found == (eos[0] if len(eos) == 1 else list(eos) or None)


def test_saving_refuses_an_existing_folder_and_leaves_it_as_it_was(checkpoint):
    before = (checkpoint / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match="exists already"):
        save_pretrained(tiny("llama3"), checkpoint)
    assert (checkpoint / "model.safetensors").read_bytes() == before


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(state, path, **_):
        Path(path).write_bytes(b"half of a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_module, "save_file", full)
    with pytest.raises(ModelError) as error:
        save_pretrained(tiny(), tmp_path / "saved")
    assert_clear(error, str(tmp_path / "saved"), "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_saving_replaces_what_an_interrupted_save_left(tmp_path):
    part = tmp_path / f".saved.{os.getpid()}.part"
    part.mkdir()
    (part / "model.safetensors").write_bytes(b"half of a file")
    assert same_logits(load_pretrained(save_pretrained(tiny(), tmp_path / "saved")), tiny())
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.aside
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the high-water mark is read from /proc")
def test_loading_holds_at_most_1_2_times_the_checkpoint(tmp_path):
    config = dataclasses.replace(TINY, vocab_size=32000, hidden_size=512, intermediate_size=2048, num_hidden_layers=7)
    folder = save_pretrained(Llama(dataclasses.replace(config, head_dim=128)), tmp_path / "large")
    size = (folder / "model.safetensors").stat().st_size
    assert size > 240e6
    # Another process: the mark never falls, and this one's is higher than what is measured. Not getrusage, whose mark
    # is inherited from the parent.
    program = """if True:
        import re, sys
        from pathlib import Path
        import model

        def high_water():
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

        before = high_water()
        loaded = model.load_pretrained(sys.argv[1])
        print(high_water() - before)
    """
    try:
        run = forks.run(["-c", program, folder])
    finally:
        shutil.rmtree(folder)  # pytest would keep 250 MB of it for its next runs
    assert run.returncode == 0 and 0.9 * size < int(run.stdout) < 1.2 * size, run.stderr


def test_reading_and_computing_need_torch_and_safetensors_alone(checkpoint):
    program = """if True:
        import sys
        sys.modules |= dict.fromkeys(("huggingface_hub", "tokenizers", "tqdm", "transformers"))  # None: not to be imported
        import torch
        import model

        llama = model.load_pretrained(sys.argv[1])
        print(llama(torch.tensor([[1, 2, 3]])).argmax(-1).tolist(), model.generate(llama, [[1, 2, 3]], 4))
        model.load_pretrained("owner/name")
    """
    run = subprocess.run([sys.executable, "-c", program, checkpoint], cwd=ROOT, capture_output=True, text=True)
    ours = tiny("llama2")
    assert run.stdout.strip() == f"{logits_of(ours, [1, 2, 3]).argmax(-1).tolist()} {generate(ours, [[1, 2, 3]], 4)}"
    assert "ModelError: owner/name: " in run.stderr and "huggingface_hub" in run.stderr.splitlines()[-1]


# --------------------------------------------------------------------------------------------------------- bad input


def assert_clear(error, *words: str) -> None:
    """One line that holds the words: the file, the key, the remedy."""
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


def assert_refused(name, *words: str) -> None:
    with pytest.raises(ModelError) as error:
        load_pretrained(name)
    assert_clear(error, *words)


@pytest.mark.parametrize("name", ["no such model!", "a/b/c", "/no/such/folder", "../no/such/folder", "owner/na..me"])
def test_refuses_a_name_that_is_neither_folder_nor_hub_id(name):
    assert_refused(name, name, "no such folder", "owner/name")


def test_refuses_a_folder_without_config(checkpoint):
    (checkpoint / "config.json").unlink()
    assert_refused(checkpoint, str(checkpoint / "config.json"), "no such file", "tokenizer.json")


@pytest.mark.parametrize("content", [b'{"model_type": "llama"', b"", b"\xff\xfe\xfe\xff", b"[1, 2]"])
def test_refuses_a_broken_config(checkpoint, content):
    (checkpoint / "config.json").write_bytes(content)
    text = "UTF-8 text" if content.startswith(b"\xff") else "JSON"
    assert_refused(checkpoint, str(checkpoint / "config.json"), text, "a model folder holds config.json")


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_refuses_a_config_that_lacks_a_key(checkpoint, key):
    change_json(checkpoint / "config.json", **{key: None})
    assert_refused(checkpoint, str(checkpoint / "config.json"), f"key '{key}' is null", "is this a Llama checkpoint?")


@pytest.mark.parametrize("model_type", ["mistral", "gpt2", None])
def test_refuses_another_architecture(checkpoint, model_type):
    change_json(checkpoint / "config.json", model_type=model_type)
    assert_refused(checkpoint, str(checkpoint / "config.json"), repr(model_type), "'llama'")


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("attention_bias", True, "True"),
        ("mlp_bias", True, "True"),
        ("attention_dropout", 0.1, "0.1"),
        ("hidden_act", "gelu", "'gelu'"),
        ("sliding_window", 4096, "4096"),
        ("quantization_config", {"quant_method": "gptq"}, "gptq"),
        ("partial_rotary_factor", 0.5, "0.5"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "'yarn'"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "'linear'"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}, "'yarn'"),
    ],
)
def test_refuses_an_attribute_that_it_does_not_implement(checkpoint, key, value, shown):
    change_json(checkpoint / "config.json", **{key: value})
    assert_refused(checkpoint, str(checkpoint / "config.json"), key.removesuffix("parameters"), shown, "not implemented")


def test_refuses_llama3_rope_without_its_numbers(checkpoint):
    change_json(checkpoint / "config.json", rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0})
    assert_refused(checkpoint, str(checkpoint / "config.json"), "key 'high_freq_factor' is missing")


def test_refuses_an_odd_head_dim(checkpoint):
    change_json(checkpoint / "config.json", head_dim=9)
    assert_refused(checkpoint, str(checkpoint / "config.json"), "head_dim = 9")


def test_refuses_query_heads_that_do_not_share_key_heads_evenly(checkpoint):
    change_json(checkpoint / "config.json", num_key_value_heads=3)
    assert_refused(checkpoint, str(checkpoint / "config.json"), "4 query heads", "3 key/value heads")


def test_refuses_a_missing_tensor(checkpoint):
    change_tensors(checkpoint, **{"model.layers.1.mlp.up_proj.weight": None})
    assert_refused(checkpoint, str(checkpoint), "'model.layers.1.mlp.up_proj.weight' is missing", "copy or save it again")


def test_refuses_an_untied_checkpoint_without_a_head(checkpoint):
    change_tensors(checkpoint, **{"lm_head.weight": None})
    assert_refused(checkpoint, str(checkpoint), "'lm_head.weight' is missing")


def test_refuses_a_wrong_shape(checkpoint):
    change_tensors(checkpoint, **{"model.norm.weight": torch.ones(31)})
    assert_refused(checkpoint, str(checkpoint / "model.safetensors"), "'model.norm.weight'", "[31]", "[32]", "config.json")


def test_refuses_a_tensor_too_many(checkpoint):
    change_tensors(checkpoint, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})
    assert_refused(checkpoint, str(checkpoint), "'model.layers.0.self_attn.q_proj.bias'", "not part of a Llama")


def test_refuses_a_layer_too_many(checkpoint):
    change_json(checkpoint / "config.json", num_hidden_layers=1)
    assert_refused(checkpoint, str(checkpoint), "'model.layers.1.", "not part of a Llama")


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_refuses_a_truncated_file(checkpoint, length):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert_refused(checkpoint, str(path), "truncated or corrupt", "copy or save it again")


@pytest.mark.parametrize("start", [b"\xff" * 8, b"\x10" + b"\0" * 7, b"<!DOCTYPE html>"])
def test_refuses_a_corrupt_header(checkpoint, start):
    path = checkpoint / "model.safetensors"
    path.write_bytes(start + path.read_bytes()[len(start) :])
    assert_refused(checkpoint, str(path), "truncated or corrupt", "copy or save it again")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pt"])
def test_never_loads_a_pickle(tmp_path, checkpoint, name):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    (checkpoint / "model.safetensors").unlink()
    torch.save(Evil(), checkpoint / name)
    assert_refused(checkpoint, str(checkpoint), name, "pickles are never loaded")
    assert not (tmp_path / "executed").exists()


def test_refuses_a_folder_without_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert_refused(checkpoint, str(checkpoint), "model.safetensors.index.json")


def point_to(folder: Path, tensor: str, shard) -> Path:
    index = folder / "model.safetensors.index.json"
    change_json(index, weight_map=json.loads(index.read_text())["weight_map"] | {tensor: shard})
    return index


@pytest.mark.parametrize("shard", ["../evil.safetensors", "{tmp}/evil.safetensors", "sub/evil.safetensors", "..", "", 7])
def test_refuses_an_index_that_points_outside_its_folder(tmp_path, shards, shard):
    says = (repr(shard), "outside its folder") if isinstance(shard, str) else ("expected a text",)
    shard = shard.format(tmp=tmp_path) if isinstance(shard, str) else shard
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "evil.safetensors")  # it would fit
    index = point_to(shards, "model.norm.weight", shard)
    assert_refused(shards, str(index), "model.norm.weight", *(word.format(tmp=tmp_path) for word in says))


def test_refuses_a_missing_shard(shards):
    (shards / "model-2.safetensors").unlink()
    assert_refused(shards, str(shards / "model-2.safetensors"), "No such file", "copy or save it again")


def test_refuses_a_truncated_shard(shards):
    path = shards / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused(shards, str(path), "truncated or corrupt", "copy or save it again")


def test_refuses_a_shard_without_a_promised_tensor(shards):
    point_to(shards, "lm_head.weight", "model-2.safetensors")
    assert_refused(shards, str(shards / "model-2.safetensors"), "'lm_head.weight' is missing", "copy or save it again")


def test_refuses_an_index_without_a_tensor(shards):
    index = shards / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["model.norm.weight"]
    change_json(index, weight_map=weight_map)
    assert_refused(shards, str(shards), "'model.norm.weight' is missing")


def test_refuses_an_index_without_a_map(shards):
    write_json(shards / "model.safetensors.index.json", {"metadata": {}})
    assert_refused(shards, str(shards / "model.safetensors.index.json"), "'weight_map' is missing")


# ------------------------------------------------------------------------------- names, heads, sizes, what is no file


RENAMED = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled blocks": lambda name: name.replace(".self_attn", "._orig_mod.self_attn"),
    "data parallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "without model.": lambda name: name.removeprefix("model."),
    "student": lambda name: f"student.{name}",
}


@pytest.mark.parametrize("how", RENAMED)
def test_tensor_names_of_wrappers_are_read_and_others_are_shown(tmp_path, how):
    folder = save_pretrained(tiny(), tmp_path / "model")
    tensors = {RENAMED[how](name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    if how == "student":
        assert_refused(folder, "'student.", "another prefix")
    else:
        assert same_logits(load_pretrained(folder), tiny())


def test_two_names_for_one_tensor_are_refused(checkpoint):
    change_tensors(checkpoint, **{"module.model.norm.weight": torch.ones(32)})
    assert_refused(checkpoint, "'module.model.norm.weight'", "'model.norm.weight'")


def test_a_model_without_its_head_says_how_to_save_it(checkpoint):
    change_tensors(checkpoint, **{"lm_head.weight": None})
    assert_refused(checkpoint, "'lm_head.weight' is missing", "AutoModelForCausalLM")


@pytest.mark.parametrize("stored", ["head alone", "equal", "different", "another dtype"])
def test_a_tied_checkpoint_is_loaded_as_it_is_stored_or_refused(tmp_path, stored):
    """transformers 5 keeps a head that differs, transformers 4 drops it."""
    folder, weight = save_pretrained(tiny(), tmp_path / "tied"), tiny().lm_head.weight.detach().clone()
    head = {"different": weight + 1e-6, "another dtype": weight.bfloat16()}.get(stored, weight)
    change_tensors(folder, **{"lm_head.weight": head})
    if stored == "head alone":
        change_tensors(folder, **{"model.embed_tokens.weight": None})
    if stored in ("head alone", "equal"):
        loaded = load_pretrained(folder)
        assert same_logits(loaded, tiny()) and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    else:
        assert_refused(folder, "config.json", "tie_word_embeddings", "'lm_head.weight'", "'model.embed_tokens.weight'")


@pytest.mark.parametrize("beside", [(), ("config.json",), ("config.json", "model.safetensors")])
def test_an_adapter_is_told_to_be_merged(tmp_path, checkpoint, beside):
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_json(folder / "adapter_config.json", {"peft_type": "LORA"})
    save_file({"base_model.model.model.norm.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    for name in beside:
        shutil.copy(checkpoint / name, folder / name)
    assert_refused(folder, str(folder), "is an adapter", "merge_and_unload")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn, torch.bool])
def test_weights_that_are_no_plain_numbers_are_refused(checkpoint, dtype):
    change_tensors(checkpoint, **{"model.norm.weight": torch.ones(32).to(dtype)})
    assert_refused(checkpoint, "'model.norm.weight'", "floating-point")


SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim".split()


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """A function that writes these JSON objects into a good checkpoint and returns its folder, the same one every time."""
    folder = save_pretrained(tiny("llama2"), tmp_path_factory.mktemp("edited") / "model")
    raw = json.loads((folder / "config.json").read_text())

    def edit(config: dict, generation: dict | None = None) -> Path:
        write_json(folder / "config.json", raw | config)
        write_json(folder / "generation_config.json", generation or {})
        return folder

    return edit


@quick
@given(st.sampled_from(SIZES), st.integers(1, 10**30) | st.sampled_from([10**9, 2**31, 2**63]))
def test_no_size_is_built_that_the_checkpoint_does_not_hold(edited, name, size):
    folder = edited({name: size})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "Llama", small(model_module.Llama))
        if size == vars(TINY)[name]:
            assert same_logits(load_pretrained(folder), tiny("llama2"))
        else:
            assert_refused(folder, str(folder))


def small(build):
    """A Llama that may only be built where it is not much larger than the checkpoint (sizes up to 61)."""

    def checked(config):
        assert max(getattr(config, name) for name in SIZES) <= V
        return build(config)

    return checked


ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**19) | st.floats() | st.text(max_size=3)
    | st.sampled_from([10**400, -1, 0, 0.0, 1e-300, 1e300, "llama3", "float32", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=4,
)  # fmt: skip
KEYS = sorted({*model_module.CONFIG, "torch_dtype", "eos_token_id", "rope_theta", "hidden_act", "architectures"})


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from(KEYS), ODD, max_size=2),
    st.none() | st.dictionaries(st.sampled_from(sorted(LLAMA3_ROPE)), ODD, max_size=2),
    st.dictionaries(st.just("eos_token_id"), ODD | st.lists(st.integers(-3, 10**12))),
)
def test_whatever_stands_in_a_config_is_read_or_refused_in_one_line(edited, changes, rope, generation):
    folder = edited(({"rope_scaling": LLAMA3_ROPE | rope} if rope is not None else {}) | changes, generation)
    try:
        loaded = load_pretrained(folder)
    except ModelError as e:
        assert "\n" not in str(e) and str(folder) in str(e)
    else:
        assert all(-1 <= e <= 2**31 for e in loaded.config.eos_token_ids)
        assert torch.isfinite(logits_of(loaded, [1, 2, 3])).all()


def test_a_config_of_ten_thousand_levels_is_refused(checkpoint):
    (checkpoint / "config.json").write_text('{"model_type": ' + "[" * 10_000 + "]" * 10_000 + "}")
    assert_refused(checkpoint, str(checkpoint / "config.json"), "nested too deeply")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"]
)
def test_what_is_no_file_is_refused_and_not_waited_for(checkpoint, name, make):
    if "index" in name:
        (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).unlink(missing_ok=True)
    make(checkpoint / name)
    assert_refused(checkpoint, str(checkpoint / name))


def test_the_advice_to_download_is_for_what_was_downloaded(tmp_path):
    cache = tmp_path / "models--a--b"
    for folder, advice in ((tmp_path / "mine", "copy or save"), (cache / "snapshots" / "c", f"remove {cache}, and")):
        save_pretrained(tiny(), folder)
        (folder / "model.safetensors").write_bytes(b"cut")
        assert_refused(folder, str(folder / "model.safetensors"), advice)


# ------------------------------------------------------------------------------------------------------ what is saved


def test_links_out_of_the_folder_are_not_copied_and_the_hubs_are(tmp_path, checkpoint):
    secret, hub = tmp_path / "secret", tmp_path / "models--a--b"
    secret.write_text("{}")
    (checkpoint / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(ModelError, match="chat_template.jinja: is a link") as error:
        save_pretrained(tiny(), tmp_path / "saved", tokenizer_from=checkpoint)
    assert_clear(error, str(secret))
    assert not (tmp_path / "saved").exists()
    (hub / "snapshots" / "c").mkdir(parents=True)
    (hub / "blobs").mkdir()
    (hub / "blobs" / "1").write_text("template")
    (hub / "blobs" / "1").chmod(0o400)
    (hub / "snapshots" / "c" / "chat_template.jinja").symlink_to("../../blobs/1")
    saved = save_pretrained(tiny(), tmp_path / "saved", tokenizer_from=hub / "snapshots" / "c") / "chat_template.jinja"
    assert saved.read_text() == "template" and not saved.is_symlink() and saved.stat().st_mode & 0o600 == 0o600


@pytest.mark.parametrize("dtype", [torch.bfloat16, "auto"])
def test_a_saved_bfloat16_model_is_of_one_dtype_in_transformers(tmp_path, dtype):
    model = tiny("llama3", torch.bfloat16)
    folder = save_pretrained(model, tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert theirs(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_a_bfloat16_run_is_evaluated_as_it_is_saved(tmp_path):
    llama, tokenizer, _ = make_tiny(tmp_path)
    shake_norms(llama)
    llama.compute_dtype = torch.bfloat16
    sets = {"forget": toy_world(0)["forget01_perturbed"][:2]}
    loaded = load_pretrained(save_pretrained(llama, tmp_path / "saved"))
    assert tofu_rows(llama, tokenizer, sets, 4) == tofu_rows(loaded, tokenizer, sets, 4)


def test_a_saved_model_knows_the_prompt_format_it_was_trained_in(tmp_path):
    folder = save_pretrained(tiny(), tmp_path / "saved", prompt="plain")
    assert recorded_prompt(folder) == "plain" and same_logits(load_pretrained(folder), tiny())
    transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert recorded_prompt(save_pretrained(tiny(), tmp_path / "other")) is None


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_an_old_gpu_computes_in_float32_by_itself(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # it counts emulation
    assert inference.pick_dtype("auto", torch.device("cuda")) == dtype
