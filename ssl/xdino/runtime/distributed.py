"""torch.distributed where a launcher set it up, and the same calls with one process and none.

A launcher (torchrun, SLURM's srun, `xdino pretrain --gpus`) sets RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT; nothing here patches or guesses.
"""

import contextlib
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xdino.errors import RunFailed, Stopped, UsageError, reason
from xdino.runtime import rendezvous

T = TypeVar("T")

# How long a process waits for another within a run. NCCL's own ten minutes would end a run whose
# first process evaluates for longer; one that died is noticed at once, by its closed connection.
PATIENCE = timedelta(hours=2)
_NOTICE_AFTER = 10.0  # seconds of waiting, after which it is said for whom


def is_active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_active() else 0


def world_size() -> int:
    return dist.get_world_size() if is_active() else 1


def start(device: torch.device) -> bool:
    """Join the process group that the environment describes; False where there is none.

    Tensors on the CPU travel by gloo whatever the device: what processes tell each other about
    files, signals and neighbours does not wait for work that a GPU has queued.

    Raises:
        UsageError: the environment describes no group, or only half of one.
        RunFailed: the others did not come in time (the message says who), or the port is taken.
    """
    if is_active():
        return False
    found = rendezvous.described(os.environ)
    if found is None:
        return False
    here, world = found
    if device.type == "cuda":
        if "LOCAL_RANK" not in os.environ:
            raise UsageError("LOCAL_RANK is not set: it says which GPU of its machine is whose")
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = _meet(here, world)
    with heard():
        dist.init_process_group(backend, store=store, rank=here, world_size=world, timeout=PATIENCE)
    return True


def _meet(here: int, world: int) -> dist.Store:
    """The store that all processes share, once every one of them has come."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    text = os.environ.get(rendezvous.LIMIT_VARIABLE, str(rendezvous.LIMIT_SECONDS))
    try:
        limit = float(text)
        patience = timedelta(seconds=limit)
    except (ValueError, OverflowError):
        limit, patience = -1.0, timedelta()
    if not limit > 0:
        raise UsageError(f"{rendezvous.LIMIT_VARIABLE} must be a number of seconds, got {text!r}")
    deadline = time.monotonic() + limit
    hosts = here == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store: dist.Store = dist.TCPStore(
            host, port, is_master=hosts, timeout=patience, wait_for_workers=False
        )
    except RuntimeError as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise RunFailed(
                f"port {port} of {host} is taken by something else: set MASTER_PORT to another"
            ) from None
        raise RunFailed(
            f"process {here} of {world} found nobody at {host}:{port} within {limit:.0f} s "
            f"({rendezvous.LIMIT_VARIABLE}): is process 0 running there?"
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"xdino/{attempt}", store)
    with heard():
        store.set(f"here/{here}", socket.gethostname())
        _await_all(store, here, world, deadline, limit)
        store.set_timeout(PATIENCE)
    return store


def _await_all(store: dist.Store, here: int, world: int, deadline: float, limit: float) -> None:
    missing = list(range(world))
    told, pause = time.monotonic() + _NOTICE_AFTER, 0.01
    while True:
        missing = [other for other in missing if not store.check([f"here/{other}"])]
        if not missing:
            return
        named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        if time.monotonic() > deadline:
            raise RunFailed(
                f"process {here} of {world} waited {limit:.0f} s ({rendezvous.LIMIT_VARIABLE}) for "
                f"process {named}, which did not come"
            )
        if here == min(set(range(world)) - set(missing)) and time.monotonic() > told:
            print(f"waiting for process {named} of {world} ...", file=sys.stderr, flush=True)
            told = float("inf")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.5)


# DDP's reducer keeps the group, and so gloo's threads, beyond its end. One that has yet to let go of
# the last tensor it carried asks for Python's lock; asked of an interpreter that has closed, that
# aborts the process ("terminate called without an active exception"). They need microseconds.
_LETTING_GO = 0.2  # seconds


def stop() -> None:
    if is_active():
        dist.destroy_process_group()
        time.sleep(_LETTING_GO)


_LOST = re.compile(
    r"gloo|connection (closed|reset|refused)|broken pipe|NCCL|timed out|recvVector|store",
    re.IGNORECASE,
)


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Inside, a process that left becomes a sentence on those that it left behind.

    Raises:
        RunFailed: instead of what gloo or NCCL raise.
    """
    try:
        yield
    except (UsageError, RunFailed):
        raise
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            raise
        raise RunFailed(
            f"process {rank()} lost another process of the run, whose own message says why "
            f"({reason(error)[:160]})"
        ) from error


