"""The compiled photometric path against the eager one, in levels of 0..255."""

import os
import shutil
import subprocess
import sys
import warnings
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from xdino.augment import photometric as room
from xdino.augment.multi_crop import TABLE_DTYPE, multi_crop
from xdino.augment.photometric import photometric, photometric_eager

#: Both compute in float32, in the same order; what is left are fused multiply-adds.
LEVELS = 2e-3


def spec(channels: int):
    return multi_crop(mean=(0.4,) * channels, std=(0.25,) * channels)


def crops(n: int, h: int, w: int, channels: int) -> torch.Tensor:
    """Smooth patterns of every level, some flat areas, and noise on top: uint8 [n, h, w, C]."""
    generator = np.random.default_rng(h * w + channels)
    y, x = np.mgrid[:h, :w] / 20
    phase = generator.uniform(0, 6, (n, 1, 1, channels))
    waves = 150 * np.sin(y[..., None] + phase) * np.cos(1.3 * x[..., None] - 2 * phase) + 128
    waves += generator.normal(0, 10, waves.shape) * (waves > 128)
    return torch.from_numpy(waves.clip(0, 255).astype(np.uint8))


def unchanged(n: int) -> np.ndarray:
    table = np.zeros(n, TABLE_DTYPE)
    table["order"] = range(4)
    table["factor"] = (1, 1, 1, 0)
    return table


def everything(n: int, seed: int = 0) -> np.ndarray:
    """A table in which every stage is often on, and blurs reach far."""
    generator = np.random.default_rng(seed)
    table = unchanged(n)
    for name in ("flip", "jitter", "gray", "solarize"):
        table[name] = generator.random(n) < (0.8 if name == "jitter" else 0.4)
    table["order"] = generator.permuted(np.tile(np.arange(4), (n, 1)), axis=1)
    table["factor"] = generator.uniform((0.5, 0.5, 0.7, -0.3), (1.5, 1.5, 1.3, 0.3), (n, 4))
    table["blur"] = np.where(generator.random(n) < 0.7, generator.uniform(0.1, 5, n), 0)
    return table


def difference(pixels: torch.Tensor, table: np.ndarray) -> float:
    """The largest difference between the paths, in levels."""
    assert room._compiled() is not None
    setting = spec(pixels.shape[-1])
    ours, reference = (f(pixels, table, setting) for f in (photometric, photometric_eager))
    assert ours.shape == reference.shape
    assert ours.isfinite().all()
    return (ours - reference).abs().max().item() * 255 * setting.std[0]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("stage", ["none", "flip", "gray", "solarize"])
def test_stages_without_a_value(stage, channels):
    table = unchanged(4)
    if stage != "none":
        table[stage] = [True, False, True, True]
    assert difference(crops(4, 37, 53, channels), table) <= LEVELS


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("operation", range(4))
def test_each_jitter_operation(operation, channels):
    low, high = ((0, 2), (0, 2), (0, 2), (-0.5, 0.5))[operation]
    table = unchanged(9)
    table["jitter"] = True
    table["factor"][:, operation] = np.linspace(low, high, 9)
    assert difference(crops(9, 37, 53, channels), table) <= LEVELS


def test_hues_of_all_corners_and_grays():
    """Ties between channels decide the sector of the hue, and a gray has none."""
    grid = np.array([0, 1, 127, 128, 254, 255], np.uint8)
    pixels = np.stack(np.meshgrid(grid, grid, grid), axis=-1).reshape(1, 12, 18, 3)
    table = unchanged(11)
    table["jitter"] = True
    table["factor"][:, 3] = np.linspace(-0.5, 0.5, 11)
    assert difference(torch.from_numpy(pixels).expand(11, -1, -1, -1), table) <= LEVELS


@pytest.mark.parametrize("channels", [1, 3])
def test_every_order_of_the_jitter(channels):
    table = unchanged(24)
    table["jitter"] = True
    table["order"] = list(permutations(range(4)))
    table["factor"] = (1.4, 0.6, 1.2, 0.1)
    assert difference(crops(24, 37, 53, channels), table) <= LEVELS


