"""GPT in two families that share one code path.

GPT-2 (Radford et al. 2019): LayerNorm, GELU, learned positions. The modern family: RMSNorm
(Zhang & Sennrich 2019), SwiGLU (Shazeer 2020), sinusoidal (Vaswani et al. 2017) or rotary positions
(Su et al. 2021), normalized queries and keys (Henry et al. 2020). Any norm goes with any feed-forward network and any
positions. Parameter names are GPT-2's.

Shapes: B sequences, T tokens, C = n_embd, H heads of size D = C / H, V = vocab_size, L layers.
"""

import math
from dataclasses import dataclass, field, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lib.kernels import IGNORE_INDEX, Dropout, causal_attention, linear_cross_entropy

GPT2_SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}
GELU = {"gelu": "tanh", "gelu_erf": "none"}  # the approximation that GPT-2 was trained with, and the exact function
KINDS = {
    "norm": ("layernorm", "rmsnorm"),
    "mlp": ("gelu", "gelu_erf", "swiglu", "relu2"),
    "pos": ("learned", "sinusoidal", "rope"),
}
LARGE_VOCABULARY = 1024  # from this size on it is padded, and its loss computed in chunks


@dataclass
class GPTConfig:
    """Shape of a GPT; the defaults are GPT-2 124M. `vocab_size` is the tokenizer's, never padded."""

    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    norm: str = "layernorm"
    mlp: str = "gelu"
    pos: str = "learned"
    tie_weights: bool = True
    qk_norm: bool = False

    @classmethod
    def of(cls, values: dict, vocab_size: int) -> "GPTConfig":
        """A GPTConfig from a dict that may hold other fields too (a training config)."""
        values = {"qk_norm": False} | values  # older checkpoints lack it
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name != "vocab_size"}, vocab_size=vocab_size)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: large vocabularies are rounded up to a multiple of 64, which is faster."""
        return -(-self.vocab_size // 64) * 64 if self.vocab_size >= LARGE_VOCABULARY else self.vocab_size


@dataclass
class KVCache:
    """Keys and values of the tokens read so far, and where the next forward pass puts its own.

    core/inference.py sets positions, length and mask before each pass; attention only uses them.
    """

    keys: Tensor  # (L, B, H, block_size, D)
    values: Tensor  # (L, B, H, block_size, D)
    positions: slice | Tensor = field(default_factory=lambda: slice(0, 0))  # of this pass's tokens; int64 (T,)
    length: int = 0  # number of keys attended to
    mask: Tensor | None = None  # (T, length), added to the scores: -inf hides a key; None: causal

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Take in a layer's k and v (B, H, T, D) of this pass; attention of q to all its keys, (B, H, T, D)."""
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.positions], values[:, :, self.positions] = k, v
        keys, values = keys[:, :, : self.length], values[:, :, : self.length]
        is_causal = self.mask is None and q.size(2) > 1
        y = F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, self.mask, is_causal=is_causal)
        return y.to(q.dtype)


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=1e-6)
    return nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)


def rotation_angles(length: int, width: int, dtype: torch.dtype) -> Tensor:
    """position / 10000^(2i / width), (length, width / 2), computed in `dtype`."""
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, width, 2, dtype=dtype) / width)
    return torch.outer(torch.arange(length, dtype=dtype), frequencies)


