"""GPT in two families that share one code path.

GPT-2 (Radford et al. 2019): LayerNorm, GELU, learned positions. The modern family: RMSNorm
(Zhang & Sennrich 2019), SwiGLU (Shazeer 2020), sinusoidal positions (Vaswani et al. 2017). Any norm
goes with any feed-forward network and any positions. Parameter names are GPT-2's.

Shapes: B sequences, T tokens, C = n_embd, H heads of size D = C / H, V = vocab_size.
"""

import math
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from inference import GraphedStep, KVCache, choose_tokens, penalised
from loss import linear_cross_entropy

GPT2_SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}

LARGE_VOCABULARY = 1024  # from here on it is padded, and its loss computed in parts
DRAWN_AHEAD = 64  # tokens of a text whose random numbers are drawn at once
ROWS = 128  # queries that attention on a CPU takes at a time


@dataclass
class GPTConfig:
    """Shape of a GPT; the defaults are GPT-2 124M. `vocab_size` is the tokenizer's, never a padded one."""

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

    @classmethod
    def gpt2(cls, name, **changes):
        """The config of "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl"."""
        return cls(**GPT2_SIZES[name] | changes)

    @classmethod
    def of(cls, values, vocab_size):
        """The config with this shape, from a dict that may hold other fields too (a training config)."""
        return cls(vocab_size=vocab_size, **{name: values[name] for name in cls.shape_fields()})

    @classmethod
    def shape_fields(cls):
        """The names of all fields but vocab_size: those that a training config has too."""
        return [f.name for f in fields(cls) if f.name != "vocab_size"]

    @property
    def padded_vocab_size(self):
        """Rows of the embedding: large vocabularies are rounded up to 64, which matrix units multiply faster."""
        return -(-self.vocab_size // 64) * 64 if self.vocab_size >= LARGE_VOCABULARY else self.vocab_size


def make_norm(config):
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=1e-6)
    return nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)


def sinusoidal_table(length, width):
    """Vaswani et al.'s position encodings, float32 (length, width): sines in even columns, cosines in odd."""
    angles = rotation_angles(length, width)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).float()