def barrier() -> None:
    if is_active():
        dist.barrier()


def mean(x: Tensor) -> Tensor:
    """The mean of `x` over all processes."""
    if world_size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / world_size()


class PendingMean:
    """The mean of `x` over all processes, under way while other work goes on."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.work = x, None
        if world_size() > 1:
            self.x = x.clone()
            self.work = dist.all_reduce(self.x, async_op=True)

    def wait(self) -> Tensor:
        """The mean; a device's own stream waits, not the caller."""
        if self.work is None:
            return self.x
        self.work.wait()
        return self.x / world_size()


def gather(value: Any) -> list[Any]:
    """One plain value of every process, in order of rank, on all of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def to_first(value: Any) -> list[Any]:
    """One plain value of every process, in order of rank, on the first; nothing on the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


# What processes tell each other; anything else that one raises is its own defect.
_HEARD = "_heard_by_all"  # of a sentence that every process has raised
_SENTENCES = {kind.__name__: kind for kind in (UsageError, RunFailed, Stopped)}


def together(action: Callable[[], T]) -> T:
    """action() on every process; if it fails on one in a sentence, all of them raise that sentence.

    Without this the others would wait for ever for the one that left. One call may lie within another:
    what all have heard is not told again.
    """
    failure: UsageError | RunFailed | Stopped | None = None
    try:
        result = action()
    except (UsageError, RunFailed, Stopped) as error:
        if vars(error).get(_HEARD):
            raise
        failure = error
    for kind, sentence in filter(None, gather(failure and (type(failure).__name__, str(failure)))):
        failure = failure or _SENTENCES.get(kind, RunFailed)(sentence)
        vars(failure)[_HEARD] = world_size() > 1
        raise failure
    return result


def from_first(action: Callable[[], T], patience: timedelta | None = None) -> T:
    """action() of the first process alone: its plain value, or its sentence, on all of them.

    `patience`: how long the others wait, where that may be longer than a run's own `PATIENCE`.
    """
    if world_size() == 1:
        return action()
    group: Any = None
    if patience is not None:
        group = dist.new_group(backend="gloo", timeout=patience)
    told: list[Any] = [None, None]
    failure: UsageError | RunFailed | Stopped | None = None
    if rank() == 0:
        try:
            told = ["", action()]
        except (UsageError, RunFailed, Stopped) as error:
            failure = error
            told = [type(error).__name__, str(error)]
        except BaseException as error:
            told = ["RunFailed", f"the first process failed: {reason(error)}"]
            raise
        finally:
            dist.broadcast_object_list(told, src=0, group=group)
    else:
        dist.broadcast_object_list(told, src=0, group=group)
    kind, value = told
    if kind:
        raise failure or _SENTENCES.get(kind, RunFailed)(value)
    return value


def agree(facts: Mapping[str, Any]) -> None:
    """Raises UsageError on every process where they differ in a fact: they would train apart.

    Args:
        facts: plain values under the names that the sentence uses.
    """
    everyone = gather(dict(facts))
    for name, mine in everyone[0].items():
        for other, theirs in enumerate(everyone):
            if theirs[name] != mine:
                raise UsageError(
                    f"the processes do not agree on {name}: process 0 has {_short(mine)}, "
                    f"process {other} has {_short(theirs[name])}"
                )


