"""Windows over tokens and their order, a pure function of (seed, step)."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core.config import ResolvedConfig
from core.tokenizer import Tokenizer
from lib.kernels import IGNORE_INDEX

Batch = tuple[Tensor, Tensor]  # x and y, int64 (sequences, block_size)


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

    def __getitem__(self, index: int) -> Batch:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        x, y = self.windows([index % len(self)])
        return x[0], y[0]

    def windows(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The windows at `indices` as one batch, (len(indices), block_size) each."""
        positions = np.asarray(indices)[:, None] * self.stride + np.arange(self.block_size + 1)
        windows = self.tokens[np.minimum(positions, len(self.tokens) - 1)].astype(np.int64)
        windows[positions >= len(self.tokens)] = IGNORE_INDEX
        windows = torch.from_numpy(windows)
        return windows[:, :-1].clamp(min=0), windows[:, 1:].contiguous()

    __getitems__ = windows  # the name by which DataLoader fetches whole batches


def window_order(cfg: ResolvedConfig, start: int) -> Iterator[np.ndarray]:
    """The indices, int64 (sequences,), of the windows of each optimizer step from `start` to the last.

    The epochs' shuffled orders, laid end to end, are cut into steps, so a step may reach across the end of
    an epoch, and every epoch visits each window once.
    """
    order, epoch_of_order = None, None
    for step in range(start, cfg.max_iters):
        picked, position, end = [], step * cfg.sequences, (step + 1) * cfg.sequences
        while position < end:
            epoch, offset = divmod(position, cfg.n_windows)
            if epoch != epoch_of_order:
                order, epoch_of_order = np.random.default_rng((cfg.seed, epoch)).permutation(cfg.n_windows), epoch
            picked.append(order[offset : offset + end - position])
            position += len(picked[-1])
        yield np.concatenate(picked)


def batches(dataset: TokenDataset, cfg: ResolvedConfig, start: int, device: torch.device) -> Iterable[Batch]:
    """The windows of each optimizer step, on the CPU, from step `start` (0 is the first) to the run's last."""
    return DataLoader(dataset, batch_sampler=window_order(cfg, start), pin_memory=device.type == "cuda",
                      collate_fn=lambda batch: batch)  # the dataset fetches whole batches
