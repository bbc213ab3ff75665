"""Label propagation, the masks it writes, and the measures of DAVIS, on made videos."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from xdino.backbone import Spec
from xdino.errors import RunFailed, UsageError
from xdino_eval.suite import davis_dataset, label_propagation
from xdino_eval.suite.davis import evaluate_davis
from xdino_eval.suite.davis_scores import (
    ObjectScore,
    contour,
    contour_f,
    jaccard,
    score_video,
    summary,
)
from xdino_eval.suite.label_propagation import Propagation

PALETTE = [0, 0, 0, 10, 20, 30, 200, 100, 0]
COLOURS = ((90, 60, 30), (230, 20, 20), (20, 30, 230))  # ground, first object, second object


def write_video(root: Path, name: str, masks: list[np.ndarray], annotated: int | None = None):
    """Frames painted by their masks, and the masks of the first `annotated` frames."""
    paint = np.array(COLOURS, np.uint8)
    for place in ("JPEGImages", "Annotations"):
        (root / place / "480p" / name).mkdir(parents=True)
    for number, mask in enumerate(masks):
        image = Image.fromarray(paint[mask])
        image.save(root / f"JPEGImages/480p/{name}/{number:05}.jpg", quality=100, subsampling=0)
        if annotated is None or number < annotated:
            picture = Image.fromarray(mask)
            picture.putpalette(PALETTE)
            picture.save(root / f"Annotations/480p/{name}/{number:05}.png")
    listed = root / "ImageSets" / "2017" / "val.txt"
    listed.parent.mkdir(parents=True, exist_ok=True)
    with open(listed, "a") as file:
        file.write(f"{name}\n")


def bars(frames: int = 5, width: int = 128) -> list[np.ndarray]:
    """Two upright bars that move by a patch a frame, towards each other."""
    masks = []
    for frame in range(frames):
        mask = np.zeros((64, width), np.uint8)
        mask[:, 8 + 8 * frame : 24 + 8 * frame] = 1
        mask[:, width - 24 - 8 * frame : width - 8 - 8 * frame] = 2
        masks.append(mask)
    return masks


@pytest.fixture
def folder(tmp_path):
    write_video(tmp_path / "data", "bars", bars())
    return tmp_path / "data"


def read(path: Path) -> tuple[np.ndarray, list[int]]:
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.asarray(image), image.getpalette()[: len(PALETTE)]


def test_moving_bars_are_followed_exactly(folder, patch_colours, tmp_path):
    out = tmp_path / "masks"
    row = evaluate_davis(patch_colours, folder, davis_dataset.open_davis(folder), out, side=64)
    assert row.metrics == pytest.approx({
        "J&F mean": 100, "J mean": 100, "J recall": 100, "J decay": 0,
        "F mean": 100, "F recall": 100, "F decay": 0,
    })  # fmt: skip
    assert (row.settings["objects"], row.val_size, row.notes) == (2, 5, [])
    assert sorted(p.name for p in (out / "bars").iterdir()) == [f"{i:05}.png" for i in range(5)]
    for number, mask in enumerate(bars()):
        found, palette = read(out / "bars" / f"{number:05}.png")
        assert np.array_equal(found, mask)
        assert palette == PALETTE, "the colours of the annotation"


def test_masks_have_the_frames_size(tmp_path, patch_colours):
    """Whatever the network is shown: 100 x 70 pixels at a side of 64, upright frames too."""
    square = np.zeros((70, 100), np.uint8)
    square[20:50, 30:60] = 1
    write_video(tmp_path / "data", "wide", [square] * 3)
    write_video(tmp_path / "data", "tall", [square.T] * 3)
    videos = davis_dataset.open_davis(tmp_path / "data")
    row = evaluate_davis(patch_colours, tmp_path, videos, tmp_path / "out", side=64)
    for name, shape in (("wide", (70, 100)), ("tall", (100, 70))):
        assert read(tmp_path / "out" / name / "00002.png")[0].shape == shape
    assert 60 < row.metrics["J mean"] < 100, "patches of 8 pixels cannot draw it exactly"


def test_videos_that_cannot_be_scored_are_segmented_and_named(tmp_path, patch_colours):
    write_video(tmp_path / "data", "first_only", bars(4), annotated=1)
    write_video(tmp_path / "data", "short", bars(2))
    videos = davis_dataset.open_davis(tmp_path / "data")
    row = evaluate_davis(patch_colours, tmp_path, videos, tmp_path / "out", side=64)
    assert row.metrics == {}
    assert "first_only, short" in row.notes[0]
    assert np.array_equal(read(tmp_path / "out/first_only/00003.png")[0], bars(4)[3])


# --- parts ------------------------------------------------------------------------------------


def by_loops(target, sources, labels, grid, how):
    """The definition, patch by patch."""
    w, (M, N, _) = grid[1], sources.shape
    out = torch.zeros(N, labels.shape[2])
    for i in range(N):
        votes = []
        for m in range(M):
            for j in range(N):
                far = max(abs(i // w - j // w), abs(i % w - j % w))
                if far <= how.radius or not how.radius:
                    cosine = torch.cosine_similarity(target[i], sources[m, j], 0)
                    votes.append((math.exp(cosine / how.temperature), labels[m, j]))
        best = sorted(votes, key=lambda vote: -vote[0])[: how.topk]
        out[i] = sum(v * label for v, label in best) / sum(v for v, _ in best)
    return out


@pytest.mark.parametrize("radius", [0, 1, 2])
@pytest.mark.parametrize("block", [1, 100, 2**26])
def test_propagation_is_what_its_definition_says(radius, block, monkeypatch):
    monkeypatch.setattr(label_propagation, "LARGEST", block)
    grid, M, D = (3, 4), 2, 5
    target, sources = torch.randn(12, D), torch.randn(M, 12, D)
    labels = torch.rand(M, 12, 3)
    how = Propagation(radius=radius, topk=4, temperature=0.3)
    found = label_propagation.propagate(target, sources, labels, grid, how)
    assert torch.allclose(found, by_loops(target, sources, labels, grid, how), atol=1e-5)


def test_context_is_the_first_frame_and_the_last_seven(patch_colours, tmp_path, monkeypatch):
    write_video(tmp_path / "data", "long", [np.eye(64, dtype=np.uint8)] * 11)
    (video,) = davis_dataset.open_davis(tmp_path / "data")
    sizes = []
    real = label_propagation.propagate

    def spy(target, sources, labels, grid, how):
        sizes.append(len(sources))
        return real(target, sources, labels, grid, how)

    monkeypatch.setattr(label_propagation, "propagate", spy)
    with torch.inference_mode():
        list(label_propagation.segment(patch_colours, video, Propagation(), side=64))
    assert sizes == [1, 2, 3, 4, 5, 6, 7, 8, 8, 8]


def test_a_small_object_wins_by_levelling():
    soft = torch.zeros(4, 4, 2)
    soft[..., 0] = 0.7
    soft[..., 1] = 0.1
    soft[1, 1] = torch.tensor([0.6, 0.4])
    found = label_propagation.decide(soft, 2)
    assert found.shape == (8, 8)
    assert found[2:4, 2:4].all() or found[3, 3] == 1
    assert not found[6:, 6:].any()
    assert not label_propagation.decide(torch.ones(2, 2, 1), 2).any(), "a frame without an object"


def test_one_hot_and_void():
    mask = np.zeros((8, 16), np.uint8)
    mask[:4, :8], mask[4:, 8:] = 2, 255
    found = label_propagation.one_hot(mask, (2, 4))
    assert found.shape == (2, 4, 3)
    assert found.argmax(2).tolist() == [[2, 2, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("before", "side", "after"),
    [
        ((480, 854), 480, (480, 832)),
        ((854, 480), 480, (832, 480)),
        ((1080, 1920), 480, (480, 832)),
        ((480, 910), 480, (480, 896)),
        ((100, 100), 480, (480, 448)),
    ],
)
def test_frame_size(before, side, after):
    assert label_propagation.frame_size(*before, side) == after


def test_resize_is_opencvs_to_the_bit():
    golden = load_file(Path(__file__).parent.parent / "golden" / "suite.safetensors")
    frame = golden["frame"].numpy()
    for height, width in ((14, 20), (5, 4)):
        expected = golden[f"frame_{height}x{width}"].numpy()
        assert np.array_equal(label_propagation.resize_linear(frame, height, width), expected)
    assert np.array_equal(label_propagation.resize_linear(frame, 6, 9), frame)
    assert label_propagation.resize_linear(frame[..., :1], 14, 20).shape == (14, 20, 1)


def test_palette():
    """PASCAL's colours: black, maroon, green, olive, navy; white comes for no label."""
    palette = davis_dataset.pascal_palette()
    assert palette[:15] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128]
    assert palette[-3:] == [224, 224, 192]


