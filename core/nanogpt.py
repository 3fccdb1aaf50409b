"""nanoGPT's files (https://github.com/karpathy/nanoGPT): checkpoints, data directories, character vocabularies.

Nothing in them is executed: checkpoints are loaded with weights_only=True, and a meta.pkl may hold only dicts, lists,
strings and numbers.
"""

import io
import os
import pickle
import pickletools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.checkpoint import check_records, named_damage
from core.config import build_config
from core.corpus import SPLITS, make_tokenizer, read_meta, write_meta
from core.huggingface import MASKS, MAX_PROBLEMS, VOCABULARY_ROWS
from core.schema import is_number
from core.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer, tokenizer_from_state
from lib.cli import UserError, describe, first_line, is_valid, plural
from lib.files import atomic_write, link_file, lock_directory, reason, sha256_of
from model import GPT, GPTConfig

GPT2_VOCABULARY = 50257
GPT2_ROWS = (GPT2_VOCABULARY, 50304)  # of the embedding, the second padded
MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout", "vocab_size")
MAX_PICKLE = 2**24  # bytes
PLAIN_OPCODES = {
    "PROTO", "FRAME", "MARK", "STOP", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "EMPTY_DICT",
    "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "NONE", "NEWTRUE",
    "NEWFALSE",
}
TOKENS_PER_CHUNK = 2**24  # counted at a time


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint of nanoGPT that was found and is supported; its weights are yet to be read."""

    path: Path
    config: GPTConfig
    characters: CharTokenizer | None  # None: GPT-2's BPE
    vocabulary_path: Path | None  # the file that lists the characters
    step: int
    val_loss: float | None  # the estimate when it was saved
    data_dir: str

    @property
    def tokenizer_kind(self) -> str:
        return CharTokenizer.kind if self.characters else GPT2Tokenizer.kind

    def load_tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer; GPT-2's merges are downloaded if need be."""
        return self.characters or make_tokenizer("gpt2", "", self.data_dir)

    def load_state(self) -> dict[str, Tensor]:
        """The weights as GPT(config).state_dict() has them, float32 on the CPU. UserError for what does not fit."""
        check_records(self.path)
        tensors = tensors_of(read_content(self.path, mmap=False))
        check_tensors(tensors, self.config, self.path)
        if not torch.equal(*(tensors[name] for name in VOCABULARY_ROWS)):
            raise UserError(f"{self.path}: lm_head.weight differs from transformer.wte.weight, which nanoGPT ties")
        state = {name: value.float().contiguous() for name, value in tensors.items()}
        if damaged := [name for name, value in state.items() if not value.isfinite().all()]:
            raise UserError(f"{self.path}: {damaged[0]} holds values that are not finite")
        n, n_padded = self.config.vocab_size, self.config.padded_vocab_size
        return state | {name: F.pad(state[name][:n], (0, 0, 0, n_padded - n)) for name in VOCABULARY_ROWS}


def is_checkpoint(path: str | Path) -> bool:
    """Whether the file `path` is a checkpoint of nanoGPT."""
    try:
        content = read_content(Path(path))
    except UserError:  # whoever else reads the file says what is wrong
        return False
    return isinstance(content, dict) and all(isinstance(content.get(key), dict) for key in ("model", "model_args"))


