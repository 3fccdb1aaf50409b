"""What generating text needs beside the model: a key-value cache, the choice of tokens, weights in a fast layout."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class KVCache:
    """Keys and values of the tokens read so far, allocated once: `keys` and `values`, (L, B, H, block_size, D).

    A static one always gives all its places, under a mask, and counts its length in a tensor: no
    shape ever changes, as a CUDA graph needs. The other gives what is there.
    """

    def __init__(self, config, batch_size, device, dtype, static=False):
        shape = config.n_layer, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.static = static
        self.length = torch.zeros(1, dtype=torch.int64, device=device) if static else 0
        self.numbers = torch.arange(config.block_size, device=device)
        self.places, self.mask = slice(0, 0), None

    def advance(self, T):
        """Make place for T tokens; their positions, a slice or int64 (T,)."""
        if self.static:
            self.places = self.length + self.numbers[:T]
            # What attention adds, (T, block_size), made once for all layers.
            self.mask = torch.zeros((T, len(self.numbers)), device=self.keys.device, dtype=self.keys.dtype)
            self.mask.masked_fill_(self.numbers > self.places[:, None], -math.inf)
            self.length.add_(T)
        else:
            if self.length + T > len(self.numbers):
                raise ValueError(f"{self.length} + {T} tokens are over block_size {len(self.numbers)}")
            if self.length and T > 1:
                raise ValueError("a cache takes many tokens when it is empty, and then one at a time")
            self.places = slice(self.length, self.length + T)
            self.length += T
        return self.places

    def store(self, layer, k, v):
        """Keep k and v, (B, H, T, D), of a layer; all its keys and values so far, and the mask or None."""
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.places], values[:, :, self.places] = k, v
        if self.static:
            return keys, values, self.mask
        return keys[:, :, : self.length], values[:, :, : self.length], None

    def take(self, other, rows):
        """Copy the content of another cache's only row into `rows`, a slice."""
        self.keys[:, rows, :, : other.length] = other.keys[:, :, :, : other.length]
        self.values[:, rows, :, : other.length] = other.values[:, :, :, : other.length]
        self.length = self.length.fill_(other.length) if self.static else other.length


class GraphedStep:
    """`GPT.step` for one token a row as a CUDA graph: one launch instead of some hundreds. `cache` is static."""

    def __init__(self, model, cache):
        self.idx = torch.zeros((cache.keys.size(1), 1), dtype=torch.int64, device=cache.keys.device)
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries make their workspaces, which a capture may not
            model.step(self.idx, cache)
        torch.cuda.current_stream().wait_stream(stream)
        cache.length.zero_()
        with torch.cuda.graph(self.graph):
            self.logits = model.step(self.idx, cache)
        cache.length.zero_()

    def __call__(self, idx, cache):
        self.idx.copy_(idx)
        self.graph.replay()
        return self.logits


def penalised(logits, penalty):
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def choose_tokens(logits, uniforms, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Draw a token for each row of logits, float (B, V), with uniforms, float64 (B,) in [0, 1): int64 (B,).

    temperature 0 takes the likeliest. Else the logits are divided by it, and in this order top_k > 0
    keeps the k likeliest, top_p < 1 the fewest likeliest that hold so much probability (nucleus, Holtzman
    et al. 2020), min_p > 0 those at least min_p times as likely as the likeliest (Nguyen et al. 2024).
    """
    device = logits.device
    if temperature == 0:
        return logits.argmax(dim=-1)
    if device.type == "mps":
        logits = logits.cpu()  # it has no float64
    ids = None
    if 0 < top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)  # from the likeliest down
    elif top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    logits = logits.double()
    p = F.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    if top_p < 1:
        p = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0)
    if min_p > 0:
        p = p.masked_fill(p < min_p * p.amax(dim=-1, keepdim=True), 0)
    cumulative = p.cumsum(dim=-1)
    # The first place whose cumulative probability is over uniform * total: never one of probability 0.
    drawn = torch.searchsorted(cumulative, uniforms.to(p.device)[:, None] * cumulative[:, -1:], right=True)
    return (drawn if ids is None else ids.gather(-1, drawn))[:, 0].to(device)


class PackedLinear(nn.Module):
    """A linear layer, for inference on CPUs, whose weights lie in the order in which oneDNN's kernels read them.

    With a few rows of input, as in decoding, it reads weights near the memory's full bandwidth, where a plain
    layer is 2 to 4 times slower. An output row depends on its input row alone, bit for bit.
    """

    def __init__(self, linear):
        super().__init__()
        self.out_features = linear.out_features
        # Where a gradient is wanted, oneDNN takes other kernels.
        self.bias = None if linear.bias is None else linear.bias.detach()
        # The layout for 16 rows serves 1 and 1,000 as well.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 16)
        # The kernel for one row may sum in another order than the one for more.
        rows = torch.arange(2.0 * linear.in_features).sin().view(2, -1).to(linear.weight.dtype)
        self.fewest_rows = 1 if torch.equal(self.product(rows[:1]), self.product(rows)[:1]) else 2

    def product(self, rows):
        return torch.ops.mkldnn._linear_pointwise.default(rows, self.weight, self.bias, "none", [], "")

    def forward(self, x):
        """x (..., in_features) -> (..., out_features)."""
        rows = x.flatten(0, -2)
        if len(rows) < self.fewest_rows:
            return self.product(rows.expand(2, -1).contiguous())[:1].view(*x.shape[:-1], self.out_features)
        return self.product(rows).view(*x.shape[:-1], self.out_features)


class CenteredHead(nn.Module):
    """An output layer with the mean embedding taken out of its weights, for those of fewer bits.

    GPT-2's logits have a large part in common, and bfloat16 steps of 0.5 at 100. That part, which no softmax
    sees, is computed in float32.
    """

    def __init__(self, linear, vocab_size):
        super().__init__()
        self.register_buffer("mean", linear.weight[:vocab_size].mean(dim=0))
        self.rest = nn.Linear(*linear.weight.t().shape, bias=False, device="meta")
        self.rest.weight = nn.Parameter(linear.weight - self.mean, requires_grad=False)

    def forward(self, x):
        """x (..., C) -> float32 (..., V)."""
        return self.rest(x).float() + (x.float() @ self.mean)[..., None]


def prepare_for_inference(model, device, dtype):
    """A GPT on `device` with weights of `dtype`, in eval mode; on CPUs its linear layers become PackedLinear.

    It cannot be trained or saved any more.
    """
    model.requires_grad_(False).eval()
    if dtype != torch.float32:
        model.lm_head = CenteredHead(model.lm_head, model.config.vocab_size)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)  # one by one; buffers, the tables, stay float32
    model.to(device)
    if device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available():
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, PackedLinear(child))
    return model
