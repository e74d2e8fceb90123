"""Llama from scratch: the layers, greedy generation, checkpoints in Hugging Face layout.

Shapes: B sequences, T positions, D hidden size, H query heads, G key/value heads, K head size, V vocabulary,
S cached positions. Parameter names and the half-split rotary layout are Hugging Face's, so loading is a strict copy.
Other architectures, biases, sliding windows and quantised weights are a ModelError; there is no sampling.
"""

import contextlib
import copy
import itertools
import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import files
from attention import Packing, causal_attention, lay
from files import Field, UserError, fault, first_line, read_bytes, read_json, replacing, write_json
from gpu import MasterProduct, captured, has_graphs, has_wide_products
from hub import TOKENIZER_FILES, again, check_link, fetch, local_path

CHUNK = 2**25  # logits (positions times vocabulary) that a loss holds at a time: 64 MiB in bfloat16
ROOMY = 64e9  # bytes of a GPU that holds eight times as many
HOLDS = "a model folder holds config.json, *.safetensors and tokenizer.json"


class ModelError(UserError):
    """A checkpoint that cannot be used."""


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

    def to_dict(self, dtype: torch.dtype) -> dict:
        """The `config.json` that transformers reads back to the same model. `dtype`: what the matrices are stored in."""
        raw: dict = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
        raw |= {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0} | vars(self)
        eos = list(raw.pop("eos_token_ids"))
        return raw | {"eos_token_id": eos[0] if len(eos) == 1 else eos or None, "torch_dtype": str(dtype).split(".")[-1]}


