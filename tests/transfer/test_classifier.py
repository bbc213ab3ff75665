"""Classifiers in files: ours, published XCiT ones, timm's; heads kept, dropped, refused."""

import json

import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf

from xdino.backbones import BackboneSpec, of_timm
from xdino.checkpoint import load_backbone, save_backbone
from xdino.errors import RunFailed, UsageError
from xdino_transfer.classification.classifier import Classifier, at_size
from xdino_transfer.classification.files import read_classifier, start_from, write_classifier

TINY = BackboneSpec(
    "xcit_nano_12_p8",
    shape={"embed_dim": 16, "depth": 1, "num_heads": 2},
    input_size=32,
    resize=37,
)
NAMES = ("cat", "dog", "pig")


@pytest.fixture
def classifier() -> Classifier:
    model = Classifier(TINY.build(), TINY, NAMES).eval()
    torch.nn.init.normal_(model.head.bias)
    return model


def images(side: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def same(one: Classifier, other: Classifier) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def test_what_is_written_is_read_again(classifier, tmp_path):
    path = tmp_path / "model.safetensors"
    write_classifier(path, classifier, {"iteration": 7})
    again = read_classifier(path).classifier
    assert torch.equal(again(images()), classifier(images()))
    assert (again.spec, again.classes) == (TINY, NAMES)
    assert same(read_classifier(tmp_path).classifier, again), "a run directory"
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    tensors = safetensors.torch.load_file(path)
    assert {"head.weight", "head.bias", "blocks.0.gamma1"} <= tensors.keys()


def test_a_published_classification_file_keeps_its_head(tmp_path):
    spec = BackboneSpec("xcit_nano_12_p16")
    model = Classifier(spec.build(), spec, 1000).eval()
    published = model.published_state()
    torch.save({"model": published}, tmp_path / "xcit_nano_12_p16_224.pth")
    again = read_classifier(tmp_path / "xcit_nano_12_p16_224.pth").classifier
    assert (again.num_classes, again.classes) == (1000, None)
    model.requires_grad_(False)  # as what is loaded: torch 2.11 has other kernels there
    assert torch.equal(again(images(64)), model(images(64)))
    timms = timm.create_model("xcit_nano_12_p16_224").eval()
    safetensors.torch.save_file(timms.state_dict(), tmp_path / "timm.safetensors")
    again = read_classifier(tmp_path / "timm.safetensors").classifier
    with torch.no_grad():
        assert torch.allclose(again(images(64)), timms(images(64)), atol=1e-5)


@pytest.mark.parametrize(
    "arch",
    ["test_vit", "test_resnet", "test_convnext", "test_efficientnet", "mobilenetv3_small_050"],
)
def test_timms_files_keep_their_heads(arch, tmp_path):
    theirs = timm.create_model(arch, num_classes=5).eval()
    torch.nn.init.normal_(theirs.get_classifier().bias)
    path = tmp_path / "timm.safetensors"
    safetensors.torch.save_file(theirs.state_dict(), path)
    ours = read_classifier(path, arch).classifier
    side = of_timm(arch).input_size
    with torch.no_grad():
        assert torch.allclose(ours(images(side)), theirs(images(side)), atol=1e-5)
    write_classifier(tmp_path / "ours.safetensors", ours, {})
    back = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    assert back.keys() == theirs.state_dict().keys(), "timm reads what is written here"
    assert same(read_classifier(tmp_path / "ours.safetensors").classifier, ours)


def test_two_heads_are_refused(tmp_path):
    arch = "levit_128s"
    safetensors.torch.save_file(timm.create_model(arch).state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="has not one linear head but"):
        read_classifier(tmp_path / "a.safetensors", arch)


def test_a_backbone_cannot_be_scored(tmp_path):
    save_backbone(tmp_path / "b.safetensors", TINY.build(), TINY)
    with pytest.raises(UsageError, match="holds a backbone without a head"):
        read_classifier(tmp_path / "b.safetensors")
    with pytest.raises(UsageError, match="there is no weights file or run directory"):
        read_classifier(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="at least two classes, got 1"):
        Classifier(TINY.build(), TINY, ["only"])


def test_the_head_starts_small(tmp_path):
    save_backbone(tmp_path / "b.safetensors", TINY.build(), TINY)
    model, notices = start_from(tmp_path / "b.safetensors", NAMES, head_scale=0.001)
    assert notices == []
    assert model.training
    assert 0 < model.head.weight.abs().max() < 2e-4
    assert not model.head.bias.any()
    own = load_backbone(tmp_path / "b.safetensors").state_dict()
    assert all(torch.equal(v, own[n]) for n, v in model.backbone.state_dict().items())


def test_a_head_goes_on_where_the_classes_are_the_same(classifier, tmp_path):
    path = tmp_path / "model.safetensors"
    write_classifier(path, classifier, {})
    kept, notices = start_from(path, NAMES, drop_path=0.1)
    assert (same(kept, classifier), notices) == (True, [])
    assert kept.backbone.blocks[0].drop_path_rate == 0.1
    new, notices = start_from(path, ("a", "b"))
    assert new.num_classes == 2
    assert "knows 3 classes and the data has 2: a new one is trained" in notices[0]
    _, notices = start_from(path, ("cat", "dog", "cow"))
    assert "is for other classes" in notices[0]


def test_it_goes_on_at_another_size(classifier):
    at_size(classifier, 48)
    assert (classifier.spec.input_size, classifier.spec.resize) == (48, 48)
    assert classifier(images(48)).shape == (2, 3)
    spec = BackboneSpec("test_vit", input_size=160, resize=160)
    fixed = Classifier(spec.build(), spec, 3)
    with pytest.raises(UsageError, match="has tables for images of 160 pixels"):
        at_size(fixed, 320)


def test_damaged_classes_and_heads_are_told(classifier, tmp_path):
    path = tmp_path / "a.safetensors"
    classifier.classes = ("cat", "dog")
    write_classifier(path, classifier, {})
    with pytest.raises(RunFailed, match="names 2 classes and has a head for 3"):
        read_classifier(path)
    classifier.classes = NAMES
    with torch.no_grad():
        classifier.head.weight[0, 0] = torch.nan
    write_classifier(path, classifier, {})
    with pytest.raises(RunFailed, match="not finite, in its head"):
        read_classifier(path)
    with safetensors.safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["xdino"])
    assert told["facts"]["task"] == "classification"


