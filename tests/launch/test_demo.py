"""The demo from end to end, made short: the table, the rows behind it, the pictures."""

import json

import pytest
from PIL import Image

from xdino_launch import demo
from xdino_launch.demo import run_demo

SHORT = {
    "model.embed_dim": "16", "model.depth": "1", "head.prototypes": "32", "head.hidden_dim": "32",
    "train.epochs": "1", "train.batch_size": "2500", "crops.local_count": "0",
    "crops.global_size": "16", "evaluate.input_size": "16", "evaluate.resize": "16",
    "evaluate.every": "1", "evaluate.limit": "500",
}  # fmt: skip


@pytest.mark.slow
def test_the_demo_scores_three_kinds_of_features_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "STRENGTHS", (1e-2,))  # probes take nearly all of the time
    rows = run_demo(tmp_path / "demo", seed=1, overrides=SHORT)
    out = capsys.readouterr().out
    assert [row.features for row in rows[::2]] == [
        "raw pixels", "untrained network", "teacher, iteration 4",
    ] * 2  # fmt: skip
    stored = json.loads((tmp_path / "demo" / "results.json").read_text())
    best = [row for row in stored if row["settings"].get("weights") == "best"]
    assert best, "of the evaluations along the way"
    stored = stored[len(best) :]
    for row, kept in zip(rows, stored, strict=True):
        assert f"{row.top1:.1f}" in out, "every number in the table is in results.json"
        assert kept["top1"] == row.top1
        assert (row.train_size, row.val_size) == (10_000, 2_000)
    assert rows[6].top1 == pytest.approx(81.55, abs=0.05), "raw pixels do not depend on training"
    assert [row.data for row in rows[::6]] == ["fashion_mnist_scattered", "fashion_mnist_sample"]
    assert stored[2]["checkpoint"] != stored[4]["checkpoint"]
    pictures = tmp_path / "demo" / "attention"
    sheet = Image.open(pictures / "sheet.png")
    assert 0.5 < sheet.width / sheet.height < 2, "a grid, not a tower"
    assert max(sheet.size) < 2500
    assert len(list(pictures.glob("*-overlay.png"))) == 10
    assert len(list(pictures.glob("*"))) == 11
    again = run_demo(tmp_path / "demo", seed=1, overrides=SHORT)
    assert [r.top1 for r in again] == [r.top1 for r in rows]
    assert len(json.loads((tmp_path / "demo" / "results.json").read_text())) == len(best) + 12
