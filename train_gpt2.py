"""Train a GPT.

    python train_gpt2.py configs/quickstart.py
    python train_gpt2.py configs/quickstart.py --learning_rate=3e-4 --run_name=slower
    python train_gpt2.py configs/quickstart.py --resume
    python train_gpt2.py --help
"""

import dataclasses
import html
import math
import shlex
import signal
import sys
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

import huggingface
from checkpoint import (
    load_newest,
    newest_config,
    prune_checkpoints,
    remove_leftovers,
    save_checkpoint,
    step_checkpoints,
    step_path,
)
from config import (
    MOST_STEPS,
    SHAPE,
    TrainConfig,
    check_value,
    config_from_argv,
    conflicts,
    help_text,
    load_config,
    nearest,
)
from dataset import TokenDataset, read_corpus, read_meta, step_loader
from device import (
    autocast,
    choose_device,
    choose_dtype,
    default_generator,
    device_name,
    is_out_of_memory,
    out_of_memory_as,
    peak_flops,
    reproducible,
    use_tf32,
)
from errors import UserError, run_script
from evaluation import evaluate, perplexity
from files import lock_folder, make_folder
from model import GPT, GPTConfig
from optim import learning_rate_at, make_optimizer, update_unless
from prepare_data import CORPORA, prepare, read_texts, split_and_write

# What makes weights and moments fit or not fit: the same in a run and in its resumption.
STATE_FIELDS = [*GPTConfig.shape_fields(), "optimizer", "init_from"]
# What may differ between a run and its resumption without a word.
PLACE_FIELDS = {"resume", "data_dir", "out_dir", "log_dir", "run_name"}

STEPS_TO_JUDGE_BY = 10  # before the expected time is told


class Diverged(Exception):
    """The loss or the gradient is not finite any more; the message says where."""


class Interrupted(Exception):
    """A signal asked for the end and the run has saved itself. `signum` is the signal's number."""

    def __init__(self, signum):
        self.signum = signum


def set_lengths(cfg, n_windows):
    """`cfg` with stride, max_iters, lr_decay_iters and min_lr made numbers, for `n_windows` training windows."""
    sequences = cfg.batch_size * cfg.gradient_accumulation_steps
    epochs = cfg.epochs if cfg.epochs or cfg.max_iters else 1
    limits = [cfg.max_iters, epochs and math.ceil(epochs * n_windows / sequences)]
    max_iters = min(limit for limit in limits if limit)
    if max_iters >= MOST_STEPS:
        raise UserError(f"{epochs} epochs are {max_iters:,} steps, and {MOST_STEPS - 1:,} are the most there can be")
    return dataclasses.replace(
        cfg, max_iters=max_iters, stride=cfg.stride or cfg.block_size,
        lr_decay_iters=cfg.lr_decay_iters or max_iters,
        min_lr=cfg.learning_rate / 10 if cfg.min_lr is None else cfg.min_lr,
    )


def weights_shape(cfg):
    """({field of SHAPE: value}, problems) of the weights that cfg starts from: its checkpoint's, or init_from's.

    A run that is resumed does not need init_from any more.
    """
    try:
        if cfg.resume and cfg.run_name and (then := newest_config(Path(cfg.out_dir) / cfg.run_name)):
            return {name: then[name] for name in SHAPE if not check_value(name, then.get(name))[1]}, []
        weights = huggingface.find(cfg.init_from, cfg.data_dir)
    except UserError as error:
        return {}, list(error.problems)
    except (OSError, ValueError) as error:  # a path that cannot be
        return {}, [f"init_from={cfg.init_from}: {error}"]
    shape = {name: getattr(weights.config, name) for name in SHAPE}
    of_data = vocabulary_of(cfg)
    fits = of_data in (None, (weights.tokenizer.kind, None), (weights.tokenizer.kind, weights.tokenizer.vocab_size))
    return shape, [] if fits else [vocabulary_message(cfg, weights.tokenizer)]


def vocabulary_of(cfg):
    """(kind of tokenizer, its size or None) of cfg.dataset, without opening it; None where that is not known."""
    try:
        meta = read_meta(Path(cfg.data_dir) / cfg.dataset)
    except UserError:
        return (CORPORA[cfg.dataset][1], None) if cfg.dataset in CORPORA else None
    return meta["tokenizer"].get("kind"), meta["vocab_size"]


