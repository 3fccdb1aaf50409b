"""Checkpoints seen from outside the run that writes them: found, opened, named."""

import glob
import os
from contextlib import suppress
from pathlib import Path

from core import nanogpt, pretrained
from core.checkpoint import LAUNCH, NONE_INTACT, UNFIT, load_checkpoint, newest_first
from core.config import TrainConfig
from core.tokenizer import Tokenizer, tokenizer_from_state
from lib.cli import UserError, first_line
from lib.device import is_out_of_memory
from model import GPT, GPTConfig


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint `path`, or the one of the last step in a run's directory; of several runs the last written to."""
    path = Path(path)
    try:
        if path.is_file():
            return path
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    for _ in range(10):  # a run that is training may prune all that one look has found
        written = {}
        for file in (*path.glob("*.pt"), *path.glob("*/*.pt")):
            with suppress(OSError):  # pruned just now, or a link to nothing
                written[file] = file.stat().st_mtime_ns if file.is_file() else -1
        if max(written.values(), default=-1) >= 0:
            newest = max(written, key=written.get)
            of_run = newest_first(newest.parent)  # a copied run's times say nothing of its steps
            return of_run[0] if newest in of_run else newest
    what = "has no checkpoints" if path.is_dir() else "is neither a file nor a run directory"
    if not path.exists() and os.path.exists(named := os.path.join(TrainConfig.out_dir, path)):
        raise UserError(f"{path} {what}: did you mean {named}?")
    raise UserError(f"{path} {what}: train first (python train_gpt2.py configs/quickstart.py) or give --ckpt FILE")


def load_model(name: str | Path, data_dir: str = "data") -> tuple[Path, GPT, Tokenizer, dict]:
    """(path, GPT on the CPU, tokenizer, content) of the checkpoint that `find_checkpoint` finds by `name`.

    It may be one of nanoGPT's: then `content` holds only step, val_loss and the file of its vocabulary (or None).
    UserError if any part of it does not fit.
    """
    path = find_checkpoint(name)
    if nanogpt.is_checkpoint(path):
        found = nanogpt.find(path, data_dir)
        content = {"step": found.step, "val_loss": found.val_loss, "vocabulary_path": found.vocabulary_path}
        return path, *pretrained.load(found), content
    try:
        content = load_checkpoint(path)
    except UserError:
        if path.exists() or path == Path(name):
            raise
        return load_model(name, data_dir)  # a run that is training has pruned it meanwhile
    tokenizer = tokenizer_from_state(content["tokenizer"], path)
    try:
        model = GPT(GPTConfig.of(content["config"], tokenizer.vocab_size))
        model.load_state_dict(content["model_state_dict"])
    except UNFIT as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"the weights in {path} do not fit its config: {first_line(error)}") from None
    return path, model, tokenizer, content


def peek(run_dir: Path) -> tuple[Path, dict] | tuple[None, None]:
    """As load_newest, but memory-mapped and not verified: neither records nor values, which may be damaged."""
    problems = []
    for path in newest_first(run_dir):
        try:
            return path, load_checkpoint(path, verify=False)
        except UserError as error:  # load_newest will warn of it
            problems += error.problems
    if problems:
        raise UserError(*problems, NONE_INTACT.format(run_dir))
    return None, None


def is_restart(run_dir: Path, launch: str | None) -> bool:
    """Whether processes of this launch have trained in `run_dir` before: torchrun has restarted them."""
    with suppress(OSError, ValueError):
        return launch is not None and (run_dir / LAUNCH).read_text() == launch
    return False


def free_run_name(cfg: TrainConfig) -> str:
    """cfg.run_name, or with -2, -3, … the first one without checkpoints; to resume, the last one with any."""
    out_dir, taken = Path(cfg.out_dir), {}
    for path in (out_dir / cfg.run_name, *out_dir.glob(f"{glob.escape(cfg.run_name)}-*")):
        number = path.name[len(cfg.run_name) + 1 :] or "1"
        if number.isdecimal() and newest_first(path):
            taken[int(number)] = path.name
    if cfg.resume and taken:
        return taken[max(taken)]
    return f"{cfg.run_name}-{max(taken) + 1}" if taken else cfg.run_name
