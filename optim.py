"""The optimizers and the learning rate's schedules."""

import math

import torch


def learning_rate_at(step, cfg):
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


class BatchedMuon(torch.optim.Muon):
    """torch.optim.Muon with the matrices of one shape stacked: a few launches for all of them, not 20 for each."""

    @torch.no_grad()
    def step(self, bad=None):
        """One update. Where the bool scalar tensor `bad` is true, all gradients count as 0."""
        for group in self.param_groups:
            of_shape = {}
            for p in group["params"]:
                of_shape.setdefault(p.shape, []).append(p)
            for shape, params in of_shape.items():
                self.update(shape, params, group, bad)

    def update(self, shape, params, group, bad):
        gradients = torch.stack([p.grad for p in params])
        if bad is not None:
            gradients.masked_fill_(bad, 0)
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(momenta, gradients.unbind(), 1 - group["momentum"])
        gradients.lerp_(torch.stack(momenta), group["momentum"])  # Nesterov's momentum
        updates = orthogonalized(gradients, group["ns_coefficients"], group["ns_steps"], group["eps"]).float()
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, updates.unbind(), alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def orthogonalized(matrices, coefficients, steps, eps):
    """Newton-Schulz steps, in bfloat16, from matrices (n, rows, columns) towards their nearest orthogonal ones."""
    a, b, c = coefficients
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.bfloat16().mT if tall else matrices.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MuonAndAdamW:
    """Muon for the blocks' matrices and AdamW for all else, with what `Trainer` and GradScaler use of an optimizer."""

    def __init__(self, muon, adamw):
        self.muon, self.adamw = muon, adamw

    @property
    def param_groups(self):
        return self.muon.param_groups + self.adamw.param_groups

    @property
    def state(self):
        return {**self.muon.state, **self.adamw.state}

    def step(self):
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none=True):
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def state_dict(self):
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, states):
        self.muon.load_state_dict(states["muon"])
        self.adamw.load_state_dict(states["adamw"])


def make_optimizer(model, cfg, device):
    """The optimizer cfg names, with weight decay on matrices only.

    "adamw": Loshchilov & Hutter 2019, fused where the device has it. "muon": torch.optim.Muon (Jordan
    et al. 2024) for the blocks' matrices, its updates scaled to the size of AdamW's (Liu et al. 2025), so
    that one learning rate serves both; AdamW for embeddings, head, norms and biases.
    """
    hidden = [p for p in model.transformer.h.parameters() if p.dim() == 2] if cfg.optimizer == "muon" else []
    taken = set(hidden)
    rest = [p for p in model.parameters() if p.requires_grad and p not in taken]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2),
                              fused=device.type in ("cpu", "cuda"))
    if not hidden:
        return adamw
    # The same bits on a CPU; there the launches that it saves cost nothing.
    kind = BatchedMuon if device.type == "cuda" else torch.optim.Muon
    muon = kind(hidden, lr=cfg.learning_rate, weight_decay=cfg.weight_decay, momentum=cfg.beta1,
                adjust_lr_fn="match_rms_adamw")
    return MuonAndAdamW(muon, adamw)


def update_unless(optimizer, bad):
    """One update, left out where the bool scalar tensor `bad` is true, without making CUDA wait.

    Fused AdamW reads found_inf on the device; BatchedMuon gets zeros for gradients.
    """
    parts = (optimizer.muon, optimizer.adamw) if isinstance(optimizer, MuonAndAdamW) else (optimizer,)
    for part in parts:
        if part.defaults.get("fused"):
            part.found_inf = bad.float()
            part.step()
        elif isinstance(part, BatchedMuon):
            part.step(bad)
        elif not bad:
            part.step()
