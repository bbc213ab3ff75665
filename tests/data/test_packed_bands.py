"""Images of bands in tars: arrays as members, packs of them, and packs that are shrunk."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy.ndimage import gaussian_filter

from xdino.config.bands import Bands
from xdino.data import open_source, open_splits
from xdino.data.decode import bands_in, decode, layout_of, shrink_bands
from xdino.data.pack import pack
from xdino.data.source import png


def tiff(path: Path, image: np.ndarray, **how: object) -> None:
    how = {"photometric": "minisblack", "planarconfig": "contig", **how}
    if image.shape[2] == 1:
        image, how["planarconfig"] = image[..., 0], None
    tifffile.imwrite(path, image, **how)


def levels_of(image: np.ndarray) -> np.ndarray:
    return np.rint(image.astype(np.float64) * 255 / 4095).astype(np.uint8)


def smooth(bands: int) -> np.ndarray:
    """float64 [80, 120, bands], 0 to 1."""
    noise = np.random.default_rng(0).uniform(0, 1, (80, 120, bands))
    found = gaussian_filter(noise, (2, 2, 0))
    return (found - found.min()) / np.ptp(found)


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def npy(array):
    target = io.BytesIO()
    np.save(target, array)
    return target.getvalue()


def test_arrays_in_tars_are_images_where_there_are_no_others(tmp_path):
    image = np.random.default_rng(0).integers(0, 4096, (20, 30, 5), np.uint16)
    members = {f"{split}/a/{i}.npy": npy(image + i) for split in ("train", "val") for i in (0, 1)}
    labelled = {**members, "train/a/0.cls": b"3", "train/a/1.cls": b"4"}
    labelled |= {f"val/a/{i}.cls": b"%d" % (3 + i) for i in (0, 1)}
    data = tar_of(tmp_path / "fields.tar", dict(sorted(labelled.items())))
    for _ in range(2):  # the second time by the kept index
        train, _ = open_splits(data)
        assert (train.channels, len(train), train.classes) == (5, 2, ("3", "4"))
        inside = open_source(data, "train", Bands(0, [(0, 4095)]))
        np.testing.assert_array_equal(inside.read(0), levels_of(image))
    tar_of(tmp_path / "apart.tar", {"0.npy": npy(image)})
    picture = png(np.zeros((20, 30, 3), np.uint8))
    mixed = {
        "0.features.npy": npy(np.zeros(8)),
        "0.jpg": picture,
        "1.jpg": picture,
        "2.npy": npy(image),
    }
    beside = tar_of(tmp_path / "mixed.tar", mixed)
    source = open_source(beside)
    assert (len(source), source.channels) == (2, 3)
    assert ".npy (2)" in source.notices()[0]
    # A tar of arrays beside one of pictures holds none of their images.
    assert len(open_source(str(tmp_path / "{apart,mixed}.tar"))) == 2
    assert len(open_source(str(tmp_path / "apart.tar"))) == 1


@pytest.mark.parametrize("kind", ["u1", "<u2", ">i2", "<u4", "<f4"])
@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_shrunk_bands_keep_type_and_range(tmp_path, kind, suffix):
    """As crops are resized: like the levels resized, but for rounding; black and white stay."""
    scale = {"u1": 255, "<f4": 1}.get(kind, 30_000)
    image = (smooth(7) * scale).astype(kind)
    for split in ("train", "val"):
        folder = tmp_path / "data" / split / "a"
        folder.mkdir(parents=True)
        if suffix == ".npy":
            np.save(folder / "0.npy", image.transpose(2, 0, 1) if split == "val" else image)
            np.save(folder / "small.npy", image[:20])
        else:
            low_high = [(t, "d", 1, v, True) for t, v in ((340, 0), (341, float(scale)))]
            tiff(folder / "0.tif", image, extratags=low_high)
            tiff(folder / "small.tif", image[:20], extratags=low_high)
    out = tmp_path / "small.tar"
    done = pack(str(tmp_path / "data"), out, shorter_side=32)
    assert (done.images, done.shrunk, done.unreadable) == (4, 2, [])
    asked = Bands(0, [] if suffix == ".tif" else [(0, scale)])
    for split in ("train", "val"):
        source, whole = (open_source(d, split, asked) for d in (str(out), str(tmp_path / "data")))
        assert source.name.endswith("(shrunk to 32)")
        assert [source.member(i)[-4:] for i in (0, 1)] == [suffix.encode()] * 2
        assert source.encoded(1) == whole.encoded(1), "no larger than that: as it was"
        small, levels = source.read(0), whole.read(0)
        assert small.shape == (32, 48, 7)
        for band in range(7):
            wanted = Image.fromarray(levels[..., band]).resize((48, 32), Image.Resampling.BICUBIC)
            np.testing.assert_allclose(small[..., band], wanted, atol=1)
    layout = layout_of(source.encoded(0))
    assert (np.dtype(layout.kind), layout.bands) == (np.dtype(kind).newbyteorder("="), 7)


def test_what_cannot_be_shrunk_is_kept_and_named(tmp_path):
    holes = np.zeros((40, 40, 4), np.float32)
    good = np.ones((40, 40, 4), np.float32)
    holes[3, 3] = np.nan
    (tmp_path / "d").mkdir()
    for name, array in (("a", good), ("b", holes), ("c", good[..., :2])):
        np.save(tmp_path / "d" / f"{name}.npy", array)
    done = pack(str(tmp_path / "d"), tmp_path / "x.tar", shorter_side=20)
    assert (done.images, done.shrunk) == (3, 1)
    assert ["not finite" in done.unreadable[0][1], "2 bands" in done.unreadable[1][1]] == [True] * 2


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_shrunk_tiff_stays_an_image_of_bands(tmp_path, count):
    tiff(tmp_path / "0.tif", np.full((40, 50, count), 900, np.uint16), photometric="miniswhite")
    data = (tmp_path / "0.tif").read_bytes()
    small, suffix = shrink_bands(data, 20, count, 10**6)
    assert (suffix, bands_in(small)) == (".tif", bands_in(data))
    bands = Bands(count, [(0, 1000)])
    assert (decode(small, bands) == decode(data, bands)[:20, :25]).all()
