"""What `--plan` counts is what there is: parameters, what autograd keeps, a run's peak. And what is chosen by it."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import error_of, make_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

import checkpoint
import gpu
import model
import plan
import train
from attention import Packing
from bench import fits
from checkpoint import RunError
from config import AUTO, Config, Plan
from data import Example
from model import Llama, LlamaConfig
from plan import Machine, Pass

ROOT = Path(__file__).resolve().parent.parent


@st.composite
def shapes(draw):
    groups, k = draw(st.integers(1, 3)), 2 * draw(st.integers(1, 8))
    return LlamaConfig(
        vocab_size=draw(st.integers(2, 500)), hidden_size=draw(st.integers(2, 64)),
        intermediate_size=draw(st.integers(1, 96)), num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=groups * draw(st.integers(2, 3)), num_key_value_heads=groups, head_dim=k,
        tie_word_embeddings=draw(st.booleans()),
    )  # fmt: skip


CONFIGS = st.builds(
    Config,
    dtype=st.sampled_from(["float32", "bfloat16"]),
    compile=st.booleans(),
    gradient_checkpointing=st.booleans(),
    optimizer=st.sampled_from(["adamw", "adamw8bit"]),
    forget_loss=st.sampled_from(["dipo", "anchored", "npo", "ga"]),
    batch_size=st.integers(1, 8),
)
MACHINES = st.builds(Machine, st.sampled_from([0.0, 24e9, 141e9]), st.integers(1, 5), st.booleans())


def total(c, config, work, machine) -> int:
    return sum(plan.step(c, config, work, machine).values())


# ---------------------------------------------------------------------------------------------------------- what is counted


@given(shapes(), st.integers(1, 7))
def test_parameters_are_the_models_and_shared_by_rows(c, world):
    with torch.device("meta"):
        parameters = list(Llama(c).parameters())
    assert plan.count(c) == sum(p.numel() for p in parameters)
    assert plan.count(c, world) == sum(p.chunk(world)[0].numel() for p in parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(shapes(), st.lists(st.integers(2, 9), min_size=1, max_size=3))
@settings(max_examples=20)
def test_activations_are_what_autograd_keeps(dtype, c, lengths):
    """Of all blocks, by the storages that are saved, beside the parameters, their casts and the rotary positions."""
    network = Llama(c, dtype).init_weights(0)
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    kept = dict[int, torch.UntypedStorage]()

    def pack(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    n = sum(lengths)
    angles = torch.zeros(1, n, c.head_dim // 2)
    cos, sin = (f(torch.cat((angles, angles), -1))[:, None].to(dtype) for f in (torch.cos, torch.sin))
    x = torch.randn(1, n, c.hidden_size, dtype=dtype, requires_grad=True)
    with saved_tensors_hooks(pack, lambda x: x):
        for block in network.model.layers:
            x = block(x, cos, sin, None, Packing(lengths, x.device))
    measured = sum(s.nbytes() for key, s in kept.items() if key not in own)
    casts = sum(2 * p.numel() for p in network.model.layers.parameters() if p.ndim == 2 and dtype == torch.bfloat16)
    positions = 2 * n * c.head_dim * dtype.itemsize
    counted = plan.kept_of_block(c, dtype.itemsize, 4, False) * n * c.num_hidden_layers
    assert measured == counted + casts + positions


@given(shapes(), CONFIGS, MACHINES, st.integers(1, 200), st.integers(1, 50))
def test_a_plan_grows_with_what_is_asked_of_it(c, config, machine, tokens, answers):
    work = Pass(tokens, min(tokens, answers), min(tokens, answers))
    bytes_ = total(c, config, work, machine)
    assert bytes_ <= total(c, config, work._replace(tokens=tokens + 1), machine)
    assert bytes_ >= total(c, config, work._replace(first=True), machine)
    assert bytes_ >= total(c, dataclasses.replace(config, optimizer="adamw8bit"), work, machine)
    assert bytes_ >= total(c, config, work, machine._replace(cpu_offload=True)) or machine.world == 1
    if machine.world > 1:
        assert bytes_ >= total(c, config, work, machine._replace(world=machine.world + 1))


@given(
    shapes(),
    CONFIGS,
    MACHINES,
    st.lists(st.tuples(st.integers(2, 99), st.integers(1, 2)), min_size=1, max_size=20),
    st.data(),
)
def test_the_largest_micro_batch_is_the_fewest_passes_that_fit(c, config, machine, groups, data):
    def needed(size):
        tokens, answers = (sorted(x, reverse=True) for x in zip(*groups, strict=True))
        alike = sum(answers[: min(size, -(-config.batch_size // machine.world))])
        return total(c, config, Pass(sum(tokens[:size]), sum(answers[:size]), alike, size == len(groups)), machine)

    free = data.draw(st.sampled_from([needed(n) for n in range(1, len(groups) + 1)])) + data.draw(st.integers(-1, 1))
    size = plan.largest(c, config, groups, free, machine)
    fit = [n for n in range(1, len(groups) + 1) if needed(n) <= free]
    assert (size == 0) <= (len(groups) not in fit and 1 not in fit)
    if size:
        passes = -(-len(groups) // size)
        assert needed(size) <= free and size == -(-len(groups) // passes)
        assert not [n for n in fit if -(-len(groups) // n) < passes and n == -(-len(groups) // -(-len(groups) // n))]


def test_a_run_takes_what_is_predicted(tmp_path):
    """bench/memory.py's row of a small model, at its tightest: 15 % and 8 MB, of which the heap's grain is the most."""
    if not sys.platform.startswith("linux"):
        pytest.skip("peak memory is read from /proc")
    tiny = make_tiny(tmp_path)
    c = dataclasses.replace(tiny.model.config, hidden_size=256, intermediate_size=768, num_hidden_layers=4)
    folder = model.save_pretrained(Llama(c).init_weights(0), tmp_path / "wide", tmp_path / "tokenizer")
    settings = {"model": str(folder), "forget": "toy_forget10[:8]", "retain": "toy_retain90[:8]", "dtype": "float32"}
    settings |= {"batch_size": 8, "micro_batch_size": 8}
    command = [sys.executable, ROOT / "bench/memory.py", "--worker", json.dumps(settings)]
    quiet = {"MALLOC_MMAP_THRESHOLD_": "65536", "LRU_CACHE_CAPACITY": "1", "OMP_NUM_THREADS": "1"}  # as its QUIET
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert abs(found["predicted"] - found["measured"]) < 0.15 * found["measured"] + 8e6, found


# ------------------------------------------------------------------------------------------------------------------ --plan


def test_the_known_shapes_have_their_models_parameters():
    """As published: the numbers of parameters of Llama 2 and 3, to the unit."""
    counts = {name: plan.count(c) for name, c in plan.SHAPES.items()}
    assert counts == {
        "llama3.2-1b": 1_235_814_400, "llama3.2-3b": 3_212_749_824, "llama3.1-8b": 8_030_261_248,
        **dict.fromkeys(("llama2-7b", "muse-news", "muse-books"), 6_738_415_616),
        "llama2-13b": 13_015_864_320, "llama2-70b": 68_976_648_192,
    }  # fmt: skip


def test_a_plan_loads_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "opened", None)
    (tmp_path / "m").mkdir()
    raw = plan.SHAPES["llama3.2-1b"].to_dict(torch.bfloat16)
    (tmp_path / "m/config.json").write_text(json.dumps(raw))
    assert train.main(["--plan", "--model", "m", "--world-size", "2"]) == 0
    own = capsys.readouterr().out
    assert train.main(["--plan", "--model", "llama3.2-1b", "--world-size", "2"]) == 0
    assert capsys.readouterr().out.replace("llama3.2-1b", "m") == own and os.listdir() == ["m"]
    assert "1,235,814,400 parameters" in own and own.count("--gradient-checkpointing") == 3
    assert train.main(["--plan", "--model", "toy"]) == 2
    assert capsys.readouterr().err.startswith("error: --plan: the toy's models are made by its first run")


@pytest.mark.parametrize("words", [["--plan", "9"], ["--plan", "3,4"], ["--plan", "3,0"], ["--world-size", "2"]])
def test_a_plan_of_nothing_is_refused(words, capsys):
    with pytest.raises(SystemExit) as refused:
        train.parse_args(words)
    assert refused.value.code == 2


def test_a_plans_lengths_are_tofus_or_those_that_are_named():
    assert train.parse_args(["--plan"])[1] == Plan(1, 85, 37)
    assert train.parse_args(["--plan", "2048,1024", "--world-size", "8"])[1] == Plan(8, 2048, 1024)
    for words, n in (
        ("--model muse-news", 2048),
        ("--forget muse_books --model m", 2048),
        ("--model muse-books --max-length 512", 512),
    ):
        assert train.parse_args(["--plan", *words.split()])[1] == Plan(1, n, n)
    assert train.parse_args("--plan --model muse-news --finetune tofu_full".split())[1] == Plan(1, 85, 37)
    many, few = (plan.report(Config(model="llama2-7b"), Plan(1, n, 37)) for n in (2048, 85))
    assert "2048" in many and many != few


@given(CONFIGS, st.integers(1, 70), st.booleans())
@settings(max_examples=20)
def test_what_is_told_adds_up(config, world, offload):
    config = dataclasses.replace(config, model="llama2-13b", cpu_offload=offload)
    lines = plan.report(config, Plan(world, 85, 37)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("a rank's device"))
    sizes = [float(line.split()[-1]) for line in lines[start + 1 : lines.index("", start)]]
    assert sum(sizes[:-1]) == pytest.approx(sizes[-1], abs=0.001 * len(sizes))


def test_a_plan_without_a_micro_batch_has_that_of_auto_on_the_smallest_card_that_holds_it(capsys):
    table = {}
    for words in (
        "--model llama3.2-1b",
        "--model llama2-7b --world-size 2",
        "--model llama2-70b",
        "--model muse-news --gradient-checkpointing",
    ):
        assert train.main(["--plan", *words.split()]) == 0
        head, *lines = (said := capsys.readouterr().out)[said.index("ranks") :].splitlines()
        flags = "--gradient-checkpointing" if "checkpointing" in words else "(none of these)"
        table[words] = next(line.split()[-3:] for line in lines if line.strip().startswith(flags))
        fits = [(card, n) for card, n in zip(plan.CARDS, table[words], strict=True) if n != "-"]
        card, size = (*fits, (plan.CARDS[-1], "1"))[0]
        assert f", {size} in a pass (auto, on a card of {card} GB)" in head
        together = float(next(line.split()[-1] for line in lines if "together" in line))
        assert (together <= card) == bool(fits)
    assert table["--model llama2-70b"] == ["-"] * 3
    assert train.main("--plan --model llama2-7b --micro-batch-size 4".split()) == 0
    assert ", 4 in a pass; " in capsys.readouterr().out
    assert train.parse_args(["--plan", "--device", "cpu"])[0] == {"device": "cpu"}  # where auto is not the default
    assert train.main("--plan --model llama3.2-1b --device cpu --micro-batch-size auto".split()) == 0
    assert " in a pass (auto, on this machine); " in capsys.readouterr().out


def test_the_table_of_what_fits_is_the_plans():
    assert fits.table() in (ROOT / "docs/running.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------ --micro-batch-size auto


def tofu_like(n: int, seed: int) -> list[Example]:
    lengths = torch.randint(2, 60, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Example(f"{seed}/{i}", (5,) * (2 * k), k) for i, k in enumerate(lengths)]


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 3), st.sampled_from(["dipo", "dpo"]), st.integers(20, 40))
@settings(max_examples=30)
def test_auto_bounds_every_step(rows, batch, world, loss, power):
    """No pass of a step reads more than what was counted with, and no pass is larger than a rank's step."""
    examples = {"forget": tofu_like(rows, 0), "retain": tofu_like(13, 1)}
    examples["refusals"] = [tofu_like(3, 2 + i) for i in range(rows)]
    config = Config(micro_batch_size=AUTO, batch_size=batch, forget_loss=loss, retain_loss="gd", seed=power)
    groups = plan.groups_of(config, examples)
    for first in range(0, 3 * batch, batch):
        parts = train.draw_parts(config, examples, first, batch).values()
        real = sorted((sum(len(e.ids) - 1 for e in group) for part in parts for group in part.groups), reverse=True)
        assert len(real) == len(groups) and all(a <= b for a, (b, _) in zip(real, groups, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "free_memory", lambda device: 2**power)
        size = plan.micro_batch_size(config, LlamaConfig(400, 32, 64, 2, 4, 2, 8), examples, torch.device("cpu"), world)
    assert 1 <= size <= -(-2 * batch // world)


def test_auto_makes_one_pass_where_memory_holds_and_changes_no_number(tmp_path, monkeypatch, capsys):
    tiny, sizes = make_tiny(tmp_path), []
    monkeypatch.chdir(tmp_path)
    original = train.compute_gradients
    monkeypatch.setattr(train, "compute_gradients", lambda *args: sizes.append(args[4]) or original(*args))
    words = f"--model {tiny.folder} --forget toy_forget10[:6] --retain toy_retain90[:6] --batch-size 3 --epochs 1 --no-eval"
    logs = {}
    for name, flags, free in (
        ("given", [], 0), ("one", ["--micro-batch-size", "auto"], 1e12), ("least", ["--micro-batch-size", "auto"], 0)
    ):  # fmt: skip
        monkeypatch.setattr(plan, "free_memory", lambda device, free=free: free)
        assert train.main([*words.split(), *flags, "--out", name]) == 0
        logs[name] = [json.loads(line)["loss"] for line in Path(name, "log.jsonl").read_text().splitlines()]
    assert sizes == [8, 8, 6, 6, 1, 1]
    assert logs["one"] == pytest.approx(logs["given"], rel=1e-5) and logs["least"] == pytest.approx(logs["given"], rel=1e-5)
    assert "micro-batch: 6 of the 6 sequences of a step" in capsys.readouterr().out


def test_auto_is_the_default_on_gpus_alone(monkeypatch):
    presets = {"muse": 1, "toy": 16, "paper": 8}
    typed = {"muse": {"model": "m", "forget": "muse_news"}, "toy": {}, "paper": {"model": "m", "forget": "tofu_forget10"}}
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        for name, given_ in typed.items():
            assert train.make_config(given_).micro_batch_size == (AUTO if there else presets[name])
            assert train.make_config(given_ | {"device": "cpu"}).micro_batch_size == presets[name]
            assert train.make_config(given_ | {"micro_batch_size": 3}).micro_batch_size == 3


def test_free_memory_is_the_devices(tmp_path, monkeypatch):
    assert 2**24 < plan.free_memory(torch.device("cpu")) < 2**50
    known = {"memory_reserved": 50, "memory_allocated": 30, "mem_get_info": (100, 1000)}
    for name, value in known.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert plan.free_memory(torch.device("cuda")) == 120
    assert "pass a number" in error_of(plan.free_memory, torch.device("cpu"), tmp_path, kind=RunError)
    monkeypatch.setattr(Path, "read_text", lambda path: (_ for _ in ()).throw(PermissionError(str(path))))
    assert "pass a number" in error_of(plan.free_memory, torch.device("cpu"), kind=RunError)


@pytest.mark.parametrize("names", plan.CGROUPS, ids=["v2", "v1"])
def test_free_memory_is_the_machines_or_the_containers(tmp_path, names):
    def left() -> int:
        return plan.free_memory(torch.device("cpu"), tmp_path)

    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert left() == 5000 * 1024
    most, used = (tmp_path / names[0] / name for name in names[1:3])
    most.parent.mkdir(parents=True)
    used.write_text("3000000\n")
    total = "inactive_file 7\ntotal_" if names[3].startswith("total") else ""  # v1 tells the group's own first
    most.with_name("memory.stat").write_text(f"anon 1\n{total}inactive_file 500000\n")
    unlimited = 5000 * 1024
    cases = ("max", unlimited), ("9223372036854771712", unlimited), ("4000000", 1500000), ("9000000", unlimited), ("9", 0)
    for limit, expected in cases:
        most.write_text(limit + "\n")
        assert left() == expected


@pytest.mark.parametrize("card, world, head, block", [(0, 1, 8, 6), (80e9, 1, 6, 4), (80e9, 2, 6, 6)])
def test_gradients_are_rounded_where_products_are_not_wide(card, world, head, block):
    """Bytes of a bfloat16 pass of one token: of the head beside its copy, of a matrix's gradient in a block."""
    config, machine, work = Config(dtype="bfloat16"), Machine(card, world), Pass(1, 1, 1)
    for vocabulary, expected in (
        (500_000, head * 500_000 * 4096 + 4 * 500_000),
        (100, block * 4096 * 11008 + 6 * 11008 + 12 * 4096),
    ):
        assert plan.step(LlamaConfig(vocab_size=vocabulary), config, work, machine)["loss"] == expected


@pytest.mark.parametrize("memory, logits", [(24e9, 2**25), (80e9, 2**28), (0, 2**25)])
def test_a_gpu_with_room_holds_more_logits(monkeypatch, memory, logits):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    assert model.chunk_positions(1000, gpu.device_memory(torch.device("cuda"))) == logits // 1000
    assert model.chunk_positions(1000, gpu.device_memory(torch.device("cpu"))) == 2**25 // 1000
    assert model.chunk_positions(2**30) == 1


# -------------------------------------------------------------------------------------------------- --optimizer adamw8bit


def test_without_torchao_the_error_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else found(name, *a))
    words = "--model m --forget toy_forget10 --optimizer adamw8bit --out run"
    assert train.main(words.split()) == 2
    assert (
        capsys.readouterr().err
        == "error: --optimizer adamw8bit: needs torchao; pip install -e '.[8bit]', or drop the flag\n"
    )


@pytest.fixture
def torchao(monkeypatch):
    """Its step as it is, not compiled: that takes half a minute a shape."""
    pytest.importorskip("torchao", reason="torchao is not installed: pip install -e '.[8bit]'")
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: f)


