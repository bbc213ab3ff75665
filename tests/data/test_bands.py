"""Images of bands: TIFF and NPY of every type, what declares their range, and what no image can be."""

import importlib.util
import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from xdino import config
from xdino.backbones import BackboneSpec
from xdino.config.bands import Bands, picture
from xdino.data import open_source
from xdino.data.decode import UnreadableImage, decode
from xdino.data.sources import splits_of
from xdino.errors import UsageError
from xdino.plan import make_plan

SHAPE = (24, 20)


def tiff(path: Path, image: np.ndarray, **how: object) -> bytes:
    tifffile.imwrite(path, image, **{"photometric": "minisblack", "planarconfig": "contig", **how})
    return path.read_bytes()


def npy(path: Path, image: np.ndarray) -> bytes:
    np.save(path, image, allow_pickle=image.dtype == object)
    return path.read_bytes()


def noise(bands: int, most: int = 4096, kind: str = "uint16", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, most, (*SHAPE, bands)).astype(kind)


def levels(image: np.ndarray, low: float, high: float) -> np.ndarray:
    scaled = np.clip((image.astype(np.float64) - low) * 255 / (high - low), 0, 255)
    return np.rint(scaled).astype(np.uint8)


LAYOUTS = {
    "side by side": {},
    "big-endian": {"byteorder": ">"},
    "big": {"bigtiff": True},
    "tiles, LZW": {"tile": (16, 16), "compression": "lzw", "predictor": True},
    "Zstandard": {"compression": "zstd"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiffs_of_every_layout_give_the_same_pixels(tmp_path, layout):
    image = noise(13)
    data = tiff(tmp_path / "a.tif", image, **LAYOUTS[layout])
    np.testing.assert_array_equal(decode(data, Bands(13, [(0, 4095)])), levels(image, 0, 4095))


def test_planes_and_pages_are_bands_too(tmp_path):
    image, bands = noise(5), Bands(5, [(0, 4095)])
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    wanted = levels(image, 0, 4095)
    data = tiff(tmp_path / "planes.tif", planes, planarconfig="separate")
    np.testing.assert_array_equal(decode(data, bands), wanted)
    tifffile.imwrite(tmp_path / "pages.tif", planes, photometric="minisblack")
    np.testing.assert_array_equal(decode((tmp_path / "pages.tif").read_bytes(), bands), wanted)
    for number, array in enumerate((image, planes, np.asfortranarray(image))):
        data = npy(tmp_path / f"{number}.npy", array)
        np.testing.assert_array_equal(decode(data, bands), wanted)


@pytest.mark.parametrize(
    ("kind", "most", "low", "high"),
    [
        ("uint8", 256, 0, 255), ("uint16", 65536, 0, 65535), ("int16", 32768, 0, 32767),
        ("uint32", 2**32, 0, 2**32 - 1), ("float32", 1, 0, 1), ("float64", 1, 0, 1),
    ],
)  # fmt: skip
def test_what_nobody_declared_is_what_the_type_holds(tmp_path, kind, most, low, high):
    image = (np.random.default_rng(0).random((*SHAPE, 4)) * (high if most > 1 else 1)).astype(kind)
    for data in (npy(tmp_path / "a.npy", image), tiff(tmp_path / "a.tif", image)):
        np.testing.assert_array_equal(decode(data, Bands(4)), levels(image, low, high))


def test_every_band_has_its_own_range(tmp_path):
    image = noise(4, kind="float32")
    pairs = [(0, 4095), (100, 200), (-4095, 4095), (0, 3000)]
    wanted = np.stack([levels(image[..., b], *pair) for b, pair in enumerate(pairs)], -1)
    with pytest.raises(UnreadableImage, match=r"not between 100 and 200.*declare data\.range"):
        decode(npy(tmp_path / "a.npy", image), Bands(4, pairs))
    image[..., 1] = 150
    wanted[..., 1] = levels(image[..., 1], 100, 200)
    np.testing.assert_array_equal(decode(npy(tmp_path / "a.npy", image), Bands(4, pairs)), wanted)


def test_a_file_may_say_black_and_white_itself(tmp_path):
    image = noise(4)
    tags = [(340, "H", 1, 0, True), (341, "H", 1, 4095, True)]  # SMinSampleValue, SMaxSampleValue
    data = tiff(tmp_path / "a.tif", image, extratags=tags)
    np.testing.assert_array_equal(decode(data, Bands(4)), levels(image, 0, 4095))
    np.testing.assert_array_equal(decode(data, Bands(4, [(0, 8191)])), levels(image, 0, 8191))


def test_pictures_are_read_by_a_declared_range_as_well(tmp_path):
    deep = noise(1)[..., 0]
    Image.fromarray(deep).save(tmp_path / "deep.png")
    found = decode((tmp_path / "deep.png").read_bytes(), Bands(1, [(0, 4095)]))
    np.testing.assert_array_equal(found[..., 0], levels(deep, 0, 4095))
    four = noise(4, 256, "uint8")
    Image.fromarray(four, "RGBA").save(tmp_path / "four.png")
    np.testing.assert_array_equal(decode((tmp_path / "four.png").read_bytes(), Bands(4)), four)


NO_IMAGES = {
    "seventeen": (noise(17), r"it has 17 bands \(at most 16 are possible\)"),
    "five": (noise(5), "it has 5 bands, and 4 are read of all images"),
    "complex": (noise(4).astype("complex64"), "complex numbers: write their magnitude"),
    "nan": (np.full((*SHAPE, 4), np.nan, "float32"), "pixels that are not finite"),
    "far": (1e4 + noise(4).astype("float32"), r"not between 0 and 1.*declare data\.range"),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_no_image_of_bands_is(tmp_path, name):
    image, why = NO_IMAGES[name]
    with pytest.raises(UnreadableImage, match=why):
        decode(tiff(tmp_path / "a.tif", image), Bands(4))
    if name != "seventeen":
        with pytest.raises(UnreadableImage, match=why):
            decode(npy(tmp_path / "a.npy", image), Bands(4))


def test_arrays_that_are_no_images_and_files_that_are_cut_short(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("opened",))

    whole = npy(tmp_path / "a.npy", noise(4))
    bomb = whole.replace(b"(24, 20, 4)", b"(9999999, 99, 4)", 1)
    for data, why in (
        (npy(tmp_path / "o.npy", np.array([[Trap()] * 4] * 4, object)), "Python's objects"),
        (npy(tmp_path / "t.npy", np.array([["a", "b"]])), "which are no numbers"),
        (npy(tmp_path / "e.npy", np.zeros((0, 3, 4))), "is no image"),
        (npy(tmp_path / "n.npy", np.zeros((2, 3, 4, 5))), "is no image"),
        (npy(tmp_path / "s.npy", np.zeros((20, 30, 40))), r"it has the shape \[20, 30, 40\]"),
        (whole[:-100], "it is cut short"),
        (bomb, "pixels are more than the limit|damaged|cut short"),
        (whole[:20], "damaged: its header"),
        (tiff(tmp_path / "a.tif", noise(4))[:-100], "damaged"),
        (b"", "the file is empty"),
        (b"no image at all", "not an image"),
    ):
        with pytest.raises(UnreadableImage, match=why):
            decode(data, Bands(4), max_pixels=10**6)


def test_a_stack_is_no_image_unless_its_pages_are_the_bands(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, *SHAPE), "uint16"), photometric="minisblack")
    with pytest.raises(UnreadableImage, match="it has 5 pages of 1 band: write one image a file"):
        decode((tmp_path / "a.tif").read_bytes(), Bands(4))
    source = open_source(str(tmp_path))
    assert source.channels == 3
    assert source.notices()[-1].endswith("(--model.in_chans 5 takes them for bands)")


# Which bands a folder has


def test_the_images_say_how_many_bands_there_are(tmp_path):
    for number in range(12):
        tiff(tmp_path / f"{number:02}.tif", noise(13 if number % 6 else 5))
    source = open_source(str(tmp_path))
    assert repr(source.channels) == "Bands(13, (), ())"
    assert source.read(1).shape == (*SHAPE, 13)
    with pytest.raises(UnreadableImage, match="it has 5 bands, and 13 are read"):
        source.read(0)
    with pytest.raises(UnreadableImage, match="it has 13 bands, and 3 channels are read"):
        open_source(str(tmp_path), channels=3).read(1)
    asked = open_source(str(tmp_path), channels=Bands(0, [(0, 4095)], (3, 2, 1)))
    assert repr(asked.channels) == "Bands(13, ((0.0, 4095.0),), (3, 2, 1))"


def test_photographs_are_what_they_were(tmp_path):
    """uint8 in colour and grey, 16 bits in grey: TIFFs that Pillow reads."""
    tiff(tmp_path / "a.tif", noise(3, 256, "uint8"), photometric="rgb")
    tiff(tmp_path / "b.tif", noise(1)[..., 0])
    np.save(tmp_path / "beside.npy", np.zeros(3))
    source = open_source(str(tmp_path))
    assert type(source.channels) is int
    assert [source.read(i).shape for i in range(2)] == [(*SHAPE, 3)] * 2
    assert source.left_out == {".npy": 1}
    assert open_source(str(tmp_path), channels=Bands(0, [(0, 4095)])).channels in (1, 3)


def test_arrays_are_images_where_there_are_no_others(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            npy(tmp_path / split / name / "x.npy", noise(6))
    assert splits_of(str(tmp_path)) == ("train", "val")
    source = open_source(str(tmp_path), "train", labelled=True)
    assert (source.channels, len(source), source.classes) == (6, 2, ("a", "b"))
    (tmp_path / "list.txt").write_text("train/a/x.npy\nval/a/x.npy\n")
    assert open_source(str(tmp_path / "list.txt")).channels == 6


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"data.range": "4095,0"}, "black below white, got 4095,0"),
        ({"data.range": "0"}, "takes black and white, 0,4095 say"),
        ({"data.range": "1,1"}, "nothing lies between"),
        ({"data.rgb": "1,2"}, "the red, the green and the blue band"),
        ({"data.rgb": "1,1,2"}, "the red, the green and the blue band"),
        ({"model.in_chans": "4", "data.rgb": "5,2,1"}, "the images have 4: got 5,2,1"),
        ({"model.in_chans": "4", "data.range": "0,1,0,1"}, "2 or 8 numbers for 4 bands, got 4"),
    ],
)
def test_declarations_that_no_image_has(keys, why):
    with pytest.raises(UsageError, match=why):
        config.load("small_data", keys)


