"""Token files on disk and batches out of them.

data/<name>/train.bin and val.bin hold raw little-endian uint16 ids without a header (nanoGPT's
format); meta.json holds the tokenizer and each split's size and sha256, and is written last.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from errors import UserError
from files import lock_folder, sha256_of
from tokenizer import tokenizer_from_state

FORMAT_VERSION = 1
SPLITS = ("train", "val")
IGNORED = -1  # target that counts in no loss


def write_corpus(folder, tokenizer, ids):
    """Write {split: ids} with their tokenizer as a data set into `folder`; meta.json is renamed into place last.

    UserError where the folder cannot be written.
    """
    with lock_folder(folder):
        temporary = Path(folder) / ".writing"
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
            temporary.mkdir()
            write_files(temporary, tokenizer, ids)
            for name in (*(f"{split}.bin" for split in SPLITS), "meta.json"):
                os.replace(temporary / name, Path(folder) / name)
        except OSError as error:
            raise UserError(f"cannot write the data set {folder}: {error.strerror}") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_files(folder, tokenizer, ids):
    """Write train.bin, val.bin and meta.json into an empty folder."""
    meta = {"format_version": FORMAT_VERSION, "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer.state(), "splits": {}}
    for split in SPLITS:
        file = folder / f"{split}.bin"
        ids[split].astype("<u2").tofile(file)
        meta["splits"][split] = {"tokens": len(ids[split]), "bytes": int(tokenizer.token_bytes[ids[split]].sum()),
                                 "sha256": sha256_of(file)}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_meta(folder):
    """The checked content of `folder`/meta.json, a dict. UserError if it is missing or damaged."""
    path = Path(folder) / "meta.json"
    again = "prepare the data set again with prepare_data.py"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a prepared data set (no meta.json): run prepare_data.py") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; {again}") from None
    try:
        if meta["format_version"] != FORMAT_VERSION:
            raise UserError(f"{path} has format {meta['format_version']!r}, not {FORMAT_VERSION}; {again}")
        for split in SPLITS:
            sizes = meta["splits"][split]
            if not (type(sizes["tokens"]) is int and sizes["tokens"] > 0 and isinstance(sizes["sha256"], str)):
                raise TypeError(f"splits.{split} is wrong")
        if not isinstance(meta["tokenizer"], dict) or type(meta["vocab_size"]) is not int:
            raise TypeError("tokenizer or vocab_size is wrong")
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error!r}; {again}") from None
    return meta


@dataclass(frozen=True)
class Corpus:
    """A prepared data set: both splits' ids as memory maps, uint16 (tokens,), and their tokenizer."""

    train: np.ndarray
    val: np.ndarray
    tokenizer: object
    fingerprint: str  # sha256 over both splits and the tokenizer


def read_corpus(folder):
    """Open and verify the data set in `folder`: sizes, hashes, ids within the vocabulary. UserError if damaged."""
    folder, meta = Path(folder), read_meta(folder)
    tokenizer = tokenizer_from_state(meta["tokenizer"], folder / "meta.json")
    again = "the data set is damaged, prepare it again with prepare_data.py"
    if tokenizer.vocab_size != meta["vocab_size"]:
        raise UserError(f"{folder}/meta.json: the tokenizer has {tokenizer.vocab_size} symbols, "
                        f"vocab_size says {meta['vocab_size']}: {again}")
    splits = {}
    for split in SPLITS:
        path, expected = folder / f"{split}.bin", meta["splits"][split]
        if not path.is_file():
            raise UserError(f"{path} is missing: {again}")
        if path.stat().st_size != 2 * expected["tokens"]:
            raise UserError(f"{path} has {path.stat().st_size} bytes, not {2 * expected['tokens']}: {again}")
        if sha256_of(path) != expected["sha256"]:
            raise UserError(f"{path} does not have the sha256 that meta.json gives: {again}")
        splits[split] = np.memmap(path, dtype="<u2", mode="r")
        if splits[split].max() >= tokenizer.vocab_size:
            raise UserError(f"{path} holds id {splits[split].max()}, over the vocabulary of "
                            f"{tokenizer.vocab_size}: {again}")
    identity = [meta["splits"]["train"]["sha256"], meta["splits"]["val"]["sha256"], meta["tokenizer"]]
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Corpus(splits["train"], splits["val"], tokenizer, fingerprint)


class TokenDataset(Dataset):
    """Windows of `block_size` tokens, a new one every `stride` tokens, over an array of ids (a memory map).

    Item i is (x, y), both int64 (block_size,): x starts at token i * stride and y is x shifted by
    one. The last window may reach past the end; there x is 0 and y is -1 (ignored in the loss).
    With stride == block_size each token but the first is a target exactly once.
    """

    def __init__(self, tokens, block_size, stride=None, tokenizer=None):
        """`tokens`: ids (tokens,), at least two. ValueError for fewer, or for a stride over block_size."""
        self.stride = stride or block_size
        if len(tokens) < 2 or self.stride > block_size:
            raise ValueError(f"{len(tokens)} tokens, block_size {block_size}, stride {self.stride}")
        self.tokens = tokens
        self.block_size = block_size
        self.tokenizer = tokenizer

    def __len__(self):
        return 1 + max(0, -(-(len(self.tokens) - 1 - self.block_size) // self.stride))

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        x, y = self.__getitems__([index % len(self)])
        return x[0], y[0]

    def __getitems__(self, indices):
        """Windows `indices` at once: (x, y), int64 (len(indices), block_size). DataLoader calls this."""
        positions = np.asarray(indices)[:, None] * self.stride + np.arange(self.block_size + 1)
        windows = self.tokens[np.minimum(positions, len(self.tokens) - 1)].astype(np.int64)
        windows[positions >= len(self.tokens)] = IGNORED
        windows = torch.from_numpy(windows)
        return windows[:, :-1].clamp(min=0), windows[:, 1:].contiguous()


class StepSampler(Sampler):
    """The windows of each optimizer step from `start` to `stop`, a pure function of (seed, step).

    The epochs' shuffled orders, laid end to end, are cut into steps of `sequences` windows, so a
    step may reach over an epoch's end and every epoch visits each window once.
    """

    def __init__(self, n_windows, sequences, seed, start, stop):
        self.n_windows, self.sequences, self.seed = n_windows, sequences, seed
        self.start, self.stop = start, stop

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        order, epoch_of_order = None, None
        for step in range(self.start, self.stop):
            picked, position = [], step * self.sequences
            while position < (step + 1) * self.sequences:
                epoch, offset = divmod(position, self.n_windows)
                if epoch != epoch_of_order:
                    order, epoch_of_order = np.random.default_rng((self.seed, epoch)).permutation(self.n_windows), epoch
                picked.append(order[offset : offset + (step + 1) * self.sequences - position])
                position += len(picked[-1])
            yield np.concatenate(picked)


def as_fetched(batch):
    """DataLoader's collate_fn: TokenDataset gives whole batches already."""
    return batch


def step_loader(dataset, sequences, seed, start, stop, pin_memory=False):
    """A DataLoader of (x, y), int64 (sequences, block_size), one for each optimizer step from start to stop."""
    sampler = StepSampler(len(dataset), sequences, seed, start, stop)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=as_fetched, pin_memory=pin_memory)