def vocabulary_message(cfg, tokenizer):
    """That cfg.dataset is by another tokenizer than the weights, whose is given."""
    return (f"dataset={cfg.dataset} does not have the vocabulary of init_from={cfg.init_from} ({tokenizer.kind}, "
            f"{tokenizer.vocab_size:,} symbols): choose another data set"
            + ("; shakespeare and what prepare_data.py --tokenizer gpt2 makes have it" * (tokenizer.kind == "gpt2")))


def check_corpus(cfg):
    """UserError if cfg.dataset is unknown or, as far as it is prepared, does not fit cfg."""
    folder = Path(cfg.data_dir) / cfg.dataset
    if (folder / "meta.json").exists():
        check_length(cfg, read_meta(folder)["splits"]["train"]["tokens"])
    elif cfg.dataset not in CORPORA:
        known = sorted({*CORPORA, *(path.parent.name for path in Path(cfg.data_dir).glob("*/meta.json"))})
        raise UserError(f"unknown dataset {cfg.dataset}{nearest(cfg.dataset, known)}: there are {', '.join(known)}; "
                        f"prepare_data.py makes others")


def check_length(cfg, n_train):
    """UserError if a training split of `n_train` tokens does not fill one window."""
    if n_train <= cfg.block_size:
        raise UserError(f"block_size={cfg.block_size} is over the data's length: {cfg.dataset} has {n_train} training "
                        f"tokens, and a window takes {cfg.block_size + 1}")


def check(cfg, problems=()):
    """UserError with all `problems` and those of the data and the machine, if there are any."""
    problems = list(problems)
    for test in (check_corpus, lambda cfg: choose_dtype(cfg.dtype, choose_device(cfg.device))):
        try:
            test(cfg)
        except UserError as error:
            problems += error.problems
        except OSError as error:  # a path that is too long, or may not be looked into
            problems.append(f"data_dir={cfg.data_dir}: {error.strerror}")
    if problems:
        raise UserError(*problems)


def open_corpus(cfg):
    """The run's data set, prepared first if it is not there yet."""
    folder = Path(cfg.data_dir) / cfg.dataset
    if cfg.dataset in CORPORA and not (folder / "meta.json").exists():
        print(f"data set {cfg.dataset} is not prepared yet: preparing it")
        prepare(cfg.dataset, cfg.data_dir)
    corpus = read_corpus(folder)
    check_length(cfg, len(corpus.train))
    return corpus


def out_of_memory_message(cfg):
    """What to lower, and by how much it matters."""
    return (f"out of memory with {cfg.batch_size} x {cfg.block_size} tokens in a forward pass: lower batch_size (the "
            f"activations shrink in proportion; raise gradient_accumulation_steps by as much and the step stays the "
            f"same), then block_size (likewise), then n_layer or n_embd={cfg.n_embd} (weights, gradients and moments "
            f"take 16 bytes a parameter, and their number grows with n_layer and with n_embd squared)")


@dataclass
class Progress:
    """What a run has to remember beside weights and moments."""

    step: int = 0  # optimizer steps done
    val_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    evals_without_better: int = 0
    pending_losses: list = field(default_factory=list)  # scalar tensors, one a step since the last log line


