"""Several processes under torchrun are the run of one: its losses, weights, scores, checkpoints, however many they are."""

import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import forks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import launch, tiny, told

import checkpoint
import dipo
import distributed
import train
from eval import main as evaluate
from model import load_pretrained

pytestmark = pytest.mark.aside
SMALL = "train --forget toy_forget10[:9] --retain toy_retain90[:20] --lr 1e-3 --epochs 1 --max-new-tokens 4".split()
PAIRS = [(f, r) for f in dipo.loss_names("forget") for r in (*dipo.loss_names("retain"), "none")]
SAMPLE = int(os.environ.get("PAIRS", "3"))  # of pairs of losses; PAIRS=40 tries all but a few, and compiles some


def records(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in lines]


def assert_same_run(folder: Path, other: Path) -> None:
    """The same to rounding in float32. AdamW makes whole steps of gradients that are rounding alone, as those of a KL to the
    start or of weights that nothing uses, so that only what comes before the first step is compared so for all losses."""
    logs, config = [*zip(records(folder), records(other), strict=True)], json.loads((folder / "config.json").read_text())
    exact = len(logs) if config["config"]["forget_loss"] == config["config"]["retain_loss"] == "dipo" else 1
    for i, (one, two) in enumerate(logs):
        assert one == pytest.approx(two, **(dict(rel=1e-5, abs=2e-5) if i < exact else dict(rel=0.1, abs=0.02)))
    a, b = (dict(load_pretrained(f / "model").named_parameters()) for f in (folder, other))
    assert a.keys() == b.keys()
    start = dict(load_pretrained(config["model_folder"]).named_parameters())
    x, y, z = (torch.cat([p.flatten() for _, p in sorted(w.items())]) for w in (a, b, start))
    assert (x - y).norm() <= 0.1 * (x - z).norm() or logs[0][0]["grad_norm"] < 1e-2


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    """{name: (folder of one process's run, folder of several processes')}, and what torchrun printed."""
    home, seed = tmp_path_factory.mktemp("ranks"), request.config.getoption("--hypothesis-seed")
    rng = random.Random(seed)
    models = {tied: tiny(home / f"tied-{tied}", tie_word_embeddings=tied) for tied in (True, False)}

    def flags(losses) -> list[str]:
        sizes = ["--batch-size", rng.randint(3, 7), "--micro-batch-size", rng.randint(1, 4)]
        memory = ["--tau=-4"] if losses[1] != "none" else ["--positions", "all"]
        more = ["--gradient-checkpointing"] * rng.randint(0, 1) + memory * losses[0].startswith("anchored")
        more += ["--max-grad-norm", "0.5"] * rng.randint(0, 1) + ["--compile"] * (SAMPLE > 9 and rng.random() < 0.1)
        both = ["--model", models[rng.random() < 0.5], "--forget-loss", losses[0], "--retain-loss", losses[1]]
        return [*SMALL, *map(str, [*both, *sizes, *more])]

    jobs, plain = {2: [], 3: []}, {}
    pairs = [("dipo", "dipo"), ("anchored", "anchored"), *rng.sample(PAIRS, SAMPLE)]
    for i, losses in enumerate(pairs):
        name = f"{i}-{'+'.join(losses)}"
        argv = [*flags(losses), "--no-eval"]
        jobs[2 + i % 2].append({"argv": [*argv, "--out", f"several/{name}"]})
        plain[name] = argv
    evaluated = [*flags(("dipo", "gd")), "--epochs", "2", "--eval-rows", "5", "--eval-every", "1", "--keep-best"]
    evaluated += ["--retain-model", str(models[True])]
    offloaded = [*flags(("npo", "gd")), "--no-eval"]
    jobs[2].append({"argv": [*offloaded, "--cpu-offload", "--out", "several/offloaded"]})
    plain["offloaded"] = offloaded
    jobs[2].append({"argv": [*evaluated, "--out", "several/evaluated"]})
    plain["evaluated"] = evaluated
    long = [*SMALL, "--model", str(models[False]), "--batch-size", "2", "--epochs", "2", "--no-eval"]
    for name, fault in (("stopped", "terminate"), ("nan", "nan"), ("full", "memory of all"), ("killed", "kill")):
        jobs[2].append({"argv": [*long, "--out", f"several/{name}"], "fault": fault, "last": fault == "kill"})
    plain["stopped"] = plain["full"] = long
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        with ThreadPoolExecutor() as pool:  # both at once
            launched = pool.submit(launch, home, 2, jobs[2])
            for name, (_, *argv) in plain.items():
                assert train.main([*argv, "--out", f"plain/{name}"]) == 0, argv
            first = launched.result()
        assert len(first.statuses) == len(jobs[2]) - 1, first.stderr[-4000:]
        shutil.copytree("several/stopped", "several/alone")
        asked = f"eval --model {models[True]} --retain-model {models[False]} --forget toy_forget10[:9] --max-new-tokens 4"
        assert evaluate(f"{asked} --out one.json".split()[1:]) == 0
        jobs[3].append({"argv": f"{asked} --out several.json".split()})
        resumed = [{"argv": ["train", "--resume", "--out", f"several/{name}"]} for name in ("stopped", "full")]
        second = launch(home, 3, [*jobs[3], *resumed])
        assert len(second.statuses) == len(jobs[3]) + 2, second.stderr[-4000:]
        assert train.main(["--resume", "--out", "several/alone"]) == 0
    found = {name: (home / "plain" / name, home / "several" / name) for name in plain}
    return found | {"alone": (home / "plain/stopped", home / "several/alone")}, first, second, seed