def test_the_published_slip_of_the_deviation(patch_colours):
    assert label_propagation.transform_of(patch_colours).std == (1.0, 1.0, 1.0)
    patch_colours.spec = Spec("")  # ImageNet's
    assert label_propagation.transform_of(patch_colours).std == (0.228, 0.224, 0.225)


# --- measures ---------------------------------------------------------------------------------


def test_jaccard():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    assert jaccard(a, b) == 1
    a[:2] = b[1:3] = True
    assert jaccard(a, b) == 4 / 12


def test_contour():
    mask = np.zeros((4, 5), bool)
    mask[2:, 2:4] = True
    assert contour(mask).astype(int).tolist() == [
        [0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 0, 1, 0],
        [0, 1, 0, 1, 0],
    ]


def test_contour_f():
    shape = (60, 80)  # 0.8 % of the diagonal are 0.8 pixels: a reach of one
    a = np.zeros(shape, bool)
    a[20:40, 20:50] = True
    empty = np.zeros(shape, bool)
    assert contour_f(a, a) == contour_f(empty, empty) == 1
    assert contour_f(a, empty) == contour_f(empty, a) == 0
    assert contour_f(a, np.roll(a, 1, 1)) == 1
    assert 0 < contour_f(a, np.roll(a, 2, 1)) < 1, "upright sides miss, level ones agree"
    assert contour_f(a, np.roll(a, (20, 30), (0, 1))) < 0.1


