"""What evaluation costs: scoring answers and greedy generation, ours against transformers, side by side.

python bench/generation.py --quick --json FILE                   random weights in SmolLM2-135M's shape: endless generations
python bench/generation.py --quick --model RUN --data-dir DATA   a model finetuned on TOFU: answers that end by themselves

Needs transformers: pip install -e '.[test]'. Both sides take turns on the same rows with the same weights; a ratio is the
median over the turns. Ours: the model as training holds it, float32 weights and --dtype activations, by the functions of
an evaluation; casting the weights counts. Transformers: weights in --dtype, sdpa attention, KV cache, batches in row order
as in open-unlearning; scoring right-padded with logits at all positions, generating left-padded.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.machine import pick_dtype  # noqa: E402
from data import Example, Tokenizer  # noqa: E402
from files import UserError  # noqa: E402
from inference import Text, evaluated, mean_loss, score  # noqa: E402
from model import Llama, LlamaConfig, generate, load_pretrained, resolve_folder  # noqa: E402
from tofu import load_rows  # noqa: E402

try:
    import transformers
except ImportError:
    sys.exit("error: bench/generation.py compares with transformers, which is not installed: pip install -e '.[test]'")

SMOLLM2 = LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 8192, rope_theta=1e5, tie_word_embeddings=True, eos_token_ids=(2,))
GENERATION_BATCH, SCORING_BATCH = 64, 32  # an evaluation's, for both sides; open-unlearning's, of rows
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}  # transformers' logits, and so its losses, are in --dtype
TIE = {torch.float32: 1e-3, torch.bfloat16: 0.5}  # two logits that rounding may swap


def load(args, dtype: torch.dtype) -> Llama:
    if args.model:
        return load_pretrained(args.model, dtype=torch.float32, compute_dtype=dtype)
    model = Llama(SMOLLM2, dtype).init_weights(0)
    for p in model.parameters():
        p.data = p.data.to(dtype).float()  # so that casting to the compute dtype loses nothing
    return model


def load_reference(model: Llama, dtype: torch.dtype) -> transformers.LlamaForCausalLM:
    """transformers' model with the same weights."""
    config = transformers.LlamaConfig(**model.config.to_dict(dtype))
    state = {name: p.detach().to(dtype, copy=True) for name, p in model.named_parameters()}
    return transformers.LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, attn_implementation="sdpa"
    ).eval()


def load_examples(args, vocabulary: int, rows: int) -> tuple[list[Example], set[int], str]:
    """(examples, stop tokens of their prompt format, where they are from)."""
    if args.model and args.data_dir:
        tokenizer = Tokenizer(resolve_folder(args.model), vocabulary)
        examples = tokenizer.encode_rows(load_rows(f"tofu_forget10[:{rows}]", args.data_dir))
        return examples, {tokenizer.eos_id}, f"tofu_forget10[:{rows}]"
    rng = random.Random(0)
    examples = []
    for i in range(rows):  # forget10 in SmolLM2's tokens: prompts 48 +- 7, answers 37 +- 17
        prompt, answer = max(8, round(rng.gauss(48, 7))), max(4, round(rng.lognormvariate(3.52, 0.43)))
        examples.append(Example(str(i), tuple(rng.randrange(3, vocabulary) for _ in range(prompt + answer)), prompt))
    return examples, set(), f"{rows} rows of random tokens"


def score_reference(model, examples: list[Example]) -> list[float]:
    """Mean loss of each answer."""
    losses = []
    for start in range(0, len(examples), SCORING_BATCH):
        chunk = examples[start : start + SCORING_BATCH]
        T = max(len(e.ids) for e in chunk)
        ids = torch.tensor([[*e.ids] + [model.config.eos_token_id] * (T - len(e.ids)) for e in chunk])
        mask = torch.arange(T) < torch.tensor([[len(e.ids)] for e in chunk])
        answer = mask & (torch.arange(T) >= torch.tensor([[e.prompt_length] for e in chunk]))
        labels = ids.masked_fill(~answer, -100)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask.long()).logits
        token_losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
        losses += (token_losses.sum(-1) / answer.sum(-1)).tolist()
    return losses


def generate_reference(
    model, prompts: list[list[int]], new_tokens: int, stop: list[int], size: int = GENERATION_BATCH
) -> list[list[int]]:
    out = []
    for start in range(0, len(prompts), size):
        chunk = prompts[start : start + size]
        T = max(map(len, chunk))
        ids = torch.tensor([[stop[0]] * (T - len(p)) + p for p in chunk]).to(model.device)
        mask = (torch.arange(T) >= torch.tensor([[T - len(p)] for p in chunk])).long().to(model.device)
        with torch.no_grad():
            found = model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, eos_token_id=stop, pad_token_id=stop[0]
            )
        out += [row[: next((i for i, t in enumerate(row) if t in stop), len(row))] for row in found[:, T:].tolist()]
    return out


def score_ours(model: Llama, examples: list[Example]) -> list[float]:
    texts = [Text(str(i), example, mean_loss) for i, example in enumerate(examples)]
    losses = {key: scores["loss"] for found in score(evaluated(model), texts) for key, scores in found.items()}
    return [losses[text.key] for text in texts]


