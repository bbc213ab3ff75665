"""Activations computed again in the backward pass instead of kept: less memory, more time."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def _statistics_as_they_are(module: nn.Module) -> Iterator[None]:
    """BatchNorms count a batch once, also where a forward pass is repeated for its gradient."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def recomputed(module: nn.Module, *inputs: object) -> Any:
    """`module(*inputs)`, whose activations are computed again in the backward pass, not kept.

    The same numbers to the bit: random numbers are drawn alike, running statistics move once.
    """
    contexts = contextlib.nullcontext(), _statistics_as_they_are(module)
    return checkpoint(module, *inputs, use_reentrant=False, context_fn=lambda: contexts)
