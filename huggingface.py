"""GPT-2's weights in Hugging Face's layout: a published name, or a folder with config.json and model.safetensors.

The published ones are fetched into data/downloads/huggingface/<name>/ once. Only safetensors are opened, no pickle.
"""

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from config import is_plain_name, nearest
from download import BPE_MERGES, download, fetch_source
from errors import UserError
from files import read_text
from model import GPT, GPTConfig
from tokenizer import tokenizer_from_state

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# name: (commit of openai-community/<name>, sha256 of its model.safetensors; None: what the hub tells for that commit)
PUBLISHED = {
    "gpt2": ("607a30d783dfa663caf39e06633721c8d4cfcd7e",
             "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da", None),
    "gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519", None),
    "gpt2-xl": ("15ea56dee5df4983c59b2538573817e1667135e2",
                "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"),
}
# What config.json may say, its default first. The three activations are one function: GELU's tanh form.
SUPPORTED = {
    "model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,), "add_cross_attention": (False,), "tie_word_embeddings": (True, False),
}
# Hugging Face's Conv1D keeps these as (inputs, outputs), nn.Linear as (outputs, inputs).
TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
VOCABULARY_ROWS = ("transformer.wte.weight", "lm_head.weight")  # padded here, not there
MASKS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which old files hold as if it were a weight
DTYPES = ("F32", "F16", "BF16")
MOST_PROBLEMS = 5  # told of one folder's tensors


def is_model(name):
    """Whether `name` is a published model's, or a folder with config.json, which a run directory does not have."""
    return name in PUBLISHED or os.path.isfile(os.path.join(name, "config.json"))


@dataclass(frozen=True)
class Pretrained:
    """A model that was found and fits: its shape and tokenizer. The weights are read (and fetched) by `state`."""

    name: str
    folder: Path
    config: GPTConfig
    tokenizer: object

    def state(self):
        """The weights as GPT(config).state_dict() has them: float32, on the CPU. UserError for what does not fit."""
        if self.name in PUBLISHED:
            fetch_published(self.name, WEIGHTS, self.folder)
        return read_state(self.folder, self.config)


def find(name, data_dir="data"):
    """The Pretrained that `name` means: one of PUBLISHED or a folder. UserError if it is none, or is not supported."""
    name = os.fspath(name)
    if not is_model(name):
        raise UserError(f"{name} is neither one of {', '.join(PUBLISHED)}{nearest(name, PUBLISHED)} nor a folder in "
                        f"Hugging Face's layout (with config.json and {WEIGHTS})")
    folder = Path(name)
    if name in PUBLISHED:
        folder = Path(data_dir) / "downloads/huggingface" / name
        fetch_published(name, "config.json", folder)
    config = read_config(folder / "config.json")
    return Pretrained(name, folder, config, read_tokenizer(folder, config.vocab_size, data_dir))


def load(name, data_dir="data"):
    """(GPT in eval mode on the CPU in float32, tokenizer) of one of PUBLISHED or a folder. UserError as in `find`."""
    found = find(name, data_dir)
    return build(found.config, found.state()), found.tokenizer


def build(config, state):
    """A GPT in eval mode that takes the tensors of `state` as its own. RuntimeError where they do not fit."""
    with torch.device("meta"):  # no time for random weights
        model = GPT(config)
    model.load_state_dict(state, assign=True)
    if config.tie_weights:
        model.lm_head.weight = model.transformer.wte.weight
    return model.eval()


def fetch_published(name, file, folder):
    """Make sure that `folder` holds a file of one of PUBLISHED; HF_ENDPOINT names another hub than huggingface.co."""
    revision, sha256 = PUBLISHED[name]
    hub = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    url = f"{hub}/openai-community/{name}/resolve/{revision}/{file}"
    download(url, folder / file, sha256 if file == WEIGHTS else None)


