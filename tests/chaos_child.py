"""What a process of the chaos suite runs: a script's main, with a fault planted in it.

The processes are forked from a server that has imported PyTorch already, so that hundreds of them
take minutes. They are real processes on real files; the faults are real signals and limits.
"""

import builtins
import os
import resource
import signal
import sys
from pathlib import Path

import torch
import torch._dynamo  # which the first optimizer of a process imports, for a second

import checkpoint
import sample
import train_gpt2
from errors import run_script


def run_training(argv, folder, log, fault):
    """Train as `train_gpt2.py argv` in `folder`, stdout and stderr in the file `log`; `fault`: (name, *arguments)."""
    name, *arguments = fault
    FAULTS[name](*arguments)
    run(train_gpt2.main, argv, folder, log)


def run_sampling(argv, folder, log):
    """Run `sample.py argv` in `folder`, stdout and stderr in the file `log`."""
    run(sample.main, argv, folder, log)


def run(main, argv, folder, log):
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = ["script", *argv]
    torch.set_num_threads(1)
    run_script(main)


def on_save_of(step, before, after=lambda: None):
    """Call `before` and `after` around the write and the pruning of the checkpoint of `step`."""
    save, prune = train_gpt2.save_checkpoint, train_gpt2.prune_checkpoints
    saving = []

    def watched_save(path, content):
        saving[:] = [Path(path).name == f"step_{step:08d}.pt"]
        if saving[0]:
            before()
        try:
            save(path, content)
        except OSError:
            after()
            raise

    def watched_prune(*args):
        prune(*args)
        if saving[0]:
            after()

    train_gpt2.save_checkpoint, train_gpt2.prune_checkpoints = watched_save, watched_prune


class FileOperations:
    """Counts the file operations of a save and, at operation `fatal`, kills the process with SIGKILL.

    A fatal write is cut in the middle: its first half is on the disk.
    """

    def __init__(self, fatal):
        self.fatal, self.count = fatal, 0

    def watch(self):
        """From now on, every file operation of checkpoint.py is counted."""
        checkpoint.open = lambda *args: WatchedFile(self, builtins.open(*args))
        checkpoint.os = WatchedModule(self, os, ("replace", "fsync", "open", "close"))
        unlink = Path.unlink
        Path.unlink = lambda *args, **kwargs: self.step() or unlink(*args, **kwargs)

    def step(self):
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


class WatchedModule:
    def __init__(self, operations, module, names):
        self.operations, self.module, self.names = operations, module, names

    def __getattr__(self, name):
        function = getattr(self.module, name)
        if name not in self.names:
            return function
        return lambda *args: self.operations.step() or function(*args)


class WatchedFile:
    def __init__(self, operations, file):
        operations.step()
        self.operations, self.file = operations, file

    def write(self, data):
        if self.operations.count + 1 == self.operations.fatal:
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()
        self.operations.step()
        return self.file.write(data)

    def flush(self):
        self.operations.step()
        self.file.flush()

    def fileno(self):
        return self.file.fileno()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.operations.step()
        self.file.close()


def kill_at_operation(step, fatal):
    """SIGKILL at the `fatal`-th file operation of the save at `step`; 0: only print how many there are."""
    operations = FileOperations(fatal)
    on_save_of(step, operations.watch, lambda: print(f"operations: {operations.count}", flush=True))


def fill_disk(step, size):
    """No file can grow over `size` bytes during the save at `step`."""
    def limit(soft):
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))

    on_save_of(step, lambda: limit(size), lambda: limit(resource.RLIM_INFINITY))


def poison(what, step, value):
    """A non-finite `value` in the loss, a gradient or a weight at `step`, counted from 1."""
    optimizer_step = train_gpt2.Trainer.optimizer_step

    def poisoned(self, x, y):
        if self.progress.step + 1 == step:
            weight = self.model.transformer.h[0].mlp.c_fc.weight
            if what == "gradient":
                weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1]), value))
            elif what == "loss":
                forward = self.forward
                self.forward = lambda *args: (None, forward(*args)[1] * value)
            else:
                update = self.optimizer.step
                self.optimizer.step = lambda: update() or weight.data[0].fill_(value)
        optimizer_step(self, x, y)

    train_gpt2.Trainer.optimizer_step = poisoned


FAULTS = {"none": lambda: None, "kill_at_operation": kill_at_operation, "fill_disk": fill_disk, "poison": poison}
