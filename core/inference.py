"""Decoding: the key-value cache, prefill and single tokens, the choice of tokens, weights in a fast layout.

Shapes as in model.py: B rows decoded together, T tokens of each, V = vocab_size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lib.kernels import PackedLinear
from model import GPT, KVCache


@dataclass
class StaticCache(KVCache):
    """A cache whose shapes never change, as a CUDA graph needs.

    Each pass attends to all block_size positions, under a mask, and the tokens are counted on the device.
    """

    n_tokens: Tensor = field(kw_only=True)  # int64 (1,), read so far
    all_positions: Tensor = field(kw_only=True)  # int64 (block_size,): 0, 1, 2, …


def make_cache(model: GPT, rows: int, static: bool = False) -> KVCache:
    """An empty cache for `rows` rows of up to block_size tokens, on the model's device."""
    config, weight = model.config, model.transformer.wte.weight
    device = weight.device
    # On a CPU, one query against many keys is up to 8 times faster in float32.
    dtype = torch.float32 if device.type == "cpu" else weight.dtype
    shape = config.n_layer, rows, config.n_head, config.block_size, config.n_embd // config.n_head
    keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
    if not static:
        return KVCache(keys, values)
    return StaticCache(keys, values, length=config.block_size,
                       n_tokens=torch.zeros(1, dtype=torch.int64, device=device),
                       all_positions=torch.arange(config.block_size, device=device))


def advance(cache: KVCache, T: int) -> None:
    """Set where the next pass puts its T tokens and what they attend to.

    ValueError if they do not fit, or if T > 1 tokens follow others (a StaticCache does not check).
    """
    if isinstance(cache, StaticCache):
        cache.positions = cache.n_tokens + cache.all_positions[:T]
        cache.mask = cache.all_positions <= cache.positions[:, None]  # (T, block_size)
        cache.n_tokens.add_(T)
        return
    block_size = cache.keys.size(3)
    if cache.length + T > block_size:
        raise ValueError(f"{cache.length} + {T} tokens exceed block_size {block_size}")
    if cache.length and T > 1:
        raise ValueError("only an empty cache takes more than one token at a time")
    cache.positions = slice(cache.length, cache.length + T)
    cache.length += T


def next_logits(model: GPT, idx: Tensor, cache: KVCache) -> Tensor:
    """Logits (B, V) of the token after idx, int64 (B, T), which follows the tokens in the cache."""
    advance(cache, idx.size(1))
    return model.logits(model.hidden(idx, cache)[:, -1])


def prefill(model: GPT, windows: Tensor, cache: KVCache) -> Tensor:
    """Refill the cache with windows, int64 (n, T), each in an equal share of its B rows; next logits (B, V).

    One window at a time: a row's numbers must not depend on how many others there are.
    """
    T, copies = windows.size(1), cache.keys.size(1) // len(windows)
    logits = []
    for i, window in enumerate(windows):
        rows = slice(i * copies, (i + 1) * copies)
        keys, values = cache.keys[:, rows], cache.values[:, rows]
        logits.append(next_logits(model, window[None], KVCache(keys[:, :1], values[:, :1])))
        keys[:, 1:, :, :T], values[:, 1:, :, :T] = keys[:, :1, :, :T], values[:, :1, :, :T]
    if isinstance(cache, StaticCache):
        cache.n_tokens.fill_(T)
    else:
        cache.length = T
    return torch.cat(logits).repeat_interleave(copies, dim=0)


class GraphedDecoder:
    """`next_logits` of one token per row as a CUDA graph: one launch instead of hundreds."""

    def __init__(self, model: GPT, cache: StaticCache) -> None:
        """`cache` is empty, and belongs to the graph from now on."""
        self.idx = torch.zeros((cache.keys.size(1), 1), dtype=torch.int64, device=cache.keys.device)
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up: libraries may not allocate workspaces during capture
            next_logits(model, self.idx, cache)
        torch.cuda.current_stream().wait_stream(stream)
        cache.n_tokens.zero_()
        with torch.cuda.graph(self.graph):
            self.logits = next_logits(model, self.idx, cache)
        cache.n_tokens.zero_()

    def __call__(self, idx: Tensor) -> Tensor:
        """Logits (B, V) of the token after idx, int64 (B, 1); the next call overwrites them."""
        self.idx.copy_(idx)
        self.graph.replay()
        return self.logits


