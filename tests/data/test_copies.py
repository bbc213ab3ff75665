"""Copies to a device and back: the same numbers, and on a GPU nobody waits."""

import pytest
import torch

from xdino.runtime import transfer

CPU = torch.device("cpu")


def test_on_the_cpu_nothing_is_copied():
    x = torch.arange(6).view(2, 3)
    assert transfer.to_device(x, CPU) is x
    assert transfer.Arriving(x).wait() is x


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_passes_the_work_that_is_queued():
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.randint(0, 256, (1 << 24,), dtype=torch.uint8).pin_memory()
    transfer.to_device(x, device)  # what is slow once: streams, memory
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(1 << 31)  # cycles: about a second
    busy.record()
    there = transfer.to_device(x, device)
    transfer._beside(device).synchronize()
    assert not busy.query()  # the copy is done, and the work before it is not
    back = transfer.Arriving(there + 1)
    torch.cuda._sleep(1 << 31)
    assert not busy.query()  # nor did Python wait for it
    assert torch.equal(back.wait(), x + 1)
