"""Hostile input: whatever stands in a file that the program reads, it succeeds or says one line, soon, in little memory.

    python tests/hostile.py --count 30000 --seed 0         the long run, on one core; exits 1 where anything was found
    python tests/hostile.py --only tokenizer.json          one kind of file
    python tests/hostile.py --seed 0 --first 123 --count 1 one input again, told in full

A tiny world of models, data, logs and runs is built once. Each input is a copy of it with one or two files mutated (by their
bytes, their JSON, or what stands in their place), used in process by a forked child with 2 GB and 5 seconds of its own. It
must end in success, or in status 2 and one line `error: ...`, or for a function in a `UserError` of one line; nothing is
written outside the folder that is asked for, and a damaged checkpoint never ends in other weights. The seed decides all.
"""

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments"), str(ROOT / "tests")]

import common  # noqa: E402
import helpers  # noqa: E402
import matplotlib.figure  # noqa: E402, F401  what is imported here, no child imports again
import pyarrow.parquet  # noqa: E402
import rouge_score.rouge_scorer  # noqa: E402, F401
import scipy.stats  # noqa: E402, F401
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import eval as evaluation  # noqa: E402
import inference  # noqa: E402
import logs  # noqa: E402
import model as model_module  # noqa: E402
import muse  # noqa: E402
import tofu  # noqa: E402
import toy  # noqa: E402
import train  # noqa: E402
from files import UserError  # noqa: E402

SECONDS, MEMORY, BATCH = 5, 2 * 2**30, 50
SECRET = "SECRET-4711"  # stands outside of the folders that are given, and must not come in
SETS = ("forget01_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed", "forget01", "retain99")
ON_TOFU = "--forget tofu_forget01 --data-dir . --max-new-tokens 2".split()
ON_MUSE = "--forget muse_news --data-dir .".split()
TO_TRAIN = "--data-dir . --retain tofu_retain99 --batch-size 2 --micro-batch-size 2 --max-new-tokens 2 --lr 1e-3".split()


# ---------------------------------------------------------------------------------------------------------------- mutations


RAW = {  # what Python's json does not write
    "a number of 5,000 digits": "7" * 5000, "Infinity": "Infinity", "-Infinity": "-Infinity", "NaN": "NaN", "1e400": "1e400",
    "10,000 lists deep": "[" * 10_000 + "]" * 10_000, "10,000 objects deep": '{"a":' * 10_000 + "1" + "}" * 10_000,
    "900 lists deep": "[" * 900 + "]" * 900, "a lone surrogate": '"\\ud800"', "a null byte": '"a\\u0000b"',
    "an escape sequence": '"\\u001b[2J\\nerror: x\\u2028"', "400 digits": "9" * 400,
}  # fmt: skip
VALUES: list = [
    None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.5, 1e-300, 1e308, -1e308, 10**9, -(10**9), 2**31, 2**63, 10**18, 10**30,
    "", " ", "x", "1", "1e-4", "auto", "é\n", "../../outside/secret", "/dev/zero", "x" * 100_000, "](", "{}", "a\nb: c",
    [], {}, [[]], [None], [1, "x"], {"": {}}, {"a": 1}, [0] * 1000, [1.5], ["x"], {"0": 0.5},
]  # fmt: skip


def pick(value, rng: random.Random) -> tuple[list, object]:
    """(a place in a JSON value, as keys; what stands there)."""
    path: list = []
    while isinstance(value, (dict, list)) and value and (not path or rng.random() < 0.75):
        key = rng.choice([*value]) if isinstance(value, dict) else rng.randrange(len(value))
        path, value = [*path, key], value[key]
    return path, value


def mutate_json(text: str, rng: random.Random) -> tuple[str, str]:
    """(JSON with one place changed, what was done)."""
    value = json.loads(text)
    path, old = pick(value, rng)
    raw_name, raw = rng.choice([*RAW.items()])
    where = ".".join(map(str, path))[:60] or "all"
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    kinds = ["value", "value", "value", "raw", "near", "delete", "rename", "duplicate", "add", "wrap", "swap"]
    kind = rng.choice(kinds if path else ["value", "raw", "wrap"])
    new: object = rng.choice(VALUES)
    if kind == "raw":
        new = "\ue000"
    elif kind == "wrap":
        new = rng.choice([[old], {"x": old}, str(old), [old, old]])
    elif kind == "near" and isinstance(old, (int, float)):
        new = rng.choice([-old, old + 1, old - 1, old * 2, old * 10**6, float(old), str(old), old / 3])
    elif kind == "near" and isinstance(old, str):
        new = rng.choice([old[:-1], old + "x", old.upper(), old * 100, [old], " " + old])
    told = f"{where} = {str(new)[:40]!r}" if kind != "raw" else f"{where} = {raw_name}"
    if not path:
        value = new
    elif kind in ("delete", "rename") and isinstance(holder, dict):
        told = f"{where} {kind}d"
        del holder[path[-1]]
        if kind == "rename":
            holder[f"{path[-1]}_"] = old
    elif kind == "delete":
        told = f"{where} deleted"
        del holder[path[-1]]
    elif kind == "duplicate" and isinstance(holder, dict):
        told, holder[f"{path[-1]}\ue001"] = f"{where} twice, = {str(new)[:40]!r}", new
    elif kind == "add" and isinstance(holder, dict):
        told, holder[rng.choice(["x", "", "é", "a\nb"])] = f"{where}: another key beside", new
    elif kind == "swap":
        other = rng.choice([*holder]) if isinstance(holder, dict) else rng.randrange(len(holder))
        told = f"{where} and {other} swapped"
        holder[path[-1]], holder[other] = holder[other], old
    else:
        holder[path[-1]] = new
    return json.dumps(value, ensure_ascii=False).replace('"\ue000"', raw).replace("\ue001", ""), told


