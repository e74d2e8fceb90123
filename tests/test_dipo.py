"""The paper's mathematics as properties of dipo.py. B sequences, T positions, V vocabulary throughout."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dipo

FILTERS = st.sampled_from(dipo.FILTERS)


@st.composite
def cases(draw, dtype=torch.float64, max_scale=10.0, reference=True):
    """(logits, ref_logits, mask): random logits with positive tops, a nearby reference, any mask (also all False)."""
    B, T, V = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 60))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.floats(0.01, max_scale))
    z = scale * torch.randn(B, T, V, generator=generator, dtype=dtype)
    z_ref = z + draw(st.floats(0.01, 3.0)) * torch.randn(B, T, V, generator=generator, dtype=dtype)
    mask = torch.rand(B, T, generator=generator) < draw(st.floats(0, 1))
    return (z, z_ref, mask) if reference else (z, mask)


def distributions(z, z_ref):
    return z.log_softmax(-1), z_ref.log_softmax(-1)


# --------------------------------------------------------------------------------------------------------- sequence KL


@given(cases())
def test_sequence_kl_is_non_negative_and_zero_between_equals(case):
    z, z_ref, mask = case
    p, q = distributions(z, z_ref)
    assert (dipo.sequence_kl(p, q, mask) >= -1e-12).all()
    assert dipo.sequence_kl(p, p, mask).abs().max() < 1e-12


@given(cases())
def test_sequence_kl_agrees_with_torch_distributions(case):
    z, z_ref, mask = case
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=z), torch.distributions.Categorical(logits=z_ref)
    )
    torch.testing.assert_close(dipo.sequence_kl(*distributions(z, z_ref), mask), (kl * mask).sum(-1))


@given(cases())
def test_sequence_kl_is_a_sum_over_positions_and_masked_equals_sliced(case):
    z, z_ref, mask = case
    p, q = distributions(z, z_ref)
    whole = dipo.sequence_kl(p, q, mask)
    for b in range(len(z)):
        kept = mask[b]
        sliced = dipo.sequence_kl(p[b : b + 1, kept], q[b : b + 1, kept], kept[None, kept])
        torch.testing.assert_close(whole[b : b + 1], sliced)


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_sequence_kl_is_finite_for_extreme_logits(a, b):
    z = torch.tensor([[[a, 0.0, b], [b, a, 0.0]]])
    kl = dipo.sequence_kl(z.log_softmax(-1), z.flip(-1).log_softmax(-1), torch.ones(1, 2, dtype=torch.bool))
    assert kl.isfinite().all() and (kl >= -1e-3).all()


def test_zero_times_minus_infinity_is_zero():
    p = torch.tensor([[[0.0, -math.inf]]])
    q = torch.tensor([[[0.5, 0.5]]]).log()
    torch.testing.assert_close(dipo.sequence_kl(p, q, torch.ones(1, 1, dtype=torch.bool)), torch.tensor([math.log(2)]))


# ------------------------------------------------------------------------------------------------------- memory vector


def kept_by_the_rule(z: list[float], p: float, filter: str) -> set[int]:
    """The rule in words: rank below p V (at least one, ties with the last included); probability >= p times the largest."""
    weights = [math.exp(x - max(z)) for x in z]
    last = sorted(z, reverse=True)[max(1, math.floor(p * len(z) + 1e-6)) - 1]
    rank, relative = {i for i, x in enumerate(z) if x >= last}, {i for i, w in enumerate(weights) if w >= p}
    return {"rank": rank, "relative": relative, "both": rank & relative, "either": rank | relative}[filter]


@given(st.lists(st.integers(-30, 60), min_size=1, max_size=40), st.sampled_from([0.01, 0.05, 0.1, 0.2, 0.5, 1.0]), FILTERS)
def test_memory_vector_keeps_exactly_what_its_rule_says(levels, p, filter):
    z = [x / 4 + 0.01 for x in levels]  # many ties, no logit of exactly zero
    m = dipo.memory_vector(torch.tensor([[z]], dtype=torch.float64), p, filter)[0, 0]
    expected = kept_by_the_rule(z, p, filter)
    assert {i for i in range(len(z)) if m[i] != 0} == expected and expected
    assert all(m[i] == z[i] for i in expected)


@given(cases(), FILTERS, st.sampled_from([0.05, 0.3]), st.booleans())
def test_memory_vector_does_not_depend_on_the_order_of_the_vocabulary(case, filter, p, center):
    z, _, _ = case
    order = torch.randperm(z.shape[-1], generator=torch.Generator().manual_seed(1))
    m = dipo.memory_vector(z, p, filter, center)
    torch.testing.assert_close(dipo.memory_vector(z[..., order], p, filter, center), m[..., order])


@given(cases(), st.floats(-100, 100), FILTERS)
def test_centred_memory_vector_ignores_the_constant_that_softmax_ignores(case, c, filter):
    z, _, _ = case
    z = z.float().double()  # differences survive the shift
    shifted, plain = dipo.memory_vector(z + c, center=True, filter=filter), dipo.memory_vector(z, center=True, filter=filter)
    assume(((shifted != 0) == (plain != 0)).all())  # a tie may break by rounding
    torch.testing.assert_close(shifted, plain, atol=1e-9, rtol=1e-9)


# ------------------------------------------------------------------------------------------------------------ the pair


@given(cases(), FILTERS)
def test_pair_is_the_policy_shifted_by_the_memory_vector_and_carries_no_gradient(case, filter):
    z = case[0].requires_grad_()
    memory, forgetting = dipo.preference_pair(z, alpha=0.7, filter=filter)
    m = dipo.memory_vector(z, filter=filter)
    torch.testing.assert_close(memory, z + 0.7 * m)
    torch.testing.assert_close(forgetting, z - 0.7 * m)
    assert not memory.requires_grad and not forgetting.requires_grad


@given(cases(), FILTERS)
def test_memory_distribution_gives_the_kept_tokens_more_and_the_forgetting_one_less(case, filter):
    z = case[0].abs() + 0.1  # positive logits, as at the top of a Llama's
    memory, forgetting = dipo.preference_pair(z, filter=filter)
    kept = memory != forgetting
    mass = [torch.where(kept, x.softmax(-1), 0.0).sum(-1) for x in (memory, z, forgetting)]
    assert (mass[0] >= mass[1] - 1e-12).all() and (mass[1] >= mass[2] - 1e-12).all()
    assert not dipo.swapped_roles(memory, forgetting).any()


@given(cases())
def test_negative_logits_swap_the_roles_and_are_refused(case):
    z, z_ref, mask = case
    assume(mask.any() and z.shape[-1] > 1)
    negative = z - z.max() - 1
    with pytest.raises(dipo.SwappedRolesError, match="--center"):
        dipo.dipo_loss(negative, z_ref, mask)


@given(cases())
def test_swapped_means_less_mass_on_the_kept_tokens(case):
    z, _, _ = case
    memory, forgetting = dipo.preference_pair(z, filter="both")
    kept = memory != forgetting
    assume(not kept.all(-1).any())
    lost = torch.where(kept, memory.softmax(-1) - forgetting.softmax(-1), 0.0).sum(-1)
    clear = lost.abs() > 1e-9
    assert (dipo.swapped_roles(memory, forgetting) == (lost < 0))[clear].all()


def test_a_few_swapped_positions_are_tolerated_and_more_are_not():
    dipo.check_roles(5, 100)
    with pytest.raises(dipo.SwappedRolesError, match="6 of 100"):
        dipo.check_roles(6, 100)


# ------------------------------------------------------------------------------------------------------ margin and loss


def margin_of(z, z_ref, mask, pair, beta=0.05):
    """u of Eq. 14 for (preferred, dispreferred) logits, by the four KLs."""
    pi_w, pi_l = (x.log_softmax(-1) for x in pair)
    return dipo.reward_margin(*distributions(z, z_ref), pi_w, pi_l, mask, beta)


@given(cases(), st.floats(0.01, 2.0))
def test_four_sequence_kls_are_one_dot_product(case, beta):
    z, z_ref, mask = case
    pair = dipo.preference_pair(z)
    dot = dipo.reward_margin_from_logits(z, z_ref, pair[0].softmax(-1), pair[1].softmax(-1), mask, beta)
    torch.testing.assert_close(margin_of(z, z_ref, mask, pair, beta), dot, rtol=1e-7, atol=1e-7)


@given(cases(), FILTERS, st.sampled_from(dipo.ROLES), st.sampled_from(["policy", "reference"]), st.floats(0.1, 2.0))
def test_dipo_margin_is_eq_14_for_its_own_pair_and_role(case, filter, role, pair_from, alpha):
    z, z_ref, mask = case
    memory, forgetting = dipo.preference_pair(z if pair_from == "policy" else z_ref, alpha, filter=filter)
    pair = (forgetting, memory) if role == "forget" else (memory, forgetting)
    u, _ = dipo.dipo_margin(z, z_ref, mask, role, 0.05, alpha, filter=filter, pair_from=pair_from)
    torch.testing.assert_close(u, margin_of(z, z_ref, mask, pair), rtol=1e-6, atol=1e-6)


@given(cases())
def test_mean_reduction_divides_the_margin_by_the_answer_tokens(case):
    z, z_ref, mask = case
    total, _ = dipo.dipo_margin(z, z_ref, mask, reduction="sum")
    mean, _ = dipo.dipo_margin(z, z_ref, mask, reduction="mean")
    torch.testing.assert_close(mean * mask.sum(-1), total)


@given(cases(), st.sampled_from(dipo.ROLES))
def test_at_the_reference_the_margin_is_zero_and_the_loss_log_two(case, role):
    z, _, mask = case
    z = z.abs()
    torch.testing.assert_close(dipo.dipo_loss(z, z, mask, role), torch.full((len(z),), math.log(2), dtype=z.dtype))


@given(cases())
def test_reversed_roles_negate_the_margin_and_the_losses_conflict_on_shared_states(case):
    z, z_ref, mask = case
    forget, _ = dipo.dipo_margin(z, z_ref, mask, "forget")
    retain, _ = dipo.dipo_margin(z, z_ref, mask, "retain")
    torch.testing.assert_close(forget, -retain)
    assert (dipo.bradley_terry_loss(forget) + dipo.bradley_terry_loss(retain) >= 2 * math.log(2) - 1e-12).all()


@given(st.floats(-200, 200), st.floats(-200, 200), st.floats(-200, 200))
def test_bradley_terry_is_the_preference_of_the_larger_reward_and_blind_to_state_terms(r_w, r_l, c):
    def loss(x, y):
        return dipo.bradley_terry_loss(torch.tensor([x - y], dtype=torch.float64))

    if abs(r_w - r_l) > 1e-9:
        assert ((-loss(r_w, r_l)).exp() > 0.5).item() == (r_w > r_l)
    torch.testing.assert_close(loss(r_w + c, r_l + c), loss(r_w, r_l), atol=1e-6, rtol=1e-6)


# ----------------------------------------------------------------------------------------------------------- gradients


@given(cases(), st.sampled_from(dipo.ROLES))
def test_gradient_is_the_closed_form_and_bounded_by_beta(case, role):
    z, z_ref, mask = case
    z, z_ref = z.abs().requires_grad_(), z_ref.requires_grad_()
    memory, forgetting = (x.softmax(-1) for x in dipo.preference_pair(z))
    preference = forgetting - memory if role == "forget" else memory - forgetting
    u, _ = dipo.dipo_margin(z, z_ref, mask, role, 0.05)
    dipo.dipo_loss(z, z_ref, mask, role, 0.05).sum().backward()
    expected = -0.05 * torch.sigmoid(-u.detach())[:, None, None] * preference * mask[..., None]
    torch.testing.assert_close(z.grad, expected)
    assert z.grad.abs().max() <= 0.05 and z_ref.grad is None


@given(cases())
def test_section_4_2_the_loss_falls_with_the_distance_to_pi_l_and_rises_with_that_to_pi_w(case):
    z, z_ref, mask = case
    assume(mask.any())
    pi_w, pi_l = (x.log_softmax(-1) for x in dipo.preference_pair(z))
    kl = [dipo.sequence_kl(a, b, mask).requires_grad_() for b in distributions(z, z_ref) for a in (pi_l, pi_w)]
    u = 0.05 * ((kl[0] - kl[1]) - (kl[2] - kl[3]))
    torch.testing.assert_close(u.detach(), margin_of(z, z_ref, mask, (pi_w, pi_l)), rtol=1e-6, atol=1e-6)
    x1, x2 = torch.autograd.grad(dipo.bradley_terry_loss(u).sum(), kl[:2])
    assert (x1 < 0).all() and (x2 > 0).all()


@given(cases(max_scale=4.0))
def test_a_step_down_the_forget_loss_moves_away_from_pi_m_and_towards_pi_f(case):
    z, _, mask = case
    z = z.abs() + 0.1
    assume(z.shape[-1] > 1 and mask.any())
    memory, forgetting = dipo.preference_pair(z)
    leaf = z.clone().requires_grad_()
    dipo.dipo_loss(leaf, z, mask, "forget").sum().backward()
    moved = z - 1e-4 * leaf.grad / leaf.grad.abs().max().clamp(min=1e-12)

    def distance(pair, logits):
        return dipo.sequence_kl(pair.log_softmax(-1), logits.log_softmax(-1), mask).sum()

    assert distance(memory, moved) >= distance(memory, z) - 1e-10
    assert distance(forgetting, moved) <= distance(forgetting, z) + 1e-10


@given(cases())
def test_alpha_to_zero_leaves_no_preference_and_no_gradient(case):
    z, z_ref, mask = case
    z = z.requires_grad_()
    u, _ = dipo.dipo_margin(z, z_ref, mask, alpha=1e-12)
    (grad,) = torch.autograd.grad(u.sum(), z)
    assert u.abs().max() < 1e-8 and grad.abs().max() < 1e-10


def test_gradcheck():
    torch.manual_seed(0)
    z = (torch.randn(2, 3, 11, dtype=torch.float64).abs() * 3).requires_grad_()
    z_ref, mask = torch.randn(2, 3, 11, dtype=torch.float64), torch.tensor([[True, True, False], [True, True, True]])
    pi_w, pi_l = (x.log_softmax(-1) for x in dipo.preference_pair(z))
    q = z_ref.log_softmax(-1)
    assert torch.autograd.gradcheck(lambda x: dipo.reward_margin(x.log_softmax(-1), q, pi_w, pi_l, mask), z)


# ------------------------------------------------------------------------------------------------- baselines, precision


@given(cases())
def test_nll_is_cross_entropy_and_ignores_padding(case):
    z, _, mask = case
    targets = torch.randint(0, z.shape[-1], mask.shape, generator=torch.Generator().manual_seed(0))
    expected = (F.cross_entropy(z.transpose(1, 2), targets, reduction="none") * mask).sum(-1)
    torch.testing.assert_close(dipo.nll(z, targets, mask), expected)
    garbage = torch.where(mask[..., None], z, 1e4)
    torch.testing.assert_close(dipo.nll(garbage, targets, mask), expected)


@given(cases())
def test_npo_tends_to_gradient_ascent_and_has_its_published_gradient_weight(case):
    z, z_ref, mask = case
    targets = torch.zeros(mask.shape, dtype=torch.int64)

    def grad(f):
        x = z.clone().requires_grad_()
        (g,) = torch.autograd.grad(f(x).sum(), x)
        return g

    ascent = grad(lambda x: -dipo.nll(x, targets, mask))
    torch.testing.assert_close(grad(lambda x: dipo.npo_loss(x, z_ref, targets, mask, 1e-9)), ascent, rtol=1e-5, atol=1e-8)
    gap = dipo.nll(z, targets, mask) - dipo.nll(z_ref, targets, mask)
    weight = 2 * torch.sigmoid(-0.1 * gap)[:, None, None]  # 2 pi_theta^beta / (pi_theta^beta + pi_ref^beta)
    torch.testing.assert_close(grad(lambda x: dipo.npo_loss(x, z_ref, targets, mask, 0.1)), weight * ascent)


@given(cases())
def test_kl_loss_is_the_distance_from_the_reference(case):
    z, z_ref, mask = case
    torch.testing.assert_close(dipo.kl_loss(z, z_ref, mask), dipo.sequence_kl(*distributions(z_ref, z), mask))


@given(cases(dtype=torch.float32), st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_is_computed_in_float32(case, dtype):
    z, z_ref, mask = case
    z, z_ref = z.abs().to(dtype), z_ref.to(dtype)
    loss = dipo.dipo_loss(z, z_ref, mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, dipo.dipo_loss(z.float(), z_ref.float(), mask))


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs a C++ compiler"
)
@settings(max_examples=5)
@given(cases(dtype=torch.float32))
def test_compiled_equals_eager(case):
    z, z_ref, mask = case
    compiled = torch.compile(dipo.dipo_margin, dynamic=True)
    for got, want in zip(compiled(z, z_ref, mask), dipo.dipo_margin(z, z_ref, mask), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_wrong_shapes_and_names_are_refused():
    z, mask = torch.zeros(2, 3, 5), torch.ones(2, 3, dtype=torch.bool)
    for bad in (lambda: dipo.dipo_loss(z, z[:, :2], mask), lambda: dipo.dipo_loss(z, z, mask[:, :2]),
                lambda: dipo.dipo_loss(z, z, mask.float()), lambda: dipo.dipo_loss(z, z, mask, "remember"),
                lambda: dipo.memory_vector(z, filter="all"), lambda: dipo.memory_vector(z, p=0.0),
                lambda: dipo.dipo_loss(z, z, mask, pair_from="target"),
                lambda: dipo.dipo_loss(z, z, mask, reduction="max")):  # fmt: skip
        with pytest.raises(AssertionError):
            bad()
