"""Command lines of train.py and eval.py as one process of several, one after the other, with faults on request.

torchrun --nproc-per-node 2 tests/ranks.py JOBS.json     [{"argv": ["train", "--forget", ...], "fault": "nan"}, ...]
python tests/ranks.py --faults [COUNT]                   what so many processes do when one fails: 8 minutes

Leaves JOBS.status.json, the exit statuses of the jobs that ended. A fault happens to the second process in the third step of
its job, or in the one that the job names.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import distributed  # noqa: E402
import eval as evaluation  # noqa: E402
import toy  # noqa: E402
import train  # noqa: E402
from model import Llama, LlamaConfig, save_pretrained  # noqa: E402

TINY = LlamaConfig(
    vocab_size=400, hidden_size=30, intermediate_size=64, num_hidden_layers=2, num_attention_heads=5, num_key_value_heads=1,
    head_dim=6, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_ids=(1,),
    initializer_range=0.2,
)  # fmt: skip
STEP = 3
# What `--faults` tries: (fault, step, more flags). In eager runs all but those that are of compiling.
TRIED = [(f, STEP, []) for f in ("kill", "stop", "hang", "terminate", "memory", "memory of all", "nan")]
TRIED += [(f, s, ["--compile"]) for f, s in (("stop", STEP), ("stop soon", 1), ("busy", 1), ("busy", STEP))]


def busy(seconds: float) -> None:
    """As one that compiles: all in Python, which its other threads must wait for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def stop_soon(seconds: float = 5) -> None:
    """In the midst of what comes next, which is compiling in the first step."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGSTOP))
    timer.daemon = True
    timer.start()


def out_of_memory(model):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    model.model.layers[1].register_forward_pre_hook(full)  # in the middle of a pass, with gathered parameters


def not_a_number(model):
    with torch.no_grad():
        next(b for b in model.model.layers).mlp.up_proj.weight.to_local().fill_(float("nan"))


FAULTS = {
    "kill": lambda model: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda model: os.kill(os.getpid(), signal.SIGSTOP),
    "stop soon": lambda model: stop_soon(),
    "hang": lambda model: time.sleep(3600),
    "busy": lambda model: busy(60),
    "terminate": lambda model: os.kill(os.getpid(), signal.SIGTERM),
    "memory": out_of_memory,
    "memory of all": out_of_memory,
    "nan": not_a_number,
}


def with_fault(fault: str, step: int = STEP):
    steps, compute_gradients = 0, train.compute_gradients

    def faulty(model, *arguments):
        nonlocal steps
        steps += 1
        if steps == step and (distributed.rank() == 1 or fault.endswith("of all")):
            Path("fault.time").write_text(str(time.time()))
            FAULTS[fault](model)
        return compute_gradients(model, *arguments)

    return faulty


def work(path: Path) -> int:
    torch.set_num_threads(1)
    plain, statuses = train.compute_gradients, []
    for job in json.loads(path.read_text()):
        which, *argv = job["argv"]
        train.compute_gradients = with_fault(job["fault"], job.get("step", STEP)) if job.get("fault") else plain
        statuses.append({"train": train, "eval": evaluation}[which].main(argv))
        if job.get("last"):
            return statuses[-1]
        distributed.gather(None)  # a fault of one job is not met in the next, nor is it the one that is told
        for key in ("cause", "told") if distributed.first() else ():
            distributed._ranks.store.delete_key(key)
        distributed.gather(None)
        if distributed.first():
            path.with_suffix(".status.json").write_text(json.dumps(statuses))
    return 0


def launch(folder: Path, count: int, jobs: list[dict], timeout: float = 300) -> subprocess.CompletedProcess:
    """torchrun with so many processes in a folder. The result's `statuses`: of the jobs that ended."""
    path = folder / f"jobs-{count}.json"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), __file__, path]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    status = path.with_suffix(".status.json")
    done.statuses = json.loads(status.read_text()) if status.exists() else []
    return done


def told(done: subprocess.CompletedProcess) -> list[str]:
    """The last lines that the processes themselves printed."""
    lines = [line.strip() for line in done.stderr.replace("\r", "\n").splitlines()]
    return [line for line in lines if line.startswith(("error: ", "interrupted"))]


def tiny(folder: Path, **changes) -> Path:
    """A random model and a tokenizer for it."""
    words = toy.train_toy_tokenizer(0, folder / "tokenizer", vocab_size=400)
    model = Llama(LlamaConfig(**(vars(TINY) | changes))).init_weights(0)
    return save_pretrained(model, folder / "model", words)


def faults(count: int) -> int:
    """Print for each fault the time from it until torchrun and all processes are gone, and what they said."""
    folder = Path(tempfile.mkdtemp())
    flags = f"train --model {tiny(folder)} --forget toy_forget10[:10] --retain toy_retain90[:20] --batch-size 4 --no-eval"
    for i, (fault, step, more) in enumerate(TRIED):
        argv = [*flags.split(), *more, "--out", str(i)]
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"compiled-{i}")  # what is compiled, is compiled each time
        done = launch(folder, count, [{"argv": argv, "fault": fault, "step": step, "last": True}])
        saved = [f.name for f in (folder / str(i) / "checkpoint").glob("*")]
        seconds = time.time() - float((folder / "fault.time").read_text())
        what = " ".join([fault, *more, f"in step {step}"])
        print(f"{what}: all gone after {seconds:.0f} s, {done.returncode}; saved at step {saved}; {told(done)}", flush=True)
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--faults":
        sys.exit(faults(int([*sys.argv, "2"][2])))
    sys.exit(distributed.launch(lambda: work(Path(sys.argv[1]))))
