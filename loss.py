"""The output layer's cross-entropy, without all logits at once."""

import math

import torch
import torch.nn.functional as F

MOST_LOGITS = 2**27  # held at a time: half a GiB in float32


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of x @ weight.T, rows in chunks whose gradients are computed at once, so nothing is kept of them.

    The same products as the plain form, no recomputation (as in Liger Kernel, Hsu et al. 2024).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, dtype):
        rows = max(1, MOST_LOGITS // len(weight))
        w, total = weight.to(dtype), torch.zeros((), device=x.device)
        wants_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dx, dweight = [], torch.zeros_like(weight, dtype=torch.float32) if wants_gradient else None
        for states, ids in zip(x.to(dtype).split(rows), targets.split(rows)):
            logits = (states @ w.T).float()
            logits[:, vocab_size:] = -math.inf
            log_p = F.log_softmax(logits, dim=-1)
            counts, ids = ids[:, None] >= 0, ids[:, None].clamp(min=0)
            total = total - (log_p.gather(1, ids) * counts).sum()
            if wants_gradient:
                # The gradient by the logits; divided by the number of targets later, which float16 may not hold.
                dlogits = log_p.exp_().scatter_add_(1, ids, torch.full_like(ids, -1, dtype=torch.float32))
                dlogits = (dlogits * counts).to(dtype)
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
        return (dx.float() * share).to(ctx.dtypes[0]), (dweight * share).to(ctx.dtypes[1]), None, None, None


def linear_cross_entropy(x, weight, targets, vocab_size):
    """Mean cross-entropy in nats, float32, of the logits x @ weight.T against targets, those of -1 left out.

    x (N, C), weight (V, C), targets int64 (N,); logits from vocab_size on (padding) count as -inf. The
    products are in autocast's dtype where it is on.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return LinearCrossEntropy.apply(x, weight, targets, vocab_size, dtype)
