"""What several test files share: the message of an error, evaluation logs, small tokenizers, a tiny model, running it."""

import functools
import json
import math
import os
import statistics
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

import data
import inference
import tofu
import toy
from inference import Options, Text
from metrics import EvalError
from model import Llama, LlamaConfig, save_pretrained

LOSSES = st.floats(0, 20)
LOSS_LISTS = st.lists(LOSSES, min_size=1, max_size=6)
RATIOS = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20)
PAIRS = st.integers(1, 30).flatmap(lambda n: st.tuples(*[st.lists(st.integers(1, 40), min_size=n, max_size=n)] * 2))
# Where rounding takes the exact p-value above 1, scipy warns and gives the asymptotic one: 0.99996 at n = 7.
ABOVE_ONE = pytest.mark.filterwarnings("ignore:ks_2samp. Exact calculation unsuccessful")
# TOFU's per-item results.
ITEMS = st.builds(
    lambda loss, correct, wrong, rouge: {
        "loss": loss,
        "correct_loss": correct,
        "wrong_losses": wrong,
        "rouge": rouge,
        "truth_ratio": math.exp(correct - statistics.fmean(wrong)),
    },
    LOSSES, LOSSES, LOSS_LISTS, st.just(0.0) | st.floats(1e-3, 1),
)  # fmt: skip
SET_ITEMS = st.dictionaries(st.text("abc", min_size=1, max_size=3), ITEMS, min_size=1, max_size=4)


def error_of(call, *args, kind=EvalError, **kwargs) -> str:
    """The message of the error that the call raises: one line."""
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------------ evaluation logs

AUTHORS = {
    "retain": "eval_log.json",
    "ra": "eval_real_author_wo_options.json",
    "wf": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}


def published(name: str) -> Path:
    """A published log of TOFU. Skips the test where there is none."""
    if not (folder := os.environ.get("DIPO_DATA")):
        pytest.skip("DIPO_DATA names no folder with tofu_logs/*.json")
    return Path(folder) / "tofu_logs" / f"{name}.json"


def write_log(path: Path, log) -> Path:
    path.write_text(log if isinstance(log, str) else json.dumps(log), encoding="utf-8")
    return path


def our_log(ratios: list[float]) -> dict:
    return {"rows": {"forget": {f"tofu_forget10/{i}": {"truth_ratio": r} for i, r in enumerate(ratios)}}}


def open_unlearning_log(ratios: list[float]) -> dict:
    return {"forget_truth_ratio": {"agg_value": 0.5, "value_by_index": {str(i): {"score": r} for i, r in enumerate(ratios)}}}


def authors_log(ratios: list[float], lists: bool) -> dict:
    """TR = exp(right - mean wrong), with the five wrong losses spread around their mean."""
    right, wrong = [23.0 + math.log(r) for r in ratios], [[22.0, 22.5, 23.0, 23.5, 24.0]] * len(ratios)
    columns = {"avg_paraphrased_loss": right, "average_perturb_loss": wrong}
    if not lists:
        columns = {name: {str(i): v for i, v in enumerate(values)} for name, values in columns.items()}
    return {"eval_log.json": {}, "eval_log_forget.json": columns}


def whole_authors_log() -> dict:
    def part(n):
        columns = {"avg_gt_loss": 0.5, "avg_paraphrased_loss": 0.7, "average_perturb_loss": [1.0, 2.0], "rougeL_recall": 0.4}
        return {name: {str(i): value for i in range(n)} for name, value in columns.items()}

    return {part_name: part(3) for part_name in AUTHORS.values()}


def without(log: dict, *keys: str) -> dict:
    log = json.loads(json.dumps(log))
    functools.reduce(dict.__getitem__, keys[:-1], log).pop(keys[-1])
    return log


# ----------------------------------------------------------------------------------------------------- small tokenizers

SPECIAL = {
    "llama2": ("<s>", "</s>"),
    "llama2-sentencepiece": ("<s>", "</s>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "smollm2": ("<|im_start|>", "<|im_end|>"),
    "plain": ("<s>", "</s>"),
}
KINDS = tuple(SPECIAL)
BYTE_LEVEL = tuple(k for k in KINDS if k != "llama2-sentencepiece")
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "Question: Who wrote it?\nAnswer: The author of it is Jaime Vasquez.",
    "assistant\n\n\n  Yes.\n\n\n  No.\n\n\n",
    "[INST] Where is it? [/INST](here) [/INST](there)" + "](" * 20,
    "user\nsystem\nYou are a helpful AI assistant named SmolLM. Cutting Knowledge Date: December 2023",
]


def byte_level_bpe(kind: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "llama3":
        words = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS * 2, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def sentencepiece_like_bpe() -> tokenizers.Tokenizer:
    """As Llama 2's tokenizer.json: no words, '▁' for spaces and in front, bytes for what is not in the vocabulary."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trained.train_from_iterator(CORPUS * 2, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab, merges = {piece: i for i, piece in enumerate(pieces)}, [tuple(m) for m in model["merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def write_tokenizer(folder: Path, kind: str, **config) -> Path:
    """A folder with a small tokenizer of the kind, one of KINDS. config: of its tokenizer_config.json."""
    tokenizer = sentencepiece_like_bpe() if kind == "llama2-sentencepiece" else byte_level_bpe(kind)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL[kind]])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": SPECIAL[kind][0], "eos_token": SPECIAL[kind][-1]} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


# --------------------------------------------------------------------------------------------------------- a tiny model


class Tiny(NamedTuple):
    """A random Llama for the toy world, in memory and as a folder."""

    model: Llama
    tokenizer: data.Tokenizer
    folder: Path


def make_tiny(root: Path, seed: int = 0, positions: int = 256) -> Tiny:
    words = toy.train_toy_tokenizer(0, root / "tokenizer", vocab_size=400)
    tokenizer = data.Tokenizer(words)
    # Wide weights, so that generations vary, and many stop ids, so that they end at different lengths.
    config = LlamaConfig(
        vocab_size=tokenizer.tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=positions, initializer_range=0.2,
        bos_token_id=0, eos_token_ids=tuple(range(1, 400, 8)),
    )  # fmt: skip
    model = Llama(config).init_weights(seed)
    return Tiny(model, tokenizer, save_pretrained(model, root / "model", tokenizer_from=words))


def score_answers(model, examples, measure=inference.mean_loss, hidden_id=None, budget=2048) -> list[dict[str, float]]:
    """What `measure` says of each example, in order."""
    texts = [Text(str(i), example, measure) for i, example in enumerate(examples)]
    scores = {k: v for found in inference.score(model, texts, hidden_id, budget) for k, v in found.items()}
    return [scores[text.key] for text in texts]


def tofu_rows(model, tokenizer, sets, max_new_tokens=200, batch_size=None, protocol=None, journal=None, **options) -> dict:
    """TOFU's per-item results of these sets. protocol: a `tofu.Protocol` in place of open-unlearning's."""
    benchmark = tofu.Tofu(Options(None, max_new_tokens=max_new_tokens, **options))
    benchmark.sets, benchmark.protocol = sets, protocol or benchmark.protocol
    benchmark.batch_size = batch_size or benchmark.batch_size
    return benchmark.rows(model, tokenizer, journal=journal)


def values(results: dict) -> list[float]:
    """Every number of the per-item results, flat."""
    items = [item for rows in results.values() for item in rows.values()]
    return [v for i in items for v in (i["loss"], i["correct_loss"], *i["wrong_losses"], i["truth_ratio"], i["rouge"])]


def generations(results: dict) -> list[str]:
    return [item["generation"] for rows in results.values() for item in rows.values()]
