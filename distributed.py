"""Several processes as one run: torchrun starts them, PyTorch's FSDP2 splits the model, and here is what lies between.

torchrun --nproc-per-node 8 train.py --forget tofu_forget10 --model llama2-7b        (and eval.py)

Each process (*rank*) does all that a run does, on its share of each step's sequences; the first one also prints and writes.
Tensors go through PyTorch's collectives, everything else as JSON through the store that torchrun keeps. Without torchrun
there is one rank, and each function here gives back at once what it was given.
"""

import contextlib
import datetime
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import files
from files import UserError, first_line
from model import Llama, RMSNorm, whole

BEAT, BEATS = 1.5, 15  # seconds between signs of life; so many without one, and a rank is given up: torchrun needs 30 s more
PATIENCE = 15  # seconds that a collective waits for a rank that lives, but does not come
COMPILING = 600  # the same where blocks are compiled, for each rank compiles for itself
PIECE = 2**21  # letters that are put into the store at a time; it takes 8 MiB, and ends what sends more
T = TypeVar("T")


class RankError(UserError):
    """Another process of the run has failed, or does not answer."""


class Ranks:
    """This process among those of a run. Its thread shows, by way of the store, that it is alive, and watches the others."""

    def __init__(self, store, rank: int, world: int, local: int):
        self.store, self.rank, self.world, self.local = store, rank, world, local
        self.turn = self.meetings = 0
        self.ended = threading.Event()
        self.signs, self.turns = [b""] * world, [0] * world  # each rank's last one, and for how many turns it has been that
        self.watch()
        threading.Thread(target=self._watch, daemon=True).start()

    def watch(self) -> int | None:
        """Show a sign, and look for the others': a rank without a new one in BEATS turns. Turns, not seconds: clocks differ,
        and a machine that sleeps, or is too busy, holds up this process too. One that has yet to come is not missed."""
        self.store.set(f"alive/{self.rank}", repr(time.time()))
        for r in range(self.world):
            if self.store.check([key := f"alive/{r}"]):
                old, self.signs[r] = self.signs[r], self.store.get(key)
                self.turns[r] = self.turns[r] + 1 if old == self.signs[r] else 0
        return next((r for r in range(self.world) if self.turns[r] >= BEATS), None)

    def _watch(self) -> None:
        with contextlib.suppress(RuntimeError):  # torchrun has ended
            while not self.ended.wait(BEAT):
                if (r := self.watch()) is not None and not self.ended.is_set():
                    try:
                        quiet = f"process {r} has shown no sign of life for {BEAT * BEATS:.0f} s"
                        tell(f"error: {lost(TimeoutError(quiet))}", self)
                        sys.stdout.flush()
                    finally:
                        os._exit(2)  # the main thread may be in a collective, which nothing interrupts

    def get(self, key: str, owner: int) -> str:
        """What `owner` sets under a key. Waits in Python, so that signals are heard. Raises RankError where it meets."""
        tries = 0
        while not self.store.check([key]):
            tries += 1
            if tries % 20 == 0 and self.store.check([f"meeting {self.meetings + 1}/{owner}"]):
                raise RankError(lost(InterruptedError(f"process {owner} was interrupted")))
            time.sleep(min(0.05, 0.001 * tries))
        return self.store.get(key).decode()

    def gather(self, value: Any) -> list:
        left, found, more = json.dumps(value), [""] * self.world, True
        while more:
            self.turn += 1
            pieces = self.exchange(f"{self.turn}", [left[:PIECE], len(left) > PIECE])
            found = [x + piece for x, (piece, _) in zip(found, pieces, strict=True)]
            left, more = left[PIECE:], any(m for _, m in pieces)
            if self.turn > 2:  # all have read it, for they have all begun the turn after it
                self.store.delete_key(f"{self.turn - 2}/{self.rank}")
        return [json.loads(x) for x in found]

    def exchange(self, key: str, value: Any) -> list:
        self.store.set(f"{key}/{self.rank}", json.dumps(value))
        return [json.loads(self.get(f"{key}/{r}", r)) for r in range(self.world)]

    def meet(self) -> None:
        self.meetings += 1
        self.turn = max(self.exchange(f"meeting {self.meetings}", self.turn)) + 1


_ranks: Ranks | None = None


