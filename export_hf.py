"""Write a checkpoint as a folder that Hugging Face's transformers opens with from_pretrained, tokenizer included.

    python export_hf.py --ckpt checkpoints/shakespeare/best.pt --out exported
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from checkpoint import find_checkpoint
from errors import UserError, run_script
from files import make_folder
from huggingface import TRANSPOSED, VOCABULARY_ROWS, WEIGHTS
from sample import load_model
from tokenizer import END_OF_TEXT

EXPORTED = {"norm": "layernorm", "mlp": "gelu", "pos": "learned"}  # Hugging Face's GPT-2 has nothing else


def check_family(config, path):
    """UserError if a GPTConfig has parts that Hugging Face's GPT-2 does not have."""
    others = [f"{name}={getattr(config, name)}" for name, only in EXPORTED.items() if getattr(config, name) != only]
    if others:
        possible = ", ".join(f"{name}={only}" for name, only in EXPORTED.items())
        raise UserError(f"{path}: {', '.join(others)} {'has' if len(others) == 1 else 'have'} no counterpart in "
                        f"Hugging Face's GPT-2; only {possible} can be exported")


def tensors_of(model):
    """{name: tensor} as Hugging Face's GPT2LMHeadModel has them: Conv1D's orientation, every bias, no padding rows."""
    config, tensors = model.config, {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_weights:
            continue
        if name in VOCABULARY_ROWS:
            value = value[: config.vocab_size]
        elif not config.bias and "wpe" not in name:
            tensors[name.removesuffix("weight") + "bias"] = torch.zeros(len(value))
        value = value.t() if name.endswith(TRANSPOSED) else value
        tensors[name] = value.clone(memory_format=torch.contiguous_format)
    return tensors


def config_json(config, end_of_text):
    """The content of config.json, a dict; `end_of_text`: the token's id, or None."""
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config.vocab_size,
        "n_positions": config.block_size, "n_ctx": config.block_size, "n_embd": config.n_embd,
        "n_layer": config.n_layer, "n_head": config.n_head, "n_inner": None, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout, "resid_pdrop": config.dropout, "tie_word_embeddings": config.tie_weights,
        "bos_token_id": end_of_text, "eos_token_id": end_of_text,
    }


def tokenizer_files(tokenizer, block_size):
    """{file name: text, or content to be written as JSON} of the tokenizer."""
    settings = {"model_max_length": block_size, "clean_up_tokenization_spaces": False}
    if tokenizer.kind == "gpt2":
        specials = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        return {"vocab.json": tokenizer.vocabulary(), "merges.txt": tokenizer.merges,
                "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False,
                                          **settings, **specials}}
    return {"tokenizer.json": character_tokenizer(tokenizer.vocabulary()),
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **settings}}


def character_tokenizer(vocabulary):
    """A tokenizer.json of single characters, a dict. Without an unknown token: other characters are errors, as here."""
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "post_processor": None, "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }


def write_folder(out, model, tokenizer):
    """Fill the folder `out`, made if it is not there: config.json comes last. UserError where that is not possible."""
    files = {**tokenizer_files(tokenizer, model.config.block_size),
             "config.json": config_json(model.config, tokenizer.end_of_text)}
    is_new = not out.exists()
    temporary = make_folder(out) / ".writing"
    try:
        temporary.mkdir()
        save_file(tensors_of(model), temporary / WEIGHTS, metadata={"format": "pt"})
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            (temporary / name).write_text(text, encoding="utf-8", newline="")
        for name in (WEIGHTS, *files):
            (temporary / name).replace(out / name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new and not any(out.iterdir()):
            out.rmdir()


def main(argv):
    parser = argparse.ArgumentParser(prog="export_hf.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", nargs="?", const="checkpoints", default="checkpoints", metavar="PATH",
                        help="a checkpoint or a run directory (default: the most recently written under checkpoints/)")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="a folder that is new or empty")
    args = parser.parse_args(argv)
    out = args.out.absolute()
    try:
        taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        raise UserError(f"cannot look into {args.out}: {error.strerror}") from None
    if taken:
        raise UserError(f"{args.out} is there already and not an empty folder: choose another --out")
    path = find_checkpoint(args.ckpt)
    model, tokenizer = load_model(path)
    check_family(model.config, path)
    write_folder(out, model, tokenizer)
    print(f"{path} -> {args.out}: {model.n_params():,} parameters, {tokenizer.kind} tokenizer with "
          f"{tokenizer.vocab_size:,} symbols; open it with transformers' AutoModelForCausalLM and "
          f"AutoTokenizer.from_pretrained({str(args.out)!r}), or here with --init_from={args.out}")


if __name__ == "__main__":
    run_script(main)
