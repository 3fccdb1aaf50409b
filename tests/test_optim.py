import copy

import numpy as np
import pytest
import torch

from config import TrainConfig
from model import GPT, GPTConfig
from optim import BatchedMuon, MuonAndAdamW, learning_rate_at, make_optimizer, update_unless

CPU = torch.device("cpu")


def test_cosine_boundaries():
    cfg = TrainConfig(learning_rate=1e-3, min_lr=1e-4, warmup_iters=10, lr_decay_iters=110, max_iters=200)
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
    cfg = TrainConfig(warmup_iters=warmup, lr_decay_iters=decay, min_lr=1e-4, lr_schedule=schedule,
                      decay_fraction=1e-20)
    assert all(0 < learning_rate_at(step, cfg) <= 1e-3 for step in range(60))


@pytest.mark.parametrize("schedule, corners", [("linear", [(10, 1e-3), (110, 1e-4)]),
                                               ("wsd", [(10, 1e-3), (77, 1e-3), (110, 1e-4)])])
def test_straight_schedules_join_their_corners(schedule, corners):
    cfg = TrainConfig(learning_rate=1e-3, min_lr=1e-4, warmup_iters=10, lr_decay_iters=110, lr_schedule=schedule,
                      decay_fraction=0.3)
    corners = [(0, 1e-3 / 11), *corners, (200, 1e-4)]
    expected = np.interp(range(201), [x for x, _ in corners], [y for _, y in corners])
    assert [learning_rate_at(step, cfg) for step in range(201)] == pytest.approx(expected, rel=1e-12)


def small_gpt(**fields):
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=31, block_size=8, n_layer=2, n_head=2, n_embd=16, **fields))


def newton_schulz(matrix):
    """Five quintic steps towards the nearest orthogonal matrix, float64; wide matrices, as the shorter side decides."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def test_muon_moves_the_matrices_of_the_blocks_and_adamw_the_rest():
    model, plain = small_gpt(), small_gpt()
    cfg = TrainConfig(optimizer="muon", learning_rate=0.01, weight_decay=0.1, beta1=0.8)
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
        update_unless(optimizer, torch.tensor(False))
        for (name, p), q in zip(model.named_parameters(), plain.parameters()):
            if p.dim() < 2 or not name.startswith("transformer.h."):
                assert torch.allclose(p, q, rtol=1e-6, atol=1e-8), name
                continue
            g = gradients[name]
            momentum[name] = 0.8 * momentum.get(name, 0 * g) + 0.2 * g
            direction = newton_schulz(0.2 * g + 0.8 * momentum[name])
            expected = before[name] * (1 - 0.01 * 0.1) - 0.01 * 0.2 * max(g.shape) ** 0.5 * direction
            error = np.linalg.norm(p.detach().numpy() - expected)
            # Muon iterates in bfloat16.
            assert error < 0.15 * np.linalg.norm(expected - before[name]), (name, error)


def test_batched_muon_is_torchs():
    """Tall, wide and square matrices, several of a shape; after three steps and a resumption from torch's own state."""
    torch.manual_seed(0)
    shapes = [(24, 8), (8, 24), (8, 8)] * 3
    starts = [torch.randn(shape) for shape in shapes]
    gradients = [[torch.randn(shape) * 10.0 ** (i - 2) for i, shape in enumerate(shapes)] for _ in range(4)]
    options = dict(lr=0.01, weight_decay=0.1, momentum=0.8, adjust_lr_fn="match_rms_adamw")
    weights, optimizers = [], []
    for kind in (torch.optim.Muon, BatchedMuon):
        weights.append([torch.nn.Parameter(start.clone()) for start in starts])
        optimizers.append(kind(weights[-1], **options))

    def step(i, k):
        for p, gradient in zip(weights[i], gradients[k]):
            p.grad = gradient.clone()
        optimizers[i].step()

    for k in range(4):
        step(0, k)
        step(1, k)
        if k == 1:
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for p, q, start in zip(*weights, starts):
            assert (p - q).norm() < 1e-3 * (p - start).norm()
    assert optimizers[1].state_dict().keys() == optimizers[0].state_dict().keys()


def test_a_bad_gradient_leaves_batched_muon_finite():
    weights = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(2)]
    before = [p.detach().clone() for p in weights]
    optimizer = BatchedMuon(weights, lr=0.01, weight_decay=0.0)
    for p in weights:
        p.grad = torch.full((8, 8), float("nan"))
    optimizer.step(torch.tensor(True))
    assert all(torch.equal(p, q) for p, q in zip(weights, before))
    assert all((state["momentum_buffer"] == 0).all() for state in optimizer.state.values())
    optimizer.step(torch.tensor(False))
    assert weights[0].isnan().all()


def test_every_parameter_is_in_one_group():
    model = small_gpt(tie_weights=False)
    for name in ("adamw", "muon"):
        groups = make_optimizer(model, TrainConfig(optimizer=name), CPU).param_groups
        assert sorted(map(id, (p for group in groups for p in group["params"]))) == sorted(map(id, model.parameters()))


def test_the_gradient_scaler_takes_muon():
    models = [small_gpt(), small_gpt()]
    cfg = TrainConfig(optimizer="muon")
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
