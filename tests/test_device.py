import pytest
import torch

import device
from device import (
    check_card,
    choose_device,
    is_out_of_memory,
    out_of_memory_as,
    reproducible,
    use_tf32,
    warn_of_unused_cuda,
)
from errors import UserError


@pytest.mark.parametrize("error, told", [
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
def test_out_of_memory_is_known_in_all_its_forms(error, told):
    assert is_out_of_memory(error) == told
    with pytest.raises(UserError if told else type(error)), out_of_memory_as("lower batch_size"):
        raise error


WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize("capability, built_for, fits", [
    ((7, 0), WHEEL, False), ((7, 5), WHEEL, True), ((8, 9), WHEEL, True), ((9, 0), WHEEL, True),
    ((10, 3), WHEEL, True), ((11, 0), WHEEL, False), ((12, 1), WHEEL, True), ((13, 0), WHEEL, True),
    ((9, 1), ["sm_90a"], False), ((9, 0), ["gfx90a"], True), ((6, 1), ["sm_75", "compute_75"], False),
])
def test_a_card_that_torch_is_not_built_for_is_refused(monkeypatch, capability, built_for, fits):
    for name, value in dict(get_device_capability=capability, get_device_name="Some Card", device_count=1).items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    if fits:
        assert check_card(torch.device("cuda")) is None and choose_device("cuda") == torch.device("cuda")
        return
    with pytest.raises(UserError) as refused:
        choose_device("cuda")
    words = str(refused.value)
    number = "{}.{}".format(*capability)
    assert f"Some Card has compute capability {number}" in words and f"sm_{number.replace('.', '')}" in words
    assert "--device=cpu" in words and "\n" not in words


@pytest.mark.parametrize("reason, warning", [
    ("The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver\nby", True),
    ("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU", False),
    ("No CUDA GPUs are available", False),
])
def test_a_driver_that_is_too_old_is_told_once(monkeypatch, capsys, reason, warning):
    def init():
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    warn_of_unused_cuda.cache_clear()
    assert choose_device("auto").type in ("cpu", "mps") and choose_device("auto").type in ("cpu", "mps")
    warn_of_unused_cuda.cache_clear()
    expected = "warning: no CUDA: The NVIDIA driver on your system is too old (found version 11040). Please update"
    err = capsys.readouterr().err
    assert err.count(expected) == warning and (err == "") == (not warning)


def test_code_for_one_card_runs_on_its_family():
    assert [device.runs_on("sm_86", 8, minor) for minor in (0, 6, 9)] == [False, True, True]


def test_only_cuda_is_asked_for_the_same_bits_each_time():
    def asked():
        return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory

    with reproducible(torch.device("cpu")):
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