def chunk_positions(vocab_size: int, memory: float = 0) -> int:
    """Positions whose logits a loss holds at a time, on a device of so much memory."""
    return max(1, (CHUNK * 8 if memory >= ROOMY else CHUNK) // vocab_size)


# ------------------------------------------------------------------------------------------------------------- layers


class Linear(nn.Linear):
    """A bias-free matrix that is stored in its own dtype (fp32 master weights) and used in the activations' dtype."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == torch.float32 and x.dtype.itemsize == 2 and has_wide_products(x.device):
            return MasterProduct.apply(x, self.weight)
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
    keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    return keep * inv + (1 - keep) * inv / s["factor"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, half-split: the pair (x_i, x_{i + K/2}) turns by its angle. x [B, heads, T, K]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class KVCache:
    """Static cache of B rows: keys and values [layers, 2, B, G, S, K]. Prompts are packed, each at these of N, and end at
    the same slot; then each row gets one position at a time, at most `more`. `at`, [1], is the slot that was filled last."""

    def __init__(
        self, config: LlamaConfig, prompts: Sequence[Sequence[int]], more: int, device: torch.device, dtype: torch.dtype
    ):
        longest, self.static = max(map(len, prompts)), has_graphs(device)  # static: what is computed has always one shape
        self.packed, self.at = (torch.tensor(x, device=device) for x in ([*itertools.chain(*prompts)], [longest - 1]))
        slots = 16 * -(-(longest + more) // 16)  # GPUs would copy a mask of another size, in each layer
        shape = (config.num_hidden_layers, 2, len(prompts), config.num_key_value_heads, slots, config.head_dim)
        self.data = torch.zeros(shape, device=device, dtype=dtype)
        slot, lengths = torch.arange(slots), torch.tensor([*map(len, prompts)])[:, None]
        used = (slot >= longest - lengths) & (slot < longest)
        self.row, self.slot = used.nonzero().to(device).unbind(1)  # of each token of the prompts
        # [B, 1, 1, S], added to attention scores: -inf where a row has nothing to be seen.
        self.mask = torch.zeros(used.shape, dtype=dtype).masked_fill(~used, -math.inf)[:, None, None].to(device)

    @property
    def filled(self) -> slice:
        return slice(None if self.static else int(self.at) + 1)

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store those of the packed prompts, [1, G, N, K]."""
        for x, new in zip(self.data[layer], (k, v), strict=True):
            x[self.row, :, self.slot] = new[0][:, self.packed].transpose(0, 1)

    def advance(self) -> None:
        """To the next slot, of all rows."""
        self.at += 1
        self.mask.index_fill_(3, self.at, 0)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One more position, which is stored: q [B, H, 1, K], k and v [B, G, 1, K] -> [B, H, 1, K]."""
        for x, new in zip(self.data[layer], (k, v), strict=True):
            x.index_copy_(2, self.at, new)
        keys, values = self.data[layer, :, :, :, self.filled]
        # Heads that share keys stand as positions of one head: keys are read once, on CPUs several times as fast.
        together, mask = q.view(q.shape[0], k.shape[1], -1, q.shape[3]), self.mask[..., self.filled]
        return F.scaled_dot_product_attention(together, keys, values, attn_mask=mask).reshape(q.shape)

    def keep(self, rows: Tensor) -> Tensor:
        """Leave out all rows but these (bool [B]); the last ones move into free places. Returns the new order of rows."""
        n = int(rows.sum())
        free, moved = (~rows[:n]).nonzero()[:, 0], n + rows[n:].nonzero()[:, 0]
        self.data[:, :, free, :, self.filled] = self.data[:, :, moved, :, self.filled]
        order = torch.arange(n, device=rows.device).index_copy(0, free, moved)
        self.data, self.mask = self.data[:, :, :n], self.mask[order]
        return order


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.heads, self.groups, self.k = layer, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = Linear(c.hidden_size, self.heads * self.k)
        self.k_proj = Linear(c.hidden_size, self.groups * self.k)
        self.v_proj = Linear(c.hidden_size, self.groups * self.k)
        self.o_proj = Linear(self.heads * self.k, c.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, packing: Packing | None) -> Tensor:
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
            y = cache.attend(self.layer, q, k, v)
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

    def forward(self, x, cos, sin, cache=None, packing=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, packing)
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
        self.compute_device: torch.device | None = None  # None: where the parameters are
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
        std = self.config.initializer_range
        for p in self.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std if p.ndim == 2 else torch.ones(p.shape))
        return self

    @property
    def device(self) -> torch.device:
        return self.compute_device or self.lm_head.weight.device

    def forward(self, input_ids: Tensor, at: Tensor | None = None, **arguments) -> Tensor:
        """Next-token logits, float32: [B, T, V], or [A, V] for the positions `at` only. Arguments of `hidden_states`."""
        return self.lm_head(self.hidden_states(input_ids, at, **arguments)).float()

    def hidden_states(
        self, input_ids: Tensor, at: Tensor | None = None, *, positions: Tensor | None = None, cache: KVCache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:  # fmt: skip
        """What the output head reads, in the compute dtype: [B, T, D], or [A, D] for the positions `at` only.

        input_ids: [B, T] int64, padded on the right: causal attention never sees that padding.
        at: [A] int64, into the B * T positions one row after the other.
        packing: of sequences back to back in the one row of input_ids [1, N]; `positions` (rotary) are of each anew.
        cache: filled with the packed sequences; without `packing`, input_ids [B, 1] are the next position of each row.
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None] if positions is None else positions
        self.frequencies = self.frequencies.to(input_ids.device)  # once: a GPU would be waited for in every pass
        angles = positions[..., None].float() * self.frequencies  # [B, T, K/2]
        cos, sin = (f(torch.cat((angles, angles), -1))[:, None].to(self.compute_dtype) for f in (torch.cos, torch.sin))
        x = self.model.embed_tokens(input_ids).to(self.compute_dtype)
        if cache is not None and packing is None:
            cache.advance()
        for block in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, cache, packing, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache, packing)
        # Examples that begin alike read the same position: indexing would add up their gradients in any order.
        return self.model.norm(x if at is None else F.embedding(at, x.flatten(0, 1)))

    def frozen_copy(self, norms: bool = False) -> "Llama":
        """A copy for inference: no gradients, matrices in the compute dtype. It computes bit for bit what self does, or with
        norms in the compute dtype too, what `save_pretrained` keeps of it; then it shares what it need not cast."""
        dtypes = {p: self.compute_dtype if norms or p.ndim == 2 else p.dtype for p in self.parameters()}
        used = {p: p.detach().to(dtype, copy=not norms) for p, dtype in dtypes.items()}
        # Given by what they are copies of, so that deepcopy does not first copy the parameters as they are.
        return copy.deepcopy(self, {id(p): nn.Parameter(x, requires_grad=False) for p, x in used.items()}).eval()


