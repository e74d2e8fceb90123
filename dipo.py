"""Distribution Preference Optimization (DiPO, arXiv 2510.04773): the paper as pure tensor functions.

Read from top to bottom: the sequence KL, the pair of distributions, the reward margin (Eq. 14), the loss, the settings of an
objective; then one table of this loss and those that it is compared with, and the two forms in which each row is computed.

Shapes
    B sequences, T answer positions, V vocabulary.
    logits       [B, T, V]  position t holds the logits that predict answer token t, given the prompt and y_<t
    targets      [B, T]     int64, the answer tokens
    mask         [B, T]     bool, True where there is an answer token (EOS included), False in padding
    losses       [B]        one number per sequence; the caller divides their sum by `Loss.divisor`
    [...]        any number of answer positions, of whichever sequences

Half precision goes in, float32 is computed with and comes out; float64 stays float64.

Notation (the paper's)
    s_t          state: the prompt x and the answer so far, y_<t
    z, z_ref     logits of the policy and of the frozen reference;  pi_theta = softmax(z),  pi_ref = softmax(z_ref)
    m            memory vector: the high-confidence logits of z, zero elsewhere
    pi_m, pi_f   memory-enhancing and forgetting-promoting distribution: pi_theta shifted towards, and away from, its own
                 high-confidence tokens
    pi_w, pi_l   preferred and dispreferred: (pi_f, pi_m) on the forget set, (pi_m, pi_f) on the retain set
    D_SeqKL      `sequence_kl`;  L `bradley_terry_loss`;  L_f + lambda L_r: settings `Objective`, added up in train.py
    u            Eq. 14: `reward_margin` to read, beta times the sum of `margin_terms` to train

Ours, not the paper's: anchored DiPO, `anchored_terms`, three changes that leave the model its language.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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
    """m_t: the high-confidence logits of z_t, zero elsewhere -> [..., V]. No gradient flows through it.

    A token is of high confidence by its *rank* (among the top p of the vocabulary; at least one token) and by its
    *relative* probability (at least p times the largest, i.e. z >= max z + log p). Ties with the last kept token are
    kept, so the result does not depend on the order of the vocabulary.

    filter: 'both' thresholds passed, 'either', or only 'rank' / 'relative'. The paper names both thresholds without
        saying how they combine; 'both' is our choice, measured in experiments/README.md.
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
    k = max(1, int(p * z.shape[-1] + 1e-6))  # 0.05 x 60 rounds to just below 3
    if filter == "both":  # where at most k tokens pass the relative threshold, they are among the k largest anyway
        return torch.maximum(by_probability, kth_largest(z, k, (z >= by_probability).sum(-1) > k))
    by_rank = z.topk(k, sorted=False).values.amin(-1, keepdim=True)
    return by_rank if filter == "rank" else torch.minimum(by_rank, by_probability)


@torch.library.custom_op("dipo::kth_largest", mutates_args=())
def kth_largest(z: Tensor, k: int, wanted: Tensor) -> Tensor:
    """The k-th largest of z's last dimension at the `wanted` positions [...] (bool), -inf elsewhere -> [..., 1].

    Top-k over a vocabulary costs more than the rest of the loss, and hardly any position needs it. An operator of its
    own, because torch.compile could not fuse across such a branch.
    """
    result = z.new_full((*z.shape[:-1], 1), -math.inf)
    if wanted.any():
        result[wanted] = z[wanted].topk(k, sorted=False).values.amin(-1, keepdim=True)
    return result


@kth_largest.register_fake
def _(z: Tensor, k: int, wanted: Tensor) -> Tensor:
    return z.new_empty((*z.shape[:-1], 1))


