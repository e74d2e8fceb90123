"""A run folder: who works in it, what its config.json holds, whether a resumed run has what it began with; interruptions."""

import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed
import files
from checkpoint import RunError, checkpoint_step
from config import FIELDS, MACHINE, PATHS, RUNS, Config, flag_of, validate, versions
from data import fingerprint
from eval import ALIASES, Source, benchmark_of, resolve_model
from files import Field, UserError, first_line, read_json, write_json
from model import TOKENIZER_FILES, resolve_folder

RECORD = {
    "config": Field(dict, fields=FIELDS),
    "data": Field(dict),  # {what: what tells its content}
    "directory": Field(str),  # that paths in data sets' names are relative to
    "model_commit": Field(str, required=False, null=True),
    "changed": Field(list, required=False),  # what `data` was before --resume-anyway
}


def resume_command(out: Path, more: str = "") -> str:
    return f"{distributed.launcher()} train.py --resume --out {shlex.quote(str(out))}{more}"


def started(out: Path) -> bool:
    return os.path.exists(out / "config.json")  # also of a name that is too long


@contextlib.contextmanager
def opened(out: Path | None, config: Config | None, resume: str = "") -> Iterator[Path]:
    """The folder of a run, which no other process has meanwhile, without leftovers. out None: the next free one of `config`,
    runs/<data>-<losses>-<number>. A folder that is made here and stays empty goes again. Raises RunError for one that holds
    something else, or, to be resumed, no run. Of several processes the first holds the folder."""
    with contextlib.ExitStack() as held:
        with distributed.together():
            if distributed.first():
                out = held.enter_context(_opened(out, config, resume))
        yield Path(distributed.gather(str(out))[0])


@contextlib.contextmanager
def _opened(out: Path | None, config: Config | None, resume: str) -> Iterator[Path]:
    if out is None and config is not None:
        name = f"{config.forget}-{config.forget_loss}-{config.retain_loss}"
        name = f"finetune-{config.finetune}" if config.finetune else name
        name = "".join(c if c.isalnum() or c in "_-+" else "_" for c in name)[:200]
        for out in (RUNS / f"{name}-{i:03d}" for i in itertools.count(1)):
            with contextlib.suppress(FileExistsError):
                out.mkdir(parents=True)  # claims the number
                break
        made = True
    elif out is not None:
        if resume and not started(out):
            why = "is no run of this program, or was stopped before its first step: nothing to go on with"
            raise RunError(f"--resume: {out / 'config.json'} is not there; {out} {why}; start without --resume")
        if resume and (links := [path for path in out.iterdir() if path.is_symlink()]):
            raise RunError(f"{links[0]}: is a link, and what it leads to would be written to; put the thing itself there")
        if not resume:
            require_free(out)
        made = not out.exists()
    assert out is not None
    try:
        with files.lock(out, RunError):
            for folder in (out, out / "checkpoint"):
                files.sweep(folder)
            files.remove(out / "reference.bin")
            if not resume:
                require_free(out)  # the process that held it may have filled it
            yield out
    finally:
        if made:
            with contextlib.suppress(OSError):
                out.rmdir()


def require_free(out: Path) -> None:
    """Raises RunError for a folder that holds more than a run leaves that was killed before it began."""
    inside = (f for f in out.iterdir() if f.name != ".lock" and f.suffix != ".part") if out.is_dir() else iter([out])
    if out.exists() and any(inside):
        raise RunError(f"--out {out}: exists already; choose another folder, or go on with: {resume_command(out)}")


def require_folder(out: Path) -> None:
    """Raises RunError where the folder was removed while the run worked in it."""
    if not started(out):
        raise RunError(f"{out}: was removed while the run worked in it; start again")


# -------------------------------------------------------------------------------------------------- what it was made of


