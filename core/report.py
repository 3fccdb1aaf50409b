"""What a person sees of a run: the start table, progress lines, TensorBoard, the end."""

import html
import math
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from core.checkpoint import Progress, Run, step_path
from core.config import ResolvedConfig, TrainConfig
from core.evaluation import Evaluation, perplexity
from core.inference import generate
from core.optim import learning_rate_at
from core.trainer import Trainer
from lib.cli import UserError, warn
from lib.device import device_name, mark, peak_flops, seconds_between
from lib.files import make_directory

STEPS_BEFORE_ESTIMATE = 10


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


class StepTimer:
    """Mean seconds per step, excluding pauses."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.start, self.steps = time.perf_counter(), 0

    def mean(self) -> float:
        """Seconds per step since the last restart."""
        return (time.perf_counter() - self.start) / max(1, self.steps)

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before


class Report:
    """Prints and logs one training process; a context manager."""

    def __init__(self, run: Run, trainer: Trainer, progress: Progress) -> None:
        self.run, self.cfg, self.corpus, self.trainer, self.progress = run, run.cfg, run.corpus, trainer, progress
        log_dir = make_directory(Path(run.cfg.log_dir) / run.cfg.run_name)
        try:
            # Drop what a killed process logged after its last checkpoint: those steps are repeated.
            self.writer = SummaryWriter(log_dir, purge_step=progress.step + 1)
        except OSError as error:
            raise UserError(f"cannot write events in {log_dir}: {error.strerror}") from None
        self.events_lost = False
        self.timer = StepTimer()
        self.first_step, self.epoch_start = progress.step, mark(trainer.device)

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *exception: object) -> None:
        self.attempt_event(self.writer.close)

    def start(self) -> None:
        """Print where the run starts, its data, model, length and device."""
        run, cfg, corpus, trainer = self.run, self.cfg, self.corpus, self.trainer
        if run.restored_from:
            print(f"resumed from {run.restored_from} at step {self.progress.step}")
            for name, then, now in run.changes:
                print(f"changed since the checkpoint: {name} {then} -> {now}")
        elif cfg.resume:
            print(f"no checkpoint in {run.directory}: starting at step 0")
        if trainer.compile_error:
            warn(f"torch.compile failed, continuing without it: {trainer.compile_error}")
        print(f"run      {cfg.run_name}: checkpoints in {run.directory}, events in {self.writer.log_dir}\n"
              f"data     {cfg.dataset}: {len(corpus.train):,} training and {len(corpus.val):,} validation tokens, "
              f"{corpus.tokenizer.vocab_size:,} symbols\n"
              f"model    {cfg.norm}, {cfg.mlp}, {cfg.pos} positions; {cfg.n_layer} layers, {cfg.n_head} heads, "
              f"{cfg.n_embd} wide, context {cfg.block_size}; {trainer.model.n_params():,} parameters\n"
              f"step     {cfg.gradient_accumulation_steps} x {cfg.batch_size} sequences = "
              f"{cfg.sequences * cfg.block_size:,} tokens\n"
              f"length   {cfg.max_iters:,} steps; {cfg.n_windows / cfg.sequences:.1f} steps an epoch of "
              f"{cfg.n_windows:,} windows\n"
              f"device   {device_name(trainer.device)}; {cfg.dtype}; "
              f"{'not compiled' if trainer.forward is trainer.model else 'compiled'}", flush=True)
        if self.progress.finished(cfg):
            print("nothing to do: the run is finished; raise --max_iters, --epochs or --patience to continue")

    def step_done(self) -> None:
        """Count a step; print the expected time once it can be estimated, and how long each epoch took."""
        self.timer.steps += 1
        cfg, step = self.cfg, self.progress.step
        if step == self.first_step + STEPS_BEFORE_ESTIMATE:
            float(self.trainer.grad_norm)  # waits for the device
            print(f"expected time: {duration((cfg.max_iters - step) * self.timer.mean())} for the remaining steps, "
                  f"evaluations not included", flush=True)
        if cfg.epoch_of(step) != cfg.epoch_of(step - 1):
            epoch_end = mark(self.trainer.device)
            print(f"epoch took {duration(seconds_between(self.epoch_start, epoch_end))}", flush=True)
            self.epoch_start = epoch_end

    def training(self) -> None:
        """Print and log the mean loss over all micro-batches since the last progress line, with rates."""
        cfg, trainer, step = self.cfg, self.trainer, self.progress.step
        trainer.check_finite()
        losses = self.progress.take_losses()
        seconds_per_step = self.timer.mean()
        self.timer.restart()
        loss, lr = sum(losses) / len(losses), learning_rate_at(step - 1, cfg)
        tokens_per_second = cfg.sequences * cfg.block_size / seconds_per_step
        scalars = {"train/loss": loss, "train/lr": lr, "train/grad_norm": float(trainer.grad_norm),
                   "perf/tokens_per_sec": tokens_per_second}
        if peak := peak_flops(trainer.device):
            scalars["perf/mfu"] = tokens_per_second * trainer.model.flops_per_token() / peak
        self.record(scalars)
        epoch, step_in_epoch, steps_in_epoch = position(step - 1, cfg)
        n_epochs = cfg.epoch_of(cfg.max_iters - 1) + 1
        print(f"epoch {epoch + 1}/{n_epochs} | step {step_in_epoch}/{steps_in_epoch} "
              f"({step_in_epoch / steps_in_epoch:.1%}) | loss {loss:.4f} | ppl {perplexity(loss):.2f} | lr {lr:.2e} "
              f"| tok/s {tokens_per_second:,.0f} | eta {duration((cfg.max_iters - step) * seconds_per_step)}",
              flush=True)

    def evaluation(self, result: Evaluation) -> None:
        """Print and log an evaluation, how it compares with the best, and a sample for TensorBoard."""
        progress = self.progress
        if progress.best_step == progress.step:
            best = "best so far"
        elif progress.best_step is None:
            best = "not saved"
        else:
            best = f"best {progress.best_val_loss:.4f} at {progress.best_step}"
        print(f"step {progress.step} | val loss {result.loss:.4f} | ppl {result.perplexity:.2f} | "
              f"bits/byte {result.bits_per_byte:.4f} | {best}", flush=True)
        self.record({f"val/{name}": value for name, value in vars(result).items()})
        if self.cfg.sample_tokens:
            text = f"<pre>{html.escape(self.sample())}</pre>"
            self.attempt_event(self.writer.add_text, "samples", text, progress.step)

    def end(self) -> None:
        """Print how the run ended; if it is finished also a sample, and what to type next."""
        run, cfg, progress = self.run, self.cfg, self.progress
        if not progress.finished(cfg):
            print(f"stopped after step {progress.step}, saved {step_path(run.directory, progress.step)}")
            return
        early = f" (early: {progress.evals_without_better} evaluations without a better loss)"
        best, path = "never evaluated", run.directory
        if progress.best_step:
            best = f"best val loss {progress.best_val_loss:.4f} at step {progress.best_step}"
            path = run.directory / "best.pt"
        print(f"finished at step {progress.step}{early if progress.step < cfg.max_iters else ''}; {best}\n\n"
              f"{self.sample()}\n\nnext:\n  python sample.py --ckpt {shlex.quote(str(path))}\n"
              f"  tensorboard --logdir {shlex.quote(cfg.log_dir)}")

    def sample(self) -> str:
        """Generate sample_tokens tokens without a prompt, always the same for the same weights."""
        tokenizer = self.corpus.tokenizer
        start = torch.tensor([tokenizer.encode(tokenizer.start).tolist()], device=self.trainer.device)
        tokens = generate(self.trainer.model, start, self.cfg.sample_tokens, temperature=0.8, top_k=200,
                          seed=self.cfg.seed)
        return tokenizer.decode(tokens[0].tolist())

    def record(self, scalars: dict[str, float]) -> None:
        """Log {tag: value} to TensorBoard at this step, and flush."""
        for tag, value in scalars.items():
            self.attempt_event(self.writer.add_scalar, tag, value, self.progress.step)
        self.attempt_event(self.writer.flush)  # events before a checkpoint must survive a kill, as it does

    def attempt_event(self, action: Callable, *args: object) -> None:
        """Call a method of the TensorBoard writer; a full disk ends the events, not the run."""
        try:
            action(*args)
        except OSError as error:
            if not self.events_lost:
                warn(f"TensorBoard events are being lost: {error.strerror}")
            self.events_lost = True
