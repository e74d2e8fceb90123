"""runs.py, checkpoint.py: what is damaged, changed, interrupted, full or held elsewhere ends in one line or as ever."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import checkpoint
import config
import files
import runs
import tofu
import train

ROOT = Path(train.__file__).parent
SMALL = "--batch-size 4 --micro-batch-size 4 --lr 1e-2 --epochs 2 --forget f.jsonl --retain r.jsonl".split()
few = settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows(path: str, numbers) -> None:
    lines = [json.dumps({"question": f"Where is number {i}?", "answer": f"In the city {i}."}) for i in numbers]
    Path(path).write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data, a model `m`, a whole run of it, and one that was interrupted after step 2 of 3."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        shutil.copytree(make_tiny(tmp_path_factory.mktemp("tiny")).folder, "m")
        rows("f.jsonl", range(6))
        rows("r.jsonl", range(9, 20))
        assert start(train.main, "whole") == 0
        at_step(patch, 2, interrupt)
        assert start(train.main, "cut", "--keep", "2", "--save-every", "1") == 130
    return home


@pytest.fixture
def cli(home, tmp_path, monkeypatch, capsys):
    """cli(arguments) -> (exit status, the lines of stderr but for bars), in a copy of that folder without the runs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("whole", "cut", "anchored"))
    capsys.readouterr()

    def call(arguments):
        status = train.main(arguments)
        parts = re.split(r"[\r\n]", capsys.readouterr().err)
        return status, [part for part in parts if part.strip() and not re.search(r"\d+%\|", part)]

    return call


@pytest.fixture
def cut(cli, home, tmp_path):
    """The two runs, as if they had been made here."""
    for name in ("whole", "cut"):
        shutil.copytree(home / name, name)
        config = Path(name, "config.json")
        config.write_text(config.read_text().replace(str(home), str(tmp_path)))
    return Path("cut")


def start(call, out="a", *more):
    return call([*SMALL, "--model", "m", "--no-eval", "--out", out, *map(str, more)])


def resume(call, out="cut", *more):
    return call(["--resume", "--out", out, *map(str, more)])


def at_step(monkeypatch, step: int, do):
    """Have do() called in a step."""
    original, count = train.compute_gradients, [0]

    def gradients(*arguments):
        count[0] += 1
        if count[0] == step:
            do()
        return original(*arguments)

    monkeypatch.setattr(train, "compute_gradients", gradients)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def weights(out) -> bytes:
    return Path(out, "model/model.safetensors").read_bytes()


