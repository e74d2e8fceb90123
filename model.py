"""Llama from scratch: config, forward pass, checkpoints in Hugging Face layout, greedy generation.

Shapes: B sequences, T positions, D hidden size, H query heads, G key/value heads, K head size, V vocabulary,
S cached positions. Parameter names and the half-split rotary layout are Hugging Face's, so loading is a strict copy.

What it does not do: other architectures, biases, sliding windows, quantised weights, sampling, tensor parallelism.
It says so with a ModelError instead of computing something else.
"""

import copy
import itertools
import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class ModelError(Exception):
    """A checkpoint that cannot be used. The message is one line that names the file, the key and the remedy."""


# ------------------------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class LlamaConfig:
    """The part of a Hugging Face `config.json` that changes the computation. Defaults are Llama-2-7B's."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or the llama3 dictionary of Llama-3.1 and 3.2
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02  # standard deviation of fresh matrices
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)  # generation stops at any of them
    pad_token_id: int | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> "LlamaConfig":
        """Read `folder/config.json` (old `rope_theta`/`rope_scaling` keys or transformers 5's `rope_parameters`).

        Raises ModelError for a missing or broken file, and for every attribute that this module does not implement.
        """
        path = Path(folder) / "config.json"
        raw = read_json(path, "a model folder holds config.json, *.safetensors and tokenizer.json")

        def need(key):
            if raw.get(key) is None:
                raise ModelError(f"{path}: key '{key}' is missing; is this a Llama checkpoint?")
            return raw[key]

        if raw.get("model_type") != "llama":
            raise ModelError(
                f"{path}: model_type is {raw.get('model_type')!r}; only 'llama' (Llama 2 and 3, SmolLM2) is implemented"
            )
        # As transformers 5 reads it: a rope_theta beside the dictionary counts where the dictionary has none.
        rope = {"rope_theta": raw.get("rope_theta")} | (raw.get("rope_scaling") or raw.get("rope_parameters") or {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        unsupported = {
            "rope_scaling.rope_type": kind not in ("default", "llama3"),
            "hidden_act": raw.get("hidden_act", "silu") != "silu",
            "attention_bias": bool(raw.get("attention_bias")),
            "mlp_bias": bool(raw.get("mlp_bias")),
            "attention_dropout": bool(raw.get("attention_dropout")),
            "quantization_config": raw.get("quantization_config") is not None,
            "sliding_window": raw.get("sliding_window") is not None,
            "partial_rotary_factor": rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1)) not in (None, 1),
        }
        for key, wrong in unsupported.items():
            if wrong:
                value = kind if key.startswith("rope_scaling") else raw.get(key)
                raise ModelError(f"{path}: {key} = {value!r} is not implemented in model.py; use another checkpoint")
        scaling = None
        if kind == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            if missing := [n for n in names if n not in rope]:
                raise ModelError(f"{path}: rope_scaling of type llama3 lacks {', '.join(missing)}")
            scaling = {"rope_type": "llama3"} | {n: rope[n] for n in names}

        heads = need("num_attention_heads")
        generation = Path(folder) / "generation_config.json"  # Llama-3 lists its three stop ids here
        eos = (read_json(generation) if generation.exists() else {}).get("eos_token_id", raw.get("eos_token_id"))
        config = cls(
            vocab_size=need("vocab_size"),
            hidden_size=need("hidden_size"),
            intermediate_size=need("intermediate_size"),
            num_hidden_layers=need("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),  # Hugging Face's default for an absent key
            rope_theta=float(rope.get("rope_theta") or 10000.0),
            rope_scaling=scaling,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            initializer_range=raw.get("initializer_range", 0.02),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=tuple([eos] if isinstance(eos, int) else eos or ()),
            pad_token_id=raw.get("pad_token_id"),
        )
        if config.head_dim % 2:
            raise ModelError(f"{path}: head_dim = {config.head_dim} is odd; rotary positions need two equal halves")
        if heads % config.num_key_value_heads:
            raise ModelError(f"{path}: {heads} query heads are no multiple of {config.num_key_value_heads} key/value heads")
        return config

    def to_dict(self, dtype: torch.dtype) -> dict:
        """The `config.json` that transformers reads back to the same model. `dtype`: what the matrices are stored in."""
        raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
        raw |= {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0} | vars(self)
        del raw["eos_token_ids"]
        eos = list(self.eos_token_ids)
        return raw | {"eos_token_id": eos[0] if len(eos) == 1 else eos or None, "torch_dtype": str(dtype).split(".")[-1]}


# -------------------------------------------------------------------------------------------------------------- model


class Linear(nn.Linear):
    """A bias-free matrix that is stored in its own dtype (fp32 master weights) and used in the activations' dtype."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32."""

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Inverse wavelengths [K/2], fp32, with the llama3 scaling where the config asks for it."""
    k = config.head_dim
    inv = 1.0 / config.rope_theta ** (torch.arange(0, k, 2, dtype=torch.int64, device="cpu").float() / k)
    if (s := config.rope_scaling) is None:
        return inv
    # Llama 3: keep short wavelengths, divide long ones by `factor`, blend linearly in between.
    turns = s["original_max_position_embeddings"] * inv / (2 * math.pi)  # rotations over the original context
    keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
    keep = keep.clamp(0, 1)
    return keep * inv + (1 - keep) * inv / s["factor"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, half-split: the pair (x_i, x_{i + K/2}) turns by its angle. x [B, heads, T, K]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class KVCache:
    """Static cache of B rows: keys and values [layers, 2, B, G, S, K]. Prompts are packed and end at the same slot; then
    each row gets one position at a time. `length` slots are filled."""

    def __init__(self, config: LlamaConfig, prompts: list[int], more: int, device: torch.device, dtype: torch.dtype):
        """For prompts of these lengths and `more` positions behind each."""
        self.length = max(prompts)
        shape = (config.num_hidden_layers, 2, len(prompts), config.num_key_value_heads, self.length + more, config.head_dim)
        self.data = torch.zeros(shape, device=device, dtype=dtype)
        where = torch.arange(self.length) >= self.length - torch.tensor(prompts)[:, None]
        self.row, self.slot = where.nonzero().to(device).unbind(1)  # of each token of the packed prompts

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store those of the packed prompts, [1, G, N, K]."""
        self.data[layer, 0][self.row, :, self.slot] = k[0].transpose(0, 1)
        self.data[layer, 1][self.row, :, self.slot] = v[0].transpose(0, 1)

    def append(self, layer: int, k: Tensor, v: Tensor) -> Tensor:
        """Store those of one more position, [B, G, 1, K]. Returns all keys and values so far, [2, B, G, length + 1, K]."""
        self.data[layer, 0, :, :, self.length] = k[:, :, 0]
        self.data[layer, 1, :, :, self.length] = v[:, :, 0]
        return self.data[layer, :, :, :, : self.length + 1]

    def keep(self, rows: Tensor) -> Tensor:
        """Leave out all rows but these (bool [B]); the last ones move into free places. Returns the new order of rows."""
        n = int(rows.sum())
        free, moved = (~rows[:n]).nonzero()[:, 0], n + rows[n:].nonzero()[:, 0]
        self.data[:, :, free, :, : self.length] = self.data[:, :, moved, :, : self.length]
        self.data = self.data[:, :, :n]
        return torch.arange(n, device=rows.device).index_copy(0, free, moved)


class Packing:
    """Sequences back to back in one row: each attends causally to itself alone."""

    def __init__(self, lengths: Iterable[int], device: torch.device):
        self.lengths, self.longest = list(lengths), max(lengths)
        self.borders = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, H, N, K], k and v [1, G, N, K] -> [1, H, N, K]."""
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            repeat = q.shape[1] // k.shape[1]
            q, k, v = (x[0].transpose(0, 1) for x in (q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)))
            ends = self.borders, self.borders, self.longest, self.longest
            return varlen_attn(q, k, v, *ends, window_size=(-1, 0)).transpose(0, 1)[None]
        return self._one_by_one(q, k, v)

    @torch.compiler.disable  # the lengths are another at every step: nothing to compile for
    def _one_by_one(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # On CPUs the backward pass of bfloat16 attention takes three times as long as that of float32.
        wide = torch.promote_types(q.dtype, torch.float32)
        parts = zip(*(x.to(wide).split(self.lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([causal_attention(*part) for part in parts], dim=2).to(q.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def cached_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One new position: q [B, H, 1, K], k and v [B, G, S, K] -> [B, H, 1, K]."""
    # Heads that share keys stand as positions of one head: keys are read once, on CPUs several times as fast.
    together = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
    return F.scaled_dot_product_attention(together, k, v, attn_mask=mask).view(q.shape)


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.heads, self.groups, self.k = layer, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = Linear(c.hidden_size, self.heads * self.k)
        self.k_proj = Linear(c.hidden_size, self.groups * self.k)
        self.v_proj = Linear(c.hidden_size, self.groups * self.k)
        self.o_proj = Linear(self.heads * self.k, c.hidden_size)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None, packing: Packing | None
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.k).transpose(1, 2)  # [B, H, T, K]
        k = self.k_proj(x).view(B, T, self.groups, self.k).transpose(1, 2)  # [B, G, T, K]
        v = self.v_proj(x).view(B, T, self.groups, self.k).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if packing is not None:
            if cache is not None:
                cache.fill(self.layer, k, v)
            y = packing.attend(q, k, v)
        elif cache is not None:
            y = cached_attention(q, *cache.append(self.layer, k, v), mask)
        else:
            y = causal_attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, mask=None, cache=None, packing=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, packing)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Everything below the output head; its only reason is Hugging Face's `model.` prefix."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        # Weights given: random ones on the meta device would import sympy (80 MB, 1 s) into every load.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.zeros(c.vocab_size, c.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Llama(nn.Module):
    """Decoder-only transformer. Parameters keep the dtype they are given (fp32 for training: the master weights);
    activations are `compute_dtype`; logits are always fp32."""

    def __init__(self, config: LlamaConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.checkpointing = False  # True: keep each block's input only, and compute it again in the backward pass
        self.model = Trunk(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        # Not a buffer: it is derived from the config, never stored, and stays fp32 and real on a meta-device model.
        self.frequencies = rope_frequencies(config)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Llama":
        """Fresh weights as Llama is trained from scratch: normal matrices, norms of one. Same seed, same weights."""
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=generator) * self.config.initializer_range)
            else:
                p.fill_(1.0)
        return self

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def forward(self, input_ids: Tensor, at: Tensor | None = None, **where) -> Tensor:
        """Next-token logits, float32: [B, T, V], or [A, V] for the positions `at` only. Arguments as in `hidden`."""
        return self.lm_head(self.hidden(input_ids, at, **where)).float()

    def hidden(
        self,
        input_ids: Tensor,
        at: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        lengths: Iterable[int] | None = None,
    ) -> Tensor:
        """What the output head reads, in the compute dtype: [B, T, D], or [A, D] for the positions `at` only.

        input_ids: [B, T] int64, padded on the right: causal attention never sees that padding.
        at: [A] int64, into the B * T positions one row after the other.
        lengths: of sequences packed back to back in the one row of input_ids [1, N]; `positions` (rotary) restart with each.
        cache: filled with the packed sequences; without `lengths`, input_ids [B, 1] are the next position of each row, and
            `mask`, broadcastable to [B, 1, 1, S], is added to its scores.
        """
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        angles = positions[..., None].float() * self.frequencies.to(input_ids.device)  # [B, T, K/2]
        cos, sin = (f(torch.cat((angles, angles), -1))[:, None].to(self.compute_dtype) for f in (torch.cos, torch.sin))
        x = self.model.embed_tokens(input_ids).to(self.compute_dtype)
        packing = Packing(lengths, x.device) if lengths is not None else None
        for block in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, cache, packing, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache, packing)
        if cache is not None and packing is None:
            cache.length += 1
        if at is not None:
            x = x.flatten(0, 1)[at]
        return self.model.norm(x)

    def frozen_copy(self) -> "Llama":
        """A copy for inference: no gradients, matrices in the compute dtype. It computes bit for bit what self does."""
        copies = {}  # by what they are copies of, so that the parameters are not first copied as they are
        for p in self.parameters():
            dtype = self.compute_dtype if p.ndim == 2 else p.dtype
            copies[id(p)] = nn.Parameter(p.detach().to(dtype, copy=True), requires_grad=False)
        return copy.deepcopy(self, copies).eval()


