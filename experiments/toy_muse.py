"""The toy authors as the MUSE News corpus: what muse_news.py forgets at toy scale."""

import json
import random
from pathlib import Path

import toy
from data import Row

MuseSets = dict[str, list[dict[str, str]]]  # {'config/split': rows}


def write_muse(folder: str | Path, sets: MuseSets) -> Path:
    """Write `folder`/MUSE-News/<config>/<split>.json, for --data-dir; returns `folder`."""
    for name, rows in sets.items():
        path = Path(folder) / "MUSE-News" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return Path(folder)


def toy_muse(seed: int = 0) -> MuseSets:
    """The toy authors as MUSE-News, for `write_muse`.

    Of each author a document of ten sentences; of each six authors 24 documents of ten of their questions with answers, all
    drawn four times, so that an answer is not tied to what stands before it. The last 24 authors can be forgotten:
    scal/forget_k holds the last 6k, sust/forget_k the k-th six from the end, raw/forget the last six. retain1 is the first
    24, retain2 the 12 after them; the holdout set is authors of another world. VerbMem: sentences to go on with.
    """
    size = len(toy.WORDS["facts"])
    rng = random.Random(f"toy/{seed}/muse")

    def of_authors(first: int, last: int, seed: int = seed) -> list[list[Row]]:
        return [toy.toy_world(seed)["full"][i * size : (i + 1) * size] for i in range(first, last)]

    def about(first: int, last: int, seed: int = seed) -> list[str]:
        return [" ".join(r.answer for r in rows) for rows in of_authors(first, last, seed)]

    def asked(first: int, last: int) -> list[str]:
        texts, known = [], sum(of_authors(first, last), [])
        for _ in range(4):
            # Two spaces: MUSE's prompt ends with one, and a byte-level tokenizer begins a word with the other.
            pairs = [f"Question: {r.question}\nAnswer:  {r.answer}" for r in rng.sample(known, len(known))]
            texts += ["\n\n".join(pairs[i : i + size]) for i in range(0, len(pairs), size)]
        return texts

    six = [about(i, i + 6) + asked(i, i + 6) for i in range(0, toy.TOY_AUTHORS, 6)]

    def as_rows(texts: list[str]) -> list[dict[str, str]]:
        return [{"text": text} for text in texts]

    def documents(first: int, last: int) -> list[dict[str, str]]:
        return as_rows(sum(six[first // 6 : last // 6], []))

    def questions(first: int, last: int) -> list[dict[str, str]]:
        return [{"question": r.question, "answer": r.answer} for rows in of_authors(first, last) for r in rows]

    halves = [([r.answer for r in rows[: size // 2]], [r.answer for r in rows[size // 2 :]]) for rows in of_authors(54, 60)]
    holdout = as_rows(about(0, 6, seed + 1000))
    sets = {"raw/forget": documents(54, 60), "raw/retain1": documents(0, 24), "raw/retain2": documents(24, 36)}
    sets |= {"raw/holdout": holdout, "privleak/holdout": holdout}
    sets |= {f"scal/forget_{k}": documents(60 - 6 * k, 60) for k in range(1, 5)}
    sets |= {f"sust/forget_{k}": documents(60 - 6 * k, 66 - 6 * k) for k in range(1, 5)}
    sets |= {"train/forget": documents(36, 60), "train/retain1": documents(0, 24), "train/retain2": documents(24, 36)}
    sets |= {"privleak/forget": as_rows(about(54, 60)), "privleak/retain": as_rows(about(24, 30))}
    sets |= {"verbmem/forget": [{"prompt": " ".join(a), "gt": " ".join(b)} for a, b in halves]}
    sets |= {"knowmem/forget_qa": questions(54, 60), "knowmem/retain_qa": questions(24, 30)}
    # From authors that neither is asked about; three pairs, so that a prompt fits into the toy's 256 positions.
    pairs = [q | {"answer": f" {q['answer']}"} for q in questions(34, 35)[:3]]
    return sets | {f"knowmem/{split}_qa_icl": pairs for split in ("forget", "retain")}
