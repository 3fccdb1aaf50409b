"""Optimizers and learning rate schedules."""

import math

import torch
from torch import nn

from core.config import ResolvedConfig
from lib.device import choose_dtype
from lib.distributed import ALONE, Processes
from lib.muon import Muon

# What each optimizer keeps for a parameter, besides a count of its updates.
MOMENTS = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}


def learning_rate_at(step: int, cfg: ResolvedConfig) -> float:
    """Learning rate of optimizer step `step` (0 is the first): linear warmup, then cfg.lr_schedule down to min_lr.

    It grows from learning_rate / (warmup_iters + 1) to learning_rate at step warmup_iters, and is
    min_lr from step lr_decay_iters on. Between them: "cosine" (Loshchilov & Hutter 2017, without
    restarts), "linear", or "wsd": constant, then linear over the last decay_fraction of lr_decay_iters
    (Hu et al. 2024).
    """
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    if step >= cfg.lr_decay_iters:
        return cfg.min_lr
    start = cfg.warmup_iters
    if cfg.lr_schedule == "wsd":
        start = max(start, cfg.lr_decay_iters - max(1, round(cfg.decay_fraction * cfg.lr_decay_iters)))
    progress = max(0, step - start) / (cfg.lr_decay_iters - start)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if cfg.lr_schedule == "cosine" else 1 - progress
    return cfg.min_lr + left * (cfg.learning_rate - cfg.min_lr)


class MuonAndAdamW:
    """Muon for the blocks' matrices, AdamW for the rest, with the methods that Trainer and GradScaler use."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        self.muon, self.adamw = muon, adamw

    @property
    def param_groups(self) -> list[dict]:
        return self.muon.param_groups + self.adamw.param_groups

    @property
    def state(self) -> dict:
        return {**self.muon.state, **self.adamw.state}

    def step(self) -> None:
        self.muon.step()
        self.adamw.step()

    def zero_grad(self) -> None:
        self.muon.zero_grad()
        self.adamw.zero_grad()

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}


def make_optimizer(model: nn.Module, cfg: ResolvedConfig, device: torch.device,
                   processes: Processes = ALONE) -> torch.optim.Optimizer | MuonAndAdamW:
    """The optimizer cfg names, with weight decay on matrices only.

    "adamw": Loshchilov & Hutter 2019, fused where the device has it. "muon": Muon (Jordan et al. 2024) for
    the blocks' matrices, its updates scaled to the size of AdamW's (by 0.2 sqrt(max(rows, columns)), Liu et al. 2025),
    so that one learning rate serves both; AdamW for embeddings, head, norms and biases. Muon iterates in bfloat16 where
    that is fast.
    """
    hidden = [p for p in model.transformer.h.parameters() if p.dim() == 2] if cfg.optimizer == "muon" else []
    taken = set(hidden)
    rest = [p for p in model.parameters() if p not in taken]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2),
                              fused=device.type in ("cpu", "cuda"))
    if not hidden:
        return adamw
    dtype = torch.bfloat16 if choose_dtype("auto", device) == torch.bfloat16 else torch.float32
    return MuonAndAdamW(Muon(hidden, dtype, not cfg.exact_sum, processes, lr=cfg.learning_rate,
                             weight_decay=cfg.weight_decay, momentum=cfg.beta1), adamw)


def load_moments(optimizer: torch.optim.Optimizer | MuonAndAdamW, saved: dict) -> None:
    """Load the moments of `saved`, a state_dict; learning rate, decay, betas and kernels stay `optimizer`'s own."""
    if isinstance(optimizer, MuonAndAdamW):
        load_moments(optimizer.muon, saved["muon"])
        load_moments(optimizer.adamw, saved["adamw"])
    else:
        optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})