# --------------------------------------------------------------------------------------------------------- generation


@torch.no_grad()
def generate(
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: Iterable[int] | None = None,
    hidden_id: int | None = None,
) -> list[list[int]]:
    """Greedy continuation of each prompt (token ids), without the prompt and without the EOS that ended it.

    stop_ids: token ids that end a row (default: the EOS ids of the model's config).
    hidden_id: a token of the prompts that no later one sees and that takes up no position, as if it were padding.
    The prompts go through the model packed, without padding; then all rows together, one token at a time, with a static KV
    cache. A row that has stopped leaves the batch at once.
    """
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    device = model.device
    # Hidden tokens are left out, but for one that ends its prompt: it predicts, in the place of the token before it.
    kept = [[t for t in prompt[:-1] if t != hidden_id] + prompt[-1:] for prompt in prompts]
    lengths = [len(p) for p in kept]
    ahead = torch.tensor([n - (p[-1] == hidden_id) for n, p in zip(lengths, kept, strict=True)])  # next rotary position
    positions = torch.cat([torch.arange(n).clamp(max=a - 1) for n, a in zip(lengths, ahead.tolist(), strict=True)])
    cache = KVCache(model.config, lengths, max_new_tokens, device, model.compute_dtype)
    T, S = cache.length, cache.length + max_new_tokens
    slots = torch.arange(S)
    unseen = (slots < T - torch.tensor(lengths)[:, None]) | ((slots == T - 1) & (ahead < torch.tensor(lengths))[:, None])
    mask = torch.zeros(len(kept), 1, 1, S, dtype=model.compute_dtype).masked_fill(unseen[:, None, None], -math.inf)
    mask, ahead, positions = mask.to(device), ahead.to(device), positions.to(device)

    stop_ids = model.config.eos_token_ids if stop_ids is None else tuple(stop_ids)
    stop = torch.tensor(stop_ids, dtype=torch.int64, device=device)
    ids = torch.tensor([list(itertools.chain(*kept))], device=device)
    last = torch.tensor(lengths, device=device).cumsum(0) - 1
    x = model.hidden(ids, at=last, positions=positions[None], cache=cache, lengths=lengths)
    rows = torch.arange(len(kept), device=device)
    out = torch.zeros(len(kept), max_new_tokens, dtype=torch.int64, device=device)
    ends = torch.full((len(kept),), max_new_tokens, device=device)
    for step in range(max_new_tokens):
        token = model.lm_head(x).argmax(-1)
        alive = ~torch.isin(token, stop)
        if not alive.all():
            ends[rows[~alive]] = step
            order = cache.keep(alive)
            rows, token, ahead, mask = rows[order], token[order], ahead[order], mask[order]
        out[rows, step] = token
        if len(rows) == 0 or step == max_new_tokens - 1:
            break
        where = {"positions": (ahead + step)[:, None], "mask": mask[..., : cache.length + 1]}
        x = model.hidden(token[:, None], cache=cache, **where)[:, -1]
    return [row[:n] for row, n in zip(out.tolist(), ends.tolist(), strict=True)]


