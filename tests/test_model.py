import math
from itertools import product

import numpy as np
import pytest
import torch
from helpers import FAMILIES, make_model
from transformers import GPT2Config, GPT2LMHeadModel

from model import GPT, GPT2_SIZES, GPTConfig, rotate, rotation_angles, sinusoidal_table


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
    model = make_model(vocab_size=vocab_size, block_size=64, n_layer=3, n_head=4, n_embd=48)
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
        model = GPT(GPTConfig(**GPT2_SIZES[name]))
    padding = (50304 - 50257) * model.config.n_embd
    positions = 1024 * model.config.n_embd
    assert sum(p.numel() for p in model.parameters()) - padding == n_params
    assert model.n_params() - padding == n_params - positions
    assert set(GPT2_SIZES) == {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"}


@pytest.mark.parametrize("norm, mlp, pos, bias, tie", list(product(
    ("layernorm", "rmsnorm"), ("gelu", "gelu_erf", "swiglu", "relu2"), ("learned", "sinusoidal", "rope"), (True, False),
    (True, False))))
def test_every_combination_starts_near_uniform_and_sees_only_the_past(norm, mlp, pos, bias, tie):
    model = make_model(norm=norm, mlp=mlp, pos=pos, bias=bias, tie_weights=tie, vocab_size=65, n_embd=64)
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
    model = make_model(family)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    a, b = (model(torch.tensor([tokens]))[0][0, -1] for tokens in ([1, 2, 3], [2, 1, 3]))
    assert (a - b).abs().max() > 1e-4


def test_rotary_positions_are_complex_rotations():
    x = torch.randn(1, 1, 5, 8)
    angles = rotation_angles(5, 8, torch.float64)
    turned = rotate(x, angles.cos().float(), angles.sin().float())
    for t, i in product(range(5), range(4)):
        expected = complex(x[0, 0, t, i], x[0, 0, t, i + 4]) * np.exp(1j * t / 10000 ** (2 * i / 8))
        assert abs(complex(turned[0, 0, t, i], turned[0, 0, t, i + 4]) - expected) < 1e-5


def test_sinusoidal_table():
    table = sinusoidal_table(20, 6)
    for t, i in product(range(20), range(3)):
        assert abs(table[t, 2 * i] - math.sin(t / 10000 ** (2 * i / 6))) < 1e-6
        assert abs(table[t, 2 * i + 1] - math.cos(t / 10000 ** (2 * i / 6))) < 1e-6


def test_initialization_is_gpt2s():
    model = make_model(n_embd=256, n_layer=8, vocab_size=500)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all()
        elif p.dim() == 2:
            std = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
            assert abs(p.std() / std - 1) < 0.05, name


def test_vocabulary_padding_never_shows():
    model = make_model(vocab_size=1030)
    assert model.transformer.wte.weight.shape[0] == 1088 and GPTConfig().padded_vocab_size == 50304
    with torch.no_grad():
        model.transformer.wte.weight[1030:] = 100.0
    idx = torch.randint(1030, (3, 16))
    logits, loss = model(idx)[0], model(idx, idx)[1]
    assert logits.shape[-1] == 1030 and loss < 10


@pytest.mark.parametrize("family", ["gpt2", "modern"])
def test_a_batch_of_8_is_overfitted(family):
    model = make_model(family, n_embd=64).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(1))
    for _ in range(150):
        _, loss = model(x[:, :-1], x[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # A window's first target has only the first token as context: the 8 windows start differently.
    assert len(set(x[:, 0].tolist())) == 8 and loss < 0.05


def test_impossible_shapes():
    with pytest.raises(ValueError, match="n_head"):
        make_model(n_embd=30, n_head=4)
    for changes in (dict(norm="RMSNorm"), dict(mlp="silu"), dict(pos="alibi"), dict(pos=None)):
        with pytest.raises(ValueError, match=r"(norm|mlp|pos) ('RMSNorm'|'silu'|'alibi'|None) is none of "):
            make_model(**changes)
    with pytest.raises(ValueError, match="block_size"):
        make_model()(torch.zeros(1, 17, dtype=torch.int64))


def test_flops_per_token_of_gpt2():
    with torch.device("meta"):
        model = GPT(GPTConfig(bias=False))
    assert model.flops_per_token() / 1e6 == pytest.approx(854.5, abs=0.5)
