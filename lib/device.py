"""Devices and dtypes: which to use, their peak speed, and timing on them."""

import contextlib
import functools
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from lib.cli import UserError, first_line, plural, warn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Dense bf16 (V100, T4: fp16) peak in FLOP/s from the vendors' data sheets, by whole words of the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
              "A10": 125e12, "A6000": 155e12, "V100": 125e12, "T4": 65e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
# In errors other than torch.OutOfMemoryError: CUDA and MPS; the CPU; cuBLAS and cuDNN.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "_STATUS_ALLOC_FAILED")

Mark = float | torch.cuda.Event


def choose_device(name: str) -> torch.device:
    """The device for "auto", "cpu", "cuda", "cuda:N" or "mps", which becomes the current one.

    UserError if this machine does not have it, or the installed torch has no kernels for it.
    """
    if name == "auto":
        warn_of_unused_cuda()
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device must be auto, cpu, cuda, cuda:N or mps, not {name!r}")
    n_devices = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= n_devices[device.type]:
        raise UserError(f"device {name} is not on this machine ({device.type} devices: {n_devices[device.type]}): "
                        f"use --device=auto")
    if device.type == "cuda":
        check_card(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `reproducible`
    if device.index:
        torch.cuda.set_device(device)  # streams, events and graphs belong to the current one
    return device


@functools.cache
def warn_of_unused_cuda() -> None:
    """Warn, once, if torch is a CUDA build and cannot use the driver it finds."""
    if torch.version.cuda is None or torch.cuda.is_available():
        return
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        if not re.search("no NVIDIA driver|No CUDA GPUs", str(error)):
            warn(f"CUDA is not used: {first_line(error)}")


def check_card(device: torch.device) -> None:
    """UserError if the installed torch has no kernels for the card `device`."""
    major, minor = torch.cuda.get_device_capability(device)
    built_for = torch.cuda.get_arch_list()
    if not any(runs_on(arch, major, minor) for arch in built_for):
        raise UserError(f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, but torch "
                        f"{torch.__version__} is built for {' '.join(built_for)}: install a build with sm_{major}"
                        f"{minor} (for an old card one for an older CUDA, for a new card a newer torch: "
                        f"https://pytorch.org/get-started/locally), or use --device=cpu")


def runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether code built for `arch` runs on compute capability (major, minor).

    Machine code ("sm_86") runs on its own major version from its minor one up, "sm_90a" on exactly its
    own; PTX ("compute_90") on all newer ones. Anything else (AMD's) is taken to run.
    """
    parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", arch)
    if not parts:
        return True
    kind, built_for, exact = parts[1], (int(parts[2]), int(parts[3])), parts[4]
    if exact:
        return built_for == (major, minor)
    return built_for <= (major, minor) and (kind == "compute" or built_for[0] == major)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype for "auto" or a name. UserError for float16 off CUDA, which the gradient scaler needs.

    Auto: bfloat16 where the device is fast at it, float16 on older CUDA cards, else float32.
    """
    if name == "float16" and device.type != "cuda":
        raise UserError(f"dtype=float16 needs a CUDA device, not {device.type}: use bfloat16, float32 or auto")
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16
    if device.type == "cpu" and cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether the processor has bf16 dot products (AVX512_BF16 or AMX), not only conversions."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Context manager for the forward pass: `dtype` where it is safe, float32 elsewhere."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def use_tf32(device: torch.device, dtype: torch.dtype) -> bool:
    """Let float32 products on CUDA have TF32's 10 bits, for speed; whether this dtype and device have them."""
    if device.type != "cuda" or dtype != torch.float32 or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    torch.set_float32_matmul_precision("high")
    return True


@contextlib.contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """While entered, CUDA computes the same bits each time, so that a resumed run equals an uninterrupted one.

    Otherwise the backward passes of attention and, compiled, of the embedding add in the order of the threads.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that takes time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that dropout on `device` draws from (torch.manual_seed would seed every device's, slowly)."""
    if device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.mps._get_default_mps_generator() if device.type == "mps" else torch.default_generator


@contextlib.contextmanager
def out_of_memory_as(message: str) -> Iterator[None]:
    """Turn running out of memory, the device's or the machine's, into a UserError with `message`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(message) from None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that the device or the machine is out of memory (compilers wrap it in their own)."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY))


def device_name(device: torch.device) -> str:
    """The device's name, for display."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return {"cpu": f"CPU, {plural(torch.get_num_threads(), 'thread')}", "mps": "Apple GPU"}[device.type]


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of the device; None if unknown, as for the slower variants of a known card."""
    name = device_name(device) if device.type == "cuda" else ""
    if re.search(r"\b(NVL|MIG|Laptop|D)\b", name):
        return None
    return next((peak for known, peak in PEAK_FLOPS.items() if re.search(rf"\b{known}\b", name)), None)


def total_memory(device: torch.device) -> int | None:
    """Bytes of memory of `device`, on a CPU what the machine or its container has; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    sizes = []
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(ValueError, OSError):  # "max", or no such file
            sizes.append(int(Path(limit).read_text()))
    return min(sizes, default=None)


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`x` on `device`; to CUDA it is copied from pinned memory, without waiting (elsewhere that would be unsafe)."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished its work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def mark(device: torch.device) -> Mark:
    """A point in time on `device`: a CUDA event, elsewhere the clock's seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Mark, end: Mark) -> float:
    """Seconds between two marks (waits for the device)."""
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000
