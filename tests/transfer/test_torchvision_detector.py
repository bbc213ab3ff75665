"""With torchvision's constants our detector computes what torchvision's Mask R-CNN does."""

import pytest
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import paste_masks_in_image

from xdino_transfer.detection import roi, rpn
from xdino_transfer.detection.detector import Detector
from xdino_transfer.detection.objects import Objects, Shown
from xdino_transfer.detection.roi import RegionHeads
from xdino_transfer.detection.rpn import RegionProposals
from xdino_transfer.fpn import FPN

WIDTH, CLASSES, SIDE = 16, 4, 128


class Levels(nn.Module):
    """A stand-in for a backbone: images to four levels, torchvision's pyramid network behind them."""

    out_channels = WIDTH

    def __init__(self):
        super().__init__()
        self.stem = nn.ModuleList(
            nn.Conv2d(3, 8, stride, stride=stride) for stride in (4, 8, 16, 32)
        )
        self.neck = FPN([8] * 4, WIDTH, extra=True)

    def bare(self, images):
        return [layer(images) for layer in self.stem]

    def forward(self, images):
        names = ["0", "1", "2", "3", "pool"]
        return dict(zip(names, self.neck(self.bare(images)), strict=True))


@pytest.fixture(scope="module")
def pair():
    """torchvision's detector, which samples everything, and ours on the same weights."""
    torch.manual_seed(1)
    levels = Levels()
    theirs = MaskRCNN(
        levels,
        CLASSES + 1,
        min_size=SIDE,
        max_size=SIDE,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5
        ),
        rpn_batch_size_per_image=10**6,
        box_batch_size_per_image=10**6,
        box_positive_fraction=0.99,
        rpn_positive_fraction=0.99,
        box_score_thresh=0.2,
    )
    with torch.no_grad():  # outputs that differ from region to region
        for parameter in theirs.rpn.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for parameter in theirs.roi_heads.box_predictor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ours = Detector(
        nn.Identity(),
        levels.neck,
        RegionProposals(WIDTH, rpn.without_sampling(rpn.TORCHVISION)),
        RegionHeads(WIDTH, CLASSES, settings=roi.without_sampling(roi.TORCHVISION)),
    )
    ours.rpn.load_state_dict(theirs.rpn.state_dict())
    ours.roi.load_state_dict(theirs.roi_heads.state_dict())
    return levels, theirs, ours


def made():
    """Two images and what is on them."""
    torch.manual_seed(2)
    images, objects = torch.rand(2, 3, SIDE, SIDE), []
    for count in (3, 2):
        corner = torch.rand(count, 2) * 70
        boxes = torch.cat([corner, corner + 20 + torch.rand(count, 2) * 35], 1)
        masks = (torch.rand(count, SIDE, SIDE) > 0.4).to(torch.uint8)
        objects.append(Objects(boxes, torch.randint(0, CLASSES, (count,)), masks))
    return images, objects


def test_losses_are_torchvisions(pair, agree):
    levels, theirs, ours = pair
    images, objects = made()
    theirs.train()
    targets = [{"boxes": o.boxes, "labels": o.labels + 1, "masks": o.masks} for o in objects]
    expected = theirs([*images], targets)
    shown = [Shown((SIDE, SIDE), (SIDE, SIDE))] * 2
    found = ours.losses_of(levels.bare(images), (SIDE, SIDE), shown, objects)
    for name, other in {
        "rpn_class": "loss_objectness", "rpn_box": "loss_rpn_box_reg", "class": "loss_classifier",
        "box": "loss_box_reg", "mask": "loss_mask",
    }.items():  # fmt: skip
        agree(name, found[name].sum(), expected[other], 1e-5)


def test_detections_are_torchvisions(pair, agree):
    levels, theirs, ours = pair
    ours.roi.settings = roi.dataclasses.replace(ours.roi.settings, score=0.2)
    images, _ = made()
    theirs.eval()
    for image in images:
        with torch.no_grad():
            (expected,) = theirs([image])
            shown = Shown((SIDE, SIDE), (SIDE, SIDE))
            bare = levels.bare(image[None])
            (found,) = ours.detect_in(bare, (SIDE, SIDE), [shown])
            logits = ours.roi.masked(ours.neck(bare), [found.boxes]).sigmoid()
        assert len(found.boxes) > 5
        assert torch.equal(found.labels + 1, expected["labels"])
        agree("boxes", found.boxes, expected["boxes"], 1e-5)
        agree("scores", found.scores, expected["scores"], 1e-5)
        own = logits[torch.arange(len(logits)), found.labels + 1][:, None]
        # It pastes into whole pixels: by its own function, from our probabilities.
        masks = paste_masks_in_image(own, found.boxes, (SIDE, SIDE))
        agree("masks", masks, expected["masks"], 1e-5)
