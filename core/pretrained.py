"""Weights to start from: published ones, directories in Hugging Face's layout, nanoGPT's checkpoints and ours."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core import huggingface, nanogpt
from core.checkpoint import load_checkpoint, newest_first
from core.config import TrainConfig
from core.tokenizer import Tokenizer, tokenizer_from_state
from lib.cli import UserError, nearest, plural
from model import GPT, GPTConfig

MAX_NAMED = 5  # different tokens in a message


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of this project that was found; its weights are yet to be read."""

    path: Path
    config: GPTConfig
    tokenizer: Tokenizer

    @property
    def tokenizer_kind(self) -> str:
        return self.tokenizer.kind

    def load_tokenizer(self) -> Tokenizer:
        return self.tokenizer

    def load_state(self) -> dict[str, Tensor]:
        """The weights, float32 on the CPU. UserError if the file is damaged."""
        return load_checkpoint(self.path)["model_state_dict"]


# A model that was found and is supported; its tokenizer and weights are yet to be read.
Pretrained = huggingface.Pretrained | nanogpt.Pretrained | Checkpoint


def find(name: str | Path, data_dir: str) -> Pretrained:
    """The model that `name` means. UserError if there is none, or it is not supported. Downloads nothing."""
    if huggingface.is_model(name):
        return huggingface.find(name, data_dir)
    if nanogpt.is_checkpoint(name):
        return nanogpt.find(name, data_dir)
    if os.path.isfile(name):
        content = load_checkpoint(name, verify=False)
        tokenizer = tokenizer_from_state(content["tokenizer"], name)
        try:
            return Checkpoint(Path(name), GPTConfig.of(content["config"], tokenizer.vocab_size), tokenizer)
        except KeyError as error:
            raise UserError(f"the config in {name} lacks {error}") from None
    published, files = huggingface.PUBLISHED, newest_first(Path(name)) if os.path.isdir(name) else []
    if files:
        raise UserError(f"{name} is the directory of a run: give one of its checkpoints, such as {files[0]}")
    raise UserError(f"{name} is neither one of {', '.join(published)}{nearest(str(name), published)}, nor a directory "
                    f"in Hugging Face's layout (with config.json and {huggingface.WEIGHTS}), nor a checkpoint file")


def load(weights: Pretrained) -> tuple[GPT, Tokenizer]:
    """(GPT in eval mode, float32 on the CPU, its tokenizer), downloaded if need be. UserError for what does not fit."""
    tokenizer, state = weights.load_tokenizer(), weights.load_state()
    with torch.device("meta"):  # no time for random weights
        model = GPT(weights.config)
    model.load_state_dict(state, assign=True)
    if weights.config.tie_weights:
        model.lm_head.weight = model.transformer.wte.weight
    return model.eval(), tokenizer


def pretrained_weights(cfg: TrainConfig, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The weights of init_from, cut to block_size positions. UserError if the vocabularies differ."""
    weights = find(cfg.init_from, cfg.data_dir)
    check_vocabulary(cfg, weights, tokenizer)
    state = weights.load_state()
    if "transformer.wpe.weight" in state:
        state["transformer.wpe.weight"] = state["transformer.wpe.weight"][: cfg.block_size]
    print(f"weights from {weights.path}")
    return state


def check_vocabulary(cfg: TrainConfig, weights: Pretrained, tokenizer: Tokenizer) -> None:
    """UserError if `tokenizer`, that of cfg.dataset, has not the weights' vocabulary; it names what differs."""
    ours, theirs = tokenizer.vocabulary(), weights.load_tokenizer().vocabulary()
    if ours != theirs:
        different = sorted(ours.keys() ^ theirs.keys())
        what = "they number the same tokens differently"
        if different:
            what = f"only one of them has {', '.join(map(repr, different[:MAX_NAMED]))}"
        raise UserError(f"{vocabulary_message(cfg, weights)}; {what}")


def vocabulary_message(cfg: TrainConfig, weights: Pretrained) -> str:
    """The message when cfg.dataset's vocabulary differs from the weights'."""
    hint = "; shakespeare has it, and so does any data set prepared with prepare_data.py --tokenizer gpt2"
    return (f"dataset={cfg.dataset} does not have the vocabulary of init_from={cfg.init_from} "
            f"({weights.tokenizer_kind}, {plural(weights.config.vocab_size, 'symbol')}): choose another data set"
            f"{hint if weights.tokenizer_kind == 'gpt2' else ''}")