class Trainer:
    """A run's data, model, optimizer and progress, and the steps of which `train` is made."""

    def __init__(self, cfg):
        self.corpus = open_corpus(cfg)
        tokenizer = self.corpus.tokenizer
        self.train_data = TokenDataset(self.corpus.train, cfg.block_size, cfg.stride, tokenizer)
        self.val_data = TokenDataset(self.corpus.val[: cfg.eval_tokens], cfg.block_size, tokenizer=tokenizer)
        self.cfg = cfg = set_lengths(cfg, len(self.train_data))
        self.sequences = cfg.batch_size * cfg.gradient_accumulation_steps
        self.run_dir = Path(cfg.out_dir) / cfg.run_name
        self.log_dir = make_folder(Path(cfg.log_dir) / cfg.run_name)
        self.lock = lock_folder(self.run_dir, f"another process is training in {self.run_dir}: wait for its end, or "
                                              f"choose another --run_name")
        remove_leftovers(self.run_dir)
        self.device = choose_device(cfg.device)
        self.dtype = choose_dtype(cfg.dtype, self.device)
        self.tf32 = use_tf32(self.device, self.dtype)
        self.generator = default_generator(self.device)
        torch.manual_seed(cfg.seed)
        self.model = GPT(GPTConfig.of(vars(cfg), tokenizer.vocab_size)).to(self.device)
        self.parameters = list(self.model.parameters())
        self.optimizer = make_optimizer(self.model, cfg, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.progress = Progress()
        self.first_bad_step = torch.tensor(-1, device=self.device)  # the first with a non-finite loss or gradient
        self.grad_norm = torch.zeros((), device=self.device)
        if not cfg.resume and step_checkpoints(self.run_dir):
            raise UserError(f"{self.run_dir} already holds checkpoints: --resume goes on from the newest "
                            f"({step_checkpoints(self.run_dir)[-1].name}), --run_name=NAME starts another run")
        restored = cfg.resume and self.restore()
        if cfg.init_from and not restored:
            self.take_pretrained()
        self.forward = self.compiled_model()
        # TensorBoard drops what a killed process logged after the checkpoint: those steps come again.
        self.writer = SummaryWriter(self.log_dir, purge_step=self.progress.step + 1)
        self.events_lost = False
        self.timer = StepTimer()

    def restore(self):
        """Take weights, moments and progress from the run's newest whole checkpoint; whether there is one."""
        path, content = load_newest(self.run_dir)
        if path is None:
            print(f"no checkpoint in {self.run_dir}: starting at step 0")
            return False
        self.compare_with(path, content)
        self.model.load_state_dict(content["model_state_dict"])
        self.optimizer.load_state_dict(content["optimizer_state_dict"])
        self.scaler.load_state_dict(content["scaler_state_dict"])
        state = {f.name: content[f.name] for f in dataclasses.fields(Progress)}
        state["pending_losses"] = [torch.tensor(loss, device=self.device) for loss in state["pending_losses"]]
        self.progress = Progress(**state)
        print(f"resumed from {path} at step {self.progress.step}")
        return True

    def take_pretrained(self):
        """Take the weights of init_from. UserError where their shape or vocabulary is another."""
        cfg, tokenizer = self.cfg, self.corpus.tokenizer
        weights = huggingface.find(cfg.init_from, cfg.data_dir)
        if problems := conflicts(vars(cfg), {name: getattr(weights.config, name) for name in SHAPE}, cfg.init_from):
            raise UserError(*problems)
        if tokenizer.vocabulary() != weights.tokenizer.vocabulary():
            raise UserError(vocabulary_message(cfg, weights.tokenizer))
        state = weights.state()
        state["transformer.wpe.weight"] = state["transformer.wpe.weight"][: cfg.block_size]
        self.model.load_state_dict(state)
        print(f"weights from {weights.folder}")

    def compare_with(self, path, content):
        """UserError where the checkpoint's data, architecture or optimizer is another; a line for other changes."""
        then = dataclasses.asdict(TrainConfig()) | content["config"]  # a field it does not have was not there yet
        problems = [f"{name} is {then[name]!r} in {path} and {getattr(self.cfg, name)!r} now: "
                    f"resume with --{name}={then[name]}, or start another run with --run_name=NAME"
                    for name in STATE_FIELDS if then[name] != getattr(self.cfg, name)]
        if content["data_fingerprint"] != self.corpus.fingerprint:
            problems.append(f"the data set is not the one of {path} (fingerprint {content['data_fingerprint'][:12]} "
                            f"of {then['dataset']} then, {self.corpus.fingerprint[:12]} of {self.cfg.dataset} now)")
        if problems:
            raise UserError(*problems)
        for name, now in dataclasses.asdict(self.cfg).items():
            if name not in PLACE_FIELDS and then[name] != now:
                print(f"changed since the checkpoint: {name} {then[name]} -> {now}")

    def compiled_model(self):
        """The model as the steps call it: compiled where cfg.compile says so and it works, else as it is."""
        wanted = self.cfg.compile == "true" or (self.cfg.compile == "auto" and self.device.type == "cuda")
        if not wanted:
            return self.model
        compiled = torch.compile(self.model, dynamic=False)
        try:
            self.try_compiled(compiled)
        except Exception as error:  # a compiler's failures have no common type
            if is_out_of_memory(error):
                raise
            print(f"warning: torch.compile failed, going on without it: {str(error).splitlines()[0]}", file=sys.stderr)
            return self.model
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            self.model.train()
        return compiled

    def try_compiled(self, compiled):
        """Call `compiled` as steps and evaluations will, with batches of their shapes: nothing is compiled later."""
        cfg = self.cfg
        for training, sequences in ((True, cfg.batch_size), (False, min(cfg.batch_size, len(self.val_data)))):
            # Two tensors: for one given twice a graph of its own is compiled.
            x, y = (torch.zeros((sequences, cfg.block_size), dtype=torch.int64, device=self.device) for _ in range(2))
            self.model.train(training)
            if training:
                self.backward(compiled, x, y, share=1.0)
            else:
                with torch.no_grad(), autocast(self.device, self.dtype):
                    compiled(x, y)

    def print_start(self):
        """What the run computes, on what, and how long it is."""
        cfg, model = self.cfg, self.model
        tokens = self.sequences * cfg.block_size
        steps_per_epoch = len(self.train_data) / self.sequences
        print(f"run      {cfg.run_name}: checkpoints in {self.run_dir}, events in {self.log_dir}\n"
              f"data     {cfg.dataset}: {len(self.corpus.train):,} training and {len(self.corpus.val):,} validation "
              f"tokens, {self.corpus.tokenizer.vocab_size:,} symbols\n"
              f"model    {cfg.norm}, {cfg.mlp}, {cfg.pos} positions; {cfg.n_layer} layers, {cfg.n_head} heads, "
              f"{cfg.n_embd} wide, context {cfg.block_size}; {model.n_params():,} parameters\n"
              f"step     {cfg.gradient_accumulation_steps} x {cfg.batch_size} sequences = {tokens:,} tokens\n"
              f"length   {cfg.max_iters:,} steps; {steps_per_epoch:.1f} steps an epoch of {len(self.train_data):,} "
              f"windows\n"
              f"device   {device_name(self.device)}; {str(self.dtype).removeprefix('torch.')}"
              f"{' with TF32 products' if self.tf32 else ''}; "
              f"{'not compiled' if self.forward is self.model else 'compiled'}", flush=True)

    def print_expected_time(self):
        """How long the steps to come will take, by the last few."""
        float(self.grad_norm)  # waits for the device
        left = (self.cfg.max_iters - self.progress.step) * self.timer.mean()
        print(f"expected time: {duration(left)} for the steps left, evaluations not counted", flush=True)

    def batches(self):
        """The windows (x, y) of each step still to do, as optimizer_step takes them."""
        return step_loader(self.train_data, self.sequences, self.cfg.seed, self.progress.step, self.cfg.max_iters,
                           pin_memory=self.device.type == "cuda")

    def backward(self, forward, x, y, share):
        """Add the gradients of share * the loss of x, y on the device to the parameters'; that loss, detached."""
        with reproducible(self.device):
            with autocast(self.device, self.dtype):
                loss = forward(x, y)[1] * share
            self.scaler.scale(loss).backward()
        return loss.detach()

    def optimizer_step(self, x, y):
        """One update from a step's windows x, y, int64 (sequences, block_size), on the CPU.

        The loss is the mean over all the step's targets, however they fall into micro-batches. A
        non-finite loss or gradient leaves weights and moments as they are.
        """
        cfg, step = self.cfg, self.progress.step
        # Dropout depends on (seed, step) alone, not on what ran before.
        self.generator.manual_seed(int(np.random.SeedSequence((cfg.seed, step)).generate_state(1)[0]))
        lr = learning_rate_at(step, cfg)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.device)
        n_targets = int((y >= 0).sum())
        on_cuda = self.device.type == "cuda"  # from pinned memory; a copy to MPS has to be waited for
        for x_micro, y_micro in zip(x.split(cfg.batch_size), y.split(cfg.batch_size)):
            share = int((y_micro >= 0).sum()) / n_targets
            x_micro, y_micro = (t.to(self.device, non_blocking=on_cuda) for t in (x_micro, y_micro))
            total += self.backward(self.forward, x_micro, y_micro, share)
        self.scaler.unscale_(self.optimizer)
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, cfg.grad_clip or math.inf)
        self.update_while_finite(total)
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.pending_losses.append(total)
        self.progress.step += 1
        self.timer.steps += 1
        if self.device.type == "cpu":
            self.check_finite()

    def update_while_finite(self, loss):
        """The optimizer's update, left out from the first non-finite loss or gradient on.

        The gradient scaler leaves out updates by itself: infinite gradients are how it finds its scale.
        """
        finite = loss.isfinite() if self.scaler.is_enabled() else loss.isfinite() & self.grad_norm.isfinite()
        # Not torch.where: it would copy the step's number to the device and wait.
        self.first_bad_step.masked_fill_((self.first_bad_step < 0) & ~finite, self.progress.step)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            update_unless(self.optimizer, self.first_bad_step >= 0)

    def check_finite(self):
        """Diverged if a step had a non-finite loss or gradient (waits for the device)."""
        if self.first_bad_step >= 0:
            raise self.diverged(int(self.first_bad_step), f"loss or gradient (norm {float(self.grad_norm):g})")

    def check_state(self):
        """Diverged if a weight or a moment is not finite: a huge update can do that with finite gradients."""
        self.check_finite()
        moments = (value for state in self.optimizer.state.values() for value in state.values())
        if not all(bool(values.isfinite().all()) for values in (*self.parameters, *moments)):
            raise self.diverged(self.progress.step - 1, "weights or moments")

    def diverged(self, step, what):
        """The Diverged to raise for `what` is not finite at optimizer step `step`, counted from 0."""
        good = (["none"] + step_checkpoints(self.run_dir))[-1]
        return Diverged(f"training diverged at step {step + 1}: {what} not finite, at learning rate "
                        f"{learning_rate_at(step, self.cfg):g}; last good checkpoint: {good}; "
                        f"try a lower learning_rate, a longer warmup_iters or a smaller grad_clip")

    def log(self):
        """A progress line and scalars, with the mean loss over all micro-batches since the last one."""
        self.check_finite()
        cfg, step = self.cfg, self.progress.step
        losses = torch.stack(self.progress.pending_losses).tolist()
        self.progress.pending_losses.clear()
        seconds_per_step = self.timer.lap()
        loss, lr = sum(losses) / len(losses), learning_rate_at(step - 1, cfg)
        tokens_per_second = self.sequences * cfg.block_size / seconds_per_step
        scalars = {"train/loss": loss, "train/lr": lr, "train/grad_norm": float(self.grad_norm),
                   "perf/tokens_per_sec": tokens_per_second}
        if peak := peak_flops(self.device):
            scalars["perf/mfu"] = tokens_per_second * self.model.flops_per_token() / peak
        self.record(scalars)
        epoch, step_in_epoch, steps_in_epoch = self.position(step - 1)
        n_epochs = self.position(cfg.max_iters - 1)[0] + 1
        eta = duration((cfg.max_iters - step) * seconds_per_step)
        print(f"epoch {epoch + 1}/{n_epochs} | step {step_in_epoch}/{steps_in_epoch} "
              f"({step_in_epoch / steps_in_epoch:.1%}) | loss {loss:.4f} | ppl {perplexity(loss):.2f} | lr {lr:.2e} "
              f"| tok/s {tokens_per_second:,.0f} | eta {eta}", flush=True)

    def position(self, step):
        """(epoch, step within it counted from 1, the epoch's steps in this run) of step `step`, counted from 0."""
        n_windows, sequences = len(self.train_data), self.sequences
        epoch = step * sequences // n_windows
        first = math.ceil(epoch * n_windows / sequences)
        end = min(math.ceil((epoch + 1) * n_windows / sequences), self.cfg.max_iters)
        return epoch, step - first + 1, end - first

    def evaluate(self):
        """Validate, record the figures and a sample, and keep the best model as best.pt."""
        self.check_finite()
        progress = self.progress
        result = evaluate(self.forward, self.val_data, self.cfg.batch_size, self.device, self.dtype)
        if not math.isfinite(result.loss):
            raise self.diverged(progress.step - 1, "validation loss")
        progress.val_loss = result.loss
        best = progress.best_val_loss, progress.best_step
        better = best[0] is None or result.loss < best[0]
        progress.evals_without_better = 0 if better else progress.evals_without_better + 1
        if better:
            progress.best_val_loss, progress.best_step = result.loss, progress.step
            if not self.save("best.pt"):  # the disk is full: the next better one will be the best
                progress.best_val_loss, progress.best_step = best
        print(f"step {progress.step} | val loss {result.loss:.4f} | ppl {result.perplexity:.2f} | "
              f"bits/byte {result.bits_per_byte:.4f}"
              f" | {'best so far' if better else f'best {progress.best_val_loss:.4f} at {progress.best_step}'}",
              flush=True)
        self.record({f"val/{name}": value for name, value in vars(result).items()})
        if self.cfg.sample_tokens:
            text = f"<pre>{html.escape(self.sample())}</pre>"
            self.attempt_event(self.writer.add_text, "samples", text, progress.step)

    def record(self, scalars):
        """Write {tag: value} to TensorBoard at this step."""
        for tag, value in scalars.items():
            self.attempt_event(self.writer.add_scalar, tag, value, self.progress.step)

    def attempt_event(self, action, *args):
        """Call a method of the TensorBoard writer; a full disk ends the events, not the run."""
        try:
            action(*args)
        except OSError as error:
            if not self.events_lost:
                print(f"warning: TensorBoard events are being lost: {error.strerror}", file=sys.stderr)
            self.events_lost = True

    def sample(self):
        """A text of sample_tokens tokens out of nothing; the same text for the same weights."""
        tokenizer = self.corpus.tokenizer
        start = torch.tensor([tokenizer.encode(tokenizer.start).tolist()], device=self.device)
        tokens = self.model.generate(start, self.cfg.sample_tokens, temperature=0.8, top_k=200, seed=self.cfg.seed)
        return tokenizer.decode(tokens[0].tolist())

    def finished(self):
        """Whether the run has all its steps, or `patience` evaluations without a better loss."""
        cfg, progress = self.cfg, self.progress
        return progress.step >= cfg.max_iters or 0 < cfg.patience <= progress.evals_without_better

    def print_end(self):
        """How the run ended, a sample, and what to type next."""
        progress = self.progress
        early = f" (early: {progress.evals_without_better} evaluations without a better loss)"
        best, path = "never evaluated", self.run_dir
        if progress.best_step:
            best = f"best val loss {progress.best_val_loss:.4f} at step {progress.best_step}"
            path = self.run_dir / "best.pt"
        print(f"finished at step {progress.step}{early if progress.step < self.cfg.max_iters else ''}; {best}\n\n"
              f"{self.sample()}\n\nnext:\n  python sample.py --ckpt {shlex.quote(str(path))}\n"
              f"  tensorboard --logdir {shlex.quote(self.cfg.log_dir)}")

    def content(self):
        """All that a checkpoint holds: tensors and primitives."""
        return {
            "model_state_dict": self.model.state_dict(), "optimizer_state_dict": self.optimizer.state_dict(),
            "scaler_state_dict": self.scaler.state_dict(), "config": dataclasses.asdict(self.cfg),
            "vocab_size": self.corpus.tokenizer.vocab_size, "tokenizer": self.corpus.tokenizer.state(),
            "data_fingerprint": self.corpus.fingerprint,
            "epoch": self.progress.step * self.sequences // len(self.train_data),
            **vars(self.progress), "pending_losses": [float(loss) for loss in self.progress.pending_losses],
        }

    def save(self, name=None):
        """Write a checkpoint, by default the step's own, delete the ones that are too old, and return its path.

        None, after a warning, where the disk does not take it; the older ones stay.
        """
        self.check_state()
        self.attempt_event(self.writer.flush)  # what is logged up to a checkpoint must outlive a kill as it does
        path = self.run_dir / name if name else step_path(self.run_dir, self.progress.step)
        try:
            save_checkpoint(path, self.content())
            prune_checkpoints(self.run_dir, self.cfg.keep_checkpoints)
        except OSError as error:
            print(f"warning: cannot save {path}: {error.strerror}; older checkpoints are kept", file=sys.stderr)
            return None
        return path

    def close(self):
        """Finish the events and give the run directory free."""
        self.attempt_event(self.writer.close)
        self.lock.release()


