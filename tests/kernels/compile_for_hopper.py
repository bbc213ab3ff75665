"""Compile every kernel that a training step launches for compute capability 9.0; no GPU is needed.

Run in a process where Triton is not interpreted. Launches are caught on their way to the driver and
compiled with the sizes and types that they were launched with; nothing is computed. Prints one line
a kernel: name, registers, bytes spilled, bytes of shared memory.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.uint8: "*u8"}
OPTIONS = ("num_warps", "num_stages")
seen: dict[str, str] = {}


def catch(kernel, *args, grid, warmup, **kwargs):
    """Instead of JITFunction.run."""
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = values[param.name]
        if param.is_constexpr or value is None:
            signature[param.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "i32" if isinstance(value, int) else "fp32"
    key = f"{kernel.fn.__module__}.{kernel.fn.__name__} {signature} {constants} {options}"
    if key in seen:
        return
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    seen[key] = report(compiled)
    types = " ".join(signature.values())
    print(f"{kernel.fn.__module__}.{kernel.fn.__name__}: {seen[key]}; {types}"[:200], flush=True)


def report(compiled) -> str:
    """What the assembler says of a kernel."""
    shared = compiled.metadata.shared
    assert shared <= 227 * 1024, f"{shared} bytes of shared memory, more than a multiprocessor has"
    assert len(compiled.asm["cubin"]) > 0
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        ptxas = nvidia.get_ptxas(90)
        said = subprocess.run(
            [ptxas.path, "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(ptx.with_suffix(".cubin"))],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert registers is not None
    assert spilled is not None
    return f"{registers[1]} registers, {spilled[1]} bytes spilled, {shared} bytes shared"


def train(embed_dim: int, heads: int, patch: int, size: int, autocast: bool) -> None:
    from xdino.kernels import blocks
    from xdino.xcit import NORM_EPS, XCiT

    model = XCiT(patch, embed_dim, 2, heads, drop_path_rate=0.1).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (tokens,), _, _ = blocks.tokens_after(model, torch.randn(2, 3, size, size), [1], NORM_EPS)
    tokens.float().sum().backward()


def views(channels: int) -> None:
    from xdino import augment
    from xdino.augment import photometric

    spec = augment.multi_crop(mean=(0.5,) * channels, std=(0.2,) * channels)
    table = augment.draw_batch(spec, 0, 0, np.arange(4))[0]
    crops = torch.zeros(4, 224, 224, channels, dtype=torch.uint8)
    photometric.photometric_fused(crops, table, spec, torch.float32)


with mock.patch.object(triton.runtime.jit.JITFunction, "run", catch):
    for what in sys.argv[1:]:
        if what.startswith("views"):
            views(int(what[5:]))
        else:
            width, heads, patch, size, precision = what.split(",")
            train(int(width), int(heads), int(patch), int(size), precision == "bf16")
