"""What only a GPU takes, on a CPU: the branch of attention, its kernel played by one that refuses what the real one refuses;
and on the meta device, whose numbers nobody can read, that nothing waits for one."""

import dataclasses
import itertools
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import generations, make_tiny, tofu_rows, values
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attention
import data
import dipo
import inference
import model as model_module
import reference as reference_module
import train
from attention import Packing
from gpu import MasterProduct, has_flash, has_wide_products
from model import Llama, LlamaConfig, generate
from reference import CachedReference
from toy import toy_world

CPU = torch.device("cpu")
HALF = torch.bfloat16, torch.float16
SMALL = LlamaConfig(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
    head_dim=16, max_position_embeddings=128, initializer_range=0.2, eos_token_ids=tuple(range(0, 300, 9)),
)  # fmt: skip


# -------------------------------------------------------------------------------------------------- the kernel, played


def check(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, window) -> tuple[list[int], list[int]]:
    """Raises where the real kernel does, or would read what is not there; returns the lengths of queries and of keys."""
    assert q.dtype in HALF and k.dtype == v.dtype == q.dtype, "FlashAttention only supports fp16 and bf16"
    assert q.ndim == 3 and k.shape == v.shape and k.shape[2] == q.shape[2], "wrong shapes"
    assert q.shape[2] % 8 == 0 and q.shape[2] <= 256, "head dimension"
    assert q.shape[1] % k.shape[1] == 0, "heads"
    for x in (q, k, v):
        assert x.stride(-1) == 1, "input tensor must have contiguous last dimension"
        assert all(stride % 8 == 0 for stride in x.stride()[:2]) and x.storage_offset() % 8 == 0, "not aligned"
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.is_contiguous() and cu_k.is_contiguous(), "borders"
    assert cu_q.device == cu_k.device == q.device, "borders on another device"
    for ends, x in ((cu_q, q), (cu_k, k)):
        assert ends.shape == cu_q.shape and ends[0] == 0 and ends[-1] == len(x), "borders of something else"
    lengths, keys = cu_q.diff().tolist(), cu_k.diff().tolist()
    assert max_q == max(lengths) and max_k == max(keys) and is_causal and list(window) == [-1, 0], "not causal"
    assert all(0 < n <= m for n, m in zip(lengths, keys, strict=True)), "queries that see nothing"
    return lengths, keys


def weights(q, k):
    """Of one sequence, [N, H, K] and [M, H, K] -> [H, N, M]. Causal from the ends of both, as flash attention has it since
    2.1 (torch/nn/attention/bias.py says so of the same operator)."""
    scores = torch.einsum("ihk,jhk->hij", q, k) / q.shape[2] ** 0.5
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(k) - len(q))
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def split(q, lengths, keys, *others):
    return zip(q.double().split(lengths), *(x.double().split(keys) for x in others), strict=True)


