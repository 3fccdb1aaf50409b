"""Checkpoints: one self-contained file each, whole or absent, verified before use; and a run's directory of them.

A run directory holds step_NNNNNNNN.pt (the newest ones) and best.pt (lowest validation loss).
"""

import dataclasses
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType

import torch
from torch import Tensor

from core.config import FIELDS, SHAPE, ResolvedConfig, TrainConfig, check_value
from core.corpus import Corpus
from core.tokenizer import Tokenizer, tokenizer_from_state
from core.trainer import Trainer
from lib.cli import UserError, first_line, warn
from lib.device import is_out_of_memory
from lib.files import atomic_write, lock_directory, remove_temporaries
from model import GPT, GPTConfig

STEP_PATTERN = "step_" + "[0-9]" * 8 + ".pt"
# Every key of a checkpoint and the types of its value.
SCHEMA = {
    "model_state_dict": dict, "optimizer_state_dict": dict, "scaler_state_dict": dict, "config": dict,
    "vocab_size": int, "tokenizer": dict, "data_fingerprint": str, "epoch": int,
    # Progress
    "step": int, "val_loss": (float, NoneType), "best_val_loss": (float, NoneType), "best_step": (int, NoneType),
    "evals_without_better": int, "pending_losses": list,
}
# Fields that weights and moments depend on: a resumed run must keep them.
STATE_FIELDS = (*SHAPE, "optimizer", "init_from")
# Fields that a resumed run may change silently.
SILENT_FIELDS = {"resume", "data_dir", "out_dir", "log_dir", "run_name"}


@dataclass
class Progress:
    """A run's state besides weights and moments."""

    step: int = 0  # optimizer steps done
    val_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    evals_without_better: int = 0
    pending_losses: list[Tensor] = field(default_factory=list)  # scalars, one per step since the last progress line

    def add(self, loss: Tensor) -> None:
        """Record a step and its loss."""
        self.pending_losses.append(loss)
        self.step += 1

    def take_losses(self) -> list[float]:
        """The losses of the steps since the last call."""
        losses = torch.stack(self.pending_losses).tolist()
        self.pending_losses.clear()
        return losses

    def evaluated(self, val_loss: float) -> bool:
        """Record an evaluation; return whether it is the best so far."""
        self.val_loss = val_loss
        is_best = self.best_val_loss is None or val_loss < self.best_val_loss
        if is_best:
            self.best_val_loss, self.best_step = val_loss, self.step
        self.evals_without_better = 0 if is_best else self.evals_without_better + 1
        return is_best

    def finished(self, cfg: ResolvedConfig) -> bool:
        """Whether all steps are done, or `patience` evaluations in a row brought no better loss."""
        return self.step >= cfg.max_iters or 0 < cfg.patience <= self.evals_without_better


