"""Files of segmenters and detectors: rebuilt from themselves alone, or refused in a sentence."""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from xdino import checkpoint
from xdino.backbones import BackboneSpec
from xdino.errors import RunFailed, UsageError
from xdino_transfer import fpn
from xdino_transfer.dense_files import dense_task, read_dense, write_dense
from xdino_transfer.detection import detector
from xdino_transfer.detection.anchors import AnchorGrid
from xdino_transfer.detection.objects import Shown
from xdino_transfer.detection.published import to_published
from xdino_transfer.detection.roi import RegionSettings
from xdino_transfer.detection.rpn import RPNSettings
from xdino_transfer.detection.views import Views
from xdino_transfer.pyramid import Pyramid
from xdino_transfer.segmentation import segmenter
from xdino_transfer.segmentation import views as segmentation_views

SHAPE = {"embed_dim": 32, "depth": 4, "num_heads": 2}
SPEC = BackboneSpec("xcit_small_12_p16", shape=SHAPE, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
IMAGES = torch.linspace(-1, 1, 3 * 64 * 48).view(1, 3, 64, 48)


def segmenters(head):
    backbone = SPEC.build() if head == "linear_map" else Pyramid(SPEC.build(), (0, 1, 2, 3))
    return segmenter.build(backbone, head, 3, channels=8).eval()


def detectors():
    settings = RPNSettings(AnchorGrid(scale=4.0)), RegionSettings(score=0.0, most=7)
    return detector.build(
        Pyramid(SPEC.build()), 2, detector.Shape(12, 16, 8), *settings
    ).eval()  # fmt: skip


@pytest.mark.parametrize("head", ["semantic_fpn", "upernet", "linear_map"])
def test_a_segmenter_comes_back(head, tmp_path):
    model, path = segmenters(head), tmp_path / "model.safetensors"
    facts = {"iteration": 7, "init": "runs/a", "protocol": {"epochs": 3}}
    views = segmentation_views.TestViews(SPEC.mean, SPEC.std, longer=640, shorter=160)
    write_dense(path, model, facts, spec=SPEC, classes=("sky", "sea", "sand"), views=views)
    assert dense_task(path) == dense_task(tmp_path) == "segmentation"
    loaded = read_dense(tmp_path)  # a run directory
    assert (loaded.task, loaded.classes, loaded.spec) == (
        "segmentation",
        ("sky", "sea", "sand"),
        SPEC,
    )
    assert (loaded.mean, loaded.std, loaded.views) == (SPEC.mean, SPEC.std, views)
    assert {key: loaded.facts[key] for key in facts} == facts
    assert (loaded.name, loaded.named) == ("segmenter, iteration 7", True)
    assert loaded.origin.sha256 == checkpoint.sha256(path)
    assert not loaded.network.training
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    with torch.no_grad():
        assert torch.equal(loaded.network(IMAGES), model(IMAGES))
    again = tmp_path / "again.safetensors"
    write_dense(again, loaded.network, facts, spec=SPEC, classes=loaded.classes, views=views)
    assert again.read_bytes() == path.read_bytes()


def test_a_detector_comes_back(tmp_path):
    model, path = detectors(), tmp_path / "d.safetensors"
    views = Views(SPEC.mean, SPEC.std, sides=(64,), longer=200, test_side=96)
    write_dense(path, model, {}, spec=SPEC, classes=("cat", "dog"), views=views)
    loaded = read_dense(path)
    assert (loaded.task, loaded.classes, loaded.name) == ("detection", ("cat", "dog"), path.name)
    assert loaded.views == Views(SPEC.mean, SPEC.std, longer=200, test_side=96)
    assert loaded.network.rpn.settings == model.rpn.settings
    assert loaded.network.roi.settings == model.roi.settings
    shown = [Shown((64, 48), (64, 64))]
    (ours,), (theirs,) = loaded.network(IMAGES, shown), model(IMAGES, shown)
    assert len(ours.scores) == 7
    assert torch.equal(ours.boxes, theirs.boxes)
    assert torch.equal(ours.masks, theirs.masks)


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_published_files(kind, tmp_path):
    """As the published code saves them: `meta`, `state_dict`, an optimiser; the name from the shapes."""
    model = segmenters("semantic_fpn") if kind == "segmentation" else detectors()
    rename = fpn.to_published if kind == "segmentation" else to_published
    names = ("a", "b", "c")[: 3 if kind == "segmentation" else 2]
    state = {"state_dict": rename(model.state_dict()), "optimizer": {"state": {}}}
    torch.save({"meta": {"epoch": 1, "CLASSES": names}, **state}, tmp_path / "named.pth")
    torch.save({"meta": {"epoch": 1}, **state}, tmp_path / "nameless.pth")
    loaded = read_dense(tmp_path / "named.pth")
    assert (loaded.task, loaded.classes, loaded.named) == (kind, names, True)
    assert loaded.mean == (0.485, 0.456, 0.406)
    published = segmentation_views.TestViews if kind == "segmentation" else Views
    assert loaded.views == published(loaded.mean, loaded.std)
    assert loaded.spec.shape["embed_dim"] == 32
    assert dense_task(tmp_path / "named.pth") == kind
    nameless = read_dense(tmp_path / "nameless.pth")
    assert nameless.classes == ("0", "1", "2")[: len(names)]
    assert not nameless.named
    with pytest.raises(UsageError, match="is not on xcit_small_12_p16: its shapes are"):
        read_dense(tmp_path / "named.pth", "xcit_small_12_p16")
    # What was read of a published file is written as ours, and comes back.
    write_dense(
        tmp_path / "ours.safetensors", loaded.network, {}, spec=loaded.spec, classes=loaded.classes
    )
    assert read_dense(tmp_path / "ours.safetensors").network.state_dict().keys() == (
        loaded.network.state_dict().keys()
    )


def test_what_may_not_be_written(tmp_path):
    with pytest.raises(ValueError, match="2 names for the 3 classes"):
        write_dense(tmp_path / "a", segmenters("upernet"), {}, spec=SPEC, classes=("a", "b"))
    with pytest.raises(ValueError, match="may not be called task"):
        write_dense(
            tmp_path / "a", segmenters("upernet"), {"task": 1}, spec=SPEC, classes=("a", "b", "c")
        )


def changed(path, out, change):
    """A copy with another header, and a checksum that fits it: what a careless tool may write."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        told = json.loads(file.metadata()[checkpoint.HEADER_KEY])
    told.pop("sha256")
    change(told, tensors)
    save_file(tensors, out, {checkpoint.HEADER_KEY: json.dumps(told)})
    return out


DAMAGES = {
    "another head": lambda told, _: told["facts"]["network"].update(head="other"),
    "a block that is not there": lambda told, _: told["facts"]["network"].update(
        after=[1, 2, 3, 9]
    ),
    "no head": lambda told, _: told["facts"].pop("network"),
    "a class too few": lambda told, _: told["facts"].update(classes=["a", "b"]),
    "classes without names": lambda told, _: told["facts"].update(classes=[1, 2, 3]),
    "another width": lambda told, _: told["facts"]["network"].update(channels=1 << 40),
    "views of nothing": lambda told, _: told["facts"].update(views={"longer": 0}),
    "no spec": lambda told, _: told.pop("spec"),
    "a tensor too few": lambda _, tensors: tensors.pop("decode_head.conv_seg.bias"),
    "not finite": lambda _, tensors: tensors["decode_head.conv_seg.bias"].fill_(torch.nan),
}


def test_damaged_files(tmp_path):
    path = tmp_path / "s.safetensors"
    write_dense(path, segmenters("semantic_fpn"), {}, spec=SPEC, classes=("a", "b", "c"))
    for name, change in DAMAGES.items():
        with pytest.raises(RunFailed, match=r"is damaged|not finite"):
            read_dense(changed(path, tmp_path / f"{name}.safetensors", change))
    write_dense(tmp_path / "d", detectors(), {}, spec=SPEC, classes=("a", "b"))
    for key, value in {"beta": "x", "other": 1, "coder": {"stds": [1, 1, 1, 1], "odd": 1}}.items():
        with pytest.raises(RunFailed, match="is damaged: no network is as it says"):
            read_dense(
                changed(
                    tmp_path / "d",
                    tmp_path / "e.safetensors",
                    lambda told, _, key=key, value=value: told["facts"]["network"][
                        "regions"
                    ].update({key: value}),
                )
            )
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunFailed, match="damaged"):
        read_dense(cut)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    cut.write_bytes(content)
    with pytest.raises(RunFailed, match="its checksum is another"):
        read_dense(cut)


def test_files_of_something_else(tmp_path):
    backbone = SPEC.build()
    checkpoint.save_backbone(tmp_path / "b.safetensors", backbone, SPEC, iteration=1)
    with pytest.raises(UsageError, match="holds a backbone alone, which can neither segment"):
        read_dense(tmp_path / "b.safetensors")
    checkpoint.save_backbone(tmp_path / "c.safetensors", backbone, SPEC, task="classification")
    with pytest.raises(UsageError, match="holds a network for classification, which can neither"):
        read_dense(tmp_path / "c.safetensors")
    torch.save({"model": backbone.state_dict()}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match="can neither segment nor detect"):
        read_dense(tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"there is no run or file"):
        read_dense(tmp_path / "none")
    with pytest.raises(UsageError, match=r"holds no model.safetensors"):
        read_dense(tmp_path)
    (tmp_path / "text.txt").write_text("no weights")
    with pytest.raises(RunFailed, match="damaged or not a checkpoint"):
        read_dense(tmp_path / "text.txt")
    odd = [tmp_path, tmp_path / "none", *tmp_path.iterdir()]
    assert [dense_task(path) for path in odd] == [None] * len(odd)
    path = tmp_path / "s.safetensors"
    write_dense(path, segmenters("upernet"), {}, spec=SPEC, classes=("a", "b", "c"))
    with pytest.raises(UsageError, match="leave out --arch xcit_nano_12_p8"):
        read_dense(path, "xcit_nano_12_p8")
    with pytest.raises(UsageError, match="is a network for segmentation, which gives"):
        checkpoint.load_backbone(path)


def test_a_header_whose_length_begins_like_a_pickle(tmp_path):
    """The first byte of safetensors is a length's, and may be any."""
    model = segmenters("semantic_fpn")
    for extra in range(0, 256, 8):
        facts = {"x": "a" * extra}
        write_dense(tmp_path / "s", model, facts, spec=SPEC, classes=("a", "b", "c"))
        if (tmp_path / "s").read_bytes()[:1] == b"\x80":
            break
    else:
        pytest.fail("no such header was made")
    assert read_dense(tmp_path / "s").facts["x"] == facts["x"]


def test_statistics_are_the_specs(tmp_path):
    """A network of one channel comes back with one number of each."""
    spec = dataclasses.replace(SPEC, in_chans=1, mean=(0.5,), std=(0.25,))
    model = segmenter.build(Pyramid(spec.build()), "semantic_fpn", 2, channels=4)
    write_dense(tmp_path / "s", model, {}, spec=spec, classes=("a", "b"))
    assert read_dense(tmp_path / "s").mean == (0.5,)