def records(out) -> list[dict]:
    lines = Path(out, "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in ("seconds", "tokens_per_s")} for x in lines]


def refused(found, *expected: str) -> str:
    status, told = found
    assert status == 2 and len(told) == 1 and told[0].startswith("error: "), found
    assert all(text in told[0] for text in expected), told
    return told[0]


# ---------------------------------------------------------------------------------------------------------- damage


def test_a_damaged_file_is_told_or_makes_no_difference(cli, cut):
    names = [
        "config.json",
        "log.jsonl",
        *(f"checkpoint/2/{name}" for name in ("weights.safetensors", "optimizer.safetensors", "manifest.json")),
    ]

    @few
    @given(
        st.sampled_from(names),
        st.sampled_from(["cut", "emptied", "flipped", "gone"]),
        st.floats(0, 0.999),
        st.integers(0, 7),
    )
    def check(name, how, where, bit):
        shutil.rmtree("copy", ignore_errors=True)
        shutil.copytree(cut, "copy")
        path = Path("copy", name)
        data = bytearray(path.read_bytes())
        at = int(where * len(data))
        data[at] ^= 1 << bit
        path.write_bytes({"cut": data[:at], "emptied": b"", "flipped": data, "gone": b""}[how])
        if how == "gone":
            path.unlink()
        status, told = found = resume(cli, "copy")
        if status == 0:
            assert weights("copy") == weights("whole") and records("copy") == records("whole")
        else:
            assert name.split("/")[-1] in refused(found) or "copy" in told[0]

    check()


def without_moments(folder):
    state = load_file(folder / "optimizer.safetensors")
    return {name: x for name, x in state.items() if not name.startswith("lm_head")}


def other_shape(folder):
    return load_file(folder / "optimizer.safetensors") | {"model.norm.weight/exp_avg": torch.zeros(1)}


def nan_moment(folder):
    return load_file(folder / "optimizer.safetensors") | {"model.norm.weight/exp_avg": torch.full((32,), math.nan)}


def other_step(folder):
    return load_file(folder / "optimizer.safetensors") | {"model.norm.weight/step": torch.tensor(999.0)}


@pytest.mark.parametrize("change", [without_moments, other_shape, nan_moment, other_step])
def test_a_checkpoint_that_does_not_fit_is_refused_though_its_checksums_are_right(cli, cut, change):
    folder = cut / "checkpoint/2"
    save_file(change(folder), folder / "optimizer.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["optimizer.safetensors"] = files.digest(folder / "optimizer.safetensors")
    files.write_json(folder / "manifest.json", manifest)
    refused(resume(cli), "damaged checkpoint", "optimizer.safetensors", "step 1, whose checkpoint is whole")


def test_an_older_checkpoint_is_named_and_leads_to_the_same_end(cli, cut):
    manifest = json.loads((cut / "checkpoint/2/manifest.json").read_text())
    files.write_json(cut / "checkpoint/2/manifest.json", manifest | {"step": 999})
    told = refused(resume(cli), "of step 999", "remove it to go on from step 1")
    (cut / "checkpoint/1/weights.safetensors").write_bytes(b"")
    assert "go on from the start" in resume(cli)[1][0]
    shutil.rmtree(told.split()[1].rstrip(":"))
    refused(resume(cli), "checkpoint/1", "from the start")
    shutil.rmtree(cut / "checkpoint/1")
    assert resume(cli)[0] == 0
    assert weights("cut") == weights("whole") and records("cut") == records("whole")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
SETTINGS = sorted(runs.FIELDS)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"lr": "1e-4"}, "'config.lr' is \"1e-4\""),
        ({"batch_size": 0}, "--batch-size 0: must be positive"),
        ({"epochs": None}, "'config.epochs' is null"),
        ({"epochs": -1.0}, "--epochs -1.0: must be positive"),
        ({"colour": 1}, "'colour' is none of this version's"),
        ({"lr": 0.02}, "its settings are not those of step 2"),
        ({"schedule": "cosine"}, "--schedule cosine: is none of linear, constant"),
    ],
)
def test_an_edited_config_is_refused_as_the_flag_would_be(cli, cut, changes, told):
    record = json.loads((cut / "config.json").read_text())
    files.write_json(cut / "config.json", record | {"config": record["config"] | changes})
    refused(resume(cli), told)


def test_any_config_ends_in_one_line_or_the_same_run(cli, cut):
    record = json.loads((cut / "config.json").read_text())

    @settings(few, max_examples=20)
    @given(st.sampled_from(SETTINGS), JSON | st.just(...))
    def check(name, value):
        shutil.rmtree("copy", ignore_errors=True)
        shutil.copytree(cut, "copy")
        config = {k: v for k, v in record["config"].items() if k != name} | ({} if value is ... else {name: value})
        files.write_json(Path("copy/config.json"), record | {"config": config})
        status, _ = found = resume(cli, "copy")
        if status == 0:
            for one, other in zip(records("copy"), records("whole"), strict=True):
                assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
        else:
            refused(found)

    check()


# --------------------------------------------------------------------------------------- another place, other inputs


def test_a_run_goes_on_where_it_is_now_from_any_directory(cli, cut, tmp_path, monkeypatch):
    """Not where its config.json says: that may be another's."""
    shutil.copytree(cut, tmp_path / "else/where")
    record = json.loads((cut / "config.json").read_text())
    record["config"]["out"] = str(tmp_path / "victim")
    files.write_json(tmp_path / "else/where/config.json", record)
    before = sorted(p.name for p in tmp_path.iterdir())
    monkeypatch.chdir(tmp_path / "else")
    assert resume(cli, "where")[0] == 0 and Path.cwd() == tmp_path / "else"
    assert weights("where") == weights("../whole") and sorted(p.name for p in tmp_path.iterdir()) == before
    assert not (tmp_path / "cut/model").exists()


