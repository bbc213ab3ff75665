"""Neighbour sheets: the right neighbours, said in numbers and shown in frames."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from xdino.errors import UsageError
from xdino_eval.features import Features
from xdino_eval.knn import nearest_neighbours
from xdino_eval.knn.neighbours import PAGE, RIGHT, UNKNOWN, WRONG, find, tiles, write


def features_of(source, places, dim=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Features(torch.randn(len(places), dim, generator=g), None, torch.tensor(places),
                    data=source.name)  # fmt: skip


@pytest.fixture
def bank(make_source):
    return make_source(12, classes=3)


def test_neighbours_are_those_that_vote(bank, make_source):
    asked = make_source(5, classes=3, seed=1)
    readable = [0, 1, 3, 4, 6, 7, 8, 9, 11]  # the others could not be read
    train, val = features_of(bank, readable), features_of(asked, [1, 2, 4], seed=1)
    found = find(train, bank, val, asked, 4)
    unit = [torch.nn.functional.normalize(f.features, dim=1).numpy() for f in (train, val)]
    similarity, row = nearest_neighbours(*unit, 4)
    assert [query.index for query in found] == [1, 2, 4]
    for query, values, rows in zip(found, similarity, row, strict=True):
        assert [near.index for near in query.neighbours] == [readable[r] for r in rows]
        assert [near.similarity for near in query.neighbours] == pytest.approx(values, abs=1e-6)
        assert query.label == str(query.index % 3)
        for near in query.neighbours:
            assert near.right == (near.index % 3 == query.index % 3)
            assert near.image == f"image {near.index} of stand-in"


def test_an_image_is_not_its_own_neighbour(bank):
    readable = [0, 2, 3, 5, 6, 7, 10]
    train = features_of(bank, readable)
    some = replace(train, features=train.features[[1, 4]], indices=train.indices[[1, 4]])
    found = find(train, bank, some, bank, 50)
    for query in found:
        assert query.index in (2, 6)
        assert {near.index for near in query.neighbours} == set(readable) - {query.index}


def frames(found, bank, asked):
    return [(t.colour, t.frame) for query in found for t in tiles(query, bank, asked)]


def test_frames_tell_right_from_wrong_and_from_unknown(bank, make_source):
    asked = make_source(2, classes=3, seed=1)
    train = features_of(bank, list(range(12)))
    found = find(train, bank, features_of(asked, [0, 1], seed=1), asked, 5)
    shown = frames(found, bank, asked)
    expected = []
    for query in found:
        expected.append(("black", "solid"))
        expected += [(RIGHT, "solid") if n.right else (WRONG, "dashed") for n in query.neighbours]
    assert shown == expected
    assert {(RIGHT, "solid"), (WRONG, "dashed")} <= set(shown)
    unlabelled = make_source(12, labelled=False)
    found = find(train, unlabelled, features_of(asked, [0], seed=1), asked, 5)
    assert [near.label for near in found[0].neighbours] == [None] * 5
    shown = frames(found, unlabelled, asked)
    assert shown[1:] == [(UNKNOWN, "solid")] * 5


def test_sheets_and_numbers_are_written_and_old_ones_removed(bank, make_source, tmp_path):
    asked = make_source(PAGE + 2, classes=3, seed=1)
    train = features_of(bank, list(range(12)))
    found = find(train, bank, features_of(asked, list(range(PAGE + 2)), seed=1), asked, 3)
    files = write(found, bank, asked, tmp_path / "n", {"k": 3, "data": "d"})
    assert [file.name for file in files] == [
        "neighbours-001-sheet.png", "neighbours-002-sheet.png", "neighbours.json",
    ]  # fmt: skip
    assert set((tmp_path / "n").iterdir()) == set(files)
    sizes = [Image.open(file).size for file in files[:2]]
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] > 3 * sizes[1][1]
    assert np.asarray(Image.open(files[0]).convert("L")).std() > 10
    told = json.loads(files[2].read_text())
    assert (told["k"], told["data"], len(told["queries"])) == (3, "d", PAGE + 2)
    assert told["queries"][4]["neighbours"][0]["index"] == found[4].neighbours[0].index
    files = write(found[:1], bank, asked, tmp_path / "n", {})
    assert set((tmp_path / "n").iterdir()) == set(files), "the second sheet is gone"


def test_refusals(bank, make_source):
    asked = make_source(2)
    train, val = features_of(bank, [0, 1]), features_of(asked, [0, 1])
    nothing = features_of(asked, [])
    broken = replace(val, features=val.features * torch.nan)
    for arguments, sentence in (
        ((train, bank, val, asked, 0), "1 neighbour or more, got 0"),
        ((train, bank, nothing, asked, 3), "no image to find neighbours of"),
        ((nothing, bank, val, asked, 3), "no other image"),
        ((features_of(bank, [0]), bank, features_of(bank, [0]), bank, 1), "no other image"),
        ((train, bank, broken, asked, 1), "a query feature is not finite"),
    ):
        with pytest.raises(UsageError, match=sentence):
            find(*arguments)


def test_sheets_do_not_lie_among_the_images(xdino, tmp_path):
    """The next run would take them for images."""
    for name in ("train/a", "val/a", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / name / "1.png")
    (tmp_path / "link").symlink_to(tmp_path / "train")
    for data, out in (
        (tmp_path, tmp_path / "train"),
        (tmp_path, tmp_path / "link" / "sheets"),
        (tmp_path / "elsewhere", tmp_path / "elsewhere" / "sheets"),
    ):
        code, _, err = xdino("neighbours", "w.pt", "--data", data, "--out", out)
        assert code == 2
        assert "--out lies in the images of" in err
    code, _, err = xdino("neighbours", "w.pt", "--data", tmp_path, "--out", tmp_path / "sheets")
    assert "--out lies" not in err
