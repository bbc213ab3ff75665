"""What is said of a run at its end, and while it goes, from rows made by hand."""

import math

import pytest

from xdino_launch.report.next_commands import next_commands
from xdino_launch.report.verdict import BelowUntrained, Verdict, judge

K = 1024
LN_K = math.log(K)


def knn(*scores: float, chance: float | None = 1.6, images: int | None = 10_000, first: int = 0):
    """Rows of evaluations every 12 epochs of 10 iterations, from epoch `first` on."""
    rows = [
        {"iteration": 10 * epoch, "epoch": epoch, "knn_top1": score, "knn_top5": 99.0,
         "chance_top1": chance, "val_images": images}
        for epoch, score in zip(range(first, 10_000, 12), scores, strict=False)
    ]  # fmt: skip
    return [{k: v for k, v in row.items() if v is not None} for row in rows]


def loss(value: float, iteration: int = 900, **more: float):
    return {"iteration": iteration, "epoch": 90, "loss": value, **more}


def views(*agreements: float):
    return [
        {"iteration": 10 * epoch, "epoch": epoch, "quality_agreement": value,
         "quality_rankme": 5.0 + epoch, "chance_agreement": 0.1}
        for epoch, value in enumerate(agreements)
    ]  # fmt: skip


CASES = {
    "as in the README": (
        knn(9.8, 20.0, 35.0, 40.5, 41.7, 41.2), {},
        "learned", "k-NN 41.2; untrained 9.8; chance 1.6; best 41.7 at epoch 48"),
    "best last": (
        knn(9.8, 20.0, 41.2), {},
        "learned", "k-NN 41.2; untrained 9.8; chance 1.6; best at epoch 24, the last"),
    "the best twice": (
        knn(9.8, 41.2, 30.0, 41.2), {},
        "learned", "k-NN 41.2; untrained 9.8; chance 1.6; best at epoch 12"),
    "lost again": (
        knn(9.8, 43.0, 30.1), {},
        "fell",
        "learned, and lost some of it again: k-NN 30.1; untrained 9.8; chance 1.6; "
        "best 43.0 at epoch 12"),
    "equal": (
        knn(9.8, 9.8), {},
        "no better",
        "no better than untrained: k-NN 9.8; untrained 9.8; chance 1.6; best at epoch 12, the last"),
    "a little less": (
        knn(9.8, 9.9, 9.7), {},
        "no better",
        "no better than untrained: k-NN 9.7; untrained 9.8; chance 1.6; best 9.9 at epoch 12"),
    "much less": (
        knn(9.8, 5.0), {},
        "worse",
        "worse than untrained: k-NN 5.0; untrained 9.8; chance 1.6; best at epoch 12, the last"),
    "few images": (
        knn(50.0, 62.0, images=50), {},
        "unclear",
        "not clearly better than untrained: k-NN 62.0; untrained 50.0; chance 1.6; best at epoch 12, "
        "the last; of 50 images, differences up to 19.7 may be chance"),
    "nobody knows how many": (
        knn(50.0, 50.1, images=None), {},
        "learned", "k-NN 50.1; untrained 50.0; chance 1.6; best at epoch 12, the last"),
    "a run from before": (
        knn(41.2, first=12), {},
        "learned", "k-NN 41.2; chance 1.6; best at epoch 12, the last"),
    "at chance": (
        knn(1.6, first=12), {},
        "no better", "no better than chance: k-NN 1.6; chance 1.6; best at epoch 12, the last"),
    "neither": (
        knn(41.2, chance=None, first=12), {},
        "learned", "k-NN 41.2; best at epoch 12, the last"),
    "from weights": (
        knn(50.0, 70.0), {"start": "at the start"},
        "learned", "k-NN 70.0; at the start 50.0; chance 1.6; best at epoch 12, the last"),
    "under way": (
        [*knn(9.8, 41.2), loss(4.0)], {"finished": False},
        "learned", "so far: k-NN 41.2; untrained 9.8; chance 1.6; best at epoch 12, the last"),
    "not one step": (
        knn(9.8), {"finished": False},
        "begun", "before the first step: k-NN 9.8; chance 1.6"),
    "without labels": (
        views(12.1, 87.3), {},
        "learned",
        "agreement of two views 87.3; untrained 12.1; chance 0.1; RankMe 6.0, 5.0 at first; "
        "best at epoch 1, the last"),
    "without labels, nothing": (
        views(12.1, 12.0), {},
        "no better",
        "no better than untrained: agreement of two views 12.0; untrained 12.1; chance 0.1; "
        "RankMe 6.0, 5.0 at first; best at epoch 1, the last"),
    "not scored": (
        [loss(6.9, 1), loss(4.25)], {},
        "unscored", "not scored while training: loss 4.25, 6.90 at first; ln K 6.93"),
    "not scored, not moved": (
        [loss(6.9, 1), loss(6.93)], {},
        "at ln K", "nothing learned yet: loss 6.93; ln K 6.93, where every run begins"),
    "no prototypes": (
        [loss(0.9, 1), loss(0.5)], {"prototypes": None},
        "unscored", "not scored while training: loss 0.50, 0.90 at first"),
    "collapsed": (
        [*knn(9.8, 1.6), loss(LN_K, teacher_entropy=LN_K, kl=0.0)], {},
        "collapsed",
        "collapsed: the loss sits at ln K = 6.931: the teacher says nothing about any image; worse than "
        "untrained: k-NN 1.6; untrained 9.8; chance 1.6; best at epoch 12, the last"),
    "empty": ([], {"finished": False}, "empty", "nothing was logged yet"),
    "damaged": (
        [{"iteration": 0, "knn_top1": "x"}, {"iteration": 1, "loss": float("nan")},
         {"iteration": 2, "knn_top1": float("inf")}, {"iteration": 3, "val_images": -1}], {},
        "empty", "nothing was logged yet"),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "how", "kind", "sentence"), CASES.values(), ids=CASES)