EIGHT = (
    "--optimizer adamw8bit --forget toy_forget10[:6] --retain toy_retain90[:6] --batch-size 2 --epochs 2 --no-eval".split()
)


def run8(folder: Path, *flags: str) -> int:
    return train.main([*EIGHT, "--model", str(folder), *flags])


def wide(tmp_path: Path) -> Path:
    tiny = make_tiny(tmp_path)
    c = dataclasses.replace(tiny.model.config, hidden_size=64, intermediate_size=128)  # matrices of 4,096 numbers and more
    return model.save_pretrained(Llama(c).init_weights(0), tmp_path / "wide", tmp_path / "tokenizer")


def test_8_bit_moments_take_two_bytes_a_number_and_resume_exactly(tmp_path, monkeypatch, torchao):
    monkeypatch.chdir(tmp_path)
    folder, rates, kept = wide(tmp_path), [], []
    original, save = train.compute_gradients, train.save_checkpoint

    def saved(out, step, network, optimizer, *args):
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        kept.append(checkpoint.flat_state(optimizer, dict(network.named_parameters())))
        return save(out, step, network, optimizer, *args)

    monkeypatch.setattr(train, "save_checkpoint", saved)
    assert run8(folder, "--out", "whole", "--save-every", "1") == 0
    assert len({rate for pair in rates for rate in pair}) > 2 and all(a == b for a, b in rates)  # it is a tensor, and moves
    moments = {n: x for n, x in kept[-1].items() if "/exp_avg" in n and not n.endswith("qmap")}
    c = model.read_config(folder)
    counted = plan.count(c, each=lambda shape: plan.moments(Config(optimizer="adamw8bit"), shape))
    assert sum(x.numel() * x.element_size() for x in moments.values()) == counted < 3 * plan.count(c)

    def stop(*args):
        if args[0].stopped == 3:
            raise KeyboardInterrupt
        args[0].stopped += 1
        return original(*args)

    monkeypatch.setattr(Llama, "stopped", 0, raising=False)
    monkeypatch.setattr(train, "compute_gradients", stop)
    assert run8(folder, "--out", "cut") == 130
    monkeypatch.setattr(train, "compute_gradients", original)
    assert train.main(["--resume", "--out", "cut"]) == 0
    a, b = (dict(model.load_pretrained(out).named_parameters()) for out in ("whole", "cut"))
    assert all(torch.equal(a[n], b[n]) for n in a)
    losses = [[json.loads(x)["loss"] for x in Path(out, "log.jsonl").read_text().splitlines()] for out in ("whole", "cut")]
    assert losses[0] == losses[1]


def test_the_optimizer_decides_results():
    assert Config(optimizer="adamw8bit").results != Config().results
