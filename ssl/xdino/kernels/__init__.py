"""Fused Triton kernels for training on CUDA: the same mathematics in fewer passes over memory.

Three quarters of a training step's traffic on a GPU is not matrix products but what lies between
them (elementwise work, norms, copies between layouts). Each module here is one family of kernels,
forward and backward, wrapped in an autograd function that saves its inputs and recomputes the rest:

- `xca`: cross-covariance attention between the qkv and the output projection;
- `lpi`: local patch interaction around the statistics of its BatchNorm;
- `residual`: LayerScale, stochastic depth, residual and the next LayerNorm;
- `mlp`: GELU and the gradient of the bias in front of it;
- `batch_norm`: training BatchNorm with GELU, for the stem; statistics over processes;
- `photometric`: from uint8 crops to normalised views;
- `sums`: of rows, in two steps;
- `blocks`: an XCiT's patch tokens out of the first four.

Nothing here is imported where Triton is missing: `reason` says why, and `xdino.xcit` and
`xdino.augment.photometric` stay the reference. With TRITON_INTERPRET=1 in the environment before
Triton is imported, the kernels run on the CPU, slowly, which is how the tests hold them to the
reference.

Letters: B images, N tokens, T = B * N rows, D width, H heads, d = D / H, C channels of a BatchNorm.
"""

import os

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether Triton runs (or would run) its kernels on the CPU, in Python."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def reason(device: torch.device) -> str | None:
    """Why no kernel can run on `device`, as half a sentence; None where one can."""
    if device.type != "cuda" and not interpreted():
        return f"they are for CUDA devices, and this one is {device.type}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


def takes(x: Tensor) -> bool:
    """Whether the kernels compute in the precision of `x`: they accumulate in float32."""
    return x.dtype in DTYPES and (x.is_cuda or interpreted())