def read_json(path):
    """The object in a JSON file, a dict. UserError if it cannot be read or is something else."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged, or no JSON: {error}; remove it and fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return content


def read_config(path):
    """The GPTConfig that a config.json tells, without dropout. UserError names each field that is not supported."""
    values = read_json(path)
    sizes = dict(n_layer="n_layer", n_head="n_head", n_embd="n_embd", vocab_size="vocab_size",
                 block_size="n_positions" if "n_positions" in values else "n_ctx")
    problems = [f"{path}: {key} must be a whole number from 1 to {most:,}, not {str(values.get(key))[:60]}"
                for key in sizes.values() for most in [10_000 if key == "n_layer" else 2**24]
                if type(values.get(key)) is not int or not 1 <= values[key] <= most]
    for key, choices in SUPPORTED.items():
        value = values.get(key, choices[0])
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            problems.append(f"{path}: {key}={str(value)[:60]} is not supported, only {' or '.join(map(str, choices))}")
    if not problems:
        shape = {name: values[key] for name, key in sizes.items()}
        if values.get("n_inner") not in (None, 4 * shape["n_embd"]):
            problems.append(f"{path}: n_inner={str(values['n_inner'])[:60]} is not supported, only 4 * n_embd")
        if shape["n_embd"] % shape["n_head"]:
            problems.append(f"{path}: n_embd={shape['n_embd']} is not divisible by n_head={shape['n_head']}")
    if problems:
        raise UserError(*problems)
    return GPTConfig(**shape, tie_weights=values.get("tie_word_embeddings", True))


def read_tokenizer(folder, vocab_size, data_dir):
    """The tokenizer of a folder, by its merges.txt or tokenizer.json; with neither, GPT-2's (fetched if need be).

    UserError for another kind, or where its ids are not what the folder's files and vocab_size say.
    """
    path, told = folder / "merges.txt", None
    if path.is_file():
        state = {"kind": "gpt2", "merges": read_text(path)}
        told = folder / "vocab.json"
        told = read_json(told) if told.is_file() else None
    elif (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        state, told = read_tokenizer_json(path)
    else:
        path = fetch_source(BPE_MERGES, data_dir)
        state = {"kind": "gpt2", "merges": read_text(path)}
    tokenizer = tokenizer_from_state(state, path)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(f"the tokenizer in {path} has {tokenizer.vocab_size:,} symbols, vocab_size in "
                        f"{folder / 'config.json'} is {vocab_size:,}")
    if told and {**tokenizer.vocabulary(), **told} != tokenizer.vocabulary():
        raise UserError(f"{folder} numbers its tokens in another way than GPT-2's or a character vocabulary does: "
                        f"that is not supported")
    return tokenizer


def read_tokenizer_json(path):
    """(tokenizer state, {token: id}) of a tokenizer.json with characters or GPT-2's kind of BPE."""
    model = read_json(path).get("model")
    try:
        vocabulary = model["vocab"]
        if model["type"] == "BPE":
            pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
            return {"kind": "gpt2", "merges": "\n".join(["#version: 0.2", *pairs]) + "\n"}, vocabulary
        if model["type"] == "WordLevel":
            return {"kind": "char", "itos": sorted(vocabulary, key=vocabulary.get)}, vocabulary
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from None
    raise UserError(f"{path} holds a tokenizer of the type {str(model['type'])[:60]}, only BPE and characters "
                    f"(WordLevel) are supported")


