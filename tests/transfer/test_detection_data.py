"""Annotated pictures in their real layouts, and everything that can be wrong with one."""

import json

import numpy as np
import pytest
from PIL import Image

from xdino.data.decode import UnreadableImage
from xdino.errors import UsageError
from xdino_transfer.detection import outlines
from xdino_transfer.detection.average_precision import score
from xdino_transfer.detection.layouts import coco
from xdino_transfer.detection.layouts.opening import open_annotated

H, W = 20, 30
SQUARE = [[5, 4, 15, 4, 15, 12, 5, 12]]


def picture(path, size=(W, H), orientation=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(path, exif=exif)


def tree(annotations=None, images=(7, 90)):
    """Two pictures of COCO's, classes numbered 3 and 90."""
    if annotations is None:
        annotations = [annotation(), annotation(image_id=90, category_id=90)]
    return {
        "images": [{"id": n, "height": H, "width": W, "file_name": f"{n:012}.jpg"} for n in images],
        "annotations": annotations,
        "categories": [{"id": 90, "name": "kite"}, {"id": 3, "name": "car"}],
    }


def annotation(**other):
    row = {
        "id": 11, "image_id": 7, "category_id": 3, "bbox": [5, 4, 10, 8], "area": 80, "iscrowd": 0,
        "segmentation": SQUARE,
    }  # fmt: skip
    return {key: value for key, value in {**row, **other}.items() if value is not None}


def coco_set(root, **trees):
    for split in ("train", "val"):
        told = trees.get(split, tree())
        for image in told["images"]:
            picture(root / f"{split}2017" / image["file_name"])
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(told))
    return root


def test_cocos_layout_with_sparse_numbers(tmp_path):
    crowd = annotation(id=12, iscrowd=1, segmentation={"size": [H, W], "counts": [100, 40, 460]})
    train, val = open_annotated(str(coco_set(tmp_path, train=tree([annotation(), crowd]))))
    assert train.classes == val.classes == ("car", "kite")
    assert train.category_ids.tolist() == [3, 90]
    assert val.labels.tolist() == [0, 1]
    assert (len(train), train.numbers.tolist()) == (2, [7, 90])
    assert train.read(0).shape == (H, W, 3)
    assert (train.of(0).tolist(), train.of(0, crowd=True).tolist()) == ([0], [0, 1])
    assert train.of(1, crowd=True).tolist() == []
    assert train.boxes[0].tolist() == [5, 4, 15, 12]
    assert train.mask(0, 0).sum() == 80
    told = train.truth()
    perfect = [{**row, "score": 1.0} for row in told["annotations"] if not row["iscrowd"]]
    for kind in ("box", "mask"):
        assert score(told, perfect, kind).values["AP"] == pytest.approx(1, rel=1e-12)


def test_polygons_a_list_and_a_string_of_runs_are_one_mask():
    as_polygon = outlines.filled(SQUARE, (H, W))
    told = outlines.runs(SQUARE, (H, W))
    as_string = {"size": [H, W], "counts": told["counts"].decode()}
    flat = as_polygon.T.ravel()  # column by column, starting with a run of 0
    edges = np.flatnonzero(np.diff(flat, prepend=0, append=2))
    runs = np.diff(edges, prepend=0).tolist()
    as_list = {"size": [H, W], "counts": runs}
    assert as_polygon.sum() == 80
    for other in (as_string, as_list):
        assert outlines.checked(other, (H, W)) is other
        assert np.array_equal(outlines.filled(other, (H, W)), as_polygon)
    assert outlines.encoded(as_polygon) == as_string
    for damaged in (as_string["counts"][:-1], as_string["counts"] + "9", "~~~"):
        with pytest.raises(UsageError, match="do not add up"):
            outlines.filled({"size": [H, W], "counts": damaged}, (H, W))


def test_vocs_layout_counts_from_one(tmp_path):
    objects = {
        "a": [("dog", (1, 1, W, H), 0), ("cat", (4, 5, 13, 14), 1)],
        "b": [],
    }
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    (folder / "Annotations").mkdir(parents=True)
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for stem, listed in objects.items():
        picture(folder / "JPEGImages" / f"{stem}.jpg")
        rows = "".join(
            f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"
            f"<xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax>"
            "</bndbox></object>"
            for name, box, difficult in listed
        )
        size = f"<size><width>{W}</width><height>{H}</height><depth>3</depth></size>"
        text = f"<annotation>{size}{rows}</annotation>"
        (folder / "Annotations" / f"{stem}.xml").write_text(text)
    for split in ("train", "val"):
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("a\nb\n")
    train, val = open_annotated(str(tmp_path))
    assert len(train.classes) == 20
    assert train.boxes.tolist() == [[0, 0, W, H], [3, 4, 13, 14]]
    assert train.crowd.tolist() == [False, True]
    assert val.mask(0, 0).sum() == W * H
    (folder / "Annotations" / "b.xml").write_text("<annotation><size></size></annotation>")
    with pytest.raises(UsageError, match=r"b.xml is no annotation of VOC's: it has no size/height"):
        open_annotated(str(tmp_path))
    (folder / "Annotations" / "b.xml").write_text('<!DOCTYPE a [<!ENTITY x "y">]><annotation/>')
    with pytest.raises(UsageError, match="entities"):
        open_annotated(str(tmp_path))