def window_start(n: int, block_size: int) -> int:
    """Index of the first of n tokens that the prediction of the next one sees.

    0 up to block_size tokens. Beyond, the window starts at a multiple of block_size / 2: each time the context
    is full, the model reads its last half again and continues from there. That holds for every kind
    of positions: learned and sinusoidal ones have none beyond block_size, and with rotary ones a window that
    drops its first tokens one by one predicts badly (Xiao et al. 2023).
    """
    half = max(1, block_size // 2)
    return half * max(0, -(-(n - block_size) // half))


def penalise(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) where those of tokens, int64 (B, T), are divided by `penalty` if positive, else multiplied.

    A penalty > 1 makes these tokens less likely (CTRL, Keskar et al. 2019).
    """
    seen = logits.gather(1, tokens)
    return logits.scatter(1, tokens, torch.where(seen > 0, seen / penalty, seen * penalty))


def choose_tokens(logits: Tensor, uniforms: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                  min_p: float = 0.0) -> Tensor:
    """Draw a token for each row of logits, float (B, V), with uniforms, float64 (B,) in [0, 1): int64 (B,).

    temperature 0 takes the most likely. Otherwise the logits are divided by it, and in this order top_k > 0
    keeps the k most likely, top_p < 1 the smallest set of most likely tokens with this total probability (nucleus,
    Holtzman et al. 2020), min_p > 0 those at least min_p times as likely as the most likely (Nguyen et al. 2024).
    """
    device = logits.device
    if temperature == 0:
        return logits.argmax(dim=-1)
    if device.type == "mps":
        logits = logits.cpu()  # MPS has no float64
    ids = None
    if 0 < top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)  # from the most likely down
    elif top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    logits = logits.double()
    p = F.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    if top_p < 1:
        p = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0)
    if min_p > 0:
        p = p.masked_fill(p < min_p * p.amax(dim=-1, keepdim=True), 0)
    cumulative = p.cumsum(dim=-1)
    # The first index whose cumulative probability exceeds uniform * total: never a token of probability 0.
    drawn = torch.searchsorted(cumulative, uniforms.to(p.device)[:, None] * cumulative[:, -1:], right=True)
    return (drawn if ids is None else ids.gather(-1, drawn))[:, 0].to(device)


@torch.inference_mode()
def stream(model: GPT, idx: Tensor, max_new_tokens: int, num_samples: int = 1, seed: int = 0,
           repetition_penalty: float = 1.0, static_cache: bool = False, **choice: float) -> Iterator[Tensor]:
    """Continue tokens idx, int64 (n, T >= 1), num_samples times each: yield the next int64 (n * num_samples,).

    What row i draws depends on seed + i alone: it is what that seed gives by itself. `choice`: see
    `choose_tokens`; `repetition_penalty`: see `penalise`; the end of the context: see `window_start`.
    """
    was_training = model.training
    model.eval()
    rows = len(idx) * num_samples
    generators = [np.random.default_rng(seed + row) for row in range(rows)]
    cache = make_cache(model, rows, static_cache)
    is_graph = static_cache and cache.keys.is_cuda
    decode = GraphedDecoder(model, cache) if is_graph else partial(next_logits, model, cache=cache)
    windows, tokens, start = idx, idx.repeat_interleave(num_samples, dim=0), None
    try:
        for _ in range(max_new_tokens):
            if start == (start := window_start(tokens.size(1), model.config.block_size)):
                logits = decode(tokens[:, -1:])
            else:
                logits = prefill(model, windows[:, start:], cache)
            if repetition_penalty != 1:
                logits = penalise(logits, tokens, repetition_penalty)
            uniforms = torch.tensor([generator.random() for generator in generators], dtype=torch.float64)
            new = choose_tokens(logits, uniforms, **choice)
            windows = tokens = torch.cat((tokens, new[:, None]), dim=1)
            yield new
    finally:
        model.train(was_training)


def generate(model: GPT, idx: Tensor, max_new_tokens: int, num_samples: int = 1, **options: float) -> Tensor:
    """Tokens idx, int64 (n, T), with their continuations: (n * num_samples, T + max_new_tokens). See `stream`."""
    new = [tokens[:, None] for tokens in stream(model, idx, max_new_tokens, num_samples, **options)]
    return torch.cat((idx.repeat_interleave(num_samples, dim=0), *new), dim=1)


class CenteredHead(nn.Module):
    """An output layer that computes in float32 what all logits have in common, for weights of fewer bits.

    That is the mean embedding's part, which no softmax sees; bfloat16's steps at GPT-2's -100 are 0.5. On 124M with
    such logits (bfloat16, CPU): KL divergence from float32 6e-4 instead of 1.1e-2 nats, argmax changed
    for 4 % of tokens instead of 15 %, and the same time per token (within 1 %).
    """

    def __init__(self, linear: nn.Linear, vocab_size: int) -> None:
        super().__init__()
        self.register_buffer("mean", linear.weight[:vocab_size].mean(dim=0))
        self.rest = nn.Linear(*linear.weight.t().shape, bias=False, device="meta")
        self.rest.weight = nn.Parameter(linear.weight - self.mean, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> float32 (..., V)."""
        return self.rest(x).float() + (x.float() @ self.mean)[..., None]


def prepare_for_inference(model: GPT, device: torch.device, dtype: torch.dtype) -> GPT:
    """The model on `device` with weights of `dtype`, in eval mode; on CPUs its linear layers become PackedLinear.

    It can no longer be trained or saved.
    """
    model.requires_grad_(False).eval()
    if dtype != torch.float32:
        model.lm_head = CenteredHead(model.lm_head, model.config.vocab_size)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)  # one at a time; the position tables (buffers) stay float32
    model.to(device)
    if device.type == "cpu" and PackedLinear.is_available():
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, PackedLinear(child))
    return model
