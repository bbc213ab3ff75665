"""How large an image is shown where nobody says: the rule, by hand."""

import pytest

from xdino.backbones import BackboneSpec
from xdino.errors import UsageError
from xdino_eval.attention import sizes
from xdino_eval.attention.sizes import shown

SHAPE = {"embed_dim": 16, "depth": 1, "num_heads": 2}


def network(patch: int, side: int):
    spec = BackboneSpec(f"xcit_nano_12_p{patch}", shape=SHAPE, input_size=side, resize=side)
    return spec.build()


@pytest.mark.parametrize(
    ("patch", "side", "height", "width", "sides", "grid", "why"),
    [
        (16, 224, 427, 640, (320, 479), (20, 30), "the longer side at 480"),
        (8, 224, 4000, 8000, (240, 480), (30, 60), "the longer side at 480"),
        (4, 28, 28, 28, (56, 56), (14, 14), "2 times their own size"),
        (4, 28, 500, 500, (480, 480), (120, 120), "the longer side at 480"),
        (16, 224, 28, 28, (224, 224), (14, 14), "the network's own size, 224"),
        (16, 224, 60, 3000, (224, 11200), (14, 700), "the network's own size, 224"),
        (16, 384, 480, 640, (384, 512), (24, 32), "the network's own size, 384"),
    ],
)
def test_the_rule(patch, side, height, width, sides, grid, why):
    found = shown(network(patch, side), (height, width, 3))
    assert ((found.height, found.width), found.grid, found.why) == (sides, grid, why)
    assert found.shorter == min(sides)


def test_memory_bounds_what_is_chosen_and_refuses_what_is_asked_for(monkeypatch):
    backbone = network(8, 64)
    monkeypatch.setattr(sizes, "free_memory", lambda device: 4_000_000)
    found = shown(backbone, (3000, 4000))
    assert found.why == "as large as memory allows"
    assert 64 < found.shorter < 360
    monkeypatch.setattr(sizes, "free_memory", lambda device: None)
    assert shown(backbone, (3000, 4000)).width == 480, "where nobody tells"
    with pytest.raises(UsageError, match="lower --size"):
        shown(backbone, (10, 10), 10**8)
    with pytest.raises(UsageError, match="at least a patch of 8 pixels, got 4"):
        shown(backbone, (100, 100), 4)
