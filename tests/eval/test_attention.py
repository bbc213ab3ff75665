"""Class-attention maps of XCiT and of vision transformers, their masks, XCA's matrices."""

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_sample_image

from xdino.backbone import Spec
from xdino.backbones import BackboneSpec
from xdino.errors import UsageError
from xdino.timm_backbone import TimmBackbone
from xdino_eval.attention.maps import (
    class_attention_maps,
    mask,
    mass_threshold,
    network_input,
    patch_of_pixel,
)
from xdino_eval.backbone_tokens import Lattice, lattice
from xdino_eval.features import evaluating

SHAPE = {"embed_dim": 32, "depth": 1, "num_heads": 4}


@pytest.fixture
def xcit():
    spec = BackboneSpec("xcit_nano_12_p16", shape=SHAPE, input_size=64, resize=72)
    return spec.build().eval()


def test_maps_are_the_softmax_without_the_class_token(xcit):
    image = np.ascontiguousarray(load_sample_image("china.jpg")[::4, ::4])  # [107, 160, 3]
    xcit.train()
    maps = class_attention_maps(xcit, image, size=90)
    assert xcit.training
    assert [layer.shape for layer in maps.layers] == [(4, 6, 9)] * 2, "90 x 134 px: ceil(side / 16)"
    for layer in maps.layers:
        assert layer.dtype == np.float32
        assert (layer > 0).all()
        assert (layer.sum((1, 2)) < 1).all()
    assert class_attention_maps(xcit, image).layers[0].shape == (4, 4, 6), "the backbone's size"


def test_one_channel():
    spec = BackboneSpec("xcit_nano_12_p8", 1, SHAPE, 28, 28, (0.5,), (0.5,))
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 1), dtype=np.uint8)
    assert class_attention_maps(spec.build(), image).layers[1].shape == (4, 4, 4)


def test_other_backbones_are_refused(frozen):
    with pytest.raises(UsageError, match="a Frozen has no class attention"):
        class_attention_maps(frozen, np.zeros((8, 8, 3), np.uint8))
    resnet = BackboneSpec("resnet18").build()
    with pytest.raises(UsageError, match="a ResNet has no class attention and no patch tokens"):
        class_attention_maps(resnet, np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(UsageError, match="cross-covariance attention is an XCiT's, and a ResNet"):
        resnet.channel_attention(torch.zeros(1, 3, 64, 64))
    pooled = judged(timm.create_model("vit_base_patch16_gap_224", num_classes=0, embed_dim=32,
                                      depth=1, num_heads=2, dynamic_img_size=True))  # fmt: skip
    with pytest.raises(UsageError, match="without a class token"):
        class_attention_maps(pooled, np.zeros((64, 64, 3), np.uint8))


def test_bad_images_and_layers(xcit):
    image = np.zeros((40, 40, 3), np.uint8)
    with pytest.raises(
        UsageError, match="there is no class-attention layer 3: choose one from 1 to 2"
    ):
        class_attention_maps(xcit, image, layers=[3])
    with pytest.raises(
        UsageError, match="an image of 40 x 15 pixels is smaller than a patch of 16"
    ):
        class_attention_maps(xcit, image[:15])
    with pytest.raises(UsageError, match="at least a patch of 16"):
        class_attention_maps(xcit, image, size=12)


def test_a_layer_alone_is_that_layer(xcit):
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    both, second = class_attention_maps(xcit, image), class_attention_maps(xcit, image, layers=[2])
    assert both.names == ("layer1", "layer2")
    assert second.names == ("layer2",)
    assert np.array_equal(second.layers[0], both.layers[1])


# --- vision transformers ----------------------------------------------------------------------

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0, "dynamic_img_size": True}


def judged(network) -> TimmBackbone:
    """What `BackboneSpec.build` makes of a network."""
    backbone = TimmBackbone(network)
    backbone.spec = Spec("", 3, {}, 64, 72, (0.5,) * 3, (0.2,) * 3)
    return backbone.eval()


def awake(network):
    """The same with random positions, registers and norms, which start as zeros and ones."""
    with torch.no_grad():
        for name, value in network.named_parameters():
            if "norm" in name or "token" in name or "pos_embed" in name:
                value.add_(torch.randn_like(value) * 0.3)
    return judged(network)


def explicit(network, inputs, block: int) -> torch.Tensor:
    """Weights [B, H, M, M] of a block as timm itself computes them when it may not fuse them."""
    seen = []
    attention = network.blocks[block].attn
    attention.fused_attn = False
    handle = attention.attn_drop.register_forward_hook(lambda m, i, out: seen.append(out))
    network.forward_features(inputs)
    handle.remove()
    attention.fused_attn = True
    return seen[0]