@pytest.mark.parametrize("name", ["checkpoint", "log.jsonl", "memory.json"])
def test_a_link_in_a_run_folder_is_not_followed(cli, cut, tmp_path, name):
    target = Path(shutil.move(cut / name, tmp_path / "victim") if (cut / name).exists() else tmp_path / "victim")
    (cut / name).symlink_to(target)
    before = sorted(p.name for p in target.iterdir()) if target.is_dir() else target.exists() and target.read_bytes()
    refused(resume(cli), f"cut/{name}: is a link")
    assert before == (
        sorted(p.name for p in target.iterdir()) if target.is_dir() else target.exists() and target.read_bytes()
    )


def change_weights():
    path = Path("m/model.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


CHANGES = {
    "forget f.jsonl (rows, fingerprint)": lambda: rows("f.jsonl", range(7)),
    "retain r.jsonl (fingerprint)": lambda: rows("r.jsonl", range(10, 21)),
    "m (model.safetensors)": change_weights,
    "tokenizer (tokenizer_config.json)": lambda: Path("m/tokenizer_config.json").write_text(
        Path("m/tokenizer_config.json").read_text() + " "
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_inputs_are_named_and_taken_on_request(cli, cut, what):
    CHANGES[what]()
    refused(resume(cli), what, "changed since the run began", "--resume-anyway")
    assert cli(["--resume-anyway", "--out", "cut"])[0] == 0
    assert len(json.loads((cut / "config.json").read_text())["changed"]) == 1


def test_a_changed_retain_log_is_named(cli, monkeypatch):
    log = {"rows": {"forget": {f"toy_forget10/{i}": {"truth_ratio": 0.5} for i in range(4)}}}
    files.write_json(Path("log.json"), log)
    arguments = [*SMALL[:8], "--forget", "toy_forget10[:4]", "--retain", "toy_retain90[:8]", "--model", "m", "--out", "a"]
    arguments += ["--retain-logs", "log.json", "--eval-retain", "toy_retain_perturbed[:2]", "--max-new-tokens", "2"]
    original = tofu.evaluation_sets
    short = {"ra": "[:2]", "wf": "[:2]"}
    monkeypatch.setattr(tofu, "evaluation_sets", lambda *a: {k: v + short.get(k, "") for k, v in original(*a).items()})
    with monkeypatch.context() as patch:
        at_step(patch, 1, interrupt)
        assert cli(arguments)[0] == 130
    shutil.copytree("a", "b")
    assert resume(cli, "b")[0] == 0  # the same log, though named by a relative path at the start
    log["rows"]["forget"]["toy_forget10/1"]["truth_ratio"] = 0.4
    files.write_json(Path("log.json"), log)
    refused(resume(cli, "a"), "retain_logs", "changed since the run began")


def test_inputs_may_lie_elsewhere_as_long_as_they_are_the_same(cli, cut):
    Path("m").rename("moved")
    refused(resume(cli), "m", "no such folder")
    assert resume(cli, "cut", "--model", "moved")[0] == 0 and weights("cut") == weights("whole")
    assert json.loads((cut / "config.json").read_text())["config"]["model"] == str(Path("moved").absolute())


def test_a_model_of_the_hub_is_taken_at_the_commit_that_the_run_began_with(cut):
    path = cut / "config.json"
    record = json.loads(path.read_text())
    for name, commit, expected in (
        ("acme/tiny", "abc", "acme/tiny@abc"), ("acme/tiny@v1", "abc", "acme/tiny@v1"), ("llama2-7b", "abc", "llama2-7b"),
        ("acme/tiny", None, "acme/tiny"),
    ):  # fmt: skip
        changed = record | {"model_commit": commit, "config": record["config"] | {"model": name}}
        path.write_text(json.dumps(changed))
        assert runs.read_config(cut, {})[0].model == expected
    assert runs.read_config(cut, {"model": "m"})[0].model == str(Path("m").absolute())


def test_a_config_that_would_make_the_toy_elsewhere_is_refused(cli, cut, tmp_path):
    record = json.loads((cut / "config.json").read_text())
    config = record["config"] | {"model": "toy", "forget": "toy_forget10", "retain": None}
    (cut / "config.json").write_text(json.dumps(record | {"config": config, "directory": str(tmp_path / "other")}))
    refused(resume(cli), "model is 'toy'")
    assert not (tmp_path / "other").exists()


def test_an_unfinished_run_is_no_model(cli, cut):
    arguments = [*SMALL, "--no-eval", "--out", "b", "--model", str(cut)]
    refused(cli(arguments), "is a run without its model/", "--resume --out cut")


def test_machine_settings_may_change_and_are_recorded(cli, cut):
    more = "--micro-batch-size 2 --gradient-checkpointing --reference recompute --device cpu --keep 1 --save-every 0".split()
    assert resume(cli, "cut", *more)[0] == 0
    kept = json.loads((cut / "config.json").read_text())["config"]
    assert (kept["micro_batch_size"], kept["reference"], kept["save_every"]) == (2, "recompute", 0)
    assert [r["step"] for r in records("cut")] == [1, 2, 3]
    assert records("cut")[-1]["loss"] == pytest.approx(records("whole")[-1]["loss"], rel=1e-3)
    refused(resume(cli, "cut", "--lr", "1"), "was started with lr = 0.01")
    refused(resume(cli, "cut", "--micro-batch-size", "-1"), "must be 0 or more")


# ------------------------------------------------------------------------------------------------------ interruptions

ANCHORED = ["--preset", "anchored", "--tau=-4"]
PLACES = {
    "loading": ("load_pretrained", signal.SIGINT),
    "encoding": ("encode", signal.SIGTERM),
    "memory": ("mark_memory", signal.SIGINT),
    "reference": ("make_reference", signal.SIGTERM),
    "saving": ("save_checkpoint", signal.SIGINT),
    "the model": ("save_pretrained", signal.SIGTERM),
    "the end": ("find_hints", signal.SIGINT),
}


@pytest.fixture(scope="module")
def anchored(home):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert start(train.main, "anchored", *ANCHORED) == 0
    return home / "anchored"


@pytest.mark.parametrize("place", PLACES)
def test_an_interruption_anywhere_is_one_line_and_loses_no_step(cli, anchored, monkeypatch, place):
    name, sent = PLACES[place]
    with monkeypatch.context() as patch:
        original = getattr(train, name)
        patch.setattr(train, name, lambda *a, **k: os.kill(os.getpid(), sent) or original(*a, **k))
        status, told = start(cli, "a", *ANCHORED)
    assert status == 130 and "interrupted" in told[-1] and "go on with: " in told[-1]
    if place in ("saving", "the model", "the end"):
        assert checkpoint.checkpoint_step(Path("a")) == len(records("a")) > 0
    again = resume(cli, "a") if "--resume" in told[-1] else start(cli, "a", *ANCHORED)
    assert again[0] == 0 and weights("a") == weights(anchored) and records("a") == records(anchored)


def test_an_interruption_of_an_evaluation_between_epochs_loses_no_step(cli, monkeypatch):
    model, out = train.load_pretrained("m", dtype=torch.float32), Path("a")
    out.mkdir()
    files.write_json(out / "config.json", {})
    config = train.Config(epochs=2.0, batch_size=4, eval_every=1.0, save_every=0, retain_loss="none", forget_loss="ga")
    examples = {"forget": train.encode(train.Config(finetune="f.jsonl"), {"finetune": train.benchmark_of("f.jsonl").load(
        "f.jsonl", None, 0)}, train.evaluation.open_source("m", "target"))["finetune"]}  # fmt: skip
    with pytest.raises(runs.Interrupted, match="after step 1 of 3"):
        train.train(model, config, examples, out, lambda *a: interrupt() or __import__("time").sleep(5))
    assert checkpoint.checkpoint_step(out) == 1


def test_a_run_killed_in_its_last_second_is_cleaned_up_and_shown_again(cli, cut, capsys):
    assert resume(cli)[0] == 0
    (cut / "checkpoint/3").mkdir(parents=True)
    assert resume(cli)[0] == 0 and not (cut / "checkpoint").exists()
    (cut / "summary.json").write_text('{"mod')
    refused(resume(cli), "summary.json", "eval.py --model cut")
    (cut / "summary.json").unlink()
    refused(resume(cli), "its model is there", "eval.py --model cut")


# ------------------------------------------------------------------------------------------------- two at a time, space


def test_a_run_that_another_process_works_in_is_refused_and_a_number_is_taken_once(cli, cut):
    code = "import files, sys\nwith files.lock('cut'): print('held', flush=True), sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert other.stdout.readline() == b"held\n"
        refused(resume(cli), f"process {other.pid} works in it")
    finally:
        other.communicate(b"")
    config = train.make_config({"model": "m"})
    with runs.opened(None, config) as first, runs.opened(None, config) as second:
        assert (first.name[-4:], second.name[-4:]) == ("-001", "-002") and first.is_dir() and second.is_dir()
    assert not first.exists() and not second.exists()  # nothing came of them


def test_a_folder_that_is_empty_or_was_killed_in_before_it_began_can_start(cli):
    Path("a").mkdir()
    Path("a/.lock").touch()
    Path("a/.config.json.123.part").touch()
    refused(resume(cli, "a"), "no run of this program", "nothing to go on with")
    assert start(cli)[0] == 0 and not list(Path("a").glob(".*"))
    assert not list(Path("a").glob(".*"))


@pytest.mark.usefixtures("cut")
def test_without_room_nothing_is_trained_or_lost(cli, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 10))
        refused(start(cli), "needs 0.000", "--save-every 0")
    shutil.rmtree("a")
    with monkeypatch.context() as patch:
        write = files.JsonLines.add

        def full(self, record):
            if record.get("step") != 3:
                return write(self, record)
            with self.path.open("a") as file:
                file.write('{"step": 3, "lo')
            raise files.room(self.path, OSError(28, "No space left on device"), self.error)

        patch.setattr(files.JsonLines, "add", full)
        refused(start(cli, "b"), "log.jsonl", "No space left")
    assert resume(cli, "b")[0] == 0 and weights("b") == weights("whole") and records("b") == records("whole")


@pytest.mark.usefixtures("cut")
def test_a_run_goes_on_where_there_is_no_room_for_another_checkpoint(cli, monkeypatch, capsys):
    one = 3 * sum(x.numel() * 4 for x in load_file("m/model.safetensors").values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, int(1.5 * one)))
    refused(start(cli), "needs", "--save-every 0")  # the next one is written beside the last
    free = iter([2 * one, one - 1, 9 * one, one - 1])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, next(free)))
    assert train.main([*SMALL, "--model", "m", "--no-eval", "--out", "b", "--save-every", "1"]) == 0
    told = capsys.readouterr()
    assert weights("b") == weights("whole") and (told.out + told.err).count("not saved at step") == 2