def test_first_and_last_frame_do_not_count():
    truth = np.zeros((4, 8, 8), np.uint8)
    truth[:, :4], truth[0, 7, 7] = 2, 255
    found = truth.copy()
    found[0] = found[3] = 0
    found[2, :, :4] = 0
    scores = score_video(truth, found)
    assert len(scores) == 2, "labels up to the highest of the first frame; 255 is none"
    assert scores[0].j.tolist() == [1, 1], "an object that nowhere is, rightly not found"
    assert scores[1].j.tolist() == [1, 0.5]
    with pytest.raises(ValueError, match="masks must be"):
        score_video(truth[:2], found[:2])


def test_summary():
    falling = np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    found = summary([ObjectScore(falling, np.ones(8)), ObjectScore(np.zeros(8), np.ones(8))])
    assert found["J mean"] == pytest.approx(100 * (0.65 + 0) / 2)
    assert found["J recall"] == pytest.approx(100 * (5 / 8 + 0) / 2)
    assert found["J&F mean"] == pytest.approx((32.5 + 100) / 2)
    # Frames 1 to 3 against 6 to 8: bounds 1, 2.75, 4.5, 6.25, 8, rounded.
    assert found["J decay"] == pytest.approx(100 * (0.9 - 0.4) / 2)


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing", ["ImageSets/2017/val.txt", "JPEGImages/480p", "Annotations/480p"]
)
def test_what_is_missing_is_named(folder, missing):
    (folder / missing).rename(folder / "elsewhere")
    with pytest.raises(UsageError, match=f"{missing} is missing: a DAVIS-2017 folder holds"):
        davis_dataset.open_davis(folder)


def test_bad_lists(folder):
    listed = folder / "ImageSets/2017/val.txt"
    for text, message in (
        ("\n", "names no video"),
        ("bars\nboat\n", "there is no folder .*boat"),
        ("../bars\n", "no name of a video"),
    ):
        listed.write_text(text)
        with pytest.raises(UsageError, match=message):
            davis_dataset.open_davis(folder)


