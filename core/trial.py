"""What a training step takes: its memory, found on fake tensors, and its time, on random tokens. Nothing is written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from core.config import ResolvedConfig
from core.dataset import Windows
from core.inference import make_cache, stream
from core.schema import tensors_in
from core.trainer import Trainer
from lib.device import mark, seconds_between
from lib.distributed import Processes
from lib.memory import LiveBytes, peak_memory
from model import GPT, LARGE_VOCABULARY

STEPS = 3
RECORD = 600  # bytes of a checkpoint per tensor, on top of its data: names, sizes, padding


@dataclass
class Memory:
    """Bytes of one process's tensors."""

    weights: int  # gradients take as much
    moments: int
    activations: int  # kept for a micro-batch's backward pass
    logits: int  # logits and loss, at their peak
    keys: Tensor  # of a sample's cache, fake; its values take as much
    checkpoint: int  # on the disk
    peak: int  # of all tensors together, held by their allocator


class Absent(Processes):
    """Processes that are not there: nothing is exchanged."""

    def sum(self, tensor: Tensor, wait: bool = True) -> None:
        pass

    def share(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
        pass


class RandomBatch:
    """Random windows in place of those of a core.dataset.Batch; they are fake where tensors are."""

    def __init__(self, cfg: ResolvedConfig, vocab_size: int) -> None:
        self.cfg, self.vocab_size, self.step = cfg, vocab_size, 0
        self.n_targets = cfg.sequences * cfg.block_size
        self.micro_batches = range(cfg.gradient_accumulation_steps)

    def part(self, first: int = 0, every: int = 1) -> Iterator[tuple[int, Windows]]:
        shape = self.cfg.batch_size, self.cfg.block_size
        for number in self.micro_batches[first::every]:
            yield number, tuple(torch.randint(self.vocab_size, shape) for _ in range(2))


def memory_of_libraries(cfg: ResolvedConfig, vocab_size: int) -> int:
    """Bytes that Python, the libraries and their workspaces take, measured by training a tiny model like cfg's."""
    tiny = replace(cfg, n_layer=1, n_head=2, n_embd=32, block_size=16, batch_size=1, gradient_accumulation_steps=1,
                   compile="false")
    vocab_size = min(vocab_size, LARGE_VOCABULARY)
    trainer = Trainer(tiny, vocab_size)
    trainer.step(RandomBatch(tiny, vocab_size))
    list(stream(trainer.model, torch.zeros((1, 1), dtype=torch.int64, device=trainer.device), 2, top_k=200))
    return peak_memory(trainer.device) or 0


@contextmanager
def made_on(device: torch.device) -> Iterator[None]:
    """Make GPTs on `device` at once: fake tensors cannot be moved there."""
    GPT.to = lambda model, device: model
    try:
        with torch.device(device):
            yield
    finally:
        del GPT.to


def trace(cfg: ResolvedConfig, vocab_size: int, n_processes: int = 1) -> tuple[Memory, GPT]:
    """(memory, model) of two training steps of one of n_processes on fake tensors: nothing is allocated.

    (The first step has no moments yet.)
    """
    # Micro-batches after the second are like it. The compiler, which is not traced, only saves memory.
    n_micro_batches = min(2, cfg.gradient_accumulation_steps // n_processes)
    cfg = replace(cfg, gradient_accumulation_steps=n_micro_batches * n_processes, compile="false")
    live, at = LiveBytes(torch.device(cfg.device).type), {}

    def forward(x: Tensor, y: Tensor) -> tuple[Tensor | None, Tensor]:
        at["start"] = live.now
        result = trainer.model(x, y)
        at["highest"] = live.since_mark
        return result

    with FakeTensorMode(), live:
        with made_on(torch.device(cfg.device)):
            trainer = Trainer(cfg, vocab_size, Absent(size=n_processes))
        trainer.forward = forward
        trainer.model.transformer.ln_f.register_forward_hook(lambda *_: at.update(end=live.mark()))
        for _ in range(2):
            trainer.step(RandomBatch(cfg, vocab_size))
        moments = list(tensors_in(list(trainer.optimizer.state.values())))
        # These last, and leave no holes.
        holes = sum(live.holes(tensor.nbytes) for tensor in (*trainer.parameters, *trainer.parameters, *moments))
        saved = list(tensors_in(trainer.state_dict()))
        memory = Memory(n_bytes(trainer.parameters), n_bytes(moments), at["end"] - at["start"],
                        at["highest"] - at["end"], make_cache(trainer.model, 1).keys,
                        n_bytes(saved) + RECORD * len(saved), round(live.highest - holes))
        return memory, trainer.model


def n_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the tensors, those of a shared storage once."""
    return sum({tensor.untyped_storage()._cdata: tensor.nbytes for tensor in tensors}.values())


def measure(cfg: ResolvedConfig, vocab_size: int, processes: Processes) -> float:
    """Seconds per step, over STEPS steps of which the first, which sets up libraries, does not count."""
    cfg = replace(cfg, learning_rate=0.0, min_lr=0.0)  # random tokens must not make it diverge
    trainer = Trainer(cfg, vocab_size, processes)
    for step in range(STEPS):
        if step == 1:
            start = mark(trainer.device)
        trainer.step(RandomBatch(cfg, vocab_size))
    return seconds_between(start, mark(trainer.device)) / (STEPS - 1)
