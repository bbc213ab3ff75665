"""DINO's ViTs: the published network's features at every image size, timm's names and classes."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from xdino import dino_vit
from xdino.backbones import BackboneSpec, of_timm
from xdino.dino_vit.network import DINOViT, WholePatches
from xdino.errors import UsageError


@pytest.fixture
def published(golden):
    tensors, facts = golden("dino_vit")
    options = {**facts["config"], "num_classes": 0, "dynamic_img_size": True}
    model = DINOViT(**options, embed_layer=WholePatches).eval()
    prefix = "state/"
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    model.load_state_dict(state, strict=True)
    return model, tensors, facts


def test_features_are_the_published_ones_at_every_size(published, agree):
    model, tensors, facts = published
    for i, size in enumerate(facts["sizes"]):
        agree(f"{size}", model(tensors[f"input/{i}"]), tensors[f"output/{i}"], 1e-5)


def test_timm_resamples_otherwise(published):
    """What the docstring says: equal at the table's own size, another network at others."""
    model, tensors, facts = published
    theirs = VisionTransformer(**facts["config"], num_classes=0, dynamic_img_size=True).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    own, larger = tensors["input/0"], tensors["input/1"]
    torch.testing.assert_close(theirs(own), model(own), rtol=1e-5, atol=1e-5)
    assert (theirs(larger) - model(larger)).abs().max() > 1e-3


@pytest.mark.parametrize(("arch", "heads"), [("small", 6), ("tiny", 3), ("base", 12)])
def test_names_build_the_published_shapes(arch, heads):
    with torch.device("meta"):
        ours = BackboneSpec(dino_vit.name(arch, 16)).build()
        theirs = timm.create_model(f"vit_{arch}_patch16_224", num_classes=0)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert ours.network.blocks[0].attn.num_heads == heads
    assert ours.network.norm.eps == ours.network.blocks[0].norm1.eps == 1e-6


def test_a_patch_that_timm_has_no_name_for():
    model = BackboneSpec("vit_tiny_patch8_64.dino").build().eval()
    assert model(torch.randn(1, 3, 70, 40)).shape == (1, 192)


def test_how_a_timm_name_is_evaluated():
    assert of_timm("vit_small_patch16_224.dino").mean == (0.485, 0.456, 0.406)
    assert of_timm("vit_small_patch16_224").std == (0.229, 0.224, 0.225)
    assert of_timm("vit_small_patch16_224.augreg_in21k").mean == (0.5, 0.5, 0.5)
    large = of_timm("vit_base_patch16_384")
    assert (large.input_size, large.resize) == (384, 439)
    with pytest.raises(UsageError, match=r"no weights called .*foo.*did you mean"):
        of_timm("vit_small_patch16_224.foo")
