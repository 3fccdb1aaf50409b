"""The processes that torchrun starts together: how they join, agree, sum gradients, and end."""

from __future__ import annotations  # annotations name torch.distributed, which some builds of torch lack

import io
import os
import pickle
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lib.cli import UserError

T = TypeVar("T")
# Those that wait do not know for what: a download, a slow disk. If another process dies, torchrun ends them.
TIMEOUT = timedelta(days=7)
JOIN_SECONDS, QUIET_SECONDS = 600, 3  # for the others to come; without a word
BUCKET_BYTES = 25 * 2**20
# Exact sums: steps to a unit. 63 bits hold sums below RANGE.
FIXED_POINT, RANGE = 2.0**44, 2.0**19


class SharedError(UserError):
    """A UserError that all processes raise at the same place, and one reports."""


@dataclass(frozen=True)
class Processes:
    """This process among all of a run. They call a method together; a single process asks nobody."""

    rank: int = 0
    size: int = 1
    launch: str | None = None  # names the launch by torchrun; the same after a restart

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints, reads and writes."""
        return self.rank == 0

    def max(self, value: int) -> int:
        """The largest `value` of all processes."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def sum(self, tensor: Tensor, wait: bool = True) -> dist.Work | None:
        """Replace `tensor` by its sum over all processes: now, or when the result's `wait` returns."""
        return dist.all_reduce(tensor, async_op=not wait) if self.size > 1 else None

    def share(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Give all processes each tensor as the process `owner` has it."""
        if self.size > 1:
            for exchange in [dist.broadcast(tensor.detach(), owner, async_op=True)
                             for tensor, owner in zip(tensors, owners)]:
                exchange.wait()

    def lead(self, action: Callable[[], T]) -> T:
        """What `action` returns, with all tensors, in the first process, which alone calls it; or its UserError."""
        if self.size == 1:
            return action()
        value, pickled, problems, tensors = None, b"", (), []
        if self.is_first:
            try:
                value = action()
                pickled = pickle_without_tensors(value, tensors)
            except UserError as error:
                problems = error.problems
        message = [pickled, problems]
        dist.broadcast_object_list(message, device=torch.device("cpu"))
        pickled, problems = message
        if problems:
            raise SharedError(*problems)
        if not self.is_first:
            value = unpickle_with_tensors(pickled, tensors)
        for tensor in tensors:
            dist.broadcast(tensor, 0)
        return value

    def each(self, action: Callable[[], T]) -> T:
        """What `action` returns here; the first process is done before the others begin. UserErrors are shared."""
        if self.size == 1:
            return action()
        values, problems = [], [()] * self.size

        def act() -> None:
            values.append(action())

        self.lead(act)
        if not self.is_first:
            try:
                act()
            except UserError as error:
                problems[self.rank] = error.problems
        dist.all_gather_object(problems, problems[self.rank])
        if any(problems):
            raise SharedError(*(f"process {rank}: {problem}" for rank, of in enumerate(problems) for problem in of))
        return values[0]

    def same(self, value: object, problem: str) -> None:
        """Raise SharedError with `problem` unless all processes have an equal `value`."""
        first = self.lead(lambda: value)

        def compare() -> None:
            if value != first:
                raise UserError(problem)

        self.each(compare)


ALONE = Processes()


def pickle_without_tensors(value: object, tensors: list[Tensor]) -> bytes:
    """`value` with its tensors' shapes, dtypes and devices in their place; the tensors are appended to `tensors`."""
    class Pickler(pickle.Pickler):
        def persistent_id(self, item: object) -> tuple | None:
            if not isinstance(item, Tensor):
                return None
            tensors.append(item.detach().contiguous())
            return item.shape, item.dtype, item.device.type

    file = io.BytesIO()
    Pickler(file).dump(value)
    return file.getvalue()


def unpickle_with_tensors(data: bytes, tensors: list[Tensor]) -> object:
    """The value that pickle_without_tensors has pickled, with empty tensors, which are appended to `tensors`."""
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, item: tuple) -> Tensor:
            shape, dtype, device = item
            tensors.append(torch.empty(shape, dtype=dtype, device=device))
            return tensors[-1]

    return Unpickler(io.BytesIO(data)).load()


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that torchrun has started. All but the first are silent unless they fail.

    A SharedError is reported by the first process and ends all with code 2, none before it is reported. A process
    that loses contact with the others ends with code 1; the message of the one that failed says why.
    """
    size = world_size()
    if size == 1:
        store = open_store() if "TORCHELASTIC_RUN_ID" in os.environ else None
        yield Processes(launch=store and launch_of(store))
        return
    rank = int(os.environ["RANK"])
    try:
        store = open_store()
        processes = Processes(rank, size, launch_of(store))
        # After a restart the store still has the addresses of the processes before (pytorch/pytorch#167288).
        store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        await_all(store, size)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        with silenced(not processes.is_first):
            yield processes
        sys.stdout.flush()
        leave(processes)
    except SharedError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        leave(processes)
        sys.exit(2)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
            raise
        print(f"process {rank} ends: it has lost contact with another one, whose own message, or torchrun's table, "
              f"says why", file=sys.stderr, flush=True)
        os._exit(1)  # the threads that wait for the others cannot be ended


def open_store() -> dist.Store:
    """The key-value store of this launch: torchrun's own, which outlives its processes, or the first process's."""
    is_server = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=is_server,
                         wait_for_workers=False)


def launch_of(store: dist.Store) -> str:
    """What names this launch, also after torchrun has restarted its processes."""
    return store.compare_set("launch", "", uuid.uuid4().hex).decode()


def await_all(store: dist.Store, size: int) -> None:
    """Wait until `size` processes have come; Ctrl-C works meanwhile. UserError after JOIN_SECONDS."""
    if store.add("came", 1) == size:
        store.set("all", "")
    start, told = time.monotonic(), False
    while not store.check(["all"]):
        if not told and time.monotonic() - start > QUIET_SECONDS:
            print("waiting for the other processes", file=sys.stderr, flush=True)
            told = True
        if time.monotonic() - start > JOIN_SECONDS:
            raise UserError(f"only {store.add('came', 0)} of {size} processes joined within {JOIN_SECONDS} s: start "
                            f"torchrun on all machines, with the same address and port")
        time.sleep(0.02)


def leave(processes: Processes) -> None:
    """End together: none before the first process has said how."""
    processes.max(0)
    dist.destroy_process_group()


@contextmanager
def silenced(silent: bool) -> Iterator[None]:
    """Discard what Python code prints, if `silent`, until it raises."""
    if not silent:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def world_size() -> int:
    """Number of processes that torchrun has started; 1 without it. UserError for an environment that is not whole."""
    text = os.environ.get("WORLD_SIZE", "1")
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if text != "1" else ()
    if missing := [name for name in needed if name not in os.environ]:
        raise UserError(f"WORLD_SIZE={text} is set, but not {', '.join(missing)}: start with torchrun, or unset it")
    if not text.isdecimal() or not int(os.environ.get("RANK", 0)) < int(text):
        raise UserError(f"WORLD_SIZE={text} and RANK={os.environ.get('RANK')} do not fit: start with torchrun, or "
                        f"unset them")
    return int(text)


def launcher(processes: Processes) -> str:
    """The command that starts a script as these processes."""
    if processes.size == 1:
        return "python"
    on_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(processes.size)
    return f"torchrun --standalone --nproc_per_node={processes.size}" if on_one_machine else "torchrun [as before]"


def local_rank() -> int:
    """Number of this process among those on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