def test_the_verdict(rows, how, kind, sentence):
    found = judge(rows, **{"prototypes": K, **how})
    assert (found.kind, found.sentence) == (kind, sentence)
    assert bool(found.advice) == (kind not in ("learned", "begun", "empty"))


def test_a_verdict_in_numbers():
    found = judge([*knn(9.8, 42.0, 41.2), loss(4.0)], K)
    numbers = ("k-NN", 41.2, 9.8, 1.6, 42.0, 12, 90, 4.0, LN_K)
    assert found == Verdict("learned", found.sentence, "", *numbers)
    assert found.plain()["best_epoch"] == 12


def test_a_score_below_the_untrained_network_is_said_once_a_spell():
    def told(scores, **how):
        alarm, rows = BelowUntrained(), knn(*scores, **how)
        return [alarm.look(rows[: i + 1]) for i in range(len(rows))]

    found = told([30.0, 29.9, 20.0, 20.0, 29.0, 15.0, 31.0, 35.0, 10.0])
    assert [i for i, words in enumerate(found) if words] == [2, 8], "once, and after it recovered"
    assert found[2].startswith("k-NN 20.0 has fallen below the untrained network's 30.0: ")
    assert "lower optim.lr" in found[2]
    assert not any(told([30.0, 20.0], images=20)), "so few images may differ so much"
    assert not any(told([30.0, 20.0], first=12)), "of what was there before the first step"
    alarm = BelowUntrained("at the start")
    assert "below that of the start, 30.0" in alarm.look(knn(30.0, 1.0))


def test_what_to_type_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "a run"
    lines = dict(next_commands(run, "fashion_mnist_sample"))
    assert lines["the k-NN score, on all images"] == (
        f"xdino knn '{run}' --data fashion_mnist_sample"
    )
    assert lines["a picture of what it looks at"].endswith(f"IMAGE.jpg --out '{run}/attention'")
    (tmp_path / "photos; rm").mkdir()
    (tmp_path / "photos; rm" / "notes.txt").touch()
    (tmp_path / "photos; rm" / "it's.JPG").touch()
    found = [line for _, line in next_commands("-run", "photos; rm")]
    assert [line.split()[1] for line in found] == ["quality", "attention", "neighbours", "export"]
    assert found[0] == "xdino quality ./-run --data 'photos; rm'"
    assert """'photos; rm/it'"'"'s.JPG' --out ./-run/attention""" in found[1]
    for split in ("train", "val"):
        (tmp_path / "photos; rm" / split / "cat").mkdir(parents=True)
    (tmp_path / "photos; rm" / "val" / "cat" / "1.png").touch()
    found = [line for _, line in next_commands("run", "photos; rm")]
    assert "knn" in found[0]
    assert "photos; rm/val/cat/1.png" in found[2], "a held-out one"
    assert next_commands("run", "no\0thing")
    assert next_commands("run", "x" * 5000)
