"""What a training step takes: bytes of one rank, counted from config.json and the flags alone, and what fits on which card.

python train.py --plan --model llama2-7b --world-size 8     one model: where the bytes go, and the largest micro-batches
"""

import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint import RunError
from config import AUTO, Config, Plan
from dipo import LOSSES
from eval import resolve_model
from gpu import device_memory, free_on_gpu
from model import LlamaConfig, chunk_positions, read_config, resolve_folder

CARDS = (24, 80, 141)  # GB, 1e9 bytes; they have 7 % more, which is left to CUDA and the allocator
CGROUPS = (  # v2, v1
    ("sys/fs/cgroup/", "memory.max", "memory.current", "inactive_file"),
    ("sys/fs/cgroup/memory/", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
SPARE = 0.9  # of the memory that is free: what a micro-batch chosen here may take
FLAGS = {"c": "--gradient-checkpointing", "8": "--optimizer adamw8bit", "o": "--cpu-offload"}
WAYS = "", "c", "8", "8c", "oc", "o"  # the table tells the first that fits
LLAMA3 = LlamaConfig(vocab_size=128256, num_key_value_heads=8)
TIED = dataclasses.replace(LLAMA3, tie_word_embeddings=True)
SHAPES = {  # known without their config.json
    "llama3.2-1b": dataclasses.replace(TIED, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64),
    "llama3.2-3b": dataclasses.replace(
        TIED, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24
    ),
    **dict.fromkeys(("llama2-7b", "muse-news", "muse-books"), LlamaConfig()),
    "llama3.1-8b": dataclasses.replace(LLAMA3, intermediate_size=14336),
    "llama2-13b": LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40
    ),
    "llama2-70b": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    ),
}
# Bytes per logit of loss and gradient at their fullest, head included, by bench/memory.py's kind of measurement:
# {loss: eager float32, bfloat16, compiled float32, bfloat16}; the others have REST.
LOGIT = {"dipo": (36, 32, 16, 12), "anchored": (45, 42, 21, 20), "anchored-npo": (29, 29, 21, 20), "kl": (29, 25, 12, 8)}
REST = (24, 20, 12, 8)


class Pass(NamedTuple):
    """What one forward and backward pass reads."""

    tokens: int
    answers: int  # positions that predict an answer token
    alike: int  # of these, of the set that has more: losses are of one set at a time
    first: bool = False  # of its step: there are no gradients yet


class Machine(NamedTuple):
    """What a step runs on, beside the settings."""

    card: float = 0.0  # bytes of a GPU, 0 for a CPU
    world: int = 1  # ranks that share parameters, gradients and moments, by rows
    cpu_offload: bool = False  # parameters, gradients and moments lie in host memory


Shapes = list[tuple[int, ...]]


def parameters(c: LlamaConfig) -> tuple[Shapes, Shapes]:
    """The shapes of the parameters of (a block, all that is outside of the blocks)."""
    d, f, q, g = c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    block = [(q, d), (g, d), (g, d), (d, q), (f, d), (f, d), (d, f), (d,), (d,)]
    return block, [(c.vocab_size, d)] * (2 - c.tie_word_embeddings) + [(d,)]


