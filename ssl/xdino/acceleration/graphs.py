"""Forward and backward passes that a GPU repeats by itself: CUDA graphs.

A step of a small network is some thousand kernels of microseconds each, and Python takes longer to
write them down than the device to run them. A graph is written down once and replayed as a whole: the
same kernels on the same addresses, so the same numbers, from inputs that are copied to where the first
ones lay. What Python decided while recording is part of it: everything of that kind belongs in the key.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

#: Passes before the recorded one: they compile, fill caches, and show who gets a gradient.
WARM = 2
#: Graphs kept at a time. Each holds its own activations; crops of two sizes take turns in no run.
KEPT = 1


@dataclass(frozen=True)
class Recording(Generic[T]):
    """Work on `inputs` that `replay` repeats; `outputs` lie where they always lie."""

    inputs: Sequence[Tensor]
    outputs: T
    replay: Callable[[], None]


def record(work: Callable[[Sequence[Tensor]], T], inputs: Sequence[Tensor]) -> Recording[T]:
    """Record `work` on copies of `inputs`: nothing has run yet, only `replay` does.

    Raises:
        RuntimeError: the work waits for the device, or does something else that no graph can hold.
    """
    static = [x.clone() for x in inputs]
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # The stream is put back by the first, which the second forgets where the recording broke. The
        # loader's threads pin memory meanwhile, which is none of this graph's business.
        with torch.cuda.stream(here), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = work(static)
    except RuntimeError:
        # torch 2.11 lets its generator believe that the recording goes on: a whole one ends that.
        again = torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local")
        with contextlib.suppress(RuntimeError), torch.cuda.stream(here), again:
            torch.zeros(1, device=here.device)
        raise
    return Recording(static, outputs, graph.replay)


def replayed(work: Callable[[], object]) -> Callable[[], object]:
    """`work` as its recording, or as it is where none can be made."""
    for _ in range(WARM):
        work()
    try:
        return record(lambda _: work(), []).replay
    except RuntimeError:
        return work


class Passes(Generic[T]):
    """Passes of micro-batches, recorded when their like has been seen `WARM` times.

    The gradients of recorded passes are tensors that stay where they are, which `begin` clears.

    Args:
        parameters: those that may get a gradient.
        recorder: `record`, or what stands for it where there is no GPU.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], recorder: Callable[..., Recording[T]] = record
    ) -> None:
        self._parameters, self._recorder = list(parameters), recorder
        self._recordings: dict[Hashable, Recording[T]] = {}
        self._seen: Counter[Hashable] = Counter()  # inputs of these shapes
        self._reached: set[nn.Parameter] = set()  # by a gradient
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._off, self._why = False, ""

    def begin(self) -> None:
        """Before the first pass of a step, with gradients that were set to None."""
        if self._gradients:
            torch._foreach_zero_([*self._gradients.values()])
            for parameter, gradient in self._gradients.items():
                parameter.grad = gradient

    def run(
        self,
        key: Hashable,
        work: Callable[[Sequence[Tensor]], T],
        inputs: Sequence[Tensor],
        alone: bool,
    ) -> T:
        """`work(inputs)`, which adds to the gradients and gives tensors without one.

        key: what Python decides by in `work`, besides the inputs' shapes. alone: no other pass of the
        step adds to these gradients. The outputs hold until the next pass.
        """
        if self._off:
            return work(inputs)
        shapes = tuple((x.shape, x.dtype) for x in inputs)
        key = key, alone, shapes
        if key not in self._recordings:
            if self._seen[shapes] < WARM:
                found = work(inputs)
                self._seen[shapes] += 1
                self._reached.update(p for p in self._parameters if p.grad is not None)
                return found
            try:
                self._keep(key, work, inputs, alone)
            except RuntimeError as error:
                self._give_up(error, alone)
                return work(inputs)
        recording = self._recordings[key]
        torch._foreach_copy_(list(recording.inputs), list(inputs))
        recording.replay()
        if not self._gradients:
            self._gradients = {p: p.grad for p in self._parameters if p.grad is not None}
        return recording.outputs

    def _keep(
        self,
        key: Hashable,
        work: Callable[[Sequence[Tensor]], T],
        inputs: Sequence[Tensor],
        alone: bool,
    ) -> None:
        self._gradients = {}
        while len(self._recordings) >= KEPT:
            self._recordings.pop(next(iter(self._recordings)))
        for parameter in self._reached:
            if alone:
                parameter.grad = None  # the graph writes gradients; else it adds to what there is
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._recordings[key] = self._recorder(work, inputs)

    def _give_up(self, error: RuntimeError, alone: bool) -> None:
        self._off, lines = True, str(error).strip().splitlines()
        self._recordings.clear()
        if alone:  # gradients that the recording made hold nothing
            for parameter in self._parameters:
                parameter.grad = None
        self._why = (
            "no CUDA graph of the passes could be recorded, and they run without one "
            f"({lines[0][:200] if lines else type(error).__name__})"
        )

    def why_not(self) -> str | None:
        """Once: why the passes are no longer recorded, where they should be."""
        why, self._why = self._why, ""
        return why or None
