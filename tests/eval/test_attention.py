"""Class-attention maps, their masks and their pictures."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image

from xdino.backbones import BackboneSpec
from xdino.errors import UsageError
from xdino_eval.attention import Maps, class_attention_maps, draw, mass_threshold

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
    with pytest.raises(
        UsageError, match="class-attention maps need an XCiT backbone, and a Frozen"
    ):
        class_attention_maps(frozen, np.zeros((8, 8, 3), np.uint8))


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


@pytest.mark.parametrize(("channels", "heads"), [(3, 4), (1, 3)])
def test_pictures(tmp_path, channels, heads):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (61, 83, channels), dtype=np.uint8)
    maps = Maps(tuple(rng.random((heads, 4, 6), dtype=np.float32) for _ in range(2)))
    state = torch.get_rng_state()
    sheet, *files = draw(maps, image, tmp_path / "new", "photo", mass=0.5)
    assert torch.equal(state, torch.get_rng_state())
    assert sheet.name == "photo-sheet.png"
    assert Image.open(sheet).width > 1000
    names = [*(f"head{i}" for i in range(1, heads + 1)), "mean", "overlay", "mask"]
    assert [f.name for f in files] == [
        f"photo-layer{n}-{name}.png" for n in (1, 2) for name in names
    ]
    assert {Image.open(file).size for file in files} == {(83, 61)}
    mask = np.asarray(Image.open(files[heads + 2]))
    assert set(np.unique(mask)) == {0, 255}
    patches = mass_threshold(maps.layers[0].mean(0), 0.5)
    assert (mask > 0).mean() == pytest.approx(patches.mean(), abs=0.05)
