"""What a counted step takes on a device: a table of GPUs, this machine's CPU, and what is assumed.

The peaks are the makers' (dense, per GPU). What of them is reached was fitted to seven shapes that were
timed on one H100 (fused kernels, bf16, one process; nano to M24, 32 to 256 images: tests/benchmarks),
and is assumed of every other GPU; it is said wherever it is used. A CPU is measured on the spot.
"""

import dataclasses
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from xdino.errors import UsageError, nearest
from xdino.forecast.costs import StepCost, Workload, count_step
from xdino.plan import Plan
from xdino.plan.feasibility import free_memory
from xdino.runtime.device import cuda_devices, multiplies_bf16, resolve_precision

# As fitted to an H100.
PRODUCTS_SHARE = 0.6  # of the peak that products and convolutions reach
BANDWIDTH_SHARE = 0.9  # of the memory's that all else reaches
LAUNCH_SECONDS = 2.5e-6  # of one operation, besides its bytes, in a CUDA graph
WRITING_SECONDS = 2.2e-5  # of one that Python launches, on the one host that was seen
# Assumed, of a GPU.
HALF_BYTES = 0.6  # what autocast's half precision moves and keeps, of float32's bytes
CONTEXT_BYTES = 1 << 30  # of CUDA, its libraries and their workspaces
ALLOCATOR_SHARE = 1.1  # of what is kept: blocks are rounded up, and gaps stay
GPU_LINK = 100e9  # bytes a second and GPU, within a machine
NODE_LINK = 25e9  # bytes a second and GPU, between machines
HIDDEN_SHARE = 0.6  # of a step, during which the network may send without anyone waiting
# Of a CPU: S12/16 in float32 at a batch of 16 held 1.14 times what is counted (tests/benchmarks).
CPU_ALLOCATOR_SHARE = 1.15


@dataclass(frozen=True)
class Machine:
    """A device, and what it can do at most.

    Args:
        half, single: operations a second of products, in the half precision that it has and in
            float32. half_kind: "bf16", "fp16", or "" where half precision gains nothing.
        bandwidth: bytes a second of its memory. memory: bytes.
        cores: of a CPU; 0 for a GPU.
    """

    name: str
    half: float
    single: float
    bandwidth: float
    memory: int
    half_kind: str = "bf16"
    cores: int = 0

    @property
    def is_cpu(self) -> bool:
        return self.cores > 0

    def precision(self, asked: str) -> str:
        """What "auto" comes to, and what is asked for otherwise."""
        if self.is_cpu:
            return resolve_precision(asked, torch.device("cpu"))
        return self.half_kind if asked == "auto" else asked

    def seconds(self, step: StepCost, precision: str, alone: bool = True) -> float:
        """Of a step, by arithmetic alone: products, other bytes and launches.

        alone: on one process, whose passes run as CUDA graphs; else Python launches what they do, and
        may take longer than the GPU.
        """
        half = precision != "fp32"
        peak = self.half if half else self.single
        moved = step.bytes * (HALF_BYTES if half else 1.0)
        if self.is_cpu:  # its rates are measured, not peaks
            return step.flops / peak + moved / self.bandwidth
        work = step.flops / (PRODUCTS_SHARE * peak) + moved / (BANDWIDTH_SHARE * self.bandwidth)
        work += LAUNCH_SECONDS * step.launches
        return work if alone else max(work, WRITING_SECONDS * step.launches)

    def needs(self, tensors: int, precision: str, activations: int) -> int:
        """Bytes of memory for `tensors` bytes of them, of which `activations` may be halved."""
        if self.is_cpu:
            return round(CPU_ALLOCATOR_SHARE * tensors)
        saved = (1 - HALF_BYTES) * activations if precision != "fp32" else 0.0
        return round(ALLOCATOR_SHARE * (tensors - saved)) + CONTEXT_BYTES


def _gpu(
    name: str, half: float, single: float, bandwidth: float, memory: int, kind: str = "bf16"
) -> Machine:
    """TFLOP/s twice, GB/s, GiB."""
    return Machine(name, half * 1e12, single * 1e12, bandwidth * 1e9, memory * 2**30, kind)