@torch.no_grad()
def generate(
    model: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Iterable[int] | None = None,
    hidden_id: int | None = None,
) -> list[list[int]]:  # fmt: skip
    """Greedy continuation of each prompt (token ids), without the prompt and without the EOS that ended it.

    stop_ids: token ids that end a row (default: the EOS ids of the model's config).
    hidden_id: a token of the prompts that no later one sees and that takes up no position, as if it were padding.
    The prompts go through the model packed, what they begin with alike once; then all rows one token at a time, and a row
    that has stopped leaves the batch, on a GPU together with others.
    """
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    device = model.device
    # Hidden tokens are left out, but for one that ends its prompt: it predicts, in the place of the token before it.
    kept = [[t for t in prompt[:-1] if t != hidden_id] + [prompt[-1]] for prompt in prompts]
    ends_hidden = torch.tensor([p[-1] == hidden_id for p in kept], device=device)
    numbered = [[(t, i - (t == hidden_id)) for i, t in enumerate(p)] for p in kept]  # with rotary positions
    tokens, places, packing = lay(numbered)
    cache = KVCache(model.config, places, max_new_tokens, device, model.compute_dtype)
    cache.mask[ends_hidden, ..., cache.at] = -math.inf
    stop = torch.tensor([*(model.config.eos_token_ids if stop_ids is None else stop_ids)], dtype=torch.int64, device=device)
    ids, positions = torch.tensor(tokens, device=device).T[:, None]
    last = torch.tensor([own[-1] for own in places], device=device)
    x = model.hidden_states(ids, at=last, positions=positions, cache=cache, packing=packing.to(device))
    ahead = torch.tensor([p[-1][1] + 1 for p in numbered], device=device)  # the next positions
    rows = torch.arange(len(kept), device=device)
    out = torch.full((len(kept), max_new_tokens), -1, device=device)
    token = model.lm_head(x).argmax(-1)
    alive = torch.ones_like(token, dtype=torch.bool)

    def advance() -> Tensor:
        x = model.hidden_states(token[:, None], positions=ahead[:, None], cache=cache)[:, -1]
        ahead.add_(1)
        return token.copy_(model.lm_head(x).argmax(-1))

    go: Callable[[], Any] = advance
    for step in range(max_new_tokens):
        alive &= ~torch.isin(token, stop)
        out[rows, step] = token.where(alive, -1)
        left = int(alive.sum())
        if left == 0 or step == max_new_tokens - 1:
            break
        # Kernels of GPUs take longer to launch than to run: what is captured is worth some rows that have stopped.
        if left < len(rows) and not (cache.static and 2 * left > len(rows)):
            order, go = cache.keep(alive), advance
            rows, token, ahead, alive = (x[order] for x in (rows, token, ahead, alive))
        go()
        if cache.static and go is advance and step < max_new_tokens - 2:  # it will be done again
            go = captured(advance)
    return [[token for token in row if token >= 0] for row in out.tolist()]


# -------------------------------------------------------------------------------------------------------- checkpoints


