"""How well a model predicts a text: every token but the first, each exactly once."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from core.dataset import TokenDataset
from lib.device import autocast
from lib.distributed import ALONE, Processes
from lib.kernels import IGNORE_INDEX


def perplexity(loss: float) -> float:
    """exp(loss in nats); inf where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one pass over a text: mean nats per token, its exponential, bits per byte; the first token is free."""

    loss: float
    perplexity: float
    bits_per_byte: float


@torch.no_grad()
def evaluate(model: torch.nn.Module, dataset: TokenDataset, batch_size: int, device: torch.device,
             dtype: torch.dtype = torch.float32, processes: Processes = ALONE) -> Evaluation:
    """Evaluate `model`, a GPT, compiled or not, on a dataset that has a tokenizer.

    Every token but the first is predicted exactly once: where windows overlap, a token counts only in
    the first window that reaches it. All batches have one shape: the last is padded with windows
    whose targets are ignored. Each process takes its share of the batches; all get the same result.
    """
    was_training = model.training
    model.eval()
    starts, losses, counts = range(0, len(dataset), batch_size), [], []
    mine = slice(processes.rank, None, processes.size)
    for start in starts[mine]:
        x, y = dataset.windows(range(start, min(start + batch_size, len(dataset))))
        y[0 if start else 1 :, : dataset.block_size - dataset.stride] = IGNORE_INDEX
        missing = batch_size - len(x)
        x = F.pad(x, (0, 0, 0, missing))
        y = F.pad(y, (0, 0, 0, missing), value=IGNORE_INDEX)
        counts.append(int((y != IGNORE_INDEX).sum()))
        with autocast(device, dtype):
            losses.append(model(x.to(device), y.to(device))[1])
    model.train(was_training)
    of_batches = torch.zeros(2, len(starts), dtype=torch.float64)  # loss, number of targets; of others' batches 0
    if losses:
        of_batches[:, mine] = torch.stack((torch.stack(losses).cpu().double(), torch.tensor(counts)))
    processes.sum(of_batches)
    nats, n_targets = of_batches.prod(0).sum().item(), of_batches[1].sum().item()
    n_bytes = int(dataset.tokenizer.token_bytes[dataset.tokens[1:]].sum())
    loss = nats / n_targets
    return Evaluation(loss, perplexity(loss), nats / math.log(2) / n_bytes)
