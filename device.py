"""Which device and number format to compute with, and how fast the device could be."""

import contextlib
import functools
import os
import re
import sys

import torch

from errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Dense bf16 (V100, T4: fp16) peak in FLOP/s by the makers' data sheets; the first whole name in the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
              "A10": 125e12, "A6000": 155e12, "V100": 125e12, "T4": 65e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
# What an error says that is not torch.OutOfMemoryError: CUDA and MPS; a CPU; cuBLAS and cuDNN.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "_STATUS_ALLOC_FAILED")


def choose_device(name):
    """The torch.device for "auto", "cpu", "cuda", "cuda:N" or "mps", which becomes the current one.

    UserError if this machine has none such, or a card that the installed torch is not built for.
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
        raise UserError(f"device {name} is not on this machine (it has {n_devices[device.type]} of the kind); "
                        f"use --device=auto")
    if device.type == "cuda":
        check_card(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as `reproducible` needs
    if device.index:
        torch.cuda.set_device(device)  # streams, events and graphs belong to the current one
    return device


@functools.cache
def warn_of_unused_cuda():
    """Say on stderr, once, if there is a driver and a torch for CUDA and they do not work together."""
    if torch.version.cuda is None or torch.cuda.is_available():
        return
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        if not re.search("no NVIDIA driver|No CUDA GPUs", str(error)):
            print(f"warning: no CUDA: {str(error).splitlines()[0]}", file=sys.stderr)


def check_card(device):
    """UserError if the installed torch has no kernels for the card `device`."""
    major, minor = torch.cuda.get_device_capability(device)
    built_for = torch.cuda.get_arch_list()
    if not any(runs_on(arch, major, minor) for arch in built_for):
        raise UserError(f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and torch "
                        f"{torch.__version__} is built for {' '.join(built_for)}: install a build that has sm_{major}"
                        f"{minor} (for an old card one of an older CUDA, for a new card a newer torch: "
                        f"https://pytorch.org/get-started/locally), or use --device=cpu")


def runs_on(arch, major, minor):
    """Whether code for `arch` runs on compute capability (major, minor).

    Machine code, "sm_86", runs on its own major version from its minor one up, "sm_90a" on its own alone; PTX,
    "compute_90", on all that are no older. What is none of these (AMD's) is not judged.
    """
    parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", arch)
    if not parts:
        return True
    kind, wanted, special = parts[1], (int(parts[2]), int(parts[3])), parts[4]
    if special:
        return wanted == (major, minor)
    return wanted <= (major, minor) and (kind == "compute" or wanted[0] == major)


def choose_dtype(name, device):
    """The torch.dtype for "auto" or a name. Auto: bfloat16 where the device multiplies it fast, float16 on
    older CUDA, else float32. UserError for float16 off CUDA (the gradient scaler needs it)."""
    if name == "float16" and device.type != "cuda":
        raise UserError(f"dtype=float16 needs a CUDA device, not {device.type}; use bfloat16, float32 or auto")
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16
    if device.type == "cpu" and cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


def cpu_has_bfloat16():
    """Whether the processor has bf16 dot products (AVX512_BF16 or AMX), not only conversions."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(device, dtype):
    """Context manager for the forward pass: `dtype` where it is safe, float32 elsewhere."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def use_tf32(device, dtype):
    """Where float32 is asked for on CUDA, let products have TF32's 10 bits, for speed; whether they have."""
    if device.type != "cuda" or dtype != torch.float32 or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    torch.set_float32_matmul_precision("high")
    return True


@contextlib.contextmanager
def reproducible(device):
    """While entered, what is computed on CUDA has the same bits each time: a resumed run equals an uninterrupted one.

    Else the backward passes of attention and, compiled, of the embedding add in the order in which threads come.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # which takes time, and helps to find mistakes only
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def default_generator(device):
    """The generator that dropout on `device` draws from (torch.manual_seed would seed every device's, slowly)."""
    if device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.mps._get_default_mps_generator() if device.type == "mps" else torch.default_generator


@contextlib.contextmanager
def out_of_memory_as(message):
    """Where the device or the machine has no memory left: a UserError with `message`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(message) from None


def is_out_of_memory(error):
    """Whether an exception says that the device or the machine has no memory left (a compiler wraps it in its own)."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY))


def device_name(device):
    """The device's name in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return {"cpu": f"CPU, {torch.get_num_threads()} threads", "mps": "Apple GPU"}[device.type]


def peak_flops(device):
    """Peak FLOP/s of the device, or None when it is not known (as of the slower kin of a known card)."""
    name = device_name(device) if device.type == "cuda" else ""
    if re.search(r"\b(NVL|MIG|Laptop|D)\b", name):
        return None
    return next((peak for known, peak in PEAK_FLOPS.items() if re.search(rf"\b{known}\b", name)), None)