def test_the_number_of_processes_changes_no_loss_and_no_weight(runs):
    found, first, second, seed = runs
    assert {*first.statuses} == {0, 2, 130}, first.stderr[-2000:]
    assert {*second.statuses} == {0}, second.stderr[-2000:]
    for one, several in found.values():
        assert_same_run(one, several)


def test_each_process_evaluates_its_share_and_the_scores_are_those_of_one(runs):
    one, several = runs[0]["evaluated"]
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (one, several))
    for name in ("target", "unlearned", "retrained"):
        assert a[name]["parts"] == pytest.approx(b[name]["parts"], rel=1e-4)
    a, b = (json.loads((one.parent.parent / f"{name}.json").read_text()) for name in ("one", "several"))
    assert a["model"]["parts"] == pytest.approx(b["model"]["parts"], rel=1e-4)
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (one, several))
    assert a["kept"] == b["kept"] and [*several.glob("eval/*/journal*")] == []
    points = [(folder / "trajectory.jsonl").read_text().splitlines() for folder in (one, several)]
    assert len(points[0]) == len(points[1]) == 2


def test_a_terminated_run_saves_once_and_goes_on_with_another_number_of_processes(runs):
    """The others in `test_the_number_of_processes_changes_no_loss_and_no_weight`: resumed with three, and with one."""
    _, first, _, _ = runs
    assert sum(line.startswith("interrupted after step 3 of 9") for line in told(first)) == 1


def test_not_a_number_on_one_process_stops_all_with_one_line(runs):
    _, first, _, _ = runs
    assert sum("is nan" in line for line in told(first)) == 1


def test_a_process_that_is_killed_ends_the_run_with_one_line(runs):
    """The last job of the first launch, behind one that is terminated, one that meets NaN and one without memory."""
    _, first, _, _ = runs
    assert first.returncode and len(told(first)) == 4 and "another process of this run has ended" in told(first)[-1]


def test_offloading_needs_torchrun(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main([*SMALL[1:], "--model", str(tiny(tmp_path)), "--no-eval", "--cpu-offload"]) == 2
    assert "torchrun" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- shares, without torch


class Rank:
    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world


@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 20))
def test_passes_cover_the_queue_once_and_are_as_many_on_every_rank(n, world, size):
    queue, found, counts = list(range(n)), [], set()
    for rank in range(world):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "_ranks", Rank(rank, world))
            mine = [*distributed.passes(queue, size)]
        found += [x for items, real in mine if real for x in items]
        counts.add(len(mine))
        assert all(0 < len(items) <= size for items, _ in mine)
    assert sorted(found) == queue and counts == {math.ceil(math.ceil(n / world) / size)}


