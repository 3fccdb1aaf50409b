import copy

import numpy as np
import pytest
import torch
from helpers import newton_schulz

from lib.distributed import ALONE
from lib.muon import Muon, orthogonalize


@pytest.mark.parametrize("dtype, stacked, tolerance", [
    (torch.bfloat16, True, 1e-3), (torch.bfloat16, False, 1e-3), (torch.float32, True, 0.15)])
def test_muon_is_torchs(dtype, stacked, tolerance):
    """Tall, wide and square matrices, several of a shape, over four steps with torch's own state loaded between."""
    torch.manual_seed(0)
    shapes = [(24, 8), (8, 24), (8, 8)] * 3
    starts = [torch.randn(shape) for shape in shapes]
    options = dict(lr=0.01, weight_decay=0.1, momentum=0.8)
    weights = [[torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2)]
    theirs = torch.optim.Muon(weights[0], adjust_lr_fn="match_rms_adamw", **options)
    ours = Muon(weights[1], dtype, stacked, ALONE, **options)
    for step in range(4):
        for i, (p, q) in enumerate(zip(*weights)):
            p.grad = torch.randn(p.shape) * 10.0 ** (i - 4)
            q.grad = p.grad.clone()
        theirs.step()
        ours.step()
        if step == 1:
            ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        for p, q, start in zip(*weights, starts):
            assert (p - q).norm() < tolerance * (p - start).norm()
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_matrices_apart_have_the_bits_that_each_has_alone():
    torch.manual_seed(0)
    starts, gradients = [[torch.randn(288, 96) for _ in range(3)] for _ in range(2)]

    def updated(numbers):
        weights = [torch.nn.Parameter(starts[i].clone()) for i in numbers]
        for p, i in zip(weights, numbers):
            p.grad = gradients[i].clone()
        Muon(weights, torch.float32, False, ALONE, lr=0.01).step()
        return weights

    assert all(torch.equal(p, updated([i])[0]) for i, p in enumerate(updated([0, 1, 2])))


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (8, 8)])
def test_iterations_in_float32_are_exact(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    for matrix, found in zip(matrices, result):
        assert np.allclose(found, newton_schulz(matrix.double().numpy()), atol=1e-5)