class StepTimer:
    """Mean seconds a step, with evaluations and saves left out."""

    def __init__(self):
        self.start, self.steps = time.perf_counter(), 0

    def lap(self):
        """Seconds a step since the last lap; the next lap starts here."""
        mean = self.mean()
        self.start, self.steps = time.perf_counter(), 0
        return mean

    def mean(self):
        return (time.perf_counter() - self.start) / max(1, self.steps)

    @contextmanager
    def left_out(self):
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before


def mark(device):
    """A point in time on `device`: a CUDA event, elsewhere the clock's seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start, end):
    """Seconds between two marks (waits for the device)."""
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


class StopSignals:
    """While entered, the first SIGINT or SIGTERM is only noted, in `received`; a second one acts at once."""

    def __enter__(self):
        self.received, self.handlers = None, {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self.handlers[signum] = signal.signal(signum, self.note)
        return self

    def note(self, signum, frame):
        self.received = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print("\nstopping after this step (once more: at once)", file=sys.stderr)

    def __exit__(self, *exception):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)


def duration(seconds):
    """Seconds in words: '48 s', '3 min 05 s', '2 h 10 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def train(cfg):
    """Train by a checked TrainConfig; return the finished Trainer.

    Interrupted after SIGINT or SIGTERM, when the run has saved itself; Diverged on a non-finite loss
    or gradient; UserError for data, checkpoints or folders that do not fit.
    """
    run = Trainer(cfg)
    cfg, progress = run.cfg, run.progress
    run.print_start()
    batches = run.batches()
    first_step, epoch_start = progress.step, mark(run.device)
    if run.finished():
        print("nothing to do: the run is finished; a larger --max_iters, --epochs or --patience makes it go on")
        batches = ()
    with StopSignals() as signals, closing(run):
        for x, y in batches:
            run.optimizer_step(x, y)
            step = progress.step
            if step == first_step + STEPS_TO_JUDGE_BY:
                run.print_expected_time()
            if step == 1 or step % cfg.log_interval == 0:
                run.log()
            if run.position(step)[0] != run.position(step - 1)[0]:
                epoch_end = mark(run.device)
                print(f"epoch took {duration(seconds_between(epoch_start, epoch_end))}", flush=True)
                epoch_start = epoch_end
            with run.timer.left_out():
                if step == cfg.max_iters or step % cfg.eval_interval == 0:
                    run.evaluate()
                stop = signals.received  # looked at once: a signal that comes later is for the next step
                last = run.finished() or stop
                if last or step % cfg.checkpoint_interval == 0:
                    path = run.save()
            if last and not path:
                raise UserError(f"the last checkpoint could not be saved in {run.run_dir}; when there is room, go on "
                                f"from the one before it with --resume")
            if run.finished():
                break
            if stop:
                print(f"stopped after step {step}, saved {path}")
                raise Interrupted(stop)
    return run


