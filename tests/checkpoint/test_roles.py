"""Teacher or student: which network of a file is read, and what a file says that has not the other."""

import argparse

import pytest
import safetensors.torch
import timm
import torch

from xdino import checkpoint
from xdino.backbones import BackboneSpec
from xdino.checkpoint import load_backbone, save_backbone
from xdino.errors import RunFailed, UsageError
from xdino.head import DINOHead
from xdino.student_teacher import MultiCropNetwork

SPEC = BackboneSpec("xcit_nano_12_p8", shape={"embed_dim": 16, "depth": 1, "num_heads": 2},
                    input_size=24, resize=27)  # fmt: skip
ARCH = "test_vit"


def networks(build):
    """Two of a kind, with different weights: the teacher and the student."""
    torch.manual_seed(1)
    return {"teacher": build().eval(), "student": build().eval()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run directory holds of its two networks."""
    path = tmp_path_factory.mktemp("run")
    two = networks(SPEC.build)
    save_backbone(path / "backbone.safetensors", two["teacher"], SPEC, role="teacher", iteration=7)
    learner = {
        role: MultiCropNetwork(backbone, DINOHead(16, 8, 8, 4)).state_dict()
        for role, backbone in two.items()
    }
    state = {"learner": learner, "iteration": 7, "spec": SPEC.to_dict(), "sampler": {}, "rng": []}
    checkpoint.save_state(path / checkpoint.STATE_FILE, state)
    return path, two


def equal(model, other):
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_run_directory_and_its_state_have_both(run, role):
    path, two = run
    for weights in (path, path / checkpoint.STATE_FILE):
        loaded = load_backbone(weights, role=role)
        assert equal(loaded, two[role])
        assert (loaded.origin.role, loaded.origin.facts["iteration"]) == (role, 7)
        assert loaded.input_size == 24


def test_files_of_one_role_refuse_the_other(run, tmp_path):
    path, two = run
    with pytest.raises(UsageError, match=r"holds the teacher alone: the student is in .*last\.pt"):
        load_backbone(path / "backbone.safetensors", role="student")
    save_backbone(tmp_path / "s.safetensors", two["student"], SPEC, role="student", iteration=7)
    with pytest.raises(UsageError, match=r"s\.safetensors holds the student alone: --role student"):
        load_backbone(tmp_path / "s.safetensors")
    assert equal(load_backbone(tmp_path / "s.safetensors", role="student"), two["student"])
    save_backbone(tmp_path / "unsaid.safetensors", two["teacher"], SPEC)
    with pytest.raises(UsageError, match="holds the teacher alone"):
        load_backbone(tmp_path / "unsaid.safetensors", role="student")
    save_backbone(tmp_path / "run" / "backbone.safetensors", two["teacher"], SPEC, role="teacher")
    with pytest.raises(UsageError, match=r"run holds no checkpoints/last\.pt \(which has the stu"):
        load_backbone(tmp_path / "run", role="student")
    with pytest.raises(UsageError, match='role must be "teacher" or "student", got "momentum"'):
        load_backbone(path, role="momentum")


def test_published_files_of_one_network(tmp_path):
    state = timm.create_model(ARCH).state_dict()
    torch.save(state, tmp_path / "bare.pth")
    safetensors.torch.save_file(state, tmp_path / "bare.safetensors")
    torch.save({"student": state}, tmp_path / "student.pth")
    torch.save({"teacher": state}, tmp_path / "teacher.pth")
    torch.save({f"student.backbone.{n}": v for n, v in state.items()}, tmp_path / "prefix.pth")
    for name in ("bare.pth", "bare.safetensors"):
        load_backbone(tmp_path / name, ARCH)
        with pytest.raises(UsageError, match="does not say whose: leave out --role student"):
            load_backbone(tmp_path / name, ARCH, "student")
    for name, has, lacks in (("student", "student", "teacher"), ("teacher", "teacher", "student"),
                             ("prefix", "student", "teacher")):  # fmt: skip
        load_backbone(tmp_path / f"{name}.pth", ARCH, has)
        with pytest.raises(UsageError, match=rf"{name}\.pth.* {has} .*: --role {has}"):
            load_backbone(tmp_path / f"{name}.pth", ARCH, lacks)


def below(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


LAYOUTS = {
    "one dict": ({"teacher": "teacher.backbone.", "student": "student.backbone."}, None),
    "wrapped": (
        {"teacher": "teacher.module.backbone.", "student": "module.student.backbone."},
        None,
    ),
    "lightning": ({"teacher": "model.teacher.", "student": "model.student."}, "state_dict"),
    "lightly": ({"teacher": "teacher_backbone.", "student": "student_backbone."}, "state_dict"),
    "dinov2": ({"teacher": "teacher.backbone.", "student": "student.backbone."}, "model"),
    "solo-learn": ({"teacher": "momentum_backbone.", "student": "backbone."}, "state_dict"),
    "moco": ({"teacher": "module.encoder_k.", "student": "module.encoder_q."}, "state_dict"),
}
BESIDE = ("teacher.dino_head.mlp.0.weight", "student.ibot_head.last_layer.weight_g", "head.0.bias",
          "projector.0.weight", "momentum_projector.0.weight", "classifier.weight",
          "dino_loss.center", "criterion.center")  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("as_safetensors", [False, True])
def test_trainers_of_others(layout, as_safetensors, tmp_path):
    prefixes, key = LAYOUTS[layout]
    two = networks(lambda: timm.create_model(ARCH, num_classes=0))
    flat = {
        name: torch.zeros(3) for name in BESIDE if name.split(".")[0] not in ("teacher", "student")
    }
    if layout in ("one dict", "dinov2"):
        flat |= {name: torch.zeros(3) for name in BESIDE}
    if layout == "lightning":
        flat = below("model.", flat)
    for role, prefix in prefixes.items():
        flat |= below(prefix, two[role].state_dict())
    path = tmp_path / ("c.safetensors" if as_safetensors else "c.ckpt")
    if as_safetensors:
        safetensors.torch.save_file({n: v.clone() for n, v in flat.items()}, path)
    else:
        torch.save({key: flat, "epoch": 3} if key else flat, path)
    for role in prefixes:
        loaded = load_backbone(path, ARCH, role)
        assert equal(loaded, two[role])
        assert loaded.origin.facts["role"] == role


def test_several_networks_without_a_role_are_named(tmp_path):
    state = timm.create_model(ARCH, num_classes=0).state_dict()
    for name, tree in {
        "twice": below("model_ema.", state) | below("teacher.", state),
        "beside": below("backbone.", state) | state,
    }.items():
        torch.save(tree, tmp_path / f"{name}.pth")
        with pytest.raises(UsageError, match=rf"{name}\.pth.*several networks .*78 tensors"):
            load_backbone(tmp_path / f"{name}.pth", ARCH)
    torch.save({"optimizer": {}, "epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(RunFailed, match="it has 'optimizer', 'epoch'"):
        load_backbone(tmp_path / "none.pth")


def test_prefixes_inside_a_networks_own_names_stay():
    from xdino import weight_names

    names = dict.fromkeys(("backbone.a.model.b", "backbone.model.teacher.c"), torch.zeros(1))
    assert list(weight_names.plain_names(names)) == ["a.model.b", "model.teacher.c"]
    args = argparse.Namespace(arch=ARCH)
    assert weight_names.published_name(args.arch, {}) == ARCH
