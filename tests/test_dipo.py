"""The paper's mathematics as properties of dipo.py, in the order in which dipo.py introduces it.

B sequences, T positions, V vocabulary throughout. w and l are the preferred and the dispreferred distribution.
"""

import functools
import itertools
import math
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from claims import claim
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import dipo
from model import Llama, LlamaConfig

FILTERS = st.sampled_from(dipo.FILTERS)
ROLES = st.sampled_from(dipo.ROLES)
BETAS = st.floats(0.01, 2.0)
KAPPAS = st.sampled_from([0.0, 0.02, 0.5, 3.0])
FRACTIONS = st.sampled_from([0.01, 0.05, 0.1, 0.2, 0.5, 1.0])
SOURCES = st.sampled_from(["policy", "reference"])
VOCABULARIES = st.sampled_from([1, 2]) | st.integers(3, 60)
REAL_VOCABULARY = 128_256  # Llama 3


@st.composite
def cases(draw, dtype=torch.float64, largest=1e4, vocabulary=VOCABULARIES):
    """(logits, ref_logits, mask): any shape from one position on, logits up to +-`largest`, ties, any mask, none too."""
    B, T, V = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(vocabulary)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([s for s in (0.01, 0.3, 1.0, 3.0, 10.0, 100.0, 1e4) if s <= largest]))
    z, noise = (scale * torch.randn(B, T, V, generator=generator, dtype=torch.float64) for _ in range(2))
    z = z.round() if draw(st.booleans()) else z  # ties
    z = z.clamp(-largest, largest).to(dtype)
    z_ref = (z + draw(st.sampled_from([0.01, 0.3, 1.0])) * noise).clamp(-largest, largest).to(dtype)
    mask = torch.rand(B, T, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return z, z_ref, mask


MODERATE = cases(largest=10.0)  # where no probability underflows


@st.composite
def marked(draw, **options):
    """A case with memory positions: (logits, ref_logits, mask, memory [B, T]); none, some or all of them, in padding too."""
    z, z_ref, mask = draw(cases(**options))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return z, z_ref, mask, torch.rand(mask.shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))


ANY_MASK = torch.tensor([[True]])


def log_softmax(*logits):
    return tuple(z.log_softmax(-1) for z in logits)


def close(actual, expected, *logits):
    """Equal up to rounding, which grows with the logits."""
    size = max([1.0, *(z.abs().max().item() for z in logits)])
    assert_close(actual, expected, rtol=1e-9, atol=1e-12 * size)


def any_pair(z, seed=0):
    """Two distributions that have nothing to do with z, as log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    return log_softmax(*(torch.randn(z.shape, generator=generator, dtype=z.dtype) * 3 for _ in range(2)))


def pair_for(role, memory, forgetting):
    """(preferred, dispreferred)."""
    return (forgetting, memory) if role == "forget" else (memory, forgetting)


def swapped_roles(z, alpha=1.0, p=0.05, filter="both", center=False):
    """Where the pair made of z has its roles swapped."""
    objective = dipo.Objective(alpha=alpha, p=p, filter=filter, center=center)
    return dipo.position_terms("dipo", "forget", objective, z, z)[2]


def dot_product(z, z_ref, w, l, mask, beta=0.05):  # noqa: E741
    """The margin of two distributions (probabilities) from the terms that train."""
    return beta * dipo.margin_terms(z, z_ref, w, l).masked_fill(~mask, 0.0).sum(-1)


def loss(name, z, mask, targets=None, z_ref=None, **options):
    """The losses [B] of a row of the table."""
    return dipo.sequence_losses(name, z, mask, targets=targets, ref_logits=z_ref, **options)[0]


def nll(z, targets, mask):
    return loss("gd", z, mask, targets)


def dipo_margin(z, z_ref, mask, role="forget", beta=None, **pair):
    """(u [B], where the roles swap [B, T])."""
    return dipo.sequence_losses("dipo", z, mask, ref_logits=z_ref, role=role, beta=beta, **pair)[1:]


def gradient(f, x):
    x = x.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x).sum(), x)
    return g


# --------------------------------------------------------------------------------- three ideas that a reader must bring


@given(MODERATE, st.floats(0.01, 0.9), st.integers(0, 2**31))
@claim("KL(P||Q) grows when Q takes mass from a token that P favours", "to bring along")
def test_kl_grows_when_q_takes_mass_from_what_p_favours(case, share, seed):
    """P favours i over j if p_i / q_i > p_j / q_j. Q' = Q - e at i, + e at j: KL is convex in e, with that slope at 0."""
    z, z_ref, _ = case
    assume(z.shape[-1] > 1)
    log_p, log_q = log_softmax(z[:1, :1], z_ref[:1, :1])
    ratio = (log_p - log_q).exp()[0, 0]
    i, j = torch.randperm(len(ratio), generator=torch.Generator().manual_seed(seed))[:2].tolist()
    i, j = (i, j) if ratio[i] >= ratio[j] else (j, i)
    q = log_q.exp()
    e = share * q[0, 0, i].item()
    q[0, 0, i] -= e
    q[0, 0, j] += e
    before, after = (dipo.sequence_kl(log_p, x, ANY_MASK).item() for x in (log_q, q.log()))
    assert after - before >= e * (ratio[i] - ratio[j]).item() - 1e-12
    assert after >= before - 1e-12


@given(st.floats(-30, 30), st.floats(-30, 30))
@claim("Bradley-Terry gives more than 1/2 to the larger reward", "to bring along")
def test_bradley_terry_gives_more_than_half_to_the_larger_reward(r_w, r_l):
    """P(w > l) = sigmoid(R_w - R_l) = exp(-L); P(w > l) + P(l > w) = 1."""
    loss = dipo.bradley_terry_loss(torch.tensor([r_w - r_l, r_l - r_w], dtype=torch.float64))
    wins, loses = (-loss).exp().tolist()
    assert wins + loses == pytest.approx(1)
    if abs(r_w - r_l) > 1e-9:
        assert (wins > 0.5) == (r_w > r_l)


def tiny_llama(seed: int, vocabulary: int = 50) -> Llama:
    """A random Llama whose logits reach about +-4, in float64."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, tie_word_embeddings=bool(seed % 2), bos_token_id=0,
        eos_token_ids=(1,), initializer_range=0.3,
    )  # fmt: skip
    model = Llama(config).init_weights(seed).double()
    model.compute_dtype = torch.float64
    return model


@settings(max_examples=25)
@given(st.integers(0, 9), st.lists(st.integers(0, 49), min_size=2, max_size=12), st.data())
@claim("the state s_t of the MDP is the prompt and the answer so far, and all of it", "to bring along")
def test_the_state_is_the_prompt_and_the_answer_so_far(seed, ids, data):
    """What follows y_t changes nothing in pi(.|s_t); any token before it does, the prompt's first one too."""
    model, at = tiny_llama(seed), data.draw(st.integers(0, len(ids) - 1))
    changed = data.draw(st.integers(0, len(ids) - 1))
    other = [(t + 1) % 50 if k == changed else t for k, t in enumerate(ids)]
    with torch.no_grad():
        before, after = (model(torch.tensor([x]))[0, at] for x in (ids, other))
    if changed > at:
        assert_close(after, before)
    else:
        assert (after - before).abs().max() > 1e-5


# --------------------------------------------------------------------------------------------------------- sequence KL


@given(cases())
@claim("D_SeqKL >= 0, and = 0 only between equal distributions", "TDPO")
def test_sequence_kl_is_zero_between_equals_and_positive_otherwise(case):
    """Pinsker's inequality makes "only" a number: D >= 1/2 sum_t |p - q|_1^2."""
    z, z_ref, mask = case
    p, q = log_softmax(z, z_ref)
    pinsker = 0.5 * ((p.exp() - q.exp()).abs().sum(-1).square() * mask).sum(-1)
    assert (dipo.sequence_kl(p, q, mask) >= pinsker - 1e-12).all()
    assert dipo.sequence_kl(p, p, mask).abs().max() == 0


@given(cases(largest=100.0))
@claim("D_SeqKL is the sum over answer positions of the tokens' KL", "TDPO")
def test_sequence_kl_is_the_sum_of_torchs_kl_over_positions(case):
    z, z_ref, mask = case
    kl = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (z, z_ref)))
    close(dipo.sequence_kl(*log_softmax(z, z_ref), mask), (kl * mask).sum(-1), z)


@given(cases())
@claim("D_SeqKL is additive over positions, and masking is leaving out", "TDPO")
def test_sequence_kl_is_additive_and_masked_equals_sliced(case):
    z, z_ref, mask = case
    p, q = log_softmax(z, z_ref)
    whole = dipo.sequence_kl(p, q, mask)
    alone = [dipo.sequence_kl(p, q, mask & (torch.arange(mask.shape[1]) == t)) for t in range(mask.shape[1])]
    close(whole, sum(alone), z)
    for b, kept in enumerate(mask):
        close(whole[b], dipo.sequence_kl(p[b : b + 1, kept], q[b : b + 1, kept], kept[None, kept])[0], z)


@given(cases(), st.floats(-100, 100), st.floats(-100, 100))
@claim("D_SeqKL does not see a constant added to all logits of a position", "TDPO")
def test_sequence_kl_ignores_a_shift_of_the_logits(case, c, d):
    z, z_ref, mask = case
    shifted = dipo.sequence_kl(*log_softmax(z + c, z_ref + d), mask)
    assert_close(shifted, dipo.sequence_kl(*log_softmax(z, z_ref), mask), rtol=1e-9, atol=1e-9)


@given(
    st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=9),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.booleans(),
)
@claim("every KL, margin, loss and gradient is finite for logits up to +-1e4", "ours")
def test_everything_is_finite_for_extreme_logits(values, dtype, masked):
    z = torch.tensor([[values, values[::-1]]], dtype=torch.float64).to(dtype)
    z_ref, mask = z.flip(1), torch.tensor([[True, not masked]])
    assert dipo.sequence_kl(*log_softmax(z, z_ref), mask).isfinite().all()
    for role in dipo.ROLES:
        losses = dipo.bradley_terry_loss(dipo_margin(z, z_ref, mask, role)[0])
        assert losses.isfinite().all() and (losses >= 0).all()
        assert gradient(lambda x, r=role: dipo.bradley_terry_loss(dipo_margin(x, z_ref, mask, r)[0]), z).isfinite().all()
    z, z_ref, mask = torch.cat([z, z_ref]), torch.cat([z_ref, z]), mask.repeat(2, 1)  # an even number, for refusals
    targets, memory = targets_for(mask, len(values)), mask & torch.tensor([True, False])
    for name, row in dipo.LOSSES.items():
        for role in row.roles:
            f = functools.partial(loss, name, mask=mask, targets=targets, z_ref=z_ref, role=role, memory=memory)
            assert f(z).isfinite().all() and gradient(f, z).isfinite().all()


def test_zero_times_minus_infinity_is_zero():
    p, q = torch.tensor([[[0.0, -math.inf]]]), torch.tensor([[[0.5, 0.5]]]).log()
    assert_close(dipo.sequence_kl(p, q, ANY_MASK), torch.tensor([math.log(2)]))
    assert_close(dipo.sequence_kl(p, p, ANY_MASK), torch.tensor([0.0]))
    assert dipo.sequence_kl(q, p, ANY_MASK).item() == math.inf


