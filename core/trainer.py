"""A model and its optimizer: one optimizer step."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from core.config import ResolvedConfig
from core.dataset import Batch
from core.optim import learning_rate_at, load_moments, make_optimizer
from core.schema import check_moments
from lib.cli import first_line
from lib.device import DTYPES, autocast, default_generator, is_out_of_memory, reproducible, send, use_tf32
from lib.distributed import ALONE, GradientSum, Processes
from lib.kernels import IGNORE_INDEX
from model import GPT, GPTConfig


class Diverged(Exception):
    """A loss, gradient, weight or moment is no longer finite; the message says which, and at which step."""


class Trainer:
    """A GPT initialized from cfg.seed, with its optimizer and gradient scaler; the same in all processes."""

    def __init__(self, cfg: ResolvedConfig, vocab_size: int, processes: Processes = ALONE) -> None:
        self.cfg, self.processes = cfg, processes
        self.device, self.dtype = torch.device(cfg.device), DTYPES[cfg.dtype]
        self.has_tf32 = use_tf32(self.device, self.dtype)
        self.generator = default_generator(self.device)
        torch.manual_seed(cfg.seed)
        self.model = GPT(GPTConfig.of(vars(cfg), vocab_size)).to(self.device)
        self.model.activation_checkpointing = cfg.activation_checkpointing
        self.parameters = list(self.model.parameters())
        self.optimizer = make_optimizer(self.model, cfg, self.device, processes)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.grad_norm = torch.zeros((), device=self.device)  # of the last step, before clipping
        self.first_bad_step = torch.tensor(-1, device=self.device)  # the first with a non-finite loss or gradient
        self.compile_error: str | None = None
        self.forward = self.compiled() if cfg.compile == "true" else self.model
        self.sum: GradientSum | None = None  # a single process lets autograd sum, if not exactly
        if processes.size > 1 or cfg.exact_sum:
            self.sum = GradientSum(self.parameters, processes, cfg.exact_sum, cfg.gradient_accumulation_steps)

    def compiled(self) -> nn.Module:
        """The compiled model, or the plain one if compiling fails (compile_error says why)."""
        model = torch.compile(self.model, dynamic=False)
        try:
            self.try_out(model)
        except Exception as error:  # compiler errors share no base class
            if is_out_of_memory(error):
                raise
            self.compile_error = first_line(error)
            return self.model
        finally:
            self.optimizer.zero_grad()
            self.model.train()
        return model

    def try_out(self, model: nn.Module) -> None:
        """Call a compiled model as training and evaluation do, so that nothing is compiled later."""
        for training in (True, False):
            # Two tensors: passing one twice would compile a different graph.
            x, y = (torch.zeros((self.cfg.batch_size, self.cfg.block_size), dtype=torch.int64, device=self.device)
                    for _ in range(2))
            self.model.train(training)
            with reproducible(self.device) if training else torch.no_grad():
                with autocast(self.device, self.dtype):
                    loss = model(x, y)[1]
                if training:
                    loss.backward()

    def step(self, batch: Batch, proceed: Callable[[int], bool] = lambda n_done: True) -> Tensor | None:
        """Do the optimizer step of `batch`; return its loss, a float32 scalar.

        Of W processes the one of rank r computes the micro-batches r, r + W, …; then all do the same update.
        The loss is the mean over all the step's targets, however they fall into micro-batches. Between
        micro-batches `proceed` is called with the number done here; if it returns False, which it must do in all
        processes, the step is dropped: None.
        Diverged, before the update, if loss or gradient is not finite; on a GPU only the next `check_finite`
        raises it.
        """
        cfg, step = self.cfg, batch.step
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, cfg)
        loss = self.backward(batch, proceed)
        if loss is None:
            self.optimizer.zero_grad()
            return None
        self.scaler.unscale_(self.optimizer)
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, cfg.grad_clip or math.inf)
        self.note_finite(loss, step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss

    def backward(self, batch: Batch, proceed: Callable[[int], bool]) -> Tensor | None:
        """Accumulate the gradients of a step's micro-batches; return their loss, None if not to `proceed`."""
        total = torch.zeros((), device=self.device)
        if self.sum:
            self.sum.start(self.scaler.scale(torch.ones_like(total)))  # the factor that losses get before backward
        for n_done, (number, (x, y)) in enumerate(batch.part(self.processes.rank, self.processes.size)):
            if n_done and not proceed(n_done):
                return None
            self.seed_dropout(batch.step, number)
            share = int((y != IGNORE_INDEX).sum()) / batch.n_targets
            x, y = send(x, self.device), send(y, self.device)
            with reproducible(self.device):
                with autocast(self.device, self.dtype):
                    loss = self.forward(x, y)[1] * share
                if self.sum:
                    self.sum.backward(self.scaler.scale(loss), number + self.processes.size >= len(batch.micro_batches))
                else:
                    self.scaler.scale(loss).backward()
                    total += loss.detach()
        return self.sum.finish() if self.sum else total

    def seed_dropout(self, step: int, number: int) -> None:
        """Let the dropout of a step's micro-batch depend on nothing else."""
        self.generator.manual_seed(int(np.random.SeedSequence((self.cfg.seed, step, number)).generate_state(1)[0]))

    def note_finite(self, loss: Tensor, step: int) -> None:
        """Remember `step` if it is the first with a non-finite loss or gradient.

        With a gradient scaler (float16) an infinite gradient is no divergence yet: the scaler skips that update and
        halves its scale. But at a scale below 1 it is not the scale that makes gradients infinite.
        """
        finite = self.grad_norm.isfinite()
        if self.scaler.is_enabled():
            finite = finite | (self.scaler.scale(torch.ones_like(loss)) >= 1)
        finite = loss.isfinite() & finite
        # Not torch.where: it would copy `step` to the device and wait.
        self.first_bad_step.masked_fill_((self.first_bad_step < 0) & ~finite, step)
        if self.device.type == "cpu":
            self.check_finite()

    def check_finite(self) -> None:
        """Diverged if a step had a non-finite loss or gradient (waits for the device)."""
        if self.first_bad_step >= 0:
            raise self.diverged(int(self.first_bad_step), f"loss or gradient (norm {float(self.grad_norm):g})")

    def check_state(self, step: int) -> None:
        """Diverged if a weight or a moment is not finite after `step` steps, which finite gradients can cause too."""
        self.check_finite()
        moments = (value for state in self.optimizer.state.values() for value in state.values())
        if not all(bool(values.isfinite().all()) for values in (*self.parameters, *moments)):
            raise self.diverged(step - 1, "weights or moments")

    def diverged(self, step: int, what: str) -> Diverged:
        """Build the Diverged error for a non-finite `what` at optimizer step `step`, which counts from 0."""
        return Diverged(f"training diverged at step {step + 1}: {what} not finite, at learning rate "
                        f"{learning_rate_at(step, self.cfg):g}; try a lower learning_rate, a longer warmup_iters, a "
                        f"smaller grad_clip{' or dtype=float32' if self.scaler.is_enabled() else ''}"
                        f"{' or exact_sum=false, which has a wider range' if self.cfg.exact_sum else ''}")

    def state_dict(self) -> dict:
        """Weights, moments and the gradient scaler's state, under their keys in a checkpoint."""
        return {"model_state_dict": self.model.state_dict(), "optimizer_state_dict": self.optimizer.state_dict(),
                "scaler_state_dict": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Load a checkpoint's content, which may come from another device or dtype.

        RuntimeError, ValueError, KeyError or TypeError if weights or moments do not fit.
        """
        moments, scaler = state["optimizer_state_dict"], state["scaler_state_dict"]
        check_moments(self.optimizer, moments, state["step"], may_lack=bool(scaler))
        self.model.load_state_dict(state["model_state_dict"])
        load_moments(self.optimizer, moments)
        if scaler:
            self.scaler.load_state_dict(scaler)
