import time

import pytest
import torch
from helpers import CPU

from lib import device
from lib.cli import UserError, plural
from lib.device import (
    DTYPES,
    PEAK_FLOPS,
    autocast,
    check_card,
    choose_device,
    choose_dtype,
    default_generator,
    device_name,
    dtype_name,
    is_out_of_memory,
    mark,
    out_of_memory_as,
    peak_flops,
    reproducible,
    runs_on,
    seconds_between,
    use_tf32,
    warn_of_unused_cuda,
)


@pytest.mark.parametrize("error, is_one", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), True),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, max allowed: 9.07 GB)."), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
    (MemoryError(), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x5 and 6x7)"), False),
    (RuntimeError("out of resource: shared memory, Required: 327680, Hardware limit: 232448"), False),
    (ValueError("out of memory"), False),
])
def test_out_of_memory_is_recognised_in_all_its_forms(error, is_one):
    assert is_out_of_memory(error) == is_one
    with pytest.raises(UserError if is_one else type(error)), out_of_memory_as("lower batch_size"):
        raise error


# Which device

def pretend_cards(monkeypatch, capability, built_for=("sm_80",), n=1, name="Some Card"):
    """Make torch report `n` CUDA cards."""
    values = dict(get_device_capability=capability, get_device_name=name, device_count=n, is_available=n > 0)
    for function, value in values.items():
        monkeypatch.setattr(torch.cuda, function, lambda *args, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built_for))


WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize("capability, built_for, fits", [
    ((7, 0), WHEEL, False), ((7, 5), WHEEL, True), ((8, 9), WHEEL, True), ((9, 0), WHEEL, True),
    ((10, 3), WHEEL, True), ((11, 0), WHEEL, False), ((12, 1), WHEEL, True), ((13, 0), WHEEL, True),
    ((9, 1), ["sm_90a"], False), ((9, 0), ["gfx90a"], True), ((6, 1), ["sm_75", "compute_75"], False),
])
def test_a_card_that_torch_is_not_built_for_is_refused(monkeypatch, capability, built_for, fits):
    pretend_cards(monkeypatch, capability, built_for)
    if fits:
        assert check_card(torch.device("cuda")) is None and choose_device("cuda") == torch.device("cuda")
        return
    with pytest.raises(UserError) as refused:
        choose_device("cuda")
    words = str(refused.value)
    number = "{}.{}".format(*capability)
    assert f"Some Card has compute capability {number}" in words and f"sm_{number.replace('.', '')}" in words
    assert "--device=cpu" in words and "\n" not in words


def test_code_for_one_card_runs_on_its_family():
    assert [runs_on("sm_86", 8, minor) for minor in (0, 6, 9)] == [False, True, True]


@pytest.mark.parametrize("reason, warning", [
    ("The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver\nby", True),
    ("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU", False),
    ("No CUDA GPUs are available", False),
])
def test_a_driver_that_is_too_old_is_reported_once(monkeypatch, capsys, reason, warning):
    def init():
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    warn_of_unused_cuda.cache_clear()
    assert choose_device("auto").type in ("cpu", "mps") and choose_device("auto").type in ("cpu", "mps")
    warn_of_unused_cuda.cache_clear()
    expected = ("warning: CUDA is not used: The NVIDIA driver on your system is too old (found version 11040). "
                "Please update your GPU driver\n")
    assert capsys.readouterr().err == (expected if warning else "")


