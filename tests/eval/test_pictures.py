"""Pictures of maps, of principal components and of channel matrices."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from xdino.backbone import Origin
from xdino.backbones import BackboneSpec
from xdino.errors import RunFailed
from xdino_eval import sheets
from xdino_eval.attention import captions, channels, colours, figures, pca
from xdino_eval.attention.channels import draw_channels
from xdino_eval.attention.colours import Scale
from xdino_eval.attention.figures import Looked
from xdino_eval.attention.maps import Maps, mask, mass_threshold
from xdino_eval.backbone_tokens import Lattice


def looked(layers, image, names=(), name="photo.jpg"):
    return Looked(name, image, Maps(tuple(layers), tuple(names)), ("weights", "shown at"))


@pytest.mark.parametrize(("channels", "heads"), [(3, 4), (1, 3)])
def test_pictures_of_every_head_and_of_their_mean(tmp_path, channels, heads):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (61, 83, channels), dtype=np.uint8)
    one = looked([rng.random((heads, 4, 6), dtype=np.float32) for _ in range(2)], image)
    scale = Scale.of(figures.every_map(one.maps))
    state = torch.get_rng_state()
    files = list(figures.draw_each(one, tmp_path / "new", "photo", scale, mass=0.5))
    assert torch.equal(state, torch.get_rng_state())
    each = [f"head{i}{end}" for i in range(1, heads + 1) for end in ("", "-mask")]
    names = [*each, "mean", "overlay", "mask"]
    assert [f.name for f in files] == [
        f"photo-layer{n}-{name}.png" for n in (1, 2) for name in names
    ]
    assert {Image.open(file).size for file in files} == {(83, 61)}
    first, layer = np.asarray(Image.open(files[1])), one.maps.layers[0]
    written = np.asarray(Image.open(files[len(names) - 1]))
    assert np.array_equal(written > 0, mask(layer.mean(0), None, 61, 83, 0.5))
    assert set(np.unique(written)) == {0, 255}
    assert np.array_equal(first > 0, mask(layer[0], None, 61, 83, 0.5))
    assert (first > 0).mean() == pytest.approx(mass_threshold(layer[0], 0.5).mean(), abs=0.05)


def test_one_head_alone(tmp_path):
    rng = np.random.default_rng(0)
    layer = rng.random((3, 4, 4), dtype=np.float32)
    one = looked([layer], np.zeros((20, 20, 3), np.uint8), ["block12"])
    assert len(figures.every_map(one.maps, 2)) == 1
    files = list(figures.draw_each(one, tmp_path, "a", Scale(), head=2))
    assert [f.name for f in files] == [
        f"a-block12-head2{end}.png" for end in ("", "-overlay", "-mask")
    ]
    kept = np.asarray(Image.open(files[-1])) > 0
    assert np.array_equal(kept, mask(layer[1], None, 20, 20))
    assert figures.told_map(one.maps, 2) == "block 12, head 2"


@pytest.mark.parametrize(
    ("height", "width", "heads", "gaps"),
    [(28, 28, 2, 0), (50, 3000, 1, 0), (3000, 50, 8, 0), (50, 3000, 3, 1), (28, 28, 40, 0)],
)
def test_sheets_and_overlays_are_of_a_size_that_opens(tmp_path, height, width, heads, gaps):
    image = np.full((height, width, 3), 90, np.uint8)
    one = looked([np.full((heads, 4, 6), 1 / 24, np.float32)] * 2, image)
    sheet = Image.open(figures.draw_sheet(one, tmp_path / "sheet.png", Scale()))
    overlay = Image.open(figures.draw_overlay(one, tmp_path / "overlay.png", Scale()))
    assert max(sheet.size) <= 1.03 * sheets.LARGEST
    assert min(sheet.size) >= 200
    assert 480 <= max(overlay.size) <= 1400
    assert -(4 + heads) % figures.columns_of(4 + heads, 2) == gaps


def test_a_caption_says_whose_weights_and_what_was_shown(tmp_path, monkeypatch):
    """The words that reach the picture, and the bar's."""
    said = []
    written = figures.captioned
    monkeypatch.setattr(
        figures,
        "captioned",
        lambda p, lines, bar: said.append((lines, bar)) or written(p, lines, bar),
    )
    one = looked([np.full((2, 4, 6), 1 / 24, np.float32)], np.zeros((30, 40, 3), np.uint8))
    figures.draw_overlay(one, tmp_path / "a.png", Scale(8.0))
    figures.draw_sheet(one, tmp_path / "b.png", Scale(8.0))
    list(figures.folder_sheets([figures.row(one, Scale())], tmp_path, told=lambda: one.told))
    for lines, _ in said:
        assert {"weights", "shown at"} <= set(lines)
    assert "60% of it on 62% of the patches; even: 60%" in said[0][0][-1]
    assert [label for _, label in said[0][1].ticks] == ["0", "1x", "2x", "4x", "6x", "8x"]


