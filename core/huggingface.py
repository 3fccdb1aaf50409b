"""GPT-2's weights in Hugging Face's layout: config.json, model.safetensors, the tokenizer's files.

Published weights are downloaded once, into data/downloads/huggingface/<name>/. Only safetensors are opened, no pickle.
"""

import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.corpus import BPE_MERGES
from core.tokenizer import Tokenizer, tokenizer_from_state
from lib.cli import UserError, describe, is_plain_name, is_valid
from lib.download import download, fetch_source
from lib.files import read_text
from model import GPT, GPT2_SIZES, GPTConfig

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# name: (commit of openai-community/<name>, sha256 of its model.safetensors; None: what the hub reports for that commit)
PUBLISHED = {
    "gpt2": ("607a30d783dfa663caf39e06633721c8d4cfcd7e",
             "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da", None),
    "gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519", None),
    "gpt2-xl": ("15ea56dee5df4983c59b2538573817e1667135e2",
                "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"),
}
# What config.json may say, the default first.
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_erf"}
SUPPORTED = {
    "activation_function": (*ACTIVATIONS,), "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,), "reorder_and_upcast_attn": (False,), "add_cross_attention": (False,),
    "tie_word_embeddings": (True, False),
}
# Hugging Face's Conv1D keeps these as (inputs, outputs), nn.Linear as (outputs, inputs).
TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
VOCABULARY_ROWS = ("transformer.wte.weight", "lm_head.weight")  # padded here, not there
MASKS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which old files store as if it were a weight
DTYPES = ("F32", "F16", "BF16")
MAX_PROBLEMS = 5  # reported of one directory's tensors


@dataclass(frozen=True)
class Pretrained:
    """A model that was found and is supported; its tokenizer and weights are yet to be read, or downloaded."""

    name: str
    path: Path  # its directory
    config: GPTConfig
    tokenizer_kind: str  # "gpt2" or "char"
    data_dir: str

    def load_tokenizer(self) -> Tokenizer:
        """The model's tokenizer; where its directory has none, GPT-2's, whose merges are downloaded if need be.

        UserError if its ids differ from what the directory's files and vocab_size say.
        """
        directory, vocab_size = self.path, self.config.vocab_size
        stored = read_tokenizer_files(directory)
        if stored is None:
            path = fetch_source(BPE_MERGES, self.data_dir)
            stored = path, {"kind": "gpt2", "merges": read_text(path)}, {}
        path, state, ids = stored
        tokenizer = tokenizer_from_state(state, path)
        if tokenizer.vocab_size != vocab_size:
            raise UserError(f"the tokenizer in {path} has {tokenizer.vocab_size:,} symbols, vocab_size in "
                            f"{directory / 'config.json'} is {vocab_size:,}")
        if not ids.items() <= tokenizer.vocabulary().items():
            raise UserError(f"{directory} numbers its tokens differently from GPT-2's or a character vocabulary: that "
                            f"is not supported")
        return tokenizer

    def load_state(self) -> dict[str, Tensor]:
        """The weights as GPT(config).state_dict() has them, float32 on the CPU. UserError for what does not fit.

        Published ones are downloaded if need be, from huggingface.co or the hub that HF_ENDPOINT names.
        """
        if self.name in PUBLISHED:
            revision, sha256 = PUBLISHED[self.name]
            hub = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
            url = f"{hub}/openai-community/{self.name}/resolve/{revision}/{WEIGHTS}"
            download(url, self.path / WEIGHTS, sha256)
        return read_state(self.path, self.config)


class StoredTensor(NamedTuple):
    """A tensor in an open safetensors file, by its name there."""

    key: str
    path: Path
    file: safe_open


def is_model(name: str | Path) -> bool:
    """Whether `name` is a published model or a directory with config.json, which a run directory does not have."""
    return name in PUBLISHED or os.path.isfile(os.path.join(name, "config.json"))