def attention64(q, k, v, lengths, keys):
    """[N, H, K] and twice [M, G, K] -> [N, H, K], in float64 and by its definition."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    parts = split(q, lengths, keys, k, v)
    return torch.cat([torch.einsum("hij,jhk->ihk", weights(a, b), c) for a, b, c in parts])


CALLS = {"forward": 0, "backward": 0, "product": 0}


def forward(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None, window_size=None, enable_gqa=False, *rest):
    sizes = check(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, window_size)
    assert scale is None and not any(x is not None for x in rest) and (enable_gqa or q.shape[1] == k.shape[1])
    CALLS["forward"] += 1
    lse = torch.zeros(q.shape[1], len(q))
    return torch.empty_like(q).copy_(attention64(q, k, v, *sizes)), lse, torch.zeros(2, dtype=torch.uint64)


def backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, is_causal, rng_state, scale=None, window_size=None):
    lengths, keys = check(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, window_size)
    assert dout.dtype == q.dtype and dout.shape == out.shape == q.shape
    CALLS["backward"] += 1
    found = []
    repeat, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    for (a, b, c), g in zip(split(q, lengths, keys, k, v), dout.double().split(lengths), strict=True):
        b, c = b.repeat_interleave(repeat, 1), c.repeat_interleave(repeat, 1)
        p = weights(a, b)
        dp = torch.einsum("ihk,jhk->hij", g, c)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dk, dv = torch.einsum("hij,ihk->jhk", ds, a), torch.einsum("hij,ihk->jhk", p, g)
        grouped = (x.unflatten(1, (-1, repeat)).sum(2) for x in (dk, dv))
        found.append((torch.einsum("hij,jhk->ihk", ds, b), *grouped))
    # The strides are those of what the gradient is of: torch 2.11 compiles for them.
    return tuple(torch.empty_like(x).copy_(torch.cat(g)) for x, g in zip((q, k, v), zip(*found, strict=True), strict=True))


def product(a, b, out_dtype):
    """A product whose result is wider than its factors, as CUDA has it and no CPU."""
    assert a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] and a.device == b.device, "wrong shapes"
    assert a.dtype == b.dtype and a.dtype in HALF and out_dtype == torch.float32, "out_dtype"
    CALLS["product"] += 1
    return (a.double() @ b.double()).to(out_dtype)


@pytest.fixture(scope="module")
def kernel():
    with (
        torch.library._scoped_library("torch_attn", "IMPL") as library,
        torch.library._scoped_library("aten", "IMPL") as products,
    ):
        library.impl("_varlen_attn", forward, "CPU")
        library.impl("_varlen_attn_backward", backward, "CPU")
        products.impl("mm.dtype", product, "CPU")
        yield


def play(patch: pytest.MonkeyPatch, branch: bool = True) -> None:
    """As if every device, or none, had the kernels."""
    patch.setattr(attention, "has_flash", lambda device: branch)
    patch.setattr(model_module, "has_wide_products", lambda device: branch)


@pytest.fixture
def played(kernel, monkeypatch):
    CALLS.update(forward=0, backward=0, product=0)
    play(monkeypatch)


def distance(a, b) -> float:
    a, b = a.double(), b.double()
    return float((a - b).norm() / (b.norm() + 1e-3))


# ------------------------------------------------------------------------------------------------------------ attention


HEADS = st.sampled_from([(9, 3), (32, 8), (6, 3), (4, 4), (3, 1)])
GROUPED = st.sampled_from(sorted({False, attention.GROUPED}))  # torch 2.11 has no enable_gqa
LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=5)
TREES = st.booleans()


def attended(heads, size, lengths, dtype, seed=0, trees=False, after=None):
    """(output, gradients of q, k, v) of the branch, and of its definition in float64. Strides as the model has them.
    trees: sequences follow others, these (`after`) or any."""
    after = after or [
        -1 + trees * int(torch.randint(i + 1, (), generator=torch.Generator().manual_seed(seed)))
        for i in range(len(lengths))
    ]
    make = torch.Generator().manual_seed(seed)
    n, (h, g) = sum(lengths), heads
    flat = [torch.randn(1, n, x * size, generator=make).to(dtype).requires_grad_() for x in (h, g, g)]
    q, k, v = (x.view(1, n, -1, size).transpose(1, 2) for x in flat)
    weight = torch.randn(1, h, n, size, generator=make).to(dtype)
    y = Packing(lengths, CPU, after).attend(q, k, v)
    got = [y.detach(), *torch.autograd.grad(y, flat, weight)]
    exact = [x.detach().double().requires_grad_() for x in flat]
    starts = [0, *itertools.accumulate(lengths)]
    seen = list[list[int]]()  # of each sequence, the rows of its keys
    for i, parent in enumerate(after):
        seen.append([*(seen[parent] if parent >= 0 else ()), *range(starts[i], starts[i + 1])])
    a, b, c = (x.view(n, -1, size) for x in exact)
    every = list(itertools.chain(*seen))
    y = attention64(a, b[every], c[every], lengths, [*map(len, seen)]).transpose(0, 1)[None]
    return got, [y.detach(), *torch.autograd.grad(y, exact, weight.double())]


@settings(max_examples=40)
@given(HEADS, st.sampled_from([8, 16, 64, 128, 192]), LENGTHS, st.sampled_from(HALF), GROUPED, st.integers(0, 99), TREES)
def test_the_branch_of_gpus_is_attention(kernel, heads, size, lengths, dtype, grouped, seed, trees):
    with pytest.MonkeyPatch.context() as patch:
        play(patch)
        patch.setattr(attention, "GROUPED", grouped)
        before = dict(CALLS)
        got, want = attended(heads, size, lengths, dtype, seed, trees)
    assert {k: CALLS[k] - before[k] for k in CALLS} == {"forward": 1, "backward": 1, "product": 0}
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == dtype and distance(a, b) < 1e-2


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])  # of one rounding
def test_compiled_the_gradient_of_shared_keys_is_rounded_once(played, monkeypatch, dtype, error):
    """By inductor's decompositions: indexing would round each of the 64 terms."""
    torch._dynamo.reset()
    compiled = torch.compile(Packing.attend, dynamic=True, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(Packing, "attend", compiled)
    got, want = attended((2, 2), 16, [9] + [3] * 64, dtype, after=[-1] + [0] * 64)
    for a, b in zip(got[2:], want[2:], strict=True):
        assert distance(a[:, :9], b[:, :9]) < error


@settings(max_examples=25)
@given(
    HEADS,
    st.sampled_from([2, 4, 20, 36, 200, 256, 264]) | st.just(16),
    LENGTHS,
    st.sampled_from([*HALF, torch.float32]),
    TREES,
)
def test_what_the_kernel_refuses_goes_sequence_by_sequence(kernel, heads, size, lengths, dtype, trees):
    dtype = torch.float32 if size == 16 else dtype
    with pytest.MonkeyPatch.context() as patch:
        play(patch)
        before = dict(CALLS)
        got, want = attended(heads, size, lengths, dtype, len(lengths), trees)
    assert before == CALLS
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == dtype and distance(a, b) < 1e-2


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 40), st.integers(1, 40), st.sampled_from(HALF))
def test_the_gradient_of_master_weights_is_not_rounded(kernel, rows, wide, high, dtype):
    """All else is bit for bit what autograd makes of x times W in the dtype of x."""
    make = torch.Generator().manual_seed(len(rows) + wide + 40 * high)
    x, w, g = (torch.randn(shape, generator=make) for shape in ((*rows, wide), (high, wide), (*rows, high)))
    found, plain = ([x.to(dtype).requires_grad_(), w.clone().requires_grad_()] for _ in "ab")
    y, z = MasterProduct.apply(*found), F.linear(plain[0], plain[1].to(dtype))
    (dx, dw), (da, db) = torch.autograd.grad(y, found, g.to(dtype)), torch.autograd.grad(z, plain, g.to(dtype))
    assert torch.equal(y, z) and torch.equal(dx, da) and dw.dtype == torch.float32
    assert has_wide_products(torch.device("cuda")) and not has_wide_products(CPU)
    exact = g.to(dtype).flatten(0, -2).double().T @ x.to(dtype).flatten(0, -2).double()
    assert distance(dw, exact) < 1e-6 and distance(db, exact) < 1e-2


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0)])
def test_a_gpu_before_ampere_has_no_kernel(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert has_flash(torch.device("cuda", 0)) == (capability >= (8, 0)) and not has_flash(CPU)
    assert inference.pick_dtype("auto", torch.device("cuda")) == (torch.bfloat16 if capability >= (8, 0) else torch.float32)


def refused() -> dict[str, tuple]:
    def case(dtype=torch.bfloat16, size=16, heads=(4, 4), borders=torch.int32, layout=lambda x: x, ends=(0, 3, 8), n=8):
        q, k, v = (layout(torch.zeros(n, h, size, dtype=dtype)) for h in (heads[0], heads[1], heads[1]))
        return (q, k, v, *[torch.tensor(ends, dtype=borders)] * 2)

    return {
        "nothing": case(),
        "float32": case(torch.float32),
        "head size": case(size=20),
        "large head": case(size=264),
        "borders": case(borders=torch.int64),
        "stride": case(layout=lambda x: x.transpose(0, 2).contiguous().transpose(0, 2)),
        "other borders": case(ends=(0, 3, 7)),
        "longest": case(ends=(0, 2, 8)),
        "heads": case(heads=(4, 3)),
        "device": (*case()[:3], *[torch.zeros(3, dtype=torch.int32, device="meta")] * 2),
        "fewer keys": (*case()[:4], torch.tensor([0, 5, 8], dtype=torch.int32)),
        "keys of fewer": (*case()[:4], torch.tensor([0, 8], dtype=torch.int32)),
    }


@pytest.mark.parametrize("what", refused())
def test_the_played_kernel_refuses_what_the_real_one_does(kernel, what):
    q, *others = refused()[what]
    arguments = q, *others, 5, 5, True, None, [-1, 0]
    if what == "nothing":
        assert torch.ops.torch_attn._varlen_attn(*arguments)[0].shape == q.shape
    else:
        with pytest.raises(AssertionError):
            forward(*arguments, enable_gqa=True)


# -------------------------------------------------------------------------------------------------- a step, a generation


def examples(n: int, role: str, seed: int = 0) -> list[data.Example]:
    make = torch.Generator().manual_seed(seed)

    def one(i: int) -> data.Example:
        prompt, answer = (int(torch.randint(2, high, (), generator=make)) for high in (12, 9))
        return data.Example(f"{role}/{i}", tuple(torch.randint(1, 300, (prompt + answer,), generator=make).tolist()), prompt)

    return [one(i) for i in range(n)]


ROWS = {"forget": examples(5, "forget", 1), "retain": examples(5, "retain", 2)}
EVERY = [e for rows in ROWS.values() for e in rows]


def parts(objective: dipo.Objective) -> dict[str, train.Part]:
    return {role: train.Part(name, w, [(e,) for e in ROWS[role]]) for role, (name, w) in objective.parts().items()}


def model_of(dtype=torch.bfloat16, config=SMALL) -> Llama:
    return Llama(config, dtype).init_weights(0)


def step(compiled="", micro=4, objective=None, checkpointing=False, dtype=torch.bfloat16):
    """(metrics, gradient) of a step away from the reference."""
    model, objective = model_of(dtype), objective or dipo.Objective()
    reference = CachedReference(model, EVERY, 3, Path("unused"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    model.checkpointing = checkpointing
    for block in model.model.layers if compiled else ():
        (block.self_attn if compiled == "inductor" else block).compile(dynamic=True, backend=compiled)
    metrics = train.compute_gradients(model, reference, objective, parts(objective), micro)
    return metrics, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("objective", [dipo.Objective(), dipo.Objective("simnpo", "gd"), dipo.Objective(reduction="mean")])
def test_a_step_through_the_branch_of_gpus_is_the_plain_step(kernel, objective, checkpointing):
    metrics, gradient = step(objective=objective)
    with pytest.MonkeyPatch.context() as patch:
        play(patch)
        before = dict(CALLS)
        found, other = step(objective=objective, checkpointing=checkpointing)
    layers, passes = SMALL.num_hidden_layers, 3
    assert CALLS["product"] - before["product"] == passes * 7 * layers + 4  # 4: of the head, once for each set in a pass
    assert CALLS["backward"] - before["backward"] == layers * passes
    assert CALLS["forward"] - before["forward"] == layers * (passes * (1 + checkpointing) + 4)  # 4: the reference
    assert found == pytest.approx(metrics, rel=2e-2, abs=2e-3) and distance(other, gradient) < 2e-2


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.aside)])
def test_compiled_the_branch_of_gpus_is_one_graph_for_all_lengths(played, monkeypatch, backend):
    (eager, gradient), (_, exact) = step(), step(dtype=torch.float32)
    if backend == "inductor":  # it has no wide products for CPUs
        monkeypatch.setattr(model_module, "has_wide_products", lambda device: False)
    CALLS.update(forward=0, backward=0, product=0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    metrics, other = step(backend)
    layers = 3 * SMALL.num_hidden_layers  # in all passes
    assert CALLS["backward"] == layers and CALLS["product"] == (0 if backend == "inductor" else 7 * layers + 4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # no break, nothing new for another batch
    assert metrics == pytest.approx(eager, rel=2e-2, abs=2e-3)
    assert distance(other, exact) < 1.5 * distance(gradient, exact) < 0.2  # it rounds in other places


PROMPTS = [list(e.ids[: e.prompt_length]) for e in EVERY]


@pytest.mark.parametrize("hidden", [None, 7])
def test_generation_through_the_branch_of_gpus_is_the_plain_one(played, monkeypatch, hidden):
    prompts = [[*p[:1], 7, *p[1:]] for p in PROMPTS] if hidden else PROMPTS
    found = generate(model_of(), prompts, 8, hidden_id=hidden)
    assert {"forward": SMALL.num_hidden_layers, "backward": 0, "product": 0} == CALLS  # the prompts at once, then the cache
    play(monkeypatch, False)
    assert found == generate(model_of(), prompts, 8, hidden_id=hidden) and len({len(x) for x in found}) > 1


class Recorded(TorchDispatchMode):
    """A CUDA graph, played: the operators of a step on the tensors that they had, again and again; what is recorded is not
    done, and nothing in it may be read."""

    def __init__(self, step):
        super().__init__()
        self.calls, self.made, self.before = [], set(), []
        with self:
            step()
        for x, old in reversed(self.before):
            x.copy_(old)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "waits for a number"
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor) and id(x) not in self.made:
                self.made.add(id(x))
                self.before.append((x, x.clone()))
        found = func(*args, **(kwargs or {}))
        self.made |= {id(x) for x in tree_leaves(found)}
        self.calls.append((func, args, kwargs or {}, found))  # keeps all tensors, so that no id comes twice
        return found

    def replay(self):
        for func, args, kwargs, found in self.calls:
            for x, new in zip(tree_leaves(found), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(x, torch.Tensor) and x.data_ptr() != new.data_ptr():
                    x.copy_(new)


@given(
    st.lists(st.lists(st.integers(1, 299), min_size=1, max_size=9), min_size=1, max_size=9),
    st.integers(1, 12), st.integers(2, 40), st.sampled_from([None, 7]),
)  # fmt: skip
def test_steps_of_generation_replayed_are_the_plain_ones(prompts, new, every, hidden):
    """On GPUs a step is captured once for a number of rows, which leave when half of them have stopped."""
    model, stop, graphs = model_of(dtype=torch.float32), range(0, 300, every), []
    want = generate(model, prompts, new, stop, hidden)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "has_graphs", lambda device: True)
        patch.setattr(model_module, "captured", lambda step: graphs.append(Recorded(step)) or graphs[-1].replay)
        assert generate(model, prompts, new, stop, hidden) == want
    longest = max(map(len, want))
    assert len(graphs) <= math.ceil(math.log2(len(prompts) + 1)) and (graphs or longest < 2 or new < 3)


def test_a_batch_is_halved_where_the_memory_ends_in_a_capture(monkeypatch, tmp_path):
    tiny, sets, sizes = make_tiny(tmp_path), {"forget": toy_world(0)["forget01_perturbed"][:5]}, []
    want = tofu_rows(tiny.model, tiny.tokenizer, sets, 4)

    def captured(step):
        graph = Recorded(step)
        sizes.append(len(graph.calls[-1][3]))  # the new tokens
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return graph.replay

    monkeypatch.setattr(model_module, "has_graphs", lambda device: True)
    monkeypatch.setattr(model_module, "captured", captured)
    assert generations(tofu_rows(tiny.model, tiny.tokenizer, sets, 4)) == generations(want)
    assert sizes[0] == 5 and {*sizes[1:]} <= {1, 2}


def test_generation_takes_attention_that_is_laid_out_otherwise(monkeypatch):
    """Kernels of GPUs give [B, H, T, K] with positions before heads in memory."""
    plain, original = generate(model_of(), PROMPTS, 8), F.scaled_dot_product_attention

    def laid_out(*args, **how):
        return original(*args, **how).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", laid_out)
    assert generate(model_of(), PROMPTS, 8) == plain


@st.composite
def families(draw) -> list[data.Example]:
    """Several answers to each of some prompts, and prompts that begin alike."""
    ids = st.lists(st.integers(1, 299), min_size=1, max_size=12)
    start, found = draw(ids), []
    for question in draw(st.lists(ids, min_size=1, max_size=3)):
        prompt = start + question
        for answer in draw(st.lists(ids, min_size=1, max_size=4)):
            found.append(data.Example(f"x/{len(found)}", (*prompt, *answer), len(prompt)))
    return draw(st.permutations(found))


def states(model, batches):
    """(final hidden states, gradient of a function of them), one batch after the other."""
    for p in model.parameters():
        p.grad = None
    y = torch.cat([model.hidden_states(**batch.inputs) for batch in batches])
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return y.detach(), torch.cat([p.grad.flatten() for p in model.model.parameters()])


HEAD_OF = {tied: [Llama(dataclasses.replace(SMALL, tie_word_embeddings=tied), dtype).init_weights(0)
                  for dtype in (torch.float32, torch.bfloat16)] for tied in (True, False)}  # fmt: skip


@settings(max_examples=25)
@given(families(), st.booleans(), st.booleans(), st.integers(1, 9))
def test_what_follows_a_shared_beginning_is_computed_as_if_alone(kernel, every, tied, branch, shared):
    """States and gradients: in float32 sequence by sequence, in bfloat16 also through the branch of GPUs."""
    exact, rough = HEAD_OF[tied]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SHARED", shared)
        play(patch, branch)
        whole, alone = [data.pack(every)], [data.pack([e]) for e in every]
        for a, b in zip(states(exact, whole), states(exact, alone), strict=True):
            assert distance(a, b) < 1e-5
        got, other, want = states(rough, whole), states(rough, alone), states(exact, alone)
        for a, b, c in zip(got, other, want, strict=True):
            assert distance(a, c) < 1.5 * distance(b, c) + 5e-3


@settings(max_examples=15)
@given(families(), st.booleans(), st.none() | st.integers(0, 30), st.integers(1, 9))
def test_generation_after_a_shared_beginning_is_that_of_each_prompt_alone(every, tied, hidden, shared):
    model, prompts = HEAD_OF[tied][0], [list(e.ids) for e in every]
    hidden = hidden if hidden is None else prompts[0][hidden % len(prompts[0])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SHARED", shared)
        found = generate(model, prompts, 5, hidden_id=hidden)
    assert found == [generate(model, [prompt], 5, hidden_id=hidden)[0] for prompt in prompts]


@pytest.mark.parametrize("dtype, branch", [(torch.float32, False), (torch.bfloat16, True)])
def test_compiled_a_shared_beginning_is_the_same_for_all_shapes(kernel, monkeypatch, dtype, branch):
    play(monkeypatch, branch)
    monkeypatch.setattr(attention, "SHARED", 2)
    families = [[data.Example(f"{e.key}/{i}", e.ids + (i + 1,) * (n + i), e.prompt_length) for e in some for i in range(n)]
                for n, some in ((2, EVERY[:3]), (4, EVERY[2:7]), (3, EVERY))]  # fmt: skip
    model, twin = (model_of(dtype, dataclasses.replace(SMALL, num_hidden_layers=1)) for _ in "ab")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in twin.model.layers:
        block.compile(dynamic=True, backend="eager")
    for some in families:
        batch = data.pack(some)
        assert batch.packing.rows is not None
        for a, b in zip(states(twin, [batch]), states(model, [batch]), strict=True):
            assert distance(a, b) < (3e-2 if branch else 1e-5)
    if branch:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# -------------------------------------------------------------------------------------------------------- nothing waits


class Transfers(TorchDispatchMode):
    """Records (operator, whether it waits) of all that goes from one device to another, lists of numbers too."""

    def __init__(self):
        super().__init__()
        self.found = list[tuple[str, bool]]()
        self.patch = pytest.MonkeyPatch()

    def __enter__(self):
        for name in ("tensor", "as_tensor"):  # no operator tells of these
            self.patch.setattr(torch, name, self.watched(name, getattr(torch, name)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def watched(self, name, make):
        def call(numbers, *args, device=None, **kwargs):
            if not isinstance(numbers, torch.Tensor) and device is not None and torch.device(device) != CPU:
                self.found.append((name, True))
            return make(numbers, *args, device=device, **kwargs)

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        made = "empty" in str(function)
        if len({x.device.type for x in tensors if x.ndim or copies}) > 1 and not made:
            waits = not ((kwargs or {}).get("non_blocking") or len(args) > 2 and args[2])
            self.found.append((str(function), waits))
        return result


OBJECTIVES = [
    dipo.Objective(), dipo.Objective(filter="relative", reduction="mean"), dipo.Objective("simnpo", "gd"),
    dipo.Objective("anchored", "anchored", positions="all"), dipo.Objective("npo", "kl"),
]  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=2, phases=[Phase.explicit, Phase.generate])
@given(st.integers(2, 10), st.sampled_from([2**25, 300 * 7]), st.booleans())
def test_no_pass_waits(kernel, objective, micro, chunk, checkpointing):
    with pytest.MonkeyPatch.context() as patch:
        play(patch)
        patch.setattr(model_module, "CHUNK", chunk)
        model = model_of(config=dataclasses.replace(SMALL, num_hidden_layers=1)).to("meta")
        model.hidden_states(**data.pack(EVERY[:1]).to("meta").inputs)  # the frequencies go there once
        model.checkpointing = checkpointing
        patch.setattr(reference_module, "keeps", lambda size, device: True)
        reference = CachedReference(model, EVERY, 3, Path("unused"))
        passes = []
        patch.setattr(torch.Tensor, "backward", watched(torch.Tensor.backward, passes))
        with Transfers() as transfers, pytest.raises(RuntimeError, match="meta"):  # the first number that is read
            train.compute_gradients(model, reference, objective, parts(objective), micro)
    assert sum(shape == () for shape in passes) >= 2 and sum(len(shape) == 2 for shape in passes) == -(-10 // micro)
    assert all(p.grad is not None for p in model.parameters())  # so it is read behind the last pass
    assert transfers.found and not [name for name, waits in transfers.found if waits]


def watched(method, calls):
    def call(self, *args, **kwargs):
        method(self, *args, **kwargs)
        calls.append(tuple(self.shape))

    return call


def test_a_gpu_gets_pinned_memory(monkeypatch):
    pinned, moved = [], []
    monkeypatch.setattr(attention, "has_flash", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.shape) or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, **how: moved.append((str(device), how)) or x)
    batch = data.pack(EVERY[:3])
    tensors = [x for x in (vars(batch) | vars(batch.packing)).values() if isinstance(x, torch.Tensor)]
    batch.to("cuda:0")
    assert len(pinned) == len(tensors) and moved == [("cuda:0", {"non_blocking": True})] * len(tensors)
    pinned.clear()
    batch.to("cpu")
    assert not pinned


@given(st.lists(st.sampled_from(EVERY), min_size=1, max_size=5))
def test_a_batch_knows_its_borders(some):
    batch = data.pack(some, share=False)
    ends = [0, *itertools.accumulate(len(e.ids) - 1 for e in some)]
    assert batch.packing.borders.tolist() == ends and batch.packing.borders.dtype == torch.int32
    assert batch.packing.key_borders is batch.packing.borders and batch.packing.rows is None
    assert batch.inputs["packing"] is batch.packing


def test_frequencies_go_to_the_device_once():
    model = model_of()
    assert model.frequencies.device == CPU
    model.to("meta").hidden_states(torch.zeros(1, 3, dtype=torch.int64, device="meta"))
    assert model.frequencies.is_meta
    with Transfers() as transfers:
        model.hidden_states(torch.zeros(1, 3, dtype=torch.int64, device="meta"))
    assert not transfers.found


# ---------------------------------------------------------------------------------------------------------- the reference


@given(st.permutations(EVERY).map(lambda order: order[:4]))
def test_states_are_copied_slice_by_slice_from_pinned_memory(some):
    reference, pinned = STORED, []
    want = torch.cat([reference.states[reference.rows[e]] for e in some])
    assert torch.equal(reference.answer_states(some), want)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "device", torch.device("cpu", 0))  # is another one than the states'
        patch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(len(x)) or x)
        assert torch.equal(reference.answer_states(some), want) and pinned == [e.answer_length for e in some]
        patch.setattr(reference, "device", torch.device("meta"))
        with Transfers() as transfers:
            assert reference.answer_states(some).shape == want.shape
    assert transfers.found == [("aten.copy_.default", False)] * len(some)


STORED = CachedReference(model_of(torch.float32), EVERY, 3, Path("unused"))


@pytest.mark.parametrize("total, place", [(10**9, "on the GPU"), (10**4, "in memory")])
def test_small_states_stay_on_the_gpu_and_others_are_pinned(monkeypatch, capsys, total, place):
    cuda, empty, made = torch.device("cuda", 0), torch.empty, []
    monkeypatch.setattr(Llama, "device", property(lambda model: cuda))
    monkeypatch.setattr(data.Batch, "to", lambda batch, device: batch)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, total))

    def recorded(*shape, **how):
        chosen = {k: how.pop(k) for k in ("device", "pin_memory") if how.get(k) in (cuda, True)}
        made.extend([chosen] if chosen else [])
        return empty(*shape, **how)

    monkeypatch.setattr(torch, "empty", recorded)
    reference = CachedReference(model_of(torch.float32), EVERY, 3, Path("unused"))
    assert torch.equal(reference.states, STORED.states) and place in capsys.readouterr().out
    assert made == [{"device": cuda} if place == "on the GPU" else {"pin_memory": True}]