def preference_pair(
    logits: Tensor, alpha: float = 1.0, p: float = 0.05, filter: str = "both", center: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits of pi_m = softmax(z + alpha m) and pi_f = softmax(z - alpha m), each [..., V].

    The pair is a target: no gradient flows through it. alpha = 1 is implicit in the paper; alpha -> 0 makes the two
    equal, and the loss a constant.
    """
    z = _at_least_float32(logits.detach())
    m = memory_vector(z, p, filter, center)
    return z + alpha * m, z - alpha * m


# ------------------------------------------------------------------------------------------- the margin and the loss


def reward_margin(
    log_probs: Tensor, ref_log_probs: Tensor, log_pi_w: Tensor, log_pi_l: Tensor, mask: Tensor, beta: float = 0.05
) -> Tensor:
    """u = R_w - R_l of Eq. 14, written out as its four sequence KLs -> [B], from log-probabilities [B, T, V].

    Every KL has a member of the pair on the left and a model on the right:

        R_pi = beta * ( D_SeqKL(pi || pi_ref) - D_SeqKL(pi || pi_theta) )      the reward of a distribution
        u    = beta * { [D(pi_l || pi_theta) - D(pi_w || pi_theta)] - [D(pi_l || pi_ref) - D(pi_w || pi_ref)] }

    u > 0: compared with the reference, the policy has come closer to pi_w than to pi_l. This form is for reading, and the
    oracle of the tests; `margin_terms` is the one that trains.
    """
    pi_w, pi_l = log_pi_w.detach(), log_pi_l.detach()
    policy = sequence_kl(pi_l, log_probs, mask) - sequence_kl(pi_w, log_probs, mask)
    reference = sequence_kl(pi_l, ref_log_probs.detach(), mask) - sequence_kl(pi_w, ref_log_probs.detach(), mask)
    return beta * (policy - reference)


def margin_terms(logits: Tensor, ref_logits: Tensor, pi_w: Tensor, pi_l: Tensor) -> Tensor:
    """< pi_w - pi_l , z_t - z_ref,t >: what each position adds to the margin, u = beta * sum_t of it -> [...].

    In the four KLs of Eq. 14 the entropies of pi_w and pi_l (probabilities, [..., V]) cancel, and since both sum to one, so
    do the normalisers of pi_theta and pi_ref. Hence dL/dz = -beta sigmoid(-u) (pi_w - pi_l). The same number as
    `reward_margin` with less rounding, and a third of the [B, T, V] tensors.
    """
    difference = _at_least_float32(logits) - _at_least_float32(ref_logits.detach())
    return ((pi_w - pi_l).detach() * difference).sum(-1)


def bradley_terry_loss(u: Tensor) -> Tensor:
    """L = -log P(pi_w > pi_l) = -log sigmoid(R_w - R_l). log 2 at u = 0; never pushes harder than |dL/du| = 1."""
    return -F.logsigmoid(u)


def negative_preference_loss(u: Tensor, beta: float) -> Tensor:
    """-(2 / beta) log sigmoid(u): what NPO, SimNPO and DPO make of u = beta S, S a gap between likelihoods -> [B].

    The factor 2 / beta, which the original DPO does not have, makes NPO tend to gradient ascent as beta -> 0.
    """
    return -(2 / beta) * F.logsigmoid(u)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax [..., V], its log-normaliser [...]) with one exponential per logit."""
    top = logits.amax(-1, keepdim=True)
    e = (logits - top).exp()
    total = e.sum(-1, keepdim=True)
    return e / total, (top + total.log()).squeeze(-1)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def check_roles(swapped: int, positions: int) -> None:
    """Raises SwappedRolesError if more than SWAP_LIMIT of the answer positions have their roles swapped.

    A few do in healthy models: where the next token is wide open, the largest logit itself is near zero.
    """
    if swapped > SWAP_LIMIT * positions:
        raise SwappedRolesError(
            f"at {swapped} of {positions} answer positions the high-confidence logits are negative, so that the "
            f"memory-enhancing and forgetting-promoting roles swap; build the pair from centred logits (--center)"
        )


# ---------------------------------------------------------------------------------------------------- the objective


@dataclass(frozen=True)
class Objective:
    """What a run minimises: mean of L_f over forget data + lam * mean of L_r over retain data. Defaults are the paper's.

    forget_loss, retain_loss: rows of LOSSES; retain_loss 'none' leaves the second part out.
    beta: in place of the row's own for the forget loss, and for the retain loss if that is the same row.
    Of losses with a pair: alpha, p, filter, center (see `preference_pair`); pair_from, 'policy' to build it from z, anew at
        each step (the paper), or 'reference', from z_ref; None: 'policy' for dipo, 'reference' for anchored; reduction,
        'sum' for u as the sum over answer tokens (the sequence KL of Eq. 14), or 'mean' (ours, for long texts).
    Of anchored losses (ours): kappa, weight of the anchor; positions of a forget answer that are forgotten: 'memory', those
        that surprise what the retain set explains by more than tau nats (see memory.py), or 'all'.
    """

    forget_loss: str = "dipo"
    retain_loss: str = "dipo"
    lam: float = 1.0
    beta: float | None = None
    alpha: float = 1.0
    p: float = 0.05
    filter: str = "both"
    center: bool = False
    pair_from: str | None = None
    reduction: str = "sum"
    kappa: float = 0.05
    positions: str = "memory"
    tau: float = 1.5

    def parts(self) -> dict[str, tuple[str, float]]:
        """{role: (its loss, its weight)}: the parts of the total objective. Raises ValueError for a loss that LOSSES does
        not have, or not for that role, and where memory positions lack the retain set that they are told by."""
        parts = {"forget": (self.forget_loss, 1.0), "retain": (self.retain_loss, self.lam)}
        if self.retain_loss == "none":
            del parts["retain"]
        for role, (name, _) in parts.items():
            if name not in loss_names(role):
                raise ValueError(f"{role} loss {name!r} is none of {', '.join(loss_names(role))}")
        if self.selects and "retain" not in parts:
            raise ValueError(f"{self.forget_loss!r} tells memory by the retain set; name a retain loss or --positions all")
        return parts

    @property
    def selects(self) -> bool:
        """Whether the forget answers' memory positions must be known."""
        return self.positions == "memory" and loss_named(self.forget_loss).anchored

    def beta_of(self, name: str) -> float:
        """0 for a loss that has none."""
        own = loss_named(name).beta
        return self.beta if own and self.beta is not None and name == self.forget_loss else own


# -------------------------------------------------------------------------------- what one position adds to each loss


class Positions(NamedTuple):
    """Answer positions and what is known there; a loss looks at what it needs."""

    logits: Tensor  # [..., V] of the policy: the gradient goes here
    ref_logits: Tensor | None  # [..., V] of the reference
    targets: Tensor | None  # [...] int64
    role: str  # the set that the positions are of: forget, retain, or finetune
    beta: float  # of the row; where it has a `loss`, that is what beta is for
    memory: Tensor | None = None  # [...] bool, the memory positions of forget answers; None: all


class Terms(NamedTuple):
    """What each position adds to its sequence's sums, and what the log tells of it."""

    value: Tensor  # [...]
    nll: Tensor | None = None  # [...] -log p of the target, where it was computed on the way
    swapped: Tensor | None = None  # [...] bool, where the pair has its roles swapped
    anchor: Tensor | None = None  # [...] KL(pi* || pi_theta), of anchored losses


def dipo_terms(s: Positions, o: Objective) -> Terms:
    """`margin_terms` of the pair that the model's own logits make, `preferring` by the role of the set."""
    assert o.pair_from in (None, "policy", "reference"), f"pair_from {o.pair_from!r} is neither 'policy' nor 'reference'"
    assert s.ref_logits is not None
    source = s.ref_logits if o.pair_from == "reference" else s.logits
    return preferring(s, *preference_pair(source, o.alpha, o.p, o.filter, o.center))


def preferring(s: Positions, z_m: Tensor, z_f: Tensor) -> Terms:
    """`margin_terms` of a pair, given as logits [..., V]: 'forget' prefers pi_f to pi_m, 'retain' pi_m to pi_f.

    swapped: pi_m gives the high-confidence tokens *less* probability than pi_f does. That happens when the kept raw
    logits are negative, as all logits of some model families are: then z + m lowers them, "memory-enhancing" forgets,
    and training would do the opposite of what it says. Our check, because m = z on the kept tokens is not invariant to
    adding a constant to all logits, although softmax(z) is. The other tokens have the same logits in both, so their
    share, of a sum U of exp(z), is U / Z_m in pi_m and U / Z_f in pi_f: the kept tokens lose exactly where Z_m < Z_f.

    Everywhere else a small step down the loss moves the policy away from pi_l and towards pi_w; the proof stands in
    tests/test_dipo.py at `test_a_tilt_along_a_vector_ordered_like_the_logits_has_the_right_direction`.
    """
    assert s.role in ROLES, f"role {s.role!r} is none of {ROLES}"
    assert s.ref_logits is not None
    (pi_m, log_z_m), (pi_f, log_z_f) = _softmax(z_m), _softmax(z_f)
    pi_w, pi_l = (pi_f, pi_m) if s.role == "forget" else (pi_m, pi_f)  # the same pair; what is preferred is exchanged
    return Terms(margin_terms(s.logits, s.ref_logits, pi_w, pi_l), swapped=log_z_m < log_z_f)


def anchored_terms(s: Positions, o: Objective) -> Terms:
    """Anchored DiPO, ours. The paper's pair, made anew from the policy at each step, pushes down whatever is likely now, at
    every position: words as much as facts, until no language is left. Three changes:

    * the pair is the reference's (unless pair_from says 'policy'): it stays where it is, and the margin saturates;
    * on forget data only memory positions add to the margin (see memory.py), on retain data all do;
    * an anchor, kappa sum_t KL(pi*_t || pi_theta,t), with pi* = pi_f at memory positions of forget data and pi_ref
      everywhere else. It is to DiPO what a likelihood term on the preferred answer is to DPO.

    dL/dz_t = -beta sigmoid(-u) (pi_w - pi_l)_t, at memory positions, + kappa (pi_theta - pi*)_t. Without anchor, with all
    positions and the policy's pair it is `dipo_terms`; for kappa -> infinity it is a distillation to pi*. With the fixed
    pair the loss is convex in z.
    """
    assert s.ref_logits is not None
    z_m, z_f = preference_pair(s.ref_logits, o.alpha, o.p, o.filter, o.center)
    terms = preferring(s, z_m, z_f) if o.pair_from is None else dipo_terms(s, o)
    kept = _at_least_float32(s.ref_logits.detach())  # logits of pi*: what shall stand there in the end
    if s.role == "forget":
        in_memory = torch.ones_like(terms.value, dtype=torch.bool) if s.memory is None else s.memory
        kept = torch.where(in_memory[..., None], z_f, kept)
        swapped = None if terms.swapped is None else terms.swapped & in_memory
        terms = terms._replace(value=terms.value.where(in_memory, 0.0), swapped=swapped)
    return terms._replace(anchor=token_kl(_log_softmax(kept), _log_softmax(s.logits)))


def token_nll(logits: Tensor, targets: Tensor | None) -> Tensor:
    """-log p of each target token: logits [..., V], targets [...] int64 -> [...]."""
    assert targets is not None, "targets are needed: this loss is one of the answer's tokens"
    z = _at_least_float32(logits)
    return z.logsumexp(-1) - z.gather(-1, targets[..., None]).squeeze(-1)


def nll_terms(s: Positions, o: Objective) -> Terms:
    """-log pi_theta(y_t | s_t): maximum likelihood."""
    nll = token_nll(s.logits, s.targets)
    return Terms(nll, nll)


def ascent_terms(s: Positions, o: Objective) -> Terms:
    """log pi_theta(y_t | s_t): gradient ascent on what `nll_terms` descends."""
    nll = token_nll(s.logits, s.targets)
    return Terms(-nll, nll)


def gap_terms(s: Positions, o: Objective) -> Terms:
    """log pi_ref(y_t | s_t) - log pi_theta(y_t | s_t): by how much the token has become less likely."""
    assert s.ref_logits is not None
    nll = token_nll(s.logits, s.targets)
    return Terms(nll - token_nll(s.ref_logits.detach(), s.targets), nll)


def kl_terms(s: Positions, o: Objective) -> Terms:
    """KL(pi_ref || pi_theta), answer positions only (the TOFU authors' code averages over prompt and padding too)."""
    assert s.ref_logits is not None
    return Terms(token_kl(_log_softmax(s.ref_logits.detach()), _log_softmax(s.logits)))


def anchored_gap_terms(s: Positions, o: Objective) -> Terms:
    """`gap_terms` at memory positions, the anchor KL(pi_ref || pi_theta) at the others: what is left of `anchored_terms`
    without DiPO's pair. Our control. NPO pushes 40 times harder than DiPO at the start, so the same kappa weighs less."""
    terms, kept = gap_terms(s, o), kl_terms(s, o).value
    if s.memory is None:
        return terms._replace(anchor=torch.zeros_like(kept))
    return terms._replace(value=terms.value.where(s.memory, 0.0), anchor=kept.where(~s.memory, 0.0))


def weighted_ascent_terms(s: Positions, o: Objective) -> Terms:
    """p^beta log p of the target, p^beta a constant weight: ascent that lets go of what has become unlikely."""
    nll = token_nll(s.logits, s.targets)
    return Terms((-s.beta * nll.detach()).exp() * -nll, nll)


def undial_terms(s: Positions, o: Objective) -> Terms:
    """Cross-entropy with softmax(z_ref - beta at the target): distillation to the reference with its answer lowered."""
    assert s.ref_logits is not None and s.targets is not None
    lowered = _at_least_float32(s.ref_logits.detach())
    lowered = lowered.scatter_add(-1, s.targets[..., None], torch.full_like(lowered[..., :1], -s.beta))
    return Terms(-(lowered.softmax(-1) * _log_softmax(s.logits)).sum(-1))


# -------------------------------------------------------------------------------------------------- the table of losses


@dataclass(frozen=True)
class Loss:
    """A row of LOSSES: all that there is to know of a loss. CONTRIBUTING.md has the recipe for another one.

    S = the sum over a sequence of `term`;  S = S / length if reduction is 'mean';  S = S - that of the refusal, if any
    the sequence's loss = loss(beta S, beta) if the row has a `loss`, else S;  + kappa A if it is anchored, A the sum over
        the sequence of the terms' `anchor`, a mean where S is one
    """

    term: Callable[[Positions, Objective], Terms]  # what one position adds
    source: str  # equation or paper
    loss: Callable[[Tensor, float], Tensor] | None = None  # u = beta S [B], beta -> losses [B]
    beta: float = 0.0  # default; 0: there is none
    roles: tuple[str, ...] = ("forget",)  # the sets that it makes sense on
    reference: bool = False  # needs ref_logits
    mean_over: str = "sequences"  # or 'tokens': what the batch's mean is over
    reduction: str | None = "sum"  # of a sequence's positions: 'sum', 'mean', or None: what the objective says
    pair: bool = False  # built on pi_m and pi_f: its margins are logged, swapped roles refused
    refusals: bool = False  # each answer has a refusal of the same question behind it
    anchored: bool = False  # forgets memory positions only, and its terms have an anchor: ours

    def __post_init__(self):
        assert self.mean_over in ("sequences", "tokens") and self.reduction in ("sum", "mean", None), f"{self} is no loss"
        assert self.roles and {*self.roles} <= {*ROLES} and (self.loss is None or self.beta), f"{self} is no loss"
        assert not self.anchored or (self.loss and not self.refusals), f"{self} is no loss"

    def divisor(self, sequences: int, tokens: int) -> int:
        """What the sum of a batch's losses is divided by; the tokens are those of answers, refusals do not count."""
        return {"sequences": sequences, "tokens": tokens}[self.mean_over]


LOSSES: dict[str, Loss] = {
    "dipo": Loss(
        dipo_terms, "Eq. 14", lambda u, beta: bradley_terry_loss(u), 0.05, ROLES, reference=True, pair=True, reduction=None
    ),
    "anchored": Loss(
        anchored_terms,
        "anchored DiPO, ours",
        lambda u, beta: bradley_terry_loss(u),
        0.05,
        ROLES,
        reference=True,
        pair=True,
        reduction=None,
        anchored=True,
    ),
    "npo": Loss(gap_terms, "NPO, arXiv 2404.05868", negative_preference_loss, 0.1, reference=True),
    "anchored-npo": Loss(
        anchored_gap_terms, "ours: NPO in anchored's frame", negative_preference_loss, 0.1, reference=True, anchored=True
    ),
    # with its margin gamma at 0, as both its code and open-unlearning have it
    "simnpo": Loss(nll_terms, "SimNPO, arXiv 2410.07163", negative_preference_loss, 4.5, reduction="mean"),
    # prefers "I don't know" to the answer: open-unlearning's IdkDPO
    "dpo": Loss(gap_terms, "DPO, arXiv 2305.18290", negative_preference_loss, 0.1, reference=True, refusals=True),
    "ga": Loss(ascent_terms, "gradient ascent", mean_over="tokens"),
    # open-unlearning's mean is over padding too
    "undial": Loss(undial_terms, "UNDIAL, arXiv 2402.10052", beta=10.0, reference=True, mean_over="tokens"),
    "wga": Loss(weighted_ascent_terms, "WGA, arXiv 2502.19301", beta=1.0, mean_over="tokens"),
    "gd": Loss(nll_terms, "gradient descent", roles=("retain",), mean_over="tokens"),
    "kl": Loss(kl_terms, "D_SeqKL(pi_ref || pi_theta)", roles=("retain",), reference=True, mean_over="tokens"),
}
FINETUNING = {"finetune": ("gd", 1.0)}  # in place of `Objective.parts`: maximum likelihood on one set


def loss_named(name: str) -> Loss:
    """A row of LOSSES. Raises ValueError for a name that is not there."""
    if name not in LOSSES:
        raise ValueError(f"loss {name!r} is none of {', '.join(LOSSES)}")
    return LOSSES[name]


def loss_names(role: str) -> tuple[str, ...]:
    return tuple(name for name, row in LOSSES.items() if role in row.roles)


def position_terms(
    name: str, role: str, objective: Objective,
    logits: Tensor, ref_logits: Tensor | None = None, targets: Tensor | None = None, memory: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The chunked form, which trains: (term, -log p of the target without gradient, swapped, anchor), [...] each.

    To train: train.compute_gradients = this, chunk by chunk, each sequence's sum, `losses_of_sums`.
    To read:  `sequence_losses`       = this, of all positions,     masked sums,     `losses_of_sums`.
    Without targets the second is zero, without an anchor the last. memory: as in `Positions`, of anchored losses. Raises
    ValueError for an unknown loss, or one whose reference is missing.
    """
    row = loss_named(name)
    if row.reference and ref_logits is None:
        raise ValueError(f"loss {name!r} needs the reference's logits")
    positions = Positions(logits, ref_logits, targets, role, objective.beta_of(name), memory)
    value, nll, swapped, anchor = row.term(positions, objective)
    if nll is None:
        nll = torch.zeros_like(value) if targets is None else token_nll(logits.detach(), targets)
    swapped = torch.zeros_like(value, dtype=torch.bool) if swapped is None else swapped
    return value, nll.detach(), swapped, torch.zeros_like(value) if anchor is None else anchor


def losses_of_sums(
    name: str, objective: Objective, sums: Tensor, lengths, anchors: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(losses [B], u = beta S [B] or None) from each sequence's sums of `position_terms`, of terms and of anchors [B], and
    its length (a tensor or a list). Where a loss has refusals, answers and refusals take turns, and [B / 2] come out.
    """
    row, beta, reduction = loss_named(name), objective.beta_of(name), loss_named(name).reduction or objective.reduction
    assert reduction in ("sum", "mean"), f"reduction {reduction!r} is neither 'sum' nor 'mean'"
    if reduction == "mean":
        lengths = torch.as_tensor(lengths, device=sums.device).clamp(min=1)
        sums, anchors = sums / lengths, None if anchors is None else anchors / lengths
    if row.refusals:
        sums = sums[::2] - sums[1::2]
    if row.loss is None:
        return sums, None
    u = beta * sums
    losses = row.loss(u, beta)
    return losses if anchors is None or not row.anchored else losses + objective.kappa * anchors, u


def sequence_losses(
    name: str, logits: Tensor, mask: Tensor, *, ref_logits: Tensor | None = None, targets: Tensor | None = None,
    role: str = "forget", beta: float | None = None, memory: Tensor | None = None, **pair
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """The whole-sequence form, for reading and for other programs: (losses [B], u [B] or None, swapped [B, T]).

    beta: None for the row's own. pair: alpha, p, filter, center, pair_from, reduction, kappa, as in `Objective`. memory:
    [B, T] bool, the positions that an anchored loss forgets; None: all. Raises ValueError as `position_terms`.
    """
    _check(mask, logits, *(() if ref_logits is None else (ref_logits,)))
    if targets is not None:
        assert targets.shape == mask.shape, f"targets {tuple(targets.shape)} and mask {tuple(mask.shape)} differ"
    assert memory is None or memory.shape == mask.shape, f"memory {tuple(memory.shape)} and mask {tuple(mask.shape)} differ"
    objective = Objective(forget_loss=name, beta=beta, **pair)
    value, _, swapped, anchor = position_terms(name, role, objective, logits, ref_logits, targets, memory)
    sums = _masked_sum(value, mask), mask.sum(-1), _masked_sum(anchor, mask)
    losses, margins = losses_of_sums(name, objective, *sums)
    return losses, margins, swapped & mask


def dipo_loss(logits: Tensor, ref_logits: Tensor, mask: Tensor, role: str = "forget", beta: float = 0.05, **pair) -> Tensor:
    """The DiPO loss of each sequence, for other programs -> [B]. The paper's objective is the mean of
    dipo_loss(role='forget') over forget sequences plus lambda times that of dipo_loss(role='retain') over retain sequences.

    pair: as in `sequence_losses`. Raises SwappedRolesError where raw logits would make it train in the wrong direction.
    """
    losses, _, swapped = sequence_losses("dipo", logits, mask, ref_logits=ref_logits, role=role, beta=beta, **pair)
    check_roles(int(swapped.sum()), int(mask.sum()))
    return losses