def find(name: str | Path, data_dir: str) -> Pretrained:
    """The model that `name`, for which `is_model` holds, means. UserError if it is not supported.

    Downloads nothing.
    """
    name = os.fspath(name)
    if name in PUBLISHED:
        directory, config = Path(data_dir) / "downloads/huggingface" / name, GPTConfig(**GPT2_SIZES[name])
    else:
        directory, config = Path(name), read_config(Path(name) / "config.json")
    stored = read_tokenizer_files(directory)
    return Pretrained(name, directory, config, stored[1]["kind"] if stored else "gpt2", data_dir)


def read_json(path: Path) -> dict:
    """The object in a JSON file. UserError if it cannot be read or is something else."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged or not JSON: {error}; remove it and fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return content


def read_config(path: Path) -> GPTConfig:
    """The config that a config.json describes, without dropout. UserError names each field that is not supported."""
    values = read_json(path)
    if values.get("model_type", "gpt2") != "gpt2":
        raise UserError(f"{path}: model_type={str(values['model_type'])[:60]} is not supported, only gpt2")
    keys = dict(n_layer="n_layer", n_head="n_head", n_embd="n_embd", vocab_size="vocab_size",
                block_size="n_positions" if "n_positions" in values else "n_ctx")
    problems = []
    for key in keys.values():
        bounds = dict(low=1, high=10_000 if key == "n_layer" else 2**24)
        if not is_valid(values.get(key), int, **bounds):
            problems.append(f"{key} must be {describe(int, **bounds)}, not {str(values.get(key))[:60]}")
    for key, choices in SUPPORTED.items():
        value = values.get(key, choices[0])
        if not is_valid(value, type(choices[0]), choices):
            problems.append(f"{key}={str(value)[:60]} is not supported, only {' or '.join(map(str, choices))}")
    if not problems:
        shape = {name: values[key] for name, key in keys.items()}
        if values.get("n_inner") not in (None, 4 * shape["n_embd"]):
            problems.append(f"n_inner={str(values['n_inner'])[:60]} is not supported, only 4 * n_embd")
        if shape["n_embd"] % shape["n_head"]:
            problems.append(f"n_embd={shape['n_embd']} is not divisible by n_head={shape['n_head']}")
    if problems:
        raise UserError(*(f"{path}: {problem}" for problem in problems))
    return GPTConfig(**shape, mlp=ACTIVATIONS[values.get("activation_function", "gelu_new")],
                     tie_weights=values.get("tie_word_embeddings", True))


def read_tokenizer_files(directory: Path) -> tuple[Path, dict, dict[str, int]] | None:
    """(file, tokenizer state, {token: id} as far as it is stored) from merges.txt or tokenizer.json; None: neither."""
    path = directory / "merges.txt"
    if path.is_file():
        vocabulary = directory / "vocab.json"
        state = {"kind": "gpt2", "merges": read_text(path)}
        return path, state, read_json(vocabulary) if vocabulary.is_file() else {}
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    model = read_json(path).get("model")
    try:
        ids = {**model["vocab"]}
        if model["type"] == "BPE":
            pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
            return path, {"kind": "gpt2", "merges": "\n".join(["#version: 0.2", *pairs]) + "\n"}, ids
        if model["type"] == "WordLevel":
            return path, {"kind": "char", "itos": sorted(ids, key=ids.get)}, ids
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from None
    raise UserError(f"{path} holds a tokenizer of type {str(model['type'])[:60]}; only BPE and characters (WordLevel) "
                    f"are supported")


def tensor_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """(the directory's safetensors files, {tensor: file} of its index or {}). UserError if any or all are missing."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS], {}
    if not (directory / INDEX).is_file():
        pickle = (", and pytorch_model.bin is a pickle, which is not opened: write the directory again with "
                  "transformers' save_pretrained" if (directory / "pytorch_model.bin").exists() else "")
        raise UserError(f"{directory} has no {WEIGHTS}{pickle}")
    index = read_json(directory / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise UserError(f"{directory / INDEX} is damaged: it has no weight_map")
    problems = []
    for file in sorted({str(file) for file in index.values()}):
        if not is_plain_name(file) or not file.endswith(".safetensors"):
            problems.append(f"{directory / INDEX} names {file[:60]!r}, which is not a safetensors file in this "
                            f"directory")
        elif not (directory / file).is_file():
            problems.append(f"{directory / file} is missing, {INDEX} names it")
    if problems:
        raise UserError(*problems[:MAX_PROBLEMS])
    return [directory / file for file in sorted(set(index.values()))], index


def name_in_gpt(key: str) -> str:
    """GPT's name of a tensor in a file, where "transformer." may be left out."""
    return key if key.startswith("lm_head.") else "transformer." + key.removeprefix("transformer.")


def open_tensors(paths: Iterable[Path], stack: ExitStack) -> dict[str, StoredTensor]:
    """{name in GPT: tensor} of all tensors but masks; `stack` closes the files. UserError for a damaged file."""
    found = {}
    for path in paths:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is truncated, damaged or not a safetensors file ({error}): remove it and fetch it "
                            f"again") from None
        found |= {name_in_gpt(key): StoredTensor(key, path, file) for key in list(file.keys())
                  if not key.endswith(MASKS)}
    return found


def read_state(directory: Path, config: GPTConfig) -> dict[str, Tensor]:
    """The directory's weights as GPT(config).state_dict() has them: float32, rows that pad the vocabulary zero.

    UserError, before any is read, names the tensors that are missing, unknown, or of a wrong shape or dtype.
    """
    with torch.device("meta"):
        shapes = {name: list(value.shape) for name, value in GPT(config).state_dict().items()}
    with ExitStack() as stack:
        paths, index = tensor_files(directory)
        found = open_tensors(paths, stack)
        indexed = {name_in_gpt(key): directory / file for key, file in index.items()}
        optional = ["lm_head.weight"] if config.tie_weights else []
        problems = [f"{indexed.get(name, paths[0])}: tensor {name.removeprefix('transformer.')} is missing"
                    for name in shapes if name not in found and name not in optional]
        problems += [f"{tensor.path}: tensor {tensor.key} {problem}" for name, tensor in found.items()
                     if (problem := problem_of(name, tensor, shapes.get(name), config))]
        if problems:
            more = len(problems) - MAX_PROBLEMS
            raise UserError(*problems[:MAX_PROBLEMS], *([f"and {more} more like these"] if more > 0 else []))
        state = {name: read_tensor(name, found[name], shape) for name, shape in shapes.items() if name in found}
    embedding = state["transformer.wte.weight"]
    if config.tie_weights and not torch.equal(state.setdefault("lm_head.weight", embedding), embedding):
        raise UserError(f"{found['lm_head.weight'].path}: tensor lm_head.weight differs from wte.weight, but "
                        f"config.json ties them (tie_word_embeddings)")
    return state


def problem_of(name: str, tensor: StoredTensor, shape: list[int] | None, config: GPTConfig) -> str | None:
    """What is wrong with a tensor that has this `shape` in GPT (None: GPT has no such tensor), or None."""
    if shape is None:
        return "has no place in the model its config describes"
    stored = tensor.file.get_slice(tensor.key)
    shape = [config.vocab_size, *shape[1:]] if name in VOCABULARY_ROWS else shape
    shape = shape[::-1] if name.endswith(TRANSPOSED) else shape
    if stored.get_shape() != shape:
        return f"has shape {stored.get_shape()}, its config requires {shape}"
    if stored.get_dtype() not in DTYPES:
        return f"is of type {stored.get_dtype()}, only {', '.join(DTYPES)} are supported"
    return None


def read_tensor(name: str, tensor: StoredTensor, shape: list[int]) -> Tensor:
    """One tensor in our shape and orientation, float32, in its own memory. UserError if it cannot be read."""
    try:
        value = tensor.file.get_tensor(tensor.key)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{tensor.path}: tensor {tensor.key} cannot be read: {error}") from None
    if not value.isfinite().all():
        raise UserError(f"{tensor.path}: tensor {tensor.key} holds values that are not finite")
    value = value.t() if name.endswith(TRANSPOSED) else value
    value = value.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return F.pad(value, (0, 0, 0, shape[0] - len(value))) if name in VOCABULARY_ROWS else value