def mutate_lines(text: str, rng: random.Random) -> tuple[str, str]:
    lines = text.splitlines(keepends=True) or ["{}\n"]
    i = rng.randrange(len(lines))
    kind = rng.choice(["json", "json", "json", "json", "remove", "twice", "blank", "swap"])
    if kind == "json":
        lines[i], told = mutate_json(lines[i], rng)
        return "".join(lines[:i]) + lines[i] + "\n" + "".join(lines[i + 1 :]), f"line {i + 1}: {told}"
    changed = {"remove": [], "twice": [lines[i]] * 2, "blank": [lines[i], "\n"], "swap": [lines[-1]]}[kind]
    return "".join([*lines[:i], *changed, *lines[i + 1 :]]), f"line {i + 1}: {kind}"


def mutate_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    at = rng.randrange(len(data) + 1)
    kind = rng.choice(
        ["cut", "cut", "flip", "flip", "empty", "bom", "utf-16", "not utf-8", "null", "noise", "insert", "twice"]
    )
    if kind == "cut":
        return data[:at], f"cut at byte {at}"
    if kind == "flip" and data:
        flipped = bytearray(data)
        for _ in range(count := rng.choice([1, 1, 1, 4, 30])):
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(flipped), f"{count} bits flipped"
    if kind == "noise":
        return rng.randbytes(rng.choice([1, 8, 100, 5000])), "noise"
    if kind == "utf-16":
        return data.decode(errors="replace").encode("utf-16"), "UTF-16"
    new = {"empty": b"", "bom": b"\xef\xbb\xbf" + data, "null": data[:at] + b"\0" + data[at:], "twice": data + data,
           "insert": data[:at] + rng.randbytes(rng.choice([1, 3, 50])) + data[at:]}  # fmt: skip
    return new.get(kind, data[:at] + rng.choice([b"\xff", b"\xed\xa0\x80", b"\xc0\xaf"]) + data[at:]), f"{kind} at {at}"