def test_sources_of_pictures_have_no_bands(tmp_path):
    for bands in (Bands(13), Bands(0, [(0, 4095)])):
        with pytest.raises(UsageError, match="holds pictures of 8 bits"):
            open_source("fashion_mnist_sample", channels=bands)
    tiff(tmp_path / "a.tif", noise(17))
    with pytest.raises(UsageError, match="have 17 bands, and at most 16 are possible"):
        open_source(str(tmp_path))


def test_without_tifffile_a_sentence_says_what_is_missing(tmp_path, monkeypatch):
    tiff(tmp_path / "a.tif", noise(5))
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(UsageError, match=r"pip install 'xdino\[bands\]'"):
        open_source(str(tmp_path)).read(0)


# What travels with the weights, and statistics


def test_bands_travel_with_a_spec():
    bands = Bands(4, [(0, 4095)], (2, 1, 0))
    spec = BackboneSpec("xcit_nano_12_p16", 4, mean=(0.5,) * 4, std=(0.2,) * 4, bands=bands)
    again = BackboneSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert repr(again.bands) == repr(bands)
    assert repr(pickle.loads(pickle.dumps(bands))) == repr(bands)
    assert "bands" not in BackboneSpec("xcit_nano_12_p16").to_dict()


def test_statistics_are_measured_once(tmp_path):
    images = [noise(5, seed=seed) for seed in range(8)]
    for number, image in enumerate(images):
        npy(tmp_path / f"{number}.npy", image)
    told = {"data.path": str(tmp_path), "data.range": "0,4095", "train.batch_size": "4"}
    told |= {"model.arch": "xcit_nano_12_p16", "crops.global_size": "32", "crops.local_size": "16"}
    plan = make_plan(config.load("small_data", told))
    pixels = np.stack([levels(image, 0, 4095) for image in images]) / 255
    np.testing.assert_allclose(plan.spec.mean, pixels.mean((0, 1, 2)), atol=6e-5)
    np.testing.assert_allclose(plan.spec.std, pixels.std((0, 1, 2)), atol=6e-5)
    kept = plan.config
    assert (kept.model.in_chans, kept.data.rgb, kept.crops.mean) == (5, (), plan.spec.mean)
    assert config.load("small_data", told).following(kept) == kept  # what is typed again goes on
    dim = make_plan(config.load("small_data", {**told, "data.range": "0,65535"}))
    assert "reach 6% of white" in dim.source.notices()[0]


def test_pictures_of_bands_show_the_declared_colours():
    image = noise(5, 256, "uint8")
    assert picture(image, Bands(5, (), (3, 2, 1)), stretched=False).shape == (*SHAPE, 3)
    np.testing.assert_array_equal(
        picture(image, Bands(5, (), (3, 2, 1)), stretched=False), image[..., [3, 2, 1]]
    )
    np.testing.assert_array_equal(picture(image, 3, (4,))[..., 0], image[..., 4])
    faint = picture(image // 16, Bands(5))
    assert faint.max() == 255
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picture(np.zeros_like(image), Bands(5)).max() == 0


def test_codecs_are_there():
    """imagecodecs is what LZW and Zstandard need; without it these tests say nothing of them."""
    assert importlib.util.find_spec("imagecodecs") is not None
