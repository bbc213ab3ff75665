"""Every part of the published detector, and the whole of it."""

import numpy as np
import pytest
import torch
from torch import nn

from xdino_transfer.detection import roi, rpn
from xdino_transfer.detection.boxes import BoxCoder, Pooling, suppressed
from xdino_transfer.detection.detector import Detector
from xdino_transfer.detection.masks import pasted
from xdino_transfer.detection.matching import Sample
from xdino_transfer.detection.objects import Objects, Shown
from xdino_transfer.detection.published import from_published, to_published
from xdino_transfer.detection.roi import RegionHeads
from xdino_transfer.detection.rpn import RegionProposals
from xdino_transfer.fpn import FPN


def below(prefix, tensors):
    return {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}


def unpacked(packed, *shape):
    bits = np.unpackbits(packed.numpy(), axis=1)[:, : int(np.prod(shape))]
    return torch.from_numpy(bits.reshape(len(packed), *shape))


def detector_of(tensors, told):
    """The published small detector, which learns from all that it sees."""
    wanted = told["config"]
    neck, roi_head = wanted["neck"], wanted["roi_head"]
    width = neck["out_channels"]
    model = Detector(
        nn.Identity(),
        FPN(neck["in_channels"], width, extra=True),
        RegionProposals(width, rpn.without_sampling(rpn.RPNSettings())),
        RegionHeads(
            width,
            told["num_classes"],
            roi_head["bbox_head"]["fc_out_channels"],
            roi_head["mask_head"]["conv_out_channels"],
            roi.without_sampling(roi.RegionSettings()),
        ),
    )
    model.load_state_dict(from_published(below("state/", tensors)), strict=True)
    return model


@pytest.fixture(scope="module")
def detector(downstream):
    tensors, told = downstream("detector")
    return detector_of(tensors, told).eval(), tensors, told


def shown_in_training(told):
    return [Shown(tuple(case["img"]), tuple(case["pad"])) for case in told["images"]]


def shown_in_tests(told):
    return [Shown(*(tuple(case[key]) for key in ("img", "pad", "ori"))) for case in told["tests"]]


def objects_of(tensors, told):
    found = []
    for i, picture in enumerate(shown_in_training(told)):
        masks = tensors[f"image/{i}/masks_packed"]
        shape = picture.padded
        masks = unpacked(masks, *shape) if len(masks) else torch.zeros(0, *shape)
        found.append(Objects(tensors[f"image/{i}/boxes"], tensors[f"image/{i}/labels"], masks))
    return found


def levels_of(prefix, tensors, count=4):
    return [tensors[f"{prefix}{i}"].clone() for i in range(count)]