def test_what_stands_in_a_masked_position_never_matters():
    """Not even NaN and infinity."""
    mask = torch.tensor([[True, False]])
    for garbage in (math.nan, math.inf, -math.inf):
        z = torch.tensor([[[1.0, 2.0], [garbage, garbage]]])
        clean = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]])
        assert_close(dipo.sequence_kl(*log_softmax(z, z), mask), torch.zeros(1))
        assert_close(nll(z, torch.zeros(1, 2, dtype=torch.int64), mask), torch.tensor([math.log1p(math.e)]))
        assert_close(dipo_margin(z, clean + 1, mask)[0], dipo_margin(clean, clean + 1, mask)[0])


# ------------------------------------------------------------------------------------------------------- memory vector


def kept_by_the_rule(z: list[float], p: float, filter: str) -> set[int]:
    """The rule in words: rank below p V (at least one, ties with the last included); probability >= p times the largest."""
    weights = [math.exp(x - max(z)) for x in z]
    last = sorted(z, reverse=True)[max(1, math.floor(p * len(z) + 1e-6)) - 1]
    rank, relative = {i for i, x in enumerate(z) if x >= last}, {i for i, w in enumerate(weights) if w >= p}
    return {"rank": rank, "relative": relative, "both": rank & relative, "either": rank | relative}[filter]


@settings(max_examples=200)
@given(st.lists(st.integers(-30, 60), min_size=1, max_size=45), FRACTIONS, FILTERS)
@claim("m keeps the logits that pass the rank and the relative threshold, zero elsewhere, ties alike", "the pair")
def test_memory_vector_keeps_exactly_what_its_rule_says(levels, p, filter):
    z = [x / 4 + 0.01 for x in levels]  # many ties, no logit of exactly zero
    m = dipo.memory_vector(torch.tensor([[z]], dtype=torch.float64), p, filter)[0, 0]
    expected = kept_by_the_rule(z, p, filter)
    assert {i for i in range(len(z)) if m[i] != 0} == expected and expected
    assert all(m[i] == z[i] for i in expected)


def test_rank_threshold_counts_tokens_whatever_the_rounding_of_p():
    """0.05 x 60 and 0.1 x 30 are 3 tokens, although the products round below it; 0.05 x 59 are 2; never less than 1."""
    for V, p, kept in (
        (60, 0.05, 3),
        (30, 0.1, 3),
        (59, 0.05, 2),
        (100, 0.29, 29),
        (10, 0.01, 1),
        (7, 1.0, 7),
        (39, 0.05, 1),
    ):
        assert (dipo.memory_vector(torch.arange(V) + 1.0, p, "rank") != 0).sum() == kept


def test_a_token_exactly_at_the_relative_threshold_counts_as_passing_it():
    """Three tokens pass with it, one more than the rank threshold allows; without it two, and nothing would be ranked."""
    z = torch.full((20,), -10.0, dtype=torch.float64)
    z[:3] = torch.tensor([20.0, 19.0, 20.0 + math.log(0.1)], dtype=torch.float64)
    assert (dipo.memory_vector(z, 0.1, "relative") != 0).sum() == 3
    assert (dipo.memory_vector(z, 0.1, "both") != 0).nonzero().flatten().tolist() == [0, 1]


def test_relative_threshold_is_closed():
    """A token of exactly p times the largest probability is kept, one just below it is not."""
    z = torch.tensor([1.0, 1.0 + math.log(0.5), 1.0 + math.log(0.5) - 1e-9], dtype=torch.float64)
    assert (dipo.memory_vector(z, 0.5, "relative") != 0).tolist() == [True, True, False]


@given(cases(), st.integers(1, 60), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 2**31))
def test_kth_largest_is_that_of_a_sort_at_the_positions_asked_for(case, k, share, seed):
    z, k = case[0], min(k, case[0].shape[-1])
    where = torch.rand(z.shape[:-1], generator=torch.Generator().manual_seed(seed)) < share
    for rows, wanted in ((z, where), (z[0], where[0]), (z[0, 0], where[0, 0])):
        expected = rows.sort(-1, descending=True).values[..., k - 1 : k]
        found = dipo.kth_largest(rows, k, wanted)
        assert found.dtype == z.dtype and found.shape == (*rows.shape[:-1], 1)
        assert torch.equal(found, torch.where(wanted[..., None], expected, -math.inf))