def test_json_beside_images(tmp_path):
    for split in ("train", "valid"):
        for image in tree()["images"]:
            picture(tmp_path / split / image["file_name"])
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(tree()))
    train, val = open_annotated(str(tmp_path))
    assert (len(train), len(val), train.notices) == (2, 2, [])


def test_what_is_left_out_is_counted(tmp_path):
    told = tree(
        [
            annotation(id=1, bbox=[5, 4, 0, 8]),
            annotation(id=2, bbox=[W + 5, 4, 10, 8]),
            annotation(id=3, bbox=[W - 5, -4, 50, 8], segmentation=None),
            annotation(id=4, segmentation=[[1, 1, 5, 5]]),
            annotation(id=5, segmentation=[[1, 1, 5, 5], *SQUARE]),
            annotation(id=6, area=0),
        ]
    )
    train, _ = open_annotated(str(coco_set(tmp_path, train=told)))
    assert train.boxes.tolist() == [[W - 5, 0, W, 4], [5, 4, 15, 12], [5, 4, 15, 12]]
    assert [train.mask(0, row).sum() for row in range(3)] == [20, 80, 80]
    without_area, points, boxes = train.notices
    assert "3 objects have boxes without an area, or outside of their picture" in without_area
    assert "(first: annotation 1)" in without_area
    assert "1 objects have polygons of fewer than three points" in points
    assert "2 of 3 objects are boxes without an outline" in boxes


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (tree([annotation(category_id=4)]), "annotation 11 of .* has category 4, and there are 3, 90"),
        (tree([annotation(image_id=8)]), "annotation 11 of .* is on image 8, which is not listed"),
        (
            tree([annotation(segmentation={"size": [W, H], "counts": [W * H]})]),
            "annotation 11 .* its mask is of 20 x 30 pixels and its image of 30 x 20",
        ),
        (
            tree([annotation(segmentation={"size": [H, W], "counts": [3, 4]})]),
            "annotation 11 .* runs of pixels do not add up",
        ),
        (tree([annotation(segmentation=[[1, 2, 3, 4, 5, 6, 7]])]), "polygon of it has half a point"),
        (tree([annotation(segmentation="mask.png")]), "neither polygons nor runs"),
        (tree([annotation(bbox=None)]), "no COCO file: where an entry is expected it has no 'bbox'"),
        (tree(images=(7, 7)), "has two pictures of one number"),
        ({"images": []}, "it has no annotations and no categories"),
        ([], "is no COCO file"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(told, said, tmp_path):
    for image in told["images"] if isinstance(told, dict) else ():
        picture(tmp_path / image["file_name"])
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(told))
    with pytest.raises(UsageError, match=said):
        coco.read(path, tmp_path)


def test_files_that_are_not_there(tmp_path):
    root = coco_set(tmp_path, train=tree(images=(7, 90, *range(100, 130))))
    (root / "train2017" / f"{7:012}.jpg").unlink()
    train, _ = open_annotated(str(root))
    assert (len(train), train.numbers[0]) == (31, 90)
    assert "1 of the 32 pictures" in train.notices[0]
    assert f"{7:012}.jpg; they are left out" in train.notices[0]
    (root / "train2017" / f"{90:012}.jpg").unlink()
    with pytest.raises(UsageError, match=r"2 of the 32 pictures of .* are not there"):
        open_annotated(str(root))
    (root / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(UsageError, match="annotations of train and none of val"):
        open_annotated(str(root), missing_share=1)
    with pytest.raises(UsageError, match="there is no folder"):
        open_annotated(str(root / "nowhere"))
    with pytest.raises(UsageError, match="holds no annotated pictures: expected"):
        open_annotated(str(root / "annotations"))


def test_layouts_are_not_mixed(tmp_path):
    root = coco_set(tmp_path)
    for name in ("Annotations", "JPEGImages"):
        (root / name).mkdir()
    with pytest.raises(UsageError, match="mixes layouts"):
        open_annotated(str(root))
    other = coco_set(tmp_path / "other")
    told = tree()
    told["categories"][0]["name"] = "bird"
    (other / "annotations" / "instances_val2017.json").write_text(json.dumps(told))
    with pytest.raises(UsageError, match="only in train: kite; only in val: bird"):
        open_annotated(str(other))


def test_pictures_are_read_upright(tmp_path):
    root = coco_set(tmp_path)
    picture(root / "train2017" / f"{7:012}.jpg", (H, W), orientation=6)  # stored on its side
    picture(root / "train2017" / f"{90:012}.jpg", (W, H), orientation=6)
    train, _ = open_annotated(str(root))
    assert train.read(0).shape == (H, W, 3)
    with pytest.raises(UnreadableImage, match="upright it has 20 x 30 pixels, and its annotations"):
        train.read(1)