def test_without_posix_fallocate_the_file_is_made_all_the_same(monkeypatch, tmp_path):
    sizes, truncate = [], os.truncate
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(os, "truncate", lambda file, size: sizes.append(size) or truncate(file, size))
    monkeypatch.setattr(reference_module, "IN_MEMORY", 0)
    reference = CachedReference(model_of(torch.float32), EVERY, 3, tmp_path / "reference.bin")
    assert sizes == [reference.states.numel() * 4] and torch.equal(reference.states, STORED.states)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- compiling


@pytest.mark.parametrize("chunk", [2**25, 300 * 7])
def test_the_loss_is_compiled_once_a_role_wherever_in_the_batch_it_begins(monkeypatch, chunk):
    monkeypatch.setattr(model_module, "CHUNK", chunk)
    torch._dynamo.reset()
    counter, model, objective = CompileCounter(), model_of(torch.float32), dipo.Objective()
    compiled = torch.compile(dipo.position_terms, dynamic=True, backend=counter)
    for micro in (7, 3, 4):
        train.compute_gradients(model, STORED, objective, parts(objective), micro, compiled)
    assert counter.frame_count == 2


def test_a_compiled_model_is_evaluated_as_a_plain_one_that_shares_its_weights():
    torch._dynamo.reset()
    counter, model = CompileCounter(), model_of(torch.float32)
    plain = [generate(model, PROMPTS, 6), generate(inference.evaluated(model), PROMPTS, 6)]
    for block in model.model.layers:
        block.compile(dynamic=True, backend=counter)
    judged = inference.evaluated(model)
    assert [generate(judged, PROMPTS, 6)] * 2 == plain and counter.frame_count == 0
    assert [p.data_ptr() for p in judged.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert not any(p.requires_grad for p in judged.parameters()) and all(p.requires_grad for p in model.parameters())
    model.hidden_states(**data.pack(EVERY).inputs)
    assert counter.frame_count  # which stays what it was


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_blocks_are_compiled_with_options_that_exist(monkeypatch, device):
    calls, model = [], model_of()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **how: calls.append(how))
    monkeypatch.setattr(model, "compute_device", torch.device(device))
    assert callable(train.compile_step(model)) and len(calls) == len(model.model.layers)
    assert all(how["dynamic"] and bool(how["options"]) == (device == "cuda") for how in calls)
    options = calls[0]["options"] or {}
    assert {*options} <= {*torch._inductor.list_options()} and all(options.values())
    assert ("combo_kernels_pointwise_only" in options) == ("combo_kernels" in options)  # others fail on varying lengths


