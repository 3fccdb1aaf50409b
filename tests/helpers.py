"""What several test files share: scripts as processes, small models, checkpoints compared."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.checkpoint import load_checkpoint, step_checkpoints
from core.tokenizer import CharTokenizer
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
# A model of a few thousand parameters: a second thread costs more than it gives.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
FAMILIES = {
    "gpt2": dict(norm="layernorm", mlp="gelu", pos="learned"),
    "modern": dict(norm="rmsnorm", mlp="swiglu", pos="sinusoidal", bias=False),
    "rope": dict(norm="rmsnorm", mlp="relu2", pos="rope", bias=False, tie_weights=False, qk_norm=True),
}


def run(script, *args, cwd, env=None, timeout=300, **options):
    """Run a script of the repo with `args` in the directory `cwd`; the finished process, its output as text."""
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, timeout=timeout,
                          capture_output=True, text=True, env=ONE_THREAD | (env or {}), **options)


def started(script, *args, cwd):
    """A running script of the repo, its output still to be read."""
    return subprocess.Popen([sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ONE_THREAD)


def assert_refused(process, *words):
    """The process ended with exit code 2, without a traceback, and stderr holds all the words."""
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    for word in words:
        assert word in process.stderr, process.stderr


@contextmanager
def files_up_to(size):
    """As on a full disk, no file can grow over `size` bytes."""
    import resource  # POSIX only

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def make_model(family="gpt2", seed=0, **changes):
    """A small GPT in eval mode with the same weights for the same seed."""
    shape = dict(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=32) | FAMILIES[family] | changes
    torch.manual_seed(seed)
    return GPT(GPTConfig(**shape)).eval()


def whole_content(step):
    """What passes for a whole checkpoint as long as no model is made of it."""
    return {"model_state_dict": {"w": torch.full((1000,), float(step))}, "optimizer_state_dict": {},
            "scaler_state_dict": {}, "config": {}, "vocab_size": 3, "tokenizer": CharTokenizer("abc").state(),
            "data_fingerprint": "", "epoch": 0,
            "step": step, "val_loss": None, "best_val_loss": None, "best_step": None, "evals_without_better": 0,
            "pending_losses": []}


def flip_bit(path, needle):
    data = bytearray(path.read_bytes())
    data[data.index(needle)] ^= 1
    path.write_bytes(data)


class FixedBatch:
    """The batch of optimizer step `step` made of given windows (x, y), fetched `batch_size` at a time."""

    def __init__(self, windows, step, batch_size=64):
        self.step, self.n_targets = step, int((windows[1] != -1).sum())
        self.micro_batches = list(zip(*(part.split(batch_size) for part in windows)))

    def part(self, first=0, every=1):
        return list(enumerate(self.micro_batches))[first::every]


def trained(directory, args, *more, name="tiny", code=0):
    """Train as a process in `directory`; (the newest checkpoint's content, the process)."""
    process = run("train_gpt2.py", *args, f"--run_name={name}", *more, cwd=directory)
    assert process.returncode == code, process.stdout + process.stderr
    return load_checkpoint(step_checkpoints(directory / "checkpoints" / name)[-1]), process


def scalars(directory):
    """{tag: {step: value}} of a TensorBoard log."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def tensors_in(tree, path=()):
    """(path, tensor) of every tensor in nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from tensors_in(value, (*path, key))
        elif isinstance(value, torch.Tensor):
            yield (*path, key), value


def assert_equal_state(a, b):
    """Weights, moments and losses not yet logged are the same bit for bit."""
    assert a["step"] == b["step"] and a["pending_losses"] == b["pending_losses"]
    for part in ("model_state_dict", "optimizer_state_dict"):
        tensors = [dict(tensors_in(state[part])) for state in (a, b)]
        assert tensors[0].keys() == tensors[1].keys() and len(tensors[0]) > 0
        for name, value in tensors[0].items():
            assert torch.equal(value, tensors[1][name]), name


def section(text, heading):
    """The part of a Markdown text under `heading`."""
    return re.split(r"^## ", text.split(heading + "\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


def newton_schulz(matrix):
    """Five quintic steps towards the nearest orthogonal matrix, float64; wide matrices, as the shorter side decides."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T