def test_captions_name_the_weights(tmp_path):
    xcit = BackboneSpec("xcit_nano_12_p16", shape={"embed_dim": 32, "depth": 1, "num_heads": 4})
    backbone = xcit.build()
    assert captions.weights(backbone).startswith(
        "weights of no file · xcit_nano_12_p16, embed_dim 32"
    )
    facts = {"role": "teacher", "iteration": 0, "iterations": 90}
    for path, name in (
        ("runs/mine/backbone.safetensors", "mine"),
        ("runs/mine/checkpoints/initial.safetensors", "mine/checkpoints/initial.safetensors"),
        ("backbone.safetensors", Path.cwd().name),
        ("dino.pth", "dino.pth"),
    ):
        backbone.origin = Origin(Path(path), "", facts)
        assert captions.weights(backbone).startswith(
            f"{name}, teacher, iteration 0 of 90 (untrained)"
        )


def test_stretched_maps_keep_each_patch_where_it_lies():
    values = np.zeros((4, 6), np.float32)
    values[1, 4] = 1
    # Patches of 10 pixels that cover 40 x 60 of a 50 x 70 image.
    wide = figures.stretch(values, Lattice((0, 0), (10 / 50, 10 / 70)), 50, 70)
    assert np.unravel_index(wide.argmax(), wide.shape) in {(14, 44), (14, 45), (15, 44), (15, 45)}
    near = figures.stretch(values, None, 40, 60, smooth=False)
    assert (near[10:20, 40:50] == 1).all()
    assert near.sum() == 100
    both = figures.stretch(np.stack((values, values)), None, 40, 60, smooth=False)
    assert np.array_equal(both[1], near)


