"""What is evaluated of a run: target and retrained model before the training, the policy on the way and at its end."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tqdm import tqdm

import distributed
import eval as evaluation
import files
from checkpoint import RunError
from config import BEST, KEPT, Config
from eval import Source
from files import JsonLines
from model import Llama, load_pretrained, save_pretrained
from runs import require_folder

POINT = {"step": files.Field(int, 0), "epoch": files.Field(float, 0)}  # of trajectory.jsonl


class Evaluations:
    """What is evaluated of a run: target and retrained model before the training, the policy on the way and at its end."""

    def __init__(self, config: Config, benchmark, out: Path, source: Source, model: Llama):
        """Raises where the target cannot be compared with the retrained model: now, not after the training."""
        self.benchmark, self.out, self.tokenizer, self.keep_best = benchmark, out, source.tokenizer, config.keep_best
        self.logs = {"target": self.score(model, "target", source.run)}
        self.load_retrained: Callable[[], Llama] | None = None
        if config.retain_model:
            name = evaluation.resolve_model(config.retain_model, "target")
            self.load_retrained = partial(load_pretrained, name, device=model.device, compute_dtype=model.compute_dtype)
            self.logs["retrained"] = self.score(self.load_retrained(), "retrained", evaluation.run_folder(name))
        self.reference = benchmark.reference(config.model, config.retain_logs, self.logs.get("retrained"))
        target = benchmark.summary(self.logs["target"], *self.reference)[0]
        self.least = KEPT * target.get("model_utility", 0.0)
        if target.get("forget_quality") is None and self.keep_best:
            raise RunError("--keep-best: there is no forget quality without --retain-model or --retain-logs; pass one")

    def score(self, model: Llama, label: str, own: Path | None = None) -> dict:
        """The log of a model; kept in the run folder that it came from (`own`) where it has one, else in this run's."""
        place = (own, "final") if own else (self.out, label)
        return self.benchmark.evaluate(model, self.tokenizer, *place, f"evaluate {label}")

    def on_epoch(self, model: Llama, step: int, epoch: float, last: bool) -> None:
        name = f"epoch-{epoch:g}"
        log = self.score(model, "unlearned", self.out) if last and not self.keep_best else self.score(model, name)
        require_folder(self.out)
        record = {"step": step, "epoch": epoch} | self.benchmark.summary(log, *self.reference)[0]
        trajectory = self.trajectory(step)
        if self.keep_best and self.best([*trajectory.records, record]) is record:
            files.remove(self.out / f"best-{step}")  # of a run that was killed here
            wait = distributed.gather
            save_pretrained(model, self.out / f"best-{step}", self.tokenizer.folder, self.tokenizer.format_name, wait)
        trajectory.add(record)
        if self.keep_best:
            kept = f"best-{self.best(trajectory.records)['step']}"
            for folder in self.out.glob("best-*"):
                if folder.name != kept:
                    files.remove(folder)
        distributed.gather()
        tqdm.write(f"epoch {epoch:g}: {self.benchmark.headline(record)}")

    def trajectory(self, before: float = math.inf) -> JsonLines:
        """The records of earlier steps; a resumed run may come by a step again."""
        path = self.out / "trajectory.jsonl"

        def earlier(record: dict) -> bool:
            if wrong := files.fault(record, files.Field(dict, fields=POINT)):
                raise RunError(f"{path}: {wrong}; remove {self.out / 'checkpoint'} to train again from the start")
            return record["step"] < before

        return JsonLines(path, earlier, RunError)

    def best(self, records: list[dict]) -> dict:
        """The record of the model to keep, by `config.BEST`; the first of equal ones."""

        def rank(record: dict) -> tuple[bool, float]:
            good = record["model_utility"] >= self.least
            return good, record["forget_quality" if good else "model_utility"]

        return max(records, key=rank)

    def keep(self) -> dict:
        """Make the best model RUN/model; returns what summary.json says of it."""
        best = self.best(self.trajectory().records)
        folder = self.out / f"best-{best['step']}"
        with distributed.together():
            if distributed.first() and not (self.out / "model").exists():
                if not folder.exists():
                    raise RunError(f"{folder}: is gone; remove {self.out / 'checkpoint'} to train again from the start")
                folder.rename(self.out / "model")
        print(f"kept: the model of step {best['step']}, epoch {best['epoch']:g} ({BEST})")
        return {"step": best["step"], "epoch": best["epoch"], "rule": BEST}

    def finish(self, model: Llama) -> dict:
        """Evaluates the end of the run and prints table and samples; returns what summary.json holds of all models."""
        self.logs["unlearned"] = self.score(model, "unlearned", self.out)
        logs: dict[str, dict] = {k: self.logs[k] for k in ("target", "unlearned", "retrained") if k in self.logs}
        if self.load_retrained:
            logs = self.benchmark.with_language(logs, self.load_retrained, self.tokenizer)
        self.logs = logs
        summaries = {k: self.benchmark.summary(log, *self.reference) for k, log in logs.items()}
        *_, (_, against) = summaries.values()
        scores = {k: summary for k, (summary, _) in summaries.items()}
        print(f"\n{self.benchmark.report(scores, against)}")
        print_samples({k: self.benchmark.samples(log) for k, log in logs.items()})
        return scores | {"retain_reference": against if self.reference[0] is not None else f"absent; {against}"}


def print_samples(answers: dict[str, dict[str, tuple[str, str, str]]]) -> None:
    """Three questions with each model's answer. answers: {model: {key: (question, reference, generation)}}."""
    rows = next(iter(answers.values()))
    for key in list(rows)[:: max(1, len(rows) // 3)][:3]:
        question, reference, _ = rows[key]
        print(f"\n{question}\n    {'reference':<11} {reference}")
        for name, generations in answers.items():
            print(f"    {name:<11} {generations[key][2]}")
    print()
