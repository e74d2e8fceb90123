"""The state of an unfinished run on disk: its weights and moments, and the checksums by which they are trusted again."""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import distributed
import files
from files import Field, UserError, first_line, read_json
from model import Llama

GROWN = ("log.jsonl", "trajectory.jsonl")  # a checkpoint knows how long they were, and is resumed with just that
TENSORS = ("weights", "optimizer")  # .safetensors, or of several processes each one's rows, -00001-of-00002.safetensors ...
SHA256 = Field(str, 64, 64)
MANIFEST = {
    "step": Field(int, 0),
    "settings": Field(str),  # `Config.results`
    "files": Field(dict, items=SHA256),
    "records": Field(dict, items=Field(dict, fields={"bytes": Field(int, 0), "sha256": SHA256})),
}


class RunError(UserError):
    """A run that cannot start or go on. The message is one line that names the setting and the remedy."""


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity."""
    return next((name for name, x in tensors.items() if not torch.isfinite(x).all()), None)


class OtherWorld(RunError):
    """A checkpoint that only as many processes can go on with as have written it."""


class NoRoom(RunError):
    """The disk has too little room for a checkpoint."""


def require_room(folder: Path, model: Llama, remedy: str, count: int = 1) -> None:
    """Raises NoRoom where the disk of a folder has no room for so many checkpoints."""
    size = count * 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    if (free := distributed.on_first(lambda: shutil.disk_usage(folder).free)) < size:  # one answer for all processes
        raise NoRoom(f"{folder}: needs {size / 1e9:.3g} GB, the disk has {free / 1e9:.3g} GB free; {remedy}")


def checkpoints(out: Path) -> list[Path]:
    """`out/checkpoint/STEP`, the oldest first."""
    found = [f for f in (out / "checkpoint").glob("*") if re.fullmatch(r"\d{1,18}", f.name)]
    return sorted(found, key=lambda folder: int(folder.name))


def checkpoint_step(out: Path) -> int:
    """The step to go on with, 0 where there is no checkpoint yet."""
    return max([0, *(int(folder.name) for folder in checkpoints(out))])


def shard_names(kind: str, count: int) -> list[str]:
    """The files of one kind that so many processes write."""
    return [f"{kind}{f'-{i:05}-of-{count:05}' if count > 1 else ''}.safetensors" for i in range(1, count + 1)]


def save_checkpoint(
    out: Path, step: int, model: Llama, optimizer: torch.optim.Optimizer, settings: str = "", keep: int = 1
) -> None:
    """Write `out/checkpoint/STEP`: fp32 weights and AdamW moments as safetensors, so that `--resume` is exact, and
    manifest.json with what they must be. Each process writes its rows. The last `keep` stay; older ones go when this one is
    complete.

    settings: what decides the results. Raises RunError where it cannot be written, or holds what is not finite.
    """
    folder = out / "checkpoint" / str(step)
    if len({*distributed.gather(step)}) > 1:
        raise RunError("the processes of the run are not at the same step: not saved")
    parameters = distributed.parameters(model)
    weights = {n: distributed.local(p.detach()).contiguous() for n, p in parameters.items()}
    moments = {n: x.contiguous() for n, x in flat_state(optimizer, parameters).items()}
    try:
        with contextlib.ExitStack() as stack:
            with distributed.together():
                if name := not_finite(weights | moments):
                    raise RunError(f"step {step}: {name} is not finite (overflow); start anew with a lower --lr")
            require_room(out, model, "free some, or pass --save-every 0; then --resume")
            with distributed.together():
                discard(folder)
                if distributed.first():
                    stack.enter_context(files.replacing(folder)).mkdir()
            part, sums = folder.with_name(distributed.on_first(lambda: files.part_of(folder).name)), dict[str, str]()
            with distributed.together():
                for kind, tensors in zip(TENSORS, (weights, moments), strict=True):
                    name = shard_names(kind, distributed.world())[distributed.rank()]
                    save_file(tensors, part / name)
                    files.sync(part / name)
                    sums[name] = files.digest(part / name)
            manifest = {"step": step, "settings": settings, "files": distributed.merged(sums), "records": records(out)}
            if distributed.first():
                (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        for old in checkpoints(out)[:-keep]:
            discard(old)
        distributed.gather()  # it is there now
    except (OSError, SafetensorError) as e:
        raise RunError(f"{folder}: could not be written ({first_line(e)}); free some space, then --resume") from None


def records(out: Path) -> dict[str, dict]:
    """What a checkpoint knows of the files that grow."""
    found = {}
    for path in filter(Path.exists, (out / name for name in GROWN)):
        files.sync(path)
        found[path.name] = {"bytes": path.stat().st_size, "sha256": files.digest(path)}
    return found


def discard(folder: Path) -> None:
    """Remove a checkpoint; one that is half removed is none."""
    if folder.exists() and files.writing:
        files.remove(part := folder.with_name(f".{folder.name}.old.part"))
        files.remove(folder.rename(part))


def verified(folder: Path) -> dict:
    """The manifest of a checkpoint whose files are what it says. Raises RunError for any other."""
    manifest = read_json(folder / "manifest.json", RunError, "it is not whole", fields=MANIFEST)
    if manifest["step"] != int(folder.name):
        raise RunError(f"manifest.json is of step {manifest['step']}")
    expected, count = manifest["files"], len(manifest["files"]) // len(TENSORS)
    named = {name for kind in TENSORS for name in shard_names(kind, count)}
    if not count or {*expected} != named or not {*manifest["records"]} <= {*GROWN}:
        raise RunError("manifest.json does not name the files of a checkpoint")
    with distributed.together():
        for name in distributed.share(sorted(expected)):
            if files.digest(folder / name) != expected[name]:
                raise RunError(f"{name} is not what was written")
    return manifest


class Shards:
    """Tensors whose rows lie one after the other in several files, or whole in one."""

    def __init__(self, paths: list[Path], stack: contextlib.ExitStack):
        """Raises RunError where the files do not hold the same tensors."""
        self.files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
        self.name, self.names = paths[0].name, {*self.files[0].keys()}
        if any({*file.keys()} != self.names for file in self.files):
            raise RunError(f"{self.name}: the files beside it hold other tensors")

    def read(self, name: str, rows: slice | None) -> torch.Tensor:
        """These rows; None: a tensor that every file has."""
        if rows is None:
            return self.files[0].get_tensor(name)
        found, start = [], 0
        for file in self.files:
            end = start + (held := file.get_slice(name)).get_shape()[0]
            if max(start, rows.start) < min(end, rows.stop) or len(self.files) == 1:
                found.append(held[max(rows.start - start, 0) : min(rows.stop, end) - start])
            start = end
        if not found:  # no rows: fewer than processes
            return self.files[0].get_slice(name)[:0]
        return found[0] if len(found) == 1 else torch.cat(found)

    def rows(self, name: str) -> int:
        return sum(file.get_slice(name).get_shape()[0] for file in self.files)


def load_checkpoint(
    out: Path, model: Llama, optimizer: torch.optim.Optimizer, settings: str = "", anyway: bool = True
) -> int:
    """Restore weights and moments of the newest checkpoint, and the length of GROWN; returns its step, 0 without one. It may
    be of another number of processes: each reads the rows that are its own now.

    settings: as of `save_checkpoint`; anyway: others will do. Raises RunError for what is damaged, naming the checkpoint
    that is whole, and for other settings.
    """
    if not (found := checkpoints(out)):
        for name in GROWN:
            files.remove(out / name)
        return 0
    *older, folder = found
    try:
        with distributed.together():
            manifest = verified(folder)
            restore_state(folder, manifest, model, optimizer)
    except OtherWorld:
        raise
    except (OSError, SafetensorError, UserError, ValueError, RuntimeError) as e:
        raise RunError(f"{folder}: damaged checkpoint ({first_line(e)}); remove it to go on from {whole(older)}") from None
    if manifest["settings"] != settings and not anyway:
        raise RunError(
            f"{out / 'config.json'}: its settings are not those of step {manifest['step']}; put them back, or pass "
            f"--resume-anyway"
        )
    for name in GROWN:
        known = manifest["records"].get(name, {"bytes": 0, "sha256": ""})
        if wrong := distributed.on_first(partial(restore, out / name, known["bytes"], known["sha256"])):
            raise RunError(f"{out / name}: {wrong}; put it back, or remove {folder} to go on from {whole(older)}")
    return manifest["step"]


def restore_state(folder: Path, manifest: dict, model: Llama, optimizer: torch.optim.Optimizer) -> None:
    """Weights and moments out of a verified checkpoint. Raises RunError for others than the model's."""
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
    weights = {n: distributed.local(p) for n, p in parameters.items()}
    count = len(manifest["files"]) // len(TENSORS)
    for kind, expected in zip(TENSORS, (weights, flat_state(optimizer, parameters)), strict=True):
        with torch.no_grad(), contextlib.ExitStack() as stack:
            names, own = shard_names(kind, count), kind == TENSORS[1] and not isinstance(optimizer, torch.optim.AdamW)
            if own and count != distributed.world():  # blocks of 256 numbers do not end where rows do
                raise OtherWorld(f"{folder}: moments of 8 bits go on with as many processes as they are of, {count}")
            names = [names[distributed.rank()]] if own else names
            shards = Shards([folder / name for name in names], stack)
            if shards.names != {*expected}:
                raise RunError(f"{shards.name} does not hold what the model and its optimizer are made of")
            for name, like in expected.items():
                p = parameters[name.split("/")[0]]
                rows = distributed.rows_of(p) if like.ndim and not own else None
                tensor = shards.read(name, rows)
                if (
                    tensor.shape != like.shape or tensor.dtype != like.dtype or not_finite({name: tensor})
                    or rows is not None and shards.rows(name) != p.shape[0]
                ):  # fmt: skip
                    raise RunError(f"{shards.name}: {name} has another shape or type, or is not finite")
                if name.endswith("/step") and tensor != manifest["step"]:
                    raise RunError(f"{shards.name}: {name} is {tensor:g}")
                like.copy_(tensor)