def test_a_sheet_of_a_folder_has_pages(tmp_path):
    for side, count in (((30, 50), 181), ((50, 30), 91)):
        picture = np.full((*side, 3), 200, np.uint8)
        rows = [(f"a/very/long/path/{'x' * 90}/{i}.png", [picture] * 3) for i in range(count)]
        pages = list(figures.folder_sheets(rows, tmp_path, told=lambda: ["word " * 200]))
        assert [page.name for page in pages] == ["sheet.png", "sheet-2.png", "sheet-3.png"][
            : len(pages)
        ]
        assert len(pages) == -(-count // 70)
        for page in pages:
            assert max(Image.open(page).size) <= 1.05 * sheets.LARGEST
    assert not (tmp_path / "sheet-3.png").exists(), "a page of an earlier, longer list"
    alike = Image.open(pages[0])
    assert 0.8 < alike.width / alike.height < 1.6, "a grid"


def test_channel_matrices(tmp_path, monkeypatch):
    matrices = [np.random.default_rng(i).dirichlet(np.ones(8), (3, 8)) for i in range(2)]
    assert [f.name for f in draw_channels(matrices, tmp_path, "a")] == ["a-xca-sheet.png"]
    files = draw_channels(matrices, tmp_path, "a", ["weights"], every=True)
    assert [f.name for f in files] == [
        "a-xca-sheet.png",
        "a-xca-block1.png",
        "a-xca-block2.png",
    ]
    assert all(Image.open(f).width > 500 for f in files)
    monkeypatch.setattr(channels, "LARGEST", 400)
    (large,) = draw_channels(matrices, tmp_path, "b")
    assert 300 < max(Image.open(large).size) <= 400


# --- principal components ---------------------------------------------------------------------


def test_components_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (500, 12)) @ rng.normal(0, 1, (12, 12)) + 100
    moments = pca.Moments()
    for part in np.split(values, [3, 200, 201]):
        moments.add(torch.from_numpy(part))
    ours = moments.components()
    theirs = PCA(3).fit(values)
    np.testing.assert_allclose(ours.mean.numpy(), theirs.mean_, rtol=1e-10)
    np.testing.assert_allclose(
        np.abs(ours.axes.T.numpy() @ theirs.components_.T), np.eye(3), atol=1e-8
    )
    np.testing.assert_allclose(ours.explained, theirs.explained_variance_ratio_, rtol=1e-8)
    largest = ours.axes.abs().argmax(0)
    assert (ours.axes[largest, torch.arange(3)] > 0).all()
    few = pca.Moments()
    few.add(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="need four tokens"):
        few.components()


def test_the_foreground_is_the_side_away_from_the_borders():
    grid = (6, 6)
    tokens = torch.randn(36, 5) * 0.01
    inside = torch.zeros(grid, dtype=torch.bool)
    inside[2:4, 2:5] = True
    tokens[inside.flatten(), 2] -= 3
    found = pca.PatchTokens(tokens, grid, Lattice((0, 0), (1 / 6, 1 / 6)))
    moments = pca.Moments()
    moments.add(tokens)
    foreground = pca.Foreground(moments.components())
    foreground.look(found)
    assert np.array_equal(foreground.of(found), inside.numpy())


def test_patch_tokens_of_an_xcit_are_those_before_class_attention():
    shape = {"embed_dim": 32, "depth": 1, "num_heads": 4}
    xcit = BackboneSpec("xcit_nano_12_p16", shape=shape, input_size=64, resize=72).build().eval()
    image = np.random.default_rng(0).integers(0, 256, (64, 90, 3), dtype=np.uint8)
    found = pca.patch_tokens(xcit, image)
    assert found.grid == (4, 6)
    assert found.tokens.shape == (24, 32)
    other = pca.patch_tokens(xcit, image)
    for block in xcit.cls_attn_blocks:
        torch.nn.init.normal_(block.attn.qkv.weight)
    assert torch.equal(found.tokens, other.tokens)


# --- colours and sheets -----------------------------------------------------------------------


def test_attention_that_says_nothing_looks_flat():
    rng = np.random.default_rng(0)
    photograph = np.full((60, 80, 3), 128, np.uint8)
    for spread, low, high in ((0, 0, 0), (1e-6, 0, 0), (0.01, 0, 3), (2, 40, 255)):
        weights = np.exp(spread * rng.normal(size=(6, 8)))
        drawn = figures.view(weights / weights.sum(), photograph)
        assert low <= drawn.heat.astype(float).std((0, 1)).max() <= high, spread
        vivid = np.ptp(drawn.overlay.astype(int), axis=2).max()
        assert vivid < 12 if spread < 0.1 else vivid > 100, "colour is for more than an even share"


def test_masks_of_even_maps_fade():
    photograph = np.full((60, 60, 3), 128, np.uint8)
    peak = np.full((10, 10), 0.1)
    peak[2:5, 2:5] = 10
    for attention, least, most in ((np.ones((10, 10)), 0, 1), (peak, 60, 255)):
        keep = mask(attention, None, 60, 60)
        drawn = figures.masked(photograph, keep, attention).astype(int)
        assert least <= np.abs(drawn - 128).max() <= most


