"""Weights written in Hugging Face's layouts, tokenizer included: GPT-2's, Llama's and Qwen3's."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from core.huggingface import ACTIVATIONS, TRANSPOSED, VOCABULARY_ROWS, WEIGHTS
from core.tokenizer import END_OF_TEXT, Tokenizer
from lib.cli import UserError
from lib.files import atomic_write, make_directory, reason
from model import GELU, GPT, GPTConfig

# {layout: {field of GPTConfig: the values that it has a place for}}
LAYOUTS = {
    "GPT-2": {"norm": ("layernorm",), "mlp": (*GELU,), "pos": ("learned",), "qk_norm": (False,)},
    "Llama": {"norm": ("rmsnorm",), "mlp": ("swiglu",), "pos": ("rope",), "bias": (False,)},
}


def layout_of(config: GPTConfig, path: Path) -> str:
    """The layout that has a place for all parts of the model in the checkpoint `path`. UserError if none has.

    Qwen3's is Llama's with normalized queries and keys.
    """
    lacking = {layout: [f"{name}={getattr(config, name)}" for name, values in fields.items()
                        if getattr(config, name) not in values] for layout, fields in LAYOUTS.items()}
    for layout, parts in lacking.items():
        if not parts:
            return "Qwen3" if config.qk_norm else layout
    raise UserError(f"{path} fits none of Hugging Face's layouts: " + "; ".join(
        f"{layout}'s lacks {', '.join(parts)} (it has {described(LAYOUTS[layout])})"
        for layout, parts in lacking.items()))


def described(fields: dict[str, tuple]) -> str:
    """A layout in words: 'norm=layernorm, mlp=gelu or gelu_erf'."""
    return ", ".join(f"{name}={' or '.join(map(str, values))}" for name, values in fields.items())


def write_pretrained(directory: Path, model: GPT, tokenizer: Tokenizer, layout: str) -> None:
    """Write a model into `directory`, created if need be, config.json last. UserError where that is impossible."""
    config, ends = model.config, {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
    tensors, fields = (gpt2_tensors, gpt2_fields) if layout == "GPT-2" else (llama_tensors, llama_fields)
    contents = tokenizer_files(tokenizer, config.block_size)
    contents["generation_config.json"] = ends
    contents["config.json"] = fields(model) | ends | {
        "vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_weights}
    is_new = not directory.exists()
    make_directory(directory)
    try:
        with atomic_write(*(directory / name for name in (WEIGHTS, *contents))) as (weights, *files):
            save_file(tensors(model), weights, metadata={"format": "pt"})
            for file, content in zip(files, contents.values()):
                text = content if isinstance(content, str) else json.dumps(content, indent=1, ensure_ascii=False) + "\n"
                file.write_text(text, encoding="utf-8", newline="")
            shutil.copymode(files[0], weights)  # safetensors lets nobody else read them
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {directory}: {reason(error)}") from None
    finally:
        if is_new and not any(directory.iterdir()):
            directory.rmdir()


def exported_state(model: GPT) -> dict[str, Tensor]:
    """The weights without rows that pad the vocabulary, and without an output layer that is the embedding."""
    return {name: value[: model.config.vocab_size] if name in VOCABULARY_ROWS else value
            for name, value in model.state_dict().items()
            if name != "lm_head.weight" or not model.config.tie_weights}


def stored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each contiguous in its own memory, as safetensors require."""
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


def gpt2_tensors(model: GPT) -> dict[str, Tensor]:
    """The weights as GPT2LMHeadModel has them: Conv1D's orientation, every bias."""
    tensors = {}
    for name, value in exported_state(model).items():
        if not model.config.bias and name not in VOCABULARY_ROWS and "wpe" not in name:
            tensors[name.removesuffix("weight") + "bias"] = torch.zeros(len(value))
        tensors[name] = value.t() if name.endswith(TRANSPOSED) else value
    return stored(tensors)


def gpt2_fields(model: GPT) -> dict:
    """What config.json says of a GPT2LMHeadModel."""
    config = model.config
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
        "n_positions": config.block_size, "n_ctx": config.block_size, "n_embd": config.n_embd,
        "n_layer": config.n_layer, "n_head": config.n_head, "n_inner": None,
        "activation_function": next(name for name, mlp in ACTIVATIONS.items() if mlp == config.mlp),
        "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout, "resid_pdrop": config.dropout,
    }


def llama_tensors(model: GPT) -> dict[str, Tensor]:
    """The weights as LlamaForCausalLM has them: q, k and v apart, and so SwiGLU's gate and the rest.

    Qwen3ForCausalLM also scales its normalized queries and keys. All rotate the pairs (x_i, x_{i + D/2}) of a head,
    so no rows of q and k change places.
    """
    names = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ln_1": "input_layernorm",
             "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj", "mlp.c_proj": "mlp.down_proj"}
    parts = {"attn.c_attn": [f"self_attn.{part}_proj" for part in "qkv"], "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"]}
    tensors = {}
    for name, value in exported_state(model).items():
        path = name.removeprefix("transformer.").removesuffix(".weight").split(".")
        prefix, part = (f"model.layers.{path[1]}.", ".".join(path[2:])) if path[0] == "h" else ("", path[0])
        targets = parts.get(part) or [names.get(part, part)]
        tensors |= {f"{prefix}{target}.weight": piece for target, piece in zip(targets, value.chunk(len(targets)))}
    if model.config.qk_norm:
        ones = torch.ones(model.config.n_embd // model.config.n_head)
        tensors |= {f"model.layers.{layer}.self_attn.{part}_norm.weight": ones
                    for layer in range(model.config.n_layer) for part in "qk"}
    return stored(tensors)


def llama_fields(model: GPT) -> dict:
    """What config.json says of a LlamaForCausalLM or, with normalized queries and keys, a Qwen3ForCausalLM."""
    config = model.config
    name = "Qwen3" if config.qk_norm else "Llama"
    return {
        "architectures": [f"{name}ForCausalLM"], "model_type": name.lower(),
        "max_position_embeddings": config.block_size, "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head, "head_dim": config.n_embd // config.n_head,
        "intermediate_size": model.transformer.h[0].mlp.c_proj.in_features, "hidden_act": "silu",
        "rms_norm_eps": model.transformer.ln_f.eps, "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False,
        "attention_dropout": config.dropout,
    }


def tokenizer_files(tokenizer: Tokenizer, block_size: int) -> dict[str, str | dict]:
    """{file name: text, or content to be written as JSON} of the tokenizer."""
    settings = {"model_max_length": block_size, "clean_up_tokenization_spaces": False,
                "model_input_names": ["input_ids", "attention_mask"]}
    if tokenizer.kind == "gpt2":
        specials = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        return {"vocab.json": tokenizer.vocabulary(), "merges.txt": tokenizer.merges,
                "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False,
                                          **settings, **specials}}
    characters = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "post_processor": None, "decoder": {"type": "Fuse"},
        # "<unk>" is not among the tokens: unknown characters are errors, as they are here.
        "model": {"type": "WordLevel", "vocab": tokenizer.vocabulary(), "unk_token": "<unk>"},
    }
    return {"tokenizer.json": characters,
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **settings}}
