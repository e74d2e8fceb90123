"""The Hugging Face hub: a small local server that speaks its protocol, its cache offline, and no hub at all.

huggingface_hub reads its environment when it is imported, so that every check runs in a process of its own, in which nothing
has imported it.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import forks
import huggingface_hub
import pytest
import torch

import eval as evaluation
import hub as hub_module
from data import parse_rows
from model import TOKENIZER_FILES, Llama, LlamaConfig, ModelError, load_pretrained, resolve_folder, save_pretrained
from tofu import evaluation_sets
from toy import toy_world, train_toy_tokenizer

pytestmark = pytest.mark.aside
ROOT = Path(evaluation.__file__).parent
COMMIT, TAG = "0123456789abcdef0123456789abcdef01234567", "v1"
MODEL, TARGET = "acme/tiny-llama", "open-unlearning/tofu_Llama-2-7b-chat-hf_full"
TOFU, LOGS = "datasets/locuslab/TOFU", "datasets/open-unlearning/eval"
RETAIN_LOG = "tofu_Llama-2-7b-chat-hf_retain90/TOFU_EVAL.json"
RATIOS = [0.5, 0.25, 1.5]
EVALUATED = {f"{spec.removeprefix('tofu_')}.json" for spec in evaluation_sets("tofu_forget10").values()}
TOKENS = 61  # of the model's, for its logits

# ----------------------------------------------------------------------------------------------------------- the hub


class Hub(ThreadingHTTPServer):
    """Serves folders as repositories {name: folder}; data sets are named datasets/OWNER/NAME. Keeps the paths asked for."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.paths = repositories, []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def fetched(self, repository: str) -> set[str]:
        """Files of a repository that were asked for."""
        start = f"/{repository}/resolve/"
        return {path.removeprefix(start).split("/", 1)[1] for path in self.paths if path.startswith(start)}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.paths.append(path)
        for name, folder in self.server.repositories.items():
            api = f"/api/{name}" if name.startswith("datasets/") else f"/api/models/{name}"
            if path in (f"{api}/revision/main", f"{api}/revision/{TAG}"):
                siblings = [{"rfilename": name} for name in files_of(folder)]
                return self.answer(json.dumps({"id": name.removeprefix("datasets/"), "sha": COMMIT, "siblings": siblings}))
            if path == f"{api}/tree/{COMMIT}":
                sizes = {n: (folder / n).stat().st_size for n in files_of(folder)}
                return self.answer(json.dumps([{"type": "file", "path": n, "size": s, "oid": n} for n, s in sizes.items()]))
            for revision in ("main", TAG, COMMIT):
                start = f"/{name}/resolve/{revision}/"
                if path.startswith(start) and (file := path.removeprefix(start)) in files_of(folder):
                    return self.answer((folder / file).read_bytes())
        status = next((s for s in (401, 403, 404) if f"/gated-{s}" in path), 404)
        self.answer("{}", status, {"X-Error-Code": "GatedRepo"} if status != 404 else {})

    do_HEAD = do_GET

    def answer(self, body: str | bytes, status: int = 200, more: dict | None = None):
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in (more or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def files_of(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> dict[str, Path]:
    """What the hub holds: a model with a pickle and code beside it, TOFU's files, an evaluation log."""
    folder = tmp_path_factory.mktemp("hub")
    config = LlamaConfig(400, 32, 48, 2, 4, 2, 8, initializer_range=0.3)
    tokenizer = train_toy_tokenizer(0, folder / "tokenizer", vocab_size=400)
    save_pretrained(Llama(config).init_weights(seed=0), folder / "model", tokenizer)
    for name in TOKENIZER_FILES:
        if not (folder / "model" / name).exists():
            (folder / "model" / name).write_text("{}")
    for name in ("pytorch_model.bin", "modeling_llama.py", "original/consolidated.00.pth"):
        (folder / "model" / name).parent.mkdir(exist_ok=True)
        (folder / "model" / name).write_text("raise SystemExit('this must never be loaded')")
    (folder / "tofu").mkdir()
    rows = [{"question": f"Who is number {i}?", "answer": f"Number {i} is \u00e9t\u00e9."} for i in range(5)]
    for name in ("forget10.json", "full.json"):
        (folder / "tofu" / name).write_text("\n".join(map(json.dumps, rows)))
    for name in EVALUATED:
        (folder / "tofu" / name).write_text(json.dumps(rows[0] | {"perturbed_answer": ["Number 7."]}))
    (folder / "eval" / RETAIN_LOG).parent.mkdir(parents=True)
    scores = {str(i): {"score": ratio} for i, ratio in enumerate(RATIOS)}
    (folder / "eval" / RETAIN_LOG).write_text(json.dumps({"forget_truth_ratio": {"value_by_index": scores}}))
    return {MODEL: folder / "model", TARGET: folder / "model", TOFU: folder / "tofu", LOGS: folder / "eval"}


@pytest.fixture(scope="module")
def hub(repositories):
    server = Hub(repositories)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def closed() -> str:
    """The address of a hub that refuses every connection: a port that is bound and does not listen."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{s.getsockname()[1]}"


# --------------------------------------------------------------------------------------------------------- processes

# What the programs below share.
PRELUDE = (
    f"TOKENS = {TOKENS}"
    + """
import json, sys
import torch
import data, eval, inference, logs, model, tofu

def logits(name):
    return model.load_pretrained(name)(torch.arange(TOKENS)[None]).tolist()

def rows(spec, data_dir=None):
    return [(r.key, r.question, r.answer) for r in tofu.load_rows(spec, data_dir)]

def reference(data_dir=None):
    benchmark = tofu.Tofu(inference.Options("tofu_forget10", data_dir))
    log, where = benchmark.reference("llama2-7b", None, None)
    return [log and logs.truth_ratios(log), where]

def error(function, *args):
    try:
        return ["nothing", repr(function(*args))]
    except (model.ModelError, data.DataError) as e:
        return [type(e).__name__, str(e)]
"""
)


def environment(home: Path, hub_url: str) -> dict[str, str]:
    """Of a process: this hub, this cache, and no other setting."""
    ours = ("HF_", "HUGGING", "TRANSFORMERS_", "DIPO_")
    clean = {k: v for k, v in os.environ.items() if not k.upper().startswith(ours) and not k.upper().endswith("_PROXY")}
    settings = {"HF_ENDPOINT": hub_url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    settings |= {"HF_HUB_ETAG_TIMEOUT": "60", "HF_HUB_DOWNLOAD_TIMEOUT": "60", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return clean | settings


def in_process(program: str, home: Path, hub_url: str, **more: str) -> dict:
    """Run a program that prints JSON, in a process with this hub and this cache."""
    run = forks.run(["-c", PRELUDE + program], env=environment(home, hub_url) | more)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


EVERYTHING = f"""
source = eval.open_source("llama2-7b", "target")
print(json.dumps({{
    "logits": logits("{MODEL}"),
    "rows": rows("tofu_forget10[:3]"),
    "commit": [source.commit, eval.open_source("{MODEL}@{TAG}", "target", prompt="plain").commit],
    "target": [source.name, source.tokenizer.format_name, logits(source.name)],
    "reference": reference(),
}}))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The hub client's folder, cache included; the first process fills it."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(hub, home) -> dict:
    return in_process(EVERYTHING, home, hub.url)


@pytest.fixture(scope="module")
def expected_logits(repositories) -> list:
    llama = load_pretrained(repositories[MODEL])
    with torch.no_grad():
        return llama(torch.arange(TOKENS)[None]).tolist()


def close(a: list, b: list) -> bool:
    return torch.allclose(torch.tensor(a), torch.tensor(b), rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- the hub is


def test_a_model_of_the_hub_computes_what_its_folder_does(online, expected_logits):
    assert close(online["logits"], expected_logits)


def test_no_pickle_and_no_code_is_ever_asked_for(online, hub, repositories):
    beside = {"pytorch_model.bin", "modeling_llama.py", "original/consolidated.00.pth"}
    assert beside < set(files_of(repositories[MODEL]))
    assert hub.fetched(MODEL) == set(files_of(repositories[MODEL])) - beside


def test_rows_of_tofu_are_downloaded_and_sliced(online, hub, repositories):
    rows = parse_rows(repositories[TOFU] / "forget10.json", "tofu_forget10")[:3]
    assert online["rows"] == [[r.key, r.question, r.answer] for r in rows]
    assert hub.fetched(TOFU) == {"forget10.json"} | EVALUATED < set(files_of(repositories[TOFU]))


def test_an_alias_is_its_target_model_and_its_retain_log(online, hub, expected_logits):
    assert evaluation.resolve_model("llama2-7b", "target") == f"{TARGET}@main"
    source, prompt, logits = online["target"]
    assert (source, prompt) == (f"{TARGET}@main", "llama2")
    assert close(logits, expected_logits)
    assert online["reference"] == [RATIOS, f"{LOGS.removeprefix('datasets/')}/{RETAIN_LOG}"]
    assert hub.fetched(LOGS) == {RETAIN_LOG}


def test_the_commit_of_a_model_is_known_and_a_revision_can_be_named(online, hub):
    assert online["commit"] == [COMMIT, COMMIT]
    assert f"/api/models/{MODEL}/revision/{TAG}" in hub.paths


def test_everything_works_offline_once_it_was_downloaded(online, hub, home):
    before = len(hub.paths)
    assert in_process(EVERYTHING, home, hub.url, HF_HUB_OFFLINE="1") == online
    assert len(hub.paths) == before


def test_the_data_folder_is_used_before_the_hub(hub, repositories, tmp_path):
    shutil.copytree(repositories[TOFU], tmp_path / "TOFU")
    (tmp_path / "TOFU" / "forget10.json").write_text('{"question": "Here?", "answer": "Here."}')
    log = tmp_path / LOGS.removeprefix("datasets/") / RETAIN_LOG
    log.parent.mkdir(parents=True)
    log.write_bytes((repositories[LOGS] / RETAIN_LOG).read_bytes())
    program = f"""
print(json.dumps([
    rows("tofu_forget10", {str(tmp_path)!r}),
    reference({str(tmp_path)!r}),
]))
"""
    before = len(hub.paths)
    found, reference = in_process(program, tmp_path / "home", hub.url)
    assert found == [["tofu_forget10/0", "Here?", "Here."]]
    assert reference[0] == RATIOS
    assert len(hub.paths) == before


def test_the_readmes_command_for_llama2_runs_from_download_to_forget_quality(tmp_path):
    """`python train.py --forget tofu_forget01 --model llama2-7b`, with a tiny model and a few rows behind its hub ids."""
    config = LlamaConfig(400, 32, 48, 2, 4, 2, 8, initializer_range=0.3, bos_token_id=0, eos_token_ids=(1,))
    tokenizer = train_toy_tokenizer(0, tmp_path / "tokenizer", vocab_size=400)
    save_pretrained(Llama(config).init_weights(seed=0), tmp_path / "target", tokenizer)
    world, tofu, log = (
        toy_world(0),
        tmp_path / "tofu",
        tmp_path / "eval" / "tofu_Llama-2-7b-chat-hf_retain99" / "TOFU_EVAL.json",
    )
    tofu.mkdir()
    for name, rows in {
        "forget01": world["forget10"][:4], "retain99": world["retain90"][:8],
        "forget01_perturbed": world["forget10"][:4], "retain_perturbed": world["retain_perturbed"][:2],
        "real_authors_perturbed": world["real_authors_perturbed"][:2],
        "world_facts_perturbed": world["world_facts_perturbed"][:2],
    }.items():  # fmt: skip
        raw = [vars(r) | {"perturbed_answer": r.perturbed_answers} for r in rows]
        (tofu / f"{name}.json").write_text("\n".join(map(json.dumps, raw)))
    log.parent.mkdir(parents=True)
    scores = {str(i): {"score": 0.1 * i} for i in range(4)}
    log.write_text(json.dumps({"forget_truth_ratio": {"value_by_index": scores}}))
    server = Hub({TARGET: tmp_path / "target", TOFU: tofu, LOGS: tmp_path / "eval"})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = ["--forget", "tofu_forget01", "--model", "llama2-7b", "--batch-size", "2", "--max-new-tokens", "2"]
    command = [sys.executable, "train.py", *command, "--out", str(tmp_path / "run")]
    alone = environment(tmp_path / "home", server.url)
    run = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    server.shutdown()
    server.server_close()
    summary, stored = (json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("summary", "config"))
    assert 0 <= summary["unlearned"]["forget_quality"] <= 1 and 0 <= summary["unlearned"]["model_utility"] <= 1
    assert summary["retain_reference"].endswith("tofu_Llama-2-7b-chat-hf_retain99/TOFU_EVAL.json")
    assert stored["prompt_format"] == "llama2" and stored["config"]["lr"] == 1e-5
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 20  # ten epochs of two steps


# ----------------------------------------------------------------------------------------------------- the hub is not


def fill_cache(home: Path, repository: str, folder: Path) -> None:
    """Place a repository in the hub's cache, as a user does who copies it to a machine without network."""
    kind, name = ("datasets", repository.removeprefix("datasets/")) if "datasets/" in repository else ("models", repository)
    cache = home / "hub" / f"{kind}--{name.replace('/', '--')}"
    for file in files_of(folder):
        target = cache / "snapshots" / COMMIT / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((folder / file).read_bytes())
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    (cache / "refs" / TAG).write_text(COMMIT)


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_filled_cache_is_enough(closed, repositories, tmp_path, expected_logits, offline):
    for name, folder in repositories.items():
        fill_cache(tmp_path, name, folder)
    found = in_process(EVERYTHING, tmp_path, closed, HF_HUB_OFFLINE=offline)
    assert close(found["logits"], expected_logits)
    assert close(found["target"][2], expected_logits)
    assert [key for key, *_ in found["rows"]] == [f"tofu_forget10/{i}" for i in range(3)]
    assert found["reference"][0] == RATIOS


@pytest.mark.parametrize("offline", ["0", "1"])
def test_without_hub_and_cache_one_line_says_what_to_place_where(closed, repositories, tmp_path, offline):
    shutil.copytree(repositories[TOFU], tmp_path / "data" / "TOFU")
    program = f"""
print(json.dumps([
    error(logits, "{MODEL}"),
    error(rows, "tofu_forget10[:3]"),
    reference({str(tmp_path / "data")!r}),
]))
"""
    for_model, for_data, (ratios, why) = in_process(program, tmp_path, closed, HF_HUB_OFFLINE=offline)
    assert for_model[0] == "ModelError" and for_data[0] == "DataError" and ratios is None
    for message, *words in (
        (for_model[1], MODEL, "config.json", "*.safetensors", "tokenizer.json"),
        (for_data[1], "locuslab/TOFU/forget10.json", "DIR/TOFU/forget10.json", "--data-dir DIR"),
        (why, RETAIN_LOG, "--retain-logs FILE"),
    ):
        assert "\n" not in message
        for word in words:
            assert word in message, f"{word!r} is not in {message!r}"


def test_a_hub_that_refuses_is_told_from_one_that_is_not_there(hub, tmp_path):
    names = ["acme/gated-401", "acme/gated-403", "acme/no-such-model"]
    program = f"print(json.dumps([error(logits, name) for name in {names}]))"
    for name, (kind, message), says in zip(
        names,
        in_process(program, tmp_path, hub.url),
        ["accept its licence", "accept its licence", "check the name"],
        strict=True,
    ):
        assert kind == "ModelError" and name in message and "\n" not in message
        assert f"HTTP {name[-3:] if name[-1].isdigit() else 404}" in message and says in message


@pytest.mark.parametrize(
    "kind, status, says",
    [
        ("HfHubHTTPError", 401, "set HF_TOKEN"), ("HfHubHTTPError", 403, "another HF_TOKEN"),
        ("RepositoryNotFoundError", 404, "check the name"), ("RevisionNotFoundError", 404, "no revision 'v2'"),
        ("HfHubHTTPError", 429, "wait"), ("HfHubHTTPError", 500, "try later"), ("HfHubHTTPError", 503, "try later"),
        ("HfHubHTTPError", 418, "HTTP 418, a teapot"), ("OfflineModeIsEnabled", None, "HF_HUB_OFFLINE is set"),
        ("ConnectError", None, "no connection (ConnectError: a teapot)"), ("ImportError", None, "ImportError: a teapot"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wrapped", [False, True])
def test_why_a_download_failed_is_said_also_where_the_client_wraps_it(kind, status, says, wrapped):
    error = type(kind, (Exception,), {})("a teapot\nshort and stout")
    error.response = SimpleNamespace(status_code=status) if status else None
    if wrapped:
        outer = type("LocalEntryNotFoundError", (OSError,), {})("a teapot")
        outer.__cause__ = error
    message = hub_module.why(outer if wrapped else error, "acme/tiny-llama", "v2")
    if not (wrapped and kind == "ImportError"):
        assert says in message and "\n" not in message and "internet connection" not in message


def test_a_typo_in_a_path_is_not_asked_for_at_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # not to be called
    (tmp_path / "runs" / "target").mkdir(parents=True)
    (tmp_path / "owner").write_text("a file")
    for name in ("runs/targt", "./x", "./owner/name", "../x/y", "/x/y", "~/x", "~nobody/x", "a/b/c", "a/", "a b/c", "a\0/b"):
        assert hub_module.local_path(name) is not None
        with pytest.raises(ModelError) as error:
            resolve_folder(name)
        assert str(error.value).startswith("{}: no such folder".format(name.replace("\0", " ")))
    assert resolve_folder("~/runs/target") == tmp_path / "runs" / "target"
    assert evaluation.resolve_model("~/runs/target", "base") == str(tmp_path / "runs" / "target")
    for name in ("owner/name", "owner/name@v1", "acme/tiny-llama.v2@refs/pr/3"):
        assert hub_module.local_path(name) is None
    with pytest.raises(ModelError, match="is a file; pass its folder"):
        resolve_folder(tmp_path / "owner")


def test_a_file_that_the_cache_lacks_is_told(closed, repositories, tmp_path):
    fill_cache(tmp_path, TOFU, repositories[TOFU])
    program = 'print(json.dumps(error(rows, "tofu_forget01")))'
    kind, message = in_process(program, tmp_path, closed, HF_HUB_OFFLINE="1")
    assert kind == "DataError" and "forget01.json" in message and "--data-dir DIR" in message and "\n" not in message
