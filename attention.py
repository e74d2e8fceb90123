"""Attention over sequences that stand back to back in one row, without padding, and over beginnings that they share.

Shapes: N positions of all sequences together, H query heads, G key/value heads, K head size.
"""

import copy
import inspect
import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from gpu import has_flash, onto

T = TypeVar("T")
SHARED = 8  # tokens that sequences begin with alike are computed once from so many on
GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters  # since torch 2.12; before, keys are repeated


class Packing:
    """Sequences back to back in one row: each attends causally to itself, and to all of those that it follows."""

    def __init__(self, lengths: Sequence[int], device: torch.device, after: Sequence[int] | None = None):
        """after: of each sequence, which earlier one it follows, and so all that this one follows, or -1 (default: none)."""
        self.lengths, paths = tuple(lengths), list[list[int]]()
        for i, parent in enumerate(after or [-1] * len(self.lengths)):
            paths.append([*(paths[parent] if parent >= 0 else ()), i])
        keys = [sum(self.lengths[i] for i in path) for path in paths]
        self.longest, self.longest_keys, self.paths, self.flash = max(self.lengths), max(keys), paths, has_flash(device)
        ends, key_ends = ([0, *itertools.accumulate(x)] for x in (self.lengths, keys))
        self.borders = torch.tensor(ends, dtype=torch.int32, device=device)  # [B + 1], of queries
        self.key_borders, self.rows = self.borders, None  # of keys; which of the N stand there, None: all
        if ends != key_ends:
            rows = [row for path in paths for i in path for row in range(ends[i], ends[i + 1])]
            self.key_borders = torch.tensor(key_ends, dtype=torch.int32, device=device)
            self.rows = torch.tensor(rows, device=device)

    def to(self, device: str | torch.device) -> "Packing":
        moved = copy.copy(self)
        vars(moved).update({name: onto(x, device) for name, x in vars(self).items() if isinstance(x, Tensor)})
        moved.flash = has_flash(torch.device(device))
        return moved

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, H, N, K], k and v [1, G, N, K] -> [1, H, N, K]."""
        # The kernel takes head sizes in steps of 8 up to 256, and above 192 not every card has its backward pass.
        if self.flash and q.dtype in (torch.bfloat16, torch.float16) and q.shape[3] % 8 == 0 and q.shape[3] <= 192:
            how: dict[str, Any] = {"window_size": (-1, 0)} | ({"enable_gqa": True} if GROUPED else {})
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            if self.rows is not None:  # not by indexing, whose gradient is summed up in bfloat16 where it is compiled
                k, v = (F.embedding(self.rows, x.flatten(1)).unflatten(1, x.shape[1:]) for x in (k, v))
            if q.shape[1] != k.shape[1] and not GROUPED:
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            # Where a sequence has more keys than queries, the kernel aligns causality at the ends of both.
            ends = self.borders, self.key_borders, self.longest, self.longest_keys
            return cast(Tensor, varlen_attn(q, k, v, *ends, **how)).transpose(0, 1)[None]
        return self._one_by_one(q, k, v)

    @torch.compiler.disable  # the lengths are another at every step: nothing to compile for
    def _one_by_one(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # On CPUs the backward pass of bfloat16 attention takes three times as long as that of float32.
        wide = torch.promote_types(q.dtype, torch.float32)
        queries, *seen = (x.to(wide).split(self.lengths, dim=2) for x in (q, k, v))
        keys, values = (
            [torch.cat([x[i] for i in path], 2) if path[1:] else x[path[0]] for path in self.paths] for x in seen
        )
        return torch.cat([*map(causal_attention, queries, keys, values)], dim=2).to(q.dtype)


def lay(sequences: Sequence[Sequence[T]], share: bool = True) -> tuple[list[T], list[list[int]], Packing]:
    """(one row of N tokens with their positions, where in it those of each sequence stand, how they attend). share: what
    several begin with, `SHARED` tokens or more, stands there once, and the rest of each follows it: what they compute is the
    same but for rounding."""
    tokens, lengths, after = list[T](), list[int](), list[int]()
    rows: list[list[int]] = [[] for _ in sequences]
    left = [([*range(len(sequences))], 0, -1)]  # some that are alike up to a position, and the part that ends there
    while left:
        some, start, parent = left.pop()
        alike = defaultdict(list)
        for i in some:
            if len(sequences[i]) > start:
                alike[tuple(sequences[i][start : start + SHARED]) if share else i].append(i)
        for group in alike.values():
            tails = [sequences[i][start:] for i in group]
            same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*tails, strict=False))
            own = [column[0] for column in same] if group[1:] else [*tails[0]]
            for i in group:
                rows[i] += range(len(tokens), len(tokens) + len(own))
            left.append((group, start + len(own), len(lengths)))
            tokens += own
            lengths.append(len(own))
            after.append(parent)
    return tokens, rows, Packing(lengths, torch.device("cpu"), after)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of queries that stand at the end of the keys."""
    (t, n), grouped = (q.shape[2], k.shape[2]), q.shape[1] != k.shape[1]
    if t < n < 2 * t:  # a mask costs all of t x n, causality half of n x n
        return causal_attention(F.pad(q, (0, 0, n - t, 0)), k, v)[:, :, n - t :]
    mask = None if t in (1, n) else torch.ones(t, n, dtype=torch.bool, device=q.device).tril(n - t)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=t == n, enable_gqa=grouped)