@given(st.floats(0.1, 50), st.sampled_from([16, 32]), st.floats(1e8, 1e11).map(int))
def test_compiling_is_for_long_runs_on_a_gpu(epochs, batch, size):
    config, steps = train.Config(epochs=epochs, batch_size=batch), max(1, int(epochs * 400 / batch))
    models = {
        kind: SimpleNamespace(device=torch.device(kind), parameters=lambda: [torch.empty(size, device="meta")])
        for kind in ("cuda", "cpu")
    }
    rows = {role: [data.Example("", (0,) * n, 1) for n in (50, 150)] for role in ("forget", "retain")}
    for some in (rows, rows | {"refusals": [[rows["forget"][0]]]}):
        pays = 0.2 * 6 * size * (steps * batch * 200) / 2e14 > 90
        assert train.worth_compiling(models["cuda"], config, some, steps) == pays
        assert not train.worth_compiling(models["cpu"], config, some, steps)


@pytest.mark.parametrize("flag", [None, True, False])
@pytest.mark.parametrize("worth", [True, False])
def test_a_flag_decides_over_what_pays(monkeypatch, tmp_path, flag, worth):
    compiled = []
    monkeypatch.setattr(train, "worth_compiling", lambda *arguments: worth)
    monkeypatch.setattr(train, "compile_step", lambda model: compiled.append(model) or dipo.position_terms)
    (tmp_path / "config.json").touch()
    config = train.Config(compile=flag, epochs=0.2, batch_size=1, save_every=0, warmup_epochs=0)
    train.train(model_of(torch.float32), config, ROWS, tmp_path)
    assert bool(compiled) == (worth if flag is None else flag)


