"""Weights and states on disk: round trips, every published layout, files that mean harm."""

import argparse
import collections
import copy
import json
import os
import pathlib
import pickle
import random
import zipfile

import numpy as np
import pytest
import safetensors
import timm
import torch
import weights as torture_weights

from xdino import checkpoint, weight_names, xcit
from xdino.backbones import BackboneSpec
from xdino.checkpoint import load_backbone, read_weights, save_backbone
from xdino.dino_vit import network
from xdino.errors import RunFailed, UsageError
from xdino.head import DINOHead
from xdino.student_teacher import MultiCropNetwork


@pytest.fixture(scope="module")
def nano():
    """XCiT-nano/16 with statistics and scales that a fresh network does not have."""
    torch.manual_seed(3)
    model = xcit.build("xcit_nano_12_p16")
    for name, value in model.state_dict().items():
        if "running_mean" in name or "gamma" in name:
            value.normal_()
    return model.eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))


def assert_same(loaded, original, images):
    """torch 2.11 has other kernels where weights want a gradient, which loaded ones do not."""
    original = copy.deepcopy(original).requires_grad_(False)
    assert torch.equal(loaded(images), original(images))


def published_checkpoint(model, prefix="module."):
    """The layout that the published trainer saves, argparse.Namespace and numpy scalars included."""
    network = MultiCropNetwork(model, DINOHead(128, 64, 32, 16))
    other = MultiCropNetwork(xcit.build("xcit_nano_12_p16"), DINOHead(128, 64, 32, 16))
    return {
        "student": {f"module.{k}": v for k, v in other.state_dict().items()},
        "teacher": {f"{prefix}{k}": v for k, v in network.state_dict().items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(0.1)}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="xcit_nano_12_p16", patch_size=16, lr=5e-4),
        "dino_loss": {"center": torch.zeros(1, 64)},
    }


def test_our_own_file(nano, images, tmp_path):
    path = tmp_path / "a.safetensors"
    spec = BackboneSpec("xcit_nano_12_p16", input_size=96, resize=110)
    save_backbone(path, nano, spec, role="teacher", iteration=7)
    save_backbone(tmp_path / "b.safetensors", nano, spec, role="teacher", iteration=7)
    assert path.read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded = load_backbone(path)
    assert_same(loaded, nano, images)
    assert (loaded.input_size, loaded.resize, loaded.training) == (96, 110, False)
    assert loaded.mean == (0.485, 0.456, 0.406)
    assert loaded.origin.facts["iteration"] == 7
    assert loaded.origin.sha256 == checkpoint.sha256(path)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert [p.name for p in tmp_path.glob(".*")] == [], "nothing half-written stays"


@pytest.mark.parametrize(
    "layout",
    [
        "full",
        "full_unwrapped",
        "backbone_only",
        "classifier",
        "timm",
        "timm_safetensors",
        "state_dict",
    ],
)
def test_published_layouts_give_the_same_features(layout, nano, images, tmp_path):
    path = tmp_path / "weights.pth"
    state = nano.state_dict()
    if layout == "full":
        torch.save(published_checkpoint(nano), path)
    elif layout == "full_unwrapped":
        torch.save(published_checkpoint(nano, prefix=""), path)
    elif layout == "backbone_only":
        torch.save(collections.OrderedDict(state), path)
    elif layout == "classifier":
        head = {"head.weight": torch.zeros(1000, 128), "head.bias": torch.zeros(1000)}
        torch.save({"model": {**state, **head}}, path)
    elif layout == "state_dict":
        torch.save({"state_dict": {f"module.backbone.{k}": v for k, v in state.items()}}, path)
    else:
        theirs = timm.create_model("xcit_nano_12_p16_224", num_classes=10)
        theirs.load_state_dict(
            {**theirs.state_dict(), **weight_names.to_timm_names(state)}, strict=True
        )
        if layout == "timm":
            torch.save(theirs.state_dict(), path)
        else:
            from safetensors.torch import save_file

            path = tmp_path / "weights.safetensors"
            save_file(theirs.state_dict(), path)
    loaded = load_backbone(path)
    torch.testing.assert_close(loaded(images), nano(images), rtol=1e-6, atol=1e-6)


def test_the_student_of_a_full_checkpoint(nano, images, tmp_path):
    torch.save(published_checkpoint(nano), tmp_path / "c.pth")
    student = load_backbone(tmp_path / "c.pth", role="student")
    assert not torch.allclose(student(images), nano(images))