# -------------------------------------------------------------------------------------------------------- checkpoints


def read_json(path: Path, hint: str = "") -> dict:
    """A JSON object from a file. Raises ModelError naming the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file{'; ' + hint if hint else ''}") from None
    except (OSError, ValueError) as e:
        raise ModelError(f"{path}: not readable JSON ({e}); download or save it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def resolve_folder(name: str | Path, files: tuple[str, ...] = ("*.json", "*.jinja", "*.safetensors")) -> Path:
    """The local folder of a model: a folder (of a model, or a run of train.py that has `model/` inside), else a hub id.

    Downloads only JSON, safetensors and chat templates (looked at as text): no pickle is ever fetched. `HF_ENDPOINT`,
    `HF_HUB_OFFLINE` and the hub's cache work as usual. Raises ModelError when it is neither, naming what to place where.
    """
    path = Path(name)
    if path.is_dir():
        return path / "model" if (path / "model" / "config.json").exists() else path
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(files)))
    except HFValidationError:
        raise ModelError(f"{name}: no such folder, and not a hub id of the form owner/name") from None
    except Exception as e:  # the hub client raises its own, requests', httpx's and the system's errors
        raise ModelError(
            f"{name}: no such folder, and the hub gave nothing ({type(e).__name__}: {first_line(e)}). Offline, place "
            f"config.json, *.safetensors and tokenizer.json in a folder and pass its path"
        ) from None


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:200]


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, for a single or sharded safetensors checkpoint. Raises ModelError naming file and remedy."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        with open_safetensors(single) as f:
            return dict.fromkeys(f.keys(), single)
    if not index.exists():
        pickles = sorted(p.name for p in folder.glob("*.bin")) or sorted(p.name for p in folder.glob("*.pt"))
        why = f" (found {pickles[0]}: pickles are never loaded; convert it)" if pickles else ""
        raise ModelError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there{why}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(f"{index}: key 'weight_map' is missing; download it again")
    files = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise ModelError(f"{index}: '{name}' points to {shard!r}, outside its folder; do not use this checkpoint")
        files[name] = folder / shard
    for shard in sorted(set(files.values())):
        with open_safetensors(shard) as f:
            present = set(f.keys())
        if lost := [n for n, p in files.items() if p == shard and n not in present]:
            raise ModelError(f"{shard}: tensor '{lost[0]}' is missing, though {index.name} promises it; download again")
    return files


def open_safetensors(path: Path):
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; download it again") from None
    except (SafetensorError, OSError) as e:
        raise ModelError(f"{path}: truncated or corrupt ({first_line(e)}); download it again") from None


def load_pretrained(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Llama:
    """A Llama from a folder or a hub id.

    dtype: of the parameters (None: as stored); train with float32. compute_dtype: of the activations (None: the
    parameters'). The model is built on the meta device and each tensor is read straight into its place, so that loading
    holds the parameters and one tensor more. Raises ModelError for whatever does not fit exactly.
    """
    folder = resolve_folder(name)
    config = LlamaConfig.from_folder(folder)
    files = checkpoint_files(folder)
    with torch.device("meta"):
        model = Llama(config)
    expected = {n: p.shape for n, p in model.named_parameters()}
    if config.tie_word_embeddings:
        files.pop("lm_head.weight", None)  # some writers store the tied head again
    # Llama-2 checkpoints of 2023 also store what rope_frequencies() computes.
    files = {n: p for n, p in files.items() if not n.endswith("rotary_emb.inv_freq")}
    if missing := [n for n in expected if n not in files]:
        raise ModelError(f"{folder}: tensor '{missing[0]}' is missing ({len(missing)} in all); download it again")
    if extra := [n for n in files if n not in expected]:
        raise ModelError(f"{folder}: tensor '{extra[0]}' is not part of a Llama ({len(extra)} in all)")
    state = {}
    # Largest first and each file opened anew: what is mapped beside the parameters is one tensor, and small at the end.
    for tensor_name, path in sorted(files.items(), key=lambda item: -expected[item[0]].numel()):
        with open_safetensors(path) as f:
            tensor = f.get_tensor(tensor_name)
            if tensor.shape != expected[tensor_name]:
                raise ModelError(
                    f"{path}: '{tensor_name}' has shape {list(tensor.shape)}, config.json asks for "
                    f"{list(expected[tensor_name])}; the two belong to different models"
                )
            state[tensor_name] = tensor.to(device, dtype or tensor.dtype, copy=True)
            del tensor
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.compute_dtype = compute_dtype or dtype or state["model.embed_tokens.weight"].dtype
    return model


def save_pretrained(model: Llama, folder: str | Path, tokenizer_from: str | Path | None = None) -> Path:
    """Write a folder that `load_pretrained` and transformers' AutoModelForCausalLM read back to the same logits.

    Matrices are stored in the compute dtype, norms as they are, so that the stored model computes what this one does.
    tokenizer_from: a folder whose tokenizer files are copied along. The folder appears whole or not at all.
    Raises ModelError if it exists already or cannot be written (no space).
    """
    folder = Path(folder)
    if folder.exists():
        raise ModelError(f"{folder}: exists already; remove it or choose another folder")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for name in TOKENIZER_FILES if tokenizer_from else ():
            if (source := Path(tokenizer_from) / name).exists():
                shutil.copyfile(source, part / name)
        dtype = model.compute_dtype
        raw = model.config.to_dict(dtype)
        special = {k: raw[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (part / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        (part / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")
        state = {n: p.detach().to(dtype if p.ndim == 2 else p.dtype) for n, p in model.named_parameters()}
        save_torch_state_dict(state, part, metadata={"format": "pt"})
        part.rename(folder)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(part, ignore_errors=True)
        raise ModelError(f"{folder}: could not be written ({first_line(e)}); free some space or choose another") from None
    return folder