@settings(max_examples=10)
@given(cases(), st.booleans())
def test_kth_largest_is_an_operator_that_torch_compile_can_trace(case, everywhere):
    z, _, mask = case
    torch.library.opcheck(dipo.kth_largest, (z, max(1, z.shape[-1] // 2), mask | everywhere))


@given(cases(), FRACTIONS, st.booleans(), st.sampled_from([torch.float64, torch.float32]))
def test_both_is_the_intersection_of_rank_and_relative_at_flat_positions_too(case, p, center, dtype):
    """Where many tokens pass the relative threshold, beside positions where hardly one does."""
    z, _, flat = case
    z = torch.where(flat[..., None], z / z.abs().amax().clamp(min=1) * 0.1, z).to(dtype)
    both, rank, relative = (z >= dipo.confidence_threshold(z, p, f) for f in ("both", "rank", "relative"))
    assert torch.equal(both, rank & relative)
    if p <= 0.5:
        assert relative[flat].all()
    m, by_rank, by_probability = (dipo.memory_vector(z, p, f, center) for f in ("both", "rank", "relative"))
    assert torch.equal(m, torch.where(rank & relative, by_rank, 0.0)) and torch.equal(
        m, torch.where(both, by_probability, 0.0)
    )


@given(cases(), FRACTIONS, FILTERS, st.booleans())
@claim("no position is left without a kept token: the likeliest one passes every filter", "the pair")
def test_the_likeliest_token_is_kept_at_every_position(case, p, filter, center):
    z = case[0]
    assume(z.shape[-1] > 1)
    m = dipo.memory_vector(z + 0.123, p, filter, center)
    top = (z + 0.123 - (z + 0.123).mean(-1, keepdim=True) * center).amax(-1)
    assert_close(m.gather(-1, z.argmax(-1, keepdim=True))[..., 0], top)


@given(cases(), FRACTIONS, FILTERS, st.booleans(), st.integers(0, 2**31))
@claim("m_t depends on z_t alone, on no other position or sequence", "the pair")
def test_memory_vector_of_a_position_depends_on_that_position_alone(case, p, filter, center, seed):
    z = case[0] * torch.rand(case[1].shape[:2], generator=torch.Generator().manual_seed(seed))[..., None].to(case[0].dtype)
    m = dipo.memory_vector(z, p, filter, center)
    for b, t in ((b, t) for b in range(z.shape[0]) for t in range(z.shape[1])):
        close(m[b, t], dipo.memory_vector(z[b, t], p, filter, center), z)


@given(cases(), FRACTIONS, FRACTIONS, FILTERS)
@claim("the kept set shrinks as the relative threshold rises, grows with the ranked share", "the pair")
def test_kept_sets_are_monotone_in_p(case, p, q, filter):
    """A larger p admits more ranks and demands more probability: monotone for each alone, each in its direction."""
    z, (low, high) = case[0] + 0.123, sorted((p, q))
    few, many = (dipo.memory_vector(z, x, filter) != 0 for x in (low, high))
    if filter == "rank":
        assert (few <= many).all()
    if filter == "relative":
        assert (many <= few).all()
    rank, relative, both, either = (dipo.memory_vector(z, p, f) != 0 for f in ("rank", "relative", "both", "either"))
    assert (both == (rank & relative)).all() and (either == (rank | relative)).all()


@given(cases(), FILTERS, FRACTIONS, st.booleans(), st.integers(0, 2**31))
@claim("m is equivariant under a permutation of the vocabulary", "the pair")
def test_memory_vector_does_not_depend_on_the_order_of_the_vocabulary(case, filter, p, center, seed):
    z = case[0]
    order = torch.randperm(z.shape[-1], generator=torch.Generator().manual_seed(seed))
    m = dipo.memory_vector(z, p, filter, center)
    close(dipo.memory_vector(z[..., order], p, filter, center), m[..., order], z)


@given(MODERATE, st.integers(-100, 100), FILTERS)
@claim("raw logits make m depend on a constant that softmax ignores; centred ones do not", "ours")
def test_centred_memory_vector_ignores_the_constant_that_softmax_ignores(case, c, filter):
    z = case[0].float().double()  # exact after the shift
    shifted, plain = (dipo.memory_vector(x, center=True, filter=filter) for x in (z + c, z))
    assert_close(shifted, plain, atol=1e-9, rtol=1e-9)
    kept = dipo.memory_vector(z.abs() + 1, filter=filter) != 0
    raw = dipo.memory_vector(z.abs() + 1 + abs(c), filter=filter)
    assert_close(raw, torch.where(kept, z.abs() + 1 + abs(c), 0.0))


# ------------------------------------------------------------------------------------------------------------ the pair


@given(cases(), st.sampled_from([torch.float64, torch.float32]))
def test_softmax_with_its_normaliser_is_torchs(case, dtype):
    z = case[0].to(dtype)
    probabilities, normaliser = dipo._softmax(z)
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-7}
    assert_close(probabilities, z.softmax(-1), **tolerance)
    assert_close(normaliser, z.logsumexp(-1), **tolerance)


@given(cases(), FILTERS, FRACTIONS, st.floats(0.01, 3.0), st.booleans())
@claim("pi_m = softmax(z + alpha m), pi_f = softmax(z - alpha m): targets, no gradient", "the pair")
def test_pair_is_the_policy_shifted_by_the_memory_vector_and_carries_no_gradient(case, filter, p, alpha, center):
    z = case[0].requires_grad_()
    m = dipo.memory_vector(z, p, filter, center)
    memory, forgetting = dipo.preference_pair(z, alpha, p, filter, center)
    assert_close(memory, (z + alpha * m).detach())
    assert_close(forgetting, (z - alpha * m).detach())
    assert not m.requires_grad and not memory.requires_grad and not forgetting.requires_grad


@given(cases(), FILTERS, FRACTIONS, st.floats(0.01, 3.0))
@claim("pi_m gives the kept tokens more mass than pi, and pi_f less", "the pair", "holds if no kept logit is negative")
def test_memory_distribution_remembers_and_forgetting_distribution_forgets(case, filter, p, alpha):
    z = case[0].abs() + 0.1
    memory, forgetting = dipo.preference_pair(z, alpha, p, filter)
    kept = dipo.memory_vector(z, p, filter) != 0
    more, mass, less = (torch.where(kept, x.softmax(-1), 0.0).sum(-1) for x in (memory, z, forgetting))
    assert (more >= mass - 1e-12).all() and (mass >= less - 1e-12).all()
    assert not swapped_roles(z, alpha, p, filter).any()


@given(MODERATE, FILTERS, FRACTIONS, st.floats(0.1, 3.0), st.booleans())
@claim("the roles are told to be swapped exactly where pi_m gives the kept tokens less than pi_f", "ours")
def test_swapped_means_less_mass_on_the_kept_tokens(case, filter, p, alpha, center):
    z = case[0]
    memory, forgetting = dipo.preference_pair(z, alpha, p, filter, center)
    kept = dipo.memory_vector(z, p, filter, center) != 0
    gained = torch.where(kept, memory.softmax(-1) - forgetting.softmax(-1), 0.0).sum(-1)
    clear = (gained.abs() > 1e-9) & ~kept.all(-1)
    assert (swapped_roles(z, alpha, p, filter, center) == (gained < 0))[clear].all()


@given(MODERATE, ROLES, SOURCES)
@claim("negative logits swap the roles; the loss refuses them", "ours")
def test_negative_logits_swap_the_roles_and_are_refused(case, role, pair_from):
    z, z_ref, mask = case
    assume(mask.any() and z.shape[-1] > 1)
    z, z_ref = z - z.max() - 1, z_ref - z_ref.max() - 1
    assert swapped_roles(z).all()
    with pytest.raises(dipo.SwappedRolesError, match="--center"):
        dipo.dipo_loss(z, z_ref, mask, role, pair_from=pair_from)
    assert not (dipo_margin(z, z_ref, mask)[1] & ~mask).any()
    dipo.dipo_loss(z, z_ref, mask, role, center=True)


def test_a_few_swapped_positions_are_tolerated_and_more_are_not():
    dipo.check_roles(0, 0)
    dipo.check_roles(5, 100)
    with pytest.raises(
        dipo.SwappedRolesError, match="^at 6 of 100 answer positions the high-confidence logits are negative"
    ):
        dipo.check_roles(6, 100)


@given(cases(), ROLES, FILTERS)
@claim("alpha -> 0 gives pi_m = pi = pi_f, u = 0 and no gradient", "the pair")
def test_alpha_to_zero_leaves_the_policy_and_no_preference(case, role, filter):
    z, z_ref, mask = case
    for x in dipo.preference_pair(z, alpha=1e-15, filter=filter):
        assert_close(x.softmax(-1), z.softmax(-1), rtol=0, atol=1e-10)
    u, _ = dipo_margin(z, z_ref, mask, role, alpha=1e-15, filter=filter)
    grad = gradient(lambda x: dipo_margin(x, z_ref, mask, role, alpha=1e-15, filter=filter)[0], z)
    assert u.abs().max() < 1e-6 and grad.abs().max() < 1e-11


def entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


@given(cases(), FILTERS, FRACTIONS, st.floats(0.01, 3.0))
@claim("entropy of pi_m <= entropy of pi", "ours", "holds if no kept logit is negative")
def test_memory_distribution_is_sharper_than_the_policy(case, filter, p, alpha):
    """d/ds H(softmax(z + s m)) = -Cov(m, z + s m), and for s >= 0 both are ordered alike (m by z: an upper set keeps its
    non-negative logits, the rest has zero)."""
    z = case[0]
    kept = dipo.memory_vector(z + 20_000, p, filter) != 0
    z = z + torch.where(kept, -z, 0.0).amax(-1, keepdim=True).clamp(min=0) + 1e-6  # no kept logit is negative
    memory, _ = dipo.preference_pair(z, alpha, p, filter)
    assert (entropy(memory) <= entropy(z) + 1e-9).all()


@given(cases(), FILTERS, FRACTIONS, st.floats(0.01, 1.0))
@claim("entropy of pi <= entropy of pi_f", "ours", "holds if alpha <= 1 and kept logits >= 0 >= others")
def test_forgetting_distribution_is_flatter_than_the_policy(case, filter, p, alpha):
    """The same derivative for -alpha <= s <= 0: z + s m is still ordered like m if the kept logits stay on top."""
    z = case[0].abs()
    kept = dipo.memory_vector(z + 1, p, filter) != 0
    z = torch.where(kept, z, -z)  # the kept ones stay in place; every other one is now at or below zero
    assume(((dipo.memory_vector(z + 1e-9, p, filter) != 0) == kept).all())
    _, forgetting = dipo.preference_pair(z, alpha, p, filter)
    assert (entropy(forgetting) >= entropy(z) - 1e-9).all()


@claim("entropy of pi_m <= entropy of pi <= entropy of pi_f for all logits", "ours", "refuted by two counterexamples")
def test_entropies_are_not_ordered_for_all_logits():
    """Left: a negative kept logit is pushed down by pi_m. Right: the best token that is not kept takes all of pi_f."""
    z = torch.tensor([-1.0, -5.0, -5.0], dtype=torch.float64)
    assert entropy(dipo.preference_pair(z, filter="rank")[0]) > entropy(z) + 0.1
    z = torch.tensor([10.0, 9.0, 0.0], dtype=torch.float64)
    assert entropy(dipo.preference_pair(z, filter="rank")[1]) < entropy(z) - 0.5


# ------------------------------------------------------------------------------------------------------ margin and loss


@given(cases(), BETAS, st.integers(0, 9))
@claim("the four sequence KLs are beta * sum_t <pi_w - pi_l, z - z_ref>", "Eq. 14")
def test_four_sequence_kls_are_one_dot_product(case, beta, seed):
    """For any two distributions: their entropies cancel, and so do the normalisers of policy and reference."""
    z, z_ref, mask = case
    w, l = any_pair(z, seed)  # noqa: E741
    u = dipo.reward_margin(*log_softmax(z, z_ref), w, l, mask, beta)
    close(u, dot_product(z, z_ref, w.exp(), l.exp(), mask, beta), z)
    close(u, beta * (((w.exp() - l.exp()) * (z - z_ref)).sum(-1) * mask).sum(-1), z)


@given(cases(), FILTERS, ROLES, SOURCES, BETAS, st.floats(0.1, 2.0), FRACTIONS, st.booleans())
@claim("the loss is -log sigmoid(u) of Eq. 14, with (pi_f, pi_m) on forget and (pi_m, pi_f) on retain data", "Eq. 14")
def test_dipo_is_eq_14_for_the_pair_of_its_role(case, filter, role, pair_from, beta, alpha, p, center):
    z, z_ref, mask = case
    memory, forgetting = dipo.preference_pair(z if pair_from == "policy" else z_ref, alpha, p, filter, center)
    w, l = log_softmax(*pair_for(role, memory, forgetting))  # noqa: E741
    expected = dipo.reward_margin(*log_softmax(z, z_ref), w, l, mask, beta)
    options = {"alpha": alpha, "p": p, "filter": filter, "center": center, "pair_from": pair_from}
    u, swapped = dipo_margin(z, z_ref, mask, role, beta, **options)
    close(u, expected, z)
    if swapped.sum() <= dipo.SWAP_LIMIT * mask.sum():
        close(dipo.dipo_loss(z, z_ref, mask, role, beta, **options), torch.logaddexp(torch.zeros_like(u), -expected), z)
    mean, _ = dipo_margin(z, z_ref, mask, role, beta, **options, reduction="mean")
    close(mean * mask.sum(-1).clamp(min=1), u, z)


def test_defaults_are_the_papers():
    """beta = p = 0.05, alpha = 1, the forget role, pairs from the policy, a sum over tokens; both thresholds, raw logits."""
    z, z_ref = torch.randn(2, 2, 3, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).abs() * 4
    mask = torch.tensor([[True, True, True], [True, False, False]])
    paper = {"beta": 0.05, "alpha": 1.0, "p": 0.05, "filter": "both", "center": False, "pair_from": "policy"}
    u, _ = dipo_margin(z, z_ref, mask, "forget", **paper, reduction="sum")
    assert torch.equal(dipo.sequence_losses("dipo", z, mask, ref_logits=z_ref)[1], u)
    assert torch.equal(dipo_margin(z, z_ref, mask)[0], u)
    assert torch.equal(dipo.dipo_loss(z, z_ref, mask), dipo.bradley_terry_loss(u))
    memory, forgetting = dipo.preference_pair(z, 1.0, 0.05, "both", False)
    assert torch.equal(dipo.preference_pair(z)[0], memory) and torch.equal(dipo.preference_pair(z)[1], forgetting)
    assert torch.equal(dipo.memory_vector(z), dipo.memory_vector(z, 0.05, "both", False))
    w, l = log_softmax(forgetting, memory)  # noqa: E741
    close(dipo.reward_margin(*log_softmax(z, z_ref), w, l, mask), u)
    close(dot_product(z, z_ref, w.exp(), l.exp(), mask), u)
    targets = torch.zeros_like(mask, dtype=torch.int64)
    assert torch.equal(loss("npo", z, mask, targets, z_ref), loss("npo", z, mask, targets, z_ref, beta=0.1))


@given(cases(), ROLES, FILTERS, SOURCES, BETAS)
@claim("u = 0 and L = log 2 at the reference", "Eq. 14")
def test_at_the_reference_the_margin_is_zero_and_the_loss_log_two(case, role, filter, pair_from, beta):
    z, _, mask = case
    z = z.abs()
    loss = dipo.dipo_loss(z, z, mask, role, beta, filter=filter, pair_from=pair_from)
    assert_close(loss, torch.full((len(z),), math.log(2), dtype=z.dtype))


@given(cases(), FILTERS, BETAS)
@claim("roles reversed negate u; on shared states L_f + L_r >= 2 log 2, equal only at u = 0", "Eq. 14")
def test_reversed_roles_negate_the_margin_and_the_losses_conflict_on_shared_states(case, filter, beta):
    """L_f + L_r = 2 log(2 cosh(u / 2))."""
    z, z_ref, mask = case
    forget, retain = (dipo_margin(z, z_ref, mask, role, beta, filter=filter)[0] for role in dipo.ROLES)
    assert torch.equal(forget, -retain)
    total = dipo.bradley_terry_loss(forget) + dipo.bradley_terry_loss(retain)
    assert_close(total, 2 * torch.logaddexp(forget / 2, -forget / 2))
    assert (total >= 2 * math.log(2) - 1e-12).all()
    assert (total > 2 * math.log(2) + 1e-8)[forget.abs() > 1e-3].all()


@given(MODERATE, BETAS, st.integers(0, 9))
@claim("P(pi_w > pi_l) = sigmoid(R_w - R_l), R the expected token reward; state-only terms cancel", "Eq. 14")
def test_margin_is_the_difference_of_expected_token_rewards(case, beta, seed):
    """r(s, a) = beta log pi_theta(a|s) / pi_ref(a|s) + c(s) with any c; R_pi = sum_t E_{a ~ pi} r(s_t, a)."""
    z, z_ref, mask = case
    w, l = any_pair(z, seed)  # noqa: E741
    c = 10 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=z.dtype)
    policy, reference = log_softmax(z, z_ref)
    token_reward = beta * (policy - reference) + c[..., None]
    r_w, r_l = (((pi.exp() * token_reward).sum(-1) * mask).sum(-1) for pi in (w, l))
    u = dipo.reward_margin(policy, reference, w, l, mask, beta)
    assert_close(u, r_w - r_l, rtol=1e-9, atol=1e-9)
    assert_close((-dipo.bradley_terry_loss(u)).exp(), torch.sigmoid(r_w - r_l), rtol=1e-9, atol=1e-9)
    without_c = beta * (dipo.sequence_kl(w, reference, mask) - dipo.sequence_kl(w, policy, mask))
    assert_close(without_c, r_w - (c * mask).sum(-1), rtol=1e-9, atol=1e-9)


@given(MODERATE, ROLES, FILTERS, st.integers(0, 9))
@claim("constants added to z_t and z_ref,t change nothing, the pair held fixed or made from centred logits", "Eq. 14")
def test_margin_ignores_what_softmax_ignores_but_the_raw_pair_does_not(case, role, filter, seed):
    """The construction m = z on the kept tokens does see them, raw: the example is a policy that means the same."""
    z, z_ref, mask = case
    z = z.float().double()
    c, d = torch.randint(-50, 50, (2, *mask.shape, 1), generator=torch.Generator().manual_seed(seed)).double()
    w, l = any_pair(z, seed)  # noqa: E741
    u = dipo.reward_margin(*log_softmax(z, z_ref), w, l, mask)
    assert_close(dipo.reward_margin(*log_softmax(z + c, z_ref + d), w, l, mask), u, rtol=1e-9, atol=1e-9)
    dot = dot_product(z + c, z_ref + d, w.exp(), l.exp(), mask)
    assert_close(dot, u, rtol=1e-9, atol=1e-9)
    centred = [dipo_margin(x, y, mask, role, filter=filter, center=True)[0] for x, y in ((z, z_ref), (z + c, z_ref + d))]
    assert_close(*centred, rtol=1e-9, atol=1e-9)
    z, z_ref = torch.tensor([[[3.0, 1.0, 0.0]], [[0.0, 2.0, 0.0]]])[:, None]
    assert (dipo_margin(z, z_ref, ANY_MASK)[0] - dipo_margin(z + 5, z_ref, ANY_MASK)[0]).abs() > 0.01


# ----------------------------------------------------------------------------------------------------------- gradients


@given(MODERATE, BETAS, st.integers(0, 9))
@claim("dL/dx1 < 0 < dL/dx2 for x1 = D(pi_l||pi_theta), x2 = D(pi_w||pi_theta)", "Section 4.2")
def test_the_loss_falls_with_the_distance_to_pi_l_and_rises_with_that_to_pi_w(case, beta, seed):
    """By autograd through the four KLs of `reward_margin`, each made a variable of its own as it is computed."""
    z, z_ref, mask = case
    (theta, ref), (w, l) = log_softmax(z, z_ref), any_pair(z, seed)  # noqa: E741
    variables = {}

    def variable(p, q, mask):
        names = {x.data_ptr(): name for name, x in {"w": w, "l": l, "theta": theta, "ref": ref}.items()}
        key = names[p.data_ptr()], names[q.data_ptr()]
        variables[key] = sequence_kl(p, q, mask).requires_grad_()
        return variables[key]

    sequence_kl = dipo.sequence_kl
    with mock.patch.object(dipo, "sequence_kl", variable):
        u = dipo.reward_margin(theta, ref, w, l, mask, beta)
    x = [variables[key] for key in (("l", "theta"), ("w", "theta"), ("l", "ref"), ("w", "ref"))]
    x1, x2, x3, x4 = torch.autograd.grad(dipo.bradley_terry_loss(u).sum(), x)
    assert (x1 < 0).all() and (x2 > 0).all()
    assert_close(x2, beta * torch.sigmoid(-u.detach()))
    assert_close(torch.stack([x1, x3, x4]), torch.stack([-x2, x2, -x2]))


@given(cases(), ROLES, BETAS, FILTERS)
@claim("dL/dz = -beta sigmoid(-u) (pi_w - pi_l), bounded by beta; none reaches reference or pair", "Section 4.2")
def test_gradient_is_the_closed_form_and_bounded_by_beta(case, role, beta, filter):
    z, z_ref, mask = case
    pair = log_softmax(*pair_for(role, *dipo.preference_pair(z, filter=filter)))
    w, l = (x.clone().requires_grad_() for x in pair)  # noqa: E741
    ref = z_ref.clone().requires_grad_()
    u = dipo.reward_margin(*log_softmax(z, z_ref), *pair, mask, beta)
    expected = -beta * torch.sigmoid(-u)[:, None, None] * (pair[0].exp() - pair[1].exp()) * mask[..., None]
    forms = {
        "four KLs": lambda x: dipo.reward_margin(*log_softmax(x, ref), w, l, mask, beta),
        "dot product": lambda x: dot_product(x, ref, w.exp(), l.exp(), mask, beta),
        "dipo": lambda x: dipo_margin(x, ref, mask, role, beta, filter=filter)[0],
    }
    for form in forms.values():
        x = z.clone().requires_grad_()
        dipo.bradley_terry_loss(form(x)).sum().backward()
        assert_close(x.grad, expected, rtol=1e-6, atol=1e-10)
        assert x.grad.abs().max() <= beta + 1e-12 and (x.grad.abs().sum(-1) <= 2 * beta + 1e-12).all()
        assert ref.grad is None and w.grad is None and l.grad is None


# ------------------------------------------------------------------------------------------------------------ direction


def slopes(z, m, alpha):
    """(<pi - pi_l, w - l>, <w - pi, w - l>) for l, w = softmax(z +- alpha m): along w - l, the slopes of D(l||pi) and of
    -D(w||pi). Both positive: a small step moves away from l and towards w."""
    pi, l, w = (x.softmax(-1) for x in (z, z + alpha * m, z - alpha * m))  # noqa: E741
    return ((pi - l) * (w - l)).sum(-1), ((w - pi) * (w - l)).sum(-1)


def crossing(z, m, alpha):
    """c: w and l give the same probability to a token with m = c, w gives more to those below it."""
    return ((z + alpha * m).logsumexp(-1) - (z - alpha * m).logsumexp(-1)) / (2 * alpha)


def ordered_above_the_crossing(z, m, alpha):
    """Does every token with m_i > c have a logit at least as large as every token with a smaller m? -> [...] bool."""
    above = m > crossing(z, m, alpha)[..., None]
    less = m[..., :, None] > m[..., None, :]
    return (~(above[..., :, None] & less) | (z[..., :, None] >= z[..., None, :])).all((-1, -2))


@settings(max_examples=200)
@given(
    st.integers(1, 8), st.floats(0.05, 5.0), st.floats(0.1, 10.0), st.floats(-10, 10), st.floats(0, 1), st.integers(0, 2**31)
)
@claim(
    "a small step down the loss moves away from pi_l and towards pi_w",
    "ours, stronger than Section 4.2",
    "holds if tokens with m above c are ordered by z as by m",
)
def test_a_tilt_along_a_vector_ordered_like_the_logits_has_the_right_direction(V, alpha, scale, shift, order, seed):
    """Theorem. Let pi = softmax(z), l = softmax(z + alpha m), w = softmax(z - alpha m), alpha > 0, m not constant, and let
    c be the value of m at which w = l. If z_i >= z_j wherever m_i > c and m_i > m_j, then

        <pi - l, w - l> > 0   and   <w - pi, w - l> > 0,

    so along -dL/dz, a positive multiple of w - l, D(l||pi) rises at the rate of the first product and D(w||pi) falls at
    that of the second.

    Proof. With Z(s) = sum_i exp(z_i + s m_i) let c'' = log(Z(0) / Z(-alpha)) / alpha, c' = log(Z(alpha) / Z(0)) / alpha;
    c = (c'' + c') / 2. log Z is strictly convex, so c'' < c < c'. Token by token, with every bracket increasing in m_i,

        l_i - pi_i = ...   > 0  iff  m_i > c'          l_i - w_i = l_i [1 - exp(-2 alpha (m_i - c))]   > 0  iff  m_i > c
        pi_i - w_i = pi_i [1 - exp(-alpha (m_i - c''))]   > 0  iff  m_i > c''

    First product, sum_i (l - pi)_i (l - w)_i: its terms are negative only for c < m_i < c'. Let k > 0 be the least
    (l - w)_i among tokens with m_i > c'. Each of them has a larger logit and a larger m than any token with c < m_j < c'
    (the condition), hence a larger l and a larger bracket: (l - w)_j <= k. As l - pi sums to zero, the tokens above c'
    give at least k sum_{m > c'} (l - pi) = k sum_{m < c'} (pi - l), which outweighs the negative terms; what is left, the
    terms with m_i < c, is positive, for the least m_i lies there.
    Second product, sum_i (pi - w)_i (l - w)_i: negative only for c'' < m_i < c. Let k be the least (pi - w)_i among tokens
    with m_i > c. By the condition it is at least (pi - w)_j for c'' < m_j <= c, and l - w sums to zero: the same argument.

    The pair of the paper: m = z (minus a constant, if centred) on an upper set of z, zero elsewhere. If c >= 0, tokens
    with m_i > c are kept ones, which have larger logits than kept ones with a smaller m and than all others: the
    condition holds. And c >= 0 says Z(alpha) >= Z(-alpha): that the roles are not swapped.
    """
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(500, V, generator=generator, dtype=torch.float64) + shift
    m = torch.randn(500, V, generator=generator, dtype=torch.float64) * scale + shift
    sorted_like_z = m.sort(-1).values.gather(-1, z.argsort(-1).argsort(-1))
    m = torch.where(torch.rand(500, 1, generator=generator) < order, sorted_like_z, m)
    covered = ordered_above_the_crossing(z, m, alpha)
    away, towards = (x[covered] for x in slopes(z, m, alpha))
    assert (away >= -1e-14).all() and (towards >= -1e-14).all()
    far_apart = ((z - alpha * m).softmax(-1) - (z + alpha * m).softmax(-1)).abs().amax(-1)[covered] > 0.3
    assert (away[far_apart] > 0).all() and (towards[far_apart] > 0).all()


@settings(max_examples=200)
@given(cases(largest=100.0), ROLES, FILTERS, FRACTIONS, st.floats(0.05, 3.0), st.booleans(), st.floats(0.01, 0.99))
@claim(
    "a step along -dL/dz moves away from pi_l and towards pi_w, for the constructed pair",
    "ours, stronger than Section 4.2",
    "holds where the roles are not swapped",
)
def test_a_step_down_the_loss_moves_away_from_pi_l_and_towards_pi_w(case, role, filter, p, alpha, center, part):
    """By autograd, steps of a finite size, any reference: away at every size (D is convex), towards up to a size that
    the slope and the range of the step bound (the curvature of D along g is a variance, at most range(g)^2 / 4)."""
    z, z_ref, mask = case
    memory, forgetting = dipo.preference_pair(z, alpha, p, filter, center)
    mask = mask & ~swapped_roles(z, alpha, p, filter, center)
    w, l = log_softmax(*pair_for(role, memory, forgetting))  # noqa: E741
    options = {"role": role, "filter": filter, "p": p, "alpha": alpha, "center": center}
    g = -gradient(lambda x: dipo.bradley_terry_loss(dipo_margin(x, z_ref, mask, **options)[0]), z)
    g = g / g.abs().amax((-1, -2), keepdim=True).clamp(min=1e-200)

    def distances(x):
        return torch.stack([dipo.sequence_kl(pi, x.log_softmax(-1), mask) for pi in (l, w)])

    before = distances(z)
    away, towards = ((gradient(lambda x, i=i: distances(x)[i], z) * g).sum((-1, -2)) * sign for i, sign in ((0, 1), (1, -1)))
    assert (away >= -1e-12).all() and (towards >= -1e-12).all()
    curvature = ((g.amax(-1) - g.amin(-1)).square() / 4 * mask).sum(-1)
    size = part * 2 * towards.clamp(min=0) / curvature.clamp(min=1e-30)
    after = distances(z + size[:, None, None] * g)
    slack = 1e-11 * (1 + before)
    assert (after[0] >= before[0] - slack[0]).all() and (after[1] <= before[1] + slack[1]).all()
    assert (after[1] < before[1])[size * towards * (1 - part) > 1e-8].all()


@claim("the same for arbitrary pairs of distributions", "ours", "refuted by counterexamples")
def test_arbitrary_pairs_may_have_the_wrong_direction():
    """Neither any two distributions, nor a tilt of the policy along some m, nor the paper's pair with swapped roles."""

    def wrong(z, m):
        z, m = torch.tensor(z, dtype=torch.float64), torch.tensor(m, dtype=torch.float64)
        assert not ordered_above_the_crossing(z, m, 1.0)
        away, towards = slopes(z, m, 1.0)
        return away.item() < -0.01, towards.item() < -0.01

    generator = torch.Generator().manual_seed(0)
    pi, w, l = (2 * torch.randn(3, 10_000, 10, generator=generator)).softmax(-1)  # noqa: E741
    fails = (((pi - l) * (w - l)).sum(-1) < 0) | (((w - pi) * (w - l)).sum(-1) < 0)
    assert 0.14 < fails.double().mean() < 0.19
    assert wrong([5, 2, 0], [5, 6, 0]) == (True, False)  # a step towards w comes nearer to l
    assert wrong([5, 2, 0], [1, 0, 6]) == (False, True)  # a step towards w goes farther from w
    pi, w, l = (torch.tensor(x) for x in ([0.8, 0.2], [0.1, 0.9], [0.5, 0.5]))  # noqa: E741  (l between pi and w)
    assert (pi - l) @ (w - l) < -0.1
    z = torch.tensor([[[-12.0, -11.0, -11.0, -5.0]]], dtype=torch.float64)
    m = dipo.memory_vector(z, 0.5, "rank")
    assert swapped_roles(z, p=0.5, filter="rank").all()
    assert slopes(z, m, 1.0)[0].item() < -0.01


@settings(max_examples=40)
@given(st.integers(0, 2**20), ROLES, FILTERS, st.sampled_from([1e-4, 1e-3]), st.booleans())
@claim(
    "an SGD step on the parameters of a Llama moves D(pi_f||pi_theta) and D(pi_m||pi_theta) of its batch apart",
    "ours, stronger than Section 4.2",
    "holds where tried; no theorem: the parameters couple the logits",
)
def test_a_step_on_parameters_moves_the_policy_towards_pi_w_and_away_from_pi_l(seed, role, filter, lr, moved):
    """forget: D(pi_f||pi_theta) falls and D(pi_m||pi_theta) rises; retain: the reverse. lr is per unit of gradient norm."""
    model, generator = tiny_llama(seed), torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (3, 8), generator=generator)
    mask = torch.rand(3, 8, generator=generator) < 0.8
    mask[:, 0] = True
    z = model(ids)
    z_ref = z.detach() + moved * torch.randn(z.shape, generator=generator)
    memory, forgetting = log_softmax(*dipo.preference_pair(z, filter=filter))
    dipo.dipo_loss(z, z_ref, mask, role, filter=filter).mean().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    with torch.no_grad():
        for p in model.parameters():
            p -= lr / norm * p.grad
        after = model(ids)
    moves = [
        (dipo.sequence_kl(pi, *log_softmax(after), mask) - dipo.sequence_kl(pi, *log_softmax(z), mask)).sum().item()
        for pi in (forgetting, memory)
    ]
    falls, rises = moves if role == "forget" else reversed(moves)
    assert falls < 0 < rises


