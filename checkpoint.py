"""Checkpoints: one self-contained file each, whole or absent, verified before they are used.

A run directory holds step_NNNNNNNN.pt (the newest ones) and best.pt (lowest validation loss).
"""

import os
import sys
import zipfile
from pathlib import Path

import torch

from errors import UserError

STEP_PATTERN = "step_" + "[0-9]" * 8 + ".pt"
TEMPORARY_SUFFIX = ".tmp"
TYPES = {"model_state_dict": dict, "optimizer_state_dict": dict, "config": dict, "vocab_size": int, "tokenizer": dict,
         "step": int, "val_loss": (float, type(None))}


def save_checkpoint(path, content):
    """Write `content`, a dict of tensors and primitives, to `path`: whole, or not at all (OSError)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch.save wraps what writing the file met
            raise error.__context__ from None
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(folder):
    """Make a rename in `folder` survive a power cut, where the system can open directories (not Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def remove_leftovers(run_dir):
    """Delete what a killed process was writing."""
    for path in Path(run_dir).glob("*" + TEMPORARY_SUFFIX):
        path.unlink()


def step_path(run_dir, step):
    return Path(run_dir) / f"step_{step:08d}.pt"


def step_checkpoints(run_dir):
    """The run's step_*.pt files, oldest first."""
    return sorted(Path(run_dir).glob(STEP_PATTERN))


def newest_first(run_dir):
    """The run's step_*.pt files from the newest to the oldest, then best.pt, as far as they are there."""
    best = Path(run_dir) / "best.pt"
    return [*step_checkpoints(run_dir)[::-1], *([best] if best.exists() else [])]


def prune_checkpoints(run_dir, keep):
    """Delete all step_*.pt but the `keep` newest."""
    for path in step_checkpoints(run_dir)[:-keep]:
        path.unlink()


def load_checkpoint(path):
    """The content of a checkpoint, tensors on the CPU. UserError if it is missing, damaged or no checkpoint.

    A .pt file is a zip archive: each record's CRC is checked first. Nothing in the file is executed
    (weights_only=True).
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise UserError(f"checkpoint {path} is damaged (record {damaged})")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from None
    except Exception as error:  # zipfile and torch.load meet damage with exceptions of a dozen types
        raise UserError(f"checkpoint {path} is damaged, or no checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        content = {}
    wrong = [key for key, kind in TYPES.items() if key not in content or not isinstance(content[key], kind)]
    if wrong:
        raise UserError(f"{path} is not a checkpoint of this project: {', '.join(wrong)} missing or of a wrong type")
    return content


def load_newest(run_dir):
    """(path, content) of the run's newest whole checkpoint, with a warning for each damaged one passed over.

    (None, None) when there are none. UserError when there are some and none is whole.
    """
    paths = newest_first(run_dir)
    for path in paths:
        try:
            return path, load_checkpoint(path)
        except UserError as error:
            print(f"warning: {error}; trying the one before it", file=sys.stderr)
    if paths:
        raise UserError(f"no checkpoint in {run_dir} is whole; start anew with another --run_name")
    return None, None


def newest_config(run_dir):
    """The config in the run's newest checkpoint that can be opened, or None; no weight is read, nothing verified."""
    for path in newest_first(run_dir):
        try:
            return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["config"])
        except Exception:  # damaged, in a dozen ways: load_newest tells of it
            continue
    return None


def find_checkpoint(path):
    """The file that `path` means: itself, or in a run directory or a folder of them the most recently written."""
    path = Path(path)
    if path.is_file():
        return path
    found = [file for pattern in ("*.pt", "*/*.pt") for file in path.glob(pattern)]
    if not found:
        what = "has no checkpoints" if path.is_dir() else "is neither a file nor a run directory"
        raise UserError(f"{path} {what}: train first (python train_gpt2.py configs/quickstart.py) or give --ckpt FILE")
    return max(found, key=lambda file: file.stat().st_mtime_ns)
