"""Jaccard indices of attention masks with masks drawn by people: layout, void, figures."""

import os

import numpy as np
import pytest
from PIL import Image

from xdino.backbones import BackboneSpec
from xdino.errors import UsageError
from xdino_eval.attention import segmentation
from xdino_eval.attention.maps import class_attention_maps, mask
from xdino_eval.attention.segmentation import chance, find_pairs, jaccard, read_mask


@pytest.fixture
def folder(tmp_path):
    """Three images with a square, and the masks of it."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(3):
        image = rng.integers(0, 90, (40, 56, 3), dtype=np.uint8)
        truth = np.zeros((40, 56), np.uint8)
        truth[8:24, 8 * i : 8 * i + 20] = 255
        image[truth > 0] += 150
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.jpg")
        Image.fromarray(truth).save(tmp_path / "masks" / f"{i}.png")
    return tmp_path


@pytest.fixture
def xcit():
    shape = {"embed_dim": 32, "depth": 1, "num_heads": 4}
    return BackboneSpec("xcit_nano_12_p8", shape=shape, input_size=40, resize=40).build().eval()


def test_jaccard_by_hand():
    a, b = np.zeros((2, 10, 10), bool)
    a[:5], b[2:6, :5] = True, True
    assert jaccard(a, b) == 15 / 55
    counted = np.ones((10, 10), bool)
    counted[0:2] = False
    assert jaccard(a, b, counted) == 15 / 35
    assert jaccard(a, a) == 1
    with pytest.raises(ValueError, match="no Jaccard index"):
        jaccard(~counted, b, np.zeros_like(counted))


def test_chance_is_what_masks_laid_anywhere_get():
    rng = np.random.default_rng(0)
    truth = np.zeros(4000, bool)
    truth[:700] = True
    found = []
    for _ in range(100):
        laid = np.zeros(4000, bool)
        laid[rng.choice(4000, 1500, replace=False)] = True
        found.append(jaccard(laid, truth))
    assert chance(laid, truth, np.ones(4000, bool)) == pytest.approx(np.mean(found), abs=2e-3)


def test_figures_are_those_of_the_masks(folder, xcit):
    rows, (_, last) = segmentation.evaluate(xcit, folder, mass=0.5)
    by_hand, mean_map = [], []
    for pair in find_pairs(folder):
        truth = np.asarray(Image.open(pair.mask)) > 0
        maps = class_attention_maps(xcit, np.asarray(Image.open(pair.image)), 80)
        heads, place = maps.layers[-1], maps.lattice
        by_hand.append([jaccard(mask(h, place, 40, 56, 0.5), truth) for h in heads])
        mean_map.append(jaccard(mask(heads.mean(0), place, 40, 56, 0.5), truth))
    np.testing.assert_allclose(last.heads, by_hand)
    np.testing.assert_allclose(last.mean_map, mean_map)
    assert [row.settings["layer"] for row in rows] == ["layer1", "layer2"]
    figures, by_hand = rows[1].metrics, 100 * np.array(by_hand)
    wanted = {
        "best head": by_hand.max(1).mean(),
        "mean head": by_hand.mean(),
        "one head": by_hand.mean(0).max(),
        "mean map": 100 * np.mean(mean_map),
        "head 3": by_hand[:, 2].mean(),
    }
    for name, value in wanted.items():
        assert figures[f"jaccard {name}"] == pytest.approx(value, abs=1e-4)
    assert rows[1].settings["size"] == "longer 112", "twice the images' own 56 pixels"
    assert "shown at 112 x 80 pixels, 14 x 10 patches of 8" in rows[1].transform
    assert segmentation.evaluate(xcit, folder, size=40)[0][0].settings["size"] == 40
    assert (rows[1].top1, rows[1].val_size, rows[1].settings["mass"]) == (None, 3, 0.5)


def test_the_truth_itself_scores_a_hundred(folder, xcit, monkeypatch):
    """Attention that lies exactly on the object, at full resolution, is a Jaccard index of 1."""
    truths = iter([np.asarray(Image.open(p.mask)) > 0 for p in find_pairs(folder)])

    def perfect(backbone, image, size, layers):
        return segmentation_maps(next(truths).astype(np.float32))

    monkeypatch.setattr(segmentation, "class_attention_maps", perfect)
    (scores,), _, _ = segmentation.score(xcit, find_pairs(folder), mass=1.0)
    assert scores.summary()["jaccard best head"] == 100


def segmentation_maps(one):
    from xdino_eval.attention.maps import Maps

    return Maps((one[None],))


def test_void_and_palettes(tmp_path):
    values = np.zeros((6, 6), np.uint8)
    values[1:3], values[3] = 7, 255
    palette = Image.fromarray(values)
    palette.putpalette(list(range(256)) * 3)
    palette.save(tmp_path / "voc.png")
    thing, counted = read_mask(tmp_path / "voc.png")
    assert (thing.sum(), counted.sum()) == (12, 30)
    Image.fromarray(values).save(tmp_path / "grey.png")
    with pytest.raises(UsageError, match="--ignore 255 if that is the void"):
        read_mask(tmp_path / "grey.png")
    assert read_mask(tmp_path / "grey.png", 255)[0].sum() == 12
    assert read_mask(tmp_path / "grey.png", "none")[0].sum() == 18
    for mode in ("1", "RGB", "RGBA", "LA"):
        Image.fromarray(np.where(values == 7, 255, 0).astype(np.uint8)).convert(mode).save(
            tmp_path / "m.png"
        )
        thing, counted = read_mask(tmp_path / "m.png")
        assert (thing.sum(), counted.all()) == (12, True), mode


def test_masks_without_an_object_are_left_out_and_told(folder, xcit):
    Image.new("L", (56, 40)).save(folder / "masks" / "1.png")
    rows, scores = segmentation.evaluate(xcit, folder)
    assert scores[0].names == ["0", "2"]
    assert rows[0].notes == ["1 masks without an object were left out"]
    for i in (0, 2):
        Image.new("L", (56, 40)).save(folder / "masks" / f"{i}.png")
    with pytest.raises(UsageError, match="no mask holds an object"):
        segmentation.evaluate(xcit, folder)


def test_the_layout_is_checked_first(folder, tmp_path):
    with pytest.raises(UsageError, match="it has no images"):
        find_pairs(tmp_path / "images")
    (folder / "masks" / "2.png").rename(folder / "masks" / "3.png")
    with pytest.raises(UsageError, match="masks has no mask for 2"):
        find_pairs(folder)
    (folder / "masks" / "3.png").rename(folder / "masks" / "2.png")
    Image.new("L", (40, 56)).save(folder / "masks" / "0.png")
    with pytest.raises(UsageError, match=r"0\.png has 40 x 56 pixels and its image 56 x 40"):
        find_pairs(folder)
    (folder / "masks" / "0.gif").write_bytes(b"")
    with pytest.raises(UsageError, match="have the same stem"):
        find_pairs(folder)


def test_what_cannot_be_read_is_left_out_and_told(folder, xcit, tmp_path):
    whole = segmentation.evaluate(xcit, folder)[1][-1]
    picture = (folder / "images" / "1.jpg").read_bytes()
    (folder / "images" / "1.jpg").write_bytes(picture[: len(picture) // 2])
    (folder / "images" / "folder.png").mkdir()
    os.mkfifo(folder / "images" / "pipe.png")
    rows, (*_, left) = segmentation.evaluate(xcit, folder)
    assert left.names == ["0", "2"]
    np.testing.assert_allclose(left.heads, whole.heads[[0, 2]])
    assert rows[0].notes[0].startswith("1 images could not be read, the first: ")
    assert "1.jpg cannot be read as an image" in rows[0].notes[0]
    (folder / "masks" / "2.png").write_bytes(b"")
    assert "2 images could not" in segmentation.evaluate(xcit, folder)[0][0].notes[0]
    (folder / "masks" / "0.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"0\.png cannot be read as a mask"):
        segmentation.evaluate(xcit, folder)


def test_a_head_without_any_attention_on_patches():
    from xdino_eval import attention

    assert not attention.mask(np.zeros((4, 4), np.float32), None, 20, 20).any()
