"""What every backbone promises: names of tensors, tokens of blocks, where it comes from."""

import copy
from pathlib import Path

import pytest
import timm
import torch

from xdino import xcit
from xdino.backbone import Backbone, Origin, Preprocessing
from xdino.backbones import BackboneSpec
from xdino.timm_backbone import TimmBackbone

SMALL = {"img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 0}


@pytest.fixture
def vit():
    network = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **SMALL)
    return TimmBackbone(network).eval()


def test_a_timm_network_keeps_its_names(vit):
    names = list(vit.network.state_dict())
    whole = torch.nn.ModuleDict({"backbone": vit})
    for module, prefix in ((vit, ""), (whole, "backbone.")):
        assert list(module.state_dict()) == [prefix + name for name in names]
        assert [n for n, _ in module.named_parameters()] == [prefix + name for name in names]
    other = copy.deepcopy(vit)
    torch.nn.init.ones_(other.network.cls_token)
    whole.load_state_dict({f"backbone.{n}": t for n, t in other.state_dict().items()}, strict=True)
    assert vit.network.cls_token.sum() == 48
    vit.load_state_dict(vit.network.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        vit.load_state_dict({}, strict=True)
    assert {m for _, m in vit.named_modules()} == {vit, *vit.network.modules()}


@torch.no_grad()
def test_tokens_of_blocks_are_timms(vit):
    images = torch.randn(2, 3, 50, 40)  # whole patches of it: 48 x 32
    theirs = vit.network.forward_intermediates(
        images[..., :48, :32], [0, 2], return_prefix_tokens=True, norm=True, intermediates_only=True
    )
    for ours, (maps, prefix) in zip(vit.forward_intermediates(images, [0, 2]), theirs, strict=True):
        assert torch.equal(ours[0], maps)
        assert torch.equal(ours[1], prefix)
    token, patches = vit.tokens(images)
    assert torch.equal(token, theirs[-1][1][:, 0])
    assert torch.equal(patches, theirs[-1][0].permute(0, 2, 3, 1))
    assert vit.class_attention(images[..., :48, :32])[0].shape == (2, 3, 1 + 6)


@torch.no_grad()
def test_tokens_of_an_xcit(agree):
    network = xcit.XCiT(patch_size=8, embed_dim=16, depth=3, num_heads=2).eval()
    theirs = timm.models.xcit.Xcit(
        patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=0, eta=1.0, tokens_norm=True
    ).eval()
    from xdino.weight_names import to_timm_names

    theirs.load_state_dict(to_timm_names(network.state_dict()), strict=True)
    images = torch.randn(2, 3, 32, 24)
    found = network.forward_intermediates(images, 2)
    wanted = theirs.forward_intermediates(images, 2, intermediates_only=True)
    for (maps, prefix), expected in zip(found, wanted, strict=True):
        agree("maps", maps, expected, 1e-5)
        assert prefix.shape == (2, 0, 16)
    _, patches = network.tokens(images)
    assert torch.equal(patches, found[-1][0].permute(0, 2, 3, 1))
    assert [m.shape for m in network.class_attention(images)] == [(2, 2, 13)] * 2
    assert len(network.class_attention(images, [2])) == 1


def test_what_it_says_of_itself():
    spec = BackboneSpec("test_resnet", 1, {}, 40, 48, (0.4,), (0.2,))
    backbone = spec.build()
    assert isinstance(backbone, Backbone)
    assert (backbone.spec, backbone.kind, backbone.in_chans) == (spec, "ResNet", 1)
    assert backbone.preprocessing == Preprocessing(40, 48, (0.4,), (0.2,))
    assert backbone.preprocessing.channels == 1
    assert backbone.origin == Origin()


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"iteration": 7}, "teacher, iteration 7"),
        ({"iteration": 7, "role": "student"}, "student, iteration 7"),
        ({"role": "student"}, "w.pth, student"),
        ({}, "w.pth"),
    ],
)
def test_names_of_origins(facts, name):
    assert Origin(Path("a/w.pth"), "0", facts).name == name
