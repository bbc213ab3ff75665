"""The published heads, losses, test mode and scores of segmentation, and our own around them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from xdino.errors import UsageError
from xdino.xcit import XCiT
from xdino_transfer import fpn, rates
from xdino_transfer.pyramid import Pyramid
from xdino_transfer.segmentation import heads, segmenter
from xdino_transfer.segmentation.confusion import ConfusionMatrix, zero_is_void
from xdino_transfer.segmentation.segmenter import Segmenter, View, averaged, probabilities, total

from . import two_processes_confusion

NAMES = ("semantic_fpn", "upernet")


def below(prefix, tensors):
    return {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}


def levels_of(prefix, tensors):
    return [tensors[f"{prefix}/level/{i}"].clone().requires_grad_() for i in range(4)]


def published(name, tensors, told):
    """The segmenter of a golden vector, without a backbone."""
    wanted = told["config"]
    decode = wanted["decode_head"]
    widths, channels = decode["in_channels"], decode["channels"]
    if name == "semantic_fpn":
        neck = fpn.FPN(wanted["neck"]["in_channels"], wanted["neck"]["out_channels"])
        head, auxiliary = heads.SemanticFPN(widths, decode["num_classes"], channels), None
    else:
        neck, other = None, wanted["auxiliary_head"]
        pools = decode["pool_scales"]
        head = heads.UperNet(widths, decode["num_classes"], channels, pools=pools)
        auxiliary = heads.Auxiliary(other["in_channels"], other["num_classes"], other["channels"])
    model = Segmenter(nn.Identity(), neck, head, auxiliary)
    model.load_state_dict(fpn.from_published(below("state/", tensors)), strict=True)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_the_published_logits_and_test_mode(name, downstream, agree):
    tensors, told = downstream(name)
    model = published(name, tensors, told).eval()
    with torch.no_grad():
        for i in range(len(told["eval_images"])):
            levels = levels_of(f"eval/{i}", tensors)
            agree(f"logits {i}", model.decoded(levels), tensors[f"eval/{i}/logits"], 1e-5)
            if model.auxiliary_head is not None:
                other = model.auxiliary_head(levels)
                agree(f"auxiliary {i}", other, tensors[f"eval/{i}/aux_logits"], 1e-5)
        if model.neck is not None:
            for i, level in enumerate(model.neck(levels)):
                agree(f"neck {i}", level, tensors[f"eval/1/neck/{i}"], 1e-5)
        view = View(tuple(told["test"]["size"]))
        original = told["test"]["ori"]
        shown = probabilities(model.decoded(levels_of("test", tensors)), view, original)
        agree("probabilities", shown, tensors["test/probability"], 1e-5)
        assert torch.equal(shown[0].argmax(0), tensors["test/label"].long())
        views = (
            probabilities(
                model.decoded(levels_of(f"views/{i}", tensors)),
                View(tuple(case["size"]), case["flip"]),
                original,
            )
            for i, case in enumerate(told["views"])
        )
        assert torch.equal(averaged(views)[0].argmax(0), tensors["views/label"].long())


class Masked(nn.Module):
    """Dropout2d with the mask that was drawn."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask[:, :, None, None]


@pytest.mark.parametrize("name", NAMES)
def test_the_published_losses_and_gradients(name, downstream, agree):
    tensors, told = downstream(name)
    model = published(name, tensors, told).train()
    parts = {"decode_head": model.decode_head, "auxiliary_head": model.auxiliary_head}
    for head in filter(None, parts.values()):
        head.dropout = nn.Identity()
    levels, labels = levels_of("train", tensors), tensors["train/label"][:, 0]
    losses = model.losses_of(levels, labels)
    agree("loss", losses["decode"], tensors["train/decode.loss_seg"], 1e-5)
    agree("accuracy", losses["accuracy"], tensors["train/decode.acc_seg"][0], 1e-5)
    if "auxiliary" in losses:
        agree("auxiliary loss", losses["auxiliary"], tensors["train/aux.loss_seg"], 1e-5)
    agree("total", total(losses), tensors["train/loss"], 1e-5)
    total(losses).backward()
    found = dict(model.named_parameters())
    theirs = below("train/grad/", tensors)
    for i in range(4):
        agree(f"gradient of level {i}", levels[i].grad, theirs.pop(f"level/{i}"), 1e-4)
    gradients = fpn.from_published(theirs)
    assert gradients.keys() == found.keys()
    for key, value in gradients.items():
        agree(f"gradient of {key}", found[key].grad, value, 1e-4)
    for key, value in below("train/state_after/", tensors).items():
        agree(key, model.state_dict()[key], value, 1e-5)

    model = published(name, tensors, told).train()
    for part, mask in below("dropout/mask/", tensors).items():
        getattr(model, part).dropout = Masked(mask)
    levels = levels_of("train", tensors)
    loss = total(model.losses_of(levels, labels))
    agree("loss with dropped channels", loss, tensors["dropout/loss"], 1e-5)
    loss.backward()
    found = dict(model.named_parameters())
    for key, value in below("dropout/grad/", tensors).items():
        grad = levels[int(key[-1])].grad if key.startswith("level/") else found[key].grad
        agree(f"gradient of {key} with dropped channels", grad, value, 1e-4)


