import numpy as np
import pytest
import torch
from helpers import CPU, make_model, newton_schulz

from core.config import TrainConfig, resolve
from core.optim import MuonAndAdamW, learning_rate_at, make_optimizer


def config(**fields):
    return resolve(TrainConfig(**fields), n_windows=1000)


def test_cosine_boundaries():
    cfg = config(learning_rate=1e-3, min_lr=1e-4, warmup_iters=10, lr_decay_iters=110, max_iters=200)
    assert learning_rate_at(0, cfg) == 1e-3 / 11
    assert learning_rate_at(9, cfg) == 1e-3 * 10 / 11
    assert learning_rate_at(10, cfg) == 1e-3
    assert learning_rate_at(60, cfg) == pytest.approx((1e-3 + 1e-4) / 2, rel=1e-12)
    assert learning_rate_at(110, cfg) == learning_rate_at(199, cfg) == 1e-4
    rates = [learning_rate_at(step, cfg) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == len(rates)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup, decay", [(0, 10), (10, 10), (50, 10), (0, 1), (9, 10)])
def test_learning_rate_of_short_runs_is_finite(warmup, decay, schedule):
    cfg = config(warmup_iters=warmup, lr_decay_iters=decay, min_lr=1e-4, lr_schedule=schedule,
                      decay_fraction=1e-20)
    assert all(0 < learning_rate_at(step, cfg) <= 1e-3 for step in range(60))


@pytest.mark.parametrize("schedule, corners", [("linear", [(10, 1e-3), (110, 1e-4)]),
                                               ("wsd", [(10, 1e-3), (77, 1e-3), (110, 1e-4)])])
def test_linear_schedules_pass_through_their_corners(schedule, corners):
    cfg = config(learning_rate=1e-3, min_lr=1e-4, warmup_iters=10, lr_decay_iters=110, lr_schedule=schedule,
                      decay_fraction=0.3)
    corners = [(0, 1e-3 / 11), *corners, (200, 1e-4)]
    expected = np.interp(range(201), [x for x, _ in corners], [y for _, y in corners])
    assert [learning_rate_at(step, cfg) for step in range(201)] == pytest.approx(expected, rel=1e-12)


def small_gpt(**fields):
    return make_model(vocab_size=31, block_size=8, n_embd=16, **fields).train()


def test_muon_moves_the_matrices_of_the_blocks_and_adamw_the_rest():
    model, plain = small_gpt(), small_gpt()
    cfg = config(optimizer="muon", learning_rate=0.01, weight_decay=0.1, beta1=0.8)
    optimizer = make_optimizer(model, cfg, CPU)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.01, betas=(cfg.beta1, cfg.beta2), weight_decay=0.1)
    reference.param_groups[0]["params"] = [p for p in plain.parameters() if p.dim() >= 2]
    reference.add_param_group({"params": [p for p in plain.parameters() if p.dim() < 2], "weight_decay": 0.0})
    momentum = {}
    for step in range(2):
        torch.manual_seed(step)
        x, y = torch.randint(31, (2, 4, 8))
        before = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
        plain.load_state_dict(model.state_dict())
        for m in (model, plain):
            m.zero_grad()
            m(x, y)[1].backward()
        gradients = {name: p.grad.double().numpy() for name, p in plain.named_parameters()}
        reference.step()
        optimizer.step()
        for (name, p), q in zip(model.named_parameters(), plain.parameters()):
            if p.dim() < 2 or not name.startswith("transformer.h."):
                assert torch.allclose(p, q, rtol=1e-6, atol=1e-8), name
                continue
            g = gradients[name]
            momentum[name] = 0.8 * momentum.get(name, 0 * g) + 0.2 * g
            direction = newton_schulz(0.2 * g + 0.8 * momentum[name])
            expected = before[name] * (1 - 0.01 * 0.1) - 0.01 * 0.2 * max(g.shape) ** 0.5 * direction
            error = np.linalg.norm(p.detach().numpy() - expected)
            tolerance = 0.15 if optimizer.muon.dtype == torch.bfloat16 else 1e-4
            assert error < tolerance * np.linalg.norm(expected - before[name]), (name, error)


def test_weight_decay_is_for_matrices_only():
    model = make_model()
    decayed, rest = make_optimizer(model, config(weight_decay=0.3), CPU).param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in rest["params"]} == {1}
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_every_parameter_is_in_one_group():
    model = small_gpt(tie_weights=False)
    for name in ("adamw", "muon"):
        groups = make_optimizer(model, config(optimizer=name), CPU).param_groups
        assert sorted(map(id, (p for group in groups for p in group["params"]))) == sorted(map(id, model.parameters()))


def test_the_gradient_scaler_takes_muon():
    models = [small_gpt(), small_gpt()]
    cfg = config(optimizer="muon")
    x, y = torch.randint(31, (2, 4, 8))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain, scaled = (make_optimizer(model, cfg, CPU) for model in models)
    assert isinstance(scaled, MuonAndAdamW)
    models[0](x, y)[1].backward()
    plain.step()
    scaler.scale(models[1](x, y)[1]).backward()
    scaler.unscale_(scaled)
    scaler.step(scaled)
    scaler.update()
    for p, q in zip(*(model.parameters() for model in models)):
        assert torch.allclose(p, q, atol=1e-7)
    scaled.zero_grad()
    before = [p.clone() for p in models[1].parameters()]
    scaler.scale(models[1](x, y)[1] * float("inf")).backward()
    scaler.unscale_(scaled)
    scaler.step(scaled)
    scaler.update()
    assert scaler.get_scale() == 512
    assert all(torch.equal(p, q) for p, q in zip(models[1].parameters(), before))
