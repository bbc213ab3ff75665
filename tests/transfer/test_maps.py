"""Pictures with masks in their real layouts, what can be wrong with them, and how they are shown."""

import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from xdino.errors import UsageError
from xdino_transfer.judging.submission import Masks
from xdino_transfer.resizing import fitted, padded, resized_labels
from xdino_transfer.segmentation.maps import open_maps, open_test, read_mask
from xdino_transfer.segmentation.views import TestViews as Whole
from xdino_transfer.segmentation.views import TrainViews, recoloured

H, W = 12, 18
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(path, size=(W, H), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


def mask(path, value=1, size=(W, H), palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.full((size[1], size[0]), value, np.uint8)
    labels[0, 0] = 255
    image = Image.fromarray(labels)
    if palette:
        image = image.convert("P")
        image.frombytes(labels.tobytes())
        image.putpalette([7, 99, 200] * 256)
    image.save(path)


def plain(root, value=1, names="sky\ntree\n", count=1):
    for part in ("train", "val"):
        for n in range(count):
            picture(root / "images" / part / f"{n}.jpg")
            mask(root / "masks" / part / f"{n}.png", value)
    (root / "classes.txt").write_text(names)
    return root


def test_ade20k(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for part in ("training", "validation"):
        picture(root / "images" / part / "ADE_1.jpg")
        mask(root / "annotations" / part / "ADE_1.png", 150)
        (root / "annotations" / part / "notes.txt").write_text("none")
    rows = "".join(f"{n}\t0.1\t1\t1\tname {n}\n" for n in range(1, 151))
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + rows)
    for data in (tmp_path, root):
        train, val = open_maps(str(data))
        assert (len(train), len(val), len(train.classes)) == (1, 1, 150)
        assert train.classes[149] == "name 150"
        image, labels = val.read(0)
        assert image.shape == (H, W, 3)
        assert labels.dtype == np.uint8
        assert np.unique(labels).tolist() == [149, 255]
    mask(root / "annotations" / "training" / "ADE_1.png", 0)
    assert np.unique(open_maps(str(root))[0].read(0)[1]).tolist() == [255]


def test_voc_has_palettes(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    picture(root / "JPEGImages" / "a.jpg")
    mask(root / "SegmentationClass" / "a.png", 20, palette=True)
    assert Image.open(root / "SegmentationClass" / "a.png").mode == "P"
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split in ("train", "val"):
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("a\n")
    train, _ = open_maps(str(tmp_path))
    assert train.classes[20] == "tvmonitor"
    assert np.unique(train.read(0)[1]).tolist() == [20, 255]


def test_pictures_beside_masks(tmp_path):
    train, _ = open_maps(str(plain(tmp_path)))
    assert (train.classes, np.unique(train.read(0)[1]).tolist()) == (("sky", "tree"), [1, 255])
    train, _ = open_maps(str(tmp_path), zero_is_void=True)
    assert np.unique(train.read(0)[1]).tolist() == [0, 255]
    picture(tmp_path / "images" / "train" / "0.jpg", (H, W), exif=_turned())
    assert train.read(0)[0].shape == (H, W, 3)


def test_folders_below_and_what_is_no_picture(tmp_path):
    root = plain(tmp_path)
    picture(root / "images" / "train" / "north" / "0.jpg")
    mask(root / "masks" / "train" / "north" / "0.png", 1)
    (root / "images" / "train" / "notes.doc").write_text("none")
    (root / "images" / "train" / "._0.jpg").write_bytes(b"of macOS")
    (root / "classes.txt").write_bytes(b"\xef\xbb\xbfsky\r\n\r\ntree\r\n")
    train, _ = open_maps(str(root))
    assert train.classes == ("sky", "tree")
    assert [path.relative_to(root).as_posix() for path in train.masks] == [
        "masks/train/0.png", "masks/train/north/0.png"
    ]  # fmt: skip
    assert "1 file of" in train.notices[0]
    assert ".doc (1)" in train.notices[0]
    (root / "classes.txt").write_text("sky\ntree\nsky\n")
    with pytest.raises(UsageError, match=r"classes\.txt names sky more than once"):
        open_maps(str(root))


def test_a_test_split_may_have_no_masks(tmp_path):
    root = plain(tmp_path / "plain")
    with pytest.raises(UsageError, match=r"there is no folder .*images/test"):
        open_test(str(root))
    for name in ("0.jpg", "north/0.jpg"):
        picture(root / "images" / "test" / name)
    found = open_test(str(root))
    assert (found.classes, len(found), found.masks) == (("sky", "tree"), 2, [])
    assert found.picture(1).shape == (H, W, 3)
    # As many masks, in the same folders, in the layout's own numbers.
    for zero, path in ((False, tmp_path / "s"), (True, tmp_path / "s.zip")):
        made = Masks(path, replace(found, zero_is_void=zero))
        for index in (0, 1):
            made.add(index, np.ones((H, W), np.int64))
        made.finish(shared=False)
    assert np.unique(read_mask(tmp_path / "s" / "north" / "0.png")).tolist() == [1]
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        assert archive.namelist() == ["0.png", "north/0.png"]
        assert np.unique(read_mask(archive.open("0.png"))).tolist() == [2]
    for folder in (root / "images" / "test", root / "images/test/../test"):
        with pytest.raises(UsageError, match="is the folder of the data itself"):
            Masks(folder, found)
    for name in ("0.png", "north/0.png"):
        mask(root / "masks" / "test" / name)
    assert len(open_test(str(root)).masks) == 2
    (root / "masks" / "test" / "0.png").unlink()
    with pytest.raises(UsageError, match=r"1 of the 2 pictures of test of .* lack a file"):
        open_test(str(root))
    voc = tmp_path / "voc"
    picture(voc / "JPEGImages" / "b.jpg")
    (voc / "SegmentationClass").mkdir()
    (voc / "ImageSets" / "Segmentation").mkdir(parents=True)
    (voc / "ImageSets" / "Segmentation" / "test.txt").write_text("b\n")
    assert (len(open_test(str(voc))), open_test(str(voc)).masks) == (1, [])


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_what_a_mask_must_not_be(tmp_path):
    root = plain(tmp_path, value=2)
    path = root / "masks" / "train" / "0.png"
    train, _ = open_maps(str(root))
    with pytest.raises(UsageError, match=r"has label 2, and the classes of train of .* are 0 to 1"):
        train.read(0)
    assert open_maps(str(root), zero_is_void=True)[0].read(0)[1].max() == 255
    mask(path, 1, (W, H + 1))
    with pytest.raises(UsageError, match="has 18 x 13 pixels, and its picture 18 x 12"):
        train.read(0)
    picture(path)
    with pytest.raises(UsageError, match="is a picture of colours"):
        train.read(0)
    path.write_bytes(b"nothing")
    with pytest.raises(UsageError, match="cannot be read as a mask: not an image"):
        train.read(0)
    jpeg = root / "masks" / "train" / "1.jpg"
    Image.fromarray(np.zeros((H, W), np.uint8)).save(jpeg)
    with pytest.raises(UsageError, match="is a JPEG, which changes labels"):
        read_mask(jpeg)
    bits = root / "bits.png"
    Image.fromarray(np.eye(4, dtype=bool)).save(bits)
    assert np.array_equal(read_mask(bits), np.eye(4))


def test_files_that_are_not_there(tmp_path):
    root = plain(tmp_path, count=20)
    (root / "masks" / "train" / "3.png").unlink()
    train, _ = open_maps(str(root))
    assert len(train) == 19
    assert "1 of the 20 pictures of train of" in train.notices[0]
    assert "3.png; they are left out" in train.notices[0]
    (root / "masks" / "train" / "4.png").unlink()
    with pytest.raises(UsageError, match=r"2 of the 20 pictures of train of .* lack a file"):
        open_maps(str(root))
    picture(root / "images" / "train" / "5.png")
    with pytest.raises(UsageError, match="has several pictures called 5"):
        open_maps(str(root))
    (root / "classes.txt").write_text("one\n")
    with pytest.raises(UsageError, match=r"classes.txt names 1 classes"):
        open_maps(str(root))
    (root / "classes.txt").unlink()
    with pytest.raises(UsageError, match=r"classes.txt cannot be read: No such file"):
        open_maps(str(root))
    with pytest.raises(
        UsageError, match="holds no pictures with masks: expected images/ and masks/"
    ):
        open_maps(str(root / "images"))
    (root / "annotations" / "training").mkdir(parents=True)
    (root / "images" / "training").mkdir()
    with pytest.raises(UsageError, match="mixes layouts"):
        open_maps(str(root))
    with pytest.raises(UsageError, match="there is no folder"):
        open_maps(str(root / "nowhere"))


# Views


def test_sizes_are_mmcvs():
    assert fitted(480, 640, 2048, 512) == (512, 683)
    assert fitted(100, 1000, 2048, 512) == (205, 2048)
    assert fitted(1, 10_000, 2048, 512) == (1, 2048)
    labels = torch.arange(6).view(2, 3)
    assert resized_labels(labels, (4, 6)).tolist()[2:] == [[3, 3, 4, 4, 5, 5]] * 2
    assert resized_labels(labels, (1, 2)).tolist() == [[0, 1]]
    batch = padded([torch.ones(3, 5, 4), torch.ones(3, 2, 7)], 32, value=-1)
    assert batch.shape == (2, 3, 32, 32)
    assert (batch[0, 0].sum(), batch[1, 0].sum()) == (20 - 1004, 14 - 1010)


def test_crops_follow_from_seed_epoch_and_number():
    views = TrainViews(MEAN, STD, crop=32, longer=128, shorter=40)
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)
    labels = np.tile(np.arange(60, dtype=np.uint8) // 10, (40, 1))
    found = [views(image, labels, views.draw(0, epoch, 5)) for epoch in (0, 1, 2, 0)]
    assert all(x.shape == (3, 32, 32) and y.shape == (32, 32) for x, y in found)
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[3], strict=True))
    assert not torch.equal(found[0][0], found[1][0])
    small = TrainViews(MEAN, STD, crop=64, longer=128, shorter=40, scales=(0.5, 0.5))
    x, y = small(image, labels, small.draw(0, 0, 0))
    assert (y[20:] == 255).all()
    assert (y[:20, 30:] == 255).all()
    assert (y[:20, :30] < 6).all()
    assert (x[:, 20:] == 0).all()


def test_crops_of_one_class_are_drawn_again():
    views = TrainViews(
        MEAN, STD, crop=8, longer=64, shorter=64, scales=(1, 1), colour=False, flip=0
    )
    labels = np.zeros((64, 64), np.uint8)
    labels[:, 32:] = 1
    image = np.repeat(labels[..., None] * 200, 3, 2)
    both = 0
    for number in range(40):
        x, y = views(image, labels, views.draw(0, 0, number))
        both += len(y.unique()) == 2
        assert torch.equal(x[0] > 1, y == 1)  # the picture and its labels move together
    assert both > 15  # one draw alone would see both in some 5 of 40


def test_colours():
    image = torch.rand(3, 4, 5) * 255
    never = np.full(9, 0.9)
    assert torch.equal(recoloured(image, never), image)
    brighter = recoloured(image, np.array([0.1, 1.0, *never[2:]]))
    assert torch.equal(brighter, (image + 32).clamp(max=255))
    for first in (0.1, 0.9):
        darker = recoloured(image, np.array([0.9, 0, first, 0.1, 0.0, *never[5:]]))
        assert torch.allclose(darker, image / 2)
    from matplotlib.colors import rgb_to_hsv

    def hsv(x):
        return rgb_to_hsv(x.permute(1, 2, 0).numpy() / 255)

    duller = recoloured(image, np.array([*never[:5], 0.1, 0.0, *never[7:]]))
    np.testing.assert_allclose(hsv(duller)[..., 1], hsv(image)[..., 1] / 2, atol=1e-5)
    np.testing.assert_allclose(hsv(duller)[..., ::2], hsv(image)[..., ::2], atol=1e-5)
    fuller = recoloured(image, np.array([*never[:5], 0.1, 1.0, *never[7:]]))
    np.testing.assert_allclose(
        hsv(fuller)[..., 1], np.minimum(hsv(image)[..., 1] * 1.5, 1), atol=1e-5
    )
    turned = recoloured(image, np.array([*never[:7], 0.1, 0.0]))
    np.testing.assert_allclose(hsv(turned)[..., 0], (hsv(image)[..., 0] - 0.1) % 1, atol=1e-4)


def test_whole_pictures():
    whole = Whole(MEAN, STD, longer=64, shorter=16)
    image = np.random.default_rng(0).integers(0, 255, (24, 30, 3)).astype(np.uint8)
    assert whole(image).shape == (1, 3, 16, 20)
    assert whole(image, 0.5).shape == (1, 3, 8, 10)
    assert torch.equal(whole(image, flipped=True), whole(image).flip(3))