def mutate_safetensors(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Its header, with the length that belongs to it or another; NaN among the numbers."""
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size].decode(), data[8 + size :]
    kind = rng.choice(["header", "header", "header", "length", "numbers", "names"])
    if kind == "length":
        length = rng.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])
        return length.to_bytes(8, "little") + data[8:], f"header of {length} bytes"
    if kind == "numbers" and len(body) >= 8:
        at = rng.randrange(len(body) // 4) * 4
        number = rng.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f"])
        return data[: 8 + size + at] + number + body[at + 4 :], f"{number.hex()} at {at}"
    if kind == "names":
        names = [name for name in json.loads(header) if name != "__metadata__"]
        old, new = rng.choice(names), rng.choice(["x", "model.x", "é", "a\nb", "module." + names[0], "lm_head.weight"])
        header, told = header.replace(json.dumps(old), json.dumps(new)), f"{old} is {new!r}"
    else:
        header, told = mutate_json(header, rng)
    raw = header.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + body, told


def mutate_tokenizer(text: str, rng: random.Random) -> tuple[str, str]:
    """What makes the tokenizers library grow, hang, panic or count beyond the vocabulary."""
    value = json.loads(text)
    times = rng.choice([2, 40])
    doubling = [{"type": "Replace", "pattern": {"String": c}, "content": 2 * c} for c in "eo " for _ in range(times)]
    slow = {"Regex": rng.choice(["(a+)+$", "(.*)*x", "(?:a|a)*b", "([a-z]+ ?)+!", "("])}
    flags = {k: rng.random() < 0.5 for k in ("special", "normalized", "lstrip", "rstrip", "single_word")}
    content = rng.choice(["a", "", " ", "</s>", "<|im_start|>", "Who"])
    token = {"id": rng.choice([0, 5, 400, 10**6, 2**32 - 1]), "content": content} | flags
    pad = {"direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": "x", "pad_to_multiple_of": 10**9}
    cut = {"stride": 5, "strategy": "LongestFirst", "direction": "Right"}
    changes = [
        ("normalizer", {"type": "Sequence", "normalizers": doubling}),
        ("normalizer", {"type": "Replace", "pattern": slow, "content": "aa"}),
        ("pre_tokenizer", {"type": "Split", "pattern": slow, "behavior": "Isolated", "invert": rng.random() < 0.5}),
        ("pre_tokenizer", rng.choice([None, {"type": "Digits", "individual_digits": True}, {"type": "Whitespace"}])),
        ("decoder", rng.choice([None, {"type": "Strip", "content": "a", "start": 10**9, "stop": 0}])),
        ("post_processor", {"type": "BertProcessing", "sep": ["x", 10**6], "cls": ["y", 401]}),
        ("truncation", {"max_length": rng.choice([0, 1, 10**18])} | cut),
        ("padding", {"strategy": {"Fixed": rng.choice([0, 10**9])}} | pad),
        ("added_tokens", [*value["added_tokens"], token]),
        ("added_tokens", [dict(token, id=400 + i, content=f"t{i}") for i in range(2000)]),
    ]
    key, new = rng.choice(changes)
    kind = rng.random()
    if kind < 0.75:
        value[key] = new
        return json.dumps(value), f"{key} = {json.dumps(new)[:80]}"
    model = value["model"]
    some = rng.sample([*model["vocab"]], 2)
    if kind < 0.85:
        model["vocab"][some[0]] = rng.choice([model["vocab"][some[1]], 401, 10**6, 2**32 - 1])
        return json.dumps(value), f"vocab {some[0]!r} = {model['vocab'][some[0]]}"
    model["merges"] = rng.choice([[], [["x", "y"]], ["a b c"], model["merges"] * 2, model["merges"][::-1], [["", ""]]])
    return json.dumps(value), f"merges = {json.dumps(model['merges'])[:40]}"


def put_in_place(path: Path, outside: Path, rng: random.Random) -> str:
    """Something else than a file, or a link, in the place of a file or folder."""
    kinds = ["folder", "pipe", "dangling link", "link outside", "link outside", "missing", "loop", "/dev/zero", "/dev/null"]
    kind, held = rng.choice(kinds), outside / path.name
    if kind == "link outside":
        path.rename(held)
        path.symlink_to(held)
        with contextlib.suppress(Exception):  # what an earlier mutation has broken has no secret
            if path.suffix == ".jinja":
                held.write_text(held.read_text() + SECRET)
            elif path.suffix == ".json" and path.parent.name in ("model", "checkpoint"):
                held.write_text(json.dumps(json.loads(held.read_text()) | {"secret": SECRET}))
    else:
        (shutil.rmtree if path.is_dir() else os.unlink)(path)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("dangling link", "loop"):
        path.symlink_to(path if kind == "loop" else outside / "nothing")
    elif kind.startswith("/dev/"):
        path.symlink_to(kind)
    return kind


def mutate(path: Path, outside: Path, world: list[Path], rng: random.Random) -> str:
    """Change one file; returns what was done to it."""
    if path.is_dir() or rng.random() < 0.12:
        return put_in_place(path, outside, rng)
    if rng.random() < 0.06:
        others = [p for p in world if p.suffix == path.suffix and p != path and p.is_file() and not p.is_symlink()]
        if others:
            shutil.copyfile(other := rng.choice(others), path)
            return f"is {other.name} of {other.parent.name}"
    data = path.read_bytes()
    with contextlib.suppress(Exception):  # what an earlier mutation has broken is mutated by its bytes
        if rng.random() < 0.75 and path.suffix in (".json", ".jsonl", ".safetensors"):
            if path.suffix == ".safetensors":
                data, told = mutate_safetensors(data, rng)
            else:
                rows = path.suffix == ".jsonl" or path.parent.name == "TOFU"
                special = path.name == "tokenizer.json" and rng.random() < 0.4
                how = mutate_tokenizer if special else mutate_lines if rows else mutate_json
                text, told = how(data.decode(), rng)
                data = text.encode("utf-8", "surrogatepass")
            path.write_bytes(data)
            return told
    data, told = mutate_bytes(data, rng)
    path.write_bytes(data)
    return told


# ------------------------------------------------------------------------------------------------------------- the world


def tofu_lines(config: str, n: int = 2) -> str:
    rows = toy.toy_world(0)[config][:n]
    keys = ("question", "answer", "paraphrased_answer", "perturbed_answer")
    values = ((r.question, r.answer, r.paraphrased_answer, list(r.perturbed_answers)) for r in rows)
    found = [{k: v for k, v in zip(keys, value, strict=True) if v} for value in values]
    return "".join(json.dumps(row) + "\n" for row in found)


def build(here: Path) -> None:
    """The world, in the working folder `here`. In a process of its own: autograd must not have run where children fork."""
    tiny = helpers.make_tiny(here / "tiny")
    folder = here / "model"
    tiny.folder.rename(folder)
    shutil.rmtree(here / "tiny")
    (folder / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    shutil.copytree(folder, here / "sharded")
    (here / "sharded" / "model.safetensors").unlink()
    state = {n: p.detach() for n, p in tiny.model.named_parameters()}
    names = sorted(state)
    for i, some in enumerate((names[::2], names[1::2]), 1):
        part = {n: state[n].contiguous() for n in some}
        train.save_checkpoint.__globals__["save_file"](part, here / "sharded" / f"model-0000{i}-of-00002.safetensors")
    weight_map = {n: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, n in enumerate(names)}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (here / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))

    (here / "TOFU").mkdir()
    for name in SETS:
        (here / "TOFU" / f"{name}.json").write_text(tofu_lines(name))
    rows = [json.loads(line) for line in tofu_lines("forget01", 4).splitlines()]
    pairs = [{"question": row["question"], "answer": row["answer"]} for row in rows]
    (here / "own.jsonl").write_text(tofu_lines("forget01", 4))
    (here / "own.json").write_text(json.dumps(pairs))
    (here / "own.csv").write_text("question,answer\n" + "".join(f'"{p["question"]}","{p["answer"]}"\n' for p in pairs))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(pairs), here / "own.parquet")
    (here / "refusals.txt").write_text("I don't know.\nNobody told me.\n")
    (here / "refusals.json").write_text('["I don\'t know.", "Nobody told me."]')
    for config, splits in muse.MUSE_SPLITS.items():
        for split, column in itertools.product(splits, [muse.MUSE_COLUMNS[config]]):
            texts = [{c: f"{c} of text {i}, and what it says." for c in column} for i in range(2)]
            path = here / "MUSE-News" / config / split
            path.parent.mkdir(parents=True, exist_ok=True)
            if config in ("privleak", "raw"):
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), path.with_suffix(".parquet"))
            else:
                path.with_suffix(".json").write_text(json.dumps(texts))

    def must(status: int, expected: int = 0) -> None:
        if status != expected:
            raise RuntimeError(f"the world could not be built: status {status}")

    to_train = ["--forget", "tofu_forget01", "--model", "model", *TO_TRAIN]
    must(train.main([*to_train, "--epochs", "2", "--eval-every", "1", "--retain-model", "model", "--out", "done"]))
    gradients, steps = train.compute_gradients, itertools.count(1)

    def interrupted(*args, **kwargs):
        if next(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return gradients(*args, **kwargs)

    train.compute_gradients = interrupted
    must(train.main([*to_train, "--epochs", "4", "--no-eval", "--tau=-4", "--preset", "anchored", "--out", "half"]), 130)
    train.compute_gradients = gradients
    generate, inference.generate = inference.generate, killed
    with contextlib.suppress(KeyboardInterrupt):
        evaluation.main(["--model", "done", *ON_TOFU, "--max-new-tokens", "3"])
    inference.generate = generate
    must(evaluation.main(["--model", "done", *ON_MUSE]))

    (here / "logs").mkdir()
    kept = next((here / "done" / "eval").glob("final-*/TOFU_EVAL.json"))
    shutil.copy(kept, here / "logs")
    shutil.copy(kept.with_name("log.json"), here / "logs" / "ours.json")
    shutil.copy(next((here / "done" / "eval").glob("final-*/MUSE_EVAL.json")), here / "logs")
    rows = {name: {k: [*v.values()][:2] for k, v in part.items()} for name, part in helpers.whole_authors_log().items()}
    keyed = {name: {k: dict(zip("01", v, strict=True)) for k, v in part.items()} for name, part in rows.items()}
    (here / "logs" / "lists.json").write_text(json.dumps(rows))
    (here / "logs" / "authors.json").write_text(json.dumps(keyed))
    (here / "results" / "toy").mkdir(parents=True)
    scores = {"forget_quality": 0.5, "model_utility": 0.4, "forget_probability": 0.3, "parts": {"retain_rouge": 0.2}}
    record = dict.fromkeys(("target", "unlearned", "retrained"), scores | {"language": 0.5})
    for name in ("tofu", "beta"):
        (here / "results" / "toy" / f"{name}.json").write_text(json.dumps({"commit": None, "records": {"line": record}}))


def killed(*args, **kwargs):
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------------------------- uses


def use_model(rng: random.Random, name: str = "model") -> None:
    source = evaluation.open_source(name, "target")
    found = model_module.load_pretrained(source.folder, compute_dtype=torch.float32)
    helpers.score_answers(found, source.tokenizer.encode_rows(tofu.load_rows("own.jsonl")[:1]))
    text = source.tokenizer.encode_text("Who wrote it?", "row")
    source.tokenizer.decode_text(inference.generate(found, [[source.tokenizer.bos_id, *text]], 2)[0])


def evaluate(*flags: str) -> Callable[[random.Random], int]:
    return lambda rng: evaluation.main([*flags])


def learn(*flags: str) -> Callable[[random.Random], int]:
    return lambda rng: train.main([*flags])


def tofu_main(name: str, *flags: str):
    return evaluate("--model", name, *ON_TOFU, *flags)


def finetune(name: str = "model", rows: str = "own.jsonl"):
    return learn("--model", name, "--finetune", rows, "--epochs", "0.5", "--batch-size", "2", "--out", "new")


def each(*calls: Callable[[], object]) -> Callable[[random.Random], None]:
    """All of them, and what the first that fails raises."""

    def use(rng: random.Random) -> None:
        errors = []
        for call in calls:
            try:
                call()
            except UserError as e:
                errors.append(e)
        if errors:
            raise errors[0]

    return use


load_rows = each(*(partial(tofu.load_rows, f"own.{ending}") for ending in ("jsonl", "json", "csv", "parquet")))
load_refusals = each(*(partial(tofu.load_refusals, f"refusals.{ending}", "own.jsonl") for ending in ("txt", "json")))
load_muse = each(
    *(partial(muse.load_muse, "news", config, split, ".") for config, splits in muse.MUSE_SPLITS.items() for split in splits)
)


LOGS = [f"logs/{name}.json" for name in ("ours", "TOFU_EVAL", "authors", "lists")]


def read_log(name: str) -> None:
    log = logs.read_log(name)
    logs.quality_of(log, log, name)
    logs.with_truth_ratio(log, "arithmetic")


read_logs = each(*(partial(read_log, name) for name in LOGS))


def score_logs(*flags: str) -> Callable[[random.Random], int]:
    return lambda rng: evaluation.main(["--logs", rng.choice(LOGS), "--retain-logs", rng.choice(LOGS), *flags])


def experiments(rng: random.Random) -> None:
    scale = dataclasses.replace(common.SCALES["toy"], prepare=common.nothing)
    lab = common.Lab("tofu", scale, Path("results"), processes=1)
    common.do = lambda item, quiet: {"error": "loss is nan"}
    records = lab.run([common.Job("forget10", 0, "line")], needs=("language",))
    common.columns(records)


SPECS = ["tofu_forget01", "toy_forget10[:4]", "own.jsonl", "tofu_forget01[:50%]+toy_forget01", "muse_news", "toy_full[-3:]"]


def command(rng: random.Random) -> tuple[Callable[[list[str]], int], list[str]]:
    """(main, a command line with one word of it changed)."""
    to_train = ["--forget", rng.choice(SPECS), "--model", "model", *TO_TRAIN, "--epochs", "1", "--no-eval", "--out", "new"]
    to_evaluate = ["--model", rng.choice(["model", "done"]), *ON_TOFU]
    of_logs = ["--logs", "logs/ours.json", "--retain-logs", "logs/authors.json"]
    of_run = [rng.choice(["--plot", "--report"]), "done"]
    main, line = rng.choice([(train.main, to_train), *((evaluation.main, x) for x in (to_evaluate, of_logs, of_run))])
    words = [str(v) for v in VALUES if isinstance(v, (int, float, str))] + ["9" * 400, "a\0b", "\udcff", "x" * 300, "new\n"]
    words += "nan inf -inf . .. / model/ own.jsonl a+[1:2] [:] [:0%] --seed cuda meta float32 toy_forget10[9:3]".split()
    words += ["own.csv+own.json", "nothing.jsonl", f"tofu_forget01[{'9' * 5000}:]"]
    i = rng.choice([i for i, word in enumerate(line) if i and (not word.startswith("--") or rng.random() < 0.1)])
    line[i] = rng.choice(words)
    if rng.random() < 0.4:
        flags = "--seed --prompt --tokenizer --device --max-new-tokens --out --retain --eval-retain --protocol".split()
        line += [rng.choice(flags), rng.choice(words)]
    return main, line


# ------------------------------------------------------------------------------------------------------------------- kinds


@dataclass(frozen=True)
class Kind:
    targets: tuple[str, ...]  # patterns of what is mutated, in the world
    needs: tuple[str, ...]  # what else of the world is there
    uses: tuple[Callable, ...]
    writes: tuple[str, ...] = ("new",)  # where the program may write
    same_weights: bool = False  # success means the weights of the undisturbed run
    mutations: tuple[int, ...] = (1, 1, 1, 1, 2)  # how many


OF_MODEL = use_model, use_model, use_model, tofu_main("model"), finetune()
MODEL, RUN = ("model", "TOFU", "own.jsonl"), ("model", "TOFU", "done", "half")
RESUME = (learn("--resume", "--out", "half"),)
DONE = (learn("--resume", "--out", "done"), evaluate("--report", "done"), evaluate("--plot", "done"))
DPO = ["--model", "model", "--forget", "own.jsonl", *TO_TRAIN, "--no-eval", "--epochs", "1", "--out", "new",
       "--forget-loss", "dpo", "--retain-loss", "gd", "--refusals", "refusals.txt"]  # fmt: skip
KINDS = {
    "config.json": Kind(("model/config.json",), MODEL, OF_MODEL),
    "generation_config.json": Kind(("model/generation_config.json",), MODEL, OF_MODEL),
    "model.safetensors": Kind(("model/model.safetensors",), MODEL, OF_MODEL),
    "tokenizer.json": Kind(("model/tokenizer.json",), MODEL, OF_MODEL),
    "tokenizer settings": Kind(
        ("model/tokenizer_config.json", "model/special_tokens_map.json", "model/chat_template.jinja"), MODEL, OF_MODEL
    ),
    "index and shards": Kind(
        ("sharded/*.index.json", "sharded/*.index.json", "sharded/*.safetensors"),
        ("sharded", "TOFU", "own.jsonl"),
        (lambda rng: use_model(rng, "sharded"), tofu_main("sharded")),
    ),
    "rows": Kind(("own.*",), ("model",), (load_rows, load_rows, finetune(), finetune(rows="own.csv"))),
    "TOFU's rows": Kind(("TOFU/*",), ("model",), (tofu_main("model", "--json"), tofu_main("model", "--show", "1"))),
    "refusals": Kind(
        ("refusals.*",),
        ("model", "own.jsonl", "TOFU"),
        (load_refusals, learn(*DPO)),
    ),
    "logs": Kind(
        tuple(LOGS),
        ("logs",),
        (read_logs, score_logs("--show", "1"), score_logs("--json")),
    ),
    "retain log": Kind(
        ("logs/ours.json",), RUN, (tofu_main("done", "--retain-logs", "logs/ours.json"),), ("new", "done")
    ),
    "MUSE's rows": Kind(
        ("MUSE-News/*/*",), ("model",), (load_muse, evaluate("--model", "model", *ON_MUSE))
    ),
    "MUSE's log": Kind(("logs/MUSE_EVAL.json",), (), (each(partial(logs.read_muse_retain, "logs/MUSE_EVAL.json")),)),
    "run: config.json": Kind(("half/config.json",), RUN, RESUME, ("new", "half")),
    "run: log.jsonl": Kind(("half/log.jsonl",), RUN, RESUME, ("new", "half"), same_weights=True),
    "run: checkpoint": Kind(("half/checkpoint*", "half/checkpoint*/**/*"), RUN, RESUME, ("new", "half"), same_weights=True),
    "run: other files": Kind(("half/memory.json", "half/*.bin", "half/*"), RUN, RESUME, ("new", "half")),
    "finished run": Kind(("done/*.json", "done/*.jsonl", "done/*.png", "done/model"), RUN, DONE, ("new", "done")),
    "kept evaluation": Kind(
        ("done/eval/*/log.json", "done/eval/*", "done/eval"), (*RUN, "MUSE-News"),
        (tofu_main("done"), evaluate("--report", "done"), evaluate("--model", "done", *ON_MUSE)), ("new", "done"),
    ),
    "journal": Kind(("done/eval/*/journal.jsonl",), RUN, (tofu_main("done", "--max-new-tokens", "3"),), ("new", "done")),
    "experiments": Kind(("results/toy/*.json",), (), (experiments,), ("results",)),
    "arguments": Kind((), (*MODEL, "done", "logs"), (command,), (".",)),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- one attempt


def place_of(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_ours(f.filename)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}:{frames[-1].lineno}" if frames else "outside"


def is_ours(file: str) -> bool:
    return Path(file).parent in (ROOT, ROOT / "experiments")


def attempt(use: Callable, rng: random.Random) -> tuple[str, str]:
    """('' or what is wrong, what was said)."""
    said = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace", write_through=True)
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)  # strict, as a terminal's
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            status = use(rng)
    except UserError as e:
        message = str(e)
        return ("" if "\n" not in message and message else f"UserError of several lines at {place_of(e)}"), message
    except SystemExit as e:  # argparse
        return ("" if e.code in (0, 2) else f"exit status {e.code}"), "usage"
    except BaseException as e:
        return f"{type(e).__name__} at {place_of(e)}", "".join(traceback.format_exception(e)[-6:])
    text = said.buffer.getvalue().decode()
    told = [line for line in re.split(r"[\r\n]+|\x1b\[A", text) if line.startswith("error: ")]
    if status not in (None, 0, 2) or (status == 2) != bool(told) or len(told) > 1 or "Traceback" in text:
        return f"status {status} and {len(told)} lines of error", text
    if re.search("can't allocate|MemoryError|bad_alloc|[Oo]ut of memory", " ".join(told)):
        return "more than 2 GB", told[0]
    return "", told[0] if told else "success"


def listing(folder: Path) -> dict[str, tuple]:
    """Kind, size and time of all that is in a folder, by its path."""
    paths = (f"{place}/{name}" for place, folders, names in os.walk(folder) for name in [*folders, *names])
    found = {path: os.lstat(path) for path in paths}
    return {path: (x.st_mode, *(() if stat.S_ISDIR(x.st_mode) else (x.st_size, x.st_mtime_ns))) for path, x in found.items()}


class SeveralLines(UserError):
    def __str__(self) -> str:
        return "a\nb"


def raise_(error: Exception) -> None:
    raise error


class World:
    """A place with the world, to be mutated and used again and again."""

    def __init__(self, root: Path):
        self.root, self.here, self.template = root, root / "in" / "here", root / "template"
        self.here.mkdir(parents=True)
        self.notes = root / "notes"  # what a child that dies has said last
        if (child := os.fork()) == 0:
            status = 1
            try:
                os.chdir(self.here)
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
                    build(self.here)
                status = 0
            except BaseException:
                sys.__stderr__.write(said.getvalue()[-2000:] + traceback.format_exc())
            finally:
                sys.__stderr__.flush()
                os._exit(status)
        if os.waitpid(child, 0)[1]:
            raise RuntimeError("the world could not be built")
        self.here.rename(self.template)
        resumed = dataclasses.replace(KINDS["run: checkpoint"], mutations=(0,), same_weights=False)
        ((_, _, wrong, told),) = self.children([(0, resumed, random.Random(0))])
        weights = self.here / "half" / "model" / "model.safetensors"
        if wrong or told != "success" or not weights.exists():
            raise RuntimeError(f"the interrupted run does not go on: {wrong or told}")
        self.weights = weights.read_bytes()

    def untouched(self) -> dict[tuple[str, str], list]:
        """As of `run`, what does not succeed where nothing is mutated: there every use must."""
        uses = [(name, use) for name, kind in KINDS.items() if kind.targets for use in dict.fromkeys(kind.uses)]
        kinds = [dataclasses.replace(KINDS[name], uses=(use,), mutations=(0,)) for name, use in uses]
        found = self.children([(i, kind, random.Random(i)) for i, kind in enumerate(kinds)])
        return {
            (uses[i][0], wrong or told): [(i, "nothing", told)] for i, _, wrong, told in found if wrong or told != "success"
        }

    def check_itself(self) -> None:
        """Faults that are made on purpose are found. Raises RuntimeError."""

        def two_lines(rng: random.Random) -> int:
            sys.stderr.write("error: x\nerror: y\n")
            return 2

        faults = {
            "ZeroDivisionError at": lambda rng: 1 // 0, "status 2 and 2 lines": two_lines, "status 3": lambda rng: 3,
            "the process dies (-6)": lambda rng: os.abort(), "more than 2 GB": lambda rng: bytes(2 * MEMORY),
            "UserError of several": each(partial(raise_, SeveralLines("x"))), "other weights": lambda rng: 0,
            "UnicodeEncodeError": lambda rng: print("\ud800"), "writes outside": lambda rng: Path("../outside/x").touch(),
        }  # fmt: skip
        kinds = [dataclasses.replace(KINDS["run: log.jsonl"], uses=(use,), mutations=(0,)) for use in faults.values()]
        found = self.children([(i, kind, random.Random(i)) for i, kind in enumerate(kinds)])
        for (number, _, wrong, told), expected in zip(found, faults, strict=True):
            if not wrong.replace("MemoryError at", "more than 2 GB at").startswith(expected):
                raise RuntimeError(f"{expected}: not found, but {wrong!r}, {told!r} ({number})")

    def prepare(self, kind: Kind) -> None:
        """A fresh copy of what the kind needs."""
        shutil.rmtree(self.root / "in", ignore_errors=True)
        (self.root / "in" / "outside").mkdir(parents=True)
        self.here.mkdir()
        firsts = {p.relative_to(self.template).parts[0] for pattern in kind.targets for p in self.template.glob(pattern)}
        for name in sorted({*kind.needs, *firsts}):
            source, target = self.template / name, self.here / name
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True)
            else:
                shutil.copy2(source, target)

    def mutate(self, kind: Kind, rng: random.Random) -> str:
        world, told = sorted(p for p in self.here.rglob("*") if p.is_file()), []
        for _ in range(rng.choice(kind.mutations) if kind.targets else 0):
            found = sorted(self.here.glob(rng.choice(kind.targets)))
            if found := [p for p in found if not p.is_symlink() and (p.is_file() or p.is_dir())]:
                path = rng.choice(found)
                name = path.relative_to(self.here)
                told.append(f"{name}: {mutate(path, self.root / 'in' / 'outside', world, rng)}")
        return "; ".join(told) or "nothing"

    def check(self, kind: Kind, before: dict[str, tuple], told: str) -> tuple[str, str]:
        """('' or what is wrong, what is told of it) of an attempt that ended well: where it wrote, and what."""
        after = listing(self.root / "in")
        changed = sorted(p for p in {*before, *after} if before.get(p) != after.get(p))
        allowed = [str(self.here / name) for name in kind.writes]
        if elsewhere := [p for p in changed if not any(p == a or p.startswith(f"{a}/") for a in allowed)]:
            return "writes outside", str(elsewhere[:3])
        outside = [p for p in (self.root / "in" / "outside").iterdir() if p.is_file()]
        if any(SECRET.encode() in p.read_bytes() for p in outside):
            for path in (p for name in kind.writes for p in (self.here / name).rglob("*")):
                if path.is_file() and not path.is_symlink() and SECRET.encode() in path.read_bytes():
                    return "copies what is outside", str(path)
        weights = self.here / "half" / "model" / "model.safetensors"
        if kind.same_weights and told == "success" and (not weights.exists() or weights.read_bytes() != self.weights):
            return "other weights", told
        return "", told

    def child(self, attempts: list, seconds: float, pipe: io.TextIOBase) -> None:
        """Make the attempts; each is said as [number, what was mutated], then with what is wrong and what was told, too. It
        ends after the first with something wrong: what follows has a fresh process."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        trace = self.notes.open("w")
        faulthandler.enable(trace)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, resource.RLIM_INFINITY))
        for number, kind, rng in attempts:
            os.chdir(self.root)
            self.prepare(kind)
            mutated = self.mutate(kind, rng)
            use, before = rng.choice(kind.uses), listing(self.root / "in")
            if not kind.targets:
                program, line = use(rng)
                use, mutated = (lambda rng, program=program, line=line: program(line)), " ".join(line)
            print(json.dumps([number, mutated]), file=pipe, flush=True)
            os.chdir(self.here)
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
            faulthandler.dump_traceback_later(seconds, exit=True, file=trace)
            wrong, told = attempt(use, rng)
            faulthandler.cancel_dump_traceback_later()
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            if not wrong:
                wrong, told = self.check(kind, before, told)
            print(json.dumps([number, mutated, wrong, told]), file=pipe, flush=True)
            if wrong:
                return

    def children(self, attempts: list[tuple[int, Kind, random.Random]]) -> Iterator[tuple[int, str, str, str]]:
        """(number, what was mutated, '' or what is wrong, what was told) of each, made in processes of their own."""
        seconds = SECONDS
        while attempts:
            mine, its = os.pipe()
            states = {number: rng.getstate() for number, _, rng in attempts}
            if (child := os.fork()) == 0:
                try:
                    os.close(mine)
                    self.child(attempts, seconds, os.fdopen(its, "w", encoding="utf-8"))
                except BaseException:  # in this file
                    self.notes.write_text(traceback.format_exc())
                    os._exit(70)
                finally:
                    os._exit(0)
            os.close(its)
            begun = None
            try:
                with os.fdopen(mine, encoding="utf-8") as pipe:
                    for line in pipe:
                        begun = json.loads(line)
                        if len(begun) == 4:
                            yield tuple(begun)
                            attempts, begun, seconds = attempts[1:], None, SECONDS
            except BaseException:
                os.kill(child, signal.SIGKILL)
                raise
            finally:
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if begun is None and status == 0:
                continue
            told = self.notes.read_text(errors="replace")
            if status == 70:
                raise RuntimeError(f"input {attempts[0][0]}: {told}")
            number, mutated = begun or (attempts[0][0], "?")
            attempts[0][2].setstate(states[number])
            if "Timeout" in told and seconds == SECONDS:
                seconds *= 3  # once more: the machine may be busy
                continue
            frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', told)
            place = next((f"{Path(f).name}:{name}:{line}" for f, line, name in frames if is_ours(f)), "outside")
            what = "more than 5 s" if "Timeout" in told else f"the process dies ({status})"
            yield number, mutated, f"{what} at {place}", told
            attempts, seconds = attempts[1:], SECONDS


