import json

import numpy as np
import pytest
import torch

from dataset import SPLITS, StepSampler, TokenDataset, read_corpus, step_loader, write_corpus
from errors import UserError
from tokenizer import CharTokenizer

TOKENS = np.arange(100, 200, dtype=np.uint16)


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


def test_indices_like_a_sequence():
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
    stream = np.concatenate(list(StepSampler(n_windows, sequences, seed=1, start=0, stop=20)))
    assert len(stream) == 20 * sequences
    epochs = [stream[i : i + n_windows].tolist() for i in range(0, len(stream) - n_windows + 1, n_windows)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n_windows))
    if n_windows == 10:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_order_is_a_function_of_seed_and_step():
    whole = list(StepSampler(10, 4, seed=5, start=0, stop=30))
    for start in (1, 7, 29):
        tail = list(StepSampler(10, 4, seed=5, start=start, stop=30))
        assert np.array_equal(tail, whole[start:])
    assert not np.array_equal(whole, list(StepSampler(10, 4, seed=6, start=0, stop=30)))


def test_loader_gives_the_windows_of_each_step():
    dataset = TokenDataset(TOKENS, 8, 4)
    steps = list(StepSampler(len(dataset), 5, seed=0, start=3, stop=9))
    batches = list(step_loader(dataset, 5, seed=0, start=3, stop=9))
    assert len(batches) == 6
    for indices, (x, y) in zip(steps, batches):
        assert x.shape == y.shape == (5, 8)
        assert all(torch.equal(x[i], dataset[j][0]) and torch.equal(y[i], dataset[j][1]) for i, j in enumerate(indices))


@pytest.fixture
def corpus_dir(tmp_path):
    tokenizer = CharTokenizer.from_text("abcdefgh é")
    texts = {"train": "abc def é" * 5, "val": "hgf é"}
    write_corpus(tmp_path / "c", tokenizer, {split: tokenizer.encode(text) for split, text in texts.items()})
    return tmp_path / "c"


def test_files_are_raw_uint16(corpus_dir):
    corpus = read_corpus(corpus_dir)
    for split, text in (("train", "abc def é" * 5), ("val", "hgf é")):
        ids = np.fromfile(corpus_dir / f"{split}.bin", dtype="<u2")
        assert np.array_equal(ids, getattr(corpus, split))
        assert corpus.tokenizer.decode(ids) == text
        meta = json.loads((corpus_dir / "meta.json").read_text())["splits"][split]
        assert (meta["tokens"], meta["bytes"]) == (len(text), len(text.encode()))
    assert sorted(path.name for path in corpus_dir.iterdir()) == [".lock", "meta.json", "train.bin", "val.bin"]


def test_fingerprint_tells_data_apart(corpus_dir, tmp_path):
    tokenizer = CharTokenizer.from_text("abcdefgh é")
    ids = {split: tokenizer.encode("abc" * 9) for split in SPLITS}
    write_corpus(tmp_path / "d", tokenizer, ids)
    write_corpus(tmp_path / "e", CharTokenizer.from_text("abcdefghié"), ids)
    prints = {read_corpus(folder).fingerprint for folder in (corpus_dir, tmp_path / "d", tmp_path / "e")}
    assert len(prints) == 3
    write_corpus(tmp_path / "d2", tokenizer, ids)
    assert read_corpus(tmp_path / "d2").fingerprint in prints


def damage_meta(change):
    def damage(folder):
        meta = json.loads((folder / "meta.json").read_text())
        change(meta)
        (folder / "meta.json").write_text(json.dumps(meta))
    return damage


def flip_byte(folder):
    data = bytearray((folder / "train.bin").read_bytes())
    data[6] ^= 1
    (folder / "train.bin").write_bytes(data)


def write_ids_over_the_vocabulary(folder):
    tokenizer = CharTokenizer.from_text("abcdefgh é")
    tokenizer.token_bytes = np.ones(99, dtype=int)
    write_corpus(folder, tokenizer, {"train": np.array([1, 98]), "val": np.array([1, 2])})


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "train.bin").write_bytes(b"\0" * 20), "train.bin has 20 bytes"),
    (flip_byte, "sha256"),
    (lambda f: (f / "val.bin").unlink(), "val.bin is missing"),
    (lambda f: (f / "meta.json").unlink(), "no meta.json"),
    (lambda f: (f / "meta.json").write_text("{"), "meta.json"),
    (lambda f: (f / "meta.json").write_bytes(b"\xff"), "meta.json"),
    (lambda f: (f / "meta.json").write_text("[]"), "meta.json"),
    (damage_meta(lambda m: m.pop("splits")), "splits"),
    (damage_meta(lambda m: m.update(format_version=9)), "format 9"),
    (damage_meta(lambda m: m.update(vocab_size=11)), "vocab_size says 11"),
    (damage_meta(lambda m: m["splits"]["val"].update(tokens="5")), "splits.val"),
    (damage_meta(lambda m: m["tokenizer"].update(kind="word")), "word"),
    (write_ids_over_the_vocabulary, "id 98"),
])
def test_damaged_data_is_refused(corpus_dir, damage, words):
    damage(corpus_dir)
    with pytest.raises(UserError, match=words):
        read_corpus(corpus_dir)
