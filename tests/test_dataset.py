import numpy as np
import pytest
import torch

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
    stream = np.concatenate([window_order(config(n_windows, sequences, 1, 20), step) for step in range(20)])
    assert len(stream) == 20 * sequences
    epochs = [stream[i : i + n_windows].tolist() for i in range(0, len(stream) - n_windows + 1, n_windows)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n_windows))
    if n_windows == 10:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_order_is_a_function_of_seed_and_step():
    cfg = config(10, 4, seed=5, max_iters=30)
    whole = [window_order(cfg, step) for step in range(30)]
    for step in (29, 1, 7):
        assert np.array_equal(window_order(cfg, step), whole[step])
    assert not np.array_equal(whole[0], window_order(config(10, 4, 6, 30), 0))


@pytest.mark.parametrize("n_tokens, stride", [(100, 4), (97, 8), (98, 3)])
def test_batches_are_the_windows_of_each_step_in_micro_batches(n_tokens, stride):
    dataset = TokenDataset(TOKENS[:n_tokens], 8, stride)
    cfg = resolve(TrainConfig(batch_size=5, gradient_accumulation_steps=7, max_iters=9), len(dataset))
    found = list(batches(dataset, cfg, 3))
    assert [batch.step for batch in found] == [3, 4, 5, 6, 7, 8]
    partial = 0
    for batch in found:
        numbers, windows = zip(*batch.part())
        assert numbers == (0, 1, 2, 3, 4, 5, 6) and [len(x) for x, _ in windows] == [5] * 7
        x, y = (torch.cat(parts) for parts in zip(*windows))
        for n, (number, (x_part, y_part)) in enumerate(batch.part(2, 3)):
            assert number == 2 + 3 * n and torch.equal(x_part, windows[number][0])
            assert torch.equal(y_part, windows[number][1])
        expected = [dataset[i] for i in window_order(cfg, batch.step)]
        assert torch.equal(x, torch.stack([x for x, _ in expected]))
        assert torch.equal(y, torch.stack([y for _, y in expected]))
        assert batch.n_targets == (y != -1).sum()
        partial += (y == -1).any().item()
    assert partial or dataset[-1][1].min() >= 0