def test_one_scale_holds_for_all_heads_and_images():
    flat, peak = np.full((10, 10), 0.01), np.full((10, 10), 0.01)
    peak[:2, :5] = 0.2
    assert Scale.of([flat]).top == 4
    assert Scale.of([]).top == 4
    assert Scale.of([flat, peak]) == Scale.of([peak, flat])
    assert Scale.of([flat, peak]).top in colours.STOPS
    assert Scale.of([peak * 1000]).top == Scale.of([peak]).top >= 6
    # Twice the even share has one colour in a map of many patches and of few.
    shades = set()
    for patches in (10, 40):
        double = np.full((patches, patches), 1 / patches**2)
        double[: patches // 10] *= 2
        ratio = colours.times_even(double)
        assert ratio.mean() == pytest.approx(1)
        shades.add(tuple(colours.colour(ratio, Scale())[0, 0]))
    assert len(shades) == 1
    assert (colours.times_even(np.zeros((2, 3, 3))) == 0).all()


def test_titles_of_a_portrait_have_room(tmp_path):
    """Each title ends before the next column begins: nothing is drawn in the gaps."""
    image = np.zeros((400, 40, 3), np.uint8)
    one = looked([np.full((4, 40, 4), 1 / 160, np.float32)], image, ["layer12"])
    pixels = np.asarray(Image.open(figures.draw_sheet(one, tmp_path / "tall.png", Scale())))
    width = (pixels.shape[1] - sheets.GAP) // 4
    for column in range(1, 5):
        left = column * width
        assert (pixels[: sheets.ROW, left : left + sheets.GAP] == 255).all()


def test_captions_are_cut_and_frames_tell_apart():
    white = np.full((40, 60, 3), 255, np.uint8)
    long = sheets.Tile([white], "x" * 500, "#ff0000", "solid")
    tiles = [long, None, sheets.Tile([white, white], "b", "#0000ff", "dashed")]
    drawn = np.asarray(sheets.sheet(tiles, columns=2, side=60, note="word " * 40))
    assert drawn.shape[1] == 2 * (sheets.CAPTION + sheets.GAP) + sheets.GAP
    top, left = sheets.GAP + sheets.ROW, sheets.GAP
    assert (drawn[top, left : left + 60] == (255, 0, 0)).all(), "solid"
    second = drawn[top + 40 + 2 * sheets.ROW, left : left + 60]
    blue = (second == (0, 0, 255)).all(-1)
    assert 20 < blue.sum() < 40, "dashed"
    assert (second[~blue] == 255).all()
    assert (drawn[-2 * sheets.ROW :] < 255).any(), "the note stands below"


def test_pictures_say_who_drew_them(tmp_path):
    image = np.zeros((20, 20, 3), np.uint8)
    one = looked([np.full((1, 4, 4), 1 / 16, np.float32)], image)
    for path in [
        *figures.draw_each(one, tmp_path, "a", Scale()),
        figures.draw_sheet(one, tmp_path / "a-sheet.png", Scale()),
        figures.draw_overlay(one, tmp_path / "a-overlay.png", Scale()),
        *draw_channels([np.full((1, 4, 4), 0.25)], tmp_path, "a"),
        *figures.folder_sheets([("\udcff", [image])], tmp_path),
    ]:
        assert sheets.drawn_here(path)
    Image.fromarray(image).save(tmp_path / "photograph.png")
    assert not sheets.drawn_here(tmp_path / "photograph.png")
    assert not sheets.drawn_here(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RunFailed, match="cannot write"):
        figures.draw_sheet(one, tmp_path / "file" / "a.png", Scale())


def test_matplotlib_says_nothing_of_its_cache(tmp_path):
    """As where the home cannot be written: the root of a test may write anywhere but below a file."""
    (tmp_path / "file").touch()
    env = os.environ | {"MPLCONFIGDIR": str(tmp_path / "file" / "below")}
    command = [
        sys.executable,
        "-c",
        "import xdino_eval.attention.figures, xdino_eval.knn.neighbours",
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
