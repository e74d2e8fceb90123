"""Mutation testing: is there a wrong dipo.py that passes? Not part of the suite.

    pip install -e '.[mutation]' && python tests/mutation.py

1. mutmut changes operators, numbers, arguments, names of dipo.py and of the pure metrics of eval.py, one at a time, and
   runs their tests on each. It goes on where it was interrupted (folder `mutants/`).
2. The misreadings that mutmut has no operator for: swapping any two of the four KLs, turning one round, dropping a mask,
   a detach, a beta, a sum, a threshold, exchanging the pair.

Prints every mutant that no test notices, and ends with status 1 if one of them is not in the README's table of equivalent
mutants.
"""

import ast
import io
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("dipo.py", "eval.py", "data.py", "model.py", "train.py")
MUSE = ["knowmem_prompt", "cut_at_stop", "muse_min_k", "muse_retained_auc", "aggregate_muse"]
EQUIVALENT = re.compile(r"^\| `(\w+)` \| `(.+)` \| .+ \|$", re.MULTILINE)


def equivalent_mutants() -> set[tuple[str, str]]:
    """(function, mutated line) of the README's table, which gives the reason for each."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("### Mutation testing")[1].split("\n## ")[0]
    return set(EQUIVALENT.findall(section))


def pure_metrics() -> list[str]:
    """The functions of eval.py's section of pure metrics, and MUSE's."""
    source = (ROOT / "eval.py").read_text(encoding="utf-8")
    headings = [i for i, line in enumerate(source.splitlines(), 1) if line.startswith("# ----")]
    start = next(i for i in headings if "pure metrics" in source.splitlines()[i - 1])
    end = next(i for i in headings if i > start)
    return [n.name for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and start < n.lineno < end] + MUSE


# --------------------------------------------------------------------------------------------------------------- mutmut


def run_mutmut() -> list[tuple[str, str]]:
    """(function, mutated line) of each survivor."""
    names = ["dipo.*", *(f"eval.x_{name}__mutmut_*" for name in pure_metrics())]
    subprocess.run(["mutmut", "run", *names], cwd=ROOT, check=True)
    results = subprocess.run(["mutmut", "results"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    survivors = []
    for name, status in re.findall(r"(\S+__mutmut_\d+): (.+)", results):
        if status.strip() in ("killed", "not checked"):
            continue
        diff = subprocess.run(["mutmut", "show", name], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        lines = [line[1:].strip() for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
        function = re.sub(r".*\.x_(.+)__mutmut_\d+", r"\1", name)
        survivors.append((function, " ".join(lines) + ("" if status.strip() == "survived" else f"  [{status.strip()}]")))
    return survivors


# ---------------------------------------------------------------------------------------------------------- misreadings


def code_matches(source: str, pattern: str) -> list[re.Match]:
    """Matches of `pattern` outside docstrings and comments."""
    starts = [0, *itertools.accumulate(len(line) for line in source.splitlines(keepends=True))]
    quoted = [
        range(starts[t.start[0] - 1] + t.start[1], starts[t.end[0] - 1] + t.end[1])
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type in (tokenize.STRING, tokenize.COMMENT)
    ]
    return [m for m in re.finditer(pattern, source) if not any(m.start() in span for span in quoted)]


def misreadings(source: str) -> dict[str, str]:
    """{what is wrong: the source with that mistake}."""
    edits = [
        (r"\.detach\(\)", "", "detach dropped"),
        (r"\bbeta \* ", "", "beta dropped"),
        (r"_masked_sum\((.+), mask\)", r"(\1).sum(-1)", "mask dropped"),
        (r"\.sum\(-1\)", ".mean(-1)", "mean in place of a sum"),
        (r"sequence_kl\((?!p_log)(\S+), (.+), mask\)", r"sequence_kl(\2, \1, mask)", "KL the other way round"),
        (r"torch\.maximum\(by_probability, (kth_largest\(.+\))\)", r"\1", "relative threshold dropped"),
        (r"torch\.maximum\(by_probability, kth_largest\(.+\)\)", "by_probability", "rank threshold dropped"),
        (r"torch\.minimum\(by_rank, by_probability\)", "by_rank", "relative threshold dropped from 'either'"),
        (r"torch\.minimum\(by_rank, by_probability\)", "by_probability", "rank threshold dropped from 'either'"),
        (r"pi_f - pi_m if", "pi_m - pi_f if", "roles reversed on forget data"),
        (r'if role == "forget" else', 'if role != "forget" else', "roles reversed"),
        (r"else pi_m - pi_f", "else pi_f - pi_m", "roles reversed on retain data"),
        (r"log_z_m < log_z_f", "log_z_m > log_z_f", "swapped taken for not swapped"),
        (r"z \+ alpha \* m, z - alpha \* m", "z - alpha * m, z + alpha * m", "pair exchanged"),
        (r"z \+ alpha \* m, z - alpha \* m", "alpha * m, -alpha * m", "policy left out of the pair"),
        (r"torch\.where\(keep, z, 0\.0\)", "torch.where(keep, z, -math.inf)", "logits removed in place of zero"),
        (r"torch\.where\(keep, z, 0\.0\)", "keep.to(z.dtype)", "indicator in place of the logit"),
        (r"logsigmoid\(u\)", "logsigmoid(-u)", "margin's sign flipped"),
        (r"-F\.logsigmoid\(u\)", "-u", "no Bradley-Terry"),
    ]
    found = {}
    for pattern, replacement, what in edits:
        matches = code_matches(source, pattern)
        assert matches, f"{pattern!r} is not in dipo.py any more"
        for match in matches:
            line = source.count("\n", 0, match.start()) + 1
            found[f"{what} in line {line}, column {match.start() - source.rfind(chr(10), 0, match.start())}"] = (
                source[: match.start()] + match.expand(replacement) + source[match.end() :]
            )
    four = code_matches(source, r"sequence_kl\(pi_[wl], .+?, mask\)")
    assert len(four) == 4, "reward_margin is expected to write out four KLs"
    for a, b in itertools.combinations(four, 2):
        swapped = source[: a.start()] + b.group() + source[a.end() : b.start()] + a.group() + source[b.end() :]
        found[f"{a.group()} and {b.group()} swapped"] = swapped
    return found


def survives(source: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        for name in (*MODULES, "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        shutil.copytree(ROOT / "tests", Path(folder) / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / "dipo.py").write_text(source, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--hypothesis-profile=mutation"]
        command += ["tests/test_dipo.py", "-k", "not compiled"]
        return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0


def main() -> int:
    known = equivalent_mutants()
    unnoticed = {f"{function}: {line}": (function, line) in known for function, line in run_mutmut()}
    source = (ROOT / "dipo.py").read_text(encoding="utf-8")
    assert survives(source), "the tests fail on dipo.py as it is"
    wrong = misreadings(source)
    with ThreadPoolExecutor(2) as pool:
        for what, alive in zip(wrong, tqdm(pool.map(survives, wrong.values()), "misreadings", len(wrong)), strict=True):
            if alive:
                unnoticed[what] = ("reward_margin", what) in known
    print(f"\n{len(wrong)} misreadings tried besides mutmut's mutants; not noticed by any test:")
    for what, equivalent in unnoticed.items():
        print(f"  {what}  ({'equivalent, see the README' if equivalent else 'NOT KNOWN TO BE EQUIVALENT'})")
    return 0 if all(unnoticed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