def read_content(path: Path, mmap: bool = True) -> dict:
    """The content of a checkpoint, tensors on the CPU; with `mmap` they are not read yet."""
    with named_damage(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def find(path: str | Path, data_dir: str) -> Pretrained:
    """The checkpoint `path`, for which `is_checkpoint` holds, with its characters. UserError for what does not fit.

    The characters are in its data set's meta.pkl, or in our data set of the same name.
    """
    path, content = Path(path), read_content(Path(path))
    n_rows, config = config_of(content["model_args"], path)
    check_tensors(tensors_of(content), config, path)
    characters = vocabulary_path = None
    if n_rows not in GPT2_ROWS:
        config_there = content.get("config")
        dataset = config_there.get("dataset") if isinstance(config_there, dict) else None
        vocabulary_path, characters = find_characters(path, dataset, n_rows, data_dir)
    step, val_loss = content.get("iter_num", 0), content.get("best_val_loss")
    val_loss = val_loss.item() if isinstance(val_loss, Tensor) and val_loss.numel() == 1 else val_loss
    return Pretrained(path, config, characters, vocabulary_path, step, val_loss if is_number(val_loss) else None,
                      data_dir)


def config_of(args: dict, path: Path) -> tuple[int, GPTConfig]:
    """(rows of the embedding, config) that a checkpoint's model_args describe. UserError names what does not fit."""
    problems = [f"{name} is not among nanoGPT's" for name in args.keys() - {*MODEL_ARGS}]
    # Without `bias` (until January 2023) there were always biases, and GELU was the approximation.
    values = {"bias": True} | {name: args[name] for name in MODEL_ARGS if name in args}
    n_rows = values.pop("vocab_size", None)
    problems += [f"{name} is missing" for name in {*MODEL_ARGS} - values.keys() - {"vocab_size"}]
    cfg, invalid = build_config(values | {"mlp": "gelu_erf" if "bias" in args else "gelu"})
    problems += invalid
    if not is_valid(n_rows, int, low=1, below=2**24):
        problems.append(f"vocab_size must be {describe(int, low=1, below=2**24)}, not {str(n_rows)[:60]}")
    if problems:
        raise UserError(*(f"{path}: model_args: {problem}" for problem in problems[:MAX_PROBLEMS]))
    return n_rows, GPTConfig.of(vars(cfg), GPT2_VOCABULARY if n_rows in GPT2_ROWS else n_rows)


def tensors_of(content: dict) -> dict[str, Tensor]:
    """The weights by their names in GPT, without causal masks; torch.compile may have put a prefix before them."""
    return {str(name).removeprefix("_orig_mod."): value for name, value in content["model"].items()
            if not str(name).endswith(MASKS)}


def check_tensors(tensors: dict[str, Tensor], config: GPTConfig, path: Path) -> None:
    """UserError if `tensors` are not those of GPT(config), but for padding; it names the first few that are not."""
    with torch.device("meta"):
        shapes = {name: [*value.shape] for name, value in GPT(config).state_dict().items()}
    problems = [f"{name} is missing" for name in shapes.keys() - tensors.keys()]
    for name, value in tensors.items():
        shape = [shapes.get(name)]
        if name in VOCABULARY_ROWS:
            n_rows = GPT2_ROWS if config.vocab_size == GPT2_VOCABULARY else [config.vocab_size]
            shape = [[n, config.n_embd] for n in n_rows]
        if name not in shapes:
            problems.append(f"{name} has no place in nanoGPT's model")
        elif not (isinstance(value, Tensor) and value.is_floating_point()
                  and value.layout == torch.strided and [*value.shape] in shape):
            problems.append(f"{name} is not a tensor of shape {shape[-1]}, as model_args require")
    if problems:
        raise UserError(*(f"{path}: {problem}" for problem in sorted(problems)[:MAX_PROBLEMS]))


def find_characters(path: Path, dataset: object, n: int, data_dir: str) -> tuple[Path, CharTokenizer]:
    """(file, the n characters it lists) of the checkpoint `path`, trained on `dataset`. UserError if there is none."""
    places = [path.parent / "meta.pkl"]
    if isinstance(dataset, str) and len(dataset) < 256:
        places += [path.parent / "../data" / dataset / "meta.pkl", Path(data_dir) / dataset / "meta.pkl",
                   Path(data_dir) / dataset / "meta.json"]
    problems = []
    for place in places:
        if not place.is_file():
            problems.append(f"{place} does not exist")
            continue
        try:
            tokenizer = read_characters(place) if place.suffix == ".pkl" else tokenizer_from_state(
                read_meta(place.parent)["tokenizer"], place)
            if tokenizer.kind == CharTokenizer.kind and tokenizer.vocab_size == n:
                return place, tokenizer
            problems.append(f"{place} has {plural(tokenizer.vocab_size, 'symbol')}")
        except UserError as error:
            problems += error.problems
    raise UserError(f"{path} was trained on {n} characters, which the meta.pkl of its data set ({dataset}) lists: copy "
                    f"that file next to the checkpoint; {'; '.join(problems)}")


class PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")


def read_plain_pickle(path: Path) -> object:
    """What a pickle of dicts, lists, strings and numbers holds. UserError for any other, none of which is executed."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_PICKLE + 1)
        if len(data) > MAX_PICKLE:
            raise ValueError(f"it is larger than {MAX_PICKLE >> 20} MiB")
        for opcode, argument, position in pickletools.genops(data):
            # A memo's index is the size of a table that is allocated.
            if opcode.name not in PLAIN_OPCODES or (opcode.name == "LONG_BINPUT" and argument > len(data)):
                raise ValueError(f"{opcode.name} at byte {position}")
        return PlainUnpickler(io.BytesIO(data)).load()
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    except Exception as error:  # damage raises a dozen exception types
        raise UserError(f"{path} is not a pickle of plain dicts, strings and numbers ({first_line(error)}); nothing "
                        f"else is read") from None


def read_characters(path: Path) -> CharTokenizer:
    """The character vocabulary in a meta.pkl. UserError if it holds none."""
    meta = read_plain_pickle(path)
    try:
        itos = meta["itos"]
        tokenizer = CharTokenizer(itos[id] for id in range(len(itos)))
        if meta["stoi"] != tokenizer.stoi or meta["vocab_size"] != tokenizer.vocab_size:
            raise ValueError("itos, stoi and vocab_size contradict each other")
        "".join(tokenizer.stoi).encode()  # UnicodeEncodeError, a ValueError: half a surrogate pair is no text
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no vocabulary of characters: {error!r}") from None
    return tokenizer


def take_over(source: Path, name: str, data_dir: str, overwrite: bool = False) -> str:
    """Make nanoGPT's data directory `source` data set `name` without copying; return a line about it.

    data_dir/name gets links to its files and a meta.json, or only that if it is `source` itself. UserError for files
    that are not what nanoGPT writes, or a directory that holds other data and not `overwrite`.
    """
    bins = {split: source / f"{split}.bin" for split in SPLITS}
    if missing := [str(file) for file in bins.values() if not file.is_file()]:
        raise UserError(f"{source} is not a data directory of nanoGPT: {' and '.join(missing)} missing")
    directory, has_characters = Path(data_dir) / name, os.path.lexists(source / "meta.pkl")
    if (source / "meta.json").exists() and not (directory.exists() and directory.samefile(source)):
        raise UserError(f"{source} is a data set of this project, not nanoGPT's: train on it with "
                        f"--data_dir={source.parent} --dataset={source.name}")
    tokenizer = read_characters(source / "meta.pkl") if has_characters else make_tokenizer("gpt2", "", data_dir)
    splits = {split: measured(file, tokenizer) for split, file in bins.items()}
    with lock_directory(directory):
        try:
            with atomic_write(directory / "meta.json") as [meta_file]:
                before = write_meta(meta_file, tokenizer, splits, overwrite)
                for file in () if directory.samefile(source) else bins.values():
                    link_file(file, directory / file.name)
        except OSError as error:
            raise UserError(f"cannot write the data set {directory}: {reason(error)}") from None
    counts = ", ".join(f"{split} {splits[split]['tokens']:,} tokens" for split in SPLITS)
    start = tokenizer.decode(np.fromfile(bins["train"], dtype="<u2", count=16))
    return (f"{directory}: {tokenizer.kind} tokenizer{'' if has_characters else ' (there is no meta.pkl)'}, "
            f"{plural(tokenizer.vocab_size, 'symbol')}; {counts}; begins {start!r}{before}")


def measured(file: Path, tokenizer: Tokenizer) -> dict[str, int | str]:
    """What meta.json says of a .bin file: tokens, bytes of their text, sha256. UserError for ids not of `tokenizer`."""
    size = file.stat().st_size
    if size % 2 or size < 4:
        raise UserError(f"{file} has {size:,} bytes: it is not a file of at least two uint16 ids")
    ids, n_bytes = np.memmap(file, dtype="<u2", mode="r"), 0
    for start in range(0, len(ids), TOKENS_PER_CHUNK):
        counts = np.bincount(ids[start : start + TOKENS_PER_CHUNK], minlength=tokenizer.vocab_size)
        if len(counts) > tokenizer.vocab_size:
            raise UserError(f"{file} holds id {len(counts) - 1:,}, outside the {tokenizer.kind} vocabulary of "
                            f"{plural(tokenizer.vocab_size, 'symbol')}")
        n_bytes += int(counts @ tokenizer.token_bytes)
    return {"tokens": len(ids), "bytes": n_bytes, "sha256": sha256_of(file)}