@given(st.integers(1, 40), st.integers(1, 9))
def test_rows_are_cut_as_chunks_are(n, world):
    tensor = torch.arange(n)
    chunks = [*tensor.chunk(world), *[tensor[:0]] * world]
    for rank in range(world):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "_ranks", Rank(rank, world))
            assert tensor[distributed.rows_of(tensor)].equal(chunks[rank])


@given(st.integers(1, 30), st.integers(1, 7), st.data())
def test_shards_hold_any_rows(tmp_path_factory, n, world, data):
    from contextlib import ExitStack

    from safetensors.torch import save_file

    folder, tensor = tmp_path_factory.mktemp("shards"), torch.arange(2 * n).view(n, 2)
    names = checkpoint.shard_names("weights", world)
    for name, rows in zip(names, [*tensor.chunk(world), *[tensor[:0]] * world], strict=False):
        save_file({"x": rows.contiguous(), "step": torch.tensor(1.0)}, folder / name)
    start = data.draw(st.integers(0, n))
    rows = slice(start, data.draw(st.integers(start, n)))
    with ExitStack() as stack:
        shards = checkpoint.Shards([folder / name for name in names], stack)
        assert shards.read("x", rows).equal(tensor[rows]) and shards.rows("x") == n
        assert shards.read("step", None) == 1


def test_what_is_longer_than_the_store_takes_is_exchanged_in_pieces(monkeypatch):
    monkeypatch.setattr(distributed, "PIECE", 3)
    values, found, store = ["äöü" * 5, {"a": [1.5, None]}], {}, torch.distributed.HashStore()
    ranks = [distributed.Ranks(store, i, 2, i) for i in range(2)]

    def work(i: int) -> None:
        found[i] = [ranks[i].gather(values[i]), ranks[i].gather(i)]

    threads = [Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for rank in ranks:
        rank.ended.set()
    assert found == {0: [values, [0, 1]], 1: [values, [0, 1]]}


def test_who_waits_for_one_that_waits_elsewhere_is_told(monkeypatch):
    store = torch.distributed.HashStore()
    one, two = (distributed.Ranks(store, i, 2, i) for i in range(2))
    store.set("meeting 1/1", "0")  # the second has begun `meet`
    with pytest.raises(distributed.RankError, match="process 1 was interrupted"):
        one.gather(None)
    one.meet()  # and so it goes on
    one.ended.set()
    two.ended.set()


@given(st.data(), st.integers(2, 4), st.integers(1, 4))
def test_a_process_is_silent_after_so_many_turns_without_a_new_sign_whatever_its_clock_says(data, world, beats):
    """Turns of the one who watches: each other comes at some turn, shows a sign in some, and its clock may go backwards."""
    others, store = range(1, world), torch.distributed.HashStore()
    shows = {r: data.draw(st.lists(st.booleans(), min_size=12, max_size=12)) for r in others}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "BEATS", beats)
        patch.setattr(distributed.threading.Thread, "start", lambda thread: None)
        watcher, turns = distributed.Ranks(store, 0, world, 0), dict.fromkeys(others, -1)  # -1: has yet to come
        for turn in range(12):
            for r in others:
                if shows[r][turn]:
                    store.set(f"alive/{r}", repr(-float(turn)))
                turns[r] = 0 if shows[r][turn] else turns[r] + (turns[r] >= 0)
            silent = watcher.watch()
            assert silent == next((r for r in others if turns[r] >= beats), None)
            if silent is not None:
                break