def count(c: LlamaConfig, world: int = 1, each=math.prod) -> int:
    """Sum of `each` over what the first of so many ranks holds of each tensor: ceil(rows / world)."""
    block, root = ([each((-(-rows // world), *rest)) for rows, *rest in shapes] for shapes in parameters(c))
    return c.num_hidden_layers * sum(block) + sum(root)


def moments(config: Config, shape: tuple[int, ...]) -> int:
    """Bytes of the optimizer's state for one tensor; 8-bit: two bytes a number and two float32 for each 256."""
    n = math.prod(shape)
    return n * 65 // 32 if config.optimizer == "adamw8bit" and n >= 4096 and n % 256 == 0 else 8 * n


def ways(config: Config, machine: Machine) -> tuple[int, bool]:
    """(bytes of an activation, whether it is compiled). Where no flag says, `train.worth_compiling` does, by the length of
    the run; until that is known eager is counted, which takes more."""
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and machine.card > 0)
    return 2 if half else 4, bool(config.compile)


def kept_of_block(c: LlamaConfig, size: int, wide: int, compiled: bool) -> int:
    """Bytes per token that the backward pass keeps of a block: norms, what goes into matrices, attention, the MLP's middle.
    size: bytes of an activation; wide: of those of attention."""
    d, f, q, g = c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    norms = 4 * size * d if compiled else 16 * d + 2 * size * d
    return norms + size * (q + (3 if compiled else 4) * f) + 2 * wide * (q + g) + 4 * c.num_attention_heads + 8


def step(c: LlamaConfig, config: Config, work: Pass, machine: Machine) -> dict[str, int]:
    """{what: bytes} on a rank's device at the fullest moment of a pass: in its loss, or at the end of its backward pass.
    Counted from model.py and train.compute_gradients; bench/memory.py compares it with what is measured."""
    (n, answers, alike, first), d, f = work, c.hidden_size, c.intermediate_size
    size, compiled = ways(config, machine)
    cast = 0 if size == 4 else size  # what `Linear` makes of each number of a weight
    wide = size if machine.card else 4  # attention's, which is float32 on CPUs
    block, root = (sum(map(math.prod, shapes)) for shapes in parameters(c))
    head, layers = c.vocab_size * d, c.num_hidden_layers
    kept = kept_of_block(c, size, wide, compiled)
    shared, here = machine.world > 1 or machine.cpu_offload, 0 if machine.cpu_offload else 1
    cast_block = 0 if shared else cast * block  # blocks that are split are gathered as they are used
    blocks, casts = layers * kept * n, layers * cast_block
    rounded = 0 if machine.card else cast  # of the gradient of a float32 weight; FSDP casts those of blocks before
    own = (4 + (cast if shared else rounded)) * d * f  # the gradient of one matrix
    backward = n * (3 * size * f + 12 * d) + own  # beside it: gradients within a block
    if config.gradient_checkpointing:
        blocks, casts, backward = layers * size * d * n, 0, backward + kept * n + cast_block
    around = n * size * (2 * c.head_dim + d) + answers * d * (8 + 3 * size)  # positions, embedding, final norm and head
    rows = [name for name, _ in config.parts.values()]
    logits = min(alike, chunk_positions(c.vocab_size, machine.card)) * c.vocab_size
    dense = max(LOGIT.get(name, REST)[2 * compiled + (size == 2)] for name in rows)
    loss = cast * head + max(dense * logits, 2 * size * logits + (4 + rounded) * head)
    reference = 0
    if any(LOSSES[name].reference for name in rows):
        reference = size * (count(c) if config.reference == "recompute" else head)
    held = 4 * count(c, machine.world) * here
    fixed = {
        "parameters": held,
        "moments": count(c, machine.world, lambda shape: moments(config, shape)) * here,
        # FSDP's: the root stays whole, beside it the block that is worked on and the next, with their gradients
        "gathered parameters and gradients": (8 * root + (16 if size == 4 else 10) * block) * shared,
        "reference's head" if config.reference == "cached" else "reference": reference,
    }
    early = held if not first else 0 if shared else 4 * head
    moments_of = (
        {"gradients": early, "cast weights": casts, "activations": blocks + around, "loss": max(loss, backward)},
        {"gradients": held, "cast weights": 0, "activations": around, "loss": 4 * head},
    )
    return fixed | max(moments_of, key=lambda moment: sum(moment.values()))


def largest(c: LlamaConfig, config: Config, groups: Sequence[tuple[int, int]], free: float, machine: Machine) -> int:
    """The groups that share a pass so that a step takes the fewest passes in `free` bytes, 0 where not even one fits.

    groups: (tokens, answer positions) of those of a rank's step; the longest may come together.
    """
    tokens, answers = ([0, *itertools.accumulate(sorted(x, reverse=True))] for x in zip(*groups, strict=True))
    for size in sorted({-(-len(groups) // passes) for passes in range(1, len(groups) + 1)}, reverse=True):
        alike = answers[min(size, -(-config.batch_size // machine.world))]
        work = Pass(tokens[size], answers[size], alike, size == len(groups))
        if sum(step(c, config, work, machine).values()) <= free:
            return size
    return 0


# ------------------------------------------------------------------------------------------------ --micro-batch-size auto


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that a process could have more of: of the GPU, or of the machine and, where it has a limit, of the container.
    Raises RunError where the system does not tell."""
    if device.type == "cuda":
        return free_on_gpu(device)

    def number(path: str, name: str = "") -> int:
        found = None
        with contextlib.suppress(OSError):
            found = re.search(rf"^{name}\D*(\d+)", (root / path).read_text(), re.M)
        return int(found[1]) if found else 0

    if not (left := 1024 * number("proc/meminfo", "MemAvailable")):
        raise RunError("--micro-batch-size auto: this system does not tell what is free; pass a number")
    for group, limit, used, inactive in CGROUPS:
        if most := number(group + limit):  # what is read from files counts as used, and is given up
            left = min(left, most - number(group + used) + number(f"{group}memory.stat", inactive))
    return max(0, left)


def groups_of(config: Config, examples: dict[str, list]) -> list[tuple[int, int]]:
    """(tokens, answer positions) of the longest groups that a step may have. examples: as `train.draw_parts` takes them."""
    found = []
    for role, (name, _) in config.parts.items():
        longest = [max(x, key=lambda e: len(e.ids)) for x in examples["refusals"]] if LOSSES[name].refusals else []
        rows = list(zip(examples[role], longest, strict=True)) if longest else [(e,) for e in examples[role]]
        sizes = [(sum(len(e.ids) - 1 for e in row), sum(e.answer_length for e in row)) for row in rows]
        repeated = 1 - (1 - config.batch_size) // len(sizes)  # orders of the set that a step may see
        found += sorted(sizes * repeated, reverse=True)[: config.batch_size]
    return sorted(found, reverse=True)


def micro_batch_size(config: Config, c: LlamaConfig, examples: dict[str, list], device: torch.device, world: int = 1) -> int:
    """How many groups share a pass: what was asked for or, where that is `auto`, as many as fit; that is printed. The
    parameters lie on the device already, but for `cpu_offload`. Ranks must agree on one answer: their least."""
    if config.micro_batch_size != AUTO:
        return config.micro_batch_size
    groups = groups_of(config, examples)
    groups = groups[: -(-len(groups) // world)]
    machine = Machine(device_memory(device), world, config.cpu_offload and device.type == "cuda")
    free = SPARE * free_memory(device) / (1 if machine.card else world)  # ranks of a CPU share its memory
    free += 0 if machine.cpu_offload else 4 * count(c, world)
    size = max(1, largest(c, config, groups, free, machine))
    print(f"micro-batch: {size} of the {len(groups)} sequences of a step, by {free / 1e9:.3g} GB of memory", flush=True)
    return size


# ------------------------------------------------------------------------------------------------------------------ --plan


def shape_of(config: Config) -> LlamaConfig:
    """Of the model that is named. Raises ModelError as `resolve_model` and `read_config`."""
    if config.model == "toy":
        raise RunError("--plan: the toy's models are made by its first run; name one of their folders with --model")
    if config.model in SHAPES:
        return SHAPES[config.model]
    source = resolve_model(config.model, "base" if config.finetune else "target")
    return read_config(resolve_folder(source, ("config.json", "generation_config.json")))


def groups_asked(config: Config, asked: Plan) -> list[tuple[int, int]]:
    """(tokens, answer positions) of each group of a rank's step, all alike."""
    sizes = [1 + LOSSES[name].refusals for name, _ in config.parts.values()]
    return [(asked.tokens * max(sizes), asked.answers * max(sizes))] * -(-len(sizes) * config.batch_size // asked.world_size)


def fitting(c: LlamaConfig, config: Config, groups: Sequence[tuple[int, int]], way: str, card: int, world: int) -> int:
    """`largest` on so many cards of so many GB, with the flags of one of WAYS."""
    optimizer, machine = "adamw8bit" if "8" in way else "adamw", Machine(1e9 * card, world, "o" in way)
    changed = dataclasses.replace(config, gradient_checkpointing="c" in way, optimizer=optimizer)
    return largest(c, changed, groups, machine.card, machine)


def report(config: Config, asked: Plan) -> str:
    """What a run with these settings needs, as lines of text: a rank's device, what lies elsewhere, and what fits."""
    c, groups = shape_of(config), groups_asked(config, asked)
    on = [Machine(1e9 * x, asked.world_size, config.cpu_offload) for x in ((0,) if config.device == "cpu" else CARDS)]
    micro, machine, chosen = min(config.micro_batch_size, len(groups)), on[len(on) // 2], ""
    if micro == AUTO:  # on the smallest card that holds the run
        sizes = [largest(c, config, groups, m.card or SPARE * free_memory(torch.device("cpu")), m) for m in on]
        machine, micro = next(((m, n) for m, n in zip(on, sizes, strict=True) if n), (on[-1], 1))
        chosen = f" (auto, on {f'a card of {machine.card / 1e9:g} GB' if machine.card else 'this machine'})"
    size, compiled = ways(config, machine)
    tokens, answers = groups[0]
    how = f"{'bfloat16' if size == 2 else 'float32'}, {'compiled' if compiled else 'eager'}, {config.optimizer}"
    losses = " + ".join(name for name, _ in config.parts.values())
    alike = min(micro, -(-config.batch_size // machine.world)) * answers
    needs = step(c, config, Pass(micro * tokens, micro * answers, alike, micro == len(groups)), machine)
    every, states = count(c), 1000 * answers * c.hidden_size * size
    kept = count(c, each=lambda shape: 4 * math.prod(shape) + moments(config, shape))
    compared = any(LOSSES[name].reference for name, _ in config.parts.values()) and config.reference == "cached"
    elsewhere = {
        "state in host memory, a rank": (4 * count(c, asked.world_size) + kept // asked.world_size) * config.cpu_offload,
        "reference's states in host memory, all ranks, for 1,000 sequences": states * compared,
        f"checkpoints on disk, all ranks (--keep {config.keep}, and one while it is written)": (config.keep + 1) * kept,
        "model/ on disk": every * size,
    }

    def table(title: str, rows: dict[str, int]) -> list[str]:
        return [f"\n{title:<76}{'GB':>10}", *(f"  {k:<74}{v / 1e9:>10.3f}" for k, v in rows.items() if v)]

    lines = [
        f"{config.model}: {every:,} parameters; {how}; {losses}",
        f"ranks: {asked.world_size}; sequences of a rank's step: {len(groups)}, {micro} in a pass{chosen}; "
        f"tokens of a sequence: {asked.tokens}, {asked.answers} of them answer",
    ]
    lines += table("a rank's device, at its fullest", needs | {"together": sum(needs.values())})
    lines += table("elsewhere", elsewhere)
    if machine.card:
        lines.append(f"\n{'largest --micro-batch-size on a card of':<56}" + "".join(f"{f'{x} GB':>10}" for x in CARDS))
        for way in WAYS:
            found = [fitting(c, config, groups, way, x, asked.world_size) for x in CARDS]
            flags = " ".join(FLAGS[mark] for mark in way)
            lines.append(f"  {flags or '(none of these)':<54}" + "".join(f"{x or '-':>10}" for x in found))
    return "\n".join(lines)