# ------------------------------------------------------------------------------------------------- baselines, ablations


def targets_for(mask, V):
    return torch.randint(0, V, mask.shape, generator=torch.Generator().manual_seed(V))


@given(cases())
@claim("gradient ascent and descent: the answer's cross-entropy, without padding", "baselines")
def test_nll_is_cross_entropy_and_ignores_padding(case):
    z, _, mask = case
    targets = targets_for(mask, z.shape[-1])
    expected = (F.cross_entropy(z.transpose(1, 2), targets, reduction="none") * mask).sum(-1)
    close(nll(z, targets, mask), expected, z)
    close(loss("ga", z, mask, targets), -expected, z)
    garbage = torch.where(mask[..., None], z, 1e4)
    close(nll(garbage, targets, mask), expected, z)


@given(MODERATE, st.floats(0.01, 2.0))
@claim("NPO's gradient is gradient ascent's times 2 pi^beta / (pi^beta + pi_ref^beta), and tends to it as beta -> 0", "NPO")
def test_npo_has_its_published_gradient_weight_and_tends_to_gradient_ascent(case, beta):
    z, z_ref, mask = case
    targets, ref = targets_for(mask, z.shape[-1]), z_ref.clone().requires_grad_()
    ascent = gradient(lambda x: -nll(x, targets, mask), z)
    close_to_ascent = gradient(lambda x: loss("npo", x, mask, targets, ref, beta=1e-9), z)
    assert_close(close_to_ascent, ascent, rtol=1e-5, atol=1e-8)
    p, p_ref = ((-beta * nll(x, targets, mask)).exp() for x in (z, z_ref))
    weight = (2 * p / (p + p_ref))[:, None, None]
    assert_close(gradient(lambda x: loss("npo", x, mask, targets, ref, beta=beta), z), weight * ascent)
    close(loss("npo", z, mask, targets, z_ref, beta=beta), 2 / beta * torch.log1p(p / p_ref), z)
    loss("npo", z.requires_grad_(), mask, targets, ref, beta=beta).sum().backward()
    assert ref.grad is None


