"""`xdino.load(...)`: features and attention of whatever a Python user calls an image."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import xdino
from xdino.checkpoint import load_backbone
from xdino.data import open_source
from xdino.errors import RunFailed
from xdino_eval.attention import class_attention_maps
from xdino_eval.features import extract
from xdino_eval.transform import EvalTransform


@pytest.fixture(scope="module")
def model(run):
    return xdino.load(run)


@pytest.fixture(scope="module")
def files(photos) -> list[Path]:
    return sorted(photos.iterdir())


def test_it_gives_what_the_evaluations_judge(model, photos, files):
    source = open_source(str(photos), channels=3)
    expected = extract(load_backbone(model.origin.path), source, EvalTransform.of(model)).features
    found = model.embed(photos)
    assert torch.equal(found, expected)
    assert (found.dtype, found.shape) == (torch.float32, (4, model.embed_dim))
    assert not found.is_inference()
    assert not found.requires_grad
    for others in (files, map(str, files), (path for path in files)):
        assert torch.equal(model.embed(others), expected)
    torch.testing.assert_close(model.embed(files, batch_size=3), expected)


def test_every_kind_of_image_is_the_same_image(model, files):
    expected = model.embed(files[0])
    picture = Image.open(files[0])
    pixels = np.asarray(picture)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    opaque = np.dstack([pixels, np.full(pixels.shape[:2], 9, np.uint8)])
    kinds = [
        *(str(files[0]), picture, pixels, pixels / np.float64(255), tensor, tensor / 255),
        *(opaque, picture.convert("RGBA"), (tensor / 255).requires_grad_()),
    ]
    for image in kinds:
        assert torch.equal(model.embed(image), expected), type(image)
    assert torch.equal(model.embed(kinds[:3]), model.embed([files[0]] * 3))
    batch = np.stack([pixels, pixels[::-1]])
    both = model.embed(batch)
    assert torch.equal(both, model.embed(torch.from_numpy(batch).permute(0, 3, 1, 2)))
    assert torch.equal(both, model.embed(list(batch)))


def test_grey_and_colour_meet_the_network(make_run, files, tmp_path):
    grey = xdino.load(make_run(tmp_path / "grey", channels=1))
    picture = Image.open(files[0])
    assert torch.equal(grey.embed(files[0]), grey.embed(picture.convert("L")))
    assert grey.embed(np.zeros((40, 40), np.uint8)).shape == (1, 16)
    assert grey.embed(np.zeros((5, 40, 40), np.uint8)).shape == (5, 16), "five grey images"
    assert grey.embed(torch.zeros(40, 40)).shape == (1, 16)
    colour = xdino.load(make_run(tmp_path / "colour"))
    level = np.asarray(picture.convert("L"))
    assert torch.equal(colour.embed(level), colour.embed(np.dstack([level] * 3)))
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(turned, exif=exif, quality=95)
    # The two decoders of JPEG differ by a level here and there.
    torch.testing.assert_close(
        colour.embed(Image.open(turned)), colour.embed(turned), atol=0.02, rtol=0.02
    )


def test_patches_and_other_sizes(model, files):
    features, patches = model.embed(files[:2], patches=True)
    torch.testing.assert_close(features, model.embed(files[:2]))
    assert patches.shape == (2, 4, 4, model.embed_dim)
    assert model.embed(files[0], patches=True, size=64)[1].shape == (1, 8, 8, model.embed_dim)
    picture = Image.open(files[0]).resize((32, 32))
    inputs = torch.from_numpy(np.asarray(picture).copy()).float() / 255 - torch.tensor(model.mean)
    inputs = (inputs / torch.tensor(model.std)).permute(2, 0, 1)[None]
    assert patches[:1].shape == model.tokens(inputs)[1].shape


def test_attention_is_the_map_that_is_drawn(model, files):
    image = np.asarray(Image.open(files[0]))
    drawn = class_attention_maps(model, image)
    maps = model.attention(files[0])
    assert torch.equal(maps, torch.from_numpy(drawn.layers[-1]))
    assert maps.shape == (2, 4, 5)  # heads, h, w of 40 x 48 pixels with the shorter side at 32
    first = class_attention_maps(model, image, layers=[1]).layers[0]
    assert torch.equal(model.attention(image, layer=1), torch.from_numpy(first))
    assert model.attention(image, size=80).shape == (2, 10, 12)
    assert ((maps.sum((1, 2)) > 0) & (maps.sum((1, 2)) < 1)).all()
    with pytest.raises(ValueError, match="choose one from 1 to 2"):
        model.attention(image, layer=3)
    with pytest.raises(ValueError, match="one image is needed here, got several"):
        model.attention(files)


def test_the_network_is_left_in_the_mode_that_it_was_in(run, files):
    model = xdino.load(run)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = model.embed(files)
    model.attention(files[0])
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(first, model.embed(files)), "no dropout, no statistics of the batch"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("nowhere.png", "there is no image file nowhere.png"),
        ([], "no images to embed"),
        (None, "got None"),
        ([3], "got a int"),
        (np.zeros((4, 4, 4, 4, 4), np.uint8), r"the shape \[4, 4, 4, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), "without pixels"),
        (np.zeros((40, 40, 3), np.int64), "got int64"),
        (np.full((40, 40, 3), 200.0), "0 to 1, got 200 to 200: divide by 255"),
        (np.full((40, 40, 3), np.nan), "0 to 1, got nan"),
        (torch.full((3, 40, 40), -1.0), r"model\(batch\)"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_said_in_a_sentence(model, images, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            model.embed(images)


def test_files_that_are_no_images_are_named(model, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"text\.png cannot be read as an image"):
        model.embed([tmp_path / "text.png"])
    with pytest.raises(ValueError, match="holds no image"):
        model.embed(tmp_path / "empty")
    cut = tmp_path / "cut.png"
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[:-30])
    with pytest.raises(ValueError, match="of Pillow cannot be read"):
        model.embed(Image.open(cut))
    with pytest.raises(ValueError, match="smaller than a patch"):
        model.attention(np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="size must be 1 pixel or more"):
        model.embed(np.zeros((40, 40), np.uint8), size=0)
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        model.embed(np.zeros((40, 40), np.uint8), batch_size=0)


def test_broken_weights_give_no_features(run, files):
    model = xdino.load(run)
    with torch.no_grad():
        model.norm.bias[0] = torch.nan
    with pytest.raises(RunFailed, match="image 0 are not finite"):
        model.embed(files)


def test_a_network_without_patches_says_so(files):
    from xdino.backbones import BackboneSpec

    model = BackboneSpec("resnet10t", input_size=32, resize=32).build()
    assert model.embed(files[0]).shape == (1, 512)
    with pytest.raises(ValueError, match="no patch tokens"):
        model.embed(files[0], patches=True)
    with pytest.raises(ValueError, match="no class attention"):
        model.attention(files[0])
