"""Distribution Preference Optimization (DiPO, arXiv 2510.04773): the paper as pure tensor functions.

Read from top to bottom: the sequence KL, the pair of distributions, the reward margin (Eq. 14), the loss; then the
losses that DiPO is compared with.

Shapes
    B sequences, T answer positions, V vocabulary.
    logits       [B, T, V]  position t holds the logits that predict answer token t, given the prompt and y_<t
    targets      [B, T]     int64, the answer tokens
    mask         [B, T]     bool, True where there is an answer token (EOS included), False in padding
    losses       [B]        one number per sequence; the mean over the batch is taken by the caller

Half precision goes in, float32 is computed with and comes out; float64 stays float64.

Every loss is a function of a sum over a sequence's positions, and each term of the sum needs that position's logits only.
`dipo_scores`, `token_nll` and `token_kl` are those terms, for logits [..., V]; train.py calls them on chunks of positions.

Notation (the paper's)
    z, z_ref     logits of the policy and of the frozen reference;  pi_theta = softmax(z),  pi_ref = softmax(z_ref)
    pi_m, pi_f   memory-enhancing and forgetting-promoting distribution: pi_theta shifted towards, and away from, its own
                 high-confidence tokens
    pi_w, pi_l   preferred and dispreferred: (pi_f, pi_m) on the forget set, (pi_m, pi_f) on the retain set
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FILTERS = ("both", "either", "rank", "relative")
ROLES = ("forget", "retain")
SWAP_LIMIT = 0.05  # of the answer positions; our choice: SmolLM2 on TOFU has under 0.005, an all-negative model has 1


class SwappedRolesError(ValueError):
    """The pair's roles are swapped: adding the memory vector would *lower* the high-confidence tokens."""


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check(mask: Tensor, *logits: Tensor) -> None:
    for z in logits:
        shapes = [tuple(t.shape) for t in logits]
        assert z.ndim == 3 and z.shape == logits[0].shape, f"expected equal [B, T, V], got {shapes}"
    assert mask.shape == logits[0].shape[:2], f"mask {tuple(mask.shape)} does not fit [B, T] of {tuple(logits[0].shape)}"
    assert mask.dtype == torch.bool, f"mask must be bool, got {mask.dtype}"


def _masked_sum(per_position: Tensor, mask: Tensor) -> Tensor:
    return per_position.masked_fill(~mask, 0.0).sum(-1)  # not a product: 0 * inf in a padded position is NaN


# ----------------------------------------------------------------------------------------------------- sequence KL


def sequence_kl(p_log_probs: Tensor, q_log_probs: Tensor, mask: Tensor) -> Tensor:
    """D_SeqKL(x, y; p || q) = sum_t KL( p(.|x, y_<t) || q(.|x, y_<t) ) over answer positions -> [B], in nats.

    The sequence KL of TDPO, as the paper uses it. Both arguments are log-probabilities [B, T, V].
    """
    _check(mask, p_log_probs, q_log_probs)
    return _masked_sum(token_kl(p_log_probs, q_log_probs), mask)


def token_kl(p_log_probs: Tensor, q_log_probs: Tensor) -> Tensor:
    """KL(p || q) of next-token distributions, log-probabilities [..., V] -> [...], in nats."""
    p_log_probs, q_log_probs = _at_least_float32(p_log_probs), _at_least_float32(q_log_probs)
    p = p_log_probs.exp()
    # 0 log 0 = 0, also where a log-probability is -inf
    return torch.where(p > 0, p * (p_log_probs - q_log_probs), 0.0).sum(-1)


# -------------------------------------------------------------------------------------------------------- the pair


