"""XCiT: timm's numbers with the same weights, every size, every shape of image, clear errors."""

import copy

import pytest
import timm
import torch

from xdino import weight_names, xcit
from xdino.errors import UsageError


@pytest.mark.parametrize("name", ["xcit_nano_12_p16", "xcit_tiny_12_p8", "xcit_small_12_p16"])
def test_same_features_as_timm_with_the_same_weights(name, agree):
    theirs = timm.create_model(f"{name}_224", num_classes=0).eval()
    # Fresh LayerScale and norms hide mistakes: make every parameter and statistic count.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in theirs.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.5, 2, generator=generator)
            elif value.is_floating_point():
                value.add_(torch.randn(value.shape, generator=generator) * 0.02)
    ours = xcit.build(name).eval()
    names = weight_names.plain_names(theirs.state_dict())
    ours.load_state_dict(names, strict=True)
    back = weight_names.to_timm_names(ours.state_dict())
    assert back.keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        assert torch.equal(back[key], value), key
    for height, width in ((224, 224), (96, 160), (100, 75), (33, 47)):
        images = torch.randn(2, 3, height, width, generator=generator)
        with torch.no_grad():
            expected = theirs.forward_features(images)[:, 0]
            agree(f"{name} {height}x{width}", ours(images), expected, 1e-5)


def test_published_sizes():
    def size(model):
        return sum(p.numel() for p in model.parameters())

    with torch.device("meta"):
        assert size(xcit.build("xcit_small_12_p16")) == pytest.approx(25.87e6, abs=5e3)
        for name in xcit.NAMES:
            if not name.endswith("_p4"):  # patch 4 is ours alone
                theirs = timm.create_model(f"{name}_224", num_classes=0)
                assert size(xcit.build(name)) == size(theirs), name


@pytest.mark.parametrize("patch_size", [4, 8, 16])
@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_any_image_size_and_number_of_channels(patch_size, in_chans):
    model = xcit.XCiT(patch_size, 32, 1, 2, in_chans=in_chans).eval()
    for height, width in ((32, 32), (17, 31), (1, 1), (64, 5)):
        images = torch.randn(2, in_chans, height, width)
        tokens, h, w = model.patch_tokens(images)
        assert (
            (h, w)
            == model.grid(height, width)
            == (-(-height // patch_size), -(-width // patch_size))
        )
        assert tokens.shape == (2, h * w, 32)
        assert model(images).shape == (2, 32)
        weights = model.class_attention(images)
        assert [tuple(m.shape) for m in weights] == [(2, 2, 1 + h * w)] * 2
        for m in weights:
            torch.testing.assert_close(m.sum(-1), torch.ones(2, 2))


def test_patch_4_stem_has_two_convolutions():
    model = xcit.XCiT(4, 48, 1, 2)
    convs = [m for m in model.patch_embed.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.stride) for c in convs] == [
        (3, 24, (2, 2)),
        (24, 48, (2, 2)),
    ]


def test_drop_path_is_for_training_and_keeps_the_mean():
    mask = xcit.drop_path_mask(torch.ones(20_000, 3, 2), 0.3)
    assert mask.shape == (20_000, 1, 1), "a branch is dropped for the whole image"
    torch.testing.assert_close(mask.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert mask.mean().item() == pytest.approx(1.0, abs=0.02)
    model = xcit.XCiT(8, 32, 2, 2, drop_path_rate=0.5)
    images = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_mistakes_are_sentences():
    with pytest.raises(UsageError, match='did you mean "xcit_small_12_p16"'):
        xcit.build("xcit_smal_12_p16")
    with pytest.raises(UsageError, match="patch_size must be 4, 8 or 16, got 14"):
        xcit.XCiT(patch_size=14)
    with pytest.raises(UsageError, match="multiple of num_heads"):
        xcit.XCiT(embed_dim=64, num_heads=3)
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\]"):
        xcit.XCiT(8, 32, 1, 2)(torch.zeros(1, 1, 8, 8))


def test_training_at_a_size_that_was_first_met_in_inference_mode():
    model = xcit.XCiT(8, 32, 1, 2)
    images = torch.randn(2, 3, 72, 40)
    with torch.inference_mode():
        model(images)
    model(images).sum().backward()


def test_autocast_trains_in_bf16():
    model = xcit.XCiT(8, 32, 2, 2, tokens_norm=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(2, 3, 32, 32)).float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_activation_checkpointing_changes_nothing_but_memory():
    """Outputs, gradients, running statistics and drop path: bit for bit, BatchNorm counted once."""
    plain = xcit.XCiT(8, 32, 3, 2, drop_path_rate=0.4)
    thrifty = copy.deepcopy(plain)
    thrifty.set_grad_checkpointing(True)
    images = torch.randn(4, 3, 40, 24)
    saved = []
    for model in (plain, thrifty):
        torch.manual_seed(5)
        held = 0

        def keep(x):
            nonlocal held
            held += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = model(images)
        out.square().sum().backward()
        saved.append(held)
    for (name, a), b in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(plain.named_buffers(), thrifty.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert saved[1] < 0.5 * saved[0]


@pytest.mark.parametrize(("dim", "heads", "shape"), [(32, 4, (2, 97)), (48, 3, (1, 300))])
def test_folded_attention_is_the_same_layer(dim, heads, shape):
    layer = xcit.XCA(dim, heads).double().eval()
    for p in layer.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    x, gain = torch.randn(*shape, dim).double(), torch.randn(dim).double()
    with torch.no_grad():
        assert layer.folds(x)
        torch.testing.assert_close(layer.folded(x, gain), gain * layer(x))
    assert not layer.folds(x), "training keeps the plain path"


def test_high_resolution_takes_the_folded_path_and_gives_the_same_features(monkeypatch):
    model = xcit.XCiT(8, 32, 3, 2).eval()
    images = torch.randn(1, 3, 80, 130)  # 10 x 17 tokens, 32 channels
    with torch.inference_mode():
        folded = model(images)
        monkeypatch.setattr(xcit.layers, "FOLD_FROM", 1000)
        torch.testing.assert_close(folded, model(images), rtol=1e-5, atol=1e-6)


def test_a_large_hidden_layer_is_made_in_pieces(monkeypatch):
    layers = xcit.layers
    mlp, gain = layers.Mlp(12, 48), torch.rand(12)
    x = torch.randn(2, 31, 12)
    with torch.no_grad():
        whole = layers.scaled_mlp(x, mlp, gain)
        seen: list[int] = []
        mlp.fc1.register_forward_hook(lambda layer, given, found: seen.append(found.numel()))
        monkeypatch.setattr(layers, "HIDDEN_AT_ONCE", 480)
        torch.testing.assert_close(layers.scaled_mlp(x, mlp, gain), whole)
        assert (len(seen), max(seen)) == (7, 480)
        # An estimate of memory is for GPUs as well, which make it whole.
        layers.scaled_mlp(x.to("meta"), mlp.to("meta"), gain.to("meta"))
    assert seen[7:] == [2 * 31 * 48]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_tokens_lie_token_by_token_between_blocks(dtype):
    model = xcit.XCiT(16, 32, 2, 2)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        found = [x for x, _, _ in xcit.trunk.after_each_block(model, torch.randn(2, 3, 64, 48))]
    assert all(x.is_contiguous() for x in found)