def timms_folder(folder, arch, config, names=None):
    """A folder as timm's `save_for_hf` writes it."""
    folder.mkdir()
    model = timm.create_model(arch, num_classes=3).eval()
    save_for_hf(model, folder, model_config=config, safe_serialization=True)
    return model


def test_timms_folders_say_all(tmp_path):
    names = ["one", "two", "three"]
    given = {"label_names": names, "pretrained_cfg": {"crop_pct": 0.9, "mean": [0.5] * 3}}
    theirs = timms_folder(tmp_path / "a", "test_resnet", given)
    found = read_classifier(tmp_path / "a")
    assert found.classes == tuple(names)
    assert (found.size, found.crop_ratio, found.mean) == (160, 0.9, (0.5, 0.5, 0.5))
    with torch.no_grad():
        assert torch.allclose(found.classifier(images(160)), theirs(images(160)), atol=1e-5)
    theirs = timms_folder(tmp_path / "b", "xcit_nano_12_p16_224", {})
    found = read_classifier(tmp_path / "b")
    assert (found.classes, found.classifier.spec.arch) == (None, "xcit_nano_12_p16")
    with torch.no_grad():
        assert torch.allclose(found.classifier(images(64)), theirs(images(64)), atol=1e-5)


def test_damaged_folders_are_told(tmp_path):
    timms_folder(tmp_path / "a", "test_resnet", {})
    config = tmp_path / "a" / "config.json"
    told = json.loads(config.read_text())
    for content, sentence in (
        ("{", "is damaged or not timm's"),
        ("[]", "is damaged or not timm's"),
        (json.dumps({**told, "architecture": None}), "it names no architecture"),
        (json.dumps({**told, "label_names": ["a"]}), "names 1 classes and has a head for 3"),
        (json.dumps({**told, "label_names": [1, 2, 3]}), "its classes are no names"),
        (json.dumps({**told, "pretrained_cfg": {"crop_pct": 0}}), "is damaged"),
        (json.dumps({**told, "pretrained_cfg": {"mean": "?"}}), "is damaged"),
    ):
        config.write_text(content)
        with pytest.raises(RunFailed, match=sentence):
            read_classifier(tmp_path / "a")
    config.write_text(json.dumps({**told, "model_args": {"depths": [1]}}))
    with pytest.raises(UsageError, match="reshapes test_resnet by depths"):
        read_classifier(tmp_path / "a")
    config.write_text(json.dumps({**told, "architecture": "test_resnett"}))
    with pytest.raises(UsageError, match="did you mean"):
        read_classifier(tmp_path / "a")


def test_a_head_of_more_layers_is_refused(tmp_path):
    model = timm.create_model("test_vit", num_classes=3)
    tensors = {**model.state_dict(), "head_dist.weight": torch.zeros(3, 64)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=r"more than one linear layer \(head_dist.weight\)"):
        read_classifier(tmp_path / "a.safetensors", "test_vit")
    save_backbone(tmp_path / "b.safetensors", TINY.build(), TINY, task="segmentation")
    with pytest.raises(UsageError, match="is a network for segmentation, not a classifier"):
        read_classifier(tmp_path / "b.safetensors")
