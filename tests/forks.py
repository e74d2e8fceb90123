"""Python processes with every library imported already: a server imports them once, and forks for each process.

Such a process begins like `python SCRIPT`, `python -c PROGRAM` or `python -m MODULE`, without the seconds that importing
takes. huggingface_hub, which reads its environment when it is imported, is left to it, and no autograd has run before it.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = "torch safetensors.torch tokenizers tqdm scipy.stats rouge_score.rouge_scorer pyarrow.parquet matplotlib.figure"
OURS = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}  # as the tests found it, not as the first one changed it


@functools.cache
def server() -> subprocess.Popen:
    """Ends when its input is closed: with this process."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=OURS, stdin=pipe, stdout=pipe, text=True)
    atexit.register(process.communicate)
    return process


def run(words: list, cwd: Path = ROOT, env: dict | None = None, timeout: int = 600) -> subprocess.CompletedProcess:
    """As `subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True)`."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        asked = [[*map(str, words)], str(cwd), dict(env or os.environ), str(out), str(err), timeout]
        print(json.dumps(asked), file=server().stdin, flush=True)
        status = int(server().stdout.readline())
        return subprocess.CompletedProcess(words, status, out.read_text(), err.read_text())


def become(words: list[str], cwd: str, env: dict[str, str], out: str, err: str, timeout: int) -> None:
    """Be that process, to its end."""
    for number, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = os.fdopen(0)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    signal.alarm(timeout)
    name, *more = words
    sys.path[0] = {"-c": "", "-m": cwd}.get(name, os.path.dirname(name))
    sys.argv = words[1:] if name == "-m" else ["-c", *more[1:]] if name == "-c" else words
    if name == "-c":
        exec(more[0], {"__name__": "__main__"})
    elif name == "-m":
        runpy.run_module(more[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(name, run_name="__main__")


def main() -> None:
    sys.path[0] = str(ROOT)
    for name in [*LIBRARIES.split(), *(path.stem for path in ROOT.glob("*.py"))]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert "huggingface_hub" not in sys.modules
    gc.freeze()
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            return become(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