@pytest.fixture(scope="module")
def tiny_vit():
    torch.manual_seed(4)
    model = network.build("vit_tiny_patch16_224.dino").eval()
    with torch.no_grad():
        model.pos_embed.normal_()
    return model


def trainer_file(model, path, prefix="backbone."):
    """A DINO checkpoint of a ViT as the published trainer writes it, submitit's folder included."""
    args = argparse.Namespace(
        arch="vit_tiny", patch_size=16, data_path="/data/imagenet", output_dir=pathlib.Path("/out")
    )
    teacher = {f"{prefix}{k}": v for k, v in model.state_dict().items()}
    torch.save({"teacher": teacher, "epoch": 100, "args": args}, path)
    return path


def test_a_vit_of_the_published_trainer(tiny_vit, tmp_path):
    path = trainer_file(tiny_vit, tmp_path / "c.pth")
    images = torch.randn(1, 3, 96, 70)
    for arch in (None, "vit_tiny_patch16_224"):  # the file says that it is DINO's
        loaded = load_backbone(path, arch)
        assert loaded.spec.arch == "vit_tiny_patch16_224.dino"
        assert torch.equal(loaded(images), tiny_vit(images))
    assert loaded.origin.facts["data"] == "/data/imagenet"
    assert loaded.origin.facts["epoch"] == 100


def test_a_vit_that_says_nothing_is_asked_for_by_name(tiny_vit, tmp_path):
    torch.save(tiny_vit.state_dict(), tmp_path / "c.pth")
    with pytest.raises(UsageError, match=r"--arch vit_tiny_patch16_224\.dino for a published DINO"):
        load_backbone(tmp_path / "c.pth")
    file = read_weights(tmp_path / "c.pth")
    for arch in ("vit_tiny", "deit_tiny", "dino_vitt16", "vit_tiny_patch16_224.dino"):
        assert checkpoint.spec_of(file, arch).arch == "vit_tiny_patch16_224.dino"
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(load_backbone(tmp_path / "c.pth", "vit_tiny")(images), tiny_vit(images))
    timms = load_backbone(tmp_path / "c.pth", "vit_tiny_patch16_224")
    assert not torch.allclose(timms(images), tiny_vit(images), atol=1e-3)
    with pytest.raises(UsageError, match=r"it fits vit_tiny_patch16_224\.dino"):
        load_backbone(tmp_path / "c.pth", "vit_small")