def test_whole_segmenters_train_on_any_size():
    images, labels = torch.randn(2, 3, 45, 70), torch.randint(0, 3, (2, 45, 70))
    labels[0] = 255
    for head in NAMES:
        model = segmenter.build(Pyramid(XCiT(16, 32, 4, 2)), head, 3, channels=8).train()
        losses = model.losses(images, labels)
        total(losses).backward()
        assert all(p.grad is not None for p in model.parameters())
    backbone = XCiT(8, 32, 2, 2)
    model = segmenter.build(backbone, "linear_map", 3).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    total(model.losses(images, labels)).backward()
    assert not backbone.training
    assert all(torch.equal(before[name], v) for name, v in backbone.state_dict().items())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"decode_head"}
    assert model(images).shape == (2, 3, 6, 9)


def test_what_cannot_be_built_is_said():
    pyramid, backbone = Pyramid(XCiT(16, 32, 4, 2)), XCiT(16, 32, 4, 2)
    for arguments, said in {
        (pyramid, "uppernet", 3): 'no head is called "uppernet": did you mean "upernet"',
        (pyramid, "upernet", 1): "tells 2 to 255 classes apart, got 1",
        (pyramid, "linear_map", 3): "a linear map reads a frozen backbone's tokens",
        (backbone, "upernet", 3): "upernet reads the four levels of an XCiT's pyramid",
    }.items():
        with pytest.raises(UsageError, match=said):
            segmenter.build(*arguments)


# Scores


def test_the_published_scores(downstream):
    tensors, told = downstream("miou")
    for case in ("plain", "zero_is_void"):
        matrix = ConfusionMatrix(told["num_classes"])
        i = 0
        while f"label/{i}" in tensors:
            labels = tensors[f"label/{i}"].numpy()
            labels = zero_is_void(labels) if case == "zero_is_void" else labels
            matrix.add(tensors[f"prediction/{i}"].numpy(), labels)
            i += 1
        np.testing.assert_array_equal(matrix.intersect, tensors[f"{case}/intersect"])
        np.testing.assert_array_equal(matrix.union, tensors[f"{case}/union"])
        np.testing.assert_array_equal(matrix.counts.sum(1), tensors[f"{case}/area_label"])
        np.testing.assert_array_equal(matrix.counts.sum(0), tensors[f"{case}/area_prediction"])
        scores, wanted = matrix.scores(), told["cases"][case]
        for ours, name in ((scores.miou, "mIoU"), (scores.macc, "mAcc"), (scores.aacc, "aAcc")):
            assert ours == pytest.approx(wanted[name], rel=1e-12)
        for ours, name in ((scores.iou, "IoU"), (scores.accuracy, "accuracy")):
            theirs = [np.nan if value is None else value for value in wanted[name]]
            np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_scores_are_those_of_a_loop_over_pixels():
    rng = np.random.default_rng(0)
    matrix, hits, seen, said = ConfusionMatrix(5), [0] * 5, [0] * 5, [0] * 5
    for shape in ((7, 5), (1, 9), (4, 4)):
        labels = rng.choice([0, 1, 2, 3, 255], shape).astype(np.uint8)  # 4 is never labelled
        predictions = rng.integers(0, 5, shape)
        matrix.add(predictions, labels)
        for label, found in zip(labels.flat, predictions.flat, strict=True):
            if label != 255:
                hits[label] += label == found
                seen[label] += 1
                said[found] += 1
    scores = matrix.scores()
    iou = [h / (a + b - h) for h, a, b in zip(hits, seen, said, strict=True)]
    assert scores.iou.tolist() == iou
    assert scores.miou == pytest.approx(np.mean(iou), rel=1e-15)
    assert scores.macc == np.mean([h / a for h, a in zip(hits, seen, strict=True) if a])
    assert scores.aacc == sum(hits) / sum(seen)


def test_two_processes_score_as_one(tmp_path):
    out, worker = tmp_path / "scores.json", Path(__file__).with_name("two_processes_confusion.py")
    port = str(20_000 + os.getpid() % 20_000)
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, str(worker), str(out)],
            env=os.environ | meeting | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
        )
        for rank in "01"
    ]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    alone = two_processes_confusion.scores()
    assert json.loads(out.read_text()) == [
        alone.miou, alone.macc, alone.aacc, *alone.accuracy[:5]
    ]  # fmt: skip


def test_scores_refuse_what_is_no_class():
    matrix = ConfusionMatrix(3)
    with pytest.raises(UsageError, match="no pixel of these pictures has a label"):
        matrix.scores()
    with pytest.raises(UsageError, match="a pixel has class 3, and there are 0 to 2"):
        matrix.add(np.zeros(1, int), np.array([3]))


# Rates


def test_the_published_rates(downstream):
    tensors, told = downstream("lr_schedules")
    case = told["schedules"]["poly_80000"]
    found = rates.poly(case["iterations"], case["base"], case["power"], case["warmup_iters"])
    at = tensors["poly_80000/iteration"].numpy()
    np.testing.assert_allclose(found[at], tensors["poly_80000/lr"], rtol=1e-12)
    case = told["schedules"]["step_700"]
    found = rates.steps(case["epochs"], case["epoch_length"], case["base"], case["step"])
    at = tensors["step_700/iteration"].numpy()
    np.testing.assert_allclose(found[at], tensors["step_700/lr"], rtol=1e-12)
    with pytest.raises(UsageError, match=r"a warm-up of 1,500 iterations does not fit into .* 100"):
        rates.poly(100, 1e-4)


def test_weight_decay_spares_layer_norms_alone():
    pyramid = Pyramid(XCiT(16, 32, 2, 2))
    decayed, plain = rates.only_norms(pyramid, 0.01)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    spared = {id(p) for p in plain["params"]}
    assert len(spared) == 2 * 3 * 2
    for name, parameter in pyramid.named_parameters():
        assert (id(parameter) in spared) == (".norm" in name), name
