"""The pyramid against the published detection and segmentation backbone, and its plain properties."""

import pytest
import torch

from xdino.errors import UsageError
from xdino.xcit import XCiT
from xdino_transfer.pyramid import Pyramid, published_blocks, without_class_attention


def published(told):
    wanted = told["config"]
    network = XCiT(
        wanted["patch_size"],
        wanted["embed_dim"],
        wanted["depth"],
        wanted["num_heads"],
        eta=wanted["eta"],
        mlp_ratio=wanted["mlp_ratio"],
    )
    pyramid = Pyramid(network)
    assert list(pyramid.after) == wanted["out_indices"]
    return pyramid


def below(prefix, tensors):
    return {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("name", ["pyramid_p16", "pyramid_p8"])
def test_the_published_levels_gradients_and_statistics(name, downstream, agree):
    tensors, told = downstream(name)
    pyramid = published(told)
    pyramid.load_state_dict(below("state/", tensors), strict=True)
    pyramid.eval()
    with torch.no_grad():
        for i, shapes in enumerate(told["level_shapes"]):
            levels = pyramid(tensors[f"input/{i}"])
            assert [list(level.shape) for level in levels] == shapes
            for j, level in enumerate(levels):
                agree(f"level {i} {j}", level, tensors[f"level/{i}/{j}"], 1e-5)
    pyramid.train()
    levels = pyramid(tensors["train/input"])
    loss = sum((level * tensors[f"train/weight/{j}"]).sum() for j, level in enumerate(levels))
    loss.backward()
    for j, level in enumerate(levels):
        agree(f"level in training {j}", level, tensors[f"train/level/{j}"], 1e-5)
    zero = told["gradients_analytically_zero"]
    found = dict(pyramid.named_parameters())
    gradients = below("train/grad/", tensors)
    assert found.keys() == gradients.keys()
    for key, value in gradients.items():
        if key in zero:
            assert found[key].grad.abs().max() < 1e-4
        else:
            agree(f"gradient of {key}", found[key].grad, value, 1e-4)
    for key, value in below("train/state_after/", tensors).items():
        agree(key, pyramid.state_dict()[key], value, 1e-5)


def test_a_checkpointed_pyramid_has_the_same_gradients_and_statistics(downstream):
    tensors, told = downstream("pyramid_p8")
    found = []
    for checkpointed in (False, True):
        pyramid = published(told)
        pyramid.load_state_dict(below("state/", tensors))
        pyramid.train().set_grad_checkpointing(checkpointed)
        sum(level.square().mean() for level in pyramid(tensors["train/input"])).backward()
        kept = {n: p.grad for n, p in pyramid.named_parameters()}
        found.append(kept | dict(pyramid.named_buffers()))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_an_xcit_gives_its_parts_and_keeps_its_last_tokens():
    network = XCiT(16, 32, 3, 2).eval()
    pyramid = Pyramid(network).eval()
    assert pyramid.after == (0, 0, 1, 2)
    images = torch.randn(2, 3, 40, 24)
    tokens, h, w = network.patch_tokens(images)
    assert (h, w) == (3, 2)
    assert torch.equal(pyramid.tokens(images)[-1].flatten(2).transpose(1, 2), tokens)
    assert torch.equal(network.tokens_after(images, [0, 2])[0][1], tokens)
    own = without_class_attention(network.state_dict())
    new = {name for name in pyramid.state_dict() if name not in own}
    assert own.keys() < pyramid.state_dict().keys()
    assert all(name.startswith("fpn") for name in new)
    with pytest.raises(ValueError, match="blocks are numbered from 0 to 2, got"):
        network.tokens_after(images, [3])


def test_the_blocks_that_are_read():
    assert published_blocks(12) == (3, 5, 7, 11)
    assert published_blocks(24) == (7, 11, 15, 23)
    assert published_blocks(1) == (0, 0, 0, 0)
    with pytest.raises(UsageError, match="a pyramid needs patches of 16 or 8 pixels"):
        Pyramid(XCiT(4, 32, 2, 2))


def test_statistics_may_rest():
    pyramid = Pyramid(XCiT(16, 32, 2, 2))
    pyramid.rest_statistics()
    pyramid.train()
    before = {name: value.clone() for name, value in pyramid.named_buffers()}
    levels = pyramid(torch.randn(2, 3, 32, 32))
    sum(level.square().sum() for level in levels).backward()
    assert pyramid.blocks[0].training
    assert all(torch.equal(value, before[name]) for name, value in pyramid.named_buffers())
    assert pyramid.blocks[0].local_mp.bn.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("patch", [16, 8])
def test_a_strip_of_few_pixels_has_four_levels(patch):
    """Published pooling rounds down to no cell at all."""
    network = Pyramid(XCiT(patch, 32, 4, 2)).eval()
    with torch.no_grad():
        for height, width in ((5, 300), (300, 5), (9, 9)):
            levels = network(torch.randn(1, 3, height, width))
            assert all(min(level.shape[2:]) >= 1 for level in levels)
