"""metrics.jsonl, wandb without an account, warnings of collapse, the picture of the views."""

import json
import math

import pytest
import torch
from PIL import Image

from xdino.metrics import MetricsLog, collapse_warning, save_views


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_continued_log_tells_every_iteration_once(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for i in range(1, 6):
        log.write({"iteration": i, "loss": i / 3})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 6, "lo')  # killed while writing
    log = MetricsLog(tmp_path, 3)
    log.write({"iteration": 4, "loss": 0.5})
    log.close()
    assert [(r["iteration"], r["loss"]) for r in rows(tmp_path)] == [
        (1, 0.3333333), (2, 0.6666667), (3, 1.0), (4, 0.5),
    ]  # fmt: skip


@pytest.mark.slow
def test_wandb_offline_continues_the_same_run(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    ids = []
    for iteration in (0, 1):
        log = MetricsLog(tmp_path, iteration, "offline", "test", {"optim": {"lr": 1}})
        log.write({"iteration": iteration + 1, "loss": 1.0})
        log.write({"iteration": iteration + 1, "knn_top1": 50.0})  # at the same iteration
        log.write({"iteration": 1, "linear_top1": 60.0})  # and one that comes late
        ids.append(log._wandb.id)
        log.close()
    assert ids[0] == ids[1] == (tmp_path / "wandb-id.txt").read_text()
    kept = list(tmp_path.glob(f"wandb/offline-run-*-{ids[0]}/*.wandb"))
    assert kept
    for file in kept:
        assert all(name in file.read_bytes() for name in (b"loss", b"knn_top1", b"linear_top1"))


def test_collapse_is_said_in_words():
    K = 64
    flat = {"teacher_entropy": math.log(K), "kl": 0.0, "centre_norm": 0.0}
    assert "ln K = 4.159" in collapse_warning(math.log(K), flat, K)
    point = {"teacher_entropy": 1e-6, "kl": 1e-6, "centre_norm": 9.0}
    assert "same prototype" in collapse_warning(2e-6, point, K)
    healthy = {"teacher_entropy": 2.0, "kl": 0.5, "centre_norm": 1.0}
    assert collapse_warning(2.5, healthy, K) is None


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_picture_of_the_views(tmp_path, channels):
    groups = [torch.zeros(2, 3, channels, 16, 16), torch.ones(4, 3, channels, 8, 8)]
    save_views(tmp_path / "views.png", groups, [0.5] * channels, [0.25] * channels)
    picture = Image.open(tmp_path / "views.png")
    assert picture.size == (6 * (6 * 18 - 2), 6 * (3 * 18 - 2)), "six times as large as 16 pixels"
    assert picture.getpixel((0, 0)) == (128, 128, 128)  # zero is the mean
    assert picture.getpixel((6 * 2 * 18, 0)) == (191, 191, 191)  # one is a standard deviation above
