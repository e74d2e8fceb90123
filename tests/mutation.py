"""Mutation testing: is there a wrong dipo.py or memory.py that passes? Not part of the suite.

    pip install -e '.[mutation]' && python tests/mutation.py

1. mutmut changes operators, numbers, arguments, names in the functions of dipo.py, memory.py and metrics.py, one at a time,
   and runs their tests on each. It goes on where it was interrupted (folder `mutants/`).
2. The misreadings that mutmut has no operator for: swapping any two of the four KLs, turning one round, dropping a mask,
   a detach, a beta, a sum, a threshold, exchanging the pair, a wrong row in the table of losses, another target of the
   anchor, memory for the rest, another way to count.

Prints every mutant that no test notices, and ends with status 1 if one of them is not in docs/theory.md's table of
equivalent mutants.
"""

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
EQUIVALENT = re.compile(r"^\| `(\w+)` \| `(.+)` \| .+ \|$", re.MULTILINE)


def equivalent_mutants() -> set[tuple[str, str]]:
    """(function, mutated line) of the table in docs/theory.md, which gives the reason for each."""
    section = (ROOT / "docs/theory.md").read_text(encoding="utf-8").split("\n## Mutation testing\n")[1].split("\n## ")[0]
    return set(EQUIVALENT.findall(section))


# --------------------------------------------------------------------------------------------------------------- mutmut


