"""Learning rates as main.py drives timm's scheduler."""

import numpy as np
import pytest
import torch
from timm.scheduler import CosineLRScheduler

from xdino.errors import UsageError
from xdino_transfer.classification.schedules import by_epoch, published, scaled, smooth


def test_the_published_rates(downstream):
    tensors, told = downstream("lr_schedules")
    for name in ("cosine/400", "cosine/30", "cosine/constant_384"):
        case = told["schedules"][name]
        rates = published(
            case["epochs"], case["peak"], case["warmup_epochs"], case["warmup_lr"], case["min_lr"]
        )
        np.testing.assert_allclose(rates, tensors[name].numpy(), rtol=1e-12, err_msg=name)


@pytest.mark.parametrize(("epochs", "peak", "warmup"), [(1, 1e-3, 0), (7, 5e-6, 5), (6, 1e-3, 6)])
def test_any_run_is_as_timms_scheduler_gives_it(epochs, peak, warmup):
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    theirs = CosineLRScheduler(optimiser, epochs, lr_min=1e-5, warmup_t=warmup, warmup_lr_init=1e-6)
    rates = []
    for epoch in range(epochs):
        rates.append(optimiser.param_groups[0]["lr"])
        theirs.step(epoch)
    np.testing.assert_allclose(published(epochs, peak, warmup), rates, rtol=1e-12)


def test_shapes_and_scaling():
    assert scaled(5e-4, 1024) == 1e-3
    assert by_epoch(np.array([1.0, 2.0]), 3).tolist() == [1, 1, 1, 2, 2, 2]
    rates = smooth(10, 4, 1e-3, warmup_epochs=2)
    assert (len(rates), rates[0], rates.max()) == (40, 0, 1e-3)
    with pytest.raises(UsageError, match="a warm-up of 5 epochs does not fit"):
        published(3, 1e-3)