@pytest.mark.usefixtures("cut")
def test_nothing_is_saved_on_request_but_where_the_run_stops(cli, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", None)
        assert start(cli, "b", "--save-every", "0")[0] == 0
    with monkeypatch.context() as patch:
        at_step(patch, 2, interrupt)
        assert start(cli, "a", "--save-every", "0")[0] == 130
    assert resume(cli, "a")[0] == 0 and weights("a") == weights("whole")


def test_a_removed_folder_is_told(cli, monkeypatch):
    at_step(monkeypatch, 2, lambda: shutil.rmtree("a"))
    refused(start(cli), "was removed while the run worked in it")


@pytest.mark.parametrize("name", ["two\nlines", "b\udcff", "nul\0"])
def test_a_name_that_no_file_or_line_can_hold_is_refused_before_the_training(cli, name):
    refused(start(cli, name), "--out", "rename it")


def test_closed_streams_stop_nothing(cli, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert train.main(["--resume"]) == 2


def test_a_name_of_formula_signs_is_a_name(cli):
    assert start(cli, "a$\\foo$ +[x]")[0] == 0


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize(
    "place, flags, told",
    [
        ("load_pretrained", [], "take a smaller model, or another --device"),
        ("compute_gradients", [], "--resume --out a --micro-batch-size 2"),
        ("mark_memory", ["--micro-batch-size", 1], "--resume --out a --gradient-checkpointing"),
        ("make_reference", ["--micro-batch-size", 1, "--gradient-checkpointing"], "shorter texts, or another --device"),
    ],
)
def test_too_little_memory_is_one_line_with_what_to_lower(cli, monkeypatch, place, flags, told):
    for error in MEMORY:

        def fail(*arguments, error=error, **more):
            raise error

        monkeypatch.setattr(train, place, fail)
        refused(start(cli, "a", "--preset", "anchored", *flags), "out of memory", told)
        shutil.rmtree("a", ignore_errors=True)


def test_a_model_that_is_not_finite_at_the_end_is_not_saved(cli, monkeypatch):
    original = torch.optim.AdamW.step

    def broken(self, *arguments):
        original(self, *arguments)
        if Path("a/log.jsonl").exists() and len(records("a")) == 2:
            self.param_groups[0]["params"][0].data[0] = math.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    for more in ([], ["--save-every", "0"]):
        assert "not finite" in refused(start(cli, "a", *more), "start anew with a lower --lr")
        assert not Path("a/model").exists() and checkpoint.checkpoint_step(Path("a")) in (0, 2)
        shutil.rmtree("a")


# ------------------------------------------------------------------------------------------------------- the best model


@settings(few, max_examples=8)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.3, 0.8]), st.sampled_from([0.2, 0.69, 0.73, 0.9])), min_size=1, max_size=4)
)
def test_the_best_model_forgets_most_of_those_that_stay_useful(points):
    """The target's utility is 0.8; the stated rule, written out."""
    evaluations = object.__new__(train.Evaluations)
    evaluations.least = config.KEPT * 0.8
    found = evaluations.best([{"step": i, "forget_quality": q, "model_utility": u} for i, (q, u) in enumerate(points)])
    useful = [i for i, (_, u) in enumerate(points) if u >= 0.9 * 0.8]
    least = max(u for _, u in points)
    expected = max(useful, key=lambda i: points[i][0]) if useful else [u for _, u in points].index(least)
    assert found["step"] == expected


