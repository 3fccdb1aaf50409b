"""Windows over tokens and their order, a pure function of (seed, step)."""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from core.config import ResolvedConfig
from core.tokenizer import Tokenizer
from lib.kernels import IGNORE_INDEX

Windows = tuple[Tensor, Tensor]  # x and y, int64 (sequences, block_size)


class TokenDataset(Dataset):
    """Windows of `block_size` tokens, one every `stride` tokens, over an array of ids (a memory map).

    Item i is (x, y), int64 (block_size,) each: x starts at token i * stride and y is x shifted by one. The
    last window may reach past the end; there x is 0 and y is IGNORE_INDEX. With stride == block_size
    each token but the first is a target exactly once.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, stride: int | None = None,
                 tokenizer: Tokenizer | None = None) -> None:
        """`tokens`: ids (tokens,), at least two. ValueError for fewer, or for a stride over block_size."""
        self.stride = stride or block_size
        if len(tokens) < 2 or self.stride > block_size:
            raise ValueError(f"{len(tokens)} tokens, block_size {block_size}, stride {self.stride}")
        self.tokens = tokens
        self.block_size = block_size
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return 1 + max(0, -(-(len(self.tokens) - 1 - self.block_size) // self.stride))

    def __getitem__(self, index: int) -> Windows:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        x, y = self.windows([index % len(self)])
        return x[0], y[0]

    def windows(self, indices: Sequence[int] | np.ndarray) -> Windows:
        """The windows at `indices` as one batch, (len(indices), block_size) each."""
        positions = np.asarray(indices)[:, None] * self.stride + np.arange(self.block_size + 1)
        windows = self.tokens[np.minimum(positions, len(self.tokens) - 1)].astype(np.int64)
        windows[positions >= len(self.tokens)] = IGNORE_INDEX
        windows = torch.from_numpy(windows)
        return windows[:, :-1].clamp(min=0), windows[:, 1:].contiguous()


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n_windows: int) -> np.ndarray:
    """The windows of an epoch in the order in which they are visited, int64 (n_windows,)."""
    return np.random.default_rng((seed, epoch)).permutation(n_windows)


def window_order(cfg: ResolvedConfig, step: int) -> np.ndarray:
    """The windows of optimizer step `step` (0 is the first), int64 (sequences,).

    The epochs' shuffled orders, laid end to end, are cut into steps, so a step may reach across the end of
    an epoch, and every epoch visits each window once.
    """
    picked, position, end = [], step * cfg.sequences, (step + 1) * cfg.sequences
    while position < end:
        epoch, offset = divmod(position, cfg.n_windows)
        picked.append(epoch_order(cfg.seed, epoch, cfg.n_windows)[offset : offset + end - position])
        position += len(picked[-1])
    return np.concatenate(picked)


class Batch:
    """The windows of optimizer step `step` (0 is the first), fetched one micro-batch at a time, on the CPU."""

    def __init__(self, dataset: TokenDataset, cfg: ResolvedConfig, step: int) -> None:
        self.dataset, self.step, order = dataset, step, window_order(cfg, step)
        self.micro_batches = order.reshape(cfg.gradient_accumulation_steps, cfg.batch_size)
        # All but those that the last window, which may be partial, lacks.
        n_lacking = max(0, (len(dataset) - 1) * dataset.stride + dataset.block_size + 1 - len(dataset.tokens))
        self.n_targets = len(order) * dataset.block_size - int((order == len(dataset) - 1).sum()) * n_lacking

    def part(self, first: int = 0, every: int = 1) -> Iterator[tuple[int, Windows]]:
        """(number, windows) of the micro-batches `first`, first + every, …"""
        for number in range(first, len(self.micro_batches), every):
            yield number, self.dataset.windows(self.micro_batches[number])


def batches(dataset: TokenDataset, cfg: ResolvedConfig, start: int) -> Iterator[Batch]:
    """The batch of each optimizer step, from step `start` (0 is the first) to the run's last."""
    return (Batch(dataset, cfg, step) for step in range(start, cfg.max_iters))
