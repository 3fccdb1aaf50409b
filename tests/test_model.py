import math
from itertools import product

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from config import TrainConfig
from loss import fused_loss_and_gradient, linear_cross_entropy, loss_and_gradient
from model import (
    GPT,
    GPT2_SIZES,
    Dropout,
    GPTConfig,
    causal_attention,
    keep_mask,
    rotate,
    rotation_angles,
    sinusoidal_table,
)
from train_gpt2 import make_optimizer

FAMILIES = {
    "gpt2": dict(norm="layernorm", mlp="gelu", pos="learned"),
    "modern": dict(norm="rmsnorm", mlp="swiglu", pos="sinusoidal", bias=False),
    "rope": dict(norm="rmsnorm", mlp="relu2", pos="rope", bias=False, tie_weights=False),
}


def make(family="gpt2", seed=0, **changes):
    shape = dict(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=32) | FAMILIES[family] | changes
    torch.manual_seed(seed)
    return GPT(GPTConfig(**shape)).eval()


def copy_from_hugging_face(model, theirs):
    """Load the weights of a GPT2LMHeadModel, whose Conv1D layers are transposed, into a GPT of ours."""
    state = model.state_dict()
    for name, value in theirs.state_dict().items():
        value = value.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else value
        state[name][: len(value)] = value
    model.load_state_dict(state)


@pytest.mark.parametrize("vocab_size", [50, 1030])
def test_gpt2_family_equals_hugging_face(vocab_size):
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=64, n_embd=48, n_layer=3, n_head=4,
                                        initializer_range=0.2)).eval()
    model = make(vocab_size=vocab_size, block_size=64, n_layer=3, n_head=4, n_embd=48)
    copy_from_hugging_face(model, theirs)
    idx = torch.randint(vocab_size, (2, 64))
    targets = torch.cat((idx[:, 1:], torch.full((2, 1), -1)), dim=1)
    with torch.no_grad():
        logits, loss = model(idx)[0], model(idx, targets)[1]
        expected = theirs(idx, labels=idx)
    assert logits.shape == (2, 64, vocab_size) and logits.std() > 0.5
    assert (logits - expected.logits).abs().max() < 1e-5
    assert abs(loss - expected.loss) < 1e-5
    assert model(idx)[1] is None


@pytest.mark.parametrize("name, n_params", [("gpt2", 124_439_808), ("gpt2-xl", 1_557_611_200)])
def test_gpt2_sizes(name, n_params):
    with torch.device("meta"):
        model = GPT(GPTConfig.gpt2(name))
    padding = (50304 - 50257) * model.config.n_embd
    positions = 1024 * model.config.n_embd
    assert sum(p.numel() for p in model.parameters()) - padding == n_params
    assert model.n_params() - padding == n_params - positions
    assert set(GPT2_SIZES) == {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"}


@pytest.mark.parametrize("norm, mlp, pos, bias, tie", list(product(
    ("layernorm", "rmsnorm"), ("gelu", "swiglu", "relu2"), ("learned", "sinusoidal", "rope"), (True, False),
    (True, False))))
def test_every_combination_starts_near_uniform_and_sees_only_the_past(norm, mlp, pos, bias, tie):
    model = make(norm=norm, mlp=mlp, pos=pos, bias=bias, tie_weights=tie, vocab_size=65, n_embd=64)
    idx = torch.randint(65, (4, 16))
    changed = idx.clone()
    changed[:, 9:] = (idx[:, 9:] + 1) % 65
    targets = torch.randint(65, (4, 16))
    with torch.no_grad():
        logits, loss = model(idx, targets)
        assert abs(loss / math.log(65) - 1) < 0.03
        assert torch.allclose(model(changed)[0][:, :9], logits[:, :9], atol=1e-6)
        assert not torch.allclose(model(changed)[0][:, 9:], logits[:, 9:], atol=1e-3)
    has_bias = any(name.endswith("bias") for name, _ in model.named_parameters())
    assert has_bias == bias
    assert (model.lm_head.weight is model.transformer.wte.weight) == tie


@pytest.mark.parametrize("family", FAMILIES)
def test_order_matters(family):
    """Without positions, attention over {a, b} would see (a, b, c) and (b, a, c) as the same."""
    model = make(family)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    a, b = (model(torch.tensor([tokens]))[0][0, -1] for tokens in ([1, 2, 3], [2, 1, 3]))
    assert (a - b).abs().max() > 1e-4


def test_rotary_positions_are_complex_rotations():
    x = torch.randn(1, 1, 5, 8)
    angles = rotation_angles(5, 8)
    turned = rotate(x, angles.cos().float(), angles.sin().float())
    for t, i in product(range(5), range(4)):
        expected = complex(x[0, 0, t, i], x[0, 0, t, i + 4]) * np.exp(1j * t / 10000 ** (2 * i / 8))
        assert abs(complex(turned[0, 0, t, i], turned[0, 0, t, i + 4]) - expected) < 1e-5


def test_sinusoidal_table():
    table = sinusoidal_table(20, 6)
    for t, i in product(range(20), range(3)):
        assert abs(table[t, 2 * i] - math.sin(t / 10000 ** (2 * i / 6))) < 1e-6
        assert abs(table[t, 2 * i + 1] - math.cos(t / 10000 ** (2 * i / 6))) < 1e-6


def test_initialisation_is_gpt2s():
    model = make(n_embd=256, n_layer=8, vocab_size=500)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all()
        elif p.dim() == 2:
            std = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
            assert abs(p.std() / std - 1) < 0.05, name


def test_weight_decay_is_for_matrices_only():
    model = make("gpt2")
    cfg = TrainConfig(weight_decay=0.3)
    decayed, rest = make_optimizer(model, cfg, torch.device("cpu")).param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in rest["params"]} == {1}
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_padded_vocabulary_is_never_seen():
    model = make(vocab_size=1030)
    assert model.transformer.wte.weight.shape[0] == 1088 and GPTConfig().padded_vocab_size == 50304
    with torch.no_grad():
        model.transformer.wte.weight[1030:] = 100.0
    idx = torch.randint(1030, (3, 16))
    logits, loss = model(idx)[0], model(idx, idx)[1]
    assert logits.shape[-1] == 1030 and loss < 10
    assert model.generate(idx, 30, num_samples=2, temperature=50.0).max() < 1030