def lost(error: BaseException) -> str:
    why = re.sub(r"\[\S*:\d+\] ?", "", first_line(error))  # places in the sources of gloo
    return f"another process of this run has ended, or does not answer ({why}); see its output, then go on with --resume"


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """In its block this process is one of torchrun's, if torchrun has started it. All but the first are silent, and write
    nothing but their part of what is split. Raises RankError where the others cannot be reached."""
    global _ranks
    if _ranks or not dist.is_torchelastic_launched():
        yield
        return
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=datetime.timedelta(minutes=10)))
    except (RuntimeError, ValueError) as e:
        raise RankError(f"torchrun: its store cannot be reached ({first_line(e)}); start with torchrun anew") from None
    # A group that torchrun restarts must not read what the one before it said.
    prefix = f"dipo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    _ranks = Ranks(dist.PrefixStore(prefix, store), rank, world, int(os.environ["LOCAL_RANK"]))
    streams = sys.stdout, sys.stderr
    files.writing = rank == 0
    with open(os.devnull, "w") as nowhere:
        if rank:
            sys.stdout = sys.stderr = nowhere  # an exception that nobody expects is shown all the same
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams
            files.writing = True
            _ranks.ended.set()
            _ranks = None
            if dist.is_initialized():
                dist.destroy_process_group()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    old = None
    with contextlib.suppress(ValueError):
        old = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if old is not None:
            signal.signal(signal.SIGTERM, old)


def launch(main: Callable[[], int]) -> int:
    """A script's exit status, as one of torchrun's processes where torchrun has started it."""
    try:
        with joined():
            try:
                with terminable():
                    status = main()
                if status == 0:
                    gather()  # one that is stopped at its end would be waited for
                return status
            except RankError as e:
                tell(f"error: {e}")
    except RankError as e:  # there is nobody to tell it once for all
        print(f"error: {e}", file=sys.stderr)
    return 2


def launcher() -> str:
    """What starts a script as this one was started."""
    return f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE')}" if _ranks else "python"


def active() -> bool:
    """Whether torchrun has started this process: then models are sharded, also for a world of one."""
    return _ranks is not None


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """In its block this process works as if there were no others, who wait meanwhile (`on_first`)."""
    global _ranks
    ranks, _ranks = _ranks, None
    try:
        yield
    finally:
        _ranks = ranks


def rank() -> int:
    return _ranks.rank if _ranks else 0


def world() -> int:
    return _ranks.world if _ranks else 1


def first() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def local_rank() -> int:
    """Number of this process on its machine, and of its GPU."""
    return _ranks.local if _ranks else 0


def tell(message: str, ranks: Ranks | None = None) -> None:
    """Print the last line of a run to standard error, once for all ranks: by the first that comes here, and the reason that
    was there first."""
    if (ranks := ranks or _ranks) is None:
        print(message, file=sys.stderr)
        return
    with contextlib.suppress(RuntimeError):  # the store has ended with torchrun
        cause = ranks.store.compare_set("cause", "", message).decode()
        if ranks.store.add("told", 1) == 1:
            print(f"\n{cause.strip()}", file=sys.__stderr__, flush=True)  # below the progress bar


def blame(error: BaseException, remedy: str = "") -> bool:
    """Keep the reason why a run ends, if it is the first: what the other ranks meet next is a consequence. Returns whether
    all ranks can still be met: not where one is gone without a word."""
    if _ranks is None or not isinstance(error, Exception):
        return True
    why = lost(error) if is_lost(error) else str(error) or type(error).__name__
    mine = f"error: out of memory ({first_line(error)}); {remedy}" if remedy else f"error: {why}"
    try:
        return _ranks.store.compare_set("cause", "", mine).decode() != mine or not is_lost(error)
    except RuntimeError:  # the store has ended with torchrun
        return False


def meet() -> None:
    """Wait for all ranks, wherever in their exchanges an interruption or an error has torn them apart."""
    if _ranks is not None:
        _ranks.meet()


# ---------------------------------------------------------------------------------------------------- what ranks exchange


def gather(value: Any = None) -> list:
    """What each rank gives (JSON), in their order, on every rank: nobody goes on before all have come, which a collective
    awaits for PATIENCE only: nothing slow goes before one. Raises RankError where one has been interrupted."""
    return _ranks.gather(value) if _ranks else [value]


def merged(found: dict[str, Any]) -> dict[str, Any]:
    """The entries of all ranks' dictionaries."""
    return {k: v for part in gather(found) for k, v in part.items()}


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A UserError that is raised in its block on one rank is raised on all, at its end."""
    error = None
    try:
        yield
    except (UserError, OSError) as e:
        error = e
    told = [x for x in gather(str(error) if error else None) if x]
    if error:
        raise error
    if told:
        raise RankError(told[0])


def on_first(function: Callable[[], T]) -> T:
    """What `function` returns on the first rank (JSON), on every rank; also its UserError."""
    value: Any = None
    with together():
        if first():
            value = function()
    return gather(value)[0]


def any_of(device: torch.device, flag: bool) -> bool:
    """Whether a rank has the flag."""
    if _ranks is None:
        return flag
    found = torch.tensor(flag, dtype=torch.int32, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def totals(numbers: dict[str, Tensor | float], device: torch.device) -> dict[str, float]:
    """Each number's sum over the ranks. Waits for the device once."""
    each = (x if isinstance(x, Tensor) else torch.full((), x, device=device) for x in numbers.values())  # no copy to it
    found = torch.stack([x.double() for x in each])
    if _ranks is not None:
        dist.all_reduce(found)
    return dict(zip(numbers, found.tolist(), strict=True))