def test_bad_masks(folder):
    first = folder / "Annotations/480p/bars/00000.png"
    Image.fromarray(np.zeros((64, 120), np.uint8)).save(first)
    with pytest.raises(UsageError, match=r"the mask .*00000\.png has 120 x 64 pixels, .* 128 x 64"):
        davis_dataset.open_davis(folder)
    Image.fromarray(np.zeros((64, 128, 3), np.uint8)).save(first)
    with pytest.raises(UsageError, match="is a palette image and the first mask of bars a colour"):
        davis_dataset.open_davis(folder)
    Image.fromarray(np.zeros((64, 128), np.float32)).save(first, "TIFF")
    with pytest.raises(UsageError, match="is no mask of labels: its pixels are F"):
        davis_dataset.open_davis(folder)
    smooth = np.arange(64 * 128).reshape(64, 128) % 200
    Image.fromarray(smooth.astype(np.uint8)).save(first)
    with pytest.raises(UsageError, match="holds 199 colours or grey levels"):
        davis_dataset.mask_labels(first)
    first.write_bytes(b"no image")
    with pytest.raises(UsageError, match="cannot be read"):
        davis_dataset.open_davis(folder)
    first.unlink()
    with pytest.raises(UsageError, match="the mask of the first frame of bars, is missing"):
        davis_dataset.open_davis(folder)