def save_checkpoint(path: Path, content: dict) -> None:
    """Write `content` (tensors and primitives under the keys of SCHEMA) to `path` atomically; OSError if that fails."""
    assert content.keys() == SCHEMA.keys()
    try:
        with atomic_write(path) as [temporary], open(temporary, "wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch.save hides the file's own error
            raise error.__context__ from None
        raise


def load_checkpoint(path: str | Path) -> dict:
    """The content of a checkpoint, tensors on the CPU. UserError if it is missing, damaged or not a checkpoint.

    A .pt file is a zip archive: each record's CRC is checked first. Nothing in the file is executed
    (weights_only=True).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise UserError(f"checkpoint {path} is damaged (record {damaged})")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from None
    except Exception as error:  # damage raises a dozen exception types
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(f"checkpoint {path} is damaged, or not a checkpoint: {first_line(error)}") from None
    if not isinstance(content, dict):
        content = {}
    wrong = [key for key, kind in SCHEMA.items() if not isinstance(content.get(key, ...), kind)]
    if "pending_losses" not in wrong and not all(isinstance(loss, float) for loss in content["pending_losses"]):
        wrong.append("pending_losses")
    if wrong:
        raise UserError(f"{path} is not a checkpoint of this project: {', '.join(wrong)} missing or of the wrong type")
    return content


def load_model(path: str | Path) -> tuple[GPT, Tokenizer, dict]:
    """(GPT on the CPU, tokenizer, content) of the checkpoint at `path`. UserError if any part does not fit."""
    content = load_checkpoint(path)
    tokenizer = tokenizer_from_state(content["tokenizer"], path)
    checks = [check_value(name, content["config"].get(name)) for name in (*SHAPE, "dropout")]
    if problems := [f"{path}: {problem}" for _, problem in checks if problem]:
        raise UserError(*problems)
    try:
        model = GPT(GPTConfig.of(content["config"], tokenizer.vocab_size))
        model.load_state_dict(content["model_state_dict"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"the weights in {path} do not fit its config: {first_line(error)}") from None
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise UserError(f"the weights in {path} are not all finite: use another checkpoint")
    return model, tokenizer, content


def step_path(run_dir: Path, step: int) -> Path:
    return run_dir / f"step_{step:08d}.pt"


def step_checkpoints(run_dir: Path) -> list[Path]:
    """The run's step_*.pt files, oldest first."""
    return sorted(run_dir.glob(STEP_PATTERN))


def newest_first(run_dir: Path) -> list[Path]:
    """The run's step_*.pt files from newest to oldest, then best.pt; those that exist."""
    best = run_dir / "best.pt"
    return [*step_checkpoints(run_dir)[::-1], *([best] if best.exists() else [])]


def load_newest(run_dir: Path) -> tuple[Path, dict] | tuple[None, None]:
    """(path, content) of the run's newest intact checkpoint, with a warning for each damaged one skipped.

    (None, None) when there are none. UserError when there are some and none is intact.
    """
    paths = newest_first(run_dir)
    for path in paths:
        try:
            return path, load_checkpoint(path)
        except UserError as error:
            warn(f"{error}; trying the previous one")
    if paths:
        raise UserError(f"no checkpoint in {run_dir} is intact; start a new run with another --run_name")
    return None, None


def peek(run_dir: Path) -> tuple[Path, dict] | tuple[None, None]:
    """(path, content) of the run's newest checkpoint that opens, memory-mapped and not verified.

    Its config and data_fingerprint have the types of SCHEMA; (None, None) if there is none.
    """
    for path in newest_first(run_dir):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if isinstance(content["config"], dict) and isinstance(content["data_fingerprint"], str):
                return path, content
        except Exception:  # damaged: load_newest reports it
            continue
    return None, None


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint `path`, or the most recently written one in a run directory or a directory of runs."""
    path = Path(path)
    if path.is_file():
        return path
    found = [file for pattern in ("*.pt", "*/*.pt") for file in path.glob(pattern) if file.is_file()]
    if not found:
        what = "has no checkpoints" if path.is_dir() else "is neither a file nor a run directory"
        raise UserError(f"{path} {what}: train first (python train_gpt2.py configs/quickstart.py) or give --ckpt FILE")
    return max(found, key=lambda file: file.stat().st_mtime_ns)


def refuse_to_overwrite(run_dir: Path) -> None:
    """UserError if the run has checkpoints."""
    if existing := newest_first(run_dir):
        raise UserError(f"{run_dir} already holds checkpoints: --resume continues from the newest "
                        f"({existing[0].name}), --run_name=NAME starts another run")


def then_and_now(saved: dict, cfg: TrainConfig) -> list[tuple[str, object, object]]:
    """(field, saved value, current value) of each field in which `cfg` differs from a checkpoint's config."""
    then = dataclasses.asdict(TrainConfig()) | saved  # fields it lacks are newer: they had their defaults
    return [(name, then[name], getattr(cfg, name)) for name in FIELDS if then[name] != getattr(cfg, name)]


def check_same_data(path: Path, saved: dict, dataset: str, fingerprint: str) -> None:
    """UserError if the checkpoint `saved` in `path` was trained on other data than `dataset` with this fingerprint."""
    if saved["data_fingerprint"] != fingerprint:
        raise UserError(f"the data set is not the one that {path} was trained on: {saved['config'].get('dataset')} "
                        f"(fingerprint {saved['data_fingerprint'][:12]}) then, {dataset} ({fingerprint[:12]}) now: "
                        f"resume with the same data, or start another run with --run_name=NAME")


class Run:
    """A run's directory while it trains: locked against other processes; restored from, saved to, pruned."""

    def __init__(self, cfg: ResolvedConfig, corpus: Corpus) -> None:
        self.cfg, self.corpus, self.directory = cfg, corpus, cfg.run_dir
        self.restored_from: Path | None = None
        self.changes: list[tuple[str, object, object]] = []  # fields that differ from the checkpoint restored

    def __enter__(self) -> "Run":
        """UserError if another process is training there, or it has checkpoints and cfg.resume is not set."""
        with ExitStack() as stack:
            stack.enter_context(lock_directory(self.directory, f"another process is training in {self.directory}: "
                                                               f"wait until it ends, or choose another --run_name"))
            remove_temporaries(self.directory)
            if not self.cfg.resume:
                refuse_to_overwrite(self.directory)
            self._locked = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._locked.close()

    def restore(self, trainer: Trainer) -> Progress | None:
        """Load the newest intact checkpoint into `trainer`; its progress, or None if there is no checkpoint."""
        path, content = load_newest(self.directory)
        if path is None:
            return None
        check_same_data(path, content, self.cfg.dataset, self.corpus.fingerprint)
        try:
            trainer.load_state_dict(content)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(f"weights or moments in {path} do not fit its config: {first_line(error)}") from None
        progress = Progress(**{f.name: content[f.name] for f in dataclasses.fields(Progress)})
        progress.pending_losses = [torch.tensor(loss, device=trainer.device) for loss in progress.pending_losses]
        self.restored_from = path
        self.changes = [change for change in then_and_now(content["config"], self.cfg)
                        if change[0] not in SILENT_FIELDS]
        return progress

    def save(self, trainer: Trainer, progress: Progress, name: str | None = None, required: bool = False) -> bool:
        """Write a checkpoint, by default the step's own, and prune old ones; return whether it was written.

        If the disk refuses, older ones are kept: a warning, or a UserError if it is `required`.
        Diverged, and nothing is written, if a weight or moment is not finite.
        """
        trainer.check_state(progress.step)
        path = self.directory / name if name else step_path(self.directory, progress.step)
        content = trainer.state_dict() | vars(progress) | {
            "config": dataclasses.asdict(self.cfg), "vocab_size": self.corpus.tokenizer.vocab_size,
            "tokenizer": self.corpus.tokenizer.state(), "data_fingerprint": self.corpus.fingerprint,
            "epoch": self.cfg.epoch_of(progress.step),
            "pending_losses": [float(loss) for loss in progress.pending_losses],
        }
        try:
            save_checkpoint(path, content)
        except OSError as error:
            warn(f"cannot save {path}: {error.strerror}; older checkpoints are kept")
            if required:
                raise UserError(f"the last checkpoint could not be saved in {self.directory}: free some space, then "
                                f"continue from the previous one with --resume") from None
            return False
        for old in step_checkpoints(self.directory)[: -self.cfg.keep_checkpoints]:
            try:
                old.unlink()
            except OSError as error:
                warn(f"cannot delete {old}: {error.strerror}")
        return True