def resolve_folder(name: str | Path, patterns: Sequence[str] = ("*.json", "*.jinja", "*.safetensors")) -> Path:
    """The local folder of a model: a folder (of a model, or a run of train.py that has `model/` inside), else a hub id,
    `owner/name` or `owner/name@revision`, of which only JSON, safetensors and chat templates (looked at as text) are
    downloaded: no pickle is ever fetched. Raises ModelError when it is neither, or the hub gives nothing."""
    if (path := local_path(name)) is None:
        return fetch(str(name), patterns, ModelError, f"or pass a folder: {HOLDS}")
    if not path.is_dir():
        absent = (
            f"no such folder; pass a folder or hub id (owner/name, owner/name@main beside a folder called owner): {HOLDS}"
        )
        raise ModelError(f"{name}: {'is a file; pass its folder' if path.exists() else absent}")
    return path / "model" if (path / "model" / "config.json").exists() and not checkpoint_index(path) else path


def checkpoint_index(folder: Path) -> Path | None:
    """The file that holds, or lists, a checkpoint's tensors."""
    names = "model.safetensors", "model.safetensors.index.json"
    return next((folder / name for name in names if (folder / name).exists()), None)


SIZE = Field(int, 1, 2**31)
TOKEN = Field(int, -1, 2**31, required=False, null=True)  # -1: what old writers have for none
CONFIG = {
    **dict.fromkeys("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split(), SIZE),
    **dict.fromkeys(("num_key_value_heads", "head_dim"), replace(SIZE, required=False, null=True)),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), TOKEN), "tie_word_embeddings": Field(bool, required=False, null=True),
    "max_position_embeddings": replace(SIZE, required=False, null=True),
    "rms_norm_eps": Field(float, 0, 1, required=False, null=True),
    "initializer_range": Field(float, 0, 1e3, required=False, null=True),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), Field(dict, required=False, null=True)),
    "dipo": Field(dict, required=False, fields={"prompt_format": Field(str)}),  # ours
}  # fmt: skip
THETA = {"rope_theta": Field(float, 1, 1e15, required=False, null=True)}
LLAMA3 = {  # rope_scaling's
    **dict.fromkeys(("low_freq_factor", "high_freq_factor"), Field(float, 1e-6, 1e6)),
    "factor": Field(float, 1, 1e6), "original_max_position_embeddings": SIZE,
}  # fmt: skip


