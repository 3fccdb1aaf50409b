"""The harness of the chaos tests: small runs as forked script processes, faults planted in them, results compared.

The processes are forked from a server that has imported PyTorch and the scripts already, so that hundreds of
them take minutes. They are real processes on real files. A fault sits where the standard library or PyTorch
is called: a signal at a file operation, a limit on the size of files, a hook of torch.
"""

import builtins
import dataclasses
import importlib
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_equal_state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from core.checkpoint import load_checkpoint, step_checkpoints, step_path
from lib.cli import run_script
from model import GPT

PROCESSES = multiprocessing.get_context("forkserver")
# The first optimizer of a process imports torch._dynamo, which takes a second.
PROCESSES.set_forkserver_preload(["chaos_harness", "torch._dynamo", "train_gpt2", "sample"])
LOCK = threading.Lock()  # multiprocessing's processes must not be polled by two threads at once
BAD_END = re.compile(r"Traceback|\.py\", line")

FLAGS = dict(dataset="tiny", n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=6,
             gradient_accumulation_steps=2, max_iters=12, warmup_iters=2, dropout=0.1, log_interval=1, eval_interval=5,
             checkpoint_interval=4, sample_tokens=0, eval_tokens=200, run_name="r", dtype="float32", device="cpu",
             learning_rate=1e-2)
WINDOWS, SEQUENCES = math.ceil((10_800 - 1) / 16), 12


class SmallRun:
    """A run of the same small training in its own directory."""

    def __init__(self, directory, data_dir, **flags):
        self.directory, self.run_dir, self.log = directory, directory / "checkpoints/r", directory / "log.txt"
        directory.mkdir(parents=True, exist_ok=True)
        self.argv = [f"--{name}={value}" for name, value in (FLAGS | dict(data_dir=data_dir) | flags).items()]

    def start(self, *more, fault=("none",), log=None, directory=None, env=None):
        return start("train_gpt2", [*self.argv, *more], directory or self.directory, log or self.log, fault, env)

    def start_ranks(self, n_processes, *more, only=None):
        """n_processes that train together, started as torchrun does, a log each; only: {rank: (flags, options)}.

        Options are those of `start`, and local_rank.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = dict(WORLD_SIZE=n_processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        processes = []
        for rank in range(n_processes):
            flags, options = (only or {}).get(rank, ((), {}))
            env = together | dict(RANK=rank, LOCAL_RANK=options.get("local_rank", rank))
            options = {name: value for name, value in options.items() if name != "local_rank"}
            processes.append(self.start(*more, *flags, log=self.log_of(rank), env=env, **options))
        return processes

    def log_of(self, rank):
        return self.directory / f"log{rank}.txt"

    def end(self, *more, fault=("none",)):
        """Run to its end; the exit code."""
        return wait(self.start(*more, fault=fault))

    def output(self):
        return read_log(self.log)

    def final(self):
        """The newest checkpoint's content and every logged scalar, [(tag, step, value)]."""
        content = load_checkpoint(step_checkpoints(self.run_dir)[-1])
        # TensorBoard reads event files in the order of their names: by second, then by process number, which wraps.
        files = sorted((self.directory / "runs/r").glob("events*"), key=lambda path: path.stat().st_mtime_ns)
        for n, path in enumerate(files):
            path.rename(path.with_name(f"events.out.tfevents.{n:010d}"))
        events = EventAccumulator(str(self.directory / "runs/r"), size_guidance={"scalars": 0})
        events.Reload()
        tags = ("train/loss", "train/lr", "train/grad_norm", "val/loss")
        return content, [(tag, event.step, event.value) for tag in tags for event in events.Scalars(tag)]

    def metrics(self):
        """[(step, tag, value)] of metrics.jsonl, without times, which never fall."""
        entries = [json.loads(line) for line in (self.directory / "runs/r/metrics.jsonl").read_text().splitlines()]
        for clock in ("seconds", "time"):
            assert [entry[clock] for entry in entries] == sorted(entry[clock] for entry in entries)
        return [(entry["step"], entry["tag"], entry["tag"].startswith("perf/") or entry["value"]) for entry in entries]

    def strays(self):
        return [path for path in self.directory.rglob("*") if path.suffix in (".tmp", ".part")]


def start(script, argv, directory, log, fault=("none",), env=None):
    """A process that runs `script.py argv` in `directory`, its output in the file `log`; fault: (name, *arguments)."""
    process = PROCESSES.Process(target=run_main, args=(script, argv, directory, log, fault, env or {}))
    with LOCK, pytest.MonkeyPatch.context() as patch:
        # What the server imports from: Python 3.11 does not hand it sys.path.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        process.start()
    return process


def exit_code(process):
    """The process's exit code, None while it runs."""
    with LOCK:
        return process.exitcode


def wait(process, seconds=100):
    """The exit code of a process that ends within `seconds`."""
    deadline = time.monotonic() + seconds
    while (code := exit_code(process)) is None:
        assert time.monotonic() < deadline, "hangs"
        time.sleep(0.005)
    return code


def send(process, signum):
    with LOCK:
        if process.exitcode is None:
            os.kill(process.pid, signum)