def generate_ours(
    model: Llama, prompts: list[list[int]], new_tokens: int, stop: list[int], size: int = GENERATION_BATCH
) -> list[list[int]]:
    model, out = evaluated(model), {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        out |= zip(chunk, generate(model, [prompts[i] for i in chunk], new_tokens, stop), strict=True)
    return [out[i] for i in range(len(prompts))]


def in_turns(ours, theirs, turns: int) -> tuple[list[float], list[float], object, object]:
    """(seconds of ours, seconds of theirs, last results of both)."""
    seconds, results = ([], []), [None, None]
    for _ in range(turns):
        for side, function in enumerate((ours, theirs)):
            began = time.perf_counter()
            results[side] = function()
            seconds[side].append(time.perf_counter() - began)
    return *seconds, *results


@torch.no_grad()
def gap_where_they_part(model: Llama, prompt: list[int], ours: list[int], theirs: list[int], stop: list[int]) -> float:
    """Distance of the two chosen logits, as computed from the whole sequence, at the first token that differs; else 0."""
    if ours == theirs:
        return 0.0
    n = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    logits: Tensor = model(torch.tensor([prompt + ours[:n]]))[0, -1]
    a, b = (logits[row[n]] if n < len(row) else logits[stop].max() for row in (ours, theirs))
    return (a - b).abs().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a Llama checkpoint (default: random weights in SmolLM2-135M's shape)")
    parser.add_argument(
        "--data-dir", default=os.environ.get("DIPO_DATA"),
        help="TOFU in hub layout (default: $DIPO_DATA); with --model the rows are its text, else random tokens",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="of activations; auto: as step.py"
    )
    parser.add_argument("--rows", type=int, help="scored and generated from (default 256, with --quick 64)")
    parser.add_argument("--new-tokens", type=int, default=200, help="limit of a generation (default: TOFU's 200)")
    parser.add_argument("--turns", type=int, default=3, help="how often each side is timed")
    parser.add_argument("--quick", action="store_true", help="fewer rows")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args()
    rows, new_tokens = args.rows or (64 if args.quick else 256), args.new_tokens
    args.dtype, why = pick_dtype(args.dtype, "cpu")
    dtype = getattr(torch, args.dtype)
    transformers.utils.logging.set_verbosity_error()
    try:
        ours = load(args, dtype)
        examples, stop, source = load_examples(args, ours.config.vocab_size, rows)
    except UserError as e:
        sys.exit(f"error: {e}")
    theirs = load_reference(ours, dtype)
    stop = sorted(stop | set(ours.config.eos_token_ids))
    prompts = [list(e.ids[: e.prompt_length]) for e in examples]
    machine = platform.processor() or platform.machine()
    print(
        f"{args.model or 'random weights'}, {source}, {args.dtype} ({why}), {torch.get_num_threads()} threads ({machine}), "
        f"torch {torch.__version__}, transformers {transformers.__version__}",
        flush=True,
    )
    for model, scoring, generating in ((ours, score_ours, generate_ours), (theirs, score_reference, generate_reference)):
        scoring(model, examples[:2])
        generating(model, prompts[:2], 2, stop)

    our_scoring, their_scoring, our_losses, their_losses = in_turns(
        lambda: score_ours(ours, examples), lambda: score_reference(theirs, examples), args.turns
    )
    our_times, their_times, our_rows, their_rows = in_turns(
        lambda: generate_ours(ours, prompts, new_tokens, stop),
        lambda: generate_reference(theirs, prompts, new_tokens, stop),
        args.turns,
    )

    def ratio(theirs, ours):
        return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))

    gaps = [gap_where_they_part(ours, *row, stop) for row in zip(prompts, our_rows, their_rows, strict=True)]
    result = {
        "scoring_time_ratio": ratio(their_scoring, our_scoring),
        "generation_time_ratio": ratio(their_times, our_times),
        "equal_generations": sum(a == b for a, b in zip(our_rows, their_rows, strict=True)) / rows,
        "max_gap_where_they_part": max(gaps),
        "max_loss_difference": max(abs(a - b) for a, b in zip(our_losses, their_losses, strict=True)),
    }
    tokens = sum(min(len(row) + 1, new_tokens) for row in our_rows)  # EOS is generated too
    work = [("scoring, rows", rows, our_scoring, their_scoring), ("generation, tokens", tokens, our_times, their_times)]
    print("\n| | ours, per s | transformers, per s | ours, s | transformers, s | transformers / ours |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, n, a, b in work:
        a_s, b_s = statistics.median(a), statistics.median(b)
        print(f"| {name} ({n:,}) | {n / a_s:,.1f} | {n / b_s:,.1f} | {a_s:.2f} | {b_s:.2f} | {ratio(b, a):.2f} |")
    print(
        f"\nlargest difference of a loss {result['max_loss_difference']:.2g}; {result['equal_generations']:.1%} of the "
        f"generations equal, the others part where the logits of the two tokens differ by at most {max(gaps):.2g}"
    )
    if args.json:
        record = result | {"rows": rows, "tokens": tokens, "new_tokens": new_tokens, "source": source, "model": args.model}
        record |= {"scoring_seconds": [our_scoring, their_scoring], "generation_seconds": [our_times, their_times]}
        record |= {"torch": torch.__version__, "transformers": transformers.__version__, "dtype": args.dtype}
        record |= {"python": platform.python_version(), "threads": torch.get_num_threads(), "machine": machine}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if result["max_loss_difference"] > LOSS_TOLERANCE[dtype] or max(gaps) > TIE[dtype]:
        sys.exit("error: the two do not compute the same")
    return 0


if __name__ == "__main__":
    sys.exit(main())