def test_the_best_model_is_kept_and_said(cli, monkeypatch, capsys):
    original, models = tofu.Tofu.summary, {}

    def summary(self, log, reference, where):
        scores, where = original(self, log, reference, where)
        best = "epoch-1-" in str(log.get("path"))
        return scores | {"forget_quality": 0.9 if best else 0.1, "model_utility": 0.5}, where

    evaluate = train.Evaluations.on_epoch

    def on_epoch(self, model, step, epoch, last):
        models[step] = {n: p.clone() for n, p in model.state_dict().items()}
        evaluate(self, model, step, epoch, last)

    monkeypatch.setattr(tofu.Tofu, "summary", summary)
    monkeypatch.setattr(train.Evaluations, "on_epoch", on_epoch)
    arguments = [*SMALL[:8], "--forget", "toy_forget10[:8]", "--retain", "toy_retain90[:8]", "--model", "m", "--keep-best"]
    arguments += ["--eval-rows", "2", "--max-new-tokens", "2", "--retain-model", "m"]
    refused(cli([*arguments, "--out", "a"]), "--keep-best", "--eval-every")
    refused(cli([*arguments[:-2], "--eval-every", "1", "--out", "a", "--no-eval"]), "--keep-best")
    assert cli([*arguments, "--eval-every", "1", "--out", "a"])[0] == 0
    kept = json.loads(Path("a/summary.json").read_text())["kept"]
    assert (kept["step"], kept["epoch"]) == (2, 1.0) and "forget quality" in kept["rule"]
    found = train.load_pretrained("a").state_dict()
    assert all(torch.equal(found[n], models[2][n].to(found[n].dtype)) for n in found)
    assert not torch.equal(found["lm_head.weight"], models[4]["lm_head.weight"]) and not list(Path("a").glob("best-*"))
