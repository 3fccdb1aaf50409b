"""Fixtures that several test files use: the downloads, a small prepared data set, the flags of a short run."""

import os
import signal
import sys

import pytest
import torch
from helpers import ROOT

from core.corpus import prepare_text, pydoc_text

torch.set_num_threads(1)  # as in helpers.ONE_THREAD
# A shell that starts the tests in the background, or nohup, has them ignored, and so would all scripts they start.
for name in ("SIGINT", "SIGHUP"):
    signum = getattr(signal, name, None)
    if signum and signal.getsignal(signum) == signal.SIG_IGN:
        signal.signal(signum, signal.default_int_handler)

# Modules about signals, limits, terminals, shells, links and POSIX paths; and those that look into Linux's /proc.
POSIX_ONLY = ("chaos_faults", "chaos_fuzz", "chaos_processes", "checkpoint", "cli", "distributed", "export_hf", "files",
              "huggingface", "plan", "preflight", "report", "runs", "sample", "train_gpt2")
LINUX_ONLY = ("chaos_faults", "chaos_fuzz", "chaos_processes", "distributed", "plan")
ABSENT = LINUX_ONLY if sys.platform == "darwin" else POSIX_ONLY if os.name != "posix" else ()
collect_ignore = [f"test_{name}.py" for name in ABSENT]


def pytest_report_header():
    return f"not run on this system: {', '.join(ABSENT)}" if ABSENT else None


@pytest.fixture(scope="session")
def downloads():
    """The directory with tinyshakespeare.txt and gpt2/vocab.bpe; skips the test where there is none."""
    for directory in (ROOT / "data/downloads", ROOT.parent / "shared/downloads"):
        if (directory / "tinyshakespeare.txt").exists() and (directory / "gpt2/vocab.bpe").exists():
            return directory
    pytest.skip("no tinyshakespeare.txt and gpt2/vocab.bpe in data/downloads or ../shared/downloads")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A data directory with `tiny`: 12,000 characters of the Python reference."""
    directory = tmp_path_factory.mktemp("data")
    prepare_text(pydoc_text(directory)[:12_000], "tiny", "char", directory)
    return directory


@pytest.fixture(scope="session")
def tiny_args(data_dir):
    """Flags of a run on `tiny` that takes a second."""
    flags = dict(dataset="tiny", data_dir=data_dir, n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=4,
                 max_iters=12, warmup_iters=2, log_interval=3, eval_interval=6, checkpoint_interval=6,
                 sample_tokens=8, run_name="tiny", dtype="float32", device="cpu")
    return [f"--{name}={value}" for name, value in flags.items()]