def train_model(config_path=None, data_path=None, epochs=None, save_path=None, **fields):
    """Train from Python: return (model, training data), the data with its `tokenizer`.

    config_path: a config file. data_path: a UTF-8 text, prepared under its stem with the tokenizer of
    the config's own data set. epochs and other `fields` win over the file. save_path: where the last
    checkpoint is written too. UserError for what is wrong with any of them.
    """
    values = fields | ({} if epochs is None else {"epochs": epochs})
    cfg, problems = load_config(config_path, values, weights_shape)
    if problems:
        raise UserError(*problems)
    if data_path:
        name = Path(data_path).stem
        _, kind = CORPORA.get(cfg.dataset, (None, "char"))
        split_and_write(read_texts([data_path]), name, kind, cfg.data_dir)
        cfg = dataclasses.replace(cfg, dataset=name)
    check(cfg)
    run = train(cfg)
    if save_path:
        save_checkpoint(save_path, run.content())
    return run.model, run.train_data


def main(argv):
    if {"--help", "-h"} & set(argv):
        print(help_text())
        return 0
    cfg, problems = config_from_argv(argv, weights_shape)
    check(cfg, problems)
    try:
        with out_of_memory_as(out_of_memory_message(cfg)):
            run = train(cfg)
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except Interrupted as stop:
        again = [*argv, *([] if cfg.resume else ["--resume"])]
        print(f"go on with: python train_gpt2.py {shlex.join(again)}")
        return 128 + stop.signum
    run.print_end()
    return 0


if __name__ == "__main__":
    run_script(main)
