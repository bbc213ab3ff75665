"""One folder that timm, transformers and xdino load, offline, and give the same features from."""

import json
import os

import numpy as np
import pytest
import safetensors
import timm
import torch
from PIL import Image

import xdino as api
from xdino.errors import RunFailed, UsageError
from xdino_eval import results
from xdino_eval.results import Row
from xdino_launch.export import to_folder, to_onnx
from xdino_launch.export.backbone import export_backbone

XCIT = "xcit_nano_12_p8"
SMALL = {"embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("socket.socket.connect", None)


@pytest.fixture
def without_transformers(monkeypatch):
    """Its import takes seconds: one test is enough."""
    find = to_folder.importlib.util.find_spec
    monkeypatch.setattr(
        to_folder.importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )  # fmt: skip


@pytest.mark.usefixtures("without_transformers")
@pytest.mark.parametrize(
    ("arch", "shape", "channels", "arguments"),
    [
        (XCIT, SMALL | {"class_attention_layers": 1, "tokens_norm": True}, 3,
         {"embed_dim": 16, "depth": 1, "num_heads": 2, "tokens_norm": True, "cls_attn_layers": 1}),
        (XCIT, SMALL, 1, {"in_chans": 1, **SMALL}),
        ("xcit_nano_12_p4", SMALL | {"patch_size": 16}, 3, SMALL),
        ("vit_tiny_patch16_224", {}, 3, {"img_size": 32}),
        ("vit_tiny_patch16_224.dino", {}, 3, {"img_size": 224}),
        ("resnet10t", {}, 1, {"in_chans": 1}),
    ],
)  # fmt: skip
def test_timm_builds_what_it_was(make_run, tmp_path, arch, shape, channels, arguments):
    size = 224 if arch.endswith("dino") else 32
    run = make_run(tmp_path / "run", arch, shape, channels, size)
    said = []
    folder = export_backbone(str(run), tmp_path / "a folder", "hf", say=said.append)
    assert sorted(path.name for path in folder.iterdir()) == sorted(to_folder.FILES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a folder", "run"]
    config = json.loads((folder / "config.json").read_text())
    assert config.get("model_args") == arguments
    assert config["num_classes"] == 0
    model, loaded = api.load(run), api.load(folder)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, channels, size, size)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), model(images), rtol=1e-4, atol=1e-5)
    assert torch.equal(loaded(images), model(images))
    assert loaded.spec == model.spec
    assert loaded.origin.facts["iteration"] == 7
    assert "gives the same features" in said[0]
    assert said[1:] == ["transformers is not installed here: not tried with it"]


def test_transformers_loads_it_and_sees_the_same_pixels(xdino, run, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "hf"
    code, out, err = xdino("export", run, "--out", folder, "--format", "hf")
    assert (code, out.strip()) == (0, str(folder)), err
    assert "transformers' TimmWrapperModel does" in err
    network = transformers.TimmWrapperModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 48, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    with torch.no_grad():
        found = network(**processor(image)).pooler_output
    expected = api.load(run).embed(image)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.usefixtures("without_transformers")
def test_the_card_says_what_was_measured(make_run, tmp_path):
    run = make_run(tmp_path / "run")
    sha = api.load(run).origin.sha256
    hostile = "a | b\n<script>"
    rows = [
        Row("k-NN", {"k": 20}, 78.125, 97.0, hostile, "", 100, 10, sha, "teacher"),
        Row("k-NN", {"k": 20}, 1.5, 2.0, "other weights", "", 100, 10, "0" * 64, "teacher"),
    ]
    results.append(run / "results.json", rows)
    folder = export_backbone(str(run), tmp_path / "hf", "hf")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    assert r"| k-NN | k 20 | a \| b &lt;script> | 78.12 |" in card
    assert "other weights" not in card
    assert "| architecture | xcit_nano_12_p8 |" in card
    assert 'timm.create_model("local-dir:FOLDER"' in card


@pytest.mark.usefixtures("without_transformers")
def test_an_earlier_export_is_replaced_and_nothing_else(make_run, run, tmp_path):
    folder = export_backbone(str(run), tmp_path / "hf", "hf")
    other = make_run(tmp_path / "run", shape=SMALL)
    export_backbone(str(other), folder, "hf")
    assert api.load(folder).spec == api.load(other).spec
    (tmp_path / "empty").mkdir()
    assert export_backbone(str(run), tmp_path / "empty", "hf").is_dir()
    for taken in (tmp_path, run, folder / "config.json"):
        with pytest.raises(UsageError, match=r"something else|is a file"):
            export_backbone(str(run), taken, "hf")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"an earlier export \(notes\.txt\): choose a new folder"):
        export_backbone(str(run), folder, "hf")
    assert os.stat(tmp_path / "hf").st_mode & 0o777 == os.stat(tmp_path / "empty").st_mode & 0o777


