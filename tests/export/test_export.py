"""Weights for others: timm's network, an ONNX graph, torch.hub; and what each file says of itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import timm
import torch
from safetensors.torch import load_file, save_file

from xdino.backbones import BackboneSpec
from xdino.checkpoint import load_backbone, save_backbone
from xdino.errors import RunFailed, UsageError
from xdino_launch.export import to_onnx
from xdino_launch.export.backbone import export_backbone

ROOT = Path(__file__).parents[2]
SHAPE = {"embed_dim": 32, "depth": 1, "num_heads": 2, "tokens_norm": True}


def shaken(model):
    """Every parameter and statistic off its initial value, where mistakes would hide."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2, generator=generator)
            elif value.is_floating_point():
                value.add_(torch.randn(value.shape, generator=generator) * 0.05)
    return model.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run directory holds of its weights: two starts by two commits, stopped at step 7."""
    path = tmp_path_factory.mktemp("run")
    spec = BackboneSpec("xcit_nano_12_p8", shape=SHAPE, input_size=48, resize=55)
    model = shaken(spec.build())
    save_backbone(
        path / "backbone.safetensors", model, spec, role="teacher", iteration=7, data="sample"
    )
    starts = [{"iteration": 0, "commit": "first"}, {"iteration": 5, "commit": "second"}]
    (path / "environment.json").write_text(
        json.dumps({"starts": [*starts, starts[0] | {"iteration": 9}]})
    )
    return path


def metadata(path):
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata()


def says_what_it_holds(card):
    wanted = {
        "architecture": "xcit_nano_12_p8",
        "patch_size": "8",
        "mean": "0.485, 0.456, 0.406",
        "std": "0.229, 0.224, 0.225",
        "training_data": "sample",
        "commit": "second",
        "iteration": "7",
    }
    return {key: card.get(key) for key in wanted} == wanted


def test_published_and_timm_names_and_back(run, tmp_path, agree):
    images = torch.randn(2, 3, 40, 48)
    features = load_backbone(run)(images)
    timms = export_backbone(str(run), tmp_path / "timm.safetensors", "timm")
    back = export_backbone(str(timms), tmp_path / "ours.safetensors", "published")
    for path in (timms, back):
        agree(path.name, load_backbone(path)(images), features, 1e-6)
    assert load_file(back).keys() == load_backbone(run).state_dict().keys()
    card = metadata(timms)
    assert says_what_it_holds(card)
    assert card["timm"].startswith("timm.create_model('xcit_nano_12_p8_224', num_classes=0")
    theirs = eval(card["timm"])
    theirs.load_state_dict(load_file(timms), strict=True)
    agree("timm", theirs.eval()(images), features, 1e-6)


def test_timms_own_small_network_there_and_back(tmp_path, agree):
    """With timm's own class head in the file, as it publishes its weights."""
    theirs = shaken(timm.create_model("xcit_small_12_p16_224"))
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    path = str(tmp_path / "timm.safetensors")
    images = torch.randn(1, 3, 64, 80)
    theirs.reset_classifier(0)
    agree("ours", load_backbone(path)(images), theirs(images), 1e-6)
    out = export_backbone(path, tmp_path / "again.safetensors", "timm")
    state = theirs.state_dict()
    again = load_file(out)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_a_data_path_that_is_no_unicode(tmp_path):
    spec = BackboneSpec("xcit_nano_12_p8", shape=SHAPE, input_size=48, resize=55)
    save_backbone(tmp_path / "a.safetensors", spec.build(), spec, data="caf\udce9")
    path = export_backbone(str(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "published")
    assert metadata(path)["training_data"] == r"caf\udce9"
    assert load_backbone(path).origin.facts["data"] == "caf\udce9"


def test_what_timm_cannot_build(tmp_path):
    spec = BackboneSpec("xcit_nano_12_p4", shape=SHAPE)
    save_backbone(tmp_path / "p4.safetensors", spec.build(), spec)
    with pytest.raises(UsageError, match="patch sizes 8 and 16, not 4"):
        export_backbone(str(tmp_path / "p4.safetensors"), tmp_path / "x.safetensors", "timm")
    assert not (tmp_path / "x.safetensors").exists()


def test_files_end_as_their_format_does(run, tmp_path):
    with pytest.raises(UsageError, match=r"onnx writes \.onnx files"):
        export_backbone(str(run), tmp_path / "x.safetensors", "onnx")
    with pytest.raises(UsageError, match=r"timm writes \.safetensors files"):
        export_backbone(str(run), tmp_path / "x.onnx", "timm")


def test_an_older_export_without_a_header_loads(tmp_path):
    model = timm.create_model("xcit_nano_12_p16_224", num_classes=0).eval()
    header = {"architecture": "xcit_nano_12_p16_224"}
    save_file(model.state_dict(), tmp_path / "old.safetensors", metadata=header)
    images = torch.randn(1, 3, 48, 48)
    loaded = load_backbone(tmp_path / "old.safetensors")
    torch.testing.assert_close(loaded(images), model(images), rtol=1e-5, atol=1e-5)


def test_a_header_of_something_else(tmp_path):
    for i, header in enumerate(('{"spec": {"arch": 3}}', "[1]", "{", '{"spec": {"nonsense": 1}}')):
        path = tmp_path / f"{i}.safetensors"
        save_file({"a": torch.zeros(1)}, path, metadata={"xdino": header})
        with pytest.raises(RunFailed, match="damaged"):
            load_backbone(path)


@pytest.mark.slow
def test_onnx_follows_batch_and_image_size(run, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    said = []
    path = export_backbone(str(run), tmp_path / "x.onnx", "onnx", say=said.append)
    assert len(said) == 6
    assert [p.name for p in tmp_path.iterdir()] == ["x.onnx"], "one file, nothing half-written"
    model = onnx.load(path)
    assert says_what_it_holds({p.key: p.value for p in model.metadata_props})
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    backbone = load_backbone(run)
    for batch, height, width in ((1, 48, 48), (3, 8, 8), (1, 96, 40), (3, 61, 35), (1, 5, 130)):
        images = torch.randn(batch, 3, height, width)
        (theirs,) = session.run(None, {"images": images.numpy()})
        difference = (torch.from_numpy(theirs) - backbone(images)).abs().max()
        assert difference < 1e-4, (batch, height, width)
    # The check is one: a graph of other weights is refused, and leaves no file.
    spec = backbone.spec
    with torch.no_grad():
        backbone.norm.bias[0] += 1
    with pytest.raises(RunFailed, match="differs"):
        list(to_onnx.check(backbone, spec, path))


def test_onnx_without_its_packages(run, tmp_path, monkeypatch):
    monkeypatch.setattr(to_onnx, "PACKAGES", ("onnx_that_nobody_has", "torch"))
    with pytest.raises(UsageError, match=r"needs onnx_that_nobody_has: .*xdino\[onnx\]"):
        export_backbone(str(run), tmp_path / "x.onnx", "onnx")


def test_torch_hub_from_a_checkout(run, tmp_path):
    spec = BackboneSpec("xcit_nano_12_p16")
    model = shaken(spec.build())
    torch.save(model.state_dict(), tmp_path / "nano.pth")
    images = torch.ones(1, 3, 48, 40)
    save_file(
        {"nano": model(images), "run": load_backbone(run)(images)},
        tmp_path / "expected.safetensors",
    )
    code = """
import sys, torch
from safetensors.torch import load_file
root, folder, run = sys.argv[1:]
def load(name, **options):
    return torch.hub.load(root, name, source="local", **options)
images, expected = torch.ones(1, 3, 48, 40), load_file(folder + "/expected.safetensors")
named = load("xcit_nano_12_p16", weights=folder + "/nano.pth")
import xdino
assert xdino.__file__.startswith(root), xdino.__file__
assert torch.allclose(named(images), expected["nano"], atol=1e-5)
assert torch.allclose(load("xdino", weights=run)(images), expected["run"], atol=1e-5)
assert load("xcit_nano_12_p8", in_chans=1, drop_path_rate=0.1).training
for wrong in ({"weights": folder + "/nano.pth"}, {"pretrained": True}):
    try:
        load("xcit_tiny_12_p16", **wrong)
    except ValueError as error:
        print(error)
    else:
        raise SystemExit("accepted")
import ssl, asyncio
ssl.SSLContext
assert root not in ssl.__file__
sys.path.insert(0, root)
import hubconf
entries = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and name[0] != "_"]
print(len(entries), {"xdino", "xcit_small_12_p16", "dino_vits16"} <= set(entries))
"""
    # -I: neither the environment's paths nor the working directory's.
    command = [sys.executable, "-I", "-c", code, str(ROOT), str(tmp_path), str(run)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "it fits xcit_nano_12_p16" in done.stdout
    assert "nothing is downloaded" in done.stdout
    assert done.stdout.splitlines()[-1] == "32 True"
