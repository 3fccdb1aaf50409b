"""Fast replacements for slow operations, each equivalent to the plain form that its docstring names."""

import ctypes
import math
import platform

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -1  # a target that no loss counts
QUERIES_PER_CHUNK = 128  # in attention on a CPU
# MKL chooses its code for exp, sin and the like at the first call. Two threads that make it at once may get different
# code, and a process other bits than the next.
torch.zeros(1).exp()
# glibc returns large blocks to the system when they are freed, and each page of a new one costs a fault. Keep them:
# M_MMAP_THRESHOLD and M_TRIM_THRESHOLD at their highest.
if platform.libc_ver()[0] == "glibc":
    for parameter in (-3, -1):
        ctypes.CDLL(None).mallopt(parameter, 2**31 - 1)
MAX_LOGITS = 2**27  # held at a time by linear_cross_entropy: half a GiB in float32
MAX_FUSED_LOGITS = 2**29  # where a compiler keeps them in 16 bits: 1 GiB


def keep_mask(shape: torch.Size, dropout: float, device: torch.device) -> Tensor:
    """Ones with probability 1 - dropout, else zeros, bfloat16, from the default generator, like `bernoulli_`.

    Sixteen random bits per element, compared in place and turned into the bits of 1.0: five times as fast
    on a CPU. The probability is rounded to a multiple of 1 / 65536.
    """
    if torch.compiler.is_compiling():  # compiled code cannot view one dtype as another
        return (torch.rand(shape, device=device) >= dropout).bfloat16()
    n = math.prod(shape)
    bits = torch.empty(-(-n // 4), dtype=torch.int64, device=device).random_(-(2**63), None).view(torch.int16)[:n]
    threshold = round((1 - dropout) * 2**16) - 2**15
    return bits.lt_(min(threshold, 2**15 - 1)).mul_(0x3F80).view(torch.bfloat16).view(shape)


class Dropout(nn.Dropout):
    """nn.Dropout, faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.p and x.device.type == "cpu":
            return x * keep_mask(x.shape, self.p, x.device).to(x.dtype) * (1 / (1 - self.p))
        return super().forward(x)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout) of (B, H, T, D).

    PyTorch's CPU kernel computes in float32 internally, and does not take dropout; products in chunks of queries,
    without the keys after them, are two to five times as fast.
    """
    is_slow = q.device.type == "cpu" and (q.dtype == torch.bfloat16 or dropout > 0)
    if not is_slow or q.size(2) > 4 * QUERIES_PER_CHUNK:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    scale = q.size(-1) ** -0.5
    q, k, values = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    if dropout:
        values = values * (1 / (1 - dropout))
    parts = []
    for start in range(0, q.size(1), QUERIES_PER_CHUNK):
        end = min(start + QUERIES_PER_CHUNK, q.size(1))
        mask = torch.full((end - start, end), -math.inf, dtype=q.dtype).triu(start + 1)
        weights = F.softmax(torch.baddbmm(mask, q[:, start:end], k[:, :end].transpose(1, 2), alpha=scale), dim=-1)
        if dropout:
            weights = weights * keep_mask(weights.shape, dropout, q.device).to(weights.dtype)
        parts.append(weights @ values[:, :end])
    return torch.cat(parts, dim=1).view_as(v)


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """a.T @ b for `a` with entries in [-1, 1]; float32 on CUDA, and for float16, whose sums could overflow."""
    if a.is_cuda and a.dtype != torch.float32 and torch.version.cuda:
        return torch.mm(a.T, b, out_dtype=torch.float32)
    if a.dtype != torch.float16:
        return a.T @ b
    limit = torch.finfo(a.dtype).max / (len(a) * b.abs().amax().float())
    scale = torch.exp2(torch.floor(torch.log2(limit))).clamp(max=1.0)  # a power of two: exact
    return (a.T @ (b * scale).to(b.dtype)).float() / scale


def loss_and_gradient(logits: Tensor, ids: Tensor, vocab_size: int, wants_gradient: bool
                      ) -> tuple[Tensor, Tensor | None]:
    """Sum of the cross-entropies of logits (N, V) for targets ids, int64 (N,), and its gradient by the logits; float32.

    ids of IGNORE_INDEX do not count, logits from vocab_size on are taken as -inf. The gradient is None if not wanted.
    """
    logits = logits.float()
    logits[:, vocab_size:] = -math.inf
    log_p = F.log_softmax(logits, dim=-1)
    counts, ids = ids[:, None] != IGNORE_INDEX, ids[:, None].clamp(min=0)
    loss = -(log_p.gather(1, ids) * counts).sum()
    if not wants_gradient:
        return loss, None
    dlogits = log_p.exp_().scatter_add_(1, ids, torch.full_like(ids, -1, dtype=torch.float32))
    return loss, dlogits * counts


def fusible_loss_and_gradient(logits: Tensor, ids: Tensor, vocab_size: int, wants_gradient: bool
                              ) -> tuple[Tensor, Tensor | None]:
    """The same from operations on rows and single elements: compiled, no float32 (N, V) is ever in memory."""
    numbers = torch.arange(logits.size(1), device=logits.device)
    log_p = F.log_softmax(torch.where(numbers < vocab_size, logits.float(), -math.inf), dim=-1)
    counts, ids = ids[:, None] != IGNORE_INDEX, ids[:, None].clamp(min=0)
    loss = -(log_p.gather(1, ids) * counts).sum()
    return loss, (log_p.exp() - (numbers == ids).float()) * counts if wants_gradient else None


class LinearCrossEntropy(torch.autograd.Function):
    """F.cross_entropy of x @ weight.T, in chunks of rows; gradients are computed along the way, no logits are kept.

    The same products as the plain form, no recomputation (as in Liger Kernel, Hsu et al. 2024).
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, targets: Tensor,
                vocab_size: int, dtype: torch.dtype, wants_gradient: bool) -> Tensor:
        of_chunk, rows = loss_and_gradient, max(1, MAX_LOGITS // len(weight))
        if x.is_cuda and torch.compiler.is_compiling():
            # Few chunks of one size, a multiple of the products' tiles: one set of compiled kernels serves all.
            n_chunks = math.ceil(len(x) * len(weight) / MAX_FUSED_LOGITS)
            of_chunk, rows = fusible_loss_and_gradient, math.ceil(len(x) / n_chunks / 128) * 128
        w, total = weight.to(dtype), torch.zeros((), device=x.device)
        dx, dweight = [], torch.zeros_like(weight, dtype=torch.float32) if wants_gradient else None
        for states, ids in zip(x.to(dtype).split(rows), targets.split(rows)):
            loss, dlogits = of_chunk(states @ w.T, ids, vocab_size, wants_gradient)
            total = total + loss
            if wants_gradient:
                dlogits = dlogits.to(dtype)  # divided by the number of targets later, since float16 might underflow
                dx.append(dlogits @ w)
                dweight += sum_of_products(dlogits, states)
        n = (targets != IGNORE_INDEX).sum()
        if wants_gradient:
            ctx.save_for_backward(torch.cat(dx), dweight, n)
            ctx.dtypes = x.dtype, weight.dtype
        return total / n

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, n = ctx.saved_tensors
        share = gradient / n
        return (dx.float() * share).to(ctx.dtypes[0]), (dweight * share).to(ctx.dtypes[1]), None, None, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Mean cross-entropy in nats, float32, of the logits x @ weight.T; targets of IGNORE_INDEX do not count.

    x (N, C), weight (V, C), targets int64 (N,); logits from vocab_size on (padding) count as -inf. The
    products are in autocast's dtype where it is on.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    # Decided here: inside a Function gradients are off, and needs_input_grad ignores no_grad.
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return LinearCrossEntropy.apply(x, weight, targets, vocab_size, dtype, wants_gradient)


class PackedLinear(nn.Module):
    """nn.Linear for inference on CPUs, its weights in the order in which oneDNN's kernels read them.

    With a few rows of input, as in decoding, it reads weights near the memory's full bandwidth, where a plain
    layer is 2 to 4 times slower. An output row depends on its input row alone, bit for bit.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features = linear.out_features
        # Tensors that require gradients would select other oneDNN kernels.
        self.bias = None if linear.bias is None else linear.bias.detach()
        # The layout for 16 rows serves 1 and 1,000 as well.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 16)
        # The kernel for one row may sum in a different order from the one for several.
        rows = torch.arange(2.0 * linear.in_features).sin().view(2, -1).to(linear.weight.dtype)
        self.min_rows = 1 if torch.equal(self.product(rows[:1]), self.product(rows)[:1]) else 2

    @staticmethod
    def is_available(dtype: torch.dtype) -> bool:
        """Whether this build and processor have the kernels for `dtype`: in bfloat16, AVX2 alone does not suffice."""
        has_kernels = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
        return has_kernels and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def product(self, rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(rows, self.weight, self.bias, "none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        rows = x.flatten(0, -2)
        if len(rows) < self.min_rows:
            return self.product(rows.expand(2, -1).contiguous())[:1].view(*x.shape[:-1], self.out_features)
        return self.product(rows).view(*x.shape[:-1], self.out_features)
