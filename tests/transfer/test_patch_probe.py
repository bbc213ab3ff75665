"""Probes of patch tokens: cases whose score is known, and what is told of it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from xdino import checkpoint
from xdino.backbone import Backbone
from xdino.backbones import BackboneSpec
from xdino.errors import UsageError
from xdino.xcit import XCiT
from xdino_eval import results
from xdino_transfer.segmentation.maps import open_maps
from xdino_transfer.segmentation.patch_probe import KNN, Bank, Linear, PatchProbe
from xdino_transfer.segmentation.patches import Patches

SIDE = 32


class Colours(Backbone):
    """Patches of 4 pixels whose tokens are their mean colours."""

    patch_size, has_patch_tokens, embed_dim = 4, True, 3

    def grid(self, height, width):
        return height // 4, width // 4

    def forward_intermediates(self, images, indices=1, norm=True):
        found = torch.nn.functional.avg_pool2d(images, 4)
        return [(found, found.new_empty(len(images), 0, 3))]


def made(root, count=6):
    """Pictures of two colours, left and right, whose labels are the colours; some void."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for folder in ("images", "masks"):
            (root / folder / part).mkdir(parents=True)
        for number in range(count):
            labels = np.zeros((SIDE, SIDE), np.uint8)
            labels[:, SIDE // 2 :] = 1 + number % 2
            colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]], np.uint8)
            image = colours[labels] + rng.integers(0, 20, (SIDE, SIDE, 3)).astype(np.uint8)
            labels[:4] = 255
            Image.fromarray(image).save(root / "images" / part / f"{number}.png")
            Image.fromarray(labels).save(root / "masks" / part / f"{number}.png")
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    return open_maps(str(root))


def test_colours_are_told_apart(tmp_path):
    train, val = made(tmp_path)
    probe = PatchProbe(KNN(3), SIDE)
    (row,) = probe(Colours(), train, val)
    assert row.metrics["aAcc"] > 93  # all but the pixels between two patches of the border
    assert row.metrics["mIoU"] > 85
    assert (row.protocol, row.train_size, row.val_size, row.top1) == ("dense k-NN", 6, 6, None)
    assert row.settings == {"k": 3, "temperature": 0.02, "classes": 3}
    assert row.transform == "whole pictures, shorter side 32"
    (again,) = probe(Colours(), train, val)
    assert again.metrics == row.metrics
    (few,) = PatchProbe(KNN(3), SIDE, shots=1, draws=4)(Colours(), train, val)
    assert few.settings["shots"] == 1
    assert few.metrics["mIoU"] < row.metrics["mIoU"]  # of one picture a class is missing
    assert few.metrics["mIoU sd"] >= 0
    (small,) = PatchProbe(KNN(3), SIDE, bank=12)(Colours(), train, val)
    assert small.metrics["mIoU"] > 60
    (linear,) = PatchProbe(Linear(), SIDE)(Colours(), train, val)
    assert linear.protocol == "dense linear"
    assert linear.metrics["mIoU"] > 85
    assert linear.settings == {"weight_decay": 1e-4, "classes": 3}


def test_an_xcit_is_left_as_it_was_and_rows_are_kept(tmp_path):
    train, val = made(tmp_path / "data", 2)
    backbone = XCiT(8, 32, 2, 2).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    told = []
    probe = PatchProbe(KNN(2), 24, progress=lambda done, of: told.append((done, of)))
    rows = probe(backbone, train, val)
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert told == [(1, 2), (2, 2)] * 2
    rows = results.signed(rows, "abc", "teacher")
    results.append(tmp_path / "results.json", rows)
    assert results.load(tmp_path / "results.json") == rows
    (train.images[0]).write_bytes(b"nothing")
    (row,) = probe(backbone, train, val)
    assert "1 pictures could not be read" in row.notes[0]
    (gray,) = PatchProbe(KNN(2), 24)(XCiT(8, 32, 2, 2, in_chans=1), val, val)
    assert gray.metrics["aAcc"] > 0


def test_what_cannot_be_asked(tmp_path):
    train, val = made(tmp_path, 2)
    with pytest.raises(UsageError, match="has no class attention and no patch tokens"):
        PatchProbe()(Backbone(), train, val)
    with pytest.raises(UsageError, match="shots must be 1 to the 2 pictures of train, got 3"):
        PatchProbe(shots=3)(Colours(), train, val)
    with pytest.raises(UsageError, match="bank and draws must be at least 1"):
        PatchProbe(draws=0)(Colours(), train, val)
    with pytest.raises(UsageError, match="k must be at least 1"):
        KNN(0)
    for path in train.masks:
        Image.fromarray(np.full((SIDE, SIDE), 255, np.uint8)).save(path)
    with pytest.raises(UsageError, match=r"no pixel of the pictures of train of .* has a label"):
        PatchProbe(size=SIDE)(Colours(), train, val)


