"""Memory that is counted: live tensors, real or fake, and the process's own."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lib.memory import LiveBytes, peak_memory

MIB = 2**20


@pytest.mark.parametrize("mode", [FakeTensorMode, torch.enable_grad])
def test_a_storage_counts_once_and_as_long_as_it_lives(mode):
    with mode(), LiveBytes("cpu") as live:
        a = torch.empty(MIB)
        view, b = a[1:], a + 1
        assert live.now == 8 * MIB
        del a
        assert live.now == 8 * MIB
        del view
        assert live.now == live.mark() == 4 * MIB
        c = b * 2
        assert live.since_mark == 8 * MIB
        del b, c
    assert live.now == 0


def test_tensors_of_another_device_do_not_count():
    with LiveBytes("cuda") as live:
        torch.empty(MIB)
    assert live.now == live.highest == 0


def test_what_is_kept_for_backward_is_counted():
    with FakeTensorMode(), LiveBytes("cpu") as live:
        x = torch.ones(MIB, requires_grad=True)
        y = (x.exp() * 2).exp().sum()
        assert live.now == 4 * MIB * 3 + 4  # x, and both results of exp
        y.backward()
        del y
        assert live.now == 4 * MIB * 2  # x and its gradient


def test_fake_values_can_be_read():
    with FakeTensorMode(), LiveBytes("cpu"):
        assert int(torch.zeros(3, dtype=torch.int64).sum()) == 1 and not torch.ones(()) > 0


def test_short_lived_blocks_of_the_heap_leave_holes():
    with FakeTensorMode(), LiveBytes("cpu") as live:
        small, large = torch.empty(MIB, dtype=torch.uint8), torch.empty(32 * MIB, dtype=torch.uint8)
        assert live.now == 33 * MIB and live.highest == pytest.approx(33.5 * MIB)
        del small, large
        assert live.held == pytest.approx(0)


def test_peak_memory_grows_with_what_is_touched():
    before = peak_memory(torch.device("cpu"))
    tensor = torch.ones(before // 4)
    assert peak_memory(torch.device("cpu")) > 1.5 * before and tensor[-1] == 1