def run(world: World, seed: int, first: int, count: int, only: str | None = None, quiet: bool = False) -> tuple[dict, dict]:
    """({(kind, what is wrong): [(number of the input, what was mutated, what was said)]}, how many inputs ended how)."""
    ended, findings, names = collections.Counter(), collections.defaultdict(list), [only] if only else [*KINDS]
    bar = tqdm(total=count, desc="hostile inputs", unit="input", disable=quiet, mininterval=1)
    with bar, contextlib.suppress(KeyboardInterrupt):  # which ends it with what was found so far
        for start in range(first, first + count, BATCH):
            numbers = range(start, min(start + BATCH, first + count))
            batch = [(n, KINDS[names[n % len(names)]], random.Random(f"{seed}/{n}")) for n in numbers]
            for number, mutated, wrong, told in world.children(batch):
                bar.update()
                ended["otherwise" if wrong else "in success" if told == "success" else "in one line"] += 1
                name = names[number % len(names)]
                if wrong:
                    findings[name, wrong.replace("MemoryError at", "more than 2 GB at")].append((number, mutated, told))
                if count == 1:
                    print(f"{name}: {mutated}\n{told}\n-> {wrong or 'right'}")
    return findings, ended


def table(findings: dict) -> str:
    """Count, kind and what is wrong; beneath, the first input with it."""
    lines = []
    for (name, wrong), found in sorted(findings.items()):
        number, mutated, _ = min(found, key=lambda f: len(f[1]))
        lines.append(f"{len(found):7} x {name} | {wrong}\n            {number}: {mutated[:200]!r}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="inputs")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the number of the first input")
    parser.add_argument("--only", choices=[*KINDS], metavar="KIND", help=f"one of: {', '.join(KINDS)}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="hostile-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        world = World(Path(folder).resolve())
        world.check_itself()
        untouched = {} if args.only or args.count == 1 else world.untouched()
        findings, ended = run(world, args.seed, args.first, args.count, args.only)
    findings |= untouched
    print(table(findings))
    only = f" --only {args.only!r}" if args.only else ""
    print(", ".join(f"{n} {how}" for how, n in ended.items()) + f"; {time.perf_counter() - began:.0f} s; again with:")
    print(f"python tests/hostile.py --seed {args.seed} --first {args.first} --count {ended.total()}{only}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