def gradients(model):
    """By the published names; of what took no part nothing."""
    return to_published({n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def same_set(ours, theirs, tolerance=1e-3):
    """Boxes [N, 4] and scores [N] (and labels) of both, matched by the nearest box."""
    boxes, scores, *labels = ours
    other_boxes, other_scores, *other_labels = theirs
    assert len(boxes) == len(other_boxes)
    apart = (boxes[:, None] - other_boxes[None]).abs().amax(2)
    for own, other in zip(labels, other_labels, strict=True):
        apart = apart + 1e6 * (own[:, None] != other[None])
    apart = apart + 1e3 * ((scores[:, None] - other_scores[None]).abs() > 1e-5)
    nearest = apart.min(1)
    assert nearest.values.max() <= tolerance
    assert len(nearest.indices.unique()) == len(boxes)
    return nearest.indices


# Boxes


def test_boxes_are_coded_as_published(downstream, agree):
    tensors, told = downstream("detector_boxes")
    references, objects = tensors["coder/reference"], tensors["coder/objects"]
    for name, stds in told["stds"].items():
        coder = BoxCoder(tuple(stds))
        deltas = tensors[f"coder/{name}/deltas"]
        encoded = coder.encode(references, objects)
        agree(f"{name} encoded", encoded, tensors[f"coder/{name}/encoded"], 1e-5)
        decoded = coder.decode(references, deltas)
        agree(f"{name} decoded", decoded, tensors[f"coder/{name}/decoded"], 1e-5)
        cut = coder.decode(references, deltas, tuple(told["clip"]))
        agree(f"{name} clipped", cut, tensors[f"coder/{name}/decoded_clipped"], 1e-5)
        near = encoded[:, 2:].mul(coder.stds[2]).abs().amax(1) < coder.widest
        back = coder.decode(references, encoded)
        agree(f"{name} there and back", back[near], objects[near], 1e-5)


def test_boxes_are_suppressed_as_published(downstream):
    tensors, _ = downstream("detector_boxes")
    boxes, scores, groups = (tensors[f"nms/{key}"] for key in ("boxes", "scores", "groups"))
    for threshold in (0.5, 0.7):
        kept = suppressed(boxes, scores, groups, threshold)
        assert torch.equal(kept, tensors[f"nms/{threshold}/kept"])
    many = boxes.repeat(200, 1)  # one by one
    found = suppressed(many, scores.repeat(200), groups.repeat(200), 0.5)
    assert len(found) == len(tensors["nms/0.5/kept"])
    assert not len(suppressed(boxes[:0], scores[:0], groups[:0], 0.5))


def test_regions_are_pooled_as_published(downstream, agree):
    tensors, told = downstream("detector_boxes")
    rois = tensors["roi_align/rois"]
    one = Pooling(strides=(told["roi_align"]["stride"],))
    order = torch.argsort(rois[:, 0], stable=True)
    boxes = [rois[rois[:, 0] == i, 1:] for i in range(len(tensors["roi_align/map"]))]
    for size in (7, 14):
        found = one([tensors["roi_align/map"]], boxes, size)
        agree(f"features {size}", found, tensors[f"roi_align/{size}"][order], 1e-5)
    levels = Pooling().levels_of(tensors["roi_levels/rois"][:, 1:])
    assert torch.equal(levels, tensors["roi_levels/level"].long())


# Proposals


def test_proposals_and_their_losses_are_the_published_ones(detector, downstream, agree):
    model, whole, facts = detector
    tensors, _ = downstream("detector_rpn")
    levels = [level.requires_grad_() for level in levels_of("level/", whole)]
    batch, shown = tuple(facts["batch"]), shown_in_training(facts)
    boxes = [own.boxes for own in objects_of(whole, facts)]
    features = model.neck(levels)
    outputs = model.rpn(features)
    for i, (feature, logits, deltas) in enumerate(zip(features, *outputs, strict=True)):
        agree(f"neck {i}", feature, tensors[f"neck/{i}"], 1e-5)
        agree(f"logits {i}", logits, tensors[f"logits/{i}"], 1e-5)
        agree(f"deltas {i}", deltas, tensors[f"deltas/{i}"], 1e-5)
    for i, anchors in enumerate(model.rpn.anchors(outputs[0], batch)):
        assert torch.equal(anchors, tensors[f"anchors/{i}"])
    samples = []
    for i, picture in enumerate(shown):
        assigned = model.rpn.assign(outputs[0], batch, picture, boxes[i])
        inside = tensors["valid"][i]
        theirs = tensors["assigned"][i].long()
        assert torch.equal(assigned[inside], theirs[inside])
        assert (assigned[~inside] == -1).all()
        samples.append(model.rpn.settings.sampler(assigned))
        positive = tensors["positive"]
        assert torch.equal(samples[-1].positive, positive[positive[:, 0] == i, 1])
    found = model.rpn.losses(outputs, batch, samples, boxes)
    agree("class", found["rpn_class"], tensors["loss_cls"], 1e-5)
    agree("box", found["rpn_box"], tensors["loss_bbox"], 1e-5)
    (found["rpn_class"].sum() + found["rpn_box"].sum()).backward()
    ours, theirs = gradients(model), below("grad/", tensors)
    for i in (1, 2, 3):
        agree(f"gradient of level {i}", levels[i].grad, theirs.pop(f"level/{i}"), 1e-4)
    for name, value in theirs.items():
        agree(f"gradient of {name}", ours[name], value, 1e-4)
    drawn = []
    for i, picture in enumerate(shown):
        assigned = model.rpn.assign(outputs[0], batch, picture, boxes[i])
        chosen = (tensors[f"sampled/{i}/{kind}"].long() for kind in ("positive", "negative"))
        drawn.append(Sample.of(assigned, *chosen))
    found = model.rpn.losses(outputs, batch, drawn, boxes)
    agree("class of a sample", found["rpn_class"], tensors["sampled/loss_cls"], 1e-5)
    agree("box of a sample", found["rpn_box"], tensors["sampled/loss_bbox"], 1e-5)
    kept = model.rpn.settings.train
    for i, ours in enumerate(model.rpn.proposals(outputs, batch, shown, kept)):
        theirs = tensors[f"proposals/{i}"]
        same_set(ours, (theirs[:, :4], theirs[:, 4]))


def test_what_is_sampled(downstream):
    tensors, told = downstream("detector_rpn")
    facts = told["sampled"]
    sampler = rpn.RPNSettings().sampler
    assert (sampler.count, sampler.positives) == (facts["num"], facts["positive_fraction"])
    for i, (positive, negative) in enumerate(facts["counts"]):
        assigned = tensors["assigned"][i].long()
        found = sampler(assigned)
        assert (len(found.positive), len(found.negative)) == (positive, negative)
        assert (assigned[found.positive] == found.objects + 1).all()
        assert (assigned[found.negative] == 0).all()
        assert len(found.negative.unique()) == negative
        other = sampler(assigned).negative
        assert not torch.equal(other, found.negative)  # 256 of thousands, drawn again


# Regions


def region_inputs(detector, downstream):
    model, whole, facts = detector
    tensors, _ = downstream("detector_roi")
    levels = [x.requires_grad_() for x in levels_of("neck/", downstream("detector_rpn")[0], 5)]
    return model, whole, facts, tensors, levels


def test_regions_and_their_losses_are_the_published_ones(detector, downstream, agree):
    model, whole, facts, tensors, levels = region_inputs(detector, downstream)
    heads, objects = model.roi, objects_of(whole, facts)
    regions, drawn = [], []
    for i, own in enumerate(objects):
        candidates, sample = heads.sample(tensors[f"image/{i}/proposals"][:, :4], own)
        assert torch.equal(sample.positive, tensors[f"image/{i}/positive"].long())
        assert torch.equal(sample.negative, tensors[f"image/{i}/negative"].long())
        assert torch.equal(sample.objects, tensors[f"image/{i}/assigned"].long())
        regions.append(heads.regions(candidates, sample, own))
        chosen = [tensors[f"sampled/{i}/{kind}"].long() for kind in ("positive", "negative")]
        place = {int(number): j for j, number in enumerate(sample.positive)}
        whose = sample.objects[[place[int(number)] for number in chosen[0]]]
        drawn.append(heads.regions(candidates, Sample(*chosen, whose), own))
    boxes = [own.boxes for own in regions]
    agree("regions", torch.cat(boxes), tensors["rois"][:, 1:], 1e-6)
    assert torch.equal(heads.settings.pooling.levels_of(torch.cat(boxes)), tensors["levels"].long())
    labels = torch.cat([own.labels for own in regions])
    assert torch.equal((labels - 1) % (told_classes := heads.classes + 1), tensors["labels"])
    targets = torch.cat([heads.targets(*pair) for pair in zip(regions, objects, strict=True)])
    agree("targets", targets, tensors["targets"][labels > 0], 1e-5)
    logits, deltas = heads.classified(levels, boxes)
    agree("logits", logits.roll(-1, 1), tensors["logits"], 1e-5)
    agree("deltas", deltas[:, 1:].flatten(1), tensors["deltas"], 1e-5)
    assert logits.shape[1] == told_classes
    masks = torch.cat([heads.mask_targets(*pair) for pair in zip(regions, objects, strict=True)])
    assert torch.equal(masks, unpacked(tensors["mask_targets_packed"], 28, 28).float())
    positive = [own.boxes[: len(own.objects)] for own in regions]
    found = heads.masked(levels, positive)[: len(tensors["mask_logits"]), 1:]
    agree("masks", found, tensors["mask_logits"], 1e-5)
    losses = heads.losses(levels, regions, objects)
    for name, theirs in (("class", "loss_cls"), ("box", "loss_bbox"), ("mask", "loss_mask")):
        agree(name, losses[name].view(-1), tensors[theirs].view(-1), 1e-5)
    sum(losses.values()).backward()
    ours, theirs = gradients(model), below("grad/", tensors)
    for i in (1, 2, 3):
        found = torch.zeros_like(levels[i]) if levels[i].grad is None else levels[i].grad
        agree(f"gradient of level {i}", found, theirs.pop(f"level/{i}"), 1e-4)
    for name, value in theirs.items():
        agree(f"gradient of {name}", ours[f"roi_head.{name}"], value, 1e-4)
    losses = heads.losses(levels, drawn, objects)
    for name, other in (("class", "loss_cls"), ("box", "loss_bbox"), ("mask", "loss_mask")):
        own = losses[name].view(-1)
        agree(f"{name} of a sample", own, tensors[f"sampled/{other}"].view(-1), 1e-5)


def same_detections(found, prefix, tensors, size):
    theirs = [tensors[f"{prefix}/{key}"] for key in ("boxes", "scores", "labels")]
    which = same_set((found.boxes, found.scores, found.labels), theirs)
    masks = unpacked(tensors[f"{prefix}/masks_packed"], *size)
    return int((found.masks != masks[which].bool()).sum())


def test_regions_are_judged_as_published(detector, downstream):
    model, whole, facts, tensors, _ = region_inputs(detector, downstream)
    for i, picture in enumerate(shown_in_tests(facts)):
        levels = model.neck(levels_of(f"test/{i}/level/", whole))
        proposals = tensors[f"test/{i}/proposals"][:, :4]
        (found,) = model.roi.detect(levels, [proposals], [picture])
        assert same_detections(found, f"test/{i}", tensors, picture.original) <= 5


# The whole


def test_the_whole_detector_learns_as_published(downstream, agree):
    tensors, told = downstream("detector")
    model = detector_of(tensors, told).train()
    levels = [level.requires_grad_() for level in levels_of("level/", tensors)]
    shown, objects = shown_in_training(told), objects_of(tensors, told)
    losses = model.losses_of(levels, tuple(told["batch"]), shown, objects)
    for name, theirs in {
        "rpn_class": "loss_rpn_cls", "rpn_box": "loss_rpn_bbox", "class": "loss_cls",
        "box": "loss_bbox", "mask": "loss_mask",
    }.items():  # fmt: skip
        agree(name, losses[name].view(-1), tensors[f"train/{theirs}"].view(-1), 1e-5)
    total = sum(loss.sum() for loss in losses.values())
    agree("total", total, tensors["train/total"], 1e-5)
    total.backward()
    ours, theirs = gradients(model), below("train/grad/", tensors)
    for i in (2, 3):
        agree(f"gradient of level {i}", levels[i].grad, theirs.pop(f"level/{i}"), 5e-3)
    for name, value in theirs.items():
        agree(f"gradient of {name}", ours[name], value, 5e-3)


def test_the_whole_detector_finds_what_the_published_one_does(detector):
    model, tensors, told = detector
    for i, picture in enumerate(shown_in_tests(told)):
        levels = levels_of(f"test/{i}/level/", tensors)
        with torch.no_grad():
            outputs = model.rpn(model.neck(levels))
        kept = model.rpn.settings.test
        ((boxes, scores),) = model.rpn.proposals(outputs, picture.padded, [picture], kept)
        theirs = tensors[f"test/{i}/proposals"]
        same_set((boxes, scores), (theirs[:, :4], theirs[:, 4]))
        (found,) = model.detect_in(levels, picture.padded, [picture])
        assert same_detections(found, f"test/{i}", tensors, picture.original) <= 5


def test_names_go_there_and_back(downstream):
    tensors, _ = downstream("detector")
    state = below("state/", tensors)
    back = to_published(from_published(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(value, back[name]) for name, value in state.items())


def test_a_box_without_an_area_is_a_stripe_as_published():
    boxes = torch.tensor([[2.5, 2.0, 2.5, 6.0], [1.0, 0.0, 6.0, 0.0], [0.0, 0.0, 8.0, 8.0]])
    upright, lying, whole = pasted(torch.ones(3, 28, 28), boxes, (8, 8))
    assert upright.nonzero()[:, 0].unique().tolist() == [2, 3, 4, 5]
    assert upright.nonzero()[:, 1].unique().tolist() == [1, 2, 3]
    assert lying.nonzero()[:, 0].unique().tolist() == [0]
    assert whole.all()


def test_regions_of_half_numbers_lie_where_they_do():
    """A thousand pixels from the left, bfloat16 knows every fourth place."""
    ramp = torch.arange(300.0).expand(1, 1, 40, 300) % 8  # exact in half numbers
    boxes = [torch.tensor([[1001.0, 10, 1041, 50]])]
    pooling = Pooling()
    wanted = pooling([ramp] * 4, boxes, 7)
    for half in (torch.bfloat16, torch.float16):
        found = pooling([ramp.to(half)] * 4, boxes, 7)
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)
