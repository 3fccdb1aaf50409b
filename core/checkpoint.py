"""Checkpoints: one self-contained file each, whole or absent, verified before use; and a run's directory of them.

A run directory holds step_NNNNNNNN.pt (the newest ones) and best.pt (lowest validation loss).
"""

import dataclasses
import itertools
import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from core.config import ResolvedConfig
from core.corpus import Corpus
from core.schema import SCHEMA, SILENT_FIELDS, check_same_data, check_same_model, problems_in, then_and_now
from core.trainer import Trainer
from lib.cli import UserError, first_line, warn
from lib.device import is_out_of_memory
from lib.distributed import ALONE, Processes
from lib.files import atomic_write, copy_file, lock_directory, reason, remove_temporaries, set_aside
from lib.memory import release_freed

LAUNCH = ".launch"  # file in a run directory that names the launch which trains there
STEP_PATTERN = "step_" + "[0-9]" * 8 + ".pt"
NONE_INTACT = "no checkpoint in {} is intact: start a new run with another --run_name"
# What loading damaged weights and moments may raise.
UNFIT = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)


class Unreadable(UserError):
    """The system refuses to read a file, which may be whole."""


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

    def take_losses(self, keep: bool = False) -> list[float]:
        """The losses of the steps since the last call; `keep` them for the next one, too."""
        losses = torch.stack(self.pending_losses).tolist()
        if not keep:
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


@contextmanager
def named_damage(path: str | Path) -> Iterator[None]:
    """Turn what reading a damaged checkpoint raises into a UserError with its name, an OSError into Unreadable."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise Unreadable(f"cannot read checkpoint {path}: {error.strerror}") from None
    except UnpicklingError:  # torch's message advises to execute the file
        raise UserError(f"checkpoint {path} is damaged, or holds more than tensors and plain values: none of it was "
                        f"used") from None
    except Exception as error:  # damage raises a dozen exception types
        if is_out_of_memory(error):
            raise
        raise UserError(f"checkpoint {path} is damaged, or not a checkpoint: {first_line(error)}") from None


def check_records(path: str | Path, verify: bool = True) -> None:
    """UserError if a checkpoint is not a zip archive (every .pt file is) or, with `verify`, a record's CRC is wrong."""
    with named_damage(path), zipfile.ZipFile(path) as archive:
        if verify and (damaged := archive.testzip()):
            raise UserError(f"checkpoint {path} is damaged (record {damaged})")


def load_checkpoint(path: str | Path, verify: bool = True) -> dict:
    """The content of a checkpoint, tensors on the CPU. UserError if it is missing, damaged or not a checkpoint.

    Its records are checked first, then the content (core/schema.py). Without `verify` tensors are memory-mapped and
    not read. Nothing in the file is executed (weights_only=True).
    """
    check_records(path, verify)
    with named_damage(path):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=not verify)
        problems = problems_in(content, path, verify)
    if not problems and Path(path).match(STEP_PATTERN) and int(Path(path).stem[-8:]) != content["step"]:
        problems = [f"step is {content['step']}"]
    if problems:
        raise UserError(f"{path} is not a whole checkpoint of this project: {'; '.join(problems)}")
    return content


def step_path(run_dir: Path, step: int) -> Path:
    return run_dir / f"step_{step:08d}.pt"


def step_checkpoints(run_dir: Path) -> list[Path]:
    """The run's step_*.pt files, oldest first."""
    return sorted(path for path in run_dir.glob(STEP_PATTERN) if path.is_file())


def newest_first(run_dir: Path) -> list[Path]:
    """The run's step_*.pt and best*.pt files, newest step first; unreadable best ones come last."""
    steps = {path: int(path.stem[-8:]) for path in step_checkpoints(run_dir)}
    for path in filter(Path.is_file, run_dir.glob("best*.pt")):
        try:
            steps[path] = load_checkpoint(path, verify=False)["step"]
        except UserError:
            steps[path] = 0
    return sorted(steps, key=lambda path: (steps[path], path.name), reverse=True)


def load_newest(run_dir: Path, use: Callable[[Path, dict], None] = lambda path, content: None
                ) -> tuple[Path, dict] | tuple[None, None]:
    """(path, content) of the run's newest intact checkpoint, after `use(path, content)`; (None, None) without any.

    One that is damaged, or for which `use` raises UNFIT, is skipped with a warning. UserError if none is left, or
    one cannot be read at all.
    """
    paths = newest_first(run_dir)
    for path in paths:
        try:
            content = load_checkpoint(path)
        except Unreadable:  # it may be whole
            raise
        except UserError as error:
            warn(f"{error}; skipping it")
            continue
        try:
            use(path, content)
            return path, content
        except UNFIT as error:
            if is_out_of_memory(error):
                raise
            warn(f"{path} does not fit its own config: {first_line(error)}; skipping it")
    if paths:
        raise UserError(NONE_INTACT.format(run_dir))
    return None, None


def refuse_to_overwrite(run_dir: Path) -> None:
    """UserError if the run has checkpoints."""
    if existing := newest_first(run_dir):
        raise UserError(f"{run_dir} already holds checkpoints: --resume continues from the newest "
                        f"({existing[0].name}), --run_name=NAME starts another run")


