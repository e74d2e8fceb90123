"""The state of an unfinished run: its weights and moments on disk, and an interruption that waits for the end of a step."""

import contextlib
import json
import shutil
import signal
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from files import UserError, first_line, read_json
from model import Llama


class RunError(UserError):
    """A run that cannot start or go on. The message is one line that names the setting and the remedy."""


def save_checkpoint(out: Path, step: int, model: Llama, optimizer: torch.optim.Optimizer) -> None:
    """Replace `out/checkpoint`: fp32 weights and AdamW moments as safetensors, so that `--resume` is exact.

    The old checkpoint goes only when the new one is complete. Raises RunError where it cannot be written.
    """
    part, folder, old = (out / f"checkpoint{suffix}" for suffix in (".part", "", ".old"))
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        names: dict[torch.Tensor, str] = {p: n for n, p in model.named_parameters()}
        save_file({n: p.detach().contiguous() for p, n in names.items()}, part / "weights.safetensors")
        state = {f"{names[p]}/{k}": v.contiguous() for p, s in optimizer.state.items() for k, v in s.items()}
        save_file(state, part / "optimizer.safetensors")
        (part / "state.json").write_text(json.dumps({"step": step}) + "\n")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(part, ignore_errors=True)
        raise RunError(f"{folder}: could not be written ({first_line(e)}); free some space, then --resume") from None


def checkpoint_folder(out: Path) -> Path | None:
    return next((f for f in (out / "checkpoint", out / "checkpoint.old") if f.exists()), None)


def checkpoint_step(out: Path) -> int:
    """The step to go on with, 0 where there is no checkpoint yet."""
    if (folder := checkpoint_folder(out)) is None:
        return 0
    try:
        return int(read_json(folder / "state.json", remedy="it is not whole")["step"])
    except (UserError, KeyError, ValueError, TypeError) as e:
        raise RunError(f"{folder}: damaged checkpoint ({first_line(e)}); remove {out} and start again") from None


def load_checkpoint(out: Path, model: Llama, optimizer: torch.optim.Optimizer) -> int:
    """Restore weights and moments; returns `checkpoint_step`."""
    step, parameters = checkpoint_step(out), dict(model.named_parameters())
    if (folder := checkpoint_folder(out)) is None:
        return step
    try:
        with torch.no_grad(), safe_open(folder / "weights.safetensors", "pt") as f:
            for name, p in parameters.items():
                p.copy_(f.get_tensor(name))
        with safe_open(folder / "optimizer.safetensors", "pt") as f:
            for key in f.keys():  # noqa: SIM118
                name, moment = key.rsplit("/", 1)
                optimizer.state[parameters[name]][moment] = f.get_tensor(key).to(model.device)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as e:
        raise RunError(f"{folder}: damaged checkpoint ({first_line(e)}); remove {out} and start again") from None
    return step


class Interrupt:
    """While a step is in hand, Ctrl-C and SIGTERM only set `wanted`; a second Ctrl-C ends at once, unsaved."""

    def __enter__(self):
        self.wanted, self.old = False, {}
        for s in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread: then nobody can interrupt it this way
                self.old[s] = signal.signal(s, self._handle)
        return self

    def _handle(self, number, frame):
        if self.wanted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.wanted = True

    def __exit__(self, *exc):
        for s, handler in self.old.items():
            signal.signal(s, handler)


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""