class Bucket:
    """Parameters whose gradients lie side by side in `flat`, to be exchanged as a whole; its last element is free."""

    def __init__(self, parameters: Sequence[Tensor], exact: bool) -> None:
        self.parameters = parameters
        self.flat = parameters[0].new_zeros(sum(p.numel() for p in parameters) + 1)
        parts = self.flat[:-1].split([p.numel() for p in parameters])
        self.gradients = [part.view(p.shape) for part, p in zip(parts, parameters)]
        # Sums in fixed point, and last how many values did not fit.
        self.fixed = torch.zeros(len(self.flat) + 1, dtype=torch.int64, device=self.flat.device) if exact else None
        self.n_missing = 0
        self.exchange: dist.Work | None = None

    def start(self) -> None:
        """Begin a sum: gradients accumulate in `flat`."""
        self.flat.zero_()
        for p, gradient in zip(self.parameters, self.gradients):
            p.grad = gradient
        if self.fixed is not None:
            self.fixed.zero_()

    def take(self, scale: Tensor, limit: float) -> None:
        """Add `flat`, divided by `scale`, to the fixed-point sum, and clear it. Values beyond `limit` do not fit."""
        values = self.flat * (FIXED_POINT / scale)
        fits = values.abs() < limit * FIXED_POINT  # not of NaN
        self.fixed[:-1] += values.where(fits, 0).round().long()
        self.fixed[-1] += (~fits).sum()
        self.flat.zero_()

    def give(self, scale: Tensor) -> None:
        """Turn the fixed-point sum back; NaN if a value did not fit."""
        self.flat.copy_(self.fixed[:-1]).mul_(scale / FIXED_POINT)
        self.flat.masked_fill_(self.fixed[-1] > 0, torch.nan)