def _short(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def broadcast_tree(tree: Any) -> Any:
    """Nested dicts, lists and tuples of plain values and tensors of process 0, on all (on the CPU).

    Tensors travel one by one, so that no process holds the whole twice.
    """
    if world_size() == 1:
        return tree
    tensors: list[Tensor] = []

    def skeleton(node: Any) -> Any:
        if isinstance(node, Tensor):
            tensors.append(node.detach().cpu())
            return _Place(len(tensors) - 1, tuple(node.shape), node.dtype)
        if isinstance(node, dict):
            return {key: skeleton(value) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(skeleton(value) for value in node)
        return node

    plain = [skeleton(tree) if rank() == 0 else None]
    dist.broadcast_object_list(plain)

    def filled(node: Any) -> Any:
        if isinstance(node, _Place):
            here = (
                tensors[node.number] if rank() == 0 else torch.empty(node.shape, dtype=node.dtype)
            )
            return broadcast(here, 0)
        if isinstance(node, dict):
            return {key: filled(value) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(filled(value) for value in node)
        return node

    return filled(plain[0])


@dataclass(frozen=True)
class _Place:
    """Where a tensor of a broadcast tree belongs."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def gather_tensor(x: Tensor) -> list[Tensor]:
    """`x` of every process, in order of rank, on the CPU of all; its shape is the same on each."""
    if world_size() == 1:
        return [x.cpu()]
    here = x.cpu().contiguous()
    every = [torch.empty_like(here) for _ in range(world_size())]
    dist.all_gather(every, here)
    return every


def broadcast(x: Tensor, source: int) -> Tensor:
    """`x` of process `source`, on the CPU of all; the others' `x` gives shape and dtype."""
    if world_size() == 1:
        return x.cpu()
    here = x.cpu().contiguous()
    here = here.clone() if here is x else here
    dist.broadcast(here, source)
    return here


def any_true(flag: bool) -> bool:
    """Whether `flag` is set on any process: how all of them stop at the same iteration."""
    if world_size() == 1:
        return flag
    x = torch.tensor(float(flag))
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return bool(x.item())


def any_of(flag: Tensor) -> Tensor:
    """`any_true` of a flag on its device, without asking the device what it is."""
    if world_size() == 1:
        return flag
    x = flag.float()
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x > 0


class MeanOverProcesses(torch.autograd.Function):
    """`mean` with a gradient: every process's result depends on every process's input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return mean(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return mean(gradient.contiguous())


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the images of all processes, on any device.

    torch's own SyncBatchNorm is faster but does not run on the CPU, where two processes must give
    what one gives.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.ndim}")

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and world_size() > 1):
            return super().forward(input)
        dims = [0, *range(2, input.ndim)]
        shape = [1, -1] + [1] * (input.ndim - 2)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        # Every process holds equally many images, so the mean of means is the mean.
        centre: Tensor = MeanOverProcesses.apply(x.mean(dims))
        var: Tensor = MeanOverProcesses.apply((x - centre.view(shape)).square().mean(dims))
        mean_kept, var_kept = self.running_mean, self.running_var
        if self.track_running_stats and mean_kept is not None and var_kept is not None:
            with torch.no_grad():
                count = x.numel() // x.shape[1] * world_size()
                momentum = 0.1 if self.momentum is None else self.momentum
                mean_kept.lerp_(centre.to(mean_kept.dtype), momentum)
                unbiased = var * (count / max(count - 1, 1))
                var_kept.lerp_(unbiased.to(var_kept.dtype), momentum)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (x * scale.view(shape) + (self.bias - centre * scale).view(shape)).to(input.dtype)


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Make every BatchNorm of `module` see all processes' images; names and state are kept."""
    if world_size() == 1:
        return module
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            new = GlobalBatchNorm(
                child.num_features,
                child.eps,
                child.momentum,
                child.affine,
                child.track_running_stats,
            )
            reference = child.running_mean if child.weight is None else child.weight
            if reference is not None:
                new.to(reference.dtype)
            new.load_state_dict(child.state_dict())
            new.train(child.training)
            new.to(device)
            for key, parameter in child.named_parameters():
                setattr(new, key, parameter)  # the same one: an optimiser may hold it already
            setattr(module, name, new)
        else:
            synchronise_batch_norm(child, device)
    return module