def whole(folders: list[Path]) -> str:
    """What there is to go on with, of these checkpoints."""
    for folder in reversed(folders):
        with contextlib.suppress(OSError, UserError):
            return f"step {verified(folder)['step']}, whose checkpoint is whole"
    return "the start"


def restore(path: Path, size: int, sha256: str) -> str:
    """Cut a file to the `size` bytes that a checkpoint knows; returns what is wrong where it begins with others, or ''."""
    if not size:
        files.remove(path)
        return ""
    if not path.is_file():
        return "is gone"
    data = path.read_bytes()
    if len(data) < size or hashlib.sha256(data[:size]).hexdigest() != sha256:
        return "is damaged"
    with path.open("r+b") as file:
        file.truncate(size)
    return ""


def empty_state(optimizer: Any, p: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the optimizer's first step would begin with: AdamW's moments, or torchao's of 8 bits."""
    if isinstance(optimizer, torch.optim.AdamW):
        zeros = {moment: torch.zeros_like(p, requires_grad=False) for moment in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros((), device=distributed.local(p).device), **zeros}
    first, second = (optimizer._new_buffer(p, signed) for signed in (True, False))
    return {"step": torch.zeros(()), "exp_avg": first, "exp_avg_sq": second}


def parts(name: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """{name: x}, or {name/part: tensor} of one that is made of several: a moment of 8 bits of codes, scale and qmap."""
    if not is_traceable_wrapper_subclass(x):
        return {name: x}
    return {k: v for part in x.__tensor_flatten__()[0] for k, v in parts(f"{name}/{part}", getattr(x, part)).items()}


def flat_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The optimizer's state as plain tensors, {parameter/moment: tensor} as `parts`, of this rank's rows and in its own
    memory: to restore it, copy into them. Made where there is none yet."""
    flat = dict[str, torch.Tensor]()
    for name, p in parameters.items():
        if not (state := optimizer.state[p]):
            state.update(empty_state(optimizer, p))
        for moment, x in state.items():
            flat |= parts(f"{name}/{moment}", distributed.local(x))
    return flat