def tensor_files(folder):
    """(safetensors files of `folder`, {tensor: file} of its index or {}). UserError if one is missing, or all are."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS], {}
    if not (folder / INDEX).is_file():
        pickle = (", and pytorch_model.bin is a pickle, which is not opened: write the folder again with transformers' "
                  "save_pretrained" if (folder / "pytorch_model.bin").exists() else "")
        raise UserError(f"{folder} has no {WEIGHTS}{pickle}")
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise UserError(f"{folder / INDEX} is damaged: it has no weight_map")
    problems = []
    for file in sorted({str(file) for file in index.values()}):
        if not is_plain_name(file) or not file.endswith(".safetensors"):
            problems.append(f"{folder / INDEX} names {file[:60]!r}, which is no safetensors file of this folder")
        elif not (folder / file).is_file():
            problems.append(f"{folder / file} is missing, {INDEX} names it")
    if problems:
        raise UserError(*problems[:MOST_PROBLEMS])
    return [folder / file for file in sorted(set(index.values()))], index


def open_tensors(files, stack):
    """{name in GPT: (name in the file, file, opened file)} of all tensors but masks. UserError for a damaged file."""
    found = {}
    for path in files:
        try:
            opened = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is cut or damaged, or no safetensors file ({error}): remove it and fetch it "
                            f"again") from None
        found |= {name_in_gpt(key): (key, path, opened) for key in list(opened.keys()) if not key.endswith(MASKS)}
    return found


def name_in_gpt(key):
    """GPT's name of a tensor in a file, where "transformer." may be left out."""
    return key if key.startswith("lm_head.") else "transformer." + key.removeprefix("transformer.")


def read_state(folder, config):
    """The weights in `folder` as GPT(config).state_dict() has them: float32, rows that pad the vocabulary zero.

    UserError, before any is read, names the tensors that are missing, unknown, or of another shape or dtype.
    """
    with torch.device("meta"):
        expected = {name: value.shape for name, value in GPT(config).state_dict().items()}
    with ExitStack() as stack:
        files, index = tensor_files(folder)
        found = open_tensors(files, stack)
        told = {name_in_gpt(key): folder / file for key, file in index.items()}
        optional = ["lm_head.weight"] if config.tie_weights else []
        problems = [f"{told.get(name, files[0])}: tensor {name.removeprefix('transformer.')} is missing"
                    for name in expected if name not in found and name not in optional]
        problems += [problem for name in found if (problem := misfit(name, *found[name], expected.get(name), config))]
        if problems:
            more = len(problems) - MOST_PROBLEMS
            raise UserError(*problems[:MOST_PROBLEMS], *([f"and {more} more like these"] if more > 0 else []))
        state = {name: read_tensor(name, *found[name], expected[name]) for name in expected if name in found}
    embedding = state["transformer.wte.weight"]
    if config.tie_weights and not torch.equal(state.setdefault("lm_head.weight", embedding), embedding):
        raise UserError(f"{found['lm_head.weight'][1]}: tensor lm_head.weight is another than wte.weight, and "
                        f"{folder / 'config.json'} says that they are one (tie_word_embeddings)")
    return state


def misfit(name, key, path, opened, shape, config):
    """What is wrong with a tensor that should have this `shape` in GPT (None: that is not in GPT), or None."""
    if shape is None:
        return f"{path}: tensor {key} has no place in the model that config.json describes"
    part, shape = opened.get_slice(key), list(shape)
    if name in VOCABULARY_ROWS:
        shape[0] = config.vocab_size
    if name.endswith(TRANSPOSED):
        shape.reverse()
    if part.get_shape() != shape:
        return f"{path}: tensor {key} has shape {part.get_shape()}, by config.json it should be {shape}"
    if part.get_dtype() not in DTYPES:
        return f"{path}: tensor {key} is of type {part.get_dtype()}, only {', '.join(DTYPES)} are supported"
    return None


def read_tensor(name, key, path, opened, shape):
    """One tensor in our shape and orientation, float32, on its own memory. UserError if it cannot be read."""
    try:
        value = opened.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: tensor {key} cannot be read: {error}") from None
    if not value.isfinite().all():
        raise UserError(f"{path}: tensor {key} holds values that are not finite")
    value = value.t() if name.endswith(TRANSPOSED) else value
    value = value.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return F.pad(value, (0, 0, 0, shape[0] - len(value))) if name in VOCABULARY_ROWS else value
