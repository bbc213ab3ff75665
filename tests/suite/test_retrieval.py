"""Retrieval on made sets whose ranking follows from colours: the answers are known."""

import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from xdino.errors import RunFailed, UsageError
from xdino_eval.accuracy import average_precision
from xdino_eval.suite.retrieval import (
    Query,
    crop,
    evaluate_retrieval,
    open_benchmark,
    score,
    shrink,
)

# Degrees from the query's colour, and what each image is to it.
DATABASE = {"junk": 5, "easy": 12, "negative_1": 20, "hard": 32, "negative_2": 55, "negative_3": 80}


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95)


@pytest.fixture
def folder(tmp_path, paint):
    """One query at 0 degrees; the database at the angles above, in another order."""
    names = sorted(DATABASE)
    for name in names:
        write(tmp_path / "roxford5k" / "jpg" / f"{name}.jpg", paint(DATABASE[name]))
    half = np.concatenate((paint(0, 32, 20), paint(85, 32, 60)), 1)  # mostly another colour
    write(tmp_path / "roxford5k" / "jpg" / "query.jpg", half)
    kinds = {kind: np.array([names.index(kind)]) for kind in ("easy", "hard", "junk")}
    truth = {
        "imlist": names,
        "qimlist": ["query"],
        "gnd": [{"bbx": [0.0, 0.0, 18.0, 31.6], **kinds}],
    }
    (tmp_path / "roxford5k" / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth))
    return tmp_path


def change(folder, **fields):
    path = folder / "roxford5k" / "gnd_roxford5k.pkl"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | fields))


def test_known_answers(folder, colours):
    """Ranking: junk, easy, negative, hard, ...: without the junk, easy is first and hard third."""
    row = evaluate_retrieval(colours, open_benchmark(folder, "roxford5k"), crop_queries=True)
    medium = ((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2) / 2
    assert row.metrics == pytest.approx({
        "mAP easy": 100, "mP@1 easy": 100, "mP@5 easy": 100, "mP@10 easy": 100,
        "mAP medium": 100 * medium, "mP@1 medium": 100,
        "mP@5 medium": 200 / 3, "mP@10 medium": 200 / 3,
        # Without easy and junk, hard is second.
        "mAP hard": 25, "mP@1 hard": 0, "mP@5 hard": 50, "mP@10 hard": 50,
    })  # fmt: skip
    assert (row.top1, row.top5, row.train_size, row.val_size) == (None, None, 6, 1)
    assert row.settings["queries"] == "cropped"


def test_whole_queries_rank_by_what_fills_them(folder, colours):
    whole = evaluate_retrieval(colours, open_benchmark(folder, "roxford5k"))
    assert whole.settings["queries"] == "whole"
    assert whole.metrics["mP@1 medium"] == 0, "the query's box is a quarter of its image"


def test_scales_of_flat_images_change_nothing(folder, colours):
    benchmark = open_benchmark(folder, "roxford5k")
    once = evaluate_retrieval(colours, benchmark, crop_queries=True)
    often = evaluate_retrieval(colours, benchmark, crop_queries=True, scales=True)
    assert often.metrics == pytest.approx(once.metrics)
    assert often.settings["scales"] == "1, 0.707, 0.5"


def test_average_precision():
    assert average_precision(np.array([0, 1, 2]), 3) == 1
    assert average_precision(np.array([3]), 1) == pytest.approx((0 / 3 + 1 / 4) / 2)
    assert average_precision(np.array([0]), 2) == 0.5, "one of two was never found"


def test_score_counts_only_queries_with_positives():
    relevant = {"easy": np.array([2]), "hard": np.array([], int), "junk": np.array([0, 3])}
    nothing = {kind: np.array([], int) for kind in relevant}
    box = (0.0, 0.0, 1.0, 1.0)
    queries = (Query("a", box, relevant), Query("b", box, nothing))
    found = score(np.array([[0, 3, 1, 2], [0, 1, 2, 3]]), queries)
    assert found["mAP easy"] == found["mAP medium"] == 100 * (0 / 1 + 1 / 2) / 2
    assert "mAP hard" not in found


def test_precision_looks_no_further_than_the_last_positive():
    relevant = {"easy": np.array([0, 1]), "hard": np.array([], int), "junk": np.array([], int)}
    order = np.arange(40)[None]
    assert score(order, (Query("a", (0, 0, 1, 1), relevant),))["mP@10 easy"] == 100


def test_fit_shrinks_and_never_enlarges(paint):
    assert shrink(paint(0, 300, 150), 224).shape == (224, 112, 3)
    assert np.array_equal(shrink(paint(0, 30, 15), 224), paint(0, 30, 15))
    assert shrink(np.zeros((300, 150, 1), np.uint8), 100).shape == (100, 50, 1)


def test_cut(paint):
    image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    assert np.array_equal(crop(image, (0.6, 1.2, 3.4, 9.0)), image[1:, 1:3])
    with pytest.raises(ValueError, match="outside"):
        crop(image, (5, 0, 9, 4))


@pytest.mark.parametrize("missing", ["roxford5k", "roxford5k/jpg", "roxford5k/gnd_roxford5k.pkl"])
def test_what_is_missing_is_named(folder, missing):
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UsageError, match=f"{missing} is missing: .* must hold roxford5k/gnd_"):
        open_benchmark(folder, "roxford5k")