@given(MODERATE, st.floats(0.01, 9.0))
@claim("SimNPO's gradient is gradient ascent's times 2/T sigmoid(-beta nll/T); it has no reference", "SimNPO")
def test_simnpo_has_its_published_gradient_weight(case, beta):
    z, _, mask = case
    targets, n = targets_for(mask, z.shape[-1]), mask.sum(-1).clamp(min=1)
    ascent = gradient(lambda x: -nll(x, targets, mask), z)
    per_token = nll(z, targets, mask) / n
    weight = 2 / n * torch.sigmoid(-beta * per_token)
    assert_close(gradient(lambda x: loss("simnpo", x, mask, targets, beta=beta), z), weight[:, None, None] * ascent)
    close(loss("simnpo", z, mask, targets, beta=beta), 2 / beta * torch.log1p((-beta * per_token).exp()), z)
    assert torch.equal(loss("simnpo", z, mask, targets), loss("simnpo", z, mask, targets, beta=4.5))


@given(st.tuples(*[st.floats(-80, 0)] * 4), st.floats(0.01, 2.0))
@claim("DPO is -2/beta log P(refusal > answer), rewards beta log pi/pi_ref; NPO where the refusal stays", "DPO")
def test_dpo_is_the_preference_of_the_refusal(log_probs, beta):
    answer, answer_ref, refusal, refusal_ref = torch.tensor(log_probs, dtype=torch.float64)[:, None]
    rewards = beta * (refusal - refusal_ref), beta * (answer - answer_ref)
    preferred = rewards[0].exp() / (rewards[0].exp() + rewards[1].exp())
    gap, refusal_gap = answer_ref - answer, refusal_ref - refusal

    def of_gaps(name, *gaps, beta=beta):
        return dipo.losses_of_sums(name, dipo.Objective(name, beta=beta), torch.cat(gaps), [3] * len(gaps))[0]

    assert_close(of_gaps("dpo", gap, refusal_gap), -2 / beta * preferred.log())
    assert torch.equal(of_gaps("dpo", gap, 0 * gap), of_gaps("npo", gap))
    assert torch.equal(of_gaps("dpo", gap, refusal_gap, beta=None), of_gaps("dpo", gap, refusal_gap, beta=0.1))
    twice = of_gaps("dpo", gap, refusal_gap, refusal_gap, gap)  # answers and refusals take turns
    assert torch.equal(twice, torch.cat([of_gaps("dpo", gap, refusal_gap), of_gaps("dpo", refusal_gap, gap)]))


@given(MODERATE)
@claim("the KL baseline is D_SeqKL(pi_ref||pi_theta)", "baselines")
def test_kl_loss_is_the_distance_from_the_reference(case):
    z, z_ref, mask = case
    ref = z_ref.clone().requires_grad_()
    distance = loss("kl", z.requires_grad_(), mask, z_ref=ref)
    close(distance, dipo.sequence_kl(*log_softmax(z_ref, z), mask))
    distance.sum().backward()
    assert ref.grad is None
    close(z.grad, (z.detach().softmax(-1) - z_ref.softmax(-1)) * mask[..., None])


@given(MODERATE, st.integers(0, 9))
@claim("DiPO saturates: a won margin stops pushing; gradient ascent pushes hardest when it has won", "ours")
def test_dipo_saturates_where_gradient_ascent_is_unbounded(case, seed):
    """Each goes `far` along its own way down. DiPO's loss and gradient fall like exp(-u), u growing with the way; ascent's
    gradient grows to its maximum, 2 in the 1-norm of each position, and its loss has no lower end."""
    z, _, mask = case
    V, n = z.shape[-1], mask.sum(-1)
    assume(V > 1)
    w, l = (x.exp() for x in any_pair(z, seed))  # noqa: E741
    targets = targets_for(mask, V)
    forgotten = -F.one_hot(targets, V).to(z.dtype)

    def dipo_loss(x):
        return dipo.bradley_terry_loss(dot_product(x, z, w, l, mask))

    def ascent_loss(x):
        return -nll(x, targets, mask)

    for far in (0.0, 10.0, 1e3, 1e5):
        u = 0.05 * far * ((w - l).square().sum(-1) * mask).sum(-1)
        assert (dipo_loss(z + far * (w - l)) <= (-u).exp() + 1e-12).all()
        norm = gradient(dipo_loss, z + far * (w - l)).abs().sum((-1, -2))
        assert (norm <= 0.05 * 2 * n * (-u).exp() + 1e-12).all()
    assert (ascent_loss(z + far * forgotten) <= -n * (far - 200)).all()
    close(gradient(ascent_loss, z + far * forgotten).abs().sum((-1, -2)), 2 * n.double())


# ----------------------------------------------------------------------------------------------- anchored DiPO (ours)


def anchored(z, z_ref, mask, memory=None, role="forget", **options):
    """(losses [B], u [B]) of anchored DiPO."""
    options |= {"role": role, "memory": memory}
    return dipo.sequence_losses("anchored", z, mask, ref_logits=z_ref, **options)[:2]


def anchor_target(z_ref, memory, role, **pair):
    """log pi*: pi_f of the reference's pair at memory positions of forget data, pi_ref everywhere else."""
    forgetting = dipo.preference_pair(z_ref, **pair)[1]
    return torch.where((memory & (role == "forget"))[..., None], forgetting, z_ref).log_softmax(-1)


def anchor_of(z, z_ref, memory, role):
    """kappa's factor, at each position [B, T]."""
    return dipo.position_terms("anchored", role, dipo.Objective("anchored"), z, z_ref, memory=memory)[3]


@given(marked(), ROLES, SOURCES, st.fixed_dictionaries({"alpha": st.floats(0.1, 2.0), "p": FRACTIONS, "filter": FILTERS,
                                                        "center": st.booleans()}), BETAS, KAPPAS)  # fmt: skip