def test_bad_frames(folder, patch_colours, colours, tmp_path):
    videos = davis_dataset.open_davis(folder)
    with pytest.raises(UsageError, match="no patch tokens"):
        evaluate_davis(colours, folder, videos, tmp_path / "out", side=64)
    assert not (tmp_path / "out").exists()
    frame = folder / "JPEGImages/480p/bars/00002.jpg"
    whole = frame.read_bytes()
    frame.write_bytes(whole[: len(whole) // 2])  # its header, and so its size, can be read
    with pytest.raises(RunFailed, match=r"00002\.jpg cannot be read"):
        evaluate_davis(patch_colours, folder, videos, tmp_path / "out", side=64)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(frame)
    with pytest.raises(UsageError, match=r"the frame .*00002\.jpg has 64 x 64 pixels"):
        davis_dataset.open_davis(folder)
    for path in frame.parent.iterdir():
        path.unlink()
    with pytest.raises(UsageError, match="holds no frame"):
        davis_dataset.open_davis(folder)


# --- masks and frames of other makers ---------------------------------------------------------


def drawn(folder: Path, make) -> None:
    """Save each mask of the folder's video anew: `make` gets its labels, uint8 [H, W]."""
    for path in sorted((folder / "Annotations/480p/bars").iterdir()):
        make(np.array(Image.open(path))).save(path)


def one_object(labels):
    return (labels > 0).astype(np.uint8)


PAINTS = np.array([(0, 0, 0), (255, 255, 255), (10, 200, 30)], np.uint8)
PASCAL = np.array(davis_dataset.pascal_palette(), np.uint8).reshape(-1, 3)


@pytest.mark.parametrize(
    ("make", "objects", "told"),
    [
        (lambda m: Image.fromarray(one_object(m) * 255), 1, True),
        (lambda m: Image.fromarray(one_object(m) * 255).convert("1"), 1, False),
        (lambda m: Image.fromarray(one_object(m) * 255).convert("P"), 1, True),
        (lambda m: Image.fromarray(one_object(m) * 128), 1, True),
        (lambda m: Image.fromarray(np.array([0, 38, 75], np.uint8)[m]), 2, True),
        (lambda m: Image.fromarray(np.array([0, 7, 3000], np.uint16)[m]), 2, True),
        (lambda m: Image.fromarray(m), 2, False),
        (lambda m: Image.fromarray(PAINTS[m]), 2, True),
        (lambda m: Image.fromarray(PAINTS[m]).convert("RGBA"), 2, True),
        (lambda m: Image.fromarray(PASCAL[m]), 2, True),
    ],
)
def test_masks_however_they_are_drawn(folder, patch_colours, tmp_path, make, objects, told):
    drawn(folder, make)
    row = evaluate_davis(
        patch_colours, folder, davis_dataset.open_davis(folder), tmp_path / "o", side=64
    )
    assert row.metrics["J&F mean"] == pytest.approx(100)
    assert row.settings["objects"] == objects
    assert [("drawn, not labelled" in note) for note in row.notes] == [True] * told


def test_void_beside_labels_stays_void(folder):
    drawn(folder, lambda m: Image.fromarray(np.where(np.arange(128) < 4, 255, m).astype(np.uint8)))
    (video,) = davis_dataset.open_davis(folder)
    assert video.labels == davis_dataset.Labels()
    assert set(np.unique(davis_dataset.read_mask(video.masks[0], video.labels))) == {0, 1, 2, 255}


@pytest.mark.parametrize("scale", [1, 60])
def test_objects_that_come_later_are_named(folder, patch_colours, tmp_path, scale):
    drawn(folder, lambda m: Image.fromarray(m * scale))
    path = folder / "Annotations/480p/bars/00002.png"
    late = np.array(Image.open(path))
    late[:8, :8] = 3 * scale
    Image.fromarray(late).save(path)
    row = evaluate_davis(
        patch_colours, folder, davis_dataset.open_davis(folder), tmp_path / "o", side=64
    )
    assert row.settings["objects"] == 2
    assert "bars shows objects after its first frame that are neither" in row.notes[-1]
    drawn(folder, lambda m: Image.fromarray(m * 0))
    row = evaluate_davis(
        patch_colours, folder, davis_dataset.open_davis(folder), tmp_path / "o", side=64
    )
    assert row.metrics == {}
    assert row.notes == ["no object in the first mask of: bars"]


@pytest.mark.parametrize("suffix", ["jpeg", "JPG", "PNG", "bmp"])
def test_frames_in_any_format(folder, suffix):
    for path in sorted((folder / "JPEGImages/480p/bars").iterdir()):
        Image.open(path).save(path.with_suffix(f".{suffix}"))
        path.unlink()
    (folder / "JPEGImages/480p/bars/folder.jpg").mkdir()
    (folder / "JPEGImages/480p/bars/notes.txt").touch()
    os.mkfifo(folder / "JPEGImages/480p/bars/pipe.jpg")
    (video,) = davis_dataset.open_davis(folder)
    assert [path.suffix for path in video.frames] == [f".{suffix}"] * 5
    Image.open(video.frames[0]).save(video.frames[0].with_suffix(".gif"))
    with pytest.raises(UsageError, match="two frames of one name"):
        davis_dataset.open_davis(folder)


@pytest.mark.parametrize(("side", "shown"), [(63, 64), (60, 64), (59, 56), (2, 8), (64, 64)])
def test_a_side_that_is_no_multiple_of_the_patch(folder, patch_colours, tmp_path, side, shown):
    videos = davis_dataset.open_davis(folder)
    row = evaluate_davis(patch_colours, folder, videos, tmp_path / "o", side=side)
    assert f"shorter side {shown}," in row.transform
    told = f"a shorter side of {shown} pixels instead of {side}: a multiple of the patch of 8"
    assert [told in note for note in row.notes] == [True] * (side != shown)
    assert side < 60 or row.metrics["J&F mean"] == pytest.approx(100)


def test_frame_size_of_patches_that_do_not_divide_64():
    assert label_propagation.frame_size(480, 854, 480, 14) == (476, 826)
    assert label_propagation.frame_size(854, 480, 480, 16) == (832, 480)


def test_masks_are_not_written_over_the_data(folder, patch_colours):
    videos = davis_dataset.open_davis(folder)
    for place in ("Annotations/480p", "JPEGImages/480p", "ImageSets/../Annotations/480p"):
        with pytest.raises(UsageError, match="would be written over"):
            evaluate_davis(patch_colours, folder, videos, folder / place, side=64)
    with pytest.raises(UsageError, match="--out needs a folder"):
        evaluate_davis(patch_colours, folder, videos, videos[0].frames[0], side=64)


def test_names_in_no_encoding(folder, patch_colours, tmp_path):
    name = os.fsdecode(b"[/b]ars\xe9".replace(b"/", b""))
    for place in ("Annotations", "JPEGImages"):
        (folder / place / "480p/bars").rename(folder / place / "480p" / name)
    (folder / "ImageSets/2017/val.txt").write_bytes(b"\xef\xbb\xbf" + os.fsencode(name) + b"\r\n")
    videos = davis_dataset.open_davis(folder)
    row = evaluate_davis(patch_colours, folder, videos, tmp_path / "o", side=64)
    assert row.metrics["J mean"] == pytest.approx(100)
    assert os.listdir(tmp_path / "o") == [name]