WATCHED = """
import sys, time, torch, distributed
distributed.BEAT, sys.stdout = 0.02, open(1, "w")
store = torch.distributed.HashStore()
store.set("alive/1", "12.5")
ranks = distributed._ranks = distributed.Ranks(store, 0, 2, 0)
print("written before")
"""


def test_a_process_that_waits_in_a_collective_for_a_silent_one_ends_with_one_line():
    """In native code, which no signal and no exception reaches. Also where the first works for all; told once."""
    done = forks.run(["-c", f"{WATCHED}store.get('never')"])
    assert (done.returncode, done.stdout) == (2, "written before\n")
    assert re.fullmatch(r"\nerror: another process .*\(process 1 has shown no sign of life for 0 s\).*\n", done.stderr)
    done = forks.run(["-c", f"{WATCHED}store.add('told', 1)\nwith distributed.alone():\n    store.get('never')"])
    assert (done.returncode, done.stdout, done.stderr) == (2, "written before\n", "")


@pytest.mark.parametrize("what", ["ranks.ended.set()", "store.set('alive/1', str(i))"])
def test_a_process_that_has_ended_or_watches_one_that_lives_is_left_alone(what):
    done = forks.run(["-c", f"{WATCHED}for i in range(50):\n    {what}\n    time.sleep(0.02)"])
    assert (done.returncode, done.stderr) == (0, "")


def test_who_waits_for_the_group_shows_signs_of_life_all_the_same(monkeypatch):
    """A store's connection is its waiter's alone: a process that comes to the group early would seem dead to the others."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, 1, True)
    client = torch.distributed.TCPStore("127.0.0.1", server.port, 1, False)
    monkeypatch.setattr(distributed, "_ranks", ranks := distributed.Ranks(client, 0, 2, 0))
    found = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda kinds, **given: found.update(given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        distributed.shard(None, torch.device("cpu"), False, False)
    waiter = Thread(target=found["store"].get, args=("late",))
    waiter.start()
    time.sleep(0.2)
    signs = []
    watcher = Thread(target=lambda: signs.append((ranks.watch(), client.get("alive/0"))))
    watcher.start()
    watcher.join(10)
    assert signs and waiter.is_alive()
    server.set("group/late", "1")
    waiter.join(10)
    ranks.ended.set()
    assert not waiter.is_alive()


@pytest.mark.parametrize("lost", [{"files": {}}, {"records": {"mog.jsonl": {"bytes": 0, "sha256": "0" * 64}}}])
def test_a_manifest_of_other_files_is_damaged(tmp_path, lost):
    """Of a log under another name all lines would go."""
    named = {f"{kind}.safetensors": hashlib.sha256(b"").hexdigest() for kind in checkpoint.TENSORS}
    (tmp_path / "3").mkdir()
    for name in named:
        (tmp_path / "3" / name).touch()
    whole = {"step": 3, "settings": "", "files": named, "records": {}}
    (tmp_path / "3/manifest.json").write_text(json.dumps(whole))
    assert checkpoint.verified(tmp_path / "3") == whole
    (tmp_path / "3/manifest.json").write_text(json.dumps(whole | lost))
    with pytest.raises(checkpoint.RunError, match="does not name the files"):
        checkpoint.verified(tmp_path / "3")


def test_a_process_that_is_stopped_at_its_very_end_is_not_waited_for():
    launched = "distributed.joined = __import__('contextlib').nullcontext\nraise SystemExit(distributed.launch(lambda: {}))"
    failed = forks.run(["-c", WATCHED + "distributed.BEATS = 10**6\n" + launched.format(130)])
    assert failed.returncode == 130  # one that fails waits for nobody
    done = forks.run(["-c", WATCHED + launched.format(0)])
    assert done.returncode == 2 and "process 1 has shown no sign of life" in done.stderr


def test_sigterm_ends_every_script_as_ctrl_c_does():
    def main() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except KeyboardInterrupt:
            return 130
        return 1

    before = signal.getsignal(signal.SIGTERM)
    assert distributed.launch(main) == 130 and signal.getsignal(signal.SIGTERM) == before
