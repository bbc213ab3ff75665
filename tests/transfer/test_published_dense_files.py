"""Published detection and segmentation files load by their names, all of them or not at all."""

import pytest
import torch

from xdino import xcit
from xdino.errors import RunFailed, UsageError
from xdino.xcit import XCiT
from xdino_transfer import fpn
from xdino_transfer.detection import detector
from xdino_transfer.detection.objects import Shown
from xdino_transfer.detection.published import load_detector, to_published
from xdino_transfer.pyramid import Pyramid
from xdino_transfer.segmentation import segmenter
from xdino_transfer.segmentation.published import load_segmenter


def pyramid(patch=16):
    return Pyramid(XCiT(patch, 32, 4, 2))


def write(path, tensors, **meta):
    tree = {"meta": {"epoch": 3, **meta}, "state_dict": tensors, "optimizer": {"state": {}}}
    torch.save(tree, path)
    return path


@pytest.fixture
def detection_file(tmp_path):
    model = detector.build(pyramid(8), 5, detector.Shape(12, 16, 8)).eval()
    tensors = to_published(model.state_dict())
    return model, tensors, write(tmp_path / "d.pth", tensors, CLASSES=("a", "b", "c", "d", "e"))


def test_a_detection_file(detection_file):
    model, _, path = detection_file
    loaded, classes = load_detector(path)
    assert classes == ("a", "b", "c", "d", "e")
    assert not loaded.training
    images, shown = torch.randn(1, 3, 64, 64), [Shown((64, 64), (64, 64))]
    for ours, theirs in zip(loaded(images, shown), model(images, shown), strict=True):
        assert torch.equal(ours.boxes, theirs.boxes)
        assert torch.equal(ours.masks, theirs.masks)


@pytest.mark.parametrize("head", ["semantic_fpn", "upernet"])
def test_a_segmentation_file(head, tmp_path):
    model = segmenter.build(pyramid(), head, 4, channels=8).eval()
    tensors = fpn.to_published(model.state_dict())
    assert any(name.startswith("decode_head.conv_seg") for name in tensors)
    loaded, classes = load_segmenter(write(tmp_path / "s.pth", tensors))
    images = torch.randn(1, 3, 48, 40)
    assert classes is None
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_the_shapes_of_the_published_small_models():
    """As mmdetection's and mmsegmentation's own heads print them for the published settings."""
    with torch.device("meta"):
        backbone = Pyramid(xcit.build("xcit_small_12_p16"))
        found = to_published(detector.build(backbone, 80).state_dict())
        fpn_head = fpn.to_published(segmenter.build(backbone, "semantic_fpn", 150).state_dict())
        upernet = segmenter.build(backbone, "upernet", 150).state_dict()
    for name, shape in {
        "backbone.fpn1.3.weight": (384, 384, 2, 2),
        "neck.lateral_convs.3.conv.weight": (256, 384, 1, 1),
        "neck.fpn_convs.3.conv.weight": (256, 256, 3, 3),
        "rpn_head.rpn_conv.weight": (256, 256, 3, 3),
        "rpn_head.rpn_cls.weight": (3, 256, 1, 1),
        "rpn_head.rpn_reg.bias": (12,),
        "roi_head.bbox_head.shared_fcs.0.weight": (1024, 12544),
        "roi_head.bbox_head.fc_cls.weight": (81, 1024),
        "roi_head.bbox_head.fc_reg.weight": (320, 1024),
        "roi_head.mask_head.convs.3.conv.weight": (256, 256, 3, 3),
        "roi_head.mask_head.upsample.weight": (256, 256, 2, 2),
        "roi_head.mask_head.conv_logits.weight": (80, 256, 1, 1),
    }.items():
        assert found[name].shape == shape, name
    assert not any(name.startswith(("rpn.", "roi.")) or ".net." in name for name in found)
    assert fpn_head["decode_head.scale_heads.3.4.conv.weight"].shape == (128, 128, 3, 3)
    assert fpn_head["decode_head.conv_seg.weight"].shape == (150, 128, 1, 1)
    assert upernet["decode_head.bottleneck.conv.weight"].shape == (512, 384 + 2048, 3, 3)
    assert upernet["auxiliary_head.convs.0.conv.weight"].shape == (256, 384, 3, 3)


def test_files_that_do_not_fit(detection_file, tmp_path):
    _, tensors, path = detection_file
    lacking = {name: value for name, value in tensors.items() if name != "rpn_head.rpn_cls.bias"}
    with pytest.raises(UsageError, match=r"does not fit: tensors 1 missing \(rpn.head.cls_logits"):
        load_detector(write(tmp_path / "a.pth", lacking))
    with pytest.raises(UsageError, match=r"1 unknown \(other\)"):
        load_detector(write(tmp_path / "b.pth", {**tensors, "other": torch.zeros(1)}))
    with pytest.raises(UsageError, match=r"is of another kind: it has no decode_head.conv_seg"):
        load_segmenter(path)
    bare = {name.removeprefix("backbone."): v for name, v in tensors.items() if "blocks" in name}
    torch.save({"model": bare}, tmp_path / "c.pth")
    with pytest.raises(UsageError, match="no detection or segmentation file"):
        load_detector(tmp_path / "c.pth")
    with pytest.raises(UsageError, match="holds a backbone alone"):
        load_detector(write(tmp_path / "d2.pth", bare))
    spoilt = {**tensors, "rpn_head.rpn_cls.bias": torch.full((3,), float("nan"))}
    with pytest.raises(
        RunFailed, match=r"values that are not finite \(first rpn_head.rpn_cls.bias"
    ):
        load_detector(write(tmp_path / "e.pth", spoilt))
    (tmp_path / "f.pth").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(RunFailed, match="damaged or not a checkpoint"):
        load_detector(tmp_path / "f.pth")
    with pytest.raises(UsageError, match="there is no file"):
        load_detector(tmp_path / "g.pth")