def test_an_xcit_without_a_name_needs_its_spec(images, tmp_path):
    shape = {"embed_dim": 96, "depth": 3, "num_heads": 2, "tokens_norm": True}
    model = xcit.build("xcit_nano_12_p8", **shape).eval()
    torch.save(model.state_dict(), tmp_path / "c.pth")
    with pytest.raises(
        UsageError,
        match=r"embed_dim 96, depth 3, num_heads 2, patch_size 8.*nearest is xcit_nano_12_p8",
    ):
        load_backbone(tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth", BackboneSpec("xcit_nano_12_p8", shape=shape))
    assert_same(loaded, model, images)


def test_mixed_networks(nano, tmp_path):
    others = xcit.build("xcit_tiny_12_p16").state_dict()
    mixed = {k: others[k] if k.startswith("cls_attn") else v for k, v in nano.state_dict().items()}
    torch.save(mixed, tmp_path / "mixed.pth")
    with pytest.raises(UsageError, match=r"does not fit xcit_nano_12_p16.*mixed"):
        load_backbone(tmp_path / "mixed.pth")
    twice = {**nano.state_dict(), "module.cls_token": others["cls_token"]}
    torch.save(twice, tmp_path / "twice.pth")
    with pytest.raises(
        RunFailed, match=r"twice\.pth.*mixes several networks: it has cls_token twice"
    ):
        load_backbone(tmp_path / "twice.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value, nano, tmp_path):
    state = {k: v.clone() for k, v in nano.state_dict().items()}
    state["blocks.3.norm1.bias"][2] = value
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(RunFailed, match=r"not finite, in 1 of 381 tensors \(first blocks\.3"):
        load_backbone(tmp_path / "c.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bytes_changed_anywhere_give_a_sentence_or_weights(tmp_path):
    """Whatever a broken disk makes of a file, no other error comes out."""
    whole = tmp_path / "whole.pth"
    args = argparse.Namespace(arch="a", output_dir=pathlib.Path("/x"), lr=np.float64(1))
    tree = {"teacher": {"a": torch.zeros(2)}, "args": args}
    generator = random.Random(0)
    refused = 0
    for i in range(300):
        torch.save(tree, whole, _use_new_zipfile_serialization=bool(i % 2))
        content = bytearray(whole.read_bytes())
        for _ in range(generator.choice((1, 2, 8))):
            content[generator.randrange(len(content))] = generator.randrange(256)
        (tmp_path / "c.pth").write_bytes(content)
        try:
            read_weights(tmp_path / "c.pth")
        except RunFailed:
            refused += 1
    assert refused > 100


def test_names_may_be_given(nano, images, tmp_path):
    torch.save(nano.state_dict(), tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth", arch="xcit_nano_12_p16_224.fb_in1k")
    assert_same(loaded, nano, images)
    with pytest.raises(
        UsageError, match=r"does not fit xcit_tiny_12_p16: .* it fits xcit_nano_12_p16"
    ):
        load_backbone(tmp_path / "c.pth", arch="xcit_tiny_12_p16")
    with pytest.raises(
        UsageError, match=r"does not fit xcit_nano_12_p8: tensors .*missing|unknown|shape"
    ):
        load_backbone(tmp_path / "c.pth", arch="xcit_nano_12_p8")


def test_a_file_that_does_not_say_what_it_is(tmp_path):
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "c.pth")
    with pytest.raises(UsageError, match="name it with --arch"):
        load_backbone(tmp_path / "c.pth")


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 not a zip"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files(content, suffix, tmp_path):
    path = tmp_path / f"c{suffix}"
    path.write_bytes(content)
    with pytest.raises(RunFailed, match="damaged"):
        load_backbone(path)


def test_things_that_are_no_weights(tmp_path):
    torch.save([1, 2, 3], tmp_path / "list.pth")
    torch.save({"teacher": {"a": 1}}, tmp_path / "numbers.pth")
    for name in ("list.pth", "numbers.pth"):
        with pytest.raises(RunFailed, match="holds no weights"):
            load_backbone(tmp_path / name)
    with pytest.raises(UsageError, match="no weights file"):
        load_backbone(tmp_path / "none.pth")
    with pytest.raises(UsageError, match=r"holds no backbone\.safetensors"):
        load_backbone(tmp_path)


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("old_format", [True, False])
def test_a_pickle_that_runs_code_is_refused(old_format, nano, tmp_path):
    proof = tmp_path / "harm_was_done"
    tree = {"teacher": nano.state_dict(), "epoch": Harm(proof)}
    torch.save(tree, tmp_path / "c.pth", _use_new_zipfile_serialization=not old_format)
    with pytest.raises(RunFailed, match=r"mkdir.*refused|refused"):
        load_backbone(tmp_path / "c.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Harm(proof)))
    with pytest.raises(RunFailed):
        load_backbone(tmp_path / "plain.pth")
    assert not proof.exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.pt"
    state = {"config": {}, "iteration": 1, "rng": []}
    checkpoint.save_state(path, state)
    with pytest.raises(AttributeError):
        checkpoint.save_state(path, {"learner": lambda: None})
    assert checkpoint.load_state(path)["iteration"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_prefixes_come_off_as_prefixes_only():
    names = {
        "module.backbone.a.module.b": torch.zeros(1),
        "head.x": torch.zeros(1),
        "fc.w": torch.zeros(1),
    }
    assert list(weight_names.plain_names(names)) == ["a.module.b"]


# --- damage, and what is none ---


@pytest.fixture
def small(tmp_path):
    """A file of ours, of a few kilobytes."""
    shape = {"embed_dim": 8, "depth": 1, "num_heads": 1}
    spec = BackboneSpec("xcit_nano_12_p4", shape=shape, input_size=24, resize=27)
    path = tmp_path / "small.safetensors"
    save_backbone(path, spec.build(), spec, role="teacher", iteration=7)
    return path


def test_one_bit_anywhere_is_noticed(small):
    """In the weights, their names, the image size or the checksum; or nothing that is read changed."""
    whole = small.read_bytes()
    before = load_backbone(small)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(0, header, 17), *range(header, len(whole), len(whole) // 40)]
    refused = 0
    for number, place in enumerate(places):
        content = bytearray(whole)
        content[place] ^= 1 << number % 8
        small.write_bytes(content)
        try:
            after = load_backbone(small)
        except RunFailed:
            refused += 1
            continue
        assert after.spec == before.spec, place
        same = zip(after.state_dict().values(), before.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in same), place
    assert refused > 0.98 * len(places)


def test_the_checksum_is_for_us_alone(small, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(small)
    assert tensors.keys() == load_backbone(small).state_dict().keys(), "others read the file"
    tensors["norm.bias"] += 1
    with safetensors.safe_open(small, framework="pt") as file:
        header = file.metadata()
    save_file(tensors, small, header)
    with pytest.raises(RunFailed, match=r"damaged: its checksum is another"):
        load_backbone(small)
    told = json.loads(header["xdino"])
    del told["sha256"]  # as files of before were written
    save_file(tensors, small, {"xdino": json.dumps(told)})
    assert load_backbone(small).input_size == 24


def test_what_is_no_damage_is_not_called_so(small, tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.weights, "open", denied, raising=False)
        with pytest.raises(
            UsageError, match=r"cannot read .*small\.safetensors: Permission denied"
        ):
            load_backbone(small)
    for error, sentence in (
        (OSError(5, "Input/output error"), r"cannot read .*p: Input/output error"),
        (MemoryError(), "p needs more memory than there is"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "p needs more memory"),
        (pickle.UnpicklingError("Unsupported global: GLOBAL os.mkdir was"), "p asks for os.mkdir"),
        (pickle.UnpicklingError("Unsupported operand 149"), "p is damaged or not a checkpoint"),
        (OSError("bad seek"), "p is damaged"),
    ):
        with pytest.raises(RunFailed, match=sentence), checkpoint.reading(pathlib.Path("p")):
            raise error
    with pytest.raises(UsageError, match=r"cannot read .*: File name too long"):
        load_backbone(tmp_path / ("x" * 300))
    pointer = tmp_path / "lfs.pth"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(RunFailed, match="a Git LFS pointer"):
        load_backbone(pointer)


def test_either_format_under_any_name(small, nano, tmp_path):
    (tmp_path / "c.pth").write_bytes(small.read_bytes())
    assert load_backbone(tmp_path / "c.pth").input_size == 24
    torch.save(nano.state_dict(), tmp_path / "c.safetensors")
    assert load_backbone(tmp_path / "c.safetensors").embed_dim == 128


def _without(state, *keys):
    return {name: value for name, value in state.items() if name not in keys}


def test_a_state_that_lacks_something(small, tmp_path):
    backbone = load_backbone(small)
    network = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    whole = {
        "learner": {"teacher": network, "student": network},
        "iteration": 3,
        "spec": backbone.spec.to_dict(),
    }
    path = tmp_path / "last.pt"
    torch.save(whole, path)
    assert load_backbone(path, role="student").origin.facts["iteration"] == 3
    for state in (
        _without(whole, "spec"),
        _without(whole, "iteration"),
        whole | {"iteration": "3"},
        whole | {"spec": {"arch": "xcit_nano_12_p4"}},
        whole | {"spec": whole["spec"] | {"shape": {"depth": 10**9}}},
        whole | {"spec": whole["spec"] | {"shape": {"nonsense": 3}}},
        whole | {"spec": whole["spec"] | {"std": (0.0, 1.0, 1.0)}},
        whole | {"learner": {"teacher": network}},
        whole | {"learner": {"teacher": network, "student": {3: torch.zeros(1)}}},
    ):
        torch.save(state, path)
        with pytest.raises(RunFailed, match=r"last\.pt.*damaged"):
            load_backbone(path, role="student")


def test_more_numbers_than_bytes(tmp_path):
    tensors = {"a": torch.zeros(1).expand(2**31, 2**20)}
    torch.save({"model": tensors}, tmp_path / "c.pth")
    with pytest.raises(RunFailed, match="holds no weights"):
        load_backbone(tmp_path / "c.pth")
    torch.save({"model": {"a": torch.zeros(1 << 20)}}, tmp_path / "c.pth")
    with (
        zipfile.ZipFile(tmp_path / "c.pth") as before,
        zipfile.ZipFile(tmp_path / "d.pth", "w", zipfile.ZIP_DEFLATED) as after,
    ):
        for name in before.namelist():
            after.writestr(name, before.read(name))
    with pytest.raises(RunFailed, match="compressed archive"):
        load_backbone(tmp_path / "d.pth")


def test_damaged_and_harmful_files_in_any_number():
    found = torture_weights.run(seed=11, count=60)
    defects = [found.pop(name) for name in ("tracebacks", "code ran", "slow")]
    found.pop("too large")  # of a process that ran other tests before
    assert defects == [0, 0, 0]
    assert found["network"] > 0
    assert sum(found.values()) == 60


def test_grey_networks_are_recognised(tmp_path):
    model = xcit.build("xcit_nano_12_p8", in_chans=1)
    torch.save(model.state_dict(), tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth")
    assert loaded.in_chans == len(loaded.mean) == 1
    assert read_weights(tmp_path / "c.pth").spec is None