def test_missing_images_and_empty_sets(folder):
    (folder / "roxford5k/jpg/hard.jpg").unlink()
    with pytest.raises(UsageError, match=r"lacks 1 of the 7 images .* the first hard\.jpg"):
        open_benchmark(folder, "roxford5k")
    change(folder, qimlist=[], gnd=[])
    with pytest.raises(UsageError, match="names no query"):
        open_benchmark(folder, "roxford5k")
    with pytest.raises(UsageError, match='no retrieval set "roxford": did you mean "roxford5k"'):
        open_benchmark(folder, "roxford")


@pytest.mark.parametrize(
    "fields",
    [
        {"gnd": []},
        {"imlist": ["../easy"]},
        {"imlist": [3]},
        {"gnd": [{"bbx": [0, 0, 1, 1], "easy": [99], "hard": [], "junk": []}]},
        {"gnd": [{"bbx": [0, 0, 1, 1], "easy": ["a"], "hard": [], "junk": []}]},
        {"gnd": [{"bbx": [0, 0], "easy": [0], "hard": [], "junk": []}]},
        {"gnd": [{"bbx": [0, 0, 1, 1], "easy": [0]}]},
        {"gnd": [{"bbx": [0, 0, float("inf"), 1], "easy": [0], "hard": [], "junk": []}]},
        {"gnd": [{"bbx": [0, 0, 10**400, 1], "easy": [0], "hard": [], "junk": []}]},
        {"gnd": [{"bbx": [0, 0, 1, 1], "easy": [10**30], "hard": [], "junk": []}]},
        {"imlist": ["zero\0byte"]},
        {"imlist": 7},
    ],
)
def test_something_else_than_ground_truth(folder, fields):
    change(folder, **fields)
    with pytest.raises(RunFailed, match="is no ground truth of revisited Oxford or Paris"):
        open_benchmark(folder, "roxford5k")


def test_a_broken_image_and_a_box_outside(folder, colours):
    benchmark = open_benchmark(folder, "roxford5k")
    change(folder, gnd=[{"bbx": [900, 0, 999, 9], "easy": [0], "hard": [], "junk": []}])
    with pytest.raises(UsageError, match=r"query query: the box .* lies outside of the 80 x 32"):
        evaluate_retrieval(colours, open_benchmark(folder, "roxford5k"), crop_queries=True)
    (folder / "roxford5k/jpg/easy.jpg").write_bytes(b"no image")
    with pytest.raises(RunFailed, match=r"easy\.jpg cannot be read"):
        evaluate_retrieval(colours, benchmark)


def test_what_is_no_file(folder):
    """A folder or a named pipe in the place of an image, or of the ground truth."""
    easy, truth = folder / "roxford5k/jpg/easy.jpg", folder / "roxford5k/gnd_roxford5k.pkl"
    easy.unlink()
    for make in (os.mkfifo, os.mkdir):
        make(easy)
        with pytest.raises(UsageError, match=r"lacks 1 of the 7 images .* the first easy\.jpg"):
            open_benchmark(folder, "roxford5k")
        (os.rmdir if easy.is_dir() else os.unlink)(easy)
    truth.unlink()
    truth.mkdir()
    with pytest.raises(UsageError, match=r"gnd_roxford5k\.pkl is missing"):
        open_benchmark(folder, "roxford5k")
