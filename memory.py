"""Memory positions, ours: the tokens of a forget answer that the model knows and that nothing that may be kept explains.

Position t is memory if log pi_ref(y_t | s_t) - log g(y_t | s_t) > tau: the reference is surer of the answer's token, by more
than tau nats, than what the retain set and the question explain. Names, dates and titles are memory; "was born in" and what
the question says are not. No second model and no labels: one pass of the model over the forget set, one of counting over the
retain set.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from tqdm import tqdm

from data import DataError, Example, pack
from dipo import token_nll
from model import CHUNK, Llama

CONTEXT = 4  # tokens that the n-gram looks back, at most
NEAREST = 32  # retain questions that are most like one
COPY = -1  # the token in place of what an answer copies from its question
COPIED = 0.9  # a token of the question explains itself
FLOOR = 0.02  # nothing is less explained than that: at tau = 1.5 nats the reference must give a memory token 0.09 or more


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


def prompt(example: Example) -> tuple[int, ...]:
    return example.ids[: example.prompt_length]


def shared(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all prompts begin with."""
    if not prompts:
        return 0
    low, high = min(prompts), max(prompts)  # what the first and the last in order share, all between them do
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


class Explanation:
    """g, a predictor of answer tokens made of what may be kept: the retain set, and the question itself.

    Two n-grams, of all retain examples and of those whose questions are most like this one: how the retain set speaks, and
    how it answers *such* questions. Ours, because after the name of somebody unknown the first alone explains no word, and
    the model would have to forget "was born in" with the place.
    """

    def __init__(self, retain: Sequence[Example], vocab_size: int):
        self.retain, self.vocab_size = sorted(retain, key=lambda e: e.ids), vocab_size  # so that their order decides nothing
        # The prompt's format, around the question, is what all prompts have in common at both ends.
        prompts = [*map(prompt, self.retain)] if len({*map(prompt, self.retain)}) > 1 else []
        self.head, self.tail = shared(prompts), shared([p[::-1] for p in prompts])
        self.ngram = self.ngram_of(self.retain)
        seen = Counter(token for e in self.retain for token in self.question(e))
        # Weights of words, as a search engine has them; those of most questions have none.
        self.weight = {t: math.log(len(self.retain) / n) for t, n in seen.items() if n <= len(self.retain) / 2}
        self.words = [self.question(e) & self.weight.keys() for e in self.retain]

    def question(self, example: Example) -> set[int]:
        """The tokens of the question, without the prompt's format."""
        return {*prompt(example)[self.head : max(self.head, example.prompt_length - self.tail)]}

    def without_copies(self, example: Example) -> list[int]:
        """The ids, with one COPY in place of each run of answer tokens that stand in the question: "COPY was born in" is
        said of anybody."""
        ids, asked = list(prompt(example)), self.question(example)
        for token in example.ids[example.prompt_length :]:
            if token not in asked:
                ids.append(token)
            elif ids[-1] != COPY:
                ids.append(COPY)
        return ids

    def ngram_of(self, examples: Iterable[Example]) -> NGram:
        return NGram(map(self.without_copies, examples), self.vocab_size + 1)  # COPY is one more token

    def nearest(self, example: Example) -> list[Example]:
        """The NEAREST retain examples by the weight of the words that both questions have, over that of all they have; none
        that shares nothing."""
        asked = self.question(example) & self.weight.keys()

        def likeness(words: set[int]) -> float:
            both, either = (math.fsum(self.weight[t] for t in x) for x in (asked & words, asked | words))
            return both / either if either else 0.0

        likenesses = [likeness(words) for words in self.words]
        alike = [i for i, x in enumerate(likenesses) if x > 0]
        return [self.retain[i] for i in sorted(alike, key=lambda i: -likenesses[i])[:NEAREST]]

    def of(self, example: Example) -> list[float]:
        """g(y_t | s_t) of each answer token: COPIED where it stands in the question, else the larger of the two n-grams, but
        not less than FLOOR."""
        ngrams, asked = (self.ngram, self.ngram_of(self.nearest(example))), self.question(example)
        before, found = list(prompt(example)), list[float]()
        for token in example.ids[example.prompt_length :]:
            if token in asked:
                found.append(COPIED)
                before += [COPY] * (before[-1] != COPY)
            else:
                found.append(max(FLOOR, *(ngram.probability(before, token) for ngram in ngrams)))
                before.append(token)
        return found


@torch.no_grad()
def answer_nll(model: Llama, example: Example) -> list[float]:
    """-log p of each answer token. The sequence is read alone, so that nothing depends on what shares a batch with it."""
    batch, chunk = pack([example]).to(model.device), max(1, CHUNK // model.config.vocab_size)
    pieces = zip(*(x.split(chunk) for x in (model.hidden_states(**batch.inputs), batch.targets)), strict=True)
    return [loss for hidden, targets in pieces for loss in token_nll(model.lm_head(hidden), targets).tolist()]


def mark(model: Llama, forget: Sequence[Example], explained: Callable[[Example], list[float]], tau: float) -> list[Example]:
    """The forget examples with their memory positions marked. model: the reference. explained(example): g(y_t | s_t)."""
    marked = []
    for example in tqdm(forget, desc="memory positions", unit="sequence", leave=False):
        nll = answer_nll(model, example)
        surprise = [-loss - math.log(g) for loss, g in zip(nll, explained(example), strict=True)]
        marked.append(dataclasses.replace(example, memory=tuple(x > tau for x in surprise)))
    return marked


def mark_memory(model: Llama, forget: Sequence[Example], retain: Sequence[Example], tau: float) -> list[Example]:
    """`mark` by what the retain set explains."""
    return mark(model, forget, Explanation(retain, model.config.vocab_size).of, tau)


def memory_record(marked: Sequence[Example], tau: float) -> dict:
    """What RUN/memory.json holds: tau, the share of the answers' tokens, and each answer's positions, counted from 0. Raises
    DataError where two examples have one key."""
    flags = [m for e in marked for m in e.memory or ()]
    rows = {e.key: [i for i, m in enumerate(e.memory or ()) if m] for e in marked}
    if len(rows) < len(marked):
        raise DataError("two rows of the forget set have the same key; rename one of the files")
    return {"tau": tau, "share": sum(flags) / max(1, len(flags)), "rows": rows}
