"""Class and patch tokens of XCiT and of vision transformers, and their pooling."""

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from xdino.backbone import Backbone
from xdino.dino_vit.network import DINOViT, WholePatches
from xdino.errors import UsageError
from xdino.timm_backbone import TimmBackbone
from xdino.xcit import XCiT
from xdino_eval.suite.descriptors import class_and_gem, class_token, gem, multi_scale

GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "suite.safetensors")


SHAPE = {
    "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 1,
    "num_classes": 0, "norm_layer": partial(nn.LayerNorm, eps=1e-6), "dynamic_img_size": True,
}  # fmt: skip


@pytest.fixture
def published() -> TimmBackbone:
    """The transformer that the published code gave the golden tokens with."""
    vit = DINOViT(**SHAPE, embed_layer=WholePatches)
    prefix = "weights."
    vit.load_state_dict({k[len(prefix) :]: v for k, v in GOLDEN.items() if k.startswith(prefix)})
    return TimmBackbone(vit).eval()


@torch.no_grad()
def test_a_published_transformer_at_any_size(published, agree):
    """Positions are stretched as published, and rows that fill no patch are ignored."""
    token, patches = published.tokens(GOLDEN["images"])
    assert patches.shape == (2, 5, 3, 16)
    agree("patches", patches.flatten(1, 2), GOLDEN["tokens"][:, 1:], 1e-5)
    agree("class", token, GOLDEN["tokens"][:, 0], 1e-5)
    agree("class alone", class_token(published, GOLDEN["images"]), GOLDEN["tokens"][:, 0], 1e-5)
    timms = TimmBackbone(VisionTransformer(**SHAPE))
    timms.load_state_dict(published.state_dict())
    stretched = class_token(timms.eval(), GOLDEN["images"])  # timm's way: antialiased
    assert (stretched - token).abs().max() > 1e-3


@torch.no_grad()
def test_at_its_own_size_it_is_what_timm_computes(published, agree):
    token, patches = published.tokens(GOLDEN["square"])
    agree("golden", patches.flatten(1, 2), GOLDEN["square_tokens"][:, 1:], 1e-5)
    agree("timm", token, published(GOLDEN["square"]), 1e-5)


@torch.no_grad()
def test_xcit_gives_the_tokens_before_class_attention(agree):
    xcit = XCiT(patch_size=8, embed_dim=16, depth=1, num_heads=2).eval()
    images = torch.randn(2, 3, 44, 27)
    token, patches = xcit.tokens(images)
    assert patches.shape == (2, *xcit.grid(44, 27), 16)
    assert torch.equal(token, xcit(images))
    assert torch.equal(class_token(xcit, images), token)
    assert torch.equal(patches.flatten(1, 2), xcit.patch_tokens(images)[0])


@torch.no_grad()
def test_other_transformers_of_timm(agree):
    """Registers are no patches, and their positions are timm's business."""
    vit = TimmBackbone(VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0,
        reg_tokens=3, dynamic_img_size=True,
    )).eval()  # fmt: skip
    images = torch.randn(2, 3, 44, 27)
    token, patches = vit.tokens(images)
    everything = vit.network.forward_features(
        images[..., :40, :24]
    )  # class token, registers, patches
    agree("class", token, everything[:, 0], 1e-6)
    agree("patches", patches.flatten(1, 2), everything[:, 4:], 1e-6)
    agree("class alone", class_token(vit, images), everything[:, 0], 1e-6)


def test_sentences(published):
    with pytest.raises(UsageError, match="40 x 7 pixels is smaller than a patch of 8"):
        published.tokens(torch.zeros(1, 3, 7, 40))
    resnet = TimmBackbone(timm.create_model("test_resnet", num_classes=0))
    for ask in (resnet.require_patches, lambda: resnet.tokens(torch.zeros(1, 3, 32, 32))):
        with pytest.raises(UsageError, match="a ResNet has no class attention and no patch tokens"):
            ask()
    rigid = TimmBackbone(VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0, reg_tokens=1
    ))  # fmt: skip
    with pytest.raises(UsageError, match="takes images of 32 x 32 pixels only, got 40 x 32"):
        rigid.tokens(torch.zeros(1, 3, 32, 44))


def test_gem():
    patches = torch.tensor([[1.0, 3.0], [-5.0, 1.0]]).view(1, 2, 2, 1)
    assert gem(patches, 1).item() == pytest.approx(5 / 4, abs=1e-5)  # -5 counts as 1e-6
    assert gem(patches).item() == pytest.approx(((1 + 81 + 1) / 4) ** 0.25)
    assert torch.allclose(gem(torch.full((1, 3, 2, 4), 2.0)), torch.full((1, 4), 2.0))


def test_class_and_gem(patch_colours, paint):
    image = torch.from_numpy(paint(30, 16, 24)).permute(2, 0, 1)[None] / 255
    found = class_and_gem(patch_colours, image)
    colour = image[0, :, 0, 0]
    assert torch.allclose(found[0], torch.cat((colour, colour.clamp(1e-6))), atol=1e-5)


def test_multi_scale(colours):
    """The mean of what the network says of three sizes, of length 1."""
    shapes = []

    class Sizes(Backbone):
        def forward(self, images):
            shapes.append(tuple(images.shape[2:]))
            return torch.tensor([[float(images.shape[2]), 1.0]])

    found = multi_scale(Sizes(), torch.zeros(1, 3, 224, 100))
    assert shapes == [(224, 100), (158, 70), (112, 50)]
    mean = torch.tensor([(224 + 158 + 112) / 3, 1.0])
    assert torch.allclose(found[0], mean / mean.norm())
    with pytest.raises(UsageError, match=r"9 x 1 pixels is too small for the scale 0\.5"):
        multi_scale(colours, torch.zeros(1, 3, 1, 9))