@pytest.mark.parametrize("family", ["gpt2", "modern"])
def test_a_batch_of_8_is_overfitted(family):
    model = make(family, n_embd=64).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(1))
    for _ in range(150):
        _, loss = model(x[:, :-1], x[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # A window's first target has no context to be told from; the batch's 8 windows start differently.
    assert len(set(x[:, 0].tolist())) == 8 and loss < 0.05


def test_impossible_shapes():
    with pytest.raises(ValueError, match="n_head"):
        make(n_embd=30, n_head=4)
    with pytest.raises(ValueError, match="block_size"):
        make()(torch.zeros(1, 17, dtype=torch.int64))


def test_flops_per_token_of_gpt2():
    with torch.device("meta"):
        model = GPT(GPTConfig.gpt2("gpt2", bias=False))
    assert model.flops_per_token() / 1e6 == pytest.approx(854.5, abs=0.5)


# What is faster than PyTorch's own

@pytest.mark.parametrize("length", [1, 5, 128, 129, 300])
def test_attention_on_a_cpu_is_pytorchs(length):
    torch.manual_seed(0)
    *inputs, weight = torch.randn(4, 2, 3, length, 16)
    exact, fast = ([part.to(dtype, copy=True).requires_grad_() for part in inputs]
                   for dtype in (torch.float32, torch.bfloat16))
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=True)
    result = causal_attention(*fast, dropout=0.0)
    (expected * weight).sum().backward()
    (result * weight).sum().backward()
    pairs = [(result, expected), *((a.grad, b.grad) for a, b in zip(fast, exact))]
    assert all((a.float() - b).norm() < 0.02 * (b.norm() + 0.1) for a, b in pairs)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 1e-7])
def test_dropped_elements_are_as_many_as_asked_for(dropout):
    torch.manual_seed(0)
    mask = keep_mask((1001, 999), dropout, torch.device("cpu"))
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert abs((mask == 0).float().mean().item() - dropout) < 0.002
    values = torch.ones(64, 4, 200, 8, dtype=torch.bfloat16)
    attended = causal_attention(torch.zeros_like(values), torch.zeros_like(values), values, dropout).float()
    assert abs(attended.mean().item() - 1) < 0.01
    dropped = Dropout(dropout)(values).float()
    assert abs(dropped.mean().item() - 1) < 0.01 and (dropped == 0).float().mean() < dropout + 0.01
    assert torch.equal(Dropout(dropout).eval()(values), values)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_loss_of_a_large_vocabulary_in_parts_is_the_plain_one(monkeypatch, dtype, tolerance):
    monkeypatch.setattr("loss.MOST_LOGITS", 5 * 64)  # chunks of five rows
    torch.manual_seed(0)
    x, weight, targets = torch.randn(17, 8), torch.randn(64, 8), torch.randint(60, (17,))
    targets[3] = targets[16] = -1
    plain, parts = ([x.clone().requires_grad_(), weight.clone().requires_grad_()] for _ in range(2))
    logits = (plain[0] @ plain[1].T)[:, :60]
    expected = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        result = linear_cross_entropy(*parts, targets, vocab_size=60)
    for loss in (expected, result):
        (3 * loss).backward()
    assert result.item() == pytest.approx(expected.item(), rel=tolerance)
    assert all((a.grad - b.grad).norm() < tolerance * b.grad.norm() for a, b in zip(parts, plain))
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, targets, 60).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_form_for_compilers_gives_the_same_loss_and_gradient(dtype):
    logits, ids = (4 * torch.randn(50, 64)).to(dtype), torch.randint(60, (50,))
    ids[::7] = -1
    logits[3, 62] = 100  # a row that pads the vocabulary
    for wants_gradient in (True, False):
        (nats, gradient), (expected, d) = (f(logits.clone(), ids, 60, wants_gradient)
                                           for f in (fused_loss_and_gradient, loss_and_gradient))
        assert nats.item() == pytest.approx(expected.item(), rel=1e-6)
        assert (gradient is None and d is None) if not wants_gradient else torch.allclose(gradient, d, atol=1e-6)


def test_without_gradients_the_loss_computes_none(monkeypatch):
    asked = []
    monkeypatch.setattr("loss.loss_and_gradient",
                        lambda *args: asked.append(args[-1]) or loss_and_gradient(*args))
    model = make(vocab_size=1030)
    idx = torch.randint(1030, (2, 16))
    model(idx, idx)[1].backward()
    with torch.no_grad():
        model(idx, idx)
    with torch.inference_mode():
        model(idx, idx)
    model.requires_grad_(False)(idx, idx)
    assert asked == [True, False, False, False]
