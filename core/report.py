"""What a person sees of a run: the start table, progress lines, TensorBoard, the end."""

import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from core.checkpoint import Progress, Run
from core.config import ResolvedConfig, TrainConfig, steps_of_epochs
from core.evaluation import Evaluation, perplexity
from core.log import Log
from core.optim import learning_rate_at
from core.text import continue_text
from core.trainer import Trainer
from lib.cli import command_line, plural, warn
from lib.device import device_name, mark, peak_flops, seconds_between, synchronize
from lib.signals import StopSignals

STEPS_BEFORE_ESTIMATE = 10
LONG_STEP = 10  # seconds
# CPU seconds a second and thread: 0.9 to 1 on an idle machine, half beside another program.
SHARED_CORES = 0.75
SCHEDULE_FIELDS = ("learning_rate", "min_lr", "warmup_iters", "lr_schedule", "lr_decay_iters", "decay_fraction")


def duration(seconds: float) -> str:
    """Seconds in words: '48 s', '3 min 05 s', '2 h 10 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def out_of_memory_message(cfg: TrainConfig) -> str:
    """What to lower, and how much it matters."""
    return (f"out of memory with {cfg.batch_size} x {cfg.block_size} tokens in a forward pass: lower batch_size (the "
            f"activations shrink in proportion; raise gradient_accumulation_steps by the same factor to keep the step "
            f"unchanged), then block_size (likewise), then n_layer or n_embd={cfg.n_embd} (weights, gradients and "
            f"moments take 16 bytes per parameter, and their number grows with n_layer and with n_embd squared)")


def position(step: int, cfg: ResolvedConfig) -> tuple[int, int, int]:
    """(epoch, step within it counted from 1, the epoch's steps in this run) of step `step`, counted from 0."""
    epoch = cfg.epoch_of(step)
    first, end = (math.ceil(e * cfg.n_windows / cfg.sequences) for e in (epoch, epoch + 1))
    return epoch, step - first + 1, min(end, cfg.max_iters) - first


def start_table(run: Run, trainer: Trainer, log_dir: Path) -> str:
    """The run's data, model, length and device."""
    cfg, corpus = run.cfg, run.corpus
    processes = f"; {run.processes.size} processes" if run.processes.size > 1 else ""
    return (f"run      {cfg.run_name}: checkpoints in {run.directory}, events in {log_dir}\n"
            f"data     {cfg.dataset}: {len(corpus.train):,} training and {len(corpus.val):,} validation tokens, "
            f"{plural(corpus.tokenizer.vocab_size, 'symbol')}\n"
            f"model    {cfg.norm}, {cfg.mlp}, {cfg.pos} positions{', QK norm' if cfg.qk_norm else ''}; "
            f"{plural(cfg.n_layer, 'layer')}, {plural(cfg.n_head, 'head')}, {cfg.n_embd} wide, "
            f"context {cfg.block_size}; {trainer.model.n_params():,} parameters\n"
            f"step     {cfg.gradient_accumulation_steps} x {plural(cfg.batch_size, 'sequence')} = "
            f"{plural(cfg.sequences * cfg.block_size, 'token')}\n"
            f"length   {plural(cfg.max_iters, 'step')}{limits(cfg)}; "
            f"{cfg.n_windows / cfg.sequences:.1f} steps an epoch of {plural(cfg.n_windows, 'window')}\n"
            f"device   {device_name(trainer.device)}; {cfg.dtype}{' with TF32 products' if trainer.has_tf32 else ''}; "
            f"{'not compiled' if trainer.forward is trainer.model else 'compiled'}{processes}")


def limits(cfg: ResolvedConfig) -> str:
    """' (…)': which of epochs and max_iters ends the run; '' if only max_iters is given."""
    if not cfg.epochs:
        return ""
    n_steps = steps_of_epochs(cfg.epochs, cfg, cfg.n_windows)
    others = "" if n_steps <= cfg.max_iters else f" would be {n_steps:,}; max_iters ends the run"
    return f" (epochs={cfg.epochs:g}{others})"


def jump_in_learning_rate(run: Run, step: int) -> str:
    """A line that says how the schedule departs from the restored checkpoint's at `step`; '' if it does not."""
    then = {name: value for name, value, _ in run.changes if name in SCHEDULE_FIELDS}
    if None in then.values():  # a config edited by hand
        return ""
    former = dataclasses.replace(run.cfg, **then)
    last, expected = (learning_rate_at(s, former) for s in (step - 1, step))
    now = learning_rate_at(step, run.cfg)
    if step >= run.cfg.max_iters or math.isclose(expected, now, rel_tol=1e-3):
        return ""
    flags = " ".join(f"--{name}={value}" for name, value in then.items())
    return (f"learning rate {last:.2e} at step {step} and {now:.2e} at step {step + 1}: to keep the former schedule, "
            f"resume with {flags}\n")


def change_of_epochs(run: Run) -> str:
    """A line that says how the epochs move if a step has another number of sequences than before; '' if it has not."""
    then = {name: value for name, value, _ in run.changes if name in ("batch_size", "gradient_accumulation_steps")}
    former = dataclasses.replace(run.cfg, **then).sequences
    if former == run.cfg.sequences:
        return ""
    return (f"a step has {plural(run.cfg.sequences, 'sequence')} and had {former:,}: epochs are counted as if it had "
            f"always been {run.cfg.sequences:,}\n")


def nothing_to_do(cfg: ResolvedConfig, step: int) -> str:
    """Why a run that resumes at `step` is finished, and how to continue it."""
    why = f"step {step} is past max_iters={cfg.max_iters}" if step > cfg.max_iters else "the run is finished"
    return f"nothing to do: {why}; raise --max_iters, --epochs or --patience to continue"


class StepTimer:
    """Time of the steps, excluding pauses: since the last restart, and in total."""

    def __init__(self, total: float = 0.0) -> None:
        self._total, self._pause, self.shared_cores = total, None, False
        self.start = self._now()[0]
        self.restart()

    def _now(self) -> tuple[float, float]:
        """The clock's seconds and the process's CPU seconds, which stand still in a pause."""
        return self._pause or (time.perf_counter(), time.process_time())

    def restart(self) -> None:
        self._total = self.total()
        (self.start, self.cpu_start), self.steps = self._now(), 0

    def seconds(self) -> float:
        return self._now()[0] - self.start

    def total(self) -> float:
        """Seconds over all restarts, and those of the run before it was resumed."""
        return self._total + self.seconds()

    def mean(self) -> float:
        """Seconds per step."""
        return self.seconds() / max(1, self.steps)

    def cores(self) -> float:
        """Cores that the steps have kept busy, on average."""
        return (self._now()[1] - self.cpu_start) / self.seconds()

    def warn_of_shared_cores(self) -> None:
        """Warn, once, if a CPU's threads get much less than a core each: then they wait for one another, spinning."""
        n_threads = torch.get_num_threads()
        # The first step also sets up libraries, with one thread.
        can_tell = n_threads > 1 and self.steps > 1 and self.seconds() > 0.5
        if can_tell and not self.shared_cores and self.cores() < SHARED_CORES * n_threads:
            self.shared_cores = True
            warn(f"{n_threads} threads get {self.cores():.1f} cores: alongside other programs, OMP_NUM_THREADS="
                 f"{max(1, int(self.cores()))} may make it many times as fast (but changes the last bits of a run)")

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._pause = seconds, cpu_seconds = self._now()
        yield
        self._pause = None
        now = self._now()
        self.start += now[0] - seconds
        self.cpu_start += now[1] - cpu_seconds


class Report:
    """Prints and logs a run; a context manager. Of several processes only the first one logs."""

    def __init__(self, run: Run, trainer: Trainer, progress: Progress, stop: StopSignals | None = None) -> None:
        """A sample being generated ends when `stop` has received a signal."""
        self.run, self.cfg, self.corpus, self.trainer, self.progress = run, run.cfg, run.corpus, trainer, progress
        self.stop = stop
        self.log = Log(run.cfg)
        run.processes.lead(lambda: self.log.open(progress.step))
        self.timer = StepTimer(self.log.metrics.seconds)
        self.first_step, self.epoch_start = progress.step, mark(trainer.device)
        # False if the run resumes within an epoch.
        self.epoch_is_whole = self.cfg.epoch_of(self.first_step) != self.cfg.epoch_of(self.first_step - 1)
        self.step_time_printed = False

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *exception: object) -> None:
        self.log.close()

    def start(self) -> None:
        """Print where the run starts, its data, model, length and device."""
        run, cfg, trainer = self.run, self.cfg, self.trainer
        if run.newest:
            print(f"resumed from {run.newest} at step {self.progress.step}")
            for name, then, now in run.changes:
                print(f"changed since the checkpoint: {name} {then} -> {now}")
            print(end=change_of_epochs(run))
            print(end=jump_in_learning_rate(run, self.progress.step))
        elif cfg.resume:
            print(f"no checkpoint in {run.directory}: starting at step 0")
        if trainer.compile_error:
            warn(f"torch.compile failed, continuing without it: {trainer.compile_error}")
        print(start_table(run, trainer, self.log.directory), flush=True)
        if 1 < cfg.max_iters <= cfg.warmup_iters:
            print(f"warmup_iters={cfg.warmup_iters} lasts the whole run: the learning rate ends at "
                  f"{learning_rate_at(cfg.max_iters - 1, cfg):.2e} and never reaches its peak")
        if self.progress.finished(cfg):
            print(nothing_to_do(cfg, self.progress.step))

    def micro_batch_done(self, n_done: int) -> None:
        """Print how long a step takes if the first one is slow, after its first n_done micro-batches."""
        is_first, n = self.progress.step == self.first_step, self.cfg.gradient_accumulation_steps
        if not self.step_time_printed and is_first and self.timer.seconds() > LONG_STEP:
            synchronize(self.trainer.device)
            seconds = self.timer.seconds() * n / self.run.processes.size / n_done
            print(f"a step has {plural(n, 'forward pass', 'forward passes')} and takes about {duration(seconds)}",
                  flush=True)
            self.step_time_printed = True

    def step_done(self) -> None:
        """Count a step; print the expected time once it can be estimated, and how long an epoch took."""
        self.timer.steps += 1
        cfg, step = self.cfg, self.progress.step
        if step == self.first_step + STEPS_BEFORE_ESTIMATE:
            float(self.trainer.grad_norm)  # waits for the device
            print(f"expected time: {duration((cfg.max_iters - step) * self.timer.mean())} for the remaining steps, "
                  f"evaluations not included", flush=True)
        if cfg.epoch_of(step) != cfg.epoch_of(step - 1):
            epoch_end = mark(self.trainer.device)
            what = "epoch" if self.epoch_is_whole else "rest of the epoch"
            if cfg.n_windows >= cfg.log_interval * cfg.sequences:  # no line for each of many short ones
                print(f"{what} took {duration(seconds_between(self.epoch_start, epoch_end))}", flush=True)
            self.epoch_start, self.epoch_is_whole = epoch_end, True

    def training(self, is_last: bool = False) -> None:
        """Print and log the mean loss over all micro-batches since the last progress line, with rates.

        The run's last line may come early: a longer run has no such line, so its losses are kept for the next.
        """
        cfg, trainer, step = self.cfg, self.trainer, self.progress.step
        trainer.check_finite()
        losses = self.progress.take_losses(keep=is_last)
        seconds_per_step = self.timer.mean()
        if trainer.device.type == "cpu":
            self.timer.warn_of_shared_cores()
        self.timer.restart()
        loss, lr = sum(losses) / len(losses), learning_rate_at(step - 1, cfg)
        tokens_per_second = cfg.sequences * cfg.block_size / seconds_per_step
        scalars = {"train/loss": loss, "train/lr": lr, "train/grad_norm": float(trainer.grad_norm),
                   "perf/tokens_per_sec": tokens_per_second}
        if peak := peak_flops(trainer.device):
            scalars["perf/mfu"] = tokens_per_second * trainer.model.flops_per_token() / peak / self.run.processes.size
        self.log.scalars(scalars, step, self.timer.total())
        epoch, step_in_epoch, steps_in_epoch = position(step - 1, cfg)
        n_epochs = cfg.epoch_of(cfg.max_iters - 1) + 1
        print(f"epoch {epoch + 1}/{n_epochs} | step {step_in_epoch}/{steps_in_epoch} "
              f"({step_in_epoch / steps_in_epoch:.1%}) | loss {loss:.4f} | ppl {perplexity(loss):.2f} | lr {lr:.2e} "
              f"| tok/s {tokens_per_second:,.0f} | eta {duration((cfg.max_iters - step) * seconds_per_step)}",
              flush=True)

    def last_loss(self) -> None:
        if self.progress.pending_losses:
            self.training(is_last=True)

    def log_evaluation(self, result: Evaluation) -> None:
        """Log an evaluation and a sample, at the end of the run its last loss first."""
        if self.progress.step == self.cfg.max_iters:
            self.last_loss()
        about = self.progress.step, self.timer.total()
        if self.cfg.sample_tokens and self.log.is_open:
            self.log.text("samples", self.sample(), *about)
        self.log.scalars({f"val/{name}": value for name, value in vars(result).items()}, *about)

    def evaluation(self, result: Evaluation) -> None:
        """Print an evaluation and how it compares with the best; if it ends the run early, the last loss first."""
        progress = self.progress
        if progress.step < self.cfg.max_iters and progress.finished(self.cfg):
            self.last_loss()
        if progress.best_step == progress.step:
            best = "best so far"
        elif progress.best_step is None:
            best = "not saved"
        else:
            best = f"best {progress.best_val_loss:.4f} at {progress.best_step}"
        print(f"step {progress.step} | val loss {result.loss:.4f} | ppl {result.perplexity:.2f} | "
              f"bits/byte {result.bits_per_byte:.4f} | {best}", flush=True)

    def end(self) -> None:
        """Print how the run ended; if it is finished also a sample, and what to type next.

        How it was stopped goes to stderr: a signal that stops the run often ends the reader of its output, too.
        """
        run, cfg, progress = self.run, self.cfg, self.progress
        if not progress.finished(cfg):
            how = "stopped before the first step was done: nothing to save"
            if progress.step:
                how = f"stopped after step {progress.step}, saved {run.newest}"
            print(how, file=sys.stderr)
            return
        self.log.events.finished()
        if not self.run.processes.is_first:
            return
        early = f" (early: {plural(progress.evals_without_better, 'evaluation')} without a better loss)"
        best, path = "never evaluated", run.directory
        if progress.val_loss is not None:  # before eval_tokens was changed
            best = "not evaluated since eval_tokens was changed"
        if progress.best_step:
            best = f"best val loss {progress.best_val_loss:.4f} at step {progress.best_step}"
            path = run.directory / "best.pt" if (run.directory / "best.pt").exists() else run.directory
        sample = f"{self.sample()}\n\n" if cfg.sample_tokens else ""
        print(f"finished at step {progress.step}{early if progress.step < cfg.max_iters else ''}; {best}\n\n"
              f"{sample}next:\n  {command_line(['python', 'sample.py', '--ckpt', str(path)])}\n"
              f"  {command_line(['tensorboard', '--logdir', cfg.log_dir])}")

    def sample(self) -> str:
        """Generate sample_tokens tokens without a prompt, always the same for the same weights."""
        return continue_text(self.trainer.model, self.corpus.tokenizer, max_new_tokens=self.cfg.sample_tokens,
                             seed=self.cfg.seed, proceed=lambda: not (self.stop and self.stop.received))
