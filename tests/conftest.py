"""What several test files share: running a script as a process, the corpora, a small prepared data set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prepare_data import pydoc_text, split_and_write

ROOT = Path(__file__).resolve().parent.parent
# Models of a few thousand parameters: a second thread costs more than it gives.
torch.set_num_threads(1)


def run(script, *args, cwd, env=None, timeout=300):
    """Run a script of the repo with `args` in the folder `cwd`; the finished process, with its output as text."""
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, timeout=timeout,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}))


def assert_refused(process, *words):
    """The process ended with exit code 2, without a traceback, and stderr holds all the words."""
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    for word in words:
        assert word in process.stderr, process.stderr


@pytest.fixture(scope="session")
def downloads():
    """The folder with tinyshakespeare.txt and gpt2/vocab.bpe; skips the test where there is none."""
    for folder in (ROOT / "data/downloads", ROOT.parent / "shared/downloads"):
        if (folder / "tinyshakespeare.txt").exists() and (folder / "gpt2/vocab.bpe").exists():
            return folder
    pytest.skip("no tinyshakespeare.txt and gpt2/vocab.bpe in data/downloads or ../shared/downloads")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A data directory with `tiny`: 12,000 characters of the Python reference."""
    folder = tmp_path_factory.mktemp("data")
    split_and_write(pydoc_text(folder)[:12_000], "tiny", "char", folder)
    return folder


@pytest.fixture
def tiny_args(data_dir):
    """Flags of a run on `tiny` that takes a second."""
    flags = dict(dataset="tiny", data_dir=data_dir, n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=4,
                 max_iters=12, warmup_iters=2, log_interval=3, eval_interval=6, checkpoint_interval=6,
                 sample_tokens=8, run_name="tiny", dtype="float32", device="cpu")
    return [f"--{name}={value}" for name, value in flags.items()]