@pytest.mark.parametrize("size", [(37, 53), (120, 90)])
def test_blurs_of_every_reach(size):
    """To 2 pixels, as drawn; beyond; in one band of rows and in several."""
    table = unchanged(16)
    table["blur"] = [*np.linspace(0.1, 2, 10), 0, 2.4, 3.5, 5, 8, 12]
    assert difference(crops(16, *size, 3), table) <= LEVELS


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 9), (9, 1), (2, 3), (7, 7), (33, 31), (97, 96), (3, 5000), (5000, 3)]
)
def test_all_stages_at_any_size(size, channels):
    assert difference(crops(8, *size, channels), everything(8)) <= LEVELS


def test_published_sizes_and_parameters():
    from xdino.augment.multi_crop import draw_batch

    table = draw_batch(multi_crop(), 0, 0, np.arange(12))
    for size, views in ((224, table[:2]), (96, table[2:4])):
        assert difference(crops(24, size, size, 3), views.reshape(-1)) <= LEVELS


def test_a_crop_is_the_same_in_any_batch_and_any_thread():
    pixels, table = crops(23, 40, 50, 3), everything(23)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([photometric(pixels[[i]], table[[i]], spec(3)) for i in range(23)])
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            assert torch.equal(photometric(pixels, table, spec(3)), alone), threads
    finally:
        torch.set_num_threads(before)


def test_views_and_read_only_tables_are_taken_and_nothing_is_changed():
    pixels, table = crops(8, 40, 50, 3), everything(8)
    expected = photometric(pixels, table, spec(3))
    table.flags.writeable = False
    copy = pixels.clone()
    assert torch.equal(photometric(pixels, table, spec(3)), expected)
    assert torch.equal(pixels, copy)
    backwards = torch.flip(pixels, (0,))
    wide = torch.cat([pixels, pixels], dim=2)[:, :, :50]
    assert not wide.is_contiguous()
    assert torch.equal(photometric(wide, table, spec(3)), expected)
    assert torch.equal(photometric(backwards, table[::-1], spec(3)), expected.flip(0))


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (2, 0, 8, 3), (2, 8, 0, 3)])
def test_nothing_in_nothing_out(shape):
    result = photometric(torch.zeros(shape, dtype=torch.uint8), everything(shape[0]), spec(3))
    assert result.shape == (shape[0], 3, *shape[1:3])


def test_without_numba_one_warning_and_the_eager_path(monkeypatch):
    pixels, table = crops(4, 20, 20, 3), everything(4)
    monkeypatch.setitem(
        sys.modules, "xdino.augment.photometric_cpu", None
    )  # its import raises ImportError
    monkeypatch.delattr("xdino.augment.photometric_cpu", raising=False)
    room._compiled.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="eager"):
            first = photometric(pixels, table, spec(3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = photometric(pixels, table, spec(3))
        assert torch.equal(first, photometric_eager(pixels, table, spec(3)))
        assert torch.equal(first, second)
    finally:
        room._compiled.cache_clear()


@pytest.mark.slow
def test_a_read_only_installation_without_a_home_still_compiles(tmp_path):
    """numba writes beside the module, else to the user's cache; with neither it only compiles."""
    copy = tmp_path / "lib" / "xdino"
    package = Path(room.__file__).parents[1]
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    # Folders cannot be made where files stand, even by root.
    for file in (copy / "augment" / "__pycache__", tmp_path / "home"):
        file.write_text("")
    code = (
        "import numpy as np, torch, warnings; warnings.simplefilter('error', RuntimeWarning)\n"
        "from xdino.augment import draw_batch, multi_crop\n"
        "from xdino.augment import photometric as room\n"
        "spec = multi_crop()\n"
        "pixels = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)\n"
        "room.photometric(pixels, draw_batch(spec, 0, 0, np.arange(4))[0], spec)\n"
        "print(room.__file__, room._compiled() is not None)"
    )
    home = str(tmp_path / "home")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA", "XDG"))}
    environment |= {"PYTHONPATH": str(tmp_path / "lib"), "HOME": home, "XDG_CACHE_HOME": home}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(copy / "augment" / "photometric.py"), "True"]