@claim("anchored DiPO is Eq. 14 on memory positions (all, on retain data) + kappa D_SeqKL(pi*||pi_theta) on every one")
def test_anchored_dipo_is_eq_14_on_memory_positions_and_an_anchor_on_all(case, role, pair_from, pair, beta, kappa):
    """pi*: pi_f of the reference's pair at memory positions of forget data, pi_ref elsewhere. The pair is the reference's
    unless the policy's is asked for; no memory positions named is all of them; a mean is over all answer tokens."""
    z, z_ref, mask, memory = case
    if role == "retain":
        assert torch.equal(anchored(z, z_ref, mask, memory, role)[0], anchored(z, z_ref, mask, None, role)[0])
    source, where = z if pair_from == "policy" else z_ref, mask & (memory | (role == "retain"))
    w, l = log_softmax(*pair_for(role, *dipo.preference_pair(source, **pair)))  # noqa: E741
    u = dipo.reward_margin(*log_softmax(z, z_ref), w, l, where, beta)
    anchor = dipo.sequence_kl(anchor_target(z_ref, memory, role, **pair), *log_softmax(z), mask)
    given_options = {"beta": beta, "kappa": kappa} | pair | ({"pair_from": "policy"} if pair_from == "policy" else {})
    named = None if memory[mask].all() else memory
    losses, margins = anchored(z, z_ref, mask, named, role, **given_options)
    close(margins, u, z)
    close(losses, torch.logaddexp(torch.zeros_like(u), -u) + kappa * anchor, z)
    losses, margins = anchored(z, z_ref, mask, memory, role, **given_options, reduction="mean")
    n = mask.sum(-1).clamp(min=1)
    close(losses, torch.logaddexp(torch.zeros_like(u), -u / n) + kappa * anchor / n, z)


@given(cases(), ROLES, FILTERS, BETAS, st.sampled_from(["sum", "mean"]), st.booleans())
@claim("anchored with kappa = 0, every position memory and the policy's pair is the paper's loss, bit for bit")
def test_without_anchor_selection_and_fixed_pair_it_is_the_papers_loss(case, role, filter, beta, reduction, named):
    z, z_ref, mask = case
    options = {"beta": beta, "filter": filter, "reduction": reduction}
    memory, ours = torch.ones_like(mask) if named else None, {"kappa": 0.0, "pair_from": "policy"}

    def papers_loss(x):
        return loss("dipo", x, mask, z_ref=z_ref, role=role, **options)

    def our_loss(x):
        return anchored(x, z_ref, mask, memory, role, **options, **ours)[0]

    assert torch.equal(our_loss(z), papers_loss(z)) and torch.equal(gradient(our_loss, z), gradient(papers_loss, z))


@given(marked(largest=100.0), ROLES, st.floats(1.0, 1e9))
@claim("kappa -> infinity, and beta -> 0, leave sum_t KL(pi*||pi_theta): a distillation to pi*")
def test_a_large_kappa_and_a_small_beta_leave_the_distillation(case, role, kappa):
    """(loss - kappa D) / kappa is at most (|u| + log 2) / kappa; loss - kappa D - log 2 at most |u|, which beta scales."""
    z, z_ref, mask, memory = case
    distance = dipo.sequence_kl(anchor_target(z_ref, memory, role), *log_softmax(z), mask)
    losses, u = anchored(z, z_ref, mask, memory, role, kappa=kappa)
    assert ((losses / kappa - distance).abs() <= (u.abs() + math.log(2)) / kappa + 1e-9 * (1 + distance)).all()
    losses, _ = anchored(z, z_ref, mask, memory, role, beta=0.05 / kappa, kappa=1.0)
    assert ((losses - distance - math.log(2)).abs() <= u.abs() / kappa + 1e-9 * (1 + distance)).all()


@given(marked(), ROLES, SOURCES, BETAS, KAPPAS)
@claim("anchored: dL/dz_t = -beta sigmoid(-u) (pi_w - pi_l)_t [t in M, or retain] + kappa (pi_theta - pi*)_t, no other one")
def test_the_gradient_of_anchored_dipo_is_the_closed_form(case, role, pair_from, beta, kappa):
    """None reaches the reference. At positions that are no memory the margin's part is exactly zero."""
    z, z_ref, mask, memory = case
    w, l = log_softmax(*pair_for(role, *dipo.preference_pair(z if pair_from == "policy" else z_ref)))  # noqa: E741
    x, ref = z.clone().requires_grad_(), z_ref.clone().requires_grad_()
    losses, u = anchored(x, ref, mask, memory, role, beta=beta, kappa=kappa, pair_from=pair_from)
    losses.sum().backward()
    moved = (mask & (memory | (role == "retain")))[..., None]
    margins = -beta * torch.sigmoid(-u.detach())[:, None, None] * (w.exp() - l.exp()) * moved
    anchors = kappa * (z.softmax(-1) - anchor_target(z_ref, memory, role).exp()) * mask[..., None]
    assert_close(x.grad, margins + anchors, rtol=1e-6, atol=1e-9)
    assert ref.grad is None
    if kappa == 0:
        assert (x.grad[~moved[..., 0]] == 0).all()


@given(marked(largest=100.0), ROLES, BETAS, st.floats(-50, 50))
@claim("at pi_theta = pi* the anchor and its gradient are zero and u >= 0; what is left to move falls like exp(-u)")
def test_at_the_fixed_point_only_the_part_that_saturates_is_left(case, role, beta, shift):
    """u >= 0 there: with z = z_ref - alpha m in M and z_ref elsewhere it is a sum of alpha <pi_m - pi_f, m>, which is the
    growth of the derivative of a convex log Z(s) = logsumexp(z_ref + s m) from s = -alpha to alpha. On retain data pi* is
    the reference, where u = 0."""
    z_ref, mask, memory = case[1:]
    target = anchor_target(z_ref, memory, role)
    z = target + shift
    assert anchor_of(z, z_ref, memory, role).abs().max() < 1e-10
    assert gradient(lambda x: anchor_of(x, z_ref, memory, role), z).abs().max() < 1e-12
    losses, u = anchored(z, z_ref, mask, memory, role, beta=beta)
    assert (u >= -1e-9).all() and (role == "forget" or u.abs().max() < 1e-9)
    left = gradient(lambda x: anchored(x, z_ref, mask, memory, role, beta=beta)[0], z).abs().amax((-1, -2))
    assert (left <= beta * (-u).exp() + 1e-12).all()
    close(losses, dipo.bradley_terry_loss(u), z)


@given(marked(), marked(), ROLES, st.floats(0, 1), KAPPAS)
@claim("with the reference's pair u is linear and the loss convex in z: one minimum; with the policy's neither holds")
def test_with_a_fixed_pair_the_margin_is_linear_and_the_loss_convex(case, other, role, a, kappa):
    """Between any two policies. The counterexample is of one position and two tokens: the policy's pair changes sides
    halfway, so that u is 0 there, and above it at both ends."""
    z, z_ref, mask, memory = case
    z2 = other[0].flatten()[torch.arange(z.numel()) % other[0].numel()].view_as(z)
    one, two, mixed = (anchored(x, z_ref, mask, memory, role, kappa=kappa) for x in (z, z2, a * z + (1 - a) * z2))
    close(mixed[1], a * one[1] + (1 - a) * two[1], z, z2, z_ref)
    size = max(1.0, *(x.abs().max().item() for x in (z, z2, z_ref)))
    assert (mixed[0] <= a * one[0] + (1 - a) * two[0] + 1e-10 * size).all()
    ends = torch.tensor([[[4.0, 1.0]], [[1.0, 4.0]]], dtype=torch.float64)  # as logits of two policies
    line, start = torch.cat([ends, ends.mean(0, keepdim=True)]), torch.full((3, 1, 2), 2.5, dtype=torch.float64)
    losses, (u_one, u_two, u_half) = anchored(line, start, torch.ones(3, 1, dtype=torch.bool), pair_from="policy", kappa=0.0)
    assert u_half.abs() < 1e-12 and u_one < -0.01 and u_two < -0.01
    losses, _ = anchored(line, start, torch.ones(3, 1, dtype=torch.bool), role="retain", pair_from="policy", kappa=0.0)
    assert losses[2] > losses[:2].mean() + 0.01


@claim("a position that has exchanged A for B: the policy's pair pushes B down next and A up, the reference's goes on")
def test_the_policys_pair_unforgets_what_the_references_has_forgotten():
    """The seed of the trouble. The reference is sure of A; by now the policy says B. Descent raises what has a negative
    gradient. The margin tells it, too: the policy's pair holds the exchange for a loss, the reference's for a gain."""
    z_ref = torch.tensor([[[6.0, 3.0, 1.0, 0.0]]], dtype=torch.float64)  # A, B, two others
    z = torch.tensor([[[2.0, 6.0, 1.0, 0.0]]], dtype=torch.float64)
    for name, pair_from, sign in (("dipo", "policy", 1), ("dipo", "reference", -1), ("anchored", None, -1)):
        of_a, of_b, *_ = gradient(lambda x: loss(name, x, ANY_MASK, z_ref=z_ref, pair_from=pair_from, kappa=0.0), z)[0, 0]  # noqa: B023
        assert sign * of_b > 0.01 and sign * of_a < -0.01
        u = dipo.sequence_losses(name, z, ANY_MASK, ref_logits=z_ref, pair_from=pair_from)[1]
        assert sign * u < -0.1


@claim("descent to the end: the paper's loss makes one position uniform and pushes on; anchored stops near pi_f")
def test_descent_ends_in_noise_with_the_policys_pair_and_beside_pi_f_with_the_anchor():
    """Where it stops the gradient's closed form is zero: pi_theta - pi_f = (beta / kappa) sigmoid(-u) (pi_f - pi_m)."""
    z_ref = torch.tensor([[[6.0, 3.0, 1.0, 0.0, -1.0]]], dtype=torch.float64)
    memory, forgetting = (x.softmax(-1) for x in dipo.preference_pair(z_ref))

    def descend(f, rate, steps):
        z = z_ref
        for _ in range(steps):
            g = gradient(f, z)
            z = z - rate * g
        return z.softmax(-1), g.abs().max()

    found, push = descend(lambda x: loss("dipo", x, ANY_MASK, z_ref=z_ref), 5.0, 1000)
    assert (found - 1 / 5).abs().max() < 0.03 and push > 0.01
    found, push = descend(lambda x: anchored(x, z_ref, ANY_MASK, kappa=0.02)[0], 100.0, 2000)
    _, u = anchored(found.log(), z_ref, ANY_MASK)
    assert push < 1e-6 and (found - forgetting).abs().max() < 0.05
    assert_close(found - forgetting, 0.05 / 0.02 * torch.sigmoid(-u) * (forgetting - memory), atol=1e-4, rtol=0)


@given(marked(largest=10.0), BETAS, KAPPAS)
@claim("the control is NPO of the memory positions' likelihood + kappa KL(pi_ref||pi_theta) on all others")
def test_anchored_npo_is_npo_on_memory_positions_and_an_anchor_elsewhere(case, beta, kappa):
    """NPO's published form, 2/beta log(1 + (pi/pi_ref)^beta). Where every position is memory it is NPO, and no anchor."""
    z, z_ref, mask, memory = case
    targets, ref = targets_for(mask, z.shape[-1]), z_ref.clone().requires_grad_()
    p, p_ref = ((-nll(x, targets, mask & memory)).exp() for x in (z, z_ref))
    anchor = dipo.sequence_kl(*log_softmax(z_ref, z), mask & ~memory)
    x = z.clone().requires_grad_()
    losses = loss("anchored-npo", x, mask, targets, ref, memory=memory, beta=beta, kappa=kappa)
    close(losses, 2 / beta * torch.log1p((p / p_ref) ** beta) + kappa * anchor, z)
    losses.sum().backward()
    assert ref.grad is None
    npo = loss("npo", z, mask, targets, z_ref, beta=beta)
    for every in (None, torch.ones_like(mask)):
        assert torch.equal(loss("anchored-npo", z, mask, targets, z_ref, memory=every, beta=beta, kappa=kappa), npo)


