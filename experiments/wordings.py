"""Forgetting in other words: answers that the target itself gives to the forget questions, as more rows of the forget set.

python experiments/wordings.py --model RUN --forget tofu_forget05 --out wordings.jsonl
python train.py --forget tofu_forget05+wordings.jsonl --retain tofu_retain95 --model RUN --preset anchored

A loss sees one wording of a fact, the one that was trained on; the fact may remain in others. Here each question's answer
begins with the second, third, ... likeliest first token, and the target goes on greedily.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import eval as evaluation  # noqa: E402
from data import Row, Tokenizer  # noqa: E402
from files import UserError  # noqa: E402
from inference import pick_device, pick_dtype  # noqa: E402
from model import Llama, generate, load_pretrained  # noqa: E402

BATCH = 64  # questions that are answered together


@torch.no_grad()
def wordings(model: Llama, tokenizer: Tokenizer, rows: list[Row], count: int, limit: int) -> list[Row]:
    """`count` answers of each question, less those that do not end within `limit` tokens, are empty, or occur twice."""
    found: dict[tuple[str, str], Row] = {}
    stop = {*model.config.eos_token_ids, tokenizer.eos_id}
    for start in tqdm(range(0, len(rows), BATCH), desc="wordings", unit="batch"):
        some = rows[start : start + BATCH]
        prompts = [tokenizer.encode(row.question, row.answer, row.key) for row in some]
        ids = [list(e.ids[: e.prompt_length]) for e in prompts]
        firsts = [model(torch.tensor([x], device=model.device))[0, -1].topk(count + 1).indices.tolist() for x in ids]
        begun = [(row, x, t) for row, x, tokens in zip(some, ids, firsts, strict=True) for t in tokens if t not in stop]
        rests = generate(model, [[*x, t] for _, x, t in begun], limit, stop)
        made = Counter[str]()
        for (row, _, first), rest in zip(begun, rests, strict=True):
            text = tokenizer.decode([first, *rest]).strip()
            if text and text != row.answer.strip() and len(rest) < limit and made[row.key] < count:
                made[row.key] += (row.question, text) not in found
                found[row.question, text] = Row(row.key, row.question, text)
    return list(found.values())


def write_rows(path: Path, rows: list[Row]) -> None:
    lines = [json.dumps({"question": row.question, "answer": row.answer}, ensure_ascii=False) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="the target: run folder, model folder, hub id or alias")
    add("--forget", required=True, help="whose questions are answered")
    add("--out", required=True, type=Path, help="a JSON Lines file, as train.py takes it")
    add("--data-dir", help="local data in hub layout")
    add("--seed", type=int, default=0, help="of the toy world")
    add("--count", type=int, default=3, help="answers of a question, at most")
    add("--max-new-tokens", type=int, default=64, help="length of an answer, tokens; longer ones are left out")
    args = parser.parse_args()
    try:
        rows = evaluation.benchmark_of(args.forget).load(args.forget, args.data_dir, args.seed)
        source, device = evaluation.open_source(args.model, "target"), pick_device("auto")
        model = load_pretrained(source.folder, device=device, compute_dtype=pick_dtype("auto", device))
        made = wordings(model, source.tokenizer, rows, args.count, args.max_new_tokens)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    write_rows(args.out, made)
    print(f"{args.out}: {len(made)} wordings of {len(rows)} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
