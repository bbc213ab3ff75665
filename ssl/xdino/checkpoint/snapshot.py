"""A state as it is now, in memory of its own, while what it was taken from goes on to change."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

Place = tuple[Hashable, ...]
SMALL = 2**20  # bytes


class Snapshot:
    """Copies of trees of tensors on the CPU, one after the other in the same memory.

    Memory that was touched before takes copies several times as fast as fresh memory does, so it is
    kept: as much as a state has. Copies from a GPU lie in pinned memory.
    """

    def __init__(self) -> None:
        self._held: dict[Place, Tensor] = {}
        self._gpus: set[torch.device] = set()  # copied from

    def missing(self, tree: Any) -> int:
        """Bytes that a copy of `tree` takes beside what is held already."""
        found = 0
        for place, value in _tensors(tree):
            if not _fits(self._held.get(place), value):
                found += value.numel() * value.element_size()
        return found

    def begin(self, tree: Any) -> tuple[Any, Callable[[], None]]:
        """`tree` with copies in the place of its tensors; the tree that was taken before is no more.

        Small tensors are copied here, among them all that forward passes move (running statistics).
        What is returned beside fills the large ones: until then nothing may move these.
        """
        shared: dict[Any, Tensor] = {}  # one copy of what lies in several places of the tree
        large: list[tuple[Tensor, Tensor]] = []

        def copied(node: Any, place: Place) -> Any:
            if isinstance(node, dict):
                return {key: copied(value, (*place, key)) for key, value in node.items()}
            if isinstance(node, list | tuple):
                return type(node)(copied(value, (*place, i)) for i, value in enumerate(node))
            if not isinstance(node, Tensor):
                return node
            same = node.device, node.dtype, node.data_ptr(), node.shape, node.stride()
            if node.numel() and same in shared:
                return shared[same]
            held = self._held.get(place)
            if held is None or not _fits(held, node):
                held = torch.empty(node.shape, dtype=node.dtype, pin_memory=node.is_cuda)
            if node.is_cuda:
                self._gpus.add(node.device)
            self._held[place] = shared[same] = held
            if node.numel() * node.element_size() > SMALL:
                large.append((held, node.detach()))
            else:
                held.copy_(node.detach(), non_blocking=True)
            return held

        def fill() -> None:
            for held, value in large:
                held.copy_(value, non_blocking=True)

        return copied(tree, ()), fill

    def take(self, tree: Any) -> Any:
        """`begin`, and all of it filled."""
        kept, fill = self.begin(tree)
        fill()
        self.wait()
        return kept

    def wait(self) -> None:
        """Until what was copied from GPUs has arrived: on the streams of the copies, of any thread.

        A whole device is not waited for: meanwhile it may be recording a CUDA graph.
        """
        for gpu in self._gpus:
            torch.cuda.current_stream(gpu).record_event().synchronize()


def _fits(held: Tensor | None, value: Tensor) -> bool:
    return held is not None and held.shape == value.shape and held.dtype == value.dtype


def _tensors(node: Any, place: Place = ()) -> list[tuple[Place, Tensor]]:
    if isinstance(node, Tensor):
        return [(place, node)]
    if isinstance(node, dict):
        return [found for key, value in node.items() for found in _tensors(value, (*place, key))]
    if isinstance(node, list | tuple):
        return [found for i, value in enumerate(node) for found in _tensors(value, (*place, i))]
    return []
