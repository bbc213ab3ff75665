"""Copy detection on made sets whose neighbours follow from colours."""

import numpy as np
import pytest
import torch
from PIL import Image

from xdino.errors import RunFailed, UsageError
from xdino_eval.suite.copydetection import (
    RANKED,
    Whitening,
    evaluate_copydetection,
    mean_average_precision,
    open_copydays,
)

ORIGINALS = {"2000": 0, "2001": 30, "2002": 60, "2003": 89}  # name -> degrees
STRONG = {"200001": 2, "200002": 50, "200101": 31, "200201": 58, "200301": 80}


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95)


@pytest.fixture
def folder(tmp_path, paint):
    for name, degrees in ORIGINALS.items():
        write(tmp_path / "original" / f"{name}00.jpg", paint(degrees))
    for name, degrees in STRONG.items():
        write(tmp_path / "strong" / f"{name}.jpg", paint(degrees))
    return tmp_path


def test_known_answers(folder, patch_colours):
    """Of the five copies four find their original first; 50 degrees finds its own (0) last."""
    row = evaluate_copydetection(patch_colours, open_copydays(folder), size=32)
    last = (0 / 3 + 1 / 4) / 2
    expected = {"mAP strong": 100 * (4 + last) / 5, "mAP original": 100}
    assert row.metrics == pytest.approx(expected)
    assert next(iter(row.metrics)) == "mAP strong", "the figure that is reported comes first"
    assert (row.train_size, row.val_size) == (4, 9)
    assert "jpegqual/75" in row.notes[0]


def test_distractors_stand_in_the_way(folder, patch_colours, paint, tmp_path_factory):
    others = tmp_path_factory.mktemp("distractors")
    write(others / "a.png", paint(49))
    write(others / "b.jpg", paint(79))
    (others / "readme.txt").write_text("no image")
    row = evaluate_copydetection(patch_colours, open_copydays(folder, others), size=32)
    lost, second = (0 / 5 + 1 / 6) / 2, (0 / 1 + 1 / 2) / 2
    assert row.metrics["mAP strong"] == pytest.approx(100 * (3 + lost + second) / 5)
    assert (row.train_size, row.settings["distractors"]) == (6, 2)


def test_weaker_blocks_are_scored_where_they_are(folder, patch_colours, paint):
    write(folder / "jpegqual" / "75" / "200000.jpg", paint(1))
    write(folder / "crops" / "10" / "200100.jpg", paint(70))  # 60, 89, then 30
    row = evaluate_copydetection(patch_colours, open_copydays(folder), size=32)
    assert row.metrics["mAP jpegqual/75"] == 100
    assert row.metrics["mAP crops/10"] == pytest.approx(100 * (0 / 2 + 1 / 3) / 2)


def test_whitening_makes_the_second_moment_one():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    features = torch.randn(500, 6, generator=generator) @ mixing + 3
    whiten = Whitening.learn(features)
    whitened = features @ whiten.matrix.T  # about zero, where the moment was taken
    moment = whitened.T @ whitened / len(features)
    assert torch.allclose(moment, torch.eye(6), atol=1e-3)
    assert torch.allclose(whiten(features).mean(0), torch.zeros(6), atol=1e-3)


def test_whitening_does_not_blow_up_what_never_varies():
    features = torch.zeros(50, 3)
    features[:, 0] = torch.linspace(1, 2, 50)
    matrix = Whitening.learn(features).matrix
    assert matrix.isfinite().all()
    largest = features.square().mean(0).max()
    assert matrix.norm(dim=1).max().item() == pytest.approx(float(largest * 1e-5) ** -0.5, rel=1e-4)


def test_whitening_of_a_folder(folder, patch_colours, paint, tmp_path_factory):
    others = tmp_path_factory.mktemp("whitening")
    for degrees in range(0, 91, 10):
        write(others / f"{degrees}.jpg", paint(degrees))
    row = evaluate_copydetection(patch_colours, open_copydays(folder, whitening=others), size=32)
    assert row.settings["whitening"] == 10
    assert row.metrics["mAP original"] == 100


def test_only_the_first_answers_count():
    ranking = np.arange(RANKED)[None]
    assert mean_average_precision(ranking, [np.array([RANKED])]) == 0
    assert mean_average_precision(ranking, [np.array([0, RANKED])]) == 50


@pytest.mark.parametrize("missing", ["original", "strong"])
def test_bad_folders(folder, missing):
    for path in (folder / missing).iterdir():
        path.unlink()
    with pytest.raises(UsageError, match=f"{missing} holds no image"):
        open_copydays(folder)
    (folder / missing).rmdir()
    with pytest.raises(UsageError, match=f"{missing} is missing: a Copydays folder holds original"):
        open_copydays(folder)


def test_bad_files(folder, patch_colours, colours, paint):
    copydays = open_copydays(folder)
    with pytest.raises(UsageError, match="a Colours has no class attention and no patch tokens"):
        evaluate_copydetection(colours, copydays, size=32)
    with pytest.raises(UsageError, match="there is no folder"):
        open_copydays(folder, whitening=folder / "nowhere")
    with pytest.raises(UsageError, match="smaller than a patch of 8"):
        evaluate_copydetection(patch_colours, copydays, size=5)
    write(folder / "strong" / "300001.jpg", paint(0))
    with pytest.raises(UsageError, match=r"300001\.jpg has no original"):
        open_copydays(folder)
    (folder / "strong" / "200001.jpg").write_bytes(b"\xff\xd8 no image")
    with pytest.raises(RunFailed, match=r"200001\.jpg cannot be read"):
        evaluate_copydetection(patch_colours, copydays, size=32)


def test_descriptors_that_are_all_zero():
    with pytest.raises(UsageError, match="all zero have no whitening"):
        Whitening.learn(torch.zeros(4, 3))
