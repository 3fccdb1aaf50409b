"""Text to data/<name>/ and back: the built-in texts, the split, the files on disk.

train.bin and val.bin hold raw little-endian uint16 ids without a header (nanoGPT's format); meta.json
holds the tokenizer and each split's sizes and sha256, and is written last.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer, tokenizer_from_state
from lib.cli import UserError, is_plain_name, plural
from lib.download import DOWNLOADS, Source, fetch_source
from lib.files import atomic_write, lock_directory, read_text, reason, sha256_of

FORMAT_VERSION = 1
SPLITS = ("train", "val")
UINT16_IDS = 1 << 16
PREPARE_AGAIN = "prepare the data set again with prepare_data.py --overwrite"
SHAKESPEARE = Source("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                     "tinyshakespeare.txt", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
# vocab.bpe alone defines GPT-2's ids (encoder.json follows from it); the hash is the one tiktoken pins.
BPE_MERGES = Source("https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe", "gpt2/vocab.bpe",
                    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")


def shakespeare_text(data_dir: str) -> str:
    """TinyShakespeare (Karpathy 2015): 1,115,394 characters of the plays."""
    return read_text(fetch_source(SHAKESPEARE, data_dir))


def pydoc_text(data_dir: str) -> str:
    """The Python language reference that ships with CPython, about half a million characters; no download."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python lacks pydoc_data (the language reference): install a full Python, "
                        "or use another data set") from None
    return "".join(topics[key] for key in sorted(topics))


# name: (function that returns the text, kind of tokenizer)
CORPORA: dict[str, tuple[Callable[[str], str], str]] = {
    "pydoc": (pydoc_text, "char"),
    "shakespeare": (shakespeare_text, "gpt2"),
    "shakespeare_char": (shakespeare_text, "char"),
}


@dataclass(frozen=True)
class Corpus:
    """A prepared data set: both splits' ids as memory maps, uint16 (tokens,), and their tokenizer."""

    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer
    fingerprint: str  # sha256 over both splits and the tokenizer


def make_tokenizer(kind: str, text: str, data_dir: str) -> Tokenizer:
    """A "char" tokenizer for `text`, or GPT-2's ("gpt2"), whose merges are downloaded if needed."""
    if kind == "char":
        return CharTokenizer.from_text(text)
    return GPT2Tokenizer(read_text(fetch_source(BPE_MERGES, data_dir)))


def is_free_name(name: str) -> bool:
    """Whether a data set of one's own may have this name: a plain one that nothing else has under data_dir."""
    return is_plain_name(name) and name not in (*CORPORA, DOWNLOADS)


def prepare_text(text: str, name: str, tokenizer_kind: str, data_dir: str, val_fraction: float = 0.1,
                 overwrite: bool = False) -> None:
    """Split `text` by characters, encode it, write it as data set `name`, and print its sizes.

    `tokenizer_kind`: "char" (vocabulary from the whole text) or "gpt2". UserError for a text that is too
    short, whose vocabulary does not fit uint16, or that would replace another one without `overwrite`.
    """
    if not text:
        raise UserError(f"the text for {name} is empty")
    cut = int(len(text) * (1 - val_fraction))
    tokenizer = make_tokenizer(tokenizer_kind, text, data_dir)
    if tokenizer.vocab_size > UINT16_IDS:
        raise UserError(f"the text for {name} has {tokenizer.vocab_size:,} distinct characters; the .bin format "
                        f"holds {UINT16_IDS:,}: use --tokenizer gpt2")
    ids = {"train": tokenizer.encode(text[:cut]), "val": tokenizer.encode(text[cut:])}
    for split in SPLITS:
        if len(ids[split]) < 2:
            raise UserError(f"the {split} split of {name} has {plural(len(ids[split]), 'token')}; at least 2 are "
                            f"needed: use a longer text or another --val_fraction")
    directory = Path(data_dir) / name
    before = write_corpus(directory, tokenizer, ids, overwrite)
    counts = ", ".join(f"{split} {plural(len(ids[split]), 'token')}" for split in SPLITS)
    symbols = plural(tokenizer.vocab_size, "symbol")
    print(f"{directory}: {tokenizer.kind} tokenizer, {symbols}; {counts}{before}", flush=True)


def open_corpus(name: str, data_dir: str, verify: bool = True) -> Corpus:
    """Open data set `name`; a missing built-in one is prepared first, with a line that says so."""
    directory = Path(data_dir) / name
    if name in CORPORA and not (directory / "meta.json").exists():
        print(f"data set {name} is not prepared yet: preparing it")
        load_text, tokenizer_kind = CORPORA[name]
        prepare_text(load_text(data_dir), name, tokenizer_kind, data_dir)
    return read_corpus(directory, verify)