def rotation_angles(length, width):
    """position / 10000^(2i / width), float64 (length, width / 2)."""
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.outer(torch.arange(length, dtype=torch.float64), frequencies)


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021): turn each pair (x_i, x_{i + D/2}) of x (B, H, T, D) by its angle.

    `cos` and `sin` are (T, D / 2), float32; the result has x's dtype.
    """
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1).type_as(x)


def keep_mask(shape, dropout, device):
    """Ones where dropout keeps an element and zeros elsewhere, bfloat16, from the default generator.

    Sixteen random bits an element, compared in place and turned into the bits of 1.0: five times as fast
    as bernoulli_ on a CPU. The probability is rounded to 1 / 65536.
    """
    if torch.compiler.is_compiling():  # cannot see one tensor as another type
        return (torch.rand(shape, device=device) >= dropout).bfloat16()
    n = math.prod(shape)
    bits = torch.empty(-(-n // 4), dtype=torch.int64, device=device).random_(-(2**63), None).view(torch.int16)[:n]
    threshold = round((1 - dropout) * 2**16) - 2**15
    return bits.lt_(min(threshold, 2**15 - 1)).mul_(0x3F80).view(torch.bfloat16).view(shape)


class Dropout(nn.Dropout):
    """nn.Dropout, faster on a CPU."""

    def forward(self, x):
        if self.training and self.p and x.device.type == "cpu":
            return x * keep_mask(x.shape, self.p, x.device).to(x.dtype) * (1 / (1 - self.p))
        return super().forward(x)


def causal_attention(q, k, v, dropout):
    """Causal attention of q, k, v (B, H, T, D) with dropout on its weights; (B, H, T, D).

    PyTorch's kernel for CPUs computes in float32 inside. There bfloat16 products, with weights for
    ROWS queries at a time and no key after them, are two to five times as fast.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.size(2) > 4 * ROWS:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    scale = q.size(-1) ** -0.5
    q, k, values = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    if dropout:
        values = values * (1 / (1 - dropout))
    parts = []
    for start in range(0, q.size(1), ROWS):
        end = min(start + ROWS, q.size(1))
        mask = torch.full((end - start, end), -math.inf, dtype=q.dtype).triu(start + 1)
        weights = F.softmax(torch.baddbmm(mask, q[:, start:end], k[:, :end].transpose(1, 2), alpha=scale), dim=-1)
        if dropout:
            weights = weights * keep_mask(weights.shape, dropout, q.device)
        parts.append(weights @ values[:, :end])
    return torch.cat(parts, dim=1).view_as(v)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x, rotation, remember=None):
        """x (B, T, C) -> (B, T, C). `rotation`: (cos, sin) for rotary positions, else None.

        `remember`: takes the keys and values of these tokens, gives those of all tokens so far and
        the mask of what each may see (None: all before itself); KVCache.store for one layer.
        """
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
                   for part in self.c_attn(x).split(C, dim=2))
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if remember is None:
            y = causal_attention(q, k, v, self.dropout if self.training else 0.0)
        else:
            k, v, mask = remember(k, v)
            y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, mask, is_causal=mask is None and T > 1).to(x.dtype)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        hidden = 4 * config.n_embd
        if self.kind == "swiglu":
            # Two thirds of the width for the same number of parameters, in whole multiples of 64.
            hidden = -(-8 * config.n_embd // 3 // 64) * 64
        self.c_fc = nn.Linear(config.n_embd, hidden * (2 if self.kind == "swiglu" else 1), bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        x = self.c_fc(x)
        if self.kind == "gelu":
            x = F.gelu(x, approximate="tanh")  # the form GPT-2 was trained with
        elif self.kind == "relu2":
            x = F.relu(x).square()  # So et al. 2021
        else:
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rotation, remember=None):
        x = x + self.attn(self.ln_1(x), rotation, remember)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        """`config`: a GPTConfig. ValueError for a shape that cannot be."""
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not divisible by n_head {config.n_head}")
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
            angles = rotation_angles(config.block_size, config.n_embd // config.n_head)
            self.register_buffer("cos", angles.cos().float(), persistent=False)
            self.register_buffer("sin", angles.sin().float(), persistent=False)
        self.apply(self._init_weights)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight

    def _init_weights(self, module):
        """GPT-2's initialisation: N(0, 0.02), and N(0, 0.02 / sqrt(2 n_layer)) into the residual stream."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (CausalSelfAttention, MLP)):
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def hidden(self, idx, cache=None):
        """Final normalised states, (B, T, C), of tokens idx, int64 (B, T).

        With a KVCache the tokens follow those that it holds, and it takes them up. ValueError when
        they are more than block_size.
        """
        T = idx.size(1)
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens are over block_size {self.config.block_size}")
        places = slice(0, T) if cache is None else cache.advance(T)
        x = self.transformer.wte(idx)
        rotation = None
        if self.config.pos == "learned":
            x = x + self.transformer.wpe.weight[places]
        elif self.config.pos == "sinusoidal":
            # Scaled as in Vaswani et al.
            x = x * math.sqrt(self.config.n_embd) + self.positions[places].to(x.dtype)
        else:
            rotation = self.cos[places], self.sin[places]
        x = self.transformer.drop(x)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, rotation, partial(cache.store, layer) if cache else None)
        return self.transformer.ln_f(x)

    def logits(self, x):
        """Logits (..., V) of states x (..., C). The rows that pad the vocabulary are left out."""
        return self.lm_head(x)[..., : self.config.vocab_size]

    def forward(self, idx, targets=None):
        """Logits (B, T, V) of tokens idx, int64 (B, T), and their loss.

        The loss is the mean cross-entropy in nats, float32, over the targets, int64 (B, T), that are
        not -1; None without targets. With targets and a large vocabulary it is computed without all
        logits at once, and the logits are None.
        """
        x = self.hidden(idx)
        if targets is not None and self.config.vocab_size >= LARGE_VOCABULARY:
            return None, linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten(),
                                              self.config.vocab_size)
        logits = self.logits(x)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def n_params(self):
        """Number of parameters, without the position embedding (nanoGPT's count)."""
        n_positions = self.transformer.wpe.weight.numel() if self.config.pos == "learned" else 0
        return sum(p.numel() for p in self.parameters()) - n_positions

    def flops_per_token(self):
        """FLOP of forward and backward for one token: 6 a parameter, 12 L C T for attention (PaLM, appendix B)."""
        c = self.config
        return 6 * self.n_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def step(self, idx, cache):
        """Logits (B, V) of the token after idx, int64 (B, T), which follows what the KVCache holds."""
        return self.logits(self.hidden(idx, cache)[:, -1])

    def window_start(self, n):
        """First of n tokens that the prediction of the next one sees.

        All n up to block_size. Beyond, the window starts at a multiple of block_size / 2, so the
        model reads the last half of a full context again and goes on from there. That holds for every
        kind of positions: learned and sinusoidal ones have no place beyond block_size, and with rotary ones
        a window that drops its first tokens one by one predicts badly (Xiao et al. 2023).
        """
        half = max(1, self.config.block_size // 2)
        return half * max(0, -(-(n - self.config.block_size) // half))

    def read(self, windows, cache):
        """Fill the cache with windows, int64 (n, T), each for an equal share of its rows: logits (rows, V).

        One window at a time: a row's numbers must not depend on how many others there are.
        """
        copies = cache.keys.size(1) // len(windows)
        logits = []
        for i, window in enumerate(windows):
            single = KVCache(self.config, 1, cache.keys.device, cache.keys.dtype)
            logits.append(self.step(window[None], single))
            cache.take(single, slice(i * copies, (i + 1) * copies))
        return torch.cat(logits).repeat_interleave(copies, dim=0)

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, num_samples=1, seed=0, repetition_penalty=1.0, cuda_graph=False, **choice):
        """Continue tokens idx, int64 (B, T >= 1), num_samples times each: yield int64 (B * num_samples,) a step.

        `choice` is that of `choose_tokens`. What a row draws depends on seed + its number alone, so
        row i is what seed + i gives by itself. repetition_penalty > 1 makes tokens that are there
        already less likely, by dividing their positive and multiplying their negative logits (CTRL,
        Keskar et al. 2019). `window_start` says what happens at the end of the context.
        """
        was_training = self.training
        self.eval()
        weight = self.transformer.wte.weight
        rows = len(idx) * num_samples
        draws = [np.random.default_rng(seed + row) for row in range(rows)]
        # A CPU attends one query to many keys up to 8 times faster in float32.
        dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
        cache = KVCache(self.config, rows, weight.device, dtype, static=cuda_graph)
        step = GraphedStep(self, cache) if cuda_graph else self.step
        tokens, windows, start = idx.repeat_interleave(num_samples, dim=0), idx, None
        try:
            for n in range(max_new_tokens):
                if start == (start := self.window_start(tokens.size(1))):
                    logits = step(tokens[:, -1:], cache)
                else:
                    logits = self.read(windows[:, start:], cache)
                if repetition_penalty != 1:
                    logits = logits.scatter(1, tokens, penalised(logits.gather(1, tokens), repetition_penalty))
                if n % DRAWN_AHEAD == 0:  # on CUDA sent to the device together, not one copy for each token
                    uniforms = torch.from_numpy(np.stack([draw.random(DRAWN_AHEAD) for draw in draws], axis=1))
                    uniforms = uniforms.to(weight.device) if weight.is_cuda else uniforms
                new = choose_tokens(logits, uniforms[n % DRAWN_AHEAD], **choice)
                windows = tokens = torch.cat((tokens, new[:, None]), dim=1)
                yield new
        finally:
            self.train(was_training)

    def generate(self, idx, max_new_tokens, num_samples=1, **options):
        """Tokens idx, int64 (B, T), with their continuations: (B * num_samples, T + max_new_tokens). See `stream`."""
        new = [tokens[:, None] for tokens in self.stream(idx, max_new_tokens, num_samples, **options)]
        return torch.cat((idx.repeat_interleave(num_samples, dim=0), *new), dim=1)
