"""How much memory a network takes for a picture, before any of it is taken.

The forward pass runs on torch's meta device, where tensors have a shape and a type and no numbers:
what lives at the same time is counted, tensor by tensor. What libraries take inside of one operation
is not seen; it is allowed for by a factor.

Letters: K classes, H x W pixels.
"""

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xdino_transfer.dense_files import classes_of
from xdino_transfer.detection.detector import Detector
from xdino_transfer.detection.masks import AT_ONCE
from xdino_transfer.detection.views import MULTIPLE
from xdino_transfer.segmentation.segmenter import Segmenter

STRIP = 1 << 24  # votes of a strip of a picture, which are turned into classes together
INSIDE = 1.3  # what operations take beside their results, and allocators beside what is asked for
Size = tuple[int, int]


class _Living(TorchDispatchMode):
    """Counts the bytes of all results that live at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _without_memory(network: Any) -> Any:
    """A copy on the meta device, of which no tensor was ever copied."""
    tensors = [*network.parameters(), *network.buffers()]
    copies = {id(value): value.detach().to("meta") for value in tensors}
    copies |= {id(p): nn.Parameter(copies[id(p)], False) for p in network.parameters()}
    return copy.deepcopy(network, copies)


class Estimate:
    """Bytes that one picture takes in a network; its weights, which are there, not with them."""

    def __init__(self, network: Segmenter | Detector) -> None:
        self._network = _without_memory(network).eval()
        self._channels = next(
            module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d)
        )
        self._known: dict[Size, int] = {}

    def __call__(self, shown: Size, original: Size) -> int:
        """Of a picture that the network sees at `shown` pixels (height, width).

        original: the pixels that the answer has.
        """
        if shown not in self._known:
            self._known[shown] = round(INSIDE * self._forward(shown))
        return self._known[shown] + self._answer(original)

    def _forward(self, shown: Size) -> int:
        network = self._network
        H, W = shown
        if isinstance(network, Detector):
            H, W = (-(-side // MULTIPLE) * MULTIPLE for side in shown)
        with torch.device("meta"), torch.no_grad(), _Living() as living:
            images = torch.empty(1, self._channels, H, W)
            if isinstance(network, Detector):
                features = network.neck(network.backbone(images))
                outputs = network.rpn(features)
                del outputs
                self._regions(network, features)
            else:
                network(images)
        return living.most

    @staticmethod
    def _regions(network: Detector, features: list[Tensor]) -> None:
        """What the heads take for as many regions as there may be."""
        proposals, found = network.rpn.settings.test.after, network.roi.settings.most
        width = network.neck.width
        for count, side, head in (
            (proposals, network.roi.BOX_SIDE, network.roi.box_head),
            (found, network.roi.MASK_SIDE, network.roi.mask_head),
        ):
            out = head(torch.empty(count, width, side, side))
            (
                network.roi.box_predictor
                if side == network.roi.BOX_SIDE
                else network.roi.mask_predictor
            )(out)

    def _answer(self, original: Size) -> int:
        """Of masks of all objects, pasted a few at a time; or of the classes, and a strip of votes."""
        pixels = original[0] * original[1]
        if isinstance(self._network, Detector):
            masks = self._network.roi.settings.most * pixels
            return masks + 16 * min(masks, max(pixels, AT_ONCE))
        return 9 * pixels + 12 * min(classes_of(self._network) * pixels, STRIP)
