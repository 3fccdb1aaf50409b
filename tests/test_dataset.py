import numpy as np
import pytest
import torch
from helpers import CPU

from core.config import TrainConfig, resolve
from core.dataset import TokenDataset, batches, window_order

TOKENS = np.arange(100, 200, dtype=np.uint16)


def config(n_windows, sequences, seed, max_iters):
    return resolve(TrainConfig(batch_size=sequences, seed=seed, max_iters=max_iters), n_windows)


@pytest.mark.parametrize("n_tokens, block_size, stride", [
    (100, 10, 10), (99, 10, 10), (91, 10, 10), (92, 10, 10), (100, 7, 3), (100, 8, 1), (5, 10, 10),
    (2, 1, 1), (11, 10, 4),
])
def test_windows_are_shifted_slices_and_cover_the_text(n_tokens, block_size, stride):
    tokens = TOKENS[:n_tokens].tolist()
    dataset = TokenDataset(TOKENS[:n_tokens], block_size, stride)
    targets = []
    for i in range(len(dataset)):
        x, y = dataset[i]
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (block_size,)
        seen = tokens[i * stride : i * stride + block_size + 1]
        n = len(seen) - 1
        assert n >= 1
        assert y.tolist() == seen[1:] + [-1] * (block_size - n)
        assert x.tolist() == (seen + [0] * block_size)[:block_size]
        targets += seen[1:]
    assert set(targets) == set(tokens[1:])
    if stride == block_size:
        assert sorted(targets) == tokens[1:]


def test_indexing_follows_sequence_rules():
    dataset = TokenDataset(TOKENS, 10)
    assert dataset[-1][1].tolist() == dataset[len(dataset) - 1][1].tolist()
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError):
            dataset[index]
    for tokens, stride in ((TOKENS[:1], 1), (TOKENS, 11)):
        with pytest.raises(ValueError):
            TokenDataset(tokens, 10, stride)


@pytest.mark.parametrize("n_windows, sequences", [(10, 4), (10, 5), (10, 10), (3, 8), (1, 2)])
def test_epochs_cover_every_window_once_in_their_own_order(n_windows, sequences):
    stream = np.concatenate(list(window_order(config(n_windows, sequences, 1, 20), start=0)))
    assert len(stream) == 20 * sequences
    epochs = [stream[i : i + n_windows].tolist() for i in range(0, len(stream) - n_windows + 1, n_windows)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n_windows))
    if n_windows == 10:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_order_is_a_function_of_seed_and_step():
    cfg = config(10, 4, seed=5, max_iters=30)
    whole = list(window_order(cfg, start=0))
    for start in (1, 7, 29):
        tail = list(window_order(cfg, start))
        assert np.array_equal(tail, whole[start:])
    assert not np.array_equal(whole, list(window_order(config(10, 4, 6, 30), start=0)))


def test_batches_are_the_windows_of_each_step():
    dataset = TokenDataset(TOKENS, 8, 4)
    cfg = config(len(dataset), 5, seed=0, max_iters=9)
    steps = list(window_order(cfg, start=3))
    loaded = list(batches(dataset, cfg, 3, CPU))
    assert len(loaded) == len(steps) == 6
    for indices, (x, y) in zip(steps, loaded):
        assert x.shape == y.shape == (5, 8)
        assert all(torch.equal(x[i], dataset[j][0]) and torch.equal(y[i], dataset[j][1]) for i, j in enumerate(indices))