def memory_vector(logits: Tensor, p: float = 0.05, filter: str = "both", center: bool = False) -> Tensor:
    """m_t: the high-confidence logits of z_t, zero elsewhere -> [B, T, V]. No gradient flows through it.

    A token is of high confidence by its *rank* (among the top p of the vocabulary; at least one token) and by its
    *relative* probability (at least p times the largest, i.e. z >= max z + log p). Ties with the last kept token are
    kept, so the result does not depend on the order of the vocabulary.

    filter: 'both' thresholds passed, 'either', or only 'rank' / 'relative'. The paper names both thresholds without
        saying how they combine; 'both' is our choice, measured in the README.
    center: False takes raw logits, as the paper does. True subtracts each position's mean logit first, which makes m
        (and so the pair) independent of the additive constant that softmax ignores and raw logits carry. Our addition.
    """
    assert logits.ndim >= 1 and 0 < p <= 1, f"logits [..., V] and 0 < p <= 1 expected, got {tuple(logits.shape)}, p = {p}"
    assert filter in FILTERS, f"filter {filter!r} is none of {FILTERS}"
    z = _at_least_float32(logits.detach())
    keep = z >= confidence_threshold(z, p, filter)
    if center:
        z = z - z.mean(-1, keepdim=True)
    return torch.where(keep, z, 0.0)


def confidence_threshold(z: Tensor, p: float, filter: str) -> Tensor:
    """The least logit that counts as of high confidence, at each position: [..., V] -> [..., 1]."""
    by_probability = z.amax(-1, keepdim=True) + math.log(p)
    if filter == "relative":
        return by_probability
    k = max(1, int(p * z.shape[-1] + 1e-6))
    if filter == "both":  # where at most k tokens pass the relative threshold, they are the k largest anyway
        return torch.maximum(by_probability, kth_largest(z, k, (z >= by_probability).sum(-1) > k))
    by_rank = z.topk(k, sorted=False).values.amin(-1, keepdim=True)
    return by_rank if filter == "rank" else torch.minimum(by_rank, by_probability)


@torch.library.custom_op("dipo::kth_largest", mutates_args=())
def kth_largest(z: Tensor, k: int, where: Tensor) -> Tensor:
    """The k-th largest of z's last dimension at the positions `where` [...], -inf elsewhere -> [..., 1].

    Top-k over a vocabulary costs more than the rest of the loss, and hardly any position needs it. An operator of its
    own, because torch.compile could not fuse across such a branch.
    """
    result = z.new_full((*z.shape[:-1], 1), -math.inf)
    if where.any():
        result[where] = z[where].topk(k, sorted=False).values.amin(-1, keepdim=True)
    return result


@kth_largest.register_fake
def _(z: Tensor, k: int, where: Tensor) -> Tensor:
    return z.new_empty((*z.shape[:-1], 1))


