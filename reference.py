"""The frozen reference pi_ref of the losses that compare the policy with its start.

Both kinds give the same numbers: final hidden states at answer positions, and the output `head` that makes logits of them.
"""

import itertools
import math
import os
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import distributed
from checkpoint import RunError
from data import Example, pack
from model import Llama, whole

IN_MEMORY = 2**32  # bytes of stored states; what is larger lies in a file of the run folder
ON_GPU = 0.02  # of its memory: states that take no more stay there. Our choice: a step hardly misses it


class CachedReference:
    """The frozen start without a second model: at step 0 the policy *is* the reference.

    One pass stores its final hidden states at the answer positions, [positions, D] in the compute dtype, so that
    z_ref = states times the initial output head is what a second model would compute. On a GPU up to ON_GPU, else in
    host memory, or past IN_MEMORY in a memory-mapped file that is gone when the process ends. Raises RunError where there
    is no room for it.
    """

    def __init__(self, model: Llama, examples: list[Example], micro_batch_size: int, file: Path):
        """file: where to map the states, if they do not fit into memory."""
        examples = list(dict.fromkeys(examples))
        starts = [0, *itertools.accumulate(e.answer_length for e in examples)]
        self.rows = {e: slice(*ends) for e, ends in zip(examples, itertools.pairwise(starts), strict=True)}
        self.device = model.device
        self.head = whole(model.lm_head.weight.detach()).to(model.compute_device, model.compute_dtype, copy=True)
        shape = starts[-1], model.config.hidden_size
        size = math.prod(shape) * self.head.element_size()
        gpu, place = self.device.type == "cuda", "in memory"
        if keeps(size, self.device):
            place, self.states = "on the GPU", torch.empty(shape, dtype=self.head.dtype, device=self.device)
        elif size > IN_MEMORY:
            place = f"in a file of {file.parent}"
            try:
                file.unlink(missing_ok=True)  # it could be a link
                with file.open("xb") as f:
                    reserve(f.fileno(), size)
                states = torch.from_file(str(file), True, math.prod(shape), dtype=self.head.dtype)
                self.states = states.view(shape)
            except OSError as e:
                remedy = "free some space, or pass --reference recompute and another --out"
                raise RunError(f"{file}: no room for {size:,} bytes ({e.strerror}); {remedy}") from None
            finally:
                file.unlink(missing_ok=True)  # the mapping keeps it until the process ends, however that is
        else:
            self.states = torch.empty(shape, dtype=self.head.dtype, pin_memory=gpu)  # to be copied while the GPU computes
        print(f"reference: final hidden states at {shape[0]:,} answer positions, {size / 1e6:,.0f} MB {place}", flush=True)
        # Not under no_grad: compiled for training, the model rounds in other places than compiled for inference.
        with tqdm(total=len(examples), desc="reference", unit="sequence", leave=False) as bar:
            for i in range(0, max(distributed.gather(len(examples))), micro_batch_size):  # as many passes on all ranks
                part = examples[i : i + micro_batch_size]
                states = model.hidden_states(**pack(part or examples[:1]).to(model.device).inputs).detach()
                if part:
                    self.states[self.rows[part[0]].start : self.rows[part[-1]].stop] = states
                bar.update(len(part))

    def answer_states(self, examples: list[Example]) -> Tensor:
        """[A, D] on the model's device: the states at the answer positions of these examples."""
        parts = [self.states[self.rows[e]] for e in examples]
        if self.states.device == self.device:
            return torch.cat(parts)
        found = parts[0].new_empty(sum(map(len, parts)), parts[0].shape[1], device=self.device)
        for place, part in zip(found.split([*map(len, parts)]), parts, strict=True):
            place.copy_(part.pin_memory(), non_blocking=True)  # the file's are not yet
        return found


def keeps(size: int, device: torch.device) -> bool:
    """Whether states of so many bytes stay where they were computed."""
    return device.type == "cuda" and size <= ON_GPU * torch.cuda.mem_get_info(device)[1]


def reserve(file: int, size: int) -> None:
    """Makes an open file so many bytes long. Raises OSError where the disk has no room, on systems that can tell."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:  # macOS
        os.truncate(file, size)


class RecomputedReference:
    """The plain way: a frozen copy of the model, and a second forward pass at every step."""

    def __init__(self, model: Llama):
        self.model = model.frozen_copy()
        self.head = self.model.lm_head.weight

    @torch.no_grad()
    def answer_states(self, examples: list[Example]) -> Tensor:
        return self.model.hidden_states(**pack(examples).to(self.model.device).inputs)


Reference = CachedReference | RecomputedReference