@pytest.mark.parametrize(
    ("name", "extra", "prefix"),
    [
        ("vit_tiny_patch16_224", {}, 1),
        ("vit_tiny_patch16_224", {"qk_norm": True, "reg_tokens": 4, "no_embed_class": True}, 5),
        ("deit_tiny_distilled_patch16_224", {}, 2),
        ("vit_small_patch16_dinov3", {}, 5),
    ],
)
def test_vit_maps_are_its_own_softmax(name, extra, prefix):
    network = awake(timm.create_model(name, img_size=64, **SMALL, **extra))
    image = np.ascontiguousarray(load_sample_image("china.jpg")[::6, ::6])  # [72, 107, 3]
    maps = class_attention_maps(network, image, size=70)  # 70 x 104 pixels: 4 x 6 whole patches
    inputs, where = network_input(network, image, 70)
    assert inputs.shape == (1, 3, 64, 96)
    with evaluating(network), torch.inference_mode():
        whole = explicit(network.network, inputs, -1)  # [1, H, M, M]
        first = explicit(network.network, inputs, 0)
        features = network.network.forward_features(inputs)
        ((found, before),) = network.forward_intermediates(inputs)
    assert whole.shape[2] == prefix + 24
    wanted = whole[0, :, 0, prefix:].reshape(3, 4, 6).numpy()
    assert maps.names == ("block2",)
    np.testing.assert_allclose(maps.layers[0], wanted, rtol=2e-5)
    np.testing.assert_allclose(
        class_attention_maps(network, image, 70, layers=[1]).layers[0].reshape(3, -1),
        first[0, :, 0, prefix:].numpy(), rtol=2e-5)  # fmt: skip
    assert torch.equal(found.flatten(2).transpose(1, 2), features[:, prefix:])
    assert torch.equal(before, features[:, :prefix])
    assert maps.lattice == where == Lattice((0.0, 0.0), (16 / 70, 16 / 104))
    with pytest.raises(UsageError, match="there is no block 3: choose one from 1 to 2"):
        class_attention_maps(network, image, layers=[3])
    assert not any(m._forward_pre_hooks for m in network.modules()), "hooks are gone"


def test_vit_of_one_size_is_refused():
    fixed = {**SMALL, "dynamic_img_size": False}
    network = judged(timm.create_model("vit_tiny_patch16_224", img_size=64, **fixed))
    with pytest.raises(UsageError, match="images of one size only"):
        class_attention_maps(network, np.zeros((64, 64, 3), np.uint8))


# --- XCA --------------------------------------------------------------------------------------


def test_channel_matrices_are_what_the_blocks_mix_with(xcit):
    images = torch.randn(2, 3, 48, 64)
    for block in xcit.blocks:
        torch.nn.init.uniform_(block.attn.temperature, 0.5, 4)
    seen = []
    handle = xcit.blocks[0].norm1.register_forward_hook(lambda m, i, out: seen.append(out))
    (matrices,) = xcit.channel_attention(images)
    handle.remove()
    x, attention = seen[0], xcit.blocks[0].attn
    assert matrices.shape == (2, 4, 8, 8)
    assert torch.allclose(matrices.sum(-1), torch.ones(2, 4, 8))
    v = attention.qkv(x)[..., 64:].view(2, -1, 4, 8)  # [B, N, H, d]
    mixed = torch.einsum("bhij,bnhj->bnhi", matrices, v).flatten(2)
    assert torch.allclose(attention.proj(mixed), attention(x), atol=1e-5)
    assert not xcit.blocks[0].norm1._forward_hooks


# --- masks ------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    weights=st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any),
    mass=st.floats(0.01, 1.0),
)
def test_mask_is_the_fewest_patches_that_hold_the_mass(weights, mass):
    attention = np.array(weights, np.float32)[None]
    keep = mass_threshold(attention, mass)
    wanted = mass * sum(weights)
    assert attention[keep].sum() >= wanted * (1 - 1e-12)
    one_fewer = sorted(weights, reverse=True)[: keep.sum() - 1]
    assert sum(one_fewer) < wanted, "no smaller set of patches holds as much"


def test_mask_order_and_refusals():
    assert mass_threshold(np.ones((2, 3)), 0.5).tolist() == [[True] * 3, [False] * 3]
    assert mass_threshold(np.array([[0.0, 3.0], [1.0, 0.0]]), 1.0).sum() == 2
    for bad, mass in ((np.zeros((2, 2)), 0.6), (np.array([[-1.0, 2]]), 0.6),
                      (np.array([[np.nan, 2]]), 0.6), (np.ones((2, 2)), 0.0)):  # fmt: skip
        with pytest.raises(ValueError, match="must"):
            mass_threshold(bad, mass)


def test_a_mask_at_full_resolution_is_the_nearest_patch():
    attention = np.array([[4.0, 1.0], [1.0, 1.0]])
    assert (
        mask(attention, None, 4, 6, 0.5).tolist()
        == [[True] * 3 + [False] * 3] * 2 + [[False] * 6] * 2
    )
    # A ViT with patches of 16 of a 40 x 56 image sees 32 x 48 of it; the image itself is twice that.
    rows, columns, seen = patch_of_pixel(Lattice((0, 0), (16 / 40, 16 / 56)), 2, 3, 80, 112)
    assert np.array_equal(rows[:64], np.arange(64) // 32)
    assert np.array_equal(columns[:96], np.arange(96) // 32)
    assert seen[:64, :96].all()
    assert seen.sum() == 64 * 96
    # XCiT: patch i is centred on pixel 4 i, and everything has a patch.
    rows, _, seen = patch_of_pixel(Lattice((-1.5 / 12, -1.5 / 12), (4 / 12, 4 / 12)), 3, 3, 12, 12)
    assert rows.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    assert seen.all()


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_where_the_patches_of_an_xcit_lie(patch):
    """The stem's response to one pixel is largest at the patch whose centre the lattice puts there."""
    spec = BackboneSpec(f"xcit_nano_12_p{patch}", shape=SHAPE, input_size=64, resize=64)
    stem = spec.build().eval().patch_embed
    for module in stem.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.ones_(module.weight)
    h = 64 // patch
    where = lattice(spec.build(), 64, 64)
    for i in range(1, h - 1):
        found = []
        for y in (patch * i - patch // 2 + 1, patch * i, patch * i + patch // 2 - 1):
            image = torch.zeros(1, 3, 64, 64)
            image[:, :, y, 32] = 100.0
            response = stem(image)[0].abs().sum(-1).reshape(h, h).sum(1)
            row = patch_of_pixel(where, h, h, 64, 64)[0][y]
            found.append(int(response.argmax()) == row == i)
        assert all(found)