def test_patches_share_pixels_as_they_lie():
    """An XCiT's patch is centred on a pixel: the first reaches half a patch beyond the edge."""
    xcit = Patches(
        np.zeros((4, 1), np.float32), (2, 2), (1 / 4, 1 / 4), XCiT(4, 32, 1, 2).patch_start / 4
    )
    labels = np.zeros((8, 8), np.uint8)
    labels[:, 2:] = 1
    assert xcit.shares(labels, 2)[:2].tolist() == [[1, 0], [0, 1]]
    labels[:, 2] = 0
    vit = Patches(np.zeros((4, 1), np.float32), (2, 2), (1 / 4, 1 / 4), 0.0)
    assert vit.shares(labels, 2)[:2].tolist() == [[0.75, 0.25], [0, 1]]
    labels[:] = 255
    assert vit.shares(labels, 2).sum() == 0
    votes = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.float32)
    assert vit.pixels(votes, (8, 8))[0].tolist() == [0] * 4 + [1] * 4
    assert xcit.pixels(votes, (8, 8))[0].tolist()[:2] == [0, 0]
    assert xcit.pixels(votes, (8, 8))[0].tolist()[3:] == [1] * 5


def test_votes_are_weighted_by_similarity():
    bank = Bank(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32))
    query = np.array([[0.8, 0.6, 0.0]], np.float32)
    found = KNN(2, 0.2).fitted(bank)(query)
    expected = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(found, [[expected, 1 - expected, 0]], atol=1e-5)


def test_the_command(tmp_path, xdino):
    made(tmp_path / "data", 2)
    weights, out = tmp_path / "w.safetensors", tmp_path / "results.json"
    backbone = XCiT(8, 32, 2, 2)
    shape = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    spec = BackboneSpec("xcit_nano_12_p8", shape=shape, input_size=24, resize=24)
    checkpoint.save_backbone(weights, backbone, spec)
    command = (
        "patch-probe",
        weights,
        "--data",
        tmp_path / "data",
        "--device",
        "cpu",
        "--results",
        out,
    )
    code, told, said = xdino(*command, "--shots", "1,2", "--draws", "2")
    assert code == 0, said
    assert "dense k-NN" in told
    assert [row.settings["shots"] for row in results.load(out)] == [1, 2]
    assert all(len(row.checkpoint) == 64 for row in results.load(out))
    assert xdino(*command, "--json")[0] == 0
    assert results.load(out)[2].train_size == 2
    assert xdino(*command, "--protocol", "linear")[0] == 0
    assert results.load(out)[3].protocol == "dense linear"
    code, _, said = xdino(*command, "--shots", "3")
    assert (code, said) == (2, "xdino: shots must be 1 to the 2 pictures of train, got 3\n")
    code, _, said = xdino(*command[:3], tmp_path, "--device", "cpu")
    assert code == 2
    assert "holds no pictures with masks: expected images/ and masks/" in said
    code, _, said = xdino(*command[:3], tmp_path / "slip")
    assert code == 2
    assert "slip" in said


def test_a_linear_map_ends_at_its_minimum():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.nn.functional.normalize(torch.randn(60, 5, generator=generator), dim=1)
    shares = torch.rand(60, 3, generator=generator)
    shares = shares / shares.sum(1, keepdim=True)
    bank = Bank(tokens.numpy(), shares.numpy())
    logits = torch.from_numpy(Linear(1e-2, 500).fitted(bank)(bank.tokens))
    # Of the bias the gradient is zero there: each class has its share of the whole.
    np.testing.assert_allclose(logits.softmax(1).mean(0), shares.mean(0), atol=2e-4)


def test_patches_are_probed_while_a_run_pretrains(tmp_path, xdino):
    """Numbers an evaluation in metrics.jsonl, a row of the last teacher in results.json, once."""
    made(tmp_path / "maps", 3)
    for split in ("train", "val"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / split / f"{i}.png")
    run = tmp_path / "run"
    keys = (
        "--model.arch xcit_nano_12_p8 --model.embed_dim 16 --model.depth 1 --model.num_heads 2 "
        "--head.prototypes 32 --head.hidden_dim 16 --head.bottleneck_dim 8 --crops.global_size 24 "
        "--crops.local_size 16 --crops.local_count 1 --train.epochs 2 --train.batch_size 2 "
        "--runtime.workers 0 --runtime.device cpu --runtime.report false --evaluate.every 1 "
        "--evaluate.protocols patch-knn,patch-linear --evaluate.limit 2"
    )
    command = ("pretrain", "small_data", "--run", run, "--data.path", tmp_path / "photos")
    command = (*command, *keys.split())
    code, _, said = xdino(*command)
    assert code == 2
    assert "asks for patch-knn, patch-linear, which needs pictures with masks" in said
    assert "Name them with --evaluate.masks" in said
    code, _, said = xdino(*command, "--evaluate.masks", tmp_path / "maps")
    assert code == 0, said
    assert "patch-knn_mIoU" in said
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scored = [row for row in rows if "patch-knn_mIoU" in row]
    assert [row["epoch"] for row in scored] == [0, 1, 2]
    assert all({"patch-linear_mAcc", "patch-knn_aAcc"} <= row.keys() for row in scored)
    found = results.load(run / "results.json")
    assert [row.protocol for row in found] == ["dense k-NN", "dense linear"]
    assert [row.val_size for row in found] == [2, 2]
    assert found[0].metrics["mIoU"] == pytest.approx(scored[-1]["patch-knn_mIoU"])
    assert found[0].checkpoint == checkpoint.load_backbone(run).origin.sha256
    # As the command has it, on all pictures; a run that is whole already gets no second row.
    assert xdino("pretrain", "--run", run)[0] == 0
    assert len(results.load(run / "results.json")) == 2
