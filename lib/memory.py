"""Memory of a computation: counted without allocating any, measured, and given back."""

import ctypes
import platform
import sys
import weakref
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

try:
    import resource
except ImportError:  # Windows
    resource = None

LARGE = 2**25  # blocks of this size take one another's places on the heap
HOLES = 1 / 2  # short-lived smaller ones leave holes: measured, 2 to 124M parameters
CUDA_BLOCK = 512  # torch rounds up to it


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made in its context on a device of type `kind`; under a FakeTensorMode none are.

    `now`: of all that live; `highest`: including allocator overhead, at the peak. A value read from a fake
    tensor, which has none, is 1, or False.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.now = self.since_mark = 0  # since_mark: the highest since `mark`
        self.held = self.highest = 0.0
        self.storages: set[int] = set()

    def mark(self) -> int:
        """The bytes now; since_mark counts from here."""
        self.since_mark = self.now
        return self.now

    def __torch_dispatch__(self, func: torch._ops.OpOverload, types: object, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype != torch.bool and 1
        if func is torch.ops.aten._pin_memory.default:  # there are no fake pinned tensors
            return args[0]
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.device.type == self.kind:
                self.count(value.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages or not size:
            return
        if self.kind == "cuda":
            size = -(-size // CUDA_BLOCK) * CUDA_BLOCK
        self.storages.add(key)
        self.now += size
        self.held += size + self.holes(size)
        self.highest, self.since_mark = max(self.highest, self.held), max(self.since_mark, self.now)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.now -= size
        self.held -= size + self.holes(size)

    def holes(self, size: int) -> float:
        """What the allocator needs on top for a short-lived block of `size` bytes."""
        return HOLES * size if self.kind == "cpu" and size < LARGE else 0


def release_freed() -> None:
    """Give the system back what is free on the heap, where lib/kernels.py lets glibc keep it."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(device: torch.device) -> int | None:
    """Bytes, at their peak so far: of CUDA memory that torch has allocated, on a CPU resident; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss may be that of the process which started this one
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)