def preference_pair(
    logits: Tensor, alpha: float = 1.0, p: float = 0.05, filter: str = "both", center: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits of pi_m = softmax(z + alpha m) and pi_f = softmax(z - alpha m), each [B, T, V].

    The pair is a target: no gradient flows through it. alpha = 1 is implicit in the paper; alpha -> 0 makes the two
    equal, and the loss a constant.
    """
    z = _at_least_float32(logits.detach())
    m = memory_vector(z, p, filter, center)
    return z + alpha * m, z - alpha * m


# ---------------------------------------------------------------------------------------------------- reward margin


def reward_margin(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    preferred_log_probs: Tensor,
    dispreferred_log_probs: Tensor,
    mask: Tensor,
    beta: float = 0.05,
) -> Tensor:
    """u = R_w - R_l of Eq. 14, written out as its four sequence KLs -> [B].

    Every KL has a member of the pair on the left and a model on the right:

        R_pi = beta * ( D_SeqKL(pi || pi_ref) - D_SeqKL(pi || pi_theta) )      the reward of a distribution
        u    = beta * { [D(pi_l || pi_theta) - D(pi_w || pi_theta)] - [D(pi_l || pi_ref) - D(pi_w || pi_ref)] }

    u > 0: compared with the reference, the policy has come closer to pi_w than to pi_l.
    """
    pi_w, pi_l = preferred_log_probs.detach(), dispreferred_log_probs.detach()
    policy = sequence_kl(pi_l, log_probs, mask) - sequence_kl(pi_w, log_probs, mask)
    reference = sequence_kl(pi_l, ref_log_probs.detach(), mask) - sequence_kl(pi_w, ref_log_probs.detach(), mask)
    return beta * (policy - reference)


def reward_margin_from_logits(
    logits: Tensor, ref_logits: Tensor, preferred_probs: Tensor, dispreferred_probs: Tensor, mask: Tensor, beta: float = 0.05
) -> Tensor:
    """The same u in one dot product: u = beta * sum_t < pi_w - pi_l , z_t - z_ref,t > -> [B].

    In the four KLs of Eq. 14 the entropies of pi_w and pi_l cancel, and since both sum to one, so do the normalisers
    of pi_theta and pi_ref. Hence dL/dz = -beta sigmoid(-u) (pi_w - pi_l). This is the form that trains: the
    same number with less rounding, and a third of the [B, T, V] tensors.
    """
    _check(mask, logits, ref_logits, preferred_probs, dispreferred_probs)
    return beta * _masked_sum(_scores(logits, ref_logits, preferred_probs - dispreferred_probs), mask)


def _scores(logits: Tensor, ref_logits: Tensor, preference: Tensor) -> Tensor:
    difference = _at_least_float32(logits) - _at_least_float32(ref_logits.detach())
    return (preference.detach() * difference).sum(-1)


def dipo_scores(
    logits: Tensor,
    ref_logits: Tensor,
    role: str,
    alpha: float = 1.0,
    p: float = 0.05,
    filter: str = "both",
    center: bool = False,
    pair_from: str = "policy",
) -> tuple[Tensor, Tensor]:
    """(< pi_w - pi_l, z_t - z_ref,t > [...], swapped [...] bool) for the pair that the model's own logits [..., V] make.

    role: 'forget' prefers pi_f to pi_m, 'retain' prefers pi_m to pi_f.
    pair_from: 'policy' builds the pair from z, anew at each step (the paper); 'reference' from z_ref (our ablation).

    swapped: pi_m gives the high-confidence tokens *less* probability than pi_f does. That happens when the kept raw
    logits are negative, as all logits of some model families are: then z + m lowers them, "memory-enhancing" forgets,
    and training would do the opposite of what it says. Our check, because m = z on the kept tokens is not invariant to
    adding a constant to all logits, although softmax(z) is. The other tokens have the same logits in both, so their
    share is U / Z_m against U / Z_f: the kept tokens lose by z + alpha m exactly if it has the smaller normaliser Z_m.

    Everywhere else a small step down the loss moves the policy away from pi_l and towards pi_w; the proof stands in
    tests/test_dipo.py at `test_a_tilt_along_a_vector_ordered_like_the_logits_has_the_right_direction`.
    """
    assert role in ROLES, f"role {role!r} is none of {ROLES}"
    assert pair_from in ("policy", "reference"), f"pair_from {pair_from!r} is neither 'policy' nor 'reference'"
    memory, forgetting = preference_pair(logits if pair_from == "policy" else ref_logits, alpha, p, filter, center)
    (pi_m, log_z_m), (pi_f, log_z_f) = _softmax(memory), _softmax(forgetting)
    scores = _scores(logits, ref_logits, pi_f - pi_m if role == "forget" else pi_m - pi_f)
    return scores, log_z_m < log_z_f


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax [..., V], its log-normaliser [...]) with one exponential per logit."""
    top = logits.amax(-1, keepdim=True)
    e = (logits - top).exp()
    total = e.sum(-1, keepdim=True)
    return e / total, (top + total.log()).squeeze(-1)


def dipo_margin(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor,
    role: str = "forget",
    beta: float = 0.05,
    reduction: str = "sum",
    **pair,
) -> tuple[Tensor, Tensor]:
    """(u [B], swapped [B, T] bool): the margin of each sequence, and where the roles of its pair swap.

    reduction: 'sum' over answer tokens (the sequence KL of Eq. 14) or 'mean' (ours, for long texts).
    pair: alpha, p, filter, center, pair_from, as in `dipo_scores`.
    """
    _check(mask, logits, ref_logits)
    assert reduction in ("sum", "mean"), f"reduction {reduction!r} is neither 'sum' nor 'mean'"
    scores, swapped = dipo_scores(logits, ref_logits, role, **pair)
    u = beta * _masked_sum(scores, mask)
    if reduction == "mean":
        u = u / mask.sum(-1).clamp(min=1)
    return u, swapped & mask


# ------------------------------------------------------------------------------------------------------------- loss


def bradley_terry_loss(u: Tensor) -> Tensor:
    """L = -log P(pi_w > pi_l) = -log sigmoid(R_w - R_l). log 2 at u = 0; never pushes harder than |dL/du| = 1."""
    return -F.logsigmoid(u)


def dipo_loss(logits: Tensor, ref_logits: Tensor, mask: Tensor, role: str = "forget", beta: float = 0.05, **pair) -> Tensor:
    """The DiPO loss of each sequence -> [B]. The paper's objective is the mean of dipo_loss(role='forget') over forget
    sequences plus lambda times the mean of dipo_loss(role='retain') over retain sequences.

    pair: alpha, p, filter, center, pair_from, reduction, as in `dipo_margin`.
    Raises SwappedRolesError (see `check_roles`) where raw logits would make it train in the wrong direction.
    """
    u, swapped = dipo_margin(logits, ref_logits, mask, role, beta, **pair)
    check_roles(int(swapped.sum()), int(mask.sum()))
    return bradley_terry_loss(u)


def check_roles(swapped: int, positions: int) -> None:
    """Raises SwappedRolesError if more than SWAP_LIMIT of the answer positions have their roles swapped.

    A few do in healthy models: where the next token is wide open, the largest logit itself is near zero.
    """
    if swapped > SWAP_LIMIT * positions:
        raise SwappedRolesError(
            f"at {swapped} of {positions} answer positions the high-confidence logits are negative, so that the "
            f"memory-enhancing and forgetting-promoting roles swap; build the pair from centred logits (--center)"
        )


# -------------------------------------------------------------------------------------- baselines and ablations


def nll(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """-log p(y | x), summed over answer tokens -> [B]. Gradient descent (retain) is its token mean, ascent its negative."""
    _check(mask, logits)
    assert targets.shape == mask.shape, f"targets {tuple(targets.shape)} and mask {tuple(mask.shape)} differ"
    return _masked_sum(token_nll(logits, targets), mask)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target token: logits [..., V], targets [...] int64 -> [...]."""
    z = _at_least_float32(logits)
    return z.logsumexp(-1) - z.gather(-1, targets[..., None]).squeeze(-1)


def npo_loss(logits: Tensor, ref_logits: Tensor, targets: Tensor, mask: Tensor, beta: float = 0.1) -> Tensor:
    """Negative preference optimisation: -(2 / beta) log sigmoid( beta (nll_theta - nll_ref) ) -> [B].

    arXiv 2404.05868; open-unlearning's NPO. Tends to gradient ascent as beta -> 0.
    """
    _check(mask, logits, ref_logits)
    return negative_preference_loss(nll(logits, targets, mask) - nll(ref_logits.detach(), targets, mask), beta)


def negative_preference_loss(gap: Tensor, beta: float) -> Tensor:
    """What NPO, SimNPO and DPO have in common: the gap [B] by which the answer has become less likely -> [B]."""
    return -(2 / beta) * F.logsigmoid(beta * gap)


def simnpo_loss(logits: Tensor, targets: Tensor, mask: Tensor, beta: float = 4.5) -> Tensor:
    """SimNPO: -(2 / beta) log sigmoid( beta nll_theta / length ) -> [B]. NPO per token and without a reference.

    arXiv 2410.07163, with its margin at 0, as both its code and open-unlearning have it.
    """
    return negative_preference_loss(nll(logits, targets, mask) / mask.sum(-1).clamp(min=1), beta)


def dpo_loss(forget_gap: Tensor, refusal_gap: Tensor, beta: float = 0.1) -> Tensor:
    """DPO that prefers "I don't know" to the answer: -(2 / beta) log sigmoid( beta (forget_gap - refusal_gap) ) -> [B].

    gap: nll_theta - nll_ref of the answer, and of a refusal of the same question, [B] each. open-unlearning's IdkDPO, whose
    factor 2 / beta the original DPO (arXiv 2305.18290) does not have.
    """
    return negative_preference_loss(forget_gap - refusal_gap, beta)


def kl_loss(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    """D_SeqKL(pi_ref || pi_theta) -> [B]: keep the policy near the reference on retain data (the KL baseline).

    Answer positions only; the original code also averages over prompt and padding.
    """
    _check(mask, logits, ref_logits)
    z, z_ref = _at_least_float32(logits), _at_least_float32(ref_logits.detach())
    return sequence_kl(z_ref.log_softmax(-1), z.log_softmax(-1), mask)
