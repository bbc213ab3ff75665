"""Networks of every family that timm knows: what is trained here is loaded again, as it was."""

import pytest
import safetensors.torch
import timm
import torch

from xdino import checkpoint
from xdino.backbones import BackboneSpec, of_timm
from xdino.checkpoint import load_backbone, read_weights, save_backbone, spec_of
from xdino.errors import UsageError
from xdino.head import DINOHead
from xdino.student_teacher import MultiCropNetwork

# Names below head. that are no class head (ConvNeXt, MambaOut, Hiera), fc_norm, pools, two heads.
FAMILIES = (
    "test_convnext", "test_convnext2", "test_convnext3", "test_mambaout", "test_vit", "test_vit2",
    "test_vit3", "test_vit4", "test_resnet", "test_efficientnet", "test_nfnet", "test_byobnet",
    "poolformer_s12", "edgenext_xx_small", "tiny_vit_5m_224", "levit_128s", "pit_ti_224",
    "efficientformer_l1", "starnet_s1", "repvit_m0_9", "mobilenetv3_small_050",
)  # fmt: skip


def same(model, other):
    own, theirs = model.state_dict(), other.state_dict()
    return own.keys() == theirs.keys() and all(torch.equal(own[n], theirs[n]) for n in own)


@pytest.mark.parametrize("arch", FAMILIES)
def test_what_is_trained_here_and_what_timm_publishes(arch, tmp_path):
    spec = of_timm(arch)
    model = spec.build().eval()
    save_backbone(tmp_path / "ours.safetensors", model, spec, role="teacher", iteration=1)
    network = MultiCropNetwork(model, DINOHead(model.embed_dim, 8, 8, 4)).state_dict()
    state = {"learner": {"student": network, "teacher": network}, "iteration": 1}
    checkpoint.save_state(
        tmp_path / "last.pt", state | {"spec": spec.to_dict(), "sampler": {}, "rng": []}
    )
    for path, role in (("ours.safetensors", "teacher"), ("last.pt", "student")):
        assert same(load_backbone(tmp_path / path, role=role), model), path
    with_classes = timm.create_model(arch)
    full = {name: value.clone() for name, value in with_classes.state_dict().items()}
    full |= {name: value.clone() for name, value in model.state_dict().items() if name in full}
    safetensors.torch.save_file(full, tmp_path / "timm.safetensors")
    assert same(load_backbone(tmp_path / "timm.safetensors", arch), model), "without its class head"


def test_our_own_files_lose_nothing(tmp_path):
    """A name that is not the network's is told, also where it looks like a class head."""
    spec = of_timm("test_vit")
    tensors = spec.build().state_dict() | {"head.weight": torch.zeros(2)}
    checkpoint.save_tensors(tmp_path / "a.safetensors", tensors, spec, {})
    with pytest.raises(UsageError, match=r"1 unknown \(head\.weight\)"):
        load_backbone(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "arch", ["resnet18", "resnet34", "resnet26", "resnet50", "wide_resnet50_2", "resnext50_32x4d",
             "resnet101", "resnet152"]
)  # fmt: skip
def test_a_resnet_is_advised_its_own_name(arch, tmp_path):
    with torch.device("meta"):
        state = timm.create_model(arch).state_dict()
    path = tmp_path / "c.pth"
    torch.save({name: torch.zeros(v.shape, dtype=v.dtype) for name, v in state.items()}, path)
    with pytest.raises(UsageError, match=rf"--arch {arch}$"):
        load_backbone(path)
    with pytest.raises(
        UsageError, match=rf"does not fit test_resnet.*it fits {arch}: --arch {arch}$"
    ):
        load_backbone(path, "test_resnet")


SPECS = (
    BackboneSpec("xcit_nano_12_p8", 1, {"embed_dim": 16, "depth": 1, "num_heads": 2}, 28, 28,
                 (0.3,), (0.4,)),
    BackboneSpec("test_convnext", input_size=96, resize=96, mean=(0.5,) * 3, std=(0.5,) * 3),
    BackboneSpec("vit_tiny_patch16_224.dino", input_size=112, resize=128),
)  # fmt: skip


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.arch)
def test_naming_a_files_own_network_changes_nothing(spec, tmp_path):
    path = tmp_path / "a.safetensors"
    save_backbone(path, spec.build(), spec)
    names = {"vit_tiny_patch16_224.dino": ("vit_tiny", "dino_vitt16")}.get(spec.arch, ())
    names += ("xcit_nano_12_p8_224",) if spec.arch.startswith("xcit") else ()
    for arch in (None, spec.arch, *names):
        loaded = load_backbone(path, arch)
        assert loaded.spec == spec, arch
        assert (loaded.input_size, loaded.resize) == (spec.input_size, spec.resize)
    if spec.arch.endswith(".dino"):  # asked for as timm resamples it, at the size of its table
        assert load_backbone(path, "vit_tiny_patch16_224").spec.input_size == 224
    with pytest.raises(UsageError, match="does not fit"):
        load_backbone(path, "xcit_nano_12_p16")


def test_a_tag_brings_its_image_size(tmp_path):
    from xdino import xcit

    torch.save(xcit.build("xcit_nano_12_p16").state_dict(), tmp_path / "c.pth")
    file = read_weights(tmp_path / "c.pth")
    for arch, size, resize in (
        ("xcit_nano_12_p16", 224, 256),
        ("xcit_nano_12_p16_224", 224, 256),
        ("xcit_nano_12_p16_384", 384, 439),
        ("xcit_nano_12_p16_384_dist", 384, 439),
        ("xcit_nano_12_p16_384.fb_dist_in1k", 384, 384),
    ):
        spec = spec_of(file, arch)
        assert (spec.arch, spec.input_size, spec.resize) == ("xcit_nano_12_p16", size, resize)
    with pytest.raises(UsageError, match=r'no weights called "xcit_nano_12_p16_384\.fb_in22k'):
        spec_of(file, "xcit_nano_12_p16_384.fb_in22k")
    with pytest.raises(UsageError, match='no backbone is called "vit_smal": did you mean'):
        spec_of(file, "vit_smal")
    with pytest.raises(UsageError, match=r"no network can be built as vit_tiny"):
        load_backbone(tmp_path / "c.pth", f"vit_tiny_patch16_{10**20}.dino")
