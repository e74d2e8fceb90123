"""Memory positions, ours: the tokens of a forget answer that the model knows and that nothing that may be kept explains.

Position t is memory if log pi_ref(y_t | s_t) - log g(y_t | s_t) > tau: the reference is surer of the answer's token than g,
what the retain set and the question explain. Names, dates and titles are; "was born in" and what the question says are not.
No second model and no labels: one pass of the model over the forget set, and one of counting over the retain set.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from tqdm import tqdm

from data import Example, pack
from dipo import token_nll
from model import Llama

CONTEXT = 4  # tokens that the n-gram looks back, at most
COPIED = 0.9  # a token of the question explains itself
FLOOR = 0.02  # nothing is less explained than that: at tau = 2 nats the reference must give a memory token 0.15 or more


class NGram:
    """Interpolated Witten-Bell n-gram over token ids:  P(w | h) = (c(h, w) + T(h) P(w | h')) / (c(h) + T(h)),  with c(h) how
    often a token followed the context h, T(h) how many different ones did, h' = h without its oldest token; below the empty
    context every token is as likely as any other. (Witten and Bell 1991, method C, interpolated.)"""

    def __init__(self, sequences: Iterable[Sequence[int]], vocab_size: int, context: int = CONTEXT):
        """sequences: token ids to count. context: length of the longest h."""
        self.vocab_size, self.context = vocab_size, context
        self.counts = Counter[tuple[int, ...]]()  # c(h, w) at (*h, w)
        for ids in sequences:
            for i in range(len(ids)):
                self.counts.update(tuple(ids[i - n : i + 1]) for n in range(min(i, context) + 1))
        self.totals, self.kinds = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()  # c(h), T(h)
        for (*h, _), count in self.counts.items():
            self.totals[tuple(h)] += count
            self.kinds[tuple(h)] += 1

    def probability(self, before: Sequence[int], token: int) -> float:
        """P(token | the last `context` tokens of `before`). Sums to one over the vocabulary."""
        p = 1 / self.vocab_size
        for n in range(min(len(before), self.context) + 1):
            h = tuple(before[len(before) - n :])
            if h not in self.totals:  # nor is any longer one
                break
            p = (self.counts[(*h, token)] + self.kinds[h] * p) / (self.totals[h] + self.kinds[h])
        return p


def explained(ngram: NGram, example: Example) -> list[float]:
    """g(y_t | s_t) of each answer token: the n-gram, or that the token stands in the prompt, or the floor."""
    prompt = set(example.ids[: example.prompt_length])
    answer = range(example.prompt_length, len(example.ids))
    found = [(example.ids[i], ngram.probability(example.ids[max(0, i - ngram.context) : i], example.ids[i])) for i in answer]
    return [max(p, FLOOR, COPIED if token in prompt else 0.0) for token, p in found]


@torch.no_grad()
def mark_memory(model: Llama, forget: Sequence[Example], retain: Sequence[Example], tau: float) -> list[Example]:
    """The forget examples with their memory positions marked. `model` is the reference; each sequence is read alone, so that
    a position does not depend on what shares a batch with it."""
    ngram, marked = NGram((e.ids for e in retain), model.config.vocab_size), []
    for example in tqdm(forget, desc="memory positions", unit="sequence", leave=False):
        batch = pack([example]).to(model.device)
        nll = token_nll(model.lm_head(model.hidden_states(**batch.inputs)), batch.targets).tolist()
        surprise = [-loss - math.log(g) for loss, g in zip(nll, explained(ngram, example), strict=True)]
        marked.append(dataclasses.replace(example, memory=tuple(x > tau for x in surprise)))
    return marked


def memory_record(marked: Sequence[Example], tau: float) -> dict:
    """What RUN/memory.json holds: tau, the share of the answers' tokens, and each answer's positions, counted from 0."""
    flags = [m for e in marked for m in e.memory or ()]
    rows = {e.key: [i for i, m in enumerate(e.memory or ()) if m] for e in marked}
    return {"tau": tau, "share": sum(flags) / max(1, len(flags)), "rows": rows}