# ------------------------------------------------------------------------------------------------------------ evaluation


def memory(patch, free: int, reserved: int, allocated: int) -> None:
    patch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    patch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    patch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)


SIZES = st.integers(0, 10**12)


@given(SIZES, SIZES, SIZES, st.integers(1, 10**10), st.integers(1, 64))
def test_a_batch_takes_half_of_what_a_gpu_has_free(free, unused, allocated, each, usual):
    with pytest.MonkeyPatch.context() as patch:
        memory(patch, free, allocated + unused, allocated)
        found = inference.by_memory(torch.device("cuda"), usual, each)
    assert found >= 1 and (found == 1 or 2 * found * each <= free + unused < 2 * (found + 1) * each)
    assert inference.by_memory(CPU, usual, each) == usual


@pytest.mark.parametrize("room", [1, 3, 10**6])
def test_results_do_not_depend_on_the_memory_that_is_free(monkeypatch, tmp_path, room):
    tiny, sets = make_tiny(tmp_path), {"forget": toy_world(0)["forget01_perturbed"][:5]}
    want, sizes, each = tofu_rows(tiny.model, tiny.tokenizer, sets, 4), [], {}
    monkeypatch.setattr(inference, "by_memory", lambda device, usual, size: each.setdefault(usual, size) and room)
    original = inference.generate
    monkeypatch.setattr(
        inference, "generate", lambda model, batch, *a: sizes.append(len(batch)) or original(model, batch, *a)
    )
    again = tofu_rows(tiny.model, tiny.tokenizer, sets, 4)
    assert generations(again) == generations(want) and values(again) == pytest.approx(values(want), rel=1e-5)
    assert max(sizes) == min(room, 5) and sum(sizes) == 5
    c = tiny.model.config
    cached = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 4  # bytes a position, of at least five
    assert each.keys() == {2048, 64} and each[2048] > 4 * 4 * c.vocab_size and each[64] > 5 * cached


def test_float32_on_a_gpu_is_said_to_be_slow():
    said = {
        (d, t): inference.on_device(torch.device(d), t) for d in ("cpu", "cuda") for t in (torch.float32, torch.bfloat16)
    }
    assert [k for k, text in said.items() if "slow" in text] == [("cuda", torch.float32)]
    assert said["cuda", torch.bfloat16] == "cuda, torch.bfloat16" and "\n" not in said["cuda", torch.float32]