def sinusoidal_table(length: int, width: int) -> Tensor:
    """Vaswani et al.'s position encodings, float32 (length, width): sines in even columns, cosines in odd."""
    angles = rotation_angles(length, width, torch.float64)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): turn each pair (x_i, x_{i + D/2}) of x (B, H, T, D) by its angle.

    `cos` and `sin` are float32 (T, D / 2); the result has x's dtype.
    """
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1).type_as(x)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.qk_norm = config.qk_norm
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, layer: int, cache: KVCache | None) -> Tensor:
        """x (B, T, C) -> (B, T, C). `rotation`: (cos, sin) for rotary positions."""
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
                   for part in self.c_attn(x).split(C, dim=2))
        if self.qk_norm:
            q, k = (F.rms_norm(part, part.shape[-1:], eps=1e-6) for part in (q, k))
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is None:
            y = causal_attention(q, k, v, self.dropout if self.training else 0.0)  # (B, H, T, D)
        else:
            y = cache.attend(layer, q, k, v)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        hidden = 4 * config.n_embd
        if self.kind == "swiglu":
            # Two thirds of the width for the same number of parameters, in whole multiples of 64.
            hidden = -(-8 * config.n_embd // 3 // 64) * 64
        self.c_fc = nn.Linear(config.n_embd, hidden * (2 if self.kind == "swiglu" else 1), bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = self.c_fc(x)
        if self.kind in GELU:
            x = F.gelu(x, approximate=GELU[self.kind])
        elif self.kind == "relu2":
            x = F.relu(x).square()  # So et al. 2021
        else:
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, layer: int, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotation, layer, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    activation_checkpointing = False  # keep only the blocks' inputs for the backward pass, compute the rest again

    def __init__(self, config: GPTConfig) -> None:
        """ValueError for an impossible shape."""
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not divisible by n_head {config.n_head}")
        for name, kinds in KINDS.items():
            if getattr(config, name) not in kinds:
                raise ValueError(f"{name} {getattr(config, name)!r} is none of {', '.join(kinds)}")
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
            drop=Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=make_norm(config),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.pos == "learned":
            self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        elif config.pos == "sinusoidal":
            table = sinusoidal_table(config.block_size, config.n_embd)
            self.register_buffer("positions", table, persistent=False)
        else:
            # float32, as Llama's code has it: exported weights compute the same.
            angles = rotation_angles(config.block_size, config.n_embd // config.n_head, torch.float32)
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)
        self.apply(self._init_weights)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight

    def _init_weights(self, module: nn.Module) -> None:
        """GPT-2's initialization: N(0, 0.02), and N(0, 0.02 / sqrt(2 n_layer)) into the residual stream."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (CausalSelfAttention, MLP)):
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Logits (B, T, V) of tokens idx, int64 (B, T), and their loss.

        The loss is the mean cross-entropy in nats, float32, over the targets, int64 (B, T), that are not
        IGNORE_INDEX; None without targets. With targets and a large vocabulary the logits are None:
        they are never all held at once.
        """
        x = self.hidden(idx)  # (B, T, C)
        if targets is not None and self.config.vocab_size >= LARGE_VOCABULARY:
            return None, linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten(),
                                              self.config.vocab_size)
        logits = self.logits(x)  # (B, T, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
        return logits, loss

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Final normalized states (B, T, C) of tokens idx, int64 (B, T), which follow those in the cache.

        ValueError for more than block_size tokens.
        """
        T = idx.size(1)
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens exceed block_size {self.config.block_size}")
        positions = slice(0, T) if cache is None else cache.positions
        x = self.transformer.wte(idx)  # (B, T, C)
        rotation = None
        if self.config.pos == "learned":
            x = x + self.transformer.wpe.weight[positions]
        elif self.config.pos == "sinusoidal":
            # Scaled as in Vaswani et al.
            x = x * math.sqrt(self.config.n_embd) + self.positions[positions].to(x.dtype)
        else:
            rotation = self.cos[positions], self.sin[positions]  # (T, D / 2) each
        x = self.transformer.drop(x)
        for layer, block in enumerate(self.transformer.h):
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, rotation, layer, cache, use_reentrant=False,
                               preserve_rng_state=self.config.dropout > 0)
            else:
                x = block(x, rotation, layer, cache)
        return self.transformer.ln_f(x)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (..., V) of states x (..., C), without vocabulary padding."""
        return self.lm_head(x)[..., : self.config.vocab_size]

    def n_params(self) -> int:
        """Number of parameters, excluding the position embedding (nanoGPT's count)."""
        n_positions = self.transformer.wpe.weight.numel() if self.config.pos == "learned" else 0
        return sum(p.numel() for p in self.parameters()) - n_positions

    def flops_per_token(self) -> int:
        """FLOP of forward and backward for one token: 6 per parameter, 12 L C T for attention (PaLM, appendix B)."""
        c = self.config
        return 6 * self.n_params() + 12 * c.n_layer * c.n_embd * c.block_size
