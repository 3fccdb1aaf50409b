"""The output layer's cross-entropy, without all logits at once."""

import math

import torch
import torch.nn.functional as F

MOST_LOGITS = 2**27  # held at a time: half a GiB in float32
MOST_FUSED_LOGITS = 2**30  # where a compiler fuses what follows them, and they stay in 16 bits: 2 GiB


def loss_and_gradient(logits, ids, vocab_size, wants_gradient):
    """(sum of the losses, gradient by the logits or None), float32, of logits (N, V) for targets ids, int64 (N,)."""
    logits = logits.float()
    logits[:, vocab_size:] = -math.inf
    log_p = F.log_softmax(logits, dim=-1)
    counts, ids = ids[:, None] >= 0, ids[:, None].clamp(min=0)
    loss = -(log_p.gather(1, ids) * counts).sum()
    if not wants_gradient:
        return loss, None
    dlogits = log_p.exp_().scatter_add_(1, ids, torch.full_like(ids, -1, dtype=torch.float32))
    return loss, dlogits * counts


def fused_loss_and_gradient(logits, ids, vocab_size, wants_gradient):
    """As loss_and_gradient, in operations on rows and single elements: a compiler keeps no float32 (N, V) of them."""
    numbers = torch.arange(logits.size(1), device=logits.device)
    log_p = F.log_softmax(torch.where(numbers < vocab_size, logits.float(), -math.inf), dim=-1)
    counts, ids = ids[:, None] >= 0, ids[:, None].clamp(min=0)
    loss = -(log_p.gather(1, ids) * counts).sum()
    return loss, (log_p.exp() - (numbers == ids).float()) * counts if wants_gradient else None


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of x @ weight.T, rows in chunks whose gradients are computed at once, so nothing is kept of them.

    The same products as the plain form, no recomputation (as in Liger Kernel, Hsu et al. 2024).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, dtype, wants_gradient):
        fused = x.is_cuda and torch.compiler.is_compiling()
        of_chunk, most = (fused_loss_and_gradient, MOST_FUSED_LOGITS) if fused else (loss_and_gradient, MOST_LOGITS)
        rows = max(1, most // len(weight))
        if fused:  # chunks of one size, for which one set of kernels is enough
            rows = math.ceil(len(x) / math.ceil(len(x) / rows))
        w, total = weight.to(dtype), torch.zeros((), device=x.device)
        dx, dweight = [], torch.zeros_like(weight, dtype=torch.float32) if wants_gradient else None
        for states, ids in zip(x.to(dtype).split(rows), targets.split(rows)):
            loss, dlogits = of_chunk(states @ w.T, ids, vocab_size, wants_gradient)
            total = total + loss
            if wants_gradient:
                # Divided by the number of targets later, which float16 may not hold.
                dlogits = dlogits.to(dtype)
                dx.append(dlogits @ w)
                dweight += dlogits.T @ states
        n = (targets >= 0).sum()
        if wants_gradient:
            ctx.save_for_backward(torch.cat(dx), dweight, n)
            ctx.dtypes = x.dtype, weight.dtype
        return total / n

    @staticmethod
    def backward(ctx, gradient):
        dx, dweight, n = ctx.saved_tensors
        share = gradient / n
        return (dx.float() * share).to(ctx.dtypes[0]), (dweight * share).to(ctx.dtypes[1]), None, None, None, None


def linear_cross_entropy(x, weight, targets, vocab_size):
    """Mean cross-entropy in nats, float32, of the logits x @ weight.T against targets, those of -1 left out.

    x (N, C), weight (V, C), targets int64 (N,); logits from vocab_size on (padding) count as -inf. The
    products are in autocast's dtype where it is on.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    # Asked here: inside a Function needs_input_grad is true under no_grad too, and gradients are never enabled.
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return LinearCrossEntropy.apply(x, weight, targets, vocab_size, dtype, wants_gradient)
