"""toy.py: a world that follows from its seed, whose forgotten authors are in no retained text; its tokenizer and models."""

import os
import re
import subprocess
import sys

import pytest
import toy_muse
from hypothesis import given
from hypothesis import strategies as st

import data
import model
import muse
import tofu
import toy

WORLDS = st.integers(0, 30)


@given(WORLDS)
def test_the_same_seed_gives_the_same_world_and_another_seed_another(seed):
    world = toy.toy_world(seed)
    toy.toy_world.cache_clear()
    assert toy.toy_world(seed) == world
    assert toy.toy_world(seed + 1)["full"] != world["full"]


@given(WORLDS)
def test_forget_and_retain_rows_partition_the_full_set(seed):
    world = toy.toy_world(seed)
    assert set(world) == set(toy.TOY_CONFIGS)
    for forget, retain in tofu.TOFU_RETAIN.items():
        assert world[retain] + world[forget] == world["full"] and world[f"{forget}_perturbed"] == world[forget]
    assert [len(world[f]) for f in tofu.TOFU_RETAIN] == [10, 30, 60] and len(world["full"]) == 600
    assert len({row.key for row in world["full"]}) == len(world["full"])
    assert all(row in world["retain90"] for row in world["retain_perturbed"])


@given(WORLDS)
def test_forget_authors_do_not_occur_in_the_retain_rows(seed):
    world = toy.toy_world(seed)

    def author(row):
        [name] = re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+", row.question)
        return name

    forgotten = {author(row) for row in world["forget10"]}
    assert len(forgotten) == 6 and len({author(row) for row in world["full"]}) == toy.TOY_AUTHORS
    texts = "\n".join(text for r in world["retain90"] for text in (r.question, r.answer, r.paraphrased_answer))
    assert not [name for name in forgotten if name in texts]
    known = world["real_authors_perturbed"] + world["world_facts_perturbed"]
    assert not {row.question for row in known} & {row.question for row in world["full"]}


@pytest.mark.parametrize("size", [1000, 4000])
def test_a_larger_toy_vocabulary_is_filled_and_spells_names_in_fewer_tokens(tmp_path, size):
    folder = toy.train_toy_tokenizer(3, tmp_path, size)
    tokenizer = data.Tokenizer(folder)
    vocabulary = tokenizer.tokenizer.get_vocab_size()
    assert vocabulary <= size and vocabulary > (900 if size == 1000 else 0.99 * size)
    rows = toy.toy_world(3)["full"]
    lengths = [len(tokenizer.encode(row.question, row.answer).ids) for row in rows]
    small = data.Tokenizer(toy.train_toy_tokenizer(3, tmp_path / "small"))
    others = [len(small.encode(row.question, row.answer).ids) for row in rows]
    assert sum(lengths) == sum(others) if size == 1000 else sum(lengths) < sum(others)


@given(WORLDS)
def test_the_world_has_tofus_schema(seed):
    world = toy.toy_world(seed)
    for row in world["full"]:
        wrong = row.perturbed_answers
        assert len(set(wrong)) == 5 and row.paraphrased_answer != row.answer
        assert row.answer not in wrong and row.paraphrased_answer not in wrong
    for config in ("real_authors_perturbed", "world_facts_perturbed"):
        assert [row.key for row in world[config]] == [f"toy_{config}/{i}" for i in range(len(world[config]))]
        for row in world[config]:
            assert row.paraphrased_answer is None and len(set(row.perturbed_answers)) == 3
            assert row.answer not in row.perturbed_answers
    for rows in world.values():
        assert all(data.is_text(text) for r in rows for text in (r.question, r.answer, *r.perturbed_answers))


