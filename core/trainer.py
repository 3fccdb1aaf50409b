"""A model and its optimizer: one optimizer step."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from core.config import ResolvedConfig
from core.dataset import Batch
from core.optim import learning_rate_at, make_optimizer
from lib.cli import first_line
from lib.device import DTYPES, autocast, default_generator, is_out_of_memory
from lib.kernels import IGNORE_INDEX
from model import GPT, GPTConfig


class Diverged(Exception):
    """A loss, gradient, weight or moment is no longer finite; the message says which, and at which step."""


class Trainer:
    """A GPT initialised from cfg.seed, with its optimizer and gradient scaler."""

    def __init__(self, cfg: ResolvedConfig, vocab_size: int) -> None:
        self.cfg = cfg
        self.device, self.dtype = torch.device(cfg.device), DTYPES[cfg.dtype]
        self.generator = default_generator(self.device)
        torch.manual_seed(cfg.seed)
        self.model = GPT(GPTConfig.of(vars(cfg), vocab_size)).to(self.device)
        self.parameters = list(self.model.parameters())
        self.optimizer = make_optimizer(self.model, cfg, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.grad_norm = torch.zeros((), device=self.device)  # of the last step, before clipping
        self.first_bad_step = torch.tensor(-1, device=self.device)  # the first with a non-finite loss or gradient
        self.compile_error: str | None = None
        self.forward = self.compiled() if cfg.compile == "true" else self.model

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
            with torch.set_grad_enabled(training), autocast(self.device, self.dtype):
                loss = model(x, y)[1]
            if training:
                loss.backward()

    def step(self, batch: Batch, step: int) -> Tensor:
        """Do optimizer step `step` (0 is the first) on its windows; return its loss, a float32 scalar.

        The loss is the mean over all the step's targets, however they fall into micro-batches. Diverged,
        before the update, if it or the gradient is not finite; on a GPU only the next `check_finite` raises it.
        """
        cfg = self.cfg
        # Dropout depends on (seed, step) alone, not on what ran before.
        self.generator.manual_seed(int(np.random.SeedSequence((cfg.seed, step)).generate_state(1)[0]))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, cfg)
        loss = self.backward(batch)
        self.scaler.unscale_(self.optimizer)
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, cfg.grad_clip or math.inf)
        self.note_finite(loss, step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss

    def backward(self, batch: Batch) -> Tensor:
        """Accumulate the gradients of a step's micro-batches; return their loss."""
        total = torch.zeros((), device=self.device)
        n_targets = int((batch[1] != IGNORE_INDEX).sum())
        on_cuda = self.device.type == "cuda"  # only CUDA batches are pinned; copies to MPS must block
        for x, y in zip(*(part.split(self.cfg.batch_size) for part in batch)):
            share = int((y != IGNORE_INDEX).sum()) / n_targets
            x, y = (part.to(self.device, non_blocking=on_cuda) for part in (x, y))
            with autocast(self.device, self.dtype):
                loss = self.forward(x, y)[1] * share
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def note_finite(self, loss: Tensor, step: int) -> None:
        """Remember `step` if it is the first with a non-finite loss or gradient.

        The gradient scaler finds its scale by infinite gradients, and skips those updates itself.
        """
        finite = loss.isfinite() if self.scaler.is_enabled() else loss.isfinite() & self.grad_norm.isfinite()
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
                        f"{learning_rate_at(step, self.cfg):g}; try a lower learning_rate, a longer warmup_iters or a "
                        f"smaller grad_clip")

    def state_dict(self) -> dict:
        """Weights, moments and the gradient scaler's state, under their keys in a checkpoint."""
        return {"model_state_dict": self.model.state_dict(), "optimizer_state_dict": self.optimizer.state_dict(),
                "scaler_state_dict": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Load what `state_dict` returned; other keys are ignored."""
        self.model.load_state_dict(state["model_state_dict"])
        self.optimizer.load_state_dict(state["optimizer_state_dict"])
        self.scaler.load_state_dict(state["scaler_state_dict"])
