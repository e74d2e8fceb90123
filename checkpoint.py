"""The state of an unfinished run on disk: its weights and moments, and the checksums by which they are trusted again."""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import files
from files import Field, UserError, first_line, read_json
from model import Llama

GROWN = ("log.jsonl", "trajectory.jsonl")  # a checkpoint knows how long they were, and is resumed with just that
TENSORS = ("weights.safetensors", "optimizer.safetensors")
SHA256 = Field(str, 64, 64)
MANIFEST = {
    "step": Field(int, 0),
    "settings": Field(str),  # `Config.results`
    "files": Field(dict, fields={name: SHA256 for name in TENSORS}),
    "records": Field(dict, items=Field(dict, fields={"bytes": Field(int, 0), "sha256": SHA256})),
}


class RunError(UserError):
    """A run that cannot start or go on. The message is one line that names the setting and the remedy."""


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity."""
    return next((name for name, x in tensors.items() if not torch.isfinite(x).all()), None)


class NoRoom(RunError):
    """The disk has too little room for a checkpoint."""


def require_room(folder: Path, model: Llama, remedy: str, count: int = 1) -> None:
    """Raises NoRoom where the disk of a folder has no room for so many checkpoints."""
    size = count * 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    if (free := shutil.disk_usage(folder).free) < size:
        raise NoRoom(f"{folder}: needs {size / 1e9:.3g} GB, the disk has {free / 1e9:.3g} GB free; {remedy}")


def checkpoints(out: Path) -> list[Path]:
    """`out/checkpoint/STEP`, the oldest first."""
    found = [f for f in (out / "checkpoint").glob("*") if re.fullmatch(r"\d{1,18}", f.name)]
    return sorted(found, key=lambda folder: int(folder.name))


def checkpoint_step(out: Path) -> int:
    """The step to go on with, 0 where there is no checkpoint yet."""
    return max([0, *(int(folder.name) for folder in checkpoints(out))])


def save_checkpoint(
    out: Path, step: int, model: Llama, optimizer: torch.optim.Optimizer, settings: str = "", keep: int = 1
) -> None:
    """Write `out/checkpoint/STEP`: fp32 weights and AdamW moments as safetensors, so that `--resume` is exact, and
    manifest.json with what they must be. The last `keep` stay; older ones go when this one is complete.

    settings: what decides the results. Raises RunError where it cannot be written, or holds what is not finite.
    """
    folder = out / "checkpoint" / str(step)
    names: dict[torch.Tensor, str] = {p: n for n, p in model.named_parameters()}
    weights = {n: p.detach().contiguous() for p, n in names.items()}
    moments = {n: x.contiguous() for n, x in flat_state(optimizer, {n: p for p, n in names.items()}).items()}
    if name := not_finite(weights | moments):
        raise RunError(f"step {step}: {name} is not finite (overflow); start anew with a lower --lr")
    try:
        require_room(out, model, "free some, or pass --save-every 0; then --resume")
        records = {}
        for path in filter(Path.exists, (out / name for name in GROWN)):
            files.sync(path)
            records[path.name] = {"bytes": path.stat().st_size, "sha256": files.digest(path)}
        discard(folder)
        with files.replacing(folder) as part:
            part.mkdir()
            for name, tensors in zip(TENSORS, (weights, moments), strict=True):
                save_file(tensors, part / name)
            sums = {name: files.digest(part / name) for name in TENSORS}
            manifest = {"step": step, "settings": settings, "files": sums, "records": records}
            (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        for old in checkpoints(out)[:-keep]:
            discard(old)
    except (OSError, SafetensorError) as e:
        raise RunError(f"{folder}: could not be written ({first_line(e)}); free some space, then --resume") from None


def discard(folder: Path) -> None:
    """Remove a checkpoint; one that is half removed is none."""
    if folder.exists():
        files.remove(part := folder.with_name(f".{folder.name}.old.part"))
        files.remove(folder.rename(part))


def verified(folder: Path) -> dict:
    """The manifest of a checkpoint whose files are what it says. Raises RunError for any other."""
    manifest = read_json(folder / "manifest.json", RunError, "it is not whole", fields=MANIFEST)
    if manifest["step"] != int(folder.name):
        raise RunError(f"manifest.json is of step {manifest['step']}")
    for name, expected in manifest["files"].items():
        if name in TENSORS and files.digest(folder / name) != expected:
            raise RunError(f"{name} is not what was written")
    return manifest


def load_checkpoint(
    out: Path, model: Llama, optimizer: torch.optim.Optimizer, settings: str = "", anyway: bool = True
) -> int:
    """Restore weights and moments of the newest checkpoint, and the length of GROWN; returns its step, 0 without one.

    settings: as of `save_checkpoint`; anyway: others will do. Raises RunError for what is damaged, naming the checkpoint
    that is whole, and for other settings.
    """
    if not (found := checkpoints(out)):
        for name in GROWN:
            files.remove(out / name)
        return 0
    *older, folder = found
    try:
        manifest = verified(folder)
        parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
        moments = flat_state(optimizer, parameters)
        for file, expected in zip(TENSORS, (parameters, moments), strict=True):
            with torch.no_grad(), safe_open(folder / file, "pt") as f:
                if {*f.keys()} != {*expected}:
                    raise RunError(f"{file} does not hold what the model and its optimizer are made of")
                for name, like in expected.items():
                    tensor = f.get_tensor(name)
                    if tensor.shape != like.shape or tensor.dtype != like.dtype or not_finite({name: tensor}):
                        raise RunError(f"{file}: {name} has another shape or type, or is not finite")
                    if name.endswith("/step") and tensor != manifest["step"]:
                        raise RunError(f"{file}: {name} is {tensor:g}")
                    like.copy_(tensor)
    except (OSError, SafetensorError, UserError, ValueError, RuntimeError) as e:
        raise RunError(f"{folder}: damaged checkpoint ({first_line(e)}); remove it to go on from {whole(older)}") from None
    if manifest["settings"] != settings and not anyway:
        raise RunError(
            f"{out / 'config.json'}: its settings are not those of step {manifest['step']}; put them back, or pass "
            f"--resume-anyway"
        )
    for name in GROWN:
        known = manifest["records"].get(name, {"bytes": 0, "sha256": ""})
        if wrong := restore(out / name, known["bytes"], known["sha256"]):
            raise RunError(f"{out / name}: {wrong}; put it back, or remove {folder} to go on from {whole(older)}")
    return manifest["step"]


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
        return {"step": torch.zeros((), device=p.device), **zeros}
    moments = {"exp_avg": optimizer._new_buffer(p, True), "exp_avg_sq": optimizer._new_buffer(p, False)}
    return {"step": torch.zeros(()), **moments}


def parts(name: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """{name: x}, or {name/part: tensor} of one that is made of several: a moment of 8 bits of codes, scale and qmap."""
    if not is_traceable_wrapper_subclass(x):
        return {name: x}
    return {k: v for part in x.__tensor_flatten__()[0] for k, v in parts(f"{name}/{part}", getattr(x, part)).items()}


def flat_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The optimizer's state as plain tensors, {parameter/moment: tensor} as `parts`, in its own memory: to restore it, copy
    into them. Made where there is none yet."""
    flat = dict[str, torch.Tensor]()
    for name, p in parameters.items():
        if not (state := optimizer.state[p]):
            state.update(empty_state(optimizer, p))
        for moment, x in state.items():
            flat |= parts(f"{name}/{moment}", x)
    return flat