class GradientSum:
    """The sum of gradients and losses over a step's micro-batches, wherever they are computed.

    Buckets of gradients are exchanged as soon as the last backward pass has completed them, while it continues.

    `exact`: each micro-batch's gradients and loss are rounded to multiples of 1 / FIXED_POINT and summed as integers,
    whose order does not matter: the bits of the sum do not depend on the number of processes. With n micro-batches
    a value of RANGE / n or more does not fit, nor does NaN; it makes sums NaN. Takes 8 bytes more per parameter.
    """

    def __init__(self, parameters: Sequence[Tensor], processes: Processes, exact: bool, n_micro_batches: int) -> None:
        self.processes, self.exact, self.limit = processes, exact, RANGE / n_micro_batches
        self.buckets, bucket, size = [], [], 0
        for p in reversed(parameters):  # the backward pass completes the last ones first
            bucket.append(p)
            size += p.numel() * p.element_size()
            if size >= BUCKET_BYTES or p is parameters[0]:
                self.buckets.append(Bucket(bucket, exact))
                bucket, size = [], 0
        for bucket in self.buckets:
            for p in bucket.parameters:
                p.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._completed(bucket))
        self.loss = self.buckets[-1].flat[-1]
        self.n_taken = len(self.buckets)  # of this backward pass

    def start(self, scale: Tensor) -> None:
        """Begin a step, whose losses are multiplied by `scale`, a power of two."""
        self.scale = scale
        for bucket in self.buckets:
            bucket.start()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add a micro-batch's loss, a scalar, and its gradients; after the last one exchange the sums."""
        self.is_last, self.n_taken = is_last, 0
        for bucket in self.buckets:
            bucket.n_missing = len(bucket.parameters)
        self.loss += loss.detach()  # goes with the last bucket
        loss.backward()
        while self.n_taken < len(self.buckets):  # has parameters that the loss does not depend on
            self._take_next()

    def _completed(self, bucket: Bucket) -> None:
        bucket.n_missing -= 1
        # In the same order everywhere.
        while self.n_taken < len(self.buckets) and not self.buckets[self.n_taken].n_missing:
            self._take_next()

    def _take_next(self) -> None:
        bucket = self.buckets[self.n_taken]
        self.n_taken += 1
        if self.exact:
            bucket.take(self.scale, self.limit)
        if self.is_last:
            bucket.exchange = self.processes.sum(bucket.fixed if self.exact else bucket.flat, wait=False)

    def finish(self) -> Tensor:
        """Wait for the sums: the gradients are in place; return the loss, a scalar."""
        for bucket in self.buckets:
            if bucket.exchange:
                bucket.exchange.wait()
                bucket.exchange = None
            if self.exact:
                bucket.give(self.scale)
        return self.loss / self.scale
