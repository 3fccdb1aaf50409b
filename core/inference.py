"""Decoding: the key-value cache, prefill and single tokens, the choice of tokens, weights in a fast layout.

Shapes as in model.py: B rows decoded together, T tokens of each, V = vocab_size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.random  # NumPy would load it at its first use, and loses a Ctrl-C meanwhile
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lib.kernels import PackedLinear
from model import GPT, KVCache

# All but cuDNN's, which builds a plan for each new length of a prompt.
UNPLANNED_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
DRAWN_AHEAD = 64  # tokens of a text whose random numbers are drawn at once


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
        # Once for all layers.
        cache.mask = torch.zeros((T, len(cache.all_positions)), dtype=cache.keys.dtype, device=cache.keys.device)
        cache.mask.masked_fill_(cache.all_positions > cache.positions[:, None], -math.inf)
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
        with sdpa_kernel(UNPLANNED_ATTENTION):
            logits.append(next_logits(model, window[None], KVCache(keys[:, :1], values[:, :1])))
        keys[:, 1:, :, :T], values[:, 1:, :, :T] = keys[:, :1, :, :T], values[:, :1, :, :T]
    if isinstance(cache, StaticCache):
        cache.n_tokens.fill_(T)
    else:
        cache.length = T
    return torch.cat(logits).repeat_interleave(copies, dim=0)


def window_start(n: int, block_size: int) -> int:
    """Index of the first of n tokens that the prediction of the next one sees.

    0 up to block_size tokens. Beyond, the window starts at a multiple of block_size / 2: each time the context
    is full, the model reads its last half again and continues from there. That holds for every kind
    of positions: learned and sinusoidal ones have none beyond block_size, and with rotary ones a window that
    drops its first tokens one by one predicts badly (Xiao et al. 2023).
    """
    half = max(1, block_size // 2)
    return half * max(0, -(-(n - block_size) // half))


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) where those of tokens `seen`, bool (B, V), are divided by `penalty` if positive, else multiplied.

    A penalty > 1 makes these tokens less likely (CTRL, Keskar et al. 2019).
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


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


class Decoder:
    """Decodes B rows of tokens, one per row at a time, in fixed buffers, so that a CUDA graph can replay it."""

    def __init__(self, model: GPT, rows: int, static: bool, repetition_penalty: float = 1.0, **choice: float) -> None:
        """`static`: with a cache of constant size, and a graph if the model is on CUDA."""
        self.model, self.repetition_penalty, self.choice = model, repetition_penalty, choice
        self.cache, device = make_cache(model, rows, static), model.transformer.wte.weight.device
        self.tokens = torch.zeros((rows, 1), dtype=torch.int64, device=device)  # chosen last
        # MPS has no float64.
        self.uniforms = torch.zeros(rows, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
        # Which tokens each row has had; only a penalty asks.
        V = model.config.vocab_size if repetition_penalty != 1 else 0
        self.seen = torch.zeros((rows, V), dtype=torch.bool, device=device)
        self.graph = self.captured() if static and device.type == "cuda" else None

    def captured(self) -> torch.cuda.CUDAGraph:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up: libraries may not allocate workspaces during capture
            self.decode()
        torch.cuda.current_stream().wait_stream(stream)
        self.cache.n_tokens.zero_()
        with torch.cuda.graph(graph):
            self.decode()
        return graph

    def start(self, idx: Tensor) -> None:
        """Record idx, int64 (B, T), as the tokens that the rows have had."""
        self.seen.zero_()
        self.note(idx)

    def note(self, idx: Tensor) -> None:
        if self.repetition_penalty != 1:
            self.seen.scatter_(1, idx, True)

    def choose(self, logits: Tensor) -> None:
        """Choose the next tokens by logits (B, V)."""
        if self.repetition_penalty != 1:
            logits = penalize(logits, self.seen, self.repetition_penalty)
        self.tokens.copy_(choose_tokens(logits, self.uniforms, **self.choice)[:, None])
        self.note(self.tokens)

    def decode(self) -> None:
        self.choose(next_logits(self.model, self.tokens, self.cache))

    def step(self, windows: Tensor | None, uniforms: Tensor) -> Tensor:
        """The rows' next tokens, int64 (B,), drawn with uniforms, float64 (B,).

        They follow windows, int64 (n, T), as in `prefill`, or, if that is None, the tokens before.
        """
        self.uniforms.copy_(uniforms)
        if windows is not None:
            self.choose(prefill(self.model, windows, self.cache))
        elif self.graph:
            self.graph.replay()
        else:
            self.decode()
        return self.tokens[:, 0].clone()


@torch.inference_mode()
def stream(model: GPT, idx: Tensor, max_new_tokens: int, num_samples: int = 1, seed: int = 0,
           **choice: float) -> Iterator[Tensor]:
    """Continue tokens idx, int64 (n, T >= 1), num_samples times each: yield the next int64 (n * num_samples,).

    What row i draws depends on seed + i alone: on a CPU it is what that seed gives by itself, bit for bit; on a GPU
    products of more rows may round differently. `choice`: repetition_penalty, see `penalize`, and the options of
    `choose_tokens`; the end of the context: see `window_start`.
    """
    was_training = model.training
    model.eval()
    rows, decoders = len(idx) * num_samples, getattr(model, "decoders", None)
    key, is_static = (rows, *sorted(choice.items())), decoders is not None
    decoder = (is_static and decoders.pop(key, None)) or Decoder(model, rows, is_static, **choice)
    generators = [np.random.default_rng(seed + row) for row in range(rows)]
    windows, tokens, start = idx, idx.repeat_interleave(num_samples, dim=0), None
    decoder.start(tokens)
    try:
        for n in range(max_new_tokens):
            if n % DRAWN_AHEAD == 0:  # a copy to the device for all of them
                drawn = np.stack([generator.random(DRAWN_AHEAD) for generator in generators], axis=1)
                uniforms = torch.tensor(drawn, device=decoder.uniforms.device)
            is_read = start == (start := window_start(tokens.size(1), model.config.block_size))
            new = decoder.step(None if is_read else windows[:, start:], uniforms[n % DRAWN_AHEAD])
            windows = tokens = torch.cat((tokens, new[:, None]), dim=1)
            yield new
    finally:
        model.train(was_training)
        if is_static:
            decoders[key] = decoder


def generate(model: GPT, idx: Tensor, max_new_tokens: int, num_samples: int = 1, **options: float) -> Tensor:
    """Tokens idx, int64 (n, T), with their continuations: (n * num_samples, T + max_new_tokens). See `stream`."""
    new = [tokens[:, None] for tokens in stream(model, idx, max_new_tokens, num_samples, **options)]
    return torch.cat((idx.repeat_interleave(num_samples, dim=0), *new), dim=1)


class CenteredHead(nn.Module):
    """An output layer that computes in float32 what all logits have in common, for weights of fewer bits.

    That is the mean embedding's part, which no softmax sees; bfloat16's steps at GPT-2's -100 are 0.5. On 124M with
    such logits (bfloat16, CPU): KL divergence from float32 6e-4 instead of 1.1e-2 nats, argmax changed
    for 4% of tokens instead of 15%, and the same time per token (within 1%).
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
    """The model on `device` with weights of `dtype`, in eval mode; it can no longer be trained or saved.

    On CPUs its linear layers become PackedLinear; on CUDA it keeps its static Decoders, with their graphs.
    """
    model.requires_grad_(False).eval()
    if dtype != torch.float32:
        model.lm_head = CenteredHead(model.lm_head, model.config.vocab_size)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)  # one at a time; the position tables (buffers) stay float32
    model.to(device)
    if device.type == "cuda":
        model.decoders = {}  # by number of rows and how tokens are chosen
    if device.type == "cpu" and PackedLinear.is_available(dtype):
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, PackedLinear(child))
    return model
