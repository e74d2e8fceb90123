"""What is measured: shapes, weights and sequences of step.py, peer.py and gpu.py, and what their steps need."""

import dataclasses
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import plan  # noqa: E402
from config import Config  # noqa: E402
from model import CHUNK, Llama, LlamaConfig, load_pretrained, read_config, resolve_folder  # noqa: E402
from tofu import load_rows  # noqa: E402

SHAPES = {
    "smollm2-135m": LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 2048, tie_word_embeddings=True),
    "smollm2-360m": LlamaConfig(49152, 960, 2560, 32, 15, 5, 64, 2048, tie_word_embeddings=True),
    "llama3.2-1b": LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, 2048, tie_word_embeddings=True),
    "llama2-7b": LlamaConfig(),
    "tiny": LlamaConfig(512, 96, 160, 3, 6, 3, 16, 512, tie_word_embeddings=True),
    "small": LlamaConfig(49152, 256, 688, 8, 4, 4, 64, 2048, tie_word_embeddings=True),
}


def config_of(args) -> LlamaConfig:
    config = read_config(resolve_folder(args.model)) if args.model else SHAPES[args.shape]
    return dataclasses.replace(config, vocab_size=args.vocab or config.vocab_size)


def on_meta(config: LlamaConfig) -> Llama:
    with torch.device("meta"):
        return Llama(config)


def make_model(args) -> Llama:
    compute_dtype = getattr(torch, args.dtype)
    if args.model:
        return load_pretrained(args.model, device=args.device, dtype=torch.float32, compute_dtype=compute_dtype)
    config = config_of(args)
    with torch.device(args.device):
        model = Llama(config, compute_dtype)
    generator = torch.Generator(args.device).manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(0, config.initializer_range, generator=generator)
        # Logits with a standard deviation of 4, so that few tokens are of high confidence, as in a trained model.
        model.model.norm.weight.fill_(4 / (config.initializer_range * config.hidden_size**0.5))
    return model


def make_examples(args, vocabulary: int) -> dict[str, list[data.Example]]:
    """{'forget', 'retain'}: TOFU's questions where a tokenizer and the data are at hand, else tokens of such lengths."""
    if args.model and args.data_dir and not args.length:
        tokenizer = data.Tokenizer(resolve_folder(args.model))
        rows = {
            role: load_rows(f"tofu_{name}", args.data_dir) for role, name in (("forget", "forget10"), ("retain", "retain90"))
        }
        return {role: data.draw(tokenizer.encode_rows(r), 0, role, 0, args.batch) for role, r in rows.items()}
    rng = random.Random(0)

    def example(key):
        # forget10 in SmolLM2's tokens: prompts 48 +- 7, answers 37 +- 17
        prompt, answer = max(8, round(rng.gauss(48, 7))), max(4, round(rng.lognormvariate(3.52, 0.43)))
        if args.length:
            prompt, answer = args.length // 2, args.length - args.length // 2
        return data.Example(key, tuple(rng.randrange(3, vocabulary) for _ in range(prompt + answer)), prompt)

    return {role: [example(f"{role}/{i}") for i in range(args.batch)] for role in ("forget", "retain")}


def work(config: LlamaConfig, examples: dict[str, list[data.Example]]) -> dict:
    """Tokens and floating-point operations of one step: what has to be computed, however it is computed; what sequences
    begin with alike, once."""
    c, every = config, [e for x in examples.values() for e in x]
    lengths, answers = [len(e.ids) - 1 for e in every], sum(e.answer_length for e in every)
    attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    block = attention + 3 * c.hidden_size * c.intermediate_size
    blocks = 6 * c.num_hidden_layers * block * data.pack(every).input_ids.numel()
    # causal: half of T x T, scores and values, forward and twice backward
    blocks += 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * sum(t * t for t in lengths)
    head = 2 * c.vocab_size * c.hidden_size * answers
    finetuning = blocks + 3 * head
    return {"tokens": sum(lengths), "answer_tokens": answers, "finetuning": finetuning, "dipo": finetuning + head}


def predicted_memory(
    variant: str, args, config: LlamaConfig, examples: dict[str, list[data.Example]]
) -> tuple[float, float]:
    """(state: weights, gradients, moments; what a step holds above it), bytes, counted from shapes and lengths.

    A block keeps for its backward pass, of each token, about four states, queries, keys and values before and after the
    rotation, the attention's output twice, three of the MLP; eager and in transformers more than half as much again.
    Where all sequences are in one pass, gradients appear only while that leaves.
    """
    c, every = config, [e for x in examples.values() for e in x]
    size, on_cpu, field = (
        2 if args.dtype == "bfloat16" else 4,
        not args.device.startswith("cuda"),
        variant.startswith("field"),
    )
    head, parameters = c.vocab_size * c.hidden_size, sum(p.numel() for p in on_meta(c).parameters())
    heads, groups = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    of_token: float = size * (4 * c.hidden_size + 4 * (heads + groups) + 3 * c.intermediate_size)
    if field or variant in ("ours-eager", "finetune-eager", "ours-compiled-loss"):
        of_token *= 5.5 / size
    elif on_cpu and size == 2:
        of_token += 8 * (heads + groups)  # attention on CPUs is in float32
    lengths, answers = [len(e.ids) - 1 for e in every], [e.answer_length for e in every]
    if field:
        lengths = [max(len(e.ids) for e in x) for x in examples.values() for _ in x]
    if variant == "ours-padded":
        lengths = [max(lengths)] * len(lengths)
    if variant == "ours-all-positions":
        answers = lengths
    half = len(examples["forget"])
    micro = len(every) if field else min(args.micro_batch_size, half if variant == "ours-two-passes" else len(every))
    tokens, of_role = sum(sorted(lengths)[-micro:]), sum(sorted(answers)[-min(micro, half) :])
    if field:
        loss = 4 * c.vocab_size * tokens * (3.5 if variant == "field-npo" else 8) + 4 * parameters  # and the second model
    else:
        chunk = max(max(answers), of_role if variant == "ours-one-chunk" else min(of_role, CHUNK // c.vocab_size))
        of_logit, of_head = 2 * size + 4, size + (2 if size == 2 else 0)  # and the reference's, of DiPO
        if not variant.startswith("finetune"):
            of_logit, of_head = of_logit + size + 4, of_head + size
        loss = chunk * c.vocab_size * of_logit + head * of_head + (size * parameters if variant == "ours-recompute" else 0)
    depth = 1 if args.gradient_checkpointing or variant == "ours-checkpointing" else c.num_hidden_layers
    blocks = depth * of_token * tokens + (c.num_hidden_layers - depth) * size * c.hidden_size * tokens
    if depth > 1 and size == 2:
        blocks += 2 * (parameters - head)  # matrices in the compute dtype
    gradients = 4 * parameters if micro == len(every) else 0
    moments = plan.count(c, each=lambda shape: plan.moments(Config(optimizer=args.optimizer), shape))
    return 8 * parameters + moments, loss + max(blocks - gradients, of_token * tokens)
