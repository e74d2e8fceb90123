"""The documents keep what they promise: their size, their links, their commands, their recipe of a loss, their picture."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_tiny

import dipo
import eval as evaluation
import train
from config import make_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "experiments/README.md", ROOT / "bench/README.md"])
MODULES = sorted(ROOT.glob("*.py"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(read(path)) if kind == language]


def section(path: Path, heading: str) -> str:
    return read(path).split(f"\n## {heading}\n")[1].split("\n## ")[0]


# ---------------------------------------------------------------------------------------------------------------- sizes


def test_the_readme_is_short_and_begins_with_what_is_needed_first():
    lines = read(ROOT / "README.md").splitlines()
    assert len(lines) <= 160
    headings = [line for line in lines[:60] if line.startswith("#")]
    assert [h.lstrip("# ") for h in headings[1:5]] == [
        "Reading order", "Install, try, use, test", "What the toy shows", "Against the baselines"
    ]  # fmt: skip
    assert lines.index("## Against the baselines") <= 60  # the four before it are whole
    prose = [line for line in lines if not line.startswith(("|", "u = "))]
    assert max(map(len, prose)) <= 130


def test_no_room_is_too_large():
    sizes = {path.name: len(read(path).splitlines()) for path in MODULES}
    assert {name: n for name, n in sizes.items() if n > 650} == {}
    assert sum(sizes.values()) <= 7600, sizes  # a quarter of it refuses, locks, checks and restores


def test_every_module_is_in_the_reading_order():
    named = re.findall(r"\[`(\w+\.py)`\]\(\1\)", section(ROOT / "README.md", "Reading order"))
    assert sorted(named) == [path.name for path in MODULES]


# ---------------------------------------------------------------------------------------------------- links and commands


def anchor(heading: str) -> str:
    """GitHub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"`|\[|\]\(.*?\)", "", heading).lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    text = FENCE.sub("", read(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, fragment = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists() and file.is_relative_to(ROOT), target
        if fragment:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", read(file)), re.MULTILINE)
            assert fragment in [anchor(h) for h in headings], target


def commands(page: Path) -> list[list[str]]:
    """The command lines of train.py and eval.py in a page's code, as words. Those with shell variables are left out."""
    text = read(page)
    code = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines() + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    lines = [part.strip() for line in code for part in line.split("&&")]
    found = [shlex.split(line, comments=True) for line in lines if re.match(r"python (train|eval)\.py\b", line)]
    return [words for words in found if not any("$" in word for word in words)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_is_one_that_the_program_takes(page, monkeypatch):
    monkeypatch.setitem(dipo.LOSSES, "uniform", dipo.LOSSES["ga"])  # CONTRIBUTING's example
    for _, script, *words in commands(page):
        if "--help" in words:
            continue
        if script == "eval.py":
            evaluation.parse_args(words)
            continue
        given, resume = train.parse_args(words)
        if not resume:
            make_config(given)


def test_commands_are_found():
    assert len(commands(ROOT / "README.md")) >= 10 and len(commands(ROOT / "docs/evaluation.md")) >= 9
    assert commands(ROOT / "docs/running.md")


def test_no_file_names_a_path_of_a_machine():
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
    roots = "|".join(("work", "home", "root", "tmp", "Users", "mnt"))
    for path in (ROOT / name for name in names if name):
        if path.suffix == ".png" or not path.is_file():
            continue
        found = re.search(rf"(?<![\w.:])/({roots})/\S*", read(path))
        assert not found, f"{path.relative_to(ROOT)}: {found[0]}"


# ------------------------------------------------------------------------------------------------------- code and picture


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny")).folder


def test_the_readmes_loss_is_the_papers_objective():
    torch.manual_seed(0)
    names = {"logits": torch.randn(2, 3, 11), "mask": torch.tensor([[True] * 3, [True, True, False]])}
    names |= {"ref_logits": names["logits"] + 0.1 * torch.randn(2, 3, 11)}
    [code] = blocks(ROOT / "README.md", "python")
    exec(code, names)
    z, z_ref, mask = (names[k] for k in ("logits", "ref_logits", "mask"))
    pi_m, pi_f = (x.log_softmax(-1) for x in dipo.preference_pair(z))
    u = dipo.reward_margin(z.log_softmax(-1), z_ref.log_softmax(-1), pi_f, pi_m, mask)
    torch.testing.assert_close(names["loss"], dipo.bradley_terry_loss(u).mean() + dipo.bradley_terry_loss(-u).mean())


def test_the_recipe_of_a_loss_makes_one_that_trains(tiny, tmp_path):
    """CONTRIBUTING followed to the letter in a copy of the modules: two edits of dipo.py, two steps by the command line."""
    term, row, test = FENCE.findall(section(ROOT / "CONTRIBUTING.md", "A loss"))
    for path in (*MODULES, *ROOT.glob("*.json")):
        shutil.copy(path, tmp_path)
    source = read(ROOT / "dipo.py")
    heading = re.search(r"^# -+ the table of losses$", source, re.MULTILINE).start()
    end = source.index("\n}\n", source.index("\nLOSSES")) + 1
    source = f"{source[:heading]}{term[1]}\n\n{source[heading:end]}{row[1]}{source[end:]}"
    (tmp_path / "dipo.py").write_text(source, encoding="utf-8")
    (tmp_path / "test_uniform.py").write_text(f"import dipo\nimport torch\n\n\n{test[1]}", encoding="utf-8")
    flags = f"--model {tiny} --forget toy_forget10[:4] --batch-size 4 --epochs 2 --no-eval --device cpu --out run"
    losses = ["--forget-loss", "uniform", "--retain-loss", "none"]
    trained, tested = [*flags.split(), *losses], ["-p", "no:cacheprovider", "test_uniform.py"]
    both = f"import pytest, train, sys; sys.exit(train.main({trained}) or pytest.main({tested}))"  # torch is imported once
    done = subprocess.run([sys.executable, "-c", both], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = [json.loads(line) for line in read(tmp_path / "run/log.jsonl").splitlines()]
    assert 0 < second["loss/forget"] < first["loss/forget"] and first["nll/forget"] > 0


def test_the_recipe_of_a_benchmark_names_all_that_it_must_have():
    recipe = section(ROOT / "CONTRIBUTING.md", "A benchmark")
    assert not [name for name in evaluation.Benchmark.__annotations__ if f"`{name}`" not in recipe]


@pytest.fixture
def pair():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("pair", ROOT / "docs" / "pair.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_drawn_from_any_model(pair, tiny, tmp_path, capsys):
    out = tmp_path / "pair.png"
    question, answer = "What does a $ cost?", "It costs $5 or $$6, in all."
    flags = ["--model", str(tiny), "--out", str(out), "--rows", "4"]
    assert pair.main([*flags, "--question", question, "--answer", answer]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000


def test_the_picture_finds_the_toys_target_and_tells_where_there_is_none(pair, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert pair.main(["--out", "pair.png"]) == 2
    assert re.fullmatch(r"error: runs/toy-seed0-.*: no target model .*python train\.py.*\n", capsys.readouterr().err)
    shutil.copytree(tiny, tmp_path / "runs/toy-seed0-12345678/toy_full/model")
    assert pair.main(["--out", "pair.png"]) == 0 and Path("pair.png").stat().st_size > 10_000
    assert pair.main(["--model", "nothing", "--out", "pair.png"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_the_picture_shows_what_m_keeps_and_then_what_pi_f_proposes(pair):
    logits = torch.tensor([0.0, 9.0, 1.0, 8.5, 2.0, 5.0, 3.0, 4.0])
    policy, forgetting = logits.softmax(-1), dipo.preference_pair(logits, filter="relative")[1].softmax(-1)
    assert pair.shown(policy, dipo.memory_vector(logits, filter="relative"), forgetting, 4) == [1, 3, 5, 7]
    assert pair.shown(policy, dipo.memory_vector(logits, p=0.001, filter="relative"), forgetting, 4) == [1, 3, 5, 7]