#: By the name that --device takes.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("b200", 2250, 75, 8000, 180),
        _gpu("h200", 989, 67, 4800, 141),
        _gpu("h100", 989, 67, 3350, 80),
        _gpu("a100", 312, 19.5, 2039, 80),
        _gpu("a100-40", 312, 19.5, 1555, 40),
        _gpu("l40s", 362, 91.6, 864, 48),
        _gpu("a10", 125, 31.2, 600, 24),
        _gpu("l4", 121, 30.3, 300, 24),
        _gpu("rtx4090", 165, 82.6, 1008, 24),
        _gpu("rtx3090", 71, 35.6, 936, 24),
        _gpu("v100", 125, 15.7, 900, 32, "fp16"),
        _gpu("t4", 65, 8.1, 320, 16, "fp16"),
    )
}


def machine_of(name: str) -> tuple[Machine, bool]:
    """The device that `name` means, and whether it is this machine's own.

    name: one of `GPUS`; "cpu", measured now; "auto" or "cuda", this machine's.

    Raises:
        UsageError: no such device, or none here.
    """
    if name in ("auto", "cuda") and cuda_devices():
        return _own_gpu(), True
    if name == "cuda":
        raise UsageError(
            f"the device is to be cuda, but torch finds no CUDA device here; name one: {', '.join(GPUS)}"
        )
    if name in ("auto", "cpu"):
        return measured_cpu(), True
    key = name.lower().replace("_", "-")
    if key not in GPUS:
        raise UsageError(f'no device is called "{name}": {nearest(key, [*GPUS, "cpu", "auto"])}')
    return GPUS[key], False


def _own_gpu() -> Machine:
    """This machine's GPU: by its name in the table, else as a card of the middle."""
    told = torch.cuda.get_device_properties(0)
    known = known_gpu(told.name) or GPUS["a10"]
    return dataclasses.replace(known, name=told.name, memory=told.total_memory)


def known_gpu(name: str) -> Machine | None:
    """The GPU of the table that a driver's name for one speaks of."""
    flat = re.sub(r"[^a-z0-9]", "", name.lower())
    return next((gpu for key, gpu in GPUS.items() if key.replace("-", "") in flat), None)


def capacity(plan: Plan) -> tuple[float, float] | None:
    """The counted operations of a step of `plan` on a process, and its GPU's peak a second.

    None where the device is no GPU of the table, or the network is none that can be counted.
    """
    if plan.device.type != "cuda":
        return None
    gpu = known_gpu(torch.cuda.get_device_properties(plan.device).name)
    train = plan.config.train
    processes = plan.total_batch // (train.batch_size * train.accumulate)
    work = Workload(
        plan.config, len(plan.source), processes, plan.precision, plan.spec, plan.crops, None
    )
    if gpu is None:
        return None
    try:
        flops = count_step(work).flops
    except (RuntimeError, ValueError, NotImplementedError):
        # A network that is not ours may ask its tensors for values, or hold an operation that torch's
        # "meta" device does not know: the run goes on without this column.
        return None
    return flops, gpu.single if plan.precision == "fp32" else gpu.half


def measured_cpu() -> Machine:
    """This machine's CPU: a product and a pass over memory, each timed for a tenth of a second."""
    cores = torch.get_num_threads()
    a, b = torch.randn(768, 768), torch.randn(768, 768)
    x = torch.randn(1 << 21)
    single = 2 * 768**3 / _best(lambda: a @ b)
    half = single
    if multiplies_bf16(torch.device("cpu")):
        a, b = a.bfloat16(), b.bfloat16()
        half = 2 * 768**3 / _best(lambda: a @ b)
    bandwidth = 2 * x.nbytes / _best(lambda: x.mul(1.5))
    memory = free_memory(torch.device("cpu")) or 0
    return Machine("cpu", half, single, bandwidth, memory, "bf16", max(1, cores))


def _best(call: Callable[[], object], seconds: float = 0.1) -> float:
    """The shortest of the calls that fit into so many seconds, three at least."""
    best, ends, done = float("inf"), time.perf_counter() + seconds, 0
    while done < 3 or time.perf_counter() < ends:
        began = time.perf_counter()
        call()
        best, done = min(best, time.perf_counter() - began), done + 1
    return best


def cores_here() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
