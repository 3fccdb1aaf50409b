"""Small runs under torchrun. As a script it trains with the fault that the environment variable FAULT names."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from chaos_harness import FAULTS, SmallRun
from helpers import ONE_THREAD, ROOT


class LaunchedRun(SmallRun):
    """A small run by torchrun. Its sums are exact, so that its result is that of any other number of processes."""

    def __init__(self, directory, data_dir, **flags):
        flags = dict(exact_sum=True, gradient_accumulation_steps=4, batch_size=3) | flags
        super().__init__(directory, data_dir, **flags)

    def launch(self, n_processes, *more, fault=None, options=()):
        """torchrun, started; fault: (rank, name, *arguments)."""
        env = ONE_THREAD | {"FAULT": json.dumps(fault), "PYTHONPATH": str(ROOT)}
        with open(self.log, "a") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}",
                 *options, __file__, *self.argv, *more],
                cwd=self.directory, env=env, stdout=output, stderr=output)

    def text(self):
        """All output, torchrun's own tracebacks too."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def await_step(self, launcher, step):
        while not (self.run_dir / f"step_{step:08d}.pt").exists():
            assert launcher.poll() is None, self.text()
            time.sleep(0.005)


def ranks_of(launcher):
    """{rank: process number} of what torchrun has started."""
    found = {}
    for children in Path(f"/proc/{launcher.pid}/task").glob("*/children"):
        for pid in children.read_text().split():
            for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if word.startswith(b"RANK="):
                    found[int(word[5:])] = int(pid)
    return found


def end_of(launcher, ranks, seconds=30):
    """The exit code of torchrun, which ends within `seconds` and leaves no process of `ranks`."""
    deadline = time.monotonic() + seconds
    code = launcher.wait(timeout=seconds)
    while any(Path(f"/proc/{pid}").exists() for pid in ranks.values()):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.01)
    return code


if __name__ == "__main__":
    from lib.cli import run_script
    from train_gpt2 import main

    rank, name, *arguments = json.loads(os.environ["FAULT"]) or (0, "none")
    if int(os.environ["RANK"]) == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        FAULTS[name](*arguments)
    run_script(main, outlives_output=True)