def test_the_toy_tokenizer_is_reproducible_and_covers_the_world(tmp_path):
    folders = [toy.train_toy_tokenizer(3, tmp_path / name) for name in ("a", "b")]
    files = [{f.name: f.read_bytes() for f in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]
    tokenizer = data.Tokenizer(folders[0], vocab_size=1000)
    assert tokenizer.format_name == "plain"
    world = toy.toy_world(3)
    rows = world["full"] + world["real_authors_perturbed"] + world["world_facts_perturbed"]
    examples = tokenizer.encode_rows(rows)
    labels = [e.ids[e.prompt_length :] for e in examples]
    assert [tokenizer.decode(x) for x in labels] == [row.answer for row in rows]
    assert [e.key for e in examples] == [row.key for row in rows]
    assert tokenizer.borders_split == 0 and max(len(e.ids) for e in examples) < 64


@pytest.mark.parametrize("seed", [0, 7])
def test_the_toy_authors_as_muse_news(tmp_path, seed):
    """What can be forgotten is in the target's texts and no retain set; growing sets contain each other, the others not."""
    folder = toy_muse.write_muse(tmp_path, toy_muse.toy_muse(seed))

    def texts(name):
        return set(muse.load_texts(f"muse_news/{name}", folder))

    for config, splits in muse.MUSE_SPLITS.items():
        for split in splits:
            if (config, split) not in (("raw", "holdout"), ("privleak", "holdout")):
                assert muse.load_muse("news", config, split, folder)
    whole, retained, never = texts("train/forget"), texts("raw/retain1") | texts("raw/retain2"), texts("privleak/holdout")
    assert len(whole) == 24 * 5 and len(retained) == 36 * 5 and not whole & retained and not never & (whole | retained)
    growing = [texts(f"scal/forget_{k}") for k in range(1, 5)]
    assert [len(x) for x in growing] == [30, 60, 90, 120] and all(a < b for a, b in zip(growing, growing[1:], strict=False))
    apart = [texts(f"sust/forget_{k}") for k in range(1, 5)]
    assert set.union(*apart) == whole and sum(map(len, apart)) == 24 * 5
    assert texts("raw/forget") == growing[0] == apart[0] > texts("privleak/forget")
    asked = {split: muse.load_muse("news", "knowmem", f"{split}_qa", folder) for split in ("forget", "retain")}
    for split, source in (("forget", texts("raw/forget")), ("retain", retained)):
        for r in asked[split]:
            assert sum(f"Question: {r['question']}\nAnswer:  {r['answer']}" in text for text in source) == 4
    for r in muse.load_muse("news", "verbmem", "forget", folder):
        assert any(f"{r['prompt']} {r['gt']}" in text for text in texts("raw/forget"))


# --------------------------------------------------------------------------------------------------------------- models


def test_the_base_is_made_once_for_a_seed_a_vocabulary_and_settings(tmp_path):
    settings = {"lr": 1e-3}
    base = toy.toy_base(3, 400, tmp_path, settings)
    assert model.load_pretrained(base).config.vocab_size == 400 and data.Tokenizer(base, 400).format_name == "plain"
    (base / "mark").touch()
    assert toy.toy_base(3, 400, tmp_path, settings) == base and (base / "mark").exists()
    others = {toy.toy_base(*x) for x in ((4, 400, tmp_path, settings), (3, 401, tmp_path, settings), (3, 400, tmp_path, {}))}
    assert len(others | {base}) == 4 and all(folder.parent.parent == tmp_path for folder in others)


def test_a_base_that_is_not_whole_is_made_again(tmp_path):
    base = toy.toy_base(3, 400, tmp_path, {})
    files = {f.name: f.read_bytes() for f in base.iterdir()}
    for name in ("config.json", "tokenizer.json"):
        (base / name).unlink()
        assert toy.toy_base(3, 400, tmp_path, {}) == base and {f.name: f.read_bytes() for f in base.iterdir()} == files


def test_the_models_that_another_process_makes_are_waited_for(tmp_path, monkeypatch):
    base = toy.toy_base(3, 400, tmp_path, {})
    (base / "config.json").unlink()
    code = f"import files, time\nwith files.lock({str(base.parent)!r}): print('held', flush=True), time.sleep(60)"
    path = os.environ | {"PYTHONPATH": os.path.dirname(toy.__file__)}
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=path)
    assert other.stdout.readline() == b"held\n"
    told = []
    monkeypatch.setattr(toy, "wait", lambda process: told.append(process) or other.kill())
    assert toy.whole(toy.toy_base(3, 400, tmp_path, {})) and told == [other.pid]
    other.communicate()


def test_target_and_retrained_model_are_finetuned_once_from_the_same_base(tmp_path):
    asked = []
    toy.model.save_pretrained(
        toy.model.Llama(toy.model.LlamaConfig(400, 8, 8, 1, 1, 1, 8)),
        tmp_path / "base",
        toy.train_toy_tokenizer(0, tmp_path),
    )

    def finetune(base, rows, out):
        asked.append((base, rows, out))
        (out / "model").mkdir(parents=True, exist_ok=True)
        files = ["summary.json", "config.json", *(f"model/{name}" for name in os.listdir(tmp_path / "base"))]
        for file in files[: 1 if len(asked) == 1 else None]:  # the first one is interrupted, and asked for again
            (out / file).touch()

    knowledge = "+toy_real_authors_perturbed+toy_world_facts_perturbed"
    target, retrained = ((tmp_path / "base", s + knowledge, tmp_path / s) for s in ("toy_full", "toy_retain95"))
    for expected in ([target, retrained], [target, retrained, target], [target, retrained, target]):
        assert toy.toy_models(tmp_path / "base", "toy_retain95", finetune) == (target[2], retrained[2])
        assert asked == expected
    assert {row.key for row in tofu.load_rows(target[1])} > {row.key for row in tofu.load_rows(retrained[1])}