@given(MODERATE, st.floats(0.0, 20.0))
@claim("UNDIAL is the cross-entropy with softmax(z_ref - beta at the answer's token), without padding", "UNDIAL")
def test_undial_is_the_cross_entropy_with_the_references_lowered_distribution(case, beta):
    """dL/dz = pi_theta - that distribution; at beta = 0 the reference itself: nothing moves where the policy is there."""
    z, z_ref, mask = case
    targets, ref = targets_for(mask, z.shape[-1]), z_ref.clone().requires_grad_()
    answer = F.one_hot(targets, z.shape[-1]).to(z.dtype)
    lowered = (z_ref - beta * answer).softmax(-1)
    rows = F.cross_entropy(z.flatten(0, 1), lowered.flatten(0, 1), reduction="none").view(mask.shape)
    x = z.clone().requires_grad_()
    losses = loss("undial", x, mask, targets, ref, beta=beta)
    close(losses, (rows * mask).sum(-1), z)
    losses.sum().backward()
    assert ref.grad is None
    close(x.grad, (z.softmax(-1) - lowered) * mask[..., None], z)
    garbage = torch.where(mask[..., None], z, 1e4)
    assert torch.equal(loss("undial", garbage, mask, targets, z_ref, beta=beta), losses.detach())
    assert (lowered <= z_ref.softmax(-1) + 1e-12)[answer.bool()].all()  # the answer is lowered, not raised
    still = gradient(lambda x: loss("undial", x, mask, targets, z_ref, beta=0.0), z_ref)
    assert still.abs().max() < 1e-12
    assert torch.equal(loss("undial", z, mask, targets, z_ref), loss("undial", z, mask, targets, z_ref, beta=10.0))


@given(MODERATE, st.floats(0.0, 5.0))
@claim("WGA's gradient is gradient ascent's, each token's times p^beta; beta = 0 is gradient ascent", "WGA")
def test_wga_is_ascent_weighted_by_the_tokens_own_probability(case, beta):
    """The weight is a constant: no gradient flows through it."""
    z, _, mask = case
    targets = targets_for(mask, z.shape[-1])
    p = z.softmax(-1).gather(-1, targets[..., None])
    ascent = gradient(lambda x: loss("ga", x, mask, targets), z)
    close(gradient(lambda x: loss("wga", x, mask, targets, beta=beta), z), p**beta * ascent, z)
    close(loss("wga", z, mask, targets, beta=beta), ((p**beta * p.log())[..., 0] * mask).sum(-1), z)
    assert torch.equal(loss("wga", z, mask, targets, beta=0.0), loss("ga", z, mask, targets))
    assert torch.equal(loss("wga", z, mask, targets), loss("wga", z, mask, targets, beta=1.0))


# ------------------------------------------------------------------------------------------------- the table of losses


@pytest.mark.parametrize("name", dipo.LOSSES)
@settings(max_examples=40)
@given(marked(largest=100.0), ROLES, BETAS, KAPPAS, st.booleans(), st.integers(0, 2**31))
@claim("a loss of whole sequences is that of sums of its terms, computed wherever the positions stand", "Eq. 14")
def test_the_two_forms_of_a_loss_are_one(name, case, role, beta, kappa, mean, seed):
    """Positions of all sequences in any order and in two pieces; what is masked is not even looked at. No memory positions
    named is all of them."""
    # an even number of sequences, for those with a refusal
    z, z_ref, mask, memory = (torch.cat([x, x.flip(1)]) for x in case)
    options = {"beta": beta, "kappa": kappa, "reduction": ("sum", "mean")[mean]}
    targets, objective = targets_for(mask, z.shape[-1]), dipo.Objective(name, **options)
    named = None if memory[mask].all() else memory
    losses, margins, swapped = dipo.sequence_losses(
        name, z, mask, ref_logits=z_ref, targets=targets, role=role, memory=named, **options
    )
    order = torch.randperm(int(mask.sum()), generator=torch.Generator().manual_seed(seed))
    rows = mask.nonzero()[:, 0][order]
    inputs = [x[mask][order] for x in (z, z_ref, targets, memory)]
    pieces = zip(*(x.tensor_split(2) for x in inputs), strict=True)
    found = [dipo.position_terms(name, role, objective, *piece) for piece in pieces]
    terms, nll_of, swapped_of, anchor = (torch.cat(x) for x in zip(*found, strict=True))
    sums, anchors = (torch.zeros(len(mask), dtype=z.dtype).index_add(0, rows, x) for x in (terms, anchor))
    others, other_margins = dipo.losses_of_sums(name, objective, sums, mask.sum(-1).tolist(), anchors)
    close(losses, others, z)
    assert (margins is None) == (other_margins is None) == (dipo.LOSSES[name].loss is None)
    if margins is not None:
        close(margins, other_margins, z)
    assert swapped.sum() == swapped_of.sum() and (swapped_of.any() <= dipo.LOSSES[name].pair)
    expected = F.cross_entropy(inputs[0], inputs[2], reduction="none")
    close(nll_of, expected, z)
    assert anchor.any() <= dipo.LOSSES[name].anchored and (anchor >= -1e-12).all()
    assert nll_of.shape == swapped_of.shape == anchor.shape == terms.shape
    assert not nll_of.requires_grad and swapped_of.dtype == torch.bool
    assert dipo.position_terms("kl", role, objective, z, z_ref)[1].abs().max() == 0  # no targets
    if name in ("npo", "anchored-npo", "simnpo", "dpo", "ga", "wga", "gd"):  # a part of the loss, and not computed again
        assert dipo.LOSSES[name].term(dipo.Positions(z, z_ref, targets, role, beta), objective).nll is not None


@pytest.mark.parametrize("name", dipo.LOSSES)
@settings(max_examples=25)
@given(marked(largest=100.0), ROLES, SOURCES, st.sampled_from([torch.bfloat16, torch.float16]))
def test_every_row_computes_in_float32_trains_no_reference_and_says_what_it_needs(name, case, role, pair_from, dtype):
    z, z_ref, mask, memory = (torch.cat([x, x.flip(1)]) for x in case)
    z, z_ref, targets = z.to(dtype).requires_grad_(), z_ref.to(dtype).requires_grad_(), targets_for(mask, z.shape[-1])
    given, options = z_ref if dipo.LOSSES[name].reference else None, {"role": role, "memory": memory, "pair_from": pair_from}
    losses = loss(name, z, mask, targets, given, **options)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, loss(name, z.float(), mask, targets, given if given is None else given.float(), **options))
    losses.sum().backward()
    assert z.grad is not None and z_ref.grad is None


def test_what_is_logged_has_no_gradient():
    z, targets = torch.randn(6, 7, generator=torch.Generator().manual_seed(0), requires_grad=True), torch.arange(6)
    for name, row in dipo.LOSSES.items():
        term, nll_of, swapped, anchor = dipo.position_terms(name, "forget", dipo.Objective(name), z, z.detach(), targets)
        assert term.requires_grad and not nll_of.requires_grad and not swapped.requires_grad
        assert anchor.requires_grad == (name == "anchored") and row.anchored == (name in ("anchored", "anchored-npo"))


def test_a_row_with_a_wrong_column_is_refused():
    right = itertools.product(("sequences", "tokens"), ("sum", "mean", None), (("forget",), ("retain",), dipo.ROLES))
    for mean_over, reduction, roles in right:
        columns = {"mean_over": mean_over, "reduction": reduction, "roles": roles}
        of_margins = {"beta": 1.0, "loss": dipo.negative_preference_loss}
        for more in ({}, {"beta": 1.0}, of_margins, of_margins | {"refusals": True}, of_margins | {"anchored": True}):
            assert dipo.Loss(dipo.nll_terms, "no source", **columns, **more).roles == roles
    for wrong in (
        {"mean_over": "token"},
        {"reduction": "max"},
        {"roles": ("remember",)},
        {"roles": ()},
        {"loss": dipo.negative_preference_loss},  # without a beta
        {"anchored": True, "beta": 1.0},  # without a loss to add the anchor to
        {"anchored": True, "beta": 1.0, "loss": dipo.negative_preference_loss, "refusals": True},
    ):
        with pytest.raises(AssertionError, match="is no loss$"):
            dipo.Loss(dipo.nll_terms, "no source", **wrong)


def test_what_each_loss_is_of_and_needs():
    """Of the table, what its formulas do not show."""
    columns = {name: (row.beta, row.roles, row.reference, row.mean_over) for name, row in dipo.LOSSES.items()}
    flags = ("pair", "refusals", "anchored")
    paired, refusing, anchored = ({name for name, row in dipo.LOSSES.items() if getattr(row, x)} for x in flags)
    expected = {
        "dipo": (0.05, ("forget", "retain"), True, "sequences"),
        "anchored": (0.05, ("forget", "retain"), True, "sequences"),
        "npo": (0.1, ("forget",), True, "sequences"),
        "anchored-npo": (0.1, ("forget",), True, "sequences"),
        "simnpo": (4.5, ("forget",), False, "sequences"),
        "dpo": (0.1, ("forget",), True, "sequences"),
        "ga": (0.0, ("forget",), False, "tokens"),
        "undial": (10.0, ("forget",), True, "tokens"),
        "wga": (1.0, ("forget",), False, "tokens"),
        "gd": (0.0, ("retain",), False, "tokens"),
        "kl": (0.0, ("retain",), True, "tokens"),
    }
    assert {name: columns[name] for name in expected} == expected
    assert paired & expected.keys() == {"dipo", "anchored"} and refusing & expected.keys() == {"dpo"}
    assert anchored & expected.keys() == {"anchored", "anchored-npo"}
    by_the_objective = {name for name, row in dipo.LOSSES.items() if row.reduction is None}
    assert by_the_objective & expected.keys() == {"dipo", "anchored"}
    for role in dipo.ROLES:
        assert dipo.loss_names(role) == tuple(name for name, row in dipo.LOSSES.items() if role in row.roles)
    assert [dipo.LOSSES[name].divisor(3, 40) for name in ("dipo", "kl")] == [3, 40]


