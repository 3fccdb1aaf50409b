"""Each fast form against the plain form that it replaces."""

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU
from torch.utils.flop_counter import FlopCounterMode

from lib.kernels import (
    IGNORE_INDEX,
    Dropout,
    PackedLinear,
    causal_attention,
    fusible_loss_and_gradient,
    keep_mask,
    linear_cross_entropy,
    loss_and_gradient,
)


@pytest.mark.parametrize("length", [1, 5, 128, 129, 300])
@pytest.mark.parametrize("dtype, dropout", [(torch.bfloat16, 0.0), (torch.float32, 1e-7)])
def test_attention_on_a_cpu_equals_pytorchs(length, dtype, dropout):
    torch.manual_seed(0)
    *inputs, weight = torch.randn(4, 2, 3, length, 16)
    exact, fast = ([part.to(kind, copy=True).requires_grad_() for part in inputs] for kind in (torch.float32, dtype))
    expected = F.scaled_dot_product_attention(*exact, is_causal=True)
    result = causal_attention(*fast, dropout)
    assert result.dtype == dtype
    (expected * weight).sum().backward()
    (result * weight).sum().backward()
    pairs = [(result, expected), *((a.grad, b.grad) for a, b in zip(fast, exact))]
    assert all((a.float() - b).norm() < 0.02 * (b.norm() + 0.1) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_dropout_keeps_the_mean(dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 12, 8)
    results = causal_attention(*(part.to(dtype).expand(4000, -1, -1, -1) for part in (q, k, v)), dropout=0.5).float()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (results.mean(dim=0) - expected[0]).norm() < 0.03 * expected.norm()
    assert results.std(dim=0).mean() > 0.1


@pytest.mark.parametrize("dropout", [0.1, 0.5, 1e-7])
def test_dropout_drops_the_share_asked_for_and_keeps_the_mean(dropout):
    torch.manual_seed(0)
    mask = keep_mask((1001, 999), dropout, CPU)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert abs((mask == 0).float().mean().item() - dropout) < 0.002
    values = torch.ones(64, 4, 200, 8, dtype=torch.bfloat16)
    attended = causal_attention(torch.zeros_like(values), torch.zeros_like(values), values, dropout).float()
    assert abs(attended.mean().item() - 1) < 0.01
    dropped = Dropout(dropout)(values).float()
    assert abs(dropped.mean().item() - 1) < 0.01 and (dropped == 0).float().mean() < dropout + 0.01
    assert torch.equal(Dropout(dropout).eval()(values), values)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_loss_computed_in_chunks_equals_the_plain_loss(monkeypatch, dtype, tolerance):
    monkeypatch.setattr("lib.kernels.MAX_LOGITS", 5 * 64)  # chunks of five rows
    torch.manual_seed(0)
    x, weight, targets = torch.randn(17, 8), torch.randn(64, 8), torch.randint(60, (17,))
    targets[3] = targets[16] = -1
    plain, chunked = ([x.clone().requires_grad_(), weight.clone().requires_grad_()] for _ in range(2))
    logits = (plain[0] @ plain[1].T)[:, :60]
    expected = F.cross_entropy(logits, targets, ignore_index=-1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        result = linear_cross_entropy(*chunked, targets, vocab_size=60)
    for loss in (expected, result):
        (3 * loss).backward()
    assert result.item() == pytest.approx(expected.item(), rel=tolerance)
    assert all((a.grad - b.grad).norm() < tolerance * b.grad.norm() for a, b in zip(chunked, plain))
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, targets, 60).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wants_gradient", [True, False])
def test_the_form_for_compilers_gives_the_same_loss_and_gradient(dtype, wants_gradient):
    torch.manual_seed(0)
    logits, ids = (4 * torch.randn(50, 64)).to(dtype), torch.randint(60, (50,))
    ids[::7] = IGNORE_INDEX
    logits[3, 62] = 100  # padding
    (loss, gradient), (expected, plain) = (
        form(logits.clone(), ids, 60, wants_gradient) for form in (fusible_loss_and_gradient, loss_and_gradient))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (gradient is plain is None) if not wants_gradient else torch.allclose(gradient, plain, atol=1e-6)


def test_no_sum_overflows_in_float16():
    """4,000 states of 20 with one target: its row of the weight's gradient is -80,000 before the mean is taken."""
    x = torch.full((4000, 8), 20.0) + torch.randn(4000, 8)
    weight, targets = torch.zeros(64, 8), torch.full((4000,), 7)
    grads = []
    for dtype in (torch.float32, torch.float16):
        w = weight.to(dtype, copy=True).requires_grad_()
        linear_cross_entropy(x.to(dtype), w, targets, vocab_size=64).backward()
        grads.append(w.grad.float())
    assert grads[0][7].abs().min() * 4000 > torch.finfo(torch.float16).max
    assert (grads[1] - grads[0]).norm() < 2e-3 * grads[0].norm()


def test_the_loss_computes_gradients_only_where_they_are_wanted():
    x, weight, targets = torch.randn(17, 8), torch.randn(64, 8), torch.randint(64, (17,))
    one_product = 2 * 17 * 8 * 64

    def flops(x, weight):
        with FlopCounterMode(display=False) as counter:
            linear_cross_entropy(x, weight, targets, 64)
        return counter.get_total_flops()

    assert flops(x, weight) == one_product
    assert flops(x.clone().requires_grad_(), weight.clone().requires_grad_()) == 3 * one_product
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            assert flops(x.clone().requires_grad_(), weight) == one_product


@pytest.mark.parametrize("width", [48, 3072])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_packed_layer_equals_the_layer(rows, width):
    """The kernel for a single row sums many columns in another order than the one for several."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(width, width // 4)
    x = torch.randn(1, rows, width)
    packed = PackedLinear(linear)
    assert torch.allclose(packed(x), linear(x), atol=1e-5)
    assert torch.equal(packed(x)[:, :1], packed(x[:, :1]))