def run_mutmut() -> list[tuple[str, str]]:
    """(function, mutated line) of each survivor."""
    subprocess.run(["mutmut", "run"], cwd=ROOT, check=True)
    results = subprocess.run(["mutmut", "results"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    survivors = []
    for name, status in re.findall(r"(\S+__mutmut_\d+): (.+)", results):
        if status.strip() in ("killed", "not checked"):
            continue
        diff = subprocess.run(["mutmut", "show", name], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        lines = [line[1:].strip() for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
        function = re.sub(r".*\.x(?:_|ǁ\w+?ǁ)(.+)__mutmut_\d+", r"\1", name)
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


START, POLICY = r"_log_softmax\(s\.ref_logits\.detach\(\)\)", r"_log_softmax\(s\.logits\)"
# (pattern, replacement, what is then wrong), of each file
EDITS = {"dipo.py": [
    (r"\.detach\(\)", "", "detach dropped"),
    (r"\bbeta \* ", "", "beta dropped"),
    (r"_masked_sum\((.+?), mask\)", r"(\1).sum(-1)", "mask dropped"),
    (r"\.sum\(-1\)", ".mean(-1)", "mean in place of a sum"),
    (r"sequence_kl\((?!p_log)(\S+), (.+?), mask\)", r"sequence_kl(\2, \1, mask)", "KL the other way round"),
    (r"torch\.maximum\(by_probability, (kth_largest\(.+\))\)", r"\1", "relative threshold dropped"),
    (r"torch\.maximum\(by_probability, kth_largest\(.+\)\)", "by_probability", "rank threshold dropped"),
    (r"torch\.minimum\(by_rank, by_probability\)", "by_rank", "relative threshold dropped from 'either'"),
    (r"torch\.minimum\(by_rank, by_probability\)", "by_probability", "rank threshold dropped from 'either'"),
    (r"\(pi_f, pi_m\) if", "(pi_m, pi_f) if", "roles reversed on forget data"),
    (r'if s\.role == "forget" else', 'if s.role != "forget" else', "roles reversed"),
    (r"else \(pi_m, pi_f\)", "else (pi_f, pi_m)", "roles reversed on retain data"),
    (r"pi_w - pi_l\)", "pi_l - pi_w)", "preferred and dispreferred exchanged"),
    (r"log_z_m < log_z_f", "log_z_m > log_z_f", "swapped taken for not swapped"),
    (r"z \+ alpha \* m, z - alpha \* m", "z - alpha * m, z + alpha * m", "pair exchanged"),
    (r"z \+ alpha \* m, z - alpha \* m", "alpha * m, -alpha * m", "policy left out of the pair"),
    (r"torch\.where\(keep, z, 0\.0\)", "torch.where(keep, z, -math.inf)", "logits removed in place of zero"),
    (r"torch\.where\(keep, z, 0\.0\)", "keep.to(z.dtype)", "indicator in place of the logit"),
    (r"logsigmoid\(u\)", "logsigmoid(-u)", "margin's sign flipped"),
    (r"-F\.logsigmoid\(u\)", "-u", "no Bradley-Terry"),
    (r"\(2 / beta\) \* ", "", "NPO's factor dropped"),
    (r"Terms\(-nll, nll\)", "Terms(nll, nll)", "ascent that descends"),
    (r"nll - token_nll\((.+)\), nll\)", r"token_nll(\1) - nll, nll)", "gap the other way round"),
    (rf"token_kl\(({START}|_log_softmax\(target\)), ({POLICY})\)", r"token_kl(\2, \1)", "KL to the policy turned round"),
    (r"sums\[::2\] - sums\[1::2\]", "sums[1::2] - sums[::2]", "refusal and answer exchanged"),
    (r",\s+(0\.05|0\.1|4\.5)(?=[,)])", ", 0.2", "another beta in the table"),
    (r"beta=(10\.0|1\.0)(?=[,)])", "beta=0.2", "another beta in the table"),
    (r', mean_over="tokens"', "", "mean over sequences in place of tokens"),
    (r', reduction="mean"', "", "SimNPO by the sum"),
    (r",\s+reduction=None", "", "the objective's reduction ignored"),
    (r",\s+(pair|refusals|anchored)=True", "", "no pair, no refusals, or no anchor"),
    (r",\s+reference=True(?=[,)])", "", "no reference"),
    (r"name == self\.forget_loss", "True", "beta for every loss"),
    (r"\(self\.forget_loss, 1\.0\)", "(self.forget_loss, self.lam)", "lambda on the forget loss"),
    (r"fixed\[1\]", "fixed[0]", "pi_m as the anchor's target"),
    (r"fixed\[1\]", "_at_least_float32(s.ref_logits.detach())", "pi_ref as the anchor's target at memory positions"),
    (r"None\], fixed\[1\], (.+)\)(?=\n)", r"None], \1, fixed[1])", "memory for the rest in the anchor's target"),
    (r"fixed\[1\], _at_least_float32\(s\.ref_logits\.detach\(\)\)", "fixed[1], fixed[1]", "pi_f as the target everywhere"),
    (r"value\.where\((\S*)memory, 0\.0\)", r"value.where(~\1memory, 0.0)", "memory for the rest in the margin"),
    (r"value\.where\((\S*)memory, 0\.0\)", "value", "the margin of all positions"),
    (r"kept\.where\(~s\.memory, 0\.0\)", "kept", "the control's anchor at memory positions, too"),
    (r"kept\.where\(~s\.memory, 0\.0\)", "kept.where(s.memory, 0.0)", "memory for the rest in the control's anchor"),
    (r's\.role != "forget"', 's.role == "forget"', "the anchor's targets of the other role"),
    (r"objective\.kappa \* ", "", "kappa dropped"),
    (r"anchors / lengths", "anchors", "a sum of anchors beside a mean"),
    (r"o\.pair_from is None", "o.pair_from is not None", "the pair from the other model"),
    (r"-s\.beta \* nll", "s.beta * nll", "WGA's exponent with the other sign"),
    (r", -s\.beta\)", ", s.beta)", "UNDIAL raises the answer"),
    (rf"lowered\.softmax\(-1\) \* {POLICY}", "s.logits.softmax(-1) * _log_softmax(lowered)", "UNDIAL turned round"),
], "memory.py": [
    (r"\(self\.totals\[h\] \+ self\.kinds\[h\]\)", "self.totals[h]", "Witten-Bell without T in the denominator"),
    (r"self\.kinds\[h\] \* p", "p", "Witten-Bell without T in the numerator"),
    (r"self\.kinds\[tuple\(h\)\] \+= 1", "self.kinds[tuple(h)] += count", "how often for how many different ones"),
    (r"min\(i, context\) \+ 1", "min(i, context)", "a context one token shorter"),
    (r"1 / self\.vocab_size", "0.0", "nothing below the empty context"),
    (r"FLOOR, \*", "*", "no floor"),
    (r"found\.append\(COPIED\)", "found.append(FLOOR)", "nothing copied"),
    (r"\[: example\.prompt_length\]", "", "copied from the answer, too"),
    (r" \* \(before\[-1\] != COPY\)", "", "each copied token counted"),
    (r"Explanation\(retain", "Explanation(forget", "what the forget set explains"),
    (r"self\.ngram_of\(self\.nearest\(example\)\)", "self.ngram", "the nearest questions left out"),
    (r"= \(self\.ngram, ", "= (self.ngram_of([]), ", "nothing but the nearest questions"),
    (r"lambda i: -likenesses", "lambda i: likenesses", "the questions least alike"),
    (r"-loss - math\.log\(g\)", "-loss + math.log(g)", "the explanation with the other sign"),
    (r"-loss - math\.log\(g\)", "-loss", "no explanation"),
    (r"-loss - math\.log\(g\)", "loss - math.log(g)", "what the reference does not know"),
    (r"x > tau", "x <= tau", "memory for the rest"),
    (r"x > tau", "-x > tau", "what is less known than explained"),
]}  # fmt: skip


def misreadings(file: str, source: str) -> dict[str, str]:
    """{what is wrong: the source with that mistake}."""
    found = {}
    for pattern, replacement, what in EDITS[file]:
        matches = code_matches(source, pattern)
        assert matches, f"{pattern!r} is not in {file} any more"
        for match in matches:
            before, line = source[: match.start()].rpartition("\n")[2], source[match.start() :].partition("\n")[0]
            function = re.findall(r"^(?: *def (?=\w)|(?=[A-Z]+: ))(\w+)", source[: match.start()], re.MULTILINE)[-1]
            name = f"{what} in {function} at column {len(before) + 1} of {(before + line).strip()}"
            assert name not in found, f"{name!r} stands twice in {function}"
            found[name] = source[: match.start()] + match.expand(replacement) + source[match.end() :]
    four = code_matches(source, r"sequence_kl\(pi_[wl], .+?, mask\)")
    assert len(four) == 4 * (file == "dipo.py"), "reward_margin is expected to write out four KLs"
    for a, b in itertools.combinations(four, 2):
        swapped = source[: a.start()] + b.group() + source[a.end() : b.start()] + a.group() + source[b.end() :]
        found[f"{a.group()} and {b.group()} swapped"] = swapped
    return found


def survives(file: str, source: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        for path in (*ROOT.glob("*.py"), *ROOT.glob("*.json"), ROOT / "pyproject.toml"):
            shutil.copy(path, folder)
        shutil.copytree(ROOT / "tests", Path(folder) / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / file).write_text(source, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--hypothesis-profile=mutation"]
        command += [f"tests/test_{file}", "-k", "not compiled"]
        return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0


def main() -> int:
    known = equivalent_mutants()
    unnoticed = {f"{function}: {line}": (function, line) in known for function, line in run_mutmut()}
    wrong = dict[str, tuple[str, str]]()
    for file in EDITS:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert survives(file, source), f"the tests fail on {file} as it is"
        wrong |= {what: (file, changed) for what, changed in misreadings(file, source).items()}
    with ThreadPoolExecutor(2) as pool:
        lives = pool.map(survives, *zip(*wrong.values(), strict=True))
        for what, alive in zip(wrong, tqdm(lives, "misreadings", len(wrong)), strict=True):
            if alive:
                unnoticed[what] = what in {mutated for _, mutated in known}
    print(f"\n{len(wrong)} misreadings tried besides mutmut's mutants; not noticed by any test:")
    for what, equivalent in unnoticed.items():
        print(f"  {what}  ({'equivalent, see docs/theory.md' if equivalent else 'NOT KNOWN TO BE EQUIVALENT'})")
    return 0 if all(unnoticed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
