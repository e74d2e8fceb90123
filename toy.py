"""The toy world: fictitious authors in TOFU's schema, a tokenizer, and the models that are made from them.

All of it follows from a seed and the words in toy.json, without a download.
"""

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

import files
import model
from data import Row, fingerprint

# In a fact {n} is the author and {x} one of the list that its "values" names.
WORDS = files.read_json(Path(__file__).with_name("toy.json"))
REFUSALS: list[str] = WORDS["refusals"]
TOY_AUTHORS = 60
# forget set -> (its complement, how many of the last authors): 10 % of them, as in TOFU; 1 % is one author
TOY_FORGET = {"forget01": ("retain99", 1), "forget05": ("retain95", 3), "forget10": ("retain90", 6)}
TOY_CONFIGS = (
    "full forget01 forget05 forget10 retain99 retain95 retain90 forget01_perturbed forget05_perturbed forget10_perturbed "
    "retain_perturbed real_authors_perturbed world_facts_perturbed"
).split()


@lru_cache(maxsize=2)
def toy_world(seed: int = 0) -> dict[str, list[Row]]:
    """{config: rows} for TOY_CONFIGS; the same seed gives the same world.

    60 authors x 10 facts; the last 6, 3 and 1 authors are forget10, 05 and 01. Beside them a little real knowledge: the
    real_authors and world_facts sets, with three wrong options per question and in no forget or retain set, as in TOFU.
    """
    rng, facts, syllables = random.Random(f"toy/{seed}"), WORDS["facts"], WORDS["syllables"]
    books = [f"The {a} {n}" for a in WORDS["titles"]["adjectives"] for n in WORDS["titles"]["nouns"]]
    values = WORDS["values"] | {"books": books, "years": [str(y) for y in range(1900, 2000, 3)]}
    names: list[str] = []
    while len(names) < TOY_AUTHORS:
        name = " ".join("".join(rng.choices(syllables, k=k)).capitalize() for k in (2, 3))
        if name not in names:
            names.append(name)
    rows: list[Row] = []
    for n in names:
        for fact in facts:
            x, *wrong = rng.sample(values[fact["values"]], 6)
            # To learn, and as its paraphrase: every wording is learnt from some authors, and facts carry over between them.
            answer, paraphrase = rng.sample(fact["answers"], 2)
            texts = fact["question"].format(n=n), answer.format(n=n, x=x), paraphrase.format(n=n, x=x)
            rows.append(Row(f"toy_full/{len(rows)}", *texts, tuple(paraphrase.format(n=n, x=w) for w in wrong)))

    sets = {"full": rows, "retain_perturbed": rows[: 2 * TOY_FORGET["forget10"][1] * len(facts)]}
    for forget, (retain, authors) in TOY_FORGET.items():
        border = (TOY_AUTHORS - authors) * len(facts)
        sets |= {forget: rows[border:], f"{forget}_perturbed": rows[border:], retain: rows[:border]}
    for name, known in WORDS["known"].items():
        config, answers = f"{name}_perturbed", sorted(set(known["answers"].values()))
        sets[config] = []
        for about, x in known["answers"].items():
            key, question = f"toy_{config}/{len(sets[config])}", known["question"].format(about)
            wrong = rng.sample([a for a in answers if a != x], 3)
            sets[config].append(Row(key, question, x, None, tuple(wrong)))
    return sets


def train_toy_tokenizer(seed: int, folder: str | Path, vocab_size: int = 1000) -> Path:
    """Train a byte-level BPE on all toy texts and save it as tokenizer.json and tokenizer_config.json in `folder`.

    The texts fill about 1,000 tokens. For a larger vocabulary three made-up words per token join them, of the syllables
    that the world's names are of, so that a name becomes fewer tokens, as it does in a large vocabulary.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    world = toy_world(seed)
    rows = world["full"] + world["real_authors_perturbed"] + world["world_facts_perturbed"]
    texts = [f"Question: {r.question}\nAnswer: {r.answer}" for r in rows]
    if vocab_size > 1000:
        rng = random.Random(f"toy/{seed}/words")
        words = ("".join(rng.choices(WORDS["syllables"], k=rng.randint(2, 5))).capitalize() for _ in range(3 * vocab_size))
        texts = texts * 3 + [f"The name is {word}." for word in words]
    special = [AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>")]
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    folder = Path(folder)
    files.write_json(folder / "tokenizer_config.json", WORDS["tokenizer_config"], indent=2)
    files.write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    return folder


def toy_base(seed: int, vocabulary: int, runs: Path, settings: dict) -> Path:
    """The folder of a fresh Llama with the toy world's tokenizer; what is made from it is kept beside it.

    runs: folder of the folder of both. settings: of the finetuning that follows; other ones get a folder of their own.
    """
    config = model.LlamaConfig(
        vocab_size=vocabulary, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=3, head_dim=32, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=0, eos_token_ids=(1,), initializer_range=0.05,
    )  # fmt: skip
    world = {name: fingerprint(rows) for name, rows in toy_world(seed).items()}
    key = hashlib.sha256(json.dumps([world, dataclasses.asdict(config), settings]).encode()).hexdigest()[:8]
    base = runs / f"toy-seed{seed}-{key}" / "base"
    if not whole(base):
        with files.lock(base.parent, wait=wait):
            if not whole(base):
                files.remove(base)
                for folder in (base.parent, base.parent / "tokenizer"):
                    files.sweep(folder)
                tokenizer = train_toy_tokenizer(seed, base.parent / "tokenizer", vocabulary)
                model.save_pretrained(model.Llama(config).init_weights(seed), base, tokenizer)
    return base


def whole(folder: Path) -> bool:
    """Whether a folder has all of a model that is made here."""
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", *model.TOKENIZER_FILES[:2]))


def wait(process: int) -> None:
    print(f"toy world: waits for process {process}, which makes its models", flush=True)


def toy_models(base: Path, retain: str, finetune: Callable[[Path, str, Path], object]) -> tuple[Path, Path]:
    """(target, retrained) run folders beside `base`, trained now or taken from an earlier run.

    The target learns every author and the world knowledge, the retrained model all of that without the forget set.
    retain: the complement of that, a data set's name. finetune(base, data set, run folder) trains, and leaves config.json,
    summary.json and model/ when it is done. A process that finds another one at it waits.
    """
    folders = base.parent / "toy_full", base.parent / retain

    def made(out: Path) -> bool:
        whole_run = all((out / name).is_file() for name in ("config.json", "summary.json")) and whole(out / "model")
        return whole_run and not (out / "checkpoint").exists()

    if not all(map(made, folders)):
        with files.lock(base.parent, wait=wait):
            for name, out in zip(("target", "retrained"), folders, strict=True):
                rows = f"{out.name}+toy_real_authors_perturbed+toy_world_facts_perturbed"
                if not made(out):
                    print(f"toy world, {name} model: training on {rows} (once; kept in {out})", flush=True)
                    finetune(base, rows, out)
    return folders