@given(
    st.sampled_from(dipo.loss_names("forget")), st.sampled_from([*dipo.loss_names("retain"), "none"]), BETAS,
    st.floats(0, 9), st.sampled_from(["memory", "all"]),
)  # fmt: skip
@claim(
    "the total objective is L_f + lambda L_r; beta is the forget loss's, and the retain loss's where that is the same",
    "the objective",
)
def test_the_objective_is_the_sum_of_two_terms(forget, retain, beta, lam, positions):
    """Memory positions are told by the retain set, so that a loss of them needs one."""
    objective = dipo.Objective(forget, retain, lam, beta, positions=positions)
    terms = {"forget": (forget, 1.0), "retain": (retain, lam)}
    assert objective.selects == (positions == "memory" and forget in ("anchored", "anchored-npo"))
    if objective.selects and retain == "none":
        with pytest.raises(
            ValueError, match=f"^'{forget}' tells memory by the retain set; name a retain loss or --positions all$"
        ):
            objective.parts()
    else:
        assert objective.parts() == {role: term for role, term in terms.items() if term[0] != "none"}
    defaults = {name: row.beta for name, row in dipo.LOSSES.items()}
    assert objective.beta_of(forget) == (beta if defaults[forget] else 0.0)
    for name, own in defaults.items():
        assert name == forget or objective.beta_of(name) == own
        assert dipo.Objective(forget, retain, lam).beta_of(name) == own
    paper = dipo.Objective()
    assert paper.parts() == {"forget": ("dipo", 1.0), "retain": ("dipo", 1.0)} and paper.beta_of("dipo") == 0.05
    assert (paper.kappa, paper.positions, paper.tau, paper.selects) == (0.05, "memory", 1.5, False)
    assert dipo.FINETUNING == {"finetune": ("gd", 1.0)}


# ----------------------------------------------------------------------------------------------------------- precision


@settings(max_examples=15)
@given(marked(largest=3.0, vocabulary=st.integers(1, 7)), ROLES, st.integers(0, 9))
@claim("every loss has the gradient that finite differences have (float64)", "ours")
def test_gradcheck(case, role, seed):
    z, z_ref, mask, memory = case
    (w, l), targets = any_pair(z, seed), targets_for(mask, z.shape[-1])  # noqa: E741
    z_ref = z_ref.abs()
    x = z.requires_grad_()
    for f in (
        lambda x: dipo.reward_margin(*log_softmax(x, z_ref), w, l, mask),
        lambda x: dot_product(x, z_ref, w.exp(), l.exp(), mask),
        lambda x: dipo.dipo_loss(x, z_ref, mask, role, pair_from="reference"),
        lambda x: nll(x, targets, mask),
        lambda x: loss("npo", x, mask, targets, z_ref),
        lambda x: loss("simnpo", x, mask, targets),
        lambda x: loss("kl", x, mask, z_ref=z_ref),
        lambda x: loss("anchored", x, mask, z_ref=z_ref, role=role, memory=memory, kappa=3.0),
        lambda x: loss("anchored-npo", x, mask, targets, z_ref, memory=memory, kappa=3.0),
        lambda x: loss("undial", x, mask, targets, z_ref, beta=2.0),
    ):
        assert torch.autograd.gradcheck(f, x)


@given(cases(largest=100.0), st.sampled_from([torch.bfloat16, torch.float16]), ROLES)
@claim("bfloat16 and float16 logits are computed with in float32", "ours")
def test_half_precision_is_computed_in_float32(case, dtype, role):
    z, z_ref, mask = case
    z, z_ref, targets = z.abs().to(dtype), z_ref.abs().to(dtype), targets_for(mask, z.shape[-1])
    pair = dipo.preference_pair(z)
    for f in (
        lambda a, b: dipo.dipo_loss(a, b, mask, role),
        lambda a, b: dipo.dipo_loss(a, b, mask, role, pair_from="reference"),
        lambda a, b: dipo.sequence_kl(-a, -b, mask),
        lambda a, b: dipo.reward_margin(-a, -b, -b, -a, mask),
        lambda a, b: dot_product(a, b, *(x.softmax(-1) for x in pair), mask),
        lambda a, b: nll(a, targets, mask),
        lambda a, b: loss("npo", a, mask, targets, b),
        lambda a, b: loss("simnpo", a, mask, targets),
        lambda a, b: loss("kl", a, mask, z_ref=b),
        lambda a, b: dipo.memory_vector(a),
    ):  # fmt: skip
        half = f(z, z_ref)
        assert half.dtype == torch.float32
        assert torch.equal(half, f(z.float(), z_ref.float()))
    for f in (dipo.memory_vector, lambda x: dipo.dipo_loss(x, x, mask, role), lambda x: nll(x, targets, mask)):
        assert f(z.double()).dtype == torch.float64


@settings(max_examples=3)
@given(cases(dtype=torch.float32, largest=100.0, vocabulary=st.just(REAL_VOCABULARY)), FILTERS, ROLES)
@claim("identity, rule, finiteness and bound hold at a vocabulary of 128,256 in float32", "ours")
def test_all_of_it_at_a_real_vocabulary(case, filter, role):
    z, z_ref, mask = case
    m = dipo.memory_vector(z + 0.123, filter=filter)
    rank = z + 0.123 >= (z + 0.123).sort(-1).values[..., [-6412]]  # 5 % of 128,256
    relative = z.softmax(-1) >= 0.05 * z.softmax(-1).amax(-1, keepdim=True)
    expected = {"rank": rank, "relative": relative, "both": rank & relative, "either": rank | relative}[filter]
    assert ((m != 0) != expected).sum() <= 1e-4 * m.numel()  # rounding at the relative threshold
    u, _ = dipo_margin(z, z_ref, mask, role, filter=filter)
    w, l = log_softmax(*pair_for(role, *dipo.preference_pair(z, filter=filter)))  # noqa: E741
    exact = dipo.reward_margin(*log_softmax(z.double(), z_ref.double()), w.double(), l.double(), mask)
    assert_close(u.double(), exact, rtol=1e-3, atol=1e-3)
    g = gradient(lambda x: dipo.bradley_terry_loss(dipo_margin(x, z_ref, mask, role, filter=filter)[0]), z)
    assert g.isfinite().all() and g.abs().max() <= 0.05 + 1e-6


@pytest.mark.aside
@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs a C++ compiler"
)
@settings(max_examples=5)
@given(cases(dtype=torch.float32, largest=10.0))
@claim("torch.compile changes no margin and no gradient beyond rounding", "ours")
def test_compiled_equals_eager(case):
    z, z_ref, mask = case
    compiled = torch.compile(dipo_margin, dynamic=True)
    for got, want in zip(compiled(z, z_ref, mask), dipo_margin(z, z_ref, mask), strict=True):
        assert_close(got, want, rtol=1e-4, atol=1e-5)
    got, want = (gradient(lambda x, f=f: f(x, z_ref, mask)[0], z) for f in (compiled, dipo_margin))
    assert_close(got, want, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- wrong arguments


SHAPED = {
    "sequence_kl": (2, dipo.sequence_kl),
    "reward_margin": (4, dipo.reward_margin),
    "dipo_loss": (2, dipo.dipo_loss),
    "kl": (2, lambda z, z_ref, mask: loss("kl", z, mask, z_ref=z_ref)),
}


@pytest.mark.parametrize("n, function", SHAPED.values(), ids=SHAPED)
def test_every_argument_must_have_the_same_shape(n, function):
    z, mask = torch.zeros(2, 3, 5), torch.ones(2, 3, dtype=torch.bool)
    function(*[z] * n, mask)
    for wrong in range(n):
        for other in (z[..., :1], z[:1], z[:, :1], z[0]):  # all of them would broadcast
            with pytest.raises(AssertionError, match=r"^expected equal \[B, T, V\], got \["):
                function(*[other if i == wrong else z for i in range(n)], mask)
    with pytest.raises(AssertionError, match=r"^mask \(2, 1\) does not fit \[B, T\] of \(2, 3, 5\)$"):
        function(*[z] * n, mask[:, :1])
    with pytest.raises(AssertionError, match="^mask must be bool, got torch.float32$"):
        function(*[z] * n, mask.float())


def test_wrong_values_and_shapes_are_told():
    z, mask, targets = torch.zeros(2, 3, 5), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.int64)
    bad = [
        (lambda: dipo.dipo_loss(z, z[:, :2], mask), r"got \[\(2, 3, 5\), \(2, 2, 5\)\]$"),
        (lambda: nll(z, targets, mask[:, :2]), r"^mask \(2, 2\) does not fit"),
        (lambda: nll(z, targets[:, :1], mask), r"^targets \(2, 1\) and mask \(2, 3\) differ$"),
        (lambda: loss("npo", z, mask, targets, z[..., :1]), r"^expected equal \[B, T, V\], got \["),
        (lambda: dipo.dipo_loss(z, z, mask, "remember"), "^role 'remember' is none of "),
        (lambda: loss("npo", z[..., :1], mask, targets, z), r"^expected equal \[B, T, V\], got \["),
        (lambda: dipo.memory_vector(z, filter="all"), "^filter 'all' is none of "),
        (lambda: dipo.memory_vector(z, p=0.0), "0 < p <= 1 expected, got"),
        (lambda: dipo.memory_vector(z, p=1.01), "0 < p <= 1 expected, got"),
        (lambda: dipo.memory_vector(torch.tensor(1.0)), "0 < p <= 1 expected, got"),
        (lambda: dipo.dipo_loss(z, z, mask, pair_from="target"), "^pair_from 'target' is neither"),
        (lambda: loss("anchored", z, mask, z_ref=z, pair_from="target"), "^pair_from 'target' is neither"),
        (lambda: loss("anchored", z, mask, z_ref=z, memory=mask[:1]), r"^memory \(1, 3\) and mask \(2, 3\) differ$"),
        (lambda: loss("anchored", z, mask, z_ref=z, role="remember"), "^role 'remember' is none of "),
        (lambda: dipo.dipo_loss(z, z, mask, reduction="max"), "^reduction 'max' is neither"),
        (lambda: loss("ga", z, mask), "^targets are needed: this loss is one of the answer's tokens$"),
        (lambda: loss("undial", z, mask, z_ref=z), "^$"),  # nor has it any without targets
    ]
    for call, message in bad:
        with pytest.raises(AssertionError, match=message):
            call()
    unknown, forget, retain = (", ".join(names) for names in (dipo.LOSSES, *map(dipo.loss_names, dipo.ROLES)))
    unknown = f"^loss 'remember' is none of {unknown}$"
    for call, message in [
        (lambda: loss("remember", z, mask), unknown),
        (lambda: dipo.losses_of_sums("remember", dipo.Objective(), z[:, 0, 0], [3, 3]), unknown),
        (lambda: dipo.Objective("remember").parts(), f"^forget loss 'remember' is none of {forget}$"),
        (lambda: dipo.Objective("npo", "npo").parts(), f"^retain loss 'npo' is none of {retain}$"),
        (
            lambda: dipo.Objective("kl").parts(),
            f"^forget loss 'kl' is none of {forget}$",
        ),
        (lambda: dipo.Objective("ga", "ga").parts(), f"^retain loss 'ga' is none of {retain}$"),
        *(
            (lambda n=n: loss(n, z, mask, targets), f"^loss '{n}' needs the reference's logits$")
            for n in ("dipo", "anchored", "anchored-npo", "undial", "kl", "dpo")
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_dipo_needs_torch_alone():
    """No library of this project beside it, no other module of it."""
    program = """if True:
        import sys
        sys.modules |= dict.fromkeys(sys.argv[1:])  # None: not to be imported
        import torch
        from dipo import dipo_loss

        z = torch.ones(1, 2, 3)
        print(dipo_loss(z, z, torch.ones(1, 2, dtype=torch.bool)).item())
    """
    root = Path(dipo.__file__).parent
    others = ["safetensors", "tokenizers", "huggingface_hub", "tqdm"]
    others += [path.stem for path in root.glob("*.py") if path.stem != "dipo"]
    done = subprocess.run([sys.executable, "-c", program, *others], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(math.log(2))