@pytest.mark.usefixtures("without_transformers")
def test_what_comes_back_otherwise_is_refused_and_leaves_nothing(run, tmp_path, monkeypatch):
    tensors = to_folder.timm_tensors
    monkeypatch.setattr(
        to_folder, "timm_tensors", lambda b: {k: v + 0.1 for k, v in tensors(b).items()}
    )
    with pytest.raises(RunFailed, match="from the folder gives other features"):
        export_backbone(str(run), tmp_path / "hf", "hf")
    monkeypatch.setattr(to_folder, "timm_tensors", tensors)
    monkeypatch.setattr(to_folder, "crop_share", lambda view: 0.5)
    with pytest.raises(RunFailed, match="another view of an image"):
        export_backbone(str(run), tmp_path / "hf", "hf")
    assert not list(tmp_path.iterdir())


def test_what_timm_has_no_words_for(make_run, tmp_path):
    for arch, shape, message in (
        ("xcit_nano_12_p4", SMALL, "patch sizes 8 and 16, not 4"),
        ("vit_tiny_patch16_224.dino", {}, "stretches positions otherwise"),
    ):
        run = make_run(tmp_path / arch, arch, shape)
        for path, format in ((tmp_path / "hf", "hf"), (tmp_path / "x.safetensors", "timm")):
            with pytest.raises(UsageError, match=message):
                export_backbone(str(run), path, format)
            assert not path.exists()


def test_the_side_that_images_are_resized_to_survives_timms_rounding():
    from xdino.backbone import Preprocessing

    for size in range(16, 400, 7):
        for resize in (size, size + 1, round(size * 256 / 224), size * 2 - 1, max(1, size - 3)):
            view = Preprocessing(size, resize, (0.5,), (0.5,))
            assert int(size / to_folder.crop_share(view)) == resize


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "x"), "x does not say its format"),
        (("--out", "x.pt"), "for a folder --format hf"),
        (("--out", "x.onnx", "--format", "published"), "writes .safetensors files, got --out x.onnx"),
        (("--out", "x.safetensors", "--format", "onnx"), "onnx writes .onnx files"),
        (("--out", "x.onnx", "--format", "hf"), "hf writes a folder, got --out x.onnx"),
        (("--out", "there.safetensors"), "is a folder, and --format published writes a file"),
    ],
)  # fmt: skip
def test_a_format_that_contradicts_the_name(xdino, run, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.safetensors").mkdir()
    code, out, err = xdino("export", run, *options)
    assert (code, out) == (2, "")
    assert message in err


def test_onnx_is_told_by_the_name_of_the_file(xdino, run, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(to_onnx, "require", lambda: None)
    monkeypatch.setattr(to_onnx, "write", lambda backbone, spec, path, *_: written.append(path))
    code, out, err = xdino("export", run, "--out", tmp_path / "x.onnx")
    assert (code, out.strip()) == (0, str(tmp_path / "x.onnx")), err
    assert written == [tmp_path / "x.onnx"]