def read_config(folder: Path) -> LlamaConfig:
    """Read config.json (old `rope_theta`/`rope_scaling` keys or transformers 5's `rope_parameters`). Raises ModelError for a
    missing or broken file, and for every attribute that this module does not implement."""
    path = Path(folder) / "config.json"
    if adapter := next(
        (n for n in ("adapter_config.json", "adapter_model.safetensors") if path.with_name(n).exists()), None
    ):
        how = "merge it into its model first (peft's merge_and_unload, then save_pretrained)"
        raise ModelError(f"{folder}: is an adapter ({adapter}); {how}, or remove {adapter} where it is merged already")
    raw = read_json(path, ModelError, f"{again(path)}: {HOLDS}")
    if "config" in raw and "versions" in raw:
        finish = f"finish it: python train.py --resume --out {shlex.quote(str(folder))}"
        raise ModelError(f"{folder}: is a run without its model/, interrupted or still going on; {finish}")
    if (kind := raw.get("model_type")) != "llama":
        raise ModelError(f"{path}: model_type is {kind!r}; only 'llama' (Llama 2 and 3, SmolLM2) is implemented")
    if wrong := fault(raw, Field(dict, fields=CONFIG)):
        raise ModelError(f"{path}: {wrong}; is this a Llama checkpoint?")
    # As transformers 5 reads it: what stands beside the dictionary counts where the dictionary does not have it.
    rope = {key: raw.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    rope |= raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    settings = raw | rope | {"rope_scaling.rope_type": kind}
    implemented = {
        "rope_scaling.rope_type": ("default", "llama3"), "hidden_act": ("silu",), "attention_bias": (None, False),
        "mlp_bias": (None, False), "attention_dropout": (None, 0), "quantization_config": (None,), "sliding_window": (None,),
        "partial_rotary_factor": (None, 1),
    }  # fmt: skip
    for key, values in implemented.items():
        if (value := settings.get(key, values[0])) not in values:
            raise ModelError(f"{path}: {key} = {value!r:.40} is not implemented in model.py; use another checkpoint")
    if wrong := fault(rope, Field(dict, fields=THETA | (LLAMA3 if kind == "llama3" else {}))):
        raise ModelError(f"{path}: {wrong}; is this a Llama checkpoint?")
    scaling = {name: rope[name] for name in LLAMA3} if kind == "llama3" else {}
    if scaling and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ModelError(f"{path}: low_freq_factor is not below high_freq_factor; is this a Llama checkpoint?")
    generation = path.with_name("generation_config.json")  # Llama-3 lists its three stop ids here
    stops = read_json(generation, ModelError, again(path)) if generation.exists() else {}
    eos = stops.get("eos_token_id", raw.get("eos_token_id"))
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if wrong := fault(
        {"eos_token_id": eos}, Field(dict, fields={"eos_token_id": Field(list, items=replace(TOKEN, null=False))})
    ):
        raise ModelError(f"{generation if 'eos_token_id' in stops else path}: {wrong}; write token ids there")
    absent: dict[str, Any] = {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
    }  # Hugging Face's defaults
    heads, sizes = raw["num_attention_heads"], {name: raw[name] for name, field in CONFIG.items() if field == SIZE}
    config = LlamaConfig(
        **sizes, **{key: value if raw.get(key) is None else raw[key] for key, value in absent.items()},
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or sizes["hidden_size"] // heads,
        rope_theta=float(rope.get("rope_theta") or 10000.0), rope_scaling={"rope_type": kind} | scaling if scaling else None,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings")), bos_token_id=raw.get("bos_token_id"),
        pad_token_id=raw.get("pad_token_id"), eos_token_ids=tuple(eos),
    )  # fmt: skip
    if not config.head_dim or config.head_dim % 2:
        raise ModelError(f"{path}: head_dim = {config.head_dim} is odd; rotary positions need two equal halves")
    if heads % config.num_key_value_heads:
        raise ModelError(f"{path}: {heads} query heads are no multiple of {config.num_key_value_heads} key/value heads")
    return config


class Stored(NamedTuple):
    """A tensor of a checkpoint, from its file's header."""

    file: Path
    name: str  # in the file
    shape: list[int]

    def read(self, rows: slice | None = None) -> Tensor:
        with open_safetensors(self.file) as f:
            return f.get_tensor(self.name) if rows is None else f.get_slice(self.name)[rows]


def canonical(name: str) -> str:
    """A tensor's name without what torch.compile and DataParallel add, with the `model.` that AutoModel leaves out."""
    name = name.replace("_orig_mod.", "").removeprefix("module.")
    return f"model.{name}" if name.startswith(("embed_tokens.", "layers.", "norm.")) else name


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """{canonical name: tensor} of a single or sharded safetensors checkpoint. Raises ModelError naming file and remedy."""
    if (index := checkpoint_index(folder)) is None:
        pickles = sorted(p.name for p in folder.glob("*.bin")) or sorted(p.name for p in folder.glob("*.pt"))
        why = f" (found {pickles[0]}: pickles are never loaded; convert it)" if pickles else ""
        raise ModelError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there{why}")
    promised = dict[str, list[str]]()  # {file: tensors}; none named: all that it holds
    if index.suffix == ".json":
        fields = {"weight_map": Field(dict, items=Field(str))}
        for name, shard in read_json(index, ModelError, again(index), fields=fields)["weight_map"].items():
            if Path(shard).name != shard or shard in ("", ".."):
                raise ModelError(f"{index}: '{name}' points to {shard!r}, outside its folder; do not use this checkpoint")
            promised.setdefault(shard, []).append(name)
    found: dict[str, Stored] = {}
    for shard, names in sorted((promised or {index.name: []}).items()):
        with open_safetensors(path := folder / shard) as f:
            present = dict.fromkeys(f.keys())
            if lost := [name for name in names if name not in present]:
                raise ModelError(f"{path}: tensor '{lost[0]}' is missing, though {index.name} promises it; {again(path)}")
            for name in names or present:
                header, key = f.get_slice(name), canonical(name)
                if (kind := header.get_dtype()) not in ("F64", "F32", "F16", "BF16"):
                    raise ModelError(f"{path}: '{name}' is stored as {kind}; only floating-point weights are implemented")
                if key in found:
                    raise ModelError(
                        f"{folder}: tensors '{name}' and '{found[key].name}' are both {key}; remove one of them"
                    )
                found[key] = Stored(path, name, header.get_shape())
    return found


def whole(x: Tensor) -> Tensor:
    """A tensor, gathered where it is sharded over processes: all of them must ask for it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def open_safetensors(path: Path):
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError("no regular file")
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as e:
        raise ModelError(f"{path}: missing, truncated or corrupt ({first_line(e)}); {again(path)}") from None


def check_sizes(path: Path, config: LlamaConfig, stored: dict[str, Stored]) -> None:
    """Raises ModelError where config.json (`path`) asks for more than the checkpoint holds: before any of it is built."""
    widest = max((size for tensor in stored.values() for size in tensor.shape), default=0)
    sizes = "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim".split()
    for name, most in ({"num_hidden_layers": len(stored)} | dict.fromkeys(sizes, widest)).items():
        if getattr(config, name) > most:
            what = f"{name} = {getattr(config, name)}, but its checkpoint holds {len(stored)} tensors, up to {widest} wide"
            raise ModelError(f"{path}: {what}; the two belong to different models")


def load_pretrained(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None, shard: Callable[[Llama], dict[str, tuple[Tensor, slice]]] | None = None,
) -> Llama:  # fmt: skip
    """A Llama from a folder or a hub id. dtype: of the parameters (None: as stored); train with float32. compute_dtype: of
    the activations (None: the parameters'). Each tensor is read straight into its place: loading holds the parameters and
    one tensor more. shard: `distributed.shard`, for parameters in float32 of which each process reads its own rows alone.
    Raises ModelError for whatever does not fit exactly."""
    folder = resolve_folder(name)
    config, stored = read_config(folder), stored_tensors(folder)
    path, head, embedding = folder / "config.json", "lm_head.weight", "model.embed_tokens.weight"
    check_sizes(path, config, stored)
    with torch.device("meta"):
        model = Llama(config)
    expected, state = dict(model.named_parameters()), dict[str, Tensor]()
    if config.tie_word_embeddings and head in stored:  # some writers store a tied head again, others it alone
        a, b = stored[head].read(), stored.setdefault(embedding, stored[head]).read()
        if a.dtype != b.dtype or not torch.equal(a, b):  # transformers 4 uses the one, transformers 5 the other
            which = f"set it to false to use both, or remove '{head}' from {stored[head].file.name}"
            raise ModelError(f"{path}: tie_word_embeddings is true, yet '{head}' is not '{embedding}'; {which}")
        del a, b
    # Llama-2 checkpoints of 2023 also store what rope_frequencies() computes.
    extra = [n for n in stored if n not in expected and n != head and not n.endswith("rotary_emb.inv_freq")]
    if missing := [n for n in expected if n not in stored]:
        remedy = again(folder)
        if extra:
            remedy = f"there is '{stored[extra[0]].name}', which has another prefix or is no Llama's: rename the tensors"
        elif missing == [head]:
            remedy = "save it with its head (AutoModelForCausalLM), or set tie_word_embeddings where that is the embedding"
        raise ModelError(f"{folder}: tensor '{missing[0]}' is missing ({len(missing)} in all); {remedy}")
    if extra:
        raise ModelError(f"{folder}: tensor '{stored[extra[0]].name}' is not part of a Llama ({len(extra)} in all)")
    for key, p in expected.items():
        if stored[key].shape != [*p.shape]:
            shapes = f"{stored[key].shape}, config.json asks for {[*p.shape]}"
            raise ModelError(f"{stored[key].file}: '{key}' has shape {shapes}; the two belong to different models")
    if shard:
        model.compute_dtype = compute_dtype or torch.float32
        for key, (place, rows) in shard(model).items():
            place.copy_(stored[key].read(rows))
        return model
    # Largest first and each file opened anew: what is mapped beside the parameters is one tensor, and small at the end.
    for key, _ in sorted(expected.items(), key=lambda item: -item[1].numel()):
        tensor = stored[key].read()
        state[key] = tensor.to(device, dtype or tensor.dtype, copy=True)
        del tensor
    model.load_state_dict(state, strict=False, assign=True)  # complete, as checked, but for a tied head
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.compute_dtype = compute_dtype or dtype or state[embedding].dtype
    return model


def save_pretrained(
    model: Llama, folder: str | Path, tokenizer_from: str | Path | None = None, prompt: str | None = None,
    wait: Callable[[], object] = bool,
) -> Path:  # fmt: skip
    """Write a folder that `load_pretrained` and transformers' AutoModelForCausalLM read back, all tensors in the compute
    dtype: to the logits of `frozen_copy(norms=True)`. In bfloat16 that rounds norms that were trained in float32 (see
    docs/running.md); with both, transformers 4 computes nothing. tokenizer_from: a folder whose tokenizer files are copied
    along. prompt: the prompt format that the model was trained in, which config.json keeps. The folder appears whole or not
    at all. Raises ModelError if it exists already or cannot be written (no space).

    A sharded model is gathered tensor by tensor and written by the first process; all call, and `wait` after each file."""
    from huggingface_hub import split_torch_state_dict_into_shards

    folder = Path(folder)
    if files.writing and folder.exists():
        raise ModelError(f"{folder}: exists already; remove it or choose another folder")
    raw = model.config.to_dict(model.compute_dtype) | ({"dipo": {"prompt_format": prompt}} if prompt else {})
    special = {k: raw[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    dtype, parameters = model.compute_dtype, dict(model.named_parameters())
    shapes = {n: torch.empty(p.shape, dtype=dtype, device="meta") for n, p in parameters.items()}
    plan = split_torch_state_dict_into_shards(shapes)
    try:
        with replacing(folder) if files.writing else contextlib.nullcontext() as part:
            if part:
                part.mkdir()
                for name in TOKENIZER_FILES:
                    if tokenizer_from and (source := Path(tokenizer_from) / name).exists():
                        check_link(source, ModelError)
                        (part / name).write_bytes(read_bytes(source, ModelError))
                write_json(part / "config.json", raw, indent=2)
                write_json(part / "generation_config.json", special, indent=2)
                if plan.is_sharded:
                    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
                    write_json(part / "model.safetensors.index.json", index, indent=2)
            for file, names in plan.filename_to_tensors.items():
                state = dict[str, Tensor]()
                for name in names:
                    tensor = whole(parameters[name].detach()).to(dtype)
                    state |= {name: tensor.cpu().contiguous()} if part else {}
                if part:
                    save_file(state, part / file, metadata={"format": "pt"})
                wait()
    except (OSError, SafetensorError) as e:
        raise ModelError(f"{folder}: could not be written ({first_line(e)}); free some space or choose another") from None
    return folder


def recorded_prompt(folder: Path) -> str | None:
    """The prompt format that `save_pretrained` wrote into config.json, None where none is there. Raises as `read_config`."""
    return read_json(folder / "config.json", ModelError, fields=CONFIG).get("dipo", {}).get("prompt_format")