def read_log(path):
    """The output in the file `path`, "" where there is none yet; never a traceback."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    assert not BAD_END.search(text), text
    return text


def last_step(output):
    """The optimizer step of the last progress line, which counts within the epoch; 0 where there is none."""
    lines = re.findall(r"epoch (\d+)/\d+ \| step (\d+)/", output)
    return math.ceil((int(lines[-1][0]) - 1) * WINDOWS / SEQUENCES) + int(lines[-1][1]) if lines else 0


def assert_same(result, expected):
    """The same weights, moments and logged values bit for bit, each step logged once."""
    (content, logged), (wanted, wanted_log) = result, expected
    assert_equal_state(content, wanted)
    assert content["best_val_loss"] == wanted["best_val_loss"]
    assert logged == wanted_log


def in_parallel(function, items):
    """[function(item)] by two threads, which wait for processes."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, items))


# What runs in the forked processes.


def run_main(script, argv, directory, log, fault, env):
    """Become `script.py argv`: see `start`."""
    os.environ.update({name: str(value) for name, value in env.items()})
    os.chdir(directory)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.argv = [script, *argv]
    torch.set_num_threads(1)
    main = importlib.import_module(script).main
    name, *arguments = fault
    FAULTS[name](*arguments)
    run_script(main, outlives_output=script == "train_gpt2")


def before(module, name, action):
    """Let `action(*arguments)` precede every call of a function of the standard library."""
    function = getattr(module, name)

    def watched(*args, **kwargs):
        action(*args)
        return function(*args, **kwargs)

    setattr(module, name, watched)


def is_checkpoint(path, step):
    """Whether `path` is the checkpoint of `step`, or its temporary file."""
    return os.path.basename(str(path)).startswith(step_path(Path(), step).name)


class FileOperations:
    """Lists the file operations from the opening of the checkpoint of `step` to that of the next one.

    At operation `fatal` (1 is the first) the process gets SIGKILL. A fatal write is cut in the middle: its
    first half is on the disk. 0: only print them.
    """

    def __init__(self, step, fatal):
        self.fatal, self.saving, self.seen = fatal, False, []
        open_file = builtins.open

        def watched(path, mode="r", *args, **kwargs):
            if "w" not in mode:
                return open_file(path, mode, *args, **kwargs)
            self.watch(path, step)
            self.count("create")
            file = open_file(path, mode, *args, **kwargs)
            return WatchedFile(self, file) if self.saving else file

        builtins.open = watched
        for name in ("replace", "fsync", "open", "close", "unlink"):
            before(os, name, lambda *args, name=name: self.count(name))

    def watch(self, path, step):
        """A file is about to be made."""
        if self.saving and not is_checkpoint(path, step):
            print("operations:", *self.seen, flush=True)
        self.saving = is_checkpoint(path, step)

    def count(self, name):
        if self.saving:
            self.seen.append(name)
            if self.is_fatal():
                os.kill(os.getpid(), signal.SIGKILL)

    def is_fatal(self, ahead=0):
        return len(self.seen) + ahead == self.fatal


class WatchedFile:
    def __init__(self, operations, file):
        self.operations, self.file = operations, file

    def write(self, data):
        if self.operations.is_fatal(ahead=1):
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()
        self.operations.count("write")
        return self.file.write(data)

    def flush(self):
        self.operations.count("flush")
        self.file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.operations.count("close")
        self.file.close()


def fill_disk(step, size):
    """No file can grow over `size` bytes from the opening of the checkpoint of `step` to its renaming or removal."""
    def limit(path, soft):
        if is_checkpoint(path, step):
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))

    before(builtins, "open", lambda path, mode="r", *_: "w" in mode and limit(path, size))
    for name in ("replace", "unlink"):
        before(os, name, lambda path, *_: limit(path, resource.RLIM_INFINITY))


def poison(what, step, value):
    """A non-finite `value` in the loss, a gradient or a weight at `step`, counted from 1."""
    passes = itertools.count()

    def after_forward(module, inputs, output):
        is_training = isinstance(module, GPT) and module.training
        if not is_training or next(passes) // FLAGS["gradient_accumulation_steps"] + 1 != step:
            return output
        weight = module.get_parameter("transformer.h.0.mlp.c_fc.weight")
        if what == "gradient":
            weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1]), value))
        elif what == "weight":
            register_optimizer_step_post_hook(lambda *_: weight.data[0].fill_(value))
        return (output[0], output[1] * value) if what == "loss" else output

    register_module_forward_hook(after_forward)


def redirect_stdout(path):
    """stdout is the file `path`, closed if that is None; only stderr is still in the log."""
    if path is None:
        os.close(1)
        sys.stdout = None
    else:
        os.dup2(os.open(path, os.O_WRONLY), 1)
        sys.stdout = os.fdopen(1, "w", closefd=False)


def fail(step):
    """A bug: an exception in the first forward pass of `step`, counted from 1, of a process."""
    def before_forward(module, inputs):
        if isinstance(module, GPT) and module.training and next(passes) == step - 1:
            raise ZeroDivisionError("a bug")

    passes = itertools.count()
    register_module_forward_pre_hook(before_forward)


def pretend_cuda(has_card):
    """The first process finds a GPU, this one only if it `has_card`."""
    train_gpt2 = importlib.import_module("train_gpt2")
    check_run, choose_device = train_gpt2.check_run, train_gpt2.choose_device
    train_gpt2.check_run = lambda *args: dataclasses.replace(check_run(*args), device="cuda")
    train_gpt2.choose_device = lambda name: None if has_card else choose_device(name)


FAULTS = {"none": lambda: None, "kill_at_operation": FileOperations, "fill_disk": fill_disk, "poison": poison,
          "redirect_stdout": redirect_stdout, "fail": fail,
          "pretend_cuda": pretend_cuda, "sleep": time.sleep}
