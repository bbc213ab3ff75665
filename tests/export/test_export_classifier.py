"""Classifiers for others: the same logits from timm's folder, timm's names, published names and ONNX."""

import json

import pytest
import safetensors
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from xdino.backbones import BackboneSpec
from xdino.checkpoint import load_backbone
from xdino.errors import RunFailed
from xdino_transfer.classification.classifier import Classifier
from xdino_transfer.classification.files import (
    holds_classifier,
    read_classifier,
    write_classifier,
)

SPEC = BackboneSpec(
    "xcit_nano_12_p8",
    shape={"embed_dim": 32, "depth": 1, "num_heads": 2, "tokens_norm": True},
    input_size=48,
    resize=55,
)
NAMES = ("cat", "dög", "pig|x")


@pytest.fixture
def run(tmp_path):
    """A run directory with a classifier and its backbone."""
    model = Classifier(SPEC.build(), SPEC, NAMES, head_scale=30).eval()
    torch.nn.init.normal_(model.head.bias)
    (tmp_path / "run").mkdir()
    write_classifier(tmp_path / "run" / "model.safetensors", model, {"iteration": 7})
    return tmp_path / "run"


def images(side: int = 48, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def logits(network, side: int = 48) -> torch.Tensor:
    with torch.no_grad():
        return network(images(side))


def test_a_folder_that_timm_loads(run, tmp_path, xdino, agree):
    code, out, error = xdino("export", run, "--format", "hf", "--out", tmp_path / "made")
    assert (code, out.strip()) == (0, str(tmp_path / "made"))
    assert "timm's local-dir: gives the same logits" in error
    theirs = timm.create_model(f"local-dir:{tmp_path / 'made'}", pretrained=True).eval()
    assert theirs.num_classes == 3
    ours = read_classifier(run).classifier
    agree("timm's logits", logits(theirs), logits(ours), 1e-5)
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["label_names"] == list(NAMES)
    assert (config["num_classes"], config["pretrained_cfg"]["crop_pct"]) == (3, 1.0)
    assert theirs.pretrained_cfg["label_names"] == list(NAMES)
    card = (tmp_path / "made" / "README.md").read_text()
    assert "tells 3 classes apart" in card
    again = read_classifier(tmp_path / "made")
    assert (again.classes, again.facts["iteration"]) == (NAMES, 7)
    assert torch.equal(logits(again.classifier), logits(ours))
    # As a stranger's: with config.json alone, without what xdino says in the header.
    save_file(load_file(tmp_path / "made" / "model.safetensors"), tmp_path / "made" / "m")
    (tmp_path / "made" / "m").replace(tmp_path / "made" / "model.safetensors")
    again = read_classifier(tmp_path / "made")
    assert (again.classes, again.size, again.crop_ratio) == (NAMES, 48, 1.0)
    agree("by config.json", logits(again.classifier), logits(ours), 1e-6)
    code, _, _ = xdino("export", run, "--format", "hf", "--out", tmp_path / "made")
    assert code == 0, "an earlier export is written over"


def test_timms_and_published_names(run, tmp_path, xdino, agree):
    ours = logits(read_classifier(run).classifier)
    for form in ("timm", "published"):
        path = tmp_path / f"{form}.safetensors"
        code, out, error = xdino("export", run, "--format", form, "--out", path)
        assert (code, out.strip()) == (0, str(path)), error
        found = read_classifier(path)
        assert found.classes == NAMES
        agree(form, logits(found.classifier), ours, 1e-6)
        with safetensors.safe_open(path, framework="pt") as file:
            card = file.metadata()
        assert json.loads(card["class_names"]) == list(NAMES)
        assert card["classes"] == "3"
    with safetensors.safe_open(tmp_path / "timm.safetensors", framework="pt") as file:
        call = file.metadata()["timm"]
    theirs = eval(call, {"timm": timm}).eval()
    theirs.load_state_dict(load_file(tmp_path / "timm.safetensors"))
    agree("timm's call", logits(theirs), ours, 1e-5)


def test_timms_own_networks(tmp_path, xdino, agree):
    theirs = timm.create_model("test_convnext", num_classes=4).eval()
    save_file(theirs.state_dict(), tmp_path / "a.safetensors")
    line = ("export", tmp_path / "a.safetensors", "--arch", "test_convnext.r160_in1k")
    code, _, error = xdino(*line, "--head", "--format", "hf", "--out", tmp_path / "made")
    assert code == 0, error
    again = timm.create_model(f"local-dir:{tmp_path / 'made'}", pretrained=True).eval()
    agree("timm", logits(again, 160), logits(theirs, 160), 1e-5)
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    told = timm.models.get_pretrained_cfg("test_convnext.r160_in1k").crop_pct
    assert config["pretrained_cfg"]["crop_pct"] == pytest.approx(told, abs=0.01)
    assert read_classifier(tmp_path / "made").crop_ratio == told
    code, _, error = xdino(*line, "--format", "published", "--out", tmp_path / "b.safetensors")
    assert code == 0, error
    assert not holds_classifier(tmp_path / "b.safetensors"), "without --head as before"
    assert load_backbone(tmp_path / "b.safetensors").embed_dim == 64


def test_the_backbone_alone_is_asked_for(run, tmp_path, xdino):
    assert holds_classifier(run)
    assert not holds_classifier(tmp_path)
    assert not holds_classifier(tmp_path / "nowhere")
    (tmp_path / "text").write_text("no weights")
    assert not holds_classifier(tmp_path / "text")
    path = tmp_path / "b.safetensors"
    code, _, error = xdino("export", run, "--no-head", "--out", path)
    assert code == 0, error
    assert not holds_classifier(path)
    assert not any(name.startswith("head") for name in load_file(path))
    code, out, error = xdino("export", path, "--head", "--out", tmp_path / "c.safetensors")
    assert (code, out) == (2, "")
    assert "holds a backbone without a head" in error
    line = ("export", run, "--head", "--role", "student", "--out", path)
    assert xdino(*line)[0] == 2


def test_onnx_gives_logits(run, tmp_path, xdino, agree):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "a.onnx"
    code, out, error = xdino("export", run, "--out", path)
    assert (code, out.strip()) == (0, str(path)), error
    assert "onnxruntime against torch" in error
    session = runtime.InferenceSession(path)
    assert [o.name for o in session.get_outputs()] == ["logits"]
    found = session.run(None, {"images": images(64).numpy()})[0]
    agree("onnx", torch.from_numpy(found), logits(read_classifier(run).classifier, 64), 1e-5)
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == list(NAMES)


def test_other_logits_are_refused(run, tmp_path, xdino, monkeypatch):
    from xdino_launch.export import classifier

    real = classifier._tensors_for

    def spoilt(model, theirs):
        return {name: value + 0.01 for name, value in real(model, theirs).items()}

    monkeypatch.setattr(classifier, "_tensors_for", spoilt)
    code, out, error = xdino("export", run, "--format", "hf", "--out", tmp_path / "made")
    assert (code, out) == (1, "")
    assert "gives other logits" in error
    assert not (tmp_path / "made").exists()
    with pytest.raises(RunFailed, match="gives other logits"):
        classifier.export_classifier(str(run), tmp_path / "a.safetensors", "timm")
    assert not (tmp_path / "a.safetensors").exists()


def test_what_is_predicted_is_what_timm_sees(run, tmp_path, xdino):
    """The pixels, too: an image through timm's transform of the folder and through `predict`."""
    Image.effect_noise((90, 70), 80).convert("RGB").save(tmp_path / "photo.png")
    assert xdino("export", run, "--format", "hf", "--out", tmp_path / "made")[0] == 0
    theirs = timm.create_model(f"local-dir:{tmp_path / 'made'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    with torch.no_grad(), Image.open(tmp_path / "photo.png") as image:
        expected = theirs(transform(image)[None]).softmax(1)[0]
    code, out, _ = xdino("predict", tmp_path / "made", tmp_path / "photo.png", "--json")
    assert code == 0
    found = {c["name"]: c["probability"] for c in json.loads(out)[0]["classes"]}
    assert [found[name] for name in NAMES] == pytest.approx(expected.tolist(), abs=1e-5)