def test_auto_picks_the_fastest_device(monkeypatch):
    pretend_cards(monkeypatch, (8, 0))
    assert choose_device("auto") == torch.device("cuda")
    pretend_cards(monkeypatch, (8, 0), n=0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("mps") == choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == CPU == choose_device("cpu")


@pytest.mark.parametrize("name, words", [
    ("tpu", "device must be auto, cpu, cuda, cuda:N or mps, not 'tpu'"), ("", "not ''"), ("cuda:x", "not 'cuda:x'"),
    ("meta", "not 'meta'"), ("cuda:2", "device cuda:2 is not on this machine (cuda devices: 2)"),
    ("mps", "(mps devices: 0): use --device=auto"), ("cpu:1", "(cpu devices: 1)"),
])
def test_missing_devices_are_refused(monkeypatch, name, words):
    pretend_cards(monkeypatch, (8, 0), n=2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError) as refused:
        choose_device(name)
    assert words in str(refused.value)


def test_a_numbered_card_becomes_the_current_one(monkeypatch):
    current = []
    pretend_cards(monkeypatch, (8, 0), n=2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert choose_device("cuda:1") == torch.device("cuda:1") and current == [torch.device("cuda:1")]
    assert choose_device("cuda:0") == torch.device("cuda:0") and len(current) == 1


# Which number format

@pytest.mark.parametrize("name, kind, capability, has_bfloat16, expected", [
    ("auto", "cuda", (7, 5), False, torch.float16), ("auto", "cuda", (8, 0), False, torch.bfloat16),
    ("auto", "cpu", None, True, torch.bfloat16), ("auto", "cpu", None, False, torch.float32),
    ("auto", "mps", None, True, torch.float32), ("float32", "cuda", (9, 0), True, torch.float32),
    ("bfloat16", "cpu", None, False, torch.bfloat16), ("float16", "cuda", (9, 0), True, torch.float16),
])
def test_number_formats(monkeypatch, name, kind, capability, has_bfloat16, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: capability)
    monkeypatch.setattr(device, "cpu_has_bfloat16", lambda: has_bfloat16)
    assert choose_dtype(name, torch.device(kind)) == expected


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_float16_is_for_cuda(kind):
    with pytest.raises(UserError, match=f"dtype=float16 needs a CUDA device, not {kind}: use bfloat16"):
        choose_dtype("float16", torch.device(kind))


@pytest.mark.parametrize("capabilities, expected", [
    (dict(avx512_bf16=True), True), (dict(amx_bf16=True), True), (dict(avx512_bf16=False, avx512_f=True), False),
    ({}, False),
])
def test_bfloat16_needs_more_than_conversions(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert device.cpu_has_bfloat16() is expected


def test_dtypes_have_their_names():
    assert {dtype_name(dtype): dtype for dtype in DTYPES.values()} == DTYPES


def test_autocast_computes_products_in_the_dtype():
    x = torch.ones(2, 2)
    for dtype in (torch.float32, torch.bfloat16):
        with autocast(CPU, dtype):
            assert (x @ x).dtype == dtype


def test_dropout_draws_from_the_default_generator():
    draws = []
    for _ in range(2):
        default_generator(CPU).manual_seed(5)
        draws.append(torch.nn.functional.dropout(torch.ones(1000), 0.5))
    assert torch.equal(*draws)


# How fast

@pytest.mark.parametrize("name, expected", [
    ("NVIDIA H200", "H200"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H100 80GB HBM3", "H100"),
    ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA L4", "L4"), ("NVIDIA L40S", "L40S"), ("NVIDIA L40", None),
    ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA GeForce RTX 4090 D", None), ("Tesla T4", "T4"),
    ("NVIDIA GeForce RTX 3090 Ti", "RTX 3090"), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA H100 NVL", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA A1000", None), ("", None),
])
def test_peaks_match_whole_names_of_full_cards(monkeypatch, name, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: name)
    assert peak_flops(torch.device("cuda")) == (PEAK_FLOPS[expected] if expected else None)


def test_the_cpu():
    assert device_name(CPU) == f"CPU, {plural(torch.get_num_threads(), 'thread')}" and peak_flops(CPU) is None
    start = mark(CPU)
    time.sleep(0.02)
    assert 0.02 <= seconds_between(start, mark(CPU)) < 5
    assert seconds_between(start, start) == 0


def test_only_cuda_is_asked_for_the_same_bits_each_time():
    def asked():
        return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory

    with reproducible(CPU):
        assert asked() == (False, True)
    with pytest.raises(KeyError), reproducible(torch.device("cuda")):
        assert asked() == (True, False) and not torch.is_deterministic_algorithms_warn_only_enabled()
        raise KeyError
    assert asked() == (False, True)


@pytest.mark.parametrize("name, dtype, capability, expected", [
    ("cuda", torch.float32, (9, 0), True), ("cuda", torch.float32, (7, 5), False),
    ("cuda", torch.bfloat16, (9, 0), False), ("cpu", torch.float32, (9, 0), False),
])
def test_tf32_is_for_float32_on_newer_cards(monkeypatch, name, dtype, capability, expected):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    assert use_tf32(torch.device(name), dtype) == expected and asked == ["high"] * expected
