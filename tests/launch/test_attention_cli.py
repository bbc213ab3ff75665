"""`xdino attention` and `xdino segment-score` as a person meets them."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from xdino.backbones import BackboneSpec
from xdino.checkpoint import save_backbone

SHAPE = {"embed_dim": 32, "depth": 1, "num_heads": 4}


@pytest.fixture
def xdino(xdino):
    """As elsewhere, but standard output comes as its lines."""

    def run(*arguments) -> tuple[int, list[str], str]:
        code, out, err = xdino(*arguments)
        return code, out.splitlines(), err

    return run


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "xcit.safetensors"
    spec = BackboneSpec("xcit_nano_12_p8", shape=SHAPE, input_size=32, resize=32)
    xcit = spec.build()
    with torch.no_grad():
        for block in xcit.cls_attn_blocks:  # an untrained one attends to all patches alike
            block.attn.qkv.weight *= 20
    save_backbone(path, xcit, spec, role="teacher", iteration=7)
    return path


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    spec = BackboneSpec("resnet18")
    save_backbone(path, spec.build(), spec)
    return path


@pytest.fixture
def images(tmp_path):
    """Ten frames of a square that moves, in a folder of their own."""
    folder = tmp_path / "frames"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        image = rng.integers(0, 60, (37, 53, 3), dtype=np.uint8)
        image[8:20, 3 * i : 3 * i + 12] += 150
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return folder


def test_images_and_a_folder_with_its_sheet(xdino, weights, images, tmp_path):
    (images / "broken.png").write_text("no image")
    (images / "below").mkdir()
    Image.open(images / "00.png").save(images / "below" / "00.png")
    out = tmp_path / "out"
    options = ("--out", out, "--layer", 2, "--head", 3)
    code, written, err = xdino("attention", weights, images / "01.png", images, *options, "--all")
    assert code == 0
    assert "skipped" in err
    assert "broken.png cannot be read as an image" in " ".join(err.split())
    assert len(written) == len(set(written)) == 5 * 12 + 1, "no file is written twice"
    assert written[0] == str(out / "01-sheet.png")
    assert written[-1] == str(out / "sheet.png")
    names = {path.rsplit("/", 1)[1] for path in written}
    assert {"01-2-layer2-head3-mask.png", "below-00-layer2-head3.png", "00-overlay.png"} <= names
    assert all(Image.open(path).size == (53, 37) for path in written if path.endswith("mask.png"))
    code, few, err = xdino("attention", weights, images / "01.png", images, *options)
    assert (code, len(few)) == (0, 12 + 1)
    assert {path.rsplit("-", 1)[-1] for path in few[:-1]} == {"overlay.png"}
    assert "shown at 106 x 74 pixels" in err, "the size that was chosen is said"
    assert "2 times their own size" in err
    assert "--size N sets the shorter side" in err


def test_one_image_has_a_sheet_and_an_overlay(xdino, weights, images, tmp_path):
    code, written, err = xdino("attention", weights, images / "00.png", "--out", tmp_path / "a")
    assert (code, [path.rsplit("/", 1)[1] for path in written]) == (
        0, ["00-sheet.png", "00-overlay.png"],
    )  # fmt: skip
    code, _, err = xdino(
        "attention", weights, images / "00.png", "--out", tmp_path / "a", "--size", 32
    )
    assert (code, err) == (0, ""), "a size that was asked for needs no words"
    code, _, err = xdino("attention", weights, images / "00.png")
    assert code == 2
    assert "--out FOLDER is needed where WEIGHTS is no run" in err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "backbone.safetensors").write_bytes(weights.read_bytes())
    code, written, _ = xdino("attention", tmp_path / "run", images / "00.png")
    assert (code, written[0]) == (0, str(tmp_path / "run" / "attention" / "00-sheet.png"))


def test_a_large_folder_is_drawn_in_part(xdino, weights, images, tmp_path):
    command = ("attention", weights, images, "--limit", 4)
    for kind, count in (((), 5), (("--pca",), 5), (("--xca",), 4)):
        code, written, err = xdino(*command, *kind, "--out", tmp_path / "out")
        assert (code, len(written)) == (0, count)
        assert "drawing 4 of the 10 images" in err
    names = [path.rsplit("/", 1)[1].split("-")[0] for path in written]
    assert names == ["00", "03", "06", "09"], "evenly spread"


def test_grey_turned_and_transparent_images_of_one_name(xdino, weights, images, tmp_path):
    places = []
    for i, mode in enumerate(("L", "RGBA", "RGB", "P")):
        (tmp_path / str(i)).mkdir()
        places.append(tmp_path / str(i) / "same.png")
        picture = Image.open(images / "03.png").convert(mode)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter
        picture.save(places[-1], exif=exif if mode == "RGB" else None)
    code, written, _ = xdino("attention", weights, *places, "--out", tmp_path / "out", "--all")
    assert code == 0
    assert len(written) == len(set(written))
    overlays = [f"same{end}-layer2-overlay.png" for end in ("", "-2", "-3", "-4")]
    shapes = [Image.open(tmp_path / "out" / name).size for name in overlays]
    assert shapes == [(53, 37), (53, 37), (37, 53), (53, 37)]


def test_a_size_that_memory_does_not_hold(xdino, weights, images, tmp_path, monkeypatch):
    from xdino.plan import feasibility
    from xdino_eval.attention import sizes

    monkeypatch.setattr(feasibility, "free_memory", lambda device: 2_000_000)
    monkeypatch.setattr(sizes, "free_memory", lambda device: 2_000_000)
    Image.new("RGB", (900, 600)).save(tmp_path / "large.png")
    command = ("attention", weights, tmp_path / "large.png", "--out", tmp_path / "out")
    code, _, err = xdino(*command, "--size", 2000)
    assert code == 2
    assert "lower --size" in err
    code, _, err = xdino(*command)
    assert code == 0
    assert "as large as memory allows" in err


def test_ten_frames_become_a_video_that_plays(xdino, weights, images, tmp_path):
    av = pytest.importorskip("av")
    code, written, _ = xdino(
        "attention", weights, images, "--fps", 12, "--layer", 2, "--out", tmp_path / "a"
    )
    assert code == 0
    names = [f"frames-layer2-mean{end}.mp4" for end in ("", "-overlay", "-mask")]
    assert [path.rsplit("/", 1)[1] for path in written] == names
    # The overlay's video in its turn: what came out goes in.
    code, again, _ = xdino("attention", weights, written[1], "--layer", 1, "--out", tmp_path / "b")
    assert code == 0
    for path in [*written, *again]:
        with av.open(path) as container:
            stream = container.streams.video[0]
            assert (stream.width, stream.height) == (54, 38)
            assert stream.average_rate == 12
            shown = list(container.decode(video=0))
        assert len(shown) == 10
        assert shown[5].to_ndarray(format="gray").std() > 2


def test_components_and_channel_matrices(xdino, weights, images, tmp_path):
    pytest.importorskip("av")
    code, written, _ = xdino(
        "attention", weights, images, "--pca", "--foreground", "--out", tmp_path / "p"
    )
    assert code == 0
    assert len(written) == 11
    code, every, _ = xdino(
        "attention", weights, images, "--pca", "--foreground", "--out", tmp_path / "p", "--all"
    )
    assert len(every) == 21
    picture = np.asarray(Image.open(every[3]))
    assert picture.shape == (37, 53, 3)
    assert (picture == 0).all(2).mean() > 0.1, "the background is black"
    code, written, _ = xdino("attention", weights, images, "--pca", "--fps", 5, "--out", tmp_path)
    assert (code, written) == (0, [str(tmp_path / "frames-pca.mp4")])
    code, written, _ = xdino(
        "attention", weights, images / "00.png", "--xca", "--out", tmp_path / "x", "--all"
    )
    assert code == 0
    assert [path.rsplit("/", 1)[1] for path in written] == [
        "00-xca-sheet.png",
        "00-xca-block1.png",
    ]


def test_segment_score_writes_rows_and_details(xdino, weights, images, tmp_path):
    (tmp_path / "masks").mkdir()
    images.rename(tmp_path / "images")
    for i in range(10):
        truth = np.zeros((37, 53), np.uint8)
        truth[8:20, 3 * i : 3 * i + 12] = 255
        Image.fromarray(truth).save(tmp_path / "masks" / f"{i:02}.png")
    results, details = tmp_path / "results.json", tmp_path / "each.json"
    command = ("segment-score", weights, "--data", tmp_path, "--details", details, "--out", results)
    code, out, _ = xdino(*command, "--json")
    assert code == 0
    rows = json.loads("\n".join(out))
    assert rows == json.loads(results.read_text())
    assert [row["settings"]["layer"] for row in rows] == ["layer1", "layer2"]
    assert rows[0]["features"] == "teacher, iteration 7"
    each = json.loads(details.read_text())["layer2"]
    assert len(each) == 10
    best = 100 * np.mean([max(image["heads"]) for image in each])
    assert rows[1]["metrics"]["jaccard best head"] == pytest.approx(best, abs=1e-3)
    code, out, _ = xdino(*command)
    assert code == 0
    shown = f"{rows[1]['metrics']['jaccard mean map']:.2f}"
    assert shown in " ".join(out), "the table shows the figures too"
    assert len(json.loads(results.read_text())) == 4


def test_bad_input_is_one_sentence(xdino, weights, resnet, images, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("no video")
    Image.new("RGB", (40, 5)).save(tmp_path / "thin.png")
    picture = images / "00.png"
    for arguments, sentence in (
        ((weights, tmp_path / "empty"), "holds no image"),
        ((weights, tmp_path / "none"), "there is no image, folder or video"),
        ((weights, tmp_path / "text.mp4"), "cannot be read as a video"),
        ((weights, tmp_path / "thin.png"), "40 x 5 pixels is smaller than a patch of 8 x 8"),
        ((weights, picture, "--size", 4), "at least a patch of 8"),
        ((weights, picture, "--size", 10**30), "1<=x<=8192"),
        ((weights, images, "--fps", 1e-300), "fps must be above 0 and at most 1000"),
        ((weights, images, "--fps", 1e300), "fps must be above 0 and at most 1000"),
        ((weights, picture, "--layer", 3), "no class-attention layer 3: choose one from 1 to 2"),
        ((weights, picture, "--head", 5), "there is no head 5: choose one from 1 to 4"),
        ((weights, picture, "--mass", 0), "--mass must be above 0 and at most 1"),
        ((weights, images, "--fps", 0), "--fps must be above 0"),
        ((weights, picture, "--pca", "--xca"), "give one of them"),
        ((weights, picture, "--foreground"), "--foreground goes with --pca"),
        ((weights, picture, "--pca", "--head", 1), "choose class attention"),
        ((weights, images, "--xca", "--fps", 5), "draws images, not videos"),
        ((resnet, picture), "a ResNet has no class attention"),
        ((resnet, picture, "--pca"), "a ResNet has no class attention and no patch tokens"),
        ((resnet, picture, "--xca"), "a ResNet has none"),
    ):
        code, out, err = xdino("attention", *arguments, "--out", tmp_path / "out")
        assert (code, out, err.count("\n")) == (2, [], 1), (sentence, err)
        assert sentence in err
    for arguments, sentence in (
        (("--data", images), "it has no images"),
        (("--data", images, "--mass", 1.5), "--mass must be above 0"),
        (("--data", images, "--ignore", "void"), "--ignore takes a value from 0 to 255"),
    ):
        code, out, err = xdino("segment-score", weights, *arguments)
        assert (code, out, err.count("\n")) == (2, [], 1), err
        assert sentence in err


@pytest.mark.parametrize("kind", [(), ("--pca",), ("--xca",)])
def test_what_was_drawn_is_not_read_again(xdino, weights, images, tmp_path, kind):
    """A folder that holds --out, an earlier --out, or both, gives as many pictures every time."""
    (images / "sub").mkdir()
    (images / "sub").joinpath("01.png").write_bytes((images / "01.png").read_bytes())
    for path in sorted(images.glob("0[2-9].png")):
        path.unlink()
    counts = []
    for out in ("a", "a", "b", "sub/c"):
        code, written, err = xdino("attention", weights, images, *kind, "--out", images / out)
        counts.append((code, len(written)))
    assert counts == [counts[0]] * 4
    assert counts[0][0] == 0
    assert "that xdino drew" in err
    code, written, err = xdino("attention", weights, images, *kind, "--out", images)
    assert (code, written) == (2, [])
    assert "--out is the folder of images" in err
    (tmp_path / "link").symlink_to(images)
    assert xdino("attention", weights, images, *kind, "--out", tmp_path / "link")[0] == 2


def test_a_pattern_of_files_does_not_feed_on_itself(xdino, weights, images):
    """`xdino attention W photos/*.png --out photos`, again and again."""
    for path in sorted(images.glob("0[2-9].png")):
        path.unlink()
    counts = []
    for _ in range(3):
        code, written, _ = xdino("attention", weights, *sorted(images.glob("*")), "--out", images)
        counts.append((code, len(written)))
    assert counts == [(0, 3)] * 3
    drawn = images / "00-overlay.png"
    code, _, err = xdino("attention", weights, drawn, "--out", images)
    assert code == 2
    assert "was drawn by xdino" in err
    # A photograph that happens to be called like a picture is not drawn over.
    for name in ("00-overlay.png", "sheet.png"):
        Image.new("RGB", (40, 40)).save(images / name)
        before = (images / name).read_bytes()
        code, _, err = xdino(
            "attention", weights, images / name, images / "00.png", "--out", images
        )
        assert code == 2
        assert "would be drawn over" in err
        assert (images / name).read_bytes() == before


def test_odd_files_among_good_ones(xdino, weights, images, tmp_path):
    (images / "folder.png").mkdir()
    (images / "empty.png").touch()
    os.mkfifo(images / "pipe.png")
    (images / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(40))
    Image.new("RGB", (40, 5)).save(images / "[thin/]".replace("/", ":"), "PNG")
    Image.new("LA", (40, 40)).save(images / "[bold] ö.png")
    Image.new("L", (40, 40)).save(os.fsencode(images) + b"/caf\xe9.png")
    (images / f"{'x' * 240}.png").write_bytes((images / "00.png").read_bytes())
    for kind, count in (((), 14), (("--pca",), 14), (("--xca",), 13)):
        code, written, err = xdino("attention", weights, images, *kind, "--out", tmp_path / "out")
        assert (code, len(written)) == (0, count), err
        assert "empty.png cannot be read" in err.replace("\n", " ")
        assert "Traceback" not in err
    for name in os.listdir(images):
        if name not in ("empty.png", "cut.jpg"):
            os.rename(images / name, tmp_path / name)
    code, _, err = xdino("attention", weights, images, "--out", tmp_path / "out")
    assert code == 2
    assert "none of the 2 images can be drawn" in err
    code, _, err = xdino("attention", weights, images, "--fps", 5, "--out", tmp_path / "out")
    assert code == 2
    (tmp_path / "file").touch()
    code, _, err = xdino("attention", weights, tmp_path / "00.png", "--out", tmp_path / "file")
    assert code == 2
    assert "--out needs a folder" in err


def test_weights_that_are_not_finite(xdino, weights, images, tmp_path):
    spec = BackboneSpec("xcit_nano_12_p8", shape=SHAPE, input_size=32, resize=32)
    xcit = spec.build()
    with torch.no_grad():
        xcit.cls_attn_blocks[-1].attn.qkv.weight.fill_(1e30)
    save_backbone(tmp_path / "huge.safetensors", xcit, spec)
    code, _, err = xdino(
        "attention", tmp_path / "huge.safetensors", images, "--out", tmp_path / "o"
    )
    assert code == 1
    assert "is not finite" in err