def write_corpus(directory: Path, tokenizer: Tokenizer, ids: dict[str, np.ndarray], overwrite: bool = False) -> str:
    """Write {split: ids} with their tokenizer as a data set; return what it replaces, in words to be appended.

    UserError where the directory cannot be written, or holds other data and not `overwrite`.
    """
    names, splits = (*(f"{split}.bin" for split in SPLITS), "meta.json"), {}
    with lock_directory(directory):
        try:
            with atomic_write(*(directory / name for name in names)) as (*bins, meta_file):
                for split, file in zip(SPLITS, bins):
                    file.write_bytes(ids[split].astype("<u2").tobytes())
                    n_bytes = int(tokenizer.token_bytes[ids[split]].sum())
                    splits[split] = {"tokens": len(ids[split]), "bytes": n_bytes, "sha256": sha256_of(file)}
                return write_meta(meta_file, tokenizer, splits, overwrite)
        except OSError as error:
            raise UserError(f"cannot write the data set {directory}: {reason(error)}") from None


def write_meta(file: Path, tokenizer: Tokenizer, splits: dict[str, dict], overwrite: bool) -> str:
    """Write meta.json of `splits` ({split: tokens, bytes, sha256}) to `file` beside it; return and raise as above."""
    meta = {"format_version": FORMAT_VERSION, "vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.state(),
            "splits": splits}
    before = holds_same_data(file.parent, meta)
    if before is False and not overwrite:
        raise UserError(f"{file.parent} was made from another text: choose another name, or replace it with "
                        f"prepare_data.py ... --overwrite (runs trained on it can then not be resumed)")
    meta["sha256"] = digest_of(meta)
    file.write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return {None: "", True: "; the same as before", False: "; replaces other data"}[before]


def holds_same_data(directory: Path, meta: dict) -> bool | None:
    """Whether the data set in `directory` is the one that `meta` describes; None if there is none."""
    found = {split: directory / f"{split}.bin" for split in SPLITS if (directory / f"{split}.bin").exists()}
    is_same = all(meta["splits"][split]["sha256"] == sha256_of(file) for split, file in found.items())
    if (directory / "meta.json").exists():
        with suppress(UserError):  # damaged: the tokens decide
            return is_same and fingerprint_of(read_meta(directory)) == fingerprint_of(meta)
    return is_same if found else None


def read_meta(directory: Path) -> dict:
    """The checked content of meta.json. UserError if it is missing or damaged."""
    path = directory / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{directory} is not a prepared data set (no meta.json): run prepare_data.py") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; {PREPARE_AGAIN}") from None
    try:
        if meta["format_version"] != FORMAT_VERSION:
            raise UserError(f"{path} has format {meta['format_version']!r}, not {FORMAT_VERSION}; {PREPARE_AGAIN}")
        for split in SPLITS:
            sizes = meta["splits"][split]
            if not (type(sizes["tokens"]) is int and sizes["tokens"] > 1 and isinstance(sizes["sha256"], str)):
                raise TypeError(f"splits.{split} is wrong")
        if not isinstance(meta["tokenizer"], dict) or type(meta["vocab_size"]) is not int:
            raise TypeError("tokenizer or vocab_size is wrong")
        rest = {key: value for key, value in meta.items() if key != "sha256"}
        if meta.get("sha256", digest := digest_of(rest)) != digest:
            raise TypeError("its content does not match its sha256")
    except (KeyError, TypeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is damaged: {what}; {PREPARE_AGAIN}") from None
    return meta


def fingerprint_of(meta: dict) -> str:
    """sha256 over the contents of both splits and the tokenizer."""
    return digest_of([meta["splits"]["train"]["sha256"], meta["splits"]["val"]["sha256"], meta["tokenizer"]])


def digest_of(content: object) -> str:
    """sha256 over JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_corpus(directory: Path, verify: bool = True) -> Corpus:
    """Open and verify a data set: sizes and, with `verify`, hashes and ids. UserError if it is damaged."""
    meta = read_meta(directory)
    tokenizer = tokenizer_from_state(meta["tokenizer"], directory / "meta.json")
    if tokenizer.vocab_size != meta["vocab_size"]:
        raise UserError(f"{directory}/meta.json: the tokenizer has {tokenizer.vocab_size} symbols, "
                        f"vocab_size says {meta['vocab_size']}; {PREPARE_AGAIN}")
    splits = [read_split(directory / f"{split}.bin", meta["splits"][split], tokenizer.vocab_size, verify)
              for split in SPLITS]
    return Corpus(*splits, tokenizer, fingerprint_of(meta))


def read_split(path: Path, expected: dict, vocab_size: int, verify: bool) -> np.ndarray:
    """The ids in a .bin file, a uint16 memory map. UserError if it is not what meta.json expects."""
    if not path.is_file():
        raise UserError(f"{path} is missing; {PREPARE_AGAIN}")
    if path.stat().st_size != 2 * expected["tokens"]:
        raise UserError(f"{path} has {path.stat().st_size} bytes, not {2 * expected['tokens']}; {PREPARE_AGAIN}")
    if verify and sha256_of(path) != expected["sha256"]:
        raise UserError(f"{path} does not match its sha256 in meta.json; {PREPARE_AGAIN}")
    ids = np.memmap(path, dtype="<u2", mode="r")
    if verify and ids.max() >= vocab_size:
        raise UserError(f"{path} holds id {ids.max()}, outside the vocabulary of {vocab_size}; {PREPARE_AGAIN}")
    return ids