def digests(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """{file: SHA-256} of the files that are there. Raises RunError for one that cannot be read."""
    try:
        return {f.name: files.digest(f) for f in sorted(f for name in names for f in folder.glob(name))}
    except OSError as e:
        raise RunError(f"{folder}: not readable ({first_line(e)})") from None


MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json")


def inputs(config: Config, rows: dict[str, list], benchmark, source: Source) -> dict[str, Any]:
    """{what: what tells its content} of all that a run reads."""
    data: dict[str, Any] = {name: {"rows": len(x), "fingerprint": fingerprint(x)} for name, x in rows.items()}
    data |= {"model": digests(source.folder, MODEL_FILES), "tokenizer": digests(source.tokenizer.folder, TOKENIZER_FILES)}
    if benchmark:
        data["evaluation"] = benchmark.data()
        if config.retain_model:
            data["retain_model"] = digests(resolve_folder(resolve_model(config.retain_model, "target")), MODEL_FILES)
        elif (reference := benchmark.reference(config.model, config.retain_logs, None)[0]) is not None:
            data["retain_logs"] = fingerprint([{k: v for k, v in reference.items() if k != "path"}])
    return data


def absolute(name: str, value: Any) -> Any:
    """A setting as it is kept: a path that there is does not depend on the working directory."""
    path = name in PATHS and value is not None and value not in (*ALIASES, "muse") and Path(value).exists()
    return str(Path(value).absolute()) if path else value


def kept_config(config: Config) -> dict[str, Any]:
    return {name: absolute(name, value) for name, value in dataclasses.asdict(config).items()}


def prepare_out(config: Config, out: Path, data: dict, folder: Path, prompt: str, commit: str | None = None) -> None:
    """Begin a run: its config.json. commit: of a model from the hub."""
    record = {"config": kept_config(config), "data": data, "directory": os.getcwd(), "model_folder": str(folder.absolute())}
    write_json(out / "config.json", record | {"model_commit": commit, "prompt_format": prompt, "versions": versions()})


def read_record(out: Path) -> dict[str, Any]:
    """What config.json holds. Raises RunError for one that is not a run's of this version."""
    path = out / "config.json"
    try:
        record = read_json(path, fields=RECORD, remedy="start anew in another folder")
        if unknown := record["config"].keys() - FIELDS.keys():
            raise UserError(f"{path}: key {sorted(unknown)[0]!r} is none of this version's; start anew in another folder")
        validate(Config(**record["config"]))
    except UserError as e:
        raise RunError(f"--resume: {path} is no run of this program ({first_line(e)})") from None
    return record


def read_config(out: Path, given: dict) -> tuple[Config, Path]:
    """The config of the run to resume, and the working directory that it was started in. Settings of the machine, and where
    its inputs are (`check_inputs` compares what they hold), may be other ones. Raises RunError where another flag says
    something else. A model of the hub is taken at the commit that the run began with."""
    record = read_record(out)
    config = Config(**record["config"])
    if config.model == "toy":  # a run keeps the folder; made anew, the toy's models would lie wherever `directory` says
        raise RunError(f"--resume: {out / 'config.json'}: model is 'toy', which no run keeps; start anew")
    for name, value in given.items():
        if name not in MACHINE + PATHS and value != (old := getattr(config, name)):
            raise RunError(f"--resume: {out} was started with {name} = {old!r}; drop {flag_of(name)}, or start anew with it")
    now = {name: absolute(name, value) for name, value in given.items() if name in MACHINE + PATHS}
    name, commit = config.model, record.get("model_commit")
    if commit and "model" not in now and name not in ALIASES and "@" not in name:
        now["model"] = f"{name}@{commit}"
    config = dataclasses.replace(config, **now)
    validate(config)
    return config, Path(record["directory"])


@contextlib.contextmanager
def working_in(directory: Path) -> Iterator[None]:
    """With that working directory, where there is one."""
    here = os.getcwd()
    with contextlib.suppress(OSError, ValueError):
        os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(here)


def check_inputs(config: Config, out: Path, data: dict, anyway: bool) -> None:
    """Keep what machine settings are now. Raises RunError where the inputs are not what they were, unless `anyway`: that is
    kept, too."""
    record, data = read_record(out), json.loads(json.dumps(data))
    before, changed = record["data"], []
    for what in dict.fromkeys([*before, *data]):
        old, new = (x.get(what) for x in (before, data))
        if old != new:
            parts = []
            if isinstance(old, dict) and isinstance(new, dict):
                parts = [part for part in dict.fromkeys([*old, *new]) if old.get(part) != new.get(part)]
            named = f"{what} {value}" if isinstance(value := getattr(config, what, None), str) else what
            changed.append(f"{named} ({', '.join(parts)})" if parts else named)
    if changed and not anyway:
        why = f"{', '.join(changed)} changed since the run began"
        raise RunError(f"--resume: {out}: {why}; put back what was there, or pass --resume-anyway")
    if changed:
        print(f"resumed though changed: {', '.join(changed)}", flush=True)
        record |= {"data": data, "changed": [*record.get("changed", []), {k: before.get(k) for k in data | before}]}
    if changed or record["config"] != kept_config(config):
        write_json(out / "config.json", record | {"config": kept_config(config)})


# ------------------------------------------------------------------------------------------------------- a finished run


def finished(config: Config, out: Path) -> dict | None:
    """summary.json of a run that is complete, its table printed; None: it is not. Raises RunError for a damaged one, and
    where nothing is left to go on with."""
    path = out / "summary.json"
    again = f"evaluate it: python eval.py --model {shlex.quote(str(out))} --forget {config.forget}"
    if not path.exists():
        if (out / "model").exists() and not checkpoint_step(out):
            raise RunError(f"{out}: its model is there, the state of its training is not; {again}")
        return None
    summary = read_json(path, RunError, f"remove it; {again}")
    print(f"{out}: complete already")
    models = {k: v for k, v in summary.items() if k in ("target", "unlearned", "retrained") or k.startswith("request ")}
    if config.eval and not config.finetune:
        try:
            against = str(summary.get("retain_reference", "")).removeprefix("absent; ")
            print(f"\n{benchmark_of(config.forget).report(models, against)}")
            for line in summary.get("hints", []):
                print(f"hint: {line}")
        except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as e:
            raise RunError(f"{path}: is no summary of this run ({first_line(e)}); remove it") from None
    return summary


# -------------------------------------------------------------------------------------------------------- interruptions


class Interrupt:
    """In its block Ctrl-C and SIGTERM wait: KeyboardInterrupt is raised at the end of it, or at once by a second Ctrl-C."""

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

    def __exit__(self, kind, *error):
        for s, handler in self.old.items():
            signal.signal(s, handler)
        if self.wanted and kind is None:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """In its block they do not wait, nor those that have come before."""
        self.__exit__(None)
        try:
            yield
        finally:
            self.__enter__()


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""