def share(items: Sequence[T]) -> Sequence[T]:
    """Those of the items that are this rank's: every world-th."""
    return items[rank() :: world()]


def passes(queue: Sequence[T], size: int) -> Iterator[tuple[Sequence[T], bool]]:
    """(items of a forward pass, whether they count): this rank's share, `size` at a time, in as many passes as the rank with
    the largest share makes. Sharded blocks are gathered by all ranks at once, so one with nothing left repeats an item."""
    mine = share(queue)
    for i in range(0, math.ceil(len(queue) / world()), size):
        yield (mine[i : i + size], True) if i < len(mine) else (queue[:1], False)


# ------------------------------------------------------------------------------------------------------------- the model


def shard(model: Llama, device: torch.device, compiled: bool, cpu_offload: bool) -> dict[str, tuple[Tensor, slice]]:
    """Split a model that is still on the meta device over the ranks, by rows: parameters, and with them gradients and
    optimizer state. Blocks are gathered one at a time; embedding, norm and head are the root's and stay gathered from the
    forward pass to the end of the backward pass, so that the head is a plain call in between.

    Returns {parameter: (where this rank's rows go, which rows of the whole they are)}; the memory is not initialised.
    cpu_offload: rows, gradients and moments stay in host memory.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        wait = datetime.timedelta(seconds=COMPILING if compiled else PATIENCE)
        assert _ranks is not None
        store = dist.PrefixStore("group", _ranks.store.clone())  # who waits in it lets no other use its connection
        kinds = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(kinds, store=store, rank=rank(), world_size=world(), timeout=wait)
    mesh = init_device_mesh(device.type, (world(),))
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    # In bfloat16 matrices are gathered as they are used, half the bytes, and no rank keeps casts of them all; norms are used
    # in float32, so that they are gathered by themselves. Gradients are summed in float32.
    half = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=torch.float32)
    for block in model.model.layers:
        if model.compute_dtype != torch.float32:
            for norm in (m for m in block.modules() if isinstance(m, RMSNorm)):
                fully_shard(norm, mesh=mesh, offload_policy=offload)
        fully_shard(block, mesh=mesh, offload_policy=offload, mp_policy=half)
    fully_shard(model, mesh=mesh, offload_policy=offload, reshard_after_forward=False)
    for module in (m for m in model.modules() if isinstance(m, FSDPModule)):
        # Sums, for each loss is normalised over the whole batch. Both: gloo has no scaled sum.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden_states")
    model.to_empty(device="cpu" if cpu_offload else device)
    vars(model)["rows"] = dict(model.named_parameters())
    model.compute_device = device
    places = {}
    for name, p in parameters(model).items():
        rows = rows_of(p)
        here = local(p.detach())
        assert here.shape[0] == rows.stop - rows.start
        places[name] = here, rows
    return places


def parameters(model: Llama) -> dict[str, nn.Parameter]:
    """By name; of a sharded model the rows that are kept, also where an error has left a pass with gathered ones."""
    return vars(model).get("rows") or dict(model.named_parameters())


def rows_of(p: Tensor) -> slice:
    """Which rows of a sharded parameter are this rank's: FSDP2 cuts as torch.chunk does."""
    size = math.ceil(p.shape[0] / world())
    start = min(rank() * size, p.shape[0])
    return slice(start, min(start + size, p.shape[0]))


def local(x: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, or the tensor."""
    return x.to_local() if hasattr(x, "to_local") else x


def like(x: Tensor, rows: Tensor) -> Tensor:
    """A tensor sharded as x is, of which this rank has these rows."""
    if not hasattr(x, "to_local"):
        return rows
    from torch.distributed.tensor import DTensor

    sharded: Any = x
    return DTensor.from_local(
        rows, sharded.device_mesh, sharded.placements, run_check=False, shape=x.shape, stride=x.stride()
    )


def gathered(model: Llama) -> Llama:
    """A frozen copy of a sharded model that is no longer sharded, in the compute dtype, on every rank: for evaluation. One
    parameter is gathered at a time. Raises out of memory where the whole model does not fit."""
    with torch.device("meta"):
        copy = Llama(model.config, model.compute_dtype)
    state = {n: whole(p.detach()).to(model.device, model.compute_dtype) for n, p in model.named_parameters()}
    copy.load_state_dict(state, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        copy.lm_head.weight = copy.model.embed_tokens.weight
    return copy.requires_grad_(False).eval()


def sharded(model: nn.Module) -> bool:
    return hasattr(model, "reshard")


def reshard(model: Any) -> None:
    """Let go of what a forward pass that no backward pass follows leaves gathered."""
    if sharded(model):
        model.reshard()


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another rank is gone."""
    known, said = ("gloo", "nccl", "connection closed by peer", "connection reset", "timed out waiting"), str(error).lower()
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and any(word in said for word in known)