class Run:
    """A run's directory while it trains: locked against other runs; restored from, saved to, pruned.

    All processes of the run call its methods together; the first one reads and writes.
    """

    def __init__(self, cfg: ResolvedConfig, corpus: Corpus, processes: Processes = ALONE) -> None:
        self.cfg, self.corpus, self.directory, self.processes = cfg, corpus, cfg.run_dir, processes
        self._locked = ExitStack()
        self.newest: Path | None = None  # the one --resume would take: restored or saved last
        self._written: tuple[int, Path | None] = 0, None  # step and file written last
        self.has_best = False  # whether best.pt is the best by this run's measure
        self.changes: list[tuple[str, object, object]] = []  # fields that differ from the checkpoint restored

    def __enter__(self) -> "Run":
        """UserError if another run is training there, or it has checkpoints and cfg.resume is not set."""
        self.processes.lead(self._lock)
        return self

    def _lock(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(lock_directory(self.directory, f"another process is training in {self.directory}: "
                                                               f"wait until it ends, or choose another --run_name"))
            remove_temporaries(self.directory)
            if not self.cfg.resume:
                refuse_to_overwrite(self.directory)
            if self.processes.launch:
                with suppress(OSError):  # a restart then has to be told to resume
                    (self.directory / LAUNCH).write_text(self.processes.launch)
            self._locked = stack.pop_all()

    def __exit__(self, *exception: object) -> None:
        self._locked.close()

    def restore(self, trainer: Trainer) -> Progress | None:
        """Load the newest intact checkpoint into `trainer`; its progress, or None if there is no checkpoint.

        Those that are newer, and so damaged, are renamed.
        """
        def use(path: Path, content: dict) -> None:
            check_same_data(path, content, self.cfg.dataset, self.corpus.fingerprint)
            check_same_model(path, content, self.cfg)
            if content["tokenizer"] != self.corpus.tokenizer.state():
                raise ValueError("its tokenizer is not the data set's")
            trainer.load_state_dict(content)

        path, content = self.processes.lead(lambda: load_newest(self.directory, use))
        if path is None:
            return None
        if not self.processes.is_first:
            trainer.load_state_dict(content)
        progress = Progress(**{f.name: content[f.name] for f in dataclasses.fields(Progress)})
        progress.pending_losses = [torch.tensor(loss, device=trainer.device) for loss in progress.pending_losses]
        self.newest = path
        self.changes = [change for change in then_and_now(content["config"], self.cfg)
                        if change[0] not in SILENT_FIELDS]
        if self.processes.lead(lambda: self._tidy(path, content)):
            progress.best_val_loss, progress.best_step, progress.evals_without_better = None, None, 0
        self.has_best = progress.best_step is not None
        content.clear()  # the weights in it have been copied: resuming takes no more memory than starting
        release_freed()
        return progress

    def _tidy(self, path: Path, content: dict) -> bool:
        """Rename what is damaged: all that is newer than the restored `path`; whether the best loss starts over."""
        for damaged in itertools.takewhile(lambda other: other != path, newest_first(self.directory)):
            set_aside(damaged, damaged.name + ".damaged")
        n_then, n_now = (min(cfg.get("eval_tokens") or math.inf, len(self.corpus.val))
                         for cfg in (content["config"], vars(self.cfg)))
        best, problem = self.directory / "best.pt", None
        if n_then != n_now:
            problem = f"losses over {n_then:,} and {n_now:,} validation tokens do not compare"
        elif best.exists() and best != path:
            try:
                check_records(best)
            except Unreadable:
                raise
            except UserError:
                problem = f"{best} is damaged"
                set_aside(best, "best.pt.damaged")
        starts_again = bool(problem and content["best_step"])
        if starts_again:
            warn(f"{problem}: the best loss starts over")
        return starts_again

    def save(self, trainer: Trainer, progress: Progress, name: str | None = None, required: bool = False) -> bool:
        """Write a checkpoint, by default the step's own, and prune old ones; return whether it was written.

        The second one of a step is a copy of the first.
        If the disk refuses, nothing changes: a warning, or a UserError if it is `required`.
        Diverged, and nothing is written, if a weight or moment is not finite.
        """
        trainer.check_state(progress.step)
        path = self.directory / name if name else step_path(self.directory, progress.step)
        if not self.processes.lead(lambda: self._write(path, trainer, progress, required)):
            return False
        if not self.holds(progress.step):
            self.newest = path
        self.has_best = self.has_best or bool(name)
        return True

    def holds(self, step: int) -> bool:
        """Whether the newest checkpoint is the file of `step`."""
        return self.newest == step_path(self.directory, step)

    def _write(self, path: Path, trainer: Trainer, progress: Progress, required: bool) -> bool:
        is_best = path.name == "best.pt"
        if is_best and not self.has_best and path.exists():
            set_aside(path, f"best_before_{progress.step:08d}.pt")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)  # someone may have deleted it
            step, written = self._written
            is_second = step == progress.step and written != path
            if is_second and written.exists():
                copy_file(written, path)
            else:
                save_checkpoint(path, self._content(trainer, progress))
            self._written = progress.step, path
        except OSError as error:
            warn(f"cannot save {path}: {reason(error)}")
            if required:
                how = f"--resume continues from {self.newest.name}" if self.newest else "start again: nothing is saved"
                raise UserError(f"the last checkpoint could not be saved in {self.directory}: free some space, or fix "
                                f"whatever else is wrong, then {how}") from None
            return False
        steps = [] if is_best else [old for old in step_checkpoints(self.directory) if old <= path]
        for old in steps[: -self.cfg.keep_checkpoints]:
            try:
                old.unlink()
            except OSError as error:
                warn(f"cannot delete {old}: {error.strerror}")
        return True

    def _content(self, trainer: Trainer, progress: Progress) -> dict:
        return trainer.state_dict() | vars(progress) | {
            "config": dataclasses.asdict(self.cfg), "vocab_size": self.corpus.tokenizer.vocab_size,
            "tokenizer": self.corpus.tokenizer.state(), "data_fingerprint": self.corpus.fingerprint,
            "epoch": self.cfg.epoch_of(progress.step),
            "pending_losses": [float(loss) for loss in progress.pending_losses],
        }
